"""Which pairs make batch number k: samplers that know the groups, and say with what chance they draw each.

Batch k is a function of the seed and of k alone.  That is all a checkpoint has to carry: to go on, say which batch
comes next.  It is also all that ranks have to agree on: each computes the global batch and takes its slice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...arguments import describe

KINDS = ("shuffle", "categorical", "balanced")


class GroupSampler:
    """Batches of pair indices; a ``batch_sampler`` for ``torch.utils.data.DataLoader``, or iterated by itself.

    Kinds:
        shuffle: epochs without replacement.  Every batch is full: where an epoch ends within one, the next begins.
        categorical: g ~ N_g / N, then a pair of g, with replacement (Ramesh et al. 2024, Algorithm 1).
        balanced: all groups with the same chance, then a pair of g, with replacement.

    Args:
        kind: one of the above.
        group_ids: group of each pair; together they must be 0 .. G-1, none without a pair.
        batch_size: pairs in a *global* batch, over all ranks.
        seed: of the draws.
        rank, world_size: this process takes the rank-th of ``world_size`` equal slices of each global batch.
        steps: number of batches that iterating yields in all; None for no end.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came.
    """

    def __init__(
        self,
        kind: str,
        group_ids: Sequence[int] | torch.Tensor,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        steps: int | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        _check_int("batch_size", batch_size, 1)
        _check_int("seed", seed, 0)
        _check_int("world_size", world_size, 1)
        _check_int("rank", rank, 0)
        if rank >= world_size:
            raise ValueError(f"rank must be less than world_size={world_size}, got {rank}")
        if batch_size % world_size:
            raise ValueError(f"batch_size must be a multiple of world_size={world_size}, got {batch_size}")
        if steps is not None:
            _check_int("steps", steps, 0)
        ids = group_ids.tolist() if isinstance(group_ids, torch.Tensor) else list(group_ids)
        if not ids:
            raise ValueError("group_ids must name the group of at least one pair, got none")
        members: list[list[int]] = [[] for _ in range(_num_groups(ids))]
        for index, group in enumerate(ids):
            members[group].append(index)
        for group, pairs in enumerate(members):
            if not pairs:
                raise ValueError(f"group_ids must leave no group without a pair, got none of group {group}")

        self.kind = kind
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.steps = steps
        self.step = 0
        """Number of the batch that comes next."""
        self._num_pairs = len(ids)
        self._members = [torch.tensor(pairs) for pairs in members]
        self._sizes = torch.tensor([len(pairs) for pairs in members])
        self._epochs: dict[int, torch.Tensor] = {}

    @property
    def sampling_probs(self) -> list[float]:
        """(G,) q, the chance that a drawn pair is of each group: what ``GroupWeights`` must be told."""
        if self.kind == "balanced":
            return [1 / len(self._members)] * len(self._members)
        return [int(size) / self._num_pairs for size in self._sizes]

    def batch(self, step: int) -> list[int]:
        """This rank's slice of batch number ``step``, wherever the iteration stands.

        Args:
            step: at least 0.

        Returns:
            ``batch_size / world_size`` indices of pairs.
        """
        pairs = self.batch_size // self.world_size
        return self.whole_batch(step)[self.rank * pairs : (self.rank + 1) * pairs]

    def whole_batch(self, step: int) -> list[int]:
        """Batch number ``step`` of all ranks together, which does not depend on how many there are.

        Args:
            step: at least 0.

        Returns:
            ``batch_size`` indices of pairs, the first rank's slice first.
        """
        _check_int("step", step, 0)
        return self._shuffled(step) if self.kind == "shuffle" else self._drawn(step)

    def __iter__(self) -> Iterator[list[int]]:
        """Go on from ``self.step``, to ``steps`` or without end."""
        while self.steps is None or self.step < self.steps:
            batch = self.batch(self.step)
            # Counted before it is handed out: a state saved after training on it then names the next one.
            self.step += 1
            yield batch

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError("a GroupSampler without steps has no length")
        return self.steps

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands, and what it is of.

        A DataLoader with workers asks for batches ahead of the training; then set ``step`` to the number of batches
        trained on before saving, or in the state that is saved.
        """
        return {"step": self.step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was saved.

        Raises:
            ValueError: the state is of another kind, seed, batch size or number of pairs, and would go on differently.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"the sampler's state was saved with {name}={state.get(name)!r}, this one has {value!r}"
                )
        _check_int("step", state["step"], 0)
        self.step = state["step"]

    def _identity(self) -> dict[str, Any]:
        # Not the rank nor the world size: the global batches do not depend on them.
        return {"kind": self.kind, "seed": self.seed, "batch_size": self.batch_size, "num_pairs": self._num_pairs}

    def _shuffled(self, step: int) -> list[int]:
        start = step * self.batch_size
        whole: list[int] = []
        while len(whole) < self.batch_size:
            epoch, offset = divmod(start + len(whole), self._num_pairs)
            whole += self._permutation(epoch)[offset : offset + self.batch_size - len(whole)].tolist()
        self._epochs = {e: order for e, order in self._epochs.items() if e >= start // self._num_pairs}
        return whole

    def _permutation(self, epoch: int) -> torch.Tensor:
        if epoch not in self._epochs:
            self._epochs[epoch] = torch.randperm(self._num_pairs, generator=self._generator(epoch))
        return self._epochs[epoch]

    def _drawn(self, step: int) -> list[int]:
        generator = self._generator(step)
        q = torch.tensor(self.sampling_probs, dtype=torch.float64)
        groups = torch.multinomial(q, self.batch_size, replacement=True, generator=generator)
        within = torch.rand(self.batch_size, dtype=torch.float64, generator=generator) * self._sizes[groups]
        return [int(self._members[g][int(i)]) for g, i in zip(groups.tolist(), within.tolist(), strict=True)]

    def _generator(self, number: int) -> torch.Generator:
        # Hashed, not added: neighbouring seeds must not share their epochs or batches.
        digest = hashlib.sha256(f"{self.kind} {self.seed} {number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def make_sampler(
    kind: str,
    group_ids: Sequence[int] | torch.Tensor,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    steps: int | None = None,
) -> GroupSampler:
    """A :class:`GroupSampler`, which says what the arguments are."""
    return GroupSampler(kind, group_ids, batch_size, seed, rank=rank, world_size=world_size, steps=steps)


def _num_groups(ids: list[Any]) -> int:
    for index, group in enumerate(ids):
        if isinstance(group, bool) or not isinstance(group, int):
            raise TypeError(f"group_ids must be integers, got {describe(group)} at {index}")
        if group < 0:
            raise ValueError(f"group_ids must not be negative, got {group} at {index}")
        if group >= len(ids):
            raise ValueError(
                f"group_ids must leave no group without a pair, got {group} at {index} of {len(ids)} pairs"
            )
    return max(ids) + 1


def _check_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
