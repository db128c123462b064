"""What the formulas would have done with the signs that docs/math.md corrects.

GR-DPO on the paper's data, with the loss written as ``+log sigma`` where alpha reads it (alpha then favours the group
that is fitted best), the gradient's factor written as ``+beta sigma(+beta m)`` (theta then flees every preference), or
both.  Everything is judged by the right loss.
"""

from __future__ import annotations

from typing import Any

import torch

from grpo_kernels import exponentiated_step

from .data import Bandit
from .methods import DPO, record_points
from .objective import GroupObjective

VARIANTS = ("as corrected", "alpha fed +log sigma", "gradient factor +sigma(+m)", "both, taken literally")
_ALPHA_SIGN = (1.0, -1.0, 1.0, -1.0)
_LITERAL_GRADIENT = (0.0, 0.0, 1.0, 1.0)


def study_corrections(bandit: Bandit, iterations: int = DPO.iterations) -> dict[str, Any]:
    """The worst validation loss of each variant over iterations: mean and standard error over seeds."""
    objective = GroupObjective(bandit.train, bandit.train_sizes, len(VARIANTS), "sigmoid", DPO.beta)
    validation = GroupObjective(bandit.validation, bandit.validation_sizes, len(VARIANTS), "sigmoid", DPO.beta)
    theta = bandit.theta0.unsqueeze(1).repeat(1, len(VARIANTS), 1)
    log_alpha = torch.full((len(theta), len(VARIANTS), len(bandit.train_sizes)), 0.5, dtype=torch.float64).log()
    sign = torch.tensor(_ALPHA_SIGN, dtype=torch.float64).view(-1, 1)
    # sigma(+m) = 1 - sigma(-m): the literal gradient +beta sigma(+beta m) d is the right one plus beta d.
    means = torch.stack([part.mean(dim=1) for part in bandit.train.split(bandit.train_sizes, dim=1)], dim=1)
    literal = torch.tensor(_LITERAL_GRADIENT, dtype=torch.float64).view(-1, 1, 1)
    excess = DPO.beta * literal * means.unsqueeze(1)
    looks = record_points(iterations)
    worst = []
    for iteration in range(1, iterations + 1):
        losses, gradients = objective.losses_and_gradients(theta)
        log_alpha = exponentiated_step(log_alpha, sign * losses, DPO.group_lr)
        theta = theta - DPO.lr * (log_alpha.exp().unsqueeze(-1) * (gradients + excess)).sum(dim=2)
        if iteration == looks[len(worst)]:
            worst.append(validation.losses(theta).amax(dim=-1))
    values = torch.stack(worst)  # (R, S, variants)
    spread = values.std(dim=1) / values.shape[1] ** 0.5 if values.shape[1] > 1 else torch.zeros_like(values[:, 0])
    return {
        "iterations": looks,
        "variants": {
            name: {"mean": values[:, :, v].mean(dim=1).tolist(), "sem": spread[:, v].tolist()}
            for v, name in enumerate(VARIANTS)
        },
    }
