"""The public functions from logits and from log-probabilities: each reads its arguments once, then applies autograd.

Equations, once (docs/math.md derives them); B pairs are 2B sequences, the B chosen first:

    p_t = z[t, y_t] - lse_t,   log pi = sum_t p_t,   m_i = (log pi - log pi_ref)_chosen - (...)_rejected
    l_i = -log sigma(beta m_i),   loss = (1/B) sum_i w[g_i] l_i,   w_g = alpha_g / q_g
"""

from __future__ import annotations

from typing import Any

import torch

from ..groups.weights import GroupWeights
from ..types import IGNORE_INDEX, GroupLossOutput, LossType
from .arguments import GivenPairs, LossArguments
from .autograd import FusedLoss, PreferenceLoss, SequenceSum, TokenLogps, logps_and_lse
from .pairs import pair_results


def fused_grpo_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ref_logps: torch.Tensor | None,
    group_ids: torch.Tensor,
    group_weights: GroupWeights | torch.Tensor,
    *,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalize: bool = False,
    pair_weights: torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    overwrite_logits: bool = False,
    tp_group: Any = None,
    vocab_start: int | None = None,
    backend: str = "auto",
) -> GroupLossOutput:
    """Group-robust preference loss of B pairs, from the policy's logits, in one pass over the vocabulary each way.

        loss = (1/B) sum_i w[g_i] l(m_i),   dloss/dz[t, :] = c_t (onehot(y_t) - softmax(z[t, :]))

    Args:
        logits: policy logits, float32, bfloat16, float16 or float64: (2B, T, V) padded, the B chosen sequences first
            and then the B rejected; or (rows, V) packed, with ``cu_seqlens``.
        labels: int64 or int32, shape of logits without V: token ids, ``ignore_index`` at prompt and padding.
        ref_logps: (2B,) float32 or float64 summed log-probabilities of the reference in nats; None for zeros.
        group_ids: (B,) int64 or int32 in [0, G): index into ``group_weights.names``.
        group_weights: a :class:`GroupWeights` (training mode with gradients: it observes this batch, steps, and the
            *new* weights are used; else it is read), or a plain (G,) tensor w used as given.
        beta: > 0, temperature of the preference model.
        loss_type: "sigmoid" (DPO), "robust" (unbiased under flipped labels), "hinge", "ipo".
        label_smoothing: in [0, 1/2); with "sigmoid" conservative DPO, with "robust" the rate of flipped labels.
        length_normalize: divide policy and reference by the number of labelled tokens before the margin.
        pair_weights: (B,) float32 or float64, multiplies each l_i wherever it appears; None for ones.
        ignore_index: label of positions that are not scored.
        shift: position t-1 predicts label t (Hugging Face); False where logits and labels are aligned already.
        cu_seqlens: (2B+1,) int32, sequence i is rows [cu[i], cu[i+1]); None for padded input.
        overwrite_logits: let backward write the gradient over the logits instead of into new memory.
        tp_group: process group whose ranks share the vocabulary: the logits are this rank's tokens of it, everything
            else is the same on every rank, and so is the result.  A shard that is -inf throughout makes its row NaN.
        vocab_start: with ``tp_group``, this rank's first token.  Both are read from logits that are a DTensor sharded
            on their last dimension over a mesh of one dimension.
        backend: "auto", or a name of :func:`available_backends`.

    Returns:
        GroupLossOutput, float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came, before anything is computed.
        UnavailableBackendError: the backend named cannot run here.
        RuntimeError: called with a moving GroupWeights inside a checkpointed region.

    Source: Ramesh et al. 2024 (arXiv 2405.20304), equations 6 and 10 and Algorithm 1.
    """
    logits, arguments = LossArguments.from_logits(
        logits, labels,
        GivenPairs(
            ref_logps, group_ids, group_weights, beta, loss_type, label_smoothing, pair_weights, length_normalize
        ),
        ignore_index=ignore_index, shift=shift, cu_seqlens=cu_seqlens, overwrite_logits=overwrite_logits,
        tp_group=tp_group, vocab_start=vocab_start, backend=backend,
    )  # fmt: skip
    logps_lse = logps_and_lse(logits.detach(), arguments)
    results = pair_results(logps_lse[0], arguments)
    return results.output(*FusedLoss.apply(logits, logps_lse, results, arguments))


