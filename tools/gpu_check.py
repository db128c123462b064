"""Everything that needs an NVIDIA GPU, in one command and at most seven minutes: ``make gpu-check OUT=DIR``.

    python tools/gpu_check.py --out DIR [--only proof,tests] [--commit SHA] [--cache FILE] [--dry-run [short]]

What tells most comes first, and each step has a budget of its own:

    ceilings     rates of a copy and of cuBLAS on random data, beside which all other times stand
    smoke        every kernel once; a backend that fails here is left out of all that follows, and where both do, the
                 run ends.  Beside these two the extension is built and Triton's kernels are compiled
    proof        the parity cases of both backends; writes the records that ``PROVEN`` takes
    benchmarks   ``gpu_bench.py``, with nothing else running
    tune         what the tables hold, timed for one shape
    tests        CUDA graphs, steps that never wait for the device, real shapes
    ranks        two ranks, and torch.compile: what starts processes and compilers
    sanitizer    memcheck of the extension, of Triton, then racecheck, as far as there is time

A command that fails, or is stopped at its limit, keeps none of the others from running.  Needs no network.  ``--only``
runs some of the steps again, into the same folder; ``--cache`` takes what ``gpu_cache.py`` has compiled elsewhere.  The
commit is that of the checkout, or where there is none what ``--commit`` or GRPO_KERNELS_COMMIT says.

DIR receives at most eight files, written during the run: gpu-check.log, summary.txt, machine.json, bench.csv,
tests.xml, tuned.csv, and for each backend DEVICE-KIND/prove-BACKEND.json; what else is made, build/gpu-check.

``--dry-run`` is for a machine without a GPU: every command, at the size of a toy, with a CPU in place of the GPU
(``gpu_hooks/``); it shows that the commands are right, and nothing of the kernels.  ``--dry-run short`` runs what
differs in the name of the backend alone for one of them, and few of the proof's cases.

Exit status: 0 if every command passed, 1 if one did not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from gpu_report import Compilations, commit_here, cuda_tool, summary, unfit
from gpu_steps import BACKENDS, PASSED, ROOT, Command, Log, Result, Runner, Step
from gpu_units import TUNED_SHAPE

TOTAL_SECONDS = 420
"""What all steps together may take."""
LAST_SECONDS = 10
"""Of those, what is left for the machine's description and the summary."""

HOOKS = ROOT / "tools" / "gpu_hooks"
DRY = {"GPU_CHECK_DRY": "launch", "OMP_NUM_THREADS": "1"}
WHOLE, SHORT = "whole", "short"
TINY_SHAPE = {"--vocab": 384, "--hidden": 32, "--rows": 16}


