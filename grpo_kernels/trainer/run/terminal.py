"""Names out of a data file, as a terminal may be shown them."""

from __future__ import annotations


def printable(text: str, width: int | None = None) -> str:
    """Text in which nothing moves the cursor, changes colours or turns the direction of writing around.

    Args:
        text: anything, the name of a group say.
        width: characters at most; a longer text loses its middle. None for no limit.

    Returns:
        The text with what does not print, line ends among it, as ``repr`` writes it.
    """
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if width is None or len(shown) <= width:
        return shown
    head = (width - 1) // 2
    return f"{shown[:head]}…{shown[len(shown) - (width - 1 - head) :]}"
