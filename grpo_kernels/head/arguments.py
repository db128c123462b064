"""The arguments of the functions from hidden states, read once: checked, normalised, and immutable from here on.

    HeadSettings    what forward and backward need of a call besides tensors; stays on the autograd node
    HeadInputs      its tensors, as they go through autograd
    HeadArguments   the settings, and the LossArguments of what is made of the token log-probabilities

A field of HeadSettings also goes through the operators of ``ops.py`` (``to_schema``, ``from_schema``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..arguments import (
    check_cu_seqlens,
    check_device,
    check_floating,
    check_integers,
    check_untransformed,
    describe,
    is_dense,
    read_number,
)
from ..backends import Backend, choose
from ..loss.arguments import GivenPairs, LossArguments, Pairs, Rows
from ..loss.ops import pick
from ..types import UnavailableBackendError
from ..vocab.shards import REFUSALS, Shard, refuse_together, shard_of_weight
from .plan import accumulation_dtype

_LEAST_SCALE, _MOST_SCALE = 1e-18, 1e18
"""Of ``softcap`` and ``logit_scale``: float32 has to hold the one over the other."""


class HeadSettings(NamedTuple):
    """What one call of the head was asked for, besides tensors."""

    dtype: torch.dtype
    """In which the GEMMs run."""
    ignore_index: int
    num_labelled: int | None
    memory_budget: int | float | str
    softcap: float
    """0 stands for none."""
    logit_scale: float
    grad: bool
    """Whether gradients were on when the function was called, which ``ctx.needs_input_grad`` does not say."""
    shard: Shard | None
    """Which tokens the weight's rows are, where ranks share the vocabulary."""
    backend: Backend
    """Of the tile operations."""
    separate_tiles: bool = True
    """Kept tiles in a tensor each, which backward frees one by one; an operator has to return one for all."""


class HeadInputs(NamedTuple):
    """The tensors that the head reads; (rows, H) and so on, as :meth:`HeadArguments.from_hidden` gives them."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor


class HeadArguments(NamedTuple):
    """One call of a function from hidden states, but for hidden, weight and bias, which go through autograd."""

    loss: LossArguments
    settings: HeadSettings

    @classmethod
    def from_hidden(
        cls,
        hidden: Any,
        weight: Any,
        labels: Any,
        pairs: GivenPairs | None,
        *,
        bias: Any,
        softcap: Any,
        logit_scale: Any,
        memory_budget: Any,
        num_labelled: Any,
        ignore_index: Any,
        shift: Any,
        cu_seqlens: Any,
        tp_group: Any,
        vocab_start: Any,
        backend: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, HeadArguments]:
        """Reads the arguments of :func:`fused_linear_grpo_loss`, or without pairs of those for log-probabilities.

        Returns (rows, H) hidden too, and weight and contiguous bias as this rank holds them.
        """
        hidden, weight, bias, shard = shard_of_weight(hidden, weight, bias, tp_group, vocab_start)
        try:
            _check_tensors(hidden, weight, labels, cu_seqlens, sharded=shard is not None)
            read_pairs = None if pairs is None else Pairs.read(pairs, "hidden", hidden, cu_seqlens)
            _check_bias(bias, weight)
            _check_logit_options(softcap, logit_scale)
            _check_memory_budget(memory_budget)
            _check_num_labelled(num_labelled, labels)
            vocabulary = weight.shape[0] if shard is None else None
            rows = Rows.read(labels, vocabulary, ignore_index, shift, cu_seqlens)
            dtype, device = _gemm_dtype(hidden, weight), hidden.device
            tiles_backend = tile_backend(backend, device, dtype)
            loss_backend = tiles_backend if pairs is None else pick(backend, device, accumulation_dtype(dtype))
        except REFUSALS:
            refuse_together(shard)
            raise
        grad = torch.is_grad_enabled()
        differentiable = grad and (
            hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        )
        settings = HeadSettings(
            dtype, ignore_index, num_labelled, memory_budget, float(softcap or 0), float(logit_scale), grad, shard,
            tiles_backend,
        )  # fmt: skip
        loss = LossArguments(rows, read_pairs, differentiable, False, loss_backend)
        hidden, bias = hidden.reshape(-1, hidden.shape[-1]), None if bias is None else bias.contiguous()
        return hidden, weight, bias, cls(loss, settings)


def tile_backend(name: str, device: torch.device, dtype: torch.dtype, *, may_prove: bool = True) -> Backend:
    """The backend that will run the tile operations; plain PyTorch under "auto" where the first choice has none."""
    if torch.compiler.is_compiling():
        return pick(name, device, dtype)  # by its name alone: the operators of head/ops.py choose when they run
    chosen = choose(name, device, dtype, may_prove=may_prove)
    if hasattr(chosen, "head_tile_fwd"):
        return chosen
    if name != "auto":
        raise UnavailableBackendError(f"backend={name!r} cannot be used here: it has no tile operations for the head")
    return choose("torch", device, dtype)


def _gemm_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype that holds both; under autocast its own, which it applies to everything below float64."""
    device, dtype = hidden.device.type, torch.promote_types(hidden.dtype, weight.dtype)
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def _check_tensors(hidden: Any, weight: Any, labels: Any, cu_seqlens: Any, *, sharded: bool) -> None:
    """Padded (2B, T, H) with labels (2B, T), or packed (rows, H) with labels (rows,) and cu_seqlens; weight (V, H)."""
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        check_floating(name, tensor)
        check_untransformed(name, tensor)
    dims = 3 if cu_seqlens is None else 2
    if hidden.dim() != dims:
        shape = "(2B, T, H), padded" if dims == 3 else "(rows, H), packed, where cu_seqlens is given"
        raise ValueError(f"hidden must have shape {shape}, got {describe(hidden)}")
    width = hidden.shape[-1]
    empty = not sharded and not weight.numel()  # of more ranks than tokens some have none
    if weight.dim() != 2 or weight.shape[1] != width or empty or not width:
        raise ValueError(
            f"weight must have shape (V, {width}) with V >= 1, hidden being {width} >= 1 wide, got {describe(weight)}"
        )
    check_device("weight", weight, hidden.device)
    check_integers("labels", labels, hidden.shape[:-1], hidden.device)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, hidden.shape[0], hidden.device)


