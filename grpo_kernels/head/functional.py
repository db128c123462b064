"""The public functions that start from hidden states: each checks its arguments, then applies ``autograd.py``.

    z = softcap * tanh(logit_scale * (h W^T + b) / softcap),   p_t = z[t, y_t] - logsumexp_v z[t, v]

and from the p_t on everything is as in ``functional.py``.  The logits themselves never exist (``linear_head.py``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..arguments import (
    check_cu_seqlens,
    check_device,
    check_flag,
    check_floating,
    check_integers,
    check_loss_settings,
    check_number,
    check_pairs,
    check_untransformed,
    describe,
    is_dense,
)
from ..groups.weights import GroupWeights
from ..loss.autograd import SequenceSum
from ..loss.functional import _checked_targets, _Pairs, _tail
from ..loss.ops import pick
from ..types import IGNORE_INDEX, LOSS_TYPES, GroupLossOutput, LossType
from ..vocab.shards import Shard, refusing_together, shard_of_weight
from . import autograd
from .ops import tile_backend
from .plan import Call, accumulation_dtype

_LEAST_SCALE, _MOST_SCALE = 1e-18, 1e18
"""Of ``softcap`` and ``logit_scale``: float32 has to hold the one over the other."""


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
            every tile of logits twice), a share of the device's memory (float in [0, 1]), or "auto", a tenth.
        num_labelled: how many labels are scored (after ``shift``), which spares one wait for the device; a wrong
            number makes the result NaN.
        tp_group: process group whose ranks share the vocabulary: ``weight`` (and ``bias``) are this rank's rows of
            the head, everything else is the same on every rank, and so is the result.  The gradient of hidden is
            whole on every rank, that of weight is that of its rows.
        vocab_start: with ``tp_group``, this rank's first word.  Both are read from a weight that is a DTensor sharded
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
    hidden, weight, bias, shard = shard_of_weight(hidden, weight, bias, tp_group, vocab_start)
    with refusing_together(shard):
        check_loss_settings(beta, loss_type, label_smoothing)
        check_flag("length_normalize", length_normalize)
        head = _Head(bias, softcap, logit_scale, memory_budget, num_labelled, shard)
        sequences = _check_inputs(hidden, weight, labels, cu_seqlens, head)
        check_pairs("hidden" if cu_seqlens is None else "cu_seqlens", sequences)
        pairs = _Pairs.check(sequences, hidden.device, ref_logps, group_ids, group_weights, pair_weights)
        targets, call = _checked_call(hidden, weight, labels, head, ignore_index, shift, cu_seqlens, backend)
        chosen = pick(backend, hidden.device, accumulation_dtype(call.dtype))
    rows = _token_rows(hidden, weight, bias, targets, call, backend)
    settings = {
        "loss_type": LOSS_TYPES.index(loss_type),
        "beta": float(beta),
        "label_smoothing": float(label_smoothing),
        "length_normalize": length_normalize,
        "ignore_index": ignore_index,
    }
    return _tail(rows, targets, cu_seqlens, None, pairs, settings, chosen)


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
    hidden, weight, bias, shard = shard_of_weight(hidden, weight, bias, tp_group, vocab_start)
    with refusing_together(shard):
        head = _Head(bias, softcap, logit_scale, memory_budget, num_labelled, shard)
        _check_inputs(hidden, weight, labels, cu_seqlens, head)
        targets, call = _checked_call(hidden, weight, labels, head, ignore_index, shift, cu_seqlens, backend)
    rows = _token_rows(hidden, weight, bias, targets, call, backend)
    # Row t-1 scored label t.  The last row of a sequence scored nothing and holds 0, so rolling cannot cross one.
    return (rows.roll(1) if shift else rows).view(labels.shape)


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
    hidden, weight, bias, shard = shard_of_weight(hidden, weight, bias, tp_group, vocab_start)
    with refusing_together(shard):
        head = _Head(bias, softcap, logit_scale, memory_budget, num_labelled, shard)
        sequences = _check_inputs(hidden, weight, labels, cu_seqlens, head)
        targets, call = _checked_call(hidden, weight, labels, head, ignore_index, shift, cu_seqlens, backend)
    rows = _token_rows(hidden, weight, bias, targets, call, backend)
    return SequenceSum.apply(rows, cu_seqlens, sequences)


class _Head(NamedTuple):
    """The arguments that belong to the head."""

    bias: torch.Tensor | None
    softcap: float | None
    logit_scale: float
    memory_budget: int | float | str
    num_labelled: int | None
    shard: Shard | None


def _checked_call(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    head: _Head,
    ignore_index: int,
    shift: bool,
    cu_seqlens: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, Call]:
    """The last checks → the word that each row has to predict, and all that the head was asked for."""
    targets = _checked_targets(weight.shape[0] if head.shard is None else None, labels, ignore_index, shift, cu_seqlens)
    dtype = _gemm_dtype(hidden, weight)
    call = Call(
        dtype, ignore_index, head.num_labelled, head.memory_budget, float(head.softcap or 0), float(head.logit_scale),
        torch.is_grad_enabled(), head.shard,
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        tile_backend(backend, hidden.device, dtype)  # raises before anything is computed
    return targets, call


def _token_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    call: Call,
    backend: str,
) -> torch.Tensor:
    """Checked arguments → (rows,) log-probability of each row's target."""
    return autograd.linear_token_logps(hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets, call, backend)


