"""The loss from hidden states: the same numbers as from logits, whatever else the call has to put up with."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from grpo_kernels import (
    GroupWeights,
    UnavailableBackendError,
    fused_grpo_loss,
    fused_linear_grpo_loss,
    linear_sequence_logps,
    linear_token_logps,
    reference,
    sequence_logps,
    token_logps,
)
from grpo_kernels.head import plan as linear_plan
from tests.helpers import IGNORE, LOSSES, assert_close, make_batch

HEADS = [
    {},
    {"logit_scale": 0.25},
    {"softcap": 2.0},
    {"softcap": 3.0, "logit_scale": -0.5, "biased": True},
    {"biased": True},
]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(linear_plan, "_LEAST_WORDS", 5)
    monkeypatch.setattr(linear_plan, "_MOST_WORDS", 5)
    monkeypatch.setattr(linear_plan, "_WORDS_MULTIPLE", 1)


def head_of(batch, width=6, *, biased=False, **options):
    """Hidden states, weight, bias that go with a batch's labels, and the options left over."""
    vocabulary = batch.logits.shape[-1]
    hidden = 2 * torch.randn(*batch.labels.shape, width, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, dtype=torch.float64)
    bias = torch.randn(vocabulary, dtype=torch.float64) if biased else None
    return hidden, weight, bias, options


def logits_of(hidden, weight, bias, softcap=None, logit_scale=1.0):
    z = hidden @ weight.t()
    z = logit_scale * (z if bias is None else z + bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def leaves(*tensors):
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]


def grads_of(scalar, tensors):
    return torch.autograd.grad(scalar, [x for x in tensors if x is not None])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("budget", [0, 700, "auto"])
def test_the_loss_is_the_one_from_logits(head, packed, shift, budget):
    batch = make_batch(packed=packed)
    hidden, weight, bias, options = head_of(batch, **head)
    common = {"shift": shift, "cu_seqlens": batch.cu_seqlens, "pair_weights": batch.pair_weights}
    left, right = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    expected = fused_grpo_loss(logits_of(*left, **options), batch.labels, *batch.tail(), **common)
    actual = fused_linear_grpo_loss(
        right[0], right[1], batch.labels, *batch.tail(), bias=right[2], memory_budget=budget, **options, **common
    )
    for mine, theirs in zip(actual, expected, strict=True):
        assert_close(mine, theirs, rtol=1e-10)
    for mine, theirs in zip(grads_of(actual.loss, right), grads_of(expected.loss, left), strict=True):
        assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("loss_type", "smoothing"), LOSSES)
@pytest.mark.parametrize("normalize", [False, True])
def test_every_loss_against_the_oracle(loss_type, smoothing, normalize):
    batch = make_batch()
    hidden, weight, _, _ = head_of(batch)
    settings = {"loss_type": loss_type, "label_smoothing": smoothing, "length_normalize": normalize, "beta": 0.3}
    expected = reference.group_robust_loss(hidden @ weight.t(), batch.labels, *batch.tail(), **settings)
    actual = fused_linear_grpo_loss(hidden, weight, batch.labels, *batch.tail(), **settings)
    assert_close(actual.loss, expected.loss, rtol=1e-10)
    assert_close(actual.losses, expected.losses, rtol=1e-10)


@pytest.mark.parametrize("shift", [False, True])
def test_token_and_sequence_logps(shift):
    batch = make_batch(pairs=3)
    hidden, weight, _, _ = head_of(batch)
    for ours, theirs in ((linear_token_logps, token_logps), (linear_sequence_logps, sequence_logps)):
        left, right = leaves(hidden, weight), leaves(hidden, weight)
        expected = theirs(left[0] @ left[1].t(), batch.labels, shift=shift)
        actual = ours(*right, batch.labels, shift=shift)
        assert_close(actual, expected)
        late = torch.randn_like(actual)
        for a, b in zip(grads_of((actual * late).sum(), right), grads_of((expected * late).sum(), left), strict=True):
            assert_close(a, b, rtol=1e-10)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("budget", [0, 300, 10**6])
def test_gradcheck(head, budget):
    batch = make_batch(pairs=2, length=4, vocabulary=11)
    hidden, weight, bias, options = head_of(batch, 3, **head)
    inputs = [x for x in leaves(hidden, weight, bias) if x is not None]

    def function(hidden, weight, bias=None):
        return linear_token_logps(hidden, weight, batch.labels, bias=bias, memory_budget=budget, **options)

    assert torch.autograd.gradcheck(function, inputs)


