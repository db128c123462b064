"""What ``grpo-kernels tune`` found best on this device: the tuning file, and the look-ups that follow it.

One file for each device and version of everything that a time depends on (``cache.key_of``), in the cache folder.
It has entries for the shapes that were tuned; everything else goes by the package's own tables.  A look-up depends on
shapes, dtype, device and the file alone: the same inputs and the same file give the same bits.  A process reads the
file once, when it first looks something up; processes whose results must agree to the bit need the same file.
``GRPO_KERNELS_TUNED=never`` leaves it unread.

A file that is damaged, is of another device or version, or has a value that no kernel accepts is ignored as a whole,
with one warning.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from . import cache

FORMAT = 1
Entry = dict[str, Any]

TIE = 0.01
"""Times that differ by no more than this are equal, and then nothing is changed."""

MOST_THREADS = 1024
LARGEST_BLOCK = 1 << 14
"""Elements.  Larger ones would want more shared memory than every GPU has, and twice the registers."""
MOST_TILE_WORDS = 1 << 14
"""As ``head/plan.py`` has it, which holds every width inside its own bounds again."""
MOST_ROW_CHUNK = 1 << 26
NEAR_WORDS, NEAR_ROWS = 2, 4
"""An entry for so many words of a tile, or rows of the head, serves others within this factor where it is nearest."""
TAIL_RANGES = (64, None)
"""Mean lengths up to which one entry of the tail serves, as in the kernels' table; None for no end."""


# ---------------------------------------------------------------------------------------------- what an entry may hold


def fits_block(block_v: int, num_warps: int, itemsize: int) -> bool:
    """Whether a kernel over the vocabulary accepts it: powers of two, and no more threads than 16-byte groups.

    With more, two threads would hold the same element, and a gradient written over its logits would be read again.
    """
    threads = 32 * num_warps
    whole = _is_power(block_v) and _is_power(num_warps)
    return whole and 64 <= threads <= MOST_THREADS and block_v <= LARGEST_BLOCK and block_v * itemsize >= 16 * threads


def fits_tail(block_pairs: int, block_tokens: int, num_warps: int) -> bool:
    """Whether the tail accepts it: powers of two, and 8 elements a thread at most; more would not fit in registers."""
    whole = all(map(_is_power, (block_pairs, block_tokens, num_warps)))
    threads = 32 * num_warps
    return whole and 64 <= threads <= MOST_THREADS and 32 <= block_pairs * block_tokens <= 8 * threads


