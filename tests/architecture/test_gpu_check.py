"""``make gpu-check`` away from a GPU: what it says without one, and that no step keeps the others from running."""

from __future__ import annotations

import csv
import importlib.util
import sys
import time
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"

pytestmark = pytest.mark.skipif(not TOOLS.exists(), reason="the tools are not part of a wheel")


@pytest.fixture
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", TOOLS / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # NamedTuple looks its module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


def run(gpu_check, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, arguments)])
    return gpu_check.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing(gpu_check, monkeypatch, capsys, tmp_path):
    assert run(gpu_check, monkeypatch, "--out", tmp_path / "out") == 2
    assert "sees no NVIDIA GPU on this machine. Nothing was run." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_step_is_refused(gpu_check, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(gpu_check, monkeypatch, "--out", tmp_path, "--only", "build,tset")
    assert "no such step: tset" in capsys.readouterr().err


def test_the_steps_fit_into_eight_minutes_and_eight_files(gpu_check):
    assert sum(step.seconds for step in gpu_check.STEPS) + 10 <= gpu_check.TOTAL_SECONDS == 8 * 60
    assert len(gpu_check.STEPS) + len(("bench.csv", "machine.json", "summary.txt")) <= 8
    for step in gpu_check.STEPS[1:]:  # the first asks the GPU what it is
        commands = step.commands(Path("out"))
        assert len(commands) == 1 or all(command.seconds < step.seconds for command in commands), "one starves the rest"


def python(gpu_check, code, seconds=60):
    return gpu_check.Command([sys.executable, "-c", code], {}, seconds)


def test_every_step_runs_however_the_ones_before_ended(gpu_check, monkeypatch, capsys, tmp_path):
    def no_commands(out):
        raise RuntimeError("the GPU has gone")

    def bench(out):
        rows = "what,variant,ms,status\na case,ours,1.5,ok\na case,theirs,,absent: not installed\n"
        return [python(gpu_check, f"open({str(out / 'bench.csv')!r}, 'w').write({rows!r})")]

    hanging = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    steps = {
        "broken": (20, lambda out: [python(gpu_check, "raise SystemExit(3)"), python(gpu_check, "print('after')")]),
        "hangs": (20, lambda out: [python(gpu_check, hanging, 2), python(gpu_check, "print('the next')")]),
        "slow": (3, lambda out: [python(gpu_check, hanging), python(gpu_check, "print('too late')")]),
        "missing": (20, lambda out: [gpu_check.Command([str(out / "no-such-program")], {})]),
        "raises": (20, no_commands),
        "works": (20, bench),
    }
    monkeypatch.setattr(gpu_check, "STEPS", [gpu_check.Step(name, *step) for name, step in steps.items()])
    monkeypatch.setattr(gpu_check, "gpu_reason", lambda: None)
    facts = dict.fromkeys(("device", "driver", "torch", "triton"), "some")
    monkeypatch.setattr(gpu_check, "machine", lambda: facts)
    start, out = time.monotonic(), tmp_path / "out"
    assert run(gpu_check, monkeypatch, "--out", out) == 1
    assert time.monotonic() - start < 30
    shown = capsys.readouterr().out
    table = [line.split()[:2] for line in shown.splitlines()[-6:]]
    assert table == [[name, "passed" if name == "works" else "FAILED"] for name in steps]
    assert "exit status 3" in shown
    assert "stopped after 2 s" in shown
    assert "no time left" in shown
    assert "the GPU has gone" in shown
    assert "stopped after 3 s" in shown
    assert "after" in (out / "broken.log").read_text().splitlines()
    assert "the next" in (out / "hangs.log").read_text().splitlines()
    assert "too late" not in (out / "slow.log").read_text().splitlines()
    assert "absent: theirs (not installed)" in shown
    assert (out / "summary.txt").read_text().rstrip() == shown[shown.index("some, driver some") :].rstrip()
    assert sorted(p.suffix for p in out.iterdir()) == [".csv", ".json", *[".log"] * 6, ".txt"]


def test_a_step_by_itself(gpu_check, monkeypatch, capsys, tmp_path):
    steps = [gpu_check.Step(name, 20, lambda out: [python(gpu_check, "print(7)")]) for name in ("build", "tests")]
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    monkeypatch.setattr(gpu_check, "gpu_reason", lambda: None)
    monkeypatch.setattr(gpu_check, "machine", lambda: dict.fromkeys(("device", "driver", "torch", "triton"), "some"))
    assert run(gpu_check, monkeypatch, "--out", tmp_path, "--only", "tests") == 0
    assert not (tmp_path / "build.log").exists()
    assert capsys.readouterr().out.rstrip().splitlines()[-1].split()[:2] == ["tests", "passed"]


def test_the_file_of_rows_says_what_became_of_every_case(monkeypatch, tmp_path):
    """On the CPU, at the size of a toy: what fails keeps nothing else from the file, what comes last included."""
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.syspath_prepend(str(TOOLS.parent))
    import gpu_bench

    from benchmarks import head, logps, measure, tail
    from benchmarks.shapes import Batch, Head

    monkeypatch.setattr(measure, "last_level_cache", lambda device: 1024)  # overwriting all of it is most of the time
    toy_head, toy_batch = Head("toy", 96, 16), Batch("16 rows", 2, 4)
    skip = ["torch.compile", "TRL", "cut-cross-entropy", "Liger", "quack"]  # which take seconds to compile or to import
    jobs = [
        gpu_bench.Job(logps, "logps", logps.Case("8 x 100", logps.BOTH, "float32", 8, 100), skip),
        gpu_bench.Job(head, "head", head.Case(toy_head, toy_batch, head.FULL, "float32"), skip),
        gpu_bench.Job(tail, "tail", tail.Case(tail.TAIL, 4, 2), skip),
        gpu_bench.Job(logps, "logps", logps.Case("a case that fails", logps.BOTH, "float32", -1, 100), skip),
    ]
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
