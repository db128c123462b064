"""Cases of ``preference_tail`` and ``robust_loss``: token log-probabilities to losses, slopes and group sums.

m = (logpi_w - ref_w) - (logpi_l - ref_l),   l = f(beta m),   s = dl/dm,   group sums of l,   (1/B) sum_i w_i l_i
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from ..types import IGNORE_INDEX, LOSS_TYPES, SMOOTHED_LOSS_TYPES
from .budget import EPSILON, require, require_close, require_same
from .case import Case, with_threads
from .places import Place, short

OPERATIONS = ("preference_tail", "robust_loss")
TAIL, ROBUST = OPERATIONS[:1], OPERATIONS[1:]

PLAIN: dict[str, Any] = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "length_normalize": False}
DTYPES = (torch.float32, torch.float64)
GROUPS = ((1, 1), (2, 1), (33, 1), (64, 7), (300, 2), (5, 10000), (300, 10000))
"""(pairs, groups)"""


def cases(place: Place) -> Iterator[Case]:
    """Every case for one backend on one device."""
    for loss_type, normalize, dtype, ref, weights in itertools.product(
        LOSS_TYPES, (False, True), DTYPES, (False, True), (False, True)
    ):
        name = f"{loss_type}, {'mean' if normalize else 'sum'} of tokens, {short(dtype)}"
        name += f"{', reference' if ref else ''}{', pair weights' if weights else ''}"
        # Each absent argument is one more compilation, which lengthens the proof.
        usual, plain = ref and not weights, loss_type == "sigmoid" and not normalize
        quick = dtype is torch.float32 and (usual or plain)
        yield Case(TAIL, name, quick, partial(check_losses, place, dtype, loss_type, normalize, ref, weights))
    for pairs, groups in GROUPS:
        quick = (pairs, groups) in ((1, 1), (64, 7), (5, 10000))
        if not (place.interpreted and pairs > 100):
            yield Case(TAIL, f"{pairs} pairs in {groups} groups", quick, partial(check_groups, place, pairs, groups))
    for loss_type in LOSS_TYPES:
        yield Case(TAIL, f"extreme margins, {loss_type}", False, partial(check_extremes, place, loss_type))
    for name, check, quick in (
        ("equal lengths need no boundaries", check_equal_lengths, True),
        ("lengths are read where there are no targets", check_given_lengths, True),
        ("lengths that are not needed may be absent", check_no_lengths, True),
        ("boundaries outside the rows are held inside", check_boundaries, False),
        ("long sequences are rounded once", check_long, True),
        ("pairs outside every group are NaN and not summed", check_unknown_groups, True),
        ("no pairs", check_no_pairs, True),
        ("same bits again", check_same_bits, True),
    ):
        yield Case(TAIL, name, quick, partial(check, place))
    for (pairs, groups), dtype in itertools.product(((1, 1), (7, 3), (300, 2), (1300, 10000)), DTYPES):
        quick = dtype is torch.float32 and pairs in (7, 1300)
        name = f"weighted mean of {pairs} pairs in {groups} groups, {short(dtype)}"
        yield Case(ROBUST, name, quick, partial(check_weighted_mean, place, dtype, pairs, groups))
    yield Case(ROBUST, "pairs outside every group are NaN", True, partial(check_mean_of_unknown_groups, place))
    yield Case(ROBUST, "no pairs", True, partial(check_mean_of_no_pairs, place))


# ---------------------------------------------------------------------------------------------- inputs, runs, the truth


class Pairs(NamedTuple):
    """What the tail is called with, in that order."""

    token_logps: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    ref_logps: torch.Tensor
    group_ids: torch.Tensor
    pair_weights: torch.Tensor


def make_pairs(pairs: int, groups: int, dtype: torch.dtype, *, length: int = 23, seed: int = 0) -> Pairs:
    """Sequences of different lengths, one of them empty, some tokens ignored."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, length, (2 * pairs,), generator=generator)
    if pairs > 1:
        counts[1] = 0
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    rows = int(cu_seqlens[-1])
    targets = torch.randint(0, 1000, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < 0.3] = IGNORE_INDEX
    token_logps = -6 * torch.rand(rows, generator=generator, dtype=torch.float64)
    token_logps[targets == IGNORE_INDEX] = 0
    ref_logps = -3 * counts.double() + torch.randn(2 * pairs, generator=generator, dtype=torch.float64)
    group_ids = torch.randint(0, groups, (pairs,), generator=generator)
    weights = torch.rand(pairs, generator=generator, dtype=torch.float64)
    return Pairs(token_logps.to(dtype), targets, cu_seqlens, ref_logps, group_ids, weights)


