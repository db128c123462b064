"""The demo's figure: who gains and who pays, how the worst group fares over training, and what alpha does."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey by their lightness.
METHOD_COLOURS = {"dpo": "#999999", "is_dpo": "#0072B2", "gr_dpo": "#D55E00"}
GROUP_COLOURS = ["#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#E69F00", "#0072B2"]


def draw(summary: dict[str, Any], runs: Path, methods: dict[str, str], path: Path) -> None:
    """Write the figure as a PNG.

    Args:
        summary: what summary.json holds.
        runs: folder of the runs, for what happened along the way.
        methods: key → name as people write it.
        path: the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 3, figsize=(16, 5.2), width_ratios=[1.35, 1, 1], layout="constrained")
    _groups(axes[0], summary, methods)
    _worst_over_time(axes[1], summary, runs, methods)
    _alpha_over_time(axes[2], summary, runs)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _groups(axis: Any, summary: dict[str, Any], methods: dict[str, str]) -> None:
    names = list(next(iter(summary["methods"].values()))[0]["groups"])
    names.sort(key=lambda name: -mean(run["groups"][name]["loss"] for run in summary["methods"]["dpo"]))
    width = 0.26
    for k, method in enumerate(methods):
        places = [i + (k - 1) * width for i in range(len(names))]
        values = [[run["groups"][name]["loss"] for run in summary["methods"][method]] for name in names]
        axis.bar(places, [mean(v) for v in values], width * 0.92, color=METHOD_COLOURS[method], label=methods[method])
        for place, seeds in zip(places, values, strict=True):
            axis.plot([place] * len(seeds), seeds, ".", color="black", markersize=4)
    axis.axhline(0.6931, color="black", linewidth=0.8, linestyle=":")
    axis.text(len(names) - 0.5, 0.70, "reference (log 2)", ha="right", va="bottom", fontsize=10)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("loss")
    axis.set_title("Held-out loss of each community (dots: seeds)")
    axis.legend(frameon=False, loc="upper right")


def _worst_over_time(axis: Any, summary: dict[str, Any], runs: Path, methods: dict[str, str]) -> None:
    for method in methods:
        curves = []
        for seed in summary["seeds"]:
            records = [r for r in _records(runs / f"{method}-seed{seed}") if r["kind"] == "eval"]
            steps = [0] + [r["step"] for r in records]
            curves.append([0.6931] + [r["worst_group_loss"] for r in records])
            axis.plot(steps, curves[-1], color=METHOD_COLOURS[method], linewidth=0.8, alpha=0.5)
        axis.plot(steps, [mean(c) for c in zip(*curves, strict=True)], color=METHOD_COLOURS[method], linewidth=2.5)
        axis.annotate(
            methods[method], (steps[-1], mean(c[-1] for c in curves)), xytext=(6, 0), textcoords="offset points",
            color=METHOD_COLOURS[method], va="center", fontweight="bold",
        )  # fmt: skip
    axis.set_xticks(range(0, steps[-1] + 1, 50))
    axis.set_xlim(0, steps[-1] * 1.22)
    axis.set_xlabel("step")
    axis.set_ylabel("held-out loss of the worst group")
    axis.set_title("The worst-off community over training")


def _alpha_over_time(axis: Any, summary: dict[str, Any], runs: Path) -> None:
    names = list(summary["methods"]["gr_dpo"][0]["groups"])
    final = {}
    for colour, name in zip(GROUP_COLOURS, names, strict=False):
        curves = []
        for seed in summary["seeds"]:
            records = [r for r in _records(runs / f"gr_dpo-seed{seed}") if r["kind"] == "train"]
            steps = [0] + [r["step"] for r in records]
            curves.append([1 / len(names)] + [r["alpha"][name] for r in records])
            axis.plot(steps, curves[-1], color=colour, linewidth=0.8, alpha=0.4)
        axis.plot(steps, [mean(c) for c in zip(*curves, strict=True)], color=colour, linewidth=2.5)
        final[name] = (mean(c[-1] for c in curves), colour)
    for name, height in _spread({name: value for name, (value, _) in final.items()}, 0.05).items():
        axis.text(steps[-1] * 1.03, height, name, color=final[name][1], va="center", fontweight="bold")
    axis.set_xticks(range(0, steps[-1] + 1, 50))
    axis.set_xlim(0, steps[-1] * 1.34)
    axis.set_ylim(0, None)
    axis.set_xlabel("step")
    axis.set_ylabel("group weight α")
    axis.set_title("Where GR-DPO puts its weight")


def _spread(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Push labels apart so that none lies on another."""
    placed: dict[str, float] = {}
    last = -gap
    for name in sorted(heights, key=heights.__getitem__):
        last = max(heights[name], last + gap)
        placed[name] = last
    return placed


def _records(run: Path) -> list[dict[str, Any]]:
    with open(run / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
