"""Cases of the tile operations of the LM head, ``head_tile_fwd`` and ``head_tile_bwd``.

z = softcap tanh(logit_scale (x + b) / softcap),   e[v] = exp(z[v] - top),   g[v] = scale e[v] d[v]
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..backends import torch_ops
from .budget import require, require_same
from .case import Case
from .places import Place, short

OPERATIONS = ("head_tile_fwd", "head_tile_bwd")

ROWS, START = 5, 1000
TILES = ((4500, 0), (4500, 1), (2056, 5), (7, 3), (1024, 0))
"""(words, elements before the first row): whole and partial blocks, with edges and without."""
SOFTCAPS = (0.0, 20.0)


def cases(place: Place) -> Iterator[Case]:
    """Every case for one backend on one device."""
    for dtype, (words, first), capped, biased, wide in itertools.product(
        place.dtypes, TILES, (False, True), (False, True), (False, True)
    ):
        if wide and dtype is torch.float32:
            continue
        if place.interpreted and capped != biased:
            continue  # slow, and a GPU's own run has them
        if wide and place.device == "cpu" and not place.interpreted:
            continue  # a CPU's GEMM answers in the dtype of its operands
        name = f"{words} words from element {first}, {short(dtype)}"
        for holds, text in ((capped, "softcap"), (biased, "bias"), (wide, "float32 GEMM output")):
            name += f", {text}" if holds else ""
        # Each alignment, bias, softcap and dtype is one more compilation, which lengthens the proof.
        if dtype is torch.bfloat16:
            quick = capped == biased and (words, first) in ((4500, 1), (1024, 0))
        else:
            quick = capped == biased and (words, first) == (4500, 1) and wide == (dtype is torch.float16)
        quick = quick or (place.device == "cpu" and capped == biased)
        check = partial(check_tile, place, dtype, words, first, capped=capped, biased=biased, wide=wide)
        yield Case(OPERATIONS, name, quick, check)


def check_tile(
    place: Place, dtype: torch.dtype, words: int, first: int, *, capped: bool, biased: bool, wide: bool
) -> None:
    """Both operations on five rows that begin ``first`` elements into their memory, against float64.

    Args:
        place: the backend and its device.
        dtype: of the exponentials and gradients, which go into GEMMs.
        words: of the tile.
        first: elements before the first row.
        capped: with a softcap.
        biased: with a bias.
        wide: logits in float32, as a GPU's GEMM gives them.
    """
    exactly: Any = torch_ops
    device, generator = place.device, torch.Generator().manual_seed(words + first)
    memory = torch.full((ROWS * (words + 1) + first,), torch.nan, dtype=torch.float32 if wide else dtype, device=device)
    logits = memory[first:].view(ROWS, words + 1)[:, :words]
    logits.copy_(3 * torch.randn(ROWS, words, generator=generator))
    bias = torch.randn(words, generator=generator).to(device) if biased else None
    targets = torch.tensor([START, START + words - 1, START + words // 2, 3, START + min(5, words - 1)]).to(device)
    options = {"start": START, "softcap": 20.0 if capped else 0.0, "logit_scale": 0.75}
    drawn = torch.rand(ROWS, generator=generator)
    initial = [x.to(device) for x in (torch.full((ROWS,), -2.0), drawn, torch.zeros(ROWS), torch.zeros(ROWS))]
    exact, plain = [x.double() for x in initial], [x.clone() for x in initial]
    exact_exps = torch.empty(ROWS, words, dtype=torch.float64, device=device)
    plain_exps = torch.empty(ROWS, words, dtype=dtype, device=device)
    for state, exps in ((exact, exact_exps), (plain, plain_exps)):
        z = logits.to(state[0].dtype)
        b = None if bias is None else bias.to(state[0].dtype)
        exactly.head_tile_fwd(z, b, targets, *state, exps, **options, shift=3)

    module = place.module
    state = [x.clone() for x in initial]
    space = torch.full((ROWS * (words + 1) + 1,), torch.nan, dtype=dtype, device=device)
    exps = space[1:].view(ROWS, words + 1)[:, :words]
    module.head_tile_fwd(logits, bias, targets, *state, exps, **options, shift=3)
    # What float32 holds of z - top, which the exponential turns into a relative error; and a rounding to the dtype.
    exponentials = 2.0**-23 * (8 + 2 * logits.abs().max().item())
    half_step = torch.finfo(dtype).eps / 2 + exponentials
    for name, mine, theirs, truth in zip(("top", "rest", "picked", "factor"), state, plain, exact, strict=True):
        step = exponentials if name in ("rest", "factor") else 2.0**-21
        error, allowed = (mine - truth).abs(), (theirs - truth).abs().max() + step * truth.abs().max().clamp(min=1)
        require((error <= allowed).all(), f"{name}: error {error.max().item():.3e}, allowed {allowed.item():.3e}")
    tiny = 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    require(((exps - exact_exps).abs() <= half_step * exact_exps.abs() + tiny).all(), "exponentials outside the budget")
    require(torch.isnan(space[0]), "written in front of the rows")
    require(torch.isnan(space[1:].view(ROWS, -1)[:, -1]).all(), "written outside the rows")
    again, other_exps = [x.clone() for x in initial], torch.empty(ROWS, words, dtype=dtype, device=device)
    module.head_tile_fwd(logits, bias, targets, *again, other_exps, **options, shift=3)
    for a, b in zip([*again, other_exps], [*state, exps], strict=True):
        require_same(a, b, "forward, a second run with another output")
    without = [x.clone() for x in initial]
    module.head_tile_fwd(logits, bias, targets, *without, None, **options, shift=0)
    for a, b in zip(without, state, strict=True):
        require_same(a, b, "forward without exponentials")

    scale, at_target = (torch.randn(ROWS, generator=generator).to(device) for _ in range(2))
    exact_grads = torch.empty(ROWS, words, dtype=torch.float64, device=device)
    wide_bias = None if bias is None else bias.double()
    vectors = [x.double() for x in (state[0], scale, at_target)]
    exactly.head_tile_bwd(logits.double(), wide_bias, targets, *vectors, exact_grads, **options)
    module.head_tile_bwd(logits, bias, targets, state[0], scale, at_target, exps, **options)
    require(((exps - exact_grads).abs() <= half_step * exact_grads.abs() + tiny).all(), "gradients outside the budget")
    if wide:
        return
    before = logits.clone()
    module.head_tile_bwd(logits, bias, targets, state[0], scale, at_target, logits, **options)
    require_same(logits, exps, "backward, in place and out of place")
    require(torch.isnan(memory[first:].view(ROWS, -1)[:, -1]).all(), "backward wrote outside the rows")
    logits.copy_(before)
    module.head_tile_fwd(logits, bias, targets, *(x.clone() for x in initial), logits, **options, shift=3)
    require_same(logits, other_exps, "forward, in place and out of place")
