"""Nothing to learn: finite losses, and gradients that are zero.  Too little to step on: alpha as it was."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import IGNORE, make_batch

from grpo_kernels import (
    GroupWeights,
    fused_grpo_loss,
    fused_linear_grpo_loss,
    preference_loss,
    sequence_logps,
    token_logps,
)

WEIGHTS = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    "shape", [(0, 5, 7), (0, 0, 7), (4, 0, 7)], ids=["no sequences", "no sequences, no tokens", "no tokens"]
)
def test_an_empty_batch_has_a_finite_loss_and_an_empty_gradient(shape):
    leaf = torch.randn(shape, requires_grad=True)
    pairs = shape[0] // 2
    labels = torch.zeros(shape[:2], dtype=torch.long)
    out = fused_grpo_loss(leaf, labels, None, torch.zeros(pairs, dtype=torch.long), WEIGHTS)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(math.log(2) if pairs else 0.0)
    assert out.policy_logps.tolist() == [0.0] * (2 * pairs)
    assert leaf.grad.shape == shape
    assert out.group_losses.isfinite().all()
    assert token_logps(leaf, labels).shape == labels.shape
    assert sequence_logps(leaf, labels).tolist() == [0.0] * (2 * pairs)


@pytest.mark.parametrize("edges", [[0], [0, 0, 0], [0, 0, 0, 0, 0]], ids=["none", "one pair", "two pairs"])
def test_an_empty_packed_batch(edges):
    leaf = torch.randn(0, 7, requires_grad=True)
    cu_seqlens, ids = torch.tensor(edges, dtype=torch.int32), torch.zeros((len(edges) - 1) // 2, dtype=torch.long)
    labels = torch.zeros(0, dtype=torch.long)
    out = fused_grpo_loss(leaf, labels, None, ids, WEIGHTS, cu_seqlens=cu_seqlens)
    out.loss.backward()
    assert out.loss.isfinite()
    assert leaf.grad.shape == (0, 7)
    assert sequence_logps(leaf, labels, cu_seqlens=cu_seqlens).tolist() == [0.0] * (len(edges) - 1)


def test_an_empty_list_of_sums():
    empty = torch.zeros(0, requires_grad=True)
    out = preference_loss(empty, None, torch.zeros(0, dtype=torch.long), WEIGHTS)
    out.loss.backward()
    assert out.loss.item() == 0
    assert empty.grad.shape == (0,)


@pytest.mark.parametrize("options", [{}, {"size_adjustment": 3.0}, {"estimator": "group_mean", "size_adjustment": 3.0}])
def test_an_empty_batch_leaves_alpha_alone(options):
    gw = GroupWeights.robust([3, 1], 0.5, **options)
    empty = torch.zeros(0, requires_grad=True)
    preference_loss(empty, None, torch.zeros(0, dtype=torch.long), gw)
    assert gw.weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("normalize", [False, True])
def test_a_fully_ignored_sequence_has_log_probability_zero_and_no_gradient(normalize):
    batch = make_batch()  # sequence 3, the last chosen one, has no labels
    leaf = batch.leaf()
    out = fused_grpo_loss(leaf, batch.labels, *batch.tail(), length_normalize=normalize)
    out.loss.backward()
    assert out.policy_logps[3] == 0
    assert (leaf.grad[3] == 0).all()
    assert (leaf.grad[7] != 0).any()
    assert leaf.grad.isfinite().all()


def test_a_batch_without_a_label_gives_zeros():
    leaf = torch.randn(4, 5, 7, requires_grad=True)
    out = fused_grpo_loss(leaf, torch.full((4, 5), IGNORE), None, torch.tensor([0, 1]), WEIGHTS, length_normalize=True)
    out.loss.backward()
    assert (out.margins == 0).all()
    assert (leaf.grad == 0).all()


def test_one_token_under_shift_has_nothing_to_predict_it():
    leaf = torch.randn(4, 1, 7, requires_grad=True)
    labels = torch.zeros(4, 1, dtype=torch.long)
    out = fused_grpo_loss(leaf, labels, None, torch.tensor([0, 1]), WEIGHTS)
    out.loss.backward()
    assert (out.policy_logps == 0).all()
    assert (leaf.grad == 0).all()
    assert (fused_grpo_loss(leaf, labels, None, torch.tensor([0, 1]), WEIGHTS, shift=False).policy_logps != 0).all()


def test_one_word_is_certain():
    leaf = torch.randn(4, 5, 1, requires_grad=True)
    out = fused_grpo_loss(leaf, torch.zeros(4, 5, dtype=torch.long), None, torch.tensor([0, 1]), WEIGHTS)
    out.loss.backward()
    assert (out.policy_logps == 0).all()
    assert (leaf.grad == 0).all()


def test_one_pair():
    batch = make_batch(pairs=1, groups=1)
    leaf = batch.leaf()
    out = fused_grpo_loss(leaf, batch.labels, *batch.tail())
    out.loss.backward()
    assert out.losses.shape == (1,)
    assert leaf.grad.isfinite().all()


def test_an_absent_group_counts_nothing_and_gets_nothing():
    batch = make_batch()
    out = fused_grpo_loss(batch.logits, batch.labels, *batch.tail())
    assert out.group_counts[2] == 0
    assert out.group_losses[2] == 0


@pytest.mark.parametrize("edges", [[0, 0, 4, 4, 9], [0, 3, 3, 9, 9], [0, 0, 0, 9, 9], [0, 9, 9, 9, 9]])
@pytest.mark.parametrize("shift", [True, False])
def test_empty_packed_sequences_are_sequences_without_labels(edges, shift):
    leaf = torch.randn(9, 7, requires_grad=True)
    cu_seqlens, labels = torch.tensor(edges, dtype=torch.int32), torch.randint(0, 7, (9,))
    out = fused_grpo_loss(
        leaf, labels, None, torch.tensor([0, 1]), WEIGHTS, cu_seqlens=cu_seqlens, shift=shift, length_normalize=True
    )
    out.loss.backward()
    empty = cu_seqlens.diff() == 0
    assert (out.policy_logps[empty] == 0).all()
    assert (out.policy_logps[cu_seqlens.diff() > 1] != 0).all()
    assert leaf.grad.isfinite().all()


def test_a_pair_that_is_not_finite_leaves_alpha_and_says_so():
    batch = make_batch()
    gw = GroupWeights.robust([5, 3, 2], 0.5)
    leaf = batch.leaf()
    with torch.no_grad():
        leaf[5, 1] = torch.nan
        batch.labels[5, 2] = 0
    out = fused_grpo_loss(leaf, batch.labels, batch.ref_logps, batch.group_ids, gw)
    assert out.losses.isnan().tolist() == [False, True, False, False]
    assert gw.weights.tolist() == [1 / 3] * 3
    assert (int(gw.num_skipped), int(gw.num_updates)) == (1, 0)


def strided(tensor):
    """The same numbers, each second place in memory."""
    return torch.stack([tensor, torch.full_like(tensor, 77)], dim=-1)[..., 0]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # kernels, and plain PyTorch
def test_inputs_may_lie_apart_in_memory(packed, shift, dtype):
    batch = make_batch(packed=packed, dtype=dtype)
    hidden = torch.randn(*batch.labels.shape, 5, dtype=dtype)
    weight, lengths = torch.randn(13, 5, dtype=dtype), torch.full((8,), 2.0, dtype=torch.float64)

    def results(change):
        labels, ref_logps, group_ids, weights, pair_weights = map(
            change, (batch.labels, batch.ref_logps, batch.group_ids, batch.weights, batch.pair_weights)
        )
        options = {"cu_seqlens": change(batch.cu_seqlens) if packed else None, "shift": shift}
        pairs = (ref_logps, group_ids, weights)
        logits = change(batch.leaf())
        out = fused_grpo_loss(logits, labels, *pairs, pair_weights=pair_weights, length_normalize=True, **options)
        (gradient,) = torch.autograd.grad(out.loss, logits)
        sums = change(sequence_logps(batch.logits, labels, **options))
        return [
            *out,
            gradient,
            token_logps(change(batch.logits), labels, **options),
            *fused_linear_grpo_loss(change(hidden), change(weight), labels, *pairs, **options),
            *preference_loss(sums, *pairs, lengths=change(lengths)),
        ]

    step = 8 * torch.finfo(dtype).eps  # a GEMM may add up in another order
    for apart, together in zip(results(strided), results(lambda tensor: tensor), strict=True):
        torch.testing.assert_close(apart, together, rtol=step, atol=step)
