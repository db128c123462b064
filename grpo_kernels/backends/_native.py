"""What native_cpu and native_cuda share: tensors checked and turned into the addresses and integers csrc takes.

Each function returns the arguments of one kernel, in order, up to what is the device's own (threads, or a stream).
The checks keep a wrong tensor from becoming a stray address; the caller's tensors stay alive through the call because
the caller holds them.
"""

from __future__ import annotations

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The codes of ``DType`` in csrc/dtypes.h."""

CPU = torch.device("cpu")

_NOWHERE = 64
"""The address of an empty vector: torch gives it 0, by which the kernels know what was left out."""


def forward_arguments(
    device: torch.device,
    logits: torch.Tensor,
    targets: torch.Tensor,
    logps: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
) -> tuple:
    """The arguments of ``token_logps_fwd``."""
    code, (sequences, length, vocabulary), stride = _block("logits", logits, device)
    rows = sequences * length
    return (
        code, logits.data_ptr(), sequences, length, vocabulary, stride[0], stride[1],
        _vector("targets", targets, rows, torch.int64, device), _vector("logps", logps, rows, torch.float32, device),
        _vector("lse", lse, rows, torch.float32, device), ignore_index,
    )  # fmt: skip


def backward_arguments(
    device: torch.device,
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    grad_logps: torch.Tensor,
    grad_logits: torch.Tensor,
    ignore_index: int,
) -> tuple:
    """The arguments of ``token_logps_bwd``."""
    code, shape, stride = _block("logits", logits, device)
    if grad_logits is logits:
        grad_stride = stride
    else:
        grad_code, grad_shape, grad_stride = _block("grad_logits", grad_logits, device)
        if grad_code != code or grad_shape != shape:
            raise ValueError(
                f"grad_logits must be like logits, {tuple(shape)} {logits.dtype}, "
                f"got {tuple(grad_shape)} {grad_logits.dtype}"
            )
    sequences, length, vocabulary = shape
    rows = sequences * length
    return (
        code, logits.data_ptr(), sequences, length, vocabulary, stride[0], stride[1],
        _vector("targets", targets, rows, torch.int64, device), _vector("lse", lse, rows, torch.float32, device),
        _vector("grad_logps", grad_logps, rows, torch.float32, device),
        grad_logits.data_ptr(), grad_stride[0], grad_stride[1], ignore_index,
    )  # fmt: skip


def tail_arguments(
    device: torch.device,
    token_logps: torch.Tensor,
    targets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    group_ids: torch.Tensor,
    pair_weights: torch.Tensor | None,
    policy_logps: torch.Tensor,
    lengths: torch.Tensor | None,
    margins: torch.Tensor,
    rewards: torch.Tensor,
    losses: torch.Tensor,
    slopes: torch.Tensor,
    group_sums: torch.Tensor,
    group_counts: torch.Tensor,
    group_losses: torch.Tensor,
    length_normalize: bool,
) -> tuple:
    """The arguments of ``preference_tail`` up to the options."""
    rows, pairs, groups = token_logps.numel(), group_ids.numel(), group_sums.numel()
    dtype, f64, i64 = token_logps.dtype, torch.float64, torch.int64
    if dtype is not torch.float32 and dtype is not f64:
        raise TypeError(f"token_logps must be float32 or float64, got {dtype}")
    if cu_seqlens is None and pairs and rows % (2 * pairs):
        raise ValueError(f"token_logps must hold as many rows for each of {2 * pairs} sequences, got {rows} rows")
    if lengths is None and (length_normalize or targets is not None):
        raise ValueError("lengths must be given where they are counted or divide")
    return (
        dtype is f64, rows, pairs, groups,
        _vector("token_logps", token_logps, rows, dtype, device),
        0 if targets is None else _vector("targets", targets, rows, i64, device),
        0 if cu_seqlens is None else _vector("cu_seqlens", cu_seqlens, 2 * pairs + 1, torch.int32, device),
        0 if ref_logps is None else _vector("ref_logps", ref_logps, 2 * pairs, f64, device),
        _vector("group_ids", group_ids, pairs, i64, device),
        0 if pair_weights is None else _vector("pair_weights", pair_weights, pairs, f64, device),
        _vector("policy_logps", policy_logps, 2 * pairs, dtype, device),
        0 if lengths is None else _vector("lengths", lengths, 2 * pairs, f64, device),
        _vector("margins", margins, pairs, dtype, device),
        _vector("rewards", rewards, 2 * pairs, dtype, device),
        _vector("losses", losses, pairs, dtype, device),
        _vector("slopes", slopes, pairs, dtype, device),
        _vector("group_sums", group_sums, groups, f64, device),
        _vector("group_counts", group_counts, groups, i64, device),
        _vector("group_losses", group_losses, groups, dtype, device),
    )  # fmt: skip


def robust_loss_arguments(
    device: torch.device,
    losses: torch.Tensor,
    group_ids: torch.Tensor,
    group_weights: torch.Tensor,
    weights: torch.Tensor,
    loss: torch.Tensor,
) -> tuple:
    """The arguments of ``robust_loss``."""
    pairs, groups, dtype = losses.numel(), group_weights.numel(), losses.dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        raise TypeError(f"losses must be float32 or float64, got {dtype}")
    if not groups:
        raise ValueError("group_weights must hold at least one weight")
    return (
        dtype is torch.float64, pairs, groups, _vector("losses", losses, pairs, dtype, device),
        _vector("group_ids", group_ids, pairs, torch.int64, device),
        _vector("group_weights", group_weights, groups, dtype, device),
        _vector("weights", weights, pairs, dtype, device), _vector("loss", loss, 1, dtype, device),
    )  # fmt: skip


def tile_fwd_arguments(
    device: torch.device,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    top: torch.Tensor,
    rest: torch.Tensor,
    picked: torch.Tensor,
    factor: torch.Tensor,
    exps: torch.Tensor | None,
    *,
    narrower: bool = False,
) -> tuple:
    """The arguments of ``head_tile_fwd`` up to the options; ``narrower``: exps of a float32 tile may have 16 bits."""
    rows, f32 = logits.shape[0], torch.float32
    return (
        *_tile(logits, bias, targets, device),
        _vector("top", top, rows, f32, device), _vector("rest", rest, rows, f32, device),
        _vector("picked", picked, rows, f32, device), _vector("factor", factor, rows, f32, device),
        *((0, 0) if exps is None else _like_tile("exps", exps, logits, device, narrower)),
    )  # fmt: skip


def tile_bwd_arguments(
    device: torch.device,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    top: torch.Tensor,
    scale: torch.Tensor,
    at_target: torch.Tensor,
    grads: torch.Tensor,
    *,
    narrower: bool = False,
) -> tuple:
    """The arguments of ``head_tile_bwd`` up to the options; ``narrower`` as in :func:`tile_fwd_arguments`."""
    rows, f32 = logits.shape[0], torch.float32
    return (
        *_tile(logits, bias, targets, device),
        _vector("top", top, rows, f32, device), _vector("scale", scale, rows, f32, device),
        _vector("at_target", at_target, rows, f32, device), *_like_tile("grads", grads, logits, device, narrower),
    )  # fmt: skip


def _tile(logits: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, device: torch.device) -> tuple:
    code, (_, rows, words), stride = _block("logits", logits.unsqueeze(0), device)
    return (
        code, logits.data_ptr(), rows, words, stride[1],
        0 if bias is None else _vector("bias", bias, words, torch.float32, device),
        _vector("targets", targets, rows, torch.int64, device),
    )  # fmt: skip


def _like_tile(
    name: str, tensor: torch.Tensor, logits: torch.Tensor, device: torch.device, narrower: bool
) -> tuple[int, int]:
    """Address and row stride of what a tile operation writes."""
    same = tensor.dtype is logits.dtype or (narrower and logits.dtype is torch.float32)
    if not same or tensor.shape != logits.shape:
        raise ValueError(
            f"{name} must be like logits, {tuple(logits.shape)} {logits.dtype}, "
            f"got {tuple(tensor.shape)} {tensor.dtype}"
        )
    _, _, stride = _block(name, tensor.unsqueeze(0), device)
    return tensor.data_ptr(), stride[1]


def _block(name: str, tensor: torch.Tensor, device: torch.device) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Dtype code, shape (S, T, V) and strides, or an error that says what came."""
    code, shape = DTYPES.get(tensor.dtype), tensor.shape
    if code is None or tensor.device != device:
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16 on {device}, got {tensor.dtype} on {tensor.device}"
        )
    if len(shape) != 3:
        raise ValueError(f"{name} must have shape (S, T, V), got {tuple(shape)}")
    stride = tensor.stride()
    if stride[2] != 1 and shape[2] > 1 and tensor.numel():
        raise ValueError(f"{name} must have a last stride of 1, got strides {stride}")
    return code, shape, stride


def _vector(name: str, tensor: torch.Tensor, size: int, dtype: torch.dtype, device: torch.device) -> int:
    """The address of a contiguous vector, never 0, or an error that says what came."""
    # A call has twenty vectors, and asking whether one is on the CPU is quicker than comparing devices.
    there = tensor.is_cpu if device is CPU else tensor.device == device
    if not there or tensor.dtype is not dtype or tensor.numel() != size or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be {size} contiguous {dtype} on {device}, got shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()}, {tensor.dtype} on {tensor.device}"
        )
    return tensor.data_ptr() or _NOWHERE
