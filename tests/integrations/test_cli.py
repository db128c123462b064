"""The command line: flags win over the file, a user's error is one line, info works with nothing but torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import tiny_config

from grpo_kernels import __version__, available_backends, cli
from grpo_kernels.trainer.config import TrainConfig

SMALL = [
    "--steps=4", "--batch_size=8", "--eval_every=2", "--log_every=2", "--tensorboard=false", "--optim.lr=0.01",
    "--model.tiny.vocab_size=280", "--model.tiny.hidden_size=16", "--model.tiny.num_layers=1",
    "--model.tiny.num_heads=2", "--data.max_length=32", "--data.max_prompt_length=20",
]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    config = tiny_config(tmp_path)
    return ["--data.train", config.data.train, "--data.test", config.data.test]


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def error(capsys, *arguments):
    """The one line of a user's error."""
    code, _, said = run(capsys, *arguments)
    assert code == 2
    assert said.startswith("grpo-kernels: error: ")
    assert said.count("\n") == 1
    return said


def parse(*arguments):
    return cli._parse(TrainConfig, list(arguments), "usage", "about")


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    pytest.importorskip("jsonargparse")
    file = tmp_path / "config.yaml"
    file.write_text("steps: 7\noptim:\n  lr: 3.0e-3\n  name: sgd\nmodel:\n  lora:\n    rank: 2\n")
    config = parse("--config", str(file), "--optim.lr", "0.5", "--groups.method=dpo", "--run-dir", "somewhere")
    assert isinstance(config, TrainConfig)
    assert (config.steps, config.optim.lr, config.optim.name, config.groups.method) == (7, 0.5, "sgd", "dpo")
    assert config.model.lora.rank == 2
    assert (config.run_dir, config.batch_size) == ("somewhere", TrainConfig().batch_size)


