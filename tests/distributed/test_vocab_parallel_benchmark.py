"""``python -m benchmarks.vocab_parallel`` runs, and counts what ranks send."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_benchmark_runs_and_counts():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.vocab_parallel", "--quick", "--ranks", "1", "2", "--clocks", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    sent = {}
    for ranks, name, value in re.findall(r"(\d) ranks, (.*): .* MiB, ([\d.]+) bytes sent", done.stdout):
        sent[int(ranks), name] = float(value)
    rows, hidden, words = 32, 32, 1000
    assert sent[1, "logits"] == sent[1, "head frozen"] == 0
    assert sent[2, "logits"] == sent[2, "head, no gradients"] == 8 + 120 / rows
    assert sent[2, "head frozen"] == sent[2, "head, nothing kept"] == 8 + 120 / rows + 4 * hidden
    assert sent[2, "gather logits"] == 2 * words / 2
