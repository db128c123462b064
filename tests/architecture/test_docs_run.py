"""The Python in the README and in docs/ runs as it stands there, block after block of one page.

A block under the line ``<!-- not run -->`` is left out: one that needs a model, a GPU or the user's own loop.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?P<skip><!-- not run -->\s*\n)?^```python[^\n]*\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line, code) of every block of a page that is meant to run."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start("code")), found["code"]) for found in BLOCK.finditer(text) if not found["skip"]
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_python_on_this_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": page.stem}
    for line, code in blocks(page):
        # Blank lines in front, so that a traceback points at the line of the page.
        exec(compile("\n" * line + code, str(page), "exec"), names)


def test_the_readme_shows_the_loss_in_a_loop_of_ones_own():
    assert any("fused_grpo_loss" in code for _, code in blocks(ROOT / "README.md"))


def test_the_readme_says_robust_not_relative_first():
    title, first = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line][:2]
    assert "Robust" in title
    assert "Relative" not in title
    assert re.search(r"[Nn]ot Group \W*Relative", title + first)
