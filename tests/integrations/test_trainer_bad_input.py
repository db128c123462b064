"""The trainer against settings, files and folders that are wrong: the error names them, and no file is written.

Every test here is one malformed run or more, started as a program or on the command line starts it; what lies on the
disk before is what lies there after.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import random
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import tiny_config

from grpo_kernels import UnavailableBackendError, cli
from grpo_kernels.trainer.checkpoint import load_latest
from grpo_kernels.trainer.config import DataConfig, LoraConfig
from grpo_kernels.trainer.data import read_pairs
from grpo_kernels.trainer.loop import train
from grpo_kernels.trainer.run_directory import LOCK, RunDirectory

pytest.importorskip("transformers")
pyarrow = pytest.importorskip("pyarrow")

NAN, INF, HUGE = math.nan, math.inf, 10**400

NOT_INTS = ["8", 1.5, 8.0, NAN, True, None, [8]]
NOT_NUMBERS = ["0.1", None, True, [0.1], 1j]
NOT_FLAGS = ["yes", 0, None]
NOT_TEXTS = [3, None, b"bytes", Path("a")]

WRONG_TYPES = {
    "steps": NOT_INTS,
    "batch_size": NOT_INTS,
    "micro_batch_size": ["2", 2.0, True],
    "seed": [1.0, "1", None],
    "keep_checkpoints": [2.0],
    "run_dir": NOT_TEXTS,
    "device": [3, None, torch.device("cpu")],
    "reference_cache": [3, True],
    "resume": NOT_FLAGS,
    "quiet": [None],
    "bf16": NOT_FLAGS,
    "data.train": NOT_TEXTS,
    "data.test": [None],
    "data.group_field": [3, None],
    "data.max_length": ["32", 32.0],
    "data.append_eos": NOT_FLAGS,
    "data.subset": [3],
    "loss.beta": NOT_NUMBERS,
    "loss.length_normalize": NOT_FLAGS,
    "loss.fused_head": [None],
    "loss.backend": [None, 1],
    "groups.group_lr": NOT_NUMBERS,
    "groups.mixing": ["0"],
    "optim.lr": NOT_NUMBERS,
    "optim.betas": [None, "ab", 0.9],
    "optim.lr_warmup_steps": [1.5],
    "optim.average_iterates": ["x"],
    "supervised.steps": [1.5],
    "model.name": NOT_TEXTS,
    "model.tiny.hidden_size": ["16"],
    "model.lora": [5, "r8", {"rank": 2}],
    "model.lora.rank": ["4"],
    "model.lora.target_modules": [3],
    "model": [None],
    "optim": [{}],
}

WRONG_VALUES = {
    "steps": [0, -1],
    "batch_size": [0, -8],
    "micro_batch_size": [0, 3, 16],
    "seed": [-1, 1 << 32, 1 << 70],
    "log_every": [0],
    "eval_every": [-1],
    "save_every": [-1],
    "keep_checkpoints": [0],
    "sampling": ["random", "", None],
    "device": ["", "nonsense", "meta", "cuda:99", "cuda:-1"],
    "run_dir": ["", " ", "a\0b", "\udcff", "x" * 300, "train.jsonl", "train.jsonl/run"],
    "reference_cache": ["train.jsonl", "a\0b"],
    "data.train": ["", "a\0.jsonl"],
    "data.prompt_field": [""],
    "data.rejected_field": ["chosen"],
    "data.max_length": [1, -5, 10**9],
    "data.max_prompt_length": [0, 32, 33],
    "loss.type": ["dpo", None, "SIGMOID"],
    "loss.beta": [0, -0.1, NAN, INF, HUGE],
    "loss.label_smoothing": [0.5, -0.1, NAN],
    "loss.backend": ["fast", ""],
    "groups.method": ["grpo", "GR_DPO", None],
    "groups.group_lr": [-1e-9, NAN, INF, HUGE],
    "groups.estimator": ["mean"],
    "groups.prior": ["flat"],
    "groups.mixing": [-0.1, 1.1, NAN],
    "groups.size_adjustment": [-1, INF],
    "optim.name": ["adam"],
    "optim.schedule": ["step"],
    "optim.lr": [0, -1, NAN, INF, HUGE],
    "optim.betas": [(0.9,), (0.9, 1.0), (NAN, 0.9), (-0.1, 0.9), (0.9, 0.9, 0.9)],
    "optim.eps": [0],
    "optim.weight_decay": [-1],
    "optim.momentum": [NAN],
    "optim.max_grad_norm": [-1, INF],
    "optim.lr_warmup_steps": [-1],
    "optim.projection": ["ball", "start", "origin"],
    "supervised.steps": [-1],
    "supervised.batch_size": [0],
    "supervised.lr": [0, NAN],
    "distributed.strategy": ["fsdp", "fully_shard"],
    "distributed.timeout_minutes": [0, NAN, 1e300],
    "model.name": ["", "a b", "./gone", "/gone/model", "../x", "a/b/c", "a\0b", "train.jsonl"],
    "model.dtype": ["float16", None],
    "model.chat_template": ["gone.jinja", "latin.jinja"],
    "model.tiny.vocab_size": [258],
    "model.tiny.hidden_size": [0, 17],
    "model.tiny.num_heads": [0, -2],
    "model.tiny.num_layers": [0],
    "model.lora.rank": [0],
    "model.lora.alpha": [0.0, NAN],
    "model.lora.dropout": [-0.1, 1.0],
    "model.lora.target_modules": ["", []],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    tiny_config(folder)
    (folder / "latin.jinja").write_bytes(b"caf\xe9")
    return folder


@pytest.fixture(autouse=True)
def nothing_is_written(folder, monkeypatch):
    """Before and after: the same files, with the same bytes."""
    monkeypatch.chdir(folder)
    before = tree(folder)
    yield
    assert tree(folder) == before


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def with_setting(folder: Path, name: str, value: object):
    config = tiny_config(folder, steps=1)
    *path, last = name.split(".")
    if path[:2] == ["model", "lora"]:
        config.model.lora = LoraConfig(rank=2)
    section = config
    for part in path:
        section = getattr(section, part)
    setattr(section, last, value)
    return config


def cases(table):
    return [
        pytest.param(name, value, id=f"{name}={value!r}"[:60]) for name, values in table.items() for value in values
    ]


@pytest.mark.parametrize(("name", "value"), cases(WRONG_TYPES))
def test_a_setting_of_another_type_is_refused_by_its_name(folder, name, value):
    with pytest.raises(TypeError, match=rf"^{name}(\[\d\])? must be"):
        train(with_setting(folder, name, value))


@pytest.mark.parametrize(("name", "value"), cases(WRONG_VALUES))
def test_a_setting_that_makes_no_sense_is_refused_by_its_name(folder, name, value):
    with pytest.raises(ValueError) as error:
        train(with_setting(folder, name, value))
    other = {"optim.projection": "optim.projection_radius"}.get(name, name)
    assert str(error.value).startswith((f"{name} ", f"{name}=", f"{name}[", f"{other} ")), error.value


@pytest.mark.parametrize("modules", ["nothing_is_called_so", "("])
def test_adapters_that_fit_nowhere_are_refused(folder, modules):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"^model\.lora cannot be applied to this model"):
        train(with_setting(folder, "model.lora.target_modules", modules))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA says")
def test_a_device_or_a_backend_that_is_not_here_is_refused_by_name(folder):
    with pytest.raises(ValueError, match=r"^device 'cuda' cannot be used here: \S"):
        train(with_setting(folder, "device", "cuda"))
    with pytest.raises(UnavailableBackendError, match=r"^loss.backend='cuda' cannot be used: .*no CUDA GPU"):
        train(with_setting(folder, "loss.backend", "cuda"))


def test_smoothing_where_it_is_not_defined_is_refused(folder):
    config = tiny_config(folder)
    config.loss.type, config.loss.label_smoothing = "hinge", 0.1
    with pytest.raises(ValueError, match=r"^loss.label_smoothing is defined for"):
        train(config)


def test_a_model_with_too_few_positions_is_refused(folder):
    with pytest.raises(ValueError, match=r"data.max_length must be at most the model's 8 positions, got 32"):
        train(with_setting(folder, "model.tiny.max_positions", 8))


# Folders


def test_a_folder_that_is_no_runs_is_neither_replaced_nor_gone_on_with(folder, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine.txt").write_text("mine")
    for changes in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match=r"holds no run \('checkpoints' is there\)"):
            train(tiny_config(folder, run_dir=str(tmp_path), **changes))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoints", "mine.txt"]


def test_a_folder_that_somebody_fills_before_the_lock_is_had_is_refused_then(tmp_path, monkeypatch):
    import grpo_kernels.trainer.run_directory as module

    lock = module._lock

    def meanwhile(path):
        (path.parent / "config.yaml").write_text("another run's")
        return lock(path)

    monkeypatch.setattr(module, "_lock", meanwhile)
    with pytest.raises(ValueError, match="exists and is not empty"):
        RunDirectory(tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_text() == "another run's"
    monkeypatch.setattr(module, "_lock", lock)
    with RunDirectory(tmp_path / "run", resume=True):  # what refused let go of the lock
        pass


def test_a_lock_that_cannot_be_taken_says_so(tmp_path):
    (tmp_path / "run" / LOCK).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"run_dir .*run cannot be locked: Is a directory"):
        RunDirectory(tmp_path / "run")


def test_a_tilde_in_run_dir_is_the_home_folder(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    result = train(tiny_config(folder, run_dir="~/run", steps=1, eval_every=0))
    assert result.run_dir == tmp_path / "run"
    assert load_latest(tmp_path / "run" / "checkpoints").step == 1


# Files of settings

FILES = {
    "broken": (b"optim: [1, 2", "cannot be read"),
    "tab": (b"optim:\n\tlr: 1\n", "cannot be read"),
    "quote": (b"run_dir: 'abc\n", "cannot be read"),
    "latin1": (b"run_dir: caf\xe9\n", "cannot be read: 'utf-8'"),
    "binary": (bytes(range(128, 256)), "cannot be read"),
    "raw NUL": (b"run_dir: a\0b\n", "cannot be read"),
    "deep list": (b"optim: " + b"[" * 3000 + b"]" * 3000, "nested too deeply"),
    "deep mapping": (b"optim: " + b"{a: " * 600 + b"1" + b"}" * 600, "nested too deeply"),
    "list": (b"- 1\n- 2\n", "Unexpected config"),
    "text": (b"hello", "Unexpected config"),
    "empty": (b"", "Unexpected config"),
    "unknown": (b"seed: 1\nnosuch: 1\n", "bad.yaml:2: there is no setting nosuch"),
    "unknown within": (b"optim:\n  lrr: 1\n", "bad.yaml:2: there is no setting optim.lrr; did you mean optim.lr?"),
    "unknown section": (b"optimizer: {lr: 1}\n", "there is no setting optimizer"),
    "in no section": (b"beta: 1\n", "there is no setting beta; did you mean loss.beta?"),
    "twice": (b"steps: 1\nsteps: 2\n", "bad.yaml:2: steps is there twice, first in line 1"),
    "section twice": (b"optim:\n  lr: 1.0\nseed: 1\noptim:\n  name: sgd\n", "bad.yaml:4: optim is there twice"),
    "twice within": (b"optim:\n  lr: 1.0\n  lr: 2.0\n", "bad.yaml:3: optim.lr is there twice, first in line 2"),
    "cycle": (b"optim: &a\n  lr: *a\n", "optim.lr"),
    "laughs": (b"a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: &d [*c,*c]\n", "there is no setting a"),
    "includes itself": (b"config: bad.yaml\n", "loop"),
    "includes nothing": (b"config: gone.yaml\n", "gone.yaml"),
    "null section": (b"optim: null\n", "optim must hold settings by name, got None"),
    "list section": (b"optim: [1]\n", "optim must hold settings by name, got [1]"),
    "text for an int": (b"steps: ten\n", "steps"),
    "float for an int": (b"steps: 1.5\n", "steps"),
    "bool for an int": (b"steps: true\n", "steps"),
    "endless int": (b"steps: " + b"9" * 5000 + b"\n", "5000 digits"),
    "nan": (b"optim: {lr: .nan}\n", "optim.lr must be finite"),
    "inf": (b"groups: {group_lr: .inf}\n", "groups.group_lr must be finite"),
    "one beta": (b"optim: {betas: [0.9]}\n", "optim.betas"),
    "NUL": (b'run_dir: "a\\0b"\n', "run_dir must not hold a NUL"),
    "python call": (b"run_dir: !!python/object/apply:os.system ['touch pwned']\n", "could not determine a constructor"),
    "python object": (b"!!python/object/new:subprocess.Popen [[touch, pwned]]\n", "could not determine a constructor"),
    "class": (b"model:\n  class_path: subprocess.Popen\n  init_args: {args: [touch, pwned]}\n", "class_path"),
    "class of adapters": (b"model:\n  lora:\n    class_path: os.system\n    init_args: {command: touch}\n", "lora"),
}


def refused(capsys, *arguments) -> str:
    """The one line of a command that must end with exit code 2."""
    code = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert said.err.startswith("grpo-kernels: error: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_settings_that_is_wrong_is_refused_in_one_line(capsys, tmp_path, monkeypatch, name):
    pytest.importorskip("jsonargparse")
    data, says = FILES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_bytes(data)
    assert says in refused(capsys, "train", "--config", "bad.yaml", "--data.train", "gone.jsonl")
    assert os.listdir(tmp_path) == ["bad.yaml"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", "."], "Path is not a file"),
        (["--config", "gone.yaml"], "gone.yaml"),
        (["--config", "a\0b"], "null byte"),
        (["--config"], "--config"),
        (["--model", "x", "--data.train", "y.jsonl"], "model"),
        (["--model", '{"class_path": "subprocess.Popen"}'], "class_path"),
        (["--model.lora", "x"], "model.lora"),
        (["stray"], "stray"),
        (["--data.train", "\x1b[2Jgone.jsonl"], r"\x1b[2Jgone.jsonl"),
    ],
)
def test_a_command_line_that_is_wrong_is_refused_in_one_line(capsys, arguments, says):
    pytest.importorskip("jsonargparse")
    assert says in refused(capsys, "train", *arguments)


# What a run left, spoilt


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    config = tiny_config(folder, steps=1, eval_every=0)
    train(config)
    return Path(config.run_dir)


def changed(change):
    def apply(data: bytes) -> bytes:
        settings = yaml.safe_load(data)
        change(settings)
        return yaml.safe_dump(settings).encode()

    return apply


def instead(data: bytes):
    return lambda _: data


EVALUATION = b'{"kind":"eval","step":1,"groups":{"a":%s},"alpha":{"a":1.0},"mean_loss":1.0,"mean_accuracy":1.0}\n'

SPOILT = [
    ("eval", "config.yaml", changed(lambda d: d["model"].update(foo=1)), "model.foo"),
    ("eval", "config.yaml", changed(lambda d: d["data"].update(max_length="x")), "data.max_length must be an int"),
    ("eval", "config.yaml", changed(lambda d: d["loss"].update(beta=-1)), "loss.beta must be positive"),
    ("eval", "config.yaml", changed(lambda d: d.update(loss=3)), "config.yaml is not the configuration of a run"),
    ("eval", "config.yaml", changed(lambda d: d.update(micro_batch_size="q")), "batch_size must be an int"),
    ("eval", "config.yaml", instead(b""), "config.yaml is not the configuration of a run"),
    ("eval", "config.yaml", instead(b"\xff"), "config.yaml is not the configuration of a run"),
    ("eval", "config.yaml", instead(b"[" * 3000), "config.yaml is not the configuration of a run"),
    ("eval", "config.yaml", instead(b"!!python/object/apply:os.system [touch pwned]"), "is not the configuration"),
    ("eval", "summary.json", instead(b""), "summary.json is not the summary of a run"),
    ("eval", "summary.json", instead(b"[]"), "summary.json is not the summary of a run"),
    ("eval", "summary.json", instead(b'{"train_groups": "abc"}'), "summary.json is not the summary of a run"),
    ("eval", "summary.json", instead(b"[" * 30_000), "summary.json is not the summary of a run"),
    ("eval", "final/config.json", instead(b"{"), "model.name="),
    ("eval", "final/model.safetensors", lambda data: data[:-9], "cannot be loaded"),
    ("eval", "final/model.safetensors", instead(b""), "cannot be loaded"),
    ("eval", "final/tokenizer.json", lambda data: data[:99], "cannot be loaded"),
    ("eval", "final/tokenizer_config.json", instead(b"\xff"), "cannot be loaded"),
    ("eval", "final/chat_template.jinja", instead(b"\xff"), "cannot be loaded"),
    ("plot", "metrics.jsonl", instead(b""), "holds no evaluation to draw"),
    ("plot", "metrics.jsonl", instead(b"\xff\n"), "metrics.jsonl cannot be read"),
    ("plot", "metrics.jsonl", instead(b"[1]\n"), "metrics.jsonl:1: not a record of a run"),
    ("plot", "metrics.jsonl", instead(b'{"kind": "eval", "step": 1}\n'), "does not hold the records of a run"),
    ("plot", "metrics.jsonl", instead(EVALUATION % b'{"loss":null,"accuracy":1.0,"n":1}'), "no line to draw"),
]


@pytest.mark.parametrize(
    ("command", "file", "spoil", "says"), SPOILT, ids=[f"{case[0]}-{case[1]}-{i}" for i, case in enumerate(SPOILT)]
)
def test_a_spoilt_file_of_a_run_is_named_in_one_line(capsys, finished, command, file, spoil, says):
    path = finished / file
    data = path.read_bytes()
    before = tree(finished)
    try:
        path.write_bytes(spoil(data))
        assert says in refused(capsys, command, finished)
    finally:
        path.write_bytes(data)
    assert tree(finished) == before


# Data

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
        (column(group=[NAN]), "row 1: field 'group' must be"),
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
