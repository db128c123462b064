"""The public functions: each checks its arguments, then applies what ``autograd.py`` holds.

Equations, once (docs/math.md derives them); B pairs are 2B sequences, the B chosen first:

    p_t = z[t, y_t] - lse_t,   log pi = sum_t p_t,   m_i = (log pi - log pi_ref)_chosen - (...)_rejected
    l_i = -log sigma(beta m_i),   loss = (1/B) sum_i w[g_i] l_i,   w_g = alpha_g / q_g
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..arguments import (
    check_flag,
    check_group_ids,
    check_ignore_index,
    check_labels_in_range,
    check_lengths,
    check_logits,
    check_loss_settings,
    check_overwrite,
    check_pairs,
    check_sums,
    check_untransformed,
    describe,
    is_dense,
)
from ..backends import Backend
from ..groups.weights import GroupWeights
from ..types import IGNORE_INDEX, LOSS_TYPES, GroupLossOutput, LossType
from ..vocab.parallel import sharded
from ..vocab.shards import refusing_together, shard_of_logits
from .autograd import FusedLoss, PreferenceLoss, SequenceSum, TokenLogps, Weighted, logps_and_lse
from .ops import pick


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
        group_ids: (B,) int64 or int32 in [0, G).
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
        tp_group: process group whose ranks share the vocabulary: the logits are this rank's words of it, everything
            else is the same on every rank, and so is the result.  A shard that is -inf throughout makes its row NaN.
        vocab_start: with ``tp_group``, this rank's first word.  Both are read from logits that are a DTensor sharded
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
    given = logits
    logits, shard = shard_of_logits(logits, tp_group, vocab_start)
    with refusing_together(shard):
        check_logits(logits, labels, cu_seqlens, sharded=shard is not None)
        check_loss_settings(beta, loss_type, label_smoothing)
        check_flag("length_normalize", length_normalize)
        num_sequences = logits.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_pairs("logits" if cu_seqlens is None else "cu_seqlens", num_sequences)
        arguments = _Pairs.check(num_sequences, logits.device, ref_logps, group_ids, group_weights, pair_weights)
        vocabulary = logits.shape[-1] if shard is None else None
        targets = _checked_targets(vocabulary, labels, ignore_index, shift, cu_seqlens)
        check_overwrite(overwrite_logits, given, logits)
        chosen = sharded(pick(backend, logits.device, logits.dtype), shard)
    settings = {
        "loss_type": LOSS_TYPES.index(loss_type),
        "beta": float(beta),
        "label_smoothing": float(label_smoothing),
        "length_normalize": length_normalize,
        "ignore_index": ignore_index,
    }
    logits = _last_stride_1(logits)
    token_rows, lse = logps_and_lse(logits.detach(), targets, ignore_index, chosen)
    moves = torch.is_grad_enabled() and logits.requires_grad
    weighted, output = _weighted(token_rows, targets, cu_seqlens, None, arguments, settings, chosen, moves)
    options = ignore_index, overwrite_logits, chosen
    return output(*FusedLoss.apply(logits, (targets, lse), options, weighted))


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
    """Group-robust preference loss for who has sequence log-probabilities already.

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
    if not is_dense(policy_logps) or policy_logps.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"policy_logps must be a float32 or float64 tensor, got {describe(policy_logps)}")
    check_untransformed("policy_logps", policy_logps)
    if policy_logps.dim() != 1:
        raise ValueError(f"policy_logps must have shape (2B,), got {describe(policy_logps)}")
    check_loss_settings(beta, loss_type, label_smoothing)
    num_sequences, device = policy_logps.shape[0], policy_logps.device
    check_pairs("policy_logps", num_sequences)
    arguments = _Pairs.check(num_sequences, device, ref_logps, group_ids, group_weights, pair_weights)
    if lengths is not None:
        check_lengths(lengths, policy_logps.shape, device)
    settings = {
        "loss_type": LOSS_TYPES.index(loss_type),
        "beta": float(beta),
        "label_smoothing": float(label_smoothing),
        "length_normalize": lengths is not None,
        "ignore_index": IGNORE_INDEX,
    }
    # A copy, since backward looks at it and the caller's own may have changed by then.
    divisors = None if lengths is None else lengths.to(torch.float64, copy=True)
    chosen = pick(backend, device, policy_logps.dtype)
    # A sequence of one token each: the sums below are the log-probabilities themselves.
    return _tail(policy_logps.contiguous(), None, None, divisors, arguments, settings, chosen)


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
    rows, _ = _token_rows(
        logits, labels, ignore_index, shift, cu_seqlens, overwrite_logits, tp_group, vocab_start, backend
    )
    # Row t-1 scored label t.  The last row of a sequence scored nothing and holds 0, so rolling cannot cross one.
    return (rows.roll(1) if shift else rows).view(labels.shape)


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
    rows, num_sequences = _token_rows(
        logits, labels, ignore_index, shift, cu_seqlens, overwrite_logits, tp_group, vocab_start, backend
    )
    return SequenceSum.apply(rows, cu_seqlens, num_sequences)


