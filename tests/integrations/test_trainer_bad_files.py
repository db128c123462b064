"""Files of settings, command lines and files of a run that are wrong end in one line that names them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from tiny_runs import tiny_config, tree

from grpo_kernels import cli
from grpo_kernels.trainer.loop import train

pytest.importorskip("transformers")
pyarrow = pytest.importorskip("pyarrow")

pytestmark = pytest.mark.usefixtures("nothing_is_written")

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
