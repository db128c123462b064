"""Real preference pairs, end to end and looked at; GRPO_KERNELS_DATA names their folder if not the usual one."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest

from experiments.hh.prepare import make_pairs
from grpo_kernels.trainer.config import DataConfig, TrainConfig
from grpo_kernels.trainer.data import pair_texts, read_pairs, tokenize_pairs

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("GRPO_KERNELS_DATA", ROOT.parent / "shared" / "data" / "hh_harmless"))
TRAIN, TEST = FOLDER / "train.jsonl", FOLDER / "test.jsonl"
GROUPS = ("1 turn", "2 turns", "3 turns", "4+ turns")

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(
        not (TRAIN.is_file() and TEST.is_file()),
        reason=f"no train.jsonl and test.jsonl in {FOLDER}; python -m experiments.hh.prepare makes them",
    ),
]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def configuration(*overrides) -> TrainConfig:
    """configs/hh_harmless.yaml with overrides by flag, as the command line reads it."""
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TrainConfig)
    files = ["--data.train", str(TRAIN), "--data.test", str(TEST)]
    parsed = parser.parse_args(["--config", str(ROOT / "configs" / "hh_harmless.yaml"), *files, *overrides])
    parsed.pop("config")
    return TrainConfig(**vars(parser.instantiate_classes(parsed)))


def test_the_files_are_what_prepare_makes_of_their_dialogues():
    rows = lines(TRAIN) + lines(TEST)
    dialogues = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]
    pairs, left_out = make_pairs(dialogues)
    assert pairs == rows
    assert not left_out


def test_every_pair_is_read_and_kept_and_its_text_comes_back():
    from grpo_kernels.trainer.model.models import train_tokenizer

    pairs = read_pairs(str(TRAIN), DataConfig())
    tokenizer = train_tokenizer(pair_texts(pairs), 2048)
    held_out = read_pairs(str(TEST), DataConfig())
    # Roomy: nothing is cut, so every text must come back.
    dataset = tokenize_pairs(held_out, tokenizer, DataConfig(max_length=8192, max_prompt_length=6144), GROUPS)
    assert dataset.group_sizes == Counter(row["group"] for row in lines(TEST))
    assert not any(dataset.dropped.values())
    assert not any(dataset.truncated.values())
    for pair, tokens in zip(held_out, dataset, strict=True):
        for reply, ids in ((pair.chosen, tokens.chosen_ids), (pair.rejected, tokens.rejected_ids)):
            assert tokenizer.decode(tokens.prompt_ids + ids) == f"<|bos|>{pair.prompt}{reply}<|eos|>"


def test_the_configuration_is_sound():
    config = configuration()
    config.check()
    assert config.data.max_length <= config.model.tiny.max_positions


def test_a_short_run_learns_and_reports_every_group(tmp_path):
    from grpo_kernels.trainer.loop import train

    config = configuration(
        "--run_dir", str(tmp_path / "run"), "--steps", "60", "--supervised.steps", "60", "--optim.lr", "5e-4",
        "--groups.group_lr", "0.1", "--model.tiny.hidden_size", "64", "--model.tiny.vocab_size", "512",
        "--data.max_length", "128", "--data.max_prompt_length", "64", "--eval_every", "0", "--quiet", "true",
    )  # fmt: skip
    result = train(config)

    report, sizes = result.report, Counter(row["group"] for row in lines(TEST))
    assert report.names == GROUPS
    assert report.n == tuple(sizes[name] for name in GROUPS)
    assert all(math.isfinite(value) for value in (*report.loss, *report.margin))
    assert all(0.3 < accuracy < 0.9 for accuracy in report.accuracy)  # neither broken nor too good to be true
    assert report.worst_group_loss == max(report.loss) >= report.mean_loss
    assert report.worst_group_loss < 0.75  # little is learnt in a minute, and nothing may be lost

    assert set(result.group_weights) == set(GROUPS)
    assert sum(result.group_weights.values()) == pytest.approx(1)
    assert max(result.group_weights.values()) > 0.251  # alpha has moved

    records = lines(tmp_path / "run" / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) / 3 < math.log(2)  # below a coin's
    warm_up = [record["loss"] for record in records if record["kind"] == "supervised"]
    assert warm_up[-1] < 0.85 * math.log(512)  # far below guessing among its words

    assert report.mean_loss < math.log(2)  # the part that was held out shows it too
