"""The thin trainer: one readable loop over any ``transformers`` causal LM, for preference pairs in groups.

For who has a loop of his own: :func:`read_pairs` and :func:`tokenize_pairs` make a data set with groups,
:class:`PreferenceCollator` makes batches of it, and :func:`make_sampler` draws them and tells ``GroupWeights`` its q.
"""

from .config import TrainConfig
from .data.dataset import PairDataset, PreferenceCollator, read_pairs, tokenize_pairs
from .data.sampling import GroupSampler, make_sampler
from .evaluation import GroupReport, evaluate
from .loop import RunResult, train

__all__ = [
    "GroupReport",
    "GroupSampler",
    "PairDataset",
    "PreferenceCollator",
    "RunResult",
    "TrainConfig",
    "evaluate",
    "make_sampler",
    "read_pairs",
    "tokenize_pairs",
    "train",
]
