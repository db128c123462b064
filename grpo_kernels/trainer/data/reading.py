"""Preference pairs as people keep them: JSON lines, parquet, a data set of the hub.

Every pair is checked as it is read, and what is wrong is said with the file, the line and the field.  A file is read
here and nowhere else; only a hub name reaches for the network.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DataConfig

Message = dict[str, Any]
"""One chat message, ``{"role": ..., "content": ...}``."""
Text = str | list[Message]
"""Plain text, or chat messages."""

_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_IMPLICIT_PROMPT = (
    "if 'chosen' and 'rejected' repeat the whole dialogue, move what they share at the start into a prompt of its own "
    "(trl's extract_prompt does that)"
)


@dataclass(frozen=True)
class Pair:
    """One preference: of two replies to a prompt, the one preferred by somebody of a group.

    Args:
        prompt: plain text, or chat messages of which the last is not the assistant's.
        chosen, rejected: in the same form; chat messages begin with the assistant's.
        group: name of the group.
        where: the file and line, or the row, that an error message points to.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    group: str
    where: str


def read_pairs(source: str, config: DataConfig, *, split: str = "train") -> list[Pair]:
    """Read and check all pairs of a file or of a split of a hub data set.

    Args:
        source: a .jsonl, .jsonl.gz or .parquet file, or the name of a hub data set.  Blank lines of JSON lines are
            skipped, and counted in line numbers; a byte order mark and Windows line ends are fine.
        config: names of the fields, and which subset and revision of a hub data set.
        split: of a hub data set; files have none.

    Returns:
        The pairs in their order.  Groups written as integers become strings.

    Raises:
        ValueError: no such file; nothing in it; broken JSON; a field that is missing or of the wrong type; an empty
            reply; equal replies: naming the file, the line or row, and the field.
    """
    pairs = []
    for row, where in _rows(source, config, split):
        try:
            pairs.append(_pair(row, config, where))
        except RecursionError as error:
            raise ValueError(f"{where}: nested too deeply") from error
    if not pairs:
        raise ValueError(f"{source} holds no pairs")
    return pairs


def pair_texts(pairs: list[Pair]) -> Iterator[str]:
    """All text of the pairs, as the embedded model's tokenizer is trained on it."""
    for pair in pairs:
        for text in (pair.prompt, pair.chosen, pair.rejected):
            if isinstance(text, str):
                yield text
            else:
                yield from (message["content"] for message in text)


def _rows(source: str, config: DataConfig, split: str) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        path = Path(source).expanduser()
        is_file, exists = path.is_file(), path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, or a home of nobody
        raise ValueError(f"{source!r} cannot be the name of a file of preference pairs: {error}") from error
    if source.endswith(_SUFFIXES):
        if not is_file:
            raise ValueError(f"no such file of preference pairs: {source}")
        return _parquet_rows(path, source, config) if source.endswith(".parquet") else _json_rows(path, source)
    if exists or path.suffix in (".json", ".csv", ".tsv", ".txt", ".gz", ".zip", ".ndjson"):
        raise ValueError(
            f"preference pairs are read from {', '.join(_SUFFIXES)} files or from the hub, got {source!r}"
            + ("; a .json or .ndjson file with one object a line only needs renaming" if "json" in path.suffix else "")
        )
    if not _HUB_NAME.fullmatch(source):
        raise ValueError(f"{source!r} is neither a file of preference pairs nor the name of a hub data set")
    return _hub_rows(source, config, split)


def _json_rows(path: Path, source: str) -> Iterator[tuple[dict[str, Any], str]]:
    for number, line in enumerate(_lines(path, source), start=1):
        where = f"{source}:{number}"
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        line = line.rstrip(b"\r\n")
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"), object_pairs_hook=_no_duplicates)
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8: {error.reason} at byte {error.start} of the line") from error
        except RecursionError as error:
            raise ValueError(f"{where}: broken JSON: nested too deeply") from error
        except ValueError as error:
            # json counts lines within the one line it is given, which would contradict ours.
            problem = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"{where}: broken JSON: {problem}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a line must hold one JSON object, got {type(row).__name__}")
        yield row, where


