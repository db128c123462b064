"""Everything that needs an NVIDIA GPU, in one command and at most eight minutes: ``make gpu-check OUT=DIR``.

Builds the extensions in place, runs the tests on the device, times every backend, runs the kernels under
compute-sanitizer, and prints one table last.  Needs no network.  OUT receives seven files: one log a step, bench.csv,
machine.json and summary.txt.

    python tools/gpu_check.py --out DIR [--only build,tests]

Every command has a limit, and so has its step; one that fails, or is stopped, keeps none of the others from running.
Exit status: 0 if every command passed, 1 if one did not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 480
"""What all steps together may take; each step has a budget of its own besides."""


class Command(NamedTuple):
    """One process of a step."""

    arguments: list[str]
    environment: dict[str, str]
    seconds: int = TOTAL_SECONDS
    """Its own limit, so that what hangs leaves time to the rest of its step."""


class Step(NamedTuple):
    """Commands that run one after the other, in one log."""

    name: str
    seconds: int
    commands: Callable[[Path], list[Command]]


class Result(NamedTuple):
    """A line of the table."""

    step: str
    status: str
    seconds: float
    detail: str


# ---- the steps


def cuda_tool(name: str) -> str:
    """A tool of the CUDA toolkit, which need not be on PATH."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or str(Path(home, "bin", name))


def build(out: Path) -> list[Command]:
    import torch

    major, minor = torch.cuda.get_device_capability()
    environment = {"GRPO_KERNELS_CUDA": "1", "GRPO_KERNELS_CUDA_ARCHS": f"{major}{minor}"}
    if not shutil.which("nvcc"):
        environment["CUDA_HOME"] = str(Path(cuda_tool("nvcc")).parents[1])
    return [Command([sys.executable, "setup.py", "build_ext", "--inplace"], environment)]


def tests(out: Path) -> list[Command]:
    """One run a backend: where one of them is not there, the other is tested all the same."""
    paths = ["tests/gpu", "tests/kernels/test_parity.py", "tests/kernels/test_preference_tail.py"]
    arguments = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "--durations=8", *paths]
    if importlib.util.find_spec("xdist"):
        # Few: some cases take gigabytes of the GPU, and each process holds a context.
        arguments += ["-n", "4", "--dist", "worksteal"]
    # Named, a backend that cannot run is an error and no skip.
    return [
        Command(arguments, {"GRPO_KERNELS_TEST_BACKENDS": backend, "OMP_NUM_THREADS": "4"}, seconds)
        for backend, seconds in (("triton", 120), ("cuda", 90))
    ]


def benchmarks(out: Path) -> list[Command]:
    return [Command([sys.executable, "tools/gpu_bench.py", "--csv", str(out / "bench.csv"), "--seconds", "95"], {})]


def sanitizer(out: Path) -> list[Command]:
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tool = cuda_tool("compute-sanitizer")
    commands = []
    for backend in ("triton", "cuda"):
        script = [sys.executable, "tests/gpu/sanitized.py", backend]
        # Once without the tool: Triton compiles here, and a script that fails by itself says so by itself.
        commands.append(Command(script, environment, 40))
        for check in ("memcheck", "racecheck", "initcheck"):
            commands.append(Command([tool, "--tool", check, "--error-exitcode", "9", *script], environment, 30))
    return commands


STEPS = [
    Step("build", 70, build),
    Step("tests", 200, tests),
    Step("benchmarks", 110, benchmarks),
    Step("sanitizer", 90, sanitizer),
]


# ---- running them


def run_step(step: Step, out: Path, deadline: float) -> Result:
    """All commands of the step, however the ones before ended, until its time is up."""
    start = time.monotonic()
    ends = min(start + step.seconds, deadline)
    failures: list[str] = []
    last_line = ""
    with open(out / f"{step.name}.log", "w") as log:
        try:
            commands = step.commands(out)
        except Exception as error:
            commands, failures = [], [f"{type(error).__name__}: {error}"]
        for command in commands:
            left = min(ends - time.monotonic(), command.seconds)
            title = describe(command)
            if left <= 1:
                failures.append(f"{title}: no time left")
                continue
            log.write(f"\n$ {title}\n")
            log.flush()
            offset = log.tell()
            status = run_command(command, log, left)
            if status is None:
                failures.append(f"{title}: stopped after {left:.0f} s")
            elif status:
                failures.append(f"{title}: exit status {status}")
            last_line = last_line_of(log.name, offset) or last_line
    detail = "; ".join(failures) if failures else last_line
    return Result(step.name, "FAILED" if failures else "passed", time.monotonic() - start, detail)


