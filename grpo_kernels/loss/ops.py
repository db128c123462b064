"""The boundary once more, as ``torch.library`` operators, so that a compiled step has no graph break.

Eager calls go straight to a backend's functions.  Under ``torch.compile`` the same calls go through these operators,
which the compiler takes as opaque: it sees which tensors they write, and fake kernels that write nothing.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..backends import Backend, choose


@torch.library.custom_op("grpo_kernels::token_logps_fwd", mutates_args=("logps", "lse"))
def _token_logps_fwd(
    logits: Tensor, targets: Tensor, logps: Tensor, lse: Tensor, ignore_index: int, backend: str
) -> None:
    chosen = choose(backend, logits.device, logits.dtype, may_prove=False)
    chosen.token_logps_fwd(logits, targets, logps, lse, ignore_index=ignore_index)


@torch.library.custom_op("grpo_kernels::token_logps_bwd", mutates_args=("grad_logits",))
def _token_logps_bwd(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad_logps: Tensor,
    grad_logits: Tensor,
    ignore_index: int,
    backend: str,
) -> None:
    chosen = choose(backend, logits.device, logits.dtype, may_prove=False)
    chosen.token_logps_bwd(logits, targets, lse, grad_logps, grad_logits, ignore_index=ignore_index)


@torch.library.custom_op(
    "grpo_kernels::preference_tail",
    mutates_args=(
        "policy_logps",
        "lengths",
        "margins",
        "rewards",
        "losses",
        "slopes",
        "group_sums",
        "group_counts",
        "group_losses",
    ),
)
def _preference_tail(
    token_logps: Tensor,
    targets: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logps: Tensor | None,
    group_ids: Tensor,
    pair_weights: Tensor | None,
    policy_logps: Tensor,
    lengths: Tensor | None,
    margins: Tensor,
    rewards: Tensor,
    losses: Tensor,
    slopes: Tensor,
    group_sums: Tensor,
    group_counts: Tensor,
    group_losses: Tensor,
    loss_type: int,
    beta: float,
    label_smoothing: float,
    length_normalize: bool,
    ignore_index: int,
    backend: str,
) -> None:
    chosen = choose(backend, token_logps.device, token_logps.dtype, may_prove=False)
    chosen.preference_tail(
        token_logps, targets, cu_seqlens, ref_logps, group_ids, pair_weights,
        policy_logps, lengths, margins, rewards, losses, slopes, group_sums, group_counts, group_losses,
        loss_type=loss_type, beta=beta, label_smoothing=label_smoothing, length_normalize=length_normalize,
        ignore_index=ignore_index,
    )  # fmt: skip


@torch.library.custom_op("grpo_kernels::robust_loss", mutates_args=("weights", "loss"))
def _robust_loss(
    losses: Tensor, group_ids: Tensor, group_weights: Tensor, weights: Tensor, loss: Tensor, backend: str
) -> None:
    choose(backend, losses.device, losses.dtype, may_prove=False).robust_loss(
        losses, group_ids, group_weights, weights, loss
    )


for _op in (_token_logps_fwd, _token_logps_bwd, _preference_tail, _robust_loss):
    _op.register_fake(lambda *args, **kwargs: None)


class OperatorBackend:
    """A backend whose functions are the operators above, carrying the name of the one that will run."""

    def __init__(self, name: str) -> None:
        self.name = name

    def token_logps_fwd(self, logits, targets, logps, lse, *, ignore_index) -> None:
        torch.ops.grpo_kernels.token_logps_fwd(logits, targets, logps, lse, ignore_index, self.name)

    def token_logps_bwd(self, logits, targets, lse, grad_logps, grad_logits, *, ignore_index) -> None:
        torch.ops.grpo_kernels.token_logps_bwd(logits, targets, lse, grad_logps, grad_logits, ignore_index, self.name)

    def preference_tail(self, *tensors, loss_type, beta, label_smoothing, length_normalize, ignore_index) -> None:
        torch.ops.grpo_kernels.preference_tail(
            *tensors, loss_type, beta, label_smoothing, length_normalize, ignore_index, self.name
        )

    def robust_loss(self, *tensors) -> None:
        torch.ops.grpo_kernels.robust_loss(*tensors, self.name)


def pick(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend itself in eager mode, its operators under ``torch.compile``; raises as ``choose`` does."""
    if is_compiling():
        return cast(Backend, OperatorBackend(name))  # the head has operators of its own: head/ops.py
    return choose(name, device, dtype)
