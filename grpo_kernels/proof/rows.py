"""Cases of the operations over the vocabulary, ``token_logps_fwd`` and ``token_logps_bwd``.

    logp_r = z[r, y_r] - logsumexp(z[r]),   dz[r, v] = c_r ((v == y_r) - exp(z[r, v] - lse_r))

Forward and backward are checked together, since backward takes what forward wrote.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..types import IGNORE_INDEX
from .budget import (
    SIGMAS,
    Mismatch,
    oracle,
    require,
    require_close,
    require_same,
    within_budget,
    within_relative_budget,
)
from .case import Case, with_threads
from .places import Place, layouts, make_rows, short

OPERATIONS = ("token_logps_fwd", "token_logps_bwd")

QUICK_VOCABULARIES = (31, 4096, 32000, 32001)
"""Short, even and aligned, long and aligned, long and odd: the block sizes of the tables, with edges and without."""


def cases(place: Place) -> Iterator[Case]:
    """Every case for one backend on one device."""

    def case(name: str, check, *arguments, quick: bool = True) -> Case:
        return Case(OPERATIONS, name, quick, lambda: check(place, *arguments))

    for dtype in place.dtypes:
        for vocabulary in vocabularies(place):
            quick = place.interpreted or vocabulary in QUICK_VOCABULARIES
            for sigma in SIGMAS:
                name = f"rows within budget, V={vocabulary}, sigma={sigma:g}, {short(dtype)}"
                yield case(name, check_rows, dtype, (2, 3, vocabulary), sigma, quick=quick)
        yield case(f"one row, {short(dtype)}", check_rows, dtype, (1, 1, place.wide), 3.0)
        for name, check in _BY_DTYPE.items():
            quick = check not in (check_beyond_the_cache, check_large_logits)
            yield case(f"{name}, {short(dtype)}", check, dtype, quick=quick)
        for vocabulary in (5, 130):
            name = f"NaN, infinities and equal logits as in PyTorch, V={vocabulary}, {short(dtype)}"
            yield case(name, check_special_rows, dtype, vocabulary, quick=vocabulary == 130)
    for name, check_once in _ONCE.items():
        yield case(name, check_once)
    for shape in ((0, 3, 5), (2, 0, 5), (0, 0, 5)):
        yield case(f"no rows, shape {shape}", check_no_rows, shape)


def vocabularies(place: Place) -> tuple[int, ...]:
    """Odd ones, powers of two, and large ones; small ones for the interpreter."""
    return (1, 2, 31, 257) if place.interpreted else (1, 2, 31, 1000, 4096, 32000, 32001, 151936)


# ---------------------------------------------------------------------------------------------- running a backend


def forward(place: Place, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logps and lse of a block of logits, into memory that was filled with NaN."""
    logps, lse = (torch.full((targets.numel(),), torch.nan, device=logits.device) for _ in range(2))
    place.module.token_logps_fwd(logits, targets, logps, lse, ignore_index=IGNORE_INDEX)
    return logps, lse