class _Pairs:
    """The arguments that belong to pairs, checked and in the dtypes that backends take."""

    __slots__ = ("group_ids", "group_weights", "pair_weights", "ref_logps")
    group_ids: torch.Tensor
    group_weights: Any
    pair_weights: torch.Tensor | None
    ref_logps: torch.Tensor | None

    @classmethod
    def check(
        cls,
        num_sequences: int,
        device: torch.device,
        ref_logps: Any,
        group_ids: Any,
        group_weights: Any,
        pair_weights: Any,
    ) -> _Pairs:
        if isinstance(group_weights, GroupWeights):
            num_groups, weights_device = group_weights.num_groups, group_weights.log_alpha.device
        elif is_dense(group_weights) and group_weights.is_floating_point():
            if group_weights.dim() != 1 or not group_weights.numel():
                raise ValueError(f"group_weights must have shape (G,), G >= 1, got {describe(group_weights)}")
            num_groups, weights_device = group_weights.shape[0], group_weights.device
        else:
            raise TypeError(
                f"group_weights must be a GroupWeights or a (G,) floating tensor, got {describe(group_weights)}"
            )
        if weights_device != device:
            raise ValueError(
                f"group_weights must be on {device}, as the policy is, got {weights_device}; "
                "move it with group_weights.to(device)"
            )
        self = cls()
        check_group_ids(group_ids, num_sequences // 2, num_groups, device)
        self.group_ids = _gapless(group_ids, torch.int64)
        self.group_weights = group_weights
        self.ref_logps = self.pair_weights = None
        if ref_logps is not None:
            check_sums("ref_logps", ref_logps, (num_sequences,), device)
            self.ref_logps = _gapless(ref_logps, torch.float64)
        if pair_weights is not None:
            check_sums("pair_weights", pair_weights, (num_sequences // 2,), device)
            self.pair_weights = _gapless(pair_weights, torch.float64)
        return self


def _token_rows(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    shift: bool,
    cu_seqlens: torch.Tensor | None,
    overwrite_logits: bool,
    tp_group: Any,
    vocab_start: int | None,
    backend: str,
) -> tuple[torch.Tensor, int]:
    """Checks; then the log-probability that each row of logits gives its target, and the number of sequences."""
    given = logits
    logits, shard = shard_of_logits(logits, tp_group, vocab_start)
    with refusing_together(shard):
        check_logits(logits, labels, cu_seqlens, sharded=shard is not None)
        vocabulary = logits.shape[-1] if shard is None else None
        targets = _checked_targets(vocabulary, labels, ignore_index, shift, cu_seqlens)
        check_overwrite(overwrite_logits, given, logits)
        chosen = sharded(pick(backend, logits.device, logits.dtype), shard)
    rows = TokenLogps.apply(_last_stride_1(logits), targets, ignore_index, overwrite_logits, chosen)
    return rows, logits.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _checked_targets(
    vocabulary: int | None, labels: torch.Tensor, ignore_index: int, shift: bool, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """(rows,) int64: the word that each row has to predict.  Shifting labels spares copying logits.

    ``vocabulary`` is None where other ranks hold words: how many is known when they have said so.
    """
    check_flag("shift", shift)
    check_ignore_index(ignore_index)
    if vocabulary is not None:
        check_labels_in_range(labels, vocabulary, ignore_index)
    labels = _gapless(labels, torch.int64)
    if not shift or not labels.numel():
        return labels.view(-1)
    if cu_seqlens is None:  # the first column goes, and one that predicts nothing comes behind the last
        return torch.constant_pad_nd(labels, (-1, 1), ignore_index).view(-1)
    targets = labels.roll(-1)
    # An empty sequence at the front makes -1 of this, the last row of all, which predicts nothing either.
    targets[cu_seqlens[1:].long() - 1] = ignore_index
    return targets


def _gapless(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in this dtype and contiguous; itself where it is, which is quicker to see than to ask PyTorch for."""
    return tensor if tensor.dtype is dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()


def _last_stride_1(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _tail(
    token_rows: torch.Tensor,
    targets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    lengths: torch.Tensor | None,
    pairs: _Pairs,
    settings: dict[str, Any],
    backend: Backend,
) -> GroupLossOutput:
    """From the log-probability of each row to the output."""
    moves = torch.is_grad_enabled() and token_rows.requires_grad
    weighted, output = _weighted(token_rows.detach(), targets, cu_seqlens, lengths, pairs, settings, backend, moves)
    return output(*PreferenceLoss.apply(token_rows, weighted))


def _weighted(
    token_rows: torch.Tensor,
    targets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    lengths: torch.Tensor | None,
    pairs: _Pairs,
    settings: dict[str, Any],
    backend: Backend,
    may_move: bool,
) -> tuple[Weighted, Callable[[torch.Tensor, torch.Tensor], GroupLossOutput]]:
    """The tail and the alpha step, outside of autograd; and what makes the output of the two that come from it."""
    group_weights, group_ids = pairs.group_weights, pairs.group_ids
    is_module, num_pairs = isinstance(group_weights, GroupWeights), group_ids.shape[0]
    num_groups = group_weights.num_groups if is_module else group_weights.shape[0]
    policy_logps, rewards = token_rows.new_empty(2 * num_pairs), token_rows.new_empty(2 * num_pairs)
    margins, losses = token_rows.new_empty(num_pairs), token_rows.new_empty(num_pairs)
    slopes = token_rows.new_empty(num_pairs)
    group_sums = token_rows.new_empty(num_groups, dtype=torch.float64)
    group_counts = token_rows.new_empty(num_groups, dtype=torch.int64)
    group_losses = token_rows.new_empty(num_groups)
    if not settings["length_normalize"]:
        targets = lengths = None  # nobody asks how long a sequence is
    elif lengths is None:
        lengths = token_rows.new_empty(2 * num_pairs, dtype=torch.float64)
    if cu_seqlens is not None:
        cu_seqlens = _gapless(cu_seqlens, torch.int32)
    backend.preference_tail(
        token_rows, targets, cu_seqlens, pairs.ref_logps, group_ids, pairs.pair_weights,
        policy_logps, lengths, margins, rewards, losses, slopes, group_sums, group_counts, group_losses, **settings,
    )  # fmt: skip
    dtype = token_rows.dtype
    if is_module:
        if may_move and group_weights.moves and group_weights.training:
            _refuse_recomputation()
            group_weights.observe_and_step(group_sums, group_counts, losses)
        alpha = group_weights.weights
        weights, used = (alpha / group_weights.sampling_probs).to(dtype), alpha.to(dtype)
    else:
        weights = used = _gapless(group_weights.detach(), dtype)
    pair_weights, loss = token_rows.new_empty(num_pairs), token_rows.new_empty(())
    backend.robust_loss(losses, group_ids, weights, pair_weights, loss)

    def output(loss: torch.Tensor, policy_logps: torch.Tensor) -> GroupLossOutput:
        chosen, rejected = rewards.chunk(2)
        return GroupLossOutput(loss, losses, margins, chosen, rejected, policy_logps, group_losses, group_counts, used)

    return Weighted(loss, policy_logps, pair_weights, slopes, lengths, cu_seqlens), output


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
