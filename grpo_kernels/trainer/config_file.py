"""A YAML file of settings, looked over before it is parsed: what YAML takes without a word, and should not."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def check_config_file(path: str | Path) -> None:
    """Refuse a file that is no UTF-8 text, no YAML, or that says something twice: YAML keeps the last, silently.

    Raises:
        ValueError: naming the file, and the setting and its lines. What is not there is for the parser to say.
    """
    import yaml

    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
        _check_keys(root, str(path), "", set())
    except (FileNotFoundError, IsADirectoryError):
        return
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read: nested too deeply") from error


def _check_keys(node: Any, path: str, prefix: str, seen: set[int]) -> None:
    if id(node) in seen:  # an alias, possibly of what it is in
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    # A mapping's value is pairs of nodes, a sequence's nodes, a scalar's text.
    for entry in node.value if node is not None and not isinstance(node.value, str) else ():
        key, value = entry if isinstance(entry, tuple) else (None, entry)
        name = prefix
        if key is not None:
            name = f"{prefix}.{key.value}".lstrip(".") if isinstance(key.value, str) else prefix
            line = key.start_mark.line + 1
            if name in lines:
                raise ValueError(f"{path}:{line}: {name} is there twice, first in line {lines[name]}")
            lines[name] = line
        _check_keys(value, path, name, seen)
