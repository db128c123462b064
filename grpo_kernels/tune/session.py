"""The stages of one tuning run: what is swept, in which order, and what each stage leaves for the next.

    tile of the head → rows that the head copies at a time → Triton's blocks and warps (tile, rows of logits, tail)
    → the backends against each other and plain PyTorch, by the tables' entries and by the tuned ones

The starting point is the package's own tables, whatever was tuned before.  A stage that ends is kept at once, so that
a run that is stopped keeps what it knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..backends import available_backends, choose, tuned
from ..backends.triton import table
from ..head.plan import make_plan, total_memory
from ..types import UnavailableBackendError
from . import candidates, checks, works
from .checks import Mismatch, Place
from .results import PATHS, PLAIN, TABLE, TUNED, Report, Result, text_of
from .shapes import Shape
from .sweep import NO_TIME, RIGHT, Candidate, Timer, check_all, fair_ends, order_is_sure, sweep, time_all

Content = Mapping[str, list[dict[str, Any]]]
Say = Callable[[str], None]
Check = Callable[[], None]
FAR_BEHIND = {1: 2.0}
"""Of whole steps, which are few and take long: what is slower by this factor after a round has no second."""
DIRECTIONS: tuple[table.Direction, ...] = ("fwd", "bwd")


def names_here(shape: Shape) -> list[str]:
    """The backends that can run here with the head's operations, in the order of the registry."""
    found = []
    for name in available_backends():
        try:
            module = choose(name, shape.device, shape.dtype)
        except UnavailableBackendError:
            continue
        if hasattr(module, "head_tile_fwd"):
            found.append(name)
    return found


def tune(
    shape: Shape,
    seconds: float,
    say: Say,
    *,
    after: Callable[[Report], None] = lambda report: None,
    keep: Callable[[Content], Path] | None = None,
) -> Report:
    """Sweep everything that the tables hold for this shape.

    Args:
        shape: and device.
        seconds: in all, shared by the stages.
        say: takes a line of progress.
        after: takes what was found so far, after each stage.
        keep: adds entries to the tuning file; None: that of the device.
    """
    on_device = torch.cuda.device(shape.device) if shape.device.type == "cuda" else nullcontext()
    with on_device:
        session = _Session(shape, say, keep or (lambda content: tuned.keep(shape.device, content)))
        stages = list(session.stages())
        ends = fair_ends([weight for weight, _ in stages], time.monotonic() + seconds)
        for (_, stage), stage_ends in zip(stages, ends, strict=True):
            try:
                stage(stage_ends)
            except RuntimeError as error:  # OutOfMemoryError is one
                if not _is_memory(error):
                    raise
                say(f"not enough memory: {str(error).splitlines()[0][:120]}")
                session.report.stopped = True
            after(session.report)
            if shape.device.type == "cuda":
                torch.cuda.empty_cache()
        return session.report


