"""The figures of benchmarks/report.md: one a command, and the scaling curves.

Each file carries a digest of the rows it was drawn from, so that a test can tell an old figure without drawing it anew.
"""

from __future__ import annotations

import hashlib
import struct
import textwrap
from pathlib import Path
from typing import Any

from benchmarks import overhead
from benchmarks.published import CURVES, Rows, curves_of, grouped, title_of
from benchmarks.results import number
from benchmarks.suite import OURS

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey by their lightness.
OURS_COLOUR, OTHER, FAINT, GREY = "#D55E00", "#0072B2", "#9CC3DD", "#555555"
CURVE_STYLES = (
    ("#D55E00", "o", "-"), ("#0072B2", "s", "--"), ("#009E73", "^", "-."), ("#E69F00", "D", ":"),
    ("#CC79A7", "v", (0, (1, 1))),
)  # fmt: skip
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 130,
}
DIGEST = "Description"


def names(kind: str, commands: dict[str, Rows]) -> dict[str, Rows]:
    """File name → the rows it is drawn from, for one kind of device."""
    files = {f"{kind}-{command}.png": [r for r in rows if not r["curve"]] for command, rows in commands.items()}
    curves = [row for rows in commands.values() for row in rows if row["curve"]]
    if curves:
        files[f"{kind}-scaling.png"] = curves
    return {name: rows for name, rows in files.items() if any(row["ms"] for row in rows)}


def digest(rows: Rows) -> str:
    return hashlib.sha256("\n".join(",".join(row.values()) for row in rows).encode()).hexdigest()


def digest_in(path: Path) -> str:
    """What ``draw_all`` left in a PNG; empty where there is none."""
    data, at = path.read_bytes(), 8
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        key, _, value = data[at + 8 : at + 8 + length].partition(b"\0")
        if kind == b"tEXt" and key == DIGEST.encode():
            return value.decode()
        at += 12 + length
    return ""


