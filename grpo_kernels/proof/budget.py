"""The error budget: how far a kernel may be from float64, and what it is compared with.

    error of the kernel  <=  error of plain PyTorch in the same dtype  +  EPSILON * (largest number involved)

One implementation for the parity tests, for recorded runs, and for the proof on a user's own device.
"""

from __future__ import annotations

import torch

from ..types import IGNORE_INDEX

EPSILON = 2.0**-22
"""Two float32 roundings: by how much an error may exceed plain PyTorch's, relative to the largest number involved."""

SIGMAS = (3.0, 8.0)
"""Standard deviations of logits, for flat and for peaked rows: the largest probability is near 0.01 and near 0.9."""


class Mismatch(Exception):
    """A kernel's result is outside the budget, or breaks a rule of the boundary; the message says which."""


def require(holds: bool | torch.Tensor, message: str) -> None:
    """Raise :class:`Mismatch` unless ``holds``."""
    if not bool(holds):
        raise Mismatch(message)


def require_same(got: torch.Tensor, want: torch.Tensor, message: str) -> None:
    """Equal to the bit, NaN in the same places."""
    same = got.shape == want.shape and torch.equal(got.isnan(), want.isnan())
    if not (same and torch.equal(got.nan_to_num(nan=0.0), want.nan_to_num(nan=0.0))):
        raise Mismatch(f"{message}: the bits differ")


def require_close(got: torch.Tensor, want: torch.Tensor, message: str, *, rtol: float, atol: float) -> None:
    """``|got - want| <= atol + rtol |want|``; NaN and infinities in the same places."""
    try:
        torch.testing.assert_close(got.double().cpu(), want.double().cpu(), rtol=rtol, atol=atol, equal_nan=True)
    except AssertionError as error:
        raise Mismatch(f"{message}: {error}") from None


def within_budget(what: str, got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, scale: float) -> None:
    """The largest error is at most plain PyTorch's plus ``EPSILON * scale``."""
    if exact.numel() == 0:
        return
    ours, theirs = ((x.double().cpu() - exact).abs().max().item() for x in (got, plain))
    allowed = theirs + EPSILON * scale
    require(ours <= allowed, f"{what}: error {ours:.3e}, PyTorch's {theirs:.3e}, allowed {allowed:.3e}")


def within_relative_budget(
    what: str, got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, reach: float
) -> None:
    """The same, entry by entry relative to its own size, so that small entries count as much as large ones.

    Args:
        what: named in the error.
        got: the kernel's result.
        plain: PyTorch's, in the same dtype.
        exact: in float64.  Entries below the normal range of the dtype of ``got`` are left out.
        reach: the largest \\|z\\| or \\|lse\\|.  float32 holds a difference of two such numbers to ``EPSILON * reach``,
            which the exponential turns into a relative error.
    """
    seen = exact.abs() > 2 * torch.finfo(got.dtype).tiny
    if not seen.any():
        return
    size = exact.abs()[seen]
    ours, theirs = (((x.double().cpu() - exact).abs()[seen] / size).max().item() for x in (got, plain))
    allowed = theirs + EPSILON * (4 + reach)
    require(ours <= allowed, f"{what}: relative error {ours:.3e}, PyTorch's {theirs:.3e}, allowed {allowed:.3e}")


def oracle(
    logits: torch.Tensor, targets: torch.Tensor, grads: torch.Tensor, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and gradient by ``torch.log_softmax`` and autograd, on the CPU, in ``dtype``.

    In float64 that is the truth, in float32 the budget.
    """
    z = logits.detach().to("cpu", dtype, copy=True).contiguous().requires_grad_()
    flat, target = torch.log_softmax(z, dim=-1).view(-1, z.shape[-1]), targets.cpu()
    labelled = target != IGNORE_INDEX
    logps = flat.gather(1, torch.where(labelled, target, 0).unsqueeze(1)).squeeze(1)
    logps = torch.where(labelled, logps, 0)
    (gradient,) = torch.autograd.grad(logps, z, grads.cpu().to(dtype))
    return logps.detach(), gradient
