"""The benchmarks: ``python -m benchmarks {overhead} ...``."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.prove import RESULTS

COMMANDS = {
    "overhead": "host time of a call on tiny tensors",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times and memory beside PyTorch and the peers that are installed; see benchmarks/report.md.",
        epilog="commands: " + "; ".join(f"{name}: {what}" for name, what in COMMANDS.items()),
    )
    parser.add_argument("commands", nargs="+", choices=COMMANDS, metavar="command", help=", ".join(COMMANDS))
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it runs, not for the numbers")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the CSV files are kept")
    options = parser.parse_args()
    status = 0
    for command in options.commands:
        status |= importlib.import_module(f"benchmarks.{command}").main(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
