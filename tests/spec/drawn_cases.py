"""Batches drawn by hypothesis, what the oracle says of them, and how far from it float32 arithmetic may end.

Shapes, layouts, masks, settings and backends are hypothesis' to draw and to shrink; the numbers themselves come from
a seed that it draws.

The error budget is carried through the oracle's own derivatives, in float64: a token's log-probability may be off by
EPSILON (four roundings) times the numbers it is a difference of, a sum by what its tokens are off by, a loss by its
slope times what its margin is off by, and so on to every entry of the gradient.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import LOSSES
from hypothesis import strategies as st

from grpo_kernels import GroupWeights, available_backends, reference

BACKENDS = [name for name in os.environ.get("GRPO_KERNELS_TEST_BACKENDS", "").split(",") if name] or [
    "auto", *(name for name in ("torch", "cpu") if available_backends()[name] is None)
]  # fmt: skip
SMALL = BACKENDS == ["triton"]
"""Triton's interpreter is slow."""

DTYPES = [torch.float32, torch.bfloat16, torch.float16, *([] if SMALL else [torch.float64])]
IGNORE_INDICES = [-100, -1, 0, 3, 2**40]


def epsilon(dtype: torch.dtype) -> float:
    """Four roundings of the accumulation dtype."""
    return 2.0**-50 if dtype == torch.float64 else 2.0**-22


