"""Token log-probabilities over the vocabulary, forward and backward.

    forward    lse_r = logsumexp_v z[r, v],   logp_r = z[r, y_r] - lse_r
    backward   dz[r, v] = c_r * ((v == y_r) - exp(z[r, v] - lse_r))

Shapes: z is (S, T, V) with any strides on S and T, row r = s * T + t; everything else is (S * T,).
Accumulation dtype: float32, whatever the dtype of z.
Bytes moved: forward reads each labelled row once; backward reads it once and writes it once.  An ignored row is
not read at all: forward writes two numbers for it, backward writes its zeros.

One program takes one row and walks it in blocks of BLOCK_V.  A block is laid out as (BLOCK_V / VEC, VEC) with
16 bytes in the second dimension, so that each thread loads 16 bytes at a time and keeps one running maximum and
one running sum per 16 bytes: threads talk to each other once, at the end of the row.  Where a row does not start
at a multiple of 16 bytes, or its length is not one, the few elements before and after are taken by
themselves (the "edges") and the rest stays 16 bytes wide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import on_device_of
from .table import token_logps_options

_LOG2E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Where running maxima start: finite, so that -inf minus the maximum is -inf and never NaN."""
_NEG_INF = tl.constexpr(float("-inf"))


# ---------------------------------------------------------------------------------------------- helpers


