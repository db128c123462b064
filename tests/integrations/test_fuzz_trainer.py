"""Anything at all in place of data and settings: it is taken for what it is, or refused by name; nothing else happens.

make test           some drawn cases of each, the same ones every time
make test-slow      more
make test-nightly   many, others every night
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import math
import os
import re
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import pytest
import yaml
from drawn import drawn
from hypothesis import assume
from hypothesis import strategies as st

from grpo_kernels import cli
from grpo_kernels.trainer.config import DataConfig, LoraConfig, TrainConfig
from grpo_kernels.trainer.data import Pair, read_pairs

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

COUNTS = {"default": 40, "slow": 400, "nightly": 5000}

TEXTS = st.text(max_size=8) | st.sampled_from(["", " ", "\0", "\ud800", "\u2028", "\x1b[2J", "😀", "é"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "name"]), st.sampled_from(["user", "assistant"]) | ANYTHING)
    | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXTS | st.just(" x")}),
    max_size=3,
)
FIELDS = {"prompt": "Q", "chosen": " yes", "rejected": " no", "group": "a"}
ROWS = st.fixed_dictionaries({}, optional={name: st.just(good) | MESSAGES | ANYTHING for name, good in FIELDS.items()})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where nothing else may be written."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert set(os.listdir(tmp_path)) <= {"pairs.jsonl", "pairs.jsonl.gz", "pairs.parquet", "run.yaml"}


def read_or_refused(name: str, content: bytes) -> list[Pair] | None:
    """Pairs that keep their promises, or an error that begins with the file's name."""
    with open(name, "wb") as file:
        file.write(content)
    refused, pairs = None, []
    try:
        pairs = read_pairs(name, DataConfig())
    except ValueError as error:
        refused = error
    if refused is not None:
        assert type(refused) is ValueError
        assert str(refused).startswith(name), refused
        return None
    assert pairs
    for pair in pairs:
        assert pair.where.startswith(name)
        assert pair.group.strip()
        assert pair.chosen != pair.rejected
        for text in (pair.prompt, pair.chosen, pair.rejected):
            for part in [text] if isinstance(text, str) else [m[k] for m in text for k in ("role", "content")]:
                part.encode()
    return pairs