def test_alpha_steps_once_and_the_new_weights_are_used():
    batch = make_batch()
    hidden, weight, _, _ = head_of(batch)
    results = []
    for linear in (True, False):
        group_weights = GroupWeights([3, 4, 5], group_lr=0.5)
        h, w = leaves(hidden, weight)
        tail = (batch.ref_logps, batch.group_ids, group_weights)
        out = fused_linear_grpo_loss(h, w, batch.labels, *tail) if linear else fused_grpo_loss(
            h @ w.t(), batch.labels, *tail
        )  # fmt: skip
        results.append((out.loss, group_weights.log_alpha.clone()))
    assert_close(results[0][0], results[1][0], rtol=1e-10)
    assert_close(results[0][1], results[1][1], rtol=1e-10)
    assert results[0][1].std() > 0


@pytest.mark.parametrize("which", [(True, False), (False, True), (False, False)])
def test_only_what_requires_grad_gets_one(which):
    batch = make_batch()
    hidden, weight, bias, _ = head_of(batch, biased=True)
    hidden.requires_grad_(which[0])
    bias.requires_grad_(which[1])
    out = linear_sequence_logps(hidden, weight, batch.labels, bias=bias)
    assert out.requires_grad == any(which)
    if any(which):
        out.sum().backward()
    assert (hidden.grad is not None, weight.grad is not None, bias.grad is not None) == (which[0], False, which[1])
    if which[1]:
        exact = bias.detach().clone().requires_grad_()
        sequence_logps(hidden.detach() @ weight.t() + exact, batch.labels).sum().backward()
        assert_close(bias.grad, exact.grad, rtol=1e-10)


def test_a_tied_embedding_gets_both_gradients():
    labels = torch.randint(0, 13, (4, 6))
    grads = []
    for linear in (True, False):
        torch.manual_seed(1)
        table = torch.randn(13, 5, dtype=torch.float64, requires_grad=True)
        hidden = torch.tanh(table[labels])
        out = linear_sequence_logps(hidden, table, labels) if linear else sequence_logps(hidden @ table.t(), labels)
        out.sum().backward()
        grads.append(table.grad)
    assert_close(grads[0], grads[1], rtol=1e-10)


def test_twice_in_one_step_with_one_weight():
    """Policy and reference over the same head, one without gradients."""
    batch = make_batch()
    hidden, weight, _, _ = head_of(batch)
    other, (h, w) = torch.randn_like(hidden), leaves(hidden, weight)
    with torch.no_grad():
        ref = linear_sequence_logps(other, w, batch.labels)
    first = fused_linear_grpo_loss(h, w, batch.labels, ref, batch.group_ids, batch.weights).loss
    second = fused_linear_grpo_loss(other, w, batch.labels, ref, batch.group_ids, batch.weights).loss
    x, y = leaves(hidden, weight)
    exact = sum(fused_grpo_loss(z @ y.t(), batch.labels, ref, batch.group_ids, batch.weights).loss for z in (x, other))
    for a, b in zip(grads_of(first + second, (h, w)), grads_of(exact, (x, y)), strict=True):
        assert_close(a, b, rtol=1e-10)


def test_backward_twice_over_a_retained_graph():
    batch = make_batch()
    inputs = leaves(*head_of(batch)[:2])
    loss = fused_linear_grpo_loss(*inputs, batch.labels, *batch.tail()).loss
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, inputs), strict=True))


def test_a_second_derivative_is_refused():
    batch = make_batch()
    inputs = leaves(*head_of(batch)[:2])
    grads = torch.autograd.grad(linear_sequence_logps(*inputs, batch.labels).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[0].sum().backward()


def test_a_weight_changed_in_between_raises():
    batch = make_batch()
    hidden, weight = leaves(*head_of(batch)[:2])
    out = linear_sequence_logps(hidden, weight, batch.labels).sum()
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_within_a_checkpointed_region(reentrant):
    batch = make_batch()
    hidden, weight, _, _ = head_of(batch)
    (a, b), (c, d) = leaves(hidden, weight), leaves(hidden, weight)
    linear_token_logps(a, b, batch.labels).sum().backward()
    checkpoint(linear_token_logps, c, d, batch.labels, use_reentrant=reentrant).sum().backward()
    assert torch.equal(a.grad, c.grad)
    assert torch.equal(b.grad, d.grad)


@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype", "result"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("budget", [0, 10**6])
def test_mixed_dtypes(hidden_dtype, weight_dtype, result, budget):
    batch = make_batch(pairs=2)
    hidden, weight, bias, _ = head_of(batch, biased=True)
    hidden, weight, bias = hidden.to(hidden_dtype), weight.to(weight_dtype), bias.to(weight_dtype)
    wide, inputs = leaves(hidden.double(), weight.double(), bias.double()), leaves(hidden, weight, bias)
    out = linear_token_logps(*inputs[:2], batch.labels, bias=inputs[2], memory_budget=budget)
    expected = token_logps(logits_of(*wide), batch.labels)
    assert out.dtype == result
    coarse = torch.bfloat16 in (hidden_dtype, weight_dtype) or torch.float16 in (hidden_dtype, weight_dtype)
    near = {"rtol": 2e-2, "atol": 5e-2} if coarse else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out.double(), expected, **near)
    for mine, theirs, leaf in zip(grads_of(out.sum(), inputs), grads_of(expected.sum(), wide), inputs, strict=True):
        assert mine.dtype == leaf.dtype
        torch.testing.assert_close(mine.double(), theirs, **near)


