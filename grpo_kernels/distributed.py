"""The only file of the core that talks to ``torch.distributed``; without an initialised group there is one rank."""

from __future__ import annotations

import sys
from typing import Any, cast

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


def is_dtensor(tensor: object) -> bool:
    """Whether this is a DTensor; by the type first, since the class is in a module of some weight."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter, type(None)) or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def replicated(tensor: Any) -> torch.Tensor:
    """All of a DTensor, the same on every rank of its mesh, as a plain tensor whose gradient is whole on every rank."""
    from torch.distributed.tensor import Replicate

    everywhere = [Replicate()] * tensor.device_mesh.ndim
    return tensor.redistribute(placements=everywhere).to_local(grad_placements=everywhere)


def group_named(name: str) -> dist.ProcessGroup:
    """The process group whose ``group_name`` this is: operators of a compiled graph know it by name."""
    return dist.distributed_c10d._resolve_process_group(cast(Any, name))


def gather_numbers(numbers: list[float], group_name: str) -> list[list[float]]:
    """Every rank's numbers in the order of ranks, float64; the same count on every rank.

    They go through the group's CPU backend where it has one, which waits for no device queue.
    """
    group = group_named(group_name)
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    device = "cpu" if "cpu" in backends else next(iter(backends))
    mine = torch.tensor(numbers, dtype=torch.float64, device=device)
    return all_gather(mine, group_name).tolist()


def all_gather(tensor: torch.Tensor, group_name: str) -> torch.Tensor:
    """(...) of every rank → (ranks, ...) in the order of ranks; shapes must agree."""
    group = group_named(group_name)
    gathered = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    dist.all_gather(list(gathered), tensor.contiguous(), group=group)
    return gathered
