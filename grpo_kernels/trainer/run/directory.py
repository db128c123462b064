"""The folder of one run: who may write in it, what it holds, and files that are whole or not there at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

# Network file systems answer so, as they are mounted.
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_OURS = (CHECKPOINTS, CONFIG, FINAL, FINAL_AVERAGE, METRICS, REFERENCE, START, SUMMARY, TENSORBOARD)


class RunDirectory:
    """A run's folder, locked while the object is open; use it as a context manager.

    Args:
        path: the folder; made if it is not there.
        overwrite: remove what an earlier run left, and nothing else that may lie there.
        resume: leave everything, to go on from it.

    Raises:
        ValueError: the folder cannot be made or written into; it holds something and neither was asked for, or what it
            holds is no run; another run is writing in it.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, resume: bool = False) -> None:
        self.path = Path(path)
        refuse_existing(self.path, overwrite=overwrite, resume=resume)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run_dir {self.path} cannot be made: {error.strerror}") from error
        self._lock = _lock(self.path / LOCK)
        try:
            # Again, now that nobody else writes here: another run may have come and gone since.
            refuse_existing(self.path, overwrite=overwrite, resume=resume)
            for name in _OURS:
                if overwrite:
                    remove_at_once(self.path / name)
                # What a process that was killed had not finished.
                for unfinished in self.path.glob(f".{name}.*.tmp"):
                    remove(unfinished)
            for unfinished in (self.path / REFERENCE).glob(".*.tmp"):
                remove(unfinished)
        except BaseException:
            self._lock.release()
            raise

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exc: object) -> None:
        # The file stays: removing it would let two later runs lock two different files.
        self._lock.release()


def refuse_existing(path: Path, *, overwrite: bool, resume: bool) -> None:
    """The rule that a run's folder is not written into without being told to, and another folder not at all.

    Raises:
        ValueError: it holds something; it holds something that is no run; it is no folder, or cannot be one.
    """
    try:
        # Nothing is made yet, and reading the data and the model takes a while.
        above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not above.is_dir():
            raise ValueError(f"run_dir must be a folder, {above} is a file")
        if not os.access(above, os.W_OK | os.X_OK):
            raise ValueError(f"run_dir {path} cannot be written: no permission in {above}")
        held = {entry.name for entry in path.iterdir()} if above == path else set()
    except OSError as error:
        raise ValueError(f"run_dir {path} cannot be used: {error.strerror}") from error
    if held <= {LOCK}:
        return
    if not (overwrite or resume):
        raise ValueError(
            f"run_dir {path} exists and is not empty; say overwrite or resume "
            "(--overwrite, --resume), or name another folder"
        )
    if LOCK not in held:  # every run leaves one
        raise ValueError(
            f"run_dir {path} holds no run ({min(held)!r} is there), and only a run is gone on with or replaced; name "
            "another folder"
        )


def _lock(path: Path) -> Any:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"run_dir {path.parent} is in use: another run holds its lock") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise ValueError(f"run_dir {path.parent} cannot be locked: {error.strerror}") from error
        warnings.warn(
            f"run_dir {path.parent} is on a file system without locks ({error.strerror}): nothing keeps another run "
            "from writing in it too",
            stacklevel=3,
        )
    return lock


def remove(path: Path) -> None:
    """A file or a folder and all in it; nothing if it is not there.  A link is removed, not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_at_once(path: Path) -> None:
    """The same, and whenever the process dies it is there in full or, by its name, not at all."""
    if path.exists() or path.is_symlink():
        gone = path.with_name(f".{path.name}.{os.getpid()}.gone.tmp")
        remove(gone)
        os.rename(path, gone)
        remove(gone)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of writing say what could not be written: of itself a full disk does not.

    Raises:
        OSError: as it came, with the path.
    """
    try:
        yield
    except Exception as error:
        # Libraries written in Rust (safetensors, tokenizers) have errors of their own for what the system says.
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found:
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """A file that is there in full, or as it was before, whenever the process dies.

    Raises:
        OSError: it cannot be written, and is as it was before; names it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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
