"""The benchmarks measure what they say: wrong results get no time, memory is what was held, the work is done."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import head, logps, overhead, peers, shapes, step, suite, tail  # noqa: E402
from benchmarks.measure import Line, Times, interleaved  # noqa: E402

CPU = torch.device("cpu")
OPTIONS = Namespace(device="cpu", skip=["compile", "TRL", "Liger", "cut-cross"], memory=False, ends=float("inf"))
ONE_ROUND = suite.Settings(rounds=1)


def rows_of(command, case, work) -> dict[str, dict]:
    rows = suite.run_case(command, case, work, {**case.fields(), "clock": "wall"}, OPTIONS, ONE_ROUND)
    return {row["variant"]: row for row in rows}


class Nothing:
    def fields(self):
        return {"case": "nothing", "work": "none", "dtype": "float32"}


def fake_work(**variants) -> suite.Work:
    def errors(outputs):
        return (outputs["x"] - 1).abs().item(), None

    return suite.Work(
        {"ours: right": Line(lambda: {"x": torch.tensor(1.0)}), **variants}, ours="ours: right",
        plain=Line(lambda: {"x": torch.tensor(1.0 + 1e-3)}), errors=errors, epsilon=(1e-4, 0.0), bytes=8.0,
        operations=1.0, copy_bytes=1024,
    )  # fmt: skip


def test_a_wrong_variant_is_shown_as_wrong_and_gets_no_time():
    off = {name: Line(lambda by=by: {"x": torch.tensor(1.0 + by)}) for name, by in
           {"near": 2.05e-3, "far": 2.2e-3, "nan": float("nan")}.items()}  # fmt: skip
    rows = rows_of("none", Nothing(), fake_work(**off))
    assert rows["ours: right"]["status"] == rows["near"]["status"] == "ok"
    for name in ("far", "nan"):
        assert rows[name]["status"].startswith("wrong: errors")
        assert "ms" not in rows[name]
    assert rows["far"]["error"] == pytest.approx(2.2e-3, rel=1e-3)


def test_one_that_fails_or_is_not_there_says_why():
    def fails():
        raise RuntimeError("no such\nthing")

    rows = rows_of("none", Nothing(), fake_work(broken=Line(fails), peer="peer is not installed"))
    assert rows["broken"]["status"] == "failed: RuntimeError: no such"
    assert rows["peer"]["status"] == "absent: peer is not installed"
    assert not suite.ours_is_broken(rows["broken"])
    assert suite.ours_is_broken({"variant": "ours: cpu", "status": "wrong: errors"})


def test_rates_are_those_of_the_same_run():
    rows = rows_of("none", Nothing(), fake_work())
    copy, ours = rows["copy"], rows["ours: right"]
    best = min(rows[name]["ms"] for name in suite.COPIES)
    assert copy["bytes"] == 2048
    assert ours["of_copy"] == pytest.approx((8 / ours["ms"]) / (2048 / best))
    assert ours["vs_ours"] == 1


def test_a_round_runs_every_line_once_and_begins_elsewhere_each_time():
    order = []
    lines = {name: Line(lambda name=name: order.append(name)) for name in "abc"}
    times = interleaved(lines, CPU, rounds=3)
    assert "".join(order) == "abcbcacab"
    assert [len(t.seconds) for t in times.values()] == [3, 3, 3]


def test_median_and_quartiles():
    times = Times((5.0, 1.0, 2.0, 4.0, 3.0))
    assert (times.median, times.best, times.quartiles) == (3.0, 1.0, (2.0, 4.0))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says what is resident")
def test_the_peak_of_memory_is_what_a_call_held():
    """64 MiB for a moment and 32 MiB in the result; what the call before it held does not count."""
    code = (
        "import torch; from benchmarks.measure import Line, resident_peak\n"
        "def run():\n"
        "    kept = torch.ones(8 << 20)\n"
        "    torch.ones(16 << 20)\n"
        "    return kept\n"
        "print(resident_peak(Line(run)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) / 2**20 == pytest.approx(96, rel=0.05)


@pytest.mark.parametrize("work", [logps.FORWARD, logps.BOTH])
def test_logps_do_the_work_and_count_it(work):
    case = logps.Case("tiny", work, "bfloat16", 8, 64, labelled=0.5)
    made = logps.build(case, CPU)
    assert made.bytes == (4 if work == logps.FORWARD else 4 + 4 + 8) * 64 * 2
    rows = rows_of("logps", case, made)
    done = {name for name, row in rows.items() if row["status"] == "ok"}
    assert {"ours: torch", "eager", "eager, float32", "F.cross_entropy"} <= done
    assert not any(row["status"].startswith(("wrong", "failed")) for row in rows.values())


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("work", head.GEMMS_OF)
def test_the_head_does_the_work_and_counts_it(work, softcap):
    tiny, batch = shapes.Head("tiny", 96, 16, softcap), shapes.Batch("two pairs", 2, 8, labelled=0.5)
    case = head.Case(tiny, batch, work, "float32", thorough=True)
    made = head.build(case, CPU)
    assert made.operations == 2 * head.GEMMS_OF[work] * 16 * 96 * 16
    rows = rows_of("head", case, made)
    assert rows["ours: torch"]["status"] == rows["eager"]["status"] == "ok"
    assert not any(row["status"].startswith(("wrong", "failed")) for row in rows.values())


def test_one_word_shrinks_what_a_gpu_does_to_what_a_cpu_can():
    published = {"TinyLlama-1.1B": (32000, 2048), "Llama-3-8B": (128256, 4096), "Qwen2.5-7B": (152064, 3584),
                 "Gemma-2-9B": (256000, 3584)}  # fmt: skip
    large, small = ([case for case in head.cases(size, None, False) if not case.curve] for size in ("gpu", "cpu"))
    for of_gpu, of_cpu in zip(large, small, strict=True):
        name, vocabulary, hidden, softcap = of_gpu.head
        assert of_gpu.head == of_cpu.head or (vocabulary, hidden) == published[name]
        assert (of_cpu.head.name, of_cpu.head.vocabulary, of_cpu.head.softcap) == (name, vocabulary, softcap)
        assert of_cpu.batch.rows * of_cpu.head.hidden <= of_gpu.batch.rows * hidden
        assert (softcap is not None) == name.startswith("Gemma")
    assert {case.head.name for case in large} >= set(published)


@pytest.mark.parametrize("work", [tail.TAIL, tail.LOSS])
def test_the_tail_does_the_work(work):
    case = tail.Case(work, 4, 3)
    rows = rows_of("tail", case, tail.build(case, CPU))
    assert {row["status"] for name, row in rows.items() if "compile" not in name} == {"ok"}


@pytest.mark.parametrize("reference", [step.CACHED, step.ONLINE])
@pytest.mark.parametrize("trained", [step.WHOLE, step.LORA])
def test_a_step_does_the_work(trained, reference, monkeypatch):
    monkeypatch.setattr(peers, "missing", lambda *_, **__: "left out here")  # its trainer takes long to import
    tiny = step.Shape("tiny", 1, 32, 48, 2, 2, 64)
    case = step.Case(tiny, shapes.Batch("two pairs", 2, 8, 0.5), trained, reference)
    rows = rows_of("step", case, step.build(case, CPU))
    own = {name: row["status"] for name, row in rows.items() if name != "TRL DPOTrainer"}
    assert set(own.values()) == {"ok"}, own


def test_what_a_call_takes_beyond_its_kernels():
    def row(case, work, variant, ms):
        return {"case": case, "work": work, "variant": variant, "ms": ms}

    rows = [row("x", overhead.FORWARD, overhead.KERNELS, 0.01), row("x", overhead.BOTH, overhead.KERNELS, 0.03),
            row("x", overhead.FORWARD_MOVING, "loss", 0.05), row("x", overhead.BOTH_MOVING, "loss", 0.1),
            row("y", overhead.FORWARD, "loss", 0.1)]  # fmt: skip
    found = [overhead.beyond_kernels(r, rows) for r in rows]
    assert found == [None, None, pytest.approx(40), pytest.approx(70), None]
