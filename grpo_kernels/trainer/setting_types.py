"""Settings are what they are declared as: the command line's parser sees to it there, this does for programs."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..arguments import check_flag, describe, read_number


def check_types(settings: Any, prefix: str = "") -> None:
    """Hold every setting of a dataclass, and of those in it, to its annotation.

    Numbers must be finite, and texts such that they can be written to a file.

    Args:
        settings: a dataclass of flags, numbers, texts, choices, lists and tuples of these, and dataclasses.
        prefix: of the names in messages.

    Raises:
        TypeError: a setting of another type.
        ValueError: none of the choices; a number that is not finite; a text with a NUL or half a surrogate pair.
    """
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        _check(prefix + field.name, getattr(settings, field.name), hints[field.name])


def _check(name: str, value: Any, hint: Any) -> None:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return
        kinds = [kind for kind in arguments if kind is not NoneType]
        fitting = [kind for kind in kinds if isinstance(value, get_origin(kind) or kind)]
        _check(name, value, (fitting or kinds)[0])
    elif origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise ValueError(f"{name} must be one of {', '.join(arguments)}, got {describe(value)}")
    elif origin is list:
        if not isinstance(value, list):
            raise TypeError(f"{name} must be a list, got {describe(value)}")
        for index, item in enumerate(value):
            _check(f"{name}[{index}]", item, arguments[0])
    elif origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{name} must be a tuple, got {describe(value)}")
        if len(value) != len(arguments):
            raise ValueError(f"{name} must hold {len(arguments)} numbers, got {describe(value)}")
        for index, item in enumerate(value):
            _check(f"{name}[{index}]", item, arguments[index])
    elif is_dataclass(hint):
        if not isinstance(value, hint):  # type: ignore[arg-type]  # a class, not an object of one
            raise TypeError(f"{name} must be of type {hint.__name__}, got {describe(value)}")  # type: ignore[union-attr]
        check_types(value, f"{name}.")
    elif hint is bool:
        check_flag(name, value)
    elif hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {describe(value)}")
    elif hint is float:
        if not math.isfinite(read_number(name, value)):
            raise ValueError(f"{name} must be finite, got {value!r}")
    else:
        _check_text(name, value)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {describe(value)}")
    if "\0" in value:
        raise ValueError(f"{name} must not hold a NUL character, got {describe(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be text that UTF-8 can hold, got {describe(value)}") from error
