"""The proof of a backend in a process of its own: started, watched, and told apart by how it ended.

A kernel that faults takes the GPU context of its process with it, so no proof runs in the user's process.  The child is
``python -m grpo_kernels.proof``; it writes one JSON object a line, and how it ends says what is known:

    every case passed                                              passed
    a case outside the budget, a kernel that does not compile,     failed
        a crash (SIGSEGV, SIGABRT, illegal memory access, ...)
    out of memory, the device busy, no C compiler, the time        no verdict
        limit, killed from outside
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .cache import PACKAGE, describe_device, package_hash

CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "SIGTRAP", "SIGSYS")
"""Signals that a program raises by itself, as against those that come from outside (SIGKILL, SIGTERM, SIGINT)."""

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

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
    """How the child is started."""
    arguments = ["--backend", name, "--device", str(device)]
    return [sys.executable, "-m", "grpo_kernels.proof", *arguments, *(["--full"] if full else [])]


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
    with tempfile.TemporaryFile() as printed:
        try:
            process = subprocess.Popen(
                command(name, device, full), env=_environment(environment or {}), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=printed, start_new_session=True, text=True, errors="replace",
            )  # fmt: skip
        except (OSError, ValueError) as error:
            return Run("none", f"no process could be started ({error})")
        try:
            outcome = _watch(process, device, start + seconds, seconds, progress)
        finally:
            _end(process)
        printed.seek(0)
        outcome.output = printed.read().decode(errors="replace")[-200_000:]
    if outcome.status == "none" and not outcome.cases and outcome.output.strip():
        outcome.reason += f" ({outcome.output.strip().splitlines()[-1][:200]})"  # why it did not even start, say
    outcome.seconds = time.monotonic() - start
    return outcome


def _environment(extra: dict[str, str]) -> dict[str, str]:
    variables = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
    # Packages are found where this process finds them, this one first.
    variables["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(PACKAGE.parent), *filter(None, sys.path)]))
    # The child checks the kernels that are named, with the block sizes of the tables.
    variables |= {"GRPO_KERNELS_PROVE": "never", "GRPO_KERNELS_TUNED": "never", "PYTHONFAULTHANDLER": "1"}
    variables.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return {**variables, **extra}


def _watch(
    process: subprocess.Popen, device: torch.device, ends: float, seconds: float, progress: Progress | None
) -> Run:
    """Follow the events until the process ends or its time is up."""
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    cases: list[CaseResult] = []
    running: dict[str, Any] = {}
    last: dict[str, Any] = {}
    while True:
        try:
            line = lines.get(timeout=max(ends - time.monotonic(), 0))
        except queue.Empty:
            what = f" in {_title(running)}" if running else ""
            return Run("none", f"it was stopped after {seconds:.0f} s{what}", cases)
        if line is None:
            break
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event["event"] == "start":
            if event["source"] != package_hash():
                return Run("none", "the process found another grpo_kernels than this one")
            if event["device"] != describe_device(device)["device"]:  # CUDA_VISIBLE_DEVICES was changed meanwhile
                return Run("none", f"the process found {event['device']} as {device}")
        if event["event"] == "case":
            running = event
        elif event["event"] == "done":
            cases.append(CaseResult(**{key: event[key] for key in CaseResult.__dataclass_fields__}))
            running = {}
        else:
            last = event
        if progress is not None:
            progress(event)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    return _outcome(process.returncode, cases, running, last)


def _outcome(code: int | None, cases: list[CaseResult], running: dict[str, Any], last: dict[str, Any]) -> Run:
    if last.get("event") == "none":
        return Run("none", last["reason"], cases)
    failures = [case for case in cases if not case.passed]
    if failures:
        others = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
        first = failures[0]
        return Run(
            "failed", f"{_title(vars(first))}{others}: {_first_line(first.message)}", cases, last.get("calls", {})
        )
    if code == 0 and last.get("event") == "end" and cases:
        return Run("passed", "", cases, last["calls"])
    where = _title(running) if running else "starting"
    if code is not None and code < 0:
        name = _signal_name(-code)
        if name in CRASHES:
            message = f"the process crashed with {name}"
            if running:
                cases.append(CaseResult(running["operations"], running["name"], False, 0.0, message))
            return Run("failed", f"{where}: {message}", cases)
        return Run("none", f"the process was ended by {name} in {where}", cases)
    return Run("none", f"the process ended with exit status {code} in {where}", cases)


def _title(case: dict[str, Any]) -> str:
    return f"{'+'.join(case['operations'])}: {case['name']}"


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0][:300]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _read(stream: Any, lines: queue.Queue[str | None]) -> None:
    with contextlib.suppress(ValueError, OSError):  # closed under a process that was stopped
        for line in stream:
            lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen) -> None:
    """End the child and whatever it started; compilers are processes too."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    if process.stdout is not None:
        with contextlib.suppress(OSError):
            process.stdout.close()
