"""Host time of one call on next to nothing: what Python, checks, autograd and launches cost before any arithmetic.

    python -m benchmarks overhead

2 pairs of 4 tokens, 32 words, 3 groups, float32, timed by pytest-benchmark.  "kernels alone" are a backend's own
functions on tensors allocated beforehand, all that a forward (and a backward) call has to run; what a public call takes
beyond them is printed beside it.  The aim on CPU is 60 µs for a forward call of the loss.  On a GPU the calls are not
waited for, so this is still the host's time.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.results import Row, merge, results_path

PAIRS, TOKENS, VOCABULARY, WIDTH, GROUPS = 2, 4, 32, 16, 3
TARGET_US = 60.0
KERNELS, LOSS, EAGER = "kernels alone", "fused_grpo_loss", "eager"
FORWARD, BOTH = "forward", "forward + backward"
FORWARD_ONLY, FORWARD_FIXED, FORWARD_MOVING = "forward, no gradients", "forward, α fixed", "forward, α moves"
BOTH_MOVING = "forward + backward, α moves"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(options: Namespace) -> int:
    if importlib.util.find_spec("pytest_benchmark") is None:
        print("overhead: left out, pytest-benchmark is not installed")
        return 0
    seconds = 0.1 if options.quick else 0.4
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
        command += [str(Path(__file__).with_name("overhead_calls.py"))]
        command += ["--benchmark-only", "--benchmark-quiet", f"--benchmark-json={report}", "--benchmark-disable-gc"]
        command += ["--benchmark-warmup=on", "--benchmark-warmup-iterations=200", f"--benchmark-max-time={seconds}"]
        done = subprocess.run(command, cwd=Path(__file__).parents[1])
        if done.returncode:
            return done.returncode
        results = json.loads(report.read_text())["benchmarks"]
    rows = rows_of(results)
    for line in described(rows):
        print(line)
    merge(results_path("overhead", DEVICE, options.results), rows, DEVICE)
    return 0


def rows_of(results: list[dict]) -> list[Row]:
    """pytest-benchmark's report as rows; times there are in seconds."""
    rows: list[Row] = []
    for result in results:
        case, work, variant = result["extra_info"]["key"]
        stats = result["stats"]
        rows.append(
            {"case": case, "work": work, "dtype": "float32", "clock": "wall", "rows": 2 * PAIRS * TOKENS,
             "vocabulary": VOCABULARY, "hidden": WIDTH, "pairs": PAIRS, "groups": GROUPS, "variant": variant,
             "status": "ok", "ms": 1e3 * stats["median"], "q1_ms": 1e3 * stats["q1"], "q3_ms": 1e3 * stats["q3"],
             "best_ms": 1e3 * stats["min"], "rounds": stats["rounds"]}
        )  # fmt: skip
    return rows


def described(rows: list[Row]) -> list[str]:
    """A line a call; where kernels were timed too, what it takes beyond them."""
    lines = []
    for row in rows:
        beyond, least = beyond_kernels(row, rows), beyond_kernels(row, rows, "best_ms")
        lines.append(
            f"{row['case'] + ', ' + row['work']:<58}{row['variant']:<24}"
            f"median {1e3 * float(row['ms']):7.1f} µs, fastest {1e3 * float(row['best_ms']):7.1f} µs"
            + ("" if beyond is None else f"; beyond the kernels {beyond:6.1f} and {least:6.1f} µs")
        )
    return [*lines, f"the aim is {TARGET_US:g} µs beyond the kernels for a forward call of the loss on CPU"]


def beyond_kernels(row: Mapping, rows: Sequence[Mapping], column: str = "ms") -> float | None:
    """Microseconds of a row beyond the kernels of the same case and direction; None for rows without any."""
    if row["variant"] in (KERNELS, EAGER):
        return None
    direction = BOTH if str(row["work"]).startswith(BOTH) else FORWARD
    for other in rows:
        if (other["case"], other["work"], other["variant"]) == (row["case"], direction, KERNELS):
            return 1e3 * (float(row[column]) - float(other[column]))
    return None
