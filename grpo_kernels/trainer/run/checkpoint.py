"""Checkpoints that are whole or not there: written beside, synced, renamed; checked by their sums when read.

``checkpoints/step-00000100/`` holds safetensors files and one ``manifest.json`` with the step, the scalars and the
SHA-256 of every file.  Reading executes nothing: tensors come from safetensors, the rest from JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..model.distributed import ALONE, Ranks
from .directory import naming, remove, remove_at_once, sync_file, sync_folder, write_atomically

FORMAT = 2
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")

Tensors = dict[str, torch.Tensor]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message says which file of it, and why."""


@dataclass
class Checkpoint:
    """What a checkpoint holds.

    Args:
        step: optimizer steps done.
        parts: file name without suffix → name → tensor.
        scalars: whatever JSON holds.
    """

    step: int
    parts: dict[str, Tensors]
    scalars: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write a checkpoint and forget all but the last ``keep``; until it is whole it does not have its name.

    Args:
        folder: of all checkpoints of the run.
        checkpoint: what to write.
        keep: how many stay, at least 1.

    Returns:
        Where it is.

    Raises:
        CheckpointError: the disk refuses; what was there before is untouched.
    """
    target = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        _write(temporary, checkpoint)
        if target.exists():  # damaged, and reached again by a run that went on from the one before
            remove_at_once(target)
        os.rename(temporary, target)
        sync_folder(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} cannot be saved in {folder}: {error}"
        ) from error
    finally:
        if temporary.exists():
            remove(temporary)
    forget_older(folder, checkpoint.step, keep=keep)
    return target


def forget_older(folder: Path, step: int, *, keep: int) -> None:
    """Remove all checkpoints before that of ``step`` but the last ``keep - 1``.

    What is newer is damaged, for the run went on from before it; it does not count, and is replaced when reached.
    """
    older = [path for path in sorted_checkpoints(folder) if _step(path) < step]
    for old in older[: max(len(older) - keep + 1, 0)]:
        remove_at_once(old)


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    from safetensors.torch import save_file

    files = {}
    for name, tensors in checkpoint.parts.items():
        path = folder / f"{name}.safetensors"
        with naming(path):
            save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
            sync_file(path)
        files[path.name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
    body = {"format": FORMAT, "step": checkpoint.step, "files": files, "scalars": checkpoint.scalars}
    text = json.dumps({"sha256": _sha256_of(body), "body": body}, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / MANIFEST, text.encode())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint, every byte of it checked against the manifest, onto the CPU.

    Args:
        path: folder of the checkpoint.

    Raises:
        CheckpointError: something is missing, cut off, changed, or of a format this version does not know.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    body = read_manifest(path)
    parts: dict[str, Tensors] = {}
    for name, expected in body["files"].items():
        # One reading for the sum and the tensors: what is used is what was checked.
        data = _read(path / Path(name).name, path)
        if len(data) != expected["bytes"]:
            raise CheckpointError(
                f"checkpoint {path} is damaged: {name} has {len(data)} bytes, {expected['bytes']} were written"
            )
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} does not have the SHA-256 it was written with")
        try:
            parts[name.removesuffix(".safetensors")] = load(data)
        except SafetensorError as error:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} holds no tensors: {error}") from error
    return Checkpoint(body["step"], parts, body["scalars"])


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest's body, checked against its own sum.

    Raises:
        CheckpointError: it is missing, broken, changed, or of another format.
    """
    try:
        manifest = json.loads(_read(path / MANIFEST, path))
        body, expected = manifest["body"], manifest["sha256"]
        found = _sha256_of(body)
        sizes = [file["bytes"] + len(file["sha256"]) + len(name) for name, file in body["files"].items()]
        body["step"] + sum(sizes), body["scalars"].keys()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} is not what was written: {error}") from error
    if found != expected:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} does not have the SHA-256 it names")
    if body.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {body.get('format')!r}, this version reads {FORMAT}")
    return body


def _read(file: Path, checkpoint: Path) -> bytes:
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise CheckpointError(f"checkpoint {checkpoint} is damaged: {file.name} is no file")
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: {file.name}: {error.strerror}") from error


