"""How a process finds out which rank it is, and what it says where it cannot; how ranks share out work."""

from __future__ import annotations

import pytest
import torch
from torchrun import OURS

from grpo_kernels import cli
from grpo_kernels.trainer.config import DistributedConfig
from grpo_kernels.trainer.model.distributed import ENVIRONMENT, Ranks, open_ranks, transformer_blocks

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in OURS:
        monkeypatch.delenv(name, raising=False)


def enter(strategy="ddp", device="cpu"):
    with open_ranks(DistributedConfig(strategy), device) as ranks:
        return ranks


def test_without_torchrun_there_is_one_rank(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")  # of itself it says nothing of ranks
    ranks = enter()
    assert (ranks.rank, ranks.size, ranks.connected, ranks.first) == (0, 1, False, True)


@pytest.mark.parametrize("missing", ENVIRONMENT)
def test_half_an_environment_is_refused_by_name(monkeypatch, missing):
    for name, value in WHOLE.items():
        if name != missing:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"but not {missing}: start with torchrun"):
        enter()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": "two"}, "RANK must be a number, as torchrun sets it, got 'two'"),
        ({"RANK": "2"}, "RANK must be less than WORLD_SIZE=2, got 2"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE must be a number"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(monkeypatch, change, words):
    for name, value in (WHOLE | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        enter()


def test_sharding_without_ranks_says_how_to_get_some():
    with pytest.raises(ValueError, match=r"distributed\.strategy=fully_shard needs ranks.*torchrun --nproc-per-node"):
        enter("fully_shard")


def test_a_device_of_ones_own_is_refused_to_several_ranks(monkeypatch):
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"device must be 'cuda', 'cpu' or 'auto' for 2 ranks.*'cuda:1'"):
        enter(device="cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="1 CUDA devices, none for LOCAL_RANK=1"):
        enter(device="cuda")


def test_the_command_line_says_it_in_one_line_and_which_rank_it_is(capsys, monkeypatch, tmp_path):
    pytest.importorskip("jsonargparse")
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["train", "--data.train", "x.jsonl", "--run-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("grpo-kernels: error: rank 3: the environment has RANK but not WORLD_SIZE")
    assert said.count("\n") == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.main(["eval", "model", "--data.test", "x.jsonl"]) == 2
    assert "eval runs in one process" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_every_item_is_dealt_once_and_all_ranks_get_equally_many(size, count):
    hands = []
    for rank in range(size):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        hands.append(ranks.deal(list(range(count))))
    assert len({len(hand) for hand in hands}) == 1
    assert sorted(item for hand in hands for item, ours in hand if ours) == list(range(count))


def test_blocks_are_found_by_their_class_or_by_looking():
    class Block(torch.nn.Module):
        pass

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(Block() for _ in range(3))
            self.heads = torch.nn.ModuleList([torch.nn.Linear(1, 1)])

    model = Model()
    assert transformer_blocks(model) == list(model.layers)
    model._no_split_modules = ["Linear"]
    assert transformer_blocks(model) == list(model.heads)
    assert transformer_blocks(torch.nn.Linear(1, 1)) == []
