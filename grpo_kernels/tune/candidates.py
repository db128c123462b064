"""What could stand in the tables for one shape: the table's own entry first, then the others, the nearest first."""

from __future__ import annotations

import itertools
import math

import torch

from ..backends import tuned
from ..head.plan import row_chunk_elements, tile_bounds, tile_words
from .shapes import Shape

Parameters = dict[str, int]

BLOCKS = tuple(1 << n for n in range(9, 15))
WARPS = (2, 4, 8, 16, 32)
"""Of 32 threads each."""
THREAD_BYTES = {"fwd": (16, 128), "bwd": (16, 64)}
"""Of a block, fewest and most for one thread: 16 are one load, and backward needs twice the registers for each."""

MOST_BLOCKS, MOST_TAIL = 14, 8
"""Candidates of one sweep, those nearest to the table: each is compiled several times for its checks."""

TAIL_BLOCKS = {64: ((1, 2, 4, 8, 16, 32), (32, 64)), None: ((1, 2, 4, 8), (128, 256, 512, 1024))}
TAIL_ELEMENTS = {64: (1, 8), None: (2, 8)}
"""Of a tile, fewest and most for one thread."""

TILE_COUNTS = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512)
"""Into how many tiles a vocabulary may be cut, each about 1.4 times the one before."""
MOST_TILE_SHARE, LEAST_TILE_BYTES = 1 / 64, 128 << 20
"""Of the device's memory: more than this is not taken by a tile, except where it is less than the second."""


def rows_of_logits(direction: str, vocabulary: int, dtype: torch.dtype, table: Parameters) -> list[Parameters]:
    """block_v and num_warps of a kernel over rows of ``vocabulary`` elements, or over tiles of so many words."""
    size, (fewest, most) = dtype.itemsize, THREAD_BYTES[direction]
    widest = max(1 << max(vocabulary - 1, 1).bit_length(), BLOCKS[0])
    found = [
        {"block_v": block, "num_warps": warps}
        for block, warps in itertools.product(BLOCKS, WARPS)
        if fewest <= block * size // (32 * warps) <= most and block <= widest and tuned.fits_block(block, warps, size)
    ]
    return _nearest_first(table, found)[:MOST_BLOCKS]


def tails(most_length: int | None, table: Parameters) -> list[Parameters]:
    """block_pairs, block_tokens and num_warps of the tail, for one of its two ranges of lengths."""
    (pairs, tokens), (fewest, most) = TAIL_BLOCKS[most_length], TAIL_ELEMENTS[most_length]
    found = [
        {"block_pairs": p, "block_tokens": t, "num_warps": w}
        for p, t, w in itertools.product(pairs, tokens, (4, 8, 16))
        if fewest <= p * t // (32 * w) <= most and tuned.fits_tail(p, t, w)
    ]
    return _nearest_first(table, found)[:MOST_TAIL]


def tiles(shape: Shape, memory: int) -> list[Parameters]:
    """tile_words of the head: no two that cut the vocabulary alike, none that takes too much of ``memory`` bytes."""
    with tuned.using(shape.device, {}):
        table = tile_words(shape.rows, shape.hidden, shape.vocabulary, shape.dtype, shape.device)
    least, most = tile_bounds(shape.vocabulary, shape.dtype, shape.device)
    room = max(int(memory * MOST_TILE_SHARE), LEAST_TILE_BYTES) // (shape.rows * shape.dtype.itemsize)
    found = []
    for count in TILE_COUNTS:
        words = -(-shape.vocabulary // count)
        words = min(-(-words // 64) * 64, most)
        if least <= words <= max(room, table):
            found.append({"tile_words": words})
    of_table = _tiles_cut(shape.vocabulary, table)
    others = [one for one in found if _tiles_cut(shape.vocabulary, one["tile_words"]) != of_table]
    unique = list({_tiles_cut(shape.vocabulary, one["tile_words"]): one for one in others}.values())
    return _nearest_first({"tile_words": table}, unique)


def row_chunks(shape: Shape) -> list[Parameters]:
    """elements of (rows, H) at a time: never more than the table has, which is what memory was counted with."""
    with tuned.using(shape.device, {}):
        table = row_chunk_elements(shape.hidden, shape.dtype, shape.device)
    rows = [min(shape.rows, max(1, (table >> n) // shape.hidden)) for n in range(4)]
    found = [{"elements": table >> n} for n in range(1, 4) if rows[n] != rows[n - 1]]
    return [{"elements": table}, *found]


def _tiles_cut(vocabulary: int, words: int) -> int:
    return -(-vocabulary // words)


def _nearest_first(table: Parameters, found: list[Parameters]) -> list[Parameters]:
    """The table's own, then the others by how many doublings they are away, and by size."""

    def away(one: Parameters) -> tuple[float, ...]:
        steps = [abs(math.log2(value / table[name])) for name, value in one.items()]
        return (sum(steps), *one.values())

    return [table, *sorted((one for one in found if one != table), key=away)]
