"""A vocabulary that is split over ranks: two numbers a row pass between them, and every rank has the whole answer.

Of row t, rank r knows its own tokens alone.  It sends a base and the log-sum relative to it,

    base_r = z[y] where y is among its tokens, else any other of its logits
    seen_r = log sum_v exp(z[v] - base_r)              over its tokens; for the head, all but y

and all take the same steps over what was gathered, in the order of ranks and in float64, and get the same bits:

    total = log sum_r exp(seen_r + base_r),   z[y] = base_r of the rank that holds y
    from logits   lse = total,  logp = z[y] - total
    the head      log-odds against y = total - z[y]    (continued in head/target.py)

A logit is what it is in any dtype and the sum is near it, so that two float32 numbers lose nothing that one process
has, however large the logits: an lse in float32 would be off by 5e-4 at 1e4.
A label on no rank is NaN, as a label out of range is everywhere, and on CPU an error on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from .. import distributed
from ..arguments import values_are_readable
from ..backends import Backend
from .labels import check_labels_in_range
from .shards import Shard, TokenRange, agree, dtype_number


def exchange(
    sent: Tensor, targets: Tensor, num_tokens: int, shard: Shard, ignore_index: int, facts: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """(2, rows) base and sum of this rank → (rows,) float64 ``total`` and z[y], the same bits on every rank.

    Raises:
        ValueError: on every rank, where they disagree (:func:`vocab.shards.agree`), and on CPU where their labels
            differ or one is on no rank.
    """
    ranges = agree(shard, num_tokens, facts)
    vocabulary = max(held.stop for held in ranges)
    # With the payload, since on a device labels are not looked at: a rank with another batch is noticed here.
    gathered = distributed.all_gather(torch.cat([sent, _fingerprint(targets).to(sent.dtype)], dim=1), shard.group)
    same = (gathered[:, :, -1] == gathered[0, :, -1]).all()
    if values_are_readable(targets):
        if not same:
            raise ValueError(
                "the ranks of tp_group must agree on labels; they have as many and not the same (each rank fed with a "
                "batch of its own, as under FSDP2 or DDP, is data parallelism)"
            )
        check_labels_in_range(targets, vocabulary, ignore_index)
    total, target_logit = _combine(gathered[:, :, :-1], targets, ranges)
    return total.masked_fill_(~same, torch.nan), target_logit


def _combine(gathered: Tensor, targets: Tensor, ranges: list[TokenRange]) -> tuple[Tensor, Tensor]:
    """(ranks, 2, rows) → (rows,) float64 ``total`` and z[y], which is NaN where no rank holds y."""
    total = torch.full(targets.shape, -torch.inf, dtype=torch.float64, device=targets.device)
    target_logit = torch.full_like(total, torch.nan)
    for (base, seen), held in zip(gathered.double(), ranges, strict=True):
        total = torch.logaddexp(total, seen + finite_base(base))
        target_logit = torch.where((targets >= held.start) & (targets < held.stop), base, target_logit)
    return total, target_logit


def finite_base(base: Tensor) -> Tensor:
    """0 in place of -inf: a target that is impossible is no base for a sum."""
    return base.masked_fill(base == -torch.inf, 0)


def _fingerprint(targets: Tensor) -> Tensor:
    """(2, 1) whole numbers below 2^24, which float32 holds: labels that differ rarely share them."""
    place = 2 * torch.arange(targets.shape[0], device=targets.device) + 1
    mixed = ((targets + 1) * place * 0x9E3779B97F4A7C1).sum()  # wraps at 2^64
    return torch.stack([mixed & 0xFFFFFF, (mixed >> 24) & 0xFFFFFF]).unsqueeze(1)


def sharded(backend: Backend, shard: Shard) -> Backend:
    """The backend for logits that are this rank's tokens."""
    return cast(Backend, ShardedBackend(backend, shard))


