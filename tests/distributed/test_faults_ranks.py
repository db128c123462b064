"""A rank that dies, hangs or fails: the others end with an error, in bounded time, and alpha has not split in two.

Two gloo processes in a plain loop, as a user would write it: the public loss, ``GroupWeights``, and an all-reduce of
the gradient.  The trainer's own ranks under torchrun are in test_trainer_torchrun.py.
"""

from __future__ import annotations

import datetime
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


if __name__ == "__main__":
    loop(Path(sys.argv[1]), int(sys.argv[2]))
