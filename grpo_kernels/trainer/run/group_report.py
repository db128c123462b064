"""What an evaluation found, group by group, as files hold it and as a terminal shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .terminal import printable

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
