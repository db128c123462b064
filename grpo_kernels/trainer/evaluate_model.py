"""Evaluation of what is on disk already: the result of a run, or any causal language model, on pairs in groups."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .config import DataConfig, LossConfig, ModelConfig, check_data, check_loss
from .data import PreferenceCollator, read_pairs, tokenize_pairs
from .evaluation import evaluate
from .inputs import try_backend
from .model.distributed import usable_device
from .model.models import check_positions, load_policy, no_progress_bars
from .model.scoring import pair_logps
from .run.directory import CONFIG, FINAL, FINAL_AVERAGE, START, SUMMARY
from .run.group_report import GroupReport
from .setting_types import check_types


@dataclass
class EvalConfig:
    """One evaluation."""

    reference: str | None = None
    """The reference model, a folder or a hub name; None: margins are plain differences of log-probability."""
    average: bool = False
    """Of a run, evaluate the averaged iterate instead of the last."""
    batch_size: int = 32
    """Pairs in one forward pass."""
    bf16: bool = False
    """Autocast the forward pass to bfloat16."""
    device: str = "auto"
    json: bool = False
    """Print the result as JSON."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)


def is_run(target: str | Path) -> bool:
    """Whether a path is the folder of a run, not of a model."""
    return (Path(target) / CONFIG).is_file()


def defaults_for(target: str, average: bool = False) -> dict[str, Any]:
    """Settings to start from, by dotted name: those of the run, or just the model's name.

    Args:
        target: folder of a run, folder of a model, or hub name.
        average: of a run, the averaged iterate.

    Raises:
        ValueError: a run that is not finished or has no averaged iterate, or a configuration that cannot be read.
    """
    if not is_run(target):
        return {"model.name": target}
    import yaml

    folder = Path(target)
    try:
        run = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        settings = {"model": run["model"], "data": run["data"], "loss": run["loss"]}
        flat = {f"{section}.{key}": value for section, entries in settings.items() for key, value in entries.items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG} is not the configuration of a run: {error!r}") from error
    model = folder / (FINAL_AVERAGE if average else FINAL)
    if not model.is_dir():
        what = "no averaged iterate" if average else "not finished: there is no trained model"
        raise ValueError(f"run {folder} has {what} in {model}")
    start = folder / START
    flat["reference"] = str(start) if start.is_dir() else flat["model.name"]
    flat["model.name"] = str(model)
    flat["bf16"] = run.get("bf16", False)
    flat["batch_size"] = run.get("micro_batch_size") or run.get("batch_size", 32)
    # Adapters, if any, are in the folder; the embedded model's shape and a hub revision are in it as well.  Whether
    # code of a model may run is asked anew: a folder must not be able to answer it for itself.
    not_taken = ("lora", "tiny", "revision", "gradient_checkpointing", "trust_remote_code")
    for name in (f"model.{setting}" for setting in not_taken):
        flat.pop(name, None)
    return flat


def groups_of(target: str) -> list[str] | None:
    """The groups a run was trained with, None for what is no run: then the data names them."""
    path = Path(target) / SUMMARY
    if not is_run(target) or not path.is_file():
        return None
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["train_groups"].keys())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not the summary of a run: {error!r}") from error


def evaluate_model(config: EvalConfig, groups: list[str] | None = None) -> GroupReport:
    """Load a model, and its reference where one is named, and evaluate it on ``data.test``.

    Args:
        config: model, data, loss.
        groups: names known from training; a pair of another is an error.  None takes them from the pairs.

    Returns:
        GroupReport.

    Raises:
        ValueError: settings or data, naming them; a reference whose tokens are not the model's.
    """
    check_types(config)
    check_loss(config.loss)
    check_data(config.data)
    if not config.data.test:
        raise ValueError("data.test must name the pairs to evaluate on, got ''")
    if config.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {config.batch_size}")
    device = usable_device(config.device)
    try_backend(config.loss, device)
    pairs = read_pairs(config.data.test, config.data, split=config.data.test_split)
    with no_progress_bars():
        model, tokenizer = load_policy(replace(config.model, lora=None, gradient_checkpointing=False))
    check_positions(model, config.data.max_length)
    dataset = tokenize_pairs(pairs, tokenizer, config.data, groups=groups)
    collate = PreferenceCollator(tokenizer.pad_token_id)
    ref_logps = None
    if config.reference is not None:
        named = replace(config.model, name=config.reference, revision=None, lora=None, gradient_checkpointing=False)
        with no_progress_bars():
            reference, its_tokenizer = load_policy(named)
        if its_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"reference {config.reference!r} must have the tokens of model.name={config.model.name!r}, "
                "its vocabulary is another"
            )
        ref_logps = pair_logps(
            reference.to(device), dataset, collate, loss=config.loss, batch_size=config.batch_size, device=device,
            bf16=config.bf16,
        )  # fmt: skip
        del reference
    return evaluate(
        model.to(device), dataset, ref_logps, config.loss, collate,
        batch_size=config.batch_size, device=device, bf16=config.bf16,
    )  # fmt: skip
