"""Files of data that are wrong are named with their line and field, and nothing is written."""

from __future__ import annotations

import gzip
import json
import math
import os
import random

import pytest
from tiny_runs import tiny_config

from grpo_kernels.trainer.config import DataConfig
from grpo_kernels.trainer.data import read_pairs
from grpo_kernels.trainer.loop import train

pytest.importorskip("transformers")
pyarrow = pytest.importorskip("pyarrow")

pytestmark = pytest.mark.usefixtures("nothing_is_written")

ROW = {"prompt": "Q", "chosen": " yes", "rejected": " no", "group": "a"}
LINE = json.dumps(ROW).encode() + b"\n"


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def nested(field: str, depth: int) -> bytes:
    rest = ", ".join(f'"{name}": " {name}"' for name in ROW if name != field)
    return b'{"%s": %s, %s}\n' % (field.encode(), b"[" * depth + b"]" * depth, rest.encode())


BROKEN = {
    "not compressed.jsonl.gz": LINE,
    "cut off.jsonl.gz": gzip.compress(LINE * 500)[:-20],
    "bad stream.jsonl.gz": flipped(gzip.compress(random.Random(0).randbytes(3000)), 40),
    "bad sum.jsonl.gz": flipped(gzip.compress(LINE * 50), -6),
    "nothing in it.jsonl.gz": gzip.compress(b""),
    "empty.jsonl.gz": b"",
    "utf-16.jsonl": LINE.decode().encode("utf-16"),
    "zeros.jsonl": bytes(100),
    "mac line ends.jsonl": LINE.replace(b"\n", b"\r") * 2,
    "nan.jsonl": b'{"prompt": NaN, "chosen": " a", "rejected": " b", "group": 1}\n',
    "infinite group.jsonl": b'{"prompt": "q", "chosen": " a", "rejected": " b", "group": 1e999}\n',
    "deep group.jsonl": nested("group", 950),
    "deeper prompt.jsonl": nested("prompt", 985),
    "deepest.jsonl": nested("prompt", 100_000),
    "array.jsonl": b"[" + LINE.strip() + b"]\n",
    "text.jsonl": b"hello\n",
    "half.jsonl": LINE + LINE[:30],
    "no parquet.parquet": LINE,
    "empty.parquet": b"",
    "magic alone.parquet": b"PAR1PAR1",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_data_file_is_named(folder, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    config = tiny_config(folder)
    config.data.train = str(path)
    with pytest.raises(ValueError) as error:
        train(config)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.parquet", "folder.jsonl", "loop.jsonl", "pipe.jsonl", "x" * 300])
def test_a_data_file_that_is_none_is_named_and_not_waited_for(folder, tmp_path, name):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    config = tiny_config(folder)
    for split in ("train", "test"):
        setattr(config.data, split, str(tmp_path / name))
        with pytest.raises(ValueError, match=name):
            train(config)


def test_a_home_of_nobody_is_an_error_like_any_other():
    with pytest.raises(ValueError, match=r"'~nobody_of_this_name/x\.jsonl' cannot be the name of a file"):
        read_pairs("~nobody_of_this_name/x.jsonl", DataConfig())


def column(**changes):
    return pyarrow.table({**{name: [value] for name, value in ROW.items()}, **changes})


NOT_TEXT = pyarrow.Array.from_buffers(
    pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (column(prompt=[b"bytes"]), "row 1: field 'prompt' must be a string"),
        (column(prompt=pyarrow.array([[("a", "b")]], pyarrow.map_(pyarrow.string(), pyarrow.string()))), "'prompt[0]'"),
        (column(group=pyarrow.array([10**18], pyarrow.timestamp("ns"))), "row 1: field 'group' must be"),
        (column(group=[math.nan]), "row 1: field 'group' must be"),
        (column(chosen=NOT_TEXT), "damaged after row 0"),
        (column().append_column("group", pyarrow.array(["b"])), "column 'group' is there 2 times"),
        (column().drop_columns(["group"]), "field 'group' is missing"),
        (column().slice(0, 0), "holds no pairs"),
    ],
)
def test_a_table_that_is_wrong_is_named_with_its_column(tmp_path, table, says):
    from pyarrow import parquet

    path = str(tmp_path / "pairs.parquet")
    parquet.write_table(table, path)
    with pytest.raises(ValueError) as error:
        read_pairs(path, DataConfig())
    assert str(error.value).startswith(path)
    assert says in str(error.value)


def test_half_a_surrogate_that_only_a_template_shows_is_named(folder, tmp_path):
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{{ m['name'] }}{% endfor %}")
    message = {"role": "user", "content": "q", "name": "\ud800"}
    row = {
        "prompt": [message],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
        "group": "a",
    }
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(row) + "\n")
    config = tiny_config(folder)
    config.data.train, config.model.chat_template = str(path), str(tmp_path / "template.jinja")
    with pytest.raises(ValueError, match=r"chat\.jsonl:1: the chat template writes half a surrogate pair"):
        train(config)
