"""What a run is made of: one dataclass a concern, checked as a whole before anything is read or written.

The command line builds these from a YAML file and flags (``--data.train FILE``); a program builds them directly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..arguments import read_loss_settings
from ..types import LossType
from .setting_types import check_types


@dataclass
class TinyModelConfig:
    """The embedded model, for trying things out: a small Llama with a tokenizer trained on the training file."""

    vocab_size: int = 2048
    """Words of the byte-level BPE tokenizer, at most; a small corpus gives fewer."""
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    max_positions: int = 1024


@dataclass
class LoraConfig:
    """Low-rank adapters through ``peft``."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass
class ModelConfig:
    """The policy; the reference is a frozen copy of it as training starts."""

    name: str = "tiny"
    """A folder, a hub name, or "tiny" for the embedded model."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters.  float32 with ``bf16: true`` trains mixed; bfloat16 parameters lose small updates."""
    chat_template: str | None = None
    """A file with a Jinja chat template, for chat messages where the tokenizer has none or another is wanted."""
    tiny: TinyModelConfig = field(default_factory=TinyModelConfig)
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False


@dataclass
class DataConfig:
    """Preference pairs: JSONL or parquet files, or a hub data set, with prompt, chosen, rejected and a group."""

    train: str = ""
    """A .jsonl, .jsonl.gz or .parquet file, or the name of a hub data set."""
    test: str = ""
    """Held-out pairs, likewise; empty: no evaluation."""
    train_split: str = "train"
    """Split of a hub data set."""
    test_split: str = "test"
    subset: str | None = None
    """Configuration of a hub data set that has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    prompt_field: str = "prompt"
    chosen_field: str = "chosen"
    rejected_field: str = "rejected"
    group_field: str = "group"
    max_length: int = 512
    """Tokens of prompt and reply together; a longer prompt loses its beginning, a longer reply its end."""
    max_prompt_length: int = 384
    append_eos: bool = True
    """End every reply that is plain text with the end-of-sequence token."""


@dataclass
class LossConfig:
    """The loss of one pair."""

    type: LossType = "sigmoid"
    beta: float = 0.1
    """How closely the policy is held to the reference: margins are beta times the difference of log-ratios."""
    label_smoothing: float = 0.0
    """Share of the pairs taken to be labelled the wrong way round; of sigmoid and robust."""
    length_normalize: bool = False
    """Divide the log-ratio of each reply by its number of tokens."""
    fused_head: bool = True
    """Take the loss from hidden states and the LM head's weight, where the model is known to allow it; logits never
    exist.  False: from the model's logits."""
    backend: str = "auto"
    """auto, torch, cpu, cuda or triton: who computes; grpo-kernels info says which are here."""


@dataclass
class GroupsConfig:
    """How groups are weighted."""

    method: Literal["dpo", "is_dpo", "gr_dpo"] = "gr_dpo"
    """Group weights fixed at N_g/N, fixed at 1/G, or moving towards the groups that do worst."""
    group_lr: float = 0.1
    """eta_alpha of gr_dpo."""
    estimator: Literal["importance", "group_mean"] = "importance"
    """What a batch says of a group: its losses over its share of the pairs (the paper), or their mean."""
    prior: Literal["uniform", "proportional"] = "uniform"
    """Where the weights begin, and what mixing pulls them towards: 1/G or N_g/N."""
    mixing: float = 0.0
    """Share of the prior in the weights that are used: none falls below mixing times its prior."""
    size_adjustment: float = 0.0
    """Adds this over the root of a group's size to its loss: small groups are given more."""


@dataclass
class OptimConfig:
    """The step on the policy."""

    name: Literal["adamw", "sgd", "rmsprop"] = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.0
    """Falls on matrices, not on biases and norms."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of adamw."""
    eps: float = 1e-8
    """Of adamw and rmsprop."""
    momentum: float = 0.0
    """Of sgd and rmsprop."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Decays to 0 at the last step, after the warm-up."""
    lr_warmup_steps: int = 0
    max_grad_norm: float = 1.0
    """0: no clipping."""
    projection: Literal["none", "start", "origin"] = "none"
    """After each step, project the trained parameters on an L2 ball about their start, or the origin."""
    projection_radius: float = 0.0
    average_iterates: bool = False
    """Keep the mean of all iterates beside the last (what the convergence guarantee speaks of) and evaluate it too."""


@dataclass
class SupervisedConfig:
    """Optional supervised warm-up on the chosen replies, before the reference is frozen."""

    steps: int = 0
    batch_size: int = 64
    """Pairs in a step, over all processes together."""
    lr: float = 3e-3


@dataclass
class DistributedConfig:
    """Several processes, started by ``torchrun --nproc-per-node N -m grpo_kernels.cli train ...``."""

    strategy: Literal["ddp", "fully_shard"] = "ddp"
    """Every process holds the model and gradients are averaged; or parameters, gradients and the optimizer's state are
    split over the processes, block by block (FSDP2)."""
    find_unused_parameters: bool = False
    """Of ddp: for a model of which a step does not use every parameter."""
    timeout_minutes: float = 30.0
    """How long a process waits for another before it gives up."""


