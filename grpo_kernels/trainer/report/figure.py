"""One picture of a run, or of several side by side: held-out loss, accuracy and alpha of every group over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..run.directory import CONFIG, METRICS
from ..run.metrics import read_metrics
from ..run.terminal import printable

METHODS = {"dpo": "DPO", "is_dpo": "IS-DPO", "gr_dpo": "GR-DPO"}

# Okabe and Ito's colours, told apart by colour-blind readers too; yellow is left out, it vanishes on white.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_INK, _QUIET = "#222222", "#B0B0B0"
_FONT = 12.0
_MEAN = "all pairs"
_WIDEST_NAME = 24


@dataclass(frozen=True)
class Curves:
    """What is drawn of one run.

    Args:
        title: above its column.
        loss, accuracy, alpha: group → (steps, values).
        mean_loss, mean_accuracy: over all test pairs, (steps, values).
        final_loss: group → last held-out loss.
    """

    title: str
    loss: dict[str, tuple[list[int], list[float]]]
    accuracy: dict[str, tuple[list[int], list[float]]]
    alpha: dict[str, tuple[list[int], list[float]]]
    mean_loss: tuple[list[int], list[float]]
    mean_accuracy: tuple[list[int], list[float]]
    final_loss: dict[str, float]

    @property
    def worst_group(self) -> str:
        """The group with the highest last held-out loss."""
        return max(self.final_loss, key=lambda name: self.final_loss[name])

    @property
    def least_accurate_group(self) -> str:
        """The group with the lowest last held-out accuracy, often but not always the worst."""
        return min(self.accuracy, key=lambda name: self.accuracy[name][1][-1])


def read_curves(run_dir: str | Path, title: str | None = None) -> Curves:
    """Read the curves of a run.

    Args:
        run_dir: folder of the run.
        title: None for the method's name.

    Raises:
        ValueError: no metrics there, or no evaluation in them.
    """
    run_dir = Path(run_dir)
    records = read_metrics(run_dir / METRICS)
    try:
        return _curves(records, run_dir, title)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{run_dir / METRICS} does not hold the records of a run: {error!r}") from error


def _curves(records: list[dict[str, Any]], run_dir: Path, title: str | None) -> Curves:
    evals = [record for record in records if record["kind"] == "eval"]
    if not evals:
        raise ValueError(f"{run_dir / METRICS} holds no evaluation to draw; train with data.test, and eval_every > 0")

    def of_groups(field: str) -> dict[str, tuple[list[int], list[float]]]:
        return {
            name: _points((e["step"], e["groups"][name][field]) for e in evals)
            for name in evals[-1]["groups"]
            if evals[-1]["groups"][name]["n"]
        }

    weighted = [record for record in records if record["kind"] in ("train", "eval")]
    alpha: dict[str, dict[int, float]] = {}
    for record in weighted:
        for name, value in record["alpha"].items():
            alpha.setdefault(name, {})[record["step"]] = value
    losses = of_groups("loss")
    if not all(values for _, values in (*losses.values(), *of_groups("accuracy").values())):
        raise ValueError(f"{run_dir / METRICS} has a group without a finite held-out loss: there is no line to draw")
    return Curves(
        title=title if title is not None else _method(run_dir),
        loss=losses,
        accuracy=of_groups("accuracy"),
        alpha={name: (sorted(values), [values[s] for s in sorted(values)]) for name, values in alpha.items()},
        mean_loss=_points((e["step"], e["mean_loss"]) for e in evals),
        mean_accuracy=_points((e["step"], e["mean_accuracy"]) for e in evals),
        final_loss={name: values[-1] for name, (_, values) in losses.items()},
    )


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
    """The figure of :func:`plot`, for who wants to add to it."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'grpo-kernels[train]'") from error

    colours = _colours(runs)
    columns = len(runs)
    longest = max(len(printable(name)) for name in (*colours, _MEAN))
    label_width = 0.45 + 0.107 * min(longest, _WIDEST_NAME)
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
            0.85 / width, 1 - 0.2 / height, heading, fontsize=_FONT + 3, fontweight="bold", color=_INK, va="top"
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
            _style(axis)
            if column == 0:
                axis.set_ylabel(label, fontsize=_FONT, color=_INK)
            for name, (steps, values) in curves.items():
                _line(axis, steps, values, colours[name], name == thick)
            if mean is not None:
                axis.plot(*mean, color=_INK, linewidth=1.4, linestyle=(0, (4, 2.5)), zorder=3)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.margins(x=0.03)
        axes[0][column].set_title(run.title, fontsize=_FONT + 2, fontweight="bold", color=_INK, loc="left", pad=8)
        axes[2][column].set_xlabel("step", fontsize=_FONT, color=_INK)
    for row, low in ((0, None), (1, None), (2, 0.0)):
        axes[row][0].set_ylim(bottom=low)
    top_alpha = max(max(values) for run in runs for _, values in run.alpha.values())
    axes[2][0].set_ylim(0, max(top_alpha * 1.1, 0.05))
    for column, run in enumerate(runs):
        _value_of_worst(axes[0][column], run.loss[run.worst_group], colours[run.worst_group], "{:.2f}")
        least = run.least_accurate_group
        _value_of_worst(axes[1][column], run.accuracy[least], colours[least], "{:.0%}", below=True)
        _say_if_equal(axes[2][column], run)
    last = runs[-1]
    _labels(axes[0][-1], last.loss, colours, last.worst_group, last.mean_loss)
    _labels(axes[1][-1], last.accuracy, colours, last.least_accurate_group, last.mean_accuracy)
    _labels(axes[2][-1], last.alpha, colours, last.worst_group, None)
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
        zorder=5 if worst else 4 if colour != _QUIET else 2,
    )
    if worst:
        axis.plot(steps[-1:], values[-1:], color=colour, marker="o", markersize=8, zorder=6, clip_on=False)


