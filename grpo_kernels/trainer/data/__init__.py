"""Preference pairs: files are read, pairs become tokens and tensors, and batches are drawn of them by group.

Each file uses those before it, and of the trainer's other parts only the configuration::

    reading        files and hub data sets → Pair, checked as they are read
    tokenization   the text of a Pair → tokens within the limits
    dataset        TokenizedPair and PairDataset: what is trained on, the groups, what was left out
    collator       PreferenceCollator: some of these → the tensors of a step
    sampling       which pairs make batch number k; knows group ids alone, and none of the files above

To add a column (a weight of each pair, say): the field's name in ``DataConfig`` and ``check_data``
(``trainer/config.py``), from which the command line has its flag; ``_fields``, ``_pair`` and :class:`Pair` in
``reading.py``; :class:`TokenizedPair`, ``tokenize_pairs`` and ``PairDataset.fingerprint``, by which a resumed run and
the reference cache notice other data, in ``dataset.py``; a tensor in ``collator.py``; and what ``group_loss`` in
``model/scoring.py`` does with it, in training and in evaluation.
"""

from .collator import PreferenceCollator
from .dataset import PairDataset, TokenizedPair, tokenize_pairs
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
