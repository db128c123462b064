"""The loss from several threads at once, in forked children, and in the workers of data loaders."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import same_bits

from grpo_kernels import GroupWeights, available_backends, fused_grpo_loss, fused_linear_grpo_loss, sequence_logps

ROOT = Path(__file__).resolve().parents[2]
HERE = [name for name in ("torch", "cpu") if available_backends()[name] is None]
every_backend = pytest.mark.parametrize("backend", HERE)


def one_call(seed, weights, backend):
    """A loss and its gradients, by logits or through the head, large enough for the kernels to use all threads."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 500, (4, 40), generator=rng)
    ids = torch.tensor([0, seed % 2])
    if seed % 2:
        leaves = [torch.randn(4, 40, 500, generator=rng).requires_grad_()]
        out = fused_grpo_loss(*leaves, labels, None, ids, weights, backend=backend)
    else:
        leaves = [torch.randn(size, generator=rng).requires_grad_() for size in ((4, 40, 16), (500, 16))]
        out = fused_linear_grpo_loss(*leaves, labels, None, ids, weights, memory_budget=seed * 1000, backend=backend)
    out.loss.backward()
    return [out.loss.detach(), out.losses, out.group_weights, *(leaf.grad for leaf in leaves)]


SHARED = {
    "plain": lambda: torch.tensor([0.5, 2.0]),
    "fixed": lambda: GroupWeights.balanced([3, 2]),
    "evaluating": lambda: GroupWeights.robust([3, 2], 0.1).eval(),
}


@every_backend
@pytest.mark.parametrize("kind", SHARED)
def test_threads_that_share_weights_that_stand_get_the_bits_of_one(backend, kind):
    shared = SHARED[kind]()
    alone = [one_call(seed, shared, backend) for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda seed: one_call(seed, shared, backend), range(24)))
    for mine, theirs in zip(together, alone, strict=True):
        assert all(same_bits(a, b) for a, b in zip(mine, theirs, strict=True))


@every_backend
def test_threads_with_a_moving_alpha_each_get_the_bits_of_one(backend):
    def run(first):
        gw = GroupWeights.robust([3, 2], 0.1)
        results = [one_call(first + step, gw, backend) for step in range(6)]
        return [*results[-1], gw.log_alpha]

    alone = [run(first) for first in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, range(8)))
    for mine, theirs in zip(together, alone, strict=True):
        assert all(same_bits(a, b) for a, b in zip(mine, theirs, strict=True))


def test_threads_that_share_a_moving_alpha_leave_it_on_the_simplex():
    """No more is promised: like an optimizer, it is for one thread at a time, and a step may be lost."""
    gw = GroupWeights.robust([3, 2], 0.1)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda seed: one_call(seed, gw, "auto"), range(160)))
    assert all(result[0].isfinite() for result in results)
    assert gw.log_alpha.isfinite().all()
    assert abs(gw.weights.sum().item() - 1) < 1e-12
    assert 0 < int(gw.num_updates) <= 160
    assert int(gw.num_skipped) == 0


FORKS = """
import os
import torch
from grpo_kernels import sequence_logps
torch.set_num_threads(3)
logits, labels = torch.randn(4, 400, 300), torch.randint(0, 300, (4, 400))
before = sequence_logps(logits, labels, backend="cpu")
child = os.fork()
if child == 0:
    after = sequence_logps(logits.requires_grad_(), labels, backend="cpu")
    after.sum().backward()
    os._exit(0 if torch.equal(before, after) and len(os.listdir("/proc/self/task")) == 1 else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif("cpu" not in HERE or not Path("/proc/self/task").exists(), reason="the compiled kernels, on Linux")
def test_a_forked_child_does_not_wait_for_threads_that_were_its_parents():
    """OpenMP's do not survive a fork."""
    run = subprocess.run(
        [sys.executable, "-c", FORKS],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout.strip() == "0", run.stderr


class Scored(torch.utils.data.Dataset):
    """Log-probabilities that the worker computes, as a loader that scores a reference on the fly would."""

    def __init__(self, backend):
        self.backend = backend

    def __len__(self):
        return 4

    def __getitem__(self, seed):
        rng = torch.Generator().manual_seed(seed)
        logits, labels = torch.randn(2, 60, 400, generator=rng), torch.randint(0, 400, (2, 60), generator=rng)
        result = one_call(seed, GroupWeights.robust([3, 2], 0.1), self.backend)
        return torch.cat([sequence_logps(logits, labels, backend=self.backend), result[0].reshape(1)])


@every_backend
@pytest.mark.parametrize("method", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()])
def test_workers_of_a_data_loader_get_the_bits_of_their_parent(backend, method):
    dataset = Scored(backend)
    here = torch.stack([dataset[i] for i in range(len(dataset))])  # with threads, before there are workers
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, num_workers=1, multiprocessing_context=method, timeout=100
    )  # fmt: skip
    assert torch.equal(torch.cat(list(loader)), here)
