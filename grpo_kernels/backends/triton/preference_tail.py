"""From token log-probabilities to losses, slopes and group sums, in one launch.

    logpi_i = sum of p_t over sequence i              m = (logpi_w - ref_w) - (logpi_l - ref_l)
    l, s    = loss and its derivative at m, times the pair weight;  reward_i = beta (logpi_i - ref_i)
    group_sums[g] = sum of l over the pairs of g      group_counts[g] = number of those pairs
    group_losses[g] = group_sums[g] / max(group_counts[g], 1)

Shapes: 2B sequences, the B chosen first; G groups.  Accumulation dtype: float64 for every sum.
Bytes moved: 4 per token (12 with the targets) for each block of groups, nothing else that grows with tokens.

Group sums need every pair, and a float sum in the order in which programs happen to arrive would differ from run
to run.  So each program owns BLOCK_GROUPS groups and walks all pairs in order, computing the pairs' losses
itself; the first also writes what belongs to pairs.  With up to BLOCK_GROUPS groups that is one program; 10000
groups are 40 programs side by side.  The price is that one multiprocessor reads all tokens: at the 50 GB/s or so
that one can draw, a quarter of a nanosecond a token, where the pass over a vocabulary of 32000 in bfloat16 that came
before takes 20 (counted for an H100, not run on a GPU).  The gain: no atomics, no second launch, no scratch to zero,
and no program that waits for another.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from ...types import LOSS_TYPES
from .launch import on_device_of, register_limit
from .table import ROBUST_LOSS_BLOCK, ROBUST_LOSS_WARPS, tail_options, tail_registers

_SIGMOID = tl.constexpr(LOSS_TYPES.index("sigmoid"))
_ROBUST = tl.constexpr(LOSS_TYPES.index("robust"))
_HINGE = tl.constexpr(LOSS_TYPES.index("hinge"))
_IPO = tl.constexpr(LOSS_TYPES.index("ipo"))


# ---------------------------------------------------------------------------------------------- helpers


@triton.jit
def _float64(bits):
    """A float argument of a kernel is a float32; these come as the bits of a float64, so that beta is beta."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _log1p(x):
    """``log(1 + x)`` for x in [0, 1] without losing a small x: what rounding 1 + x lost is put back as a factor."""
    u = 1 + x
    exact = u == 1
    return tl.where(exact, x, tl.log(u) * (x / tl.where(exact, 1.0, u - 1)))


@triton.jit
def _softplus(x):
    """``log(1 + exp(x)) = -log sigma(-x)``."""
    positive = tl.where(x > 0, x, tl.where(x == x, 0.0, x))  # a maximum that lets NaN through
    return positive + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigma(x):
    """``1 / (1 + exp(-x))``, without overflow on either side."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def _value_and_slope(margin, beta, half_inverse_beta, smoothing, LOSS_TYPE: tl.constexpr):
    """Loss and its derivative with respect to the margin, without pair or group weights."""
    x = beta * margin
    if LOSS_TYPE == _IPO:
        gap = margin - half_inverse_beta
        value = gap * gap
        slope = 2 * gap
    elif LOSS_TYPE == _HINGE:
        beyond = tl.where(x == x, 0.0, x)
        value = tl.where(x < 1, 1 - x, beyond)
        slope = tl.where(x < 1, -beta, beyond)
    else:
        if LOSS_TYPE == _SIGMOID:
            a = 1 - smoothing
            b = smoothing
        else:  # robust: unbiased under labels flipped with probability `smoothing`
            tl.static_assert(LOSS_TYPE == _ROBUST, "this backend has no such loss")
            a = (1 - smoothing) / (1 - 2 * smoothing)
            b = -smoothing / (1 - 2 * smoothing)
        # Not 0 * softplus: a rejected reply that is impossible has softplus(x) = inf.
        other = tl.where(b == 0, 0.0, b * _softplus(x))
        value = a * _softplus(-x) + other
        slope = beta * (b * _sigma(x) - a * _sigma(-x))
    return value, slope


@triton.jit
def _sequence_sums(
    token_logps_ptr, targets_ptr, cu_seqlens_ptr, lengths_ptr, sequence, inside, rows, length, ignore_index,
    BLOCK_PAIRS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Sum of token logps, and labelled tokens or what to divide by, of BLOCK_PAIRS sequences: both float64."""
    if cu_seqlens_ptr is not None:
        # Held inside the rows: a wrong boundary may give a wrong sum, never a stray read.
        begin = tl.maximum(tl.load(cu_seqlens_ptr + sequence, mask=inside, other=0), 0).to(tl.int64)
        tokens = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1, mask=inside, other=0).to(tl.int64), rows) - begin
    else:
        begin = sequence.to(tl.int64) * length
        tokens = tl.where(inside, length, 0).to(tl.int64)
    logp = tl.zeros([BLOCK_PAIRS, BLOCK_TOKENS], tl.float64)
    count = tl.zeros([BLOCK_PAIRS, BLOCK_TOKENS], tl.int32)
    column = tl.arange(0, BLOCK_TOKENS)[None, :]
    longest = tl.max(tokens, axis=0)
    for start in range(0, longest, BLOCK_TOKENS):
        live = start + column < tokens[:, None]
        at = begin[:, None] + start + column
        logp += tl.load(token_logps_ptr + at, mask=live, other=0.0).to(tl.float64)
        if targets_ptr is not None:
            labelled = live & (tl.load(targets_ptr + at, mask=live, other=ignore_index) != ignore_index)
            count += labelled.to(tl.int32)
    if targets_ptr is not None:
        labelled_tokens = tl.sum(count, axis=1).to(tl.float64)
    elif lengths_ptr is not None:
        labelled_tokens = tl.load(lengths_ptr + sequence, mask=inside, other=1.0)
    else:
        labelled_tokens = tl.full([BLOCK_PAIRS], 1, tl.float64)
    return tl.sum(logp, axis=1), labelled_tokens


