"""The autograd Functions, and the only file that knows ``ctx``.

Two of them make the loss.  ``TokenLogps`` is the vocabulary: one read forward, one read and write backward.
``PreferenceLoss`` is the way back from the loss to the token log-probabilities, whoever made them.  Between the two
backward passes one number a row: ``c_t``, in which the slopes, the group weights and whatever else was added to the
log-probabilities have already met.  ``FusedLoss`` is both at once.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..backends import Backend


def differentiable_once(backward: Any) -> Any:
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


_Options = tuple[int, bool, Backend]
"""ignore_index, whether to overwrite the logits, and who does the work."""


class TokenLogps(torch.autograd.Function):
    """logits → log-probability of each row's target; saves logits, targets and (rows,) lse."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, overwrite: bool, backend: Backend
    ) -> torch.Tensor:
        """(2B, T, V) or (rows, V), and (rows,) int64 → (rows,)."""
        logps, lse = logps_and_lse(logits, targets, ignore_index, backend)
        ctx.save_for_backward(logits, targets, lse)
        ctx.options = ignore_index, overwrite, backend
        return logps

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_logps: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _logits_gradient(grad_logps, *ctx.saved_tensors, *ctx.options), None, None, None, None


class Weighted(NamedTuple):
    """What the tail and the alpha step have made of token log-probabilities: what a loss and its gradient need."""

    loss: torch.Tensor
    """() ``(1/B) sum_i w_i l_i``."""
    policy_logps: torch.Tensor
    """(2B,) sums over tokens."""
    weights: torch.Tensor
    """(B,) w of each pair's group."""
    slopes: torch.Tensor
    """(B,) s_i."""
    lengths: torch.Tensor | None
    """(2B,) float64, where it normalises."""
    cu_seqlens: torch.Tensor | None


class PreferenceLoss(torch.autograd.Function):
    """Token log-probabilities → (loss, policy_logps), both of which carry gradients.

        dloss/dp_t = ± (1/B) w_i s_i [/ max(length_i, 1)]

    Takes one tuple instead of many tensors, since autograd looks at every argument of a Function.
    """

    @staticmethod
    def forward(ctx: Any, token_logps: torch.Tensor, pairs: Weighted) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(*pairs[2:])
        ctx.rows = token_logps.shape[0]
        ctx.set_materialize_grads(False)
        # Detached, because an input that is handed back would be taken for a view.
        return pairs.loss.detach(), pairs.policy_logps.detach()

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, grad_loss: torch.Tensor | None, grad_policy_logps: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        return _rows_gradient(grad_loss, grad_policy_logps, ctx.rows, *ctx.saved_tensors), None


class FusedLoss(torch.autograd.Function):
    """logits → (loss, policy_logps): ``TokenLogps`` and ``PreferenceLoss`` in one, which spares a node a call.

    Saves what both save.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor], options: _Options, pairs: Weighted
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``rows`` are targets and lse."""
        ctx.save_for_backward(logits, *rows, *pairs[2:])
        ctx.options = options
        ctx.set_materialize_grads(False)
        return pairs.loss.detach(), pairs.policy_logps.detach()

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, grad_loss: torch.Tensor | None, grad_policy_logps: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        logits, targets, lse, *pairs = ctx.saved_tensors
        grad = _rows_gradient(grad_loss, grad_policy_logps, targets.shape[0], *pairs)
        if grad is not None:
            grad = _logits_gradient(grad, logits, targets, lse, *ctx.options)
        return grad, None, None, None


class SequenceSum(torch.autograd.Function):
    """(rows,) → (2B,) sums over each sequence, taken in float64 in a fixed order."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, cu_seqlens: torch.Tensor | None, sequences: int) -> torch.Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.rows = values.shape[0]
        if cu_seqlens is None:
            sums = values.view(sequences, ctx.rows // max(sequences, 1)).sum(dim=1, dtype=torch.float64)
        else:
            edges = cu_seqlens.long().clamp(0, ctx.rows)  # a wrong boundary may give a wrong sum, never a stray read
            sums = torch.segment_reduce(values.double(), "sum", offsets=edges, initial=0, unsafe=True)
        return sums.to(values.dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (cu_seqlens,) = ctx.saved_tensors
        return _expand(grad, cu_seqlens, ctx.rows), None, None


def logps_and_lse(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, backend: Backend
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows,) log-probability of each row's target and (rows,) logsumexp, outside of autograd."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = targets.shape[0]
    logps, lse = logits.new_empty(rows, dtype=dtype), logits.new_empty(rows, dtype=dtype)
    backend.token_logps_fwd(_rows(logits), targets, logps, lse, ignore_index=ignore_index)
    return logps, lse


def _logits_gradient(
    grad_logps: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    overwrite: bool,
    backend: Backend,
) -> torch.Tensor:
    logits = logits.detach()
    grad = logits if overwrite else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backend.token_logps_bwd(
        _rows(logits), targets, lse, grad_logps.contiguous(), _rows(grad), ignore_index=ignore_index
    )
    if overwrite:
        # As after any in-place operation: whoever saved these logits, this node too, must not use them again.
        torch.autograd.graph.increment_version(logits)
    return grad


def _rows_gradient(
    grad_loss: torch.Tensor | None,
    grad_policy_logps: torch.Tensor | None,
    rows: int,
    weights: torch.Tensor,
    slopes: torch.Tensor,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor | None:
    """(rows,) c_t, from the gradients of the loss and of the sequences' log-probabilities."""
    scale = None  # c of each sequence: (2B,), + for chosen, - for rejected
    if grad_loss is not None:
        scale = grad_loss / max(slopes.shape[0], 1) * weights * slopes
        scale = torch.cat([scale, -scale])
        if lengths is not None:
            scale = scale / lengths.clamp(min=1).to(scale.dtype)
    if grad_policy_logps is not None:
        scale = grad_policy_logps if scale is None else scale + grad_policy_logps
    return None if scale is None else _expand(scale, cu_seqlens, rows)


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
