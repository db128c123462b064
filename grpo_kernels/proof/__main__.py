"""The process that a proof runs in: ``python -m grpo_kernels.proof --backend NAME --device DEVICE [--full]``.

Standard output is one JSON object a line, for ``backends/child.py``; whatever else is printed, by kernels and
compilers too, goes to standard error.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from typing import Any

import torch

from ..backends import OPERATIONS
from ..backends.cache import describe_device, package_hash
from ..backends.child import NO_VERDICT
from ..types import UnavailableBackendError
from . import Mismatch, Place, cases


def main() -> int:
    """Run the cases and report each; the exit status is 0 where the report is complete."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo_kernels.proof",
        description="Check a backend's kernels on a device, one JSON object a line.",
    )
    parser.add_argument("--backend", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--full", action="store_true", help="all cases instead of the quick ones")
    parser.add_argument("--end-with-stdin", action="store_true", help="end as soon as standard input does")
    options = parser.parse_args()
    if options.end_with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    report = _Report()
    # An output element that a kernel forgets to write must not look right by luck.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    place, calls = Place(options.backend, options.device), Counter[str]()
    try:
        _count_calls(place.module, calls)
        wanted = cases(place, quick=not options.full)
    except Exception as error:
        traceback.print_exc()
        report(event="none", reason=_sentence(error))
        return 0
    device = describe_device(torch.device(options.device))["device"]
    report(event="start", source=package_hash(), device=device, cases=len(wanted))
    for case in wanted:
        about: dict[str, Any] = {"operations": list(case.operations), "name": case.name}
        report(event="case", **about)
        start, message = time.monotonic(), ""
        try:
            case.run()
            _synchronize(place)
        except Mismatch as error:
            message = str(error)
        except Exception as error:
            traceback.print_exc()
            if no_verdict(error):
                report(event="none", reason=f"{_sentence(error)} (in {case.name})")
                return 0
            message = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - start
        report(event="done", **about, passed=not message, seconds=float(round(seconds, 3)), message=message)
        if message and not _usable(place):
            break  # a device that has faulted answers every call with the same error
    else:
        unused = {name for name in OPERATIONS if hasattr(place.module, name)} - set(calls)
        if unused:
            report(event="none", reason=f"no case called {', '.join(sorted(unused))}")
            return 0
    report(event="end", calls=dict(calls))
    return 0


def _end_with_stdin() -> None:
    """End where the parent, which holds the other end, is gone: a case that hangs would keep the device for good."""
    while os.read(0, 4096):
        pass
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # compilers that were started, too
    os._exit(1)


class _Report:
    """Writes events to what standard output was; standard output itself is standard error from here on."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._out.write("\n")  # what an import may have printed is no part of the first event

    def __call__(self, **event: Any) -> None:
        self._out.write(json.dumps(event) + "\n")
        self._out.flush()


def _count_calls(module: Any, calls: Counter[str]) -> None:
    """Count the calls of each operation, the public functions' calls among them."""
    for name in OPERATIONS:
        function = getattr(module, name, None)
        if function is not None:
            setattr(module, name, _counted(name, function, calls))


def _counted(name: str, function: Any, calls: Counter[str]) -> Any:
    @functools.wraps(function)
    def counted(*arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        return function(*arguments, **options)

    return counted


def no_verdict(error: BaseException) -> bool:
    """Whether the error says something about the machine and nothing about the kernels.

    A C compiler that fails (on Triton's launcher, which it compiles where it is used) is the machine's: Python's
    headers may be missing.
    """
    kinds = (torch.OutOfMemoryError, MemoryError, ImportError, OSError, UnavailableBackendError)
    if isinstance(error, (*kinds, subprocess.CalledProcessError)):
        return True
    return any(part.lower() in str(error).lower() for part in NO_VERDICT)


def _sentence(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


def _synchronize(place: Place) -> None:
    """A kernel's fault belongs to the case that launched it."""
    if place.device.startswith("cuda"):
        torch.cuda.synchronize(place.device)


def _usable(place: Place) -> bool:
    try:
        _synchronize(place)
    except Exception:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