def test_autocast_is_honoured():
    batch = make_batch(pairs=2)
    hidden, weight, _, _ = head_of(batch)
    inputs = leaves(hidden.float(), weight.float())
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_token_logps(*inputs, batch.labels)
    same = linear_token_logps(inputs[0].bfloat16(), inputs[1].bfloat16(), batch.labels)
    assert out.dtype == torch.float32
    assert torch.equal(out, same)
    assert all(grad.dtype == torch.float32 for grad in grads_of(out.sum(), inputs))


@pytest.mark.parametrize("told", [False, True])
def test_compiled_without_a_graph_break(told):
    batch = make_batch(dtype=torch.float32)
    hidden, weight, bias, _ = head_of(batch, biased=True)
    count = int((batch.labels[:, 1:] != IGNORE).sum()) if told else None

    def function(hidden, weight, bias):
        tail = (batch.ref_logps, batch.group_ids, batch.weights)
        return fused_linear_grpo_loss(
            hidden, weight, batch.labels, *tail, bias=bias, softcap=4.0, num_labelled=count
        ).loss

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    left, right = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    a, b = function(*left), compiled(*right)
    assert torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip(grads_of(a, left), grads_of(b, right), strict=True))
    frozen = hidden.clone().requires_grad_()
    compiled(frozen, weight, bias).backward()
    assert_close(frozen.grad, grads_of(function(*left), left)[0])


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("budget", [0, 10**6])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_operator_passes_opcheck(told, budget, frozen):
    hidden, weight = leaves(torch.randn(6, 5), torch.randn(11, 5))
    targets = torch.tensor([1, 2, IGNORE, 3, 10, 0])
    call = (torch.float32, IGNORE, 5 if told else None, repr(budget), 0.0, 1.0, True, "", 0, 0, "torch")
    arguments = (hidden, weight.requires_grad_(not frozen), None, targets, [True, not frozen, False], *call)
    torch.library.opcheck(torch.ops.grpo_kernels.linear_token_logps_fwd.default, arguments)


@pytest.mark.parametrize("few", [0, 2])
def test_compiled_with_no_label_at_all(few):
    hidden, weight = leaves(torch.randn(4, 3, 5), torch.randn(11, 5))
    labels = torch.full((4, 3), IGNORE)
    labels[:few, 2] = 4
    torch._dynamo.reset()
    compiled = torch.compile(linear_sequence_logps, fullgraph=True, backend="aot_eager")
    out = compiled(hidden, weight, labels)
    assert torch.equal(out, linear_sequence_logps(hidden, weight, labels))
    out.sum().backward()
    assert hidden.grad.count_nonzero() == 5 * few


@pytest.mark.parametrize("wrong", [-2, -1, 1, 2])
def test_a_wrong_number_of_labels_gives_nan(wrong):
    batch = make_batch()
    hidden, weight = leaves(*head_of(batch)[:2])
    count = int((batch.labels[:, 1:] != IGNORE).sum())
    right = linear_sequence_logps(hidden, weight, batch.labels, num_labelled=count)
    assert_close(right, linear_sequence_logps(hidden, weight, batch.labels))
    out = linear_sequence_logps(hidden, weight, batch.labels, num_labelled=count + wrong)
    assert out.isnan().all()
    out.sum().backward()
    assert hidden.grad.isnan().any()
    assert weight.grad.isnan().all()


@pytest.mark.parametrize("labelled", [0, 1])
def test_few_labels_or_none(labelled):
    hidden, weight = leaves(torch.randn(2, 3, 4), torch.randn(9, 4))
    labels = torch.full((2, 3), IGNORE)
    labels[0, 1 : 1 + labelled] = 5
    out = linear_sequence_logps(hidden, weight, labels)
    out.sum().backward()
    assert out[1] == 0
    assert (out[0] == 0) == (labelled == 0)
    assert hidden.grad.count_nonzero() == 4 * labelled
    assert (weight.grad.count_nonzero() > 0) == (labelled > 0)


