"""The policy in training: on one device, copied on every rank, or sharded over all of them."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..config import DistributedConfig
from .distributed import Ranks, is_sharded, shard_fully


class Policy:
    """The trained model as the ranks hold it.

    Args:
        model: in full, on every rank with the same bits; it is moved to the rank's device.
        config: the strategy.
        ranks: over which.

    Attributes:
        model: whose parameters are trained, for evaluation and by name.
        trained: what a training step calls, so that gradients meet.
    """

    def __init__(self, model: Any, config: DistributedConfig, ranks: Ranks) -> None:
        self.ranks = ranks
        self.model = self.trained = model
        self._skeleton: Any = None
        if not ranks.connected:
            model.to(ranks.device)
        elif config.strategy == "fully_shard":
            self._skeleton = _skeleton(model) if ranks.first else None
            shard_fully(model, ranks)
        elif ranks.size > 1:
            model.to(ranks.device)
            self.trained = torch.nn.parallel.DistributedDataParallel(
                model,
                device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
                find_unused_parameters=config.find_unused_parameters,
                gradient_as_bucket_view=True,
            )
        else:
            model.to(ranks.device)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one micro-batch: before the last of a step, ranks need not meet.

        A sharded model meets all the same: what it saves is memory, and gradients kept back would be in full.
        """
        wrapped = isinstance(self.trained, torch.nn.parallel.DistributedDataParallel)
        return self.trained.no_sync() if wrapped and not last else nullcontext()

    def portable(self) -> Any | None:
        """The model as one process has it, to be saved, on the first rank; None on the others.  All ranks must ask."""
        if not any(is_sharded(parameter) for parameter in self.model.parameters()):
            return self.model if self.ranks.first else None
        tensors = self.ranks.to_first({**dict(self.model.named_parameters()), **dict(self.model.named_buffers())})
        if not self.ranks.first:
            return None
        model = copy.deepcopy(self._skeleton)
        found = {id(p): torch.nn.Parameter(tensors[name], p.requires_grad) for name, p in model.named_parameters()}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = found[id(parameter)]
        for name, buffer in model.named_buffers():
            buffer.copy_(tensors[name])
        return model


def _skeleton(model: Any) -> Any:
    """A copy of a model whose parameters take no memory."""
    empty = {id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)