def tiny(dtype: torch.dtype) -> float:
    """Below this, its normal range, the accumulation dtype may give 0."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny


@dataclass
class Case:
    """One call of the loss, but for what gives the logits."""

    sequences: int
    vocabulary: int
    cu_seqlens: torch.Tensor | None
    labels: torch.Tensor
    rows: tuple[int, ...]
    """Shape of the logits without V."""
    dtype: torch.dtype
    ref_logps: torch.Tensor | None
    group_ids: torch.Tensor
    weights: Any
    """A plain tensor, or a GroupWeights that this case has to itself."""
    options: dict[str, Any] = field(default_factory=dict)
    rng: torch.Generator = field(default_factory=torch.Generator)

    @property
    def layout(self) -> dict[str, Any]:
        return {name: self.options[name] for name in ("ignore_index", "shift", "cu_seqlens")}

    @property
    def pairs(self) -> int:
        return self.sequences // 2


def draw_case(data: Any, *, most_words: int = 150) -> Case:
    """Everything but the logits."""
    draw = data.draw
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1), label="seed"))
    pairs = draw(st.sampled_from([1, 1, 2, 3, 4, 5, 0]), label="pairs")
    length = draw(st.sampled_from([1, 2, 3, 5, 8, 13, 0]), label="length")
    vocabulary = draw(st.integers(1, 20) | st.integers(1, 40 if SMALL else most_words), label="vocabulary")
    groups = draw(st.sampled_from([1, 2, 3, 7, 40]), label="groups")
    shift, packed = draw(st.booleans(), label="shift"), draw(st.booleans(), label="packed")
    ignore_index = draw(st.sampled_from(IGNORE_INDICES), label="ignore_index")
    dtype = draw(st.sampled_from(DTYPES), label="dtype")
    sequences = 2 * pairs
    cu_seqlens, rows = None, (sequences, length)
    if packed:
        lengths = torch.randint(0, length + 1, (sequences,), generator=rng)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        rows = (int(lengths.sum()),)
    labels = torch.randint(0, vocabulary, rows, generator=rng)
    labels[torch.rand(rows, generator=rng) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]), label="ignored")] = (
        ignore_index
    )
    if -(2**31) <= ignore_index < 2**31 and draw(st.booleans(), label="int32 labels"):
        labels = labels.int()
    if not packed and draw(st.booleans(), label="labels across"):
        labels = labels.t().contiguous().t()
    loss_type, smoothing = draw(st.sampled_from(LOSSES), label="loss")
    group_ids = torch.randint(0, groups, (pairs,), generator=rng)
    wide = draw(st.sampled_from([torch.float32, torch.float64]), label="dtype of sums")
    ref_logps = None
    if draw(st.booleans(), label="reference"):
        ref_logps = (-3 * length * torch.rand(sequences, generator=rng)).to(wide)
    pair_weights = None
    if draw(st.booleans(), label="pair weights"):
        pair_weights = (2 * torch.rand(pairs, generator=rng)).to(wide)
    return Case(
        sequences=sequences,
        vocabulary=vocabulary,
        cu_seqlens=cu_seqlens,
        labels=labels,
        rows=rows,
        dtype=dtype,
        ref_logps=ref_logps,
        group_ids=group_ids.int() if draw(st.booleans(), label="int32 groups") else group_ids,
        weights=_draw_weights(data, groups, wide, rng),
        options={
            "beta": draw(st.sampled_from([0.01, 0.1, 0.5, 2.0]), label="beta"),
            "loss_type": loss_type,
            "label_smoothing": smoothing,
            "length_normalize": draw(st.booleans(), label="length_normalize"),
            "pair_weights": pair_weights,
            "ignore_index": ignore_index,
            "shift": shift,
            "cu_seqlens": cu_seqlens,
        },
        rng=rng,
    )


def _draw_weights(data: Any, groups: int, dtype: torch.dtype, rng: torch.Generator) -> Any:
    kind = data.draw(st.sampled_from(["plain", "proportional", "balanced", "robust", "robust"]), label="weights")
    if kind == "plain":
        return (torch.rand(groups, generator=rng, dtype=torch.float64) + 0.1).to(dtype)
    sizes = torch.randint(1, 50, (groups,), generator=rng)
    q = None
    if data.draw(st.booleans(), label="sampling_probs"):
        q = torch.rand(groups, generator=rng, dtype=torch.float64) + 0.1
        q /= q.sum()
    if kind != "robust":
        return getattr(GroupWeights, kind)(sizes, sampling_probs=q)
    return GroupWeights.robust(
        sizes,
        data.draw(st.sampled_from([0.0, 5e-7, 1e-3, 0.1, 10.0]), label="group_lr"),
        estimator=data.draw(st.sampled_from(["importance", "group_mean"]), label="estimator"),
        prior=data.draw(st.sampled_from(["uniform", "proportional"]), label="prior"),
        mixing=data.draw(st.sampled_from([0.0, 0.1, 1.0]), label="mixing"),
        size_adjustment=data.draw(st.sampled_from([0.0, 1.0]), label="size_adjustment"),
        sampling_probs=q,
    )


def draw_logits(data: Any, case: Case) -> torch.Tensor:
    """Logits of this case in a drawn layout: flat, peaked or far from zero, some words impossible."""
    spread = data.draw(st.sampled_from([0.1, 3.0, 8.0, 30.0]), label="spread")
    z = spread * torch.randn(*case.rows, case.vocabulary, generator=case.rng)
    if data.draw(st.booleans(), label="far from zero"):
        z += torch.tensor([0.0, 1e4, -1e4])[torch.randint(0, 3, case.rows, generator=case.rng)].unsqueeze(-1)
    if data.draw(st.booleans(), label="impossible words"):
        impossible = torch.rand(z.shape, generator=case.rng) < 0.3
        impossible.scatter_(-1, words_of(case).unsqueeze(-1), False)
        z[impossible] = -torch.inf
    return lay_out(z.to(case.dtype), data.draw(st.sampled_from(LAYOUTS), label="layout"))


LAYOUTS = ["contiguous", "padded", "unaligned", "across", "swapped", "shifted"]


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers lying differently in memory, NaN around them."""
    *rows, width = x.shape
    if layout == "padded":
        return x.new_full((*rows, width + 3), torch.nan)[..., 1 : 1 + width].copy_(x)
    if layout == "unaligned":
        return x.new_full((x.numel() + 1,), torch.nan)[1:].view(x.shape).copy_(x)
    if layout == "across":  # the last dimension is not the one that lies together
        return x.new_full((width, *rows), torch.nan).movedim(0, -1).copy_(x)
    if layout == "swapped" and len(rows) == 2:
        return x.new_full((rows[1], rows[0], width), torch.nan).transpose(0, 1).copy_(x)
    if layout == "shifted" and len(rows) == 2:
        return x.new_full((rows[0], rows[1] + 1, width), torch.nan)[:, :-1].copy_(x)
    return x.contiguous()


# ---- what the oracle says, and how far off one may be


@dataclass
class Truth:
    """float64 values by name and what each may be off by, and both for the gradient of each token's log-probability."""

    values: dict[str, torch.Tensor]
    bounds: dict[str, torch.Tensor]
    c: torch.Tensor
    """Shape of the labels: gradient of the scalar with respect to each token's log-probability."""
    c_bound: torch.Tensor


