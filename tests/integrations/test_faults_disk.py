"""Full disks and damaged files: the error says what could not be written, what was saved stays, and the run goes on."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import tiny_config
from victims import FULL, HALF, KINDS, ROOT, Victims, assert_same_end, build_shim, config_of, latest, prepare

from grpo_kernels.trainer.loop import train
from grpo_kernels.trainer.run import checkpoint as module
from grpo_kernels.trainer.run.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)

pytest.importorskip("transformers")

NIGHTLY = os.environ.get("GRPO_KERNELS_NIGHTLY") == "1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disks")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def disks(folder):
    """Runs on disks that go bad, and for each kind one that did not, with the calls that it made."""
    with Victims(folder, build_shim(folder)) as victims:
        calls = {}
        for kind in KINDS:
            end = victims.run(kind, folder / f"whole {kind}")
            assert end.status == 0, end.said
            calls[kind] = end.calls
        yield victims, calls


def assert_full_and_gone_on_with(victims: Victims, kind: str, run_dir: Path, words: str, **how: int) -> bool:
    """A run on a full disk ends by itself, says which file, and ends well once there is space; False if there was."""
    end = victims.run(kind, run_dir, **how)
    if end.status != 0:
        assert end.status == 1, end.said
        assert end.error is not None
        kind_of_error, message = end.error
        assert kind_of_error in ("OSError", "CheckpointError", "ValueError"), end.said
        assert words in message, end.said
        assert str(run_dir) in message, end.said
    assert latest(run_dir) >= max(end.saved, default=0)
    again = victims.run(kind, run_dir, resume=True)
    assert again.status == 0, again.said
    assert_same_end(run_dir, victims.folder / f"whole {kind}")
    shutil.rmtree(run_dir)
    return end.status != 0


@pytest.mark.parametrize(
    "moments", [pytest.param(3, id="3"), pytest.param(10_000 if NIGHTLY else 40, id="many", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_up_at_any_call_costs_nothing_that_was_saved(disks, kind, moments):
    victims, calls = disks
    if victims.shim is None:
        pytest.skip("needs Linux and a C compiler")
    everywhere = [(at, mode) for at in range(1, calls[kind] + 1) for mode in (FULL, HALF)]
    chosen = random.Random(f"full {kind}").sample(everywhere, min(moments, len(everywhere)))
    refused = sum(
        assert_full_and_gone_on_with(
            victims, kind, victims.folder / "full", "No space left on device", mode=mode, at=at
        )
        for at, mode in chosen
    )
    # The run does without TensorBoard's files, and without removing the last old checkpoint.
    assert refused >= 0.5 * len(chosen)


@pytest.mark.parametrize("limit", [300, 8000])
def test_files_that_may_not_grow_are_as_a_full_disk(disks, limit):
    victims, _ = disks
    assert assert_full_and_gone_on_with(victims, "plain", victims.folder / "limited", "File too large", limit=limit)


SMALL_DISK = """
mount -t tmpfs -o size={size} none {folder}/disk && cd {folder} || exit 99
{command} > first.txt 2>&1; echo $? > first.code
mount -o remount,size=50m {folder}/disk
{command} --resume > second.txt 2>&1; echo $? > second.code
cp -r disk/run kept
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["40k", "120k", "160k", "250k"])
def test_a_disk_that_is_really_full_ends_the_command_in_one_line(tmp_path, folder, size):
    if sys.platform != "linux" or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("a user may not mount a small disk here")
    (tmp_path / "disk").mkdir()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings_of(folder)))
    command = f"{sys.executable} -m grpo_kernels.cli train --config run.yaml --run-dir disk/run --quiet"
    script = SMALL_DISK.format(size=size, folder=tmp_path, command=command)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(["unshare", "-rm", "sh", "-c", script], check=True, env=environment, timeout=300)
    said = (tmp_path / "first.txt").read_text()
    assert (tmp_path / "first.code").read_text() == "2\n", said
    assert said.startswith("grpo-kernels: error: ")
    assert said.count("\n") == 1
    assert "No space left on device" in said
    assert "disk/run" in said
    assert (tmp_path / "second.code").read_text() == "0\n", (tmp_path / "second.txt").read_text()
    assert latest(tmp_path / "kept") == 6


def settings_of(folder: Path) -> dict:
    settings = asdict(config_of("plain", folder, folder / "unused"))
    settings["optim"]["betas"] = list(settings["optim"]["betas"])
    return settings


# Damage


@pytest.fixture(scope="module")
def whole(folder):
    """A run with every part that a checkpoint can have."""
    config = config_of("everything", folder, folder / "undamaged")
    train(config)
    return config


def cut(data: bytes) -> bytes:
    return data[:-5]


