"""How many cases are drawn, and a few of them on the Triton kernels, in Triton's interpreter; the traps too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_drawn_head
import test_drawn_invariances
import test_drawn_loss
from drawn import DRAWN

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"
MODULES = [module.__name__ for module in (test_drawn_head, test_drawn_invariances, test_drawn_loss)]


def test_the_counts_are_the_promised_ones_and_those_of_the_page():
    counts = [numbers for name, numbers in DRAWN.items() if name.rpartition(".")[0] in MODULES]
    default, slow, nightly = map(sum, zip(*counts, strict=True))
    assert slow >= 2_000
    assert nightly >= 50_000
    assert f"{default:,} / {slow:,} / {nightly:,}" in PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "without"),
    [
        # Against the oracle; the invariances are of bits, which Triton's depend on where in 16 bytes a row starts.
        (["test_drawn_loss.py", "test_drawn_head.py"], ""),
        (["test_numerical_traps.py"], "256k 32k 32_bits flat_row reference keeps"),
    ],
    ids=["drawn", "traps"],
)
def test_triton_in_its_interpreter(files, without):
    pytest.importorskip("triton")
    kernels = HERE.parent / "kernels"
    selection = " and ".join(f"not {word}" for word in without.split())
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "triton_interpreter", "-p", "no:cacheprovider",
            *(HERE / name for name in files), "-k", selection,
        ],
        env={
            **os.environ,
            "GRPO_KERNELS_TEST_BACKENDS": "triton",
            "PYTHONPATH": os.pathsep.join([str(kernels), os.environ.get("PYTHONPATH", "")]),
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
        },
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