@dataclass
class TrainConfig:
    """One run."""

    run_dir: str = "runs/train"
    """Everything the run writes is in here."""
    overwrite: bool = False
    """Replace a run directory that exists."""
    resume: bool = False
    """Go on from the last checkpoint in ``run_dir``, bit for bit."""
    seed: int = 0
    """Of the order of pairs, of dropout and of what is drawn at the start."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 64
    """Pairs in an optimizer step, over all processes together; each takes an equal share."""
    micro_batch_size: int | None = None
    """Pairs in one forward and backward of one process, at most; None: its whole share.  Must divide batch_size; if
    less, the group weights lag by one step, however many processes there are."""
    sampling: Literal["shuffle", "categorical", "balanced"] = "shuffle"
    """Epochs without replacement; a group by its share and then a pair of it (the paper); groups in equal shares."""
    bf16: bool = False
    """Autocast the forward pass to bfloat16."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    eval_every: int = 100
    """Steps between evaluations; 0: only at the end."""
    save_every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 2
    """The latest that stay; older ones are removed once a later one is whole."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl; a line holds means over the steps since the one before."""
    tensorboard: bool = True
    """Write TensorBoard's files too, where it is installed."""
    quiet: bool = False
    """Print nothing, draw no progress bar."""
    reference_cache: str | None = None
    """Folder of cached reference log-probabilities; None: inside ``run_dir``."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    groups: GroupsConfig = field(default_factory=GroupsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def check(self) -> None:
        """Every rule that can be told from the configuration alone.

        Raises:
            TypeError, ValueError: naming the setting as it is written on the command line, the rule and what came.
        """
        check_types(self)
        check_loss(self.loss)
        check_data(self.data)
        _require(bool(self.data.train), "data.train", "must name the training pairs", self.data.train)
        _require(bool(self.run_dir.strip()), "run_dir", "must name a folder", self.run_dir)
        for name in ("steps", "batch_size", "log_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        for name in ("eval_every", "save_every"):
            _require(getattr(self, name) >= 0, name, "must not be negative", getattr(self, name))
        # Ranks, and the warm-up, take their seeds from above.
        _require(0 <= self.seed < 1 << 32, "seed", "must be at least 0 and below 2**32", self.seed)
        micro = self.micro_batch_size
        _require(
            micro is None or (micro >= 1 and self.batch_size % micro == 0),
            "micro_batch_size",
            f"must divide batch_size={self.batch_size}",
            micro,
        )
        _require(not (self.resume and self.overwrite), "resume", "and overwrite exclude each other", True)
        optim, groups, supervised = self.optim, self.groups, self.supervised
        _require(optim.lr > 0, "optim.lr", "must be positive", optim.lr)
        _require(optim.eps > 0, "optim.eps", "must be positive", optim.eps)
        _require(all(0 <= b < 1 for b in optim.betas), "optim.betas", "must be in [0, 1)", optim.betas)
        for name in ("weight_decay", "momentum", "lr_warmup_steps", "max_grad_norm"):
            value = getattr(optim, name)
            _require(value >= 0, f"optim.{name}", "must not be negative", value)
        _require(
            optim.projection == "none" or optim.projection_radius > 0,
            "optim.projection_radius",
            f"must be positive with optim.projection={optim.projection}",
            optim.projection_radius,
        )
        for name in ("group_lr", "size_adjustment"):
            value = getattr(groups, name)
            _require(value >= 0, f"groups.{name}", "must not be negative", value)
        _require(0 <= groups.mixing <= 1, "groups.mixing", "must be in [0, 1]", groups.mixing)
        _require(supervised.steps >= 0, "supervised.steps", "must not be negative", supervised.steps)
        _require(supervised.batch_size >= 1, "supervised.batch_size", "must be at least 1", supervised.batch_size)
        _require(supervised.lr > 0, "supervised.lr", "must be positive", supervised.lr)
        minutes = self.distributed.timeout_minutes
        _require(0 < minutes <= 10080, "distributed.timeout_minutes", "must be positive and at most a week", minutes)
        if (lora := self.model.lora) is not None:
            _require(lora.rank >= 1, "model.lora.rank", "must be at least 1", lora.rank)
            _require(lora.alpha > 0, "model.lora.alpha", "must be positive", lora.alpha)
            _require(0 <= lora.dropout < 1, "model.lora.dropout", "must be in [0, 1)", lora.dropout)
            modules = lora.target_modules
            _require(bool(modules), "model.lora.target_modules", "must name the layers to adapt", modules)


def check_loss(loss: LossConfig) -> None:
    """The rules of the loss's settings.

    Raises:
        TypeError, ValueError: naming the setting.
    """
    try:
        read_loss_settings(loss.beta, loss.type, loss.label_smoothing)
    except (TypeError, ValueError) as error:
        raise type(error)(f"loss.{error}") from None


def check_data(data: DataConfig) -> None:
    """The rules of the data's settings, but for where it is.

    Raises:
        ValueError: naming the setting.
    """
    names = ("prompt_field", "chosen_field", "rejected_field", "group_field")
    for index, name in enumerate(names):
        value = getattr(data, name)
        _require(bool(value), f"data.{name}", "must name a field", value)
        for other in names[:index]:
            _require(value != getattr(data, other), f"data.{name}", f"must not be the field of data.{other}", value)
    _require(data.max_length >= 2, "data.max_length", "must be at least 2", data.max_length)
    _require(
        1 <= data.max_prompt_length < data.max_length,
        "data.max_prompt_length",
        f"must leave room for a reply within data.max_length={data.max_length}",
        data.max_prompt_length,
    )


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} {rule}, got {value!r}")
