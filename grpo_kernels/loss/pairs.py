"""From the log-probability of each row to losses, slopes and group weights; outside of autograd.

    log pi = sum_t p_t,   m_i = (log pi - log pi_ref)_chosen - (...)_rejected,   l_i = l(m_i),   s_i = dl_i/dm_i
    log alpha <- the exponentiated step, where it moves;   w_i = alpha[g_i] / q[g_i],   loss = (1/B) sum_i w_i l_i

Sums and losses are the backend's, the step of alpha is that of ``groups/weights.py``.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch

from ..arguments import contiguous
from ..groups.weights import GroupWeights
from ..types import GroupLossOutput
from .arguments import LossArguments, Pairs


class PairResults(NamedTuple):
    """What is computed of B pairs: the output, and what the gradient needs.  Dtype that of the log-probabilities."""

    loss: torch.Tensor
    """() ``(1/B) sum_i w_i l_i``."""
    policy_logps: torch.Tensor
    """(2B,) sums over tokens."""
    losses: torch.Tensor
    """(B,) l_i, the pair's own weight included."""
    slopes: torch.Tensor
    """(B,) s_i, the pair's own weight included."""
    weights: torch.Tensor
    """(B,) w_i of each pair's group."""
    lengths: torch.Tensor | None
    """(2B,) float64 to divide by, where it normalises."""
    margins: torch.Tensor
    """(B,) m_i."""
    rewards: torch.Tensor
    """(2B,) beta times the log-ratio of each sequence."""
    group_losses: torch.Tensor
    """(G,) mean of the group's losses."""
    group_counts: torch.Tensor
    """(G,) int64."""
    group_weights: torch.Tensor
    """(G,) alpha, or the weights that were passed."""

    def output(self, loss: torch.Tensor, policy_logps: torch.Tensor) -> GroupLossOutput:
        """What the caller gets; ``loss`` and ``policy_logps`` as they come from autograd."""
        chosen, rejected = self.rewards.chunk(2)
        return GroupLossOutput(
            loss, self.losses, self.margins, chosen, rejected, policy_logps,
            self.group_losses, self.group_counts, self.group_weights,
        )  # fmt: skip


def pair_results(token_logps: torch.Tensor, arguments: LossArguments) -> PairResults:
    """(rows,) log-probabilities, detached → everything about the pairs; α takes its step in between, if it moves."""
    rows, backend = arguments.rows, arguments.backend
    pairs = cast(Pairs, arguments.pairs)
    num_pairs, num_groups = pairs.num_pairs, pairs.num_groups
    targets, lengths = None, pairs.lengths
    if pairs.length_normalize and lengths is None:
        targets, lengths = rows.targets, token_logps.new_empty(2 * num_pairs, dtype=torch.float64)
    policy_logps, losses = token_logps.new_empty(2 * num_pairs), token_logps.new_empty(num_pairs)
    group_losses, loss = token_logps.new_empty(num_groups), token_logps.new_empty(())
    rewards = torch.empty_like(policy_logps)
    margins, slopes, weights = torch.empty_like(losses), torch.empty_like(losses), torch.empty_like(losses)
    group_sums = token_logps.new_empty(num_groups, dtype=torch.float64)
    group_counts = token_logps.new_empty(num_groups, dtype=torch.int64)
    backend.preference_tail(
        token_logps, targets, rows.cu_seqlens, pairs.ref_logps, pairs.group_ids, pairs.pair_weights,
        policy_logps, lengths, margins, rewards, losses, slopes, group_sums, group_counts, group_losses,
        loss_type=pairs.loss_type, beta=pairs.beta, label_smoothing=pairs.label_smoothing,
        length_normalize=pairs.length_normalize, ignore_index=rows.ignore_index,
    )  # fmt: skip
    group_weights = pairs.group_weights
    if isinstance(group_weights, GroupWeights):
        if arguments.differentiable and group_weights.moves and group_weights.training:
            _refuse_recomputation()
            group_weights.observe_and_step(group_sums, group_counts, losses)
        alpha = group_weights.weights
        loss_weights, reported = (alpha / group_weights.sampling_probs).to(loss.dtype), alpha.to(loss.dtype)
    else:
        plain = group_weights.detach() if group_weights.requires_grad else group_weights
        loss_weights = reported = contiguous(plain, loss.dtype)
    backend.robust_loss(losses, pairs.group_ids, loss_weights, weights, loss)
    return PairResults(
        loss, policy_logps, losses, slopes, weights, lengths, margins, rewards, group_losses, group_counts, reported
    )


def _refuse_recomputation() -> None:
    """A checkpointed region runs twice; alpha would step twice, and the second loss would not be the first."""
    if torch.compiler.is_compiling():
        return
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    checkpointed = hooks is not None and "checkpoint" in getattr(hooks[0], "__qualname__", "")
    if checkpointed or torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "the loss with a moving GroupWeights was called inside a checkpointed region, where it would run twice and "
            "alpha would step twice; checkpoint the model and call the loss outside, or checkpoint token_logps and "
            "pass its sums to preference_loss"
        )
