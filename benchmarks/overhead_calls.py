"""The calls that ``python -m benchmarks overhead`` times, one test of pytest-benchmark each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from benchmarks.overhead import (
    BOTH,
    BOTH_MOVING,
    DEVICE,
    EAGER,
    FORWARD,
    FORWARD_FIXED,
    FORWARD_MOVING,
    FORWARD_ONLY,
    GROUPS,
    KERNELS,
    LOSS,
    PAIRS,
    TOKENS,
    VOCABULARY,
    WIDTH,
)
from grpo_kernels import GroupWeights, fused_grpo_loss, fused_linear_grpo_loss, preference_loss, token_logps
from grpo_kernels.backends import choose


class Inputs:
    """A batch of almost nothing, and everything a backend writes to, allocated once."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape, sequences, rows = (2 * PAIRS, TOKENS), 2 * PAIRS, 2 * PAIRS * TOKENS
        self.logits = torch.randn(*shape, VOCABULARY, generator=generator).to(DEVICE)
        self.hidden = torch.randn(*shape, WIDTH, generator=generator).to(DEVICE)
        self.weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(DEVICE)
        self.labels = torch.randint(0, VOCABULARY, shape, generator=generator).to(DEVICE)
        self.targets = self.labels.flatten()
        self.ref_logps = torch.full((sequences,), -30.0, device=DEVICE)
        self.ref64 = self.ref_logps.double()
        self.policy_logps = torch.full((sequences,), -31.0, device=DEVICE)
        self.group_ids = (torch.arange(PAIRS) % GROUPS).to(DEVICE)
        self.weights = torch.ones(GROUPS, device=DEVICE)
        self.fixed = GroupWeights.balanced([50, 30, 20]).to(DEVICE)
        self.moving = GroupWeights.robust([50, 30, 20], group_lr=1e-3).to(DEVICE)
        self.backend = choose("auto", DEVICE, torch.float32)
        self.logps, self.lse, self.grads = (torch.zeros(rows, device=DEVICE) for _ in range(3))
        self.grad_logits = torch.empty_like(self.logits)
        sums, counts = (torch.zeros(GROUPS, dtype=dtype, device=DEVICE) for dtype in (torch.float64, torch.int64))
        policy, margins, rewards, losses, slopes, means = (
            torch.zeros(n, device=DEVICE) for n in (sequences, PAIRS, sequences, PAIRS, PAIRS, GROUPS)
        )
        self.tail_out = [policy, None, margins, rewards, losses, slopes, sums, counts, means]
        self.pair_weights, self.robust = torch.zeros(PAIRS, device=DEVICE), torch.zeros((), device=DEVICE)

    def kernels(self, *, backward: bool = False) -> None:
        self.vocabulary()
        self.tail()
        if backward:
            self.backend.token_logps_bwd(
                self.logits, self.targets, self.lse, self.grads, self.grad_logits, ignore_index=-100
            )

    def vocabulary(self) -> None:
        self.backend.token_logps_fwd(self.logits, self.targets, self.logps, self.lse, ignore_index=-100)

    def tail(self) -> None:
        self.backend.preference_tail(
            self.logps, None, None, self.ref64, self.group_ids, None, *self.tail_out,
            loss_type=0, beta=0.1, label_smoothing=0.0, length_normalize=False, ignore_index=-100,
        )  # fmt: skip
        self.backend.robust_loss(self.tail_out[4], self.group_ids, self.weights, self.pair_weights, self.robust)

    def loss(self, group_weights, *, grad: bool = True, backward: bool = False) -> None:
        logits = self.logits.detach().requires_grad_(grad)
        out = fused_grpo_loss(logits, self.labels, self.ref_logps, self.group_ids, group_weights, shift=False)
        if backward:
            torch.autograd.grad(out.loss, logits)

    def head(self, group_weights, *, backward: bool = False) -> None:
        hidden = self.hidden.detach().requires_grad_()
        out = fused_linear_grpo_loss(
            hidden, self.weight, self.labels, self.ref_logps, self.group_ids, group_weights, shift=False
        )
        if backward:
            torch.autograd.grad(out.loss, hidden)

    def from_logps(self, group_weights, *, backward: bool = False) -> None:
        policy = self.policy_logps.detach().requires_grad_()
        out = preference_loss(policy, self.ref_logps, self.group_ids, group_weights)
        if backward:
            torch.autograd.grad(out.loss, policy)

    def tokens(self) -> None:
        token_logps(self.logits.detach().requires_grad_(), self.labels, shift=False)

    def eager(self, *, backward: bool = False) -> None:
        """What people write, without a loss per group."""
        logits = self.logits.detach().requires_grad_()
        token = logits.log_softmax(-1).gather(-1, self.labels.unsqueeze(-1)).squeeze(-1)
        ratios = token.sum(1) - self.ref_logps
        loss = -functional.logsigmoid(0.1 * (ratios[:PAIRS] - ratios[PAIRS:])) * self.weights[self.group_ids]
        if backward:
            torch.autograd.grad(loss.mean(), logits)


LOGITS, TOKENS_ONLY = "from logits", "token log-probabilities"
LOGPS, HIDDEN = "from log-probabilities", "from hidden states, head frozen"
HEAD = "fused_linear_grpo_loss"
CALLS: dict[tuple[str, str, str], Callable[[Inputs], None]] = {
    (LOGITS, FORWARD, KERNELS): lambda x: x.kernels(),
    (LOGITS, FORWARD_ONLY, LOSS): lambda x: x.loss(x.weights, grad=False),
    (LOGITS, FORWARD, LOSS): lambda x: x.loss(x.weights),
    (LOGITS, FORWARD, EAGER): lambda x: x.eager(),
    (LOGITS, FORWARD_FIXED, LOSS): lambda x: x.loss(x.fixed),
    (LOGITS, FORWARD_MOVING, LOSS): lambda x: x.loss(x.moving),
    (LOGITS, BOTH, KERNELS): lambda x: x.kernels(backward=True),
    (LOGITS, BOTH, LOSS): lambda x: x.loss(x.weights, backward=True),
    (LOGITS, BOTH, EAGER): lambda x: x.eager(backward=True),
    (LOGITS, BOTH_MOVING, LOSS): lambda x: x.loss(x.moving, backward=True),
    (TOKENS_ONLY, FORWARD, KERNELS): lambda x: x.vocabulary(),
    (TOKENS_ONLY, FORWARD, "token_logps"): lambda x: x.tokens(),
    (LOGPS, FORWARD, KERNELS): lambda x: x.tail(),
    (LOGPS, FORWARD, "preference_loss"): lambda x: x.from_logps(x.weights),
    (LOGPS, FORWARD_MOVING, "preference_loss"): lambda x: x.from_logps(x.moving),
    (LOGPS, BOTH_MOVING, "preference_loss"): lambda x: x.from_logps(x.moving, backward=True),
    (HIDDEN, FORWARD, HEAD): lambda x: x.head(x.weights),
    (HIDDEN, BOTH, HEAD): lambda x: x.head(x.weights, backward=True),
    ("the α step", "step", "GroupWeights.step"): lambda x: x.moving.step(),
}
"""(case, work, variant) → the call."""


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs()


@pytest.mark.parametrize("key", CALLS, ids=" | ".join)
def test_host_time(benchmark, inputs, key):
    benchmark.extra_info["key"] = key
    benchmark(CALLS[key], inputs)
