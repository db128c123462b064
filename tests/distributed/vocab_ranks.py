"""Four gloo processes that share a vocabulary, and one call that runs the same on one process and on a shard of it."""

from __future__ import annotations

import datetime
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from helpers import Batch, make_batch

from grpo_kernels import fused_grpo_loss, fused_linear_grpo_loss
from grpo_kernels.head import plan as linear_plan

WORLD = 4
LIMIT = datetime.timedelta(seconds=60)
VOCABULARY, WIDTH = 29, 6

EDGES = {
    "two": [0, 15, 29],
    "two, uneven": [0, 22, 29],
    "four, uneven": [0, 3, 12, 13, 29],
    "four, one of no words": [0, 12, 12, 20, 29],
}
"""Where shards meet, in the order of ranks."""


@dataclass
class Call:
    """One call of the loss."""

    edges: str | tuple[int, ...] = "two, uneven"
    """A name of :data:`EDGES`, or where shards meet."""
    head: bool = True
    dtype: torch.dtype = torch.float64
    packed: bool = False
    biased: bool = False
    frozen: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    late: bool = True
    """Whether something is added to the sequences' log-probabilities besides the loss."""
    reverse: bool = False
    """Whether the last rank holds the first words."""
    spread: float = 3.0
    offset: float = 0.0
    change: Callable[[Batch, torch.Tensor, torch.Tensor], None] | None = None
    """What is done in place to batch, hidden and weight before the call."""

    @property
    def ranks(self) -> int:
        return len(self.limits) - 1

    @property
    def limits(self) -> Sequence[int]:
        return EDGES[self.edges] if isinstance(self.edges, str) else self.edges

    def words(self, rank: int) -> slice:
        at = self.ranks - 1 - rank if self.reverse else rank
        return slice(self.limits[at], self.limits[at + 1])


def small_tiles() -> None:
    """Several tiles in each shard of so small a vocabulary."""
    linear_plan._LEAST_WORDS = linear_plan._MOST_WORDS = 5
    linear_plan._WORDS_MULTIPLE = 1


def batch_of(call: Call) -> tuple[Batch, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Batch, hidden, weight and bias, float64; the batch's logits are theirs."""
    batch = make_batch(vocabulary=VOCABULARY, packed=call.packed)
    rng = torch.Generator().manual_seed(5)
    hidden = torch.randn(*batch.labels.shape, WIDTH, generator=rng, dtype=torch.float64)
    weight = call.spread / WIDTH**0.5 * torch.randn(VOCABULARY, WIDTH, generator=rng, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=rng, dtype=torch.float64) + call.offset
    if call.change is not None:
        call.change(batch, hidden, weight)
    batch.logits = hidden @ weight.t() + bias
    return batch, hidden, weight, bias


def run(
    call: Call, group: Any = None, rank: int = 0, *, exact: bool = False, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Everything that comes out of a call; by one process where there is no group.

    ``exact`` runs it on the same rounded inputs in float64.
    """
    batch, *tensors = batch_of(call)
    tensors = [tensor.to(device) for tensor in tensors]
    for name in ("logits", "labels", "ref_logps", "group_ids", "weights", "pair_weights", "cu_seqlens"):
        if getattr(batch, name) is not None:
            setattr(batch, name, getattr(batch, name).to(device))
    dtype = torch.float64 if exact else call.dtype
    words = slice(None) if group is None else call.words(rank)
    options = {"pair_weights": batch.pair_weights, "cu_seqlens": batch.cu_seqlens, **call.options}
    if group is not None:
        options |= {"tp_group": group, "vocab_start": words.start}
    if call.head:
        hidden, weight, bias = (x.to(call.dtype).to(dtype) for x in tensors)
        weight, bias = weight[words].clone(), bias[words].clone()
        hidden.requires_grad_()
        inputs = {"hidden": hidden}
        if not call.frozen:
            inputs["weight"] = weight.requires_grad_()
        if call.biased:
            options["bias"] = bias
            if not call.frozen:
                inputs["bias"] = bias.requires_grad_()
        out = fused_linear_grpo_loss(hidden, weight, batch.labels, *batch.tail(), **options)
    else:
        leaf = batch.logits[..., words].to(call.dtype).to(dtype).clone().requires_grad_()
        inputs = {"logits": leaf}
        out = fused_grpo_loss(leaf * 1, batch.labels, *batch.tail(), **options)
    scalar = out.loss + (0.01 * out.policy_logps.cos().sum() if call.late else 0)
    scalar.backward()
    grads = {f"grad of {name}": tensor.grad for name, tensor in inputs.items()}
    return {name: value.detach() for name, value in out._asdict().items()} | grads


def together(call: Call, results: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What all ranks have, put together as one process has it."""
    whole = dict(results[0])
    order = sorted(range(len(results)), key=lambda rank: call.words(rank).start)
    for name in whole.keys() & {"grad of weight", "grad of bias", "grad of logits"}:
        dim = -1 if name == "grad of logits" else 0
        whole[name] = torch.cat([results[rank][name] for rank in order], dim=dim)
    return whole


def _enter(rank: int, folder: str, scenarios: Callable[..., dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    small_tiles()
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=LIMIT)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results = scenarios(rank, {2: pairs[rank // 2], WORLD: dist.group.WORLD})
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()  # who leaves first would take the connection along that another still reads from
    dist.destroy_process_group()


def on_four_ranks(folder: str, scenarios: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``scenarios(rank, {number of ranks: group})`` returns on every rank; raises what one raised."""
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed.tensor", "grpo_kernels"])
    context = torch.multiprocessing.start_processes(
        _enter, (folder, scenarios), nprocs=WORLD, join=False, start_method="forkserver"
    )
    end = time.monotonic() + LIMIT.total_seconds()
    while not context.join(timeout=5):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise AssertionError(f"{WORLD} ranks did not finish within {LIMIT}")
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(WORLD)]
