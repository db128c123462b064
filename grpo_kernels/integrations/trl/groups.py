"""Groups in data sets: which there are, how many pairs each has, and their ids in a batch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from datasets import IterableDataset

GROUP_IDS = "group_ids"
"""Key of the (B,) int64 ids in a batch."""


def require_column(dataset: Any, column: str, what: str) -> None:
    """Refuse a data set without groups, before anything is tokenized.

    Raises:
        ValueError: naming the data set, the column and what columns there are.
    """
    names = getattr(dataset, "column_names", None)
    if names is None:
        # A stream knows its columns only once it has been looked at.
        names = list(next(iter(dataset), {}))
    if column not in names:
        raise ValueError(
            f"{what} must have the column {column!r}, which says the group of each pair (group_column), "
            f"its columns are {list(names)}"
        )


def group_name(value: Any, column: str) -> str:
    """The name of a group as text.

    Raises:
        ValueError: neither text nor an integer, or empty.
    """
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        shown = "null" if value is None else f"{type(value).__name__} {value!r}"
        raise ValueError(f"column {column!r} must hold text or integers that name a group, got {shown}")
    return str(value)


def count_groups(dataset: Any, column: str, what: str) -> dict[str, int]:
    """Pairs of each group, the names sorted, numbers in them as numbers.

    Raises:
        ValueError: no such column, a value that names no group, or no pair at all.
    """
    require_column(dataset, column, what)
    values: Counter[Any] = Counter()
    for batch in dataset.select_columns([column]).with_format(None).iter(batch_size=10_000):
        values.update(batch[column])
    counts: Counter[str] = Counter()
    for value, count in values.items():
        try:
            counts[group_name(value, column)] += count
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
    if not counts:
        raise ValueError(f"{what} must hold at least one pair, got none")
    return {name: counts[name] for name in sorted(counts, key=_natural)}


def training_sizes(raw: Any, prepared: Any, column: str, given: Any) -> dict[str, int]:
    """N_g of the training set as it is trained on, after TRL has dropped what is too long.

    Args:
        raw: the data set as it was passed to the trainer.
        prepared: what TRL made of it.
        column: where the group is.
        given: ``group_sizes``, a mapping or None.

    Returns:
        name → pairs.

    Raises:
        ValueError: a stream without ``group_sizes``, a data set with other ones, a group that lost all its pairs.
    """
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"group_sizes must be a mapping, group to number of pairs, or None, got {given!r}")
    sizes = None if given is None else {str(name): size for name, size in given.items()}
    if isinstance(prepared, IterableDataset):
        require_column(prepared, column, "train_dataset")
        if sizes is None:
            raise ValueError(
                "group_sizes must be given for an IterableDataset, group to number of pairs: the pairs of a stream "
                "cannot be counted beforehand"
            )
        return sizes
    counts = count_groups(prepared, column, "train_dataset")
    before = count_groups(raw, column, "train_dataset")
    lost = {name: size for name, size in before.items() if name not in counts}
    if lost:
        raise ValueError(
            f"train_dataset must keep a pair of every group, TRL dropped all of {lost}: their prompts alone fill "
            "max_length; raise it, or leave these groups out"
        )
    if sizes is not None and sizes != counts:
        raise ValueError(f"group_sizes must be what train_dataset has, {counts}, or None, got {sizes}")
    return counts


def require_known(dataset: Any, column: str, names: Sequence[str], what: str) -> None:
    """Refuse a data set with a group that the training set does not have; a stream is looked at batch by batch.

    Raises:
        ValueError: naming the groups.
    """
    require_column(dataset, column, what)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "select_columns"):
        return
    unknown = [name for name in count_groups(dataset, column, what) if name not in set(names)]
    if unknown:
        raise ValueError(f"{what} must have groups of the training set, {_short(names)}, got {_short(unknown)} as well")


class GroupCollator:
    """A collator that puts the pairs' group ids beside what another collator makes of them.

    Args:
        collate: makes a batch of examples, from which the group column is gone.
        column: where the examples have their group.
        names: the groups, index = id.
    """

    def __init__(
        self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], column: str, names: Iterable[str]
    ) -> None:
        self.collate = collate
        self.column = column
        self.ids = {name: i for i, name in enumerate(names)}

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Examples → batch with ``group_ids`` (B,) int64.

        Raises:
            ValueError: an example without a group, or of one that is not known.
        """
        ids = [self._id(example) for example in examples]
        batch = self.collate([{k: v for k, v in example.items() if k != self.column} for example in examples])
        return {**batch, GROUP_IDS: torch.tensor(ids)}

    def _id(self, example: Mapping[str, Any]) -> int:
        if self.column not in example:
            raise ValueError(
                f"a pair came without the column {self.column!r}, which says its group; its columns are {list(example)}"
            )
        name = group_name(example[self.column], self.column)
        if name not in self.ids:
            raise ValueError(f"unknown group {name!r}: the groups of the training set are {_short(list(self.ids))}")
        return self.ids[name]


def _natural(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """ "10" after "9"."""
    parts = re.split(r"([0-9]+)", name)
    # Numbers too long to be converted quickly are names, not numbers.
    return [(0, int(part)) if i % 2 and len(part) < 20 else (1, part) for i, part in enumerate(parts)], name


def _short(names: Sequence[str]) -> str:
    return str(list(names)) if len(names) <= 12 else f"{list(names[:12])} and {len(names) - 12} more"
