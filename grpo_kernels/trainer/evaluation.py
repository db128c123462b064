"""Held-out evaluation, group by group: loss, reward accuracy, margin and n; the worst group, and the mean beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .config import LossConfig
from .model.distributed import ALONE, Ranks, reshard
from .model.scoring import group_loss, reply_logps
from .run.terminal import printable

_WIDEST_NAME = 40


@dataclass(frozen=True)
class GroupReport:
    """What an evaluation found; a group without pairs has n = 0 and NaN elsewhere, and is never the worst.

    ``worst_group`` is the group with the highest mean loss, which is what the method bounds.  ``mean_loss`` and
    ``mean_accuracy`` are means over all evaluated pairs: a group counts by its share of *that* set.
    """

    names: tuple[str, ...]
    loss: tuple[float, ...]
    """Mean loss of the group's pairs, group weights left out."""
    accuracy: tuple[float, ...]
    """Share of the group's pairs whose margin is positive."""
    margin: tuple[float, ...]
    """Mean margin in nats, without beta."""
    n: tuple[int, ...]

    @property
    def worst_index(self) -> int:
        """Index of the group with the highest loss among those that have pairs."""
        present = [i for i, count in enumerate(self.n) if count]
        # NaN compares false with everything and would hide: a group that cannot be scored is the worst there is.
        return max(present, key=lambda i: math.inf if math.isnan(self.loss[i]) else self.loss[i])

    @property
    def worst_group(self) -> str:
        """Name of the group with the highest loss."""
        return self.names[self.worst_index]

    @property
    def worst_group_loss(self) -> float:
        """The highest group loss."""
        return self.loss[self.worst_index]

    @property
    def worst_group_accuracy(self) -> float:
        """The lowest group accuracy, whichever group has it."""
        return min(self.accuracy[i] for i, count in enumerate(self.n) if count)

    @property
    def mean_loss(self) -> float:
        """Mean loss over all evaluated pairs."""
        return self._mean(self.loss, self.n)

    @property
    def mean_accuracy(self) -> float:
        """Reward accuracy over all evaluated pairs."""
        return self._mean(self.accuracy, self.n)

    def mean(self, field: str, shares: Mapping[str, float]) -> float:
        """Mean of a field with groups counted by given shares, those of the training set say.

        Args:
            field: "loss", "accuracy" or "margin".
            shares: non-negative number for every group by name; need not sum to 1.

        Returns:
            The weighted mean over the groups that have pairs.

        Raises:
            ValueError: an unknown field, or a group without a share.
        """
        if field not in ("loss", "accuracy", "margin"):
            raise ValueError(f"field must be 'loss', 'accuracy' or 'margin', got {field!r}")
        missing = [name for name in self.names if name not in shares]
        if missing:
            raise ValueError(f"shares must name every group, nothing came for {missing}")
        return self._mean(getattr(self, field), [shares[name] for name in self.names])

    def _mean(self, values: Sequence[float], weights: Sequence[float]) -> float:
        present = [i for i, count in enumerate(self.n) if count]
        return sum(values[i] * weights[i] for i in present) / sum(weights[i] for i in present)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, as summary.json and metrics.jsonl hold them; None where a group has no pairs."""

        def number(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "worst_group": self.worst_group,
            "worst_group_loss": number(self.worst_group_loss),
            "worst_group_accuracy": number(self.worst_group_accuracy),
            "mean_loss": number(self.mean_loss),
            "mean_accuracy": number(self.mean_accuracy),
            "groups": {
                name: {
                    "loss": number(self.loss[i]),
                    "accuracy": number(self.accuracy[i]),
                    "margin": number(self.margin[i]),
                    "n": self.n[i],
                }
                for i, name in enumerate(self.names)
            },
        }

    def table(self, group_weights: Mapping[str, float] | None = None) -> str:
        """The report as aligned text, the worst group marked.

        Args:
            group_weights: alpha by group name, for a column of its own; None for no such column.
        """
        head = ["group", "n", "loss", "accuracy", "margin"] + (["alpha"] if group_weights else [])
        rows = [head]
        for i, name in enumerate(self.names):
            if self.n[i]:
                numbers = [f"{self.loss[i]:.4f}", f"{self.accuracy[i]:.3f}", f"{self.margin[i]:+.2f}"]
            else:
                numbers = ["-", "-", "-"]
            alpha = [f"{group_weights[name]:.3f}"] if group_weights else []
            rows.append([printable(name, _WIDEST_NAME), str(self.n[i]), *numbers, *alpha])
        margin = self._mean(self.margin, self.n)
        rows.append(
            ["all pairs", str(sum(self.n)), f"{self.mean_loss:.4f}", f"{self.mean_accuracy:.3f}", f"{margin:+.2f}"]
            + ([""] if group_weights else [])
        )
        widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
        lines = []
        for k, row in enumerate(rows):
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            cells[0] = row[0].ljust(widths[0])
            mark = "  <- worst" if k == self.worst_index + 1 else ""
            lines.append("  ".join(cells).rstrip() + mark)
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def batches_by_length(dataset: Any, batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of pairs of similar length, longest first: least padding, and memory shows at once."""

    def length(i: int) -> int:
        pair = dataset.pairs[i]
        return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))

    order = sorted(range(len(dataset.pairs)), key=lambda i: (-length(i), i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """No gradients, no dropout, and afterwards the mode that was: nothing here draws a random number."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        reshard(model)


def pair_logps(
    model: torch.nn.Module,
    dataset: Any,
    collate: Callable[[list[Any]], Mapping[str, torch.Tensor]],
    *,
    loss: LossConfig,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    ranks: Ranks = ALONE,
) -> torch.Tensor:
    """Summed log-probabilities of every reply of a data set, without gradients.

    Args:
        model: causal language model, on ``device``.
        dataset: a :class:`~.data.PairDataset` of N pairs.
        collate: pairs → batch, a :class:`~.data.PreferenceCollator`.
        loss: of it only the backend, and whether the head is fused.
        batch_size: pairs in one forward pass.
        device: where the batch goes.
        bf16: autocast the forward pass.
        ranks: that share the work, batch by batch; all must call.

    Returns:
        (N, 2) float32 on the CPU, chosen and rejected, in nats.
    """
    device = torch.device(device)
    logps = torch.zeros(len(dataset.pairs), 2)
    with frozen(model):
        for indices, ours in ranks.deal(list(batches_by_length(dataset, batch_size))):
            batch = collate([dataset.pairs[i] for i in indices])
            sums = reply_logps(model, {name: tensor.to(device) for name, tensor in batch.items()}, loss, bf16=bf16)
            if ours:
                logps[indices] = sums.view(2, -1).t().float().cpu()
    return ranks.sum(logps)  # zeros where another rank was


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
