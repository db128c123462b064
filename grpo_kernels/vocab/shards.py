"""Which tokens each rank holds: the arguments that say so, and what the ranks of the group compare before a call.

Every rank holds tokens [start, stop) of every row, and the ranks' ranges cover the vocabulary once.  Before anything of
a call passes between ranks, each sends the others one short list of numbers: which tokens it holds, and what it was
called with.  All read the same lists, so all go on or all raise, and none waits for a rank that has left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from .. import distributed
from ..arguments import FLOATS, describe
from ..types import UnavailableBackendError

FACTS = (
    "function", "rows", "labelled rows", "dtype", "hidden size", "gradient of hidden", "bias", "softcap",
    "logit_scale", "ignore_index", "vocabulary",
)  # fmt: skip
"""What ranks have to agree on, each a float64 number; 0 where a function has no such thing."""

FUNCTIONS = ("from logits", "from hidden states")


class Shard(NamedTuple):
    """This rank's tokens among those of its group."""

    group: str
    """Name of the process group."""
    start: int
    """This rank's first token."""
    vocabulary: int = 0
    """The whole vocabulary where it is known (a DTensor knows), else 0."""


class TokenRange(NamedTuple):
    """The tokens of one rank, [start, stop)."""

    start: int
    stop: int


def shard_of_weight(
    hidden: Any, weight: Any, bias: Any, tp_group: Any, vocab_start: Any
) -> tuple[Any, Any, Any, Shard | None]:
    """hidden, weight and bias as this rank holds them, and which tokens those are; None where it holds them all."""
    if not distributed.is_dtensor(weight):
        for name, tensor in (("hidden", hidden), ("bias", bias)):
            if distributed.is_dtensor(tensor):
                raise TypeError(f"{name} must be a plain tensor, as weight is, got {_describe(tensor)}")
        return hidden, weight, bias, _shard_of_group(tp_group, vocab_start)
    _refuse_both("weight", tp_group, vocab_start)
    mesh, local, shard = weight.device_mesh, *_local_shard("weight", weight, 0)
    if bias is not None:
        if not distributed.is_dtensor(bias) or bias.device_mesh != mesh:
            raise ValueError(
                f"bias must be a DTensor on the mesh of weight, sharded as weight is, got {_describe(bias)}"
            )
        bias = _local_shard("bias", bias, 0)[0]
    if distributed.is_dtensor(hidden):
        if hidden.device_mesh != mesh:
            raise ValueError(
                f"hidden must be a plain tensor or a DTensor on the mesh of weight, got {_describe(hidden)}"
            )
        hidden = distributed.replicated(hidden)
    return hidden, local, bias, shard


def shard_of_logits(logits: Any, tp_group: Any, vocab_start: Any) -> tuple[Any, Shard | None]:
    """The logits as this rank holds them, and which tokens those are; None where it holds them all."""
    if not distributed.is_dtensor(logits):
        return logits, _shard_of_group(tp_group, vocab_start)
    _refuse_both("logits", tp_group, vocab_start)
    return _local_shard("logits", logits, logits.dim() - 1)


def _shard_of_group(tp_group: Any, vocab_start: Any) -> Shard | None:
    if tp_group is None:
        if vocab_start is not None:
            raise ValueError(
                f"vocab_start says where this rank's shard starts and needs tp_group, got {describe(vocab_start)}"
            )
        return None
    if not distributed.is_process_group(tp_group):
        raise TypeError(
            f"tp_group must be None or a group of torch.distributed that this rank belongs to, got {describe(tp_group)}"
        )
    try:
        _check_start(vocab_start)
    except REFUSALS:
        refuse_together(Shard(tp_group.group_name, 0))
        raise
    return Shard(tp_group.group_name, vocab_start)


def _check_start(vocab_start: Any) -> None:
    if vocab_start is None:
        raise ValueError("vocab_start must be given with tp_group: this rank's first word in the whole vocabulary")
    if isinstance(vocab_start, bool) or not isinstance(vocab_start, int):
        raise TypeError(f"vocab_start must be an int, got {describe(vocab_start)}")
    if vocab_start < 0:
        raise ValueError(f"vocab_start must not be negative, got {describe(vocab_start)}")
    if vocab_start >= 2**53:
        raise ValueError(f"vocab_start must be below 2^53, got {describe(vocab_start)}")


