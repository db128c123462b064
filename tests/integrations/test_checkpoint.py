"""Checkpoints are whole or not there; damage is seen and named, and the one before is used; reading runs no code."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_config

from grpo_kernels.trainer.run import checkpoint as module
from grpo_kernels.trainer.run.checkpoint import (
    Checkpoint,
    CheckpointError,
    clear_unfinished,
    load_checkpoint,
    load_latest,
    optimizer_tensors,
    random_state,
    restore_optimizer,
    restore_random_state,
    restore_tensors,
    save_checkpoint,
    seed_random,
    sorted_checkpoints,
)
from grpo_kernels.trainer.run.directory import remove_at_once, write_atomically
from grpo_kernels.trainer.run.metrics import Metrics, read_metrics

pytest.importorskip("safetensors")


def make(step: int) -> Checkpoint:
    tensors = {"w": torch.full((3, 2), float(step)), "scalar": torch.tensor(step), "half": torch.ones(2).bfloat16()}
    return Checkpoint(step, {"model": tensors, "random": {"torch": torch.get_rng_state()}}, {"names": ["é", "b"]})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back_with_its_bits(tmp_path):
    one = make(7)
    again = load_checkpoint(save_checkpoint(tmp_path, one))
    assert again.step == 7
    assert again.scalars == one.scalars
    for part, tensors in one.parts.items():
        for name, tensor in tensors.items():
            assert again.parts[part][name].dtype == tensor.dtype
            assert torch.equal(again.parts[part][name], tensor)


def test_the_last_few_are_kept_and_the_latest_is_found_by_number(tmp_path):
    for step in (9, 10, 99_999_999, 100_000_000):
        save_checkpoint(tmp_path, make(step), keep=2)
    assert names(tmp_path) == ["step-100000000", "step-99999999"]
    assert load_latest(tmp_path).step == 100_000_000
    assert load_latest(tmp_path / "nowhere") is None


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("file", ["model.safetensors", "random.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, file, damage):
    save_checkpoint(tmp_path, make(1))
    path = save_checkpoint(tmp_path, make(2))
    damage(path / file)
    with pytest.raises(CheckpointError, match=rf"step-00000002 is damaged: {file}"):
        load_checkpoint(path)
    with pytest.warns(UserWarning, match=rf"{file}.*going on from step 1 instead"):
        assert load_latest(tmp_path).step == 1


def test_when_all_are_damaged_nothing_is_guessed(tmp_path):
    for step in (1, 2):
        truncate(save_checkpoint(tmp_path, make(step)) / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used.*step-00000002.*step-00000001"):
        load_latest(tmp_path)


def test_a_changed_setting_in_the_manifest_is_seen(tmp_path):
    manifest = save_checkpoint(tmp_path, make(1)) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 1', '"step": 2'))
    with pytest.raises(CheckpointError, match=r"manifest\.json does not have the SHA-256"):
        load_latest(tmp_path)


@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, call):
    save_checkpoint(tmp_path, make(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(CheckpointError, match=r"step 2 cannot be saved.*No space left"):
            save_checkpoint(tmp_path, make(2))
    assert names(tmp_path) == ["step-00000001"]
    assert load_latest(tmp_path).step == 1


def test_a_process_that_dies_while_saving_leaves_no_checkpoint_and_its_remains_are_cleared(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, make(1))
    with monkeypatch.context() as patch:
        # As kill -9 leaves it: everything written, nothing renamed, no clearing up.
        patch.setattr(os, "rename", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(module, "remove", lambda path: None)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, make(2))
    assert len(names(tmp_path)) == 2
    assert [path.name for path in sorted_checkpoints(tmp_path)] == ["step-00000001"]
    clear_unfinished(tmp_path)
    assert names(tmp_path) == ["step-00000001"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_reached_again(tmp_path):
    path = save_checkpoint(tmp_path, make(2))
    truncate(path / "model.safetensors")
    save_checkpoint(tmp_path, make(2))
    assert load_latest(tmp_path).step == 2


def test_loading_runs_no_code(tmp_path, monkeypatch):
    import pickle

    path = save_checkpoint(tmp_path, make(1))
    for unpickle in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, unpickle, lambda *a, **k: pytest.fail("a checkpoint was unpickled"))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    load_checkpoint(path)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_a_manifest_cannot_reach_outside_its_folder(tmp_path):
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"x")
    path = save_checkpoint(tmp_path / "run", make(1))
    body = json.loads((path / "manifest.json").read_text())["body"]
    body["files"] = {"../../secret.safetensors": {"sha256": "", "bytes": 1}}
    forged = {"sha256": module._sha256_of(body), "body": body}
    (path / "manifest.json").write_text(json.dumps(forged))
    with pytest.raises(CheckpointError, match="No such file"):
        load_checkpoint(path)


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "RMSprop"])
def test_an_optimizer_goes_on_with_the_same_bits(kind):
    def build():
        torch.manual_seed(1)
        parameters = {name: torch.nn.Parameter(torch.randn(4, 3)) for name in ("b", "a")}
        options = {} if kind == "AdamW" else {"momentum": 0.9}
        return parameters, getattr(torch.optim, kind)(parameters.values(), lr=0.1, **options)

    def step(parameters, optimizer, seed):
        torch.manual_seed(seed)
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    parameters, optimizer = build()
    step(parameters, optimizer, 2)
    others, resumed = build()
    restore_tensors(others, {name: p.detach().clone() for name, p in parameters.items()}, "model")
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, parameters).items()}
    restore_optimizer(resumed, others, saved)
    for seed in (3, 4):
        step(parameters, optimizer, seed)
        step(others, resumed, seed)
    for name in parameters:
        assert torch.equal(parameters[name], others[name])
    with pytest.raises(CheckpointError, match="not trained here"):
        restore_optimizer(resumed, others, {"c/step": torch.zeros(())})


def test_random_streams_go_on_where_they_were():
    numpy = pytest.importorskip("numpy")

    def draw():
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), numpy.random.rand(3).tolist()

    random.gauss(0, 1)  # leaves a second draw waiting
    tensors, scalars = random_state()
    scalars = json.loads(json.dumps(scalars))
    expected = draw()
    draw()
    restore_random_state(tensors, scalars)
    assert draw() == expected


def test_all_random_streams_are_of_the_seed_and_the_rank():
    numpy = pytest.importorskip("numpy")

    def draw(seed, rank):
        seed_random(seed, rank)
        return torch.rand(3).tolist(), random.random(), numpy.random.rand(3).tolist()

    drawn = [draw(*where) for where in ((0, 0), (0, 1), (1, 0), (0, 2), (2**32 - 1, 1))]
    for one, *others in zip(*drawn, strict=True):  # of each stream
        assert one not in others
    assert draw(0, 1) == drawn[1]
    seed_random(3, 0)  # the first rank's is the seed's own
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))


def test_tensors_that_do_not_fit_are_refused_by_name():
    with pytest.raises(CheckpointError, match=r"model does not fit: 1 names differ, 'v' first"):
        restore_tensors({"w": torch.zeros(2)}, {"w": torch.zeros(2), "v": torch.zeros(1)}, "model")
    with pytest.raises(CheckpointError, match=r"w is torch.float32 \(3,\) in it, torch.float32 \(2,\) here"):
        restore_tensors({"w": torch.zeros(2)}, {"w": torch.zeros(3)}, "model")


def test_metrics_are_cut_to_the_checkpoint_and_a_half_line_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write({"kind": "train", "step": 1, "loss": float("nan")})
    kept = metrics.sync()
    metrics.write({"kind": "train", "step": 2, "loss": 0.5})
    metrics.close()
    with open(path, "a") as file:
        file.write('{"kind": "tra')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    assert read_metrics(path)[0]["loss"] is None
    metrics = Metrics(path, keep_bytes=kept)
    metrics.write({"kind": "train", "step": 3})
    metrics.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 3]
    with pytest.warns(UserWarning, match="shorter than when the checkpoint was saved"):
        Metrics(path, keep_bytes=10_000).close()


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"before")
    monkeypatch.setattr(os, "fsync", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"after")
    assert path.read_bytes() == b"before"
    assert names(tmp_path) == ["file"]


def test_a_run_whose_last_checkpoint_is_damaged_comes_to_the_same_end(tmp_path):
    pytest.importorskip("transformers")
    from grpo_kernels.trainer.loop import train

    config = tiny_config(tmp_path, steps=6)
    train(config)
    checkpoints = Path(config.run_dir) / "checkpoints"
    whole, before = load_latest(checkpoints), (Path(config.run_dir) / "metrics.jsonl").read_bytes()
    flip(checkpoints / "step-00000006" / "optimizer.safetensors")
    with pytest.warns(UserWarning, match="going on from step 3 instead"):
        train(replace(config, resume=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_latest(checkpoints)
    assert again.step == 6
    for part, tensors in whole.parts.items():
        assert all(torch.equal(tensor, again.parts[part][name]) for name, tensor in tensors.items())
    assert (Path(config.run_dir) / "metrics.jsonl").read_bytes() == before


def test_what_is_removed_is_there_in_full_or_not_at_all(tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path, make(1))
    with monkeypatch.context() as patch:
        # As kill -9 leaves it within the removal.
        patch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remove_at_once(path)
    assert not path.exists()
    clear_unfinished(tmp_path)
    assert names(tmp_path) == []
