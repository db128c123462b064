"""What every rank of test_trainer_torchrun.py does: one run of the trainer after another, and a note of each.

``python -m torch.distributed.run ... rank_scenarios.py FOLDER NAME ...`` leaves ``FOLDER/NAME.RANK.json``; a name says
what the run is made of, word for word.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from tiny_runs import tiny_config, write_dropout_model

from grpo_kernels.trainer import inputs, loop
from grpo_kernels.trainer.config import (
    DistributedConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    SupervisedConfig,
    TrainConfig,
)
from grpo_kernels.trainer.data.sampling import GroupSampler
from grpo_kernels.trainer.model.distributed import is_sharded, local_part

SGD = OptimConfig(
    name="sgd", lr=0.1, momentum=0.5, max_grad_norm=0.5, average_iterates=True, projection="start",
    projection_radius=0.05,
)  # fmt: skip
"""Everything that a step can do to the parameters, each part of it at work."""

# An element of the gradient that is nothing but rounding would move by a whole lr, were eps not above it.
ADAMW = OptimConfig(name="adamw", lr=1e-2, weight_decay=0.1, eps=1e-3, projection="origin", projection_radius=5.0)

DIES_AT = 4
"""The batch at which a run is interrupted, a step after its checkpoint."""


def configured(folder: Path, name: str, where: str) -> TrainConfig:
    """The run that a name stands for, in a folder named after ``where`` it takes place."""
    config = tiny_config(folder, f"{where} {name}", batch_size=12, steps=6, eval_every=3, save_every=3, optim=SGD)
    words = name.split()
    config.distributed = DistributedConfig("fully_shard" if "sharded" in words else "ddp", timeout_minutes=1.0)
    config.loss.fused_head = "logits" not in words
    config.bf16 = "bf16" in words
    if "warm-up" in words:
        config.supervised = SupervisedConfig(steps=3, batch_size=6)
    if "accumulated" in words:
        config.micro_batch_size = 4  # a share of 6 goes in 4 and 2
    if "lagging" in words:
        config.micro_batch_size = 6  # all of a share of two ranks, and half of what one process has
    if "categorical" in words:
        config.sampling = "categorical"
    if "adamw" in words:
        config.optim = ADAMW
    if "tied" in words or "dropout" in words:
        config.model = ModelConfig(name=str(folder / ("tied" if "tied" in words else "dropout")))
    if "lora" in words:
        config.model.lora = LoraConfig(rank=2)
    config.distributed.find_unused_parameters = "unused" in words
    config.model.gradient_checkpointing = "checkpointed" in words
    return config


def prepare(folder: Path, resumed: list[str]) -> None:
    """Write the files that all runs read, and checkpoints of one process where those of many shall go on."""
    tiny_config(folder)
    texts = (folder / "train.jsonl").read_text().splitlines()
    write_dropout_model(folder / "dropout", texts)
    write_dropout_model(folder / "tied", texts, dropout=0.0)
    for name in resumed:
        config = configured(folder, name, "many")
        config.distributed.strategy = "ddp"
        with interrupted():
            try:
                loop.train(config)
            except RuntimeError as error:
                assert str(error) == "the power went"  # noqa: PT017 - any other is a fault


def scenario(folder: Path, name: str, rank: int) -> dict[str, Any]:
    """The run of a name, with whatever its last words say goes wrong in it."""
    config = configured(folder, name, "many")
    if "unused" in name:
        with loading(add_an_unused_parameter):
            return train(config)
    if name.endswith("interrupted"):
        with interrupted():
            first = train(config)
        torch.manual_seed(99)
        return {"first": first, **train(replace(config, resume=True))}
    if name.endswith("resumed"):
        return train(replace(config, resume=True))
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
    if name.endswith("other model on one") and rank == 1:
        with loading(change_one_number):
            return train(config)
    if name.endswith("poisoned on one"):
        with poisoned(rank):
            return train(config)
    if name.endswith("endless gradient on one"):
        with endless_gradient(rank):
            return train(config)
    if name.endswith("full disk"):
        error = OSError(28, "No space left on device")
        with mock.patch("grpo_kernels.trainer.run.checkpoint.sync_file", side_effect=error):
            return train(config)
    return train(config)


def train(config: TrainConfig) -> dict[str, Any]:
    """One run, and what this rank can tell of it."""
    jobs: list[Any] = []
    whole = loop._Job.run

    def run(job: Any, began: float) -> Any:
        jobs.append(job)
        return whole(job, began)

    note: dict[str, Any] = {}
    began = time.monotonic()
    with mock.patch.object(loop._Job, "run", run):
        try:
            result = loop.train(config)
            note["report"] = result.summary["test"]
        except Exception as error:
            note["error"] = [type(error).__name__, str(error)]
    note["seconds"] = time.monotonic() - began
    for job in jobs:
        note["sharded"] = [is_sharded(p) for p in job.model.parameters()]
        note["trained"] = type(job.policy.trained).__name__
        note["units"] = sum(hasattr(module, "reshard") for module in job.model.modules())
        note["log_alpha"] = [value.hex() for value in job.group_weights.log_alpha.tolist()]
    return note


@contextmanager
def interrupted() -> Iterator[None]:
    """Within, every rank's run ends where it would draw batch ``DIES_AT``."""

    def die() -> None:
        raise RuntimeError("the power went")

    with before_batch(DIES_AT, die):
        yield