def flip(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def parts(whole) -> list[str]:
    return sorted(path.name for path in (Path(whole.run_dir) / "checkpoints" / "step-00000006").iterdir())


def test_a_checkpoint_has_the_parts_that_are_damaged_here(whole):
    names = ["average", "group_weights", "model", "optimizer", "random", "reference", "start", "window"]
    assert parts(whole) == sorted(["manifest.json", *(f"{name}.safetensors" for name in names)])


@pytest.mark.parametrize(("name", "harm"), [("manifest.json", flip), ("group_weights.safetensors", cut)])
def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(whole, tmp_path, name, harm):
    shutil.copytree(whole.run_dir, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000006" / name
    path.write_bytes(harm(path.read_bytes()))
    with pytest.warns(UserWarning, match=rf"step-00000006 is damaged: {name} .*going on from step 4 instead"):
        train(replace(whole, run_dir=str(tmp_path / "run"), resume=True))
    assert_same_end(tmp_path / "run", Path(whole.run_dir))


def test_every_file_is_checked_against_every_harm(whole, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(Path(whole.run_dir) / "checkpoints", checkpoints)
    newest, before = checkpoints / "step-00000006", checkpoints / "step-00000004"
    harms = {
        "cut": cut,
        "flipped": flip,
        "empty": lambda data: b"",
        "longer": lambda data: data + b"\0",
        "zeros": lambda data: bytes(len(data)),
        "of another step": None,
        "gone": None,
        "a folder": None,
        "a pipe": None,
        "a link to nothing": None,
    }
    for name in parts(whole):
        file, data = newest / name, (newest / name).read_bytes()
        for harm, change in harms.items():
            file.unlink()
            if change is not None:
                file.write_bytes(change(data))
            elif harm == "of another step":
                shutil.copy(before / name, file)
            elif harm == "a folder":
                file.mkdir()
            elif harm == "a pipe":
                os.mkfifo(file)
            elif harm == "a link to nothing":
                file.symlink_to("nothing")
            # The reference and the start do not change, and with another manifest it is another whole checkpoint.
            if harm == "of another step" and file.exists() and file.read_bytes() == data:
                continue
            named = r"\w+\.safetensors" if (name, harm) == ("manifest.json", "of another step") else name
            with pytest.warns(UserWarning, match=rf"step-00000006 is damaged: {named}\b.*going on from step 4"):
                assert load_latest(checkpoints).step == 4, (name, harm)
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
            file.write_bytes(data)
    assert load_latest(checkpoints).step == 6


@settings(max_examples=300 if NIGHTLY else 60, deadline=None, derandomize=not NIGHTLY)
@given(data=st.data())
def test_a_changed_byte_is_seen_or_changes_nothing(checkpoint_folder, data):
    path, good = checkpoint_folder
    file = data.draw(st.sampled_from(sorted(path.iterdir())))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
    before = file.read_bytes()
    file.write_bytes(bytes(content))
    again, refused = loaded(path)
    file.write_bytes(before)
    if again is None:
        assert file.name in refused
    else:
        assert again.step == good.step
        assert again.scalars == good.scalars
        assert all(torch.equal(t, again.parts[p][n]) for p, ts in good.parts.items() for n, t in ts.items())


def loaded(path: Path) -> tuple[Checkpoint | None, str]:
    """The checkpoint, or the words of a CheckpointError; any other error is the test's."""
    try:
        return load_checkpoint(path), ""
    except CheckpointError as error:
        return None, str(error)


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory):
    good = Checkpoint(3, {"model": {"w": torch.arange(4.0)}, "window": {"n": torch.tensor(2)}}, {"names": ["é"]})
    return save_checkpoint(tmp_path_factory.mktemp("bytes"), good), good


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FILES = st.dictionaries(
    st.sampled_from(["model.safetensors", "window.safetensors", "../../x.safetensors", "", "manifest.json"]),
    VALUES | st.fixed_dictionaries({"sha256": st.text(max_size=3), "bytes": st.integers()}),
)


@settings(max_examples=500 if NIGHTLY else 100, deadline=None, derandomize=not NIGHTLY)
@given(body=VALUES | st.fixed_dictionaries({}, optional={
    "format": st.just(module.FORMAT) | VALUES, "step": st.integers() | VALUES, "files": FILES | VALUES,
    "scalars": VALUES,
}))  # fmt: skip
def test_a_forged_manifest_is_a_checkpoint_error_and_nothing_else(checkpoint_folder, body):
    path, _ = checkpoint_folder
    manifest = path / "manifest.json"
    before = manifest.read_bytes()
    manifest.write_text(json.dumps({"sha256": module._sha256_of(body), "body": body}), encoding="utf-8")
    checkpoint, refused = loaded(path)
    manifest.write_bytes(before)
    if checkpoint is None:
        assert str(path) in refused
    else:  # a checkpoint of no files
        assert checkpoint.parts == {}


def test_a_checkpoint_that_is_newer_and_damaged_does_not_push_out_the_one_just_saved(tmp_path):
    def make(step: int) -> Checkpoint:
        return Checkpoint(step, {"model": {"w": torch.full((2,), float(step))}})

    for step in (3, 6):
        save_checkpoint(tmp_path, make(step))
    (tmp_path / "step-00000006" / "model.safetensors").unlink()
    # Gone on from 3, with more checkpoints than before, of which one is kept.
    for step in (4, 5):
        save_checkpoint(tmp_path, make(step), keep=1)
        with pytest.warns(UserWarning, match=f"going on from step {step} instead"):
            assert load_latest(tmp_path).step == step
    save_checkpoint(tmp_path, make(6), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


def test_tensorboard_that_cannot_be_written_does_not_end_a_run(tmp_path):
    pytest.importorskip("tensorboard")
    config = tiny_config(tmp_path, steps=2, tensorboard=True)
    run_dir = Path(config.run_dir)
    run_dir.mkdir()
    (run_dir / "lock").touch()
    (run_dir / "tensorboard").write_text("no folder")
    with pytest.warns(UserWarning, match="TensorBoard's files cannot be written"):
        result = train(replace(config, resume=True))
    assert result.steps == 2
