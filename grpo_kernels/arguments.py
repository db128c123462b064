"""Checks of single arguments: ``check_*`` raises, ``read_*`` also returns what the rest of the package takes.

Everything that reads a tensor's values is done on CPU tensors only: on a device it would wait for the queue, and
the kernels answer a bad label or group id with NaN in that pair instead.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch.compiler import is_compiling

from .types import LOSS_TYPES, SMOOTHED_LOSS_TYPES

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes that logits, hidden states and weights may have."""

_INTEGERS, _SUMS = (torch.int64, torch.int32), (torch.float32, torch.float64)
# Looked up once, since a small call makes dozens of checks.
_TENSOR, _STRIDED, _is_transformed = torch.Tensor, torch.strided, torch._C._functorch.is_functorch_wrapped_tensor
_LOSS_INDEX: dict[str, int] = {name: index for index, name in enumerate(LOSS_TYPES)}


def describe(value: Any) -> str:
    """A value as an error message shows it."""
    if isinstance(value, torch.Tensor):
        if value.is_nested:
            return "a nested tensor"
        layout = "" if value.layout == torch.strided else f"{value.layout} "
        return f"a {layout}{value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"an integer of {value.bit_length()} bits"
    return f"{type(value).__name__} {value!r}"[:120]


def is_dense(value: Any) -> bool:
    """A tensor that has strides: neither sparse nor nested."""
    return isinstance(value, _TENSOR) and value.layout is _STRIDED and not value.is_nested


def contiguous(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in this dtype and contiguous; itself where it is, which is quicker to see than to ask PyTorch for."""
    return tensor if tensor.dtype is dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()


def read_number(name: str, value: Any) -> float:
    """A real number that float64 holds, bool excluded; may be infinite or NaN."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got {describe(value)}") from None


