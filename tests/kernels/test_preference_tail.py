"""The tail's part of the parity matrix: token log-probabilities to losses, slopes and group sums, against float64."""

import itertools

import pytest
import torch
from kernel_cases import EPSILON, case_id, places, run_tail, tail_oracle

from grpo_kernels.types import IGNORE_INDEX, LOSS_TYPES

every_place = pytest.mark.parametrize("place", places(), ids=case_id)
float_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=case_id)


def make_pairs(pairs, groups, dtype, *, length=23, seed=0):
    """Sequences of different lengths, one of them empty, some tokens ignored."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, length, (2 * pairs,), generator=generator)
    if pairs > 1:
        counts[1] = 0
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    rows = int(cu_seqlens[-1])
    targets = torch.randint(0, 1000, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < 0.3] = IGNORE_INDEX
    token_logps = -6 * torch.rand(rows, generator=generator, dtype=torch.float64)
    token_logps[targets == IGNORE_INDEX] = 0
    ref_logps = -3 * counts.double() + torch.randn(2 * pairs, generator=generator, dtype=torch.float64)
    group_ids = torch.randint(0, groups, (pairs,), generator=generator)
    weights = torch.rand(pairs, generator=generator, dtype=torch.float64)
    return token_logps.to(dtype), targets, cu_seqlens, ref_logps, group_ids, weights


def assert_tail(got, want, dtype):
    """Sums are float64 whatever the dtype, so every output is within one rounding of the truth."""
    step = EPSILON / 4 if dtype is torch.float32 else 2.0**-50
    for name, value in want.items():
        tolerance = 2.0**-44 if value.dtype is torch.float64 and got[name].dtype is torch.float64 else step
        scale = 1 + value.nan_to_num().abs().max().item() if value.numel() else 1
        torch.testing.assert_close(
            got[name].double(), value.double(), rtol=max(tolerance, 2.0**-44), atol=2.0**-44 * scale, equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


@pytest.mark.parametrize("length_normalize", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@float_dtypes
@every_place
def test_losses_and_slopes(place, dtype, loss_type, length_normalize):
    smoothed = loss_type in ("sigmoid", "robust")
    for with_ref, with_weights, smoothing in itertools.product((0, 1), (0, 1), (0.0, 0.1) if smoothed else (0.0,)):
        logps, targets, cu, ref, ids, weights = make_pairs(9, 4, dtype)
        ref, weights = ref if with_ref else None, weights if with_weights else None
        options = {
            "loss_type": loss_type,
            "beta": 0.3,
            "label_smoothing": smoothing,
            "length_normalize": bool(length_normalize),
        }
        got = run_tail(place, logps, targets, cu, ref, ids, weights, 4, **options)
        assert_tail(got, tail_oracle(logps, targets, cu, ref, ids, weights, 4, **options), dtype)


OPTIONS = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "length_normalize": False}


@pytest.mark.parametrize(("pairs", "groups"), [(1, 1), (2, 1), (33, 1), (64, 7), (300, 2), (5, 10000), (300, 10000)])
@every_place
def test_groups_from_one_to_many(place, pairs, groups):
    if place.interpreted and pairs > 100:
        pytest.skip("the interpreter is slow")
    arguments = make_pairs(pairs, groups, torch.float32)
    got = run_tail(place, *arguments, groups, **OPTIONS)
    assert_tail(got, tail_oracle(*arguments, groups, **OPTIONS), torch.float32)
    assert got["group_counts"].sum() == pairs


@every_place
def test_equal_lengths_need_no_boundaries(place):
    pairs, length = 6, 11
    cu = torch.arange(2 * pairs + 1, dtype=torch.int32) * length
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(0, 9, (2 * pairs * length,), generator=generator)
    logps = -torch.rand(2 * pairs * length, generator=generator)
    ids = torch.arange(pairs) % 3
    want = tail_oracle(logps, targets, cu, None, ids, None, 3, **OPTIONS)
    for boundaries in (None, cu):
        assert_tail(run_tail(place, logps, targets, boundaries, None, ids, None, 3, **OPTIONS), want, torch.float32)


@every_place
def test_lengths_are_read_where_there_are_no_targets(place):
    logps, _targets, cu, ref, ids, weights = make_pairs(9, 3, torch.float32)
    options = {**OPTIONS, "length_normalize": True}
    lengths = torch.arange(18, dtype=torch.float64)
    got = run_tail(place, logps, None, cu, ref, ids, weights, 3, lengths=lengths.clone(), **options)
    assert torch.equal(got["lengths"], lengths)
    ratios = (got["policy_logps"].double() - ref) / lengths.clamp(min=1)
    torch.testing.assert_close(got["margins"].double(), ratios[:9] - ratios[9:], rtol=1e-5, atol=1e-5)


@every_place
def test_lengths_that_nobody_asks_for_may_be_missing(place):
    logps, targets, cu, ref, ids, weights = make_pairs(9, 3, torch.float32)
    with_them = run_tail(place, logps, targets, cu, ref, ids, weights, 3, **OPTIONS)
    without = run_tail(place, logps, None, cu, ref, ids, weights, 3, **OPTIONS)
    assert with_them.keys() - without.keys() == {"lengths"}
    assert all(torch.equal(without[name], with_them[name]) for name in without)


@every_place
def test_boundaries_outside_the_rows_are_held_inside(place):
    """On a device nobody looks at them before: a sum may be wrong then, but of rows that are there."""
    logps, targets, ids = -torch.rand(12), torch.zeros(12, dtype=torch.int64), torch.tensor([0, 1])
    got, want = (
        run_tail(place, logps, targets, torch.tensor(cu, dtype=torch.int32), None, ids, None, 2, **OPTIONS)
        for cu in ([-3, 4, 9, 2**30, 2**31 - 1], [0, 4, 9, 12, 12])
    )
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@every_place
def test_long_sequences_are_rounded_once(place):
    """Sums in the thousands: added up in float32 they would be off by hundreds of its steps, not by half of one."""
    length = 200 if place.interpreted else 4096
    logps = torch.full((2 * length,), -3.1)
    logps[0] += 0.01
    targets = torch.zeros(2 * length, dtype=torch.int64)
    got = run_tail(place, logps, targets, None, None, torch.zeros(1, dtype=torch.int64), None, 1, **OPTIONS)
    sums = logps.double().view(2, length).sum(dim=1).float()
    assert torch.equal(got["policy_logps"], sums)
    assert torch.equal(got["margins"], (sums[0] - sums[1]).reshape(1))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@every_place
def test_extreme_margins(place, loss_type):
    """Neither end overflows, and a NaN margin gives NaN, not a loss of zero."""
    margins = [0.0, 1e-9, 50.0, -50.0, 2e4, -2e4, 1e30, -1e30, torch.nan]
    logps = torch.tensor([*margins, *[0.0] * len(margins)], dtype=torch.float64)
    cu = torch.arange(len(logps) + 1, dtype=torch.int32)
    targets, ids = torch.zeros(len(logps), dtype=torch.int64), torch.zeros(len(margins), dtype=torch.int64)
    options = {**OPTIONS, "loss_type": loss_type, "beta": 1.0}
    got = run_tail(place, logps, targets, cu, None, ids, None, 1, **options)
    want = tail_oracle(logps, targets, cu, None, ids, None, 1, **options)
    for name in ("losses", "slopes"):
        torch.testing.assert_close(got[name][:-1], want[name][:-1], rtol=1e-12, atol=1e-300)
        assert got[name][-1].isnan()
    assert got["group_sums"].isnan().all()


@every_place
def test_pairs_outside_every_group_are_nan_and_not_summed(place):
    logps, targets, cu, ref, ids, weights = make_pairs(9, 3, torch.float32)
    ids[2], ids[5], ids[7] = -1, 3, 2**40
    got = run_tail(place, logps, targets, cu, ref, ids, weights, 3, **OPTIONS)
    assert_tail(got, tail_oracle(logps, targets, cu, ref, ids, weights, 3, **OPTIONS), torch.float32)
    assert got["losses"].isnan().nonzero().flatten().tolist() == [2, 5, 7]
    assert got["margins"].isfinite().all()
    assert got["group_counts"].sum() == 6


def run_robust_loss(place, losses, group_ids, group_weights):
    weights, loss = torch.full_like(losses, torch.nan), losses.new_full((), torch.nan)
    tensors = [x.to(place.device) for x in (losses, group_ids, group_weights, weights, loss)]
    place.module.robust_loss(*tensors)
    return tensors[3].cpu(), tensors[4].cpu()


@pytest.mark.parametrize(("pairs", "groups"), [(1, 1), (7, 3), (300, 2), (1300, 10000)])
@float_dtypes
@every_place
def test_robust_loss_is_the_weighted_mean(place, dtype, pairs, groups):
    losses, group_ids = torch.rand(pairs, dtype=dtype), torch.randint(0, groups, (pairs,))
    group_weights = torch.rand(groups, dtype=dtype)
    weights, loss = run_robust_loss(place, losses, group_ids, group_weights)
    assert torch.equal(weights, group_weights[group_ids])
    exact = (weights.double() * losses.double()).mean()
    torch.testing.assert_close(loss.double(), exact, rtol=EPSILON / 4 if dtype is torch.float32 else 2.0**-44, atol=0)
    for again in range(3):
        assert torch.equal(run_robust_loss(place, losses, group_ids, group_weights)[1], loss), again


@every_place
def test_robust_loss_of_pairs_outside_every_group_is_nan_and_reads_nothing_astray(place):
    losses, group_ids = torch.tensor([0.5, torch.nan, torch.nan]), torch.tensor([1, -(2**40), 2**40])
    _, loss = run_robust_loss(place, losses, group_ids, torch.ones(2))
    assert loss.isnan()


@every_place
def test_robust_loss_of_no_pairs_is_zero(place):
    weights, loss = run_robust_loss(place, torch.empty(0), torch.empty(0, dtype=torch.int64), torch.ones(2))
    assert weights.shape == (0,)
    assert loss.item() == 0


@every_place
def test_no_pairs(place):
    nothing = torch.empty(0)
    cu, ids = torch.zeros(1, dtype=torch.int32), torch.empty(0, dtype=torch.int64)
    for boundaries in (cu, None):
        got = run_tail(place, nothing, ids, boundaries, None, ids, None, 5, **OPTIONS)
        assert got["group_sums"].tolist() == [0.0] * 5
        assert got["group_counts"].tolist() == [0] * 5


@every_place
def test_same_bits_on_every_run_and_any_number_of_threads(place, threads):
    arguments = make_pairs(20 if place.interpreted else 300, 3, torch.float32, length=30 if place.interpreted else 200)
    seen = []
    for count in (1, 4, 4, 3):
        threads(count)
        seen.append(run_tail(place, *arguments, 3, **OPTIONS))
    for again in seen[1:]:
        assert all(torch.equal(seen[0][name], again[name]) for name in again)
