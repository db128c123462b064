"""docs/scaling.md says what its formulas and the file of measurements say, and the two agree where both speak."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import scaling_on_paper as paper  # noqa: E402
from benchmarks.results import read  # noqa: E402

ROWS = [row for row in read(paper.MEASURED) if row["case"] != "gather logits"]
WORK_OF_GEMM = 6 << 20
"""Bytes that a GEMM takes for itself on one thread; more threads take more."""


def test_the_tables_are_what_the_formulas_and_the_measurements_make_of_them():
    text = paper.PAGE.read_text(encoding="utf-8")
    assert paper.page(text) == text, "the page is old: python -m benchmarks.scaling_on_paper"


def test_a_page_without_a_place_for_a_table_is_named():
    with pytest.raises(ValueError, match=r"scaling\.md must have a place for the table 'measured'"):
        paper.page("")


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row["threads"] == "1"], ids=lambda row: f"{row['case']}, {row['curve']} ranks"
)
def test_the_memory_measured_is_that_of_the_formula(row):
    beyond = float(row["peak_mib"]) * 2**20 - paper.expected_peak(row)
    assert -0.005 * paper.expected_peak(row) <= beyond <= WORK_OF_GEMM


@pytest.mark.parametrize("row", [row for row in ROWS if row["curve"] != "1"], ids=lambda row: row["case"])
def test_the_bytes_counted_are_eight_a_row_and_with_a_gradient_of_hidden_its_sum(row):
    rows = int(row["labelled"])
    summed = 0 if row["case"] in ("logits", "head, no gradients") else 4 * rows * int(row["hidden"])
    assert int(row["bytes"]) == 8 * rows + 120 + summed


def test_gathering_logits_would_be_two_bytes_a_word():
    for row in read(paper.MEASURED):
        if row["case"] == "gather logits":
            assert int(row["bytes"]) == int(row["rows"]) * int(row["vocabulary"]) // int(row["curve"]) * 2


def test_plans_use_every_gpu():
    for plan in paper.PLANS:
        assert plan.tensor * plan.context * plan.data == plan.gpus


def test_what_the_text_says_of_the_plans():
    all_of_it = {(plan.gpus, str(plan)): plan for plan in paper.PLANS}
    small, chosen, wide = all_of_it[8, "1 × 8 × 1"], all_of_it[64, "8 × 8 × 1"], all_of_it[64, "1 × 64 × 1"]
    parts = paper.memory(small, frozen=False)
    assert parts["state"] > paper.GPU_MEMORY
    assert parts["layer inputs"] / 1e9 == pytest.approx(172, abs=0.5)
    assert paper.longest(small, frozen=True) / 1024 == pytest.approx(220, abs=5)

    def seconds(plan):
        sent = paper.traffic(plan, frozen=False)
        return (sent["tensor"] + sent["head"]) / paper.NEAR + (sent["context"] + sent["FSDP2"]) / paper.FAR

    def total(plan):
        return sum(paper.memory(plan, frozen=False).values())

    assert (round(seconds(chosen)), round(seconds(wide))) == (9, 38)
    work = paper.operations(frozen=False)
    computing = sum(work.values()) / paper.FLOPS / 64
    assert computing == pytest.approx(150, abs=1)
    assert work["head"] / sum(work.values()) == pytest.approx(0.005, abs=5e-4)
    words, rows = paper.MODEL.vocabulary // 8, chosen.rows
    own = rows * paper.MODEL.hidden * paper.HALF + words * paper.MODEL.hidden * paper.HALF
    assert (own + paper.head_bytes(rows, paper.MODEL.hidden, words)) / 1e9 == pytest.approx(14, abs=0.5)
    assert own + paper.head_bytes(rows // 8, paper.MODEL.hidden, words) < 5e9
    gathered = own + paper.logits_bytes(rows, paper.MODEL.vocabulary)
    assert gathered / 1e9 == pytest.approx(72, abs=1)
    assert total(chosen) < paper.GPU_MEMORY < total(chosen) - paper.memory(chosen, frozen=False)["head"] + gathered
    data, context = all_of_it[512, "8 × 8 × 8"], all_of_it[512, "8 × 64 × 1"]
    assert total(data) / total(context) == pytest.approx(5, abs=0.5)
    assert seconds(context) / (computing / 8) == pytest.approx(0.25, abs=0.05)