class ShardedBackend:
    """A backend whose logits are one rank's tokens.

    The backend itself sees targets among these in every row that is scored: where y is on another rank, token 0
    takes its place.  Forward needs no more than that, and backward puts the one element right afterwards.
    """

    def __init__(self, backend: Backend, shard: Shard) -> None:
        self._backend, self._shard = backend, shard

    def preference_tail(self, *tensors, **settings) -> None:
        self._backend.preference_tail(*tensors, **settings)

    def robust_loss(self, *tensors) -> None:
        self._backend.robust_loss(*tensors)

    def token_logps_fwd(self, logits, targets, logps, lse, *, ignore_index) -> None:
        num_tokens, ignored = logits.shape[-1], targets == ignore_index
        if num_tokens:
            local, _ = self._local(targets, num_tokens, ignored)
            self._backend.token_logps_fwd(logits, local, logps, lse, ignore_index=_IGNORED)
            index = local.clamp(min=0).view(*logits.shape[:2], 1)
            base = logits.gather(2, index).view(-1).to(logps.dtype)
            seen = torch.where(base == -torch.inf, lse, -logps)
        else:  # more ranks than tokens
            base, seen = torch.zeros_like(logps), torch.full_like(logps, -torch.inf)
        group, start, vocabulary = self._shard
        # Where the row is ignored both are whatever lies there.
        run = exchange_op if torch.compiler.is_compiling() else _exchange_rows
        total, target_logit = run(
            torch.stack([base, seen]), targets, num_tokens, group, start, vocabulary, ignore_index, logits.dtype
        )
        logps.copy_((target_logit - total).masked_fill_(ignored, 0))
        # NaN where no rank has the label, and with it the row of the gradient.
        lse.copy_(torch.where(target_logit.isnan(), target_logit, total))

    def token_logps_bwd(self, logits, targets, lse, grad_logps, grad_logits, *, ignore_index) -> None:
        num_tokens = logits.shape[-1]
        if not num_tokens:
            return
        local, elsewhere = self._local(targets, num_tokens, targets == ignore_index)
        first = logits[..., 0].reshape(-1).to(lse.dtype, copy=True)  # grad_logits may be the same memory
        self._backend.token_logps_bwd(logits, local, lse, grad_logps, grad_logits, ignore_index=_IGNORED)
        column = grad_logits.select(-1, 0)
        grad_first = (first - lse).exp() * -grad_logps
        column.copy_(torch.where(elsewhere.view(column.shape), grad_first.view(column.shape), column))

    def _local(self, targets: Tensor, num_tokens: int, ignored: Tensor) -> tuple[Tensor, Tensor]:
        """Targets as the backend sees them, and which rows are scored with a target of another rank."""
        local = targets - self._shard.start
        elsewhere = ((local < 0) | (local >= num_tokens)) & ~ignored
        return local.masked_fill(elsewhere, 0).masked_fill_(ignored, _IGNORED), elsewhere


_IGNORED = -1
"""What is ignored among targets that count from a rank's first token, where the caller's own index may be a token."""


def _exchange_rows(
    sent: Tensor,
    targets: Tensor,
    num_tokens: int,
    group: str,
    start: int,
    vocabulary: int,
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    facts = {"rows": targets.shape[0], "dtype": dtype_number(dtype), "ignore_index": ignore_index}
    return exchange(sent, targets, num_tokens, Shard(group, start, vocabulary), ignore_index, facts)


exchange_op = torch.library.custom_op(
    "grpo_kernels::vocab_exchange",
    _exchange_rows,
    mutates_args=(),
    schema="(Tensor sent, Tensor targets, SymInt num_tokens, str group, SymInt start, SymInt vocabulary, "
    "SymInt ignore_index, ScalarType dtype) -> (Tensor, Tensor)",
)
"""The same under ``torch.compile``."""


@exchange_op.register_fake
def _(sent, targets, *_settings):
    return sent.new_empty(targets.shape, dtype=torch.float64), sent.new_empty(targets.shape, dtype=torch.float64)
