"""The TRL example runs as it stands, without a network, and says how each group came out."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is not installed (it wants Python 3.11 or newer)")

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "trl_dpo.py"


def run(monkeypatch, capsys, folder, *flags):
    """The worst held-out loss of a run of the program, and alpha by group."""
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), "--output_dir", str(folder), *flags])
    runpy.run_path(str(PROGRAM), run_name="__main__")
    said = capsys.readouterr().out.split("\nheld out, after ")[1]
    alpha = {name: float(value) for name, value in re.findall(r"(\w+)  loss .* alpha ([\d.]+)", said)}
    return float(re.search(r"worst group: \w+, loss ([\d.]+)", said)[1]), alpha


def test_the_example_serves_its_worst_group_better_than_dpo(tmp_path, monkeypatch, capsys):
    plain, shares = run(monkeypatch, capsys, tmp_path / "dpo", "--method", "dpo", "--steps", "30")
    robust, alpha = run(monkeypatch, capsys, tmp_path / "gr", "--steps", "30")
    assert robust < plain
    assert alpha["experts"] > 1 / 3 > shares["experts"]


def test_the_example_goes_on_where_it_was_left(tmp_path, monkeypatch, capsys):
    whole = run(monkeypatch, capsys, tmp_path, "--steps", "6")
    (tmp_path / "checkpoint-6").rename(tmp_path / "gone")
    assert run(monkeypatch, capsys, tmp_path, "--steps", "6", "--resume") == whole
