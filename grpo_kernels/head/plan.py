"""What one call of the LM head will do: how wide a tile is, and which tiles stay from forward to backward.

    GEMMs of 2 * rows * V * H operations: 1 without gradients, 2 for hidden alone (a frozen head),
    3 for both with every tile kept, 4 with none, in between in proportion to the words kept

A plan follows from shapes, dtype, budget, the device's total memory and its tuning file (``grpo-kernels tune``) alone,
never from what is free at the moment: a rerun or a resumed run takes the same tiles, and gets the same bits.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch

_log = logging.getLogger(__name__)
_logged: set[tuple[object, ...]] = set()

_AUTO_SHARE = 0.1
"""Of total memory: what ``memory_budget="auto"`` lets forward keep."""

_TILE_BYTES = {"cpu": 32 << 20, "cuda": 32 << 20}
"""One tile of all rows, in the dtype of the GEMM: what a last-level cache holds, and enough work for a GEMM."""

_ROW_CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Of (rows, H) at a time where an operation needs a copy: less than a tile, which is free at such times, and few
operations, because each makes all threads meet, which on a busy machine costs more than the work."""

_WORDS_MULTIPLE = 64
_LEAST_WORDS, _MOST_WORDS = 512, 16384
_MOST_WORDS_FLOAT16 = 1024
"""On CPU, where a float16 GEMM answers in float16: so many exponentials, each 1 in a flat row, times weights up to 64
stay below its largest number, 65504."""


@dataclass(frozen=True)
class Tile:
    """Words [start, stop), and whether their exponentials stay from forward to backward."""

    start: int
    stop: int
    kept: bool = False


@dataclass(frozen=True)
class Plan:
    """What one call will do; depends on shapes, dtype, device memory, budget and the tuning file alone."""

    rows: int
    """Labelled rows; the others cost nothing."""
    hidden: int
    vocabulary: int
    dtype: torch.dtype
    """In which the GEMMs run and tiles are kept."""
    grad_hidden: bool
    grad_weight: bool
    """Whether weight or bias require grad."""
    tile_words: int
    kept_words: int
    """Their exponentials stay from forward to backward."""
    row_chunk: int
    """Elements of (rows, H) at a time where an operation needs a copy."""

    @property
    def kept_bytes(self) -> int:
        return self.rows * self.kept_words * self.dtype.itemsize

    @property
    def tile_bytes(self) -> int:
        """The working tile, beyond what the budget counts."""
        return self.rows * self.tile_words * self.dtype.itemsize

    @property
    def gemms(self) -> float:
        """How many times 2 * rows * V * H operations."""
        recomputed = 1 - self.kept_words / max(self.vocabulary, 1)
        return 1 + self.grad_hidden + (1 + recomputed if self.grad_weight else 0)

    def tiles(self) -> list[Tile]:
        """In the order of forward.  The kept ones come last: backward goes the other way, and finds them in cache."""
        edge = self.vocabulary - self.kept_words
        recomputed = [Tile(a, b) for a, b in _cut(0, edge, self.tile_words)]
        return recomputed + [Tile(a, b, kept=True) for a, b in _cut(edge, self.vocabulary, self.tile_words)]


def make_plan(
    rows: int,
    hidden: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    memory_budget: int | float | str = "auto",
    *,
    grad_hidden: bool = True,
    grad_weight: bool = True,
) -> Plan:
    """Tile and storage plan of one call; the first of each kind is logged at level INFO."""
    words = tile_words(rows, hidden, vocabulary, dtype, device)
    kept = 0
    # float16 keeps nothing: in the scale of a kept tile its range would not hold a target's entry.
    if grad_weight and dtype != torch.float16:
        kept = min(vocabulary, budget_bytes(memory_budget, device) // max(rows * dtype.itemsize, 1))
        if kept < vocabulary:
            kept = kept // _WORDS_MULTIPLE * _WORDS_MULTIPLE
    chunk = row_chunk_elements(hidden, dtype, device)
    plan = Plan(rows, hidden, vocabulary, dtype, grad_hidden, grad_weight, words, kept, chunk)
    kind = (hidden, vocabulary, dtype, grad_hidden, grad_weight)  # not the budget, which may be another at every step
    if kind not in _logged:
        _logged.add(kind)
        _log.info(
            "LM head: %d rows, H %d, V %d, %s: tiles of %d words (%.1f MB), %d words kept (%.1f MB), %.2f GEMMs",
            rows, hidden, vocabulary, dtype, words, plan.tile_bytes / 1e6, kept, plan.kept_bytes / 1e6, plan.gemms,
        )  # fmt: skip
    return plan


def tile_words(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Words of a tile: what was tuned for this shape, else as many as a last-level cache holds of all rows."""
    words = _look_ups().tile_words(device, dtype, rows, hidden, vocabulary)
    if words is None:
        words = _TILE_BYTES.get(device.type, _TILE_BYTES["cuda"]) // max(rows * dtype.itemsize, 1)
    least, most = tile_bounds(vocabulary, dtype, device)
    return min(max(words, least), most)


def tile_bounds(vocabulary: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Fewest and most words of a tile."""
    narrow = dtype == torch.float16 and device.type == "cpu"
    most = min(_MOST_WORDS_FLOAT16 if narrow else _MOST_WORDS, _MOST_WORDS, max(vocabulary, 1))
    return min(_LEAST_WORDS, most), most


def row_chunk_elements(hidden: int, dtype: torch.dtype, device: torch.device, *, shared: bool = False) -> int:
    """Elements of (rows, H) at a time where an operation needs a copy.

    ``shared``: ranks take these chunks together, each with a collective, and need not have the same tuning file.
    """
    elements = None if shared else _look_ups().row_chunk(device, dtype, hidden)
    if elements is not None:
        return elements
    return _ROW_CHUNK_ELEMENTS.get(device.type, _ROW_CHUNK_ELEMENTS["cuda"])


_tuned: Any = None


def _look_ups() -> Any:
    """``backends.tuned``, imported at the first plan: not with the package, and not anew in every call."""
    global _tuned
    if _tuned is None:
        from ..backends import tuned

        _tuned = tuned
    return _tuned


def budget_bytes(memory_budget: int | float | str, device: torch.device) -> int:
    """Bytes that forward may keep: an int as it is, a share of the device's memory, or "auto"."""
    if isinstance(memory_budget, int):
        return memory_budget
    share = _AUTO_SHARE if isinstance(memory_budget, str) else memory_budget
    return int(share * total_memory(device))


def total_memory(device: torch.device) -> int:
    """Bytes that the device has, free or not: a plan must not depend on what else is running."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _host_memory()


@functools.cache
def _host_memory() -> int:
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 8 << 30  # pragma: no cover - platforms that do not say


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cut(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """[start, stop) in pieces of one size, the last a little smaller."""
    if stop <= start:
        return []
    count = -(-(stop - start) // most)
    size = -(-(stop - start) // count)
    if size > _WORDS_MULTIPLE:
        size = min(-(-size // _WORDS_MULTIPLE) * _WORDS_MULTIPLE, most)
    return [(a, min(a + size, stop)) for a in range(start, stop, size)]
