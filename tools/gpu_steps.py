"""Commands under limits, for ``gpu_check.py``: one log, a section of it for each, and a line for each step.

A command that fails, or is stopped, keeps none of the others from running, but for those of a backend that is broken.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("triton", "cuda")

MARK = "GPU_CHECK_RUN"
"""Variable of all processes of a run, by which those are found that outlive their command."""

SECTION_BYTES = 1 << 20
"""Of the log, at most this of one command: of what prints without end, the beginning and the end."""

PASSED, FAILED, SKIPPED, PARTLY = "passed", "FAILED", "skipped", "partly"
"""``PARTLY``: nothing failed, and there was no time for all of it."""


class Command(NamedTuple):
    """One process of a step."""

    title: str
    arguments: list[str]
    environment: Mapping[str, str] = {}
    seconds: float = float("inf")
    """Its own limit, so that what hangs leaves time to the rest of its step."""
    backend: str = ""
    """The one that it is about: it waits for what that needs, and is left out once that is broken."""
    alone: bool = False
    """Whether it waits for everything that runs beside the steps: what it measures would be slower."""


class Step(NamedTuple):
    """Commands that run one after the other."""

    name: str
    seconds: float
    """That it has in any case, if the steps before it kept to theirs."""
    most: float
    """That it may take where the steps before it left time."""
    commands: Callable[[Mapping[str, str]], list[Command]]
    """Given the broken backends, and why they are taken for that."""
    after: Callable[[], None] = lambda: None
    """What brings its results to the output folder, however the commands ended."""
    decides: bool = False
    """Whether a backend whose command fails here is broken for all that comes later."""


class Result(NamedTuple):
    """A line of the summary."""

    step: str
    status: str
    seconds: float
    detail: str


class Log:
    """One file for all commands; what was printed is there at once, so that nothing is lost when the run is stopped."""

    def __init__(self, path: Path) -> None:
        self.path, self.begin = path, 0

    @contextlib.contextmanager
    def section(self, title: str) -> Iterator[IO[str]]:
        """The file, open for what a command prints below its title."""
        with self.path.open("a", errors="replace") as file:
            file.write(f"\n$ {title}\n")
            file.flush()
            self.begin = file.tell()
            yield file
        self.trim()

    def trim(self) -> None:
        """Of a section that is too long, the middle goes."""
        with self.path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END) - self.begin
            if size > SECTION_BYTES:
                half = SECTION_BYTES // 2
                file.seek(-half, os.SEEK_END)
                tail = file.read()
                file.seek(self.begin + half)
                file.write(f"\n... {size - 2 * half} bytes left out ...\n".encode() + tail)
                file.truncate()

    def lines(self) -> list[str]:
        """Of the last section, those that hold something."""
        with self.path.open(errors="replace") as file:
            file.seek(self.begin)
            return [line.rstrip() for line in file if line.strip()]

    def last_line(self) -> str:
        return next(iter(self.lines()[-1:]), "").strip()


class Runner:
    """Runs steps, and beside them, until one needs it or has to be alone, what was begun with :meth:`beside`."""

    def __init__(self, log: Log, environment: Mapping[str, str] | None = None) -> None:
        self.log, self.environment = log, dict(environment or {})
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self.broken: dict[str, str] = {}
        self.running: list[tuple[Command, subprocess.Popen | None, float, Path]] = []

    # ---- steps

    def run(
        self,
        steps: list[Step],
        ends: float,
        told: Callable[[list[Result]], None] = lambda results: None,
        note: Callable[[], str] = lambda: "",
    ) -> list[Result]:
        """Every step in its turn, until ``time.monotonic()`` is ``ends``; none is begun once every backend is broken.

        Args:
            steps: in order.
            ends: of all of them; each leaves those after it the seconds that are theirs, but has its own in any case:
                the last ones lose what something before the steps has taken.
            told: is given the results so far after every step, so that a run that is stopped has left them.
            note: what to add to the line of the step that has just ended.
        """
        results: list[Result] = []
        for place, step in enumerate(steps):
            if self.broken.keys() >= set(BACKENDS):
                results.append(Result(step.name, SKIPPED, 0, "; ".join(self.broken.values())))
            else:
                print(f"gpu-check: {step.name} ...", flush=True)
                reserved = sum(later.seconds for later in steps[place + 1 :])
                results += self.run_step(step, min(ends, max(ends - reserved, time.monotonic() + step.seconds)))
                last = results[-1]._replace(detail="; ".join(filter(None, (results[-1].detail, note()))))
                results[-1] = last
                print(f"gpu-check: {last.step} {last.status} in {last.seconds:.0f} s: {last.detail[:200]}", flush=True)
            told(results)
        return results

    def run_step(self, step: Step, ends: float) -> list[Result]:
        """All commands of the step, however the ones before ended, until its time is up.

        The result of what ran beside the steps and was waited for stands before that of the step.
        """
        begin = time.monotonic()
        ends = min(begin + step.most, ends)
        failures, skipped, late, results = [], [], [], []
        line = ""
        try:
            commands = step.commands(self.broken)
        except Exception as error:
            commands, failures = [], [f"{type(error).__name__}: {error}"]
        for command in commands:
            results += self.wait_for_what_it_needs(command, ends)
            missing = [job.title for job, *_ in self.running if needs(command, job)]
            if missing:
                late.append(f"{command.title}: no time left, {' and '.join(missing)} has not ended")
                continue
            if command.backend in self.broken:
                skipped.append(f"{command.title}: skipped ({self.broken[command.backend]})")
                continue
            left = min(ends - time.monotonic(), command.seconds)
            if left <= 1:
                late.append(f"{command.title}: no time left")
                continue
            failure, line = self.run_command(command, left)
            if failure:
                failures.append(f"{command.title}: {failure}")
                if step.decides and command.backend:
                    self.broken[command.backend] = f"{command.backend}: {step.name} failed"
        try:
            step.after()
        except Exception as error:
            failures.append(f"results: {type(error).__name__}: {error}")
        status = FAILED if failures else PARTLY if late else PASSED
        if skipped and len(skipped) == len(commands):
            status = SKIPPED
        detail = "; ".join([*failures, *late, *skipped]) or line
        return [*results, Result(step.name, status, time.monotonic() - begin, detail)]

    def run_command(self, command: Command, seconds: float) -> tuple[str, str]:
        """What was wrong with it, empty where nothing was; and the last line that it printed."""
        with self.log.section(describe(command)) as file:
            process = self.start(command, file)
            status = 127 if process is None else wait(process, seconds)
        end_marked(self.mark, {job.pid for _, job, _, _ in self.running if job is not None})
        line = self.log.last_line()
        if status is None:
            return f"stopped after {seconds:.0f} s", line
        return (f"exit status {status}: {line[:160]}" if status else ""), line

    def start(self, command: Command, file: IO[str]) -> subprocess.Popen | None:
        environment = {**os.environ, **self.environment, **command.environment, MARK: self.mark}
        paths = [self.environment.get("PYTHONPATH"), str(ROOT), os.environ.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        try:
            return subprocess.Popen(
                command.arguments, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            file.write(f"{error}\n")
            return None

    # ---- beside them

    def beside(self, command: Command, output: Path) -> None:
        """Begin a command that runs beside the steps; ``output`` is a file for what it prints until it has ended."""
        with output.open("w") as file:
            self.running.append((command, self.start(command, file), time.monotonic(), output))

    def wait_for_what_it_needs(self, command: Command, ends: float) -> list[Result]:
        """What became of everything that this command waits for; nothing where that is known already.

        What has not ended when the step has to goes on, if it has time of its own left and need not stop for this.
        """
        results = []
        for entry in [entry for entry in self.running if needs(command, entry[0])]:
            job, process, began, output = entry
            ended = process is None or ends_within(process, min(began + job.seconds, ends) - time.monotonic())
            if not ended and not command.alone and ends < began + job.seconds:
                continue
            self.running.remove(entry)
            status = 127 if process is None else wait(process, 0)
            with self.log.section(describe(job)) as file:
                file.write(output.read_text(errors="replace"))
            line = self.log.last_line()
            failure = "" if status == 0 else "stopped" if status is None else f"exit status {status}: {line[:160]}"
            seconds = time.monotonic() - began
            results.append(Result(job.title, FAILED if failure else PASSED, seconds, failure or line))
            if failure and job.backend:
                self.broken[job.backend] = f"{job.backend}: {job.title} failed"
        return results

    def stop(self) -> None:
        """End what still runs beside the steps."""
        for _, process, _, _ in self.running:
            if process is not None:
                wait(process, 0)
        self.running = []
        end_marked(self.mark, set())


def needs(command: Command, job: Command) -> bool:
    """Whether a command waits for what runs beside the steps."""
    return command.alone or (job.backend != "" and job.backend == command.backend)


def ends_within(process: subprocess.Popen, seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=max(seconds, 0))
    return process.returncode is not None


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Exit status, or None where it had to be stopped; its children end with it."""
    try:
        return process.wait(timeout=max(seconds, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_marked(mark: str, but: set[int]) -> None:
    """End what a command of this run has left behind in a session of its own: the proof's process has one.

    Args:
        mark: of this run, in the environment of every process that it began.
        but: sessions that go on.
    """
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            marked = f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
            if marked and os.getsid(int(entry.name)) not in but:
                os.kill(int(entry.name), signal.SIGKILL)


def describe(command: Command) -> str:
    """As one would type it."""
    words = ["python" if word == sys.executable else word for word in command.arguments]
    settings = [f"{key}={value}" for key, value in command.environment.items()]
    return " ".join([*settings, *words])
