"""The head's forward and backward, and the two again as operators for ``torch.compile``.

How many rows are labelled, and so the shape of almost everything that forward hands to backward, is known only when
it runs.  The compiler therefore sees two opaque operators whose outputs have sizes of their own; ``autograd.py`` ties
them together.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..loss.ops import OperatorBackend
from ..vocab.shards import Shard
from . import linear_head
from .arguments import HeadInputs, HeadSettings, tile_backend
from .plan import accumulation_dtype


def forward(inputs: HeadInputs, needs: Sequence[bool], settings: HeadSettings) -> tuple[Tensor, linear_head.Saved]:
    """As :func:`linear_head.token_logps_fwd`, with autocast off: ``settings.dtype`` is what it asked for."""
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        return linear_head.token_logps_fwd(inputs, needs, settings)


def backward(
    grad_logps: Tensor, inputs: HeadInputs, saved: linear_head.Saved, needs: Sequence[bool], settings: HeadSettings
) -> tuple[Any, ...]:
    """Gradients of hidden, weight and bias, None where they are not needed.

    Of ``inputs`` a frozen head reads the shape and dtype of hidden alone.  ``saved`` is emptied, each field after its
    use.
    """
    with torch.autocast(grad_logps.device.type, enabled=False):
        c = grad_logps[saved.index]
        if saved.count_is_right is not None:
            c = c.masked_fill(~saved.count_is_right, torch.nan)
        grads: list[Any] = [None, None, None]
        if needs[0]:
            grads[0] = linear_head.hidden_gradient(c, inputs, saved, settings)
            saved.unit_grad = None
        if needs[1] or needs[2]:
            grads[1:] = linear_head.weight_gradient(c, inputs, saved, needs, settings)
        return tuple(grads)


_WHOLE = Shard("", 0)
"""Stands for None in a schema: no group has this name."""


def to_schema(settings: HeadSettings) -> tuple[Any, ...]:
    """The settings in types that a schema knows; a budget is bytes, a fraction or "auto", a backend its name."""
    backend = cast(OperatorBackend, settings.backend)  # as it is under torch.compile
    return (
        settings.dtype, settings.ignore_index, settings.num_labelled, repr(settings.memory_budget), settings.softcap,
        settings.logit_scale, settings.grad, *(settings.shard or _WHOLE), backend.name,
    )  # fmt: skip


def from_schema(
    device: torch.device,
    dtype: torch.dtype,
    ignore_index: int,
    num_labelled: int | None,
    memory_budget: str,
    softcap: float,
    logit_scale: float,
    grad: bool,
    group: str,
    start: int,
    vocabulary: int,
    backend: str,
) -> HeadSettings:
    """From :func:`to_schema`.  Inside a compiled region nothing is proven."""
    shard = Shard(group, start, vocabulary) if group else None
    budget, chosen = ast.literal_eval(memory_budget), tile_backend(backend, device, dtype, may_prove=False)
    return HeadSettings(
        dtype, ignore_index, num_labelled, budget, softcap, logit_scale, grad, shard, chosen, separate_tiles=False
    )


def _nothing(like: Tensor) -> Tensor:
    """Stands for None: an operator returns tensors."""
    return like.new_empty(0)


@torch.library.custom_op("grpo_kernels::linear_token_logps_fwd", mutates_args=())
def linear_token_logps_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    needs: list[bool],
    dtype: torch.dtype,
    ignore_index: int,
    num_labelled: int | None,
    memory_budget: str,
    softcap: float,
    logit_scale: float,
    grad: bool,
    group: str,
    start: int,
    vocabulary: int,
    backend: str,
) -> list[Tensor]:
    settings = from_schema(
        hidden.device, dtype, ignore_index, num_labelled, memory_budget, softcap, logit_scale, grad, group, start,
        vocabulary, backend,
    )  # fmt: skip
    logps, saved = forward(HeadInputs(hidden, weight, bias, targets), needs, settings)
    if saved.kept_scale is None and (needs[1] or needs[2]):
        saved.kept_scale = logps.new_empty(0, saved.index.shape[0])  # no tile was kept, of as many rows
    results = [logps, *saved.tensors(), *([] if saved.kept else [None])]
    return [_nothing(hidden) if result is None else result for result in results]


@linear_token_logps_fwd.register_fake
def _(hidden, weight, bias, targets, needs, dtype, ignore_index, num_labelled, *_settings):
    size = torch.library.get_ctx().new_dynamic_size
    rows = size() if num_labelled is None else num_labelled
    accumulate = accumulation_dtype(dtype)
    full = needs[1] or needs[2]
    kept, kept_tiles = (size(), size()) if full else (0, 0)
    logps, index = hidden.new_empty(targets.shape, dtype=accumulate), targets.new_empty(rows)
    count_is_right = _nothing(hidden) if num_labelled is None else targets.new_empty((), dtype=torch.bool)
    unit_grad = hidden.new_empty((rows, hidden.shape[1]), dtype=accumulate) if needs[0] else _nothing(hidden)
    vectors = [hidden.new_empty(rows, dtype=accumulate) if full else _nothing(hidden) for _ in range(3)]
    tiles = [_nothing(hidden), _nothing(hidden)]
    if full:
        tiles = [hidden.new_empty((kept_tiles, rows), dtype=accumulate), hidden.new_empty(kept, dtype=dtype)]
    return [logps, index, count_is_right, unit_grad, *vectors, *tiles]


@torch.library.custom_op("grpo_kernels::linear_token_logps_bwd", mutates_args=())
def linear_token_logps_bwd(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    index: Tensor,
    count_is_right: Tensor | None,
    saved: list[Tensor],
    needs: list[bool],
    dtype: torch.dtype,
    ignore_index: int,
    num_labelled: int | None,
    memory_budget: str,
    softcap: float,
    logit_scale: float,
    grad: bool,
    group: str,
    start: int,
    vocabulary: int,
    backend: str,
) -> list[Tensor]:
    settings = from_schema(
        hidden.device, dtype, ignore_index, num_labelled, memory_budget, softcap, logit_scale, grad, group, start,
        vocabulary, backend,
    )  # fmt: skip
    *fields, kept_scale, kept = saved
    tiles = [kept] if kept_scale.shape[0] else []
    told = None if num_labelled is None else count_is_right
    grads = backward(
        grad_logps, HeadInputs(hidden, weight, bias, targets),
        linear_head.Saved.of([index, told, *fields, kept_scale, *tiles]), needs, settings,
    )  # fmt: skip
    return [_nothing(hidden) if result is None else result for result in grads]


@linear_token_logps_bwd.register_fake
def _(grad_logps, hidden, weight, bias, targets, index, count_is_right, saved, needs, *_settings):
    inputs = (hidden, weight, bias)
    return [
        _nothing(hidden)
        if tensor is None or not need
        else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, need in zip(inputs, needs, strict=True)
    ]
