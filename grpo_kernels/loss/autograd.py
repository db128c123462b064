"""The autograd Functions of the loss; each saves, computes, and returns, and no other file here knows ``ctx``.

    TokenLogps       logits → p_t                               one read forward; one read and one write backward
    SequenceSum      p_t → log pi of each sequence
    PreferenceLoss   p_t, from any source → loss, log pi       backward: one number a row, c_t
    FusedLoss        logits → loss, log pi                      TokenLogps and PreferenceLoss in one node

In ``c_t`` the slopes, the group weights and whatever else was added to the log-probabilities have already met, so the
vocabulary has one backward, whatever the loss:

    c_t = ± (1/B) w_i s_i [/ max(length_i, 1)] + the gradient of log pi,   dloss/dz[t, :] = c_t (onehot(y_t) - softmax)
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .arguments import LossArguments, Rows
from .pairs import PairResults


def strictly_once_differentiable(backward: Any) -> Any:
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
    def forward(ctx: Any, logits: torch.Tensor, arguments: LossArguments) -> torch.Tensor:
        """(2B, T, V) or (rows, V) → (rows,)."""
        logps, lse = logps_and_lse(logits, arguments)
        ctx.save_for_backward(logits, arguments.rows.targets, lse)
        _keep_settings(ctx, arguments)
        return logps

    @staticmethod
    @strictly_once_differentiable
    def backward(ctx: Any, grad_logps: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, targets, lse = ctx.saved_tensors
        return _logits_gradient(ctx, grad_logps, logits, targets, lse), None


class PreferenceLoss(torch.autograd.Function):
    """Token log-probabilities → (loss, policy_logps), both of which carry gradients; backward gives c_t."""

    @staticmethod
    def forward(
        ctx: Any, token_logps: torch.Tensor, results: PairResults, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(results.slopes, results.weights, results.lengths, rows.cu_seqlens)
        ctx.num_rows = token_logps.shape[0]  # a size of its own input, which a compiled graph of any shape knows
        ctx.set_materialize_grads(False)
        # Detached, or the very tensors that kernels write would become part of the graph.
        return results.loss.detach(), results.policy_logps.detach()

    @staticmethod
    @strictly_once_differentiable
    def backward(
        ctx: Any, grad_loss: torch.Tensor | None, grad_policy_logps: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        saved = SavedForLoss(*ctx.saved_tensors)
        return saved.grad_token_logps(grad_loss, grad_policy_logps, ctx.num_rows), None, None


class FusedLoss(torch.autograd.Function):
    """logits → (loss, policy_logps): ``TokenLogps`` and ``PreferenceLoss`` in one, which spares a node a call.

    Saves what both save.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        logps_lse: tuple[torch.Tensor, torch.Tensor],
        results: PairResults,
        arguments: LossArguments,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``logps_lse`` as from :func:`logps_and_lse`; a tuple, since autograd looks at every tensor it is passed."""
        (_, lse), rows = logps_lse, arguments.rows
        ctx.save_for_backward(
            logits, rows.targets, lse, results.slopes, results.weights, results.lengths, rows.cu_seqlens
        )
        _keep_settings(ctx, arguments)
        ctx.set_materialize_grads(False)
        return results.loss.detach(), results.policy_logps.detach()

    @staticmethod
    @strictly_once_differentiable
    def backward(
        ctx: Any, grad_loss: torch.Tensor | None, grad_policy_logps: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        logits, targets, lse, *saved = ctx.saved_tensors
        grad = SavedForLoss(*saved).grad_token_logps(grad_loss, grad_policy_logps, targets.shape[0])
        if grad is not None:
            grad = _logits_gradient(ctx, grad, logits, targets, lse)
        return grad, None, None, None


class SequenceSum(torch.autograd.Function):
    """(rows,) → (sequences,) sums over each sequence, taken in float64 in a fixed order."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.save_for_backward(rows.cu_seqlens)
        num_rows = ctx.num_rows = values.shape[0]
        if rows.cu_seqlens is None:
            length = num_rows // max(rows.num_sequences, 1)
            sums = values.view(rows.num_sequences, length).sum(dim=1, dtype=torch.float64)
        else:
            # A wrong boundary may give a wrong sum, never a stray read.
            edges = rows.cu_seqlens.long().clamp(0, num_rows)
            sums = torch.segment_reduce(values.double(), "sum", offsets=edges, initial=0, unsafe=True)
        return sums.to(values.dtype)

    @staticmethod
    @strictly_once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (cu_seqlens,) = ctx.saved_tensors
        return _expand(grad, cu_seqlens, ctx.num_rows), None


