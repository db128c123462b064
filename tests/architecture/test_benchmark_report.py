"""What is published about speed and memory is what the files of results say."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import figures, report, results  # noqa: E402

FILES = sorted(p for p in (ROOT / "benchmarks" / "results").glob("*/*.csv") if p.stem in report.COMMANDS)
MADE_ALWAYS = ("device", "threads", "versions", "commit", "date")


@pytest.fixture(scope="module")
def published() -> dict:
    return report.load()


def test_report_and_readme_are_what_the_files_make_of_them(published):
    for path, text in report.pages(published).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: python -m benchmarks report"


def test_figures_were_drawn_from_these_rows(published):
    wanted = {}
    for kind, commands in published.items():
        wanted |= figures.names(kind, commands)
    assert {path.name for path in report.FIGURES.glob("*.png")} == set(wanted)
    for name, rows in wanted.items():
        found = figures.digest_in(report.FIGURES / name)
        assert found == figures.digest(rows), f"{name} is old: python -m benchmarks report"


def test_a_changed_number_is_noticed(published):
    """Neither of the tests above could pass with one digit of one file changed."""
    kind, command = next((kind, command) for kind in published for command in published[kind] if command != "overhead")
    row = next(row for row in published[kind][command] if row["ms"] and row["vs_ours"] and not row["curve"])
    before = report.pages(published), figures.digest(published[kind][command])
    old, row["ms"] = row["ms"], "1234567"
    try:
        assert report.pages(published)[report.REPORT] != before[0][report.REPORT]
        assert figures.digest(published[kind][command]) != before[1]
    finally:
        row["ms"] = old


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_row_says_where_it_was_made_and_a_wrong_one_has_no_time(path):
    rows = results.read(path)
    assert rows
    for row in rows:
        assert all(row[name] for name in MADE_ALWAYS), row
        assert row["driver"] or path.parent.name.startswith("cpu"), row
        assert row["status"].split(":")[0] in {"ok", "wrong", "absent", "failed"}
        assert bool(row["ms"]) == (row["status"] == "ok"), row


def test_another_run_replaces_what_it_measured_and_nothing_else(tmp_path):
    import torch

    path, cpu = tmp_path / "logps.csv", torch.device("cpu")
    row = {"work": "forward", "dtype": "float32", "clock": "wall", "status": "ok", "ms": 1.0}
    results.merge(path, [{**row, "case": case, "variant": v} for case in "ab" for v in ("eager", "peer")], cpu)
    results.merge(path, [{**row, "case": "b", "variant": "eager", "ms": 2.0}], cpu)
    kept = [(r["case"], r["variant"], r["ms"]) for r in results.read(path)]
    assert kept == [("a", "eager", "1"), ("a", "peer", "1"), ("b", "eager", "2")]


def test_a_file_of_another_kind_is_refused_by_name(tmp_path):
    path = tmp_path / "old.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["what", "ms"], ["kernel", "1"]])
    with pytest.raises(ValueError, match=r"old\.csv must have the columns"):
        results.read(path)
