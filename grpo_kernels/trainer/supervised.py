"""The optional warm-up: maximum likelihood of the chosen replies, before the reference is frozen."""

from __future__ import annotations

import math
from typing import Any

import torch

from .config import TrainConfig
from .data import PairDataset, PreferenceCollator
from .metrics import Metrics
from .optim import NonFiniteError, Parameters, clip_gradients
from .progress import Progress
from .sampling import make_sampler
from .scoring import reply_logps

# The warm-up draws its own order: its batches should not be the first ones of training again.
_SEED = 1 << 32


def warm_up(
    model: Any,
    parameters: Parameters,
    dataset: PairDataset,
    collate: PreferenceCollator,
    config: TrainConfig,
    metrics: Metrics,
) -> None:
    """Train on the chosen replies: AdamW at a constant rate, on the mean over the batch's reply tokens.

    Args:
        model: the policy, in training mode; changed in place.
        parameters: those trained, by name.
        dataset: the training pairs.
        collate: pairs → batch.
        config: ``supervised``, and the settings that it shares with training.
        metrics: gets lines of kind "supervised".

    Raises:
        NonFiniteError: the loss or its gradient is not finite.
    """
    settings, device = config.supervised, next(iter(parameters.values())).device
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.lr)
    sampler = make_sampler("shuffle", dataset.group_ids, settings.batch_size, config.seed + _SEED)
    micro_batch_size = config.micro_batch_size or config.batch_size
    progress = Progress(settings.steps, label="warm-up", quiet=config.quiet)
    for step in range(1, settings.steps + 1):
        indices = sampler.batch(step - 1)
        tokens = sum(len(dataset[i].chosen_ids) for i in indices)
        loss = 0.0
        for first in range(0, len(indices), micro_batch_size):
            chunk = indices[first : first + micro_batch_size]
            # The chosen sequences come first; the rejected are not learnt from here.
            batch = {name: tensor[: len(chunk)].to(device) for name, tensor in collate(_pairs(dataset, chunk)).items()}
            logps = reply_logps(model, batch, config.loss, bf16=config.bf16)
            part = -logps.sum() / tokens
            part.backward()
            loss += float(part.detach())
        norm = float(clip_gradients(parameters.values(), config.optim.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(
                f"warm-up step {step}: loss {loss:g}, gradient norm {norm:g}; lower supervised.lr={settings.lr:g}, or "
                f"look at the pairs of this step, from {dataset.where[indices[0]]} on"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % config.log_every == 0 or step == settings.steps:
            metrics.write({"kind": "supervised", "step": step, "loss": loss})
        progress.advance(f"loss {loss:.3f}")
    progress.close()


def _pairs(dataset: PairDataset, indices: list[int]) -> list[Any]:
    return [dataset[i] for i in indices]
