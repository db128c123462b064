"""Starting processes as users do, through torchrun's own entry, so that no test can hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
OURS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


class Done(NamedTuple):
    """How a launch ended."""

    code: int
    out: str
    err: str


def start(ranks: int, *arguments: object) -> subprocess.Popen[str]:
    """``torchrun --nproc-per-node RANKS ARGUMENTS``, in a session of its own."""
    paths = [str(ROOT), str(ROOT / "tests" / "integrations"), str(ROOT / "tests" / "distributed")]
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        # A free port of its own choice on this machine.
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        + [str(argument) for argument in arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float) -> Done:
    """Wait for the end; past the limit everything that was started is killed, and the test fails."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"not done within {seconds} s\n{out[-2000:]}\n{err[-4000:]}") from None
    return Done(process.returncode, out, err)


def launch(ranks: int, *arguments: object, seconds: float = 180) -> Done:
    """Start and wait."""
    return finish(start(ranks, *arguments), seconds)
