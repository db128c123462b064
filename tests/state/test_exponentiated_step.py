"""The alpha arithmetic, alone: against the paper's formula and over long runs."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close

from grpo_kernels import GroupWeights, exponentiated_step, reference


def test_one_step_is_the_papers():
    alpha = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    losses = torch.tensor([1.0, 0.1, 0.7], dtype=torch.float64)
    assert_close(exponentiated_step(alpha.log(), losses, 0.4).exp(), reference.alpha_step(alpha, losses, 0.4))


def test_it_broadcasts_over_seeds_and_rates():
    log_alpha, losses = torch.randn(4, 1, 3, dtype=torch.float64), torch.rand(4, 5, 3, dtype=torch.float64)
    rates, adjustment = torch.rand(5, 1, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    together = exponentiated_step(log_alpha, losses, rates, adjustment=adjustment)
    assert together.shape == (4, 5, 3)
    for s in range(4):
        for r in range(5):
            alone = exponentiated_step(log_alpha[s, 0], losses[s, r], rates[r].item(), adjustment=adjustment)
            assert_close(together[s, r], alone)


def test_the_input_is_left_alone_and_its_dtype_kept():
    log_alpha = torch.zeros(3)
    new = exponentiated_step(log_alpha, torch.rand(3, dtype=torch.float64), 1.0)
    assert new.dtype == torch.float32
    assert (log_alpha == 0).all()


def test_a_rate_of_zero_only_normalises():
    assert_close(exponentiated_step(torch.zeros(4), torch.rand(4), 0).exp(), torch.full((4,), 0.25), rtol=1e-6)


def test_enormous_losses_leave_log_alpha_finite():
    log_alpha = torch.zeros(3, dtype=torch.float64)
    for _ in range(100):
        log_alpha = exponentiated_step(log_alpha, torch.tensor([1e4, 0.0, 1e4]), 10.0)
    assert log_alpha.isfinite().all()
    assert_close(log_alpha.exp(), torch.tensor([0.5, 0.0, 0.5]))


def independent(alpha, losses, eta):
    """The recursion with plain numbers: multiply, sum, divide."""
    grown = [a * math.exp(eta * x) for a, x in zip(alpha, losses, strict=True)]
    total = math.fsum(grown)
    return [g / total for g in grown]


@pytest.mark.parametrize("eta", [5e-7, 1e-2])
def test_a_hundred_thousand_steps_stay_with_an_independent_recursion(eta):
    """At the paper's rate of 5e-7 too, where float32 would not move at all."""
    table = torch.rand(1000, 3, dtype=torch.float64)
    table[:, 1] *= 0.9  # so that alpha goes somewhere
    rows, plain = table.unbind(), table.tolist()
    log_alpha, alpha = torch.full((3,), -math.log(3), dtype=torch.float64), [1 / 3] * 3
    for t in range(100_000):
        log_alpha = exponentiated_step(log_alpha, rows[t % 1000], eta)
        alpha = independent(alpha, plain[t % 1000], eta)
    assert (log_alpha.exp() - torch.tensor(alpha, dtype=torch.float64)).abs().max() < 1e-12
    assert abs(log_alpha.exp().sum().item() - 1) < 1e-12
    assert max(alpha) - min(alpha) > 5e-4


def test_the_module_takes_the_same_steps():
    gw, alpha = GroupWeights.robust([5, 3, 2], 1e-3), [1 / 3] * 3
    for t in range(2000):
        losses = [1 + 0.5 * math.sin(t + g) for g in range(3)]
        gw.observe(torch.tensor(losses, dtype=torch.float64), torch.ones(3), torch.tensor(losses, dtype=torch.float64))
        gw.step()
        alpha = independent(alpha, [x / (3 * q) for x, q in zip(losses, (0.5, 0.3, 0.2), strict=True)], 1e-3)
    assert (gw.weights - torch.tensor(alpha, dtype=torch.float64)).abs().max() < 1e-12
    assert int(gw.num_updates) == 2000
