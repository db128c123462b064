"""Record a run of every parity case on this machine; a record that passed may go into ``PROVEN``.

    python -m benchmarks.prove --backend cpu --isa all
    python -m benchmarks.prove --backend cuda

The cases are those of ``grpo_kernels.proof``, which the tests and ``grpo-kernels prove`` take too.  Writes
``benchmarks/results/<device kind>/prove-<backend>.json``: device, versions, commit, date and the outcome, for the CPU
once per instruction set.  The exit status is 0 where every case passed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from grpo_kernels.backends import OPERATIONS, available_backends, cache, child, device_kind, records

RESULTS = Path(__file__).parent / "results"
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
SECONDS = 1800.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", required=True, choices=[name for name in available_backends() if name != "torch"])
    parser.add_argument("--isa", default="all", help="one of the CPU's instruction sets, or all that it has")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the record is kept")
    options = parser.parse_args()
    device = torch.device("cpu" if options.backend == "cpu" else "cuda")
    labels = [options.backend]
    if options.backend == "cpu":
        labels = _isas_here() if options.isa == "all" else [options.isa]
    runs = {}
    for label in labels:
        environment = {"GRPO_KERNELS_ISA": label} if options.backend == "cpu" else {}
        run = child.run(options.backend, device, full=True, seconds=SECONDS, environment=environment)
        print(f"{label}: {run.status} {run.reason} ({len(run.cases)} cases, {run.seconds:.0f} s)", flush=True)
        if run.status != "passed":
            print(run.report())
        runs[label] = run
    command = "python -m benchmarks.prove " + " ".join(sys.argv[1:])
    record = records.make(options.backend, device, runs, command)
    print(records.write(record, options.results))
    problem = records.problem(record, options.backend, device_kind(device), OPERATIONS)
    if problem is not None:
        print(f"not a proof: {problem}")
    return 0 if problem is None else 1


def _isas_here() -> list[str]:
    code = "from grpo_kernels.backends import native_cpu as n; raise SystemExit(n.unavailable_reason() is not None)"

    def runs(isa: str) -> bool:
        environment = {**os.environ, "GRPO_KERNELS_ISA": isa}
        return subprocess.run([sys.executable, "-c", code], cwd=cache.PACKAGE.parent, env=environment).returncode == 0

    found = [isa for isa in ISAS if runs(isa)]
    if not found:
        raise SystemExit(f"the cpu backend cannot run here: {available_backends()['cpu']}")
    return found


def describe_software(sources: Sequence[str] = ("csrc", "grpo_kernels")) -> dict[str, object]:
    """Versions, threads, commit and date: what makes a number repeatable.  A change in ``sources`` marks the commit."""
    return {
        **cache.versions(), "cuda": torch.version.cuda, "threads": torch.get_num_threads(),
        "commit": records.commit_here(sources), "date": records.today(),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
