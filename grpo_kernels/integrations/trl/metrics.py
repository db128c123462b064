"""What is logged: by group, and of tokens what TRL's own head tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...trainer import GroupReport


class GroupTally:
    """Sums over pairs by group, until they are reported.

    Args:
        names: the groups, index = id.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self._sums = torch.zeros(4, len(self.names), dtype=torch.float64)

    def add(self, group_ids: torch.Tensor, losses: torch.Tensor, margins: torch.Tensor) -> None:
        """Pairs of the global batch, on the CPU.

        Args:
            group_ids: (B,) int64.
            losses: (B,) float64 losses without group weights.
            margins: (B,) float64 margins in nats.
        """
        values = torch.stack([losses, (margins > 0).double(), margins, torch.ones_like(losses)])
        self._sums.index_add_(1, group_ids, values)

    def report(self) -> GroupReport | None:
        """Means by group; None without a pair."""
        counts = self._sums[3]
        if not counts.any():
            return None
        loss, accuracy, margin = (self._sums[:3] / counts).tolist()
        return GroupReport(self.names, tuple(loss), tuple(accuracy), tuple(margin), tuple(counts.long().tolist()))


def report_metrics(report: GroupReport | None, max_groups: int) -> dict[str, float]:
    """``group_<name>/{loss,accuracy,margin,n}`` and ``worst_group/*``, the group of the highest mean loss.

    Args:
        report: what a tally came to; None for no metrics.
        max_groups: with more groups, only ``worst_group/*``.

    Returns:
        Numbers only, as loggers want them: ``worst_group/index`` is the position in ``group_weights.names``.  A group
        without pairs has ``n`` alone.
    """
    if report is None:
        return {}
    metrics: dict[str, float] = {}

    def put(prefix: str, i: int) -> None:
        if report.n[i]:
            values = {"loss": report.loss[i], "accuracy": report.accuracy[i], "margin": report.margin[i]}
            metrics.update({f"{prefix}/{name}": value for name, value in values.items()})
        metrics[f"{prefix}/n"] = report.n[i]

    if len(report.names) <= max_groups:
        for i, name in enumerate(report.names):
            put(f"group_{name}", i)
    put("worst_group", report.worst_index)
    metrics["worst_group/index"] = report.worst_index
    return metrics


def alpha_metrics(names: Sequence[str], weights: torch.Tensor, max_groups: int) -> dict[str, float]:
    """``alpha/<name>``, and ``alpha_effective_groups``: exp of alpha's entropy, G where it is uniform, 1 at a corner.

    Args:
        names: the groups.
        weights: (G,) float64 alpha in use.
        max_groups: with more groups, only the second.
    """
    weights = weights.cpu()
    metrics = {"alpha_effective_groups": float(torch.special.entr(weights).sum().exp())}
    if len(names) <= max_groups:
        metrics.update({f"alpha/{name}": weight for name, weight in zip(names, weights.tolist(), strict=True)})
    return metrics


def token_metrics(
    outputs: Any, completion_mask: torch.Tensor, gather: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, float]:
    """What ``DPOTrainer`` logs about tokens, under its names: entropy, mean logits, and accuracy on chosen replies.

    Args:
        outputs: of TRL's head, each field (2B, T-1) or with virtual tokens in front.
        completion_mask: (2B, T), 1 at tokens of replies.
        gather: (1, k) of every rank → (ranks, k).
    """
    mask = completion_mask[:, 1:]
    length = mask.shape[1]
    chosen, rejected = mask.bool().chunk(2)
    entropy, logits = outputs.entropy[:, -length:].detach(), outputs.mean_logits[:, -length:]
    chosen_logits, rejected_logits = logits.chunk(2)
    right = outputs.is_top1[:, -length:].chunk(2)[0] & chosen
    sums = torch.stack(
        [
            (entropy * mask).sum(), (chosen_logits * chosen).sum(), (rejected_logits * rejected).sum(), right.sum(),
            chosen.sum(), rejected.sum(),
        ]
    )  # fmt: skip
    total = gather(sums.float()[None]).sum(dim=0).tolist()
    n_chosen, n_rejected = max(total[4], 1.0), max(total[5], 1.0)
    return {
        "entropy": total[0] / max(total[4] + total[5], 1.0),
        "logits/chosen": total[1] / n_chosen,
        "logits/rejected": total[2] / n_rejected,
        "mean_token_accuracy": total[3] / n_chosen,
    }
