"""The autograd Function of the LM head, and the same for a compiled step.

    hidden (rows, H), weight (V, H), bias (V,) → log-probability of each row's target

From there on it is ``loss/autograd.py``.
"""

from __future__ import annotations

from typing import Any

import torch

from ..loss.autograd import strictly_once_differentiable
from . import ops
from .arguments import HeadArguments, HeadInputs, HeadSettings
from .linear_head import Saved


class LinearTokenLogps(torch.autograd.Function):
    """hidden, weight, bias → log-probability of each row's target, tile by tile (linear_head.py).

    A frozen head saves (labelled rows, H) and nothing else; otherwise its inputs, a few vectors and the kept tiles.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        settings: HeadSettings,
    ) -> torch.Tensor:
        """(rows, H), (V, H), (V,) and (rows,) int64 → (rows,)."""
        needs = tuple(settings.grad and need for need in ctx.needs_input_grad[:3])
        inputs = HeadInputs(hidden, weight, bias, targets)
        logps, saved = ops.forward(inputs, needs, settings)
        if not (needs[1] or needs[2]):
            # Backward will ask for shape and dtype only; what it saves must not keep a frozen head's inputs alive.
            ctx.save_for_backward(hidden.new_empty(()).expand(hidden.shape), None, None, None, *saved.tensors())
        else:
            ctx.save_for_backward(*inputs, *saved.tensors())
        ctx.needs, ctx.settings = needs, settings
        return logps

    @staticmethod
    @strictly_once_differentiable
    def backward(ctx: Any, grad_logps: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, *tensors = ctx.saved_tensors
        saved = Saved.of(tensors)
        tensors.clear()  # so that `saved` alone holds them
        if hasattr(ctx, "maybe_clear_saved_tensors"):
            # Unless the graph is retained: a kept tile then goes when it has been used, and its memory to dW.
            ctx.maybe_clear_saved_tensors()
        inputs = HeadInputs(hidden, weight, bias, targets)
        return (*ops.backward(grad_logps, inputs, saved, ctx.needs, ctx.settings), None, None)


def _save_compiled(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    hidden, weight, bias, targets, needs, *settings = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, *output[1:])
    ctx.needs, ctx.settings = needs, settings


def _backward_compiled(ctx: Any, grads: list[torch.Tensor]) -> tuple[Any, ...]:
    hidden, weight, bias, targets, index, count_is_right, *saved = ctx.saved_tensors
    results = ops.linear_token_logps_bwd(
        grads[0], hidden, weight, bias, targets, index, count_is_right, saved, ctx.needs, *ctx.settings
    )
    results = [grad if need else None for grad, need in zip(results, ctx.needs, strict=True)]
    return (*results, None, None, *(None for _ in ctx.settings))


ops.linear_token_logps_fwd.register_autograd(_backward_compiled, setup_context=_save_compiled)


def apply_head(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, arguments: HeadArguments
) -> torch.Tensor:
    """:class:`LinearTokenLogps`, or under ``torch.compile`` the operators that do the same: (rows,)."""
    targets, settings = arguments.loss.rows.targets, arguments.settings
    if not torch.compiler.is_compiling():
        return LinearTokenLogps.apply(hidden, weight, bias, targets, settings)
    needs = [settings.grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    return ops.linear_token_logps_fwd(hidden, weight, bias, targets, needs, *ops.to_schema(settings))[0]
