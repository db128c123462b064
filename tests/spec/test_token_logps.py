"""``token_logps`` and ``sequence_logps`` are log-softmax at the label, for every layout and dtype."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import IGNORE, assert_close, make_batch, same_bits

from grpo_kernels import fused_grpo_loss, reference, sequence_logps, token_logps

LAYOUTS = {
    "contiguous": lambda z: z.contiguous(),
    "one position sliced off": lambda z: torch.cat([z, z[:, :1]], dim=1)[:, :-1],
    "first position sliced off": lambda z: torch.cat([z[:, :1], z], dim=1)[:, 1:],
    "time first": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "vocabulary first": lambda z: z.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "vocabulary padded": lambda z: torch.nn.functional.pad(z, (0, 3))[..., :-3],
    "every second sequence": lambda z: z.repeat_interleave(2, dim=0)[::2],
}


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_both_agree_with_the_oracle(packed, shift):
    batch = make_batch(packed=packed)
    layout = {"shift": shift, "cu_seqlens": batch.cu_seqlens}
    logps = token_logps(batch.logits, batch.labels, **layout)
    expected = reference.token_logps(batch.logits, batch.labels, **layout)
    assert logps.shape == batch.labels.shape
    assert_close(logps, expected)
    sums = reference.sequence_sums(expected, batch.cu_seqlens)
    assert_close(sequence_logps(batch.logits, batch.labels, **layout), sums)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_neither_loss_nor_gradient(layout):
    batch = make_batch()
    results = []
    for arrange in (LAYOUTS["contiguous"], LAYOUTS[layout]):
        leaf = batch.leaf()
        out = fused_grpo_loss(arrange(leaf), batch.labels, *batch.tail())
        out.loss.backward()
        results.append((out.losses, leaf.grad))
    assert same_bits(results[0][0], results[1][0])
    assert same_bits(results[0][1], results[1][1])


def test_expanded_logits_get_the_sum_of_the_gradients():
    batch = make_batch()
    row = batch.logits[:1].clone().requires_grad_()
    fused_grpo_loss(row.expand_as(batch.logits), batch.labels, *batch.tail()).loss.backward()
    twin = batch.logits[:1].clone().requires_grad_()
    reference.group_robust_loss(twin.expand_as(batch.logits), batch.labels, *batch.tail()).loss.backward()
    assert_close(row.grad, twin.grad)


@pytest.mark.parametrize("arrange", [lambda y: y.t().contiguous().t(), lambda y: y.int()], ids=["strided", "int32"])
def test_labels_may_be_strided_or_int32(arrange):
    batch = make_batch()
    expected = token_logps(batch.logits, batch.labels)
    assert same_bits(token_logps(batch.logits, arrange(batch.labels)), expected)


def test_group_ids_may_be_int32_and_strided():
    batch = make_batch()
    out = fused_grpo_loss(batch.logits, batch.labels, *batch.tail())
    ids = batch.group_ids.int().repeat_interleave(2)[::2]
    again = fused_grpo_loss(batch.logits, batch.labels, batch.ref_logps, ids, batch.weights)
    assert same_bits(again.loss, out.loss)


def test_another_ignore_index_may_be_a_word_of_the_vocabulary():
    batch = make_batch()
    relabelled = batch.labels.masked_fill(batch.labels == 0, 1)
    by_default = token_logps(batch.logits, relabelled)
    assert same_bits(
        token_logps(batch.logits, relabelled.masked_fill(relabelled == IGNORE, 0), ignore_index=0), by_default
    )


def test_labels_are_not_changed():
    for packed in (False, True):
        batch = make_batch(packed=packed)
        before = batch.labels.clone()
        token_logps(batch.logits, batch.labels, cu_seqlens=batch.cu_seqlens)
        assert torch.equal(batch.labels, before)


def test_shift_does_not_cross_packed_sequences():
    batch = make_batch(packed=True)
    edges = batch.cu_seqlens.tolist()
    together = token_logps(batch.logits, batch.labels, cu_seqlens=batch.cu_seqlens)
    for start, end in itertools.pairwise(edges):
        alone = token_logps(batch.logits[None, start:end], batch.labels[None, start:end])[0]
        assert_close(together[start:end], alone)


def test_ignored_rows_are_not_looked_at():
    batch = make_batch()
    leaf = batch.leaf()
    with torch.no_grad():
        leaf[batch.labels == IGNORE] = torch.nan
    logps = token_logps(leaf, batch.labels, shift=False)
    assert_close(logps, token_logps(batch.logits, batch.labels, shift=False))
    logps.sum().backward()
    assert (leaf.grad[batch.labels == IGNORE] == 0).all()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, "all -inf"])
def test_rows_that_are_not_numbers_give_nan_as_log_softmax_does(poison):
    logits = torch.randn(1, 3, 5)
    if poison == "all -inf":
        logits[0, 1] = -torch.inf
    else:
        logits[0, 1, 2] = poison
    labels = torch.tensor([[1, 1, 1]])
    logps = token_logps(logits, labels, shift=False)
    assert logps[0, 1].isnan()
    assert_close(logps, logits.log_softmax(-1)[..., 1], rtol=1e-6, atol=1e-6)  # float32


def test_a_word_alone_in_its_row_is_certain():
    logits = torch.full((1, 2, 4), -torch.inf)
    logits[..., 2] = 7.0
    leaf = logits.requires_grad_()
    logps = token_logps(leaf, torch.tensor([[2, 2]]), shift=False)
    logps.sum().backward()
    assert (logps == 0).all()
    assert (leaf.grad == 0).all()


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, 1e30])
def test_a_common_offset_of_a_row_costs_no_accuracy(offset):
    """As in PyTorch: the largest logit is taken off before anything is added to it."""
    offset = float(torch.tensor(offset))
    steps = torch.tensor([0.0, 1.0, -1.0, 3.0]) * max(1.0, torch.finfo(torch.float32).eps * abs(offset) * 4)
    logits = (offset + steps).expand(1, 1, 4)
    truth = logits.double().log_softmax(-1)[0, 0, 0]
    ours = token_logps(logits, torch.zeros(1, 1, dtype=torch.long), shift=False)[0, 0]
    theirs = logits.log_softmax(-1)[0, 0, 0]
    budget = (theirs.double() - truth).abs() + torch.finfo(torch.float32).eps * truth.abs()
    assert (ours.double() - truth).abs() <= budget


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [3.0, 8.0], ids=["flat", "peaked"])
def test_half_precision_logits_stay_within_the_error_of_float32(dtype, spread):
    """The logits as they came are the truth; what we add is at most what float32 log_softmax adds, and an ulp."""
    batch = make_batch(pairs=8, length=16, vocabulary=499, spread=spread).to(dtype)
    leaf = batch.leaf()
    logps = token_logps(leaf, batch.labels, shift=False)
    logps.sum().backward()
    exact = batch.logits.double().requires_grad_()
    truth = reference.token_logps(exact, batch.labels, shift=False)
    truth.sum().backward()
    plain = reference.token_logps(batch.logits.float(), batch.labels, shift=False)
    assert logps.dtype == torch.float32
    eps = torch.finfo(torch.float32).eps
    error, allowed = (logps - truth).abs().max(), (plain - truth).abs().max()
    assert error <= allowed + 2 * eps * truth.abs().max()
    assert leaf.grad.dtype == dtype
    # One rounding to the dtype of the gradient, over what float32 does to the softmax (a few ulp of lse).
    limit = torch.finfo(dtype).eps * exact.grad.abs() + 32 * eps * exact.grad.abs() + torch.finfo(dtype).tiny
    assert ((leaf.grad.double() - exact.grad).abs() <= limit).all()


@pytest.mark.parametrize("wide", [torch.float16, torch.float32])
def test_logits_of_ten_thousand_do_not_overflow(wide):
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], dtype=wide, requires_grad=True)
    logps = token_logps(logits, torch.tensor([[1]]), shift=False)
    logps.sum().backward()
    assert logps.item() == -20000
    assert torch.equal(logits.grad.float(), torch.tensor([[[-1.0, 1.0, 0.0]]]))


def test_the_same_bits_on_every_run_and_any_number_of_threads():
    batch = make_batch(pairs=8, length=33, vocabulary=257, dtype=torch.float32)
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            leaf = batch.leaf()
            out = fused_grpo_loss(leaf, batch.labels, *batch.tail())
            out.loss.backward()
            runs.append((out.loss.detach(), leaf.grad))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in runs[1:]:
        assert same_bits(loss, runs[0][0])
        assert same_bits(grad, runs[0][1])


def test_autocast_changes_nothing_but_the_logits_a_model_hands_over():
    batch = make_batch(dtype=torch.bfloat16)
    plain = fused_grpo_loss(batch.logits, batch.labels, *batch.tail())
    leaf = batch.leaf()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused_grpo_loss(leaf, batch.labels, *batch.tail())
        out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert same_bits(out.loss.detach(), plain.loss)
    assert leaf.grad.isfinite().all()
