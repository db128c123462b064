"""What ``gpu_check.py`` writes down: the machine, what Triton compiled, the rows that were measured, the steps.

As a script it prints what it finds of the GPU, or why there is none: in a process of its own, so that the one that runs
the steps holds no memory of the GPU, and does not wait where the driver does.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

from gpu_steps import ROOT, Result

MOST_FILES, MOST_BYTES, MOST_FOLDERS = 8, 16 << 20, 2
"""Of the output folder: the results have to travel."""

DETAIL = 300
"""Characters of a step's line in the summary; the log has the rest."""


def cuda_tool(name: str) -> str:
    """A tool of the CUDA toolkit, which need not be on PATH."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or str(Path(home, "bin", name))


def printed(command: list[str]) -> str:
    """The last line that a command prints, "unknown" where it does not run."""
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = output.stdout.strip().splitlines()
    return lines[-1] if lines and output.returncode == 0 else "unknown"


def commit_here() -> str:
    """Of the checkout, with a mark where files were changed; "unknown" where there is none."""
    commit = printed(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    changes = printed(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return commit if "unknown" in (commit, changes) else commit + "+changes"


def gpu_reason() -> str | None:
    """None where there is an NVIDIA GPU that PyTorch can use, else why not."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    if torch.version.hip is not None:
        return "this PyTorch is built for AMD GPUs; the check is for NVIDIA's"
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} sees no NVIDIA GPU on this machine"
    try:
        torch.zeros(1, device="cuda").item()
    except RuntimeError as error:
        return f"PyTorch {torch.__version__} sees a GPU that it cannot use ({str(error).splitlines()[0]})"
    return None


def machine() -> dict[str, str]:
    """What the results were made on."""
    import torch

    found = {
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "memory": f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.1f} GiB",
    }
    for name in ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory", "temperature.gpu"):
        found[name] = printed(["nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader"])
    found |= {
        "nvcc": printed([cuda_tool("nvcc"), "--version"]),
        "processors": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "none"
    return found


class Compilations:
    """What the processes of a run have written down of Triton's compilations (``gpu_hooks/sitecustomize.py``)."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen = path, 0
        self.total: Counter[str] = Counter()

    def since_last(self) -> str:
        """Those of the step that has just ended, as a phrase; empty where there were none."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        words = [line.split() for line in lines[self.seen :]]
        self.seen = len(lines)
        counts = Counter(word[0] for word in words if len(word) == 3)
        self.total += counts
        seconds = sum(float(word[2]) for word in words if len(word) == 3 and word[0] == "compiled")
        if not counts:
            return ""
        return f"Triton compiled {counts['compiled']} in {seconds:.0f} s, found {counts['found']} in its cache"


def summary(results: list[Result], facts: dict[str, str], bench: Path, tuned: str) -> str:
    lines = [
        f"{facts['device']}, driver {facts['driver_version']}, torch {facts['torch']}, triton {facts['triton']}",
        f"commit {facts['commit']}",
        "",
    ]
    if bench.exists():
        with bench.open(newline="") as file:
            lines += [*measured(list(csv.DictReader(file))), ""]
    lines += [*tuned.rstrip().splitlines(), ""] if tuned.strip() else []
    lines += [f"{'step':<12}{'status':<9}{'seconds':>8}  detail"]
    lines += [f"{r.step:<12}{r.status:<9}{r.seconds:>8.0f}  {r.detail[:DETAIL]}" for r in results]
    return "\n".join(lines)


def measured(rows: list[dict[str, str]]) -> list[str]:
    """The benchmark's rows case by case; what is not installed, in one line."""
    shown = [row for row in rows if not row["status"].startswith("absent")]
    names = [name for name in (rows[0] if rows else {}) if name not in ("what", "status")]
    widths = {name: max([len(name), *(len(row[name] or "") for row in shown)]) for name in names}
    lines, before = [], None
    for row in shown:
        if row["what"] != before:
            before = row["what"]
            lines += [before, "  " + "  ".join(name.ljust(widths[name]) for name in names).rstrip()]
        told = "" if row["status"] == "ok" else "  " + row["status"][:100]
        lines.append("  " + "  ".join((row[name] or "").ljust(widths[name]) for name in names).rstrip() + told)
    absent = {f"{row['variant']} ({row['status'].removeprefix('absent: ')})" for row in rows if row not in shown}
    return [*lines, *(["absent: " + "; ".join(sorted(absent))] if absent else [])]


def unfit(out: Path) -> list[str]:
    """What keeps the files of a folder from travelling: their number, sizes, names, and how deep they lie."""
    files = sorted(path for path in out.rglob("*") if not path.is_dir())
    found = [f"{len(files)} files, more than {MOST_FILES}"] if len(files) > MOST_FILES else []
    for path in files:
        place = path.relative_to(out)
        if not all(re.fullmatch(r"[A-Za-z0-9._-]+", part) for part in place.parts):
            found.append(f"{place}: a name with other than letters, digits, '.', '_' and '-'")
        if len(place.parts) - 1 > MOST_FOLDERS:
            found.append(f"{place}: more than {MOST_FOLDERS} folders deep")
        if path.is_symlink() or not path.is_file():
            found.append(f"{place}: not a plain file")
        elif path.stat().st_size > MOST_BYTES:
            found.append(f"{place}: {path.stat().st_size} bytes")
    return found


def main() -> int:
    reason = gpu_reason()
    print(json.dumps({"reason": reason} if reason else machine()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
