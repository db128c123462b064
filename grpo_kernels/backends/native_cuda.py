"""The boundary in CUDA C++ for NVIDIA GPUs of compute capability 8.0 and up (csrc/cuda).

    p_t = z[t, y_t] - lse_t,   dz[t, v] = c_t * ((v == y_t) - exp(z[t, v] - lse_t))

float32, bfloat16 and float16 logits; float32 accumulation.  Every call is one launch on PyTorch's current stream,
without a sync and without an allocation, so it can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch  # before _cuda, so that its context is the one in use

from ._native import (
    DTYPES,
    backward_arguments,
    forward_arguments,
    robust_loss_arguments,
    tail_arguments,
    tile_bwd_arguments,
    tile_fwd_arguments,
)

try:
    from .. import _cuda  # type: ignore[attr-defined]
except ImportError as error:  # no nvcc when the package was built
    _cuda = None
    _import_error = error


def unavailable_reason() -> str | None:
    """None if the module was built and PyTorch and its own CUDA runtime see an NVIDIA GPU, else one sentence."""
    if _cuda is None:
        return f"the extension grpo_kernels._cuda is not built; install with nvcc at hand ({_import_error})"
    if torch.version.hip is not None:
        return "this PyTorch is built for AMD GPUs"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU"
    try:
        _cuda.device_count()
    except RuntimeError as error:
        return f"the CUDA runtime in grpo_kernels._cuda does not start: {error}"
    return None


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """None for float32, bfloat16 and float16 on a GPU of compute capability 8.0 and up, else one sentence."""
    if device.type != "cuda":
        return f"it takes tensors on an NVIDIA GPU, not on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, {device} has {capability[0]}.{capability[1]}"
    return None if dtype in DTYPES else f"it takes float32, bfloat16 and float16, not {dtype}"


def token_logps_fwd(
    logits: torch.Tensor, targets: torch.Tensor, logps: torch.Tensor, lse: torch.Tensor, *, ignore_index: int
) -> None:
    """``logps[r] = z[r, y_r] - lse_r``; see ``boundary.py``."""
    device = _gpu_of(logits)
    arguments = forward_arguments(device, logits, targets, logps, lse, ignore_index)
    _launch(_cuda.token_logps_fwd, device, *arguments)


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
    device = _gpu_of(logits)
    arguments = backward_arguments(device, logits, targets, lse, grad_logps, grad_logits, ignore_index)
    _launch(_cuda.token_logps_bwd, device, *arguments)


def preference_tail(
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
    *,
    loss_type: int,
    beta: float,
    label_smoothing: float,
    length_normalize: bool,
    ignore_index: int,
) -> None:
    """Token log-probabilities to losses, slopes and group sums; see ``boundary.py``."""
    device = _gpu_of(token_logps)
    arguments = tail_arguments(
        device, token_logps, targets, cu_seqlens, ref_logps, group_ids, pair_weights,
        policy_logps, lengths, margins, rewards, losses, slopes, group_sums, group_counts, group_losses,
        length_normalize,
    )  # fmt: skip
    options = (loss_type, beta, label_smoothing, length_normalize, ignore_index)
    _launch(_cuda.preference_tail, device, *arguments, *options)


def robust_loss(
    losses: torch.Tensor,
    group_ids: torch.Tensor,
    group_weights: torch.Tensor,
    weights: torch.Tensor,
    loss: torch.Tensor,
) -> None:
    """``loss = (1/B) sum_i w[g_i] l_i``; see ``boundary.py``."""
    device = _gpu_of(losses)
    _launch(_cuda.robust_loss, device, *robust_loss_arguments(device, losses, group_ids, group_weights, weights, loss))


def head_tile_fwd(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    top: torch.Tensor,
    rest: torch.Tensor,
    picked: torch.Tensor,
    factor: torch.Tensor,
    exps: torch.Tensor | None,
    *,
    start: int,
    softcap: float,
    logit_scale: float,
    shift: float,
) -> None:
    """Carry (top, rest, picked) past one tile and write its exponentials; see ``boundary.py``."""
    device = _gpu_of(logits)
    arguments = tile_fwd_arguments(device, logits, bias, targets, top, rest, picked, factor, exps, narrower=True)
    out_code = DTYPES[logits.dtype if exps is None else exps.dtype]
    _launch(_cuda.head_tile_fwd, device, out_code, *arguments, 2.0**-shift, start, softcap, logit_scale)


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
    device = _gpu_of(logits)
    arguments = tile_bwd_arguments(device, logits, bias, targets, top, scale, at_target, grads, narrower=True)
    _launch(_cuda.head_tile_bwd, device, DTYPES[grads.dtype], *arguments, start, softcap, logit_scale)


def _gpu_of(tensor: torch.Tensor) -> torch.device:
    if not tensor.is_cuda:
        raise TypeError(f"tensors must be on an NVIDIA GPU, got one on {tensor.device}")
    return tensor.device


def _launch(kernel, device: torch.device, *arguments) -> None:
    stream = torch.cuda.current_stream(device).cuda_stream
    if device.index == torch.cuda.current_device():
        kernel(*arguments, device.index, stream)
    else:  # the module sets the device for its own runtime; this puts PyTorch's back afterwards
        with torch.cuda.device(device):
            kernel(*arguments, device.index, stream)