def _gemm_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype that holds both; under autocast its own, which it applies to everything below float64."""
    device, dtype = hidden.device.type, torch.promote_types(hidden.dtype, weight.dtype)
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def _check_inputs(hidden: Any, weight: Any, labels: Any, cu_seqlens: Any, head: _Head) -> int:
    """Everything about one call but the pairs and the labels' values; returns the number of sequences."""
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        check_floating(name, tensor)
        check_untransformed(name, tensor)
    dims = 3 if cu_seqlens is None else 2
    if hidden.dim() != dims:
        shape = "(2B, T, H), padded" if dims == 3 else "(rows, H), packed, where cu_seqlens is given"
        raise ValueError(f"hidden must have shape {shape}, got {describe(hidden)}")
    width = hidden.shape[-1]
    empty = head.shard is None and not weight.numel()  # of more ranks than words some have none
    if weight.dim() != 2 or weight.shape[1] != width or empty or not width:
        raise ValueError(
            f"weight must have shape (V, {width}) with V >= 1, hidden being {width} >= 1 wide, got {describe(weight)}"
        )
    check_device("weight", weight, hidden.device)
    check_integers("labels", labels, hidden.shape[:-1], hidden.device)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, hidden.shape[0], hidden.device)
    _check_head(head, weight)
    if head.num_labelled is not None and head.num_labelled > labels.numel():
        raise ValueError(f"num_labelled must be at most the {labels.numel()} labels, got {head.num_labelled}")
    return hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _check_head(head: _Head, weight: torch.Tensor) -> None:
    bias, softcap, logit_scale, budget, num_labelled, _ = head
    if bias is not None:
        if not is_dense(bias) or not bias.is_floating_point():
            raise TypeError(f"bias must be a floating tensor or None, got {describe(bias)}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({weight.shape[0]},), as weight has words, got {describe(bias)}")
        check_device("bias", bias, weight.device)
    if softcap is not None and not _LEAST_SCALE <= check_number("softcap", softcap) <= _MOST_SCALE:
        raise ValueError(
            f"softcap must be positive, in [{_LEAST_SCALE:g}, {_MOST_SCALE:g}], or None for no cap, got {softcap!r}"
        )
    if not _LEAST_SCALE <= abs(check_number("logit_scale", logit_scale)) <= _MOST_SCALE:
        raise ValueError(
            f"logit_scale must be finite and not 0, of a size in [{_LEAST_SCALE:g}, {_MOST_SCALE:g}], "
            f"got {logit_scale!r}"
        )
    if isinstance(budget, str):
        if budget != "auto":
            raise ValueError(f"memory_budget must be 'auto', bytes or a share of memory, got {budget!r}")
    elif not check_number("memory_budget", budget) >= 0:
        raise ValueError(f"memory_budget must not be negative, got {budget!r}")
    elif isinstance(budget, float) and budget > 1:
        raise ValueError(
            f"memory_budget as a float is a share of the device's memory, at most 1, got {budget!r}; bytes are an int"
        )
    if num_labelled is not None:
        if isinstance(num_labelled, bool) or not isinstance(num_labelled, int):
            raise TypeError(f"num_labelled must be an int or None, got {describe(num_labelled)}")
        if not 0 <= num_labelled < 2**63:
            raise ValueError(f"num_labelled must not be negative, and fit into 64 bits, got {describe(num_labelled)}")
