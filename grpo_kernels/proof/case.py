"""What a case is: one check of one backend on one device, of the operations that it names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

Result = TypeVar("Result")


class Case(NamedTuple):
    """One check."""

    operations: tuple[str, ...]
    """Of the boundary, those that it runs; ``WHOLE`` for what goes through the public functions."""
    name: str
    quick: bool
    """Whether it belongs to the proof on a user's device, which should take a minute."""
    run: Callable[[], None]
    """Raises ``budget.Mismatch``."""


WHOLE = ("whole",)


def with_threads(run: Callable[[], Result], counts: Sequence[int]) -> list[Result]:
    """``run()`` once for each number of the CPU's threads; on a GPU that is merely once for each."""
    before = torch.get_num_threads()
    results = []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results
