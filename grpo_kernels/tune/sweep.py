"""How candidates are compared: checked first, then timed in rounds, then the best once more against the table's own.

A round runs every candidate once, beginning with another one each time, so that whatever disturbs the machine disturbs
all alike.  Each run takes other input buffers, of which there are so many that the last-level cache does not hold
them.  Candidates far behind leave after the first rounds.  The last rounds are between the fastest and the table's
entry alone, and the entry stays unless the other is faster by more than 1 % there, and in so many rounds (6 of 6, 12 of
15) as two equal ones would be once in fifty times.  What a busy machine does to a few rounds therefore changes nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..backends import tuned
from ..types import UnavailableBackendError
from .checks import Mismatch

PRUNING = {1: 1.5, 3: 1.2, 6: 1.08}
"""After so many rounds: a candidate slower than the fastest by this factor leaves."""
SLOW_SECONDS, SLOW_FACTOR = 1.0, 3.0
"""Of the one run before the rounds: a candidate that took longer, and this many times the fastest's, has no others."""
LEAST_ROUNDS, MOST_ROUNDS = 3, 15
ORDER_ROUNDS = 5
LEAST_FINAL_ROUNDS, FINAL_ROUNDS, FINAL_SHARE = 6, 15, 0.5
PATIENCE = 1.5
"""By how much more than the time that is left the last rounds may take; if that is not enough, nothing is changed."""
CHANCE = 0.02
"""At most, that of two equal candidates one would win as often as it did in the last rounds."""
CHECK_SHARE = 0.5
"""Of a stage's time, what checks may take; a candidate that was not checked by then is not tried."""

RIGHT = "ok"
NO_TIME = "not tried: no time left"

_turn = itertools.count()


def _nothing(turn: int) -> None:
    pass


@dataclass(eq=False)
class Candidate:
    """Something to be timed, and what became of it."""

    parameters: Mapping[str, Any]
    run: Callable[[int], object]
    """Does the work once; the number says which of the input buffers to take."""
    check: Callable[[], None] | None = None
    """Raises ``Mismatch``; None: was checked before."""
    entries: Mapping[str, Any] = field(default_factory=dict)
    """The content of a tuning file that makes the look-ups give it."""
    adds: Mapping[str, Any] = field(default_factory=dict)
    """Of ``entries``, what is kept where it is chosen."""
    status: str = ""
    """RIGHT where it was checked; else why it has no time."""
    seconds: list[float] = field(default_factory=list)
    final: list[float] = field(default_factory=list)
    """Of the last rounds."""
    undecided: bool = False
    """Seemed faster than the table's entry, and there was no time to make sure."""
    first: float = 0.0
    """Seconds of the run before the rounds, by the clock on the wall."""

    def release(self) -> None:
        """Let go of the buffers, which only the functions hold."""
        self.run, self.check = _nothing, None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


def order_is_sure(timed: Sequence[Candidate]) -> bool:
    """Whether the times of backends, in the order of the registry, say which one ``auto`` should try first.

    They do where the first is the fastest, so that nothing changes, or where the fastest is so in at least
    ``ORDER_ROUNDS`` rounds and its upper quartile is below the lower quartile of the first.
    """
    if not timed:
        return False
    first, fastest = timed[0], min(timed, key=lambda one: one.median)
    if fastest is first:
        return True
    enough = min(len(fastest.seconds), len(first.seconds)) >= ORDER_ROUNDS
    return enough and fastest.quartiles[1] < first.quartiles[0]


