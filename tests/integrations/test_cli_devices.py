"""``grpo-kernels prove`` and what ``info`` says of it; how the proof goes is what ``child.run`` returned."""

from __future__ import annotations

import json

import pytest
import torch

from grpo_kernels import cli
from grpo_kernels.backends import OPERATIONS, PROVEN, available_backends, child, device_kind, records, verdicts

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(available_backends()["cpu"] is not None, reason="the cpu backend is not built here")


def run_of(status):
    """A proof of two operations' cases, of which the second went as ``status`` says."""
    cases = [child.CaseResult(["token_logps_fwd", "token_logps_bwd"], "one row", True, 1.5)]
    if status != "none":
        message = "losses: error 1\nmore of it" if status == "failed" else ""
        cases.append(child.CaseResult(["preference_tail"], "hinge", status == "passed", 0.5, message))
    reason = {"passed": "", "failed": "preference_tail: hinge: losses: error 1", "none": "out of memory"}[status]
    return child.Run(status, reason, cases, dict.fromkeys(OPERATIONS, 2), 2.0, "what was printed")


@pytest.fixture
def proof(monkeypatch, tmp_path):
    """Sets how the proof goes; the options that it was given are in ``asked``."""
    monkeypatch.setenv("GRPO_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "_seen", {})
    monkeypatch.setattr(verdicts, "_decided", set())
    asked = []

    def goes(status):
        def run(name, device, *, progress, **options):
            asked.append((name, str(device), options))
            found = run_of(status)
            progress({"event": "start", "cases": len(found.cases)})
            for case in found.cases:
                progress({"event": "case", "operations": case.operations, "name": case.name})
                progress({"event": "done"})
            return found

        monkeypatch.setattr(child, "run", run)

    goes.asked = asked
    return goes


def prove(capsys, *arguments):
    code = cli.main(["prove", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(("status", "code"), [("passed", 0), ("failed", 1), ("none", 3)])
def test_it_prints_a_table_and_its_exit_status_says_how_it_went(proof, capsys, status, code):
    proof(status)
    got, out, err = prove(capsys, "--device", "cpu")
    assert got == code
    assert err == ""
    assert "checking token_logps_fwd, token_logps_bwd (case 1 of" in out
    (row,) = [line.split() for line in out.splitlines() if line.startswith("  token_logps_fwd, token_logps_bwd")]
    assert row[2:] == ["1", "0", "1.5"]
    if status == "failed":
        assert "FAILED hinge\n         losses: error 1\n" in out
        assert "the whole report is in " in out
    if status == "none":
        assert "no verdict: out of memory" in out
    assert [(name, device) for name, device, _ in proof.asked] == [("cpu", "cpu")]


def test_options_reach_the_proof(proof, capsys):
    proof("passed")
    prove(capsys, "--device", "cpu", "--backend", "cpu", "--full", "--seconds", "7")
    assert proof.asked == [("cpu", "cpu", {"full": True, "seconds": 7.0})]


def test_the_record_is_one_that_proven_accepts(proof, capsys, tmp_path):
    proof("passed")
    code, out, _ = prove(capsys, "--device", "cpu", "--record", tmp_path / "results", "--commit", "0123abc")
    assert code == 0
    path = tmp_path / "results" / device_kind(CPU) / "prove-cpu.json"
    assert str(path) in out
    record = json.loads(path.read_text())
    assert records.problem(record, "cpu", device_kind(CPU), OPERATIONS) is None
    assert record["commit"] == "0123abc"
    assert record["command"].startswith("grpo-kernels prove --device cpu")


def test_a_failed_run_is_recorded_as_one(proof, capsys, tmp_path):
    proof("failed")
    assert prove(capsys, "--device", "cpu", "--record", tmp_path)[0] == 1
    record = json.loads((tmp_path / device_kind(CPU) / "prove-cpu.json").read_text())
    assert records.problem(record, "cpu", device_kind(CPU), OPERATIONS) == "no run, or a failed case"
    assert record["runs"]["cpu"]["failures"] == ["hinge: losses: error 1\nmore of it"]


KNOWN = {
    "recorded": "proven by the run recorded in benchmarks/results/",
    "unknown": 'not proven yet; the first call with backend="auto" does it, or grpo-kernels prove',
    "passed": "proven here, 20",
    "failed": "failed here, 20",
}


@pytest.mark.parametrize("status", KNOWN)
def test_info_says_what_is_known_of_each_backend(proof, capsys, monkeypatch, status):
    if status != "recorded":
        for entry in list(PROVEN):
            monkeypatch.delitem(PROVEN, entry)
    elif ("cpu", device_kind(CPU)) not in PROVEN:
        pytest.skip("nothing is recorded for this kind of CPU")
    if status in ("passed", "failed"):
        proof(status)
        prove(capsys, "--device", "cpu")
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"          cpu: {KNOWN[status]}" in out
    if status == "failed":
        assert "preference_tail: hinge: losses: error 1; the report is in " in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "gpu"], "--device must be cpu, cuda or cuda:N, got 'gpu'"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cuda:77"], "--device cuda:77: PyTorch sees"),
        (["--backend", "metal"], "--backend must be cpu, cuda or triton, got 'metal'"),
        (["--backend", "auto"], "--backend must be cpu, cuda or triton, got 'auto'"),
        (["--backend", "torch"], "--backend must be cpu, cuda or triton, got 'torch'"),
        (["--seconds", "inf"], "--seconds must be positive and at most 86400, got inf"),
        (["--record", "/proc/nowhere"], "--record must be a folder that can be written to, got '/proc/nowhere'"),
        (["--ful"], "unrecognized arguments: --ful"),
        (["--device", "cpu", "--backend", "cuda"], "backend='cuda' cannot be used here"),
        (["--seconds", "0"], "--seconds must be positive and at most 86400, got 0"),
        (["--seconds", "soon"], "invalid float value: 'soon'"),
        (["everything"], "unrecognized arguments: everything"),
    ],
)
def test_bad_arguments_are_one_line(proof, capsys, arguments, said):
    proof("passed")
    code, _, err = prove(capsys, *arguments)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert proof.asked == []


def test_a_cache_that_cannot_be_written_is_said_before_the_proof(proof, capsys, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    proof("passed")
    code, _, err = prove(capsys, "--device", "cpu")
    assert code == 2
    assert "GRPO_KERNELS_CACHE must be a folder that can be written to" in err
    assert proof.asked == []


@pytest.mark.parametrize(("name", "command"), [("PROVE", "info"), ("PROVE", "prove"), ("TUNED", "info")])
def test_a_variable_with_a_value_that_it_cannot_have_is_one_line(proof, capsys, monkeypatch, name, command):
    proof("passed")
    monkeypatch.setenv(f"GRPO_KERNELS_{name}", "sometimes")
    assert cli.main([command]) == 2
    assert f"GRPO_KERNELS_{name} must be" in capsys.readouterr().err
    assert proof.asked == []