def oracle(
    case: Case,
    token_logps: torch.Tensor,
    token_bounds: torch.Tensor,
    lengths: torch.Tensor | None,
    likelihood: float = 0.0,
) -> Truth:
    """Everything after the vocabulary, from the exact log-probability of each token (shape of labels).

    ``lengths`` divide policy and reference; None for no normalising.  ``likelihood`` times the chosen replies'
    log-probabilities is added to the scalar, as a user may.  The group weights are those in force now: a GroupWeights
    that moves is asked after the call.
    """
    options, eps = case.options, epsilon(case.dtype)
    module = isinstance(case.weights, GroupWeights)
    w = (case.weights.loss_weights if module else case.weights).double()
    pairs, ids = case.pairs, case.group_ids.long()
    sums = sequence_sums(token_logps, case.cu_seqlens)
    sums_bound = sequence_sums(token_bounds, case.cu_seqlens) + eps * sums.abs()
    lengths = torch.ones(case.sequences) if lengths is None else lengths.clamp(min=1)
    lengths = lengths.double()
    ratios = reference.log_ratios(sums, case.ref_logps, lengths)
    ratio_bound = sums_bound / lengths
    margins = reference.pair_margins(ratios)
    margin_bound = ratio_bound[:pairs] + ratio_bound[pairs:] + eps * margins.abs()
    settings = {name: options[name] for name in ("beta", "loss_type", "label_smoothing")}
    u = torch.ones(pairs) if options["pair_weights"] is None else options["pair_weights"].double()
    losses, slopes = (f(margins, **settings) for f in (reference.pair_losses, reference.pair_slopes))
    steepest, bend = _lipschitz(margins, margin_bound, slopes, settings)
    loss_bound = (steepest * margin_bound + eps * losses.abs()) * u
    slope_bound = (bend + eps * slopes.abs()) * u
    losses, slopes = losses * u, slopes * u
    members = torch.nn.functional.one_hot(ids, len(w)).double().t()  # (G, B)
    counts = members.sum(1).clamp(min=1)
    rewards, rewards_bound = options["beta"] * ratios, options["beta"] * (ratio_bound + eps * ratios.abs())
    terms = w[ids] * losses / max(pairs, 1)
    values = {
        "loss": terms.sum(),
        "losses": losses,
        "margins": margins,
        "rewards_chosen": rewards[:pairs],
        "rewards_rejected": rewards[pairs:],
        "policy_logps": sums,
        "group_losses": members @ losses / counts,
    }
    bounds = {
        "loss": (w[ids] * loss_bound / max(pairs, 1) + 2 * eps * terms.abs()).sum() + tiny(case.dtype),
        "losses": loss_bound,
        "margins": margin_bound,
        "rewards_chosen": rewards_bound[:pairs],
        "rewards_rejected": rewards_bound[pairs:],
        "policy_logps": sums_bound,
        "group_losses": (1 + eps) * (members @ loss_bound / counts) + eps * values["group_losses"].abs(),
    }
    c = w[ids] / max(pairs, 1) * slopes
    c_bound = w[ids] / max(pairs, 1) * slope_bound + 2 * eps * c.abs() + tiny(case.dtype) * (1 + slopes.abs())
    c = torch.cat([c, -c]) / lengths
    c[:pairs] += likelihood
    c_bound = c_bound.repeat(2) / lengths + 2 * eps * c.abs()
    return Truth(values, bounds, _spread(c, case), _spread(c_bound, case))


