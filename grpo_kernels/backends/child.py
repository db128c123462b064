"""The proof of a backend in a process of its own: started, watched, and told apart by how it ended.

A kernel that faults takes the GPU context of its process with it, so no proof runs in the user's process.  The child
is ``python -m grpo_kernels.proof`` with this process's ``sys.path``; it writes one JSON object a line, and how it ends
says what is known:

    every case passed                                              passed
    a case outside the budget, a kernel that does not compile,     failed
        a crash in a case (SIGSEGV, SIGABRT, ...)
    out of memory, the device busy, no C compiler, the time        no verdict
        limit, killed from outside, a crash before the first case
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .cache import PACKAGE, describe_device, package_hash

CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "SIGTRAP")
"""Signals that a program raises by itself, as against those that come from outside (SIGKILL, SIGTERM, SIGINT)."""

NO_VERDICT = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "busy or unavailable",
    "no CUDA-capable device",
    "driver initialization failed",
    "system not yet initialized",
    "uncorrectable ECC error",
    "the launch timed out and was terminated",
    "active drivers",
    "Failed to find C compiler",
    "Cannot find ptxas",
    "can't start new thread",
    "Resource temporarily unavailable",
    "No space left on device",
)
"""Parts of messages that say nothing about the kernels: the device or the machine had no room, or lacks a tool."""

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_START = (
    "import sys; sys.path[:] = sys.argv.pop(1).split('\\n'); import runpy; "
    "runpy.run_module('grpo_kernels.proof', run_name='__main__', alter_sys=True)"
)
"""Before anything but ``sys`` is imported: the working directory may hold a json.py, or another grpo_kernels."""

_KEPT_OUTPUT = 200_000
_LONGEST_LINE = 1 << 20

Status = Literal["passed", "failed", "none"]


@dataclass
class CaseResult:
    """What became of one case."""

    operations: list[str]
    name: str
    passed: bool
    seconds: float
    message: str = ""


@dataclass
class Run:
    """What became of a proof."""

    status: Status
    reason: str = ""
    """One sentence where the status is not "passed"."""
    cases: list[CaseResult] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    """How often each operation of the boundary was called."""
    seconds: float = 0.0
    output: str = ""
    """What the child printed: tracebacks, messages of compilers."""

    @property
    def failures(self) -> list[CaseResult]:
        return [case for case in self.cases if not case.passed]

    def report(self) -> str:
        """Everything that is known, for a file."""
        lines = [f"status: {self.status}", f"reason: {self.reason}", f"seconds: {self.seconds:.1f}", ""]
        for case in self.cases:
            lines.append(f"{'passed' if case.passed else 'FAILED'}  {'+'.join(case.operations)}: {case.name}")
            lines += [f"    {line}" for line in case.message.splitlines()]
        return "\n".join([*lines, "", "output of the process", "---------------------", self.output, ""])


Progress = Callable[[dict[str, Any]], None]


def command(name: str, device: torch.device, full: bool) -> list[str]:
    """How the child is started: it ends with this process, which holds the other end of its standard input."""
    paths = [os.path.abspath(path) for path in sys.path if isinstance(path, str)]
    paths = list(dict.fromkeys([*paths, str(PACKAGE.parent)]))
    arguments = ["--backend", name, "--device", str(device), "--end-with-stdin", *(["--full"] if full else [])]
    return [sys.executable, "-c", _START, "\n".join(paths), *arguments]


def run(
    name: str,
    device: torch.device,
    *,
    seconds: float,
    full: bool = False,
    environment: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> Run:
    """Prove a backend on a device.

    Args:
        name: of the registry.
        device: where it runs.
        seconds: time limit.
        full: all cases instead of the quick ones.
        environment: variables of the child besides this process's own.
        progress: called with every event of the child, in this thread.

    Returns:
        The outcome; a child that could not be started is one without a verdict.
    """
    start = time.monotonic()
    if not sys.executable:
        return Run("none", "this Python does not know its own executable, so no process can be started")
    try:
        printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed below, where it is read
    except OSError as error:
        return Run("none", f"no temporary file could be made ({error})")
    with printed:
        try:
            process = subprocess.Popen(
                command(name, device, full), env=_environment(environment or {}), stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=printed, start_new_session=True, bufsize=0,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError) as error:
            return Run("none", f"no process could be started ({error})")
        seen = _Seen()
        try:
            late = _follow(process, device, start + seconds, seen, progress)
        finally:
            _end(process)
        printed.seek(max(printed.seek(0, os.SEEK_END) - _KEPT_OUTPUT, 0))
        output = printed.read().decode(errors="replace")
    outcome = _outcome(None if late else process.returncode, seen, output, seconds)
    outcome.output, outcome.seconds = output, time.monotonic() - start
    return outcome


def _environment(extra: dict[str, str]) -> dict[str, str]:
    variables = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
    # The child checks the kernels that are named, with the block sizes of the tables.
    variables |= {"GRPO_KERNELS_PROVE": "never", "GRPO_KERNELS_TUNED": "never", "PYTHONFAULTHANDLER": "1"}
    variables.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return {**variables, **extra}


# ---------------------------------------------------------------------------------------------- what the child says

_FIELDS: dict[str, dict[str, Any]] = {
    "start": {"source": str, "device": str, "cases": int},
    "case": {"operations": list, "name": str},
    "done": {"operations": list, "name": str, "passed": bool, "seconds": float, "message": str},
    "none": {"reason": str},
    "end": {"calls": dict},
}
"""What an event must hold; a line that does not is something else that was printed."""


@dataclass
class _Seen:
    """What the child has said so far."""

    expected: int | None = None
    """Cases that it has, once it has started."""
    cases: list[CaseResult] = field(default_factory=list)
    running: dict[str, Any] | None = None
    reason: str = ""
    """Why there is no verdict, where it or this process says so."""
    calls: dict[str, int] | None = None
    """Of the operations, once it has ended."""


def _follow(
    process: subprocess.Popen, device: torch.device, ends: float, seen: _Seen, progress: Progress | None
) -> bool:
    """Read the events until the process ends; whether its time was up before."""
    for line in _lines(process, ends):
        event = None if line is None else _event(line)
        if line is None:
            return True
        if event is None:
            continue
        kind = event["event"]
        if kind == "start":
            seen.expected = event["cases"]
            if event["source"] != package_hash():
                seen.reason = "the process found another grpo_kernels than this one"
            elif event["device"] != describe_device(device)["device"]:  # CUDA_VISIBLE_DEVICES was changed meanwhile
                seen.reason = f"the process found {event['device']} as {device}"
            if seen.reason:
                return False
        elif kind == "case":
            seen.running = event
        elif kind == "done":
            seen.cases.append(CaseResult(**{key: event[key] for key in _FIELDS["done"]}))
            seen.running = None
        elif kind == "none":
            seen.reason = event["reason"]
        else:
            seen.calls = event["calls"]
        if progress is not None:
            progress(event)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5 if seen.calls is None else 30)
    return False


def _lines(process: subprocess.Popen, ends: float) -> Iterator[bytes | None]:
    """Lines of standard output; None where the time is up.  Something that outlives the child may hold its pipe."""
    stream = process.stdout.fileno() if process.stdout is not None else -1
    held = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            left = ends - time.monotonic()
            if left <= 0:
                yield None
                return
            if not selector.select(min(left, 1.0)):
                if process.poll() is not None:
                    return
                continue
            read = os.read(stream, 1 << 16)
            if not read:
                return
            *lines, held = (held + read).split(b"\n")
            yield from lines
            held = held[:_LONGEST_LINE]


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
        fields = _FIELDS[event["event"]]
        return event if all(isinstance(event[name], kind) for name, kind in fields.items()) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


# ---------------------------------------------------------------------------------------------- what that means


def _outcome(code: int | None, seen: _Seen, output: str, seconds: float) -> Run:
    """``code`` is None where the process was stopped at its time limit."""
    cases, calls = seen.cases, seen.calls or {}
    failures = [case for case in cases if not case.passed]
    signal_name = _signal_name(-code) if code is not None and code < 0 else ""
    blameless = next((text for text in NO_VERDICT if text.lower() in output[-4000:].lower()), None)
    if signal_name in CRASHES and seen.running is not None and not seen.reason and blameless is None:
        message = f"the process crashed with {signal_name}"
        failures.append(CaseResult(seen.running["operations"], seen.running["name"], False, 0.0, message))
        cases.append(failures[-1])
    if failures:  # whatever happened afterwards
        others = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
        reason = f"{_title(vars(failures[0]))}{others}: {_first_line(failures[0].message)}"
        return Run("failed", reason, cases, calls)
    if seen.reason:
        return Run("none", seen.reason, cases)
    if seen.calls is not None and cases and len(cases) == seen.expected:
        return Run("passed", "", cases, calls)  # complete, however the process ended after it
    where = _title(seen.running) if seen.running else "starting" if not cases else "ending"
    if code is None:
        return Run("none", f"it was stopped after {seconds:.0f} s in {where}", cases)
    if signal_name:
        how = f"was ended by {signal_name}"
    else:
        how = f"ended with exit status {code}"
    why = f" ({blameless})" if blameless else f" ({_last_line(output)})" if not cases and output.strip() else ""
    return Run("none", f"the process {how} in {where}{why}", cases)


def _title(case: dict[str, Any]) -> str:
    return f"{'+'.join(map(str, case['operations']))}: {case['name']}"


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0][:300]


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:200]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _end(process: subprocess.Popen) -> None:
    """End the child and whatever it started; compilers are processes too."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
