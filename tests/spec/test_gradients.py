"""The closed-form backward is the derivative: of the fused loss, of whatever is added to it, and of the oracle."""

from __future__ import annotations

import pytest
import torch
from helpers import IGNORE, LOSSES, assert_close, make_batch

from grpo_kernels import GroupWeights, fused_grpo_loss, preference_loss, reference, sequence_logps, token_logps


@pytest.mark.parametrize("shift", [True, False], ids=["shift", "aligned"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("normalize", [False, True], ids=["sums", "means"])
@pytest.mark.parametrize(("loss_type", "smoothing"), LOSSES)
def test_gradcheck_with_a_likelihood_term_in_the_same_backward(loss_type, smoothing, normalize, packed, shift):
    batch = make_batch(pairs=2, length=3, vocabulary=4, groups=2, packed=packed)

    def total(logits):
        out = fused_grpo_loss(
            logits,
            batch.labels,
            *batch.tail(),
            beta=0.4,
            loss_type=loss_type,
            label_smoothing=smoothing,
            length_normalize=normalize,
            pair_weights=batch.pair_weights,
            shift=shift,
            cu_seqlens=batch.cu_seqlens,
        )
        return out.loss - 0.3 * out.policy_logps[:2].sum()

    assert torch.autograd.gradcheck(total, batch.leaf())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_gradcheck_of_the_log_probabilities(packed):
    batch = make_batch(pairs=2, length=3, vocabulary=4, packed=packed)
    for function in (token_logps, sequence_logps):
        assert torch.autograd.gradcheck(
            lambda z, f=function: f(z, batch.labels, cu_seqlens=batch.cu_seqlens), batch.leaf()
        )


@pytest.mark.parametrize(("loss_type", "smoothing"), LOSSES)
@pytest.mark.parametrize("lengths", [None, torch.tensor([1, 3, 0, 2])])
def test_gradcheck_of_the_loss_of_sums(loss_type, smoothing, lengths):
    batch = make_batch(pairs=2)

    def total(logps):
        out = preference_loss(
            logps, *batch.tail(), beta=0.4, loss_type=loss_type, label_smoothing=smoothing, lengths=lengths
        )
        return out.loss + out.policy_logps.square().sum()

    assert torch.autograd.gradcheck(total, (-3 * torch.rand(4, dtype=torch.float64)).requires_grad_())


def test_alpha_is_held_in_the_derivative():
    """With a moving alpha, the gradient is that of the same loss under the new weights, taken as numbers."""
    batch = make_batch()
    moving = GroupWeights.robust([5, 3, 2], 0.3)
    leaf, twin = batch.leaf(), batch.leaf()
    out = fused_grpo_loss(leaf, batch.labels, batch.ref_logps, batch.group_ids, moving)
    out.loss.backward()
    w = out.group_weights / torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference.group_robust_loss(twin, batch.labels, batch.ref_logps, batch.group_ids, w).loss.backward()
    assert_close(leaf.grad, twin.grad)


@pytest.mark.parametrize(("loss_type", "smoothing"), LOSSES)
def test_slopes_of_the_oracle_are_the_derivatives_of_its_losses(loss_type, smoothing):
    margins = torch.linspace(-60, 60, 241, dtype=torch.float64).requires_grad_()
    settings = {"beta": 0.7, "loss_type": loss_type, "label_smoothing": smoothing}
    reference.pair_losses(margins, **settings).sum().backward()
    assert_close(reference.pair_slopes(margins.detach(), **settings), margins.grad)


def test_logit_gradient_of_the_oracle_is_the_derivative_of_the_log_probability():
    logits = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    targets, scale = torch.randint(0, 9, (6,)), torch.randn(6, dtype=torch.float64)
    (scale * logits.log_softmax(-1)[torch.arange(6), targets]).sum().backward()
    assert_close(reference.logit_gradient(logits.detach(), targets, scale), logits.grad)


def test_gradient_is_c_times_onehot_minus_softmax():
    """``c_i = ± (1/B) w_g s_i``: + on rows of chosen replies, - on rejected ones, 0 where the label is ignored."""
    batch = make_batch()
    leaf = batch.leaf()
    out = fused_grpo_loss(leaf, batch.labels, *batch.tail(), beta=0.2, shift=False)
    out.loss.backward()
    slopes = reference.pair_slopes(out.margins, beta=0.2)
    c = batch.weights[batch.group_ids] * slopes / 4
    rows = torch.cat([c, -c]).unsqueeze(1).expand(8, 7).masked_fill(batch.labels == IGNORE, 0)
    targets = batch.labels.clamp(min=0)
    expected = reference.logit_gradient(batch.logits.flatten(0, 1), targets.flatten(), rows.flatten())
    assert_close(leaf.grad.flatten(0, 1), expected)


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust"])
@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_extreme_margins_have_finite_losses_and_slopes(loss_type, margin):
    logps = torch.tensor([margin, 0.0], requires_grad=True)
    out = preference_loss(logps, None, torch.zeros(1, dtype=torch.long), torch.ones(1), beta=1.0, loss_type=loss_type)
    out.loss.backward()
    assert out.loss.item() == max(-margin, 0)
    assert logps.grad.tolist() == ([-1.0, 1.0] if margin < 0 else [0.0, 0.0])


def test_an_impossible_rejected_reply_is_a_won_pair():
    """A rejected word with logit -inf: the margin is +inf, the loss 0, and 0 * inf has no say in it."""
    batch = make_batch(pairs=1, length=3, groups=1)
    logits, labels = batch.logits.clone(), torch.ones(2, 3, dtype=torch.long)
    logits[1, 0, 1] = -torch.inf
    leaf = logits.requires_grad_()
    out = fused_grpo_loss(leaf, labels, None, batch.group_ids, batch.weights)
    out.loss.backward()
    assert out.margins.item() == torch.inf
    assert out.loss.item() == 0
    assert (leaf.grad == 0).all()
    assert reference.pair_losses(out.margins, beta=0.1).item() == 0


def test_a_likelihood_term_alone_may_be_differentiated():
    batch = make_batch()
    leaf, twin = batch.leaf(), batch.leaf()
    fused_grpo_loss(leaf, batch.labels, *batch.tail()).policy_logps[:4].sum().backward()
    reference.group_robust_loss(twin, batch.labels, *batch.tail()).policy_logps[:4].sum().backward()
    assert_close(leaf.grad, twin.grad)


def test_a_gradient_penalty_is_refused_and_not_taken_for_a_constant():
    batch = make_batch()
    leaf = batch.leaf()
    loss = fused_grpo_loss(leaf, batch.labels, *batch.tail()).loss
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (loss + grad.square().sum()).backward()
    sums = sequence_logps(batch.logits, batch.labels).requires_grad_()
    (grad,) = torch.autograd.grad(preference_loss(sums, *batch.tail()).loss, sums, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_a_graph_that_is_retained_gives_the_same_gradient_twice():
    batch = make_batch()
    leaf = batch.leaf()
    loss = fused_grpo_loss(leaf, batch.labels, *batch.tail()).loss
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_logits_changed_before_backward_are_noticed():
    batch = make_batch()
    logits = batch.leaf() * 1
    loss = fused_grpo_loss(logits, batch.labels, *batch.tail()).loss
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_no_graph_is_kept_where_gradients_are_off(off):
    batch = make_batch()
    leaf = batch.leaf()
    with off():
        out = fused_grpo_loss(leaf, batch.labels, *batch.tail())
    assert out.loss.grad_fn is None
    assert out.policy_logps.grad_fn is None
    assert not out.loss.requires_grad


def test_the_graph_keeps_the_logits_the_targets_and_one_number_a_row():
    """What waits for backward: nothing of the size of the logits besides the logits themselves."""
    batch = make_batch(dtype=torch.bfloat16, vocabulary=101)
    leaf, kept = batch.leaf(), []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        fused_grpo_loss(leaf, batch.labels, *batch.tail(), length_normalize=True)
    large = [t for t in kept if t.numel() >= leaf.numel()]
    assert [t.data_ptr() for t in large] == [leaf.data_ptr()]
    rest = sum(t.numel() * t.element_size() for t in kept) - leaf.numel() * leaf.element_size()
    assert rest <= batch.labels.numel() * (8 + 4) + 8 * 8 + 4 * (8 + 3 * 8)  # targets, lse; lengths; pairs
