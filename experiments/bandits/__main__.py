"""The command: the whole study with figures and tables, or one case as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from .data import FEATURES, SCENARIOS
from .study import MAIN, default_jobs, run_cell, run_study

REPOSITORY = Path(__file__).resolve().parents[2]

_DESCRIPTION = """\
Reproduces the log-linear bandit study of Ramesh et al. 2024 (Group Robust Preference Optimization).

Without options: every scenario, every kind of features, six methods, 20 seeds, the convergence rate and the
uncorrected formulas, in under three minutes on two free cores; writes docs/figures/ and the tables in docs/paper.md.
With --features or --scenario or --json: that one case, as a table on the terminal and as JSON."""

_EPILOG = """\
scenarios:
""" + "\n".join(f"  {name:4} {scenario.what}" for name, scenario in SCENARIOS.items())


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bandits",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--features", choices=FEATURES, help=f"one case: its features (default {MAIN[0]})")
    parser.add_argument("--scenario", choices=tuple(SCENARIOS), help=f"one case: its scenario (default {MAIN[1]})")
    parser.add_argument("--seeds", type=parse_seeds, default=parse_seeds("2021-2040"), metavar="A-B,C",
                        help="seeds, ranges and commas (default 2021-2040)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="one case: write its numbers here")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs", metavar="DIR",
                        help="whole study: folder of paper.md and figures/ (default: the repository's)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=default_jobs(), metavar="N",
                        help="whole study: processes, one thread each (default %(default)s)")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")

    if options.features or options.scenario or options.json:
        torch.set_num_threads(1)  # tensors of this size gain nothing from a second thread
        case = (options.features or MAIN[0], options.scenario or MAIN[1])
        numbers = run_cell(*case, options.seeds)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(numbers, indent=1) + "\n")
        print(f"features {case[0]}, scenario {case[1]}, {len(options.seeds)} seeds: worst group, mean ± standard error")
        for method, found in numbers.items():
            parts = [f"{k} {v['mean']:.4f} ± {v['sem']:.4f}" for k, v in found.items() if k != "per_seed"]
            print(f"  {method:7} {'   '.join(parts)}")
        return 0

    from . import figures, tables  # matplotlib loads only where something is drawn

    page = options.docs / "paper.md"
    if not page.is_file():
        parser.error(f"--docs must be a folder with the page paper.md, got {options.docs}")
    study = run_study(options.seeds, options.jobs)
    folder = options.docs / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    tables.save(study, folder / "study.json")
    tables.write(tables.load(folder / "study.json"), page)
    for path in figures.draw_all(study, folder):
        print(path)
    print(f"{study['seconds']:.0f} s for {len(options.seeds)} seeds in {options.jobs} processes")
    return 0


def parse_seeds(text: str) -> tuple[int, ...]:
    """``"2021-2023,2030"`` → (2021, 2022, 2023, 2030)."""
    seeds: list[int] = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        try:
            seeds += range(int(low), int(high) + 1) if dash else [int(low)]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"seeds are numbers, ranges and commas (2021-2040,7), got {text!r}"
            ) from None
    if not seeds or len(set(seeds)) != len(seeds) or max(seeds) >= 2**32:
        raise argparse.ArgumentTypeError(f"seeds must be distinct, at least one, each below 2**32, got {text!r}")
    return tuple(seeds)


if __name__ == "__main__":
    sys.exit(main())
