"""What ``gpu_check.py`` measures in a minute and a half: those cases of ``python -m benchmarks`` that say most.

    python tools/gpu_bench.py --csv FILE [--seconds 70] [--skip NAME] [--tiny]

Log-probabilities and the gradient of 16384 x 128256 logits, the LM head of Llama-3-8B over 16384 rows, the tail.
All data is random.  The rows of a case are of one interleaved run: our backends, PyTorch, ``torch.compile``, Liger, TRL
and other peers where they are installed ("absent" where not), a copy and the bare GEMMs.  "x floor" is the time over
that of the GEMMs that the head's plan asks for, at cuBLAS's rate in that run.  A variant whose result is wrong gets no
time.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import head, logps, suite, tail
from benchmarks.shapes import LLAMA, Batch, Head
from grpo_kernels.head.plan import make_plan

COLUMNS = {
    "variant": "variant", "ms": "ms", "q1_ms": "q1", "q3_ms": "q3", "vs_ours": "vs ours", "of_copy": "of copy",
    "of_gemm": "of GEMMs", "floor": "x floor", "peak_mib": "peak MiB", "error": "error", "error_grad": "error grad",
    "status": "status",
}  # fmt: skip
"""Of a row of the benchmarks, and what it is called in the file."""

ROWS_16K = Batch("16384 rows", 8, 1024)
SLOW_TO_COMPILE = ["torch.compile"]


class Job(NamedTuple):
    """One case of one command."""

    module: object
    command: str
    case: object
    skip: list[str]
    rounds: int = 100
    """At most; fewer where the command has it so."""


JOBS = [
    Job(logps, "logps", logps.Case("16384 x 128256", logps.BOTH, "bfloat16", 16384, 128256), []),
    # Compiling this head takes longer than measuring it, and on the logits above the compiler is there.
    Job(head, "head", head.Case(LLAMA, ROWS_16K, head.FULL, "bfloat16"), SLOW_TO_COMPILE),
    Job(head, "head", head.Case(LLAMA, ROWS_16K, head.FROZEN, "bfloat16"), SLOW_TO_COMPILE),
    Job(tail, "tail", tail.Case(tail.TAIL, 64, 4), SLOW_TO_COMPILE),
    Job(tail, "tail", tail.Case(tail.TAIL, 4096, 10000), SLOW_TO_COMPILE),
    Job(logps, "logps", logps.Case("8192 x 32000", logps.BOTH, "float32", 8192, 32000), SLOW_TO_COMPILE),
]
TOY_HEAD, TOY_BATCH = Head("toy", 96, 16), Batch("16 rows", 2, 4)
NO_PEERS = ["torch.compile", "TRL", "cut-cross-entropy", "Liger", "quack"]
"""Which take seconds to compile, or to import."""
TINY_JOBS = [
    Job(logps, "logps", logps.Case("8 x 100", logps.BOTH, "bfloat16", 8, 100), NO_PEERS, 3),
    Job(head, "head", head.Case(TOY_HEAD, TOY_BATCH, head.FULL, "bfloat16"), NO_PEERS, 3),
    Job(head, "head", head.Case(TOY_HEAD, TOY_BATCH, head.FROZEN, "bfloat16"), NO_PEERS, 3),
    Job(tail, "tail", tail.Case(tail.TAIL, 4, 2), NO_PEERS, 3),
]
"""Of the same kinds, at a size that says nothing: to see that they run."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True, help="where the rows go; written after every case")
    parser.add_argument("--seconds", type=float, default=70, help="no new case begins after this")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="a backend that is left out")
    parser.add_argument("--tiny", action="store_true", help="other cases, at the size of a toy")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_bench: PyTorch sees no GPU on this machine", file=sys.stderr)
        return 2
    left_out = [suite.OURS + name for name in options.skip]
    jobs = [job._replace(skip=[*job.skip, *left_out]) for job in (TINY_JOBS if options.tiny else JOBS)]
    return measure(jobs, torch.device("cuda"), options.csv, time.monotonic() + options.seconds)


def measure(jobs: list[Job], device: torch.device, path: Path, ends: float) -> int:
    """All cases for which there is time; 1 if one of ours was wrong or failed."""
    lines: list[dict[str, str]] = []
    broken = 0
    for job in jobs:
        if time.monotonic() > ends:
            lines.append({"what": title(job.case), "status": "no time left"})
        else:
            try:
                rows = run(job, device, ends)
            except Exception as error:  # what comes after is measured all the same
                traceback.print_exc()
                broken += 1
                lines.append({"what": title(job.case), "status": f"failed: {type(error).__name__}"})
            else:
                broken += sum(suite.ours_is_broken(row) for row in rows)
                lines += with_floor(job, rows, device)
        write(lines, path)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"{len(lines)} rows in {path.name}")
    return 1 if broken else 0


def write(lines: list[dict[str, str]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["what", *COLUMNS.values()])
        writer.writeheader()
        writer.writerows(lines)


def run(job: Job, device: torch.device, ends: float) -> list[suite.Row]:
    options = Namespace(device=device.type, skip=job.skip, memory=False, ends=ends)
    fields = {**job.case.fields(), "clock": "wall"}
    print(f"\n{title(job.case)}", flush=True)
    settings = replace(job.module.SETTINGS, rounds=min(job.rounds, job.module.SETTINGS.rounds))
    return suite.run_case(job.command, job.case, job.module.build(job.case, device), fields, options, settings)


def title(case: suite.Case) -> str:
    fields = case.fields()
    return f"{fields['case']}, {fields['work']}, {fields['dtype']}"


def with_floor(job: Job, rows: list[suite.Row], device: torch.device) -> Iterator[dict[str, str]]:
    """The rows as they stand in the file; those of the head beside the GEMMs of their plan."""
    bare = next((row["ms"] for row in rows if row["variant"] == suite.GEMMS and "ms" in row), None)
    for row in rows:
        gemms = gemms_of(job.case, str(row["variant"]), device) if job.command == "head" else None
        if bare and gemms and "ms" in row:
            row["floor"] = row["ms"] / (bare * gemms / 3)
        yield {"what": title(job.case), **{label: shown(name, row.get(name)) for name, label in COLUMNS.items()}}


def gemms_of(case: head.Case, variant: str, device: torch.device) -> float | None:
    """How many times 2 * rows * V * H operations the plan of one of our variants takes; None for the others."""
    if not variant.startswith(suite.OURS) or "through logits" in variant:
        return None
    budget: int | str = 0 if variant.endswith("budget 0") else "auto"
    full = case.work == head.FULL
    plan = make_plan(
        case.batch.rows, case.head.hidden, case.head.vocabulary, getattr(torch, case.dtype), device, budget,
        grad_hidden=case.work != head.NO_GRADIENT, grad_weight=full,
    )  # fmt: skip
    return plan.gemms


FORMS: dict[str, Callable[[float], str]] = {
    "of_copy": "{:.0%}".format, "of_gemm": "{:.0%}".format, "vs_ours": "{:.2f}".format, "floor": "{:.2f}".format,
    "peak_mib": "{:.0f}".format, "error": "{:.0e}".format, "error_grad": "{:.0e}".format,
}  # fmt: skip


def shown(name: str, value: object) -> str:
    if value is None:
        return ""
    return FORMS.get(name, "{:.4g}".format)(value) if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
