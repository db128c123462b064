"""What a run reads cannot make it do anything: no file holds code that is executed, none steers the terminal, none says
where to write; and without a hub name nobody is called."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import GROUPS, tiny_config, write_dropout_model

from grpo_kernels import cli
from grpo_kernels.trainer.config import LoraConfig, ModelConfig, SupervisedConfig
from grpo_kernels.trainer.evaluation import GroupReport
from grpo_kernels.trainer.loop import train
from grpo_kernels.trainer.model.models import load_policy
from grpo_kernels.trainer.run.checkpoint import CheckpointError
from grpo_kernels.trainer.run.terminal import printable

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("grpo_kernels", "experiments") for path in (ROOT / folder).rglob("*.py"))

# What a program says

NEVER_IMPORTED = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "subprocess", "pty"}
NEVER_CALLED = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}


STARTS_PROCESSES = {
    "grpo_kernels/backends/child.py",  # this Python, on this package
    "grpo_kernels/backends/records.py",  # git, with arguments that stand there
    "grpo_kernels/proof/__main__.py",  # only to know an exception of Triton's
}
"""Files that may import subprocess: what they start is not read from anywhere."""


def broken_rules(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in NEVER_IMPORTED]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in NEVER_CALLED or (called == "torch.load" and options.get("weights_only") != "True"):
                found.append(called)
            found += [name for name in ("shell", "allow_pickle") if options.get(name) == "True"]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_in_the_sources_executes_what_is_read(path):
    allowed = {"subprocess"} if path.relative_to(ROOT).as_posix() in STARTS_PROCESSES else set()
    assert set(broken_rules(ast.parse(path.read_text()))) <= allowed


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import os, subprocess", "torch.load(f)", "eval(text)",
        "torch.load(f, weights_only=False)", "yaml.load(f)", "os.system(c)", "numpy.load(f, allow_pickle=True)",
    ],
)  # fmt: skip
def test_the_rules_see_what_they_are_for(code):
    assert broken_rules(ast.parse(code))


# What a file holds


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def bombs(mark: Path) -> dict[str, bytes]:
    """The ways in which torch and Python write pickles."""
    import io

    found = {"pickle": pickle.dumps(Bomb(mark))}
    for name, zipped in (("torch.save", True), ("old torch.save", False)):
        file = io.BytesIO()
        torch.save({"w": torch.zeros(2), "bomb": Bomb(mark)}, file, _use_new_zipfile_serialization=zipped)
        found[name] = file.getvalue()
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that has written everything there is to write, stopped a step short of a second checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny_config(
        folder, steps=4, save_every=2, eval_every=0, supervised=SupervisedConfig(steps=1, batch_size=8)
    )
    config.optim.schedule = "constant"
    config.optim.average_iterates = True
    train(config)
    return config


def test_the_bombs_go_off_where_pickles_are_read(tmp_path):
    for number, bomb in enumerate(bombs(tmp_path / "mark").values()):
        file = tmp_path / f"{number}.bin"
        file.write_bytes(bomb)
        torch.load(file, weights_only=False) if number else pickle.loads(bomb)
        (tmp_path / "mark").rmdir()


FEW = {
    "checkpoints/step-00000004/manifest.json", "checkpoints/step-00000004/model.safetensors", "final/config.json",
    "final/model.safetensors", "config.yaml", "metrics.jsonl",
}  # fmt: skip
"""One of each kind; all of them take a while."""


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("how", "all_files"),
    [
        ("torch.save", False),
        *(pytest.param(how, True, marks=pytest.mark.slow) for how in ("pickle", "torch.save", "old torch.save")),
    ],
)
def test_a_pickle_in_the_place_of_any_file_of_a_run_is_not_executed(finished, tmp_path, capsys, how, all_files):
    mark = tmp_path / "mark"
    bomb = bombs(mark)[how]
    whole = Path(finished.run_dir)
    read = {"checkpoints", "reference", "final", "start", "final-average"}
    files = [
        path.relative_to(whole)
        for path in sorted(whole.rglob("*"))
        if path.is_file() and (path.parent == whole or path.relative_to(whole).parts[0] in read)
    ]
    assert len(files) >= 30
    tried = 0
    for file in files:
        if not all_files and str(file) not in FEW and file.parts[0] != "reference":
            continue
        run = tmp_path / "run"
        shutil.copytree(whole, run)
        (run / file).write_bytes(bomb)
        # The one thing that reads it: going on, evaluating, drawing.
        if file.parts[0] in ("final", "start", "config.yaml", "summary.json"):
            assert cli.main(["eval", str(run)]) in (0, 2)
        elif file.parts[0] == "final-average":
            assert cli.main(["eval", str(run), "--average"]) in (0, 2)
        elif file.parts[0] == "metrics.jsonl":
            assert cli.main(["plot", str(run), "--out", str(tmp_path / "out.png")]) == 2
        else:
            if file.parts[0] == "reference":
                shutil.rmtree(run / "checkpoints")
            with contextlib.suppress(ValueError, CheckpointError):  # as good an end as any here
                train(replace(finished, run_dir=str(run), resume=True))
        capsys.readouterr()
        assert not mark.exists(), file
        shutil.rmtree(run)
        tried += 1
    assert tried == (len(files) if all_files else len(FEW) + 2)


@pytest.mark.parametrize("how", ["pickle", "torch.save", "old torch.save"])
def test_a_models_folder_with_a_pickle_for_weights_is_an_error(finished, tmp_path, how):
    shutil.copytree(Path(finished.run_dir) / "final", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(bombs(tmp_path / "mark")[how])
    with pytest.raises(ValueError, match=r"^model\.name=.* cannot be loaded"):
        load_policy(ModelConfig(name=str(tmp_path / "model")))
    assert not (tmp_path / "mark").exists()


def with_code(folder: Path, mark: Path) -> Path:
    """Give a model's folder a class of its own, in a file beside it."""
    (folder / "modeling_own.py").write_text(
        f"import os\nos.mkdir({str(mark)!r})\nfrom transformers import LlamaForCausalLM as Own\n"
    )
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"},
        "model_type": "own",
        "architectures": ["Own"],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_code_that_comes_with_a_model_is_not_run(finished, tmp_path, capsys):
    shutil.copytree(finished.run_dir, tmp_path / "run")
    folder = with_code(tmp_path / "run" / "final", tmp_path / "mark")
    with pytest.raises(ValueError, match=r"^model\.name=.* cannot be loaded"):
        load_policy(ModelConfig(name=str(folder)))
    # Not even where the run's own configuration says that it may be.
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    assert cli.main(["eval", str(tmp_path / "run")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


def test_a_chat_template_is_kept_in_its_box(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{{ cycler.__init__.__globals__.os.mkdir('" + str(tmp_path / "mark") + "') }}"
        "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    )
    message = {"prompt": [{"role": "user", "content": "q"}], "group": "a"}
    for field in ("chosen", "rejected"):
        message[field] = [{"role": "assistant", "content": field}]
    (tmp_path / "chat.jsonl").write_text(json.dumps(message) + "\n")
    config = tiny_config(tmp_path)
    config.data.train, config.model.chat_template = str(tmp_path / "chat.jsonl"), str(template)
    with pytest.raises(ValueError, match=r"chat\.jsonl:1: the chat template refuses"):
        train(config)
    assert not (tmp_path / "mark").exists()


# Where it writes

EVIL = [
    "../../outside", "/etc/outside", "..", ".", "C:\\outside", "\x1b[2J\x1b[31mred", "line\nbreak\r", "bell\x07\x08",
    "nul\0nul", "\u202ereversed", "\x9b31mcsi", "$\\frac{", "%s{0}", "~", "-rf", "a" * 3000, "名前 😀", "é", "e\u0301",
    "lock", "checkpoints/step-99999999", "\u2028separator", "<b>", "&amp;", "'; DROP", '"quoted"', " \t x",
]  # fmt: skip
"""Names of groups that somebody may have put into a data file."""


def evil_pairs(path: Path) -> Path:
    rows = []
    for number, name in enumerate(EVIL):
        chosen, rejected = GROUPS["many" if number % 2 else "few"]
        for k in range(2):
            rows.append({"prompt": f"{number}", "chosen": f" {chosen} {k}", "rejected": f" {rejected}", "group": name})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def names_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_the_name_of_a_group_says_nothing_of_where_to_write_nor_to_the_terminal(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    config = tiny_config(tmp_path, steps=2, batch_size=4, quiet=False, tensorboard=True)
    config.data.train = config.data.test = str(evil_pairs(tmp_path / "evil.jsonl"))
    before = names_below(tmp_path)
    result = train(config)
    assert set(result.group_weights) == set(EVIL)
    for arguments in (["eval", config.run_dir], ["eval", config.run_dir, "--json"], ["plot", config.run_dir]):
        assert cli.main(arguments) == 0
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert all(c.isprintable() or c == "\n" for c in text)
    assert "red" in said.out  # the names are there, disarmed

    # The same files as a run with names that nobody would mind.
    tame = tiny_config(tmp_path, "tame", steps=2, batch_size=4, quiet=False, tensorboard=True)
    train(tame)
    new = names_below(tmp_path) - before
    ours, theirs = ({stable(name) for name in new if name.startswith(f"{run}/")} for run in ("run", "tame"))
    assert ours - {"report.png"} == theirs
    assert {name for name in new if not name.startswith(("run", "tame"))} == set()


def stable(name: str) -> str:
    """A file's name within its run, without what depends on the clock or the data."""
    inside = name.split("/", 1)[1]
    return inside.split("/")[0] if inside.startswith(("tensorboard", "reference")) else inside


def test_a_table_of_names_that_are_no_words_is_a_table():
    count = len(EVIL)
    numbers = tuple(float(i) for i in range(count))
    table = GroupReport(tuple(EVIL), numbers, numbers, numbers, (1,) * count).table()
    rows = table.split("\n")
    assert len(rows) == count + 4  # head, two rules, the mean
    assert all(row.isprintable() for row in rows)
    assert max(len(row) for row in rows) < 100


def test_what_does_not_print_is_written_out():
    assert printable("a\x1b[31m\nb\u202e\x9b") == "a\\x1b[31m\\nb\\u202e\\x9b"
    assert printable("名前 é 😀") == "名前 é 😀"
    assert printable("x" * 50, 9) == "xxxx…xxxx"
    assert printable("abcdef", 5) == "ab…ef"
    assert printable("abcde", 5) == "abcde"


def test_links_in_a_runs_folder_are_removed_and_not_followed(tmp_path):
    config = tiny_config(tmp_path, steps=1, eval_every=0)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    Path(config.run_dir).mkdir()
    for name in ("lock", "checkpoints", "final", "start", "reference", "metrics.jsonl"):
        (Path(config.run_dir) / name).symlink_to(outside if name != "metrics.jsonl" else outside / "mine.txt")
    (Path(config.run_dir) / "lock").unlink()
    (Path(config.run_dir) / "lock").touch()
    train(replace(config, overwrite=True))
    assert names_below(outside) == {"mine.txt"}
    assert (outside / "mine.txt").read_text() == "mine"


# Whom it calls


def test_without_a_hub_name_nobody_is_called(tmp_path, monkeypatch, capsys):
    peft = pytest.importorskip("peft")
    called = []

    def refuse(*arguments, **more):
        called.append(arguments)
        raise OSError("there is no network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    tiny = tiny_config(tmp_path, "tiny", steps=2, tensorboard=True)
    train(tiny)
    write_dropout_model(tmp_path / "model", ["some words"] * 5)
    adapted = tiny_config(tmp_path, "adapted", steps=2)
    adapted.model = ModelConfig(name=str(tmp_path / "model"), lora=LoraConfig(rank=2))
    train(adapted)
    assert (tmp_path / "adapted" / "final" / "adapter_model.safetensors").is_file(), peft.__version__
    train(replace(adapted, resume=True))
    for run in ("tiny", "adapted"):
        assert cli.main(["eval", str(tmp_path / run)]) == 0
        assert cli.main(["plot", str(tmp_path / run)]) == 0
    assert cli.main(["info"]) == 0
    assert called == []
    # What a hub name does, seen by the same eyes.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between one attempt and the next
    hub = tiny_config(tmp_path, "hub")
    hub.model = ModelConfig(name="nobody-of-this-name/no-such-model")
    with pytest.raises(ValueError, match=r"^model\.name='nobody-of-this-name/no-such-model' cannot be loaded"):
        train(hub)
    assert called


def test_what_a_run_writes_down_is_plain_data(finished):
    """A configuration that YAML's safe loader reads, JSON, and tensors: nothing else is in the folder."""
    run = Path(finished.run_dir)
    kinds = {path.suffix for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    assert kinds == {".yaml", ".json", ".jsonl", ".safetensors", ".jinja"}
    assert yaml.safe_load((run / "config.yaml").read_text())["steps"] == 4
