"""What one rank of a split vocabulary computes, holds and sends, by how many ranks share it.

    python -m benchmarks.vocab_parallel [--ranks 1 2 4 8] [--rounds 3] [--clocks wall cpu] [--quick]

4 pairs of 128 tokens, all scored, H 1024, V 32000, bfloat16.  The ranks are gloo processes of this machine and would
only take cores from one another, so they take turns: a process computes while it holds a lock, lets go of it when it
enters a collective and takes it again when it leaves.  Its time is the time it held the lock, on all of torch's threads
(``wall``), or the processor time of one thread (``cpu``).  Waiting for others and for the network is in no time here.

    case      the work is shared by so many ranks, ``curve``: those of one case differ in nothing else
    ms        median over the rounds, of the slowest rank
    peak_mib  the most that PyTorch held at one time beyond the inputs, results included; of the rank that held most
    bytes     what one rank handed to collectives in one call, counted; of the rank that handed over most

"gather logits" is what all this spares: each rank gathers all logits and goes on as if it were alone.
Writes ``benchmarks/results/<device kind>/vocab_parallel.csv``; lines of another clock stay.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.prove import RESULTS
from benchmarks.results import Row, merge, results_path
from grpo_kernels import fused_grpo_loss, fused_linear_grpo_loss, linear_sequence_logps

PAIRS, TOKENS, WIDTH, VOCABULARY, DTYPE = 4, 128, 1024, 32000, torch.bfloat16
EVERYTHING = 1 << 40
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LIMIT = timedelta(minutes=3)

Lines = dict[str, Callable[[], object]]


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a process that waits for its turn must not spin
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vocab_parallel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="how many share the vocabulary")
    parser.add_argument("--rounds", type=int, default=3, help="beyond two that are not counted")
    parser.add_argument("--clocks", nargs="+", choices=CLOCKS, default=["wall", "cpu"])
    parser.add_argument("--quick", action="store_true", help="one round of small shapes, nothing written")
    options = parser.parse_args(arguments)
    if min(options.ranks) < 1 or max(options.ranks) > VOCABULARY:
        parser.error(f"--ranks must be from 1 to {VOCABULARY}, got {options.ranks}")
    rows: list[Row] = []
    for clock in options.clocks:
        threads = 1 if clock == "cpu" else torch.get_num_threads()
        for ranks in options.ranks:
            rows += measure(ranks, clock, threads, 1 if options.quick else options.rounds, options.quick)
    if not options.quick:
        path = results_path("vocab_parallel", torch.device("cpu"), RESULTS)
        merge(path, rows, torch.device("cpu"))
        print(f"wrote {path}")


def measure(ranks: int, clock: str, threads: int, rounds: int, quick: bool) -> list[Row]:
    """One row a line of what so many ranks do."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, folder, clock, threads, rounds, quick)
        torch.multiprocessing.spawn(on_one_rank, arguments, nprocs=ranks)
        found = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(ranks)]
    shape = shapes(quick)
    result = []
    for name in found[0]:
        of_ranks = [rank[name] for rank in found]
        seconds = max((rank["seconds"] for rank in of_ranks), key=statistics.median)
        quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        row: Row = {
            "case": name, "work": f"one of {ranks} ranks", "dtype": str(DTYPE).removeprefix("torch."), "clock": clock,
            "rows": shape["rows"], "labelled": shape["rows"], "vocabulary": shape["vocabulary"],
            "hidden": shape["width"],
            "pairs": shape["pairs"], "groups": 2, "curve": ranks, "variant": "grpo_kernels", "status": "ok",
            "ms": statistics.median(seconds) * 1e3, "q1_ms": quartiles[0] * 1e3, "q3_ms": quartiles[2] * 1e3,
            "best_ms": min(seconds) * 1e3, "rounds": len(seconds), "threads": threads,
            "peak_mib": max(rank["peak"] for rank in of_ranks) / 2**20, "peak_by": "allocations",
            "bytes": max(rank["bytes"] for rank in of_ranks),
        }  # fmt: skip
        sent = int(str(row["bytes"])) / shape["rows"]
        print(
            f"{clock} x{threads}, {ranks} ranks, {name}: {row['ms']:.4g} ms, {row['peak_mib']:.4g} MiB, "
            f"{sent:.6g} bytes sent a row", flush=True,
        )  # fmt: skip
        result.append(row)
    return result


def shapes(quick: bool) -> dict[str, int]:
    """A few words and rows where it is only to be seen to run."""
    pairs, tokens = (1, 16) if quick else (PAIRS, TOKENS)
    width, vocabulary = (32, 1000) if quick else (WIDTH, VOCABULARY)
    return {"pairs": pairs, "tokens": tokens, "rows": 2 * pairs * tokens, "width": width, "vocabulary": vocabulary}


