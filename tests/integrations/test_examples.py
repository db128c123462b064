"""Every program in examples/ runs as it stands, without a network, and does what its first lines say."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).resolve().parents[2] / "examples"
sys.path.append(str(FOLDER.parent / "tests" / "distributed"))

from torchrun import finish, start  # noqa: E402

PROGRAMS = {path.name for path in FOLDER.glob("*.py")}
RUN_HERE = {"plain_pytorch.py", "hf_trainer.py", "torchrun_fsdp2.py"}
RUN_ELSEWHERE = {"trl_dpo.py", "tensor_parallel.py"}
"""By tests of their own: ``test_trl_example.py``, ``test_vocab_parallel_example.py``."""
NEEDS = {"hf_trainer.py": "accelerate", "trl_dpo.py": "trl"}


class Result(NamedTuple):
    """What a program said in the end."""

    table: dict[str, tuple[float, float, float]]
    """Loss, accuracy and alpha by group."""
    worst: float
    """Loss of the worst group."""


def read(out: str) -> Result:
    end = out.split("\nheld out, after ")[1]
    found = re.findall(r"(\w+)  loss ([\d.]+)  accuracy ([\d.]+)  alpha ([\d.]+)", end)
    table = {name: tuple(float(number) for number in numbers) for name, *numbers in found}
    assert set(table) == {"newcomers", "hobbyists", "experts"}
    return Result(table, float(re.search(r"worst group: .*loss ([\d.]+)", end)[1]))


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a program in this process and gives its output."""

    def started(name, *flags):
        if name in NEEDS:
            pytest.importorskip(NEEDS[name])
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return started


def end_of(process):
    done = finish(process, seconds=120)
    assert done.code == 0, done.err
    return done.out


def assert_close(found: Result, expected: Result) -> None:
    """Sums in another order, printed to three digits."""
    for group, numbers in expected.table.items():
        assert found.table[group] == pytest.approx(numbers, abs=2e-3)


def test_every_program_is_run_by_a_test():
    assert PROGRAMS == RUN_HERE | RUN_ELSEWHERE, "a new program: run it in a test, and say here where"
    assert set(re.findall(r"`(\w+\.py)`", (FOLDER / "README.md").read_text())) == PROGRAMS


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_help_says_how_it_is_started_and_what_every_flag_does(name, run, capsys):
    with pytest.raises(SystemExit) as ended:
        run(name, "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"examples/{name}" in text
    assert "--group_lr" in text


def test_the_plain_loop_serves_its_worst_group_better_than_dpo(run):
    flags = ("plain_pytorch.py", "--steps", 40)
    plain, robust = read(run(*flags, "--method", "dpo")), read(run(*flags))
    assert robust.worst < plain.worst
    assert robust.table["experts"][2] > 1 / 3 > plain.table["experts"][2]


def test_the_plain_loop_goes_on_where_it_was_left(run, tmp_path):
    whole = read(run("plain_pytorch.py", "--steps", 6))
    checkpoint = tmp_path / "state.pt"
    run("plain_pytorch.py", "--steps", 3, "--checkpoint", checkpoint)
    again = run("plain_pytorch.py", "--steps", 6, "--checkpoint", checkpoint)
    assert "going on after step 3" in again
    assert read(again) == whole


def test_the_plain_loop_takes_a_model_and_pairs_of_ones_own(run, tmp_path):
    config = transformers.GPT2Config(vocab_size=384, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "model")
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for i in range(12):
            group = ("newcomers", "hobbyists", "experts")[i % 3]
            pair = {"prompt": f"{i}?", "chosen": " yes", "rejected": " no", "group": group}
            file.write(json.dumps(pair) + "\n")
    data = ("--train", tmp_path / "pairs.jsonl", "--test", tmp_path / "pairs.jsonl", "--batch_size", 6)
    result = read(run("plain_pytorch.py", "--model", tmp_path / "model", *data, "--steps", 20))
    assert all(accuracy == 1 for _, accuracy, _ in result.table.values())


def test_the_trainer_serves_its_worst_group_better_than_dpo(run, tmp_path):
    flags = ("hf_trainer.py", "--steps", 40, "--output_dir")
    plain = read(run(*flags, tmp_path / "dpo", "--method", "dpo"))
    robust = read(run(*flags, tmp_path / "gr_dpo"))
    assert robust.worst < plain.worst
    assert robust.table["experts"][2] > 1 / 3 > plain.table["experts"][2]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_goes_on_where_it_was_left_alpha_and_all(run, tmp_path, accumulation):
    flags = ("hf_trainer.py", "--steps", 6, "--accumulation", accumulation, "--output_dir", tmp_path)
    whole = read(run(*flags))
    (tmp_path / "checkpoint-6").rename(tmp_path / "gone")
    assert (tmp_path / "checkpoint-3" / "group_weights.pt").exists()
    assert read(run(*flags, "--resume")) == whole


def test_the_trainer_in_parts_or_on_two_ranks_is_the_trainer_at_once(run, tmp_path):
    def flags(name, batch_size):
        return ("--steps", 6, "--batch_size", batch_size, "--output_dir", tmp_path / name)

    ranks = start(2, FOLDER / "hf_trainer.py", *flags("ranks", 8))
    at_once = read(run("hf_trainer.py", *flags("at once", 16)))
    assert_close(read(end_of(ranks)), at_once)
    # Alpha that moves lags by one step in parts; alpha that is fixed is the same.
    fixed = read(run("hf_trainer.py", *flags("fixed", 16), "--method", "is_dpo"))
    in_parts = read(run("hf_trainer.py", *flags("in parts", 8), "--method", "is_dpo", "--accumulation", 2))
    assert_close(in_parts, fixed)
    moving = read(run("hf_trainer.py", *flags("moving", 8), "--accumulation", 2))
    assert moving.table["experts"][2] == pytest.approx(at_once.table["experts"][2], abs=0.05)
    assert moving.table["experts"][2] != pytest.approx(1 / 3, abs=0.01)


def test_fsdp2_on_two_ranks_is_one_and_goes_on_with_another_number(tmp_path):
    program = FOLDER / "torchrun_fsdp2.py"
    uninterrupted, first_half = (
        start(2, program, "--steps", 6),
        start(2, program, "--steps", 3, "--checkpoint", tmp_path),
    )
    whole = end_of(uninterrupted)
    assert "2 processes on cpu, 65696 of 131392 numbers on each" in whole
    end_of(first_half)
    again = end_of(start(1, program, "--steps", 6, "--checkpoint", tmp_path))
    assert "going on after step 3" in again
    assert_close(read(again), read(whole))
    assert {path.name for path in tmp_path.iterdir()} == {"step-3", "step-6"}


def test_fsdp2_without_torchrun_says_how_it_is_started(run, capsys):
    with pytest.raises(SystemExit) as ended:
        run("torchrun_fsdp2.py")
    assert ended.value.code == 2
    assert "start it with torchrun: torchrun --standalone" in capsys.readouterr().err
