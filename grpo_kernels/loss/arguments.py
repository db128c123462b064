"""The arguments of the public functions, read once: checked, normalised, and immutable from here on.

    logits, labels, ...   LossArguments.from_logits     rows: what each row of logits has to predict
    policy_logps, ...     LossArguments.from_logps      pairs: what makes a loss of the sequences' log-probabilities

``head.HeadArguments`` holds a LossArguments too.  Everything below a public function takes the object and checks
nothing again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..arguments import (
    check_even_sequences,
    check_flag,
    check_ignore_index,
    check_integers,
    check_logits,
    check_overwrite,
    check_untransformed,
    contiguous,
    describe,
    is_dense,
    read_lengths,
    read_loss_settings,
    read_sums,
    values_are_readable,
)
from ..backends import Backend
from ..groups.weights import GroupWeights
from ..types import IGNORE_INDEX
from ..vocab.labels import check_labels_in_range, integer_range, targets_of
from ..vocab.parallel import sharded
from ..vocab.shards import REFUSALS, refuse_together, shard_of_logits
from .ops import pick


class Rows(NamedTuple):
    """The rows of logits or hidden states: what each has to predict, and which of them are one sequence."""

    num_rows: int
    num_sequences: int
    targets: torch.Tensor | None
    """(rows,) int64, the token that each row has to predict; None where log-probabilities are given."""
    cu_seqlens: torch.Tensor | None
    """(sequences + 1,) int32, sequence i is rows [cu[i], cu[i+1]); None where all are of one length."""
    labels_shape: torch.Size
    ignore_index: int
    shift: bool

    @classmethod
    def read(cls, labels: torch.Tensor, vocabulary: int | None, ignore_index: Any, shift: Any, cu_seqlens: Any) -> Rows:
        """From labels whose shape and dtype are checked, and ``cu_seqlens``.

        ``vocabulary`` is None where other ranks hold a part of it: how many tokens there are is not known here.
        """
        check_ignore_index(ignore_index)
        check_flag("shift", shift)
        if vocabulary is not None:
            check_labels_in_range(labels, vocabulary, ignore_index)
        targets = targets_of(labels, ignore_index, shift, cu_seqlens)
        if cu_seqlens is None:
            num_sequences = labels.shape[0]
        else:
            num_sequences, cu_seqlens = cu_seqlens.shape[0] - 1, contiguous(cu_seqlens, torch.int32)
        return cls(targets.shape[0], num_sequences, targets, cu_seqlens, labels.shape, ignore_index, shift)

    def per_label(self, values: torch.Tensor) -> torch.Tensor:
        """(rows,) numbers of what each row predicts, in the shape of labels: entry t is that of ``labels[t]``."""
        # Row t-1 predicts label t.  The last row of a sequence predicts nothing and holds 0, so rolling is enough.
        return (values.roll(1) if self.shift else values).view(self.labels_shape)


class GivenPairs(NamedTuple):
    """The arguments about pairs as a public function was given them, unchecked."""

    ref_logps: Any
    group_ids: Any
    group_weights: Any
    beta: Any
    loss_type: Any
    label_smoothing: Any
    pair_weights: Any
    length_normalize: Any = False
    lengths: Any = None


class Pairs(NamedTuple):
    """B pairs in G groups: what makes a loss of the policy's log-probabilities."""

    num_pairs: int
    num_groups: int
    ref_logps: torch.Tensor | None
    """(2B,) float64, None for zeros."""
    group_ids: torch.Tensor
    """(B,) int64."""
    group_weights: GroupWeights | torch.Tensor
    """α as state, or the (G,) weights to use."""
    pair_weights: torch.Tensor | None
    """(B,) float64, None for ones."""
    loss_type: int
    """Index into ``LOSS_TYPES``."""
    beta: float
    label_smoothing: float
    length_normalize: bool
    lengths: torch.Tensor | None
    """(2B,) float64 to divide by, where they were given; None where labelled tokens are counted, or nothing divided."""

    @classmethod
    def read(cls, given: GivenPairs, name: str, policy: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> Pairs:
        """``policy`` is the checked input called ``name``; it or ``cu_seqlens`` says how many sequences there are."""
        if cu_seqlens is None:
            num_sequences = policy.shape[0]
        else:
            name, num_sequences = "cu_seqlens", cu_seqlens.shape[0] - 1
        check_even_sequences(name, num_sequences)
        device, num_pairs, normalize = policy.device, num_sequences // 2, given.length_normalize
        ref_logps = read_sums("ref_logps", given.ref_logps, num_sequences, device)
        num_groups = _read_num_groups(given.group_weights, device)
        group_ids = _read_group_ids(given.group_ids, num_pairs, num_groups, device)
        beta, loss_type, label_smoothing = read_loss_settings(given.beta, given.loss_type, given.label_smoothing)
        check_flag("length_normalize", normalize)
        lengths = read_lengths(given.lengths, num_sequences, device)
        pair_weights = read_sums("pair_weights", given.pair_weights, num_pairs, device)
        return cls(
            num_pairs, num_groups, ref_logps, group_ids, given.group_weights, pair_weights,
            loss_type, beta, label_smoothing, normalize or lengths is not None, lengths,
        )  # fmt: skip


class LossArguments(NamedTuple):
    """One call of a function from logits or log-probabilities, but for these themselves, which go through autograd."""

    rows: Rows
    pairs: Pairs | None
    """None where log-probabilities are all that is asked for."""
    differentiable: bool
    """Whether the result carries a gradient: they are on, and an input requires one."""
    overwrite_logits: bool
    backend: Backend

    @classmethod
    def from_logits(
        cls,
        logits: Any,
        labels: Any,
        pairs: GivenPairs | None,
        *,
        ignore_index: Any,
        shift: Any,
        cu_seqlens: Any,
        overwrite_logits: Any,
        tp_group: Any,
        vocab_start: Any,
        backend: Any,
    ) -> tuple[torch.Tensor, LossArguments]:
        """Reads the arguments of :func:`fused_grpo_loss`, or without pairs of the functions for log-probabilities.

        Returns the logits too: this rank's part of them, last stride 1.
        """
        given = logits
        logits, shard = shard_of_logits(logits, tp_group, vocab_start)
        try:
            check_logits(logits, labels, cu_seqlens, sharded=shard is not None)
            read_pairs = None if pairs is None else Pairs.read(pairs, "logits", logits, cu_seqlens)
            vocabulary = logits.shape[-1] if shard is None else None
            rows = Rows.read(labels, vocabulary, ignore_index, shift, cu_seqlens)
            check_overwrite(overwrite_logits, given, logits)
            chosen = pick(backend, logits.device, logits.dtype)
            if shard is not None:
                chosen = sharded(chosen, shard)
        except REFUSALS:
            refuse_together(shard)
            raise
        if logits.stride(-1) != 1 and logits.shape[-1] != 1:
            logits = logits.contiguous()
        differentiable = torch.is_grad_enabled() and logits.requires_grad
        return logits, cls(rows, read_pairs, differentiable, overwrite_logits, chosen)

    @classmethod
    def from_logps(cls, policy_logps: Any, pairs: GivenPairs, *, backend: Any) -> tuple[torch.Tensor, LossArguments]:
        """Reads the arguments of :func:`preference_loss`: the log-probability of each sequence is given.

        Returns the log-probabilities too, contiguous.
        """
        if not is_dense(policy_logps) or policy_logps.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"policy_logps must be a float32 or float64 tensor, got {describe(policy_logps)}")
        check_untransformed("policy_logps", policy_logps)
        if policy_logps.dim() != 1:
            raise ValueError(f"policy_logps must have shape (2B,), got {describe(policy_logps)}")
        read_pairs = Pairs.read(pairs, "policy_logps", policy_logps)
        differentiable = torch.is_grad_enabled() and policy_logps.requires_grad
        chosen = pick(backend, policy_logps.device, policy_logps.dtype)
        return policy_logps.contiguous(), cls(_SUMS, read_pairs, differentiable, False, chosen)


_SUMS = Rows(0, 0, None, None, torch.Size(), IGNORE_INDEX, False)
"""Where log-probabilities of sequences are given: there are no rows that predict anything."""


def _read_num_groups(group_weights: Any, device: torch.device) -> int:
    """G, of a GroupWeights or a (G,) tensor on this device."""
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
    return num_groups


def _read_group_ids(group_ids: Any, num_pairs: int, num_groups: int, device: torch.device) -> torch.Tensor:
    """(B,) int64 in [0, G); the range is checked on CPU."""
    check_integers("group_ids", group_ids, (num_pairs,), device)
    if values_are_readable(group_ids):
        low, high = integer_range(group_ids)
        if low < 0 or high >= num_groups:
            low, high = (int(x) for x in torch.aminmax(group_ids))
            raise ValueError(f"group_ids must be in [0, {num_groups}), got values from {low} to {high}")
    return contiguous(group_ids, torch.int64)
