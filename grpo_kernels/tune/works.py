"""What is timed: each operation over input buffers of its own, as functions of a turn that says which buffers.

Inputs are random: a processor draws less power over constants, and runs faster than it would in training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..backends import choose
from ..head.functional import linear_token_logps
from ..head.plan import total_memory
from ..loss.functional import fused_grpo_loss
from ..types import IGNORE_INDEX, LOSS_TYPES
from .shapes import Shape
from .sweep import copies, rotated

Run = Callable[[int], object]

MOST_LOGITS = {"cpu": 512 << 20, "cuda": 2 << 30}
"""Bytes of logits in one buffer where a work takes logits: fewer rows beyond that."""
TOKENS = {64: 32, None: 512}
"""Length of a sequence that stands for each range of the tail's table."""


class Sizes(NamedTuple):
    """How a batch of logits is cut: 2B sequences of T tokens."""

    sequences: int
    length: int

    @property
    def rows(self) -> int:
        return self.sequences * self.length


def sizes_of_logits(shape: Shape) -> Sizes:
    """An even number of sequences, about as many rows as the shape has, as far as memory allows."""
    most = min(MOST_LOGITS[shape.device.type], total_memory(shape.device) // 32)
    rows = max(2, min(shape.rows, most // (shape.vocabulary * shape.dtype.itemsize)))
    length = min(512, rows // 2)
    return Sizes(rows // (2 * length) * 2, length)


def wide_output(shape: Shape) -> bool:
    """Whether the GEMMs of the head answer in float32, as CUDA's do for half precision."""
    return shape.device.type == "cuda" and shape.dtype != torch.float32


def _logits(shape: Shape, rows: int, width: int, dtype: torch.dtype, each: int = 1) -> list[torch.Tensor]:
    """Buffers of the same random logits; ``each``: how many tensors of this size come with one."""
    size = rows * width * dtype.itemsize * each
    count = copies(size, shape.device, total_memory(shape.device))
    first = 3 * torch.randn(rows, width, device=shape.device, dtype=dtype)
    return [first, *(first.clone() for _ in range(count - 1))]


# ---------------------------------------------------------------------------------------------- single operations


def token_logps(shape: Shape, direction: str, backend: str) -> Run:
    """The kernel over rows of logits, forward or backward, out of place."""
    module = choose(backend, shape.device, shape.dtype)
    rows, device = sizes_of_logits(shape).rows, shape.device
    buffers = [x.unsqueeze(0) for x in _logits(shape, rows, shape.vocabulary, shape.dtype, 2)]
    targets = torch.randint(0, shape.vocabulary, (rows,), device=device)
    logps, lse = (torch.empty(rows, device=device) for _ in range(2))
    grads, out = torch.randn(rows, device=device), torch.empty_like(buffers[0]) if direction == "bwd" else None
    module.token_logps_fwd(buffers[0], targets, logps, lse, ignore_index=IGNORE_INDEX)

    def run(turn: int) -> None:
        if out is None:
            module.token_logps_fwd(rotated(buffers, turn), targets, logps, lse, ignore_index=IGNORE_INDEX)
        else:
            module.token_logps_bwd(rotated(buffers, turn), targets, lse, grads, out, ignore_index=IGNORE_INDEX)

    return run


def head_tile(shape: Shape, direction: str, words: int, backend: str) -> Run:
    """A tile operation on what a GEMM of the head gives, writing what goes into the next one."""
    module = choose(backend, shape.device, shape.dtype)
    rows, device = shape.rows, shape.device
    dtype = torch.float32 if wide_output(shape) else shape.dtype
    buffers = _logits(shape, rows, words, dtype, 2)
    out = torch.empty(rows, words, device=device, dtype=shape.dtype)
    targets = torch.randint(0, shape.vocabulary, (rows,), device=device)
    top, rest, picked, factor = (torch.zeros(rows, device=device) for _ in range(4))
    scale, at_target = (torch.randn(rows, device=device) for _ in range(2))
    options: dict[str, Any] = {"start": 0, "softcap": 0.0, "logit_scale": 1.0}

    def run(turn: int) -> None:
        logits = rotated(buffers, turn)
        if direction == "fwd":
            module.head_tile_fwd(logits, None, targets, top, rest, picked, factor, out, shift=0, **options)
        else:
            module.head_tile_bwd(logits, None, targets, top, scale, at_target, out, **options)

    return run


def tail(shape: Shape, most_length: int | None, backend: str) -> Run:
    """The tail over sequences of one length, as many as the rows allow."""
    module = choose(backend, shape.device, torch.float32)
    device, length = shape.device, min(TOKENS[most_length], max(1, shape.rows // 2))
    pairs = max(1, shape.rows // (2 * length))
    count = copies(2 * pairs * length * 12, device, total_memory(device))
    tokens = [-6 * torch.rand(2 * pairs * length, device=device) for _ in range(count)]
    targets = [torch.randint(0, shape.vocabulary, (2 * pairs * length,), device=device) for _ in range(count)]
    ref_logps = -3.0 * length * torch.ones(2 * pairs, device=device, dtype=torch.float64)
    group_ids = torch.arange(pairs, device=device) % 4

    def vectors(size: int, number: int, dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.empty(size, device=device, dtype=dtype) for _ in range(number)]

    policy, rewards = vectors(2 * pairs, 2, torch.float32)
    (lengths,) = vectors(2 * pairs, 1, torch.float64)
    margins, losses, slopes = vectors(pairs, 3, torch.float32)
    (sums,), (counts,), (means,) = (vectors(4, 1, dtype) for dtype in (torch.float64, torch.int64, torch.float32))

    def run(turn: int) -> None:
        module.preference_tail(
            rotated(tokens, turn), rotated(targets, turn), None, ref_logps, group_ids, None,
            policy, lengths, margins, rewards, losses, slopes, sums, counts, means,
            loss_type=LOSS_TYPES.index("sigmoid"), beta=0.1, label_smoothing=0.0, length_normalize=False,
            ignore_index=IGNORE_INDEX,
        )  # fmt: skip

    return run


# ---------------------------------------------------------------------------------------------- a step of training


class HeadStep:
    """The head in a step of preference training: the reference's log-probabilities, then forward and backward."""

    def __init__(self, shape: Shape) -> None:
        size = (shape.rows + shape.vocabulary) * shape.hidden * shape.dtype.itemsize
        count = copies(size, shape.device, total_memory(shape.device))

        def draw(rows: int, scale: float) -> torch.Tensor:
            return torch.randn(rows, shape.hidden, device=shape.device, dtype=shape.dtype).mul_(scale)

        # Logits then have a standard deviation of 3.
        drawn = draw(shape.rows, 3.0), draw(shape.vocabulary, shape.hidden**-0.5)
        self._inputs = [tuple(x.clone().requires_grad_() for x in drawn) for _ in range(count)]
        self._labels = torch.randint(0, shape.vocabulary, (1, shape.rows), device=shape.device)
        self._grads = torch.randn(1, shape.rows, device=shape.device)

    def of_backend(self, name: str) -> Run:
        def logps(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return linear_token_logps(
                hidden.unsqueeze(0), weight, self._labels, shift=False, num_labelled=self._labels.numel(), backend=name
            )

        return lambda turn: self._step(logps, turn)

    def plain(self, turn: int) -> object:
        """By PyTorch's operations and autograd, all logits at once."""

        def logps(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            logits = torch.nn.functional.linear(hidden.unsqueeze(0), weight).float()
            return torch.log_softmax(logits, -1).gather(-1, self._labels.unsqueeze(-1)).squeeze(-1)

        return self._step(logps, turn)

    def _step(self, logps: Callable[..., torch.Tensor], turn: int) -> object:
        hidden, weight = rotated(self._inputs, turn)
        with torch.no_grad():
            reference = logps(hidden, weight)
        value = logps(hidden, weight)
        return reference, torch.autograd.grad(value, (hidden, weight), self._grads.to(value.dtype))


class LogitsStep:
    """The loss from logits, forward and backward: rows of logits to a loss, and its gradient."""

    def __init__(self, shape: Shape) -> None:
        sizes, device = sizes_of_logits(shape), shape.device
        buffers = _logits(shape, sizes.rows, shape.vocabulary, shape.dtype, 2)
        self._logits = [x.view(*sizes, shape.vocabulary).requires_grad_() for x in buffers]
        self._labels = torch.randint(0, shape.vocabulary, tuple(sizes), device=device)
        pairs = sizes.sequences // 2
        self._ref_logps = -5.0 * sizes.length * torch.ones(sizes.sequences, device=device, dtype=torch.float64)
        self._group_ids = torch.arange(pairs, device=device) % 4
        self._group_weights = torch.ones(4, device=device)

    def of_backend(self, name: str) -> Run:
        def run(turn: int) -> object:
            logits = rotated(self._logits, turn)
            out = fused_grpo_loss(
                logits, self._labels, self._ref_logps, self._group_ids, self._group_weights, shift=False, backend=name
            )
            return torch.autograd.grad(out.loss, logits)

        return run

    def plain(self, turn: int) -> object:
        """By PyTorch's operations and autograd."""
        logits = rotated(self._logits, turn)
        logps = torch.log_softmax(logits.float(), -1).gather(-1, self._labels.unsqueeze(-1)).squeeze(-1)
        chosen, rejected = (logps.sum(-1).double() - self._ref_logps).chunk(2)
        losses = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected))
        loss = (losses * self._group_weights[self._group_ids]).mean()
        return torch.autograd.grad(loss, logits)
