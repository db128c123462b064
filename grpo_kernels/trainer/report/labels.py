"""Words within the panels of a figure: the names of its lines, and the number that it is drawn for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..run.terminal import printable
from .curves import Curves
from .style import FONT_SIZE, INK, QUIET

MEAN_LABEL = "all pairs"
WIDEST_NAME = 24


def say_if_equal(axis: Any, run: Curves) -> None:
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
            fontsize=FONT_SIZE,
            color="#555555",
        )


def value_of_worst(
    axis: Any, curve: tuple[list[int], list[float]], colour: str, form: str, below: bool = False
) -> None:
    """The number that the comparison is about, at the end of the worst group's line."""
    steps, values = curve
    low, high = axis.get_ylim()
    # Above the point, or below it where the text would leave the panel.
    fraction = (values[-1] - low) / (high - low)
    down = fraction > 0.88 or (below and fraction > 0.14)
    axis.annotate(
        "worst " + form.format(values[-1]),
        (steps[-1], values[-1]),
        xytext=(2, -9 if down else 9),
        textcoords="offset points",
        ha="right",
        va="top" if down else "bottom",
        fontsize=FONT_SIZE,
        fontweight="bold",
        color=colour,
        zorder=7,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
    )


def name_lines(
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
        if colours[name] != QUIET
    ]
    if mean is not None and mean[1]:
        entries.append((mean[1][-1], MEAN_LABEL, INK, False))
    grey = sum(colours[name] == QUIET for name in curves)
    if grey:
        values = [v[-1] for name, (_, v) in curves.items() if colours[name] == QUIET]
        entries.append((sum(values) / grey, f"{grey} more", "#808080", False))
    entries.sort()
    heights = spread([(value - low) / (high - low) for value, *_ in entries], 0.088)
    for place, (value, name, colour, bold) in zip(heights, entries, strict=True):
        at = (value - low) / (high - low)
        axis.plot([1.005, 1.045], [at, place], transform=axis.transAxes, color=colour, linewidth=1, clip_on=False)
        axis.text(
            1.06,
            place,
            printable(name, WIDEST_NAME),
            transform=axis.transAxes,
            color=colour,
            fontsize=FONT_SIZE,
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
    places_out = [_start(group) + k * gap for group in groups for k in range(int(group[1]))]
    shift_up = max(0.0, -places_out[0]) if places_out else 0.0
    shift_down = max(0.0, places_out[-1] - 1) if places_out else 0.0
    if shift_up and not shift_down:
        floor = 0.0
        for k, place in enumerate(places_out):
            places_out[k] = max(place, floor)
            floor = places_out[k] + gap
    elif shift_down and not shift_up:
        ceiling = 1.0
        for k in range(len(places_out) - 1, -1, -1):
            places_out[k] = min(places_out[k], ceiling)
            ceiling = places_out[k] - gap
    return places_out


def _start(group: Sequence[float]) -> float:
    return group[0] / group[1]
