"""Two processes on half the batch each are one process on the whole.

Every scenario runs in one pair of gloo processes, which meet in a file: no port, so nothing to clash with.
"""

from __future__ import annotations

import copy
import datetime

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close, make_batch

from grpo_kernels import GroupWeights, fused_grpo_loss

SIZES = [5, 3, 2]
PAIRS, RANKS, STEPS = 6, 2, 3
LIMIT = datetime.timedelta(seconds=60)

ESTIMATORS = ["importance", "group_mean"]


def train(rank, ranks, estimator, accumulate, poison_rank=None, group=None):
    """Three steps of a bias on the logits; returns all there is to compare."""
    gw = GroupWeights.robust(SIZES, 0.3, estimator=estimator, size_adjustment=0.5, process_group=group)
    bias = torch.zeros(13, dtype=torch.float64, requires_grad=True)
    history = {"log_alpha": [], "grads": []}
    for step in range(STEPS):
        batch = make_batch(pairs=PAIRS, seed=step)
        pairs = torch.arange(rank, PAIRS, ranks)
        micro_batches = pairs.chunk(2) if accumulate else [pairs]
        grad = torch.zeros_like(bias)
        with gw.accumulate() if accumulate else torch.enable_grad():
            for micro in micro_batches:
                rows = torch.cat([micro, micro + PAIRS])
                logits = batch.logits[rows] + bias
                if rank == poison_rank and step == 1:
                    logits = logits * torch.nan
                loss = fused_grpo_loss(
                    logits, batch.labels[rows], batch.ref_logps[rows], batch.group_ids[micro], gw
                ).loss
                grad += torch.autograd.grad(loss, bias)[0] * len(micro) / len(pairs)
        if accumulate:
            gw.step()
        if ranks > 1:
            dist.all_reduce(grad, group=group)
            grad /= ranks
        with torch.no_grad():
            bias -= 0.1 * grad.nan_to_num()
        history["log_alpha"].append(gw.log_alpha.clone())
        history["grads"].append(grad)
    history["counters"] = [int(gw.num_updates), int(gw.num_skipped)]
    return history


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=LIMIT)
    results = {}
    for estimator in ESTIMATORS:
        results[estimator, "plain"] = train(rank, RANKS, estimator, accumulate=False)
        results[estimator, "accumulated"] = train(rank, RANKS, estimator, accumulate=True)
    results["poisoned"] = train(rank, RANKS, "importance", accumulate=False, poison_rank=1)
    given = dist.new_group([0, 1])
    results["group given"] = train(rank, RANKS, "importance", accumulate=False, group=given)
    alone = [dist.new_group([r]) for r in range(RANKS)]
    gw = GroupWeights.robust(SIZES, 0.3, process_group=alone[rank])
    gw.observe(torch.full((3,), float(rank)), torch.ones(3), torch.ones(3))
    gw.step()
    results["alone"] = gw.log_alpha
    assert copy.deepcopy(gw).process_group is gw.process_group
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.spawn(worker, (str(folder),), nprocs=RANKS, join=False)
    deadline = datetime.datetime.now() + LIMIT
    while not context.join(timeout=5):  # raises what a worker raised
        if datetime.datetime.now() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"two ranks did not finish within {LIMIT}")
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("how", ["plain", "accumulated"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_alpha_has_the_same_bits_on_every_rank(ranks, estimator, how):
    first, second = (run[estimator, how]["log_alpha"] for run in ranks)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("how", ["plain", "accumulated"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_alpha_and_gradient_are_those_of_one_process_on_the_whole_batch(ranks, estimator, how):
    alone = train(0, 1, estimator, accumulate=how == "accumulated")
    together = ranks[0][estimator, how]
    for name in ("log_alpha", "grads"):
        for ours, whole in zip(together[name], alone[name], strict=True):
            # float64 sums in another order; a float32 step would be off by more than this.
            assert_close(ours, whole, rtol=1e-11, atol=1e-12)
    assert together["counters"] == [STEPS, 0]


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_both(ranks):
    for run in ranks:
        poisoned = run["poisoned"]
        assert poisoned["counters"] == [STEPS - 1, 1]
        assert torch.equal(poisoned["log_alpha"][1], poisoned["log_alpha"][0])
        assert not torch.equal(poisoned["log_alpha"][2], poisoned["log_alpha"][1])
    assert torch.equal(ranks[0]["poisoned"]["log_alpha"][-1], ranks[1]["poisoned"]["log_alpha"][-1])


def test_a_group_that_is_given_is_the_one_that_is_summed_over(ranks):
    assert torch.equal(ranks[0]["group given"]["log_alpha"][-1], ranks[0]["importance", "plain"]["log_alpha"][-1])
    assert not torch.equal(ranks[0]["alone"], ranks[1]["alone"])
