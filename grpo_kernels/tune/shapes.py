"""What is tuned for: a device, a dtype, and the sizes of a model's LM head."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = ("bfloat16", "float16", "float32")
ROWS = {"cpu": 2048, "cuda": 16384}
"""Labelled tokens of a batch, unless told."""


@dataclass(frozen=True)
class Shape:
    """One shape on one device."""

    device: torch.device
    dtype: torch.dtype
    rows: int
    """Labelled tokens of a batch."""
    hidden: int
    vocabulary: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}, V {self.vocabulary}, H {self.hidden}, {self.rows} rows"


def shape_of(
    *,
    model: str | None = None,
    vocab: int | None = None,
    hidden: int | None = None,
    rows: int | None = None,
    dtype: str = "bfloat16",
    device: str | None = None,
) -> Shape:
    """The shape that a command line asks for.

    Raises:
        ValueError: naming the argument.
    """
    if model is not None and (vocab is not None or hidden is not None):
        raise ValueError("--model reads both sizes from the model's config.json: leave out --vocab and --hidden")
    if model is not None:
        vocab, hidden = _sizes_of(Path(model))
    for name, value in (("--vocab", vocab), ("--hidden", hidden)):
        if value is None:
            other = "--hidden" if name == "--vocab" else "--vocab"
            alone = "tune needs a shape" if vocab is hidden is None else f"{name} must be given with {other}"
            raise ValueError(
                f"{alone}: --model FOLDER (with a config.json), or --vocab V and --hidden H of the LM head"
            )
        _check_size(name, value, 1 << 30)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    where = device_of(device)
    if rows is None:
        rows = ROWS[where.type]
    _check_size("--rows", rows, 1 << 30)
    return Shape(where, getattr(torch, dtype), rows, hidden or 0, vocab or 0)


def device_of(name: str | None) -> torch.device:
    """The device of this name; without one the first GPU, or the CPU where there is none."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be a device as PyTorch names it, cpu or cuda:0, got {name!r}") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"--device must be cpu or a cuda device, got {name!r}")
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError(f"--device {name}: PyTorch sees no GPU here")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise ValueError(f"--device {name}: there are {count} GPUs here, numbered from 0")
    return torch.device("cuda", index)


def check_seconds(seconds: float) -> float:
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"--seconds must be a positive number, got {seconds}")
    return seconds


def _check_size(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise ValueError(f"{name} must be from 1 to {most}, got {value}")


def _sizes_of(folder: Path) -> tuple[int, int]:
    """vocab_size and hidden_size of the folder's config.json, those of its text model where it has several."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--model must be a folder with a config.json, and {path} is not there") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--model: {path} cannot be read ({error})") from None
    found: list[int] = []
    for name in ("vocab_size", "hidden_size"):
        value = _look_up(config, name)
        if value is None:
            raise ValueError(f"--model: {path} has no {name}; give --vocab and --hidden instead")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"--model: {name} in {path} must be a positive integer, got {str(value)[:80]}")
        found.append(value)
    return found[0], found[1]


def _look_up(config: object, name: str) -> object:
    for part in (config, config.get("text_config") if isinstance(config, dict) else None):
        if isinstance(part, dict) and part.get(name) is not None:
            return part[name]
    return None
