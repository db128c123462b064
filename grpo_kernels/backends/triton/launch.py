"""What every launcher needs: the right device, and options that only one vendor's compiler has."""

from __future__ import annotations

import contextlib

import torch
import triton.runtime.jit


def interpreting(kernel: object) -> bool:
    """Whether the kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` when they were first imported)."""
    return not isinstance(kernel, triton.runtime.jit.JITFunction)


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def register_limit(registers: int | None) -> dict[str, int]:
    """The launch option for at most so many registers a thread, which NVIDIA's compiler has and AMD's has not."""
    return {} if registers is None or torch.version.hip is not None else {"maxnreg": registers}
