"""Preference pairs: files are read, pairs become tokens, and batches are drawn of them by group."""

from .dataset import PairDataset, PreferenceCollator, TokenizedPair, tokenize_pairs
from .reading import Pair, pair_texts, read_pairs

__all__ = [
    "Pair",
    "PairDataset",
    "PreferenceCollator",
    "TokenizedPair",
    "pair_texts",
    "read_pairs",
    "tokenize_pairs",
]
