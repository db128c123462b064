"""Cases through the public functions: the loss with its alpha step, packed and padded, the LM head, a CUDA graph.

a step   loss, gradient of the logits, log alpha;    the head   log-probabilities, gradients of hidden and weight
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from .. import GroupWeights, fused_grpo_loss, linear_token_logps
from ..types import IGNORE_INDEX, LOSS_TYPES, SMOOTHED_LOSS_TYPES
from .budget import EPSILON, require, require_same, within_budget
from .case import WHOLE, Case
from .places import Place, short

PAIRS = 4
SIZES = (50, 30, 20)
RATE = 0.1


def cases(place: Place) -> Iterator[Case]:
    """Every case for one backend on one device."""
    for dtype, packed in itertools.product(place.dtypes, (False, True)):
        text = f"{'packed' if packed else 'padded'}, {short(dtype)}"
        yield Case(WHOLE, f"two steps with a moving alpha, {text}", True, partial(check_steps, place, dtype, packed))
    for loss_type in LOSS_TYPES:
        check = partial(check_steps, place, torch.float32, False, loss_type)
        yield Case(WHOLE, f"two steps with a moving alpha, {loss_type}", False, check)
    for dtype in place.dtypes:
        for frozen, budget in ((True, 0), (False, 0), (False, 10**9)):
            what = "frozen" if frozen else f"trained, {'everything' if budget else 'nothing'} kept"
            quick = dtype is not torch.float16 or frozen
            check = partial(check_head, place, dtype, frozen=frozen, budget=budget)
            yield Case(WHOLE, f"the head, {what}, {short(dtype)}", quick, check)
    if place.device.startswith("cuda"):
        yield Case(WHOLE, "a CUDA graph replays a step", True, partial(check_graph, place))


# ---------------------------------------------------------------------------------------------- the loss


class Step:
    """The tensors of one step over static inputs, as a CUDA graph needs them."""

    def __init__(self, place: Place, dtype: torch.dtype, packed: bool, loss_type: str, *, size_of: Place | None = None):
        """``size_of``: the place that says how large the step is, where it is not ``place`` itself."""
        vocabulary = (size_of or place).wide
        length = 2 if (size_of or place).interpreted else 8
        generator, device = torch.Generator().manual_seed(7), place.device
        shape = (2 * PAIRS * length, vocabulary) if packed else (2 * PAIRS, length, vocabulary)
        # Drawn as bfloat16, which every dtype holds exactly: all of them have the same truth.
        logits = (3 * torch.randn(shape, generator=generator)).bfloat16()
        self.labels = torch.randint(0, vocabulary, shape[:-1], generator=generator).to(device)
        self.labels.view(2 * PAIRS, length)[::3, 0] = IGNORE_INDEX
        self.logits = logits.to(device=device, dtype=dtype).requires_grad_()
        self.ref_logps = (-6 * length - length * torch.rand(2 * PAIRS, generator=generator, dtype=torch.float64)).to(
            device
        )
        self.group_ids = torch.tensor([0, 2, 1, 0], device=device)
        bounds = torch.arange(0, 2 * PAIRS * length + 1, length, dtype=torch.int32, device=device)
        self.cu_seqlens = bounds if packed else None
        self.group_weights = GroupWeights.robust(list(SIZES), group_lr=RATE).to(device)
        self.options: dict[str, Any] = {
            "loss_type": loss_type, "backend": place.name,
            "label_smoothing": 0.1 if loss_type in SMOOTHED_LOSS_TYPES else 0.0,
        }  # fmt: skip

    def run(self) -> list[torch.Tensor]:
        """Loss, gradient and log alpha after one step."""
        out = fused_grpo_loss(
            self.logits, self.labels, self.ref_logps, self.group_ids, self.group_weights,
            cu_seqlens=self.cu_seqlens, **self.options,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(out.loss, self.logits)
        return [out.loss.detach(), gradient, self.group_weights.log_alpha]

    def rewind(self) -> None:
        """Back to the alpha of the start, in place: a graph holds the buffers' addresses."""
        start = GroupWeights.robust(list(SIZES), group_lr=RATE).to(self.logits.device)
        for name, buffer in self.group_weights.named_buffers():
            buffer.copy_(getattr(start, name))


