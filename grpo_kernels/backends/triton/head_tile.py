"""The two tile operations of the LM head, between its GEMMs.

    z[v] = softcap * tanh(logit_scale * (x[v] + bias[v]) / softcap)         x: one tile of the GEMM's output
    forward    e[v] = exp(z[v] - top),  rest += sum_{v != y} e[v],  top = running max_{v != y} z[v]
    backward   g[v] = scale * exp(z[v] - top) * d[v],  g[y] = at_target * d[y]
    d[v] = 1 - (z[v] / softcap)^2, 1 without a cap

Shapes: a tile is (rows, words) with any stride between rows; everything else is (rows,), the bias (words,).
Accumulation dtype: float32, whatever the dtype of the tile.
Bytes moved: backward reads the tile once and writes it once.  Forward reads it twice, first for the maximum, and writes
it once where exponentials are wanted: a row is at most 64 KB, and the second read finds it in cache.

One program takes one row, in blocks of (BLOCK_V / VEC, VEC) with 16 bytes of the tile in the second dimension and the
row's edges by themselves, as in ``token_logps.py``.  Each element is taken once to the maximum and once to its
exponential, with or without an output, so that both give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import on_device_of, register_limit
from .table import Direction, head_tile_options, head_tile_registers
from .token_logps import _edge_columns, _exp, _expm1, _split_row

_NEG_INF = tl.constexpr(float("-inf"))


# ---------------------------------------------------------------------------------------------- helpers


@triton.jit
def _logit(x, bias, softcap, slope, CAPPED: tl.constexpr):
    """z of the module's docstring; ``slope`` is logit_scale, over softcap where there is one."""
    z = (x.to(tl.float32) + bias) * slope
    if CAPPED:
        # Not 2 sigma(2z) - 1, which would lose the digits of a small z.
        e = _expm1(-2 * tl.abs(z))
        t = e / (2 + e)
        z = softcap * tl.where(z < 0, t, -t)
    return z


@triton.jit
def _kept(z, softcap, CAPPED: tl.constexpr):
    """d of the module's docstring: what the cap leaves of a change."""
    if CAPPED:
        t = z / softcap
        return 1 - t * t
    else:
        return 1.0


@triton.jit
def _local_target(targets_ptr, row, start, words):
    """Column of the row's target within the tile, -1 where it is not there."""
    local = tl.load(targets_ptr + row) - start
    return tl.where((local >= 0) & (local < words), local, -1).to(tl.int32)


@triton.jit
def _bias_at(bias_ptr, column, mask):
    if bias_ptr is not None:
        return tl.load(bias_ptr + column, mask=mask, other=0.0)
    else:
        return 0.0


# ---------------------------------------------------------------------------------------------- forward

# Nothing is specialised on values or addresses, as in token_logps.py: the last tile is narrower than the others.
_ARGUMENTS = [
    "logits_ptr", "bias_ptr", "targets_ptr", "top_ptr", "rest_ptr", "picked_ptr", "factor_ptr", "exps_ptr",
    "scale_ptr", "at_target_ptr", "grads_ptr",
    "stride", "stride_out", "words", "start", "softcap", "slope", "exps_scale",
]  # fmt: skip