class Plan:
    """The steps of one run, and where their results go."""

    def __init__(self, out: Path, scratch: Path, commit: str, architecture: int, dry: str = "") -> None:
        self.out, self.scratch, self.commit, self.architecture, self.dry = out, scratch, commit, architecture, dry
        self.compilations = scratch / "compilations.txt"
        self.environment = {
            "PYTHONPATH": str(HOOKS),
            "PYTHONUNBUFFERED": "1",
            "GPU_CHECK_COMPILATIONS": str(self.compilations),
            "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR") or str(scratch / "triton"),
            # Neither a verdict nor a tuning file of another run decides what is measured here.
            "GRPO_KERNELS_CACHE": str(scratch / "cache"),
            "GRPO_KERNELS_PROVE": "never",
            "GRPO_KERNELS_TUNED": "never",
            "GRPO_KERNELS_COMMIT": commit,
        }
        if dry:
            self.environment |= DRY | ({"GPU_CHECK_DRY_CASES": "16"} if dry == SHORT else {})

    def steps(self) -> list[Step]:
        return [
            Step("ceilings", 15, 15, self.ceilings),
            Step("smoke", 25, 60, self.smoke, decides=True),
            Step("proof", 100, 100, self.proof),
            Step("benchmarks", 90, 90, self.benchmarks),
            Step("tune", 70, 70, self.tune, self.keep_tuned),
            Step("tests", 35, 90, self.tests),
            Step("ranks", 40, 90, self.ranks),
            Step("sanitizer", 30, 150, self.sanitizer),
        ]

    # ---- beside the first steps

    def build(self) -> Command:
        """The extension, for this GPU's architecture alone."""
        environment = {"GRPO_KERNELS_CUDA": "1", "GRPO_KERNELS_CUDA_ARCHS": str(self.architecture)}
        if not shutil.which("nvcc"):
            environment["CUDA_HOME"] = str(Path(cuda_tool("nvcc")).parents[1])
        arguments = [sys.executable, "setup.py", "build_ext", "--inplace", "--parallel", "2"]
        return Command("build", arguments + self.if_dry("--help"), environment, 100, "cuda")

    def compile(self) -> Command:
        """Triton's kernels, many at a time: a step alone would compile them one after the other."""
        jobs = 1 if self.dry else max(1, (os.cpu_count() or 1) - 4)
        arguments = [sys.executable, "tools/gpu_cache.py", "--jobs", str(jobs), "--seconds", "60"]
        arguments += ["--architecture", str(self.architecture)]
        environment = {"GPU_CHECK_COMPILATIONS": str(self.scratch / "compiled_beside.txt"), "CUDA_VISIBLE_DEVICES": ""}
        return Command("compile", arguments + self.if_dry("--every", "40"), environment, 75)

    def if_dry(self, *words: str) -> list[str]:
        return list(words) if self.dry else []

    # ---- the steps

    def ceilings(self, broken: Mapping[str, str]) -> list[Command]:
        script = [sys.executable, "tools/gpu_ceilings.py", "--json", str(self.scratch / "ceilings.json")]
        return [Command("ceilings", script + self.if_dry("--tiny"))]

    def smoke(self, broken: Mapping[str, str]) -> list[Command]:
        return [Command(name, [sys.executable, "tests/gpu/smoke.py", name], {}, 30, name) for name in BACKENDS]

    def proof(self, broken: Mapping[str, str]) -> list[Command]:
        """The extension first: nothing of it has to be compiled."""
        commands = []
        for name, seconds in (("cuda", 45), ("triton", 95)):
            arguments = [sys.executable, "-m", "grpo_kernels.cli", "prove", "--backend", name, "--full"]
            arguments += ["--record", str(self.out), "--seconds", str(seconds - 5), "--commit", self.commit]
            commands.append(Command(name, arguments, {}, seconds, name))
        return commands

    def benchmarks(self, broken: Mapping[str, str]) -> list[Command]:
        script = [sys.executable, "tools/gpu_bench.py", "--csv", str(self.out / "bench.csv"), "--seconds", "70"]
        script += [word for name in broken for word in ("--skip", name)] + self.if_dry("--tiny")
        return [Command("benchmarks", script, alone=True)]

    def tune(self, broken: Mapping[str, str]) -> list[Command]:
        shape = [str(word) for pair in (TINY_SHAPE if self.dry else TUNED_SHAPE).items() for word in pair]
        arguments = [sys.executable, "-m", "grpo_kernels.cli", "tune", *shape, "--dtype", "bfloat16"]
        arguments += ["--seconds", "3" if self.dry else "55", "--out", str(self.scratch / "tune")]
        return [Command("tune", arguments, {"GRPO_KERNELS_TUNED": "auto"}, 70, "triton", alone=True)]

    def keep_tuned(self) -> None:
        if (self.scratch / "tune" / "tuned.csv").exists():
            shutil.copy(self.scratch / "tune" / "tuned.csv", self.out / "tuned.csv")

    def tests(self, broken: Mapping[str, str]) -> list[Command]:
        """Steps of both backends first: captured in a graph, and without a wait for the device."""
        steps, shapes = ["test_whole_step"], ["test_fused_head", "test_real_shapes"]
        commands = [self.pytest(name, files, "not compiled", 20) for files in (steps, shapes) for name in BACKENDS]
        return commands[::3] if self.dry == SHORT else commands

    def ranks(self, broken: Mapping[str, str]) -> list[Command]:
        files = ["test_vocab_parallel_gpu", "test_whole_step"]
        commands = [self.pytest(name, files, "compiled or vocab_parallel", 45) for name in BACKENDS]
        return commands[:1] if self.dry == SHORT else commands

    def pytest(self, backend: str, files: list[str], selected: str, each: int) -> Command:
        arguments = ["-k", selected, *(f"tests/gpu/{name}.py" for name in files)]
        script = [sys.executable, "tools/gpu_tests.py", "--xml", str(self.out / "tests.xml"), "--suite", backend]
        script += ["--each", str(each), "--", *arguments, *self.if_dry("--collect-only")]
        # Named, a backend that cannot run is an error and no skip.
        return Command(backend, script, {"GRPO_KERNELS_TEST_BACKENDS": backend}, 60, backend)

    def sanitizer(self, broken: Mapping[str, str]) -> list[Command]:
        """The extension first under each check."""
        commands = []
        for check in ("memcheck", "racecheck"):
            for name in reversed(BACKENDS):
                tool = [] if self.dry else [cuda_tool("compute-sanitizer"), "--tool", check, "--error-exitcode", "9"]
                script = [*tool, sys.executable, "tests/gpu/smoke.py", name]
                environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
                commands.append(Command(f"{check} of {name}", script, environment, 90, name))
        return commands[:1] if self.dry == SHORT else commands


def write_results(plan: Plan, facts: dict[str, str], results: list[Result], compilations: Mapping[str, int]) -> str:
    """machine.json and summary.txt as they stand after the steps so far; the text of the latter."""
    ceilings, table = plan.scratch / "ceilings.json", plan.scratch / "tune" / "table.txt"
    content = {**facts, "compilations": compilations, "steps": [result._asdict() for result in results]}
    if ceilings.exists():
        content["ceilings"] = json.loads(ceilings.read_text())
    (plan.out / "machine.json").write_text(json.dumps(content, indent=2) + "\n")
    text = summary(results, facts, plan.out / "bench.csv", table.read_text() if table.exists() else "")
    (plan.out / "summary.txt").write_text(text + "\n")
    return text