@triton.jit
def _row_offset(row, length, stride_sequence, stride_row):
    """Elements from the first row of the tensor to row ``row``, in 64 bits because ``row`` is."""
    return (row // length) * stride_sequence + (row % length) * stride_row


@triton.jit
def _split_row(row_ptr, vocabulary, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements before the first 16-byte boundary of the row, and the whole 16-byte groups after it in elements."""
    if ALIGNED:
        head = 0
        body = vocabulary
    else:
        # The low bits of the address; an element never straddles 16 bytes, so the division is exact.
        misaligned = (row_ptr.to(tl.int64) & 15).to(tl.int32) // (16 // VEC)
        head = tl.minimum((VEC - misaligned) % VEC, vocabulary)
        body = (vocabulary - head) // VEC * VEC
    return head, body


@triton.jit
def _edge_columns(head, body, vocabulary, LANES: tl.constexpr, VEC: tl.constexpr):
    """Columns outside the 16-byte groups, one for each lane that has one: fewer than VEC in front, fewer behind.

    As many lanes as a block has groups, so that no two threads hold the same element.
    """
    lane = tl.arange(0, LANES)
    column = tl.where(lane < VEC, lane, head + body + lane - VEC)
    return column, (lane < head) | ((lane >= VEC) & (column < vocabulary))


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2E)


@triton.jit
def _expm1(x):
    """``exp(x) - 1`` in float32 to a few units in the last place; x is a log-probability, at most about 0."""
    series = 1 + x * (1 / 9)
    series = 1 + x * (1 / 8) * series
    series = 1 + x * (1 / 7) * series
    series = 1 + x * (1 / 6) * series
    series = 1 + x * (1 / 5) * series
    series = 1 + x * (1 / 4) * series
    series = 1 + x * (1 / 3) * series
    series = 1 + x * (1 / 2) * series
    return tl.where(tl.abs(x) < 0.5, x * series, _exp(x) - 1)


@triton.jit
def _fill_row(
    row_ptr, body_ptr, value, head, body, vocabulary,
    BLOCK_V: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    LANES: tl.constexpr = BLOCK_V // VEC
    lane = tl.arange(0, LANES)[:, None] * VEC
    offset = lane + tl.arange(0, VEC)[None, :]
    block = tl.full([LANES, VEC], 0, tl.float32) + value
    for start in range(0, body, BLOCK_V):
        tl.store(body_ptr + start + offset, block.to(row_ptr.dtype.element_ty), mask=start + lane < body)
    if not ALIGNED:
        column, edge = _edge_columns(head, body, vocabulary, LANES, VEC)
        fill = tl.full([LANES], 0, tl.float32) + value
        tl.store(row_ptr + column, fill.to(row_ptr.dtype.element_ty), mask=edge)


# ---------------------------------------------------------------------------------------------- forward

# Nothing is specialised on values of numbers or on addresses and sizes of tensors, and a number has one type whatever
# its value: a new sequence length must not mean a new compilation in the middle of a run.  What alignment allows is
# said by ALIGNED instead.  On AMD Triton would else tell storages of up to 2 GiB from larger ones, and lose what
# tl.multiple_of promises on the way: loads of 2 bytes instead of 16.
_ARGUMENTS = [
    "logits_ptr", "targets_ptr", "logps_ptr", "lse_ptr", "grad_logps_ptr", "grad_logits_ptr",
    "stride_sequence", "stride_row", "stride_grad_sequence", "stride_grad_row", "length", "vocabulary", "ignore_index",
]  # fmt: skip


@triton.jit(do_not_specialize=_ARGUMENTS)
def token_logps_fwd_kernel(
    logits_ptr, targets_ptr, logps_ptr, lse_ptr,
    stride_sequence: tl.int64, stride_row: tl.int64,
    length: tl.int32, vocabulary: tl.int32, ignore_index: tl.int64,
    BLOCK_V: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``logps[r] = z[r, y_r] - lse_r``; one program per row, one read of the row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(logps_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        return

    row_ptr = logits_ptr + _row_offset(row, length, stride_sequence, stride_row)
    head, body = _split_row(row_ptr, vocabulary, VEC, ALIGNED)
    LANES: tl.constexpr = BLOCK_V // VEC
    lane = tl.arange(0, LANES)[:, None] * VEC
    offset = lane + tl.arange(0, VEC)[None, :]
    if ALIGNED:
        # Not row_ptr + 0, and not in a helper: the compiler would fold the sum away, and the promise with it.
        body_ptr = tl.multiple_of(row_ptr, 16)
    else:
        body_ptr = tl.multiple_of(row_ptr + head, 16)

    # Issued before the loop, so that its latency hides behind the row's.
    known = (target >= 0) & (target < vocabulary)
    z_target = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32)

    top = tl.full([LANES], _LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, body, BLOCK_V):
        # The mask is the same for all 16 bytes of a group, which is what lets the compiler keep the load whole.
        z = tl.load(body_ptr + start + offset, mask=start + lane < body, other=_NEG_INF).to(tl.float32)
        new_top = tl.maximum(top, tl.max(z, axis=1))
        total = total * _exp(top - new_top) + tl.sum(_exp(z - new_top[:, None]), axis=1)
        top = new_top
    if not ALIGNED:
        column, edge = _edge_columns(head, body, vocabulary, LANES, VEC)
        z = tl.load(row_ptr + column, mask=edge, other=_NEG_INF).to(tl.float32)
        new_top = tl.maximum(top, z)
        total = total * _exp(top - new_top) + _exp(z - new_top)
        top = new_top

    row_top = tl.max(top, axis=0)
    row_total = tl.sum(total * _exp(top - row_top), axis=0)
    # A row of only -inf leaves the total at 0, and one with NaN or +inf leaves it NaN: both are NaN in torch.
    log_total = tl.where(row_total > 0, tl.log(row_total), float("nan"))
    tl.store(lse_ptr + row, row_top + log_total)
    tl.store(logps_ptr + row, (z_target - row_top) - log_total)


# ---------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=_ARGUMENTS)
def token_logps_bwd_kernel(
    logits_ptr, targets_ptr, lse_ptr, grad_logps_ptr, grad_logits_ptr,
    stride_sequence: tl.int64, stride_row: tl.int64, stride_grad_sequence: tl.int64, stride_grad_row: tl.int64,
    length: tl.int32, vocabulary: tl.int32, ignore_index: tl.int64,
    BLOCK_V: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr, GRAD_HINT: tl.constexpr,
):  # fmt: skip
    """``dz[r, v] = c_r ((v == y_r) - exp(z[r, v] - lse_r))``; one program per row, one read and one write of it.

    In place is safe: each thread writes just the elements that it has read, the target's among them, so no
    thread depends on an element that another may have overwritten.
    GRAD_HINT is 16 where rows of the gradient start at the same place within 16 bytes as rows of the logits, else 1.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    row_ptr = logits_ptr + _row_offset(row, length, stride_sequence, stride_row)
    grad_ptr = grad_logits_ptr + _row_offset(row, length, stride_grad_sequence, stride_grad_row)
    head, body = _split_row(row_ptr, vocabulary, VEC, ALIGNED)
    if ALIGNED:
        body_ptr = tl.multiple_of(row_ptr, 16)
        grad_body_ptr = tl.multiple_of(grad_ptr, 16)
    else:
        body_ptr = tl.multiple_of(row_ptr + head, 16)
        grad_body_ptr = tl.multiple_of(grad_ptr + head, GRAD_HINT)
    known = (target >= 0) & (target < vocabulary)
    ignored = target == ignore_index
    if ignored | (known == 0):
        value = tl.where(ignored, 0.0, float("nan"))
        _fill_row(grad_ptr, grad_body_ptr, value, head, body, vocabulary, BLOCK_V, VEC, ALIGNED)
        return

    lse = tl.load(lse_ptr + row)
    scale = -tl.load(grad_logps_ptr + row)
    LANES: tl.constexpr = BLOCK_V // VEC
    lane = tl.arange(0, LANES)[:, None] * VEC
    offset = lane + tl.arange(0, VEC)[None, :]
    target_column = target.to(tl.int32)

    for start in range(0, body, BLOCK_V):
        inside = start + lane < body
        logp = tl.load(body_ptr + start + offset, mask=inside, other=_NEG_INF).to(tl.float32) - lse
        # exp(logp) - 1 would lose what is left of the target's entry as its probability nears 1.  Only the block
        # that holds the target looks it up; the rest compare with a column that they do not have.
        in_block = target_column - head - start
        at_target = offset == in_block
        target_dz = 0.0
        if (in_block >= 0) & (in_block < BLOCK_V):
            target_logp = tl.sum(tl.sum(tl.where(at_target, logp, 0.0), axis=1), axis=0)
            target_dz = scale * _expm1(target_logp)
        dz = tl.where(at_target, target_dz, scale * _exp(logp))
        tl.store(grad_body_ptr + start + offset, dz.to(grad_ptr.dtype.element_ty), mask=inside)
    if not ALIGNED:
        column, edge = _edge_columns(head, body, vocabulary, LANES, VEC)
        logp = tl.load(row_ptr + column, mask=edge, other=_NEG_INF).to(tl.float32) - lse
        dz = scale * tl.where(column == target_column, _expm1(logp), _exp(logp))
        tl.store(grad_ptr + column, dz.to(grad_ptr.dtype.element_ty), mask=edge)


# ---------------------------------------------------------------------------------------------- launchers


def token_logps_fwd(
    logits: torch.Tensor, targets: torch.Tensor, logps: torch.Tensor, lse: torch.Tensor, *, ignore_index: int
) -> None:
    """``logps[r] = z[r, y_r] - lse_r``; see ``boundary.py``."""
    if targets.numel() == 0:
        return
    _, length, vocabulary = logits.shape
    options = token_logps_options("fwd", vocabulary, logits.dtype, device=logits.device)
    with on_device_of(logits):
        token_logps_fwd_kernel[(targets.numel(),)](
            logits, targets, logps, lse,
            logits.stride(0), logits.stride(1), length, vocabulary, ignore_index,
            BLOCK_V=options.block_v, VEC=options.vec, ALIGNED=_aligned(logits), num_warps=options.num_warps,
        )  # fmt: skip


def token_logps_bwd(
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    grad_logps: torch.Tensor,
    grad_logits: torch.Tensor,
    *,
    ignore_index: int,
) -> None:
    """``dz[r, v] = c_r ((v == y_r) - exp(z[r, v] - lse_r))``, in place or not; see ``boundary.py``."""
    if grad_logits.numel() == 0:
        return
    _, length, vocabulary = logits.shape
    options = token_logps_options("bwd", vocabulary, logits.dtype, device=logits.device)
    with on_device_of(logits):
        token_logps_bwd_kernel[(targets.numel(),)](
            logits, targets, lse, grad_logps, grad_logits,
            logits.stride(0), logits.stride(1), grad_logits.stride(0), grad_logits.stride(1),
            length, vocabulary, ignore_index,
            BLOCK_V=options.block_v, VEC=options.vec, ALIGNED=_aligned(logits) and _aligned(grad_logits),
            GRAD_HINT=16 if _same_alignment(logits, grad_logits) else 1, num_warps=options.num_warps,
        )  # fmt: skip


def _row_steps(tensor: torch.Tensor) -> tuple[int, int]:
    """Bytes between sequences and between rows; what there is only one of takes no step."""
    sequences, length, _ = tensor.shape
    size = tensor.element_size()
    return (tensor.stride(0) * size if sequences > 1 else 0), (tensor.stride(1) * size if length > 1 else 0)


def _aligned(tensor: torch.Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes and is one long."""
    row_bytes = tensor.shape[-1] * tensor.element_size()
    return all(number % 16 == 0 for number in (tensor.data_ptr(), row_bytes, *_row_steps(tensor)))


def _same_alignment(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether each row of ``a`` starts at the same place within 16 bytes as the same row of ``b``."""
    pairs = ((a.data_ptr(), b.data_ptr()), *zip(_row_steps(a), _row_steps(b), strict=True))
    return all((x - y) % 16 == 0 for x, y in pairs)