def sorted_checkpoints(folder: Path) -> list[Path]:
    """All folders with a checkpoint's name, oldest first; whether they are whole is for reading to tell."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; a damaged one is passed over with a warning.

    Args:
        folder: of all checkpoints of the run.

    Returns:
        The checkpoint, or None where there has never been one.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    problems = []
    for path in reversed(sorted_checkpoints(folder)):
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem}; going on from step {checkpoint.step} instead", stacklevel=2)
        return checkpoint
    if problems:
        raise CheckpointError("no checkpoint can be used: " + "; ".join(problems))
    return None


def clear_unfinished(folder: Path) -> None:
    """Remove what a process that died while saving left behind."""
    if folder.is_dir():
        for path in folder.glob(".step-*.tmp"):
            remove(path)


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> Tensors:
    """The optimizer's state as ``parameter name / field`` → tensor, whatever order its groups are in."""
    tensors = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value
            elif value is not None:
                raise CheckpointError(f"the optimizer keeps {key}={value!r} for {name}, which is no tensor")
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    ranks: Ranks = ALONE,
) -> None:
    """The inverse of :func:`optimizer_tensors`; scalar counters stay on the CPU, as torch keeps them.

    Args:
        optimizer, parameters: of this run; the state of a sharded parameter is sharded as it is.
        tensors: in full on the first rank, see :meth:`Ranks.like`; scalars on all.
        ranks: of the run.

    Raises:
        CheckpointError: state of a parameter that is not trained here.
    """
    optimizer.state.clear()
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in parameters:
            raise CheckpointError(
                f"the checkpoint holds the optimizer's {entry!r} of {name!r}, which is not trained here"
            )
        parameter = parameters[name]
        state = optimizer.state.setdefault(parameter, {})
        state[entry] = tensor.clone() if entry == "step" else ranks.like(parameter, tensor)


@torch.no_grad()
def restore_tensors(
    into: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], what: str, ranks: Ranks = ALONE
) -> None:
    """Copy tensors into others of the same names and shapes.

    Args:
        into: of this run, sharded or not.
        tensors: in full on the first rank, see :meth:`Ranks.like`.
        what: they are, for the message.
        ranks: of the run.

    Raises:
        CheckpointError: a name is missing or superfluous, or a shape or dtype differs.
    """
    if into.keys() != tensors.keys():
        differ = sorted(into.keys() ^ tensors.keys())
        raise CheckpointError(f"the checkpoint's {what} does not fit: {len(differ)} names differ, {differ[0]!r} first")
    for name, tensor in tensors.items():
        target = into[name]
        if target.shape != tensor.shape or target.dtype != tensor.dtype:
            raise CheckpointError(
                f"the checkpoint's {what} does not fit: {name} is {tensor.dtype} {tuple(tensor.shape)} in it, "
                f"{target.dtype} {tuple(target.shape)} here"
            )
        target.copy_(ranks.like(target, tensor))


def seed_random(seed: int, rank: int) -> None:
    """Start all random streams of this process; each rank has its own, or dropout would do the same on every one."""
    # An odd number of 32 bits, 2^32 over the golden ratio: torch's stream on CPU takes no more bits of a seed, and so
    # no two ranks share one, nor a rank that of another small seed.
    seed = (seed + rank * 0x9E3779B9) % (1 << 32)
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def random_state() -> tuple[Tensors, dict[str, Any]]:
    """All random streams of this process: torch's as tensors, Python's and NumPy's (where in use) for JSON."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, internal, gauss = random.getstate()
    scalars: dict[str, Any] = {"python": [version, list(internal), gauss]}
    if "numpy" in sys.modules:
        kind, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        scalars["numpy"] = [kind, keys.tolist(), position, has_gauss, cached]
    return tensors, scalars


def restore_random_state(tensors: Tensors, scalars: Mapping[str, Any]) -> None:
    """The inverse of :func:`random_state`; devices that are not here are left out."""
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda.{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
    version, internal, gauss = scalars["python"]
    random.setstate((version, tuple(internal), gauss))
    if "numpy" in scalars and "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        kind, keys, position, has_gauss, cached = scalars["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sha256_of(body: Any) -> str:
    canonical = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
