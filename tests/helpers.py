"""Batches of preference pairs for tests, and how far numbers may lie apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

IGNORE = -100

LOSSES = [
    ("sigmoid", 0.0),
    ("sigmoid", 0.1),
    ("robust", 0.0),
    ("robust", 0.2),
    ("hinge", 0.0),
    ("ipo", 0.0),
]
"""Every loss, with and without smoothing where it has any."""


@dataclass
class Batch:
    """2B sequences, the B chosen first; G groups, of which the last is absent when G > 1."""

    logits: torch.Tensor
    labels: torch.Tensor
    ref_logps: torch.Tensor
    group_ids: torch.Tensor
    weights: torch.Tensor
    pair_weights: torch.Tensor
    cu_seqlens: torch.Tensor | None

    def leaf(self) -> torch.Tensor:
        """The logits as a leaf of their own, requiring grad."""
        return self.logits.detach().clone().requires_grad_()

    def tail(self) -> tuple[torch.Tensor, ...]:
        """The positional arguments after the labels."""
        return self.ref_logps, self.group_ids, self.weights

    def to(self, dtype: torch.dtype) -> Batch:
        """The same batch with logits of another dtype."""
        return replace(self, logits=self.logits.to(dtype))


def make_batch(
    pairs: int = 4,
    length: int = 7,
    vocabulary: int = 13,
    groups: int = 3,
    *,
    packed: bool = False,
    dtype: torch.dtype = torch.float64,
    spread: float = 3.0,
    seed: int = 0,
) -> Batch:
    """A drawn batch: prompts, padding, words ignored within a reply, one sequence without a label.

    Packed sequences differ in length; where there are four or more, the second is empty.
    """
    rng = torch.Generator().manual_seed(seed)
    sequences = 2 * pairs
    if packed:
        lengths = torch.randint(1, length + 1, (sequences,), generator=rng)
        if sequences >= 4:
            lengths[1] = 0
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        shape: tuple[int, ...] = (int(lengths.sum()),)
    else:
        cu_seqlens, shape = None, (sequences, length)
    logits = spread * torch.randn(*shape, vocabulary, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, shape, generator=rng)
    labels[torch.rand(shape, generator=rng) < 0.25] = IGNORE
    if not packed and sequences >= 4:
        labels[0, : length // 2] = IGNORE  # a prompt
        labels[2, length // 2 :] = IGNORE  # padding
        labels[3] = IGNORE
    seen = max(groups - 1, 1)
    return Batch(
        logits=logits.to(dtype),
        labels=labels,
        ref_logps=-5 * torch.rand(sequences, generator=rng, dtype=torch.float64),
        group_ids=torch.randint(0, seen, (pairs,), generator=rng),
        weights=torch.rand(groups, generator=rng, dtype=torch.float64) + 0.5,
        pair_weights=torch.rand(pairs, generator=rng, dtype=torch.float64) + 0.5,
        cu_seqlens=cu_seqlens,
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-12, atol: float = 1e-13) -> None:
    """Same shape, and the same numbers to a few hundred roundings of float64 unless a test says why it needs more."""
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True, check_device=False
    )


def same_bits(first: Any, second: Any) -> bool:
    """Whether two tensors hold the same bits (NaN equal to NaN)."""
    return first.dtype == second.dtype and torch.equal(first.nan_to_num(nan=1e30), second.nan_to_num(nan=1e30))
