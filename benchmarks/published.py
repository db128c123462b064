"""The rows of the files of results, arranged as the report and its figures show them: by table and by curve."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.results import KEY
from benchmarks.suite import COPIES, GEMMS

Rows = list[dict[str, str]]
CURVES = {"rows": "rows", "vocabulary": "V", "hidden": "H", "pairs": "B", "groups": "G"}
"""What a curve may vary, and how that is written."""


def grouped(rows: Iterable[dict[str, str]]) -> dict[tuple[str, ...], Rows]:
    """Rows that were timed in turns, by case, work, dtype and clock."""
    groups: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in KEY), []).append(row)
    return groups


def title_of(key: tuple[str, ...]) -> str:
    *what, clock = key
    return ", ".join(what) + ("" if clock == "wall" else ", processor time of one thread")


def curves_of(rows: Rows) -> dict[tuple[str, str], dict[str, list[tuple[float, float]]]]:
    """(what varies, work) → variant → (x, ms), in the order of x."""
    found: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row["curve"] and row["ms"] and row["variant"] not in (*COPIES, GEMMS):
            point = float(row[row["curve"]]), float(row["ms"])
            found.setdefault((row["curve"], row["work"]), {}).setdefault(row["variant"], []).append(point)
    return {key: {name: sorted(points) for name, points in curve.items()} for key, curve in found.items()}
