"""What ``GroupWeights`` and the step of alpha demand of their arguments, and of a state that was saved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch

from ..arguments import FLOATS, check_floating, describe, is_dense, read_number, values_are_readable


def check_in(name: str, value: Any, *, low: float, high: float = math.inf) -> None:
    """A finite number in [low, high]."""
    if not (low <= read_number(name, value) <= high and math.isfinite(value)):
        bounds = f"finite and at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {bounds}, got {value!r}")


def check_step(log_alpha: Any, group_losses: Any, group_lr: Any, adjustment: Any) -> None:
    """The arguments of ``exponentiated_step``; those that are tensors broadcast against one another."""
    check_floating("log_alpha", log_alpha)
    if log_alpha.dim() == 0 or log_alpha.shape[-1] == 0:
        raise ValueError(f"log_alpha must have shape (..., G) with G >= 1, got {describe(log_alpha)}")
    if not is_dense(group_losses) or group_losses.shape[-1:] != log_alpha.shape[-1:]:
        raise ValueError(
            f"group_losses must be a tensor with the last dimension of log_alpha {tuple(log_alpha.shape)}, "
            f"got {describe(group_losses)}"
        )
    shape = _broadcast("group_losses", group_losses, log_alpha.shape, log_alpha)
    if isinstance(group_lr, torch.Tensor):
        shape = _broadcast("group_lr", group_lr, shape, log_alpha)
        known = values_are_readable(group_lr) and group_lr.numel() > 0
        if known and not (float(group_lr.min()) >= 0 and float(group_lr.max()) < math.inf):
            raise ValueError(f"group_lr must be finite and not negative, got {describe(group_lr.tolist())}")
    else:
        check_in("group_lr", group_lr, low=0.0)
    if isinstance(adjustment, torch.Tensor):
        _broadcast("adjustment", adjustment, shape, log_alpha)
    else:
        check_in("adjustment", adjustment, low=-math.inf)


def _broadcast(name: str, tensor: torch.Tensor, shape: Sequence[int], log_alpha: torch.Tensor) -> Sequence[int]:
    """The shape that both broadcast to; real numbers, on the device of log_alpha, G or 1 of them in the end."""
    if not is_dense(tensor) or tensor.dtype not in (*FLOATS, torch.int64, torch.int32):
        raise TypeError(f"{name} must be a tensor of real numbers, got {describe(tensor)}")
    if tensor.device != log_alpha.device:
        raise ValueError(f"{name} must be on {log_alpha.device}, as log_alpha is, got {describe(tensor)}")
    if tensor.shape == shape:  # nearly always; a step is a few microseconds, and long runs take a million
        return shape
    pairs = list(itertools.zip_longest(reversed(tensor.shape), reversed(shape), fillvalue=1))
    if any(size != other and 1 not in (size, other) for size, other in pairs):
        raise ValueError(f"{name} must broadcast against {tuple(shape)}, got {describe(tensor)}")
    if tensor.shape and tensor.shape[-1] not in (1, log_alpha.shape[-1]):
        raise ValueError(f"{name} must end in 1 or {log_alpha.shape[-1]} groups, got {describe(tensor)}")
    return [other if size == 1 else size for size, other in reversed(pairs)]


def check_vector(name: str, tensor: Any, size: int | None, device: torch.device) -> None:
    """Real numbers, this many (None: any number) in one dimension."""
    if not is_dense(tensor) or tensor.is_complex():
        raise TypeError(f"{name} must be a tensor of real numbers, got {describe(tensor)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, as the weights are, got {describe(tensor)}")
    if tensor.dim() != 1 or size not in (None, tensor.shape[0]):
        raise ValueError(f"{name} must have shape ({'B' if size is None else size},), got {describe(tensor)}")


def saved_order(extra_state: Any, names: Sequence[str]) -> torch.Tensor:
    """(G,) where each of these groups stands in a state, by its name."""
    saved = extra_state.get("names") if isinstance(extra_state, Mapping) else None
    if not isinstance(saved, (list, tuple)):
        raise ValueError(f"the state must hold the names of its groups, got {describe(extra_state)}")
    saved = [str(name) for name in saved]
    if sorted(saved) != sorted(names):
        raise ValueError(
            f"the state was saved for groups {saved}, this GroupWeights has {list(names)}; "
            "weights cannot be carried over between different sets of groups"
        )
    return torch.tensor([saved.index(name) for name in names])


def saved_vector(state_dict: Mapping[str, Any], key: str, size: int) -> torch.Tensor:
    """Floating numbers, this many, out of a state."""
    tensor = state_dict[key]
    if not is_dense(tensor) or not tensor.is_floating_point() or tensor.shape != (size,):
        raise ValueError(f"{key} in the state must be {size} floating numbers, got {describe(tensor)}")
    return tensor


def check_logarithms(key: str, log_alpha: torch.Tensor) -> None:
    """Of weights that can be normalised: no NaN, no +inf, not all -inf."""
    if values_are_readable(log_alpha) and not bool((log_alpha < math.inf).all() & (log_alpha > -math.inf).any()):
        raise ValueError(f"{key} in the state must be logarithms of weights, got {describe(log_alpha.tolist())}")


def names_and_sizes(group_sizes: Any) -> tuple[tuple[str, ...], list[int]]:
    """``group_sizes`` as the class takes them → names as text, and positive integers."""
    if isinstance(group_sizes, Mapping):
        names, sizes = [str(name) for name in group_sizes], list(group_sizes.values())
    else:
        sizes = _listed(group_sizes)
        names = [str(i) for i in range(len(sizes))]
    if not sizes:
        raise ValueError("group_sizes must name at least one group, got none")
    if len(set(names)) != len(names):
        raise ValueError(f"group_sizes must have distinct names once written as text, got {names}")
    for name, size in zip(names, sizes, strict=True):
        if isinstance(size, bool) or not isinstance(size, Integral):
            raise TypeError(f"group_sizes must be integers, got {size!r} for group {name!r}")
        if size <= 0:
            raise ValueError(
                f"group_sizes must be positive (N_g, pairs in the training set), got {describe(size)} for {name!r}"
            )
        if int(size) > 2**53:
            raise ValueError(f"group_sizes must be at most 2^53, got {describe(int(size))} for {name!r}")
    return tuple(names), [int(size) for size in sizes]


def _listed(group_sizes: Any) -> list[Any]:
    """Counts come from torch.bincount and numpy.bincount as often as from a list."""
    sizes = group_sizes
    if isinstance(sizes, torch.Tensor):
        sizes = sizes.tolist() if is_dense(sizes) and not sizes.is_meta and not sizes.is_quantized else None
    elif hasattr(sizes, "tolist"):
        sizes = sizes.tolist()
    if isinstance(sizes, (str, bytes, bytearray, memoryview)) or not isinstance(sizes, Sequence):
        raise TypeError(f"group_sizes must be a mapping name -> size or a sequence, got {describe(group_sizes)}")
    return list(sizes)


def prior_of(prior: Any, fractions: torch.Tensor) -> torch.Tensor:
    """(G,) float64 prior; ``fractions`` is N_g / N."""
    if isinstance(prior, str):
        if prior == "uniform":
            return torch.full_like(fractions, 1 / len(fractions))
        if prior == "proportional":
            return fractions.clone()
        raise ValueError(f"prior must be 'uniform', 'proportional' or {len(fractions)} numbers, got {prior!r}")
    return simplex("prior", prior, len(fractions))


def simplex(name: str, values: Any, groups: int) -> torch.Tensor:
    """Positive numbers, one a group, that sum to 1 (to 1e-3; the rest is rounding and is normalised away)."""
    try:
        if isinstance(values, torch.Tensor) and (not is_dense(values) or values.is_complex()):
            raise TypeError
        tensor = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(f"{name} must be {groups} numbers, got {describe(values)}") from error
    if tensor.shape != (groups,):
        raise ValueError(f"{name} must have shape ({groups},), one number a group, got {tuple(tensor.shape)}")
    if not bool(tensor.isfinite().all()) or not bool((tensor > 0).all()):
        raise ValueError(f"{name} must be positive and finite, got {describe(tensor.tolist())}")
    if abs(float(tensor.sum()) - 1) > 1e-3:
        raise ValueError(f"{name} must sum to 1, got {float(tensor.sum()):g}")
    return tensor / tensor.sum()
