"""What every command does with a case: check all variants, time them in one interleaved run, take their memory.

A command is a module with ``build(case, device) -> Work``.  A variant whose log-probabilities or gradients lie further
from float64 than twice those of plain PyTorch in the same dtype, plus the ``epsilon`` of the work, is wrong: its row
says so and has no time.  One that cannot run here has a row that says why.
"""

from __future__ import annotations

import gc
import importlib
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol

import torch

from benchmarks.measure import (
    Line,
    Times,
    allocator_peak,
    copy_lines,
    in_fresh_processes,
    interleaved,
    resident_peak,
)
from benchmarks.results import Row, merge, results_path
from grpo_kernels import UnavailableBackendError

GEMMS = "three bare GEMMs"
COPIES = ("copy", "copy, memcpy")
OURS = "ours: "
Outputs = dict[str, torch.Tensor]
Errors = tuple[float | None, float | None]
"""Relative errors of the log-probabilities and of the gradients, against float64; None where there are none."""


class Case(Protocol):
    """One thing to be done: a NamedTuple of plain values, so that a fresh process can build it again."""

    def fields(self) -> Row:
        """The columns of ``results.CASE``, but for the clock."""


@dataclass
class Work:
    """A case with its inputs: who can do it, and how to tell whether it was done."""

    variants: dict[str, Line | str]
    """Each run returns its outputs by name; a string says why a variant is absent."""
    ours: str
    """Whose time the others are compared with."""
    plain: Line
    """Plain PyTorch, all of it in the same dtype: twice its errors are allowed, plus epsilon.  Not timed."""
    errors: Callable[[Outputs], Errors]
    epsilon: tuple[float, float]
    bytes: float
    """That have to be moved, whoever does it."""
    operations: float
    copy_bytes: int
    """Of the copy in the same rounds."""
    gemms: Line | None = None
    gemm_operations: float = 0.0
    memory: bool = True
    """Whether fresh processes are worth their time."""


def run_command(command: str, options: Namespace) -> NoReturn:
    """Run a module's ``main`` and leave the process with what it returned."""
    start = time.monotonic()
    status = importlib.import_module(f"benchmarks.{command}").main(options)
    print(f"{command}: {time.monotonic() - start:.0f} s")
    sys.exit(status)


@dataclass(frozen=True)
class Settings:
    """How a command measures."""

    rounds: int
    """Of each case, but no more than 5 once ``most_seconds`` have passed."""
    most_seconds: float = 8.0
    at_once: int = 4
    """Fresh processes for the peak of memory that run side by side."""
    preload: Sequence[str] = ()
    """What those have imported already, where it is installed."""


def run(
    command: str,
    cases: Sequence[Case],
    build: Callable[[Case, torch.device], Work],
    options: Namespace,
    settings: Settings,
) -> int:
    """All cases of a command, each written to the file of results as soon as it is there."""
    device = torch.device(options.device)
    path = results_path(command, device, options.results)
    settings = replace(settings, rounds=options.rounds or (3 if options.quick else settings.rounds))
    threads, broken = torch.get_num_threads(), 0
    for clock in options.clocks:
        torch.set_num_threads(1 if clock == "cpu" else threads)
        for case in cases:
            fields = {**case.fields(), "clock": clock}
            title = ", ".join(str(fields[name]) for name in ("case", "work", "dtype", "clock"))
            if options.only and options.only not in title:
                continue
            if time.monotonic() > options.ends:
                print(f"{command}: no time left for {title}")
                continue
            print(f"\n{title}", flush=True)
            torch.compiler.reset()  # every case compiles for its own shapes
            try:
                rows = run_case(command, case, build(case, device), fields, options, settings)
            except Exception:  # what was measured before stays, and what comes after is measured
                traceback.print_exc()
                broken += 1
                continue
            merge(path, rows, device)
            broken += sum(ours_is_broken(row) for row in rows)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    torch.set_num_threads(threads)
    return 1 if broken else 0