class _Session:
    def __init__(self, shape: Shape, say: Say, keep: Callable[[Content], Path]) -> None:
        self.shape, self.say, self.keep = shape, say, keep
        self.names = names_here(shape)
        self.dtype = tuned.name_of(shape.dtype)
        self.memory = total_memory(shape.device)
        self.timer = Timer(shape.device)
        self.report = Report(shape)
        self.results = self.report.results
        self.verdicts: dict[str, Mismatch | None] = {}
        self.base = tuned.Tuning({})
        """What was chosen so far."""

    def place(self, backend: str) -> Place:
        return Place(backend, str(self.shape.device))

    def stages(self) -> Iterator[tuple[float, Callable[[float], None]]]:
        """(share of the time, stage); the ones before were not run yet when this says which come."""
        yield 6, self.tile
        yield 1, self.row_chunk
        if "triton" in self.names:
            for direction in DIRECTIONS:
                yield 1.5, partial(self.head_tile, direction)
            for direction in DIRECTIONS:
                yield 1.5, partial(self.token_logps, direction)
            for most in tuned.TAIL_RANGES:
                yield 1, partial(self.tail, most)
        for path in PATHS:
            yield 2, partial(self.path, path)

    # ---- the head

    def tile(self, ends: float) -> None:
        """By the first backend that is right: most of the time is in the GEMMs, which are the same for all."""
        while True:
            self._tile(self.place(self.names[0]), ends)
            if self.results[-1].chosen is not None or len(self.names) == 1:
                return
            self.say(f"{self.names[0]} is left out: no tile of the head is right")
            del self.names[0]

    def _tile(self, place: Place, ends: float) -> None:
        shape = self.shape
        run, found = works.HeadStep(shape).of_backend(place.name), []
        for parameters in candidates.tiles(shape, self.memory):
            entry = {**self._identity(), **parameters}
            # For the check a few rows, and no more words than make several tiles and a narrower one.
            small = {**entry, "hidden": checks.HEAD_WIDTH, "rows": checks.LABELLED_ROWS}
            small["vocabulary"] = min(shape.vocabulary, 3 * parameters["tile_words"] + 100)
            check = self._check(checks.head, place, shape.dtype, small["vocabulary"], head=[small])
            found.append(self._candidate(parameters, run, check, head=[entry]))
        self._sweep("tile of the head", "head", place.name, found, ends, str(shape))

    def row_chunk(self, ends: float) -> None:
        shape, place = self.shape, self.place(self.names[0])
        parameters_of_all = candidates.row_chunks(shape)
        if len(parameters_of_all) < 2:
            return
        run, found = works.HeadStep(shape).of_backend(place.name), []
        for parameters in parameters_of_all:
            entry = {"dtype": self.dtype, "hidden": shape.hidden, **parameters}
            # The check's rows are few: so many at a time that there are as many chunks.
            at_once = min(max(1, parameters["elements"] // shape.hidden), shape.rows)
            part = max(1, checks.LABELLED_ROWS * at_once // shape.rows)
            small = {**entry, "hidden": checks.HEAD_WIDTH, "elements": part * checks.HEAD_WIDTH}
            check = self._check(checks.head, place, shape.dtype, min(shape.vocabulary, 4096), row_chunk=[small])
            found.append(self._candidate(parameters, run, check, row_chunk=[entry]))
        self._sweep("rows the head copies", "head", place.name, found, ends, str(shape))

    def _identity(self) -> dict[str, Any]:
        shape = self.shape
        return {"dtype": self.dtype, "hidden": shape.hidden, "vocabulary": shape.vocabulary, "rows": shape.rows}

    # ---- Triton's tables

    def head_tile(self, direction: table.Direction, ends: float) -> None:
        shape, place, wide = self.shape, self.place("triton"), works.wide_output(self.shape)
        logits = torch.float32 if wide else shape.dtype
        with tuned.using(shape.device, self.base.content()):
            plan = make_plan(shape.rows, shape.hidden, shape.vocabulary, shape.dtype, shape.device, 0)
        words = max(tile.stop - tile.start for tile in plan.tiles())
        current = _block(table.head_tile_options(direction, words, logits, 32))
        run, found = works.head_tile(shape, direction, words, "triton"), []
        for parameters in candidates.rows_of_logits(direction, words, logits, current):
            entry = {"direction": direction, "dtype": tuned.name_of(logits), "words": words, **parameters}
            check = self._check(checks.head_tile, place, shape.dtype, words, wide, head_tile=[entry])
            found.append(self._candidate(parameters, run, check, head_tile=[entry]))
        what = f"{tuned.name_of(logits)}, {words} words, {shape.rows} rows"
        self._sweep(f"head_tile_{direction}", "head", "triton", found, ends, what)

    def token_logps(self, direction: table.Direction, ends: float) -> None:
        shape, place = self.shape, self.place("triton")
        current = _block(table.token_logps_options(direction, shape.vocabulary, shape.dtype, 32))
        run, found = works.token_logps(shape, direction, "triton"), []
        for parameters in candidates.rows_of_logits(direction, shape.vocabulary, shape.dtype, current):
            entry = {"direction": direction, "dtype": self.dtype, "vocabulary": shape.vocabulary, **parameters}
            check = self._check(checks.rows_of_logits, place, shape.dtype, shape.vocabulary, token_logps=[entry])
            found.append(self._candidate(parameters, run, check, token_logps=[entry]))
        what = f"{self.dtype}, V {shape.vocabulary}, {works.sizes_of_logits(shape).rows} rows"
        self._sweep(f"token_logps_{direction}", "logits", "triton", found, ends, what)

    def tail(self, most_length: int | None, ends: float) -> None:
        place, length = self.place("triton"), works.TOKENS[most_length]
        options = table.tail_options(length, 4, 32)
        current = {name: getattr(options, name) for name in ("block_pairs", "block_tokens", "num_warps")}
        run, found = works.tail(self.shape, most_length, "triton"), []
        for parameters in candidates.tails(most_length, current):
            entry = {"most_length": most_length, **parameters}
            check = self._check(checks.tail_kernel, place, 1100 if most_length is None else 50, tail=[entry])
            found.append(self._candidate(parameters, run, check, tail=[entry]))
        self._sweep("preference_tail", "logits", "triton", found, ends, f"sequences of {length}")

    # ---- whole steps

    def path(self, path: str, ends: float) -> None:
        """All backends by the tuned entries, those that they change by the tables' too, and plain PyTorch."""
        shape, started = self.shape, time.monotonic()
        step: Any = works.HeadStep(shape) if path == "head" else works.LogitsStep(shape)
        found = []
        for name in self.names:
            run = step.of_backend(name)
            found.append(
                Candidate({"backend": name, "entries": TUNED}, run, self._check_once(name), self.base.content())
            )
            if any(one.changed and one.path == path and one.backend in (name, self.names[0]) for one in self.results):
                found.append(Candidate({"backend": name, "entries": TABLE}, run))
        plain = Candidate({"backend": PLAIN, "entries": ""}, step.plain)
        rows = shape.rows if path == "head" else works.sizes_of_logits(shape).rows
        needs = rows * shape.vocabulary * (2 * shape.dtype.itemsize + 16)
        check_all(found, shape.device, float("inf"))  # few, and an order of some of them would be none
        # A GPU says when there is too little; a CPU's system ends the process.
        if needs < self.memory * (0.6 if shape.device.type == "cuda" else 0.33):
            check_all([plain], shape.device, ends)
        else:
            plain.status = f"not tried: would take {needs / 2**30:.0f} GiB"
        everyone = [*found, plain]
        sound = [one for one in everyone if one.status == RIGHT]
        if sound:
            time_all(sound, self.timer, ends, FAR_BEHIND)
        self.report.times[path] = everyone
        timed = [one for one in sound if one.parameters["entries"] == TUNED]
        ms = {one.parameters["backend"]: 1e3 * one.median for one in timed}
        sure = order_is_sure(timed)
        if ms:
            entry = self.base.find("backends", *self._identity().values()) or {**self._identity(), "ms": {}}
            unsure = sorted({*entry.get("unsure", []), path} - ({path} if sure else set()))
            self._add(backends=[{**entry, "ms": {**entry["ms"], path: ms}, "unsure": unsure}])
        self.report.order = tuned.rank(tuned.sure_times(self.base.sections["backends"].values()))
        self._release(everyone)
        fastest = min(ms, key=lambda name: ms[name]) if ms else "none"
        but = "" if sure else " in too few or too uneven rounds to change the order of the backends"
        self.say(f"{PATHS[path]:<22} {len(ms)} backends timed, the fastest is {fastest}{but}, {_took(started)}")

    def _check_once(self, name: str) -> Check:
        """The check of a whole backend, of which both paths want to know."""

        def check() -> None:
            if name not in self.verdicts:
                try:
                    self._check(checks.backend, self.place(name), self.shape.dtype)()
                    self.verdicts[name] = None
                except Mismatch as error:
                    self.verdicts[name] = error
            found = self.verdicts[name]
            if found is not None:
                raise found

        return check

    # ---- what stages have in common

    def _with(self, sections: Content) -> Content:
        return self.base.with_entries(sections).content()

    def _candidate(
        self, parameters: candidates.Parameters, run: works.Run, check: Callable[[], None], **adds: list[dict[str, Any]]
    ) -> Candidate:
        return Candidate(parameters, run, check, self._with(adds), adds)

    def _check(
        self, check: Callable[..., None], *arguments: Any, **sections: list[dict[str, Any]]
    ) -> Callable[[], None]:
        """The check while look-ups give these entries besides what was chosen."""
        device, entries = self.shape.device, self._with(sections)

        def run() -> None:
            with tuned.using(device, entries):
                check(*arguments)

        return run

    def _add(self, **sections: list[dict[str, Any]]) -> None:
        self.base = self.base.with_entries(sections)
        self.report.path = self.keep(sections)

    def _release(self, found: Sequence[Candidate]) -> None:
        for one in found:
            one.release()
        self.report.stopped |= any(one.undecided or one.status == NO_TIME for one in found)

    def _sweep(self, operation: str, path: str, backend: str, found: list[Candidate], ends: float, shape: str) -> None:
        started = time.monotonic()
        chosen = sweep(found, self.timer, ends)
        self._release(found)
        result = Result(operation, path, backend, shape, found, chosen)
        self.results.append(result)
        timed = sum(bool(one.seconds) for one in found)
        refused = sum(one.status.startswith(("wrong", "failed")) for one in found)
        taken = "the table's" if not result.changed else text_of(chosen.parameters) if chosen else "none is right"
        also = f", {refused} refused" if refused else ""
        self.say(f"{operation:<22} {timed} of {len(found)} candidates timed{also}: {taken}, {_took(started)}")
        if chosen is not None and timed > 1:  # else nothing is known that an earlier run may not have known better
            self._add(**chosen.adds)


def _block(options: table.TokenLogpsOptions | table.HeadTileOptions) -> candidates.Parameters:
    return {"block_v": options.block_v, "num_warps": options.num_warps}


def _is_memory(error: BaseException) -> bool:
    """Whether there was not enough of it; on a CPU PyTorch says so in words alone."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _took(started: float) -> str:
    return f"{time.monotonic() - started:.1f} s"
