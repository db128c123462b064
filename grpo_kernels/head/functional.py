"""The public functions from hidden states: each reads its arguments once, then applies autograd.

    z = softcap * tanh(logit_scale * (h W^T + b) / softcap),   p_t = z[t, y_t] - logsumexp_v z[t, v]

From the p_t on everything is as in ``loss/functional.py``.  The logits themselves never exist (``linear_head.py``).
"""

from __future__ import annotations

from typing import Any

import torch

from ..groups.weights import GroupWeights
from ..loss.arguments import GivenPairs
from ..loss.autograd import SequenceSum
from ..loss.functional import loss_of_token_logps
from ..types import IGNORE_INDEX, GroupLossOutput, LossType
from .arguments import HeadArguments
from .autograd import apply_head


def fused_linear_grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ref_logps: torch.Tensor | None,
    group_ids: torch.Tensor,
    group_weights: GroupWeights | torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget: int | float | str = "auto",
    num_labelled: int | None = None,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalize: bool = False,
    pair_weights: torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    tp_group: Any = None,
    vocab_start: int | None = None,
    backend: str = "auto",
) -> GroupLossOutput:
    """Group-robust preference loss of B pairs, from the hidden states before the LM head; logits never exist.

        loss = (1/B) sum_i w[g_i] l(m_i),   z = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap)

    Args:
        hidden: (2B, T, H) padded, the B chosen sequences first and then the B rejected; or (rows, H) packed, with
            ``cu_seqlens``.  float32, bfloat16, float16 or float64.
        weight: (V, H) of the LM head, floating.  Where dtypes differ GEMMs run in the one that holds both; under
            autocast in autocast's.
        labels: int64 or int32, shape of hidden without H: token ids, ``ignore_index`` at prompt and padding.  Rows
            without a label cost nothing.
        bias: (V,) of the LM head, floating; None for none.
        softcap: > 0, bound on the logits (Gemma), in [1e-18, 1e18]; None for none.
        logit_scale: not 0, of a size in the same range, multiplies the logits before the cap (Cohere; Granite divides
            by its scaling).
        memory_budget: what forward may keep for backward when the head trains: bytes (int; 0 keeps nothing and makes
            every tile of logits twice), a fraction of the device's memory (float in [0, 1]), or "auto", a tenth.
        num_labelled: how many labels are scored (after ``shift``), which spares one wait for the device; a wrong
            number makes the result NaN.
        tp_group: process group whose ranks share the vocabulary: ``weight`` (and ``bias``) are this rank's rows of
            the head, everything else is the same on every rank, and so is the result.  The gradient of hidden is
            whole on every rank, that of weight is that of its rows.
        vocab_start: with ``tp_group``, this rank's first token.  Both are read from a weight that is a DTensor sharded
            on dimension 0 over a mesh of one dimension; hidden may then be one of any placement, and is gathered.
        ref_logps, group_ids, group_weights, beta, loss_type, label_smoothing, length_normalize, pair_weights,
            ignore_index, shift, cu_seqlens, backend: as in :func:`fused_grpo_loss`.

    Returns:
        GroupLossOutput, float32 (float64 for float64 hidden or weight).

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came, before anything is computed.
        UnavailableBackendError: the backend named cannot run here, or has no tile operations for the head.
        RuntimeError: called with a moving GroupWeights inside a checkpointed region.

    Source: Ramesh et al. 2024 (arXiv 2405.20304), equations 6 and 10 and Algorithm 1.
    """
    hidden, weight, bias, arguments = HeadArguments.from_hidden(
        hidden, weight, labels,
        GivenPairs(
            ref_logps, group_ids, group_weights, beta, loss_type, label_smoothing, pair_weights, length_normalize
        ),
        bias=bias, softcap=softcap, logit_scale=logit_scale, memory_budget=memory_budget, num_labelled=num_labelled,
        ignore_index=ignore_index, shift=shift, cu_seqlens=cu_seqlens, tp_group=tp_group, vocab_start=vocab_start,
        backend=backend,
    )  # fmt: skip
    rows = apply_head(hidden, weight, bias, arguments)
    return loss_of_token_logps(rows, arguments.loss)


def linear_token_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget: int | float | str = "auto",
    num_labelled: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    tp_group: Any = None,
    vocab_start: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Log-probability of every labelled token, from the hidden states before the LM head.

        p_t = z[t, y_t] - logsumexp_v z[t, v],   z = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap)

    Args:
        As :func:`fused_linear_grpo_loss`; any number of sequences.

    Returns:
        Shape of labels, float32 (float64 for float64 hidden or weight), in nats: entry t is log p(labels[t]); 0 where
        the label is ignored and, under ``shift``, at the first position of a sequence.  Differentiable in hidden,
        weight and bias, with any gradient: any loss of log-probabilities can stand on it.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came, before anything is computed.
        UnavailableBackendError: the backend named cannot run here, or has no tile operations for the head.
    """
    hidden, weight, bias, arguments = HeadArguments.from_hidden(
        hidden, weight, labels, None,
        bias=bias, softcap=softcap, logit_scale=logit_scale, memory_budget=memory_budget, num_labelled=num_labelled,
        ignore_index=ignore_index, shift=shift, cu_seqlens=cu_seqlens, tp_group=tp_group, vocab_start=vocab_start,
        backend=backend,
    )  # fmt: skip
    return arguments.loss.rows.per_label(apply_head(hidden, weight, bias, arguments))


def linear_sequence_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget: int | float | str = "auto",
    num_labelled: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    tp_group: Any = None,
    vocab_start: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Summed log-probability of the labelled tokens of each sequence, from the hidden states before the LM head.

        log pi = sum_t p_t

    Args:
        As :func:`linear_token_logps`.

    Returns:
        (sequences,) float32 (float64 for float64 hidden or weight), in nats; 0 for a sequence without labels.
        Differentiable.

    Raises:
        As :func:`linear_token_logps`.
    """
    hidden, weight, bias, arguments = HeadArguments.from_hidden(
        hidden, weight, labels, None,
        bias=bias, softcap=softcap, logit_scale=logit_scale, memory_budget=memory_budget, num_labelled=num_labelled,
        ignore_index=ignore_index, shift=shift, cu_seqlens=cu_seqlens, tp_group=tp_group, vocab_start=vocab_start,
        backend=backend,
    )  # fmt: skip
    return SequenceSum.apply(apply_head(hidden, weight, bias, arguments), arguments.loss.rows)
