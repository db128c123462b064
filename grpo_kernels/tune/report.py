"""What a tuning run says: the table on the terminal, every candidate as CSV, and entries for the package's table."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator, Sequence

from ..backends import cache
from ..backends.triton import table
from .results import PATHS, Report, Result, text_of
from .sweep import Candidate

COLUMNS = (
    "operation", "backend", "shape", "parameters", "status", "chosen", "median_ms", "q1_ms", "q3_ms", "rounds",
    "final_ms", "final_rounds",
)  # fmt: skip


def gains(report: Report) -> str:
    """Operation by operation: the entry before and after, both times, and what was gained."""
    lines = [("operation", "entry before", "entry after", "ms before", "ms after", "gain")]
    for result in report.results:
        name = f"{result.operation} ({result.backend})"
        if result.chosen is None:
            reasons = {one.status.split(":")[0] for one in result.candidates}
            lines.append((name, text_of(result.table.parameters), f"none: {', '.join(sorted(reasons))}", "", "", ""))
            continue
        before, after = times_of(result)
        lines.append((
            name,
            text_of(result.table.parameters),
            text_of(result.chosen.parameters) if result.changed else "the same",
            "" if before is None else f"{before:.3f}",
            "" if after is None else f"{after:.3f}",
            f"{1 - after / before:.1%}" if result.changed and before and after else "",
        ))  # fmt: skip
    return _columns(lines)


def times_of(result: Result) -> tuple[float | None, float | None]:
    """Milliseconds by the table's entry and by the one taken, of the rounds between those two where there were any."""
    found = []
    for one in (result.table, result.chosen):
        seconds = [] if one is None else one.final if result.changed and one.final else one.seconds
        found.append(1e3 * statistics.median(seconds) if seconds else None)
    return found[0], found[1]


def steps(report: Report) -> str:
    """The backends against each other and against plain PyTorch."""
    lines = [("step", "backend", "entries", "ms", "quartiles")]
    for path, candidates in report.times.items():
        for one in candidates:
            name, entries = str(one.parameters["backend"]), str(one.parameters["entries"])
            if not one.seconds:
                lines.append((PATHS[path], name, entries, one.status, ""))
                continue
            first, third = one.quartiles
            lines.append((
                PATHS[path], name, entries, f"{1e3 * one.median:.3f}", f"{1e3 * first:.3f} to {1e3 * third:.3f}"
            ))  # fmt: skip
    return _columns(lines)


def refused(report: Report) -> list[str]:
    """A line for each candidate that was wrong or failed."""
    return [
        f"{operation}, {text_of(one.parameters)}: {one.status}"
        for operation, _, _, one, _ in _everyone(report)
        if one.status.startswith(("wrong", "failed"))
    ]


def as_csv(report: Report) -> str:
    """Every candidate, a row each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for operation, backend, shape, one, chosen in _everyone(report):
        timed: list[object] = ["", "", "", 0]
        if one.seconds:
            timed = [*(f"{1e3 * value:.6f}" for value in (one.median, *one.quartiles)), len(one.seconds)]
        final = [f"{1e3 * statistics.median(one.final):.6f}", len(one.final)] if one.final else ["", 0]
        writer.writerow([operation, backend, shape, text_of(one.parameters), one.status, chosen, *timed, *final])
    return text.getvalue()


def _everyone(report: Report) -> Iterator[tuple[str, str, str, Candidate, str]]:
    for result in report.results:
        for one in result.candidates:
            role = ["the table's"] if one is result.table else []
            role += ["taken"] if one is result.chosen else []
            yield result.operation, result.backend, result.shape, one, ", ".join(role)
    for path, candidates in report.times.items():
        for one in candidates:
            yield PATHS[path], str(one.parameters["backend"]), str(report.shape), one, ""


# ---------------------------------------------------------------------------------------------- for table.py


def as_table(report: Report) -> str:
    """The lines of ``backends/triton/table.py`` and ``head/plan.py`` that would hold what was found."""
    device = cache.describe_device(report.shape.device)
    found = cache.versions()
    lines = [
        f"# {device['device']}, {device['capability']}, driver {device['driver']}",
        f"# torch {found['torch']}, triton {found['triton']}; tuned for {report.shape}",
    ]
    by_name = {result.operation: result for result in report.results if result.operation != "preference_tail"}
    for name, entries in (("token_logps", table.TOKEN_LOGPS), ("head_tile", table.HEAD_TILE)):
        rows = [_table_row(by_name, name, key, entries[key]) for key in entries]
        if any(rows):
            lines += [f"\n# {name.upper()}", *(row for row in rows if row)]
    tails = [one for one in report.results if one.operation == "preference_tail" and one.chosen is not None]
    if tails:
        lines += ["\n# TAIL", *_tail_rows(tails)]
    for operation, form in (
        ("tile of the head", '_TILE_BYTES["{device}"] = {value}'),
        ("rows the head copies", '_ROW_CHUNK_ELEMENTS["{device}"] = {value}'),
    ):
        result = by_name.get(operation)
        if result is not None and result.chosen is not None and result.changed:
            value = next(iter(result.chosen.parameters.values()))
            if operation == "tile of the head":
                value *= report.shape.rows * report.shape.dtype.itemsize
            line = form.format(device=report.shape.device.type, value=value)
            lines.append(f"\n# head/plan.py: {line}")
    return "\n".join(lines) + "\n"


def _table_row(
    by_name: dict[str, Result], name: str, key: tuple[table.Direction, int], entries: tuple[tuple[float, int, int], ...]
) -> str:
    """One line of the table with the entry that was found in its range; nothing where nothing was swept for it."""
    direction, itemsize = key
    result = by_name.get(f"{name}_{direction}")
    if result is None or result.chosen is None:
        return ""
    (added,) = result.chosen.adds[name]
    size = added["vocabulary" if name == "token_logps" else "words"]
    if itemsize != (4 if added["dtype"] == "float32" else 2):
        return ""
    place = next(i for i, entry in enumerate(entries) if size <= entry[0])
    new = [*entries]
    new[place] = (entries[place][0], added["block_v"], added["num_warps"])
    inside = ", ".join(f"({_number(end)}, {block}, {warps})" for end, block, warps in new)
    return f'    ("{direction}", {itemsize}): ({inside}),{"" if result.changed else "  # the same"}'


def _tail_rows(tails: list[Result]) -> list[str]:
    entries = {end: (pairs, tokens, table.TAIL_WARPS) for end, pairs, tokens in table.TAIL}
    for result in tails:
        (added,) = result.chosen.adds["tail"] if result.chosen else ({},)
        end = float("inf") if added["most_length"] is None else added["most_length"]
        entries[end] = (added["block_pairs"], added["block_tokens"], added["num_warps"])
    inside = ", ".join(f"({_number(end)}, {pairs}, {tokens})" for end, (pairs, tokens, _) in entries.items())
    warps = ", ".join(str(warps) for _, _, warps in entries.values())
    return [f"TAIL: tuple[tuple[float, int, int], ...] = ({inside})", f"# TAIL_WARPS of these: {warps}"]


def _number(end: float) -> str:
    return 'float("inf")' if end == float("inf") else str(int(end))


def _columns(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(row.rstrip() for row in rows)
