"""How figures look: the groups' colours, the size of letters, quiet axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .curves import Curves

# Okabe and Ito's colours, told apart by colour-blind readers too; yellow is left out, it vanishes on white.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
INK, QUIET = "#222222", "#B0B0B0"
FONT_SIZE = 12.0


def group_colours(runs: Sequence[Curves]) -> dict[str, str]:
    """Group → colour, the same in all columns; more groups than colours: the best-off are drawn in grey."""
    names = list(dict.fromkeys(name for run in runs for name in run.alpha))
    if len(names) <= len(_COLOURS):
        return dict(zip(names, _COLOURS, strict=False))
    highest = {name: max(run.final_loss.get(name, -math.inf) for run in runs) for name in names}
    shown = set(sorted(names, key=lambda name: -highest[name])[: len(_COLOURS)])
    palette = iter(_COLOURS)
    return {name: next(palette) if name in shown else QUIET for name in names}


def style_axes(axis: Any) -> None:
    """No frame, thin lines to read values off by."""
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#888888")
    axis.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=FONT_SIZE - 1, colors="#444444", length=3)
