"""Block sizes and warps by vocabulary and dtype.

A table, and not an autotuner: a training run should not stop at its first step, or at a new shape, to time
kernels.  ``grpo-kernels tune`` times the candidates on a user's device and keeps what is faster for the shape it was
told in the tuning file of that device, whose entries go before the table's (``backends/tuned.py``); with ``--out`` it
writes the lines of this table anew.  The number of stages is no option: no loop here multiplies matrices, and the
compiler makes the same program of any.
The entries follow from the compiler's report and the counting below; they have not been run on a GPU.

A multiprocessor of an H100 needs some 20 KB of loads in flight to keep its memory busy.  Forward, at 32 registers
a thread, has 2048 threads with 32 bytes or more each; backward, at 40 (bfloat16) and 32 (float32), has 1536 and 2048
threads with 16 and 32 bytes.  Twice the block costs backward twice the registers and wins nothing.  The
tail is one or a few programs whose float64 tiles must fit in registers: 2048 elements over 8 warps do, 4096 spill.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from .. import tuned

Direction = Literal["fwd", "bwd"]

WARP_SIZE = 32 if torch.version.hip is None else 64
"""Threads of a warp, 64 on AMD's data-centre GPUs: the table counts warps of 32, and keeps the threads of a block."""


class TokenLogpsOptions(NamedTuple):
    """How a kernel over the vocabulary is launched."""

    block_v: int
    """Elements of a row in one block."""
    num_warps: int
    vec: int
    """Elements in 16 bytes."""


class HeadTileOptions(NamedTuple):
    """How a tile operation of the LM head is launched; fields as in TokenLogpsOptions."""

    block_v: int
    num_warps: int
    vec: int


class TailOptions(NamedTuple):
    """How the tail is launched: one tile is ``block_pairs`` sequences of ``block_tokens`` tokens."""

    block_pairs: int
    block_tokens: int
    block_groups: int
    num_warps: int


# (largest V, block_v, num_warps) by direction and bytes per element; the last line takes every larger V.
TOKEN_LOGPS: dict[tuple[Direction, int], tuple[tuple[float, int, int], ...]] = {
    ("fwd", 2): ((1024, 1024, 2), (8192, 2048, 4), (float("inf"), 4096, 8)),
    ("fwd", 4): ((1024, 1024, 2), (8192, 2048, 4), (float("inf"), 4096, 8)),
    ("bwd", 2): ((1024, 512, 2), (8192, 1024, 4), (float("inf"), 2048, 8)),
    ("bwd", 4): ((1024, 512, 2), (8192, 1024, 4), (float("inf"), 2048, 8)),
}

# (most words of a tile, block_v, num_warps) by direction and bytes per element of the GEMM's output.
HEAD_TILE: dict[tuple[Direction, int], tuple[tuple[float, int, int], ...]] = {
    ("fwd", 2): ((1024, 512, 2), (4096, 1024, 4), (float("inf"), 2048, 8)),
    ("fwd", 4): ((1024, 512, 2), (4096, 1024, 4), (float("inf"), 2048, 8)),
    ("bwd", 2): ((1024, 512, 2), (4096, 1024, 4), (float("inf"), 2048, 8)),
    ("bwd", 4): ((1024, 512, 2), (4096, 1024, 4), (float("inf"), 2048, 8)),
}

# (largest mean length of a sequence, block_pairs, block_tokens).  Two shapes and no more, so that lengths which change
# from batch to batch do not bring a compilation each.
TAIL: tuple[tuple[float, int, int], ...] = ((64, 8, 32), (float("inf"), 4, 512))

# Groups are split over programs in blocks of this many (see preference_tail.py).
TAIL_BLOCK_GROUPS = 256
TAIL_WARPS = 8

# Pairs that the last kernel takes at a time; a batch is rarely more.
ROBUST_LOSS_BLOCK = 256
ROBUST_LOSS_WARPS = 128 // WARP_SIZE


def token_logps_options(
    direction: Direction,
    vocabulary: int,
    dtype: torch.dtype,
    warp_size: int = WARP_SIZE,
    device: torch.device | None = None,
) -> TokenLogpsOptions:
    """The entry for rows of ``vocabulary`` elements of ``dtype``: the one tuned on ``device``, else the table's."""
    found = None if device is None else tuned.token_logps(device, direction, dtype, vocabulary)
    block_v, num_warps = found or _entry(TOKEN_LOGPS[direction, dtype.itemsize], vocabulary)
    return TokenLogpsOptions(block_v, num_warps * 32 // warp_size, 16 // dtype.itemsize)


def head_tile_options(
    direction: Direction,
    words: int,
    dtype: torch.dtype,
    warp_size: int = WARP_SIZE,
    device: torch.device | None = None,
) -> HeadTileOptions:
    """The entry for a tile of ``words`` words whose logits are of ``dtype``: tuned on ``device``, else the table's."""
    found = None if device is None else tuned.head_tile(device, direction, dtype, words)
    block_v, num_warps = found or _entry(HEAD_TILE[direction, dtype.itemsize], words)
    return HeadTileOptions(block_v, num_warps * 32 // warp_size, 16 // dtype.itemsize)


def head_tile_registers(direction: Direction, *, aligned: bool, capped: bool, biased: bool) -> int | None:
    """``maxnreg`` of NVIDIA's compiler where it would sooner spill a word than take another register, else None."""
    return 64 if direction == "fwd" and capped and biased and not aligned else None


def tail_options(
    mean_length: float, num_groups: int, warp_size: int = WARP_SIZE, device: torch.device | None = None
) -> TailOptions:
    """The entry for sequences of this mean length: the one tuned on ``device``, else the table's."""
    found = None if device is None else tuned.tail(device, mean_length)
    block_pairs, block_tokens, num_warps = found or (*_entry(TAIL, mean_length), TAIL_WARPS)
    block_groups = 16 if num_groups <= 16 else TAIL_BLOCK_GROUPS
    return TailOptions(block_pairs, block_tokens, block_groups, num_warps * 32 // warp_size)


def tail_registers(num_warps: int) -> int:
    """``maxnreg`` of NVIDIA's compiler for the tail: all that a multiprocessor has for so many threads.

    Left alone, the compiler aims at a second or third block on the multiprocessor and would sooner spill a word than
    lose it; the tail is one block, or one on each of a few multiprocessors.
    """
    return min(255, (1 << 16) // (32 * num_warps))


def _entry(entries: tuple[tuple[float, int, int], ...], size: float) -> tuple[int, int]:
    """What the first range says that ``size`` falls into."""
    return next((a, b) for most, a, b in entries if size <= most)
