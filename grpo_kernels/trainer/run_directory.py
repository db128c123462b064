"""The folder of one run: who may write in it, what it holds, and files that are whole or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
FINAL = "final"
FINAL_AVERAGE = "final-average"
LOCK = "lock"
METRICS = "metrics.jsonl"
REFERENCE = "reference"
START = "start"
SUMMARY = "summary.json"
TENSORBOARD = "tensorboard"

_OURS = (CHECKPOINTS, CONFIG, FINAL, FINAL_AVERAGE, METRICS, REFERENCE, START, SUMMARY, TENSORBOARD)


class RunDirectory:
    """A run's folder, locked while the object is open; use it as a context manager.

    Args:
        path: the folder; made if it is not there.
        overwrite: remove what an earlier run left, and nothing else that may lie there.
        resume: leave everything, to go on from it.

    Raises:
        ValueError: the folder holds something and neither was asked for, or another run is writing in it.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, resume: bool = False) -> None:
        self.path = Path(path)
        refuse_existing(self.path, overwrite=overwrite, resume=resume)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path / LOCK)
        for name in _OURS:
            if overwrite:
                remove(self.path / name)
            # What a process that was killed had not finished; nobody else writes here while the lock is held.
            for unfinished in self.path.glob(f".{name}.*.tmp"):
                remove(unfinished)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exc: object) -> None:
        # Closing lets the lock go.  The file stays: removing it would let two later runs lock two different files.
        self._lock.close()


def refuse_existing(path: Path, *, overwrite: bool, resume: bool) -> None:
    """The rule that a run's folder is not written into without being told to.

    Raises:
        ValueError: it holds something, or is no folder.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"run_dir must be a folder, {path} is a file")
    if path.is_dir() and any(path.iterdir()) and not (overwrite or resume):
        raise ValueError(f"run_dir {path} exists and is not empty; say overwrite or resume, or name another folder")


def _lock(path: Path) -> IO[str]:
    file = open(path, "a+")  # noqa: SIM115 - open as long as the lock is held
    try:
        import fcntl
    except ImportError:  # pragma: no cover - no such locks on Windows: there, two runs in a folder are not noticed
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(f"run_dir {path.parent} is in use: another run holds its lock") from error
    return file


def remove(path: Path) -> None:
    """A file or a folder and all in it; nothing if it is not there.  A link is removed, not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """A file that is there in full, or as it was before, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def sync_file(path: Path) -> None:
    """A file's contents on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """A folder's entries on the disk: a rename is only then safe from a loss of power."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
