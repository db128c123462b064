"""The head's own tests, on backends whose kernels run in a process of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def cases_of(test: Callable) -> Callable[[Callable], Callable]:
    """The parametrisation of a test of test_linear_head.py, without its backends."""

    def decorate(function: Callable) -> Callable:
        for mark in test.pytestmark:
            if mark.args[0] != "backend":
                function = pytest.mark.parametrize(*mark.args, **mark.kwargs)(function)
        return function

    return decorate
