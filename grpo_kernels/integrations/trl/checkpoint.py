"""Alpha beside a checkpoint's other files: ``group_weights.safetensors``, the groups' names in its header."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ... import GroupWeights

FILE = "group_weights.safetensors"
STATE = ("log_alpha", "num_updates", "num_skipped")


def save_group_weights(folder: str | Path, group_weights: GroupWeights) -> None:
    """Write alpha.  What is pending belongs to a step that was not taken, and is not kept.

    Args:
        folder: an existing folder.
        group_weights: whose state.
    """
    state = group_weights.state_dict()
    tensors = {name: state[name].cpu().contiguous() for name in STATE}
    sizes = dict(zip(group_weights.names, group_weights.group_sizes, strict=True))
    metadata = {"format": "pt", "groups": json.dumps(sizes)}
    save_file(tensors, Path(folder) / FILE, metadata=metadata)


def load_group_weights(folder: str | Path, group_weights: GroupWeights) -> None:
    """Restore alpha by the groups' names, in whatever order they are now.

    Args:
        folder: a checkpoint.
        group_weights: takes the state over.

    Raises:
        ValueError: no such file where alpha moves, one that cannot be read, or one of other groups.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        if not group_weights.moves:  # held at the prior, which the settings say
            return
        raise ValueError(
            f"{folder} must hold {FILE} to resume from, it does not: alpha would start anew in the middle of a run. "
            "Was it written by another trainer? Then pass its model instead of resuming, or copy the file of the "
            "run whose alpha to go on with"
        )
    try:
        with safe_open(path, framework="pt") as file:
            names = list(json.loads(file.metadata()["groups"]))
            tensors = {name: file.get_tensor(name) for name in STATE}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error
    pending = torch.zeros_like(group_weights.pending)
    try:
        group_weights.load_state_dict({**tensors, "pending": pending, "_extra_state": {"names": names}})
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit: {error}") from error
    group_weights.discard()