def _refuse_both(name: str, tp_group: Any, vocab_start: Any) -> None:
    if tp_group is not None or vocab_start is not None:
        raise ValueError(f"tp_group and vocab_start are read from {name}, which is a DTensor; leave them out")


def _local_shard(name: str, tensor: Any, dim: int) -> tuple[Any, Shard]:
    mesh, placements = tensor.device_mesh, tensor.placements
    if mesh.ndim != 1 or not placements[0].is_shard() or placements[0].dim % tensor.dim() != dim:
        raise ValueError(
            f"{name} must be sharded on dimension {dim} over a mesh of one dimension (mesh['tp'] of a larger one; what "
            f"FSDP2 has sharded besides is whole within its module's forward), got {_describe(tensor)}"
        )
    whole, rank = tensor.shape[dim], mesh.get_local_rank()
    each = -(-whole // mesh.size())  # as torch.chunk cuts: the last shards may be smaller, or empty
    return tensor.to_local(), Shard(mesh.get_group().group_name, min(rank * each, whole), whole)


def _describe(tensor: Any) -> str:
    if not distributed.is_dtensor(tensor):
        return describe(tensor)
    return f"a DTensor of shape {tuple(tensor.shape)}, placements {tensor.placements} on {tensor.device_mesh}"


REFUSALS = (TypeError, ValueError, UnavailableBackendError)
"""What arguments that are wrong raise."""


def refuse_together(shard: Shard | None) -> None:
    """Tell the other ranks, who are waiting to hear from this one, that it has refused its arguments."""
    if shard is not None:
        distributed.gather_numbers([1.0] + [0.0] * (2 + len(FACTS)), shard.group)


def agree(shard: Shard, num_tokens: int, facts: Mapping[str, float]) -> list[TokenRange]:
    """Every rank's tokens, in the order of ranks, once all have said the same of everything else.

    Raises:
        ValueError: on every rank, where one has refused its arguments, where ranks differ in a fact, or where their
            tokens do not cover the vocabulary once.
    """
    mine = {**dict.fromkeys(FACTS, 0.0), **facts, "vocabulary": shard.vocabulary}
    lists = distributed.gather_numbers([0.0, shard.start, num_tokens, *map(float, mine.values())], shard.group)
    refused = [rank for rank, (refusal, *_) in enumerate(lists) if refusal]
    if refused:
        raise ValueError(f"rank {refused[0]} of tp_group has refused its arguments; the reason is in its own error")
    for fact, values in zip(mine, zip(*(said for _, _, _, *said in lists), strict=True), strict=True):
        if len(set(values)) > 1:
            said = ", ".join(f"{_in_words(fact, value)} on rank {rank}" for rank, value in enumerate(values[:8]))
            raise ValueError(f"the ranks of tp_group must agree on {fact}, got {said}")
    ranges = [TokenRange(int(start), int(start + count)) for _, start, count, *_ in lists]
    _check_cover(ranges, shard.vocabulary)
    return ranges


def _check_cover(ranges: list[TokenRange], vocabulary: int) -> None:
    """Neither gap nor overlap; where the vocabulary ends is known from a DTensor alone."""
    edge, problem = 0, ""
    for held in sorted(held for held in ranges if held.stop > held.start):
        if held.start != edge:
            problem = "overlap" if held.start < edge else "leave a gap"
            break
        edge = held.stop
    if not problem and edge != (vocabulary or edge):
        problem = f"cover {edge} words of {vocabulary}"
    if not problem and not edge:
        problem = "hold no word"
    if problem:
        said = ", ".join(f"[{a}, {b}) on rank {rank}" for rank, (a, b) in enumerate(ranges[:8]))
        raise ValueError(f"the ranks of tp_group must cover the vocabulary once; they {problem}: {said}")


def _in_words(fact: str, value: float) -> str:
    if fact == "dtype":
        return str(FLOATS[int(value)])
    if fact == "function":
        return FUNCTIONS[int(value)]
    if fact in ("gradient of hidden", "bias"):
        return "yes" if value else "no"
    return f"{value:g}" if fact in ("softcap", "logit_scale") else str(int(value))


def dtype_number(dtype: torch.dtype) -> float:
    """How a dtype is said to the other ranks."""
    return float(FLOATS.index(dtype))
