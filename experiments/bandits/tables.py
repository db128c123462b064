"""docs/figures/study.json, and from it the tables between markers in docs/paper.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import reference
from .data import FEATURES, SCENARIOS
from .methods import DPO, IPO, IPO_GRADIENT
from .metrics import HEADLINES

_TITLES = {
    "max_val_group_loss": "validation loss",
    "max_reward_err": "reward error",
    "max_train_group_loss": "training loss",
}


def save(study: dict[str, Any], path: Path) -> None:
    """Write what the tables need: means and standard errors, saddle points, the rate; curves stay in the figures."""
    kept = {
        "seeds": study["seeds"],
        "rate": study["rate"],
        "corrections": {
            name: {key: values[-1] for key, values in curve.items()}
            for name, curve in study["corrections"]["variants"].items()
        },
        "cells": {
            name: {
                **{
                    which: {
                        method: {key: value for key, value in numbers.items() if key != "per_seed"}
                        for method, numbers in cell[which].items()
                    }
                    for which in ("final", "averaged")
                },
                "saddle": {family: found["per_seed"] for family, found in cell["saddle"].items()},
            }
            for name, cell in study["cells"].items()
        },
    }
    path.write_text(json.dumps(_rounded(kept), indent=1) + "\n")


def load(path: Path) -> dict[str, Any]:
    """Read what :func:`save` wrote."""
    return json.loads(path.read_text())


def write(numbers: dict[str, Any], path: Path) -> None:
    """Replace the text between ``<!-- name -->`` and ``<!-- /name -->`` by the table of that name."""
    text = path.read_text()
    for name, make in _TABLES.items():
        if text.count(f"<!-- {name} -->") != 1 or text.count(f"<!-- /{name} -->") != 1:
            raise ValueError(f"{path} must hold the markers <!-- {name} --> and <!-- /{name} --> once, in this order")
        opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
        text = text[: text.index(opening)] + f"{opening}\n\n{make(numbers)}\n\n" + text[text.index(closing) :]
    path.write_text(text)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def _number(found: dict[str, float]) -> str:
    digits = 4 if found["mean"] < 2 else 2
    return f"{found['mean']:.{digits}f} ± {found['sem']:.{digits}f}"


def _difference(a: float, b: float) -> str:
    # study.json keeps eight digits, so what is smaller has been rounded away.
    return f"{abs(a - b):.0e}" if abs(a - b) > 1e-6 else "< 1e-6"


def _main_table(numbers: dict[str, Any]) -> str:
    """Scenario iii, swapped, beside the reference."""
    rows = []
    final = numbers["cells"]["swapped iii"]["final"]
    for method in reference.METHODS:
        row = [method]
        for key in HEADLINES:
            mean, sem = reference.FINAL[method][key]
            digits = 4 if mean < 2 else 2
            row += [_number(final[method][key]), f"{mean:.{digits}f} ± {sem:.{digits}f}"]
        rows.append(row)
    header = ["worst group's"]
    for key in HEADLINES:
        header += [_TITLES[key], "reference"]
    return _markdown(header, rows)


def _all_table(numbers: dict[str, Any]) -> str:
    """Every case, final iterates: validation loss and reward error."""
    rows = []
    for features in FEATURES:
        for scenario in SCENARIOS:
            final = numbers["cells"][f"{features} {scenario}"]["final"]
            for key in HEADLINES[:2]:
                values = [_number(final[method][key]) for method in reference.METHODS]
                rows.append([f"{features}, {scenario}, {_TITLES[key]}", *values])
    return _markdown(["features, scenario", *reference.METHODS], rows)


def _averaged_table(numbers: dict[str, Any]) -> str:
    """Swapped features: the last iterate, and the mean of all."""
    rows = []
    for scenario in SCENARIOS:
        cell = numbers["cells"][f"swapped {scenario}"]
        for which in ("final", "averaged"):
            values = [_number(cell[which][method]["max_val_group_loss"]) for method in reference.METHODS]
            rows.append([f"{scenario}, {which}", *values])
    return _markdown(["scenario, iterate", *reference.METHODS], rows)


def _gradient_table(numbers: dict[str, Any]) -> str:
    """Closed form and gradient form of the IPO family."""
    rows = []
    for scenario in SCENARIOS:
        final = numbers["cells"][f"swapped {scenario}"]["final"]
        for closed, gradient in zip(IPO.methods, IPO_GRADIENT.methods, strict=True):
            a, b = (final[method]["max_train_group_loss"] for method in (closed, gradient))
            rows.append([f"{scenario}, {closed}", _number(a), _number(b), _difference(a["mean"], b["mean"])])
    return _markdown(["scenario, method", "closed form", "by gradient", "difference of means"], rows)


def _saddle_table(numbers: dict[str, Any]) -> str:
    """GR-DPO's and GR-IPO's training losses beside the saddle points the reference gives."""
    rows = []
    for family, method in (("dpo", DPO.methods[2]), ("ipo", IPO.methods[2])):
        found = numbers["cells"]["swapped iii"]["saddle"][family]
        for seed, points in reference.SADDLE_POINTS.items():
            if str(seed) not in found:
                continue
            mine = found[str(seed)]
            rows.append(
                [
                    f"{method}, {seed}",
                    f"{mine['reached'][0]:.5f}",
                    f"{mine['reached'][1]:.5f}",
                    f"{mine['minimax_train']:.5f}",
                    f"{points[family]['minimax_train']:.5f}",
                    f"{mine['reached_alpha0']:.4f}",
                    f"{points[family]['alpha0']:.4f}",
                ]
            )
        furthest = max(abs(x - seed["minimax_train"]) for seed in found.values() for x in seed["reached"])
        rows.append([f"{method}, furthest of {len(found)} seeds", "", "", f"within {furthest:.1e}", "", "", ""])
    return _markdown(
        ["", "L of group 0", "L of group 1", "saddle point", "reference", "weight of group 0", "reference"], rows
    )


def _rate_table(numbers: dict[str, Any]) -> str:
    """The gap at each horizon, and the slope."""
    rate = numbers["rate"]
    rows = [[f"{t:,}", f"{g:.5f} ± {s:.5f}"] for t, g, s in zip(rate["steps"], rate["gap"], rate["sem"], strict=True)]
    words = (
        f"Slope over the last decade and a half: **{rate['slope']:.3f}**; the bound's is -0.5. The inner minimum is "
        f"certified to {max(rate['largest_solver_error'], 1e-15):.0e}. The ball has radius {rate['radius']:g}; the "
        f"step sizes are {rate['theta_step']:g}/√T for θ and {rate['alpha_step']:g}/√T for the weights."
    )
    return _markdown(["T", "duality gap of the averages"], rows) + "\n\n" + words


def _corrections_table(numbers: dict[str, Any]) -> str:
    """Where each variant ends."""
    rows = [[name, f"{v['mean']:.2f} ± {v['sem']:.2f}"] for name, v in numbers["corrections"].items()]
    return _markdown(["formulas", "worst group's validation loss at the end"], rows)


_TABLES = {
    "reference": _main_table,
    "all": _all_table,
    "averaged": _averaged_table,
    "gradient": _gradient_table,
    "saddle": _saddle_table,
    "rate": _rate_table,
    "corrections": _corrections_table,
}
