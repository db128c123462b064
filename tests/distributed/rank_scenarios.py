"""What every rank of test_trainer_torchrun.py does: one run of the trainer after another, and a note of each.

``python -m torch.distributed.run ... rank_scenarios.py FOLDER NAME ...`` writes ``FOLDER/NAME-RANK.json``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_runs import tiny_config, write_dropout_model
from tokenizers import Tokenizer  # noqa: F401 - before torch's threads start, it forks

from grpo_kernels.trainer import loop
from grpo_kernels.trainer.config import DistributedConfig, LoraConfig, ModelConfig, OptimConfig, SupervisedConfig
from grpo_kernels.trainer.distributed import is_sharded
from grpo_kernels.trainer.sampling import GroupSampler
from grpo_kernels.trainer.config import TrainConfig

SGD = OptimConfig(
    name="sgd", lr=0.1, momentum=0.5, average_iterates=True, projection="start", projection_radius=0.05,
    max_grad_norm=0.5,
)  # fmt: skip
"""Everything that a step can do to the parameters, each part of it at work."""

# An element of the gradient that is nothing but rounding would move by a whole lr without an eps above it.
ADAMW = OptimConfig(name="adamw", lr=1e-2, weight_decay=0.1, eps=1e-3, projection="origin", projection_radius=5.0)


def configured(folder: Path, name: str, where: str) -> TrainConfig:
    """The run that a name stands for; ``where`` names its folder, so that one process and several do not meet."""
    config = tiny_config(folder, f"{where}-{name}", batch_size=12, steps=6, eval_every=3, save_every=3, optim=SGD)
    base, _, _ = name.partition(" ")
    strategy = "fully_shard" if base.startswith("shard") else "ddp"
    config.distributed = DistributedConfig(strategy=strategy, timeout_minutes=1.0)
    if "warm-up" in name:
        config.supervised = SupervisedConfig(steps=3, batch_size=6)
    if "accumulated" in name:
        config.micro_batch_size = 4  # shares of 6 on two ranks: 4 and 2
    if "adamw" in name:
        config.optim = ADAMW
    if "lora" in name:
        config.model.lora = LoraConfig(rank=2)
    if "logits" in name:
        config.loss.fused_head = False
    if "tied" in name:
        config.model = ModelConfig(name=str(folder / "tied"))
    if "dropout" in name:
        config.model = ModelConfig(name=str(folder / "dropout"))
    return config


def train(config: TrainConfig, rank: int) -> dict[str, Any]:
    """One run, and what this rank can tell of it."""
    jobs: list[Any] = []
    whole = loop._Job.run

    def run(job, began):
        jobs.append(job)
        return whole(job, began)

    loop._Job.run = run
    note: dict[str, Any] = {}
    began = time.monotonic()
    try:
        result = loop.train(config)
        note["summary"] = result.summary["test"]
    except Exception as error:
        note["error"] = [type(error).__name__, str(error)]
    finally:
        loop._Job.run = whole
        note["seconds"] = time.monotonic() - began
    if jobs:
        job = jobs[0]
        note["sharded"] = [is_sharded(p) for p in job.model.parameters()]
        note["trained"] = type(job.policy.trained).__name__
        note["units"] = sum(hasattr(module, "reshard") for module in job.model.modules())
        note["log_alpha"] = [x.hex() for x in job.group_weights.log_alpha.tolist()]
    return note


@contextmanager
def dying_at(step: int) -> Iterator[None]:
    """The run ends, on every rank, where it would draw a batch."""
    whole = GroupSampler.batch

    def batch(self, number):
        if number == step:
            raise RuntimeError("the power went")
        return whole(self, number)

    GroupSampler.batch = batch
    try:
        yield
    finally:
        GroupSampler.batch = whole


def scenario(folder: Path, name: str, rank: int) -> dict[str, Any]:
    """A name, done."""
    where = "many"
    config = configured(folder, name, where)
    if name.endswith("interrupted"):
        with dying_at(4):
            first = train(config, rank)
        torch.manual_seed(99)
        return {"first": first, **train(replace(config, resume=True), rank)}
    if name.endswith("bad batch size"):
        config.batch_size = 9
    if name.endswith("bad warm-up"):
        config.supervised = SupervisedConfig(steps=1, batch_size=7)
    if name.endswith("unreadable on one") and rank == 1:
        config.data.train = str(folder / "nowhere.jsonl")
    if name.endswith("other pairs on one") and rank == 1:
        config.data.train = config.data.test
    if name.endswith("other settings on one") and rank == 1:
        config.optim = replace(config.optim, lr=0.2)
    if name.endswith("poisoned on one"):
        return poisoned(config, rank)
    if name.endswith("full disk"):
        return full_disk(config, rank)
    return train(config, rank)


def poisoned(config: TrainConfig, rank: int) -> dict[str, Any]:
    """At step 5 the second pair of the second rank has a reference that is no number."""
    whole, calls = loop.group_loss, []

    def group_loss(model, batch, ref_logps, *others, **settings):
        calls.append(None)
        if len(calls) == 5 and rank == 1:
            ref_logps = ref_logps.clone()
            ref_logps[1] = float("nan")
        return whole(model, batch, ref_logps, *others, **settings)

    loop.group_loss = group_loss
    try:
        return train(config, rank)
    finally:
        loop.group_loss = whole


def full_disk(config: TrainConfig, rank: int) -> dict[str, Any]:
    """The first rank, the only one that writes, cannot."""
    whole = os.rename

    def rename(*arguments, **options):
        raise OSError(28, "No space left on device")

    os.rename = rename
    try:
        return train(config, rank)
    finally:
        os.rename = whole


def prepare(folder: Path) -> None:
    """The files that the scenarios read."""
    tiny_config(folder)
    texts = (folder / "train.jsonl").read_text().splitlines()
    write_dropout_model(folder / "dropout", texts)
    write_dropout_model(folder / "tied", texts, dropout=0.0)


def main() -> None:
    torch.set_num_threads(1)
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    rank = int(os.environ["RANK"])
    import datetime

    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for name in names:
        note = scenario(folder, name, rank)
        (folder / f"{name}-{rank}.json").write_text(json.dumps(note))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
