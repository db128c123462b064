"""The parts of the study as independent tasks over processes, one thread each, and the one record they add up to."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from .corrections import study_corrections
from .data import FEATURES, SCENARIOS, make_bandit
from .methods import DPO, IPO, IPO_GRADIENT, ROBUST, Family, History, train
from .metrics import evaluate, headlines, report
from .objective import GroupObjective
from .optimum import saddle_points
from .rate import horizons, study_rate

MAIN = ("swapped", "iii")
"""The case that the paper puts first, and the one the rate and the corrections are shown on."""


def run_cell(features: str, scenario: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    """The six methods on one kind of features in one scenario: the shape of ``--json``."""
    bandit = make_bandit(features, scenario, seeds)
    answer: dict[str, Any] = {}
    for family in (DPO, IPO):
        history = train(bandit, family)
        answer.update(_report(bandit, family, history.theta[-1], history.coefficients[-1]))
    return answer


def run_full_cell(features: str, scenario: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    """As :func:`run_cell`, with averaged iterates, curves, saddle points, and for swapped features IPO by gradient."""
    bandit = make_bandit(features, scenario, seeds)
    families = {"dpo": DPO, "ipo": IPO}
    if features == "swapped":
        families["ipo_gradient"] = IPO_GRADIENT
    final: dict[str, Any] = {}
    averaged: dict[str, Any] = {}
    answer: dict[str, Any] = {"final": final, "averaged": averaged, "curves": {}, "saddle": {}}
    for name, family in families.items():
        history = train(bandit, family)
        final.update(_report(bandit, family, history.theta[-1], history.coefficients[-1]))
        averaged.update(_report(bandit, family, history.average[-1], history.coefficients[-1]))
        if features == "swapped" and family is not IPO_GRADIENT:
            answer["curves"][name] = _curves(bandit, family, history)
            answer["saddle"][name] = _against_saddle(bandit, family, history)
    return answer


def _report(bandit, family: Family, theta: torch.Tensor, coefficients: torch.Tensor) -> dict[str, Any]:
    return report(bandit, family.methods, theta, coefficients, family.loss_type, family.beta)


def _curves(bandit, family: Family, history: History) -> dict[str, Any]:
    """Mean and standard deviation over seeds of the headlines and of alpha_0, at the iterations looked at."""
    worst = [headlines(evaluate(bandit, theta, family.loss_type, family.beta)) for theta in history.theta]
    stacked = {name: torch.stack([w[name] for w in worst]) for name in worst[0]}  # (R, S, 3)
    stacked["alpha0"] = history.alpha[:, :, :1]
    return {
        "iterations": history.iterations,
        "methods": family.methods,
        **{name: {"mean": v.mean(dim=1).tolist(), "std": _std(v).tolist()} for name, v in stacked.items()},
    }


def _std(values: torch.Tensor) -> torch.Tensor:
    return values.std(dim=1) if values.shape[1] > 1 else torch.zeros_like(values[:, 0])


def _against_saddle(bandit, family: Family, history: History) -> dict[str, Any]:
    """The robust method's training losses beside the saddle point's, seed by seed and over iterations."""
    saddle = saddle_points(bandit.train, bandit.train_sizes, family.loss_type, family.beta)
    value = saddle.group_losses.amax(dim=1)
    objective = GroupObjective(bandit.train, bandit.train_sizes, 1, family.loss_type, family.beta)
    losses = torch.stack([objective.losses(theta[:, ROBUST:])[:, 0] for theta in history.theta])  # (R, S, G)
    away = (losses - value.view(1, -1, 1)).abs().amax(dim=2)
    return {
        "iterations": history.iterations,
        "distance": {
            "median": away.median(dim=1).values.tolist(),
            "smallest": away.amin(dim=1).tolist(),
            "largest": away.amax(dim=1).tolist(),
        },
        "per_seed": {
            str(seed): {
                "alpha0": float(saddle.alpha0[s]),
                "minimax_train": float(value[s]),
                "reached_alpha0": float(history.alpha[-1, s, 0]),
                "reached": losses[-1, s].tolist(),
            }
            for s, seed in enumerate(bandit.seeds)
        },
    }


def _rate_task(seeds: tuple[int, ...]) -> dict[str, Any]:
    return study_rate(make_bandit(*MAIN, seeds), horizons())


def _corrections_task(seeds: tuple[int, ...]) -> dict[str, Any]:
    return study_corrections(make_bandit(*MAIN, seeds))


def run_study(seeds: tuple[int, ...], jobs: int) -> dict[str, Any]:
    """Everything, ``jobs`` tasks at a time; prints a line as each comes in."""
    started = time.perf_counter()
    tasks: list[tuple[str, Any, tuple]] = [("rate", _rate_task, (seeds,))]
    for features in FEATURES:
        for scenario in reversed(SCENARIOS):
            tasks.append((f"{features} {scenario}", run_full_cell, (features, scenario, seeds)))
    tasks.insert(4, ("corrections", _corrections_task, (seeds,)))
    cells: dict[str, Any] = {}
    # Spawned, not forked: a forked torch may inherit a lock of its thread pool.  Tasks go out longest first.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(call, *arguments): name for name, call, arguments in tasks}
        for future in as_completed(futures):
            cells[futures[future]] = future.result()
            print(f"{time.perf_counter() - started:6.1f} s  {futures[future]}", flush=True)
    answer: dict[str, Any] = {"seeds": list(seeds), "rate": cells.pop("rate"), "corrections": cells.pop("corrections")}
    answer["cells"] = {name: cells[name] for name in sorted(cells)}
    answer["seconds"] = time.perf_counter() - started
    return answer


def default_jobs() -> int:
    """Two, or one where there is one core."""
    return min(2, os.cpu_count() or 1)
