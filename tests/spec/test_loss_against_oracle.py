"""The fused loss is the oracle's, value by value and gradient by gradient, for every setting."""

from __future__ import annotations

import pytest
import torch
from helpers import LOSSES, assert_close, make_batch, same_bits

from grpo_kernels import arguments, available_backends, fused_grpo_loss, preference_loss, reference, sequence_logps
from grpo_kernels.backends import torch_ops
from grpo_kernels.types import LOSS_TYPES


@pytest.mark.parametrize("weighted", [False, True], ids=["", "pair_weights"])
@pytest.mark.parametrize("shift", [True, False], ids=["shift", "aligned"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("normalize", [False, True], ids=["sums", "means"])
@pytest.mark.parametrize(("loss_type", "smoothing"), LOSSES)
def test_fused_loss_is_the_oracle(loss_type, smoothing, normalize, packed, shift, weighted):
    batch = make_batch(packed=packed)
    settings = {
        "beta": 0.3,
        "loss_type": loss_type,
        "label_smoothing": smoothing,
        "length_normalize": normalize,
        "pair_weights": batch.pair_weights if weighted else None,
        "shift": shift,
        "cu_seqlens": batch.cu_seqlens,
    }
    fused, plain = batch.leaf(), batch.leaf()
    ours = fused_grpo_loss(fused, batch.labels, *batch.tail(), **settings)
    oracle = reference.group_robust_loss(plain, batch.labels, *batch.tail(), **settings)
    for name in ("loss", "losses", "margins", "policy_logps", "group_losses"):
        assert_close(getattr(ours, name), getattr(oracle, name))
    ours.loss.backward()
    oracle.loss.backward()
    assert_close(fused.grad, plain.grad)


@pytest.mark.parametrize("normalize", [False, True])
def test_every_field_of_the_output_is_what_it_says(normalize):
    batch = make_batch()
    leaf = batch.leaf()
    out = fused_grpo_loss(
        leaf, batch.labels, *batch.tail(), beta=0.25, length_normalize=normalize, pair_weights=batch.pair_weights
    )
    divisor = reference.labelled_tokens(batch.labels).clamp(min=1) if normalize else 1
    rewards = 0.25 * (sequence_logps(batch.logits, batch.labels) - batch.ref_logps) / divisor
    assert_close(out.rewards_chosen, rewards[:4])
    assert_close(out.rewards_rejected, rewards[4:])
    assert_close(0.25 * out.margins, out.rewards_chosen - out.rewards_rejected)
    assert_close(out.group_weights, batch.weights)
    assert torch.equal(out.group_counts, torch.bincount(batch.group_ids, minlength=3))
    assert out.group_losses[2] == 0  # absent
    assert out.loss.requires_grad
    assert out.policy_logps.requires_grad
    for name in ("losses", "margins", "rewards_chosen", "rewards_rejected", "group_losses", "group_weights"):
        assert not getattr(out, name).requires_grad, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_outputs_are_float32_or_float64_for_float64_logits(dtype):
    batch = make_batch(dtype=dtype)
    out = fused_grpo_loss(batch.logits, batch.labels, *batch.tail())
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for name, value in out._asdict().items():
        assert value.dtype == (torch.int64 if name == "group_counts" else expected), name


@pytest.mark.parametrize(("loss_type", "smoothing"), LOSSES)
def test_preference_loss_of_the_sums_is_the_fused_loss_bit_for_bit(loss_type, smoothing):
    batch = make_batch()
    settings = {"loss_type": loss_type, "label_smoothing": smoothing, "pair_weights": batch.pair_weights}
    fused = fused_grpo_loss(batch.logits, batch.labels, *batch.tail(), length_normalize=True, **settings)
    lengths = reference.labelled_tokens(batch.labels)
    sums = sequence_logps(batch.logits, batch.labels)
    split = preference_loss(sums, *batch.tail(), lengths=lengths, **settings)
    for name, value in fused._asdict().items():
        assert same_bits(getattr(split, name), value), name


def test_no_reference_is_a_reference_of_zeros():
    batch = make_batch()
    none = fused_grpo_loss(batch.logits, batch.labels, None, batch.group_ids, batch.weights)
    zeros = fused_grpo_loss(batch.logits, batch.labels, torch.zeros(8), batch.group_ids, batch.weights)
    for name, value in none._asdict().items():
        assert same_bits(getattr(zeros, name), value), name


def test_a_policy_that_is_its_reference_loses_exactly_log_2():
    batch = make_batch(length=400, vocabulary=50)
    reference_logps = sequence_logps(batch.logits, batch.labels)
    out = fused_grpo_loss(batch.logits, batch.labels, reference_logps, batch.group_ids, batch.weights)
    assert (out.margins == 0).all()
    assert (out.losses == torch.tensor(2.0, dtype=torch.float64).log()).all()


def test_in_float32_a_policy_that_is_its_reference_is_off_by_the_rounding_of_the_reference_alone():
    """The margin keeps the digits that a float32 reference has lost: half an ulp of each sum, and nothing more."""
    batch = make_batch(length=400, vocabulary=50, dtype=torch.float32)
    reference_logps = sequence_logps(batch.logits, batch.labels)
    out = fused_grpo_loss(batch.logits, batch.labels, reference_logps, batch.group_ids, batch.weights)
    rounding = torch.finfo(torch.float32).eps / 2 * reference_logps.abs()
    assert (out.margins.abs() <= rounding[:4] + rounding[4:]).all()


def test_small_margins_of_long_replies_are_not_lost():
    """float32 tokens of a long reply, summed: off by one rounding of the sum, not by one a token."""
    logps = -torch.rand(4, 20_000) * 4
    labels = torch.zeros(4, 20_000, dtype=torch.long)
    # Two words: the first has the log-probability we want to the last bit of float32 or nearly so.
    logits = torch.stack([logps, torch.log1p(-logps.double().exp()).float()], dim=-1)
    sums = sequence_logps(logits, labels, shift=False)
    truth = reference.sequence_sums(reference.token_logps(logits.double(), labels, shift=False))
    # A token is off by at most about an ulp of 8; errors of that size add up like a random walk.
    assert (sums - truth).abs().max() < torch.finfo(torch.float32).eps * (truth.abs().max() + 8 * 20_000**0.5)


@pytest.mark.parametrize("backend", [name for name in ("torch", "cpu") if available_backends()[name] is None])
def test_a_loss_that_a_backend_lacks_is_an_error_and_not_another_loss(backend, monkeypatch):
    """As when one is added to the names first."""
    monkeypatch.setitem(arguments._LOSS_INDEX, "newest", len(LOSS_TYPES))
    monkeypatch.setattr(torch_ops, "LOSS_TYPES", (*LOSS_TYPES, "newest"))
    logps, ids = torch.tensor([-1.0, -2.0]), torch.tensor([0])
    with pytest.raises(ValueError, match=r"newest|loss"):
        preference_loss(logps, None, ids, torch.ones(1), loss_type="newest", backend=backend)
