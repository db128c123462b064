"""Which backends the parity tests run, on which devices; the cases themselves are in ``grpo_kernels.proof``.

Environment:
    GRPO_KERNELS_TEST_BACKENDS   "cpu,triton": only these, and it is an error if one of them cannot run here
    TRITON_INTERPRET=1           the triton backend runs on the CPU, on small shapes (and see cuda_emulator.py)
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

from grpo_kernels.backends import available_backends, choose
from grpo_kernels.proof import Case, Place, cases
from grpo_kernels.types import UnavailableBackendError


def places() -> list[Place]:
    """Every backend on every device where it runs in this process, or those the environment names."""
    wanted = [name for name in os.environ.get("GRPO_KERNELS_TEST_BACKENDS", "").split(",") if name]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = [
        Place(name, device) for name in wanted or available_backends() for device in devices if _runs(name, device)
    ]
    missing = set(wanted) - {place.name for place in found}
    if missing:
        raise RuntimeError(f"asked to test {sorted(missing)}, which cannot run here: {available_backends()}")
    return found


def _runs(name: str, device: str) -> bool:
    try:
        choose(name, torch.device(device), torch.float32)
    except UnavailableBackendError:
        return False
    return True


def every_case() -> list[tuple[Place, Case]]:
    """The parity matrix in full."""
    return [(place, case) for place in places() for case in cases(place)]


def case_id(value: object) -> str:
    """A case as a test's name: its operations, then what it checks."""
    if isinstance(value, Case):
        return f"{'+'.join(value.operations)}: {value.name}"
    return str(value).removeprefix("torch.")


def load(name: str) -> ModuleType:
    return importlib.import_module(f"grpo_kernels.backends.{name}")
