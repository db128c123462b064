"""A candidate is right before it is timed: within the budget of the proof, at the shape that is tuned.

Each of these raises ``Mismatch``.  They run while ``tuned.using`` makes all look-ups give the candidate.  Those of the
kernels are few, because each alignment and each absent argument is one more compilation for every candidate.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from ..backends import torch_ops
from ..proof import Mismatch, Place, rows, tail, tiles, whole
from ..proof.budget import require, require_same
from ..proof.places import layouts, make_rows

__all__ = ["Mismatch", "Place", "backend", "head", "head_tile", "rows_of_logits", "tail_kernel"]


def rows_of_logits(place: Place, dtype: torch.dtype, vocabulary: int) -> None:
    """Forward and backward over aligned rows and others, in place too, and the same bits again."""
    logits, targets, grads = make_rows(place, dtype, (2, 3, vocabulary), 3.0)
    for name, view in layouts(logits).items():
        if name not in ("contiguous", "unaligned"):
            continue
        rows.check_against_oracle(place, view, targets, grads)
        logps, lse = rows.forward(place, view, targets)
        require_same(rows.forward(place, view, targets)[0], logps, "logps of a second run")
        gradient = rows.backward(place, view, targets, lse, grads)
        rows.backward(place, view, targets, lse, grads, view)
        require_same(view, gradient, f"gradient in place and out of place, {name}")


def tail_kernel(place: Place, length: int) -> None:
    """Sequences of this length in a few groups, against float64, and the same bits again."""
    pairs, groups, options = 9, 3, cast("dict[str, Any]", tail.PLAIN)
    generator = torch.Generator().manual_seed(length)
    count = 2 * pairs * length
    bounds = torch.arange(0, count + 1, length, dtype=torch.int32)
    targets = torch.randint(0, 1000, (count,), generator=generator)
    logps = -6 * torch.rand(count, generator=generator)
    ref_logps = -3.0 * length + torch.randn(2 * pairs, generator=generator, dtype=torch.float64)
    group_ids = torch.randint(0, groups, (pairs,), generator=generator)
    want = tail.tail_oracle(logps, targets, bounds, ref_logps, group_ids, None, groups, **options)
    got, again = (
        tail.run_tail(place, logps, targets, None, ref_logps, group_ids, None, groups, **options) for _ in range(2)
    )
    tail.require_tail(got, want, torch.float32)
    for name, value in again.items():
        require_same(value, got[name], f"{name} of a second run")


def head_tile(place: Place, dtype: torch.dtype, words: int, wide: bool) -> None:
    """Both tile operations on tiles of this width, aligned and not, against float64, and the same bits again."""
    count, generator, device = 5, torch.Generator().manual_seed(words), place.device
    drawn = 3 * torch.randn(count, words, generator=generator)
    targets = torch.tensor([0, words - 1, words // 2, words, -1], device=device)
    scale, at_target = (torch.randn(count, generator=generator).to(device) for _ in range(2))
    options: dict[str, Any] = {"start": 0, "softcap": 0.0, "logit_scale": 0.75}
    for first in (0, 1):
        space = torch.empty(count * words + first, dtype=torch.float32 if wide else dtype, device=device)
        logits = space[first:].view(count, words).copy_(drawn)
        top, rest, picked, factor = (x.double() for x in _state(count, device))
        exps, grads = (torch.empty(count, words, dtype=torch.float64, device=device) for _ in range(2))
        torch_ops.head_tile_fwd(logits.double(), None, targets, top, rest, picked, factor, exps, **options, shift=3)
        # Backward is held to float64 given the top that it is told, which is rounded.
        told, s, a = (x.double() for x in (top.float(), scale, at_target))
        torch_ops.head_tile_bwd(logits.double(), None, targets, told, s, a, grads, **options)
        vectors = top.float(), scale, at_target
        runs = [_run_tile(place, logits, targets, vectors, dtype, options) for _ in range(2)]
        for mine, again in zip(*runs, strict=True):
            require_same(again, mine, "a second run")
        *state, our_exps, our_grads = (x.double() for x in runs[0])
        step = 2.0**-22 * (8 + 2 * logits.abs().max().item())
        exact = {"top": top, "rest": rest, "picked": picked, "factor": factor}
        for (name, truth), mine in zip(exact.items(), state, strict=True):
            require(((mine - truth).abs() <= step * truth.abs().clamp(min=1)).all(), f"{name} outside the budget")
        half_step = torch.finfo(dtype).eps / 2 + step
        tiny = 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        for name, mine, truth in (("exponentials", our_exps, exps), ("gradients", our_grads, grads)):
            require(((mine - truth).abs() <= half_step * truth.abs() + tiny).all(), f"{name} outside the budget")


def _run_tile(
    place: Place,
    logits: torch.Tensor,
    targets: torch.Tensor,
    vectors: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
    options: dict[str, Any],
) -> list[torch.Tensor]:
    """Top, rest, picked, factor, exponentials and gradients of one tile."""
    state = _state(targets.numel(), place.device)
    exps, grads = (torch.full_like(logits, torch.nan, dtype=dtype) for _ in range(2))
    place.module.head_tile_fwd(logits, None, targets, *state, exps, **options, shift=3)
    place.module.head_tile_bwd(logits, None, targets, *vectors, grads, **options)
    return [*state, exps, grads]


def _state(count: int, device: str) -> list[torch.Tensor]:
    """Top, rest, picked and factor as they may come in."""
    return [torch.full((count,), value, device=device) for value in (-2.0, 0.5, 0.0, 0.0)]


HEAD_ROWS, HEAD_WIDTH = 40, 64
LABELLED_ROWS = HEAD_ROWS - len(range(0, HEAD_ROWS, 5))
"""As ``whole.check_head`` leaves them: what an entry for its shape is found by."""


def head(place: Place, dtype: torch.dtype, vocabulary: int) -> None:
    """The whole head over this vocabulary: trained with every tile kept and with none, and frozen."""
    shape = HEAD_ROWS, HEAD_WIDTH, vocabulary
    for frozen, budget in ((False, 10**12), (False, 0), (True, 0)):
        whole.check_head(place, dtype, frozen=frozen, budget=budget, shape=shape)


def backend(place: Place, dtype: torch.dtype) -> None:
    """A backend as a whole, over a small vocabulary."""
    rows.check_rows(place, dtype, (2, 3, place.wide), 3.0)
    rows.check_in_place(place, dtype)
    tail.check_losses(place, torch.float32, "sigmoid", False, True, False)
    tail.check_same_bits(place)
    tiles.check_tile(place, dtype, 1024, 0, capped=False, biased=False, wide=False)
    whole.check_head(place, dtype, frozen=False, budget=0)
