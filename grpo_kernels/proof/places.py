"""Where cases run: a backend on a device; and the inputs that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..backends import choose
from ..types import IGNORE_INDEX, UnavailableBackendError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Place:
    """A backend on a device where it runs."""

    name: str
    """Of the registry, as users give it."""
    device: str

    @property
    def module(self) -> Any:
        """The functions of the boundary."""
        return choose(self.name, torch.device(self.device), torch.float32)

    @property
    def interpreted(self) -> bool:
        """A GPU's kernels on the CPU, by Triton's interpreter or the tests' emulator of CUDA: slowly."""
        return self.name in ("triton", "cuda") and self.device == "cpu"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of logits, those that this backend takes on this device."""
        return tuple(dtype for dtype in DTYPES if self.takes(dtype))

    def takes(self, dtype: torch.dtype) -> bool:
        try:
            choose(self.name, torch.device(self.device), dtype)
        except UnavailableBackendError:
            return False
        return True

    @property
    def wide(self) -> int:
        """One odd vocabulary of several blocks, for cases that are not about V; a small one for the interpreter."""
        return 131 if self.interpreted else 4099

    def __str__(self) -> str:
        return f"{self.name}@{self.device}"


def make_rows(
    place: Place, dtype: torch.dtype, shape: tuple[int, int, int], sigma: float, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normal logits, labels (every fifth ignored where there are more than one) and gradients of the logps."""
    generator = torch.Generator().manual_seed(seed)
    sequences, length, vocabulary = shape
    rows = sequences * length
    logits = (torch.randn(shape, generator=generator) * sigma).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    if rows > 1:
        targets[1::5] = IGNORE_INDEX
    grads = torch.randn(rows, generator=generator)
    return logits.to(place.device), targets.to(place.device), grads.to(place.device)


def layouts(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers at other strides and alignments; the last stride is 1 throughout."""
    sequences, length, vocabulary = logits.shape
    width = vocabulary + 5
    padded = logits.new_full((sequences, length + 2, width), torch.nan)
    unaligned = logits.new_full((logits.numel() + 1,), torch.nan)[1:]
    swapped = logits.new_full((length, sequences, vocabulary), torch.nan).transpose(0, 1)
    views = {
        "contiguous": torch.full_like(logits, torch.nan),
        "shifted": logits.new_full((sequences, length + 1, vocabulary), torch.nan)[:, :-1],
        "padded": padded[:, 1:-1, 3 : 3 + vocabulary],
        "swapped": swapped,
        "unaligned": unaligned.view(logits.shape),
    }
    for view in views.values():
        view.copy_(logits)
    return views


def short(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` → ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
