"""The order of the package: the rule as it is written down, and the drawing of what the code does.

    python tests/architecture/drawing.py            prints the drawing
    python tests/architecture/drawing.py --write    puts it into docs/design.md, between the markers

``docs/design.md`` holds both; test_imports.py holds the code to the rule and the page to the code.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from imports import PACKAGE, PUBLIC, ROOT, graph_inside, graph_of_places, in_order

RULE = """\
types ← reference
types ← {arguments, distributed} ← {groups, backends} ← vocab ← loss ← head ← {trainer, integrations}
head ← public names ← trainer ← integrations
{backends, public names} ← proof ← tune
{trainer, integrations, proof, tune} ← cli
"""
"""What may import what: whatever stands further right on a line imports what stands further left, never the other way
round, and names in one pair of braces do not import each other unless a line of their own says so."""

TRAINER = """\
setting_types ← config ← {data, model} ← run ← {inputs, supervised, evaluation, report} ← {loop, evaluate_model}
"""
"""The same inside ``trainer``, of its files and folders."""

PAGE = ROOT / "docs" / "design.md"
MARKERS = (
    "<!-- drawing of the imports: made by `python tests/architecture/drawing.py --write` -->",
    "<!-- end of the drawing -->",
)


def order_of(rule: str) -> dict[str, set[str]]:
    """Place → all that stand before it, on one line or over several: what it may import.

    Raises:
        ValueError: a place stands before itself.
    """
    before: dict[str, set[str]] = {}
    for chain in re.split(r"[;\n]", rule):
        steps = [[name.strip() for name in step.strip(" {}").split(",") if name.strip()] for step in chain.split("←")]
        for name in itertools.chain(*steps):
            before.setdefault(name, set())
        for left, right in itertools.pairwise(steps):
            for name in right:
                before[name].update(left)
    for middle in before:
        for name, seen in before.items():
            if middle in seen:
                before[name] = seen | before[middle]
    wrong = [name for name, seen in before.items() if name in seen]
    if wrong:
        raise ValueError(f"the rule puts {', '.join(wrong)} before themselves")
    return before


def draw() -> str:
    """A line a subpackage or module, in the order of the rule: what it imports, and what it consists of.

    The files after the bar stand in an order in which each imports only files to its left.
    """
    rule, graph = order_of(RULE), graph_of_places()
    known = [*rule, *sorted(set(graph) - set(rule))]
    names = in_order(known, {name: rule.get(name, set()) for name in known})
    rows = []
    for name in (name for name in names if name in graph):
        reached = [other for other in names if other in graph[name]] + sorted(graph[name] - set(names))
        rows.append((name, ", ".join(reached), ", ".join(_parts(name))))
    wide, wider = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{name:{wide}} ← {reached:{wider}} | {parts}".rstrip(" |←") for name, reached, parts in rows)


def _parts(place: str) -> list[str]:
    """The files and folders of a subpackage; none of a module."""
    if place == PUBLIC or not (PACKAGE / place).is_dir():
        return []
    inside = graph_inside(place)
    return [part + "/" * (PACKAGE / place / part).is_dir() for part in in_order(sorted(inside), inside)]


def block() -> str:
    """The drawing as the page has it, between its markers."""
    return f"{MARKERS[0]}\n```\n{draw()}\n```\n{MARKERS[1]}"


def write() -> None:
    """Put the drawing into the page.

    Raises:
        ValueError: the page lacks the markers.
    """
    text = PAGE.read_text(encoding="utf-8")
    before, begin, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not (begin and end):
        raise ValueError(f"{PAGE} must hold the lines {MARKERS[0]!r} and {MARKERS[1]!r}, in this order")
    PAGE.write_text(before + block() + after, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    else:
        print(draw())