def _lines(path: Path, source: str) -> Iterator[bytes]:
    # In binary, so that lines end at \n alone: U+2028 and its like may stand in a JSON string as they are.
    try:
        with gzip.open(path, "rb") if source.endswith(".gz") else open(path, "rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{source}: cannot be read: {error}") from error


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(items)
    if len(row) != len(items):
        names = [name for name, _ in items]
        raise ValueError(f"field {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return row


def _parquet_rows(path: Path, source: str, config: DataConfig) -> Iterator[tuple[dict[str, Any], str]]:
    # pyarrow comes with datasets, and unlike it neither copies the file into a cache nor knows a network.
    parquet = _needs("pyarrow.parquet", "parquet files")
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:
        raise ValueError(f"{source}: not a parquet file: {error}") from error
    names = file.schema_arrow.names
    for name in _fields(config):
        if names.count(name) > 1:
            raise ValueError(f"{source}: column {name!r} is there {names.count(name)} times")
    number = 0
    try:
        for batch in file.iter_batches(columns=[name for name in _fields(config) if name in names]):
            for row in batch.to_pylist():
                number += 1
                yield row, f"{source} row {number}"
    except Exception as error:  # whatever a damaged page brings about
        raise ValueError(f"{source}: damaged after row {number}: {error}") from error


def _hub_rows(source: str, config: DataConfig, split: str) -> Iterator[tuple[dict[str, Any], str]]:
    datasets = _needs("datasets", "hub data sets")
    try:
        rows = datasets.load_dataset(source, name=config.subset, split=split, revision=config.revision)
    except Exception as error:
        raise ValueError(
            f"{source!r} is not a file here, and as a hub data set (split {split!r}) it cannot be loaded: {error}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield row, f"{source} ({split}) row {number}"


def _needs(module: str, purpose: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} need {module}: pip install 'grpo-kernels[train]'") from error


def _fields(config: DataConfig) -> tuple[str, str, str, str]:
    return config.prompt_field, config.chosen_field, config.rejected_field, config.group_field


def _pair(row: dict[str, Any], config: DataConfig, where: str) -> Pair:
    prompt_field, chosen_field, rejected_field, group_field = _fields(config)
    for setting, name in zip(("prompt", "chosen", "rejected", "group"), _fields(config), strict=True):
        if name not in row:
            hint = f"; {_IMPLICIT_PROMPT}" if setting == "prompt" and chosen_field in row else ""
            raise ValueError(
                f"{where}: field {name!r} is missing (data.{setting}_field names it), "
                f"the fields are {sorted(row)}{hint}"
            )
    prompt = _text(row[prompt_field], prompt_field, where)
    chosen = _reply(row[chosen_field], chosen_field, where)
    rejected = _reply(row[rejected_field], rejected_field, where)
    forms = {type(prompt), type(chosen), type(rejected)}
    if len(forms) > 1:
        raise ValueError(
            f"{where}: {prompt_field!r}, {chosen_field!r} and {rejected_field!r} must all be strings or all be "
            f"lists of chat messages, got {type(prompt).__name__}, {type(chosen).__name__}, {type(rejected).__name__}; "
            f"{_IMPLICIT_PROMPT}"
        )
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise ValueError(f"{where}: field {prompt_field!r} must not end with a message of the assistant's")
    if chosen == rejected:
        raise ValueError(f"{where}: fields {chosen_field!r} and {rejected_field!r} are equal, there is no preference")
    return Pair(prompt, chosen, rejected, _group(row[group_field], group_field, where), where)


def _text(value: Any, field: str, where: str) -> Text:
    if isinstance(value, str):
        _check_unicode(value, field, where)
        return value
    if not isinstance(value, list):
        raise ValueError(f"{where}: field {field!r} must be a string or a list of chat messages, got {_shown(value)}")
    if not value:
        raise ValueError(f"{where}: field {field!r} must hold at least one chat message, got an empty list")
    messages = []
    for index, message in enumerate(value):
        name = f"{field}[{index}]"
        if not isinstance(message, dict):
            raise ValueError(f"{where}: field {name!r} must be a chat message {{role, content}}, got {_shown(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"{where}: field '{name}.{key}' must be a string, got {_shown(message.get(key))}")
            _check_unicode(message[key], f"{name}.{key}", where)
        # Parquet gives every message the keys of all; a key without a value was not there.
        messages.append({key: item for key, item in message.items() if item is not None})
    return messages


def _reply(value: Any, field: str, where: str) -> Text:
    reply = _text(value, field, where)
    if isinstance(reply, str):
        if not reply.strip():
            raise ValueError(f"{where}: field {field!r} is an empty reply, got {reply[:20]!r}")
        return reply
    if reply[0]["role"] != "assistant":
        raise ValueError(
            f"{where}: field {field!r} must begin with a message of the assistant's, got role "
            f"{reply[0]['role']!r}; {_IMPLICIT_PROMPT}"
        )
    if not any(message["content"].strip() for message in reply if message["role"] == "assistant"):
        raise ValueError(f"{where}: field {field!r} is an empty reply: no message of the assistant's has content")
    return reply


def _group(value: Any, field: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"{where}: field {field!r} must be a string or an integer, got {_shown(value)}")
    group = str(value)
    if not group.strip():
        raise ValueError(f"{where}: field {field!r} must name a group, got {group!r}")
    _check_unicode(group, field, where)
    return group


def _check_unicode(text: str, field: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: field {field!r} holds half a surrogate pair at character {error.start}") from error


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return f"{type(value).__name__} {str(value)[:60]!r}"
