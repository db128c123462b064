"""The command line: ``grpo-kernels train | eval | plot | info | prove | tune``.

Exit codes: 0; 2 for what the user can put right, in one line on standard error; 1 for a run that failed (a loss that
is not finite) and for a proof in which a kernel was wrong; 3 for a proof without a verdict; 130 when interrupted.
``GRPO_KERNELS_TRACEBACK=1`` shows where an error came from.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

_USAGE = """\
Group Robust (not Relative) Preference Optimization: DPO and IPO that leave no group behind.

usage: grpo-kernels COMMAND ...

  train   train on preference pairs in groups
            grpo-kernels train --config FILE.yaml --data.train PAIRS.jsonl --data.test PAIRS.jsonl
  eval    the per-group table of a finished run, or of any model
            grpo-kernels eval RUN_DIR                 grpo-kernels eval MODEL --data.test PAIRS.jsonl
  plot    held-out loss, accuracy and group weights over time, runs side by side
            grpo-kernels plot RUN_DIR [RUN_DIR ...] --out report.png
  info    versions, devices, which backends are here and whether they are proven
  prove   check the kernels on this machine's device, which backend="auto" does at its first call
            grpo-kernels prove                        grpo-kernels prove --device cuda:1 --backend triton
  tune    blocks, tiles and backends chosen on this device for the shape of your model
            grpo-kernels tune --model FOLDER          grpo-kernels tune --vocab 32000 --hidden 4096

grpo-kernels COMMAND --help says more; --version prints the version.
"""

_TRAIN_ABOUT = """\
Train on preference pairs in groups.  Every setting is a flag, or an entry of a YAML file given with --config; flags
after the file win.  The pairs are JSON objects with prompt, chosen, rejected and group, one a line.

