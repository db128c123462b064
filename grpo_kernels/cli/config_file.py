"""A YAML file of settings, looked over before it is parsed: what YAML takes without a word, and should not."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any


def check_config_file(path: str | Path, settings: Collection[str] = ()) -> None:
    """Refuse a file that is no UTF-8 text, no YAML, that says something twice (YAML keeps the last, silently), or that
    holds a setting that there is not.

    Args:
        path: the file.
        settings: the dotted names that there are; none: any name will do.

    Raises:
        ValueError: naming the file, the setting and its line. A file that is not there is for the parser to say.
    """
    import yaml

    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
        _check_keys(root, str(path), "", set(), settings)
    except (FileNotFoundError, IsADirectoryError):
        return
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read: nested too deeply") from error


def did_you_mean(name: str, settings: Collection[str]) -> str:
    """The end of a sentence about a setting that there is not: what it looks like, if anything."""
    close = get_close_matches(name, settings, n=1) or [full for full in settings if full.endswith(f".{name}")]
    return f"; did you mean {close[0]}?" if close else ""


def is_setting(name: str, settings: Collection[str]) -> bool:
    """Whether a dotted name is a setting, a section of them, or inside a setting that is itself a mapping."""
    return any(
        name == known or known.startswith(f"{name}.") or name.startswith(f"{known}.") for known in settings
    )  # fmt: skip


def _check_keys(node: Any, path: str, prefix: str, seen: set[int], settings: Collection[str]) -> None:
    if id(node) in seen:  # an alias, possibly of what it is in
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    # A mapping's value is pairs of nodes, a sequence's nodes, a scalar's text.
    for entry in node.value if node is not None and not isinstance(node.value, str) else ():
        key, value = entry if isinstance(entry, tuple) else (None, entry)
        name = prefix
        if key is not None and key.value != "<<":  # which merges another mapping into this one
            name = f"{prefix}.{key.value}".lstrip(".") if isinstance(key.value, str) else prefix
            line = key.start_mark.line + 1
            if name in lines:
                raise ValueError(f"{path}:{line}: {name} is there twice, first in line {lines[name]}")
            lines[name] = line
            if settings and not is_setting(name, settings):
                raise ValueError(f"{path}:{line}: there is no setting {name}{did_you_mean(name, settings)}")
        _check_keys(value, path, name, seen, settings)
