"""One picture of a run, or of several side by side: held-out loss, accuracy and alpha of every group over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..run.terminal import printable
from .curves import Curves, read_curves
from .labels import MEAN_LABEL, WIDEST_NAME, name_lines, say_if_equal, value_of_worst
from .style import FONT_SIZE, INK, QUIET, group_colours, style_axes


def plot(
    run_dirs: Sequence[str | Path] | str | Path,
    out: str | Path,
    *,
    titles: Sequence[str] | None = None,
    heading: str | None = None,
) -> Path:
    """Draw runs side by side: a column each, rows of held-out loss, accuracy and alpha, all on the same scales.

    Args:
        run_dirs: one folder or several.
        out: the picture; its suffix says which format.
        titles: one a run; None for the methods' names.
        heading: above everything; None for none.

    Returns:
        Where the picture is.

    Raises:
        ValueError: no runs, another number of titles, or a run without evaluations.
        ImportError: matplotlib is not installed.
    """
    folders = [run_dirs] if isinstance(run_dirs, (str, Path)) else list(run_dirs)
    if not folders:
        raise ValueError("run_dirs must name at least one run, got none")
    if titles is not None and len(titles) != len(folders):
        raise ValueError(f"titles must be one a run, got {len(titles)} for {len(folders)} runs")
    runs = [read_curves(folder, titles[i] if titles else None) for i, folder in enumerate(folders)]
    figure = draw(runs, heading)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # No date inside: the same run gives the same file.
    metadata = {"Software": None} if out.suffix == ".png" else None
    figure.savefig(out, dpi=160, metadata=metadata)
    return out


def draw(runs: Sequence[Curves], heading: str | None = None) -> Any:
    """The figure of :func:`plot`, for those who want to add to it."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'grpo-kernels[train]'") from error

    colours = group_colours(runs)
    columns = len(runs)
    longest = max(len(printable(name)) for name in (*colours, MEAN_LABEL))
    label_width = 0.45 + 0.107 * min(longest, WIDEST_NAME)
    width, height, top = (
        0.9 + (3.5 if columns > 1 else 5.5) * columns + label_width,
        8.4,
        0.62 if heading is None else 0.98,
    )
    # Figure, not pyplot: no global state, no display.
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.subplots(3, columns, sharex=True, sharey="row", squeeze=False)
    figure.subplots_adjust(
        left=0.85 / width, right=1 - label_width / width, bottom=0.6 / height, top=1 - top / height, hspace=0.16,
        wspace=0.1,
    )  # fmt: skip
    if heading is not None:
        figure.text(
            0.85 / width, 1 - 0.2 / height, heading, fontsize=FONT_SIZE + 3, fontweight="bold", color=INK, va="top"
        )
    for column, run in enumerate(runs):
        worst = run.worst_group
        rows = (
            ("held-out loss", run.loss, run.mean_loss, worst),
            ("held-out accuracy", run.accuracy, run.mean_accuracy, run.least_accurate_group),
            ("group weight α", run.alpha, None, worst),
        )
        for row, (label, curves, mean, thick) in enumerate(rows):
            axis = axes[row][column]
            style_axes(axis)
            if column == 0:
                axis.set_ylabel(label, fontsize=FONT_SIZE, color=INK)
            for name, (steps, values) in curves.items():
                _line(axis, steps, values, colours[name], name == thick)
            if mean is not None:
                axis.plot(*mean, color=INK, linewidth=1.4, linestyle=(0, (4, 2.5)), zorder=3)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.margins(x=0.03)
        axes[0][column].set_title(run.title, fontsize=FONT_SIZE + 2, fontweight="bold", color=INK, loc="left", pad=8)
        axes[2][column].set_xlabel("step", fontsize=FONT_SIZE, color=INK)
    for row, low in ((0, None), (1, None), (2, 0.0)):
        axes[row][0].set_ylim(bottom=low)
    top_alpha = max(max(values) for run in runs for _, values in run.alpha.values())
    axes[2][0].set_ylim(0, max(top_alpha * 1.1, 0.05))
    for column, run in enumerate(runs):
        value_of_worst(axes[0][column], run.loss[run.worst_group], colours[run.worst_group], "{:.2f}")
        least = run.least_accurate_group
        value_of_worst(axes[1][column], run.accuracy[least], colours[least], "{:.0%}", below=True)
        say_if_equal(axes[2][column], run)
    last = runs[-1]
    name_lines(axes[0][-1], last.loss, colours, last.worst_group, last.mean_loss)
    name_lines(axes[1][-1], last.accuracy, colours, last.least_accurate_group, last.mean_accuracy)
    name_lines(axes[2][-1], last.alpha, colours, last.worst_group, None)
    from matplotlib.ticker import PercentFormatter

    axes[1][0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def _line(axis: Any, steps: Sequence[int], values: Sequence[float], colour: str, worst: bool) -> None:
    axis.plot(
        steps,
        values,
        color=colour,
        linewidth=3.2 if worst else 1.7,
        solid_capstyle="round",
        marker="o" if len(steps) == 1 else None,
        zorder=5 if worst else 4 if colour != QUIET else 2,
    )
    if worst:
        axis.plot(steps[-1:], values[-1:], color=colour, marker="o", markersize=8, zorder=6, clip_on=False)