def test_a_vocabulary_of_one_word_and_an_empty_batch():
    hidden, weight = leaves(torch.randn(2, 3, 4), torch.randn(1, 4))
    out = linear_token_logps(hidden, weight, torch.zeros(2, 3, dtype=torch.long))
    out.sum().backward()
    assert not out.any()
    assert not hidden.grad.any()
    assert not weight.grad.any()
    assert linear_token_logps(torch.randn(0, 3, 4), weight, torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3)


GOOD = {"hidden": torch.randn(2, 3, 4), "weight": torch.randn(7, 4), "labels": torch.zeros(2, 3, dtype=torch.long)}
BAD = [
    ({"hidden": [1.0]}, TypeError, "hidden must be a floating tensor, got list"),
    ({"hidden": torch.zeros(2, 3, 4, dtype=torch.long)}, TypeError, "hidden must be a floating tensor"),
    ({"hidden": torch.randn(6, 4)}, ValueError, "hidden must have shape"),
    ({"weight": torch.randn(7, 5)}, ValueError, r"weight must have shape \(V, 4\).*\(7, 5\)"),
    ({"weight": torch.randn(0, 4)}, ValueError, "weight must have shape"),
    ({"weight": torch.randn(7, 4, device="meta")}, ValueError, "weight must be on cpu"),
    ({"labels": torch.zeros(2, 4, dtype=torch.long)}, ValueError, "labels must have shape"),
    ({"labels": torch.zeros(2, 3)}, TypeError, "labels must be an int64 or int32 tensor"),
    ({"labels": torch.full((2, 3), 7)}, ValueError, r"labels must be in \[0, 7\)"),
    ({"bias": 1.0}, TypeError, "bias must be a floating tensor or None"),
    ({"bias": torch.randn(6)}, ValueError, r"bias must have shape \(7,\)"),
    ({"bias": torch.randn(7, device="meta")}, ValueError, "bias must be on cpu"),
    ({"softcap": 0.0}, ValueError, "softcap must be positive"),
    ({"softcap": -3}, ValueError, "softcap must be positive"),
    ({"softcap": float("nan")}, ValueError, "softcap must be positive"),
    ({"softcap": "30"}, TypeError, "softcap must be a number"),
    ({"logit_scale": 0.0}, ValueError, "logit_scale must be finite and not 0"),
    ({"logit_scale": float("inf")}, ValueError, "logit_scale must be finite"),
    ({"logit_scale": None}, TypeError, "logit_scale must be a number"),
    ({"memory_budget": -1}, ValueError, "memory_budget must not be negative, got -1"),
    ({"memory_budget": -0.1}, ValueError, "memory_budget must not be negative"),
    ({"memory_budget": float("nan")}, ValueError, "memory_budget must not be negative"),
    ({"memory_budget": 1.5}, ValueError, "share of the device's memory, at most 1, got 1.5"),
    ({"memory_budget": "lots"}, ValueError, "memory_budget must be 'auto'"),
    ({"memory_budget": None}, TypeError, "memory_budget must be a number"),
    ({"memory_budget": True}, TypeError, "memory_budget must be a number"),
    ({"num_labelled": -1}, ValueError, "num_labelled must not be negative"),
    ({"num_labelled": 7}, ValueError, "num_labelled must be at most the 6 labels, got 7"),
    ({"num_labelled": 2.0}, TypeError, "num_labelled must be an int or None"),
    ({"cu_seqlens": torch.tensor([0, 6]).int()}, ValueError, "hidden must have shape"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int"),
    ({"backend": "fast"}, ValueError, "backend must be"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        linear_token_logps(**{**GOOD, **change})


def test_bad_pairs_are_named():
    tail = (None, torch.tensor([0]), torch.ones(1))
    with pytest.raises(ValueError, match="even number"):
        fused_linear_grpo_loss(torch.randn(3, 3, 4), GOOD["weight"], torch.zeros(3, 3, dtype=torch.long), *tail)
    with pytest.raises(ValueError, match="group_ids"):
        fused_linear_grpo_loss(*GOOD.values(), None, torch.tensor([1]), torch.ones(1))
    with pytest.raises(ValueError, match="beta"):
        fused_linear_grpo_loss(*GOOD.values(), *tail, beta=0.0)


def test_a_backend_without_tile_operations_says_so(monkeypatch):
    from grpo_kernels.backends import torch_ops

    monkeypatch.delattr(torch_ops, "head_tile_fwd")
    with pytest.raises(UnavailableBackendError, match="no tile operations"):
        linear_token_logps(**GOOD, backend="torch")
