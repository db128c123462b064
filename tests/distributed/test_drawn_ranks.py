"""Drawn settings and batches on two ranks, unevenly shared: alpha has the same bits on both, and is one process's."""

from __future__ import annotations

import datetime
import os
import warnings

import pytest
import torch
import torch.distributed as dist

from grpo_kernels import GroupWeights, preference_loss

RANKS = 2
CASES = 2_000 if os.environ.get("GRPO_KERNELS_NIGHTLY") == "1" else 200
LIMIT = datetime.timedelta(seconds=300)

pytestmark = pytest.mark.slow


def alpha_of(seed, rank=None):
    """Three drawn steps; log alpha of this rank's share of the pairs, or without a rank of all of them."""
    rng = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(0, len(choices), (), generator=rng))]

    groups = pick(1, 2, 3, 17, 300)
    gw = GroupWeights.robust(
        torch.randint(1, 50, (groups,), generator=rng),
        pick(5e-7, 1e-3, 0.1, 10.0),
        estimator=pick("importance", "group_mean"),
        prior=pick("uniform", "proportional"),
        mixing=pick(0.0, 0.3),
        size_adjustment=pick(0.0, 1.0),
    )
    loss_type, accumulate = pick("sigmoid", "robust", "hinge", "ipo"), pick(False, True)
    for _ in range(3):
        pairs = pick(2, 3, 8, 33)
        sums = -40 * torch.rand(2 * pairs, generator=rng, dtype=torch.float64)
        ids = torch.randint(0, groups, (pairs,), generator=rng)
        share = torch.randint(0, RANKS, (pairs,), generator=rng)  # one rank may have none
        mine = torch.arange(pairs) if rank is None else (share == rank).nonzero().squeeze(1)
        parts = mine.tensor_split(2) if accumulate else [mine]
        with gw.accumulate():
            for part in parts:
                rows = torch.cat([part, part + pairs])
                leaf = sums[rows].requires_grad_()
                preference_loss(leaf, None, ids[part], gw, loss_type=loss_type)
        gw.step()
    return gw.log_alpha, gw.weights, int(gw.num_updates)


def worker(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=LIMIT)
    torch.save([alpha_of(seed, rank) for seed in range(CASES)], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_alpha_is_equal_on_all_ranks_and_to_that_of_one(tmp_path):
    context = torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=RANKS, join=False)
    deadline = datetime.datetime.now() + LIMIT
    while not context.join(timeout=5):  # raises what a worker raised
        if datetime.datetime.now() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"two ranks did not finish within {LIMIT}")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    assert len(ranks[0]) == CASES
    for seed, ((log_alpha, weights, updates), (other, other_weights, _)) in enumerate(zip(*ranks, strict=True)):
        assert torch.equal(log_alpha, other), seed
        assert torch.equal(weights, other_weights), seed
        assert abs(weights.sum().item() - 1) < 1e-12
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alone, _, steps = alpha_of(seed)
        assert updates == steps == 3
        # A float64 sum of losses in another order, times eta.
        torch.testing.assert_close(log_alpha, alone, rtol=1e-12, atol=1e-12 * (1 + alone.abs().max().item()))