def _check_bias(bias: Any, weight: torch.Tensor) -> None:
    if bias is None:
        return
    if not is_dense(bias) or not bias.is_floating_point():
        raise TypeError(f"bias must be a floating tensor or None, got {describe(bias)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), as weight has words, got {describe(bias)}")
    check_device("bias", bias, weight.device)


def _check_logit_options(softcap: Any, logit_scale: Any) -> None:
    if softcap is not None and not _LEAST_SCALE <= read_number("softcap", softcap) <= _MOST_SCALE:
        raise ValueError(
            f"softcap must be positive, in [{_LEAST_SCALE:g}, {_MOST_SCALE:g}], or None for no cap, got {softcap!r}"
        )
    if not _LEAST_SCALE <= abs(read_number("logit_scale", logit_scale)) <= _MOST_SCALE:
        raise ValueError(
            f"logit_scale must be finite and not 0, of a size in [{_LEAST_SCALE:g}, {_MOST_SCALE:g}], "
            f"got {logit_scale!r}"
        )


def _check_memory_budget(budget: Any) -> None:
    if isinstance(budget, str):
        if budget != "auto":
            raise ValueError(f"memory_budget must be 'auto', bytes or a share of memory, got {budget!r}")
    elif not read_number("memory_budget", budget) >= 0:
        raise ValueError(f"memory_budget must not be negative, got {budget!r}")
    elif isinstance(budget, float) and budget > 1:
        raise ValueError(
            f"memory_budget as a float is a share of the device's memory, at most 1, got {budget!r}; bytes are an int"
        )


def _check_num_labelled(num_labelled: Any, labels: torch.Tensor) -> None:
    if num_labelled is None:
        return
    if isinstance(num_labelled, bool) or not isinstance(num_labelled, int):
        raise TypeError(f"num_labelled must be an int or None, got {describe(num_labelled)}")
    if not 0 <= num_labelled < 2**63:
        raise ValueError(f"num_labelled must not be negative, and fit into 64 bits, got {describe(num_labelled)}")
    if num_labelled > labels.numel():
        raise ValueError(f"num_labelled must be at most the {labels.numel()} labels, got {num_labelled}")
