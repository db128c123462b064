"""Runs that are killed, at random moments and at every call that changes a file, and gone on with: nothing is lost.

A killed run that is gone on with ends as one that was left alone: the same bits of parameters, optimizer, alpha, random
streams and reference, the same bytes of metrics and of the trained models.  What a save had said was saved is there.

    make test           5 kills
    make test-slow      20 kills, and one at every seventh call
    make test-nightly   100 kills, and one before and one after every call
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from victims import AFTER, BEFORE, KINDS, Victims, assert_same_end, build_shim, config_of, latest, moment, prepare

from grpo_kernels.trainer.loop import train
from grpo_kernels.trainer.run.directory import RunDirectory

pytest.importorskip("transformers")

NIGHTLY = os.environ.get("GRPO_KERNELS_NIGHTLY") == "1"
SEED = int(os.environ.get("GRPO_KERNELS_SEED", "0"))


class Kills:
    """Runs to compare with, and what was done to others.

    Args:
        folder: for all of it.
    """

    def __init__(self, folder: Path) -> None:
        prepare(folder)
        self.folder = folder
        self.victims = Victims(folder, build_shim(folder))
        self.calls: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.moments: Counter[str] = Counter()
        self.finished = 0
        for kind in KINDS:
            self.victims.run(kind, folder / "to get warm")
            began = time.monotonic()
            end = self.victims.run(kind, folder / f"whole {kind}")
            self.seconds[kind] = time.monotonic() - began
            assert end.status == 0, end.said
            assert end.saved == [2, 4, 6]
            self.calls[kind] = end.calls
            shutil.rmtree(folder / "to get warm")

    def clock(self, kind: str, run_dir: Path, rng: random.Random, number: int, **more) -> bool:
        """Start a run and send it a signal at some time; False if it was over before."""
        process = self.victims.start(kind, run_dir, **more)
        time.sleep(rng.uniform(0, self.seconds[kind]))
        os.kill(process, number)
        return self.check(kind, run_dir, number)

    def call(self, kind: str, run_dir: Path, mode: int, at: int, **more) -> bool:
        """Start a run that is killed at a call; False if it does not get there."""
        self.victims.start(kind, run_dir, mode=mode, at=at, **more)
        return self.check(kind, run_dir, signal.SIGKILL)

    def check(self, kind: str, run_dir: Path, number: int) -> bool:
        end = self.victims.end()
        if end.status == 0:
            return False
        expected = {signal.SIGKILL: -9, signal.SIGTERM: -15, signal.SIGINT: 130}[signal.Signals(number)]
        assert end.status == expected, end.said
        self.moments[moment(run_dir)] += 1
        found = latest(run_dir)
        assert found >= max(end.saved, default=0), "a save said that it was done, and is not there"
        return True

    def finish(self, kind: str, run_dir: Path) -> None:
        """Go on to the end, and compare it with that of the run nobody killed."""
        end = self.victims.run(kind, run_dir, resume=True)
        assert end.status == 0, end.said
        assert_same_end(run_dir, self.folder / f"whole {kind}")
        self.finished += 1
        shutil.rmtree(run_dir)


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    kills = Kills(tmp_path_factory.mktemp("kills"))
    with kills.victims:
        yield kills
    print(f"\nkilled {sum(kills.moments.values())} times: {dict(kills.moments.most_common())}")
    print(f"went on and ended as the run nobody killed: {kills.finished}")


@pytest.mark.parametrize(
    "count", [pytest.param(5, id="5"), pytest.param(100 if NIGHTLY else 20, id="many", marks=pytest.mark.slow)]
)
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(kills, count):
    rng = random.Random(f"kills {SEED}")
    done = 0
    while done < count:
        kind, run_dir = KINDS[done % 2], kills.folder / f"killed {done}"
        resume = False
        # Killed once, and possibly again and again on the way.
        while True:
            if kills.victims.shim is not None and rng.random() < 0.5:
                mode, at = rng.choice((BEFORE, AFTER)), rng.randint(1, kills.calls[kind])
                killed = kills.call(kind, run_dir, mode, at, resume=resume)
            else:
                killed = kills.clock(kind, run_dir, rng, signal.SIGKILL, resume=resume)
            done += killed
            resume = run_dir.exists()
            if done >= count or rng.random() < 0.5:
                break
        if resume:
            kills.finish(kind, run_dir)
    assert done == count


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_any_call_that_changes_a_file_ends_as_if_it_had_not_been(kills, kind):
    if kills.victims.shim is None:
        pytest.skip("needs Linux and a C compiler")
    stride = 1 if NIGHTLY else 7
    modes = (BEFORE, AFTER) if NIGHTLY else (AFTER,)
    died = 0
    for at in range(1, kills.calls[kind] + 1, stride):
        for mode in modes:
            run_dir = kills.folder / f"called {kind}"
            if kills.call(kind, run_dir, mode, at):
                died += 1
            kills.finish(kind, run_dir)
    # TensorBoard writes from a thread of its own, and so not always as often.
    assert died >= len(range(1, kills.calls[kind] + 1, stride)) * len(modes) * 0.9


@pytest.mark.parametrize(
    "count", [pytest.param(2, id="2"), pytest.param(100 if NIGHTLY else 20, id="many", marks=pytest.mark.slow)]
)
def test_a_run_that_is_told_to_end_goes_on_as_if_it_had_not_been(kills, count):
    rng = random.Random(f"signals {SEED}")
    done = 0
    while done < count:
        number = (signal.SIGTERM, signal.SIGINT)[done % 2]  # the latter is Ctrl-C
        kind, run_dir = rng.choice(KINDS), kills.folder / f"ended {done}"
        done += kills.clock(kind, run_dir, rng, number)
        kills.finish(kind, run_dir)


def test_a_run_keeps_others_out_of_its_folder_until_it_is_dead(kills, tmp_path):
    run_dir = tmp_path / "run"
    process = kills.victims.start("plain", run_dir)
    while not (run_dir / "config.yaml").exists():
        time.sleep(0.001)
    os.kill(process, signal.SIGSTOP)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    for changes in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match=r"run_dir .* is in use: another run holds its lock"):
            train(config_of("plain", kills.folder, run_dir, **changes))
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    os.kill(process, signal.SIGKILL)
    assert kills.victims.end().status == -signal.SIGKILL
    kills.finish("plain", run_dir)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.warns(UserWarning, match=r"without locks \(No locks available\): nothing keeps another run from"),
        RunDirectory(tmp_path / "run"),
    ):
        pass
