"""How ``make gpu-check`` runs its steps: limits, broken backends, tests that hang, and a log that stays small."""

from __future__ import annotations

import os
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"

pytestmark = pytest.mark.skipif(not TOOLS.exists(), reason="the tools are not part of a wheel")

HANGING = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
DETACHED = (
    "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
    "start_new_session=True).pid)"
)


@pytest.fixture(autouse=True)
def tools_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))


@pytest.fixture
def steps():
    import gpu_steps

    return gpu_steps


def python(steps, title, code, seconds=60.0, backend="", alone=False):
    return steps.Command(title, [sys.executable, "-c", code], {}, seconds, backend, alone)


@pytest.mark.parametrize("broken", [("triton",), ("cuda",), ("triton", "cuda")])
def test_a_backend_whose_smoke_fails_is_left_out_and_both_end_the_run(steps, tmp_path, broken):
    def of_both(code):
        return lambda known: [python(steps, name, code(name), 30, name) for name in steps.BACKENDS]

    made = [
        steps.Step("smoke", 30, 30, of_both(lambda name: f"raise SystemExit({int(name in broken)})"), decides=True),
        steps.Step("proof", 30, 30, of_both(lambda name: f"print('{name} was proven')")),
        steps.Step("tune", 30, 30, lambda known: [python(steps, "tune", "print('tuned')", 30, "triton")]),
        steps.Step("rest", 30, 30, lambda known: [python(steps, "rest", "print('the rest ran')")]),
    ]
    told = []
    runner = steps.Runner(steps.Log(tmp_path / "log"))
    results = runner.run(made, time.monotonic() + 600, lambda results: told.append(len(results)))
    assert told == [1, 2, 3, 4]
    log = (tmp_path / "log").read_text().splitlines()
    for name in steps.BACKENDS:
        ran = f"{name} was proven" in log
        assert ran == (name not in broken)
        skipped = any(f"{name}: smoke failed" in result.detail for result in results[1:])
        assert skipped == (name in broken)
    assert ("tuned" in log) == ("triton" not in broken)
    assert ("the rest ran" in log) == (len(broken) == 1)
    assert results[3].status == ("passed" if len(broken) == 1 else "skipped")
    assert results[2].status == ("skipped" if "triton" in broken else "passed")


def test_a_step_leaves_to_those_after_it_the_time_that_is_theirs(steps, tmp_path):
    made = [
        steps.Step("greedy", 1, 60, lambda broken: [python(steps, "one", HANGING)]),
        steps.Step("last", 10, 10, lambda broken: [python(steps, "one", "print('it had its time')")]),
    ]
    results = steps.Runner(steps.Log(tmp_path / "log")).run(made, time.monotonic() + 13)
    assert [result.status for result in results] == ["FAILED", "passed"]
    assert results[0].seconds < 6


def test_what_needs_the_extension_waits_for_it_and_what_is_timed_for_everything(steps, tmp_path):
    mark = tmp_path / "built"
    runner = steps.Runner(steps.Log(tmp_path / "log"))
    slow = f"import time; time.sleep(1); open({str(mark)!r}, 'w').write('x')"
    runner.beside(python(steps, "build", slow, 30, "cuda"), tmp_path / "build.txt")
    runner.beside(python(steps, "compile", "import time; time.sleep(600)", 3), tmp_path / "compile.txt")
    there = f"import os; print('built' if os.path.exists({str(mark)!r}) else 'not built')"
    made = [
        steps.Step("smoke", 20, 20, lambda b: [python(steps, n, there, 20, n) for n in steps.BACKENDS], decides=True),
        steps.Step("benchmarks", 20, 20, lambda b: [python(steps, "one", "print(1)", alone=True)]),
    ]
    results = runner.run(made, time.monotonic() + 60)
    assert [result.step for result in results] == ["build", "smoke", "compile", "benchmarks"]
    assert [result.status for result in results] == ["passed", "passed", "FAILED", "passed"]
    assert results[2].detail == "stopped"
    log = (tmp_path / "log").read_text()
    assert log.index("not built") < log.rindex("built")


