"""The boundary in C++ for CPUs: AVX-512, AVX2 or portable code, chosen at run time (csrc/cpu).

    p_t = z[t, y_t] - lse_t,   dz[t, v] = c_t * ((v == y_t) - exp(z[t, v] - lse_t))

float32, bfloat16 and float16 logits; float32 accumulation.  Forward reads the logits once, backward reads and writes
them once; nothing is allocated.  ``GRPO_KERNELS_ISA=avx512_bf16|avx512|avx2|baseline`` overrides the choice.
"""

from __future__ import annotations

import os

import torch  # before _cpu, so that both share one OpenMP runtime and torch's threads

from ._native import (
    CPU,
    DTYPES,
    backward_arguments,
    forward_arguments,
    robust_loss_arguments,
    tail_arguments,
    tile_bwd_arguments,
    tile_fwd_arguments,
)

try:
    from .. import _cpu  # type: ignore[attr-defined]
except ImportError as error:  # no C++ compiler when the package was installed
    _cpu = None
    _import_error = error


_TASKS = "/proc/self/task"
_had_threads = _alone = False


def _before_fork() -> None:
    global _had_threads
    _had_threads = not os.path.isdir(_TASKS) or len(os.listdir(_TASKS)) > 1


def _in_the_child() -> None:
    global _alone
    _alone = _alone or _had_threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_in_the_child)


def _threads() -> int:
    """As many as torch's; one in a forked child whose parent had threads.

    OpenMP's do not survive a fork, and the child would wait for them without end, as it does in PyTorch's own
    operations where nobody has called ``torch.set_num_threads(1)``.
    """
    return 1 if _alone else torch.get_num_threads()


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
    return None if dtype in DTYPES else f"it takes float32, bfloat16 and float16, not {dtype}"


def isa() -> str:
    """The instruction set in use: ``avx512_bf16``, ``avx512``, ``avx2`` or ``baseline``."""
    return _cpu.isa()


def token_logps_fwd(
    logits: torch.Tensor, targets: torch.Tensor, logps: torch.Tensor, lse: torch.Tensor, *, ignore_index: int
) -> None:
    """``logps[r] = z[r, y_r] - lse_r``; see ``boundary.py``."""
    arguments = forward_arguments(CPU, logits, targets, logps, lse, ignore_index)
    _cpu.token_logps_fwd(*arguments, _threads())


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
    arguments = backward_arguments(CPU, logits, targets, lse, grad_logps, grad_logits, ignore_index)
    _cpu.token_logps_bwd(*arguments, _threads())


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
    arguments = tail_arguments(
        CPU, token_logps, targets, cu_seqlens, ref_logps, group_ids, pair_weights,
        policy_logps, lengths, margins, rewards, losses, slopes, group_sums, group_counts, group_losses,
        length_normalize,
    )  # fmt: skip
    options = (loss_type, beta, label_smoothing, length_normalize, ignore_index)
    _cpu.preference_tail(*arguments, *options, _threads())


def robust_loss(
    losses: torch.Tensor,
    group_ids: torch.Tensor,
    group_weights: torch.Tensor,
    weights: torch.Tensor,
    loss: torch.Tensor,
) -> None:
    """``loss = (1/B) sum_i w[g_i] l_i``; see ``boundary.py``."""
    _cpu.robust_loss(*robust_loss_arguments(CPU, losses, group_ids, group_weights, weights, loss))


def integer_range(integers: torch.Tensor, ignored: int) -> tuple[int, int]:
    """Smallest and largest of 0 and the integers that are not ignored; see ``boundary.py``."""
    if not integers.is_contiguous():
        integers = integers.contiguous()
    if integers.dtype not in (torch.int64, torch.int32) or not integers.is_cpu:
        raise TypeError(f"integers must be int64 or int32 on cpu, got {integers.dtype} on {integers.device}")
    return _cpu.integer_range(integers.dtype is torch.int32, integers.data_ptr(), integers.numel(), ignored)


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
    arguments = tile_fwd_arguments(CPU, logits, bias, targets, top, rest, picked, factor, exps)
    _cpu.head_tile_fwd(*arguments, 2.0**-shift, start, softcap, logit_scale, _threads())


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
    arguments = tile_bwd_arguments(CPU, logits, bias, targets, top, scale, at_target, grads)
    _cpu.head_tile_bwd(*arguments, start, softcap, logit_scale, _threads())
