"""What a tuning run found: one result for each operation, and the times of whole steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .shapes import Shape
from .sweep import Candidate

TABLE, TUNED, PLAIN = "table", "tuned", "plain PyTorch"
PATHS = {"logits": "loss from logits", "head": "head step"}


@dataclass
class Result:
    """One operation: all its candidates, and which of them was taken."""

    operation: str
    path: str
    """Of ``PATHS``, the step that it is part of."""
    backend: str
    shape: str
    candidates: list[Candidate]
    chosen: Candidate | None
    """None where no candidate was right."""

    @property
    def table(self) -> Candidate:
        return self.candidates[0]

    @property
    def changed(self) -> bool:
        return self.chosen is not None and self.chosen is not self.table


@dataclass
class Report:
    """Everything that a tuning run found."""

    shape: Shape
    results: list[Result] = field(default_factory=list)
    times: dict[str, list[Candidate]] = field(default_factory=dict)
    """By path, the backends' candidates: parameters ``backend`` and ``entries``."""
    order: tuple[str, ...] = ()
    path: Path | None = None
    stopped: bool = False
    """Whether time ran out before every candidate was tried, and the fastest compared with the table's entry."""


def text_of(parameters: Mapping[str, Any]) -> str:
    """``block_v 2048, num_warps 8``."""
    return ", ".join(f"{name} {value}" for name, value in parameters.items())
