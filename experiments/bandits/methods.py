"""DPO, IS-DPO, GR-DPO and the same three over IPO, for all seeds at once.

All six are one iteration: ``theta <- theta - lr sum_g c_g dL_g/dtheta`` (or, closed form, theta that minimises
``sum_g c_g L_g``), and differ in the group coefficients

    plain                 c_g = N_g / N
    importance sampling   c_g = w_g N_g / N, w = (0.8, 0.2): pair weights, over N, as the authors scale them
    group robust          c_g = alpha_g, moved first, by the losses at the old theta, then used
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from grpo_kernels import LossType, exponentiated_step

from .data import Bandit
from .objective import GroupObjective

IMPORTANCE_WEIGHTS = (0.8, 0.2)
ROBUST = 2
"""Which of the three is the group robust one."""


class Family(NamedTuple):
    """Three methods over one loss, and the paper's hyperparameters for it."""

    methods: tuple[str, str, str]
    loss_type: LossType
    beta: float
    lr: float | None
    """Step size of theta; None for the closed form."""
    group_lr: float
    iterations: int


DPO = Family(("DPO", "IS-DPO", "GR-DPO"), "sigmoid", 1.0, 0.9, 0.5, 10_000)
IPO = Family(("IPO", "IS-IPO", "GR-IPO"), "ipo", 0.1, None, 0.01, 100)
IPO_GRADIENT = Family(("IPO (gradient)", "IS-IPO (gradient)", "GR-IPO (gradient)"), "ipo", 0.1, 1.0, 0.01, 4_000)
"""The paper gives no step size here: 1 is a third of what the steepest direction bears."""


class History(NamedTuple):
    """What S seeds × 3 methods went through, at R of the iterations."""

    iterations: list[int]
    theta: torch.Tensor
    """(R, S, 3, 4) iterates."""
    average: torch.Tensor
    """(R, S, 3, 4) their running means, the start not included."""
    coefficients: torch.Tensor
    """(R, S, 3, G) c_g."""
    alpha: torch.Tensor
    """(R, S, G) the robust method's group weights."""


def record_points(iterations: int, points: int = 60) -> list[int]:
    """Iterations at which to look, evenly on a log scale, the last one among them."""
    return sorted({round(iterations ** (k / (points - 1))) for k in range(points)})


def group_coefficients(sizes: tuple[int, ...], seeds: int) -> torch.Tensor:
    """(S, 3, G) c_g of the three methods at the start."""
    share = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    importance = torch.tensor(IMPORTANCE_WEIGHTS, dtype=torch.float64) * share
    return torch.stack([share, importance, torch.full_like(share, 1 / len(sizes))]).repeat(seeds, 1, 1)


def train(bandit: Bandit, family: Family, iterations: int | None = None) -> History:
    """Run the three methods of a family on every seed."""
    iterations = family.iterations if iterations is None else iterations
    objective = GroupObjective(bandit.train, bandit.train_sizes, 3, family.loss_type, family.beta)
    closed_form = None if family.lr is not None else LeastSquares(bandit.train, bandit.train_sizes, family.beta)
    theta = bandit.theta0.unsqueeze(1).repeat(1, 3, 1)
    total = torch.zeros_like(theta)
    coefficients = group_coefficients(bandit.train_sizes, len(theta))
    log_alpha = coefficients[:, ROBUST].log()
    looks, kept = set(record_points(iterations)), []
    for iteration in range(1, iterations + 1):
        if closed_form is None:
            losses, gradients = objective.losses_and_gradients(theta)
        else:
            losses = objective.losses(theta)
        log_alpha = exponentiated_step(log_alpha, losses[:, ROBUST], family.group_lr)
        coefficients[:, ROBUST] = log_alpha.exp()
        if closed_form is None:
            theta = theta - family.lr * (coefficients.unsqueeze(-1) * gradients).sum(dim=2)
        else:
            theta = closed_form.minimise(coefficients)
        total += theta
        if iteration in looks:
            kept.append((theta, total / iteration, coefficients.clone(), log_alpha.exp()))
    return History(sorted(looks), *(torch.stack(values) for values in zip(*kept, strict=True)))


class LeastSquares:
    """The paper's closed form for IPO: ``theta = (1 / 2 beta) (S' W S)^-1 S' W 1``, solved, never inverted.

    Rows of S are feature differences, and W holds ``c_g / N_g`` for each pair of g.  Group by group, ``S' W S`` is
    ``sum_g c_g A_g`` with A_g the second moment of the group's rows, and ``S' W 1`` is ``sum_g c_g b_g`` with b_g their
    mean.
    """

    def __init__(self, differences: torch.Tensor, sizes: tuple[int, ...], beta: float) -> None:
        parts = differences.split(sizes, dim=1)
        self.moments = torch.stack([part.mT @ part / part.shape[1] for part in parts], dim=1)
        self.means = torch.stack([part.mean(dim=1) for part in parts], dim=1)
        self.scale = 1 / (2 * beta)

    def minimise(self, coefficients: torch.Tensor) -> torch.Tensor:
        """(S, M, G) c_g → (S, M, K) theta that minimises ``sum_g c_g L_g``."""
        moment = torch.einsum("smg,sgjk->smjk", coefficients, self.moments)
        mean = torch.einsum("smg,sgk->smk", coefficients, self.means)
        return self.scale * torch.linalg.solve(moment, mean)