def test_an_extension_that_is_late_is_not_broken(steps, tmp_path):
    runner = steps.Runner(steps.Log(tmp_path / "log"))
    runner.beside(python(steps, "build", "import time; time.sleep(4)", 30, "cuda"), tmp_path / "build.txt")
    made = [
        steps.Step("smoke", 2, 2, lambda b: [python(steps, "cuda", "print(1)", 20, "cuda")], decides=True),
        steps.Step("proof", 20, 20, lambda b: [python(steps, "cuda", "print('proven')", 20, "cuda")]),
    ]
    results = runner.run(made, time.monotonic() + 60)
    assert [(r.step, r.status) for r in results] == [("smoke", "partly"), ("build", "passed"), ("proof", "passed")]
    assert results[0].detail == "cuda: no time left, build has not ended"
    assert results[2].detail == "proven"


def test_what_was_late_before_costs_the_last_steps_and_not_the_first(steps, tmp_path):
    made = [steps.Step(str(n), 10, 10, lambda broken: [python(steps, "one", "print(1)")]) for n in range(3)]
    made[2] = made[2]._replace(commands=lambda broken: [python(steps, "one", HANGING)])
    results = steps.Runner(steps.Log(tmp_path / "log")).run(made, time.monotonic() + 6)
    assert [result.status for result in results] == ["passed", "passed", "FAILED"]
    assert results[2].seconds < 6.5


def test_an_extension_that_does_not_build_is_broken(steps, tmp_path):
    runner = steps.Runner(steps.Log(tmp_path / "log"))
    runner.beside(python(steps, "build", "raise SystemExit('error: no nvcc')", 30, "cuda"), tmp_path / "build.txt")
    made = [steps.Step("proof", 20, 20, lambda b: [python(steps, n, "print(1)", 20, n) for n in steps.BACKENDS])]
    results = runner.run(made, time.monotonic() + 60)
    assert [(result.step, result.status) for result in results] == [("build", "FAILED"), ("proof", "passed")]
    assert "error: no nvcc" in results[0].detail
    assert "cuda: skipped (cuda: build failed)" in results[1].detail


def test_nothing_outlives_its_command(steps, tmp_path):
    """The proof's process has a session of its own, which a signal to the command's group does not reach."""
    log = steps.Log(tmp_path / "log")
    runner = steps.Runner(log)
    runner.beside(python(steps, "beside", "import time; time.sleep(600)"), tmp_path / "beside.txt")
    assert runner.run_command(python(steps, "one", DETACHED), 30)[0] == ""
    left, beside = int(log.last_line()), runner.running[0][1].pid
    assert ended(left)
    assert not ended(beside)
    runner.stop()
    assert ended(beside)


def ended(pid):
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def test_what_prints_without_end_leaves_the_rest_of_the_log(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "SECTION_BYTES", 10_000)
    log = steps.Log(tmp_path / "log")
    runner = steps.Runner(log)
    runner.run_command(python(steps, "one", "print('the first')"), 30)
    loud = "print('it begins'); [print('x' * 99) for _ in range(10000)]; print('it ends')"
    assert runner.run_command(python(steps, "two", loud), 30) == ("", "it ends")
    text = (tmp_path / "log").read_text()
    assert len(text) < 11_000
    for told in ("the first", "it begins", "bytes left out", "it ends"):
        assert told in text


def test_files_that_would_not_travel_are_named(tmp_path):
    import gpu_report

    (tmp_path / "nvidia-sm80").mkdir()
    for name in ("gpu-check.log", "summary.txt", "nvidia-sm80/prove-triton.json"):
        (tmp_path / name).write_text("x")
    assert gpu_report.unfit(tmp_path) == []
    (tmp_path / "nvidia-sm80+").mkdir()
    (tmp_path / "nvidia-sm80+" / "prove-cuda.json").write_text("x")
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c" / "d.txt").write_text("x")
    with (tmp_path / "large.csv").open("w") as file:
        file.truncate((16 << 20) + 1)
    (tmp_path / "link").symlink_to("summary.txt")
    for n in range(2):
        (tmp_path / f"{n}.txt").write_text("x")
    found = "\n".join(gpu_report.unfit(tmp_path))
    for told in ("9 files, more than 8", "nvidia-sm80+/prove-cuda.json: a name", "d.txt: more than 2 folders",
                 "large.csv: 16777217 bytes", "link: not a plain file"):  # fmt: skip
        assert told in found