def preference_loss(
    policy_logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    group_ids: torch.Tensor,
    group_weights: GroupWeights | torch.Tensor,
    *,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    lengths: torch.Tensor | None = None,
    pair_weights: torch.Tensor | None = None,
    backend: str = "auto",
) -> GroupLossOutput:
    """Group-robust preference loss for those who have sequence log-probabilities already.

        loss = (1/B) sum_i w[g_i] l(m_i)

    Args:
        policy_logps: (2B,) float32 or float64 summed log-probabilities in nats, the B chosen first.
        lengths: (2B,) numbers that divide policy and reference before the margin, anything under 1 counting as 1 (a
            reply without labels); None for no normalising.
        ref_logps, group_ids, group_weights, beta, loss_type, label_smoothing, pair_weights, backend: as in
            :func:`fused_grpo_loss`.

    Returns:
        GroupLossOutput, in the dtype of ``policy_logps``.

    Raises:
        TypeError, ValueError, UnavailableBackendError, RuntimeError: as :func:`fused_grpo_loss`.

    Source: Ramesh et al. 2024 (arXiv 2405.20304), equations 6 and 10.
    """
    pairs = GivenPairs(
        ref_logps, group_ids, group_weights, beta, loss_type, label_smoothing, pair_weights, lengths=lengths
    )
    policy_logps, arguments = LossArguments.from_logps(policy_logps, pairs, backend=backend)
    return loss_of_token_logps(policy_logps, arguments)


def token_logps(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    overwrite_logits: bool = False,
    tp_group: Any = None,
    vocab_start: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Log-probability of every labelled token.

        p_t = z[t, y_t] - logsumexp_v z[t, v]

    Args:
        logits, labels, ignore_index, shift, cu_seqlens, overwrite_logits, tp_group, vocab_start, backend: as in
            :func:`fused_grpo_loss`; any number of sequences.

    Returns:
        Shape of labels, float32 (float64 for float64 logits), in nats: entry t is log p(labels[t]); 0 where the
        label is ignored and, under ``shift``, at the first position of a sequence.  Differentiable.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came, before anything is computed.
        UnavailableBackendError: the backend named cannot run here.
    """
    logits, arguments = LossArguments.from_logits(
        logits, labels, None, ignore_index=ignore_index, shift=shift, cu_seqlens=cu_seqlens,
        overwrite_logits=overwrite_logits, tp_group=tp_group, vocab_start=vocab_start, backend=backend,
    )  # fmt: skip
    return arguments.rows.per_label(TokenLogps.apply(logits, arguments))


def sequence_logps(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    overwrite_logits: bool = False,
    tp_group: Any = None,
    vocab_start: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Summed log-probability of the labelled tokens of each sequence.

        log pi = sum_t p_t

    Args:
        As :func:`token_logps`.

    Returns:
        (sequences,) float32 (float64 for float64 logits), in nats; 0 for a sequence without labels.  Differentiable.

    Raises:
        As :func:`token_logps`.
    """
    logits, arguments = LossArguments.from_logits(
        logits, labels, None, ignore_index=ignore_index, shift=shift, cu_seqlens=cu_seqlens,
        overwrite_logits=overwrite_logits, tp_group=tp_group, vocab_start=vocab_start, backend=backend,
    )  # fmt: skip
    return SequenceSum.apply(TokenLogps.apply(logits, arguments), arguments.rows)


def loss_of_token_logps(token_logps: torch.Tensor, arguments: LossArguments) -> GroupLossOutput:
    """The loss as a function of (rows,) token log-probabilities from any source; not public."""
    results = pair_results(token_logps.detach(), arguments)
    return results.output(*PreferenceLoss.apply(token_logps, results, arguments.rows))
