"""What must hold whatever the numbers are, on a handful of drawn cases each."""

from __future__ import annotations

import torch
from helpers import LOSSES, assert_close, make_batch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_kernels import GroupWeights, exponentiated_step, fused_grpo_loss, preference_loss, token_logps

# The fixtures that every test has set up nothing that a second case could find changed.
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

batches = st.builds(
    make_batch,
    pairs=st.integers(1, 5),
    length=st.integers(1, 9),
    vocabulary=st.integers(1, 17),
    groups=st.integers(1, 4),
    packed=st.booleans(),
    seed=st.integers(0, 2**31),
)


def loss_of(batch, logits=None, labels=None, weights=None, **options):
    return fused_grpo_loss(
        batch.logits if logits is None else logits,
        batch.labels if labels is None else labels,
        batch.ref_logps,
        batch.group_ids,
        batch.weights if weights is None else weights,
        cu_seqlens=batch.cu_seqlens,
        **options,
    )


@few
@given(batch=batches, loss=st.sampled_from(LOSSES), normalize=st.booleans())
def test_swapping_chosen_and_rejected_negates_the_margins(batch, loss, normalize):
    logps = -5 * torch.rand(len(batch.ref_logps), dtype=torch.float64)
    lengths = torch.arange(len(logps)) if normalize else None
    options = {"loss_type": loss[0], "label_smoothing": loss[1]}
    out = preference_loss(logps, *batch.tail(), lengths=lengths, **options)
    swap = torch.arange(len(logps)).roll(len(logps) // 2)
    swapped = preference_loss(
        logps[swap],
        batch.ref_logps[swap],
        batch.group_ids,
        batch.weights,
        lengths=None if lengths is None else lengths[swap],
        **options,
    )
    assert torch.equal(swapped.margins, -out.margins)
    assert torch.equal(swapped.rewards_chosen, out.rewards_rejected)


@few
@given(batch=batches, loss=st.sampled_from(LOSSES), seed=st.integers(0, 2**31))
def test_permuting_pairs_permutes_losses_and_leaves_alpha(batch, loss, seed):
    pairs = len(batch.group_ids)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    logps = -5 * torch.rand(2 * pairs, dtype=torch.float64)
    rows = torch.cat([order, order + pairs])
    options = {"loss_type": loss[0], "label_smoothing": loss[1]}
    results = []
    for both, ids, ref in (
        (logps, batch.group_ids, batch.ref_logps),
        (logps[rows], batch.group_ids[order], batch.ref_logps[rows]),
    ):
        gw = GroupWeights.robust([3] * len(batch.weights), 0.2)
        results.append((preference_loss(both.requires_grad_(), ref, ids, gw, **options), gw.weights))
    (plain, alpha), (permuted, alpha_permuted) = results
    assert torch.equal(permuted.losses, plain.losses[order])
    assert_close(alpha_permuted, alpha)
    assert_close(permuted.loss, plain.loss)


@few
@given(batch=batches, seed=st.integers(0, 2**31))
def test_a_number_added_to_a_row_of_logits_changes_nothing(batch, seed):
    rng = torch.Generator().manual_seed(seed)
    offset = 100 * torch.randn(*batch.logits.shape[:-1], 1, generator=rng, dtype=torch.float64)
    plain, shifted = batch.leaf(), (batch.logits + offset).requires_grad_()
    for leaf in (plain, shifted):
        loss_of(batch, leaf).loss.backward()
    # Adding 100 rounds a logit to an ulp of 100.
    assert_close(loss_of(batch, shifted).losses, loss_of(batch).losses, rtol=1e-11, atol=1e-11)
    assert_close(shifted.grad, plain.grad, rtol=1e-11, atol=1e-13)


@few
@given(batch=batches)
def test_the_gradient_of_a_row_sums_to_zero(batch):
    leaf = batch.leaf()
    loss_of(batch, leaf).loss.backward()
    assert leaf.grad.sum(-1).abs().max() < 1e-14 if leaf.numel() else True


@few
@given(batch=batches)
def test_log_probabilities_are_never_positive_and_sum_to_certainty(batch):
    words = batch.logits.shape[-1]
    aligned = {"shift": False, "cu_seqlens": batch.cu_seqlens}
    every = [token_logps(batch.logits, torch.full_like(batch.labels, v), **aligned) for v in range(words)]
    assert all((logp <= 1e-14).all() for logp in every)
    assert_close(torch.stack(every).exp().sum(0), torch.ones(batch.labels.shape))


@few
@given(batch=batches, scale=st.floats(0.1, 10))
def test_the_loss_is_linear_in_the_group_weights(batch, scale):
    assert_close(loss_of(batch, weights=batch.weights * scale).loss, loss_of(batch).loss * scale)
    ones = torch.ones_like(batch.weights)
    assert_close(loss_of(batch, weights=ones).loss, loss_of(batch).losses.mean())


@few
@given(
    losses=st.lists(st.floats(0, 50), min_size=1, max_size=8),
    group_lr=st.floats(0, 10),
    shift=st.floats(-100, 100),
)
def test_alpha_stays_on_the_simplex_favours_the_worst_and_ignores_a_common_loss(losses, group_lr, shift):
    group_losses = torch.tensor(losses, dtype=torch.float64)
    start = torch.zeros(len(losses), dtype=torch.float64).log_softmax(0)
    new = exponentiated_step(start, group_losses, group_lr)
    assert abs(new.exp().sum().item() - 1) < 1e-12
    worst = group_losses.argmax()
    assert new[worst] >= start[worst] - 1e-15
    assert torch.equal(new.argmax() == worst, torch.tensor(True)) or new[worst] == new.max()
    # η times a loss of up to 150 leaves its rounding in the exponent.
    assert_close(exponentiated_step(start, group_losses + shift, group_lr), new, rtol=1e-11, atol=1e-11)


@few
@given(mixing=st.floats(0.01, 1), losses=st.lists(st.floats(0, 1e4), min_size=3, max_size=3))
def test_mixing_puts_a_floor_under_every_weight(mixing, losses):
    gw = GroupWeights.robust([5, 3, 2], 10.0, estimator="group_mean", mixing=mixing)
    values = torch.tensor(losses, dtype=torch.float64)
    for _ in range(3):
        gw.observe(values, torch.ones(3), values)
        gw.step()
    assert (gw.weights >= mixing / 3 * (1 - 1e-12)).all()
    assert abs(gw.weights.sum().item() - 1) < 1e-12
