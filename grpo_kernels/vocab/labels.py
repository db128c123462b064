"""Labels as tokens of a vocabulary: their range, and the token that each row of logits has to predict.

    padded   labels (S, T):   targets[s, t] = labels[s, t + 1], nothing at t = T - 1
    packed   labels (rows,):  targets[r] = labels[r + 1], nothing in the last row of a sequence

Where labels are aligned with the logits already (``shift=False``), they are the targets.
"""

from __future__ import annotations

import torch

from ..arguments import contiguous, shortened, values_are_readable
from ..backends import decided


def integer_range(integers: torch.Tensor, ignored: int = 0) -> tuple[int, int]:
    """Smallest and largest of 0, which is in every range here, and the values that are not ``ignored``."""
    return decided(integers.device, torch.float32).integer_range(integers, ignored)


def check_labels_in_range(labels: torch.Tensor, vocabulary: int, ignore_index: int) -> None:
    """Labels in [0, V) or ``ignore_index``, also at positions that no row predicts; on CPU."""
    if not values_are_readable(labels):
        return
    low, high = integer_range(labels, ignore_index)
    if low < 0 or high >= vocabulary:
        bad = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
        found = labels[bad].unique().tolist()
        raise ValueError(
            f"labels must be in [0, {vocabulary}) or ignore_index={ignore_index}, got {shortened(found)} "
            f"at {int(bad.sum())} of {labels.numel()} positions"
        )


def targets_of(labels: torch.Tensor, ignore_index: int, shift: bool, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """(rows,) int64: the token that each row has to predict.  Shifting labels spares copying logits."""
    labels = contiguous(labels, torch.int64)
    if not shift or not labels.numel():
        return labels.view(-1)
    if cu_seqlens is None:  # drop the first column, and append one that predicts nothing
        return torch.constant_pad_nd(labels, (-1, 1), ignore_index).view(-1)
    targets = labels.roll(-1)
    # An empty sequence at the front makes -1 of this, the last row of all, which predicts nothing either.
    targets[cu_seqlens[1:].long() - 1] = ignore_index
    return targets
