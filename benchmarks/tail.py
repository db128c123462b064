"""From log-probabilities to losses, slopes, group sums and the α step; and what the number of groups costs.

    python -m benchmarks tail

Three works: the "tail" (token log-probabilities to sums, margins, losses, slopes and group sums: one call of a backend,
no gradients), the "loss, α moves" (from summed log-probabilities, forward, α step and backward), and the "whole loss, α
moves" (from logits, forward and backward), which stands at one size and shows that groups cost next to nothing in it.
``one-hot groups`` is the way of the method's authors and of group DRO: a (G, B) mask times the losses.  α begins anew
before each run.

The tail has to move 4 bytes a token, 60 a pair and 20 a group; the loss from sums 40 a pair and 64 a group.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from benchmarks import suite
from benchmarks.logps import EPSILON
from benchmarks.measure import Line
from benchmarks.results import Row
from benchmarks.shapes import IGNORE_INDEX, normal
from benchmarks.suite import OURS, Errors, Outputs, Settings, Work
from grpo_kernels import GroupWeights, available_backends, fused_grpo_loss, preference_loss
from grpo_kernels.backends import choose

SETTINGS = Settings(rounds=31, most_seconds=2.0)
BETA, GROUP_LR, TOKENS = 0.1, 1e-4, 64
TAIL, LOSS, WHOLE = "tail", "loss, α moves", "whole loss, α moves"
WHOLE_PAIRS, WHOLE_TOKENS, WHOLE_VOCABULARY = 8, 16, 32000
COMPILED_GROUPS = (1, 10000)
"""Where ``torch.compile`` stands beside the others: it compiles for seconds to run for microseconds."""

Grouped = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


class Case(NamedTuple):
    work: str
    pairs: int
    groups: int
    curve: str = ""

    def fields(self) -> Row:
        tokens = {TAIL: TOKENS, LOSS: 0, WHOLE: WHOLE_TOKENS}[self.work]
        return {
            "case": f"{self.pairs} pairs, {self.groups} groups", "work": self.work, "dtype": "float32",
            "rows": 2 * self.pairs * tokens or "", "pairs": self.pairs, "groups": self.groups, "curve": self.curve,
            "vocabulary": WHOLE_VOCABULARY if self.work == WHOLE else "",
        }  # fmt: skip


def cases() -> list[Case]:
    counts = (1, 10, 100, 1000, 10000)
    return [
        *(Case(TAIL, pairs, 16, "pairs") for pairs in (16, 64, 256, 1024, 4096)),
        *(Case(TAIL, 64, groups, "groups") for groups in counts),
        *(Case(LOSS, 64, groups, "groups") for groups in counts),
        Case(LOSS, 4096, 16),
        Case(LOSS, 4096, 10000),
        *(Case(WHOLE, WHOLE_PAIRS, groups, "groups") for groups in counts),
    ]


def main(options: Namespace) -> int:
    return suite.run("tail", cases(), build, options, SETTINGS)


def build(case: Case, device: torch.device) -> Work:
    return {TAIL: tail, LOSS: loss, WHOLE: whole_loss}[case.work](case, device)


def backends_here(device: torch.device) -> dict[str, str | None]:
    """Every backend that is for this kind of device, and why it is not there."""
    found = available_backends().items()
    return {name: why for name, why in found if name == "torch" or (name == "cpu") == (device.type == "cpu")}


# ---- the tail alone


def tail(case: Case, device: torch.device) -> Work:
    pairs, groups, generator = case.pairs, case.groups, torch.Generator(device).manual_seed(0)
    rows = 2 * pairs * TOKENS
    token_logps = -normal((rows,), 2.0, torch.float32, generator).abs()
    ref_logps = -100 + normal((2 * pairs,), 2.0, torch.float64, generator)
    ids = torch.randint(0, groups, (pairs,), generator=generator, device=device)

    def ours(name: str) -> Line:
        module = choose(name, device, torch.float32)
        policy, rewards = (torch.empty(2 * pairs, device=device) for _ in range(2))
        margins, losses, slopes = (torch.empty(pairs, device=device) for _ in range(3))
        sums, counts = (torch.empty(groups, dtype=dtype, device=device) for dtype in (torch.float64, torch.int64))
        means = torch.empty(groups, device=device)

        def run() -> Outputs:
            module.preference_tail(
                token_logps, None, None, ref_logps, ids, None, policy, None, margins, rewards, losses, slopes, sums,
                counts, means, loss_type=0, beta=BETA, label_smoothing=0.0, length_normalize=False,
                ignore_index=IGNORE_INDEX,
            )  # fmt: skip
            return {"losses": losses, "slopes": slopes, "sums": sums}

        return Line(run)

    def plain(token: torch.Tensor, ref: torch.Tensor, grouped: Grouped) -> Outputs:
        policy = token.view(2 * pairs, TOKENS).sum(1)
        ratios = policy - ref
        rewards = BETA * ratios
        margins = ratios[:pairs] - ratios[pairs:]
        losses, slopes = -functional.logsigmoid(BETA * margins), -BETA * torch.sigmoid(-BETA * margins)
        sums, counts = grouped(losses, ids, groups), grouped(torch.ones_like(losses), ids, groups)
        return {
            "losses": losses,
            "slopes": slopes,
            "sums": sums,
            "rewards": rewards,
            "means": sums / counts.clamp(min=1),
        }

    ref32 = ref_logps.float()
    compiled = torch.compile(plain)
    variants: dict[str, Line | str] = {OURS + name: why or ours(name) for name, why in backends_here(device).items()}
    variants |= {
        "eager": Line(lambda: plain(token_logps, ref32, scattered)),
        "eager, one-hot groups": Line(lambda: plain(token_logps, ref32, one_hot)),
        "torch.compile": Line(lambda: compiled(token_logps, ref32, scattered)),
    }
    if case.curve and case.groups not in COMPILED_GROUPS:
        del variants["torch.compile"]
    truth = plain(token_logps.double(), ref_logps, scattered)
    return Work(
        variants, ours=next(iter(variants)), plain=variants["eager"],
        errors=errors_from(truth, ("losses", "sums"), "slopes"),
        epsilon=(1e-6, 1e-6), bytes=4.0 * rows + 60 * pairs + 20 * groups, operations=2.0 * rows + 20 * pairs,
        copy_bytes=4 * rows, memory=False,
    )  # fmt: skip


def scattered(values: torch.Tensor, ids: torch.Tensor, groups: int) -> torch.Tensor:
    """(G,) sums over the pairs of each group."""
    return values.new_zeros(groups).index_add_(0, ids, values)


def one_hot(values: torch.Tensor, ids: torch.Tensor, groups: int) -> torch.Tensor:
    mask = (ids == torch.arange(groups, device=ids.device).unsqueeze(1)).to(values.dtype)
    return mask @ values


def errors_from(truth: Outputs, values: tuple[str, ...], gradient: str) -> Callable[[Outputs], Errors]:
    def errors(outputs: Outputs) -> Errors:
        off = max(
            ((outputs[name].double() - truth[name]).abs().max() / truth[name].abs().max()).item() for name in values
        )
        return off, ((outputs[gradient].double() - truth[gradient]).norm() / truth[gradient].norm()).item()

    return errors


# ---- with the step of alpha


class Alpha:
    """What the eager ways keep: log α, moved by them as GroupWeights moves its own."""

    def __init__(self, groups: int, dtype: torch.dtype, device: torch.device) -> None:
        self.groups = groups
        self.start = torch.full((groups,), 1 / groups, dtype=dtype, device=device).log()
        self.log_alpha, self.q = self.start.clone(), 1 / groups

    def weighted(self, losses: torch.Tensor, ids: torch.Tensor, grouped: Grouped) -> torch.Tensor:
        """() robust loss, with the new α."""
        with torch.no_grad():
            estimate = grouped(losses.detach(), ids, self.groups) / (losses.shape[0] * self.q)
            moved = torch.log_softmax(self.log_alpha + GROUP_LR * estimate.to(self.log_alpha.dtype), 0)
            self.log_alpha.copy_(moved)
            weights = (moved.exp() / self.q).to(losses.dtype)
        return (weights[ids] * losses).mean()

    def restart(self) -> None:
        self.log_alpha.copy_(self.start)


def robust(groups: int, device: torch.device) -> tuple[GroupWeights, Callable[[], None]]:
    """Weights of equally large groups, and what puts them back to the start."""
    weights = GroupWeights.robust([100] * groups, group_lr=GROUP_LR).to(device)
    start = weights.log_alpha.clone()

    def restart() -> None:
        weights.log_alpha.copy_(start)
        weights.discard()

    return weights, restart


def loss(case: Case, device: torch.device) -> Work:
    pairs, groups, generator = case.pairs, case.groups, torch.Generator(device).manual_seed(0)
    policy_logps = -100 + normal((2 * pairs,), 5.0, torch.float32, generator)
    ref_logps = -100 + normal((2 * pairs,), 5.0, torch.float32, generator)
    ids = torch.randint(0, groups, (pairs,), generator=generator, device=device)
    weights, restart = robust(groups, device)

    def ours() -> Outputs:
        policy = policy_logps.detach().requires_grad_()
        out = preference_loss(policy, ref_logps, ids, weights, beta=BETA)
        return {"loss": out.loss.detach(), "grad": torch.autograd.grad(out.loss, policy)[0]}

    def value(policy: torch.Tensor, ref: torch.Tensor, alpha: Alpha, grouped: Grouped) -> torch.Tensor:
        ratios = policy - ref
        losses = -functional.logsigmoid(BETA * (ratios[:pairs] - ratios[pairs:]))
        return alpha.weighted(losses, ids, grouped)

    def eager(grouped: Grouped, dtype: torch.dtype = torch.float32, function: Callable = value) -> Line:
        alpha, ref = Alpha(groups, torch.float64, device), ref_logps.to(dtype)

        def run() -> Outputs:
            policy = policy_logps.to(dtype).detach().requires_grad_()
            result = function(policy, ref, alpha, grouped)
            return {"loss": result.detach(), "grad": torch.autograd.grad(result, policy)[0]}

        return Line(run, alpha.restart)

    variants: dict[str, Line | str] = {
        f"{OURS}auto": Line(ours, restart),
        "eager": eager(scattered),
        "eager, one-hot groups": eager(one_hot),
        "torch.compile": eager(scattered, function=torch.compile(value)),
    }
    if case.curve and case.groups not in COMPILED_GROUPS:
        del variants["torch.compile"]
    truth = eager(scattered, torch.float64)()
    return Work(
        variants, ours=f"{OURS}auto", plain=eager(scattered), errors=errors_from(truth, ("loss",), "grad"),
        epsilon=(1e-6, 1e-6), bytes=40.0 * pairs + 64 * groups, operations=20.0 * pairs + 10 * groups,
        copy_bytes=1 << 20, memory=False,
    )  # fmt: skip


def whole_loss(case: Case, device: torch.device) -> Work:
    pairs, groups, dtype = case.pairs, case.groups, torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shape = (2 * pairs, WHOLE_TOKENS, WHOLE_VOCABULARY)
    source = normal(shape, 3.0, dtype, generator)
    labels = torch.randint(0, WHOLE_VOCABULARY, shape[:2], generator=generator, device=device)
    ids = torch.randint(0, groups, (pairs,), generator=generator, device=device)
    leaf = source.clone().requires_grad_()
    weights, restart = robust(groups, device)

    def fresh() -> None:
        restart()
        with torch.no_grad():
            leaf.copy_(source)

    def ours() -> Outputs:
        logits = leaf.view(shape)
        out = fused_grpo_loss(logits, labels, None, ids, weights, beta=BETA, shift=False, overwrite_logits=True)
        return {"loss": out.loss.detach(), "grad": torch.autograd.grad(out.loss, logits)[0]}

    def eager(dtype: torch.dtype) -> Line:
        alpha = Alpha(groups, torch.float64, device)

        def run() -> Outputs:
            logits = leaf.to(dtype)
            token = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            sums = token.sum(1)
            losses = -functional.logsigmoid(BETA * (sums[:pairs] - sums[pairs:]))
            result = alpha.weighted(losses, ids, one_hot)
            return {"loss": result.detach(), "grad": torch.autograd.grad(result, logits)[0]}

        def prepare() -> None:
            alpha.restart()
            fresh()

        return Line(run, prepare)

    truth = eager(torch.float64)()
    rows, elements = 2 * pairs * WHOLE_TOKENS, leaf.numel()
    return Work(
        {f"{OURS}auto": Line(ours, fresh), "eager": eager(dtype)}, ours=f"{OURS}auto", plain=eager(dtype),
        errors=errors_from(truth, ("loss",), "grad"), epsilon=(1e-6, EPSILON[dtype]),
        bytes=12.0 * elements, operations=7.0 * elements + 2 * rows, copy_bytes=4 * elements, memory=False,
    )  # fmt: skip
