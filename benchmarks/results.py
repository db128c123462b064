"""The rows of every benchmark: what they say, where they were made, and how a file of them is kept.

One file a command and kind of device, ``results/<device kind>/<command>.csv``, all with the columns below.  A run
replaces the rows of what it measured, which is everything with the same case, work, dtype and clock; the others stay,
each with its own versions, commit and date.
"""

from __future__ import annotations

import csv
import importlib.metadata
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from benchmarks.prove import RESULTS, describe_software
from grpo_kernels import UnavailableBackendError
from grpo_kernels.backends import choose, device_kind
from grpo_kernels.backends.cache import describe_device

CASE = ("case", "work", "dtype", "clock", "rows", "labelled", "vocabulary", "hidden", "pairs", "groups", "curve")
"""What was to be done.  rows: tokens; labelled: those of them that are scored; curve: what a scaling curve varies."""

MEASURED = (
    "variant",  # who did it; names of this package's backends, or of a peer
    "status",  # ok; or wrong, absent, failed, with the reason, and then there is no time
    "ms",  # median
    "q1_ms",
    "q3_ms",
    "best_ms",
    "rounds",
    "peak_mib",  # the most held at one time beyond the inputs, results included
    "peak_by",  # resident (set, in a fresh process) or allocator; allocations: their running sum, an older way
    "bytes",  # that the work has to move, by formula; the same for all who do it
    "operations",  # that the work has to do, by formula
    "of_copy",  # bytes a second over those of a copy in the same run
    "of_gemm",  # operations a second over those of bare GEMMs in the same run
    "vs_ours",  # time over that of ours in the same run
    "error",  # largest of the log-probabilities, over their largest value, against float64
    "error_grad",  # of the gradients: norm of the difference over the norm, against float64
)
MADE = ("device", "driver", "isa", "threads", "versions", "commit", "date")
COLUMNS = (*CASE, *MEASURED, *MADE)
KEY = ("case", "work", "dtype", "clock")

PACKAGES = ("triton", "liger-kernel", "trl", "cut-cross-entropy", "quack-kernels", "transformers", "peft")
"""What the rows may depend on besides Python, PyTorch and this package."""

SOURCES = ("csrc", "grpo_kernels", "benchmarks/*.py")

Row = dict[str, object]


def results_path(command: str, device: torch.device, folder: Path = RESULTS) -> Path:
    return folder / device_kind(device) / f"{command}.csv"


def made(device: torch.device) -> Row:
    """Where and with what: the columns that make a number repeatable."""
    where, software = describe_device(device), describe_software(SOURCES)
    versions = {"python": software["python"], "torch": software["torch"]}
    if software["cuda"]:
        versions["cuda"] = software["cuda"]
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": where["device"],
        "driver": "" if device.type == "cpu" else where["driver"],
        "isa": _isa(device),
        "threads": software["threads"],
        "versions": " ".join(f"{name}={version}" for name, version in versions.items()),
        "commit": software["commit"],
        "date": software["date"],
    }


def _isa(device: torch.device) -> str:
    if device.type != "cpu":
        return ".".join(map(str, torch.cuda.get_device_capability(device)))
    try:
        return choose("cpu", device, torch.float32).isa()
    except UnavailableBackendError:
        return ""


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file, text as it stands there; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and tuple(rows[0]) != COLUMNS:
        raise ValueError(f"{path} must have the columns {', '.join(COLUMNS)}; it has {', '.join(rows[0])}")
    return rows


def number(row: Mapping[str, str], name: str) -> float | None:
    """A column as a number; None where it is empty."""
    return float(row[name]) if row[name] else None


def merge(path: Path, rows: Iterable[Mapping[str, object]], device: torch.device) -> None:
    """Put rows into a file in the place of those with the same case, work, dtype and clock; the rest stays."""
    where = made(device)
    fresh = [{name: _text({**where, **row}.get(name, "")) for name in COLUMNS} for row in rows]
    measured = {_key(row) for row in fresh}
    kept = [row for row in read(path) if _key(row) not in measured]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*kept, *fresh], key=_key))


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def _text(value: object) -> str:
    """Four digits: more than any of these times has."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
