"""``grpo-kernels tune``: blocks, tiles and backends for one shape on one device, kept in the cache folder."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import NoReturn

_ABOUT = """\
Time on this device what the package's tables hold (blocks and warps of the kernels, tiles of the LM head, the backends
themselves) for the shape of your model.  Each candidate is checked against float64 before it is timed, and replaces
the table's entry only where it is more than 1 % faster.  What is found is kept in the cache folder, and every later
process on this device follows it: block and tile sizes for this shape, the order in which backend="auto" tries the
backends for all tuned shapes of this dtype together.  GRPO_KERNELS_TUNED=never ignores it.  Nothing else should run on
the device meanwhile.
"""


def tune(arguments: list[str]) -> int:
    given = _parser().parse_args(arguments)
    from ..backends import tuned
    from ..tune import Report, check_seconds, report, shape_of
    from ..tune import tune as run

    shape = shape_of(
        model=given.model, vocab=given.vocab, hidden=given.hidden, rows=given.rows, dtype=given.dtype,
        device=given.device,
    )  # fmt: skip
    seconds, setting = check_seconds(given.seconds), tuned.setting()
    path = _writable(tuned.path_of(shape.device))
    out = None if given.out is None else _folder(Path(given.out))

    def write(so_far: Report) -> None:
        """After each stage, so that a run that is ended from outside leaves what it had found."""
        if out is not None:
            (out / "tuned.csv").write_text(report.as_csv(so_far), encoding="utf-8")
            (out / "table.txt").write_text(report.as_table(so_far), encoding="utf-8")

    started = time.monotonic()
    print(f"tuning on {_name_of(shape.device)} for {shape}; about {seconds:.0f} s", flush=True)
    if shape.device.type == "cpu" and (load := _load()) > 1:
        print(f"this machine is busy (load {load:.1f} on {os.cpu_count()} cores): times will scatter")
    try:
        found = run(shape, seconds, lambda line: print(f"  {line}", flush=True), after=write)
    except KeyboardInterrupt:
        print(f"\nstopped; what had ended by then is in {path}" if path.exists() else "\nstopped; nothing was kept")
        raise
    print(f"\n{report.gains(found)}\n\n{report.steps(found)}\n")
    for line in report.refused(found):
        print(f"refused: {line}")
    if not found.order:
        print("the order of the backends stays as it is: the times are not sure enough to change it")
    else:
        print(f"backends, fastest first: {', '.join(found.order)} (auto takes the first of them that is proven here)")
        print("plain PyTorch, written as one would without this package, is timed for comparison; auto never takes it")
    if found.stopped:
        print("time ran out before everything was tried, or made sure of: more --seconds may find more")
    if out is not None:
        print(f"every candidate: {out / 'tuned.csv'}; entries for the package's table: {out / 'table.txt'}")
    if found.path is None:
        print("nothing was found that could be kept")
        return 1
    print(f"kept in {found.path} after {time.monotonic() - started:.0f} s")
    if setting == "never":
        print("GRPO_KERNELS_TUNED=never is set: as long as it is, nothing follows this file")
    else:
        print("GRPO_KERNELS_TUNED=never ignores it; deleting it forgets all shapes tuned on this device")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grpo-kernels tune", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", metavar="FOLDER", help="a model's folder on this machine; the sizes are read from its config.json"
    )
    parser.add_argument("--vocab", type=int, metavar="V", help="words of the vocabulary, with --hidden in its place")
    parser.add_argument("--hidden", type=int, metavar="H", help="width of the hidden states")
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="labelled tokens of one step, chosen and rejected together (2048 on a CPU, 16384 on a GPU unless told)",
    )
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32 (bfloat16 unless told)")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 (the first GPU, or the CPU, unless told)")
    parser.add_argument("--seconds", type=float, default=120.0, metavar="N", help="about how long (120 unless told)")
    parser.add_argument("--out", metavar="DIR", help="also write tuned.csv and table.txt into this folder")
    # One line, as everywhere, not argparse's two.
    parser.error = _raise  # type: ignore[method-assign]
    return parser


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _load() -> float:
    """How many processes ran or waited over the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _name_of(device: object) -> str:
    from ..backends import cache

    return f"{cache.describe_device(device)['device']} ({device})"  # type: ignore[arg-type]


def _writable(path: Path) -> Path:
    """Before minutes are spent."""
    probe = path.with_name(f"{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(probe, "a"):
            pass
    except OSError as error:
        raise OSError(
            f"the tuning file cannot be written ({error}); set GRPO_KERNELS_CACHE to a folder that can be"
        ) from error
    return path


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out must be a folder that can be made or is there, got {str(path)!r} ({error})") from None
    return path
