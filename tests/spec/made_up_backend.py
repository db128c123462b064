"""A proof of a made-up backend, in the place of ``python -m grpo_kernels.proof``: right, wrong, or worse.

    python made_up_backend.py MODE --backend NAME --device cpu

PROOFS_MADE in the environment is a file that gets a line for each proof that was started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import types

import torch

from grpo_kernels import backends as _  # noqa: F401 - the package, before its registry is changed
from grpo_kernels.backends import torch_ops
from grpo_kernels.proof import __main__ as proof
from grpo_kernels.proof import cases as all_cases

registry = sys.modules["grpo_kernels.backends"]

FAULTY_CASE = "one row, bfloat16"


def few(place, *, quick):
    """Cases enough to call every operation, and no more: the proofs of these tests should take no time."""
    print("what is printed meanwhile goes to the report")
    wanted = (FAULTY_CASE, "one row, float32", "no pairs", "7 words from element 3, float32")
    return [case for case in all_cases(place, quick=quick) if case.name in wanted]


def faulty(mode):
    """``token_logps_fwd`` of plain PyTorch until bfloat16 comes, then what ``mode`` says."""

    def token_logps_fwd(logits, targets, logps, lse, *, ignore_index):
        torch_ops.token_logps_fwd(logits, targets, logps, lse, ignore_index=ignore_index)
        if logits.dtype is not torch.bfloat16 or mode == "right":
            return
        if mode == "wrong":
            logps += 1e-3
        elif mode == "segfault":
            ctypes.string_at(0)
        elif mode == "abort":
            os.abort()
        elif mode == "hang":
            time.sleep(600)
        elif mode == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif mode == "exit":
            os._exit(7)
        elif mode == "holds":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
            time.sleep(600)
        elif mode == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return token_logps_fwd


def made_up(mode):
    """The module of the backend."""
    module = types.SimpleNamespace(**{name: getattr(torch_ops, name) for name in registry.OPERATIONS})
    module.unavailable_reason = lambda: None
    module.unsupported_reason = lambda device, dtype: None
    module.token_logps_fwd = faulty(mode)
    return module


if __name__ == "__main__":
    mode = sys.argv.pop(1)
    with open(os.environ["PROOFS_MADE"], "a") as file:
        file.write(f"{mode}\n")
    name = sys.argv[sys.argv.index("--backend") + 1]
    registry._MODULES = {name: name, "torch": "torch_ops"}
    registry._load = lambda asked: torch_ops if asked == "torch" else made_up(mode)
    loaded = {asked: registry._load(asked) for asked in registry._MODULES}
    registry._load = loaded.__getitem__
    proof.cases = few
    print("{}\n[]\nnull\n7", '{"event": "end"}\n{"event": "done", "passed": true}\n{"level": "info"}', end="")
    if "PACKAGE_HASH" in os.environ:
        proof.package_hash = lambda: os.environ["PACKAGE_HASH"]
    sys.exit(proof.main())
