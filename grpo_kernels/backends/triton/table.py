"""Block sizes and warps by vocabulary and dtype.

A table, and not an autotuner: a training run should not stop at its first step, or at a new shape, to time
kernels.  ``python -m benchmarks.tune_triton`` times the candidates on a GPU and prints this table anew.
The entries follow from the compiler's report and the counting below; they have not been run on a GPU.

A multiprocessor of an H100 needs some 20 KB of loads in flight to keep its memory busy.  Forward, at 32 registers
a thread, has 2048 threads with 32 bytes or more each; backward, at 40 (bfloat16) and 32 (float32), has 1536 and 2048
threads with 16 and 32 bytes.  Twice the block costs backward twice the registers and wins nothing.  The
tail is one or a few programs whose float64 tiles must fit in registers: 2048 elements over 8 warps do, 4096 spill.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

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
    direction: Direction, vocabulary: int, dtype: torch.dtype, warp_size: int = WARP_SIZE
) -> TokenLogpsOptions:
    """The entry for rows of ``vocabulary`` elements of ``dtype``."""
    entries = TOKEN_LOGPS[direction, dtype.itemsize]
    block_v, num_warps = next(entry[1:] for entry in entries if vocabulary <= entry[0])
    return TokenLogpsOptions(block_v, num_warps * 32 // warp_size, 16 // dtype.itemsize)


def head_tile_options(
    direction: Direction, words: int, dtype: torch.dtype, warp_size: int = WARP_SIZE
) -> HeadTileOptions:
    """The entry for a tile of ``words`` words whose logits are of ``dtype``."""
    entries = HEAD_TILE[direction, dtype.itemsize]
    block_v, num_warps = next(entry[1:] for entry in entries if words <= entry[0])
    return HeadTileOptions(block_v, num_warps * 32 // warp_size, 16 // dtype.itemsize)


def head_tile_registers(direction: Direction, *, aligned: bool, capped: bool, biased: bool) -> int | None:
    """``maxnreg`` of NVIDIA's compiler where it would sooner spill a word than take another register, else None."""
    return 64 if direction == "fwd" and capped and biased and not aligned else None


def tail_options(mean_length: float, num_groups: int, warp_size: int = WARP_SIZE) -> TailOptions:
    """The entry for sequences of this mean length."""
    block_pairs, block_tokens = next(entry[1:] for entry in TAIL if mean_length <= entry[0])
    block_groups = 16 if num_groups <= 16 else TAIL_BLOCK_GROUPS
    return TailOptions(block_pairs, block_tokens, block_groups, TAIL_WARPS * 32 // warp_size)
