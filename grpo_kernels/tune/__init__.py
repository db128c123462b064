"""``grpo-kernels tune``: what the package's tables hold, chosen anew on a user's device for a user's shape.

    shapes      which device, dtype and sizes          candidates   what could stand in the tables
    checks      whether a candidate is right            works        what is timed, over which buffers
    sweep       how candidates are compared             session      the stages, and what each leaves behind
    results     what was found                          report      what is said and written

What is found goes into the tuning file of the device, which ``backends/tuned.py`` reads.
"""

from __future__ import annotations

from .results import Report
from .session import tune
from .shapes import Shape, check_seconds, shape_of

__all__ = ["Report", "Shape", "check_seconds", "shape_of", "tune"]