# ---------------------------------------------------------------------------------------------- forward

# Nothing is specialised on values or addresses, as in token_logps.py.
_ARGUMENTS = [
    "token_logps_ptr", "targets_ptr", "cu_seqlens_ptr", "ref_logps_ptr", "group_ids_ptr", "pair_weights_ptr",
    "policy_logps_ptr", "lengths_ptr", "margins_ptr", "rewards_ptr", "losses_ptr", "slopes_ptr", "group_sums_ptr",
    "group_counts_ptr", "group_losses_ptr",
    "num_pairs", "num_groups", "rows", "length", "ignore_index", "beta_bits", "smoothing_bits",
]  # fmt: skip
_ROBUST_ARGUMENTS = [
    "losses_ptr", "group_ids_ptr", "group_weights_ptr", "weights_ptr", "loss_ptr", "num_pairs", "num_groups",
]  # fmt: skip


@triton.jit(do_not_specialize=_ARGUMENTS)
def preference_tail_kernel(
    token_logps_ptr, targets_ptr, cu_seqlens_ptr, ref_logps_ptr, group_ids_ptr, pair_weights_ptr,
    policy_logps_ptr, lengths_ptr, margins_ptr, rewards_ptr, losses_ptr, slopes_ptr, group_sums_ptr, group_counts_ptr,
    group_losses_ptr,
    num_pairs: tl.int32, num_groups: tl.int32, rows: tl.int64, length: tl.int32, ignore_index: tl.int64,
    beta_bits: tl.int64, smoothing_bits: tl.int64,
    LOSS_TYPE: tl.constexpr, LENGTH_NORMALIZE: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """All pairs in order, BLOCK_PAIRS at a time; this program's groups, and in program 0 the pairs' outputs too."""
    block = tl.program_id(0)
    beta = _float64(beta_bits)
    smoothing = _float64(smoothing_bits)
    half_inverse_beta = 1 / (2 * beta)  # once: a float64 division is a subroutine, and in the loop it cost a stack
    group = block * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    sums = tl.zeros([BLOCK_GROUPS], tl.float64)
    counts = tl.zeros([BLOCK_GROUPS], tl.int32)

    for first in range(0, num_pairs, BLOCK_PAIRS):
        pair = first + tl.arange(0, BLOCK_PAIRS)
        inside = pair < num_pairs
        lose = num_pairs + pair
        logp_w, length_w = _sequence_sums(token_logps_ptr, targets_ptr, cu_seqlens_ptr, lengths_ptr, pair, inside,
                                          rows, length, ignore_index, BLOCK_PAIRS, BLOCK_TOKENS)  # fmt: skip
        logp_l, length_l = _sequence_sums(token_logps_ptr, targets_ptr, cu_seqlens_ptr, lengths_ptr, lose, inside,
                                          rows, length, ignore_index, BLOCK_PAIRS, BLOCK_TOKENS)  # fmt: skip
        # Rounded first, as the reference was: a policy that equals it has margin 0 to the bit.
        dtype = policy_logps_ptr.dtype.element_ty
        logp_w = logp_w.to(dtype)
        logp_l = logp_l.to(dtype)
        ratio_w = logp_w.to(tl.float64)
        ratio_l = logp_l.to(tl.float64)
        if ref_logps_ptr is not None:
            ratio_w -= tl.load(ref_logps_ptr + pair, mask=inside, other=0.0)
            ratio_l -= tl.load(ref_logps_ptr + lose, mask=inside, other=0.0)
        if LENGTH_NORMALIZE:
            ratio_w /= tl.maximum(length_w, 1.0)
            ratio_l /= tl.maximum(length_l, 1.0)
        margin = ratio_w - ratio_l
        value, slope = _value_and_slope(margin, beta, half_inverse_beta, smoothing, LOSS_TYPE)
        if pair_weights_ptr is not None:
            weight = tl.load(pair_weights_ptr + pair, mask=inside, other=0.0)
            value *= weight
            slope *= weight
        group_id = tl.load(group_ids_ptr + pair, mask=inside, other=-1)

        if block == 0:
            known = (group_id >= 0) & (group_id < num_groups)
            tl.store(policy_logps_ptr + pair, logp_w, mask=inside)
            tl.store(policy_logps_ptr + lose, logp_l, mask=inside)
            if targets_ptr is not None:
                tl.store(lengths_ptr + pair, length_w, mask=inside)
                tl.store(lengths_ptr + lose, length_l, mask=inside)
            tl.store(margins_ptr + pair, margin.to(dtype), mask=inside)
            tl.store(rewards_ptr + pair, (beta * ratio_w).to(dtype), mask=inside)
            tl.store(rewards_ptr + lose, (beta * ratio_l).to(dtype), mask=inside)
            tl.store(losses_ptr + pair, tl.where(known, value, float("nan")).to(dtype), mask=inside)
            tl.store(slopes_ptr + pair, tl.where(known, slope, float("nan")).to(dtype), mask=inside)

        member = group_id[:, None] == group[None, :]
        sums += tl.sum(tl.where(member, value[:, None], 0.0), axis=0)
        counts += tl.sum(member.to(tl.int32), axis=0)

    tl.store(group_sums_ptr + group, sums, mask=group < num_groups)
    tl.store(group_counts_ptr + group, counts.to(tl.int64), mask=group < num_groups)
    means = sums / tl.maximum(counts, 1).to(tl.float64)
    tl.store(group_losses_ptr + group, means.to(group_losses_ptr.dtype.element_ty), mask=group < num_groups)


@triton.jit(do_not_specialize=_ROBUST_ARGUMENTS)
def robust_loss_kernel(
    losses_ptr, group_ids_ptr, group_weights_ptr, weights_ptr, loss_ptr,
    num_pairs: tl.int32, num_groups: tl.int32, BLOCK: tl.constexpr,
):  # fmt: skip
    """``loss = (1/B) sum_i w[g_i] l_i`` and the weights of the pairs; one program, all pairs in order."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, num_pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        inside = pair < num_pairs
        group_id = tl.load(group_ids_ptr + pair, mask=inside, other=0)
        known = (group_id >= 0) & (group_id < num_groups)
        weight = tl.load(group_weights_ptr + tl.where(known, group_id, 0), mask=inside, other=0.0)
        tl.store(weights_ptr + pair, weight, mask=inside)
        total += weight.to(tl.float64) * tl.load(losses_ptr + pair, mask=inside, other=0.0).to(tl.float64)
    loss = tl.sum(total, axis=0) / tl.maximum(num_pairs, 1).to(tl.float64)
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))


# ---------------------------------------------------------------------------------------------- launchers


def preference_tail(
    token_logps: torch.Tensor,
    targets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    group_ids: torch.Tensor,
    pair_weights: torch.Tensor | None,
    policy_logps: torch.Tensor,
    lengths: torch.Tensor | None,
    margins: torch.Tensor,
    rewards: torch.Tensor,
    losses: torch.Tensor,
    slopes: torch.Tensor,
    group_sums: torch.Tensor,
    group_counts: torch.Tensor,
    group_losses: torch.Tensor,
    *,
    loss_type: int,
    beta: float,
    label_smoothing: float,
    length_normalize: bool,
    ignore_index: int,
) -> None:
    """Token log-probabilities to losses, slopes and group sums; see ``boundary.py``."""
    num_pairs, num_groups = group_ids.numel(), group_sums.numel()
    rows = token_logps.numel()
    mean_length = rows // max(2 * num_pairs, 1)
    options = tail_options(mean_length, num_groups, device=token_logps.device)
    with on_device_of(token_logps):
        preference_tail_kernel[(max(triton.cdiv(num_groups, options.block_groups), 1),)](
            token_logps, targets, cu_seqlens, ref_logps, group_ids, pair_weights,
            policy_logps, lengths, margins, rewards, losses, slopes, group_sums, group_counts, group_losses,
            num_pairs, num_groups, rows, mean_length, ignore_index, _bits(beta), _bits(label_smoothing),
            LOSS_TYPE=loss_type, LENGTH_NORMALIZE=length_normalize,
            BLOCK_PAIRS=options.block_pairs, BLOCK_TOKENS=options.block_tokens, BLOCK_GROUPS=options.block_groups,
            num_warps=options.num_warps, **register_limit(tail_registers(options.num_warps)),
        )  # fmt: skip


def robust_loss(
    losses: torch.Tensor,
    group_ids: torch.Tensor,
    group_weights: torch.Tensor,
    weights: torch.Tensor,
    loss: torch.Tensor,
) -> None:
    """``loss = (1/B) sum_i w[g_i] l_i``; see ``boundary.py``."""
    with on_device_of(losses):
        robust_loss_kernel[(1,)](
            losses, group_ids, group_weights, weights, loss, losses.numel(), group_weights.numel(),
            BLOCK=ROBUST_LOSS_BLOCK, num_warps=ROBUST_LOSS_WARPS,
        )  # fmt: skip


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]
