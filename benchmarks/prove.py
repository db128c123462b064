"""Run the kernels' parity matrix on this machine and record the outcome; what passes may go into ``PROVEN``.

    python -m benchmarks.prove --backend cpu --isa all
    python -m benchmarks.prove --backend cuda

Writes ``benchmarks/results/<device kind>/prove-<backend>.json``: device, versions, commit, date, and how many tests
passed and failed, for the CPU once per instruction set.  The exit status is that of the tests.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import torch

from grpo_kernels.backends import backends, device_kind

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
MATRIX = ("test_parity.py", "test_preference_tail.py")
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "asimd")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", required=True, choices=[name for name in backends() if name != "torch"])
    parser.add_argument("--isa", default="all", help="one of the CPU's instruction sets, or all that it has")
    options = parser.parse_args()
    device = torch.device("cpu" if options.backend == "cpu" else "cuda")
    runs: dict[str, dict] = {}
    if options.backend == "cpu":
        wanted = _isas_here() if options.isa == "all" else [options.isa]
        runs = {isa: run_matrix(options.backend, GRPO_KERNELS_ISA=isa) for isa in wanted}
    else:
        runs = {options.backend: run_matrix(options.backend)}
    record = {
        "backend": options.backend,
        "device_kind": device_kind(device),
        **describe_device(device),
        **describe_software(),
        "passed": sum(run["passed"] for run in runs.values()),
        "failed": sum(run["failed"] for run in runs.values()),
        "skipped": sum(run["skipped"] for run in runs.values()),
        "runs": runs,
        "command": "python -m benchmarks.prove " + " ".join(sys.argv[1:]),
    }
    path = RESULTS / device_kind(device) / f"prove-{options.backend}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{path.relative_to(ROOT)}: {record['passed']} passed, {record['failed']} failed")
    return 0 if record["passed"] and not record["failed"] else 1


def run_matrix(backend: str, **environment: str) -> dict[str, int]:
    """Passed, failed and skipped tests of the matrix for one backend, in a process of its own."""
    files = [*MATRIX, *(["test_native_cpu.py"] if backend == "cpu" else [])]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
             *(str(ROOT / "tests" / "kernels" / name) for name in files)],
            cwd=ROOT,
            env={**os.environ, "GRPO_KERNELS_TEST_BACKENDS": backend, **environment},
        )  # fmt: skip
        suite = ElementTree.parse(report).getroot().find("testsuite")
    total, failed, errors, skipped = (int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped"))
    return {"passed": total - failed - errors - skipped, "failed": failed + errors, "skipped": skipped}


def describe_device(device: torch.device) -> dict[str, object]:
    """The device as a reader would look it up."""
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return {
            "device": torch.cuda.get_device_name(device),
            "capability": capability,
            "driver": _smi("driver_version"),
        }
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "device": fields.get("model name", platform.processor() or platform.machine()),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
    }


def describe_software(sources: Sequence[str] = ("csrc", "grpo_kernels/backends")) -> dict[str, object]:
    """Versions, commit and date: what makes a number repeatable.  ``sources``: a change there marks the commit."""
    changed = _git("status", "--porcelain", "--untracked-files=no", *sources)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "HEAD") + ("+changes" if changed else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _isas_here() -> list[str]:
    code = "from grpo_kernels.backends import native_cpu as n; raise SystemExit(n.unavailable_reason() is not None)"
    found = [
        isa
        for isa in ISAS
        if subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "GRPO_KERNELS_ISA": isa}
        ).returncode
        == 0
    ]
    if not found:
        raise SystemExit(f"the cpu backend cannot run here: {backends()['cpu']}")
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _smi(field: str) -> str:
    """Of the first GPU."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"], capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return (done.stdout.strip().splitlines() or ["unknown"])[0]


if __name__ == "__main__":
    raise SystemExit(main())
