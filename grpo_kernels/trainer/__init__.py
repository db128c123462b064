"""The thin trainer: one readable loop over any ``transformers`` causal LM, for preference pairs in groups.

For those who have a loop of their own: :func:`read_pairs` and :func:`tokenize_pairs` make a data set with groups,
:class:`PreferenceCollator` makes batches of it, and :func:`make_sampler` draws them and tells ``GroupWeights`` its q.

The parts, and who may import whom::

    setting_types ← config ← {data, model} ← run ← {inputs, supervised, evaluation, report} ← {loop, evaluate_model}

``loop.py`` is the place to begin, ``config.py`` has every setting.
"""

from .config import TrainConfig
from .data import PairDataset, PreferenceCollator, read_pairs, tokenize_pairs
from .data.sampling import GroupSampler, make_sampler
from .evaluation import evaluate
from .loop import RunResult, train
from .run.group_report import GroupReport

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