@contextmanager
def before_batch(step: int, act: Any) -> Iterator[None]:
    """Do something just before a batch is drawn."""
    whole = GroupSampler.batch

    def batch(self: GroupSampler, number: int) -> list[int]:
        if number == step:
            act()
        return whole(self, number)

    with mock.patch.object(GroupSampler, "batch", batch):
        yield


@contextmanager
def loading(change: Callable[[Any], None]) -> Iterator[None]:
    """Models are changed as they are loaded."""
    whole = inputs.load_policy

    def load_policy(*arguments: Any, **options: Any) -> Any:
        model, tokenizer = whole(*arguments, **options)
        change(model)
        return model, tokenizer

    with mock.patch.object(inputs, "load_policy", load_policy):
        yield


def add_an_unused_parameter(model: Any) -> None:
    """One that no step has a gradient for."""
    model.unused = torch.nn.Parameter(torch.ones(4, 2))


def change_one_number(model: Any) -> None:
    """By as little as there is."""
    weight = model.lm_head.weight.data
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.ones(()))


@contextmanager
def poisoned(rank: int) -> Iterator[None]:
    """At step 5 the second pair of the second rank has a reference that is no number."""
    whole, calls = loop.group_loss, []

    def group_loss(model: Any, batch: Any, ref_logps: torch.Tensor, *others: Any, **settings: Any) -> Any:
        calls.append(None)
        if len(calls) == 5 and rank == 1:
            ref_logps = ref_logps.clone()
            ref_logps[1] = float("nan")
        return whole(model, batch, ref_logps, *others, **settings)

    with mock.patch.object(loop, "group_loss", group_loss):
        yield


@contextmanager
def endless_gradient(rank: int) -> Iterator[None]:
    """In the first step an element of what the second rank holds of the last parameter's gradient is infinite."""
    whole = loop._Job._gradients

    def gradients(job: Any, *arguments: Any) -> Any:
        result = whole(job, *arguments)
        if rank == 1:
            local_part(list(job.parameters.values())[-1].grad).view(-1)[0] = float("inf")
        return result

    with mock.patch.object(loop._Job, "_gradients", gradients):
        yield


def command_line_that_loses_a_rank(arguments: list[str]) -> int:
    """The command line, but for its second rank, which the system kills."""
    from grpo_kernels.cli import main

    if os.environ["RANK"] != "1":
        return main(arguments)
    with before_batch(DIES_AT, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        return main(arguments)


def forget_after(folder: Path, step: int) -> None:
    """Let a finished run stand where it was after a step."""
    for path in (folder / "checkpoints").iterdir():
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)


def run_scenarios(folder: Path, names: list[str]) -> NoReturn:
    """All in one group of ranks: the trainer uses one that stands already."""
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank = dist.get_rank()
    for name in names:
        (folder / f"{name}.{rank}.json").write_text(json.dumps(scenario(folder, name, rank)))
    dist.destroy_process_group()
    os._exit(0)  # as the trainer's command does: gloo's threads live on, and may abort an interpreter that ends


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "lose-a-rank":
        sys.exit(command_line_that_loses_a_rank(sys.argv[2:]))
    run_scenarios(Path(sys.argv[1]), sys.argv[2:])
