"""Runs small enough for a test: pairs of three groups that disagree, and a model of a few thousand parameters."""

from __future__ import annotations

import json
import random
from pathlib import Path

from grpo_kernels.trainer.config import (
    DataConfig,
    GroupsConfig,
    ModelConfig,
    OptimConfig,
    TinyModelConfig,
    TrainConfig,
)

GROUPS = {"many": ("sun", "rain"), "some": ("sun", "rain"), "few": ("rain", "sun")}
"""What each group chooses, and rejects."""


def write_pairs(path: Path, num_pairs: int, seed: int) -> Path:
    """Pairs of uneven groups, every group among them."""
    rng = random.Random(seed)
    names = [*GROUPS, *rng.choices(list(GROUPS), weights=[6, 3, 1], k=num_pairs - len(GROUPS))]
    rows = []
    for name in names:
        chosen, rejected = GROUPS[name]
        rows.append(
            {
                "prompt": f"weather {rng.randint(0, 9)} ?",
                "chosen": f" {chosen} {rng.randint(0, 99)}",
                "rejected": f" {rejected}" * rng.randint(1, 3),
                "group": name,
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_config(folder: Path, name: str = "run", **changes) -> TrainConfig:
    """A run of 8 steps of 8 out of 30 pairs: it ends in its third epoch, within it."""
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    if not train.exists():
        write_pairs(train, 30, seed=1)
        write_pairs(test, 12, seed=2)
    settings = {
        "run_dir": str(folder / name),
        "quiet": True,
        "tensorboard": False,
        "steps": 8,
        "batch_size": 8,
        "eval_every": 3,
        "save_every": 3,
        "log_every": 2,
        "model": ModelConfig(
            tiny=TinyModelConfig(vocab_size=280, hidden_size=16, num_layers=1, num_heads=2, max_positions=64)
        ),
        "data": DataConfig(train=str(train), test=str(test), max_length=32, max_prompt_length=20),
        "groups": GroupsConfig(group_lr=0.05),
        "optim": OptimConfig(lr=1e-2),
        **changes,
    }
    return TrainConfig(**settings)


def write_dropout_model(folder: Path, texts: list[str], dropout: float = 0.2) -> Path:
    """A folder with a tiny GPT-2 that has dropout, tied embeddings and biases, and its tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from grpo_kernels.trainer.model.models import train_tokenizer

    tokenizer = train_tokenizer(texts, 280)
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def die_at(monkeypatch, step: int, error: BaseException | None = None) -> None:
    """Let the batch of a step raise, as if the process ended there."""
    from grpo_kernels.trainer.data.sampling import GroupSampler

    whole = GroupSampler.batch

    def batch(self, number):
        if number == step:
            raise error if error is not None else RuntimeError("the power went")
        return whole(self, number)

    monkeypatch.setattr(GroupSampler, "batch", batch)


def lines(run_dir: str | Path) -> list[dict]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder with its bytes, None for what is no file."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
