"""The files that the documentation and the docstrings name are there."""

from __future__ import annotations

import re

import pytest
from imports import ROOT

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
SOURCES = sorted((ROOT / "grpo_kernels").rglob("*.py"))
THERE = {
    str(path.relative_to(ROOT))
    for folder in ("grpo_kernels", "tests", "tools", "benchmarks", "experiments", "examples", "csrc")
    for path in (ROOT / folder).rglob("*.*")
} | {"setup.py"}


def is_there(name: str) -> bool:
    return any(path == name or path.endswith(f"/{name}") for path in THERE)


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path):
    named = set(re.findall(r"`([\w/]+\.(?:py|cu|cpp|h))`", path.read_text(encoding="utf-8")))
    assert not {name for name in named if not is_there(name)}


def test_a_file_that_is_gone_is_noticed():
    assert is_there("loss/autograd.py")
    assert not is_there("linear_ops.py")
