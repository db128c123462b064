"""Two gloo ranks on half the batch each are one process on the whole, alpha and evaluation included."""

from __future__ import annotations

import datetime
import os

import pytest
import torch
import torch.distributed as dist
from trl_runs import furthest, pairs, parameters, robust, watch_alpha

RANKS, LIMIT = 2, datetime.timedelta(seconds=120)
COMMON = {"group_lr": 0.1, "train_sampling_strategy": "sequential"}
ACCUMULATED = {**COMMON, "gradient_accumulation_steps": 2}
# Ranks take turns with batches, so a window of two micro-batches on two ranks is four neighbouring batches of one.
RUNS = {"plain": (COMMON, 4), "accumulated": (ACCUMULATED, 2)}


def results(folder, settings, batch_size):
    trainer = robust(
        folder, eval_dataset=pairs(9, seed=5), per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=2, **settings,
    )  # fmt: skip
    alphas = watch_alpha(trainer)
    trainer.train()
    metrics = {name: value for name, value in trainer.evaluate().items() if "group" in name}
    return {
        "alphas": torch.stack(alphas),
        "parameters": parameters(trainer),
        "metrics": metrics,
        "log": [{k: v for k, v in line.items() if "group_" in k or k == "loss"} for line in trainer.state.log_history],
        "wrapped": type(trainer.model_wrapped).__name__,
    }


def worker(rank, folder):
    torch.set_num_threads(1)
    # What a launcher says; the address only has to be there, since the ranks meet in a file.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="none", MASTER_PORT="1")
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=LIMIT)
    done = {name: results(f"{folder}/{name}", settings, size // RANKS) for name, (settings, size) in RUNS.items()}
    torch.save(done, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # as the trainer's command does: gloo's threads live on, and may abort an interpreter that ends


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one(tmp_path, ranks, name):
    settings, size = RUNS[name]
    whole = results(tmp_path, settings, size)
    for run in (ranks[0][name], ranks[1][name]):
        assert run["wrapped"] == "DistributedDataParallel"
        assert (run["alphas"] - whole["alphas"]).abs().max() < 1e-6
        assert furthest(run["parameters"], whole["parameters"]) < 1e-6
        # Nine pairs do not go evenly into batches of two on two ranks: what accelerate adds must not be counted.
        assert run["metrics"] == pytest.approx(whole["metrics"], abs=1e-5)
        for mine, theirs in zip(run["log"], whole["log"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
    assert torch.equal(ranks[0][name]["alphas"], ranks[1][name]["alphas"])
    assert (whole["alphas"][-1] - whole["alphas"][0]).abs().max() > 0.01