def _say_if_equal(axis: Any, run: Curves) -> None:
    """Lines that lie on each other show as one; say that they do."""
    values = {round(value, 9) for _, values in run.alpha.values() for value in values}
    if len(values) == 1 and len(run.alpha) > 1:
        steps, (value, *_) = next(iter(run.alpha.values()))
        axis.annotate(
            "the same for all groups",
            (steps[-1], value),
            xytext=(2, 9),
            textcoords="offset points",
            ha="right",
            fontsize=_FONT,
            color="#555555",
        )


def _value_of_worst(
    axis: Any, curve: tuple[list[int], list[float]], colour: str, form: str, below: bool = False
) -> None:
    """The number that the comparison is about, at the end of the worst group's line."""
    steps, values = curve
    low, high = axis.get_ylim()
    # Above the point, or below it where the text would leave the panel.
    share = (values[-1] - low) / (high - low)
    down = share > 0.88 or (below and share > 0.14)
    axis.annotate(
        "worst " + form.format(values[-1]),
        (steps[-1], values[-1]),
        xytext=(2, -9 if down else 9),
        textcoords="offset points",
        ha="right",
        va="top" if down else "bottom",
        fontsize=_FONT,
        fontweight="bold",
        color=colour,
        zorder=7,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
    )


def _labels(
    axis: Any,
    curves: Mapping[str, tuple[list[int], list[float]]],
    colours: Mapping[str, str],
    worst: str,
    mean: tuple[list[int], list[float]] | None,
) -> None:
    """Names at the ends of lines, pushed apart where lines end together; no legend to look up."""
    low, high = axis.get_ylim()
    entries = [
        (values[-1], name, colours[name], name == worst)
        for name, (_, values) in curves.items()
        if colours[name] != _QUIET
    ]
    if mean is not None and mean[1]:
        entries.append((mean[1][-1], _MEAN, _INK, False))
    grey = sum(colours[name] == _QUIET for name in curves)
    if grey:
        values = [v[-1] for name, (_, v) in curves.items() if colours[name] == _QUIET]
        entries.append((sum(values) / grey, f"{grey} more", "#808080", False))
    entries.sort()
    heights = spread([(value - low) / (high - low) for value, *_ in entries], 0.088)
    for place, (value, name, colour, bold) in zip(heights, entries, strict=True):
        at = (value - low) / (high - low)
        axis.plot([1.005, 1.045], [at, place], transform=axis.transAxes, color=colour, linewidth=1, clip_on=False)
        axis.text(
            1.06,
            place,
            printable(name, _WIDEST_NAME),
            transform=axis.transAxes,
            color=colour,
            fontsize=_FONT,
            fontweight="bold" if bold else "normal",
            va="center",
            parse_math=False,  # a dollar sign is a dollar sign
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Rising places moved as little as it takes to be ``gap`` apart and, where there is room, within [0, 1]."""
    groups: list[list[float]] = []  # sum of wanted places of the first member, members
    for place in places:
        groups.append([place, 1.0])
        while len(groups) > 1 and _start(groups[-2]) + groups[-2][1] * gap > _start(groups[-1]):
            total, members = groups.pop()
            groups[-1][0] += total - groups[-1][1] * members * gap
            groups[-1][1] += members
    apart = [_start(group) + k * gap for group in groups for k in range(int(group[1]))]
    shift_up = max(0.0, -apart[0]) if apart else 0.0
    shift_down = max(0.0, apart[-1] - 1) if apart else 0.0
    if shift_up and not shift_down:
        floor = 0.0
        for k, place in enumerate(apart):
            apart[k] = max(place, floor)
            floor = apart[k] + gap
    elif shift_down and not shift_up:
        ceiling = 1.0
        for k in range(len(apart) - 1, -1, -1):
            apart[k] = min(apart[k], ceiling)
            ceiling = apart[k] - gap
    return apart


def _start(group: Sequence[float]) -> float:
    return group[0] / group[1]


def _style(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#888888")
    axis.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=_FONT - 1, colors="#444444", length=3)


def _colours(runs: Sequence[Curves]) -> dict[str, str]:
    """Group → colour, the same in all columns; more groups than colours: the best-off are drawn in grey."""
    names = list(dict.fromkeys(name for run in runs for name in run.alpha))
    if len(names) <= len(_COLOURS):
        return dict(zip(names, _COLOURS, strict=False))
    highest = {name: max(run.final_loss.get(name, -math.inf) for run in runs) for name in names}
    shown = set(sorted(names, key=lambda name: -highest[name])[: len(_COLOURS)])
    palette = iter(_COLOURS)
    return {name: next(palette) if name in shown else _QUIET for name in names}


def _method(run_dir: Path) -> str:
    import yaml

    try:
        method = yaml.safe_load((run_dir / CONFIG).read_text(encoding="utf-8"))["groups"]["method"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return run_dir.name
    return METHODS.get(method, str(method))


def _points(pairs: Any) -> tuple[list[int], list[float]]:
    kept = [(step, value) for step, value in pairs if value is not None]
    return [step for step, _ in kept], [value for _, value in kept]