def run_command(command: Command, log, seconds: float) -> int | None:
    """Exit status, or None where it had to be stopped; its children end with it."""
    environment = {**os.environ, **command.environment}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    try:
        process = subprocess.Popen(
            command.arguments, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        log.write(f"{error}\n")
        log.flush()
        return 127
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def describe(command: Command) -> str:
    words = ["python" if word == sys.executable else word for word in command.arguments]
    return " ".join([*(f"{key}={value}" for key, value in command.environment.items()), *words])


def last_line_of(path: str, offset: int) -> str:
    with open(path, errors="replace") as log:
        log.seek(offset)
        lines = [line.strip() for line in log if line.strip()]
    return lines[-1] if lines else ""


def machine() -> dict[str, str]:
    """What the results were made on."""
    import torch

    found = {
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "date": time.strftime("%Y-%m-%d"),
    }
    for name, command in {
        "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        "nvcc": [cuda_tool("nvcc"), "--version"],
        "commit": ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
    }.items():
        try:
            output = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            output = ""
        found[name] = output.splitlines()[-1] if output else "unknown"
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "none"
    return found


def table(results: list[Result], facts: dict[str, str], bench: Path) -> str:
    lines = [f"{facts['device']}, driver {facts['driver']}, torch {facts['torch']}, triton {facts['triton']}", ""]
    if bench.exists():
        with bench.open(newline="") as file:
            lines += [*measured(list(csv.DictReader(file))), ""]
    lines += [f"{'step':<12}{'status':<9}{'seconds':>8}  detail"]
    lines += [f"{r.step:<12}{r.status:<9}{r.seconds:>8.0f}  {r.detail[:240]}" for r in results]
    return "\n".join(lines)


def measured(rows: list[dict[str, str]]) -> list[str]:
    """The benchmark's rows case by case; what is not installed, in one line."""
    shown = [row for row in rows if not row["status"].startswith("absent")]
    names = [name for name in (rows[0] if rows else {}) if name not in ("what", "status")]
    widths = {name: max([len(name), *(len(row[name] or "") for row in shown)]) for name in names}
    lines, before = [], None
    for row in shown:
        if row["what"] != before:
            before = row["what"]
            lines += [before, "  " + "  ".join(name.ljust(widths[name]) for name in names).rstrip()]
        told = "" if row["status"] == "ok" else "  " + row["status"][:100]
        lines.append("  " + "  ".join((row[name] or "").ljust(widths[name]) for name in names).rstrip() + told)
    absent = {f"{row['variant']} ({row['status'].removeprefix('absent: ')})" for row in rows if row not in shown}
    return [*lines, *(["absent: " + "; ".join(sorted(absent))] if absent else [])]


def gpu_reason() -> str | None:
    """None where there is an NVIDIA GPU that PyTorch can use, else why not."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    if torch.version.hip is not None:
        return "this PyTorch is built for AMD GPUs; the check is for NVIDIA's"
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} sees no NVIDIA GPU on this machine"
    try:
        torch.zeros(1, device="cuda").item()
    except RuntimeError as error:
        return f"PyTorch {torch.__version__} sees a GPU that it cannot use ({str(error).splitlines()[0]})"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, test, sanitize and time the GPU kernels.")
    parser.add_argument("--out", required=True, type=Path, help="folder for logs and CSVs; made if need be")
    parser.add_argument("--only", default="", help="comma-separated steps, of " + ", ".join(s.name for s in STEPS))
    arguments = parser.parse_args()
    wanted = [name for name in arguments.only.split(",") if name]
    unknown = set(wanted) - {step.name for step in STEPS}
    if unknown:
        parser.error(f"no such step: {', '.join(sorted(unknown))}")
    reason = gpu_reason()
    if reason is not None:
        print(f"gpu-check: {reason}. Nothing was run.", file=sys.stderr)
        return 2
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + TOTAL_SECONDS - 10
    facts = machine()
    (out / "machine.json").write_text(json.dumps(facts, indent=2) + "\n")
    results = []
    for step in STEPS:
        if not wanted or step.name in wanted:
            print(f"gpu-check: {step.name} ...", flush=True)
            results.append(run_step(step, out, deadline))
            print(f"gpu-check: {step.name} {results[-1].status} in {results[-1].seconds:.0f} s", flush=True)
    for result in results:
        if result.status != "passed":
            lines = (out / f"{result.step}.log").read_text(errors="replace").splitlines()[-15:]
            print(f"\n--- end of {result.step}.log\n" + "\n".join(line[:300] for line in lines))
    summary = table(results, facts, out / "bench.csv")
    (out / "summary.txt").write_text(summary + "\n")
    print("\n" + summary)
    return 0 if all(result.status == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
