"""What is measured: the heads of real models, and batches with short and long replies.

``size="gpu"`` is as published.  ``size="cpu"`` keeps every vocabulary, on which the ways of doing it differ most, and
shrinks rows and hidden width to what four cores do in a tenth of a second.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

IGNORE_INDEX = -100
REPEATED = (1 << 20) - 3
"""Random numbers that large tensors repeat: odd, so that rows of an even width do not all repeat one another."""


class Head(NamedTuple):
    """The LM head of a model: V words, H wide."""

    name: str
    vocabulary: int
    hidden: int
    softcap: float | None = None


TINYLLAMA = Head("TinyLlama-1.1B", 32000, 2048)
LLAMA = Head("Llama-3-8B", 128256, 4096)
QWEN = Head("Qwen2.5-7B", 152064, 3584)
GEMMA = Head("Gemma-2-9B", 256000, 3584, softcap=30.0)
HEADS = (TINYLLAMA, LLAMA, QWEN, GEMMA)


class Batch(NamedTuple):
    """2 * pairs sequences of tokens each, of which a share is labelled."""

    name: str
    pairs: int
    tokens: int
    labelled: float = 1.0

    @property
    def rows(self) -> int:
        return 2 * self.pairs * self.tokens


BATCHES = {
    "gpu": {
        "short": Batch("short replies", 64, 64),
        "long": Batch("long replies", 2, 2048),
        "half": Batch("half labelled", 8, 512, 0.5),
    },
    "cpu": {
        "short": Batch("short replies", 8, 16),
        "long": Batch("long replies", 1, 128),
        "half": Batch("half labelled", 2, 64, 0.5),
    },
}
CPU_HIDDEN = {TINYLLAMA.name: 2048, LLAMA.name: 512, QWEN.name: 448, GEMMA.name: 448}
"""A quarter to an eighth of what the model has, but for the smallest."""


def heads(size: str) -> tuple[Head, ...]:
    """The heads at the size asked for."""
    return HEADS if size == "gpu" else tuple(head._replace(hidden=CPU_HIDDEN[head.name]) for head in HEADS)


def labels_of(batch: Batch, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """(2 * pairs, tokens) int64: a prompt without labels at the front of every sequence, where not all is labelled."""
    labels = torch.randint(0, vocabulary, (2 * batch.pairs, batch.tokens), generator=generator)
    labels[:, : round((1 - batch.labelled) * batch.tokens)] = IGNORE_INDEX
    return labels


def normal(shape: tuple[int, ...], scale: float, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Normal numbers on the generator's device.  Large tensors repeat a million of them: drawing takes as long as the
    work, and a fresh process for every variant draws anew."""
    size = math.prod(shape)
    block = torch.empty(min(size, REPEATED), device=generator.device).normal_(generator=generator).mul_(scale).to(dtype)
    return block.repeat(-(-size // block.numel()))[:size].view(shape)
