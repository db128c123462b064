"""The losses of logits and of sums are the oracle's, whatever comes: shapes, layouts, masks, settings, backends."""

from __future__ import annotations

import pytest
import torch
from drawn import drawn
from drawn_cases import (
    BACKENDS,
    alpha_after,
    assert_within,
    draw_case,
    draw_logits,
    epsilon,
    oracle,
    rounded,
    scored_lengths,
    sequence_sums,
    softmax_gradient,
    tokens_of,
)
from hypothesis import strategies as st

from grpo_kernels import GroupWeights, fused_grpo_loss, preference_loss, sequence_logps, token_logps

pytestmark = pytest.mark.filterwarnings("ignore:group_lr=")


def draw_backend(data, case):
    names = [name for name in BACKENDS if case.dtype != torch.float64 or name in ("auto", "torch")]
    return data.draw(st.sampled_from(names), label="backend")


def log_alpha_of(weights):
    return weights.log_alpha.clone() if isinstance(weights, GroupWeights) else None


def check_output(case, out, truth, before):
    """Every field of the output, and alpha, which stood at ``before``."""
    for name, value in truth.values.items():
        assert_within(name, getattr(out, name), value, truth.bounds[name])
    assert torch.equal(out.group_counts, torch.bincount(case.group_ids.long(), minlength=len(out.group_counts)))
    gw = case.weights
    if before is None:
        assert torch.equal(out.group_weights, gw.to(out.loss.dtype))
        return
    if gw.moves and case.pairs:
        expected, off = alpha_after(case, before, truth)
        assert_within("log_alpha", gw.log_alpha, expected, torch.tensor(off))
        assert int(gw.num_updates) == 1
    else:
        assert_within("log_alpha", gw.log_alpha, before, torch.tensor(1e-14))
    assert abs(gw.weights.sum().item() - 1) < 1e-12
    assert (gw.weights >= gw.mixing * gw.prior * (1 - 1e-12)).all()
    assert torch.equal(out.group_weights, gw.weights.to(out.loss.dtype))


@drawn(default=60, slow=600, nightly=12_000)
def test_the_loss_of_logits_is_the_oracles(data):
    case = draw_case(data)
    logits = draw_logits(data, case)
    exact, before = logits.double().clone(), log_alpha_of(case.weights)
    likelihood = data.draw(st.sampled_from([0.0, -0.25]), label="likelihood")
    overwrite = data.draw(st.booleans(), label="overwrite_logits") and (logits.stride(-1) == 1)
    options = {**case.options, "overwrite_logits": overwrite, "backend": draw_backend(data, case)}
    leaf = logits.detach().requires_grad_()
    out = fused_grpo_loss(leaf.view_as(leaf), case.labels, case.ref_logps, case.group_ids, case.weights, **options)
    (out.loss + likelihood * out.policy_logps[: case.pairs].sum()).backward()
    truth = oracle(case, *tokens_of(case, exact), scored_lengths(case), likelihood)
    check_output(case, out, truth, before)
    dz, bound = softmax_gradient(case, exact, truth.c, truth.c_bound)
    assert_within("gradient", leaf.grad, dz, rounded(case.dtype, dz, bound))


@drawn(default=30, slow=300, nightly=6_000)
def test_log_probabilities_of_logits_are_the_oracles(data):
    case = draw_case(data, most_words=600)
    logits = draw_logits(data, case)
    exact = logits.double().clone()
    options = {**case.layout, "backend": draw_backend(data, case)}
    one, other = (logits.detach().requires_grad_() for _ in range(2))
    tokens, sums = token_logps(one, case.labels, **options), sequence_logps(other, case.labels, **options)
    logps, bound = tokens_of(case, exact)
    assert_within("token_logps", tokens, logps, bound)
    logp = sequence_sums(logps, case.cu_seqlens)
    bound = sequence_sums(bound, case.cu_seqlens) + epsilon(case.dtype) * logp.abs()
    assert_within("sequence_logps", sums, logp, bound)
    late = torch.randn(case.labels.shape, generator=case.rng).to(tokens.dtype)
    (tokens * late).sum().backward()
    sums.sum().backward()
    for leaf, c in ((one, late.double()), (other, torch.ones_like(logps))):
        dz, bound = softmax_gradient(case, exact, c, torch.zeros_like(c))
        assert_within("gradient", leaf.grad, dz, rounded(case.dtype, dz, bound))


@drawn(default=30, slow=300, nightly=6_000)
def test_the_loss_of_sums_is_the_oracles(data):
    case = draw_case(data)
    case.dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    size = data.draw(st.sampled_from([1e-6, 1.0, 300.0, 2e4]), label="size")
    sums = (-size * torch.rand(2 * case.sequences, generator=case.rng)).to(case.dtype)
    stride = data.draw(st.integers(1, 2), label="stride")
    leaf = sums[: stride * case.sequences : stride].detach().requires_grad_()
    lengths, kind = None, data.draw(st.sampled_from([torch.int64, torch.int16, torch.float32, torch.float64]))
    if case.options["length_normalize"]:
        lengths = torch.randint(0, 9, (case.sequences,), generator=case.rng).to(kind)
    options = {name: case.options[name] for name in ("beta", "loss_type", "label_smoothing", "pair_weights")}
    before = log_alpha_of(case.weights)
    out = preference_loss(leaf, case.ref_logps, case.group_ids, case.weights, lengths=lengths, **options)
    out.loss.backward()
    # Sequences of one token each, which are what they are.
    case.cu_seqlens, case.labels = None, torch.zeros(case.sequences, 1, dtype=torch.int64)
    tokens = leaf.detach().double().unsqueeze(1)
    truth = oracle(case, tokens, torch.zeros_like(tokens), lengths)
    check_output(case, out, truth, before)
    assert_within("gradient", leaf.grad, truth.c.flatten(), truth.c_bound.flatten())
