"""The benchmarks: ``python -m benchmarks {logps,head,tail,step,overhead,report}``."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

import torch

from benchmarks.measure import CLOCKS
from benchmarks.prove import RESULTS
from benchmarks.suite import run_command

COMMANDS = {
    "logps": "log-probabilities from logits, forward and backward",
    "head": "from hidden states through the LM head, with and without its gradient",
    "tail": "from log-probabilities to losses, group sums and the α step",
    "step": "a whole preference step of a model",
    "overhead": "host time of a call on tiny tensors",
    "report": "benchmarks/report.md, its figures and the README's table, from the files of results",
}
SHARES = {"logps": 4, "head": 9, "tail": 1, "step": 5, "overhead": 1, "report": 0}
"""How --seconds is shared out; what one command leaves over the next may use."""


def main() -> int:
    options = parser().parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device cuda: PyTorch sees no GPU on this machine")
    if options.device == "cuda" and options.clocks != ["wall"]:
        parser().error("--clocks cpu is for --device cpu: a GPU's time is not the processor's")
    options.size = options.size or {"cpu": "cpu", "cuda": "gpu"}[options.device]
    options.ends = time.monotonic() + options.seconds
    if len(options.commands) == 1:
        run_command(options.commands[0], options)
    status, start, shares = 0, time.monotonic(), [SHARES[command] for command in options.commands]
    for place, command in enumerate(options.commands):
        options.ends = start + options.seconds * sum(shares[: place + 1]) / max(sum(shares), 1)
        # Each in a process of its own, so that none finds what another left behind.
        process = multiprocessing.get_context("spawn").Process(target=run_command, args=(command, options))
        process.start()
        process.join()
        status |= int(process.exitcode != 0)
    return status


def parser() -> argparse.ArgumentParser:
    here = "cuda" if torch.cuda.is_available() else "cpu"
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times, memory and errors beside PyTorch and the peers installed here; see benchmarks/report.md.",
        epilog="commands: " + "; ".join(f"{name}: {what}" for name, what in COMMANDS.items()),
    )
    add = made.add_argument
    add("commands", nargs="+", choices=COMMANDS, metavar="command", help=", ".join(COMMANDS))
    add("--device", choices=("cpu", "cuda"), default=here, help="%(default)s here")
    add("--size", choices=("cpu", "gpu"), default=None, help="of the shapes; as the device unless told")
    add("--rounds", type=int, default=0, help="how many; as the command has it unless told")
    add("--all", action="store_true", help="every case and variant of head, not only what fits into ten minutes")
    add("--quick", action="store_true", help="3 rounds: to see that it runs, not for the numbers")
    add(
        "--seconds", type=float, default=float("inf"), help="no new case begins after this; what tells most comes first"
    )
    add("--only", default="", metavar="TEXT", help="cases with this in their title")
    add("--skip", nargs="+", default=[], metavar="TEXT", help="variants with one of these in their name")
    add("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), default=None, help="of logps and head")
    add("--clocks", nargs="+", choices=CLOCKS, default=["wall"], help="cpu: processor time of one thread, CPU only")
    add("--no-memory", dest="memory", action="store_false", help="no fresh processes for the peak of memory on CPU")
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="where the files of results are kept")
    return made


if __name__ == "__main__":
    sys.exit(main())