def test_a_switch_needs_no_value():
    pytest.importorskip("jsonargparse")
    config = parse("--resume", "--bf16", "false", "--overwrite=false", "--quiet")
    assert (config.resume, config.bf16, config.overwrite, config.quiet) == (True, False, False, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--optim.lr", "fast", "--data.train", "x"], "optim.lr"),
        (["train", "--data.train", "x", "--nosuch", "1"], "there is no flag --nosuch"),
        (["train", "--data.train", "x", "--loss.bta=3"], "there is no flag --loss.bta; did you mean --loss.beta?"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train"], "data.train must name the training pairs"),
        (["train", "--data.train", "nowhere.jsonl"], "nowhere.jsonl"),
        (["train", "--data.train", "x.jsonl", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["train", "--data.train", "x.jsonl", "--groups.method", "grpo"], "groups.method"),
        (["eval"], "needs the folder of a run, or a model"),
        (["eval", "nowhere"], "'nowhere' is no folder of a run; to evaluate a model of the hub"),
        (["eval", "."], "'.' is the folder of neither a run nor a model"),
        (["eval", "./nowhere", "--data.test", "x.jsonl"], "x.jsonl"),
        (["plot"], "RUN_DIR"),
        (["plot", "nowhere"], "nowhere"),
        (["info", "please"], "info takes no arguments, got please"),
        (["trian"], "there is no command 'trian'; the commands are train, eval, plot, info"),
    ],
)
def test_a_users_error_is_one_line_that_names_it(capsys, tmp_path, monkeypatch, arguments, said):
    pytest.importorskip("jsonargparse")
    monkeypatch.chdir(tmp_path)
    assert said in error(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_leaves_without_taking_its_interpreter_down():
    """Threads of a process group that outlived its destruction could abort it, after all was done."""
    code = "import atexit; from grpo_kernels import cli; atexit.register(print, 'taken down'); cli.run()"
    for rank, arguments, ends in (("0", ["info"], 0), ("1", ["nosuch"], 2), (None, ["info"], 0)):
        environment = {name: value for name, value in os.environ.items() if name != "RANK"}
        environment |= {} if rank is None else {"RANK": rank}
        done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == ends, done.stderr
        assert ("taken down" in done.stdout) == (rank is None)
        assert "backends" in done.stdout or "no command 'nosuch'" in done.stderr  # nothing that was printed is lost


def test_a_fault_of_the_package_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(cli._COMMANDS, "info", lambda arguments: {}["nothing"])
    with pytest.raises(KeyError):
        cli.main(["info"])


def test_train_then_eval_then_plot(capsys, tmp_path, files):
    pytest.importorskip("transformers")
    folder = tmp_path / "run"
    code, out, _ = run(capsys, "train", "--run_dir", folder, *files, *SMALL)
    assert code == 0
    assert "<- worst" in out
    summary = json.loads((folder / "summary.json").read_text())["test"]

    # The run's own pairs, loss and reference: what the run said at its end.
    code, out, err = run(capsys, "eval", folder, "--json")
    assert code == 0
    again = json.loads(out)
    assert err == ""
    for name, group in summary["groups"].items():
        for field, value in group.items():
            assert again["groups"][name][field] == pytest.approx(value, abs=1e-5)

    # A flag over the run's settings; a model's folder without a reference.
    code, out, _ = run(capsys, "eval", folder, "--json", "--loss.beta", "1.0")
    assert json.loads(out)["worst_group_loss"] != pytest.approx(summary["worst_group_loss"], abs=1e-4)
    code, out, _ = run(
        capsys, "eval", folder / "final", *files[2:], "--data.max_length=32", "--data.max_prompt_length=20"
    )
    assert code == 0
    assert "no reference" in out
    assert "<- worst" in out

    code, out, _ = run(capsys, "plot", folder)
    assert code == 0
    assert Path(out.strip()).read_bytes().startswith(b"\x89PNG")

    # What the run was made of, read back as it was written.
    config = parse("--config", str(folder / "config.yaml"))
    assert (config.run_dir, config.steps, config.optim.betas) == (str(folder), 4, (0.9, 0.999))
    assert "exists and is not empty" in error(capsys, "train", "--run_dir", folder, *files, *SMALL)
    assert "unknown group 'nobody'" in error(capsys, "eval", folder, "--data.test", stranger(tmp_path))
    assert "no averaged iterate" in error(capsys, "eval", folder, "--average")


def stranger(folder: Path) -> Path:
    path = folder / "stranger.jsonl"
    path.write_text('{"prompt": "a", "chosen": " b", "rejected": " c", "group": "nobody"}\n')
    return path


def test_help_says_what_there_is(capsys):
    pytest.importorskip("jsonargparse")
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(command in out for command in ("train", "eval", "plot", "info"))
    for command, words in (
        ("train", ["--data.train", "--groups.group_lr", "Go on from the last checkpoint", "flags after the file win"]),
        ("eval", ["--reference", "RUN_DIR|MODEL"]),
        ("plot", ["--titles"]),
    ):
        with pytest.raises(SystemExit) as done:
            cli.main([command, "--help"])
        assert done.value.code == 0
        out = " ".join(capsys.readouterr().out.split())
        assert all(word in out for word in words), command
    assert run(capsys, "--version")[:2] == (0, f"grpo-kernels {__version__}\n")


def test_info_names_every_backend_and_why_it_is_not_there(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert __version__ in out
    for name, reason in available_backends().items():
        line = next(line for line in out.splitlines() if line.split()[:1] == [name] and "here" in line)
        assert ("not here" in line) == (reason is not None)
        assert " ".join((reason or "").split()) in line


def test_info_works_with_nothing_but_torch():
    blocked = [
        "transformers",
        "peft",
        "jsonargparse",
        "yaml",
        "matplotlib",
        "tqdm",
        "safetensors",
        "triton",
        "datasets",
    ]
    program = (
        "import sys\n"
        f"for name in {blocked}: sys.modules[name] = None\n"
        "from grpo_kernels.cli import main\n"
        "assert main(['info']) == 0\n"
        "sys.exit(main(['train', '--data.train', 'x.jsonl']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "backends" in done.stdout
    assert done.returncode == 2
    assert "pip install 'grpo-kernels[train]'" in done.stderr
    assert done.stderr.count("\n") == 1
