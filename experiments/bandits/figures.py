"""The figures of docs/paper.md: readable in print, told apart by dash and marker as well as by colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, so a display is never looked for

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, NullLocator

from .corrections import VARIANTS
from .data import FEATURES, SCENARIOS
from .methods import DPO, IPO, ROBUST, Family

# Okabe and Ito's palette: plain, importance-sampled, robust, and one more.
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73")
DASHES = ((4, 1.6), (1, 1.2), (), (5, 1.2, 1, 1.2))
MARKERS = ("s", "^", "o", "D")
GREY = "#555555"

_STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}


def draw_all(study: dict[str, Any], folder: Path) -> list[Path]:
    """Draw every figure of the study into a folder; returns what was written."""
    with plt.rc_context(_STYLE):
        drawn = {
            "gr_dpo.png": _curves(study, "dpo", DPO, "log"),
            "gr_ipo.png": _curves(study, "ipo", IPO, "log"),
            "features.png": _features(study),
            "saddle.png": _saddle(study),
            "rate.png": _rate(study["rate"]),
            "corrections.png": _corrections(study["corrections"]),
        }
        paths = []
        for name, figure in drawn.items():
            # No creation date in the file, so that the same numbers give the same bytes.
            figure.savefig(folder / name, metadata={"Software": None})
            plt.close(figure)
            paths.append(folder / name)
    return paths


def _line(axes, x, y, spread, style: int, label: str | None = None) -> None:
    y, spread = np.asarray(y), np.asarray(spread)
    axes.fill_between(x, y - spread, y + spread, color=COLOURS[style], alpha=0.14, linewidth=0)
    axes.plot(x, y, color=COLOURS[style], dashes=DASHES[style] or (None, None), label=label)


def _curves(study: dict[str, Any], name: str, family: Family, scale: str) -> plt.Figure:
    """Rows: worst validation loss, worst reward error, alpha_0; columns: scenarios."""
    figure, grid = plt.subplots(3, len(SCENARIOS), figsize=(7.4, 6.4), sharex=True, sharey="row")
    rows = (("max_val_group_loss", "max validation\ngroup loss"), ("max_reward_err", "max reward error"))
    for column, (scenario, what) in enumerate(SCENARIOS.items()):
        cell = study["cells"][f"swapped {scenario}"]
        curves = cell["curves"][name]
        steps = curves["iterations"]
        for axes, (key, label) in zip(grid[:2, column], rows, strict=True):
            mean, std = np.array(curves[key]["mean"]), np.array(curves[key]["std"])
            for m, method in enumerate(family.methods):
                _line(axes, steps, mean[:, m], std[:, m], m, method)
            if column == 0:
                axes.set_ylabel(label)
        axes = grid[2, column]
        mean, std = np.array(curves["alpha0"]["mean"]), np.array(curves["alpha0"]["std"])
        _line(axes, steps, mean[:, 0], std[:, 0], ROBUST)
        saddle = np.mean([seed["alpha0"] for seed in cell["saddle"][name].get("per_seed", {}).values()])
        axes.axhline(saddle, color="black", linewidth=1, dashes=(6, 2))
        axes.axhline(what.train_sizes[0] / sum(what.train_sizes), color=GREY, linewidth=1, dashes=(1, 1.5))
        axes.set_ylim(0, 1)
        axes.set_xscale(scale)
        axes.set_xlim(1, steps[-1])
        axes.set_xlabel("iteration")
        if column == 0:
            axes.set_ylabel(r"$\alpha$ of group 0")
        grid[0, column].set_title(f"scenario {scenario}\n" + what.what.replace(", ", ",\n"))
    handles, labels = grid[0, 0].get_legend_handles_labels()
    handles += [plt.Line2D([], [], color="black", linewidth=1, dashes=(6, 2)),
                plt.Line2D([], [], color=GREY, linewidth=1, dashes=(1, 1.5))]  # fmt: skip
    labels += [r"$\alpha$ at the saddle point", "share of group 0"]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), handlelength=2.6, columnspacing=1.4)
    return figure


def _features(study: dict[str, Any]) -> plt.Figure:
    """Where every method ends, for each kind of features and scenario."""
    families = (DPO, IPO)
    rows = (("max_val_group_loss", "max validation group loss"), ("max_reward_err", "max reward error"))
    figure, grid = plt.subplots(2, 2, figsize=(7.4, 5.2), sharex=True)
    cases = [(features, scenario) for features in FEATURES for scenario in SCENARIOS]
    # A wider gap between kinds of features than between scenarios.
    places = np.array([k + 0.8 * (k // len(SCENARIOS)) for k in range(len(cases))])
    for column, family in enumerate(families):
        for axes, (key, label) in zip(grid[:, column], rows, strict=True):
            for m, method in enumerate(family.methods):
                numbers = [study["cells"][f"{f} {s}"]["final"][method][key] for f, s in cases]
                axes.errorbar(
                    places + 0.2 * (m - 1),
                    [n["mean"] for n in numbers],
                    yerr=[2 * n["sem"] for n in numbers],
                    fmt=MARKERS[m], color=COLOURS[m], markersize=4.5, elinewidth=1, capsize=1.5, label=method,
                )  # fmt: skip
            axes.set_ylim(bottom=0)
            axes.grid(axis="x", visible=False)
            if column == 0:
                axes.set_ylabel(label)
        grid[0, column].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handletextpad=0.2)
        grid[1, column].set_xticks(places, [scenario for _, scenario in cases])
        grid[1, column].xaxis.set_minor_locator(NullLocator())
        for k, features in enumerate(FEATURES):
            middle = places[k * len(SCENARIOS) : (k + 1) * len(SCENARIOS)].mean()
            grid[1, column].annotate(
                features, (middle, 0), (0, -20), xycoords=("data", "axes fraction"), textcoords="offset points",
                ha="center", va="top",
            )  # fmt: skip
    return figure


def _saddle(study: dict[str, Any]) -> plt.Figure:
    """How far GR-DPO's training group losses are from the saddle point's, over iterations."""
    figure, grid = plt.subplots(1, len(SCENARIOS), figsize=(7.4, 2.7), sharey=True)
    for axes, scenario in zip(grid, SCENARIOS, strict=True):
        found = study["cells"][f"swapped {scenario}"]["saddle"]["dpo"]
        distance, steps = found["distance"], found["iterations"]
        axes.fill_between(
            steps, distance["smallest"], distance["largest"], color=COLOURS[ROBUST], alpha=0.16, linewidth=0
        )
        axes.plot(steps, distance["median"], color=COLOURS[ROBUST])
        axes.axhline(1e-3, color="black", linewidth=1, dashes=(6, 2))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(1, steps[-1])
        axes.set_ylim(1e-7, 1)  # scenario i goes on to rounding, which nobody needs to see
        axes.set_xlabel("iteration")
        axes.set_title(f"scenario {scenario}")
    grid[0].set_ylabel("furthest group's distance\nfrom the saddle point's loss")
    grid[0].annotate("0.001", (1.3, 1e-3), (0, -3), textcoords="offset points", va="top")
    return figure


def _rate(rate: dict[str, Any]) -> plt.Figure:
    """The duality gap of the averages against T, beside a line of slope -1/2."""
    steps, gap, sem = (np.array(rate[key], dtype=float) for key in ("steps", "gap", "sem"))
    figure, axes = plt.subplots(figsize=(4.6, 3.4))
    axes.errorbar(
        steps, gap, yerr=2 * sem, fmt="o-", color=COLOURS[ROBUST], markersize=4, elinewidth=1, capsize=2,
        label="gap of the averaged iterates",
    )  # fmt: skip
    late = steps >= steps[-1] / 10**1.5 * 0.999
    bound = 1.5 * gap[late][0] * np.sqrt(steps[late][0] / steps)
    axes.plot(steps, bound, color="black", linewidth=1, dashes=(6, 2), label="slope of the bound, -1/2")
    fit = np.polyfit(np.log(steps[late]), np.log(gap[late]), 1)
    axes.plot(
        steps[late], 0.72 * np.exp(np.polyval(fit, np.log(steps[late]))), color=COLOURS[0], dashes=(1, 1.2),
        label=f"fitted slope, {rate['slope']:.2f} (drawn below)",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("steps T of one sampled pair each")
    axes.set_ylabel("duality gap")
    axes.legend(loc="lower left")
    return figure


def _corrections(found: dict[str, Any]) -> plt.Figure:
    """The worst validation loss under each set of signs."""
    figure, axes = plt.subplots(figsize=(4.6, 3.4))
    order = (ROBUST, 1, 0, 3)  # the right one looks as it does everywhere else
    labels = (
        "as corrected",
        r"$\alpha$ fed with $+\log\,\sigma$",
        r"gradient factor $+\beta\sigma(+\beta m)$",
        "both, taken literally",
    )
    for name, label, style in zip(VARIANTS, labels, order, strict=True):
        curve = found["variants"][name]
        _line(axes, found["iterations"], curve["mean"], 2 * np.array(curve["sem"]), style, label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1, found["iterations"][-1])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("iteration")
    axes.set_ylabel("max validation group loss")
    axes.legend(loc="upper left", handlelength=2.6)
    return figure