On several devices: torchrun --nproc-per-node N -m grpo_kernels.cli train ...; batch_size counts the pairs of all N
processes together, so that the run goes as it does in one.
"""

_EVAL_ABOUT = """\
Evaluate a finished run (its own test pairs, loss and reference, unless told otherwise) or any model on preference
pairs: loss, reward accuracy and margin of every group, the worst one marked.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from .. import __version__

        print(f"grpo-kernels {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    command = _COMMANDS.get(name)
    if command is None:
        return _fail(f"there is no command {name!r}; the commands are {', '.join(_COMMANDS)}")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _guarded(command, rest)


def _guarded(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    try:
        return command(arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("GRPO_KERNELS_TRACEBACK"):
            raise
        code = _exit_code(error)
        if code is None:
            raise
        if _is_peers(error) and _rank() > 0:
            # The first rank says it; torchrun ends all ranks as soon as one is gone, so it gets the time to.
            time.sleep(1)
            return code
        return _fail(str(error) or type(error).__name__, code)


def _exit_code(error: Exception) -> int | None:
    """2 for what the user can put right, 1 for a run that failed, None for a fault of this package."""
    from ..types import UnavailableBackendError

    if isinstance(error, (ValueError, TypeError, ImportError, OSError, UnavailableBackendError)):
        return 2
    if _is_peers(error):
        fault = isinstance(error.__cause__, Exception) and _exit_code(error.__cause__) is None
        return None if fault else 1
    module = sys.modules.get("grpo_kernels.trainer.run.checkpoint")
    if module is not None and isinstance(error, module.CheckpointError):
        return 2
    module = sys.modules.get("grpo_kernels.trainer.model.optim")
    return 1 if module is not None and isinstance(error, module.NonFiniteError) else None


def _is_peers(error: Exception) -> bool:
    """Whether it went wrong on another rank, or on all."""
    module = sys.modules.get("grpo_kernels.trainer.model.distributed")
    return module is not None and isinstance(error, module.PeerError)


def _rank() -> int:
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def _fail(message: str, code: int = 2) -> int:
    who = f"rank {_rank()}: " if _rank() > 0 else ""
    _say(f"error: {who}{message}")
    return code


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    if _rank() > 0:
        return  # the first rank has the same to say
    _say(f"warning: {message}")


def _say(text: str) -> None:
    from ..trainer.run.terminal import printable

    # One line, whatever a message quotes out of a file.
    print(f"grpo-kernels: {printable(' '.join(text.split()))}", file=sys.stderr)


def _train(arguments: list[str]) -> int:
    from ..trainer.config import TrainConfig

    config = _parse(
        TrainConfig, arguments, "grpo-kernels train [--config FILE.yaml] [--SECTION.SETTING VALUE ...]", _TRAIN_ABOUT
    )
    from ..trainer.loop import train

    train(config)
    if not config.quiet and _rank() == 0:
        print(f"\nthe model is in {Path(config.run_dir) / 'final'}; grpo-kernels plot {config.run_dir} draws the run")
    return 0


def _eval(arguments: list[str]) -> int:
    from ..trainer.evaluate_model import EvalConfig, defaults_for, evaluate_model, groups_of, is_run

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("eval runs in one process: start it without torchrun")
    usage = "grpo-kernels eval RUN_DIR|MODEL [--data.test FILE] [--reference MODEL] [--SECTION.SETTING VALUE ...]"
    target, rest = (
        (arguments[0], arguments[1:]) if arguments and not arguments[0].startswith("-") else (None, arguments)
    )
    if target is None and not {"-h", "--help"} & set(rest):
        raise ValueError(f"eval needs the folder of a run, or a model, first: {usage}")
    average = any(flag in ("--average", "--average=true") for flag in rest)
    defaults = defaults_for(target, average) if target is not None else {}
    config = _parse(EvalConfig, rest, usage, _EVAL_ABOUT, defaults)
    if target is not None and not config.data.test and not is_run(target):
        what = "is the folder of neither a run nor a model" if Path(target).is_dir() else "is no folder of a run"
        if not (Path(target) / "config.json").is_file():
            raise ValueError(f"{target!r} {what}; to evaluate a model of the hub, name pairs with --data.test")
    report = evaluate_model(config, groups_of(target) if target is not None else None)
    if config.json:
        print(json.dumps(report.to_dict(), indent=2))  # in ASCII: the name of a group may hold anything
        return 0
    print(f"{config.model.name} on {config.data.test}")
    against = config.reference or "no reference: margins are plain differences of log-probability"
    print(f"against {against}\n\n{report.table()}")
    return 0


def _plot(arguments: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog="grpo-kernels plot", description="Draw held-out loss, accuracy and group weights, a column a run."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folder of a run; several are put side by side")
    parser.add_argument("--out", help="the picture (.png, .svg, .pdf); report.png in the first run unless told")
    parser.add_argument("--titles", nargs="+", metavar="TITLE", help="one a run; the methods' names unless told")
    parser.add_argument("--heading", help="a line above everything")
    # One line, as everywhere, not argparse's two.
    parser.error = _raise  # type: ignore[method-assign]
    given = parser.parse_args(arguments)
    from ..trainer.report.figure import plot

    out = given.out or Path(given.runs[0]) / "report.png"
    print(plot(given.runs, out, titles=given.titles, heading=given.heading))
    return 0


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _info(arguments: list[str]) -> int:
    from .devices import info

    return info(arguments)


def _prove(arguments: list[str]) -> int:
    from .devices import prove

    return prove(arguments)


def _tune(arguments: list[str]) -> int:
    from .tune import tune

    return tune(arguments)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train, "eval": _eval, "plot": _plot, "info": _info, "prove": _prove, "tune": _tune,
}  # fmt: skip


def _parse(
    kind: type, arguments: list[str], usage: str, description: str, defaults: dict[str, Any] | None = None
) -> Any:
    """A configuration from flags and YAML files."""
    try:
        from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
    except ImportError as error:
        raise ImportError("the trainer's commands need its packages: pip install 'grpo-kernels[train]'") from error

    from .config_file import check_config_file, did_you_mean, is_setting

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="grpo-kernels", usage=usage, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="A YAML file of settings.")
    parser.add_class_arguments(kind)
    try:
        parser.set_defaults(defaults or {})
    except KeyError as error:
        raise ValueError(f"the configuration of the run is not one of this version: {error.args[0]}") from error
    settings = list(parser.get_defaults().keys())
    for name in _config_files(arguments):
        check_config_file(name, settings)
    switches = {f"--{f.name}" for f in fields(kind) if f.type in (bool, "bool")}
    arguments = _with_values(arguments, switches)
    try:
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        flags = (argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--"))
        wrong = next((flag for flag in flags if not is_setting(flag, [*settings, "help"])), None)
        if wrong is not None and "unrecognized" in str(error):
            hint = did_you_mean(f"--{wrong}", [f"--{name}" for name in settings])
            raise ValueError(f"there is no flag --{wrong}{hint}") from error
        raise ValueError(str(error)) from error
    for f in fields(kind):
        if is_dataclass(f.default_factory) and not hasattr(parsed[f.name], "keys"):
            raise ValueError(f"{f.name} must hold settings by name, got {parsed[f.name]!r}")
    # The older name goes away in version 5, the newer came with 4.49.
    made = (getattr(parser, "instantiate", None) or parser.instantiate_classes)(parsed)
    return kind(**{f.name: made[f.name] for f in fields(kind)})


def _config_files(arguments: list[str]) -> list[str]:
    given = [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
    return given + [after for before, after in itertools.pairwise(arguments) if before == "--config"]


def _with_values(arguments: list[str], switches: set[str]) -> list[str]:
    """``--resume`` alone means true, and ``--run-dir`` is ``--run_dir``."""
    given = []
    for i, argument in enumerate(arguments):
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            argument = "--" + flag[2:].replace("-", "_") + equals + value
            following = arguments[i + 1] if i + 1 < len(arguments) else "--"
            if argument in switches and following.lower() not in ("true", "false", "yes", "no"):
                argument += "=true"
        given.append(argument)
    return given


def run() -> NoReturn:
    """:func:`main` as a program."""
    code = main()
    if "RANK" in os.environ:
        # DDP's process group outlives its destruction, and gloo's threads may want a lock of an interpreter that is
        # being taken down: rarely, a run that had done everything ended with SIGABRT.  Nothing is left to take down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
