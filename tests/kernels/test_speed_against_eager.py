"""Speed that must not be lost, as ratios within one run: a busy machine slows both sides.

The fastest of interleaved rounds is compared, and the bounds are well below what was measured: they break where
a pass over the vocabulary, a copy of the logits or a loop over groups comes back, and not before.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from grpo_kernels import GroupWeights, available_backends, fused_grpo_loss, fused_linear_grpo_loss, token_logps
from grpo_kernels.backends import choose

ROUNDS = 12

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] is not None or choose("cpu", torch.device("cpu"), torch.float32).isa() == "baseline",
    reason="the compiled CPU kernels are not here, or only the portable ones",
)


@pytest.fixture(autouse=True)
def _memory_as_it_comes(_poisoned_memory):
    """Filling memory with NaN, as other kernel tests do, takes as long as the kernels."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def times_faster(benchmark):
    """How many times as long the second function takes; pytest-benchmark keeps the number."""

    def compare(ours: Callable[[], object], other: Callable[[], object]) -> float:
        seconds: dict[Callable[[], object], list[float]] = {ours: [], other: []}

        def rounds() -> None:
            for _ in range(ROUNDS):
                for function, taken in seconds.items():
                    start = time.perf_counter()
                    function()
                    taken.append(time.perf_counter() - start)

        ours(), other()
        benchmark.pedantic(rounds, rounds=1)
        benchmark.extra_info["ratio"] = min(seconds[other]) / min(seconds[ours])
        return benchmark.extra_info["ratio"]

    return compare


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_vocabulary_is_read_and_written_once_each_way(times_faster, dtype):
    """Measured: 3 to 6 times eager at this size on a busy core; more at the sizes of benchmarks/report.md."""
    leaf = (3 * torch.randn(1, 256, 32000)).to(dtype).requires_grad_()
    labels, grads = torch.randint(0, 32000, (1, 256)), torch.randn(1, 256)

    def ours():
        logits = leaf.view_as(leaf)
        logps = token_logps(logits, labels, shift=False, overwrite_logits=True, backend="cpu")
        return torch.autograd.grad(logps, logits, grads)

    def eager():
        logps = leaf.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return torch.autograd.grad(logps, leaf, grads.to(logps.dtype))

    assert times_faster(ours, eager) > 1.8


def test_unlabelled_rows_cost_the_head_nothing(times_faster):
    """One row in eight is labelled; eager goes over all of them.  Measured: 4 to 5 times.

    Logits have a standard deviation of 3, as a model's do.  At 16 most exponentials are subnormal numbers in float32,
    which make a GEMM up to 30 times slower on Intel CPUs.
    """
    hidden, weight = torch.randn(2, 128, 256, requires_grad=True), torch.randn(8000, 256) * (3 / 16)
    weight.requires_grad_()
    labels = torch.randint(0, 8000, (2, 128))
    labels[:, :112] = -100
    group_ids, ones = torch.zeros(1, dtype=torch.int64), torch.ones(1)

    def ours():
        loss = fused_linear_grpo_loss(hidden, weight, labels, None, group_ids, ones, shift=False, backend="cpu").loss
        return torch.autograd.grad(loss, [hidden, weight])

    def eager():
        token = (hidden @ weight.t()).log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        sums = (token * (labels >= 0)).sum(1)
        loss = -torch.nn.functional.logsigmoid(0.1 * (sums[0] - sums[1]))
        return torch.autograd.grad(loss, [hidden, weight])

    assert times_faster(ours, eager) > 2


def test_ten_thousand_groups_cost_next_to_what_one_does(times_faster):
    """The loss with α moving, from logits.  Measured: 1.02 to 1.4 times."""
    logits, labels = torch.randn(16, 16, 32000), torch.randint(0, 32000, (16, 16))
    group_ids = torch.zeros(8, dtype=torch.int64)

    def loss_of(groups: int) -> Callable[[], object]:
        group_weights = GroupWeights.robust([100] * groups, group_lr=1e-5)
        leaf = logits.clone().requires_grad_()

        def run():
            z = leaf.view_as(leaf)
            out = fused_grpo_loss(z, labels, None, group_ids, group_weights, overwrite_logits=True)
            return torch.autograd.grad(out.loss, z)

        return run

    assert times_faster(loss_of(1), loss_of(10_000)) < 2
