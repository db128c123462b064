"""The optional warm-up: maximum likelihood of the chosen replies, before the reference is frozen."""

from __future__ import annotations

import math

import torch

from .config import TrainConfig
from .data import PairDataset, PreferenceCollator
from .data.sampling import make_sampler
from .model.optim import NonFiniteError, Parameters, clip_gradients
from .model.policy import Policy
from .model.scoring import reply_logps
from .run.metrics import Metrics
from .run.progress import Progress

# The warm-up draws its own order: its batches should not be the first ones of training again.
_SEED = 1 << 32


def warm_up(
    policy: Policy,
    parameters: Parameters,
    dataset: PairDataset,
    collate: PreferenceCollator,
    config: TrainConfig,
    metrics: Metrics,
) -> None:
    """Train on the chosen replies: AdamW at a constant rate, on the mean over the batch's reply tokens.

    Args:
        policy: in training mode; changed in place.
        parameters: those trained, by name.
        dataset: the training pairs.
        collate: pairs → batch.
        config: ``supervised``, and the settings that it shares with training.
        metrics: gets lines of kind "supervised".

    Raises:
        NonFiniteError: the loss or its gradient is not finite.
    """
    settings, ranks = config.supervised, policy.ranks
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.lr)
    seed = config.seed + _SEED
    sampler = make_sampler("shuffle", dataset.group_ids, settings.batch_size, seed, ranks.rank, ranks.size)
    micro_batch_size = config.micro_batch_size or config.batch_size // ranks.size
    progress = Progress(settings.steps, label="warm-up", quiet=config.quiet)
    for step in range(1, settings.steps + 1):
        indices = sampler.batch(step - 1)
        whole = sampler.whole_batch(step - 1)
        tokens = sum(len(dataset[i].chosen_ids) for i in whole)
        total = torch.zeros((), device=ranks.device)
        for first in range(0, len(indices), micro_batch_size):
            chunk = indices[first : first + micro_batch_size]
            batch = collate([dataset[i] for i in chunk])
            # The chosen sequences come first; the rejected are not learnt from here.
            batch = {name: tensor[: len(chunk)].to(ranks.device) for name, tensor in batch.items()}
            with policy.accumulating(last=first + micro_batch_size >= len(indices)):
                logps = reply_logps(policy.trained, batch, config.loss, bf16=config.bf16)
                part = -logps.sum() / tokens
                (part * ranks.size).backward()  # gradients are averaged over ranks; this is a sum
            total += part.detach()
        loss = float(ranks.sum(total))
        norm = float(clip_gradients(parameters.values(), config.optim.max_grad_norm, ranks))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ranks.alike(
                NonFiniteError(
                    f"warm-up step {step}: loss {loss:g}, gradient norm {norm:g}; lower supervised.lr="
                    f"{settings.lr:g}, or look at the pairs of this step, from {dataset.where[whole[0]]} on"
                )
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % config.log_every == 0 or step == settings.steps:
            metrics.write({"kind": "supervised", "step": step, "loss": loss})
        progress.advance(f"loss {loss:.3f}")
    progress.close()
