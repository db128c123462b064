"""The autograd Functions, and the only file that knows ``ctx``.

Two of them make the loss.  ``TokenLogps`` holds the one read of the vocabulary forward and the one read and write
backward; ``PreferenceLoss`` is the way back from the loss to the token log-probabilities.  Between them backward passes
one number a row: ``c_t``, in which the slopes, the group weights and whatever else was added to the log-probabilities
have already met.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import linear_ops
from .backends import Backend
from .linear_plan import Call


def _differentiable_once(backward: Any) -> Any:
    """``once_differentiable``, in earnest.

    PyTorch's own refuses a second derivative only where an incoming gradient requires grad.  That of a loss does not,
    and a gradient penalty would silently be taken for a constant.
    """
    refusing = once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            grads = tuple(None if grad is None else grad.detach().requires_grad_() for grad in grads)
        return refusing(ctx, *grads)

    return wrapper


class TokenLogps(torch.autograd.Function):
    """logits → log-probability of each row's target; saves logits, targets and (rows,) lse."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, overwrite: bool, backend: Backend
    ) -> torch.Tensor:
        """(2B, T, V) or (rows, V), and (rows,) int64 → (rows,)."""
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        logps = torch.empty(targets.shape, dtype=dtype, device=logits.device)
        lse = torch.empty_like(logps)
        backend.token_logps_fwd(_rows(logits), targets, logps, lse, ignore_index=ignore_index)
        ctx.save_for_backward(logits, targets, lse)
        ctx.ignore_index, ctx.overwrite, ctx.backend = ignore_index, overwrite, backend
        return logps

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad_logps: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, targets, lse = ctx.saved_tensors
        logits = logits.detach()
        grad = logits if ctx.overwrite else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        ctx.backend.token_logps_bwd(
            _rows(logits), targets, lse, grad_logps.contiguous(), _rows(grad), ignore_index=ctx.ignore_index
        )
        if ctx.overwrite:
            # As after any in-place operation: whoever saved these logits, this node too, must not use them again.
            torch.autograd.graph.increment_version(logits)
        return grad, None, None, None, None


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
        call: Call,
        backend: str,
    ) -> torch.Tensor:
        """(rows, H), (V, H), (V,) and (rows,) int64 → (rows,)."""
        needs = tuple(call.grad and need for need in ctx.needs_input_grad[:3])
        logps, *saved = linear_ops.forward(hidden, weight, bias, targets, needs, call, backend)
        if not (needs[1] or needs[2]):
            # Backward will ask for shape and dtype only; what it saves must not keep a frozen head's inputs alive.
            ctx.save_for_backward(hidden.new_empty(()).expand(hidden.shape), None, None, None, *saved)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, *saved)
        ctx.needs, ctx.call, ctx.backend = needs, call, backend
        return logps

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad_logps: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, index, right, *saved = ctx.saved_tensors
        grads = linear_ops.backward(
            grad_logps, hidden, weight, bias, targets, index, right, saved, ctx.needs, ctx.call, ctx.backend
        )
        return (*grads, None, None, None)


def _save_compiled(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    hidden, weight, bias, targets, needs, *call = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, *output[1:])
    ctx.needs, ctx.call = needs, call


def _backward_compiled(ctx: Any, grads: list[torch.Tensor]) -> tuple[Any, ...]:
    hidden, weight, bias, targets, index, right, *saved = ctx.saved_tensors
    results = linear_ops.linear_token_logps_bwd(
        grads[0], hidden, weight, bias, targets, index, right, saved, ctx.needs, *ctx.call
    )
    results = [grad if need else None for grad, need in zip(results, ctx.needs, strict=True)]
    return (*results, None, None, *(None for _ in ctx.call))


linear_ops.linear_token_logps_fwd.register_autograd(_backward_compiled, setup_context=_save_compiled)


def linear_token_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    call: Call,
    backend: str,
) -> torch.Tensor:
    """:class:`LinearTokenLogps`, or under ``torch.compile`` the operators that do the same."""
    if not torch.compiler.is_compiling():
        return LinearTokenLogps.apply(hidden, weight, bias, targets, call, backend)
    needs = [call.grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    return linear_ops.linear_token_logps_fwd(
        hidden, weight, bias, targets, needs, *linear_ops.flat(call), backend
    )[0]  # fmt: skip


class PreferenceLoss(torch.autograd.Function):
    """What the tail has made of token log-probabilities → (loss, policy_logps), through which gradients come back.

        loss = (1/B) sum_i w_i l_i,   dloss/dp_t = ± (1/B) w_i s_i [/ max(length_i, 1)]

    Saves slopes and weights (B,) and, where it normalises, lengths (2B,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        token_logps: torch.Tensor,
        policy_logps: torch.Tensor,
        losses: torch.Tensor,
        slopes: torch.Tensor,
        weights: torch.Tensor,
        lengths: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(slopes, weights, lengths, cu_seqlens)
        ctx.rows = token_logps.shape[0]
        ctx.set_materialize_grads(False)
        weighted = weights * losses
        # Of no pairs the sum is 0 and the mean NaN.  Detached, because an input handed back would be taken for a view.
        return weighted.mean() if weights.shape[0] else weighted.sum(), policy_logps.detach()

    @staticmethod
    @_differentiable_once
    def backward(
        ctx: Any, grad_loss: torch.Tensor | None, grad_policy_logps: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        slopes, weights, lengths, cu_seqlens = ctx.saved_tensors
        scale = None  # c of each sequence: (2B,), + for chosen, - for rejected
        if grad_loss is not None:
            scale = grad_loss / max(slopes.shape[0], 1) * weights * slopes
            scale = torch.cat([scale, -scale])
            if lengths is not None:
                scale = scale / lengths.clamp(min=1).to(scale.dtype)
        if grad_policy_logps is not None:
            scale = grad_policy_logps if scale is None else scale + grad_policy_logps
        grad = None if scale is None else _expand(scale, cu_seqlens, ctx.rows)
        return (grad,) + (None,) * 6


class SequenceSum(torch.autograd.Function):
    """(rows,) → (2B,) sums over each sequence, taken in float64 in a fixed order."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, cu_seqlens: torch.Tensor | None, sequences: int) -> torch.Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.rows = values.shape[0]
        if cu_seqlens is None:
            sums = values.view(sequences, ctx.rows // max(sequences, 1)).sum(dim=1, dtype=torch.float64)
        else:
            sums = torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens.long(), initial=0, unsafe=True)
        return sums.to(values.dtype)

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (cu_seqlens,) = ctx.saved_tensors
        return _expand(grad, cu_seqlens, ctx.rows), None, None


def _expand(scale: torch.Tensor, cu_seqlens: torch.Tensor | None, rows: int) -> torch.Tensor:
    """One number a sequence → one number a row."""
    if cu_seqlens is None:
        sequences = max(scale.shape[0], 1)
        return scale.unsqueeze(1).expand(-1, rows // sequences).reshape(rows)
    # searchsorted and not repeat_interleave: rows past the last sequence need an answer, and no host sync.
    index = torch.searchsorted(
        cu_seqlens[1:], torch.arange(rows, device=scale.device, dtype=cu_seqlens.dtype), right=True
    )
    return torch.nn.functional.pad(scale, (0, 1))[index.clamp(max=scale.shape[0])]


def _rows(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dim() == 3 else logits.unsqueeze(0)
