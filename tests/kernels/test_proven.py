"""``auto`` rests on recorded runs: each entry of PROVEN has one, and it passed."""

import json
from pathlib import Path

import pytest
import torch

from grpo_kernels.backends import PROVEN, choose, device_kind

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

pytestmark = pytest.mark.skipif(not RESULTS.exists(), reason="the recorded runs are not part of a wheel")


@pytest.mark.parametrize("entry", PROVEN, ids="@".join)
def test_an_entry_has_its_passing_run(entry):
    record = json.loads((RESULTS / PROVEN[entry]).read_text())
    assert (record["backend"], record["device_kind"]) == entry
    assert record["failed"] == 0
    assert record["passed"] >= 100
    assert all(run["failed"] == 0 and run["passed"] > 0 for run in record["runs"].values())
    assert {"device", "torch", "python", "commit", "date", "command"} <= record.keys()


@pytest.mark.skipif(device_kind(torch.device("cpu")) != "cpu-x86_64", reason="proven on x86-64 only")
def test_auto_prefers_the_compiled_kernels_on_the_cpu():
    pytest.importorskip("grpo_kernels._cpu")
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choose("auto", cpu, dtype) is choose("cpu", cpu, dtype)
    assert choose("auto", cpu, torch.float64) is choose("torch", cpu, torch.float64)
