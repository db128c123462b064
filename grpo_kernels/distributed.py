"""The only file that talks to ``torch.distributed``; without an initialised default group there is one rank."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist


def is_distributed(process_group: dist.ProcessGroup | None = None) -> bool:
    """Whether a sum over ranks means anything: a group was given, or a default one stands."""
    return process_group is not None or (dist.is_available() and dist.is_initialized())


def is_process_group(group: object) -> bool:
    """Whether this is a group of ranks that this rank belongs to, or None for the default one."""
    return group is None or (dist.is_available() and isinstance(group, dist.ProcessGroup))


def world_size(process_group: dist.ProcessGroup | None = None) -> int:
    """Ranks in the group (None: the default group where one is initialised, else 1)."""
    return dist.get_world_size(process_group) if is_distributed(process_group) else 1


def all_reduce_sum_(tensor: torch.Tensor, process_group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum over the ranks of the group, in place; every rank ends with the same bits."""
    if is_distributed(process_group):
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=process_group)
    return tensor


def reshard(model: torch.nn.Module) -> None:
    """Free what FSDP2 gathered for a forward that no backward follows; its parameters are the shards again.

    Until then ``model.parameters()`` would give an optimizer the gathered copies.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:  # else nobody has imported it, and nothing is sharded
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()