def _lipschitz(
    margins: torch.Tensor, bound: torch.Tensor, slopes: torch.Tensor, settings: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much a loss may change per unit of margin nearby, and how much its slope may be off in all."""
    beta, e = settings["beta"], settings["label_smoothing"]
    flip = 1 / (1 - 2 * e) if settings["loss_type"] == "robust" else 1.0
    if settings["loss_type"] == "ipo":
        return slopes.abs() + 2 * bound, 2 * bound
    if settings["loss_type"] == "hinge":
        at_the_kink = (1 - beta * margins).abs() <= beta * bound
        return torch.full_like(margins, beta), beta * at_the_kink
    return torch.full_like(margins, beta * flip), beta**2 / 4 * flip * bound + 2 * epsilon(torch.float32) * beta * flip


def sequence_sums(values: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    if values.numel() == 0:
        sequences = values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return torch.zeros(sequences, dtype=values.dtype)
    return reference.sequence_sums(values, cu_seqlens)


def _spread(per_sequence: torch.Tensor, case: Case) -> torch.Tensor:
    """One number a sequence → one a label."""
    if case.cu_seqlens is None:
        return per_sequence.unsqueeze(1).expand(case.labels.shape)
    return per_sequence.repeat_interleave(case.cu_seqlens.diff().long())


def alpha_after(case: Case, before: torch.Tensor, truth: Truth) -> tuple[torch.Tensor, float]:
    """log alpha after one step from ``before`` by the oracle's losses, and how far each entry may be from it."""
    gw, ids = case.weights, case.group_ids.long()
    losses, bound = truth.values["losses"], truth.bounds["losses"]
    if gw.estimator == "importance":
        seen = reference.importance_losses(losses, ids, gw.sampling_probs)
        present = torch.ones(gw.num_groups)
        off = (bound / gw.sampling_probs[ids]).sum().item() / max(case.pairs, 1)
    else:
        seen = reference.group_mean_losses(losses, ids, gw.num_groups)
        present = (torch.bincount(ids, minlength=gw.num_groups) > 0).double()
        off = bound.max().item()
    exponent = before + gw.group_lr * (seen + gw.adjustment) * present
    return exponent.log_softmax(0), 2 * gw.group_lr * off + 1e-12


def is_scored(case: Case) -> torch.Tensor:
    """Shape of the labels: whether the token counts."""
    return _token_logps(case, torch.zeros(*case.rows, case.vocabulary + 1, dtype=torch.float64)) < 0


def scored_lengths(case: Case) -> torch.Tensor | None:
    """(2B,) what the case divides by, None where it does not."""
    return sequence_sums(is_scored(case).double(), case.cu_seqlens) if case.options["length_normalize"] else None


def tokens_of(case: Case, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 logits → log-probabilities, shape of the labels, and what they may be off by."""
    logps = _token_logps(case, z)
    return logps, is_scored(case) * epsilon(case.dtype) * (2 + logps.abs() + math.log(case.vocabulary))


def _token_logps(case: Case, z: torch.Tensor) -> torch.Tensor:
    if not case.labels.numel():
        return torch.zeros(case.labels.shape, dtype=torch.float64)
    return reference.token_logps(z, case.labels.long(), **case.layout)


def row_gradients(case: Case, c: torch.Tensor) -> torch.Tensor:
    """Shape of the labels → (*rows, 1): what belongs to a token goes to the row of logits that predicts it."""
    c = torch.where(is_scored(case), c, 0.0).flatten()
    # The first token of a sequence is not scored under shift, so rolling carries nothing over a border.
    return (c.roll(-1) if case.options["shift"] else c).view(*case.rows, 1)


def words_of(case: Case) -> torch.Tensor:
    """(*rows,) the word that each row of logits predicts; any where it predicts none."""
    labels = case.labels.long().flatten()
    words = torch.where(labels == case.options["ignore_index"], 0, labels)
    return (words.roll(-1) if case.options["shift"] else words).view(case.rows)


def softmax_gradient(
    case: Case, z: torch.Tensor, c: torch.Tensor, c_bound: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 logits, gradients of the tokens and their bounds → ``c (onehot - p)`` and its bound, before rounding."""
    c, c_bound = row_gradients(case, c), row_gradients(case, c_bound)
    if not z.numel():
        return z, z
    p, hit = z.softmax(-1), torch.nn.functional.one_hot(words_of(case), case.vocabulary)
    # At the target 1 - p is the sum of the others, where a float64 1 - p has lost it.
    onehot = torch.where(hit == 1, (p * (1 - hit)).sum(-1, keepdim=True), -p)
    # float32 holds z - lse to EPSILON times the larger of the two, which the exponential makes a relative error.
    reach = torch.maximum(z.where(z.isfinite(), 0).abs().amax(-1, keepdim=True), z.logsumexp(-1, keepdim=True).abs())
    dz = c * onehot
    eps = epsilon(case.dtype)
    room = 2 * tiny(case.dtype) * (1 + c.abs())
    return dz, c.abs() * p * eps * (4 + reach) + c_bound * onehot.abs() + 2 * eps * dz.abs() + room


def rounded(dtype: torch.dtype, value: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """The bound once the value is stored in this dtype."""
    info = torch.finfo(dtype)
    return bound + info.eps * value.abs() + info.tiny * info.eps


def assert_within(name: str, got: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor) -> None:
    """Same shape, and no entry further from the truth than its bound; infinities and NaN in the same places."""
    assert got.shape == truth.shape, f"{name}: {tuple(got.shape)} and not {tuple(truth.shape)}"
    got, truth = got.detach().double(), truth.detach().double()
    over = (got - truth).abs() - bound
    same = (got == truth) | (got.isnan() & truth.isnan())
    wrong = ~same & ~(over <= 0)
    assert not wrong.any(), (
        f"{name} at {wrong.nonzero()[0].tolist()}: {got[wrong][0]:.9e} for {truth[wrong][0]:.9e}, "
        f"off by {(got - truth).abs()[wrong][0]:.2e} where {bound.expand_as(truth)[wrong][0]:.2e} is allowed"
    )
