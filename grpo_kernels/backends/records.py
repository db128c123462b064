"""Recorded runs: what ``PROVEN`` rests on, how such a file is made and what makes it acceptable."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from . import cache, child, device_kind

FIELDS = ("device", "capability", "driver", "python", "torch", "triton", "commit", "source", "date", "command")
"""What a record says besides the outcome, so that the run can be repeated."""


def make(name: str, device: torch.device, runs: Mapping[str, child.Run], command: str, commit: str = "") -> dict:
    """The record of one or several runs of all cases, by label (of a CPU: the instruction set).

    Args:
        name: of the backend.
        device: where it ran.
        runs: outcomes by label.
        command: that repeats it.
        commit: of the source; "" for GRPO_KERNELS_COMMIT, or what git says.
    """
    shown = {
        label: {
            "status": run.status, "reason": run.reason, "seconds": round(run.seconds, 1),
            "passed": len(run.cases) - len(run.failures), "failed": len(run.failures),
            "failures": [f"{case.name}: {case.message}"[:500] for case in run.failures], "calls": run.calls,
        }
        for label, run in runs.items()
    }  # fmt: skip
    return {
        "backend": name,
        "device_kind": device_kind(device),
        **cache.describe_device(device),
        **cache.versions(),
        "commit": commit or commit_here(),
        "source": cache.package_hash(),
        "date": today(),
        "command": command,
        "passed": sum(run["passed"] for run in shown.values()),
        "failed": sum(run["failed"] for run in shown.values()),
        "runs": shown,
    }


def write(record: Mapping, folder: Path) -> Path:
    """``folder/<kind of device>/prove-<backend>.json``, the place that ``PROVEN`` names under ``benchmarks/results/``.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / record["device_kind"] / f"prove-{record['backend']}.json"
    cache.write_json(path, dict(record))
    return path


def problem(record: Mapping, name: str, kind: str, operations: Mapping[str, str]) -> str | None:
    """None where the record lets ``auto`` pick the backend on this kind of device, else why not."""
    if (record.get("backend"), record.get("device_kind")) != (name, kind):
        return f"it is of {record.get('backend')} on {record.get('device_kind')}"
    missing = [field for field in FIELDS if not record.get(field)]
    if missing:
        return f"it does not say {', '.join(missing)}"
    runs = record.get("runs") or {}
    if not runs or record.get("failed") != 0 or not record.get("passed"):
        return "no run, or a failed case"
    for label, run in runs.items():
        if run["status"] != "passed" or run["failed"] or not run["passed"]:
            return f"the run {label} did not pass: {run['reason']}"
        unused = [operation for operation in operations if not run["calls"].get(operation)]
        if unused:
            return f"the run {label} called no {', '.join(unused)}"
    # A dry run has none, and a tree with changes cannot be looked up.
    return None if re.fullmatch(r"[0-9a-f]{7,64}", record["commit"]) else f"{record['commit']!r} is no commit"


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def commit_here(sources: Sequence[str] = ("csrc", "grpo_kernels")) -> str:
    """GRPO_KERNELS_COMMIT, else the checkout's commit, "+changes" where ``sources`` differ from it, else "unknown"."""
    given = os.environ.get("GRPO_KERNELS_COMMIT", "").strip()
    if given:
        return given
    # An installed package may lie inside somebody else's checkout.
    ours = _git("ls-files", "--error-unmatch", "grpo_kernels/__init__.py") != "unknown"
    head = _git("rev-parse", "HEAD") if ours else "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", *sources)
    return f"{head}+changes" if head != "unknown" and changed else head


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=cache.PACKAGE.parent, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