def test_what_triton_compiled_is_counted_by_step(tmp_path):
    import gpu_report

    path = tmp_path / "compilations.txt"
    counted = gpu_report.Compilations(path)
    assert counted.since_last() == ""
    path.write_text("compiled one_kernel 1.500\nfound two_kernel 0.001\ncompiled three_kernel 0.750\n")
    assert counted.since_last() == "Triton compiled 2 in 2 s, found 1 in its cache"
    assert counted.since_last() == ""
    with path.open("a") as file:
        file.write("found one_kernel 0.001\n")
    assert counted.since_last() == "Triton compiled 0 in 0 s, found 1 in its cache"


# ---- tests that hang

SUITE = """
import signal, time, pytest
def test_passes(): pass
def test_sleeps(): time.sleep(60)
def test_hangs():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(60)
def test_fails(): assert 1 == 2, "<&\\x01"
@pytest.mark.skip(reason="no <reason>")
def test_skipped(): pass
@pytest.fixture
def broken(): raise RuntimeError("the fixture is broken")
def test_errs(broken): pass
def test_last(): pass
"""


def test_a_test_that_hangs_is_named_and_those_after_it_run(steps, tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    code, line, outcomes = run_tests(steps, tmp_path)
    assert code.startswith("exit status 1")
    assert line == "2 passed, 4 failed, 1 skipped, test_suite.py::test_hangs did not end"
    assert outcomes == {
        "test_passes": "", "test_sleeps": "failure: Failed: took longer than 1 s", "test_hangs": "error: did not end",
        "test_fails": "failure: AssertionError: <& ", "test_skipped": "skipped: Skipped: no <reason>",
        "test_errs": "error: RuntimeError: the fixture is broken", "test_last": "",
    }  # fmt: skip
    log = (tmp_path / "log").read_text()
    assert "in test_hangs" in log, "where it was"
    # A second suite stands in the same file.
    assert run_tests(steps, tmp_path, "-k", "passes", suite="other")[1:] == (
        "1 passed, 0 failed, 0 skipped", {"test_passes": ""},
    )  # fmt: skip
    assert len(list(ElementTree.parse(tmp_path / "tests.xml").iter("testcase"))) == 8


def test_of_a_run_that_is_killed_every_outcome_is_left(steps, tmp_path):
    (tmp_path / "test_suite.py").write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    code, _, outcomes = run_tests(steps, tmp_path, each=60, seconds=6)
    assert code == "stopped after 6 s"
    assert outcomes == {"test_a": "", "test_b": "error: did not end"}


def test_where_no_test_is_selected_it_is_an_error(steps, tmp_path):
    (tmp_path / "test_suite.py").write_text("def test_a(): pass\n")
    assert run_tests(steps, tmp_path, "-k", "no_such_test")[0].startswith("exit status 1")


def run_tests(steps, folder, *arguments, suite="triton", each=1, seconds=60):
    """What was wrong, the last line printed, and the outcomes in the file."""
    import gpu_tests

    script = [sys.executable, str(TOOLS / "gpu_tests.py"), "--xml", str(folder / "tests.xml"), "--suite", suite]
    script += ["--each", str(each), "--", str(folder), "-c", os.devnull, "--rootdir", str(folder), *arguments]
    failure, line = steps.Runner(steps.Log(folder / "log")).run_command(steps.Command("tests", script), seconds)
    found = gpu_tests.cases(folder / "tests.xml", suite)
    return failure, line, {name.rpartition("::")[2]: outcome for name, outcome in found}