def run_case(command: str, case: Case, work: Work, fields: Row, options: Namespace, settings: Settings) -> list[Row]:
    """The rows of one case: those who do the work, then the copies and GEMMs beside them."""
    device = torch.device(options.device)
    for name in work.variants:
        if any(text in name for text in options.skip):
            work.variants[name] = "skipped"
    status, errors, peaks = check(work, device)
    sound = [name for name in work.variants if status[name] == "ok"]
    units = copy_lines(work.copy_bytes, device) | ({} if work.gemms is None else {GEMMS: work.gemms})
    for line in units.values():
        line()
    lines = {name: work.variants[name] for name in sound} | units
    clock = str(fields["clock"])
    times = interleaved(
        lines, device, rounds=settings.rounds, clock=clock, most_seconds=settings.most_seconds, ends=options.ends
    )
    wanted = options.memory and work.memory and time.monotonic() < options.ends
    if wanted and device.type == "cpu" and clock == "wall":
        share = max(1, torch.get_num_threads() // settings.at_once)
        each = [(command, case, name, share) for name in sound]
        found = in_fresh_processes(peak_of, each, settings.at_once, settings.preload)
        peaks = dict(zip(sound, found, strict=True))
    rows = []
    for name in [*work.variants, *units]:
        row = {**fields, "variant": name, "status": status.get(name, "ok")}
        row["error"], row["error_grad"] = errors.get(name, (None, None))
        row |= measured(name, work, times)
        if peaks.get(name) is not None:
            row["peak_mib"] = peaks[name] / 2**20
            row["peak_by"] = "resident" if device.type == "cpu" else "allocator"
        rows.append(row)
        print(described(row), flush=True)
    return rows


def measured(name: str, work: Work, times: dict[str, Times]) -> Row:
    """The columns that come of the time of a line, empty for one that was not timed."""
    if name not in times:
        return {}
    seconds, (first, third) = times[name].median, times[name].quartiles
    row: Row = {
        "ms": 1e3 * seconds, "q1_ms": 1e3 * first, "q3_ms": 1e3 * third, "best_ms": 1e3 * times[name].best,
        "rounds": len(times[name].seconds),
    }  # fmt: skip
    moved, done = work.bytes, work.operations
    if name in COPIES or name == GEMMS:
        moved, done = (2.0 * work.copy_bytes, 0.0) if name in COPIES else (0.0, work.gemm_operations)
    elif work.ours in times:
        row["vs_ours"] = seconds / times[work.ours].median
    row |= {"bytes": moved, "operations": done}
    if moved:
        copy_rate = 2 * work.copy_bytes / min(times[copy].median for copy in COPIES if copy in times)
        row["of_copy"] = moved / seconds / copy_rate
    if done and GEMMS in times:
        row["of_gemm"] = done / seconds / (work.gemm_operations / times[GEMMS].median)
    return row


def check(work: Work, device: torch.device) -> tuple[dict[str, str], dict[str, Errors], dict[str, int]]:
    """Status and errors of every variant, and on a GPU its memory.  What is sound has then run once."""
    status: dict[str, str] = {}
    errors: dict[str, Errors] = {}
    peaks: dict[str, int] = {}
    try:
        allowed = tuple(2 * (e or 0.0) + more for e, more in zip(work.errors(work.plain()), work.epsilon, strict=True))
    except torch.OutOfMemoryError:
        allowed = tuple(4 * more for more in work.epsilon)
    for name, variant in work.variants.items():
        if isinstance(variant, str):
            status[name] = f"absent: {variant}"
            continue
        try:
            outputs = variant()
            errors[name] = work.errors(outputs)
            del outputs
            if device.type == "cuda":
                peaks[name] = allocator_peak(variant, device)
        except UnavailableBackendError as error:
            status[name] = f"absent: {error}"
            continue
        except Exception as error:
            first = (str(error).strip() or "no message").splitlines()[0][:120]
            status[name] = f"failed: {type(error).__name__}: {first}"
            continue
        if all(e is None or e <= most for e, most in zip(errors[name], allowed, strict=True)):
            status[name] = "ok"
        else:
            seen, most = (" and ".join(f"{e:.1e}" for e in pair if e is not None) for pair in (errors[name], allowed))
            status[name] = f"wrong: errors {seen} where {most} are allowed"
    return status, errors, peaks


def ours_is_broken(row: Row) -> bool:
    return str(row["variant"]).startswith(OURS) and str(row["status"]).startswith(("wrong", "failed"))


def peak_of(command: str, case: Case, variant: str, threads: int) -> int | None:
    """In a fresh process: the resident set's peak over one call of a variant."""
    torch.set_num_threads(threads)
    work = importlib.import_module(f"benchmarks.{command}").build(case, torch.device("cpu"))
    return resident_peak(work.variants[variant])


def described(row: Row) -> str:
    text = f"  {row['variant']:<40}"
    if "ms" not in row:
        return text + str(row["status"])
    text += f"{row['ms']:10.3f} ms  [{row['q1_ms']:.3f}, {row['q3_ms']:.3f}]"
    for name, form in (("vs_ours", "{:.2f} x ours"), ("of_copy", "{:.0%} of copy"), ("of_gemm", "{:.0%} of GEMMs"),
                       ("peak_mib", "{:.0f} MiB"), ("error", "errors {:.0e}"), ("error_grad", "{:.0e}")):  # fmt: skip
        if row.get(name) is not None:
            text += "  " + form.format(row[name])
    return text
