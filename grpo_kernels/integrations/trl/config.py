"""Settings of the group-robust trainer: TRL's ``DPOConfig`` and what concerns groups and the head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from trl import DPOConfig

from ... import GroupWeights, available_backends
from ...arguments import read_loss_settings
from ...types import LossType

LOSSES: dict[str, tuple[LossType, bool]] = {
    "sigmoid": ("sigmoid", False),
    "sigmoid_norm": ("sigmoid", True),
    "hinge": ("hinge", False),
    "ipo": ("ipo", True),
    "robust": ("robust", False),
}
"""TRL's name of a loss → this package's, and whether log-probabilities are divided by the reply's length."""

TAKEN_COLUMNS = {
    "prompt", "chosen", "rejected", "image", "images", "tools", "chat_template_kwargs",
    "prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps",
}  # fmt: skip
"""Columns that TRL reads or makes."""


@dataclass
class GroupRobustDPOConfig(DPOConfig):
    """``DPOConfig`` with groups; every field of ``DPOConfig`` and ``TrainingArguments`` keeps its name and meaning.

    Args:
        group_column: column of every data set that says which group a pair belongs to: text or integers.
        method: "gr_dpo" moves the group weights alpha towards the groups that do worst, "dpo" holds them at
            N_g / N, "is_dpo" at 1 / G.
        group_lr: eta_alpha of gr_dpo, >= 0.
        estimator: "importance" or "group_mean", what drives alpha.
        prior: alpha at the start and what ``mixing`` mixes in: "uniform", "proportional" or name → share.
        mixing: share of the prior in the alpha used, in [0, 1].
        size_adjustment: C >= 0 of C / sqrt(N_g) in alpha's exponent.
        sampling_probs: name → chance that a drawn pair is of the group, where it is not N_g / N.
        group_sizes: name → pairs in the training set; only for an ``IterableDataset``, which cannot be counted.
        length_normalize: divide log-probabilities by the reply's length; None: as TRL's loss type does ("ipo" and
            "sigmoid_norm" do).
        fused_head: take log-probabilities from hidden states with this package's LM head.  False: with TRL's, which
            also logs entropy, mean logits and token accuracy.
        memory_budget: what the fused head may keep from forward to backward: bytes, a share of the device's memory,
            or "auto".
        backend: backend of the fused head, "auto" or a name of ``grpo_kernels.available_backends()``.
        max_logged_groups: with more groups than this, only the worst is logged.

    Raises:
        TypeError, ValueError: naming the setting, the rule and what came; also for a TRL setting under which the loss
            of a pair would not be one of its margin alone.
    """

    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "prior", "sampling_probs", "group_sizes"]  # noqa: RUF012

    group_column: str = field(default="group", metadata={"help": "Column that says which group a pair belongs to."})
    method: Literal["dpo", "is_dpo", "gr_dpo"] = field(
        default="gr_dpo",
        metadata={"help": "Group weights fixed at N_g/N, fixed at 1/G, or moving towards the groups that do worst."},
    )
    group_lr: float = field(default=0.1, metadata={"help": "Step size eta_alpha of the group weights under gr_dpo."})
    estimator: Literal["importance", "group_mean"] = field(
        default="importance",
        metadata={"help": "What drives the group weights: the paper's estimate, or means over the global batch."},
    )
    prior: dict[str, float] | str | None = field(
        default="uniform",
        metadata={"help": "Group weights at the start: uniform, proportional, or JSON, group to share."},
    )
    mixing: float = field(default=0.0, metadata={"help": "Share of the prior in the group weights used."})
    size_adjustment: float = field(default=0.0, metadata={"help": "C of C/sqrt(N_g) in the group weights' exponent."})
    sampling_probs: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": "JSON, group to chance that a drawn pair is of it, where that is not its share of pairs."},
    )
    group_sizes: dict[str, int] | str | None = field(
        default=None, metadata={"help": "JSON, group to number of pairs, for a training set that cannot be counted."}
    )
    length_normalize: bool | None = field(
        default=None,
        metadata={"help": "Divide log-probabilities by the reply's length. Not set: as TRL's loss type does."},
    )
    fused_head: bool = field(
        default=True, metadata={"help": "Take log-probabilities with grpo_kernels' LM head rather than TRL's."}
    )
    memory_budget: float | str | None = field(
        default="auto",
        metadata={"help": "What the fused head may keep for backward: bytes, a share of memory in [0, 1], or auto."},
    )
    backend: str = field(default="auto", metadata={"help": "Backend of the fused head."})
    max_logged_groups: int = field(
        default=50, metadata={"help": "With more groups than this, only the worst group is logged."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prior = "uniform" if self.prior is None else self.prior
        self.check_groups()

    def check_groups(self) -> None:
        """Every rule about groups and the loss that can be told without the data.

        Raises:
            TypeError, ValueError: see the class.
        """
        loss_settings(self)
        self.memory_budget = _budget(self.memory_budget)
        if self.backend != "auto" and self.backend not in available_backends():
            raise ValueError(
                f"backend must be 'auto' or one of {', '.join(available_backends())}, got {self.backend!r}"
            )
        if not isinstance(self.group_column, str) or not self.group_column or self.group_column in TAKEN_COLUMNS:
            raise ValueError(f"group_column must name a column that TRL does not use itself, got {self.group_column!r}")
        if self.max_logged_groups < 0:
            raise ValueError(f"max_logged_groups must not be negative, got {self.max_logged_groups}")
        # What the sizes are does not matter to these rules, and the real ones are not known yet.
        names = next((v for v in (self.group_sizes, self.prior, self.sampling_probs) if isinstance(v, Mapping)), ["1"])
        make_group_weights(self, dict.fromkeys(map(str, names), 1))


class LossSettings(NamedTuple):
    """What ``preference_loss`` is told about the loss of a pair."""

    loss_type: LossType
    label_smoothing: float
    length_normalize: bool


def loss_settings(args: Any) -> LossSettings:
    """This package's settings for what TRL's say.

    Raises:
        ValueError: a setting under which the loss is not a function of one margin.
    """
    kinds = list(args.loss_type)
    if len(kinds) != 1 or kinds[0] not in LOSSES:
        raise ValueError(
            f"loss_type must be one of {', '.join(LOSSES)} for group-robust training, got {kinds}: other losses of "
            "TRL's are not functions of a pair's margin, or mix several"
        )
    for name, wanted, why in (
        ("loss_weights", None, "there is one loss; scale the learning rate instead"),
        ("ld_alpha", None, "LD-DPO weights tokens"),
        ("f_divergence_type", "reverse_kl", "the margin is a difference of log-ratios"),
        ("use_weighting", False, "WPO weights pairs by the policy, and the groups do not see that"),
    ):
        value = getattr(args, name)
        if value != wanted:
            raise ValueError(f"{name} must be {wanted!r} for group-robust training ({why}), got {value!r}")
    loss_type, by_length = LOSSES[kinds[0]]
    read_loss_settings(args.beta, loss_type, args.label_smoothing)
    if args.length_normalize is not None:
        if kinds[0] == "sigmoid_norm" and not args.length_normalize:
            raise ValueError("length_normalize must not be False with loss_type 'sigmoid_norm'; that is 'sigmoid'")
        by_length = args.length_normalize
    return LossSettings(loss_type, args.label_smoothing, by_length)


def make_group_weights(args: GroupRobustDPOConfig, sizes: Mapping[str, int]) -> GroupWeights:
    """The group weights of a method, for groups of these sizes.

    Raises:
        TypeError, ValueError: naming the setting, the rule and what came.
    """
    q = _by_name("sampling_probs", args.sampling_probs, sizes)
    if args.method == "dpo":
        return GroupWeights.proportional(sizes, sampling_probs=q)
    if args.method == "is_dpo":
        return GroupWeights.balanced(sizes, sampling_probs=q)
    if args.method != "gr_dpo":
        raise ValueError(f"method must be 'dpo', 'is_dpo' or 'gr_dpo', got {args.method!r}")
    prior: Any = args.prior if isinstance(args.prior, str) else _by_name("prior", args.prior, sizes)
    return GroupWeights.robust(
        sizes,
        args.group_lr,
        estimator=args.estimator,
        prior=prior,
        mixing=args.mixing,
        size_adjustment=args.size_adjustment,
        sampling_probs=q,
    )


def _by_name(setting: str, values: Any, sizes: Mapping[str, int]) -> list[float] | None:
    """Numbers in the order of the groups."""
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise TypeError(f"{setting} must be a mapping, group to number, got {values!r}")
    named = {str(name): value for name, value in values.items()}
    if set(named) != set(sizes):
        raise ValueError(f"{setting} must name the groups {list(sizes)}, got {list(named)}")
    return [named[name] for name in sizes]


def _budget(value: Any) -> float | str:
    """The setting as ``attach_fused_head`` takes it; the command line gives text."""
    rule = "memory_budget must be 'auto', bytes (an int) or a share of memory (a float in [0, 1])"
    if value is None or value == "auto":
        return "auto"
    number = value
    if isinstance(value, str):
        try:
            # "1" is one byte, "1.0" all of the memory, as with numbers.
            number = int(value) if value.strip().isdigit() else float(value)
        except ValueError:
            number = math.nan
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{rule}, got {value!r}")
    if not number >= 0 or (isinstance(number, float) and number > 1):
        raise ValueError(f"{rule}, got {value!r}")
    return number