@triton.jit(do_not_specialize=_ARGUMENTS)
def head_tile_fwd_kernel(
    logits_ptr, bias_ptr, targets_ptr, top_ptr, rest_ptr, picked_ptr, factor_ptr, exps_ptr,
    stride: tl.int64, stride_out: tl.int64, words: tl.int32, start: tl.int32,
    softcap: tl.float32, slope: tl.float32, exps_scale: tl.float32,
    BLOCK_V: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr, OUT_HINT: tl.constexpr, BIAS_HINT: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """Carry (top, rest, picked) of one row past a tile, and write its exponentials.

    In place is safe: each thread writes just the elements that it has read.  The target's logit is loaded apart, and
    the maximum over the row, for which all threads meet, lies between that load and the first write.
    OUT_HINT is the bytes of VEC elements of the output where its rows start at the same place as the tile's, else 1.
    """
    row = tl.program_id(0).to(tl.int64)
    target = _local_target(targets_ptr, row, start, words)
    old_top = tl.load(top_ptr + row)
    old_rest = tl.load(rest_ptr + row)
    row_ptr = logits_ptr + row * stride
    inside = target >= 0
    x_target = tl.load(row_ptr + target, mask=inside, other=0.0)
    z_target = _logit(x_target, _bias_at(bias_ptr, target, inside), softcap, slope, CAPPED)
    tl.store(picked_ptr + row, z_target, mask=inside)

    head, body = _split_row(row_ptr, words, VEC, ALIGNED)
    LANES: tl.constexpr = BLOCK_V // VEC
    lane = tl.arange(0, LANES)[:, None] * VEC
    offset = lane + tl.arange(0, VEC)[None, :]
    column, edge = _edge_columns(head, body, words, LANES, VEC)
    if ALIGNED:
        # Here, and not in a helper, for the reason given in token_logps.py.
        body_ptr = tl.multiple_of(row_ptr, 16)
    else:
        body_ptr = tl.multiple_of(row_ptr + head, 16)
    bias_body_ptr = bias_ptr
    if bias_ptr is not None:
        if ALIGNED:
            bias_body_ptr = tl.multiple_of(bias_ptr, BIAS_HINT)
        else:
            bias_body_ptr = bias_ptr + head

    top = tl.full([LANES], _NEG_INF, tl.float32)
    for first in range(0, body, BLOCK_V):
        live = first + lane < body
        x = tl.load(body_ptr + first + offset, mask=live, other=0.0)
        z = _logit(x, _bias_at(bias_body_ptr, first + offset, live), softcap, slope, CAPPED)
        # After the cap, which would make -softcap of -inf.
        z = tl.where(live & (head + first + offset != target), z, _NEG_INF)
        top = tl.maximum(top, tl.max(z, axis=1))
    if not ALIGNED:
        x_edge = tl.load(row_ptr + column, mask=edge, other=0.0)
        z_edge = _logit(x_edge, _bias_at(bias_ptr, column, edge), softcap, slope, CAPPED)
        top = tl.maximum(top, tl.where(edge & (column != target), z_edge, _NEG_INF))
    new_top = tl.maximum(old_top, tl.max(top, axis=0))

    total = tl.zeros([LANES], tl.float32)
    out_ptr = exps_ptr
    out_body_ptr = exps_ptr
    if exps_ptr is not None:
        out_ptr = exps_ptr + row * stride_out
        if ALIGNED:
            out_body_ptr = tl.multiple_of(out_ptr, OUT_HINT)
        else:
            out_body_ptr = tl.multiple_of(out_ptr + head, OUT_HINT)
    for first in range(0, body, BLOCK_V):
        live = first + lane < body
        x = tl.load(body_ptr + first + offset, mask=live, other=0.0)
        z = _logit(x, _bias_at(bias_body_ptr, first + offset, live), softcap, slope, CAPPED)
        other = live & (head + first + offset != target)
        e = tl.where(other, _exp(z - new_top), 0.0)
        total += tl.sum(e, axis=1)
        if exps_ptr is not None:
            # Once more, because the target's d may be NaN.
            e = tl.where(other, e * exps_scale * _kept(z, softcap, CAPPED), 0.0)
            tl.store(out_body_ptr + first + offset, e.to(exps_ptr.dtype.element_ty), mask=live)
    if not ALIGNED:
        x = tl.load(row_ptr + column, mask=edge, other=0.0)
        z = _logit(x, _bias_at(bias_ptr, column, edge), softcap, slope, CAPPED)
        other = edge & (column != target)
        e = tl.where(other, _exp(z - new_top), 0.0)
        total += e
        if exps_ptr is not None:
            e = tl.where(other, e * exps_scale * _kept(z, softcap, CAPPED), 0.0)
            tl.store(out_ptr + column, e.to(exps_ptr.dtype.element_ty), mask=edge)

    factor = _exp(old_top - new_top)
    tl.store(top_ptr + row, new_top)
    tl.store(rest_ptr + row, old_rest * factor + tl.sum(total, axis=0))
    if factor_ptr is not None:
        tl.store(factor_ptr + row, factor)


# ---------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=_ARGUMENTS)
def head_tile_bwd_kernel(
    logits_ptr, bias_ptr, targets_ptr, top_ptr, scale_ptr, at_target_ptr, grads_ptr,
    stride: tl.int64, stride_out: tl.int64, words: tl.int32, start: tl.int32, softcap: tl.float32, slope: tl.float32,
    BLOCK_V: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr, OUT_HINT: tl.constexpr, BIAS_HINT: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """``g[v] = scale exp(z[v] - top) d[v]``, ``g[y] = at_target d[y]`` of one row; in place is safe, as in forward."""
    row = tl.program_id(0).to(tl.int64)
    target = _local_target(targets_ptr, row, start, words)
    top = tl.load(top_ptr + row)
    scale = tl.load(scale_ptr + row)
    at_target = tl.load(at_target_ptr + row)
    row_ptr = logits_ptr + row * stride
    out_ptr = grads_ptr + row * stride_out
    head, body = _split_row(row_ptr, words, VEC, ALIGNED)
    LANES: tl.constexpr = BLOCK_V // VEC
    lane = tl.arange(0, LANES)[:, None] * VEC
    offset = lane + tl.arange(0, VEC)[None, :]
    if ALIGNED:
        body_ptr = tl.multiple_of(row_ptr, 16)
        out_body_ptr = tl.multiple_of(out_ptr, OUT_HINT)
    else:
        body_ptr = tl.multiple_of(row_ptr + head, 16)
        out_body_ptr = tl.multiple_of(out_ptr + head, OUT_HINT)
    bias_body_ptr = bias_ptr
    if bias_ptr is not None:
        if ALIGNED:
            bias_body_ptr = tl.multiple_of(bias_ptr, BIAS_HINT)
        else:
            bias_body_ptr = bias_ptr + head

    for first in range(0, body, BLOCK_V):
        live = first + lane < body
        x = tl.load(body_ptr + first + offset, mask=live, other=0.0)
        z = _logit(x, _bias_at(bias_body_ptr, first + offset, live), softcap, slope, CAPPED)
        g = tl.where(head + first + offset == target, at_target, scale * _exp(z - top)) * _kept(z, softcap, CAPPED)
        tl.store(out_body_ptr + first + offset, g.to(grads_ptr.dtype.element_ty), mask=live)
    if not ALIGNED:
        column, edge = _edge_columns(head, body, words, LANES, VEC)
        x = tl.load(row_ptr + column, mask=edge, other=0.0)
        z = _logit(x, _bias_at(bias_ptr, column, edge), softcap, slope, CAPPED)
        g = tl.where(column == target, at_target, scale * _exp(z - top)) * _kept(z, softcap, CAPPED)
        tl.store(out_ptr + column, g.to(grads_ptr.dtype.element_ty), mask=edge)


# ---------------------------------------------------------------------------------------------- launchers


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
    if targets.numel() == 0:
        return
    with on_device_of(logits):
        head_tile_fwd_kernel[(targets.numel(),)](
            logits, bias, targets, top, rest, picked, factor, exps,
            logits.stride(0), 0 if exps is None else exps.stride(0), logits.shape[1], start,
            softcap, logit_scale / softcap if softcap else logit_scale, 2.0**-shift,
            **_launch("fwd", logits, exps, bias, softcap != 0),
        )  # fmt: skip


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
    if grads.numel() == 0:
        return
    with on_device_of(logits):
        head_tile_bwd_kernel[(targets.numel(),)](
            logits, bias, targets, top, scale, at_target, grads,
            logits.stride(0), grads.stride(0), logits.shape[1], start,
            softcap, logit_scale / softcap if softcap else logit_scale,
            **_launch("bwd", logits, grads, bias, softcap != 0),
        )  # fmt: skip


def _launch(
    direction: Direction, logits: torch.Tensor, out: torch.Tensor | None, bias: torch.Tensor | None, capped: bool
) -> dict[str, int]:
    """Block sizes, and what the addresses of this tile allow to be moved at once."""
    words = logits.shape[1]
    options = head_tile_options(direction, words, logits.dtype, device=logits.device)
    vec = options.vec
    place, step = _place(logits, vec)
    aligned = place == step == words % vec == 0
    same = out is not None and (place, step) == _place(out, vec)
    registers = head_tile_registers(direction, aligned=aligned, capped=capped, biased=bias is not None)
    return {
        **register_limit(registers),
        "BLOCK_V": options.block_v,
        "VEC": vec,
        "ALIGNED": aligned,
        "CAPPED": capped,
        "OUT_HINT": vec * out.element_size() if out is not None and same else 1,
        "BIAS_HINT": 16 if bias is not None and bias.data_ptr() % 16 == 0 else 1,
        "num_warps": options.num_warps,
    }


def _place(tensor: torch.Tensor, vec: int) -> tuple[int, int]:
    """Where the first row starts within ``vec`` elements, and by how much each next row is further; one row is not."""
    size = tensor.element_size()
    step = tensor.stride(0) if tensor.shape[0] > 1 else 0
    return tensor.data_ptr() // size % vec, step % vec
