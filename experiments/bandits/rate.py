"""Algorithm 1 as the paper states its guarantee: one sampled pair a step, projection, averaged iterates.

    g ~ N_g / N, one pair of g        l = -log sigma(<d, theta>)
    alpha_g <- alpha_g exp(eta_a l N / N_g), renormalised
    theta   <- P( theta - eta_t alpha_g (N / N_g) dl/dtheta )      P: onto the L2 ball of radius R

with both step sizes proportional to 1 / sqrt(T).  The guarantee is a duality gap of the averages in O(T^-1/2):

    gap = max_g L_g(mean theta) - min over the ball of sum_g (mean alpha)_g L_g

and both of its sides are exact, the maximum by inspection and the minimum by a certified convex solve.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from grpo_kernels import exponentiated_step, preference_loss

from .data import NUM_FEATURES, NUM_GROUPS, Bandit
from .optimum import GroupMeans, minimise_in_ball

RADIUS = 5.0
THETA_STEP = 5.0
"""eta_t sqrt(T)."""
ALPHA_STEP = 0.5
"""eta_a sqrt(T)."""
SAMPLES_AT_ONCE = 2000


def horizons(last: float = 5.0, per_decade: int = 4) -> list[int]:
    """T from 1e2 to 10 ** last, evenly on a log scale."""
    return [round(10 ** (2 + k / per_decade)) for k in range(round((last - 2) * per_decade) + 1)]


def algorithm_1(
    bandit: Bandit,
    steps: list[int],
    *,
    radius: float = RADIUS,
    theta_step: float = THETA_STEP,
    alpha_step: float = ALPHA_STEP,
    sample_seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every seed with every horizon at once → averaged theta (S, H, 4) and averaged alpha (S, H, G).

    A run of horizon T has step sizes of its own, so it is a run of its own and stops when T is reached.

    Args:
        bandit: data sets of S seeds.
        steps: (H,) horizons T, ascending.
        radius, theta_step, alpha_step: of the ball, and eta sqrt(T) of either step size.
        sample_seed: seeds the sampling of pairs.
    """
    num_seeds, num_horizons = len(bandit.seeds), len(steps)
    share = torch.tensor(bandit.train_sizes, dtype=torch.float64) / sum(bandit.train_sizes)
    # Runs are ordered by horizon, so that the ones still going are always the last.
    runs = num_horizons * num_seeds
    ends = torch.tensor(steps).repeat_interleave(num_seeds)
    rates = ends.double().rsqrt().unsqueeze(1)
    theta = torch.zeros(runs, NUM_FEATURES, dtype=torch.float64)
    log_alpha = torch.full((runs, NUM_GROUPS), -np.log(NUM_GROUPS), dtype=torch.float64)
    theta_sum, alpha_sum = torch.zeros_like(theta), torch.zeros_like(log_alpha)
    pool = bandit.train.repeat(num_horizons, 1, 1)
    rng = np.random.default_rng(sample_seed)
    done, first = 0, 0
    while first < runs:
        going = runs - first
        count = min(SAMPLES_AT_ONCE, int(ends[first]) - done)
        # Pairs stand group by group, so a pair drawn evenly from all is of g with chance N_g / N, then even within g.
        drawn = torch.from_numpy(rng.integers(0, pool.shape[1], size=(count, going)))
        samples = pool[torch.arange(first, runs), drawn]
        groups = (drawn >= bandit.train_sizes[0]).long()
        state = [values[first:] for values in (theta, log_alpha, theta_sum, alpha_sum)]
        _advance(*state, samples, groups, share, rates[first:] * theta_step, rates[first:] * alpha_step, radius)
        done += count
        first = int((ends <= done).sum())
    counts = ends.double().unsqueeze(1)
    theta_mean, alpha_mean = theta_sum / counts, alpha_sum / counts
    shape = (num_horizons, num_seeds, -1)
    return theta_mean.view(shape).transpose(0, 1), alpha_mean.view(shape).transpose(0, 1)


def _advance(
    theta: torch.Tensor,
    log_alpha: torch.Tensor,
    theta_sum: torch.Tensor,
    alpha_sum: torch.Tensor,
    samples: torch.Tensor,
    groups: torch.Tensor,
    share: torch.Tensor,
    theta_rate: torch.Tensor,
    alpha_rate: torch.Tensor,
    radius: float,
) -> None:
    """Take one step a sample, samples (n, R, 4) and groups (n, R), in place."""
    runs = len(theta)
    base = torch.arange(runs) * NUM_GROUPS
    # One pair a run: with w = R the loss is the sum of the runs' losses, and each theta gets its own gradient.
    weights, zeros = theta.new_full((runs * NUM_GROUPS,), runs), theta.new_zeros(runs)
    for pair, group in zip(samples, groups, strict=True):
        moving = theta.detach().requires_grad_()
        logps = torch.cat([(pair * moving).sum(dim=1), zeros])
        output = preference_loss(logps, None, base + group, weights, beta=1.0)
        (gradient,) = torch.autograd.grad(output.loss, moving)
        # The sampled group's loss over its chance of being drawn, zero for the others: unbiased for every L_g.
        estimate = output.group_losses.view(runs, NUM_GROUPS) / share
        log_alpha.copy_(exponentiated_step(log_alpha, estimate, alpha_rate))
        alpha = log_alpha.exp()
        boost = (alpha / share).gather(1, group.unsqueeze(1))
        stepped = theta - theta_rate * boost * gradient
        theta.copy_(stepped * (radius / stepped.norm(dim=1, keepdim=True)).clamp(max=1))
        theta_sum += theta
        alpha_sum += alpha


def duality_gap(
    bandit: Bandit, theta: torch.Tensor, alpha: torch.Tensor, radius: float = RADIUS
) -> tuple[torch.Tensor, torch.Tensor]:
    """(S, H, 4) and (S, H, G) → the gap (S, H), and how much too small it can be (S, H)."""
    num_seeds, num_horizons = theta.shape[:2]
    means = GroupMeans(bandit.train.repeat_interleave(num_horizons, dim=0), bandit.train_sizes, beta=1.0)
    flat_alpha = alpha.reshape(-1, NUM_GROUPS)
    best, error = minimise_in_ball(means, flat_alpha, radius)
    worst = means.losses(theta.reshape(-1, NUM_FEATURES)).amax(dim=1)
    gap = worst - (flat_alpha * means.losses(best)).sum(dim=1)
    return gap.view(num_seeds, num_horizons), error.view(num_seeds, num_horizons)


def study_rate(bandit: Bandit, steps: list[int]) -> dict[str, Any]:
    """The mean gap at every horizon, its standard error, and the slope over the last decade and a half."""
    gaps, error = duality_gap(bandit, *algorithm_1(bandit, steps))
    mean = gaps.mean(dim=0)
    sem = gaps.std(dim=0) / len(gaps) ** 0.5 if len(gaps) > 1 else torch.zeros_like(mean)
    return {
        "steps": steps,
        "gap": mean.tolist(),
        "sem": sem.tolist(),
        "largest_solver_error": float(error.amax()),
        "slope": loglog_slope(steps, mean.tolist()),
        "radius": RADIUS,
        "theta_step": THETA_STEP,
        "alpha_step": ALPHA_STEP,
    }


def loglog_slope(steps: list[int], gaps: list[float], decades: float = 1.5) -> float:
    """Least-squares slope of log gap against log T over the last so many decades."""
    x, y = np.log10(steps), np.log10(gaps)
    late = x >= x[-1] - decades - 1e-3
    return float(np.polyfit(x[late], y[late], 1)[0])
