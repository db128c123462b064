"""A rank that dies, hangs or fails: the others end with an error, in bounded time, and alpha has not split in two.

Two gloo processes in a plain loop, as a user would write it: the public loss, ``GroupWeights``, and an all-reduce of
the gradient.  Then the trainer under torchrun, killed at random moments; more of that is in test_trainer_torchrun.py.
"""

from __future__ import annotations

import datetime
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest
from torchrun import finish, launch
from torchrun import start as start_ranks

NIGHTLY = os.environ.get("GRPO_KERNELS_NIGHTLY") == "1"
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 4
"""Seconds that a rank waits for another, as the loops below are started with."""


def loop(folder: Path, rank: int) -> None:
    """Steps without end; every step is noted."""
    import torch
    import torch.distributed as dist

    from grpo_kernels import GroupWeights, fused_grpo_loss

    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2, timeout=limit)
    group_weights = GroupWeights.robust([5, 3, 2], 0.1)
    bias = torch.zeros(11, requires_grad=True)
    with open(folder / f"steps.{rank}", "w") as notes:
        while True:
            logits, labels = torch.randn(8, 6, 11), torch.randint(11, (8, 6))
            out = fused_grpo_loss(logits + bias, labels, None, torch.randint(3, (4,)), group_weights)
            out.loss.backward()
            dist.all_reduce(bias.grad)
            with torch.no_grad():
                bias -= 0.1 * bias.grad
            bias.grad = None
            # As exact text, so that the ranks can be compared.
            print(*(float(x).hex() for x in group_weights.log_alpha), file=notes, flush=True)


def start(folder: Path) -> list[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank)], stderr=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(2)
    ]


def steps(folder: Path, rank: int) -> list[str]:
    path = folder / f"steps.{rank}"
    return path.read_text().splitlines() if path.exists() else []


def ended(process: subprocess.Popen[str], seconds: float) -> str:
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still waiting after {seconds} s") from None
    return said


@pytest.mark.parametrize(
    ("number", "limit"), [(signal.SIGKILL, 30), (signal.SIGSTOP, TIMEOUT + 30)], ids=["dies", "hangs"]
)
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_is_gone_ends_the_other(tmp_path, number, limit, victim):
    processes = start(tmp_path)
    try:
        began = time.monotonic()
        while len(steps(tmp_path, 0)) < 20:
            assert time.monotonic() - began < 120, "the ranks do not meet"
            time.sleep(0.01)
        time.sleep(random.Random(f"{number} {victim}").uniform(0, 0.1))
        processes[victim].send_signal(number)
        said = ended(processes[1 - victim], limit)
        assert processes[1 - victim].returncode == 1
        assert "RuntimeError" in said or "DistBackendError" in said or "DistNetworkError" in said
        # Up to there both had the same alpha after every step that both have noted.
        ours, theirs = steps(tmp_path, 0), steps(tmp_path, 1)
        common = min(len(ours), len(theirs)) - 1  # the last line may be half written
        assert common >= 10
        assert ours[:common] == theirs[:common]
        assert abs(len(ours) - len(theirs)) <= 1
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the ranks")
@pytest.mark.parametrize("strategy", ["ddp", "fully_shard"])
def test_a_trainer_of_two_ranks_of_which_one_is_killed_goes_on_as_if_it_had_not_been(tmp_path, strategy):
    """A random rank at a random moment; on as many ranks the bits are the same."""
    pytest.importorskip("transformers")
    import yaml
    from tiny_runs import tiny_config, write_dropout_model
    from victims import assert_same_end, latest, moment

    config = tiny_config(tmp_path, steps=6, save_every=2)
    texts = (tmp_path / "train.jsonl").read_text().splitlines()
    config.model.name = str(write_dropout_model(tmp_path / "dropout", texts))
    config.distributed.strategy = strategy
    settings = asdict(config) | {"device": "cpu", "quiet": False}
    settings["optim"]["betas"] = list(settings["optim"]["betas"])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    command = ["-m", "grpo_kernels.cli", "train", "--config", tmp_path / "run.yaml", "--resume", "--run-dir"]
    whole = launch(2, *command, tmp_path / "whole")
    assert whole.code == 0, whole.err

    rng, done, attempts = random.Random(strategy), 0, 0
    milestones = ["config.yaml", "reference", "checkpoints/step-00000002", "checkpoints/step-00000004"]
    while done < (10 if NIGHTLY else 1):
        run_dir = tmp_path / f"{attempts}"
        attempts += 1
        assert attempts <= 30, "the runs are over before they can be killed"
        milestone = run_dir / rng.choice(milestones)
        process = start_ranks(2, *command, run_dir)
        began = time.monotonic()
        while not milestone.exists() and process.poll() is None:
            assert time.monotonic() - began < 120, f"{milestone} never came"
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        with suppress(FileNotFoundError, IndexError, ProcessLookupError):  # if it was over first
            ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(rng.choice(ranks)), signal.SIGKILL)
        began = time.monotonic()
        killed = finish(process, seconds=60)
        if killed.code == 0:
            continue
        done += 1
        assert "SIGKILL" in killed.err
        print(f"\nkilled {moment(run_dir)}: torchrun ended after {time.monotonic() - began:.1f} s")
        before = latest(run_dir)
        again = launch(2, *command, run_dir)
        assert again.code == 0, again.err
        assert (f"resuming after step {before}" if before else "starting at the beginning") in again.err
        assert_same_end(run_dir, tmp_path / "whole")


if __name__ == "__main__":
    loop(Path(sys.argv[1]), int(sys.argv[2]))
