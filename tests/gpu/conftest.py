"""Tests that need an NVIDIA GPU; ``make gpu-check OUT=DIR`` runs them where there is one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

# Tests ask for deterministic algorithms, for which cuBLAS wants this; without it a warning, here an error, says so.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # kernel_cases.py, which both folders use

WANTED = [name for name in os.environ.get("GRPO_KERNELS_TEST_BACKENDS", "").split(",") if name]


def pytest_collection_modifyitems(items):
    """Where there is no GPU these are skipped, unless a backend was asked for by name: then they run, and fail."""
    here = Path(__file__).parent
    absent = not torch.cuda.is_available() or torch.version.hip is not None
    skip = pytest.mark.skip(reason="PyTorch sees no NVIDIA GPU here")
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if absent and not WANTED:
                item.add_marker(skip)


@pytest.fixture(params=[name for name in ("triton", "cuda") if not WANTED or name in WANTED])
def backend(request):
    """Each GPU backend by name; skipped where it is not here, unless GRPO_KERNELS_TEST_BACKENDS asks for it."""
    from grpo_kernels import available_backends

    reason = available_backends()[request.param]
    if reason is not None:
        (pytest.fail if WANTED else pytest.skip)(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def _give_memory_back():
    """The large cases need most of a small GPU each."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
