"""Held-out evaluation: a model's loss and margin on every pair of a set, and their means group by group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .config import LossConfig
from .model.distributed import ALONE, Ranks
from .model.scoring import batches_by_length, frozen, group_loss
from .run.group_report import GroupReport


def evaluate(
    model: torch.nn.Module,
    dataset: Any,
    ref_logps: torch.Tensor | None,
    loss: LossConfig,
    collate: Callable[[list[Any]], Mapping[str, torch.Tensor]],
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    ranks: Ranks = ALONE,
) -> GroupReport:
    """Evaluate a model on pairs in groups.

    Args:
        model: causal language model, on ``device``; its mode and the random streams are left as they were.
        dataset: a :class:`~.data.PairDataset` of N pairs.
        ref_logps: (N, 2) float32, the reference's log-probabilities, chosen and rejected; None for zeros.
        loss: the loss of one pair.
        collate: pairs → batch, a :class:`~.data.PreferenceCollator`.
        batch_size: pairs in one forward pass.
        device: where batches go.
        bf16: autocast the forward pass.
        ranks: that share the work, batch by batch; all must call, and all get the report.

    Returns:
        GroupReport.

    Raises:
        ValueError: no pairs, or ``ref_logps`` of another shape.
    """
    device = torch.device(device)
    num_pairs, num_groups = len(dataset.pairs), len(dataset.groups)
    if not num_pairs:
        raise ValueError("dataset must hold at least one pair to be evaluated, got none")
    if ref_logps is not None and ref_logps.shape != (num_pairs, 2):
        raise ValueError(f"ref_logps must have shape ({num_pairs}, 2), got {tuple(ref_logps.shape)}")
    scores = torch.zeros(2, num_pairs, dtype=torch.float64)
    even = torch.ones(num_groups, device=device)
    with frozen(model):
        for indices, ours in ranks.deal(list(batches_by_length(dataset, batch_size))):
            batch = collate([dataset.pairs[i] for i in indices])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            reference = None if ref_logps is None else ref_logps[indices].t().reshape(-1).to(device)
            out = group_loss(model, batch, reference, even, loss, bf16=bf16)
            if ours:
                scores[:, indices] = torch.stack([out.losses, out.margins]).double().cpu()
    losses, margins = ranks.sum(scores)  # zeros where another rank was
    group_ids = torch.tensor([pair.group_id for pair in dataset.pairs])
    counts = torch.bincount(group_ids, minlength=num_groups)

    def means(values: torch.Tensor) -> tuple[float, ...]:
        sums = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, group_ids, values.double())
        return tuple((sums / counts).tolist())

    return GroupReport(
        names=tuple(str(name) for name in dataset.groups),
        loss=means(losses),
        accuracy=means(margins > 0),
        margin=means(margins),
        n=tuple(counts.tolist()),
    )
