"""What a person watching sees: a bar on a terminal, a line now and then elsewhere, nothing when told to be quiet."""

from __future__ import annotations

import sys
from typing import Any

from .terminal import printable


class Progress:
    """A bar on a terminal, else about ten lines a run, on standard error.

    Args:
        total: steps of the run.
        start: steps done already.
        label: what is going on.
        quiet: show nothing.
    """

    def __init__(self, total: int, start: int = 0, label: str = "train", quiet: bool = False) -> None:
        self.label, self.total, self.done, self.quiet = label, total, start, quiet
        self._every = max(total // 10, 1)
        self._note = ""
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, desc=label, dynamic_ncols=True, file=sys.stderr)

    def advance(self, note: str | None = None) -> None:
        """One step further.

        Args:
            note: what to show beside the count from now on; None keeps what was.
        """
        self.done += 1
        self._note = self._note if note is None else printable(note)
        if self._bar is not None:
            if note is not None:
                self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update()
        elif not self.quiet and (self.done % self._every == 0 or self.done == self.total):
            print(f"{self.label} {self.done}/{self.total}  {self._note}".rstrip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()
