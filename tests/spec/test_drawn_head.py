"""The LM head is the oracle's on logits that never exist: any dtypes, layout, tile, budget, cap, scale, bias, backend.

What float32 accumulation may be off by is carried through as in ``drawn_cases.py``; what comes before it is one
rounding of a logit to the dtype of the GEMM, and after it a rounding each of the exponential, of the row's factor and
of the result.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import pytest
import torch
from drawn import drawn
from drawn_cases import (
    BACKENDS,
    DTYPES,
    assert_within,
    draw_case,
    epsilon,
    is_scored,
    lay_out,
    oracle,
    row_gradients,
    scored_lengths,
    sequence_sums,
    tiny,
    words_of,
)
from hypothesis import strategies as st

from grpo_kernels import fused_linear_grpo_loss, linear_sequence_logps, linear_token_logps
from grpo_kernels.head import plan as linear_plan

pytestmark = pytest.mark.filterwarnings("ignore:group_lr=")


@dataclass
class Head:
    """What stands before the logits, as float64 and as given, and in what dtype the GEMMs run."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    logit_scale: float
    gemm: torch.dtype
    autocast: bool

    @property
    def options(self):
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def leaves(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]

    def exact(self):
        """Exact logits z, what each may be off by, and its derivative by the GEMM's output (off by the last)."""
        h, w = self.hidden.detach().double(), self.weight.detach().double()
        b = 0 if self.bias is None else self.bias.detach().double()
        x, size = h @ w.t(), h.abs() @ w.abs().t()
        eps, step = epsilon(self.gemm), torch.finfo(self.gemm).eps
        autocast = 2 * step * size if self.autocast else 0  # both inputs are rounded
        x_bound = step * x.abs() + (4 + h.shape[-1]) * eps / 4 * size + autocast + tiny(self.gemm)
        y = self.logit_scale * (x + b)
        y_bound = abs(self.logit_scale) * x_bound + eps * y.where(y.isfinite(), 0).abs()
        if self.softcap is None:
            return y, y_bound, torch.full_like(y, self.logit_scale), torch.zeros_like(y)
        t = torch.tanh(y / self.softcap)
        slope = 1 / torch.cosh(y / self.softcap).square()
        t_bound = torch.minimum(slope * y_bound / self.softcap * 4, torch.full_like(t, 2.0)) + eps
        z, z_bound = self.softcap * t, self.softcap * t_bound + eps * (self.softcap * t).abs()
        if self.softcap > 1e6:  # the cap is far away: relative errors, not the cap's own
            z_bound = y_bound + 2 * eps * z.abs()
            t_bound = z_bound / self.softcap + eps * t.abs()
        return z, z_bound, slope * self.logit_scale, abs(self.logit_scale) * 2 * (t.abs() + t_bound) * t_bound


def draw_head(data, case):
    draw, rng = data.draw, case.rng
    width = draw(st.sampled_from([1, 2, 5, 16, 33]), label="width")
    dtypes = st.sampled_from(DTYPES)
    hidden_dtype = draw(dtypes, label="dtype of hidden")
    weight_dtype = draw(st.just(hidden_dtype) | dtypes, label="dtype of weight")
    gemm = torch.promote_types(hidden_dtype, weight_dtype)
    autocast = gemm != torch.float64 and draw(st.booleans(), label="autocast")
    spread = draw(st.sampled_from([0.1, 3.0, 8.0]), label="spread")
    scale = draw(st.sampled_from([1.0, 1.0, 0.25, -0.5, 4.0]), label="logit_scale")
    bias = None
    if draw(st.booleans(), label="bias"):
        bias = torch.randn(case.vocabulary, generator=rng)
        if scale > 0 and draw(st.booleans(), label="impossible words"):
            never = torch.ones(case.vocabulary, dtype=torch.bool)
            never[words_of(case).flatten()] = False
            bias[never] = -torch.inf
        bias = bias.to(draw(dtypes, label="dtype of bias"))
    hidden = spread * torch.randn(*case.rows, width, generator=rng)
    weight = torch.randn(case.vocabulary, width, generator=rng) / width**0.5
    layouts = st.sampled_from(["contiguous", "padded", "unaligned", "across"])
    hidden = lay_out(hidden.to(hidden_dtype), draw(layouts, label="layout of hidden")).requires_grad_()
    weight = lay_out(weight.to(weight_dtype), draw(layouts, label="layout of weight"))
    weight.requires_grad_(draw(st.booleans(), label="weight learns"))
    if bias is not None:
        bias.requires_grad_(draw(st.booleans(), label="bias learns"))
    hidden.requires_grad_(not (weight.requires_grad and draw(st.booleans(), label="hidden is fixed")))
    case.dtype = torch.bfloat16 if autocast else gemm
    cap = draw(st.sampled_from([None, None, 0.5, 5.0, 30.0, 1e18]), label="softcap")
    return Head(hidden, weight, bias, cap, scale, case.dtype, autocast)


