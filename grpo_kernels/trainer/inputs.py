"""What a run starts from: pairs, model, sampler and group weights, read and checked before anything is written."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import GroupWeights, UnavailableBackendError, preference_loss
from .config import LossConfig, TrainConfig
from .data import PairDataset, pair_texts, read_pairs, tokenize_pairs
from .data.sampling import GroupSampler, make_sampler
from .model.distributed import Ranks
from .model.models import check_positions, load_policy, no_progress_bars
from .run.directory import refuse_existing


@dataclass
class Inputs:
    """What a run is made from, whole and the same on every rank, before anything is written."""

    model: Any
    tokenizer: Any
    train_set: PairDataset
    test_set: PairDataset | None
    sampler: GroupSampler
    group_weights: GroupWeights


def read_inputs(config: TrainConfig, ranks: Ranks) -> Inputs:
    """Read and check all of it; writes nothing.

    Args:
        config: already checked by itself.
        ranks: of the run; each reads for itself.

    Raises:
        ValueError, TypeError: configuration or data, with the setting or the file, line and field.
        ImportError: a package that the model needs is not installed.
    """
    ranks.require_divisible("batch_size", config.batch_size)
    if config.supervised.steps:
        ranks.require_divisible("supervised.batch_size", config.supervised.batch_size)
    if ranks.first:
        refuse_existing(Path(config.run_dir), overwrite=config.overwrite, resume=config.resume)
        if config.reference_cache and Path(config.reference_cache).is_file():
            raise ValueError(f"reference_cache must be a folder, {config.reference_cache} is a file")
    try_backend(config.loss, ranks.device)
    train_pairs = read_pairs(config.data.train, config.data, split=config.data.train_split)
    test_pairs = read_pairs(config.data.test, config.data, split=config.data.test_split) if config.data.test else []
    with no_progress_bars() if config.quiet else nullcontext():
        model, tokenizer = load_policy(config.model, train_texts=pair_texts(train_pairs), seed=config.seed)
    check_positions(model, config.data.max_length)
    train_set = tokenize_pairs(train_pairs, tokenizer, config.data)
    test_set = tokenize_pairs(test_pairs, tokenizer, config.data, groups=train_set.groups) if test_pairs else None
    sampler = make_sampler(config.sampling, train_set.group_ids, config.batch_size, config.seed, ranks.rank, ranks.size)
    group_weights = make_group_weights(config, train_set.group_sizes, sampler.sampling_probs)
    return Inputs(model, tokenizer, train_set, test_set, sampler, group_weights)


def try_backend(loss: LossConfig, device: torch.device) -> None:
    """Let a backend that is not here, or not for this device, say so now and not at the first step."""
    try:
        preference_loss(
            torch.zeros(2, device=device),
            torch.zeros(2, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.ones(1, device=device),
            beta=loss.beta,
            loss_type=loss.type,
            backend=loss.backend,
        )
    except (ValueError, UnavailableBackendError) as error:
        raise type(error)(f"loss.backend={loss.backend!r} cannot be used: {error}") from error


def make_group_weights(config: TrainConfig, group_sizes: dict[str, int], sampling_probs: list[float]) -> GroupWeights:
    """The group weights of a method: fixed at N_g/N, fixed at 1/G, or moving."""
    groups = config.groups
    if groups.method == "dpo":
        return GroupWeights.proportional(group_sizes, sampling_probs=sampling_probs)
    if groups.method == "is_dpo":
        return GroupWeights.balanced(group_sizes, sampling_probs=sampling_probs)
    return GroupWeights.robust(
        group_sizes,
        groups.group_lr,
        estimator=groups.estimator,
        prior=groups.prior,
        mixing=groups.mixing,
        size_adjustment=groups.size_adjustment,
        sampling_probs=sampling_probs,
    )
