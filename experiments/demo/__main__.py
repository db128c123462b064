"""Three methods on the made-up forum: ``python -m experiments.demo`` (and ``make demo``).

For every seed it draws fresh pairs, warms the embedded model up on the chosen replies, and trains it from there by
DPO, IS-DPO and GR-DPO with nothing else changed.  It prints the comparison and leaves ``summary.json`` and
``report.png`` in the output folder, the runs themselves beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from .figure import draw
from .forum import COMMUNITIES
from .runs import METHODS, run_all
from .tables import README_TABLE, comparison, markdown, put_between


def main(arguments: list[str] | None = None) -> None:
    """Parse, train, print, write."""
    parser = argparse.ArgumentParser(prog="python -m experiments.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="runs at a time, one thread each; default: %(default)s",
    )
    parser.add_argument(
        "--write-docs", action="store_true", help="also put the table into README.md and the figure into docs/figures"
    )
    options = parser.parse_args(arguments)

    began = time.monotonic()
    print(__doc__.split("\n\n")[1].replace("\n", " ").replace("``", ""))
    sizes = ", ".join(f"{name} {c.train_pairs}" for name, c in COMMUNITIES.items())
    print(f"training pairs: {sizes}.  {len(options.seeds) * len(METHODS)} runs, {options.jobs} at a time:", flush=True)
    results = run_all(options.seeds, options.out, options.jobs)
    summary = {"seeds": options.seeds, "methods": results}
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    figure = options.out / "report.png"
    draw(summary, options.out, METHODS, figure)
    print("\n" + comparison(summary, METHODS) + "\n")
    print(f"{verdict(summary)}  ({time.monotonic() - began:.0f} s)")
    print(f"wrote {options.out / 'summary.json'} and {figure}")
    if options.write_docs:
        Path("docs/figures").mkdir(parents=True, exist_ok=True)
        Path("docs/figures/demo.png").write_bytes(figure.read_bytes())
        Path("docs/figures/demo.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        put_between(Path("README.md"), README_TABLE, markdown(summary, METHODS))


def verdict(summary: dict[str, Any]) -> str:
    """What the numbers say, whichever way they came out."""
    worst = {method: [run["worst_group_loss"] for run in runs] for method, runs in summary["methods"].items()}
    others = [min(losses) for losses in zip(*(v for k, v in worst.items() if k != "gr_dpo"), strict=True)]
    wins = sum(gr < other for gr, other in zip(worst["gr_dpo"], others, strict=True))
    return f"GR-DPO has the lowest worst-group loss in {wins} of {len(others)} seeds."


if __name__ == "__main__":
    main()
