"""What a run says about itself: a JSON line at a time, and TensorBoard beside it where that is installed.

Nothing that depends on the clock is written to ``metrics.jsonl``: two runs that do the same have equal files.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .directory import naming


class Metrics:
    """Writer of ``metrics.jsonl``, one line per record, flushed at once.

    Args:
        path: the file; None writes nothing, as on a rank that is not the first.
        keep_bytes: how much of an existing file stands; what a run wrote after its last checkpoint is cut off, and
            will be written again when the run gets there.
        tensorboard: folder of TensorBoard's files; None for none.
        step: step after which records will come.
    """

    def __init__(
        self, path: Path | None, *, keep_bytes: int = 0, tensorboard: Path | None = None, step: int = 0
    ) -> None:
        self._file, self._board = None, None
        if path is None:
            return
        self._path = path
        with naming(path):
            self._file = open(path, "ab")  # noqa: SIM115 - closed by close()
            if self._file.tell() < keep_bytes:
                warnings.warn(f"{path} is shorter than when the checkpoint was saved; lines are lost", stacklevel=2)
            self._file.truncate(min(keep_bytes, self._file.tell()))
            self._file.seek(0, os.SEEK_END)
        with self._without_board_if_it_fails():
            self._board = _summary_writer(tensorboard, step)

    def write(self, record: Mapping[str, Any]) -> None:
        """One record; numbers that are not finite become null, as JSON has no word for them."""
        if self._file is None:
            return
        with naming(self._path):
            self._file.write((json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n").encode())
            self._file.flush()
        with self._without_board_if_it_fails():
            if self._board is not None:
                for tag, value in _scalars(record):
                    self._board.add_scalar(f"{record['kind']}/{tag}", value, record["step"])

    def sync(self) -> int:
        """All lines on the disk.

        Returns:
            Bytes written so far, what ``keep_bytes`` of a resumed run has to be.
        """
        if self._file is None:
            return 0
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            return self._file.tell()

    def close(self) -> None:
        """Close the file and TensorBoard's."""
        if self._file is not None:
            with naming(self._path):  # what could not be written is tried again
                self._file.close()
        with self._without_board_if_it_fails():
            if self._board is not None:
                self._board.close()

    @contextmanager
    def _without_board_if_it_fails(self) -> Iterator[None]:
        """TensorBoard's files are a convenience: a run does not end for them."""
        try:
            yield
        except OSError as error:
            self._board = None
            warnings.warn(f"TensorBoard's files cannot be written ({error}); going on without", stacklevel=4)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a ``metrics.jsonl``; a last line that a dying process left half written is passed over.

    Raises:
        ValueError: no such file, or a line that is no record.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            record["kind"], record["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a record of a run: {error}") from error
        records.append(record)
    return records


def _summary_writer(folder: Path | None, step: int) -> Any:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # it is optional
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and (prefix or key != "step"):
            yield prefix + key, value


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
