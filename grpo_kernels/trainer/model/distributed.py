"""The ranks of one run: processes as ``torchrun`` starts them, each with its slice of every batch.

All of the trainer's words with ``torch.distributed`` are in here.  Every rank does the same; the first alone writes and
speaks.  Without a process group there is one rank, for which everything below is the identity.
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..config import DistributedConfig

T = TypeVar("T")
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process, and all of it is needed."""


class PeerError(RuntimeError):
    """The run ended for what went wrong on another rank, or on all of them; the message says which, and what."""


class Ranks:
    """This process among those of the run.

    Args:
        device: of this rank, where its part of the work is and where tensors are sent from.
        connected: whether a process group stands, whose ranks these are.
    """

    def __init__(self, device: torch.device | str = "cpu", *, connected: bool = False) -> None:
        self.device = torch.device(device)
        self.connected = connected
        self.rank = dist.get_rank() if connected else 0
        self.size = dist.get_world_size() if connected else 1
        self.in_step = False
        """After an error: whether every rank knows of it, so that none is in the middle of a collective."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def gather(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The tensors of all ranks, of one shape, joined along ``dim`` in the order of the ranks; on every rank."""
        if self.size == 1:
            return tensor
        sent = tensor.to(self.device).contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent)
        return torch.cat(parts, dim).to(tensor.device)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, the same bits on every one."""
        if self.size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def gather_objects(self, value: T) -> list[T]:
        """What each rank has, in the order of the ranks; on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """What the first rank has."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def deal(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """This rank's items: one of every ``size`` in turn.

        Every rank gets equally many, since the forward pass of a sharded model needs all of them: where items run out
        the last one comes again, marked False.
        """
        rounds = -(-len(items) // self.size)
        return [
            (items[min(k, len(items) - 1)], k < len(items)) for k in range(self.rank, rounds * self.size, self.size)
        ]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What each rank does by itself and all must get through: if it fails on one, no other waits for it.

        The first rank raises what went wrong with it; a rank with which nothing did, and every rank but the first,
        raises :class:`PeerError`.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            if self.size == 1:
                raise
            error = caught
        if self.size == 1:
            return
        try:
            said = self.gather_objects(None if error is None else str(error) or type(error).__name__)
        except RuntimeError:  # a rank is gone, and cannot be asked
            if error is not None:
                raise error from None
            raise
        failed = next((rank for rank, words in enumerate(said) if words is not None), None)
        if failed is None:
            return
        self.in_step = True
        if self.first and error is not None:
            raise error
        raise PeerError(f"rank {failed}: {said[failed]}") from error

    def alike(self, error: Exception) -> Exception:
        """An error that every rank comes to by itself, as this rank should raise it: the first as it is."""
        self.in_step = True
        return error if self.first else PeerError(f"rank 0: {error}")

    def require_equal(self, values: Mapping[str, Any]) -> None:
        """Refuse ranks that would not do the same.

        Args:
            values: what must be equal on all ranks, by the name of the setting it comes from.

        Raises:
            ValueError: naming the first that differs, and a rank where it does.
        """
        everywhere = self.gather_objects(dict(values))
        for name, value in everywhere[0].items():
            for rank, others in enumerate(everywhere):
                if others[name] != value:
                    raise ValueError(
                        f"{name} must be the same on every rank, got something else on rank {rank} than on rank 0"
                    )

    def require_divisible(self, name: str, value: int) -> None:
        """Refuse a number of pairs that ranks cannot share equally.

        Raises:
            ValueError: naming the setting, the ranks and what came.
        """
        if value % self.size:
            raise ValueError(f"{name} must be divisible by the {self.size} ranks, got {value}")

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in full, whether it is sharded or not; all ranks must ask."""
        return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]

    def to_first(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors in full on the first rank, those that were sharded on the CPU; on the others, nothing."""
        found = {}
        for name, tensor in tensors.items():
            full = self.whole(tensor.detach())
            if self.first:
                found[name] = full.cpu() if is_sharded(tensor) else full
        return found

    @torch.no_grad()
    def like(self, target: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """The first rank's tensor, laid out over the ranks as ``target`` is.

        Args:
            target: says device and shards.
            tensor: in full on the first rank; of the others only its shape and dtype count.

        Returns:
            A new tensor, dtype as ``tensor``.
        """
        if not self.connected:
            return tensor.to(target.device, copy=True)
        full = torch.empty(tensor.shape, dtype=tensor.dtype, device=target.device)
        if self.first:
            full.copy_(tensor)
        dist.broadcast(full, src=0)
        if not is_sharded(target):
            return full
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
        return distribute_tensor(full, mesh, placements, src_data_rank=None)


ALONE = Ranks()
"""One process, for what is done without torchrun."""


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether each rank holds a part of this tensor (it is a ``DTensor``)."""
    return hasattr(tensor, "full_tensor")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def reshard(model: Any) -> None:
    """After a forward pass without gradients: the root of a sharded model holds its weights for a backward."""
    if hasattr(model, "reshard"):
        model.reshard()


@contextmanager
def open_ranks(config: DistributedConfig, device: str) -> Iterator[Ranks]:
    """The ranks of this run: those torchrun started, those of a group that stands already, or this process alone.

    Args:
        config: strategy, and how long a rank waits for another.
        device: as configured; under torchrun "auto" and "cuda" are the device of this LOCAL_RANK.

    Raises:
        ValueError: a part of torchrun's environment is missing or no number; no such device; a strategy that needs
            ranks, without any.
    """
    ours = not (dist.is_available() and dist.is_initialized())
    if ours and not any(name in os.environ for name in ENVIRONMENT[:3]):
        if config.strategy == "fully_shard":
            raise ValueError(
                "distributed.strategy=fully_shard needs ranks to shard over: start with torchrun --nproc-per-node N, "
                "N=1 for one"
            )
        yield Ranks(usable_device(device))
        return
    if ours:
        rank, size, local_rank = _environment()
        place = usable_device(device, local_rank, size)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(minutes=config.timeout_minutes),
            device_id=place if place.type == "cuda" else None,
        )
    else:
        place = usable_device(device, int(os.environ.get("LOCAL_RANK", dist.get_rank())), dist.get_world_size())
    ranks = Ranks(place, connected=True)
    if not ranks.first:
        logging.getLogger("grpo_kernels").setLevel(logging.ERROR)  # the first rank has the same to say
    try:
        yield ranks
        ranks.in_step = True
    finally:
        # NCCL's way to close waits for ranks that are elsewhere, and those for this process to end; gloo's does not.
        if ours and (ranks.in_step or place.type == "cpu"):
            dist.destroy_process_group()


