"""Pairs ready for training: their tokens, their groups, and what was left out."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..config import DataConfig
from .reading import Pair
from .tokenization import encode, fit_prompt, fit_reply, prompt_and_reply_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLY_GONE = "reply gone"
REPLIES_EQUAL = "replies equal"


@dataclass
class TokenizedPair:
    """The tokens of one pair.

    Args:
        prompt_ids, chosen_ids, rejected_ids: token ids; the two sequences are prompt + chosen and prompt + rejected.
        group_id: index of the group in ``PairDataset.groups``.
        pair_index: index of the pair in its PairDataset.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    group_id: int
    pair_index: int


@dataclass
class PairDataset(torch.utils.data.Dataset):
    """Tokenized pairs and their groups; index it for a :class:`TokenizedPair`.

    Args:
        pairs: in their order, unusable ones left out.
        groups: names, index = group id.
        where: for each pair the file and line that it came from.
        dropped: unusable pairs by reason: "reply gone" (no token left of one), "replies equal" (the same tokens,
            once tokenized and cut).
        truncated: how many prompts and how many replies of the kept pairs were cut.
    """

    pairs: list[TokenizedPair]
    groups: tuple[str, ...]
    where: list[str]
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TokenizedPair:
        return self.pairs[index]

    @property
    def group_ids(self) -> list[int]:
        """Group id of each pair, what the samplers are made from."""
        return [pair.group_id for pair in self.pairs]

    @property
    def group_sizes(self) -> dict[str, int]:
        """N_g by name, unusable pairs not counted; 0 for a group that is not in this data."""
        counts = Counter(self.group_ids)
        return {name: counts[i] for i, name in enumerate(self.groups)}

    def fingerprint(self) -> str:
        """SHA-256 over every token, the order of the pairs, and the groups."""
        digest = hashlib.sha256(repr(self.groups).encode())
        for pair in self.pairs:
            parts = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
            # The lengths first: without them a token could move from one part to the next unnoticed.
            numbers = [pair.group_id, *map(len, parts), *(token for part in parts for token in part)]
            digest.update(array("q", numbers).tobytes())
        return digest.hexdigest()


def tokenize_pairs(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    groups: Sequence[str] | None = None,
) -> PairDataset:
    """Tokenize pairs, cut them to the limits, and leave out those that hold no preference afterwards.

    A prompt begins with the tokenizer's beginning-of-sequence token, where it has one, and keeps its end; a reply
    keeps its beginning.  A plain reply that is whole ends with the end-of-sequence token, if ``config.append_eos``; a
    chat template closes its own.

    Args:
        pairs: at least one.
        tokenizer: of the policy.
        config: limits, in tokens.
        groups: names known from training, at evaluation; None takes them from the pairs, numbers in them sorted as
            numbers, the rest as text.

    Returns:
        The tokens, and counts of what was cut and left out.

    Raises:
        ValueError: a group that is not in ``groups``; a group left without a pair; a chat template that does not fit.
    """
    names = _sorted_names({pair.group for pair in pairs}) if groups is None else tuple(groups)
    ids = {name: i for i, name in enumerate(names)}
    for pair in pairs:
        if pair.group not in ids:
            raise ValueError(f"{pair.where}: unknown group {pair.group!r}, the groups are {list(names)}")

    texts = [text for pair in pairs for text in prompt_and_reply_texts(pair, tokenizer)]
    tokens = encode(texts, tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    dropped, truncated = {REPLY_GONE: 0, REPLIES_EQUAL: 0}, {"prompts": 0, "replies": 0}
    kept: list[TokenizedPair] = []
    where: list[str] = []
    for i, pair in enumerate(pairs):
        end = eos if config.append_eos and isinstance(pair.prompt, str) else None
        prompt, prompt_cut = fit_prompt(tokens[3 * i], bos, eos, config.max_prompt_length)
        if not prompt:
            raise ValueError(
                f"{pair.where}: the prompt is empty, and the tokenizer has neither a beginning-of-sequence nor an "
                "end-of-sequence token to stand in for it; nothing could predict the reply's first token"
            )
        room = config.max_length - len(prompt)
        chosen, chosen_cut = fit_reply(tokens[3 * i + 1], end, room)
        rejected, rejected_cut = fit_reply(tokens[3 * i + 2], end, room)
        if not chosen or not rejected:
            dropped[REPLY_GONE] += 1
        elif chosen == rejected:
            dropped[REPLIES_EQUAL] += 1
        else:
            truncated["prompts"] += prompt_cut
            truncated["replies"] += chosen_cut + rejected_cut
            kept.append(TokenizedPair(prompt, chosen, rejected, ids[pair.group], len(kept)))
            where.append(pair.where)

    dataset = PairDataset(kept, names, where, dropped, truncated)
    _check_no_group_vanished(pairs, dataset, config)
    return dataset


def _check_no_group_vanished(pairs: Sequence[Pair], dataset: PairDataset, config: DataConfig) -> None:
    sizes = dataset.group_sizes
    dropped = ", ".join(f"{reason} {count}" for reason, count in dataset.dropped.items())
    for name, read in Counter(pair.group for pair in pairs).items():
        if not sizes[name]:
            raise ValueError(
                f"group {name!r} has no usable pair left of {read} "
                f"(dropped in all groups: {dropped}); raise data.max_length={config.max_length} or lower "
                f"data.max_prompt_length={config.max_prompt_length}, or leave the group out"
            )
    if not len(dataset):
        raise ValueError("there are no pairs to tokenize")


def _sorted_names(names: set[str]) -> tuple[str, ...]:
    """Sorted, so that the order is the data's alone; "10" after "9"."""

    def key(name: str) -> tuple[list[tuple[int, int | str]], str]:
        parts = re.split(r"([0-9]+)", name)
        # Numbers too long to be converted quickly are names, not numbers.
        return [(0, int(part)) if i % 2 and len(part) < 20 else (1, part) for i, part in enumerate(parts)], name

    return tuple(sorted(names, key=key))
