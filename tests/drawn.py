"""Drawn cases: how many of each property run where, and the decorator that sees to it.

    make test           a few of each, the same ones every time
    make test-slow      SLOW in all, the same ones every time
    make test-nightly   NIGHTLY in all, others every night; a failure prints what reproduces it

A property that took fewer cases than it was asked for fails: the counts in docs/reliability.md are counts of
comparisons that were made.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

NIGHTLY = os.environ.get("GRPO_KERNELS_NIGHTLY") == "1"

DRAWN: dict[str, tuple[int, int, int]] = {}
"""Test → its numbers of cases: default, slow, nightly."""


def drawn(*, default: int, slow: int, nightly: int) -> Callable[[Callable[[Any], None]], Any]:
    """``check(data)`` becomes a test of this many drawn cases; ``data`` is hypothesis' ``st.data()``."""

    def decorate(check: Callable[[Any], None]) -> Any:
        DRAWN[f"{check.__module__}.{check.__name__}"] = (default, slow, nightly)
        many = nightly if NIGHTLY else slow
        numbers = [pytest.param(default, id="few"), pytest.param(many, id="many", marks=pytest.mark.slow)]

        def test(number: int) -> None:
            taken = 0

            # The fixtures that a test has set up here nothing that a second case could find changed.
            @settings(
                max_examples=number,
                deadline=None,
                derandomize=not NIGHTLY,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.reuse, Phase.generate, Phase.shrink] if NIGHTLY else [Phase.generate, Phase.shrink],
            )
            @given(data=st.data())
            def run(data: Any) -> None:
                nonlocal taken
                check(data)
                taken += 1

            run()
            assert taken >= number, f"{taken} cases of {number}"

        test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
        return pytest.mark.parametrize("number", numbers)(test)

    return decorate
