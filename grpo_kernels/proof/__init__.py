"""Whether a backend's kernels are right on a device: the cases, against float64 and within an error budget.

    cases(place)   rows (token_logps_fwd, _bwd)   tail (preference_tail, robust_loss)   tiles (head_tile_fwd, _bwd)
                   whole (steps with a moving alpha, the LM head, a CUDA graph)

One list of cases for three uses: the parity tests take all of them, ``python -m benchmarks.prove`` records a run of
them, and ``backend="auto"`` runs the quick ones once on a user's device, in a process of its own (``__main__.py``).
The dtypes, losses and operations come from the boundary: an operation that has no case is an error here.
"""

from __future__ import annotations

from ..backends import OPERATIONS, OPTIONAL_OPERATIONS
from . import rows, tail, tiles, whole
from .budget import Mismatch
from .case import WHOLE, Case
from .places import Place

SOURCES = (rows, tail, tiles, whole)
"""In this order, since each relies on what the ones before have checked."""


def cases(place: Place, *, quick: bool = False) -> list[Case]:
    """The cases for one backend on one device.

    Args:
        place: the backend by name, and the device as ``torch.device`` reads it.
        quick: only those of the proof on a user's device.

    Returns:
        Cases in the order in which they should run.  Operations that the backend lacks (``OPTIONAL_OPERATIONS``)
        have none.

    Raises:
        RuntimeError: an operation of the boundary has no case.
    """
    offered = {name for name in OPERATIONS if name not in OPTIONAL_OPERATIONS or hasattr(place.module, name)}
    found = [case for source in SOURCES for case in source.cases(place) if case.quick or not quick]
    found = [case for case in found if case.operations == WHOLE or offered.issuperset(case.operations)]
    missing = offered - {name for case in found for name in case.operations}
    if missing:
        raise RuntimeError(f"no case for {', '.join(sorted(missing))}: add some under grpo_kernels/proof/")
    return found


__all__ = ["Case", "Mismatch", "Place", "cases"]
