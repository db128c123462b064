"""``grpo-kernels train`` under torchrun: however many ranks there are and however they hold the model, it is one run.

The scenarios (rank_scenarios.py) share two launches of two processes and one of three; what they leave is compared
with what one process does.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rank_scenarios import add_an_unused_parameter, configured, forget_after, loading, prepare
from tiny_runs import lines
from torchrun import finish, launch, start

from grpo_kernels.trainer.loop import train
from grpo_kernels.trainer.run.checkpoint import load_latest

pytest.importorskip("transformers")
filelock = pytest.importorskip("filelock")

RUNS = [
    "replicated",
    "replicated lora adamw accumulated warm-up categorical",
    "sharded",
    "sharded tied adamw accumulated warm-up",
    "sharded lora adamw lagging",
]
SLOW_RUNS = [
    "replicated tied warm-up",
    "replicated logits accumulated",
    "replicated checkpointed adamw",
    "replicated lora checkpointed",
    "replicated unused adamw",
    "sharded unused adamw",
    "sharded logits accumulated warm-up",
    "sharded lora tied warm-up",
    "sharded checkpointed adamw",
    "sharded tied categorical checkpointed",
]
UNINTERRUPTED = ["replicated dropout accumulated", "sharded dropout"]
RESUMED = ["replicated resumed", "sharded adamw resumed"]
ERRORS = {
    "replicated bad batch size": (["ValueError", "PeerError"], "batch_size must be divisible by the 2 ranks, got 9"),
    "replicated bad warm-up": (
        ["ValueError", "PeerError"],
        "supervised.batch_size must be divisible by the 2 ranks, got 7",
    ),
    "replicated unreadable on one": (["PeerError", "PeerError"], "rank 1: no such file of preference pairs"),
    "sharded other pairs on one": (["ValueError", "PeerError"], "the pairs of data.train must be the same on every"),
    "replicated other settings on one": (["ValueError", "PeerError"], "optim.lr must be the same on every rank"),
    "sharded other model on one": (
        ["ValueError", "PeerError"],
        "the parameters of model.name must be the same on every rank, got something else on rank 1 than on rank 0",
    ),
    "sharded poisoned on one": (["NonFiniteError", "PeerError"], "step 5: the loss of 1 of 12 pairs is not finite"),
    "sharded endless gradient on one": (
        ["NonFiniteError", "PeerError"],
        "every loss is finite, but the gradient is not (norm inf, parameter lm_head.weight first)",
    ),
    "sharded full disk": (["CheckpointError", "PeerError"], "the checkpoint of step 3 cannot be saved"),
}
PROGRAM = Path(__file__).with_name("rank_scenarios.py")


def once(tmp_path_factory, name: str, make):
    """A folder that is made once, whichever process of pytest-xdist comes first."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if base.name.startswith("popen-") else base
    with filelock.FileLock(base / f"{name}.lock"):
        folder = base / name
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / "done").touch()
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def launched(ranks: int, names: list[str], resumed: list[str]):
    def make(folder: Path) -> None:
        prepare(folder, resumed)
        done = launch(ranks, PROGRAM, folder, *names)
        assert done.code == 0, done.err[-4000:]
        (folder / "stderr").write_text(done.err)

    return make


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    names = [*RUNS, *UNINTERRUPTED, *(f"{name} interrupted" for name in UNINTERRUPTED), *RESUMED, *ERRORS]
    return once(tmp_path_factory, "two-ranks", launched(2, names, RESUMED))


def notes(folder: Path, name: str, ranks: int = 2) -> list[dict]:
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(ranks)]


def checkpoint(run_dir: str | Path):
    found = load_latest(Path(run_dir) / "checkpoints")
    assert found is not None
    return found


def alone(folder: Path, name: str):
    """The same run in this process, which no process group knows of."""
    config = configured(folder, name, "one")
    config.distributed.strategy = "ddp"
    with loading(add_an_unused_parameter) if "unused" in name else nullcontext():
        result = train(config)
    return config, result


