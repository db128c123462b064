"""The odds against a row's target, over a vocabulary that is split over ranks.

    log odds against the target = log sum_{v != y} exp(z[v]) - z[y],   1 - p[y] = sigmoid(log odds)

``vocab/parallel.py`` has the exchange between ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..vocab.parallel import exchange, finite_base
from ..vocab.shards import FUNCTIONS, Shard, dtype_number
from .arguments import HeadSettings
from .plan import Plan


class TargetOdds(NamedTuple):
    """(rows,) each, over all tokens of the vocabulary, on whichever rank they are."""

    log_odds: Tensor
    """log((1 - p[y]) / p[y])."""
    target_logit: Tensor
    """z[y]."""
    log_scale: Any
    """top - log of the sum over all tokens but y: the log of this rank's scale relative to the whole sum; None where
    one rank has all tokens."""


def target_odds(
    top: Tensor,
    sum_exp: Tensor,
    target_logit: Tensor,
    targets: Tensor,
    all_rows: int,
    biased: bool,
    plan: Plan,
    settings: HeadSettings,
) -> TargetOdds:
    """This rank's largest other logit, the sum seen from there, and z[y] where it holds y → the odds, in float64.

    All (rows,), labelled rows out of ``all_rows``; ``targets`` count from this rank's first token.
    """
    shard = cast(Shard, settings.shard)
    base = torch.where((targets >= 0) & (targets < plan.vocabulary), target_logit, top)
    seen = sum_exp.log() + (top - finite_base(base))
    facts = {
        "function": FUNCTIONS.index("from hidden states"), "rows": all_rows, "labelled rows": plan.rows,
        "dtype": dtype_number(plan.dtype), "hidden size": plan.hidden, "gradient of hidden": plan.grad_hidden,
        "bias": biased, "softcap": settings.softcap, "logit_scale": settings.logit_scale,
        "ignore_index": settings.ignore_index,
    }  # fmt: skip
    total, target_logit = exchange(
        torch.stack([base, seen]), targets + shard.start, plan.vocabulary, shard, settings.ignore_index, facts
    )
    log_scale = (top.double() - total).masked_fill_(sum_exp == 0, -torch.inf)
    return TargetOdds(total - target_logit, target_logit, log_scale)