def check_flag(name: str, value: Any) -> None:
    """True or False, and no other thing that Python would take for one."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")


def check_floating(name: str, tensor: Any) -> None:
    """A dense tensor of one of the dtypes that logits and their like may have."""
    if not is_dense(tensor) or (tensor.dtype not in FLOATS and not tensor.is_floating_point()):
        raise TypeError(f"{name} must be a floating tensor, got {describe(tensor)}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {describe(tensor)}")


def check_untransformed(name: str, tensor: torch.Tensor) -> None:
    """Not inside ``torch.func``, whose grad and vmap hand in tensors without memory that a kernel could read."""
    if not is_compiling() and _is_transformed(tensor):
        raise TypeError(f"{name} must not be inside a transform of torch.func (grad, vmap); use torch.autograd.grad")


def read_loss_settings(beta: Any, loss_type: Any, label_smoothing: Any) -> tuple[float, int, float]:
    """β > 0; a known loss; smoothing in [0, 1/2), and only where it is defined → β, index of the loss, smoothing."""
    beta_read = read_number("beta", beta)
    if not 0 < beta_read < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta!r}")
    index = _LOSS_INDEX.get(loss_type) if isinstance(loss_type, str) else None
    if index is None:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {describe(loss_type)}")
    smoothing_read = read_number("label_smoothing", label_smoothing)
    if not 0 <= smoothing_read < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 1/2), got {label_smoothing!r}")
    if label_smoothing and loss_type not in SMOOTHED_LOSS_TYPES:
        raise ValueError(
            f"label_smoothing is defined for loss_type {' and '.join(SMOOTHED_LOSS_TYPES)} only, "
            f"got {label_smoothing!r} with {loss_type!r}"
        )
    return beta_read, index, smoothing_read


def check_logits(logits: Any, labels: Any, cu_seqlens: Any, *, sharded: bool) -> None:
    """Padded (2B, T, V) with labels (2B, T), or packed (rows, V) with labels (rows,) and cu_seqlens (2B+1,)."""
    check_floating("logits", logits)
    check_untransformed("logits", logits)
    dims = 3 if cu_seqlens is None else 2
    if logits.dim() != dims:
        shape = "(2B, T, V), padded" if dims == 3 else "(rows, V), packed, where cu_seqlens is given"
        raise ValueError(f"logits must have shape {shape}, got {describe(logits)}")
    if logits.shape[-1] == 0 and not sharded:  # of more ranks than words some have none
        raise ValueError(f"logits must have a vocabulary of at least one word, got {describe(logits)}")
    check_integers("labels", labels, logits.shape[:-1], logits.device)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, logits.shape[0], logits.device)


def check_cu_seqlens(cu_seqlens: Any, rows: int, device: torch.device) -> None:
    """(n+1,) int32, from 0 to rows, never falling."""
    if not is_dense(cu_seqlens) or cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be an int32 tensor, got {describe(cu_seqlens)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (2B+1,), got {describe(cu_seqlens)}")
    check_device("cu_seqlens", cu_seqlens, device)
    if values_are_readable(cu_seqlens):
        edges = cu_seqlens.tolist()
        if edges[0] != 0 or edges[-1] != rows or any(a > b for a, b in itertools.pairwise(edges)):
            raise ValueError(f"cu_seqlens must rise from 0 to the {rows} rows of logits, got {shortened(edges)}")


def check_integers(name: str, tensor: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """An integer tensor of exactly this shape on this device."""
    if not is_dense(tensor) or tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be an int64 or int32 tensor, got {describe(tensor)}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {describe(tensor)}")
    check_device(name, tensor, device)


def read_sums(name: str, tensor: Any, size: int, device: torch.device) -> torch.Tensor | None:
    """(size,) float64, from float32 or float64 numbers that carry no gradient; None stays."""
    if tensor is None:
        return None
    if not is_dense(tensor):
        raise TypeError(f"{name} must be a tensor or None, got {describe(tensor)}")
    if tensor.dtype not in _SUMS:
        raise TypeError(
            f"{name} must be float32 or float64 (a sum over tokens in half precision is off by up to a nat), "
            f"got {describe(tensor)}"
        )
    if tensor.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {describe(tensor)}")
    check_device(name, tensor, device)
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require grad: the loss has no gradient with respect to it; detach it first")
    return contiguous(tensor, torch.float64)


def read_lengths(lengths: Any, size: int, device: torch.device) -> torch.Tensor | None:
    """(size,) float64 of its own, since backward reads it and the caller's may change until then; None stays."""
    if lengths is None:
        return None
    if not is_dense(lengths):
        raise TypeError(f"lengths must be a tensor or None, got {describe(lengths)}")
    if lengths.dtype == torch.bool or lengths.is_complex():
        raise TypeError(f"lengths must be an integer or floating tensor, got {describe(lengths)}")
    if lengths.shape != (size,):
        raise ValueError(f"lengths must have shape ({size},), got {describe(lengths)}")
    check_device("lengths", lengths, device)
    if lengths.requires_grad:
        raise ValueError("lengths must not require grad: the loss has no gradient with respect to it; detach it first")
    return lengths.to(torch.float64, copy=True).contiguous()


def check_even_sequences(name: str, num_sequences: int) -> None:
    """An even number of sequences; ``name`` is the argument that says how many there are."""
    if num_sequences % 2:
        raise ValueError(
            f"{name} must hold an even number of sequences (B chosen, then B rejected), got {num_sequences}"
        )


def check_ignore_index(ignore_index: Any) -> None:
    """An int that an int64 holds."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {describe(ignore_index)}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit into 64 bits, got {describe(ignore_index)}")


def check_overwrite(overwrite: Any, given: torch.Tensor, logits: torch.Tensor) -> None:
    """Logits that may be overwritten with their gradient: given as no leaf, and no two elements in one place."""
    check_flag("overwrite_logits", overwrite)
    if not overwrite:
        return
    if given.is_leaf and given.requires_grad:
        raise ValueError(
            "overwrite_logits=True would write the gradient over a leaf that requires grad (a parameter, say); "
            "pass a result of an operation, or overwrite_logits=False"
        )
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(f"overwrite_logits=True needs logits with last stride 1, got strides {logits.stride()}")
    # Each dimension has to step past all that the finer ones reach.
    reach = 0
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(
                f"overwrite_logits=True needs logits of which no two share a place in memory, got strides "
                f"{logits.stride()} for shape {tuple(logits.shape)}"
            )
        reach += stride * (size - 1)


def check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """All tensors of a call on one device."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, as the policy is, got {describe(tensor)}")


def values_are_readable(tensor: torch.Tensor) -> bool:
    """Whether looking at values costs no wait for a device and breaks no graph."""
    return tensor.is_cpu and not is_compiling()


def shortened(values: list[int]) -> str:
    """A list of numbers as an error message shows it."""
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"