def assert_equal_to_rounding(run_dir: str | Path, other: str | Path) -> None:
    """Parameters, optimizer, alpha, averages, reference, to a few float32 roundings; every line of the metrics."""
    ours, theirs = checkpoint(run_dir), checkpoint(other)
    assert ours.step == theirs.step == 6
    assert ours.parts.keys() == theirs.parts.keys()
    for part in ours.parts.keys() - {"random"}:
        assert ours.parts[part].keys() == theirs.parts[part].keys()
        for name, tensor in ours.parts[part].items():
            torch.testing.assert_close(tensor, theirs.parts[part][name], rtol=1e-6, atol=1e-6, msg=f"{part} {name}")
    assert_near(lines(run_dir), lines(other))


def assert_near(ours, theirs, where: str = "metrics") -> None:
    """Two values of JSON, their numbers to 1e-5: a loss of 0.7 has float32 steps of 6e-8, and is a mean of many."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_near(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_near(one, other, f"{where}/{i}")
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), where
    else:
        assert ours == theirs, where


def assert_one_run(folder: Path, name: str, ranks: int = 2) -> None:
    first, *others = told = notes(folder, name, ranks)
    assert all("error" not in note for note in told), told
    for other in others:
        assert other["log_alpha"] == first["log_alpha"]  # bit for bit
        assert other["report"] == first["report"]
    if name.startswith("sharded"):
        # What really ran: every parameter a shard, the blocks and the root units of their own.
        assert all(all(note["sharded"]) and note["trained"].startswith("FSDP") and note["units"] == 2 for note in told)
    else:
        assert all(note["trained"] == "DistributedDataParallel" and not any(note["sharded"]) for note in told)
    config, result = alone(folder, name)
    assert_equal_to_rounding(folder / f"many {name}", config.run_dir)
    assert_near(first["report"], result.summary["test"])
    if "warm-up" not in name:
        # Not sharded, sharded, merged: the reference is known by the same name.
        runs = (folder / f"many {name}", result.run_dir)
        files = [{path.name for path in (run / "reference").iterdir()} for run in runs]
        assert files[0] == files[1]


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one_process(two, name):
    assert_one_run(two, name)


@pytest.mark.slow
def test_two_ranks_are_one_process_in_more_ways(tmp_path_factory):
    folder = once(tmp_path_factory, "two-ranks-more", launched(2, SLOW_RUNS, []))
    for name in SLOW_RUNS:
        assert_one_run(folder, name)


def test_the_head_is_fused_on_every_rank(two):
    assert "not fused" not in (two / "stderr").read_text()


@pytest.mark.parametrize("name", RUNS)
def test_what_ranks_leave_is_what_one_process_leaves(two, name):
    transformers = pytest.importorskip("transformers")
    folder = two / f"many {name}"
    # The adapters of a model that has a name stay adapters; those of the embedded one are merged, as in one process.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "final")
    assert type(model).__name__ in ("LlamaForCausalLM", "GPT2LMHeadModel")
    saved = checkpoint(folder).parts["model"]
    if "lora" not in name:
        assert all(torch.equal(parameter, saved[key]) for key, parameter in model.named_parameters())
    names = {path.name for path in folder.iterdir()}
    assert names - {"start", "final-average"} == {
        "checkpoints", "config.yaml", "final", "lock", "metrics.jsonl", "reference", "summary.json",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert "FSDP" not in summary["model"]["architecture"]
    assert summary["model"]["parameters"] > 5000  # in full, not a shard's


@pytest.mark.parametrize("name", UNINTERRUPTED)
def test_on_as_many_ranks_an_interrupted_run_goes_on_bit_for_bit(two, name):
    told = notes(two, f"{name} interrupted")
    assert [note["first"]["error"] for note in told] == [["RuntimeError", "the power went"]] * 2
    whole, again = checkpoint(two / f"many {name}"), checkpoint(two / f"many {name} interrupted")
    for part, tensors in whole.parts.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, again.parts[part][key]), (part, key)
    assert whole.scalars["random"] == again.scalars["random"]
    # Dropout does not do the same on both ranks.
    streams = whole.parts["random"]
    generators = [torch.Generator() for _ in range(2)]
    for rank, generator in enumerate(generators):
        generator.set_state(streams[f"{rank}/torch"])
    assert not torch.equal(*(torch.rand(8, generator=generator) for generator in generators))
    for file in ("metrics.jsonl", "final/model.safetensors"):
        ours, theirs = (two / f"many {run}" / file for run in (name, f"{name} interrupted"))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_of_one_process_goes_on_on_two(two, name):
    assert_one_run(two, name)


@pytest.mark.parametrize("name", ["replicated", "sharded", "sharded tied adamw accumulated warm-up"])
def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(two, name, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two / f"many {name}", folder)
    forget_after(folder, 3)
    config = replace(configured(two, name, "many"), run_dir=str(folder), resume=True)
    config.distributed.strategy = "ddp"
    train(config)
    assert_equal_to_rounding(folder, two / f"many {name}")


@pytest.mark.parametrize("name", ERRORS)
def test_what_goes_wrong_on_one_rank_ends_all_with_its_words(two, name):
    kinds, words = ERRORS[name]
    told = notes(two, name)
    assert [note["error"][0] for note in told] == kinds
    assert all(words in note["error"][1] for note in told), told
    assert all(note["seconds"] < 20 for note in told)
    if kinds[0] in ("ValueError", "PeerError"):  # what can be told before anything is written
        assert not (two / f"many {name}").exists()


def test_a_rank_that_is_killed_ends_the_others_and_three_ranks_go_on(tmp_path):
    prepare(tmp_path, [])
    name = "replicated"
    config = configured(tmp_path, name, "many")
    whole, _ = alone(tmp_path, name)
    # As a user would write it; the rest of the configuration is that of a run before.
    arguments = [
        "train", "--config", f"{whole.run_dir}/config.yaml", "--run-dir", config.run_dir, "--quiet=false",
    ]  # fmt: skip
    began = time.monotonic()
    done = launch(2, PROGRAM, "lose-a-rank", *arguments, seconds=90)
    assert done.code != 0
    assert time.monotonic() - began < 60
    assert "Signal 9 (SIGKILL)" in done.err
    assert checkpoint(config.run_dir).step == 3

    arguments += ["--resume", "--distributed.strategy", "fully_shard"]
    done = launch(3, "-m", "grpo_kernels.cli", *arguments)
    assert done.code == 0, done.err[-4000:]
    assert_equal_to_rounding(config.run_dir, whole.run_dir)
    # One voice.
    assert done.err.count("resuming after step 3") == 1
    assert done.out.count("<- worst") == 2  # the last iterate and the average
    assert done.out.count("the model is in") == 1


def endless_run(folder: Path, *arguments: object):
    """Two ranks that have saved their first checkpoint and would go on; the process of torchrun, and theirs."""
    prepare(folder, [])
    config = configured(folder, "replicated", "many")
    alone(folder, "replicated")
    given = ["--config", folder / "one replicated" / "config.yaml", "--run-dir", config.run_dir, *arguments]
    process = start(2, "-m", "grpo_kernels.cli", "train", *given, "--steps", 100_000, "--eval-every", 0)
    deadline = time.monotonic() + 90
    while not (Path(config.run_dir) / "checkpoints" / "step-00000003").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(ranks) == 2
    return process, config, ranks


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["torchrun", "a rank"])
def test_being_told_to_stop_ends_all_of_them(tmp_path, whom):
    process, config, ranks = endless_run(tmp_path)
    os.kill(process.pid if whom == "torchrun" else ranks[1], signal.SIGTERM)
    assert finish(process, 60).code != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert checkpoint(config.run_dir).step >= 3


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fully_shard"])
def test_torchrun_with_one_process_is_one_process(tmp_path, strategy):
    prepare(tmp_path, [])
    whole, _ = alone(tmp_path, "replicated")
    run_dir = tmp_path / "under torchrun"
    given = ["--config", f"{whole.run_dir}/config.yaml", "--run-dir", run_dir, "--distributed.strategy", strategy]
    done = launch(1, "-m", "grpo_kernels.cli", "train", *given)
    assert done.code == 0, done.err[-4000:]
    assert_equal_to_rounding(run_dir, whole.run_dir)


@pytest.mark.slow
def test_a_rank_that_hangs_is_waited_for_as_long_as_configured(tmp_path):
    process, config, ranks = endless_run(tmp_path, "--distributed.timeout-minutes", 0.1)
    os.kill(ranks[1], signal.SIGSTOP)
    began = time.monotonic()
    # Six seconds, and the half minute that torchrun gives a process before it is killed.
    assert finish(process, 90).code != 0
    assert time.monotonic() - began > 5
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert checkpoint(config.run_dir).step >= 3
