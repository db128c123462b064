"""The demo's runs: their configuration, and all of them, some at a time."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from grpo_kernels.trainer.config import (
    DataConfig,
    GroupsConfig,
    ModelConfig,
    OptimConfig,
    SupervisedConfig,
    TinyModelConfig,
    TrainConfig,
)
from grpo_kernels.trainer.loop import RunResult, train

from .forum import COMMUNITIES, Setting, write_seed

METHODS = {"dpo": "DPO", "is_dpo": "IS-DPO", "gr_dpo": "GR-DPO"}


def configuration(
    method: str, seed: int, out: Path, *, group_lr: float = 0.1, steps: int = 200, start: Path | None = None
) -> TrainConfig:
    """One run.  The methods differ in ``groups.method`` alone.

    The run without a ``start`` warms the embedded model up and leaves it in its folder ``start``; the others of the
    seed begin there, which is where their own warm-up would have brought them.
    """
    model = ModelConfig(name="tiny", tiny=TinyModelConfig(max_positions=32))
    return TrainConfig(
        run_dir=str(out / f"{method}-seed{seed}"),
        overwrite=True,
        quiet=True,
        seed=seed,
        steps=steps,
        batch_size=64,
        eval_every=max(50, steps // 4),
        log_every=5,
        reference_cache=str(out / "reference"),
        model=model if start is None else ModelConfig(name=str(start)),
        data=DataConfig(
            train=str(out / "data" / f"seed{seed}" / "train.jsonl"),
            test=str(out / "data" / f"seed{seed}" / "test.jsonl"),
            max_length=32,
            max_prompt_length=16,
        ),
        groups=GroupsConfig(method=method, group_lr=group_lr),  # type: ignore[arg-type]
        optim=OptimConfig(name="adamw", lr=2e-3, schedule="linear"),
        supervised=SupervisedConfig(steps=0 if start else 150, batch_size=64, lr=3e-3),
    )


def run_all(
    seeds: list[int],
    out: Path,
    jobs: int,
    methods: Iterable[str] = METHODS,
    *,
    setting: Setting = Setting(),  # noqa: B008 - frozen
    group_lr: float = 0.1,
    steps: int = 200,
) -> dict[str, list[dict[str, Any]]]:
    """Every method on every seed, some at a time; the outcomes in the order of the seeds."""
    for seed in seeds:
        write_seed(out / "data" / f"seed{seed}", seed, setting)
    first, *others = methods
    outcomes: dict[tuple[str, int], dict[str, Any]] = {}
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_start_worker) as pool:

        def submit(method: str, seed: int, start: Path | None = None) -> Future[tuple[dict[str, Any], float]]:
            return pool.submit(run_one, configuration(method, seed, out, group_lr=group_lr, steps=steps, start=start))

        running = {submit(first, seed): (first, seed) for seed in seeds}
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                method, seed = running.pop(future)
                outcome, seconds = future.result()
                outcomes[method, seed] = outcome
                print(
                    f"  seed {seed}  {METHODS[method]:<7} {seconds:5.1f} s   worst group "
                    f"{outcome['worst_group']:<10} loss {outcome['worst_group_loss']:.3f}",
                    flush=True,
                )
                if method == first:
                    start = out / f"{first}-seed{seed}" / "start"
                    running |= {submit(other, seed, start): (other, seed) for other in others}
    return {method: [outcomes[method, seed] for seed in seeds] for method in methods}


def _start_worker() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # a model this small gains nothing from a second thread; a second run does


def run_one(config: TrainConfig) -> tuple[dict[str, Any], float]:
    """One run, in a process of its own; and the seconds it took."""
    began = time.monotonic()
    return outcome_of(train(config)), time.monotonic() - began


def outcome_of(result: RunResult) -> dict[str, Any]:
    """A run's row of the summary: the worst group, and the mean over the population the training pairs come from."""
    report = result.report
    if report is None:
        raise ValueError(f"{result.run_dir} has no held-out evaluation")
    shares = {name: float(c.train_pairs) for name, c in COMMUNITIES.items()}
    plain = report.to_dict()
    return {
        "worst_group": plain["worst_group"],
        "worst_group_loss": plain["worst_group_loss"],
        "worst_group_accuracy": plain["worst_group_accuracy"],
        "mean_loss": report.mean("loss", shares),
        "mean_accuracy": report.mean("accuracy", shares),
        "groups": plain["groups"],
        "group_weights": result.group_weights,
    }
