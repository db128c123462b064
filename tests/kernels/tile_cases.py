"""One tile of the head at a time, on any backend and device: what the matrix of test_linear_head.py leaves out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_cases import DTYPES, Place, case_id

from grpo_kernels.backends import choose, torch_ops_head


def cases_of(test: Callable) -> Callable[[Callable], Callable]:
    """The parametrisation of a test of test_linear_head.py, without its backends."""

    def decorate(function: Callable) -> Callable:
        for mark in test.pytestmark:
            if mark.args[0] != "backend":
                function = pytest.mark.parametrize(*mark.args, **mark.kwargs)(function)
        return function

    return decorate


def several_blocks(test: Callable) -> Callable:
    """Whole and partial blocks, with edges and without; ``wide`` is what a GPU's GEMM answers: float32 logits."""
    for mark in (
        pytest.mark.parametrize("wide", [False, True], ids=["one-dtype", "float32-tile"]),
        pytest.mark.parametrize("softcap", [0.0, 20.0]),
        pytest.mark.parametrize(("words", "first"), [(4500, 0), (4500, 1), (2056, 5), (7, 3), (1024, 0)]),
        pytest.mark.parametrize("dtype", DTYPES, ids=case_id),
    ):
        test = mark(test)
    return test


def check_tile(place: Place, dtype: torch.dtype, words: int, first: int, softcap: float, wide: bool) -> None:
    """Both operations on five rows that begin ``first`` elements into their memory, against float64."""
    rows, start, device = 5, 1000, place.device
    memory = torch.full((rows * (words + 1) + first,), torch.nan, dtype=torch.float32 if wide else dtype, device=device)
    logits = memory[first:].view(rows, words + 1)[:, :words]
    logits.copy_(3 * torch.randn(rows, words))
    bias = torch.randn(words).to(device) if softcap else None
    targets = torch.tensor([start, start + words - 1, start + words // 2, 3, start + min(5, words - 1)]).to(device)
    options = {"start": start, "softcap": softcap, "logit_scale": 0.75}
    initial = [
        x.to(device) for x in (torch.full((rows,), -2.0), torch.rand(rows), torch.zeros(rows), torch.zeros(rows))
    ]
    exact, plain = [x.double() for x in initial], [x.clone() for x in initial]
    exact_exps = torch.empty(rows, words, dtype=torch.float64, device=device)
    plain_exps = torch.empty(rows, words, dtype=dtype, device=device)
    for state, exps in ((exact, exact_exps), (plain, plain_exps)):
        z = logits.to(state[0].dtype)
        b = None if bias is None else bias.to(state[0].dtype)
        torch_ops_head.head_tile_fwd(z, b, targets, *state, exps, **options, shift=3)
    backend = choose(place.name, torch.device(device), dtype)
    state = [x.clone() for x in initial]
    space = torch.full((rows * (words + 1) + 1,), torch.nan, dtype=dtype, device=device)
    exps = space[1:].view(rows, words + 1)[:, :words]
    backend.head_tile_fwd(logits, bias, targets, *state, exps, **options, shift=3)
    # What float32 holds of z - top, which the exponential turns into a relative error; and a rounding to the dtype.
    exponentials = 2.0**-23 * (8 + 2 * logits.abs().max().item())
    half_step = torch.finfo(dtype).eps / 2 + exponentials
    names = ("top", "rest", "picked", "factor")
    for name, mine, theirs, truth in zip(names, state, plain, exact, strict=True):
        step = exponentials if name in ("rest", "factor") else 2.0**-21
        error, allowed = (mine - truth).abs(), (theirs - truth).abs().max() + step * truth.abs().max().clamp(min=1)
        assert (error <= allowed).all(), (name, error.max(), allowed)
    tiny = 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((exps - exact_exps).abs() <= half_step * exact_exps + tiny).all()
    assert torch.isnan(space[0])
    assert torch.isnan(space[1:].view(rows, -1)[:, -1]).all(), "written outside the rows"
    again, other_exps = [x.clone() for x in initial], torch.empty(rows, words, dtype=dtype, device=device)
    backend.head_tile_fwd(logits, bias, targets, *again, other_exps, **options, shift=3)
    assert all(torch.equal(a, b) for a, b in zip([*again, other_exps], [*state, exps], strict=True)), "other bits"

    scale, at_target = torch.randn(rows).to(device), torch.randn(rows).to(device)
    exact_grads = torch.empty(rows, words, dtype=torch.float64, device=device)
    wide_bias = None if bias is None else bias.double()
    vectors = [x.double() for x in (state[0], scale, at_target)]
    torch_ops_head.head_tile_bwd(logits.double(), wide_bias, targets, *vectors, exact_grads, **options)
    backend.head_tile_bwd(logits, bias, targets, state[0], scale, at_target, exps, **options)
    assert ((exps - exact_grads).abs() <= half_step * exact_grads.abs() + tiny).all()
    if wide:
        return
    before = logits.clone()
    backend.head_tile_bwd(logits, bias, targets, state[0], scale, at_target, logits, **options)
    assert torch.equal(logits, exps)
    assert torch.isnan(memory[first:].view(rows, -1)[:, -1]).all(), "written outside the rows"
    logits.copy_(before)
    backend.head_tile_fwd(logits, bias, targets, *(x.clone() for x in initial), logits, **options, shift=3)
    assert torch.equal(logits, other_exps)
