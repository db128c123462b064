"""The two tile operations of the LM head in PyTorch operations: any device, any floating dtype.

    z[v] = softcap * tanh(logit_scale * (x[v] + bias[v]) / softcap)         x: one tile of the GEMM's output
    forward    e[v] = exp(z[v] - top),  rest += sum_{v != y} e[v],  top = running max_{v != y} z[v]
    backward   g[v] = scale * exp(z[v] - top) * d[v],  g[y] = at_target * d[y]
    d[v] = 1 - (z[v] / softcap)^2, 1 without a cap

Rows are taken a few at a time, so that the float32 copies of a half-precision tile stay in cache.  Accumulation
dtype: float32, float64 for float64 tiles.  The boundary is described in ``boundary.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_CHUNK_BYTES = {"cpu": 2 << 20}
_DEFAULT_CHUNK_BYTES = 256 << 20


def head_tile_fwd(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    top: torch.Tensor,
    rest: torch.Tensor,
    picked: torch.Tensor,
    factor: torch.Tensor | None,
    exps: torch.Tensor | None,
    *,
    start: int,
    softcap: float,
    logit_scale: float,
    shift: float,
) -> None:
    """Carry (top, rest, picked) past one tile and write its exponentials; see ``boundary.py``."""
    for part in _chunks(logits, top.dtype):
        z = _logits(logits[part], bias, top.dtype, softcap, logit_scale)
        index, inside = _local(targets[part], start, z.shape[1])
        at_target = z.gather(1, index)
        picked[part] = torch.where(inside, at_target, picked[part].unsqueeze(1)).squeeze(1)
        z.scatter_(1, index, torch.where(inside, -torch.inf, at_target))
        old_top = top[part].clone()
        new_top = torch.maximum(old_top, z.amax(dim=1))
        rescale = (old_top - new_top).exp_()
        slope = _slope(z, softcap) if exps is not None else None
        e = z.sub_(new_top.unsqueeze(1)).exp_()
        rest[part] = rest[part] * rescale + e.sum(dim=1)
        top[part] = new_top
        if factor is not None:
            factor[part] = rescale
        if exps is not None:
            if shift:
                e.mul_(2.0**-shift)
            if slope is not None:
                # The target's logit is -inf by now, and 0 * -inf is not 0.
                e.mul_(slope).scatter_(1, index, torch.where(inside, 0.0, e.gather(1, index)))
            exps[part] = e


def head_tile_bwd(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    top: torch.Tensor,
    scale: torch.Tensor,
    at_target: torch.Tensor,
    grads: torch.Tensor,
    *,
    start: int,
    softcap: float,
    logit_scale: float,
) -> None:
    """The gradient of one tile of the GEMM's output; see ``boundary.py``."""
    for part in _chunks(logits, top.dtype):
        z = _logits(logits[part], bias, top.dtype, softcap, logit_scale)
        index, inside = _local(targets[part], start, z.shape[1])
        slope = _slope(z, softcap)
        g = z.sub_(top[part].unsqueeze(1)).exp_().mul_(scale[part].unsqueeze(1))
        g.scatter_(1, index, torch.where(inside, at_target[part].unsqueeze(1), g.gather(1, index)))
        grads[part] = g if slope is None else g.mul_(slope)


def _logits(
    x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, softcap: float, logit_scale: float
) -> torch.Tensor:
    """A copy of the tile with bias, scale and cap applied; ``softcap`` 0 stands for none."""
    z = x.to(dtype, copy=True)
    if bias is not None:
        z.add_(bias)
    if softcap:
        return z.mul_(logit_scale / softcap).tanh_().mul_(softcap)
    return z.mul_(logit_scale) if logit_scale != 1 else z


def _slope(z: torch.Tensor, softcap: float) -> torch.Tensor | None:
    """d of the module's docstring, None where it is 1 throughout."""
    return (z / softcap).square_().neg_().add_(1) if softcap else None


def _local(targets: torch.Tensor, start: int, words: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, 1) index of the target within the tile, safe to gather at, and whether it is there."""
    index = (targets - start).unsqueeze(1)
    inside = (index >= 0) & (index < words)
    return torch.where(inside, index, 0), inside


def _chunks(logits: torch.Tensor, dtype: torch.dtype) -> Iterator[slice]:
    rows, words = logits.shape
    step = max(1, _CHUNK_BYTES.get(logits.device.type, _DEFAULT_CHUNK_BYTES) // max(words * dtype.itemsize, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