def draw_all(results: dict[str, dict[str, Rows]], folder: Path) -> None:
    """Every figure of every kind of device; one that no row stands behind any more is removed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wanted = {}
    for kind, commands in results.items():
        for name, rows in names(kind, commands).items():
            command = name.removeprefix(f"{kind}-").removesuffix(".png")
            draw = {"scaling": scaling, "overhead": host_time}.get(command, bars)
            wanted[folder / name] = (draw, rows)
    for path in folder.glob("*.png"):
        if path not in wanted:
            path.unlink()
    with plt.rc_context(STYLE):
        for path, (draw, rows) in wanted.items():
            figure = draw(plt, rows)
            figure.savefig(path, metadata={"Software": None, DIGEST: digest(rows)})
            plt.close(figure)


def bars(plt: Any, rows: Rows) -> Any:
    """A panel a table: time of every variant as a multiple of ours, on a logarithmic scale, with its quartiles."""
    groups = {key: group for key, group in grouped(rows).items() if len(shown(group)) > 1}
    # Another clock tells the same story; it is in the tables.
    groups = {key: group for key, group in groups.items() if key[-1] == "wall"} or groups
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    most = max(len(shown(group)) for group in groups.values())
    figure, grid = plt.subplots(
        lines, columns, figsize=(4.6 * columns, lines * (0.7 + 0.21 * most)), squeeze=False, sharex=True
    )
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    for axes, (key, group) in zip(grid.flat, groups.items(), strict=False):
        panel(axes, key, group)
        axes.set_ylim(most - 0.5, -0.5)  # bars of one height
        axes.tick_params(labelbottom=True)
    for axes in grid[-1]:
        axes.set_xlabel("time over ours")
    grid.flat[0].set_xscale("log")
    grid.flat[0].margins(x=0.4)
    for axes in grid.flat:
        plain_ticks(axes.xaxis)
    return figure


def shown(group: Rows) -> Rows:
    """Whoever does the work, the fastest first, then those that are wrong or failed; the absent are in the table."""
    timed = sorted((row for row in group if row["vs_ours"]), key=lambda row: float(row["ms"]))
    return timed + [row for row in group if row["status"].startswith(("wrong", "failed"))]


def panel(axes: Any, key: tuple[str, ...], group: Rows) -> None:
    rows = shown(group)
    for place, row in enumerate(rows):
        name = row["variant"]
        ratio = number(row, "vs_ours")
        if ratio is None:
            axes.text(1.02, place, row["status"].split(":")[0], va="center", color=GREY, style="italic", fontsize=8)
            continue
        per_ms = ratio / float(row["ms"])
        axes.barh(place, ratio - 1, left=1, height=0.7, color=OURS_COLOUR if name.startswith(OURS) else OTHER)
        if row["q1_ms"]:
            axes.plot([per_ms * float(row[q]) for q in ("q1_ms", "q3_ms")], [place] * 2, color="black", linewidth=1)
        else:
            axes.plot(ratio, place, "|", color="black")
        label = f"{ratio:.2f}" + (f"   {float(row['peak_mib']):.0f} MiB" if row["peak_mib"] else "")
        right = max(ratio, per_ms * float(row["q3_ms"] or row["ms"]), 1)
        axes.annotate(label, (right, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows], fontsize=7.5)
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(OURS_COLOUR if row["variant"].startswith(OURS) else "black")
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.set_title(textwrap.fill(title_of(key), 44), loc="left")


def plain_ticks(axis: Any) -> None:
    """0.5, 1, 2, 5 and so on, written as people write them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high < 200 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def scaling(plt: Any, rows: Rows) -> Any:
    """Time against each of rows, V, H, B and G; for the first three with a line of slope 1."""
    curves = curves_of(rows)
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(4.4 * columns, 3.3 * lines), squeeze=False)
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    for axes, ((name, work), curve) in zip(grid.flat, curves.items(), strict=False):
        for (colour, marker, dash), (variant, points) in zip(CURVE_STYLES * 2, curve.items(), strict=False):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, linestyle=dash, color=colour, marker=marker, markersize=4, label=variant)
        if name in ("rows", "vocabulary", "hidden"):
            points = points_of_ours(curve)
            (x, y), (last, _) = points[0], points[-1]
            axes.plot([x, last], [y, y * last / x], color=GREY, linewidth=0.8, linestyle=":", label="slope 1")
        axes.set_xscale("log")
        axes.set_yscale("log")
        every = [y for points in curve.values() for _, y in points]
        axes.set_ylim(min(every) / 3, max(every) * 3)  # what is flat shall look flat
        for axis in (axes.xaxis, axes.yaxis):
            plain_ticks(axis)
        axes.set_xlabel(CURVES[name])
        axes.set_ylabel("ms")
        axes.set_title(f"{work}; {fixed_in(rows, name, work)}", loc="left", fontsize=9)
        axes.legend(fontsize=7.5)
    return figure


def fixed_in(rows: Rows, name: str, work: str) -> str:
    """What does not vary along a curve."""
    mine = [row for row in rows if (row["curve"], row["work"]) == (name, work)]
    constant = {other: {row[other] for row in mine} for other in CURVES if other != name}
    return ", ".join(
        f"{CURVES[other]} {next(iter(seen))}" for other, seen in constant.items() if len(seen) == 1 and seen != {""}
    )


def points_of_ours(curve: dict[str, list[tuple[float, float]]]) -> list[tuple[float, float]]:
    return next(points for name, points in curve.items() if name.startswith(OURS))


def host_time(plt: Any, rows: Rows) -> Any:
    """Microseconds of each call: the kernels in it, and what comes on top."""
    figure, axes = plt.subplots(figsize=(8.4, 0.9 + 0.24 * len(rows)))
    for place, row in enumerate(rows):
        median, beyond = 1e3 * float(row["ms"]), overhead.beyond_kernels(row, rows)
        if beyond is None:
            axes.barh(place, median, color=OTHER, height=0.7)
        else:
            axes.barh(place, median - beyond, color=FAINT, height=0.7)
            axes.barh(place, beyond, left=median - beyond, color=OURS_COLOUR, height=0.7)
        text = f"{median:.0f}" + ("" if beyond is None else f", {beyond:.0f} beyond the kernels")
        axes.annotate(text, (median, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{row['case']}, {row['work']}: {row['variant']}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(overhead.TARGET_US, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"µs, median (dotted: {overhead.TARGET_US:g} µs)")
    axes.margins(x=0.25)
    parts = {"a whole call": OTHER, "the kernels in it": FAINT, "beyond them": OURS_COLOUR}
    axes.legend([plt.Rectangle((0, 0), 1, 1, color=colour) for colour in parts.values()], list(parts))
    return figure
