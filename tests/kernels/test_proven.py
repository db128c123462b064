"""``auto`` rests on recorded runs: each entry of PROVEN has one, and it passed."""

import json
import re
from pathlib import Path

import pytest
import torch

from grpo_kernels.backends import OPERATIONS, PROVEN, child, choose, device_kind, records

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CPU = torch.device("cpu")


@pytest.mark.skipif(not RESULTS.exists(), reason="the recorded runs are not part of a wheel")
@pytest.mark.parametrize("entry", PROVEN, ids="@".join)
def test_an_entry_has_its_passing_run(entry):
    record = json.loads((RESULTS / PROVEN[entry]).read_text())
    assert records.problem(record, *entry, OPERATIONS) is None
    assert all(run["passed"] >= 100 for run in record["runs"].values())
    assert "+changes" not in record["commit"]


@pytest.mark.skipif(device_kind(CPU) != "cpu-x86_64", reason="proven on x86-64 only")
def test_auto_prefers_the_compiled_kernels_on_the_cpu():
    pytest.importorskip("grpo_kernels._cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choose("auto", CPU, dtype) is choose("cpu", CPU, dtype)
    assert choose("auto", CPU, torch.float64) is choose("torch", CPU, torch.float64)


def run_of(status="passed", *, passed=True, calls=None):
    case = child.CaseResult(["token_logps_fwd"], "one row", passed, 0.1, "" if passed else "error 1")
    return child.Run(status, "" if status == "passed" else "why", [case], dict.fromkeys(OPERATIONS, 3) | (calls or {}))


def test_a_passing_run_is_written_as_proven_wants_it(tmp_path):
    record = records.make("cpu", CPU, {"avx2": run_of(), "baseline": run_of()}, "a command", "0123abc")
    kind = device_kind(CPU)
    path = records.write(record, tmp_path)
    assert path == tmp_path / kind / "prove-cpu.json"
    assert re.fullmatch(r"[A-Za-z0-9._-]+", kind)
    read = json.loads(path.read_text())
    assert records.problem(read, "cpu", kind, OPERATIONS) is None
    assert read["commit"] == "0123abc"
    assert (read["passed"], read["failed"]) == (2, 0)


NOT_PROOFS = {
    "failed": ({"one": run_of("failed", passed=False)}, "no run, or a failed case"),
    "no verdict": ({"one": run_of(), "other": run_of("none")}, "the run other did not pass: why"),
    "an operation that was not called": ({"one": run_of(calls={"robust_loss": 0})}, "called no robust_loss"),
    "no run": ({}, "no run, or a failed case"),
}


@pytest.mark.parametrize("what", NOT_PROOFS)
def test_what_is_no_proof_says_why(what):
    runs, why = NOT_PROOFS[what]
    record = records.make("cpu", CPU, runs, "a command", "0123abc")
    assert why in records.problem(record, "cpu", device_kind(CPU), OPERATIONS)


@pytest.mark.parametrize("field", ["device", "driver", "commit", "torch", "date", "backend", "device_kind"])
def test_a_record_that_does_not_say_where_it_was_made_is_no_proof(field):
    record = records.make("cpu", CPU, {"one": run_of()}, "a command", "0123abc")
    assert records.problem({**record, field: ""}, "cpu", device_kind(CPU), OPERATIONS)


def test_the_commit_can_be_told_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("GRPO_KERNELS_COMMIT", "0123abc")
    assert records.make("cpu", CPU, {"one": run_of()}, "a command")["commit"] == "0123abc"
