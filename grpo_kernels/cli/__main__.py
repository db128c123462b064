"""``python -m grpo_kernels.cli``, which torchrun can start."""

from . import run

run()
