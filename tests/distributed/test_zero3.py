"""A fused head under DeepSpeed's ZeRO-3: two gloo processes on half the batch each are one process on the whole."""

from __future__ import annotations

import datetime
import os

import pytest
import torch
import torch.distributed as dist
from test_fully_shard import LIMIT, PAIRS, RANKS, STEPS, attached, batch, build, train

from grpo_kernels import GroupWeights, preference_loss

pytest.importorskip("deepspeed")

CONFIG = {
    "train_batch_size": PAIRS,
    "train_micro_batch_size_per_gpu": PAIRS // RANKS,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "gradient_clipping": 0.0,
    # Nothing stays gathered: the head's weight is there during the head's call and during its backward alone.
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    },
}

CASES = {"untied": False, "tied": True, "attached first": False}


def train_sharded(name, rank):
    import deepspeed

    model = build(CASES[name])
    if name == "attached first":
        attached(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    assert engine.zero_optimization_stage() == 3
    assert all(parameter.numel() == 0 and parameter.ds_numel for parameter in model.parameters())
    attached(engine)
    weights, losses = GroupWeights.robust([5, 9, 2], 0.3), []
    for step in range(STEPS):
        ids, labels, ref_logps, group_ids = batch(step, torch.arange(rank, PAIRS, RANKS))
        out = engine(input_ids=ids, fused_labels=labels)
        result = preference_loss(out.sequence_logps, ref_logps, group_ids, weights)
        engine.backward(result.loss)
        assert model.lm_head.weight.numel() == 0, "the head's weight stayed gathered"
        engine.step()
        losses.append(result.loss.detach())
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {"loss": losses, "alpha": weights.log_alpha, "parameters": parameters}


def worker(rank, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "DS_ACCELERATOR": "cpu"}
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=LIMIT)
    torch.save({name: train_sharded(name, rank) for name in CASES}, f"{folder}/{rank}.pt")
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


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process_on_the_whole_batch(ranks, name):
    expected = train(attached(build(CASES[name])))
    for run in ranks:
        torch.testing.assert_close(run[name]["alpha"], expected["alpha"], rtol=1e-6, atol=0)
        for parameter, tensor in expected["parameters"].items():
            torch.testing.assert_close(run[name]["parameters"][parameter], tensor, rtol=1e-6, atol=1e-6, msg=parameter)
    losses = torch.stack([torch.stack(run[name]["loss"]) for run in ranks]).mean(dim=0)
    torch.testing.assert_close(losses, torch.stack(expected["loss"]), rtol=1e-6, atol=0)
