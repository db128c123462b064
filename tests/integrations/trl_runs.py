"""TRL runs small enough for a test: pairs of three groups, a Llama of a few thousand parameters, no network."""

from __future__ import annotations

import atexit
import gc
import os
import random
from pathlib import Path
from typing import Any

# Read when huggingface_hub is first imported: TRL reports each trainer that is made, and tests have no network.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The caches of data sets go where the test says, not into the user's home.
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed (it wants Python 3.11 or newer)")

from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: F401 - for the tests

from grpo_kernels.integrations.trl import GroupRobustDPOConfig, GroupRobustDPOTrainer
from grpo_kernels.trainer.model.models import train_tokenizer

# Every train() collects garbage, and would look through all that these imports have made: half a second each time.
gc.freeze()
atexit.register(gc.unfreeze)

REPLIES = {"many": ("sun", "rain"), "some": ("sun", "rain"), "few": ("rain", "sun")}
"""What each group chooses, and rejects."""
SHARES = {"many": 6, "some": 3, "few": 1}


def rows(num_pairs: int, seed: int = 1, groups: dict[str, int] = SHARES) -> list[dict[str, str]]:
    """Pairs of uneven groups, every group among them."""
    rng = random.Random(seed)
    names = [*groups, *rng.choices(list(groups), weights=list(groups.values()), k=num_pairs - len(groups))]
    rng.shuffle(names)
    made = []
    for name in names:
        chosen, rejected = REPLIES[name]
        made.append(
            {
                "prompt": f"weather {rng.randint(0, 9)} ?",
                "chosen": f" {chosen} {rng.randint(0, 99)}",
                "rejected": f" {rejected}" * rng.randint(1, 3),
                "group": name,
            }
        )
    return made


def pairs(num_pairs: int, seed: int = 1, groups: dict[str, int] = SHARES) -> Dataset:
    """The same as a data set."""
    return Dataset.from_list(rows(num_pairs, seed, groups))


def tokenizer() -> Any:
    """A byte-level tokenizer of such pairs; each caller gets its own, since TRL sets its padding token."""
    texts = [row[field] for row in rows(40) for field in ("prompt", "chosen", "rejected")]
    return train_tokenizer(texts, 280, 64)


def model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A one-layer Llama; the same seed gives the same parameters."""
    shape: dict[str, Any] = {
        "vocab_size": 280,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,  # replies differ in likelihood from the start
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))


def settings(folder: Path, kind: type = GroupRobustDPOConfig, **changes: Any) -> Any:
    """Five steps of SGD on four pairs each, in float32, every step logged."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "beta": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return kind(**{**defaults, **changes})


def robust(folder: Path, policy: Any = None, data: Any = None, **changes: Any) -> GroupRobustDPOTrainer:
    """A group-robust trainer; what is not a field of its configuration goes to the trainer."""
    return _make(GroupRobustDPOTrainer, GroupRobustDPOConfig, folder, policy, data, changes)


def stock(folder: Path, policy: Any = None, data: Any = None, **changes: Any) -> DPOTrainer:
    """TRL's own, given the reference that TRL cannot make of a model without a name."""
    changes.setdefault("ref_model", None if "peft_config" in changes else model().eval().requires_grad_(False))
    return _make(DPOTrainer, DPOConfig, folder, policy, data, changes)


def _make(trainer: type, config: type, folder: Path, policy: Any, data: Any, changes: dict[str, Any]) -> Any:
    fields = config.__dataclass_fields__
    return trainer(
        model=model() if policy is None else policy,
        args=settings(folder, config, **{k: v for k, v in changes.items() if k in fields}),
        train_dataset=pairs(24) if data is None else data,
        processing_class=tokenizer(),
        **{k: v for k, v in changes.items() if k not in fields},
    )


def history(trainer: Any, key: str) -> list[float]:
    """A metric over the lines of the log that have it."""
    return [line[key] for line in trainer.state.log_history if key in line]


def parameters(trainer: Any) -> dict[str, torch.Tensor]:
    """The trained model's tensors."""
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of parameters."""
    assert one.keys() == other.keys()
    return max(float((tensor - other[name]).abs().max()) for name, tensor in one.items())


def batches(trainer: GroupRobustDPOTrainer, size: int) -> list[dict[str, torch.Tensor]]:
    """An epoch of a trainer's pairs in their order, as its collator makes them."""
    data = trainer.train_dataset
    return [
        trainer.data_collator([data[i] for i in range(start, min(start + size, len(data)))])
        for start in range(0, len(data), size)
    ]


def plain_logps(policy: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(2B,) log-probability of each reply, from the logits, with nothing but PyTorch."""
    logits = policy(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    tokens = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (tokens * batch["completion_mask"][:, 1:]).sum(1)


def by_hand(
    trainer: GroupRobustDPOTrainer, policy: Any, reference: Any, *, size: int, steps: int, lag: bool
) -> tuple[list[torch.Tensor], list[float]]:
    """The trainer's run once more, written out: SGD on DPO, alpha by Algorithm 1 or one step behind it.

    Returns:
        log alpha and the robust loss after each step; ``policy`` is trained in place.
    """
    args, sizes = trainer.args, torch.tensor(trainer.group_weights.group_sizes, dtype=torch.float64)
    q = sizes / sizes.sum()
    log_alpha = torch.full_like(q, 1 / len(q)).log()
    alphas, robust_losses = [], []
    for batch in batches(trainer, size)[:steps]:
        with torch.no_grad():
            ref = plain_logps(reference, batch)
        chosen, rejected = (plain_logps(policy, batch) - ref).chunk(2)
        losses = -torch.nn.functional.logsigmoid(args.beta * (chosen - rejected))
        ids = batch["group_ids"]
        sums = torch.zeros_like(q).index_add_(0, ids, losses.detach().double())
        counts = torch.bincount(ids, minlength=len(q))
        estimate = sums / (len(ids) * q) if args.estimator == "importance" else sums / counts.clamp(min=1)
        moved = (log_alpha + args.group_lr * estimate).log_softmax(0)
        weights = ((log_alpha if lag else moved).exp() / q)[ids]
        log_alpha = moved
        loss = (weights.float() * losses).mean()
        policy.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter -= args.learning_rate * parameter.grad
        alphas.append(log_alpha)
        robust_losses.append(loss.item())
    return alphas, robust_losses


def watch_alpha(trainer: GroupRobustDPOTrainer) -> list[torch.Tensor]:
    """A list that will hold log alpha after every step."""
    seen: list[torch.Tensor] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(trainer.group_weights.log_alpha.clone())

    trainer.add_callback(Watch())
    return seen
