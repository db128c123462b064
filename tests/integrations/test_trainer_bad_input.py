"""The trainer against settings and folders that are wrong: the error names them, and no file is written.

Every test here is one malformed run or more; what lies on the disk before is what lies there after.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_config

from grpo_kernels import UnavailableBackendError
from grpo_kernels.trainer.config import LoraConfig
from grpo_kernels.trainer.loop import train
from grpo_kernels.trainer.run.checkpoint import load_latest
from grpo_kernels.trainer.run.directory import LOCK, RunDirectory

pytest.importorskip("transformers")
pyarrow = pytest.importorskip("pyarrow")

pytestmark = pytest.mark.usefixtures("nothing_is_written")

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
    import grpo_kernels.trainer.run.directory as module

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
