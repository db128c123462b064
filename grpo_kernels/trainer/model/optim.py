"""The step on the policy: optimizer, schedule, clipping, projection on a ball, and the average of the iterates."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ..config import OptimConfig
from .distributed import ALONE, Ranks, is_sharded, local_part

Parameters = dict[str, torch.nn.Parameter]


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; the message names the step, the pairs and the groups at fault."""


def trained_parameters(model: torch.nn.Module) -> Parameters:
    """What the optimizer moves, by name; a tensor shared by two modules (tied embeddings) appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(parameters: Parameters, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW, SGD or RMSprop over named parameters; weight decay falls on matrices, not on biases and norms.

    Args:
        parameters: name → parameter.
        config: which optimizer, and its settings.

    Raises:
        ValueError: nothing to train, or an unknown name.
    """
    if not parameters:
        raise ValueError("model must have at least one parameter that requires grad, got none")
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if params
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    if config.name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.lr, momentum=config.momentum, eps=config.eps)
    raise ValueError(f"optim.name must be adamw, sgd or rmsprop, got {config.name!r}")


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of one step: a function of the step alone, so that resuming has nothing to restore.

    Args:
        step: 0 for the first step.
        steps: steps of the whole run; the decay would reach 0 at this step.
        config: peak rate, warm-up and schedule.
    """
    warmup = config.lr_warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(steps - warmup, 1)
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """One rate for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = value


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float, ranks: Ranks = ALONE) -> torch.Tensor:
    """Scale gradients down to a total L2 norm of at most ``max_norm`` (0: leave them), and return the norm they had.

    Sharded gradients count in full; all ranks must ask, and all get the same norm.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = ranks.whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


class BallProjection:
    """Projection of all trained parameters together on an L2 ball, about their start or about the origin.

    Args:
        parameters: name → parameter.
        radius: of the ball, in the norm of all parameters as one vector; > 0.
        center: name → tensor; None for the origin.
        ranks: over which the parameters may be sharded; all must call.
    """

    def __init__(
        self,
        parameters: Parameters,
        radius: float,
        center: dict[str, torch.Tensor] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.parameters, self.radius, self.center, self.ranks = parameters, radius, center, ranks

    @torch.no_grad()
    def __call__(self) -> float:
        """Project in place; parameters inside the ball keep their bits.

        Returns:
            The distance from the center before projecting.
        """
        squares = [local_part(self._offset(name, p)).double().square().sum() for name, p in self.parameters.items()]
        square = torch.stack(squares).sum()
        if any(is_sharded(p) for p in self.parameters.values()):
            square = self.ranks.sum(square)
        distance = float(square.sqrt())
        if distance > self.radius:
            for name, p in self.parameters.items():
                offset = self._offset(name, p) * (self.radius / distance)
                p.copy_(offset if self.center is None else self.center[name] + offset)
        return distance

    def _offset(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        return parameter if self.center is None else parameter - self.center[name]


class IterateAverage:
    """The plain mean of all iterates so far, in float32 or wider: what the O(T^-1/2) guarantee speaks of.

    Args:
        parameters: name → parameter.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.count = 0
        self.mean = {name: torch.zeros_like(p, dtype=_wide(p.dtype)) for name, p in parameters.items()}
        self._kept: dict[str, torch.Tensor] | None = None

    @torch.no_grad()
    def update(self) -> None:
        """Take in the current iterate."""
        self.count += 1
        for name, p in self.parameters.items():
            self.mean[name].lerp_(p.to(self.mean[name].dtype), 1 / self.count)

    @torch.no_grad()
    def __enter__(self) -> IterateAverage:
        """Within the block the model holds the average."""
        self._kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.copy_(self.mean[name])
        return self

    @torch.no_grad()
    def __exit__(self, *exc: object) -> None:
        kept, self._kept = self._kept, None
        for name, p in self.parameters.items():
            p.copy_((kept or {})[name])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
