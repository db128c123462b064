"""What the paper reports about a parameter vector: group losses, and how much reward its best action forgoes."""

from __future__ import annotations

import math
from typing import Any

import torch

from grpo_kernels import LossType

from .data import Bandit
from .objective import GroupObjective

HEADLINES = ("max_val_group_loss", "max_reward_err", "max_train_group_loss")


def evaluate(bandit: Bandit, theta: torch.Tensor, loss_type: LossType, beta: float) -> dict[str, torch.Tensor]:
    """(S, M, 4) parameters → (S, M, G) validation and training group losses and relative reward errors.

    The reward error of a group is ``(best - got) / best``: best is the mean over the test states of the highest
    reward, got that of the action the policy likes most.
    """
    num_vectors = theta.shape[1]
    sets = {
        "train_group_loss": (bandit.train, bandit.train_sizes),
        "val_group_loss": (bandit.validation, bandit.validation_sizes),
    }
    found = {
        name: GroupObjective(differences, sizes, num_vectors, loss_type, beta).losses(theta)
        for name, (differences, sizes) in sets.items()
    }
    scores = torch.einsum("sgnyk,smk->smgny", bandit.test_features, theta)
    rewards = bandit.test_rewards.unsqueeze(1).expand_as(scores)
    got = rewards.gather(-1, scores.argmax(dim=-1, keepdim=True)).squeeze(-1).mean(dim=-1)
    best = bandit.test_rewards.amax(dim=-1).mean(dim=-1).unsqueeze(1)
    return {**found, "reward_err": (best - got) / best}


def headlines(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The worst group's numbers, named as the reference file names them: each (S, M)."""
    sources = ("val_group_loss", "reward_err", "train_group_loss")
    return {name: found[source].amax(dim=-1) for name, source in zip(HEADLINES, sources, strict=True)}


def mean_and_sem(values: torch.Tensor) -> dict[str, float]:
    """Mean over seeds, and its standard error (n - 1 under the root); 0 where there is one seed only."""
    sem = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "sem": sem}


def report(
    bandit: Bandit,
    methods: tuple[str, ...],
    theta: torch.Tensor,
    weights: torch.Tensor,
    loss_type: LossType,
    beta: float,
) -> dict[str, Any]:
    """Means, standard errors and the numbers of every seed, method by method, ready for JSON."""
    found = evaluate(bandit, theta, loss_type, beta)
    worst = headlines(found)
    answer: dict[str, Any] = {}
    for m, method in enumerate(methods):
        answer[method] = {name: mean_and_sem(values[:, m]) for name, values in worst.items()}
        answer[method]["per_seed"] = {
            str(seed): {
                **{name: float(values[s, m]) for name, values in worst.items()},
                **{name: values[s, m].tolist() for name, values in found.items()},
                "theta": theta[s, m].tolist(),
                "group_coefficients": weights[s, m].tolist(),
            }
            for s, seed in enumerate(bandit.seeds)
        }
    return answer