class Timer:
    """Seconds of one call: a pair of events on a GPU, the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # On a GPU, written before each run: the host gets a start, so that its launches are not in the time.
        size = max(2 * last_level_cache(device), 256 << 20) if device.type == "cuda" else 0
        self._written = torch.zeros(size, dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            self._written.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            kept = function()
            end.record()
            end.synchronize()
            del kept
            return start.elapsed_time(end) / 1e3
        now = time.perf_counter()
        kept = function()
        seconds = time.perf_counter() - now
        del kept  # letting go of the results is not part of the work
        return seconds


def sweep(candidates: Sequence[Candidate], timer: Timer, ends: float) -> Candidate | None:
    """Check and time all, the table's entry first; the one to take, or None where none is right.

    Args:
        candidates: with the table's entry first; what became of each is written into it.
        timer: of the device they run on.
        ends: ``time.monotonic()`` when it should be over.  At least the table's entry is checked, and one round run.
    """
    now = time.monotonic()
    check_all(candidates, timer.device, now + CHECK_SHARE * (ends - now))
    sound = [one for one in candidates if one.status == RIGHT]
    if not sound:
        return None
    time_all(sound, timer, ends - FINAL_SHARE * max(ends - time.monotonic(), 0))
    table = candidates[0]
    if table.status != RIGHT:
        return _fastest(sound)
    rivals = [one for one in sound if _ratio(one.seconds, table.seconds) < 1 - tuned.TIE]
    if not rivals:
        return table
    best = _fastest(rivals)
    if time.monotonic() + LEAST_FINAL_ROUNDS * (best.median + table.median) / PATIENCE > ends:
        best.undecided = True
        return table
    play_off(table, best, timer, ends)
    faster = _ratio(best.final, table.final) < 1 - tuned.TIE and _is_no_chance(best.final, table.final)
    return best if faster else table


def check_all(candidates: Sequence[Candidate], device: torch.device, ends: float) -> None:
    """Give every candidate its status; the first one is checked whatever the time."""
    for place, candidate in enumerate(candidates):
        if place and time.monotonic() > ends:
            candidate.status = NO_TIME
            continue
        try:
            with tuned.using(device, candidate.entries):
                if candidate.check is not None:
                    candidate.check()
                started = time.monotonic()
                candidate.run(next(_turn))  # compiles and loads what the check did not
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                candidate.first = time.monotonic() - started
            candidate.status = RIGHT
        except Mismatch as error:
            candidate.status = f"wrong: {error}"
        except torch.OutOfMemoryError:
            candidate.status = "out of memory"
        except UnavailableBackendError as error:
            candidate.status = f"not here: {error}"
        except Exception as error:  # a compiler's error, a launch that is refused: others may do
            text = (str(error).strip() or "no message").splitlines()[0]
            candidate.status = f"failed: {type(error).__name__}: {text}"[:200]
        if candidate.status != RIGHT:
            _require_device(device, candidate)


def time_all(
    candidates: Sequence[Candidate], timer: Timer, ends: float, pruning: Mapping[int, float] = PRUNING
) -> None:
    """Rounds until ``ends``, over fewer and fewer candidates, but always the first; every one has one time at least."""
    table, quickest = candidates[0], min(one.first for one in candidates)
    live = [one for one in candidates if one is table or one.first < max(SLOW_SECONDS, SLOW_FACTOR * quickest)]
    for candidate in candidates:
        if candidate not in live:
            candidate.seconds.append(candidate.first)
    for done in range(MOST_ROUNDS):
        started = time.monotonic()
        for candidate in _from(done, live):
            if done == 0 and candidate is not table and started > ends:
                candidate.seconds.append(candidate.first)
            else:
                run_once(candidate, timer, candidate.seconds)
        late = 2 * time.monotonic() - started > ends  # another round as long as this one would end after it
        limit = pruning.get(done + 1)
        if late:
            limit = min(limit or 1.1, 1.1) if done + 1 < LEAST_ROUNDS else None
        if limit is not None:
            fastest = min(one.median for one in live)
            live = [one for one in live if one is table or one.median <= limit * fastest]
        if (late or len(live) < 2) and done + 1 >= LEAST_ROUNDS:
            break


def play_off(table: Candidate, rival: Candidate, timer: Timer, ends: float) -> None:
    """Rounds of these two alone, until the rival cannot win any more at the latest."""
    for done in range(FINAL_ROUNDS):
        lost = sum(a >= b for a, b in zip(rival.final, table.final, strict=True))
        if (done >= LEAST_FINAL_ROUNDS and time.monotonic() > ends) or _chance(
            FINAL_ROUNDS - lost, FINAL_ROUNDS
        ) > CHANCE:
            break
        for candidate in _from(done, [table, rival]):
            run_once(candidate, timer, candidate.final)


def run_once(candidate: Candidate, timer: Timer, into: list[float]) -> None:
    with tuned.using(timer.device, candidate.entries):
        turn = next(_turn)
        into.append(timer(lambda: candidate.run(turn)))


def _from(place: int, candidates: list[Candidate]) -> list[Candidate]:
    first = place % len(candidates)
    return candidates[first:] + candidates[:first]


def _ratio(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds that both took part in."""
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=False))


def _is_no_chance(mine: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two equal ones would seldom differ as often as these did."""
    won = sum(a < b for a, b in zip(mine, theirs, strict=True))
    return _chance(won, len(mine)) <= CHANCE


def _chance(won: int, rounds: int) -> float:
    """That a fair coin falls on one side ``won`` times or more."""
    return sum(math.comb(rounds, k) for k in range(won, rounds + 1)) / 2**rounds


def _fastest(candidates: Sequence[Candidate]) -> Candidate:
    """Among those within a tie of the fastest the first, which is the nearest to the table's entry."""
    best = min(one.median for one in candidates)
    return next(one for one in candidates if one.median <= best * (1 + tuned.TIE))


def _require_device(device: torch.device, candidate: Candidate) -> None:
    """After a kernel that faulted nothing on this GPU works any more in this process."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        raise RuntimeError(
            f"{device} no longer answers after a candidate ({dict(candidate.parameters)}): {error}"
        ) from error


# ---------------------------------------------------------------------------------------------- buffers


def last_level_cache(device: torch.device) -> int:
    """Bytes, at most 256 MiB; on a system that does not say, 64 MiB."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))
    with contextlib.suppress(OSError, ValueError):
        sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        found = [int(path.read_text().strip().rstrip("K")) << 10 for path in sizes]
        if found:
            return min(max(found), 256 << 20)
    return 64 << 20


def copies(size: int, device: torch.device, memory: int) -> int:
    """Of inputs of ``size`` bytes, so many that the last-level cache does not hold them all; at most 1/8 of memory."""
    wanted = -(-2 * last_level_cache(device) // max(size, 1)) + 1
    return max(2, min(wanted, memory // 8 // max(size, 1), 64))


def rotated(inputs: Sequence[Any], turn: int) -> Any:
    return inputs[turn % len(inputs)]


def fair_ends(weights: Sequence[float], ends: float) -> Iterator[float]:
    """When each of the stages should be over: what is left, in proportion to the weights of those still to come."""
    for place, weight in enumerate(weights):
        now = time.monotonic()
        yield now + max(ends - now, 0) * weight / sum(weights[place:])
