"""The boundary in C++ for CPUs: AVX-512, AVX2 or portable code, chosen at run time (csrc/cpu).

    p_t = z[t, y_t] - lse_t,   dz[t, v] = c_t * ((v == y_t) - exp(z[t, v] - lse_t))

float32, bfloat16 and float16 logits; float32 accumulation.  Forward reads the logits once, backward reads and writes
them once; nothing is allocated.  ``GRPO_KERNELS_ISA=avx512_bf16|avx512|avx2|baseline`` overrides the choice.
"""

from __future__ import annotations

import torch  # before _cpu, so that both share one OpenMP runtime and torch's threads

try:
    from .. import _cpu
except ImportError as error:  # no C++ compiler when the package was installed
    _cpu = None
    _import_error = error

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The codes of ``DType`` in csrc/cpu/dtypes.h."""


def unavailable_reason() -> str | None:
    """None if the module was built and this CPU runs the instruction set asked for, else one sentence."""
    if _cpu is None:
        return f"the extension grpo_kernels._cpu is not built; install with a C++ compiler at hand ({_import_error})"
    try:
        _cpu.isa()
    except RuntimeError as error:
        return str(error)
    return None


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """None for float32, bfloat16 and float16 on the CPU, else one sentence."""
    if device.type != "cpu":
        return f"it takes tensors on the CPU, not on {device}"
    return None if dtype in _DTYPES else f"it takes float32, bfloat16 and float16, not {dtype}"


def isa() -> str:
    """The instruction set in use: ``avx512_bf16``, ``avx512``, ``avx2`` or ``baseline``."""
    return _cpu.isa()


def token_logps_fwd(
    logits: torch.Tensor, targets: torch.Tensor, logps: torch.Tensor, lse: torch.Tensor, *, ignore_index: int
) -> None:
    """``logps[r] = z[r, y_r] - lse_r``; see ``backends.__doc__``."""
    code, (sequences, length, vocabulary), (stride_s, stride_t) = _block("logits", logits)
    rows = sequences * length
    _cpu.token_logps_fwd(
        code, logits.data_ptr(), sequences, length, vocabulary, stride_s, stride_t,
        _vector("targets", targets, rows, torch.int64), _vector("logps", logps, rows, torch.float32),
        _vector("lse", lse, rows, torch.float32), ignore_index, torch.get_num_threads(),
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
    """``dz[r, v] = c_r ((v == y_r) - exp(z[r, v] - lse_r))``, in place or not; see ``backends.__doc__``."""
    code, shape, (stride_s, stride_t) = _block("logits", logits)
    grad_code, grad_shape, (grad_stride_s, grad_stride_t) = _block("grad_logits", grad_logits)
    if grad_code != code or grad_shape != shape:
        raise ValueError(
            f"grad_logits must be like logits, {tuple(shape)} {logits.dtype}, "
            f"got {tuple(grad_shape)} {grad_logits.dtype}"
        )
    sequences, length, vocabulary = shape
    rows = sequences * length
    _cpu.token_logps_bwd(
        code, logits.data_ptr(), sequences, length, vocabulary, stride_s, stride_t,
        _vector("targets", targets, rows, torch.int64), _vector("lse", lse, rows, torch.float32),
        _vector("grad_logps", grad_logps, rows, torch.float32),
        grad_logits.data_ptr(), grad_stride_s, grad_stride_t, ignore_index, torch.get_num_threads(),
    )  # fmt: skip


def preference_tail(
    token_logps: torch.Tensor,
    targets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    group_ids: torch.Tensor,
    pair_weights: torch.Tensor | None,
    policy_logps: torch.Tensor,
    lengths: torch.Tensor,
    margins: torch.Tensor,
    losses: torch.Tensor,
    slopes: torch.Tensor,
    group_sums: torch.Tensor,
    group_counts: torch.Tensor,
    *,
    loss_type: int,
    beta: float,
    label_smoothing: float,
    length_normalize: bool,
    ignore_index: int,
) -> None:
    """Token log-probabilities to losses, slopes and group sums; see ``backends.__doc__``."""
    rows, pairs, groups = token_logps.numel(), group_ids.numel(), group_sums.numel()
    dtype = token_logps.dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        raise TypeError(f"token_logps must be float32 or float64, got {dtype}")
    if cu_seqlens is None and pairs and rows % (2 * pairs):
        raise ValueError(f"token_logps must hold as many rows for each of {2 * pairs} sequences, got {rows} rows")
    f64 = torch.float64
    _cpu.preference_tail(
        dtype is f64, rows, pairs, groups,
        _vector("token_logps", token_logps, rows, dtype),
        0 if targets is None else _vector("targets", targets, rows, torch.int64),
        0 if cu_seqlens is None else _vector("cu_seqlens", cu_seqlens, 2 * pairs + 1, torch.int32),
        0 if ref_logps is None else _vector("ref_logps", ref_logps, 2 * pairs, f64),
        _vector("group_ids", group_ids, pairs, torch.int64),
        0 if pair_weights is None else _vector("pair_weights", pair_weights, pairs, f64),
        _vector("policy_logps", policy_logps, 2 * pairs, dtype), _vector("lengths", lengths, 2 * pairs, f64),
        _vector("margins", margins, pairs, dtype), _vector("losses", losses, pairs, dtype),
        _vector("slopes", slopes, pairs, dtype),
        _vector("group_sums", group_sums, groups, f64), _vector("group_counts", group_counts, groups, torch.int64),
        loss_type, beta, label_smoothing, length_normalize, ignore_index, torch.get_num_threads(),
    )  # fmt: skip


def _block(name: str, tensor: torch.Tensor) -> tuple[int, torch.Size, tuple[int, int]]:
    """Dtype code, shape (S, T, V) and the first two strides, or an error that says what came."""
    code, shape = _DTYPES.get(tensor.dtype), tensor.shape
    if code is None or not tensor.is_cpu:
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16 on the CPU, got {tensor.dtype} on {tensor.device}"
        )
    if len(shape) != 3:
        raise ValueError(f"{name} must have shape (S, T, V), got {tuple(shape)}")
    stride = tensor.stride()
    if stride[2] != 1 and shape[2] > 1:
        raise ValueError(f"{name} must have a last stride of 1, got strides {stride}")
    return code, shape, stride[:2]


def _vector(name: str, tensor: torch.Tensor, size: int, dtype: torch.dtype) -> int:
    """The address of a contiguous vector; the caller's argument keeps it alive through the call."""
    if tensor.dtype is not dtype or tensor.numel() != size or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(
            f"{name} must be {size} contiguous {dtype} on the CPU, got {tuple(tensor.shape)} {tensor.dtype} "
            f"on {tensor.device}, strides {tensor.stride()}"
        )
    return tensor.data_ptr()
