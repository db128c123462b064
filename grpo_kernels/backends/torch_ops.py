"""The boundary in PyTorch operations: any device, any floating dtype, no compiled code.

    p_t = z[t, y_t] - lse_t,   dz[t, v] = c_t * ((v == y_t) - exp(z[t, v] - lse_t))

Rows are taken a few at a time, so that the float32 copies of half-precision logits stay in cache and never
reach the size of the logits.  Accumulation dtype: float32, float64 for float64 logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..types import LOSS_TYPES
from .torch_ops_head import head_tile_bwd, head_tile_fwd  # noqa: F401 - part of the boundary

_CHUNK_BYTES = {"cpu": 2 << 20}
_DEFAULT_CHUNK_BYTES = 256 << 20
"""Working memory for one chunk of rows in the accumulation dtype: about a core's L2 on a CPU, few launches on a GPU."""


def unavailable_reason() -> str | None:
    """PyTorch is always there."""
    return None


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Every device and every floating dtype is taken."""
    return None if dtype.is_floating_point else f"{dtype} is not a floating dtype"


def token_logps_fwd(
    logits: torch.Tensor, targets: torch.Tensor, logps: torch.Tensor, lse: torch.Tensor, *, ignore_index: int
) -> None:
    """``logps[r] = z[r, y_r] - lse_r``; see ``boundary.py``."""
    for part, rows in _chunks(logps.dtype, logits):
        z, target = rows.to(logps.dtype), targets[part]
        top = z.amax(dim=1, keepdim=True)
        # No special case for infinities: inf - inf is NaN, which is what torch.log_softmax gives.
        log_sum = (z - top).exp_().sum(dim=1).log_()
        lse[part] = log_sum + top.squeeze(1)
        index, valid = _safe_index(target, logits.shape[-1])
        # Not z - lse: at |z| = 1e4, rounding lse to float32 would cost 5e-4.
        logp = z.gather(1, index.unsqueeze(1)).sub_(top).squeeze(1).sub_(log_sum)
        logp.masked_fill_(~valid, torch.nan)
        logps[part] = logp.masked_fill_(target == ignore_index, 0)


def token_logps_bwd(
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    grad_logps: torch.Tensor,
    grad_logits: torch.Tensor,
    *,
    ignore_index: int,
) -> None:
    """``dz[r, v] = c_r ((v == y_r) - exp(z[r, v] - lse_r))``, in place or not; see ``boundary.py``."""
    for part, rows, out in _chunks(lse.dtype, logits, grad_logits):
        target, scale = targets[part], grad_logps[part].unsqueeze(1)
        index, valid = _safe_index(target, logits.shape[-1])
        shifted = rows.to(lse.dtype, copy=True).sub_(lse[part].unsqueeze(1))
        at_target = shifted.gather(1, index.unsqueeze(1)).expm1_().mul_(-scale)
        dz = shifted.exp_().mul_(-scale).scatter_(1, index.unsqueeze(1), at_target)
        dz.masked_fill_(~valid.unsqueeze(1), torch.nan)
        out.copy_(dz.masked_fill_((target == ignore_index).unsqueeze(1), 0))


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
    num_pairs, num_groups = group_ids.shape[0], group_sums.shape[0]
    logps = _segment_sum(token_logps.double(), cu_seqlens, 2 * num_pairs)
    policy_logps.copy_(logps)
    logps = policy_logps.double()  # rounded as the reference was: a policy that equals it has margin 0 to the bit
    if targets is not None and lengths is not None:
        lengths.copy_(_segment_sum((targets != ignore_index).double(), cu_seqlens, 2 * num_pairs))
    ratios = logps if ref_logps is None else logps - ref_logps
    if length_normalize:
        ratios = ratios / lengths.clamp(min=1)  # type: ignore[union-attr]  # given where it divides
    rewards.copy_(beta * ratios)
    margin = ratios[:num_pairs] - ratios[num_pairs:]
    loss, slope = _value_and_slope(margin, LOSS_TYPES[loss_type], beta, label_smoothing)
    if pair_weights is not None:
        loss, slope = loss * pair_weights, slope * pair_weights
    valid = (group_ids >= 0) & (group_ids < num_groups)
    margins.copy_(margin)
    losses.copy_(loss.masked_fill(~valid, torch.nan))
    slopes.copy_(slope.masked_fill(~valid, torch.nan))
    _group_sums(loss, group_ids, valid, group_sums, group_counts)
    group_losses.copy_(group_sums / group_counts.clamp(min=1))


def robust_loss(
    losses: torch.Tensor,
    group_ids: torch.Tensor,
    group_weights: torch.Tensor,
    weights: torch.Tensor,
    loss: torch.Tensor,
) -> None:
    """``loss = (1/B) sum_i w[g_i] l_i``; see ``boundary.py``."""
    torch.index_select(group_weights, 0, group_ids.clamp(0, group_weights.shape[0] - 1), out=weights)
    loss.copy_((weights.double() * losses.double()).sum() / max(losses.shape[0], 1))


def integer_range(integers: torch.Tensor, ignored: int) -> tuple[int, int]:
    """Smallest and largest of 0 and the integers that are not ignored; see ``boundary.py``."""
    if not integers.numel():
        return 0, 0
    integers = integers.long()  # which may hold no such number as `ignored` otherwise
    low, high = (int(x) for x in torch.aminmax(integers.masked_fill(integers == ignored, 0)))
    return min(low, 0), max(high, 0)


def _group_sums(
    loss: torch.Tensor, group_ids: torch.Tensor, valid: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor
) -> None:
    """Sum and count per group, in an order that does not depend on threads: pairs sorted by group, then segments."""
    num_groups = sums.shape[0]
    key, order = torch.where(valid, group_ids, num_groups).sort(stable=True)
    edges = torch.searchsorted(key, torch.arange(num_groups + 1, device=key.device))
    counts.copy_(edges.diff())
    # What lies after the last edge belongs to no group, but segment_reduce wants segments to cover everything.
    edges = torch.nn.functional.pad(edges, (0, 1), value=key.shape[0])
    sums.copy_(torch.segment_reduce(loss[order], "sum", offsets=edges, initial=0, unsafe=True)[:num_groups])


def _value_and_slope(
    margin: torch.Tensor, loss_type: str, beta: float, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and its derivative with respect to the margin, without pair or group weights."""
    x = beta * margin
    if loss_type == "ipo":
        gap = margin - 1 / (2 * beta)
        return gap.square(), 2 * gap
    if loss_type == "hinge":
        return (1 - x).relu(), torch.where(x < 1, -beta, torch.where(x.isnan(), x, 0.0))
    # -log sigma(x) and -log sigma(-x), and the derivatives of both with respect to x.
    win, lose = -torch.nn.functional.logsigmoid(x), -torch.nn.functional.logsigmoid(-x)
    d_win, d_lose = -torch.sigmoid(-x), torch.sigmoid(x)
    if loss_type == "sigmoid":
        a, b = 1 - smoothing, smoothing
    elif loss_type == "robust":  # unbiased under labels flipped with probability `smoothing`
        a, b = (1 - smoothing) / (1 - 2 * smoothing), -smoothing / (1 - 2 * smoothing)
    else:
        raise ValueError(f"no loss {loss_type!r} here")
    if b == 0:  # not 0 * lose: a rejected reply that is impossible has lose = inf
        return win, beta * d_win
    return a * win + b * lose, beta * (a * d_win + b * d_lose)