def altered(data: Any, content: bytes) -> bytes:
    """Bytes cut out, written over, doubled."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at, length = data.draw(st.integers(0, len(changed))), data.draw(st.integers(0, 8))
        changed[at : at + length] = data.draw(st.binary(max_size=8) | st.just(bytes(changed[at : at + 2 * length])))
    return bytes(changed)


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@drawn(**COUNTS)
def test_any_rows_are_pairs_or_refused(data):
    rows = data.draw(st.lists(ROWS, min_size=1, max_size=3))
    pairs = read_or_refused("pairs.jsonl", lines(rows))
    assert pairs is None or len(pairs) == len(rows)


@drawn(**COUNTS)
def test_any_bytes_are_pairs_or_refused(data):
    good = lines([FIELDS, {**FIELDS, "group": 7}])
    read_or_refused(
        "pairs.jsonl", data.draw(st.binary(max_size=60)) if data.draw(st.booleans()) else altered(data, good)
    )


@drawn(**COUNTS)
def test_any_compressed_bytes_are_pairs_or_refused(data):
    read_or_refused("pairs.jsonl.gz", altered(data, gzip.compress(lines([FIELDS] * 3), mtime=0)))


@drawn(**COUNTS)
def test_any_table_is_pairs_or_refused(data):
    names = data.draw(st.lists(st.sampled_from([*FIELDS, "other"]), min_size=1, max_size=6))
    height = data.draw(st.integers(0, 3))
    columns = []
    for name in names:
        good = st.just(FIELDS.get(name, "x"))
        values = data.draw(st.lists(good | LEAVES, min_size=height, max_size=height))
        try:
            columns.append(pyarrow.array(values))
        except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
            assume(False)
    sink = io.BytesIO()
    try:
        parquet.write_table(pyarrow.Table.from_arrays(columns, names=names), sink)
    except (pyarrow.ArrowException, UnicodeEncodeError):
        assume(False)
    content = sink.getvalue()
    read_or_refused("pairs.parquet", altered(data, content) if data.draw(st.booleans()) else content)


@drawn(**COUNTS)
def test_good_rows_come_back_whatever_is_in_them(data):
    words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    texts = words.filter(str.strip)
    rows = [
        {
            "prompt": data.draw(words),
            "chosen": data.draw(texts),
            "rejected": data.draw(texts),
            "group": data.draw(texts),
        }
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    assume(all(row["chosen"] != row["rejected"] for row in rows))
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    pairs = read_or_refused("pairs.jsonl", content)
    assert pairs is not None
    assert [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected, "group": p.group} for p in pairs] == rows


def leaves(settings: Any, prefix: str = "") -> list[str]:
    """Every setting there is, by its dotted name, sections too."""
    found = []
    for field in fields(settings):
        found.append(prefix + field.name)
        if is_dataclass(value := getattr(settings, field.name)):
            found += leaves(value, f"{prefix}{field.name}.")
    return found


def whole() -> TrainConfig:
    config = TrainConfig()
    config.data.train = "pairs.jsonl"
    config.model.lora = LoraConfig()
    return config


SETTINGS = leaves(whole())
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 0.5, math.nan, math.inf, 1 << 40, 10**400])
WORDS = st.sampled_from(["", "a", "\0", "\ud800", "none", "tiny", "sgd", "start", "ipo", "../x", "~", "x" * 300])
ODDITIES = st.none() | st.booleans() | NUMBERS | WORDS | st.lists(NUMBERS | WORDS, max_size=3) | st.binary(max_size=2)


@drawn(default=150, slow=1500, nightly=20_000)
def test_any_value_of_any_setting_is_taken_or_refused_by_name(data):
    config = whole()
    changed = data.draw(st.lists(st.sampled_from(SETTINGS), min_size=1, max_size=3, unique=True))
    for name in changed:
        *path, last = name.split(".")
        section: Any = config
        for part in path:
            section = getattr(section, part, None)
        if is_dataclass(section):
            setattr(section, last, data.draw(ODDITIES, label=name))
    before = copy.deepcopy(config)
    refused = None
    try:
        config.check()
    except (TypeError, ValueError) as error:
        refused = error
    if refused is not None:
        assert type(refused) in (TypeError, ValueError)
        assert re.match(r"[a-z_.0-9]+(\[\d+\])? ", str(refused))
        assert any(name in str(refused) for name in changed), refused
    else:
        # What is taken can be written down, and read back the same.
        plain = json.loads(json.dumps(asdict(config), allow_nan=False))
        assert yaml.safe_load(yaml.safe_dump(plain, allow_unicode=True)) == plain
    assert repr(config) == repr(before)


@drawn(default=60, slow=400, nightly=4000)
def test_any_file_of_settings_is_taken_or_refused_in_one_line(data):
    pytest.importorskip("jsonargparse")
    good = yaml.safe_dump({"steps": 3, "optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "model": {"lora": {"rank": 2}}})
    kind = data.draw(st.sampled_from(["bytes", "altered", "setting"]))
    if kind == "bytes":
        content = data.draw(st.binary(max_size=40) | st.text(max_size=40).map(lambda t: t.encode(errors="replace")))
    elif kind == "altered":
        content = altered(data, good.encode())
    else:
        *path, last = data.draw(st.sampled_from(SETTINGS)).split(".")
        settings: Any = {last: data.draw(ANYTHING)}
        for part in reversed(path):
            settings = {part: settings}
        content = json.dumps(settings).encode()  # which is YAML too, nearly always
    with open("run.yaml", "wb") as file:
        file.write(content)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        # Past the parser there is no such file of pairs: a run never starts.
        code = cli.main(["train", "--config", "run.yaml", "--data.train", "gone.jsonl", "--device", "cpu"])
    assert code == 2, err.getvalue()
    assert err.getvalue().startswith("grpo-kernels: error: ")
    assert err.getvalue().count("\n") == 1
    assert err.getvalue().rstrip("\n").isprintable()
    assert out.getvalue() == ""
