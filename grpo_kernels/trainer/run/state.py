"""Everything that makes the next step what it is: gathered for a checkpoint, and put back from one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from ... import GroupWeights
from ..config import TrainConfig
from ..data import PairDataset
from ..model.distributed import ALONE, Ranks
from ..model.optim import IterateAverage, Parameters
from .checkpoint import (
    Checkpoint,
    Tensors,
    optimizer_tensors,
    random_state,
    restore_optimizer,
    restore_random_state,
    restore_tensors,
)

_FREE = {
    "run_dir", "overwrite", "resume", "quiet", "tensorboard", "save_every", "keep_checkpoints", "reference_cache",
    "device", "data.train", "data.test",
    "distributed.strategy", "distributed.find_unused_parameters", "distributed.timeout_minutes",
}  # fmt: skip
"""Settings that may change on resuming.  The data may have moved; what is in it is compared by fingerprint."""

_ITS_OWN = {
    "run_dir", "quiet", "tensorboard", "reference_cache", "device", "data.train", "data.test", "model.name",
    "model.chat_template",
}  # fmt: skip
"""Settings that may be another on each rank of a run."""

_AS_LARGE_AS_THE_MODEL = {"model", "optimizer", "average", "start"}


class Window:
    """Sums over the steps since the last line of metrics, group by group.

    Args:
        num_groups: G.
    """

    def __init__(self, num_groups: int) -> None:
        self.groups = torch.zeros(4, num_groups, dtype=torch.float64)
        """Losses, positive margins, margins, pairs."""
        self.steps = torch.zeros(2, dtype=torch.float64)
        """Robust losses, steps."""

    def add(self, losses: torch.Tensor, margins: torch.Tensor, group_ids: torch.Tensor, loss: float) -> None:
        """One step: (B,) losses, margins and groups of its pairs, and its robust loss."""
        rows = torch.stack(
            [losses.double(), (margins > 0).double(), margins.double(), torch.ones_like(losses).double()]
        )
        self.groups.index_add_(1, group_ids, rows)
        self.steps += torch.tensor([loss, 1.0], dtype=torch.float64)

    def record(self, names: Sequence[str]) -> dict[str, Any]:
        """Means, as a line of metrics holds them; None where no pair of the group was drawn."""
        losses, correct, margins, counts = self.groups.tolist()
        groups = {
            name: {
                "loss": losses[i] / n if (n := counts[i]) else None,
                "accuracy": correct[i] / n if n else None,
                "margin": margins[i] / n if n else None,
                "n": int(n),
            }
            for i, name in enumerate(names)
        }
        present = [i for i, n in enumerate(counts) if n]
        worst = max(present, key=lambda i: losses[i] / counts[i])
        pairs = sum(counts)
        return {
            "robust_loss": float(self.steps[0] / self.steps[1]),
            "loss": sum(losses) / pairs,
            "accuracy": sum(correct) / pairs,
            "worst_group": names[worst],
            "groups": groups,
        }

    def clear(self) -> None:
        """Start anew."""
        self.groups.zero_()
        self.steps.zero_()


class TrainState:
    """The parts of a run that change from step to step, and those fixed before its first.

    Args:
        model: the policy.
        parameters: those trained, by name.
        optimizer: over them.
        group_weights: alpha.
        average: mean of the iterates, or None.
        ranks: that hold all this together; saving and restoring take all of them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        parameters: Parameters,
        optimizer: torch.optim.Optimizer,
        group_weights: GroupWeights,
        average: IterateAverage | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.parameters, self.optimizer, self.ranks = model, parameters, optimizer, ranks
        self.group_weights, self.average = group_weights, average
        self.window = Window(group_weights.num_groups)
        self.step = 0
        self.metrics_bytes = 0
        self.seconds = 0.0
        self.reference: dict[str, torch.Tensor] = {}
        """Split → (N, 2) log-probabilities of the reference."""
        self.start: Tensors = {}
        """Center of the ball that iterates are projected on; empty for the origin."""

    def checkpoint(
        self, config: TrainConfig, train_set: PairDataset, test_set: PairDataset | None
    ) -> Checkpoint | None:
        """All of it, as of now and in full, on the first rank; None on the others.

        Nothing in it depends on the number of ranks but the random streams, of which each rank has its own.
        """
        streams = self.ranks.gather_objects(random_state())
        weights = self.group_weights.state_dict()
        parts = {
            "model": self._model_tensors(),
            "optimizer": optimizer_tensors(self.optimizer, self.parameters),
            "group_weights": {name: t for name, t in weights.items() if isinstance(t, torch.Tensor)},
            "random": {f"{rank}/{name}": t for rank, (tensors, _) in enumerate(streams) for name, t in tensors.items()},
            "window": {"groups": self.window.groups, "steps": self.window.steps},
            # With these inside, going on needs neither the cache nor the policy as it was before the first step.
            "reference": self.reference,
        }
        if self.average is not None:
            parts["average"] = self.average.mean
        if self.start:
            parts["start"] = self.start
        whole = {part: self.ranks.to_first(tensors) for part, tensors in parts.items()}
        if not self.ranks.first:
            return None
        scalars = {
            "config": _plain(config),
            "groups": list(self.group_weights.names),
            "data": data_fingerprints(train_set, test_set),
            "random": [scalars for _, scalars in streams],
            "metrics_bytes": self.metrics_bytes,
            "seconds": self.seconds,
            "average_count": self.average.count if self.average is not None else 0,
        }
        return Checkpoint(self.step, whole, scalars)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put everything back.

        Args:
            checkpoint: of a run on any number of ranks; as :func:`share_checkpoint` gives it.

        Raises:
            CheckpointError: it does not fit this model.
        """
        parts, scalars = checkpoint.parts, checkpoint.scalars
        restore_tensors(self._model_tensors(), parts["model"], "model", self.ranks)
        restore_optimizer(self.optimizer, self.parameters, parts["optimizer"], self.ranks)
        self.group_weights.load_state_dict({**parts["group_weights"], "_extra_state": {"names": scalars["groups"]}})
        restore_tensors({"groups": self.window.groups, "steps": self.window.steps}, parts["window"], "window")
        if self.average is not None:
            restore_tensors(self.average.mean, parts["average"], "average", self.ranks)
            self.average.count = scalars["average_count"]
        self.start = {
            name: self.ranks.like(self.parameters[name], tensor) for name, tensor in parts.get("start", {}).items()
        }
        self.reference = parts["reference"]
        self.step, self.metrics_bytes = checkpoint.step, scalars["metrics_bytes"]
        self.seconds = scalars["seconds"]
        rank = self.ranks.rank
        if rank < len(scalars["random"]):  # a rank that was not there goes on with the stream it starts with
            prefix = f"{rank}/"
            streams = {name[len(prefix) :]: t for name, t in parts["random"].items() if name.startswith(prefix)}
            restore_random_state(streams, scalars["random"][rank])

    def _model_tensors(self) -> Tensors:
        """What training changes: trained parameters and saved buffers.  A frozen base is loaded by its name."""
        saved = self.model.state_dict()
        buffers = {name: tensor for name, tensor in self.model.named_buffers() if name in saved}
        return {**{name: p.data for name, p in self.parameters.items()}, **buffers}


def run_identity(
    config: TrainConfig, model: torch.nn.Module, train_set: PairDataset, test_set: PairDataset | None
) -> dict[str, Any]:
    """What ranks must have in common to be one run, by name; where files lie may differ, what is in them not."""
    settings = {name: value for name, value in _flat(_plain(config)).items() if name not in _ITS_OWN}
    sets = {f"the pairs of data.{name}": print_ for name, print_ in data_fingerprints(train_set, test_set).items()}
    # A quick look, not a fingerprint: it is there for a folder that another node has an older model in.
    sums = [int(torch.hash_tensor(parameter.detach()).view(torch.int64)) for parameter in model.parameters()]
    return {**settings, **sets, "the parameters of model.name": sums}


def share_checkpoint(checkpoint: Checkpoint | None, ranks: Ranks) -> Checkpoint | None:
    """The checkpoint that the first rank has read, for all ranks to restore from.

    Args:
        checkpoint: on the first rank; None where there is none.
        ranks: of the run.

    Returns:
        On the first rank the checkpoint.  On the others a copy in which what is as large as the model has shapes
        without numbers; those are sent as they are put in place.
    """
    sent = checkpoint
    if ranks.first and checkpoint is not None and ranks.size > 1:
        parts = {
            part: {name: t.to("meta") if t.dim() else t for name, t in tensors.items()}
            if part in _AS_LARGE_AS_THE_MODEL
            else tensors
            for part, tensors in checkpoint.parts.items()
        }
        sent = replace(checkpoint, parts=parts)
    sent = ranks.broadcast(sent)
    return checkpoint if ranks.first else sent


def data_fingerprints(train_set: PairDataset, test_set: PairDataset | None) -> dict[str, str | None]:
    """What the data is, whatever its file is called."""
    return {"train": train_set.fingerprint(), "test": None if test_set is None else test_set.fingerprint()}


def check_resumable(
    config: TrainConfig, checkpoint: Checkpoint, train_set: PairDataset, test_set: PairDataset | None
) -> None:
    """Refuse to go on with settings or data under which the run would not have come to this checkpoint.

    ``steps`` may grow under a constant schedule; the others decay towards the last step and would have gone otherwise.

    Raises:
        ValueError: naming the setting, what the checkpoint has and what came.
    """
    now, then = _flat(_plain(config)), _flat(checkpoint.scalars["config"])
    for name in sorted(now.keys() | then.keys()):
        before, came = then.get(name), now.get(name)
        if name in _FREE or before == came:
            continue
        if name == "steps" and config.optim.schedule == "constant":
            if config.steps >= checkpoint.step:
                continue
            raise ValueError(f"steps must be at least the {checkpoint.step} of the checkpoint to resume, got {came!r}")
        reason = f": optim.schedule={config.optim.schedule} decays towards the last step" if name == "steps" else ""
        raise ValueError(f"{name} must be {before!r}, as in the checkpoint, to resume; got {came!r}{reason}")
    for split, fingerprint in data_fingerprints(train_set, test_set).items():
        if fingerprint != checkpoint.scalars["data"][split]:
            raise ValueError(f"data.{split} must hold the pairs that the checkpoint was made with; they differ now")


def _plain(config: TrainConfig) -> dict[str, Any]:
    """As it comes back from JSON: tuples are lists."""
    return json.loads(json.dumps(asdict(config)))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
