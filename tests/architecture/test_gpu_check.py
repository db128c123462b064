"""``make gpu-check`` away from a GPU: its plan, its limits, and that no step keeps the others from running."""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"

pytestmark = pytest.mark.skipif(not TOOLS.exists(), reason="the tools are not part of a wheel")

BUDGETS = {
    "ceilings": 15, "smoke": 25, "proof": 100, "benchmarks": 90, "tune": 70, "tests": 90, "ranks": 90, "sanitizer": 90,
}  # fmt: skip
"""The steps in their order, and what each may ask for in any case."""

HANGING = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"


@pytest.fixture(autouse=True)
def tools_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.syspath_prepend(str(ROOT))  # the benchmarks


@pytest.fixture
def gpu_check():
    import gpu_check

    return gpu_check


@pytest.fixture
def steps():
    import gpu_steps

    return gpu_steps


@pytest.fixture
def plan(gpu_check, tmp_path):
    return gpu_check.Plan(tmp_path / "out", tmp_path / "scratch", "abc123", 90)


def run(gpu_check, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, arguments)])
    return gpu_check.main()


def python(steps, title, code, seconds=60.0, backend="", alone=False):
    return steps.Command(title, [sys.executable, "-c", code], {}, seconds, backend, alone)


# ---- the plan


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing(gpu_check, monkeypatch, capsys, tmp_path):
    assert run(gpu_check, monkeypatch, "--out", tmp_path / "out", "--scratch", tmp_path / "scratch") == 2
    assert "sees no NVIDIA GPU on this machine. Nothing was run." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_step_is_refused(gpu_check, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(gpu_check, monkeypatch, "--out", tmp_path, "--only", "proof,tset")
    assert "no such step: tset" in capsys.readouterr().err


def test_the_steps_fit_into_seven_minutes(gpu_check, plan):
    steps = plan.steps()
    assert sum(step.seconds for step in steps) + gpu_check.LAST_SECONDS <= gpu_check.TOTAL_SECONDS == 7 * 60
    assert [step.name for step in steps] == list(BUDGETS)
    for step in steps:
        assert 0 < step.seconds <= min(step.most, BUDGETS[step.name])
        commands = step.commands({})
        assert len(commands) == 1 or all(command.seconds < step.most for command in commands), "one starves the rest"
    assert [step.name for step in steps if step.decides] == ["smoke"]


def test_what_is_timed_waits_for_everything_else(plan):
    alone = {step.name for step in plan.steps() for command in step.commands({}) if command.alone}
    assert alone == {"benchmarks", "tune"}


def test_the_extension_is_built_for_this_gpu_alone(plan):
    assert plan.build().environment["GRPO_KERNELS_CUDA_ARCHS"] == "90"
    assert plan.build().backend == "cuda"


def test_the_extension_is_sanitized_first(plan):
    (sanitizer,) = (step for step in plan.steps() if step.name == "sanitizer")
    assert [command.title for command in sanitizer.commands({})] == [
        "memcheck of cuda", "memcheck of triton", "racecheck of cuda", "racecheck of triton",
    ]  # fmt: skip


def test_a_broken_backend_is_not_measured(plan):
    (benchmarks,) = plan.benchmarks({"triton": "its smoke failed"})
    assert benchmarks.arguments[-2:] == ["--skip", "triton"]


def test_every_command_knows_the_commit_and_no_earlier_verdict(plan):
    assert plan.environment["GRPO_KERNELS_COMMIT"] == "abc123"
    assert plan.environment["GRPO_KERNELS_PROVE"] == plan.environment["GRPO_KERNELS_TUNED"] == "never"
    for command in plan.proof({}):
        assert command.arguments[command.arguments.index("--commit") + 1] == "abc123"


def test_every_script_of_the_plan_is_there(plan):
    commands = [plan.build(), plan.compile(), *(c for step in plan.steps() for c in step.commands({}))]
    words = [word for command in commands for word in command.arguments if word.endswith(".py")]
    assert len(words) > 10
    assert [word for word in words if not (ROOT / word).is_file()] == []


# ---- running the steps


def test_every_step_runs_however_the_ones_before_ended(gpu_check, steps, plan, monkeypatch, capsys):
    def no_commands(broken):
        raise RuntimeError("the GPU has gone")

    def bench(broken):
        rows = "what,variant,ms,status\na case,ours,1.5,ok\na case,theirs,,absent: not installed\n"
        return [python(steps, "rows", f"open({str(plan.out / 'bench.csv')!r}, 'w').write({rows!r})")]

    def lost():
        raise FileNotFoundError("no such results")

    commands = {
        "broken": (20, [python(steps, "one", "raise SystemExit(3)"), python(steps, "two", "print('after')")]),
        "hangs": (20, [python(steps, "one", HANGING, 2), python(steps, "two", "print('the next')")]),
        "slow": (3, [python(steps, "one", HANGING), python(steps, "two", "print('too late')")]),
        "missing": (20, [steps.Command("one", [str(plan.out / "no-such-program")])]),
    }
    made = [
        steps.Step(name, seconds, seconds, lambda broken, found=found: found)
        for name, (seconds, found) in commands.items()
    ]
    made += [
        steps.Step("raises", 20, 20, no_commands),
        steps.Step("loses", 20, 20, lambda broken: [python(steps, "one", "print(1)")], lost),
        steps.Step("works", 20, 20, bench),
    ]
    start = time.monotonic()
    assert run_plan(gpu_check, plan, made, monkeypatch) == 1
    assert time.monotonic() - start < 60
    shown = capsys.readouterr().out
    table = [line.split()[:2] for line in shown.splitlines()[-7:]]
    assert table == [[step.name, "passed" if step.name == "works" else "FAILED"] for step in made]
    log = (plan.out / "gpu-check.log").read_text().splitlines()
    for told in ("one: exit status 3", "stopped after 2 s", "the GPU has gone", "stopped after 3 s", "no such results"):
        assert told in shown
    assert "two: no time left" in shown
    assert "after" in log
    assert "the next" in log
    assert "too late" not in log
    assert "absent: theirs (not installed)" in shown
    summary = (plan.out / "summary.txt").read_text()
    assert summary.rstrip() == shown[shown.index("some, driver some") :].rstrip()
    assert {path.name for path in plan.out.iterdir()} == {"gpu-check.log", "summary.txt", "machine.json", "bench.csv"}


def run_plan(gpu_check, plan, made, monkeypatch, beside=(), wanted=()):
    facts = dict.fromkeys(("device", "driver_version", "torch", "triton", "commit"), "some")
    monkeypatch.setattr(plan, "steps", lambda: list(made))
    build, compiled = beside or (
        python(plan_steps(), "build", "pass", 60, "cuda"),
        python(plan_steps(), "compile", "pass"),
    )
    monkeypatch.setattr(plan, "build", lambda: build)
    monkeypatch.setattr(plan, "compile", lambda: compiled)
    gpu_check.begin_anew(plan, list(wanted))
    return gpu_check.run(plan, facts, list(wanted), None, time.monotonic())


def plan_steps():
    import gpu_steps

    return gpu_steps


def test_a_step_by_itself(gpu_check, steps, plan, monkeypatch, capsys):
    made = [
        steps.Step(name, 20, 20, lambda broken, name=name: [python(steps, "one", f"print('{name} ran')")])
        for name in ("proof", "tests")
    ]
    assert run_plan(gpu_check, plan, made, monkeypatch) == 0
    (plan.out / "bench.csv").write_text("what,status\n")
    assert run_plan(gpu_check, plan, made, monkeypatch, wanted=["tests"]) == 0
    assert capsys.readouterr().out.rstrip().splitlines()[-1].split()[:2] == ["tests", "passed"]
    log = (plan.out / "gpu-check.log").read_text().splitlines()
    assert log.count("proof ran") == 1
    assert log.count("tests ran") == 2
    assert (plan.out / "bench.csv").exists(), "what other steps left stays"


# ---- rows


def test_the_file_of_rows_says_what_became_of_every_case(monkeypatch, tmp_path):
    """On the CPU, at the size of a toy: what fails keeps nothing else from the file, what comes last included."""
    import gpu_bench

    from benchmarks import logps, measure

    monkeypatch.setattr(measure, "last_level_cache", lambda device: 1024)  # overwriting all of it is most of the time
    fails = gpu_bench.Job(logps, "logps", logps.Case("a case that fails", logps.BOTH, "float32", -1, 100), [])
    jobs = [gpu_bench.TINY_JOBS[0], gpu_bench.TINY_JOBS[1], gpu_bench.TINY_JOBS[3], fails]
    path = tmp_path / "bench.csv"

    def rows_of(jobs, seconds):
        status = gpu_bench.measure(jobs, torch.device("cpu"), path, time.monotonic() + seconds)
        with path.open(newline="") as file:
            return status, list(csv.DictReader(file))

    status, rows = rows_of(jobs, 100)
    assert status == 1
    assert rows[-1]["what"].startswith("a case that fails")
    assert rows[-1]["status"].startswith("failed: ")
    assert all(row["status"] == "ok" for row in rows if row["ms"])
    timed = {(row["what"].split(",")[0], row["variant"]) for row in rows if row["ms"]}
    assert {("8 x 100", "ours: torch"), ("8 x 100", "copy"), ("4 pairs", "ours: torch"), ("toy", "eager")} <= timed
    beside_the_floor = {row["variant"].partition(":")[0] for row in rows if row["x floor"]}
    assert beside_the_floor == {"ours"}
    assert [row["status"] for row in rows_of(jobs[:1], -1)[1]] == ["no time left"]


def test_what_is_multiplied_or_copied_is_random(monkeypatch):
    """A GPU that multiplies ones is an eighth faster than one that multiplies numbers."""
    import gpu_ceilings

    from benchmarks.measure import copy_lines, gemm_line

    operands = []
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: operands.extend([a, b]) or multiply(a, b, out=out))
    cpu = torch.device("cpu")
    gemm_line(24, 16, 40, torch.float32, cpu)()
    gpu_ceilings.gemm(24, 16, 40, torch.float32, cpu)()
    assert len(operands) == 8
    for operand in operands:
        assert operand.unique().numel() == operand.numel()
        assert operand.isfinite().all()
    for line in copy_lines(4096, cpu).values():
        copied = line()
        assert copied is None or copied.unique().numel() == 256