def backward(
    place: Place,
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    grads: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of the logits, into ``out`` or into memory that was filled with NaN."""
    out = torch.full_like(logits, torch.nan, memory_format=torch.contiguous_format) if out is None else out
    place.module.token_logps_bwd(logits, targets, lse, grads, out, ignore_index=IGNORE_INDEX)
    return out


# ---------------------------------------------------------------------------------------------- the checks


def check_against_oracle(place: Place, logits: torch.Tensor, targets: torch.Tensor, grads: torch.Tensor) -> None:
    """Forward, lse and backward of one block against float64, with plain float32 PyTorch as the budget.

    Half-precision logits are held to plain PyTorch *in float32*, rounded at the end, which is stricter than what
    PyTorch does in their own dtype.
    """
    exact_logps, exact_grads = oracle(logits, targets, grads)
    plain_logps, plain_grads = oracle(logits, targets, grads, torch.float32)
    labelled = (targets != IGNORE_INDEX).cpu()
    exact_lse = logits.double().logsumexp(-1).flatten().cpu()
    plain_lse = logits.cpu().float().logsumexp(-1).flatten()
    reach = max(logits.double().abs().max().item(), exact_lse.abs().max().item())

    logps, lse = (x.cpu() for x in forward(place, logits, targets))
    # A logp is z - max - log(sum) with a sum of 1 or more, whose last bit alone is EPSILON, however small the logp.
    within_budget("logps", logps, plain_logps, exact_logps, max(1.0, exact_logps.abs().max().item()))
    exact_lse_seen = exact_lse[labelled]
    within_budget("lse", lse[labelled], plain_lse[labelled], exact_lse_seen, exact_lse.abs().max().item())
    require(not logps[~labelled].any(), "the logp of an ignored row is not 0")

    gradient = backward(place, logits, targets, lse.to(logits.device), grads).cpu()
    rounded = plain_grads.to(logits.dtype)
    within_budget("gradient", gradient, rounded, exact_grads, grads.abs().max().item() * max(1.0, reach))
    is_target = torch.zeros_like(exact_grads, dtype=torch.bool).view(targets.numel(), -1)
    is_target[labelled, targets.cpu()[labelled]] = True
    is_target = is_target.view(gradient.shape)
    # The target entry has a case of its own: PyTorch's relative error there is no budget to keep.
    mine, theirs, truth = (x.masked_fill(is_target, 0) for x in (gradient, rounded, exact_grads))
    within_relative_budget("gradient", mine, theirs, truth, reach)
    require(not gradient.reshape(targets.numel(), -1)[~labelled].any(), "the gradient of an ignored row is not 0")


def check_rows(place: Place, dtype: torch.dtype, shape: tuple[int, int, int], sigma: float) -> None:
    check_against_oracle(place, *make_rows(place, dtype, shape, sigma))


def check_layouts(place: Place, dtype: torch.dtype) -> None:
    logits, targets, grads = make_rows(place, dtype, (3, 4, place.wide), 3.0)
    for name, view in layouts(logits).items():
        try:
            check_against_oracle(place, view, targets, grads)
        except Mismatch as error:
            raise Mismatch(f"logits {name}: {error}") from None


def check_layout_of_the_gradient(place: Place, dtype: torch.dtype) -> None:
    """The gradient may lie differently in memory from the logits; the bits are the same."""
    logits, targets, grads = make_rows(place, dtype, (3, 4, place.wide), 3.0)
    _, lse = forward(place, logits, targets)
    expected = backward(place, logits, targets, lse, grads)
    for out_name, out in layouts(torch.zeros_like(logits)).items():
        for name, view in layouts(logits).items():
            out.fill_(torch.nan)
            require_same(
                backward(place, view, targets, lse, grads, out), expected, f"logits {name}, gradient {out_name}"
            )


def check_neighbours(place: Place) -> None:
    """Memory around a view is neither read (NaN would spread) nor written."""
    logits, targets, grads = make_rows(place, place.dtypes[-1], (2, 3, 33), 3.0)
    buffer = logits.new_full((2, 5, 40), torch.nan)
    inner = buffer[:, 1:4, 5:38]
    inner.copy_(logits)
    logps, lse = forward(place, inner, targets)
    require(logps.isfinite().all(), "forward read outside the rows")
    backward(place, inner, targets, lse, grads, inner)
    require(inner.isfinite().all(), "backward read outside the rows")
    require(buffer.isnan().sum() == buffer.numel() - inner.numel(), "backward wrote outside the rows")


def check_expanded(place: Place) -> None:
    """One row for all sequences: a stride of 0, as an expanded tensor has."""
    logits, targets, grads = make_rows(place, torch.float32, (1, 3, 100), 3.0)
    check_against_oracle(place, logits.expand(4, 3, 100), targets.repeat(4), grads.repeat(4))


def check_large_logits(place: Place, dtype: torch.dtype) -> None:
    logits, targets, grads = make_rows(place, dtype, (2, 3, place.wide), 3.0)
    base = torch.tensor([1e4, -1e4, 0.0], device=logits.device).to(dtype).view(1, 3, 1)
    check_against_oracle(place, (logits.float() + base.float()).to(dtype), targets, grads)
    spread = torch.linspace(-1e4, 1e4, place.wide, device=logits.device).to(dtype).expand(2, 3, -1)
    for rows in (spread, spread.flip(-1)):
        check_against_oracle(place, rows.contiguous(), targets, grads)


def check_confident_target(place: Place, dtype: torch.dtype) -> None:
    """At p = 0.999 and beyond the entry 1 - p must not be rounded away, whatever the dtype of the logits."""
    vocabulary = place.wide
    logits = torch.zeros(1, 4, vocabulary, dtype=dtype, device=place.device)
    targets = torch.full((4,), 7, device=place.device)
    top = torch.tensor([4.0, 8.0, 12.0, 16.0], device=place.device) + 5
    logits[0, :, 7] = top.to(dtype)
    grads = torch.ones(4, device=place.device)
    _, lse = forward(place, logits, targets)
    got = backward(place, logits, targets, lse, grads)[0, :, 7].double().cpu()
    exact = -torch.expm1(torch.log_softmax(logits.double(), -1)[0, :, 7]).cpu()
    # lse is rounded to float32 at a size of 21, and that is all that separates the two before the last rounding.
    error = (got - exact).abs() - 21 * 2.0**-24
    require((error <= exact * torch.finfo(dtype).eps).all(), f"the target's entry is {got}, where {exact} is exact")


SPECIAL_ROWS = {
    "all -inf": lambda z: z.fill_(-torch.inf),
    "some -inf": lambda z: z[5:].fill_(-torch.inf),
    "all -inf but one": lambda z: (z.fill_(-torch.inf), z[3].fill_(2.0)),
    "-inf at the target": lambda z: z[3].fill_(-torch.inf),
    "+inf": lambda z: z[-1].fill_(torch.inf),
    "+inf at the target": lambda z: z[3].fill_(torch.inf),
    "+inf and -inf": lambda z: (z[0].fill_(torch.inf), z[1].fill_(-torch.inf)),
    "NaN first": lambda z: z[0].fill_(torch.nan),
    "NaN last": lambda z: z[-1].fill_(torch.nan),
    "NaN at the target": lambda z: z[3].fill_(torch.nan),
    "all NaN": lambda z: z.fill_(torch.nan),
    "all equal": lambda z: z.fill_(1.5),
    "lowest finite": lambda z: z.fill_(torch.finfo(z.dtype).min),
}


def check_special_rows(place: Place, dtype: torch.dtype, vocabulary: int) -> None:
    logits, _, _ = make_rows(place, dtype, (len(SPECIAL_ROWS), 1, vocabulary), 3.0)
    for row, spoil in zip(logits[:, 0], SPECIAL_ROWS.values(), strict=True):
        spoil(row)
    targets = torch.full((len(SPECIAL_ROWS),), 3, device=place.device)
    grads = torch.linspace(-1, 1, len(SPECIAL_ROWS), device=place.device)
    logps, lse = forward(place, logits, targets)
    gradient = backward(place, logits, targets, lse, grads).cpu().float()
    expected_logps, expected_gradient = oracle(logits, targets, grads, torch.float32)
    for i, name in enumerate(SPECIAL_ROWS):
        require_close(logps[i], expected_logps[i], f"logp of a row {name}", rtol=1.3e-6, atol=1e-5)
        if name == "lowest finite":
            continue  # lse in float32 has no room for log V beside 3e38, and logits are held to 1e4
        want = expected_gradient[i].to(dtype).float()
        require_close(gradient[i], want, f"gradient of a row {name}", rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def check_ignored_rows(place: Place, dtype: torch.dtype) -> None:
    """Ignored rows are not read: NaN in them, in their lse and in their gradients changes nothing."""
    logits, targets, grads = make_rows(place, dtype, (2, 5, place.wide), 3.0)
    ignored = targets == IGNORE_INDEX
    clean_logps, clean_lse = forward(place, logits, targets)
    clean_gradient = backward(place, logits, targets, clean_lse, grads)
    logits.view(10, -1)[ignored] = torch.nan
    grads[ignored] = torch.nan
    logps, lse = forward(place, logits, targets)
    lse[ignored] = torch.nan  # unspecified there, so nothing may depend on it
    gradient = backward(place, logits, targets, lse, grads)
    require_same(logps, clean_logps, "logps beside ignored rows of NaN")
    require_same(gradient, clean_gradient, "gradients beside ignored rows of NaN")
    require(not gradient.reshape(10, -1)[ignored].any(), "the gradient of an ignored row is not 0")


def check_labels_out_of_range(place: Place, dtype: torch.dtype) -> None:
    vocabulary = place.wide
    logits, _, grads = make_rows(place, dtype, (1, 7, vocabulary), 3.0)
    labels = [0, -1, vocabulary - 1, vocabulary, 2**62, -(2**62), IGNORE_INDEX]
    targets = torch.tensor(labels, device=place.device)
    bad = torch.tensor([not 0 <= y < vocabulary and y != IGNORE_INDEX for y in labels])
    logps, lse = forward(place, logits, targets)
    gradient = backward(place, logits, targets, lse, grads)[0].cpu()
    require(torch.equal(logps.isnan().cpu(), bad), f"NaN logps for the labels {labels}: {logps}")
    require(torch.equal(gradient.isnan().all(-1), bad), "rows of NaN gradient are not those of a label out of range")
    require(gradient[~bad].isfinite().all(), "the gradient of a good label is not finite")


def check_in_place(place: Place, dtype: torch.dtype) -> None:
    logits, targets, grads = make_rows(place, dtype, (3, 4, place.wide), 8.0)
    for name, view in layouts(logits).items():
        _, lse = forward(place, view, targets)
        expected = backward(place, view, targets, lse, grads)
        backward(place, view, targets, lse, grads, view)
        require_same(view, expected, f"in place and out of place, {name}")


def check_beyond_the_cache(place: Place, dtype: torch.dtype) -> None:
    """Large outputs may be written by other instructions (streaming stores), from any alignment."""
    if place.interpreted:
        return  # the interpreter has no cache to go past
    rows = 36 << 20 >> (3 if dtype is torch.float32 else 2)
    logits, targets, grads = make_rows(place, dtype, (1, rows // 32001, 32001), 3.0)
    _, lse = forward(place, logits, targets)
    out = torch.empty(logits.numel() + 1, dtype=dtype, device=place.device)[1:].view(logits.shape)
    backward(place, logits, targets, lse, grads, out)
    backward(place, logits, targets, lse, grads, logits)
    require_same(logits, out, "in place and out of place, beyond the cache")


def check_same_bits(place: Place, dtype: torch.dtype) -> None:
    """A second run gives the same bits, and so does any number of the CPU's threads."""
    logits, targets, grads = make_rows(place, dtype, (4, 16, place.wide), 8.0)
    labelled = targets != IGNORE_INDEX

    def run() -> list[torch.Tensor]:
        logps, lse = forward(place, logits, targets)
        return [logps, lse[labelled], backward(place, logits, targets, lse, grads)]

    first, *more = with_threads(run, (1, 4, 4, 3))
    for again in more:
        for a, b in zip(first, again, strict=True):
            require_same(b, a, "a second run, or another number of threads")


def check_no_rows(place: Place, shape: tuple[int, int, int]) -> None:
    logits = torch.empty(shape, device=place.device)
    targets = torch.empty(0, dtype=torch.int64, device=place.device)
    logps, lse = forward(place, logits, targets)
    require(logps.numel() == 0, "logps of no rows")
    backward(place, logits, targets, lse, logps)


_BY_DTYPE = {
    "strides and alignments of the logits": check_layouts,
    "strides and alignments of the gradient": check_layout_of_the_gradient,
    "large logits": check_large_logits,
    "confident target": check_confident_target,
    "ignored rows are not read": check_ignored_rows,
    "labels out of range are NaN": check_labels_out_of_range,
    "in place is out of place": check_in_place,
    "in place is out of place beyond the cache": check_beyond_the_cache,
    "same bits again": check_same_bits,
}
_ONCE = {"nothing outside the rows is touched": check_neighbours, "a stride of 0": check_expanded}
