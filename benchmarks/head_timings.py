"""The LM head and its loss, beside three bare GEMMs, plain PyTorch and the peers that are installed.

    python -m benchmarks.head_timings [--rounds 7] [--dtypes bfloat16 float32] [--clocks wall cpu]

4 pairs of 256 tokens, H 1024, V 32000, policy only, every row labelled unless a line says otherwise.  One interleaved
run: each round runs every line once, so that neighbours disturb all alike.  Clocks: ``wall`` on all of torch's
threads; ``cpu``, the processor time of one thread, which a neighbour that takes the cores away does not lengthen.

    ms             median over the rounds;  best_ms the fastest
    vs_gemms       ms over that of h W^T, G W and G^T h at full size in the same run
    best_vs_gemms  the same of the fastest
    peak_mb        the most that PyTorch held at one time beyond the inputs, results included

Peers: Liger's DPO loss (compiled), TRL's chunked head, cut-cross-entropy's ``torch_compile``, PyTorch's own
``linear_cross_entropy``.  Writes ``benchmarks/results/<device kind>/head.csv``; there, lines of another clock or dtype
stay.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.prove import RESULTS, describe_device, describe_software
from grpo_kernels import fused_linear_grpo_loss, linear_sequence_logps
from grpo_kernels.backends import choose, device_kind

PAIRS, TOKENS, WIDTH, VOCABULARY = 4, 256, 1024, 32000
BETA = 0.1
EVERYTHING = 1 << 40
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Lines = dict[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--clocks", nargs="+", choices=CLOCKS, default=["wall", "cpu"])
    parser.add_argument("--backend", default="cpu")
    options = parser.parse_args()
    rows = []
    threads = torch.get_num_threads()
    for clock in options.clocks:
        torch.set_num_threads(1 if clock == "cpu" else threads)
        for name in options.dtypes:
            rows += measure(getattr(torch, name), clock, options.rounds, options.backend)
    write(rows)


def measure(dtype: torch.dtype, clock: str, rounds: int, backend: str) -> list[dict[str, object]]:
    lines = {k: v for k, v in all_lines(dtype, backend).items() if works(k, v)}
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    for _ in range(rounds):
        for name, function in lines.items():
            start = CLOCKS[clock]()
            function()
            seconds[name].append(CLOCKS[clock]() - start)
    unit, best_unit = statistics.median(seconds["three_gemms"]), min(seconds["three_gemms"])
    result = []
    for name, values in seconds.items():
        median, best = statistics.median(values), min(values)
        row = {
            "clock": clock, "threads": torch.get_num_threads(), "dtype": str(dtype).removeprefix("torch."),
            "what": name, "ms": median * 1e3, "best_ms": best * 1e3,
            "vs_gemms": median / unit, "best_vs_gemms": best / best_unit, "peak_mb": peak_bytes(lines[name]) / 1e6,
        }  # fmt: skip
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True)
        result.append(row)
    return result


def works(name: str, function: Callable[[], object]) -> bool:
    """Runs a line twice, which also compiles what compiles; a peer that fails says so and is left out."""
    try:
        function()
        function()
    except Exception as error:
        if not name.startswith("peer"):
            raise
        print(f"{name}: left out, {type(error).__name__}: {str(error).splitlines()[0][:150]}")
        return False
    return True


def all_lines(dtype: torch.dtype, backend: str) -> Lines:
    generator = torch.Generator().manual_seed(0)
    shape = (2 * PAIRS, TOKENS)
    hidden = torch.randn(*shape, WIDTH, generator=generator).to(dtype)
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.03).to(dtype)
    labels = torch.randint(0, VOCABULARY, shape, generator=generator)
    half = labels.masked_fill(torch.rand(shape, generator=generator) < 0.5, -100)
    group_ids, group_weights = torch.arange(PAIRS) % 2, torch.tensor([1.5, 0.5])

    def loss(label: torch.Tensor, budget: int, *, frozen: bool = False) -> Callable[[], object]:
        def run() -> None:
            h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
            out = fused_linear_grpo_loss(
                h, w, label, None, group_ids, group_weights, beta=BETA, shift=False, memory_budget=budget,
                backend=backend,
            )  # fmt: skip
            out.loss.backward()

        return run

    def no_grad() -> None:
        with torch.no_grad():
            linear_sequence_logps(hidden, weight, labels, shift=False, backend=backend)

    lines: Lines = {
        "three_gemms": three_gemms(hidden, weight),
        "full, budget 0": loss(labels, 0),
        "full, budget holds all": loss(labels, EVERYTHING),
        "frozen head": loss(labels, 0, frozen=True),
        "no grad": no_grad,
        "full, budget 0, half unlabelled": loss(half, 0),
        "frozen head, half unlabelled": loss(half, 0, frozen=True),
    }
    for name, logps in peers(labels).items():
        for frozen in (False, True):
            prefix = "" if name == "eager" else "peer: "
            lines[f"{prefix}{name}{', frozen' if frozen else ''}"] = preference_of(logps, hidden, weight, frozen)
    lines["peer: liger dpo, compiled"] = liger(hidden, weight, labels, frozen=False)
    lines["peer: liger dpo, compiled, frozen"] = liger(hidden, weight, labels, frozen=True)
    return lines


def three_gemms(hidden: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    """The unit: every GEMM of a head that trains, at full size, into memory that is there already."""
    h = hidden.reshape(-1, WIDTH)
    logits, grad = h @ weight.t(), torch.randn(h.shape[0], VOCABULARY).to(h.dtype)
    grad_h, grad_w = torch.empty_like(h), torch.empty_like(weight)

    def run() -> None:
        torch.mm(h, weight.t(), out=logits)
        torch.mm(grad, weight, out=grad_h)
        torch.mm(grad.t(), h, out=grad_w)

    return run


def peers(labels: torch.Tensor) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """(hidden rows, weight) → token log-probabilities, by everyone who offers them."""
    flat = labels.reshape(-1)

    def eager(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (h @ w.t()).float().log_softmax(-1).gather(1, flat.unsqueeze(1)).squeeze(1)

    def trl_chunked(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        from trl.trainer import utils

        size = utils._CHUNKED_LOGPROB_CHUNK_SIZE
        return utils._ChunkedLogProbFunction.apply(h, w, None, flat, 1.0, size, None, 1.0, ("log_probs",))[0]

    def cut_cross_entropy(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(h, w, flat, reduction="none", impl="torch_compile")

    def pytorch_linear_cross_entropy(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        # It sums within itself; a preference loss cannot stand on that, but its time can be seen.
        return -functional.linear_cross_entropy(h, w, flat, reduction="sum").expand(flat.shape[0]) / flat.shape[0]

    return {
        "eager": eager,
        "trl chunked": trl_chunked,
        "cut-cross-entropy torch_compile": cut_cross_entropy,
        "pytorch linear_cross_entropy": pytorch_linear_cross_entropy,
    }


def preference_of(
    logps: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    frozen: bool,
) -> Callable[[], object]:
    def run() -> None:
        h, w = hidden.reshape(-1, WIDTH).detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
        sums = logps(h, w).float().view(2 * PAIRS, TOKENS).sum(1)
        (-functional.logsigmoid(BETA * (sums[:PAIRS] - sums[PAIRS:]))).mean().backward()

    return run


def liger(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, frozen: bool) -> Callable[[], object]:
    module = []

    def run() -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        if not module:
            module.append(LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False))
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
        module[0](w, h, labels)[0].backward()

    return run


def peak_bytes(function: Callable[[], object]) -> int:
    """The highest running sum of PyTorch's allocations and releases over one run."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def write(rows: list[dict[str, object]]) -> None:
    device = torch.device("cpu")
    where = {"device": describe_device(device)["device"], "isa": choose("cpu", device, torch.float32).isa()}
    software = describe_software()
    software.pop("cuda")
    software.pop("threads")
    for package in ("liger_kernel", "trl", "cut_cross_entropy"):
        try:
            software[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            software[package] = ""
    path = Path(RESULTS, device_kind(device), "head.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = [
        {**{key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()}, **where,
         **software}
        for row in rows
    ]  # fmt: skip
    measured = {(row["clock"], row["dtype"]) for row in fresh}
    kept = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    kept = [row for row in kept if row.keys() == fresh[0].keys() and (row["clock"], row["dtype"]) not in measured]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(fresh[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(kept + fresh, key=lambda row: (row["clock"], row["dtype"])))
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