def _environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) of this process."""
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if missing:
        there = ", ".join(name for name in ENVIRONMENT if name in os.environ)
        raise ValueError(
            f"the environment has {there} but not {', '.join(missing)}: start with torchrun, which sets all of them, "
            "or unset them for a run of one process"
        )
    numbers = []
    for name in ENVIRONMENT[:3]:
        value = os.environ[name]
        if not value.isdecimal():
            raise ValueError(f"{name} must be a number, as torchrun sets it, got {value!r}")
        numbers.append(int(value))
    rank, size, local_rank = numbers
    if rank >= size:
        raise ValueError(f"RANK must be less than WORLD_SIZE={size}, got {rank}")
    return rank, size, local_rank


def usable_device(name: str, local_rank: int = 0, size: int = 1) -> torch.device:
    """The device of a name, once a number has been there and back.

    Args:
        name: as configured, "auto" for CUDA where it is and else the CPU.
        local_rank, size: of this rank; of several on a machine each has its own device.

    Raises:
        ValueError: it cannot be used; says why.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and size > 1:
            if device.index is not None:
                raise ValueError(
                    f"device must be 'cuda', 'cpu' or 'auto' for {size} ranks, each has its own; got {name!r}"
                )
            if 0 < (count := torch.cuda.device_count()) <= local_rank:
                raise ValueError(
                    f"this machine has {count} CUDA devices, none for LOCAL_RANK={local_rank}: start at most {count} "
                    "ranks on it, or say device=cpu"
                )
            device = torch.device("cuda", local_rank)
        torch.zeros(1, device=device).item()  # "meta" can be asked for, and holds nothing
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def shard_fully(model: Any, ranks: Ranks) -> None:
    """Leave each rank a part of every parameter; the whole ones come together block by block as they are needed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def transformer_blocks(model: Any) -> list[torch.nn.Module]:
    """The layers of a model that are computed one after the other, as ``transformers`` names them or else by looking.

    Args:
        model: causal language model, possibly with adapters.

    Returns:
        The modules of the classes that the model says must not be split; without any, those of the longest
        ``ModuleList``; without one of these, none.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = getattr(inner, "_no_split_modules", None) or ()
    blocks = [module for module in inner.modules() if type(module).__name__ in names]
    if blocks:
        return blocks[::-1]  # the inner before the outer, where they are nested
    lists = [list(module) for module in inner.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])
