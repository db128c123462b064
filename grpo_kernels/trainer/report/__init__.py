"""Figures of one or several runs, from their metrics files: ``grpo-kernels plot``.

It imports ``run``, whose files it reads, and nothing else of the trainer; only the command line and programs import
it.  Each file uses those before it: curves (what a run's metrics hold), style, labels, figure (the whole picture).
"""

from .curves import Curves, read_curves
from .figure import draw, plot

__all__ = ["Curves", "draw", "plot", "read_curves"]
