"""Exact minima over theta and saddle points of the min-max problem, to the last digits: what the runs are held against.

    f(theta, alpha) = sum_g alpha_g L_g(theta),   saddle: min over theta, max over alpha on the simplex

Nothing here goes through the package, so that agreement means something.  The sigmoid loss is minimised by Newton's
method with a line search, the squared one in closed form; all problems of a call are solved together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .methods import LeastSquares


class GroupMeans:
    """L_g, gradient and Hessian of the sigmoid loss for P problems, one theta each.

    Args:
        differences: (P, N, K) feature differences, pairs standing group by group.
        sizes: (G,) pairs of each group.
        beta: of the loss.
    """

    def __init__(self, differences: torch.Tensor, sizes: tuple[int, ...], beta: float) -> None:
        self.differences, self.sizes, self.beta = differences, sizes, beta
        counts = torch.tensor(sizes)
        self._groups = torch.arange(len(sizes)).repeat_interleave(counts)
        self._per_pair = (1 / counts.double())[self._groups]

    def losses(self, theta: torch.Tensor) -> torch.Tensor:
        """(P, K) → (P, G)."""
        values = F.softplus(-self.beta * self._margins(theta))
        return torch.stack([part.mean(dim=1) for part in values.split(self.sizes, dim=1)], dim=1)

    def derivatives(self, theta: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient (P, K) and Hessian (P, K, K) of ``sum_g alpha_g L_g``."""
        lose = torch.sigmoid(-self.beta * self._margins(theta))
        weights = alpha[:, self._groups] * self._per_pair
        gradient = torch.einsum("pn,pnk->pk", -self.beta * weights * lose, self.differences)
        scaled = (self.beta**2 * weights * lose * (1 - lose)).unsqueeze(-1) * self.differences
        return gradient, scaled.mT @ self.differences

    def _margins(self, theta: torch.Tensor) -> torch.Tensor:
        return torch.einsum("pnk,pk->pn", self.differences, theta)


def minimise(
    means: GroupMeans, alpha: torch.Tensor, start: torch.Tensor, ridge: torch.Tensor | None = None, steps: int = 60
) -> torch.Tensor:
    """(P, K) the minimum over theta of ``sum_g alpha_g L_g(theta) + ridge |theta|^2 / 2``, by Newton's method.

    Args:
        means: the problems.
        alpha: (P, G) weights of the groups.
        start: (P, K) where to begin.
        ridge: (P,) non-negative; None for zeros.
        steps: at most so many; stops where no gradient is above 1e-13.
    """
    ridge = torch.zeros(len(start), dtype=start.dtype) if ridge is None else ridge
    identity = torch.eye(start.shape[1], dtype=start.dtype)

    def value(theta: torch.Tensor) -> torch.Tensor:
        return (alpha * means.losses(theta)).sum(dim=1) + ridge * theta.square().sum(dim=1) / 2

    theta = start
    for _ in range(steps):
        gradient, hessian = means.derivatives(theta, alpha)
        gradient = gradient + ridge.unsqueeze(1) * theta
        if float(gradient.abs().amax()) < 1e-13:
            break
        hessian = hessian + (ridge + 1e-14).view(-1, 1, 1) * identity
        direction = -torch.linalg.solve(hessian, gradient)
        slope, before, length = (gradient * direction).sum(dim=1), value(theta), torch.ones(len(theta)).double()
        for _ in range(30):  # halve until it descends; rounding is forgiven, or the last steps would be refused
            short = value(theta + length.unsqueeze(1) * direction) > before + 1e-4 * length * slope + 1e-15
            if not bool(short.any()):
                break
            length = torch.where(short, length / 2, length)
        theta = theta + length.unsqueeze(1) * direction
    return theta


def minimise_in_ball(means: GroupMeans, alpha: torch.Tensor, radius: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The minimum of ``sum_g alpha_g L_g(theta)`` over ``|theta| <= radius``: theta (P, K), and its certificate (P,).

    The multiplier of the ball is found by bisection on its logarithm.  The certificate is the Frank-Wolfe gap,
    ``<grad, theta> + radius |grad|``, which bounds what is left for a convex f from above.
    """
    theta = torch.zeros(len(alpha), means.differences.shape[2], dtype=torch.float64)
    low, high = torch.full((len(alpha),), -40.0).double(), torch.full((len(alpha),), 5.0).double()
    for _ in range(60):
        middle = (low + high) / 2
        theta = minimise(means, alpha, theta, ridge=middle.exp())
        outside = theta.norm(dim=1) > radius
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    theta = theta * (radius / theta.norm(dim=1)).clamp(max=1).unsqueeze(1)
    gradient, _ = means.derivatives(theta, alpha)
    return theta, (gradient * theta).sum(dim=1) + radius * gradient.norm(dim=1)


class Saddle(NamedTuple):
    """Saddle points of S seeds: alpha_0 (S,), theta (S, K), group losses there (S, G)."""

    alpha0: torch.Tensor
    theta: torch.Tensor
    group_losses: torch.Tensor


def saddle_points(differences: torch.Tensor, sizes: tuple[int, int], loss_type: str, beta: float) -> Saddle:
    """Bisection on alpha_0: at the best theta, ``L_0 - L_1`` is the slope of a concave function of alpha_0.

    Where one group stays worse even with nearly all the weight, alpha_0 ends near 0 or 1, and the losses differ.
    """
    means = GroupMeans(differences, sizes, beta)
    squares = LeastSquares(differences, sizes, beta) if loss_type == "ipo" else None
    num_sets, num_features = len(differences), differences.shape[2]
    theta = torch.zeros(num_sets, num_features, dtype=torch.float64)
    low, high = torch.full((num_sets,), 1e-3).double(), torch.full((num_sets,), 1 - 1e-3).double()
    for _ in range(52):
        alpha0 = (low + high) / 2
        alpha = torch.stack([alpha0, 1 - alpha0], dim=1)
        if squares is None:
            theta = minimise(means, alpha, theta)
            losses = means.losses(theta)
        else:
            theta = squares.minimise(alpha.unsqueeze(1)).squeeze(1)
            gaps = torch.einsum("pnk,pk->pn", differences, theta) - 1 / (2 * beta)
            losses = torch.stack([part.square().mean(dim=1) for part in gaps.split(sizes, dim=1)], dim=1)
        rises = losses[:, 0] > losses[:, 1]
        low, high = torch.where(rises, alpha0, low), torch.where(rises, high, alpha0)
    return Saddle(alpha0, theta, losses)
