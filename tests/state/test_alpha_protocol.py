"""When alpha moves, by how much, and what it does not follow."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from helpers import assert_close, make_batch

from grpo_kernels import GroupWeights, fused_grpo_loss, preference_loss, reference

SIZES = [5, 3, 2]
Q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
THIRDS = torch.full((3,), 1 / 3, dtype=torch.float64)


def call(gw, batch=None, requires_grad=True):
    batch = make_batch() if batch is None else batch
    logits = batch.leaf() if requires_grad else batch.logits
    return fused_grpo_loss(logits, batch.labels, batch.ref_logps, batch.group_ids, gw)


def test_alpha_moves_in_training_with_gradients_and_an_input_that_requires_grad():
    gw = GroupWeights.robust(SIZES, 0.3)
    call(gw)
    assert int(gw.num_updates) == 1
    assert gw.weights.argmax() != 2  # the absent group


@pytest.mark.parametrize("missing", ["training", "grad", "requires_grad"])
def test_alpha_is_only_read_otherwise(missing):
    gw = GroupWeights.robust(SIZES, 0.3)
    if missing == "training":
        gw.eval()
        out = call(gw)
    elif missing == "grad":
        with torch.no_grad():
            out = call(gw)
    else:
        out = call(gw, requires_grad=False)
    assert gw.log_alpha.tolist() == [math.log(1 / 3)] * 3
    assert (gw.pending == 0).all()
    assert_close(out.group_weights, THIRDS)


@pytest.mark.parametrize("make", [GroupWeights.proportional, GroupWeights.balanced])
def test_fixed_weights_do_not_move(make):
    gw = make(SIZES)
    before = gw.weights
    call(gw)
    gw.step()
    assert torch.equal(gw.weights, before)
    assert int(gw.num_updates) == 0


def test_the_batch_is_weighted_with_the_new_alpha():
    gw = GroupWeights.robust(SIZES, 0.3)
    batch = make_batch()
    out = call(gw, batch)
    seen = reference.importance_losses(out.losses, batch.group_ids, Q)
    alpha = reference.alpha_step(THIRDS, seen, 0.3)
    assert_close(out.group_weights, alpha)
    assert_close(out.loss, reference.robust_loss(out.losses, batch.group_ids, alpha / Q))


def test_accumulating_observes_only_and_steps_once_as_one_large_batch_would():
    large = make_batch(pairs=6)
    whole, parts = GroupWeights.robust(SIZES, 0.3), GroupWeights.robust(SIZES, 0.3)
    call(whole, large)
    with parts.accumulate():
        for start in (0, 2, 4):
            pairs = slice(start, start + 2)
            rows = [start, start + 1, start + 6, start + 7]
            out = fused_grpo_loss(
                large.leaf()[rows], large.labels[rows], large.ref_logps[rows], large.group_ids[pairs], parts
            )
            assert_close(out.group_weights, THIRDS)  # the alpha of before, for all of them
        assert parts.accumulating
        parts.step()
    assert not parts.accumulating
    assert int(parts.num_updates) == 1
    assert_close(parts.log_alpha, whole.log_alpha)


def test_blocks_of_accumulation_nest_and_end_with_an_error_too():
    gw = GroupWeights.robust(SIZES, 0.3)

    def interrupted():
        with gw.accumulate():
            with gw.accumulate():
                call(gw)
            assert gw.accumulating
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert not gw.accumulating


def test_what_was_observed_is_used_once():
    gw = GroupWeights.robust(SIZES, 0.3)
    with gw.accumulate():
        call(gw)
    gw.step()
    after = gw.log_alpha.clone()
    gw.step()
    assert_close(gw.log_alpha, after)


def test_a_batch_thrown_away_leaves_no_trace():
    gw = GroupWeights.robust(SIZES, 0.3)
    with gw.accumulate():
        call(gw)
    gw.discard()
    gw.step()
    assert_close(gw.weights, THIRDS)


@pytest.mark.parametrize("estimator", ["importance", "group_mean"])
@pytest.mark.parametrize("size_adjustment", [0.0, 2.0])
def test_a_call_of_the_loss_steps_as_observing_and_stepping_does(estimator, size_adjustment):
    """It takes a shorter way, to the same bits."""
    at_once, apart = (
        GroupWeights.robust(SIZES, 0.3, estimator=estimator, size_adjustment=size_adjustment) for _ in range(2)
    )
    for bad in (0.0, 0.0, math.inf):
        sums, counts = torch.tensor([0.7, bad, 2.1], dtype=torch.float64), torch.tensor([1, 0, 3])
        losses = torch.tensor([0.7, 0.6, 0.8, 0.7 + bad])
        at_once.observe_and_step(sums, counts, losses)
        apart.observe(sums, counts, losses)
        apart.step()
    for name, buffer in at_once.named_buffers():
        assert torch.equal(buffer, getattr(apart, name)), name
    assert (int(at_once.num_updates), int(at_once.num_skipped)) == (2, 1)


def test_what_a_checkpoint_left_pending_is_part_of_the_next_step():
    saved, gone_on = GroupWeights.robust(SIZES, 0.3), GroupWeights.robust(SIZES, 0.3)
    with saved.accumulate():
        call(saved, make_batch(seed=1))
    gone_on.load_state_dict(saved.state_dict())
    call(saved)
    call(gone_on)
    plain = GroupWeights.robust(SIZES, 0.3)
    call(plain)
    assert torch.equal(gone_on.log_alpha, saved.log_alpha)
    assert not torch.equal(gone_on.log_alpha, plain.log_alpha)
    assert (gone_on.pending == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_is_skipped_counted_and_forgotten(bad):
    gw = GroupWeights.robust(SIZES, 0.3)
    call(gw)
    before = gw.log_alpha.clone()
    gw.observe(torch.tensor([1.0, bad, 1.0]), torch.ones(3), torch.tensor([1.0, bad, 1.0]))
    gw.step()
    assert torch.equal(gw.log_alpha, before)
    assert (int(gw.num_updates), int(gw.num_skipped)) == (1, 1)
    call(gw)
    assert int(gw.num_updates) == 2


def test_a_bad_pair_left_out_of_the_group_sums_still_stops_the_step():
    """A group id out of range on a device: its loss is NaN and its group nowhere."""
    gw = GroupWeights.robust(SIZES, 0.3)
    gw.observe(torch.ones(3), torch.ones(3), torch.tensor([1.0, math.nan]))
    gw.step()
    assert int(gw.num_skipped) == 1


def test_group_mean_is_the_mean_over_the_groups_pairs_and_absent_groups_keep_log_alpha():
    batch = make_batch()
    gw = GroupWeights.robust(SIZES, 0.3, estimator="group_mean", size_adjustment=2.0)
    out = call(gw, batch)
    means = reference.group_mean_losses(out.losses, batch.group_ids, 3)
    present = torch.bincount(batch.group_ids, minlength=3) > 0
    assert present.tolist() == [True, True, False]
    exponent = torch.where(present, means + 2 / torch.tensor(SIZES).double().sqrt(), 0.0)
    assert_close(gw.weights, reference.alpha_step(THIRDS, exponent, 0.3))


def test_size_adjustment_is_in_the_exponent_and_not_in_the_loss():
    batch = make_batch()
    gw = GroupWeights.robust(SIZES, 0.3, size_adjustment=2.0)
    out = call(gw, batch)
    seen = reference.importance_losses(out.losses, batch.group_ids, Q) + 2 / torch.tensor(SIZES).double().sqrt()
    alpha = reference.alpha_step(THIRDS, seen, 0.3)
    assert_close(gw.weights, alpha)
    assert_close(out.loss, reference.robust_loss(out.losses, batch.group_ids, alpha / Q))
    assert_close(out.losses, call(GroupWeights.balanced(SIZES), batch).losses)


def test_mixing_moves_the_alpha_used_and_not_the_alpha_kept():
    gw, pure = GroupWeights.robust(SIZES, 0.3, mixing=0.25, prior="proportional"), None
    pure = GroupWeights.robust(SIZES, 0.3, prior="proportional")
    for _ in range(3):
        call(gw)
        call(pure)
    assert_close(gw.log_alpha, pure.log_alpha)
    assert_close(gw.weights, 0.75 * pure.weights + 0.25 * Q)
    assert_close(gw.loss_weights, gw.weights / Q)


@pytest.mark.parametrize(
    ("prior", "start"),
    [
        ("uniform", [1 / 3] * 3),
        ("proportional", [0.5, 0.3, 0.2]),
        (torch.tensor([0.2, 0.2, 0.6]), [0.2, 0.2, 0.6]),
        ([0.2, 0.2, 0.6], [0.2, 0.2, 0.6]),
    ],
)
def test_alpha_starts_at_the_prior(prior, start):
    gw = GroupWeights.robust(SIZES, 0.3, prior=prior)
    # A float32 prior is normalised, which leaves its rounding.
    assert_close(gw.weights, torch.tensor(start, dtype=torch.float64), rtol=1e-7)
    assert abs(gw.weights.sum().item() - 1) < 1e-15


def test_names_come_from_the_mapping_or_count_up():
    assert GroupWeights.balanced({"a": 1, 2: 3}).names == ("a", "2")
    assert GroupWeights.balanced([4, 4]).names == ("0", "1")


@pytest.mark.parametrize("convert", [tuple, torch.tensor, "numpy"])
def test_sizes_may_come_from_bincount(convert):
    if convert == "numpy":
        numpy = pytest.importorskip("numpy")
        assert GroupWeights.proportional(list(numpy.array(SIZES))).group_sizes == (5, 3, 2)
        convert = numpy.array
    assert_close(GroupWeights.proportional(convert(SIZES)).weights, Q)


@pytest.mark.parametrize(
    ("group_lr", "pairs", "options", "warns"),
    [
        (0.5, 2, {}, True),  # 0.5 / 0.2 / 2 = 1.25
        (0.5, 3, {}, False),
        (0.5, 2, {"sampling_probs": [0.3, 0.3, 0.4]}, False),
        (0.5, 2, {"estimator": "group_mean"}, False),
    ],
)
def test_a_step_that_one_pair_can_blow_up_is_warned_about_once(group_lr, pairs, options, warns):
    gw = GroupWeights.robust(SIZES, group_lr, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            gw.observe(torch.ones(3), torch.ones(3), torch.ones(pairs))
            gw.step()
    assert [str(w.message)[:13] for w in caught] == ["group_lr=0.5 "] * warns
    assert all(w.filename == __file__ for w in caught)


def test_the_warning_counts_all_micro_batches():
    gw = GroupWeights.robust(SIZES, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            gw.observe(torch.ones(3), torch.ones(3), torch.ones(1))
        gw.step()


def test_pair_weights_drive_alpha_as_they_drive_the_loss():
    batch = make_batch()
    gw, logps = GroupWeights.robust(SIZES, 0.3), torch.zeros(8, dtype=torch.float64, requires_grad=True)
    out = preference_loss(logps, batch.ref_logps, batch.group_ids, gw, pair_weights=batch.pair_weights)
    seen = reference.importance_losses(out.losses, batch.group_ids, Q)
    assert_close(gw.weights, reference.alpha_step(THIRDS, seen, 0.3))
