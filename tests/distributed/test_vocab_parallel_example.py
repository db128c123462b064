"""``examples/tensor_parallel.py`` takes the same steps on any number of processes, whatever each of them holds."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("transformers")

from torchrun import launch

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "tensor_parallel.py"


def numbers(out):
    """Loss, accuracy and alpha of every group, in the end."""
    found = re.findall(r"(\w+)  loss ([\d.]+)  accuracy ([\d.]+)  alpha ([\d.]+)", out.split("\nheld out, after ")[1])
    assert [name for name, *_ in found] == ["newcomers", "hobbyists", "experts"]
    return [float(number) for _, *row in found for number in row]


def on_ranks(ranks, *flags):
    done = launch(ranks, PROGRAM, *flags)
    assert done.code == 0, done.err
    return done.out


@pytest.fixture
def alone(monkeypatch, capsys, tmp_path):
    """Runs the program in this process, the only one of its group."""

    def run(*flags):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), *map(str, flags)])
        start = dist.init_process_group

        def meet_in_a_file(backend):
            start(backend, f"file://{tmp_path}/meet", rank=0, world_size=1)

        monkeypatch.setattr(dist, "init_process_group", meet_in_a_file)
        runpy.run_path(str(PROGRAM), run_name="__main__")
        return capsys.readouterr().out

    yield run
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_model_on_two_processes_is_a_model_on_one(alone):
    shared = on_ranks(2, "--steps", 4)
    assert "1 x 2 processes on cpu, 192 of 384 words' rows on the first" in shared
    # Sums in another order, printed to three digits.
    assert numbers(shared) == pytest.approx(numbers(alone("--steps", 4, "--head", "logits")), abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--tensor", 2), ("--tensor", 2, "--head", "logits"), ()])
def test_and_on_four_in_any_arrangement(alone, flags):
    shared = on_ranks(4, "--steps", 4, *flags)
    assert numbers(shared) == pytest.approx(numbers(alone("--steps", 4)), abs=2e-3)


def test_without_torchrun_it_says_how_it_is_started(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(PROGRAM)])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    assert ended.value.code == 2
    assert "start it with torchrun: torchrun --standalone" in capsys.readouterr().err
