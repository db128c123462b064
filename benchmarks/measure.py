"""How time and memory are taken, so that the same words mean the same thing in every file of results.

Time: after a call that is not counted, rounds; a round runs every line once, beginning with another line each time, so
that whatever disturbs the machine disturbs all alike.  A line that takes seconds sits out after the third round.
Before each run the last-level cache is overwritten.  On a GPU the clock is a pair of events, and overwriting the cache
gives the host a start, so that few of its launches are in the time; the shortest works are bound by them all the same.
``clock="cpu"`` is the processor time of one thread, which a busy neighbour does not lengthen.

Memory: on a GPU the allocator's peak.  On CPU the peak of the resident set over one call in a fresh process, after a
first call there that loads what is loaded lazily and compiles what is compiled; a bar of 128 KiB on what the C library
keeps for itself makes released memory leave the resident set.

What is copied or multiplied is random: a GPU that multiplies ones or zeros draws less power, and its clock stays
higher.  On a Hopper GPU such a GEMM takes about an eighth less time, and no real one is like it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.shapes import REPEATED, normal

CLOCKS = ("wall", "cpu")
LEAST_ROUNDS = 5
SLOW_SECONDS, ROUNDS_OF_SLOW = 2.0, 3

Function = Callable[[], object]


@dataclass(frozen=True)
class Line:
    """Something to be timed: ``prepare`` comes before each run and is not in the time."""

    run: Function
    prepare: Function | None = None

    def __call__(self) -> object:
        if self.prepare is not None:
            self.prepare()
        return self.run()


@dataclass(frozen=True)
class Times:
    """Seconds of all rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


def interleaved(
    lines: dict[str, Line],
    device: torch.device,
    *,
    rounds: int,
    clock: str = "wall",
    most_seconds: float = float("inf"),
    ends: float = float("inf"),
) -> dict[str, Times]:
    """Times of all lines, each round running every one of them once.

    Args:
        lines: by name; each has run once already.
        rounds: how many; fewer, but at least 5 (or ``rounds``), where ``most_seconds`` have passed, and at least 3
            once ``time.monotonic()`` is past ``ends``.
    """
    flush = Flush(device)
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    names = list(lines)
    start = time.monotonic()
    for round_ in range(rounds):
        now = time.monotonic()
        if (round_ >= LEAST_ROUNDS and now - start > most_seconds) or (round_ >= ROUNDS_OF_SLOW and now > ends):
            break
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            if len(seconds[name]) >= ROUNDS_OF_SLOW and min(seconds[name]) > SLOW_SECONDS:
                continue
            if lines[name].prepare is not None:
                lines[name].prepare()
            flush()
            seconds[name].append(elapsed(lines[name].run, device, clock))
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def elapsed(function: Function, device: torch.device, clock: str = "wall") -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        kept = function()
        end.record()
        end.synchronize()
        del kept
        return start.elapsed_time(end) / 1e3
    now = time.perf_counter if clock == "wall" else time.process_time
    start = now()
    kept = function()
    seconds = now() - start
    del kept  # releasing the results is not part of the work
    return seconds


class Flush:
    """Overwrites twice the last-level cache."""

    def __init__(self, device: torch.device) -> None:
        size = 2 * last_level_cache(device)
        self.buffer = torch.zeros(max(size, 1), dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self.buffer.zero_()


def last_level_cache(device: torch.device) -> int:
    """Bytes; on a system that does not say, 64 MiB."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    with contextlib.suppress(OSError, ValueError):
        found = [int(path.read_text().strip().rstrip("K")) << 10 for path in sizes]
        if found:
            return min(max(found), 256 << 20)
    return 64 << 20


# ---- the machine's own rates, taken in the same rounds


def copy_lines(size: int, device: torch.device) -> dict[str, Line]:
    """Copies of ``size`` random bytes, each read once and written once; the machine's rate is that of the fastest."""
    source = random_bytes(size, device)
    target = torch.zeros_like(source).fill_(2)
    lines = {"copy": Line(lambda: target.copy_(source))}
    if device.type == "cpu":
        lines["copy, memcpy"] = Line(lambda: memcpy(target, source))
    return lines


def random_bytes(size: int, device: torch.device) -> torch.Tensor:
    """A million of them over and over."""
    generator = torch.Generator(device).manual_seed(0)
    block = torch.randint(0, 256, (min(size, REPEATED),), dtype=torch.uint8, device=device, generator=generator)
    return block.repeat(-(-size // max(block.numel(), 1)))[:size]


def memcpy(target: torch.Tensor, source: torch.Tensor) -> None:
    """libc's memcpy, one part for each of torch's threads; ctypes lets go of the interpreter meanwhile."""
    size = source.numel() * source.element_size()
    step = -(-size // torch.get_num_threads())
    workers = [
        threading.Thread(
            target=ctypes.memmove,
            args=(target.data_ptr() + at, source.data_ptr() + at, min(step, size - at)),
        )
        for at in range(0, size, step)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def gemm_line(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Line:
    """The three GEMMs of a head that trains, h Wᵀ, G W and Gᵀ h, into memory that is there: 6·rows·V·H operations.

    Every operand is normal random numbers, h and G of a size of 1 and 1/100, W so that the logits have 3.
    """
    generator = torch.Generator(device).manual_seed(0)
    h = normal((rows, hidden), 1.0, dtype, generator)
    weight = normal((vocabulary, hidden), 3 / hidden**0.5, dtype, generator)
    grad = normal((rows, vocabulary), 1e-2, dtype, generator)
    logits, grad_h, grad_w = torch.empty_like(grad), torch.empty_like(h), torch.empty_like(weight)

    def run() -> None:
        torch.mm(h, weight.t(), out=logits)
        torch.mm(grad, weight, out=grad_h)
        torch.mm(grad.t(), h, out=grad_w)

    return Line(run)


# ---- memory


def allocator_peak(line: Line, device: torch.device) -> int:
    """Bytes that PyTorch's allocator held at most during a call, beyond what it held before; GPU only."""
    if line.prepare is not None:
        line.prepare()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = line.run()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before


def resident_peak(line: Line) -> int | None:
    """Bytes that came to the resident set of this process at most during a call; None where the system does not say.

    For a process that does nothing else.
    """
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        libc.mallopt(-3, 128 << 10)  # M_MMAP_THRESHOLD: set by hand, it no longer grows with what is released
    line()
    if line.prepare is not None:
        line.prepare()
    gc.collect()
    with contextlib.suppress(AttributeError):
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        kept = line.run()
        peak = _status("VmHWM")
    except OSError:
        return None
    del kept
    return max(peak - before, 0)


def _status(field: str) -> int:
    for entry in Path("/proc/self/status").read_text().splitlines():
        if entry.startswith(field + ":"):
            return int(entry.split()[1]) << 10
    raise OSError(f"no {field} in /proc/self/status")


def in_fresh_processes(
    function: Callable[..., object],
    arguments: Iterable[tuple],
    at_once: int,
    preload: Sequence[str] = (),
    seconds: float = 180,
) -> list[object]:
    """``function(*arguments)`` of each, in a process of its own that has only imported; None where it died."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__, *preload])

    def one(values: tuple) -> object:
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(sending, function, values))
        process.start()
        sending.close()
        try:
            return receiving.recv() if receiving.poll(seconds) else None
        except EOFError:
            return None
        finally:
            process.join(10)  # compilers have workers to send home
            process.kill()
            process.join()

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, arguments))


def _send(connection, function: Callable[..., object], values: tuple) -> None:
    connection.send(function(*values))