def logps_and_lse(logits: torch.Tensor, arguments: LossArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows,) log-probability of each row's target and (rows,) logsumexp, outside of autograd."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = arguments.rows
    logps = logits.new_empty(rows.num_rows, dtype=dtype)
    lse = torch.empty_like(logps)
    arguments.backend.token_logps_fwd(_block(logits), rows.targets, logps, lse, ignore_index=rows.ignore_index)
    return logps, lse


def _keep_settings(ctx: Any, arguments: LossArguments) -> None:
    """What the gradient of the logits needs besides tensors; ``arguments`` itself would keep tensors alive."""
    ctx.ignore_index = arguments.rows.ignore_index
    ctx.overwrite_logits = arguments.overwrite_logits
    ctx.backend = arguments.backend


def _logits_gradient(
    ctx: Any, grad_logps: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor
) -> torch.Tensor:
    """``grad_logps[t] (onehot(y_t) - softmax(z[t, :]))``, in new memory or over the logits."""
    logits = logits.detach()
    grad = logits if ctx.overwrite_logits else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    ctx.backend.token_logps_bwd(
        _block(logits), targets, lse, grad_logps.contiguous(), _block(grad), ignore_index=ctx.ignore_index
    )
    if ctx.overwrite_logits:
        # As after any in-place operation: a node that saved these logits, this one too, must not use them again.
        torch.autograd.graph.increment_version(logits)
    return grad


class SavedForLoss(NamedTuple):
    """The saved tensors that lead from the gradient of the loss back to the rows, in the order they are saved in."""

    slopes: torch.Tensor
    """(B,) s_i."""
    weights: torch.Tensor
    """(B,) w_i of each pair's group."""
    lengths: torch.Tensor | None
    """(2B,) float64, where it normalises."""
    cu_seqlens: torch.Tensor | None

    def grad_token_logps(
        self, grad_loss: torch.Tensor | None, grad_policy_logps: torch.Tensor | None, num_rows: int
    ) -> torch.Tensor | None:
        """(rows,) c_t, from the gradients of the loss and of the sequences' log-probabilities."""
        scale = None  # c of each sequence: (2B,), + for chosen, - for rejected
        if grad_loss is not None:
            scale = grad_loss / max(self.slopes.shape[0], 1) * self.weights * self.slopes
            scale = torch.cat([scale, -scale])
            if self.lengths is not None:
                scale = scale / self.lengths.clamp(min=1).to(scale.dtype)
        if grad_policy_logps is not None:
            scale = grad_policy_logps if scale is None else scale + grad_policy_logps
        return None if scale is None else _expand(scale, self.cu_seqlens, num_rows)


def _expand(scale: torch.Tensor, cu_seqlens: torch.Tensor | None, num_rows: int) -> torch.Tensor:
    """One number a sequence → one number a row."""
    if cu_seqlens is None:
        sequences = max(scale.shape[0], 1)
        return scale.unsqueeze(1).expand(-1, num_rows // sequences).reshape(num_rows)
    # searchsorted and not repeat_interleave: rows past the last sequence need an answer, and no host sync.
    index = torch.searchsorted(
        cu_seqlens[1:], torch.arange(num_rows, device=scale.device, dtype=cu_seqlens.dtype), right=True
    )
    return torch.nn.functional.pad(scale, (0, 1))[index.clamp(max=scale.shape[0])]


def _block(logits: torch.Tensor) -> torch.Tensor:
    """Logits as backends take them: (sequences, T, V), packed ones as one sequence."""
    return logits if logits.dim() == 3 else logits.unsqueeze(0)
