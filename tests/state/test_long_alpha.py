"""Alpha over long runs: losses from 1e-8 to 1e4, rates from 5e-7 to 10, 1 to 10,000 groups.

The step in the log domain is a sum: whatever is normalised on the way, the exponents of T steps are
``log alpha_0 + eta * sum_t L_t``.  That, summed in extended precision and normalised once at the end, is what a million
normalised float64 steps are held against.  Each of them rounds three times (the product, the sum, the normalising), and
what the sum over groups within the normalising is off by is common to all groups and is gone with the next one, so

    |log alpha - exact| <= 3 T 2^-53 (1 + |log alpha|) + G 2^-53

which is 3e-10 of it after a million steps; docs/reliability.md says what was seen.
"""

from __future__ import annotations

import math
import os

import numpy
import pytest
import torch

from grpo_kernels import GroupWeights, exponentiated_step

NIGHTLY = os.environ.get("GRPO_KERNELS_NIGHTLY") == "1"
MILLION = 1_000_000
RATES = (5e-7, 1e-3, 1.0, 10.0)

RUNS = [
    # (groups, steps by default, in the slow tests, at night)
    (1, 500, 10_000, MILLION),
    (3, 2_000, MILLION, MILLION),
    (10, 2_000, 10_000, MILLION),
    (100, 1_000, 100_000, MILLION),
    (1_000, 300, 10_000, MILLION),
    (10_000, 100, 10_000, MILLION),
]


def runs(which):
    return [(groups, steps[which]) for groups, *steps in RUNS]


def losses_of(groups: int) -> numpy.ndarray:
    """(1009, G) losses, evenly spread over their logarithms; a run goes round and round them."""
    return 10 ** numpy.random.default_rng(groups).uniform(-8, 4, (1009, groups))


def exact(table: numpy.ndarray, steps: int, rates: tuple[float, ...] = RATES) -> numpy.ndarray:
    """(rates, G) log alpha after this many steps from a uniform start, in extended precision."""
    whole, part = divmod(steps, len(table))
    wide = table.astype(numpy.longdouble)
    total = wide.sum(0) * whole + wide[:part].sum(0)
    exponent = numpy.array(rates, dtype=numpy.longdouble)[:, None] * total
    exponent -= exponent.max(1, keepdims=True)
    return exponent - numpy.log(numpy.exp(exponent).sum(1, keepdims=True))


def worst_error(log_alpha: torch.Tensor, truth: numpy.ndarray) -> float:
    """The largest error, relative to 1 + |log alpha|."""
    return float((abs(log_alpha.numpy() - truth) / (1 + abs(truth))).max())


def check_a_run(groups: int, steps: int) -> None:
    table = losses_of(groups)
    rows = [torch.from_numpy(row) for row in table]
    rates = torch.tensor(RATES, dtype=torch.float64).unsqueeze(1)
    log_alpha = torch.full((len(RATES), groups), -math.log(groups), dtype=torch.float64)
    looks, seen = {10**k for k in range(8)} | {steps}, 0.0
    for step in range(1, steps + 1):
        log_alpha = exponentiated_step(log_alpha, rows[(step - 1) % len(rows)], rates)
        if step in looks:
            assert log_alpha.isfinite().all()
            assert (log_alpha.exp().sum(1) - 1).abs().max() < 1e-12
            seen = worst_error(log_alpha, exact(table, step))
            assert seen <= (3 * step + groups) * 2.0**-53, step
    print(f"G {groups}, {steps:,} steps: error {seen:.1e} of 1 + |log alpha|, least log alpha {log_alpha.min():.3g}")


@pytest.mark.parametrize(("groups", "steps"), runs(0))
def test_a_run_stays_with_the_exact_recursion(groups, steps):
    check_a_run(groups, steps)


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "steps"), runs(2 if NIGHTLY else 1))
def test_a_long_run_stays_with_the_exact_recursion(groups, steps):
    check_a_run(groups, steps)


def test_the_sum_of_exponents_is_the_recursion():
    """Step by step and normalised each time, in extended precision: what ``exact`` takes for granted."""
    table = losses_of(7)
    wide = table.astype(numpy.longdouble)
    log_alpha = numpy.full((len(RATES), 7), -numpy.log(numpy.longdouble(7)))
    for step in range(2_500):
        log_alpha = log_alpha + numpy.array(RATES, dtype=numpy.longdouble)[:, None] * wide[step % len(wide)]
        log_alpha -= log_alpha.max(1, keepdims=True)
        log_alpha -= numpy.log(numpy.exp(log_alpha).sum(1, keepdims=True))
    truth = exact(table, 2_500)
    room = 3 * 2_500 * numpy.finfo(numpy.longdouble).eps
    assert (abs(log_alpha - truth) / (1 + abs(truth))).max() <= room


def check_the_module(mixing: float, rate: float, steps: int) -> None:
    """observe and step, a million times if need be: the same recursion, and a floor under every weight."""
    groups, pairs = 5, 8
    table = losses_of(groups)
    q = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05], dtype=torch.float64)
    gw = GroupWeights.robust([8, 6, 4, 1, 1], rate, mixing=mixing, sampling_probs=q)
    # What makes L_g = sum / (B q) the loss of the table.
    rows = [torch.from_numpy(row) * pairs * q for row in table]
    counts, finite = torch.ones(groups), torch.ones(pairs)
    floor = mixing / groups
    for step in range(steps):
        gw.observe(rows[step % len(rows)], counts, finite)
        gw.step()
        if step % 997 == 0 or step == steps - 1:
            assert (gw.weights >= floor * (1 - 1e-15)).all()
            assert abs(gw.weights.sum().item() - 1) < 1e-12
    assert (int(gw.num_updates), int(gw.num_skipped)) == (steps, 0)
    truth = exact(table, steps, (rate,))
    # The product and the quotient by B q round twice more.
    assert worst_error(gw.log_alpha.unsqueeze(0), truth) <= (5 * steps + groups) * 2.0**-53
    alpha = (1 - mixing) * numpy.exp(truth[0]) + mixing / groups
    assert abs(gw.weights.numpy() - alpha).max() <= 5 * steps * 2.0**-53 * (1 + abs(truth).max())


SETTINGS = [(0.0, 5e-7), (0.0, 10.0), (0.1, 1e-3), (0.1, 10.0), (1.0, 1.0)]


@pytest.mark.filterwarnings("ignore:group_lr=")
@pytest.mark.parametrize(("mixing", "rate"), SETTINGS)
def test_the_module_takes_the_same_steps_and_keeps_its_floor(mixing, rate):
    check_the_module(mixing, rate, 500)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:group_lr=")
@pytest.mark.parametrize(("mixing", "rate"), SETTINGS[1::2])
def test_the_module_does_so_for_long(mixing, rate):
    check_the_module(mixing, rate, MILLION if NIGHTLY else 20_000)
