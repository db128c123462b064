"""The whole method in plain PyTorch, written to be read beside ``docs/math.md``: the oracle of the tests.

Nothing here is fast, nothing is fused, and gradients come from autograd alone.  Every function takes any floating
dtype and computes in it; give it float64 to have the truth.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .types import IGNORE_INDEX, LossType


def token_logps(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = True,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """``p_t = z[t, y_t] - logsumexp_v z[t, v]``, shape of labels: entry t is log p(labels[t]), 0 where ignored.

    Padded: logits (2B, T, V), labels (2B, T).  Packed: logits (rows, V), labels (rows,), and ``cu_seqlens``.
    With ``shift`` the logits at position t-1 predict label t, within a sequence.
    """
    if cu_seqlens is not None:
        pieces = [
            token_logps(logits[None, start:end], labels[None, start:end], ignore_index=ignore_index, shift=shift)[0]
            for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
        ]
        return torch.cat(pieces)
    if shift:
        scored = token_logps(logits[:, :-1], labels[:, 1:], ignore_index=ignore_index, shift=False)
        return F.pad(scored, (1, 0))[:, : labels.shape[1]]
    labelled = labels != ignore_index
    logps = logits.log_softmax(dim=-1).gather(-1, labels.where(labelled, 0).unsqueeze(-1)).squeeze(-1)
    return logps.where(labelled, 0)


def sequence_sums(values: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """(2B,) sum of each sequence: ``log pi = sum_t p_t``, or the number of labelled tokens."""
    if cu_seqlens is None:
        return values.sum(dim=-1)
    edges = cu_seqlens.tolist()
    return torch.stack([values[start:end].sum() for start, end in itertools.pairwise(edges)])


def labelled_tokens(
    labels: torch.Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = True,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """(2B,) how many tokens of each sequence are scored."""
    labelled = (labels != ignore_index).double()
    if shift:  # nothing predicts the first token of a sequence
        if cu_seqlens is None:
            labelled[:, :1] = 0
        else:
            starts = cu_seqlens[:-1][cu_seqlens.diff() > 0]
            labelled[starts.long()] = 0
    return sequence_sums(labelled, cu_seqlens)


def log_ratios(
    policy_logps: torch.Tensor, ref_logps: torch.Tensor | None, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """(2B,) ``log pi - log pi_ref``, both divided by the sequence's length where lengths are given."""
    ratios = policy_logps if ref_logps is None else policy_logps - ref_logps
    return ratios if lengths is None else ratios / lengths.clamp(min=1).to(ratios.dtype)


def pair_margins(ratios: torch.Tensor) -> torch.Tensor:
    """(B,) ``m_i``: log-ratio of the chosen reply minus that of the rejected one; chosen come first."""
    chosen, rejected = ratios.chunk(2)
    return chosen - rejected


def pair_losses(
    margins: torch.Tensor, *, beta: float, loss_type: LossType = "sigmoid", label_smoothing: float = 0.0
) -> torch.Tensor:
    """(B,) ``l_i``, the loss of each pair as a function of its margin."""
    x, eps = beta * margins, label_smoothing
    match loss_type:
        case "sigmoid" | "robust" if eps == 0:  # the same, and without 0 * inf where the rejected reply is impossible
            return -F.logsigmoid(x)
        case "sigmoid":  # DPO; with smoothing, conservative DPO
            return -(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x)
        case "robust":  # unbiased under labels flipped with probability eps
            return (-(1 - eps) * F.logsigmoid(x) + eps * F.logsigmoid(-x)) / (1 - 2 * eps)
        case "hinge":
            return torch.relu(1 - x)
        case "ipo":
            return (margins - 1 / (2 * beta)).square()
    raise ValueError(f"loss_type {loss_type!r} is not known")


def pair_slopes(
    margins: torch.Tensor, *, beta: float, loss_type: LossType = "sigmoid", label_smoothing: float = 0.0
) -> torch.Tensor:
    """(B,) ``s_i = dl_i / dm_i`` in closed form; negative wherever a larger margin is better."""
    x, eps = beta * margins, label_smoothing
    match loss_type:
        case "sigmoid":
            return beta * (-(1 - eps) * torch.sigmoid(-x) + eps * torch.sigmoid(x))
        case "robust":
            return beta * (-(1 - eps) * torch.sigmoid(-x) - eps * torch.sigmoid(x)) / (1 - 2 * eps)
        case "hinge":
            return -beta * (x < 1).to(margins.dtype)
        case "ipo":
            return 2 * (margins - 1 / (2 * beta))
    raise ValueError(f"loss_type {loss_type!r} is not known")


def logit_gradient(logits: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``dL/dz[t, :] = c_t (onehot(y_t) - softmax(z[t, :]))`` for rows (rows, V), targets (rows,), c (rows,)."""
    onehot = F.one_hot(targets, logits.shape[-1]).to(logits.dtype)
    return scale.unsqueeze(-1) * (onehot - logits.softmax(dim=-1))


def group_mean_losses(losses: torch.Tensor, group_ids: torch.Tensor, num_groups: int) -> torch.Tensor:
    """(G,) mean loss of each group's pairs; 0 where it has none."""
    members = [losses[group_ids == g] for g in range(num_groups)]
    return torch.stack([m.mean() if len(m) else losses.new_zeros(()) for m in members])


def importance_losses(losses: torch.Tensor, group_ids: torch.Tensor, sampling_probs: torch.Tensor) -> torch.Tensor:
    """(G,) ``L_g = (1/B) sum_{i in g} l_i / q_g``: its expectation is the group's mean loss at any batch size."""
    sums = torch.stack([losses[group_ids == g].sum() for g in range(len(sampling_probs))])
    return sums / (len(losses) * sampling_probs.to(losses.dtype))


def alpha_step(alpha: torch.Tensor, group_losses: torch.Tensor, group_lr: float) -> torch.Tensor:
    """(G,) exponentiated gradient as the paper writes it: ``alpha_g exp(eta L_g) / sum_h alpha_h exp(eta L_h)``."""
    grown = alpha * torch.exp(group_lr * group_losses)
    return grown / grown.sum()


def robust_loss(losses: torch.Tensor, group_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """() ``(1/B) sum_i w[g_i] l_i``."""
    return (weights.to(losses.dtype)[group_ids] * losses).sum() / max(len(losses), 1)


class Reference(NamedTuple):
    """What :func:`group_robust_loss` returns; ``loss`` and ``policy_logps`` carry gradients."""

    loss: torch.Tensor
    losses: torch.Tensor
    margins: torch.Tensor
    policy_logps: torch.Tensor
    group_losses: torch.Tensor


def group_robust_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ref_logps: torch.Tensor | None,
    group_ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalize: bool = False,
    pair_weights: torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = True,
    cu_seqlens: torch.Tensor | None = None,
) -> Reference:
    """The loss of one batch under given weights w, from the logits, by the definitions above and nothing else."""
    layout: dict[str, Any] = {"ignore_index": ignore_index, "shift": shift, "cu_seqlens": cu_seqlens}
    policy_logps = sequence_sums(token_logps(logits, labels, **layout), cu_seqlens)
    lengths = labelled_tokens(labels, **layout) if length_normalize else None
    margins = pair_margins(log_ratios(policy_logps, ref_logps, lengths))
    losses = pair_losses(margins, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing)
    if pair_weights is not None:
        losses = losses * pair_weights
    loss = robust_loss(losses, group_ids, weights)
    return Reference(loss, losses, margins, policy_logps, group_mean_losses(losses, group_ids, len(weights)))
