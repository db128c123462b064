"""Training runs that can be killed: a process that has imported everything forks one for each run, in a moment.

As a program this is that process.  It reads jobs from its standard input, a line of JSON each, and says on its standard
output that a run has started and how it ended.  Tests use :class:`Victims`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_runs import tiny_config, write_dropout_model, write_pairs

from grpo_kernels.trainer.config import ModelConfig, OptimConfig, SupervisedConfig, TrainConfig
from grpo_kernels.trainer.run.checkpoint import load_latest

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("plain", "everything")

COUNT, BEFORE, AFTER, FULL, HALF = range(5)
"""What disk_shim.c does at its call: nothing, kill before or after it, find the disk full there or in its midst."""


def config_of(kind: str, folder: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    """A run: plain as can be, or with a warm-up, dropout, accumulation, a projection and an average."""
    config = tiny_config(folder, run_dir=str(run_dir), steps=6, save_every=2, log_every=1, tensorboard=False, **changes)
    config.device = "cpu"
    if kind == "everything":
        config.model = ModelConfig(name=str(folder / "dropout"))
        config.supervised = SupervisedConfig(steps=2, batch_size=4)
        config.optim = OptimConfig(
            name="sgd", lr=0.1, momentum=0.5, projection="start", projection_radius=0.05, average_iterates=True
        )
        config.micro_batch_size = 4
        config.sampling = "categorical"
        config.tensorboard = True
    return config


def prepare(folder: Path) -> None:
    """Everything that runs read."""
    write_pairs(folder / "train.jsonl", 30, seed=1)
    write_pairs(folder / "test.jsonl", 12, seed=2)
    write_dropout_model(folder / "dropout", (folder / "train.jsonl").read_text().splitlines())


def build_shim(folder: Path) -> Path | None:
    """disk_shim.c as a library; None where it cannot be built or loaded."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None:
        return None
    library = folder / "disk_shim.so"
    source = Path(__file__).with_name("disk_shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@dataclass
class End:
    """How a run ended.

    Args:
        status: exit code, or minus the signal.
        saved: steps whose checkpoints a completed save had said were saved.
        calls: that the shim had counted, where the run came to its end.
        error: type and words of the exception that ended it, if one did.
        said: what it wrote to its standard error.
    """

    status: int
    saved: list[int]
    calls: int
    error: tuple[str, str] | None
    said: str


class Victims:
    """Runs, one at a time; use it as a context manager.

    Args:
        folder: of data, model and notes.
        shim: from :func:`build_shim`.
    """

    def __init__(self, folder: Path, shim: Path | None = None) -> None:
        self.folder, self.shim = folder, shim
        self.notes = folder / "notes.txt"
        paths = [str(ROOT), str(Path(__file__).parent)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
        if shim is not None:
            environment["LD_PRELOAD"] = str(shim)
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Victims:
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.kill()
        self.server.wait()

    def start(
        self, kind: str, run_dir: Path, *, resume: bool = False, mode: int = COUNT, at: int = 0, limit: int = 0
    ) -> int:
        """Start a run and return its process id.

        The disk goes bad at call ``at`` below the run's folder; or no file may be longer than ``limit`` bytes.
        """
        self.notes.write_text("")
        job = {"kind": kind, "run_dir": str(run_dir), "resume": resume, "mode": mode, "at": at, "limit": limit}
        job |= {"folder": str(self.folder), "shim": self.shim is not None}
        return int(self._ask(json.dumps(job)))

    def end(self) -> End:
        """Wait for the end of the run."""
        status = int(self._ask(""))
        notes = [json.loads(line) for line in self.notes.read_text().splitlines()]
        saved = [note["saved"] for note in notes if "saved" in note]
        calls = next((note["calls"] for note in notes if "calls" in note), 0)
        error = next((tuple(note["error"]) for note in notes if "error" in note), None)
        return End(status, saved, calls, error, self.notes.with_suffix(".err").read_text())

    def run(self, kind: str, run_dir: Path, **more: Any) -> End:
        """A run from its start to its end."""
        self.start(kind, run_dir, **more)
        return self.end()

    def _ask(self, words: str) -> str:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(words + "\n")
        self.server.stdin.flush()
        line = self.server.stdout.readline()
        assert line, "the server of victims is gone"
        return line


def serve() -> None:
    """Fork a process for every job; it is the caller's to kill it."""
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401 - what each run would import by itself
    from torch.utils import tensorboard  # noqa: F401

    from grpo_kernels.trainer import loop

    torch.set_num_threads(1)
    while line := sys.stdin.readline():
        job = json.loads(line)
        process = os.fork()
        if process == 0:
            _be_a_victim(job, loop)
        print(process, flush=True)
        sys.stdin.readline()  # until then the number belongs to the run, over or not, and can be sent signals
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _be_a_victim(job: dict[str, Any], loop: Any) -> None:
    folder = Path(job["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(folder / "notes.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    notes = os.open(folder / "notes.txt", os.O_WRONLY | os.O_APPEND)

    def note(**values: Any) -> None:
        os.write(notes, (json.dumps(values) + "\n").encode())

    save = loop.save_checkpoint

    def save_and_tell(where: Path, checkpoint: Any, **more: Any) -> Path:
        path = save(where, checkpoint, **more)
        note(saved=checkpoint.step)
        return path

    loop.save_checkpoint = save_and_tell
    shim = ctypes.CDLL(None) if job["shim"] else None
    code, unlimited = 0, resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        config = config_of(job["kind"], folder, Path(job["run_dir"]), resume=job["resume"])
        if shim is not None:
            shim.shim_arm(job["run_dir"].encode(), ctypes.c_int(job["mode"]), ctypes.c_long(job["at"]))
        if job["limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], unlimited[1]))
        loop.train(config)
        if shim is not None:
            shim.shim_calls.restype = ctypes.c_long
            note(calls=shim.shim_calls())
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        traceback.print_exc()
        note(error=(type(error).__name__, str(error)))
        code = 1
    with contextlib.suppress(BaseException):
        sys.stderr.flush()
    os._exit(code)


def moment(run_dir: Path) -> str:
    """What a run was about when it was killed, by what it left."""
    if not run_dir.exists():
        return "before anything was written"
    unfinished = sorted(run_dir.rglob(".*"))
    if unfinished:
        inside = unfinished[0].relative_to(run_dir).parts
        names = {"checkpoints": "a checkpoint", "reference": "the reference"}
        return f"while writing {names.get(inside[0], inside[0].removeprefix('.').split('.')[0])}"
    if not list((run_dir / "checkpoints").glob("step-*")):
        return "before the first checkpoint"
    if (run_dir / "checkpoints" / "step-00000006").exists():
        return "after the last checkpoint"
    return "between checkpoints"


def latest(run_dir: Path) -> int:
    """Step of the last checkpoint, 0 for none; a damaged one would be warned of, and there must be none."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_latest(run_dir / "checkpoints")
    return 0 if found is None else found.step


def assert_same_end(run_dir: Path, whole: Path) -> None:
    ours, theirs = load_latest(run_dir / "checkpoints"), load_latest(whole / "checkpoints")
    assert ours.step == theirs.step == 6
    assert ours.parts.keys() == theirs.parts.keys()
    for part, tensors in theirs.parts.items():
        assert ours.parts[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(ours.parts[part][name], tensor), (part, name)
    for name in theirs.scalars.keys() - {"seconds", "config"}:
        assert ours.scalars[name] == theirs.scalars[name], name
    # The tree alike: nothing missing, nothing left over; of TensorBoard's files there is one a start.
    names = [
        {str(p.relative_to(root)) for p in root.rglob("*") if p.parent.name != "tensorboard"}
        for root in (run_dir, whole)
    ]
    assert names[0] == names[1], names[0] ^ names[1]
    for name in sorted(names[0]):
        one, other = run_dir / name, whole / name
        if one.is_dir() or one.parent.parent.name == "checkpoints":
            continue
        if name == "config.yaml":
            assert one.read_text().replace(str(run_dir), str(whole)) == other.read_text()
        elif name == "summary.json":
            assert timeless(one) == timeless(other)
        else:
            assert one.read_bytes() == other.read_bytes(), name


def timeless(path: Path) -> dict:
    return {name: value for name, value in json.loads(path.read_text()).items() if name != "seconds"}


if __name__ == "__main__":
    serve()