def check_steps(place: Place, dtype: torch.dtype, packed: bool, loss_type: str = "sigmoid") -> None:
    """Two steps, each against float64; the second is weighted by the alpha that the first moved."""
    ours = Step(place, dtype, packed, loss_type)
    exact = Step(Place("torch", "cpu"), torch.float64, packed, loss_type, size_of=place)
    plain = Step(Place("torch", "cpu"), torch.float32, packed, loss_type, size_of=place)
    for turn in (1, 2):
        got, truth, budget = ([x.detach().cpu() for x in one.run()] for one in (ours, exact, plain))
        for name, mine, theirs, true in zip(("loss", "gradient", "log alpha"), got, budget, truth, strict=True):
            theirs = theirs.to(mine.dtype)  # a gradient in half precision is rounded at the end
            # Sums of log-probabilities reach 64, and are rounded to float32 before they become margins and slopes.
            largest = true.abs().max().item()
            within_budget(f"step {turn}, {name}", mine, theirs, true, 64 * max(largest, name != "gradient"))
    start = GroupWeights.robust(list(SIZES), group_lr=RATE).log_alpha
    require(not torch.equal(ours.group_weights.log_alpha.cpu(), start), "alpha did not move")
    again = Step(place, dtype, packed, loss_type)
    ours.rewind()
    for turn in (1, 2):
        for name, a, b in zip(("loss", "gradient", "log alpha"), again.run(), ours.run(), strict=True):
            require_same(a, b, f"{name} of step {turn}, a second time")


def check_graph(place: Place) -> None:
    """Four replays give the bits of four eager steps, alpha among them."""
    step = Step(place, torch.bfloat16, False, "sigmoid")

    def clones(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in tensors]

    with torch.cuda.device(torch.device(place.device)):
        eager = [clones(step.run()) for _ in range(4)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step.run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step.run()
        step.rewind()
        for turn, expected in enumerate(eager):
            graph.replay()
            for name, a, b in zip(("loss", "gradient", "log alpha"), captured, expected, strict=True):
                require_same(a, b, f"{name} of replay {turn + 1}")


# ---------------------------------------------------------------------------------------------- the head


def check_head(
    place: Place, dtype: torch.dtype, *, frozen: bool, budget: int, shape: tuple[int, int, int] | None = None
) -> None:
    """Values and gradients in the norm: no further from float64 than plain PyTorch, plus one rounding of the dtype.

    The vocabulary is wider than the widest tile, so that several tiles take part; ``shape`` is another (rows, H, V).
    """
    rows, width, vocabulary = shape or ((6, 16, 16500) if place.interpreted else (48, 64, 20000))
    generator = torch.Generator().manual_seed(5)
    hidden = (3 * torch.randn(1, rows, width, generator=generator)).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(dtype)
    labels = torch.randint(0, vocabulary, (1, rows), generator=generator)
    labels = torch.where(torch.rand(1, rows, generator=generator) < 0.5, (hidden @ weight.t()).argmax(-1), labels)
    labels[0, ::5] = IGNORE_INDEX
    grads = 1e-2 * torch.randn(1, rows, generator=generator)
    device = torch.device(place.device)
    labels, grads = labels.to(device), grads.to(device)

    def gradients(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
        h, w = (x.to(device).detach().clone() for x in inputs)
        leaves = [h.requires_grad_()] if frozen else [h.requires_grad_(), w.requires_grad_()]
        value = function(h, w)
        return [value.detach(), *torch.autograd.grad(value, leaves, grads.to(value.dtype))]

    def plain(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        logps = (h @ w.t()).log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return torch.where(labels == IGNORE_INDEX, 0.0, logps)

    def fused(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_token_logps(h, w, labels, shift=False, memory_budget=budget, backend=place.name)

    exact = gradients(plain, hidden.double(), weight.double())
    eager = gradients(plain, hidden, weight)
    ours, again = gradients(fused, hidden, weight), gradients(fused, hidden, weight)
    epsilon = 16 * EPSILON if dtype is torch.float32 else torch.finfo(dtype).eps / 2
    for name, truth, theirs, mine, second in zip(
        ("logps", "hidden", "weight"), exact, eager, ours, again, strict=False
    ):
        error = ((mine.double() - truth).norm() / truth.norm()).item()
        allowed = ((theirs.double() - truth).norm() / truth.norm()).item() + epsilon
        require(error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}")
        require_same(second, mine, f"{name} of a second run")
