"""``overwrite_logits=True``: the gradient takes the place of the logits, bit for bit, and nobody can miss it."""

from __future__ import annotations

import pytest
import torch
from helpers import make_batch, same_bits

from grpo_kernels import fused_grpo_loss, sequence_logps, token_logps


def gradient(leaf, make_logits, batch, overwrite, **options):
    out = fused_grpo_loss(
        make_logits(leaf),
        batch.labels,
        *batch.tail(),
        overwrite_logits=overwrite,
        cu_seqlens=batch.cu_seqlens,
        **options,
    )
    (out.loss - out.policy_logps.sum()).backward()
    return leaf.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_gradient_is_the_same_bit_for_bit(dtype, packed, normalize):
    batch = make_batch(packed=packed, dtype=dtype)
    plain = gradient(batch.leaf(), lambda z: z * 1, batch, False, length_normalize=normalize)
    over = gradient(batch.leaf(), lambda z: z * 1, batch, True, length_normalize=normalize)
    assert same_bits(plain, over)


def test_no_second_tensor_of_the_size_of_the_logits_is_made():
    batch = make_batch()
    logits = batch.leaf() * 1
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    fused_grpo_loss(logits, batch.labels, *batch.tail(), overwrite_logits=True).loss.backward()
    assert seen == [logits.data_ptr()]


@pytest.mark.parametrize("view", [lambda z: z.view(8, 7, 13), lambda z: z[:, :], lambda z: z.unflatten(0, (8, 7))])
def test_views_of_a_leaf_may_be_overwritten(view):
    batch = make_batch()
    shape = (8 * 7, 13) if view(torch.zeros(56, 13)).dim() == 3 else (8, 7, 13)
    leaves = [batch.logits.detach().clone().reshape(shape).requires_grad_() for _ in range(2)]
    plain, over = (gradient(leaf, view, batch, flag) for leaf, flag in zip(leaves, (False, True), strict=True))
    assert same_bits(plain, over)


def test_only_the_slice_that_was_handed_over_is_written():
    batch = make_batch()
    whole = torch.cat([batch.logits, batch.logits[:, :1]], dim=1).requires_grad_() * 1
    last = whole[:, -1].detach().clone()
    logits = whole[:, :-1]
    fused_grpo_loss(logits, batch.labels, *batch.tail(), overwrite_logits=True).loss.backward()
    assert torch.equal(whole[:, -1], last)
    assert not torch.equal(logits, batch.logits)


def test_a_second_backward_raises():
    batch = make_batch()
    loss = fused_grpo_loss(batch.leaf() * 1, batch.labels, *batch.tail(), overwrite_logits=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_another_use_of_the_logits_raises():
    batch = make_batch()
    logits = batch.leaf() * 1
    loss = fused_grpo_loss(logits, batch.labels, *batch.tail(), overwrite_logits=True).loss
    other = logits.square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("function", [token_logps, sequence_logps])
def test_the_log_probabilities_overwrite_too(function):
    batch = make_batch()
    plain, over = batch.leaf(), batch.leaf()
    function(plain * 1, batch.labels).sum().backward()
    function(over * 1, batch.labels, overwrite_logits=True).sum().backward()
    assert same_bits(plain.grad, over.grad)


def test_logits_are_left_alone_until_backward_and_without_gradients():
    batch = make_batch()
    logits = batch.logits.clone()
    fused_grpo_loss(logits, batch.labels, *batch.tail(), overwrite_logits=True)
    assert torch.equal(logits, batch.logits)
    logits = batch.leaf() * 1
    fused_grpo_loss(logits, batch.labels, *batch.tail(), overwrite_logits=True)
    assert torch.equal(logits, batch.logits)
