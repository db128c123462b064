"""Python loads this at the start of every process of ``gpu_check.py``, whose commands have this folder on their path.

Environment:
    GPU_CHECK_COMPILATIONS   a file, to which each kernel that Triton compiles, or finds in its cache, adds a line
    GPU_CHECK_DRY            the CPU takes the place of the GPU; "compile": Triton compiles each kernel for it,
                             "launch": it is called, but compiles nothing
    GPU_CHECK_ARCHITECTURE   the GPU's compute capability, without its dot; 90 unless told
    GPU_CHECK_DRY_CASES      of the proof's cases, every so-manyth and the first of each kind; 1 unless told
"""

from __future__ import annotations

import contextlib
import importlib.abc
import os
import sys
from collections.abc import Callable
from types import ModuleType


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module, once, as soon as it has been imported."""

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]) -> None:
        self.actions = actions

    def find_spec(self, name, path=None, target=None):
        if name not in self.actions:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def executed(module: ModuleType) -> None:
                execute(module)
                self.actions.pop(name)(module)

            spec.loader.exec_module = executed
        return spec


def write_down_compilations(knobs: ModuleType) -> None:
    def listener(*, src, times, cache_hit, **rest) -> None:
        # One short write at the end of the file, which does not mix with those of other processes.  Not worth an
        # error: it would be the compilation's.
        with contextlib.suppress(Exception), open(os.environ["GPU_CHECK_COMPILATIONS"], "a") as file:
            file.write(f"{'found' if cache_hit else 'compiled'} {src.name} {times.total / 1e6:.3f}\n")

    knobs.compilation.listener = listener


def actions() -> dict[str, Callable[[ModuleType], None]]:
    found = {}
    if os.environ.get("GPU_CHECK_COMPILATIONS"):
        found["triton.knobs"] = write_down_compilations
    if os.environ.get("GPU_CHECK_DRY"):
        import dry_kernels
        import dry_torch

        found["torch"] = dry_torch.install
        found["grpo_kernels.proof"] = dry_kernels.fewer_cases
        found["grpo_kernels.backends.triton"] = dry_kernels.triton
        found["grpo_kernels.backends.native_cuda"] = dry_kernels.cuda
    return found


sys.meta_path.insert(0, AfterImport(actions()))