class Turns:
    """One process computes at a time; counts its seconds, and the bytes that it hands to collectives."""

    def __init__(self, path: Path, clock: str) -> None:
        self._file = path.open("w")
        self._clock = CLOCKS[clock]
        self.seconds, self.bytes = 0.0, 0
        for name in ("all_gather", "all_reduce"):
            setattr(dist, name, self._beside(getattr(dist, name), tensor_at=name == "all_gather"))

    def _beside(self, collective: Callable[..., Any], tensor_at: int) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            self.bytes += arguments[tensor_at].nbytes
            self.give()
            try:
                return collective(*arguments, **options)
            finally:
                self.take()

        return run

    def take(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._since = self._clock()

    def give(self) -> None:
        self.seconds += self._clock() - self._since
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def __call__(self, function: Callable[[], object]) -> tuple[float, int]:
        """Seconds and bytes of one call that all ranks make."""
        dist.barrier()
        self.seconds, self.bytes = 0.0, 0
        self.take()
        kept = function()
        self.give()
        del kept
        return self.seconds, self.bytes


def on_one_rank(rank: int, ranks: int, folder: str, clock: str, threads: int, rounds: int, quick: bool) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=LIMIT)
    turns = Turns(Path(folder, "turn"), clock)
    lines = all_lines(rank, ranks, quick)
    results: dict[str, dict[str, Any]] = {}
    for name, function in lines.items():
        turns(function)
        results[name] = {"seconds": [], "peak": peak_bytes(lambda function=function: turns(function))}
    for _ in range(rounds):
        for name, function in lines.items():
            seconds, results[name]["bytes"] = turns(function)
            results[name]["seconds"].append(seconds)
    torch.save(results, Path(folder, f"{rank}.pt"))
    dist.barrier()  # who leaves first would take the connection along that another still reads from
    dist.destroy_process_group()


def all_lines(rank: int, ranks: int, quick: bool) -> Lines:
    """This rank's part of each work; of one rank the whole, without a group."""
    shape = shapes(quick)
    generator = torch.Generator().manual_seed(0)
    sequences = (2 * shape["pairs"], shape["tokens"])
    hidden = torch.randn(*sequences, shape["width"], generator=generator).to(DTYPE)
    weight = (torch.randn(shape["vocabulary"], shape["width"], generator=generator) * 0.03).to(DTYPE)
    labels = torch.randint(0, shape["vocabulary"], sequences, generator=generator)
    edges = [rank * shape["vocabulary"] // ranks for rank in range(ranks + 1)]
    words = slice(edges[rank], edges[rank + 1])
    weight = weight[words].clone()
    logits = hidden @ weight.t()
    given: dict[str, Any] = {"shift": False, "backend": "cpu"}
    shard = given | ({"tp_group": dist.group.WORLD, "vocab_start": words.start} if ranks > 1 else {})
    pairs = None, torch.arange(shape["pairs"]) % 2, torch.tensor([1.5, 0.5])

    def head(budget: int, *, frozen: bool = False) -> Callable[[], object]:
        def run() -> object:
            h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
            fused_linear_grpo_loss(h, w, labels, *pairs, memory_budget=budget, **shard).loss.backward()
            return h.grad, w.grad

        return run

    def no_grad() -> object:
        with torch.no_grad():
            return linear_sequence_logps(hidden, weight, labels, **shard)

    def from_logits() -> object:
        z = logits.detach().requires_grad_()
        fused_grpo_loss(z, labels, *pairs, **shard).loss.backward()
        return z.grad

    def gathered() -> object:
        parts = [logits.new_empty(*sequences, edges[other + 1] - edges[other]) for other in range(ranks)]
        dist.all_gather(parts, logits)
        z = torch.cat(parts, dim=-1).requires_grad_()
        fused_grpo_loss(z, labels, *pairs, **given).loss.backward()
        return None if z.grad is None else z.grad[..., words]

    lines: Lines = {
        "head, nothing kept": head(0),
        "head, all kept": head(EVERYTHING),
        "head frozen": head(0, frozen=True),
        "head, no gradients": no_grad,
        "logits": from_logits,
    }  # fmt: skip
    if ranks > 1 and shape["vocabulary"] % ranks == 0:
        lines["gather logits"] = gathered
    return lines


def peak_bytes(function: Callable[[], object]) -> int:
    """The highest running sum of PyTorch's allocations and releases over one run."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    main()