def begin_anew(plan: Plan, wanted: list[str]) -> None:
    """Remove what an earlier run has left of the steps that come now; what is compiled stays."""
    plan.scratch.mkdir(parents=True, exist_ok=True)
    plan.out.mkdir(parents=True, exist_ok=True)
    results = {
        "ceilings": [plan.scratch / "ceilings.json"],
        "proof": plan.out.glob("*/prove-*.json"),
        "benchmarks": [plan.out / "bench.csv"],
        "tune": [plan.out / "tuned.csv", *(plan.scratch / "tune").glob("*")],
        "tests": [plan.out / "tests.xml"],
        "ranks": [plan.out / "tests.xml"],
    }
    old = [plan.compilations, *(path for name in wanted or results for path in results.get(name, []))]
    if not wanted:
        old.append(plan.out / "gpu-check.log")
    for path in old:
        path.unlink(missing_ok=True)


def find_machine(plan_environment: Mapping[str, str]) -> dict[str, str]:
    """What there is, or {"reason": why there is no GPU to be checked}; asked in a process of its own."""
    paths = os.pathsep.join(filter(None, [str(HOOKS), os.environ.get("PYTHONPATH")]))
    script = [sys.executable, str(ROOT / "tools" / "gpu_report.py")]
    environment = {**os.environ, **plan_environment, "PYTHONPATH": paths}
    try:
        asked = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=90)
        return json.loads(asked.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"reason": "the GPU gives no answer within 90 seconds"}
    except (IndexError, ValueError):
        return {"reason": f"the GPU cannot be asked: {(asked.stderr.strip().splitlines() or ['no message'])[-1]}"}


def main() -> int:
    begin = time.monotonic()
    names = [step.name for step in Plan(Path(), Path(), "", 90).steps()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="folder for the results; made if need be")
    parser.add_argument("--only", default="", help="comma-separated steps, of " + ", ".join(names))
    parser.add_argument("--commit", default="", help="where there is no git: what the records name")
    parser.add_argument("--cache", type=Path, help="a file that gpu_cache.py made; unpacked for Triton")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "gpu-check", help="folder for the rest")
    parser.add_argument(
        "--dry-run", nargs="?", choices=(WHOLE, SHORT), const=WHOLE, default="", metavar=SHORT,
        help="every command at the size of a toy, without a GPU",
    )  # fmt: skip
    options = parser.parse_args()
    wanted = [name for name in options.only.split(",") if name]
    unknown = set(wanted) - set(names)
    if unknown:
        parser.error(f"no such step: {', '.join(sorted(unknown))}")
    facts = find_machine(DRY if options.dry_run else {})
    if "reason" in facts:
        print(f"gpu-check: {facts['reason']}. Nothing was run.", file=sys.stderr)
        return 2
    facts["commit"] = options.commit or os.environ.get("GRPO_KERNELS_COMMIT") or commit_here()
    architecture = int(facts["capability"].replace(".", ""))
    plan = Plan(options.out.resolve(), options.scratch.resolve(), facts["commit"], architecture, options.dry_run)
    begin_anew(plan, wanted)
    return run(plan, facts, wanted, options.cache, begin)


def run(plan: Plan, facts: dict[str, str], wanted: list[str], cache: Path | None, begin: float) -> int:
    """The steps asked for, all of them where none is."""
    log, compiled = Log(plan.out / "gpu-check.log"), Compilations(plan.compilations)
    runner = Runner(log, plan.environment)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what runs beside ends too
    with log.section("gpu_check.py") as file:
        for name, value in [*facts.items(), *plan.environment.items()]:
            print(f"{name}: {value}", file=file)
        if cache is not None:
            from gpu_cache import unpack

            told = unpack(cache, Path(plan.environment["TRITON_CACHE_DIR"]), plan.architecture)
            facts["cache"] = told
            print(f"{cache}: {told}", file=file)
            print(f"gpu-check: {told}", flush=True)
    try:
        for command in (plan.build(), plan.compile()):
            runner.beside(command, plan.scratch / f"{command.title}.txt")
        results = runner.run(
            [step for step in plan.steps() if not wanted or step.name in wanted],
            begin + TOTAL_SECONDS - LAST_SECONDS,
            lambda results: write_results(plan, facts, results, compiled.total),
            compiled.since_last,
        )
    finally:
        runner.stop()
    text = write_results(plan, facts, results, compiled.total)
    with log.section("summary.txt") as file:
        print(text, file=file)
    for trouble in unfit(plan.out):
        print(f"gpu-check: {trouble}")
    print("\n" + text)
    return 0 if all(result.status == PASSED for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
