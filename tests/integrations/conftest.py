"""Around every malformed run: what lies on the disk before is what lies there after."""

from __future__ import annotations

import pytest
from tiny_runs import tiny_config, tree


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data of a tiny run, and what a bad setting may name."""
    folder = tmp_path_factory.mktemp("bad")
    tiny_config(folder)
    (folder / "latin.jinja").write_bytes(b"caf\xe9")
    return folder


@pytest.fixture
def nothing_is_written(folder, monkeypatch):
    """Before and after: the same files, with the same bytes."""
    monkeypatch.chdir(folder)
    before = tree(folder)
    yield
    assert tree(folder) == before