def _is_power(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _is_count(value: object, most: int = 1 << 40) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_dtype(value: object) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


def _is_block(entry: Entry) -> bool:
    numbers = _is_count(entry["block_v"]) and _is_count(entry["num_warps"])
    itemsize = getattr(torch, entry["dtype"]).itemsize
    return numbers and fits_block(entry["block_v"], entry["num_warps"], itemsize)


def _is_tail(entry: Entry) -> bool:
    numbers = [entry[name] for name in ("block_pairs", "block_tokens", "num_warps")]
    return entry["most_length"] in TAIL_RANGES and all(map(_is_count, numbers)) and fits_tail(*numbers)


def _is_times(entry: Entry) -> bool:
    by_path, unsure = entry["ms"], entry.get("unsure", [])
    if not isinstance(unsure, list) or not all(isinstance(path, str) for path in unsure):
        return False
    return isinstance(by_path, dict) and all(
        isinstance(by_name, dict) and all(isinstance(ms, float) and 0 < ms < math.inf for ms in by_name.values())
        for by_name in by_path.values()
    )


_SECTIONS: dict[str, tuple[tuple[str, ...], Callable[[Entry], bool]]] = {
    "token_logps": (("direction", "dtype", "vocabulary"), _is_block),
    "head_tile": (("direction", "dtype", "words"), _is_block),
    "tail": (("most_length",), _is_tail),
    "head": (
        ("dtype", "hidden", "vocabulary", "rows"),
        lambda entry: _is_count(entry["tile_words"], MOST_TILE_WORDS),
    ),
    "row_chunk": (("dtype", "hidden"), lambda entry: _is_count(entry["elements"], MOST_ROW_CHUNK)),
    "backends": (("dtype", "hidden", "vocabulary", "rows"), _is_times),
}
"""Section of the file: what an entry is found by, and whether its values are such as the kernels accept."""

_IDENTITY: dict[str, Callable[[object], bool]] = {
    "direction": lambda value: value in ("fwd", "bwd"),
    "dtype": _is_dtype,
    "most_length": lambda value: value in TAIL_RANGES,
    **dict.fromkeys(("vocabulary", "words", "hidden", "rows"), _is_count),
}


class Tuning:
    """The entries of one file, by what they are found by."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: an entry is not such as this version writes.
        """
        self.sections: dict[str, dict[tuple[Any, ...], Entry]] = {}
        for section, (identity, accepts) in _SECTIONS.items():
            entries = content.get(section, [])
            if not isinstance(entries, list):
                raise ValueError(f"{section} is no list")
            for entry in entries:
                try:
                    good = all(_IDENTITY[name](entry[name]) for name in identity) and accepts(entry)
                except (KeyError, TypeError):
                    good = False
                if not good:
                    raise ValueError(f"{section} has an entry that no kernel accepts: {str(entry)[:200]}")
            self.sections[section] = {tuple(entry[name] for name in identity): entry for entry in entries}

    def with_entries(self, content: Mapping[str, Any]) -> Tuning:
        """These entries and those of ``content``, which replace the ones found by the same."""
        added = Tuning(content)
        return Tuning(
            {name: list({**entries, **added.sections[name]}.values()) for name, entries in self.sections.items()}
        )

    def content(self) -> dict[str, list[Entry]]:
        """As the file holds them."""
        return {name: list(entries.values()) for name, entries in self.sections.items() if entries}

    def find(self, section: str, *identity: object) -> Entry | None:
        return self.sections[section].get(identity)

    def nearest(self, section: str, *identity: Any, factor: float) -> Entry | None:
        """The entry whose last identity, a size, is nearest by ratio, and no further off than ``factor``."""
        *same, size = identity
        near = [
            (abs(math.log(found[-1] / size)), found[-1], entry)
            for found, entry in self.sections[section].items()
            if list(found[:-1]) == same and found[-1] <= factor * size and size <= factor * found[-1]
        ]
        return min(near, key=lambda one: one[:2])[2] if near else None


# ---------------------------------------------------------------------------------------------- look-ups


def token_logps(device: torch.device, direction: str, dtype: torch.dtype, vocabulary: int) -> tuple[int, int] | None:
    """(block_v, num_warps) for rows of exactly this vocabulary, warps counted in threads of 32; None: not tuned."""
    tuning = of(device)
    entry = tuning and tuning.find("token_logps", direction, name_of(dtype), vocabulary)
    return (entry["block_v"], entry["num_warps"]) if entry else None


def head_tile(device: torch.device, direction: str, dtype: torch.dtype, words: int) -> tuple[int, int] | None:
    """(block_v, num_warps) for tiles of about this many words, warps counted in threads of 32; None: not tuned."""
    tuning = of(device)
    entry = tuning and tuning.nearest("head_tile", direction, name_of(dtype), words, factor=NEAR_WORDS)
    return (entry["block_v"], entry["num_warps"]) if entry else None


def tail(device: torch.device, mean_length: float) -> tuple[int, int, int] | None:
    """(block_pairs, block_tokens, num_warps) for sequences of this mean length; None: not tuned."""
    tuning = of(device)
    entry = tuning and tuning.find("tail", TAIL_RANGES[0] if mean_length <= TAIL_RANGES[0] else None)
    return (entry["block_pairs"], entry["block_tokens"], entry["num_warps"]) if entry else None


def tile_words(device: torch.device, dtype: torch.dtype, rows: int, hidden: int, vocabulary: int) -> int | None:
    """Words of a tile of the head, for other rows than those tuned as many as take the same memory; None: not tuned."""
    tuning = of(device)
    if not tuning or rows < 1:
        return None
    entry = tuning.nearest("head", name_of(dtype), hidden, vocabulary, rows, factor=NEAR_ROWS)
    return entry["tile_words"] * entry["rows"] // rows if entry else None


def row_chunk(device: torch.device, dtype: torch.dtype, hidden: int) -> int | None:
    """Elements of (rows, H) that the head copies at a time; None: not tuned."""
    tuning = of(device)
    entry = tuning and tuning.find("row_chunk", name_of(dtype), hidden)
    return entry["elements"] if entry else None


def order(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The names of the backends that were timed for this dtype, the fastest first; nothing where none were.

    Over all shapes that were tuned, and for the loss from logits and the head alike: by the product of the ratios to
    the fastest.  One that is within 1 % of another keeps its place in the registry,
    which is the one that knows which of the names there are.
    """
    tuning = of(device)
    if tuning is None:
        return ()
    wanted = name_of(dtype)
    entries = [entry for entry in tuning.sections["backends"].values() if entry["dtype"] == wanted]
    return rank(sure_times(entries))


def sure_times(entries: Iterable[Entry]) -> list[dict[str, float]]:
    """Times of backends that may change their order: those that were taken in enough rounds, and even ones."""
    return [
        by_name for entry in entries for path, by_name in entry["ms"].items() if path not in entry.get("unsure", [])
    ]


def rank(times: list[dict[str, float]]) -> tuple[str, ...]:
    """The names, fastest first, of those that were timed in every one of ``times``; see :func:`order`."""
    if not times:
        return ()
    names = [name for name in times[0] if all(name in by_name for by_name in times)]
    total = {name: sum(math.log(by_name[name] / min(by_name.values())) for by_name in times) for name in names}
    placed: list[str] = []
    for name in names:  # each goes in front of those that are slower than it by more than a tie
        at = len(placed)
        while at and total[placed[at - 1]] - total[name] > math.log1p(TIE) * len(times):
            at -= 1
        placed.insert(at, name)
    return tuple(placed)


@functools.cache
def name_of(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` → ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------- the file

_known: dict[torch.device, Tuning | None] = {}


def of(device: torch.device) -> Tuning | None:
    """The tuning of this device, read once in a process; None where there is none."""
    try:
        return _known[device]
    except KeyError:
        return _known.setdefault(device, _read_wanted(device))


def forget() -> None:
    """The next look-up reads the file again.  Between forward and backward of one loss that would be too late."""
    _known.clear()


@contextlib.contextmanager
def using(device: torch.device, content: Mapping[str, Any]) -> Iterator[None]:
    """Look-ups of this process see just these entries meanwhile, whatever the file or the environment says."""
    before = dict(_known)
    _known[device] = Tuning(content)
    try:
        yield
    finally:
        _known.clear()
        _known.update(before)


def setting() -> str:
    """``GRPO_KERNELS_TUNED``: "auto" (read the file) or "never"."""
    value = os.environ.get("GRPO_KERNELS_TUNED", "auto").strip().lower() or "auto"
    if value not in ("auto", "never"):
        raise ValueError(f"GRPO_KERNELS_TUNED must be one of auto, never, got {value!r}")
    return value


def path_of(device: torch.device) -> Path:
    """Where the tuning file of this device is, or would be.

    Raises:
        OSError: there is no cache folder.
    """
    return cache.folder() / cache.file_name("tuned", cache.key_of(device))


def _read_wanted(device: torch.device) -> Tuning | None:
    if setting() == "never" or device.type not in ("cpu", "cuda"):
        return None
    with contextlib.suppress(OSError):
        # The key needs a hash of the package's source; a machine that was never tuned does not compute it.
        if any(cache.folder().glob("tuned-*.json")):
            path = path_of(device)
            if path.exists():
                return _read(path, cache.key_of(device), and_then="the package's own tables are used instead")
    return None


def _read(path: Path, key: dict[str, str], and_then: str) -> Tuning | None:
    content = cache.read_json(path)
    reason = None
    if content is None:
        reason = "is damaged"
    elif content.get("format") != FORMAT or content.get("key") != key:
        reason = "was made on another device or by another version"
    else:
        try:
            return Tuning(content)
        except ValueError as error:
            reason = f"cannot be used ({error})"
    warnings.warn(
        f"the tuning file {path} {reason}: {and_then}; `grpo-kernels tune` makes it anew, and it may be deleted.",
        stacklevel=5,
    )
    return None


def keep(device: torch.device, content: Mapping[str, Any], *, wait_seconds: float = 60) -> Path:
    """Add entries to the tuning file of this device, under a lock; other shapes' entries stay.

    Raises:
        ValueError: an entry is not such as the kernels accept.
        OSError: the file cannot be written, or another process held the lock for ``wait_seconds``.
    """
    from filelock import FileLock, Timeout

    added, path, key = Tuning(content), path_of(device), cache.key_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.lock", timeout=wait_seconds):
            there = _read(path, key, "it is replaced") if path.exists() else None
            merged = there.with_entries(content) if there else added
            cache.write_json(path, {"format": FORMAT, "key": key, **merged.content()})
    except Timeout as error:
        raise OSError(f"another process has held {path}.lock for {wait_seconds:.0f} s") from error
    forget()
    return path
