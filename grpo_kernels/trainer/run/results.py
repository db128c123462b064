"""What a run leaves behind besides checkpoints: its configuration, the trained model, and a summary."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..config import TrainConfig
from ..data import PairDataset
from ..model.models import describe_model, no_progress_bars
from .directory import (
    CONFIG,
    SUMMARY,
    naming,
    remove,
    remove_at_once,
    sync_file,
    sync_folder,
    write_atomically,
    write_json,
)
from .group_report import GroupReport


def save_config(config: TrainConfig, folder: Path) -> None:
    """The configuration in full, as ``grpo-kernels train --config`` reads it back."""
    import yaml

    # What was asked of this one start is no property of the run.
    settings = asdict(config) | {"overwrite": False, "resume": False}
    settings["optim"]["betas"] = list(settings["optim"]["betas"])
    write_atomically(folder / CONFIG, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode())


def save_model(model: Any, tokenizer: Any, folder: Path, *, merge: bool) -> None:
    """A folder that ``transformers`` loads, model and tokenizer, there in full or not at all.

    Args:
        model: the policy, possibly with adapters.
        tokenizer: beside it.
        folder: replaced if it is there.
        merge: write adapters into the weights of a base that has no name to load it by.

    Raises:
        OSError: it cannot be written; names the folder.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with naming(folder):
        remove(temporary)
        try:
            if merge and hasattr(model, "merge_and_unload"):
                model = copy.deepcopy(model).merge_and_unload()
            with no_progress_bars():
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
            for file in temporary.iterdir():
                sync_file(file)
            sync_folder(temporary)
            remove_at_once(folder)
            os.rename(temporary, folder)
        finally:
            remove(temporary)
        sync_folder(folder.parent)


def write_summary(
    folder: Path,
    config: TrainConfig,
    model: Any,
    train_set: PairDataset,
    test_set: PairDataset | None,
    sampling_probs: Sequence[float],
    alpha: Mapping[str, float],
    report: GroupReport | None,
    average_report: GroupReport | None,
    *,
    seconds: float,
) -> dict[str, Any]:
    """Write summary.json and return what is in it."""
    sizes = train_set.group_sizes
    sets = {"train": train_set, "test": test_set}
    summary: dict[str, Any] = {
        "method": config.groups.method,
        "seed": config.seed,
        "steps": config.steps,
        "seconds": round(seconds, 1),
        "model": {"name": config.model.name, **describe_model(model)},
        "torch": torch.__version__,
        "train_groups": {
            name: {"n": sizes[name], "sampled": q, "alpha": alpha[name]}
            for name, q in zip(train_set.groups, sampling_probs, strict=True)
        },
        "dropped": {split: data.dropped for split, data in sets.items() if data is not None},
        "truncated": {split: data.truncated for split, data in sets.items() if data is not None},
    }
    if report is not None:
        shares = {name: sizes[name] / len(train_set) for name in train_set.groups}
        summary["test"] = report.to_dict()
        summary["test"]["mean_is_over"] = "all test pairs"
        summary["test"]["mean_loss_at_train_shares"] = report.mean("loss", shares)
    if average_report is not None:
        summary["test_of_average"] = average_report.to_dict()
    write_json(folder / SUMMARY, summary)
    return summary