@contextlib.contextmanager
def tiles_of(words):
    """Tiles so narrow that a small vocabulary has many."""
    names = ("_LEAST_WORDS", "_MOST_WORDS", "_WORDS_MULTIPLE")
    before = [getattr(linear_plan, name) for name in names]
    for name, value in zip(names, (words, words, 1), strict=True):
        setattr(linear_plan, name, value)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(linear_plan, name, value)


def draw_call(data, case, head):
    """The arguments that choose how, and the tiles they are about."""
    budgets = st.sampled_from(["auto", 0, 0.0, 1.0]) | st.integers(0, 20_000)
    names = [name for name in BACKENDS if case.dtype != torch.float64 or name in ("auto", "torch")]
    options = {
        **case.layout,
        **head.options,
        "memory_budget": data.draw(budgets, label="memory_budget"),
        "backend": data.draw(st.sampled_from(names), label="backend"),
    }
    if data.draw(st.booleans(), label="num_labelled"):
        options["num_labelled"] = int(is_scored(case).sum())
    return options, data.draw(st.sampled_from([1, 3, 8, 64, 512]), label="words of a tile")


def tokens_of(case, z, z_bound):
    """Log-probabilities, shape of the labels, and what they may be off by."""
    logps = torch.zeros(case.labels.shape, dtype=torch.float64)
    bound = torch.zeros_like(logps)
    if not case.labels.numel():
        return logps, bound
    scored, words = is_scored(case), words_of(case).unsqueeze(-1)
    p = z.softmax(-1)
    per_row = z.log_softmax(-1).gather(-1, words)
    off = z_bound.gather(-1, words) + (p * z_bound).sum(-1, keepdim=True)
    off = off + epsilon(case.dtype) * (2 + per_row.abs() + math.log(case.vocabulary))
    for target, source in ((logps, per_row), (bound, off)):
        source = source.flatten()
        target.copy_((source.roll(1) if case.options["shift"] else source).view(case.labels.shape))
    return torch.where(scored, logps, 0.0), torch.where(scored, bound, 0.0)


