"""Batches as tensors: tokenized pairs padded to one length, with labels at the replies alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...types import IGNORE_INDEX
from .dataset import TokenizedPair


class PreferenceCollator:
    """Pairs to the tensors of a step: 2B sequences, the B chosen first and then the B rejected, padded on the right.

    Args:
        pad_token_id: what fills ``input_ids`` after the end; never scored and never attended to.
        pad_to_multiple_of: the padded length is a multiple of it.
        ignore_index: label at prompt and padding.

    Raises:
        TypeError, ValueError: a pad token that is no token, or a multiple below 1.
    """

    def __init__(self, pad_token_id: int, *, pad_to_multiple_of: int = 1, ignore_index: int = IGNORE_INDEX) -> None:
        for name, value, least in (("pad_token_id", pad_token_id, 0), ("pad_to_multiple_of", pad_to_multiple_of, 1)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.ignore_index = ignore_index

    def __call__(self, pairs: Sequence[TokenizedPair]) -> dict[str, Any]:
        """Make one batch.

        Args:
            pairs: B pairs, B >= 1.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` (2B, T) int64, ``group_ids`` and ``pair_index`` (B,) int64.

        Raises:
            ValueError: no pairs.
        """
        if not pairs:
            raise ValueError("pairs must hold at least one pair, got none")
        replies = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
        prompts = [pair.prompt_ids for pair in pairs] * 2
        longest = max(len(prompt) + len(reply) for prompt, reply in zip(prompts, replies, strict=True))
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(replies), width), self.pad_token_id)
        labels = torch.full_like(input_ids, self.ignore_index)
        attention_mask = torch.zeros_like(input_ids)
        for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
            start, end = len(prompt), len(prompt) + len(reply)
            input_ids[row, :end] = torch.tensor(prompt + reply)
            labels[row, start:end] = input_ids[row, start:end]
            attention_mask[row, :end] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "group_ids": torch.tensor([pair.group_id for pair in pairs]),
            "pair_index": torch.tensor([pair.pair_index for pair in pairs]),
        }
