"""The names that every other module shares: loss types, the output record, and how errors are worded."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

LossType = Literal["sigmoid", "robust", "hinge", "ipo"]

LOSS_TYPES: tuple[LossType, ...] = get_args(LossType)
"""Order is part of the boundary: kernels receive ``LOSS_TYPES.index(loss_type)``."""

SMOOTHED_LOSS_TYPES: tuple[LossType, ...] = ("sigmoid", "robust")
"""The losses that ``label_smoothing`` is defined for."""

IGNORE_INDEX = -100
"""The label of a position that is not scored, as in PyTorch and Hugging Face."""


class GroupLossOutput(NamedTuple):
    """What one call of the loss returns.  Everything but ``loss`` and ``policy_logps`` is detached.

    Shapes: B pairs, G groups.  Dtypes: float32, or float64 where the log-probabilities are float64.
    """

    loss: torch.Tensor
    """() robust loss ``(1/B) sum_i w[g_i] l_i``, differentiable."""
    losses: torch.Tensor
    """(B,) loss of each pair, ``pair_weights`` included, group weights not."""
    margins: torch.Tensor
    """(B,) margin m in nats, without beta."""
    rewards_chosen: torch.Tensor
    """(B,) beta times the log-ratio of the chosen reply to the reference."""
    rewards_rejected: torch.Tensor
    """(B,) beta times the log-ratio of the rejected reply to the reference."""
    policy_logps: torch.Tensor
    """(2B,) summed log-probabilities in nats, chosen first, differentiable."""
    group_losses: torch.Tensor
    """(G,) mean of ``losses`` over this call's pairs of the group, 0 where it has none."""
    group_counts: torch.Tensor
    """(G,) int64, this call's pairs of the group."""
    group_weights: torch.Tensor
    """(G,) the alpha in force in this call, or the plain tensor that was passed."""


class UnavailableBackendError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""