def tail_oracle(
    token_logps: torch.Tensor, targets: torch.Tensor, cu_seqlens: torch.Tensor, ref_logps: torch.Tensor | None,
    group_ids: torch.Tensor, pair_weights: torch.Tensor | None, groups: int,
    *, loss_type: str, beta: float, label_smoothing: float, length_normalize: bool,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Everything the tail writes, in float64 from the sums on, one pair at a time; slopes by autograd."""
    bounds, pairs = cu_seqlens.tolist(), group_ids.numel()
    spans = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    # The sum is rounded once, to the dtype of the tokens, as the boundary has it.
    logps = torch.stack([token_logps[span].double().sum() for span in spans]).to(token_logps.dtype).double()
    lengths = torch.tensor([float((targets[span] != IGNORE_INDEX).sum()) for span in spans], dtype=torch.float64)
    ratios = logps - ref_logps if ref_logps is not None else logps
    if length_normalize:
        ratios = ratios / lengths.clamp(min=1)
    margins = (ratios[:pairs] - ratios[pairs:]).requires_grad_()
    x, e = beta * margins, label_smoothing
    win, lose = -torch.nn.functional.logsigmoid(x), -torch.nn.functional.logsigmoid(-x)
    losses = {
        "sigmoid": lambda: (1 - e) * win + e * lose,
        "robust": lambda: ((1 - e) * win - e * lose) / (1 - 2 * e),
        "hinge": lambda: (1 - x).relu(),
        "ipo": lambda: (margins - 1 / (2 * beta)) ** 2,
    }[loss_type]()
    if pair_weights is not None:
        losses = losses * pair_weights
    (slopes,) = torch.autograd.grad(losses.sum(), margins)
    losses = losses.detach()
    members = [group_ids == g for g in range(groups)]
    valid = (group_ids >= 0) & (group_ids < groups)
    return {
        "policy_logps": logps,
        "lengths": lengths,
        "margins": margins.detach(),
        "rewards": beta * ratios.detach(),
        "losses": losses.masked_fill(~valid, torch.nan),
        "slopes": slopes.masked_fill(~valid, torch.nan),
        "group_sums": torch.stack([losses[m].sum() for m in members]),
        "group_counts": torch.stack([m.sum() for m in members]),
        "group_losses": torch.stack([losses[m].sum() / max(int(m.sum()), 1) for m in members]),
    }


def run_tail(
    place: Place, token_logps: torch.Tensor, targets: torch.Tensor | None, cu_seqlens: torch.Tensor | None,
    ref_logps: torch.Tensor | None, group_ids: torch.Tensor, pair_weights: torch.Tensor | None, groups: int,
    *, loss_type: str, lengths: torch.Tensor | None = None, **options: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The outputs of the tail by name, on the CPU."""
    pairs, dtype, device = group_ids.numel(), token_logps.dtype, place.device

    def on_device(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.to(device)

    def filled(size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((size,), torch.nan if dtype.is_floating_point else -7, dtype=dtype, device=device)

    out = {
        "policy_logps": filled(2 * pairs, dtype),
        "lengths": filled(2 * pairs, torch.float64) if targets is not None else on_device(lengths),
        "margins": filled(pairs, dtype),
        "rewards": filled(2 * pairs, dtype),
        "losses": filled(pairs, dtype),
        "slopes": filled(pairs, dtype),
        "group_sums": filled(groups, torch.float64),
        "group_counts": filled(groups, torch.int64),
        "group_losses": filled(groups, dtype),
    }
    inputs = (token_logps, targets, cu_seqlens, ref_logps, group_ids, pair_weights)
    place.module.preference_tail(
        *map(on_device, inputs), *out.values(),
        loss_type=LOSS_TYPES.index(loss_type), ignore_index=IGNORE_INDEX, **options,
    )  # fmt: skip
    return {name: value.cpu() for name, value in out.items() if value is not None}


def run_robust_loss(
    place: Place, losses: torch.Tensor, group_ids: torch.Tensor, group_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of the pairs and the robust loss, on the CPU."""
    weights, loss = torch.full_like(losses, torch.nan), losses.new_full((), torch.nan)
    tensors = [x.to(place.device) for x in (losses, group_ids, group_weights, weights, loss)]
    place.module.robust_loss(*tensors)
    return tensors[3].cpu(), tensors[4].cpu()


def require_tail(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Sums are float64 whatever the dtype, so every output is within one rounding of the truth."""
    step = EPSILON / 4 if dtype is torch.float32 else 2.0**-50
    for name, value in want.items():
        tolerance = 2.0**-44 if value.dtype is torch.float64 and got[name].dtype is torch.float64 else step
        scale = 1 + value.nan_to_num().abs().max().item() if value.numel() else 1
        require_close(got[name], value, name, rtol=max(tolerance, 2.0**-44), atol=2.0**-44 * scale)


# ---------------------------------------------------------------------------------------------- the checks


def check_losses(
    place: Place, dtype: torch.dtype, loss_type: str, length_normalize: bool, with_ref: bool, with_weights: bool
) -> None:
    """With and without label smoothing, where the loss has any."""
    for smoothing in (0.0, 0.1) if loss_type in SMOOTHED_LOSS_TYPES else (0.0,):
        logps, targets, cu, references, ids, drawn = make_pairs(9, 4, dtype)
        ref, weights = references if with_ref else None, drawn if with_weights else None
        options: dict[str, Any] = {
            "loss_type": loss_type, "beta": 0.3, "label_smoothing": smoothing, "length_normalize": length_normalize,
        }  # fmt: skip
        got = run_tail(place, logps, targets, cu, ref, ids, weights, 4, **options)
        require_tail(got, tail_oracle(logps, targets, cu, ref, ids, weights, 4, **options), dtype)


def check_groups(place: Place, pairs: int, groups: int) -> None:
    arguments = make_pairs(pairs, groups, torch.float32)
    got = run_tail(place, *arguments, groups, **PLAIN)
    require_tail(got, tail_oracle(*arguments, groups, **PLAIN), torch.float32)
    require(got["group_counts"].sum() == pairs, "group counts do not add up to the pairs")


def check_equal_lengths(place: Place) -> None:
    pairs, length = 6, 11
    cu = torch.arange(2 * pairs + 1, dtype=torch.int32) * length
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(0, 9, (2 * pairs * length,), generator=generator)
    logps = -torch.rand(2 * pairs * length, generator=generator)
    ids = torch.arange(pairs) % 3
    want = tail_oracle(logps, targets, cu, None, ids, None, 3, **PLAIN)
    for boundaries in (None, cu):
        require_tail(run_tail(place, logps, targets, boundaries, None, ids, None, 3, **PLAIN), want, torch.float32)


def check_given_lengths(place: Place) -> None:
    logps, _targets, cu, ref, ids, weights = make_pairs(9, 3, torch.float32)
    options = {**PLAIN, "length_normalize": True}
    lengths = torch.arange(18, dtype=torch.float64)
    got = run_tail(place, logps, None, cu, ref, ids, weights, 3, lengths=lengths.clone(), **options)
    require_same(got["lengths"], lengths, "lengths that were given")
    ratios = (got["policy_logps"].double() - ref) / lengths.clamp(min=1)
    require_close(got["margins"], ratios[:9] - ratios[9:], "margins", rtol=1e-5, atol=1e-5)


def check_no_lengths(place: Place) -> None:
    logps, targets, cu, ref, ids, weights = make_pairs(9, 3, torch.float32)
    with_them = run_tail(place, logps, targets, cu, ref, ids, weights, 3, **PLAIN)
    without = run_tail(place, logps, None, cu, ref, ids, weights, 3, **PLAIN)
    require(with_them.keys() - without.keys() == {"lengths"}, "lengths were written where there are no targets")
    for name, value in without.items():
        require_same(value, with_them[name], f"{name} without targets")


def check_boundaries(place: Place) -> None:
    """On a device they are not checked before: a sum may be wrong then, but of rows that are there."""
    logps, targets, ids = -torch.rand(12), torch.zeros(12, dtype=torch.int64), torch.tensor([0, 1])
    got, want = (
        run_tail(place, logps, targets, torch.tensor(cu, dtype=torch.int32), None, ids, None, 2, **PLAIN)
        for cu in ([-3, 4, 9, 2**30, 2**31 - 1], [0, 4, 9, 12, 12])
    )
    for name, value in want.items():
        require_same(got[name], value, name)


def check_long(place: Place) -> None:
    """Sums in the thousands: added up in float32 they would be off by hundreds of its steps, not by half of one."""
    length = 200 if place.interpreted else 4096
    logps = torch.full((2 * length,), -3.1)
    logps[0] += 0.01
    targets = torch.zeros(2 * length, dtype=torch.int64)
    got = run_tail(place, logps, targets, None, None, torch.zeros(1, dtype=torch.int64), None, 1, **PLAIN)
    sums = logps.double().view(2, length).sum(dim=1).float()
    require_same(got["policy_logps"], sums, "policy_logps")
    require_same(got["margins"], (sums[0] - sums[1]).reshape(1), "margins")


def check_extremes(place: Place, loss_type: str) -> None:
    """Neither end overflows, and a NaN margin gives NaN, not a loss of zero."""
    margins = [0.0, 1e-9, 50.0, -50.0, 2e4, -2e4, 1e30, -1e30, torch.nan]
    logps = torch.tensor([*margins, *[0.0] * len(margins)], dtype=torch.float64)
    cu = torch.arange(len(logps) + 1, dtype=torch.int32)
    targets, ids = torch.zeros(len(logps), dtype=torch.int64), torch.zeros(len(margins), dtype=torch.int64)
    options = {**PLAIN, "loss_type": loss_type, "beta": 1.0}
    got = run_tail(place, logps, targets, cu, None, ids, None, 1, **options)
    want = tail_oracle(logps, targets, cu, None, ids, None, 1, **options)
    for name in ("losses", "slopes"):
        require_close(got[name][:-1], want[name][:-1], name, rtol=1e-12, atol=1e-300)
        require(got[name][-1].isnan(), f"{name} of a NaN margin")
    require(got["group_sums"].isnan().all(), "group sums of a NaN margin")


def check_unknown_groups(place: Place) -> None:
    logps, targets, cu, ref, ids, weights = make_pairs(9, 3, torch.float32)
    ids[2], ids[5], ids[7] = -1, 3, 2**40
    got = run_tail(place, logps, targets, cu, ref, ids, weights, 3, **PLAIN)
    require_tail(got, tail_oracle(logps, targets, cu, ref, ids, weights, 3, **PLAIN), torch.float32)
    require(got["losses"].isnan().nonzero().flatten().tolist() == [2, 5, 7], "losses are NaN elsewhere")
    require(got["margins"].isfinite().all(), "margins are not finite")
    require(got["group_counts"].sum() == 6, "a pair outside every group was counted")


def check_no_pairs(place: Place) -> None:
    nothing = torch.empty(0)
    cu, ids = torch.zeros(1, dtype=torch.int32), torch.empty(0, dtype=torch.int64)
    for boundaries in (cu, None):
        got = run_tail(place, nothing, ids, boundaries, None, ids, None, 5, **PLAIN)
        require(got["group_sums"].tolist() == [0.0] * 5, "group sums of no pairs")
        require(got["group_counts"].tolist() == [0] * 5, "group counts of no pairs")


def check_same_bits(place: Place) -> None:
    small = place.interpreted
    arguments = make_pairs(20 if small else 300, 3, torch.float32, length=30 if small else 200)
    first, *more = with_threads(lambda: run_tail(place, *arguments, 3, **PLAIN), (1, 4, 4, 3))
    for again in more:
        for name, value in again.items():
            require_same(value, first[name], f"{name} of a second run, or another number of threads")


def check_weighted_mean(place: Place, dtype: torch.dtype, pairs: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(pairs)
    losses = torch.rand(pairs, generator=generator, dtype=dtype)
    group_ids = torch.randint(0, groups, (pairs,), generator=generator)
    group_weights = torch.rand(groups, generator=generator, dtype=dtype)
    weights, loss = run_robust_loss(place, losses, group_ids, group_weights)
    require_same(weights, group_weights[group_ids], "weights of the pairs")
    exact = (weights.double() * losses.double()).mean()
    require_close(loss, exact, "loss", rtol=EPSILON / 4 if dtype is torch.float32 else 2.0**-44, atol=0)
    for _ in range(3):
        require_same(run_robust_loss(place, losses, group_ids, group_weights)[1], loss, "the loss of a second run")


def check_mean_of_unknown_groups(place: Place) -> None:
    losses, group_ids = torch.tensor([0.5, torch.nan, torch.nan]), torch.tensor([1, -(2**40), 2**40])
    _, loss = run_robust_loss(place, losses, group_ids, torch.ones(2))
    require(loss.isnan(), "the loss of pairs outside every group is not NaN")


def check_mean_of_no_pairs(place: Place) -> None:
    weights, loss = run_robust_loss(place, torch.empty(0), torch.empty(0, dtype=torch.int64), torch.ones(2))
    require(weights.shape == (0,), "weights of no pairs")
    require(loss.item() == 0, "the loss of no pairs is not 0")