def check_gradients(case, head, exact, c, c_bound):
    """Of hidden, weight and bias: what ``.grad`` holds against ``dx = c (onehot - p) dz/dx`` in float64."""
    if not case.labels.numel():
        assert all(not leaf.grad.any() for leaf in head.leaves())
        return
    z, z_bound, slope, slope_bound = exact
    c, c_bound = row_gradients(case, c), row_gradients(case, c_bound)
    p, hit = z.softmax(-1), torch.nn.functional.one_hot(words_of(case), case.vocabulary)
    error = torch.where(hit == 1, (p * (1 - hit)).sum(-1, keepdim=True), -p)
    eps, info = epsilon(case.dtype), torch.finfo(case.dtype)
    reach = z.where(z.isfinite(), 0).abs().amax(-1, keepdim=True)
    relative = z_bound + (p * z_bound).sum(-1, keepdim=True) + eps * (4 + reach) + 4 * info.eps
    # An exponential is at most 1 and stored in the dtype of the GEMM, and p is at most p_max times it; a kept one
    # may be 2^-64 of the row's largest too large (linear_head._finish_kept).
    lost = (c.abs() * (p.amax(-1, keepdim=True) + error.abs()) + 1) * 2 * info.tiny * info.eps * (c != 0)
    lost = lost + 2.0**-60 * c.abs()
    dx = c * error * slope
    bound = (c.abs() * relative.expm1().clamp(max=1e9) + c_bound) * error.abs() * slope.abs()
    bound = bound + (c.abs() + c_bound) * error.abs() * slope_bound + lost
    dx, bound = dx.flatten(0, -2), bound.flatten(0, -2)
    bound = torch.where(dx.isnan() | (p.flatten(0, -2) == 0) & (hit.flatten(0, -2) == 0), lost.flatten(0, -2), bound)
    h, w = head.hidden.detach().double().flatten(0, -2), head.weight.detach().double()
    places = {
        "hidden": (head.hidden, lambda x, size: x @ size(w)),
        "weight": (head.weight, lambda x, size: x.t() @ size(h)),
        "bias": (head.bias, lambda x, size: x.sum(0)),
    }
    for name, (leaf, product) in places.items():
        if leaf is None or not leaf.requires_grad:
            continue
        truth = product(dx, lambda x: x).view(leaf.shape)
        room = product(bound + (4 + dx.shape[0]) * eps * dx.abs(), torch.abs).view(leaf.shape)
        step = torch.finfo(leaf.dtype)
        room = room + (info.eps + step.eps) * truth.abs() + step.tiny * step.eps + tiny(case.dtype)
        assert leaf.grad.dtype == leaf.dtype
        assert_within(f"gradient of {name}", leaf.grad, truth, room)


@drawn(default=50, slow=500, nightly=10_000)
def test_the_loss_of_hidden_states_is_the_oracles(data):
    case = draw_case(data, most_words=200)
    head = draw_head(data, case)
    options, words = draw_call(data, case, head)
    with tiles_of(words):
        with torch.autocast("cpu", torch.bfloat16, enabled=head.autocast):
            out = fused_linear_grpo_loss(
                head.hidden, head.weight, case.labels, case.ref_logps, case.group_ids, case.weights,
                **{**case.options, **options},
            )  # fmt: skip
        out.loss.backward()
    exact = head.exact()
    truth = oracle(case, *tokens_of(case, *exact[:2]), scored_lengths(case))
    for name, value in truth.values.items():
        assert_within(name, getattr(out, name), value, truth.bounds[name])
    check_gradients(case, head, exact, truth.c, truth.c_bound)


@drawn(default=30, slow=300, nightly=6_000)
def test_log_probabilities_of_hidden_states_are_the_oracles(data):
    case = draw_case(data, most_words=600)
    head = draw_head(data, case)
    options, words = draw_call(data, case, head)
    sums = data.draw(st.booleans(), label="sequences")
    function = linear_sequence_logps if sums else linear_token_logps
    late = torch.randn(case.sequences if sums else case.labels.shape, generator=case.rng)
    with tiles_of(words):
        with torch.autocast("cpu", torch.bfloat16, enabled=head.autocast):
            out = function(head.hidden, head.weight, case.labels, **options)
        (out * late).sum().backward()
    exact = head.exact()
    logps, bound = tokens_of(case, *exact[:2])
    if sums:
        logps, bound = (sequence_sums(x, case.cu_seqlens) for x in (logps, bound))
        bound = bound + epsilon(case.dtype) * logps.abs()
        late = late.repeat_interleave(case.cu_seqlens.diff().long()) if case.cu_seqlens is not None else late[:, None]
    assert_within("log-probabilities", out, logps, bound)
    c = late.double().expand(case.labels.shape)
    check_gradients(case, head, exact, c, torch.zeros_like(c))