def _segment_sum(values: torch.Tensor, cu_seqlens: torch.Tensor | None, segments: int) -> torch.Tensor:
    if cu_seqlens is None:
        return values.view(segments, values.shape[0] // max(segments, 1)).sum(dim=1)
    # Held inside the rows: a wrong boundary may give a wrong sum, never a stray read.
    edges = cu_seqlens.long().clamp(0, values.shape[0])
    return torch.segment_reduce(values, "sum", offsets=edges, initial=0, unsafe=True)


def _safe_index(target: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An index that gather accepts everywhere, and where it is the target itself."""
    valid = (target >= 0) & (target < vocabulary)
    return torch.where(valid, target, 0), valid


def _chunks(dtype: torch.dtype, *tensors: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """In the order of rows: a slice of rows, and a view of them, ``(rows, V)``, in each of these (S, T, V) tensors.

    The tensors may have different strides; only where all of them allow it are rows taken across sequences.
    """
    sequences, length, vocabulary = tensors[0].shape
    if tensors[0].numel() == 0:
        return
    budget = _CHUNK_BYTES.get(tensors[0].device.type, _DEFAULT_CHUNK_BYTES)
    step = max(1, budget // (vocabulary * dtype.itemsize))
    if all(sequences == 1 or z.stride(0) == length * z.stride(1) for z in tensors):
        sequences, length = 1, sequences * length
        tensors = tuple(z.as_strided((1, length, vocabulary), (0, z.stride(1), 1)) for z in tensors)
    for s in range(sequences):
        for start in range(0, length, step):
            stop = min(start + step, length)
            yield slice(s * length + start, s * length + stop), *(z[s, start:stop] for z in tensors)
