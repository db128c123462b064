"""Forward and backward of the token log-probabilities, beside PyTorch and beside the speed of a copy.

    python -m benchmarks.kernel_timings

For each shape and dtype, in one interleaved run, the median of:

    kernel            forward and backward, the gradient written over the logits (2 reads, 1 write)
    kernel_keep       the same with the gradient in memory of its own
    eager             F.log_softmax, gather, backward
    compile           torch.compile of the same
    copy              the fastest of torch.copy_ and memcpy over all threads; it reads and writes once
    host              one call of each kernel on a single row of 32: what Python and the binding cost

``vs_three_passes`` is kernel / (1.5 * copy).  Writes ``benchmarks/results/<device kind>/logps.csv``.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.prove import RESULTS, describe_device, describe_software
from grpo_kernels.backends import choose, device_kind

SHAPES = ((2048, 32000), (512, 151936))
DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    rows = []
    for shape in SHAPES:
        for dtype in DTYPES:
            medians = measure(*shape, dtype, options.rounds)
            rows += report(shape, dtype, medians)
    host = host_times()
    rows += [{"rows": 1, "vocabulary": 32, "dtype": "float32", "what": f"host_{k}", "ms": v} for k, v in host.items()]
    write(rows)


def measure(rows: int, vocabulary: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Median seconds of everything, each round running all of them once: neighbours then disturb all alike."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(1, rows, vocabulary, generator=generator).mul_(3).to(dtype)
    logits, other = source.clone(), torch.empty_like(source)
    leaf = source[0].clone().requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    logps, lse, grads = torch.empty(rows), torch.empty(rows), torch.full((rows,), 1e-3)
    backend = choose("cpu", source.device, dtype)

    def kernel(out: torch.Tensor) -> None:
        backend.token_logps_fwd(logits, targets, logps, lse, ignore_index=-100)
        backend.token_logps_bwd(logits, targets, lse, grads, out, ignore_index=-100)

    def plain(z: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(z, dim=-1).gather(1, target.unsqueeze(1)).squeeze(1).float()

    def forward_backward(function: Callable) -> None:
        leaf.grad = None
        function(leaf, targets).backward(grads)

    compiled = torch.compile(plain)
    timed = {
        "kernel": lambda: kernel(logits),
        "kernel_keep": lambda: kernel(other),
        "eager": lambda: forward_backward(plain),
        "compile": lambda: forward_backward(compiled),
        "copy_torch": lambda: other.copy_(source),
        "copy_memcpy": lambda: memcpy(other, source),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(rounds + 2):
        for name, function in timed.items():
            logits.copy_(source)  # the gradient has overwritten it
            start = time.perf_counter()
            function()
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    medians["copy"] = min(medians.pop("copy_torch"), medians.pop("copy_memcpy"))
    return medians


def memcpy(destination: torch.Tensor, source: torch.Tensor) -> None:
    """libc's memcpy, one part for each of torch's threads; ctypes lets go of the interpreter meanwhile."""
    size, parts = source.nbytes, torch.get_num_threads()
    step = -(-size // parts)
    workers = [
        threading.Thread(
            target=ctypes.memmove,
            args=(destination.data_ptr() + at, source.data_ptr() + at, min(step, size - at)),
        )
        for at in range(0, size, step)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def host_times() -> dict[str, float]:
    """Milliseconds of a call on next to nothing."""
    logits, targets = torch.zeros(1, 1, 32), torch.zeros(1, dtype=torch.int64)
    logps, lse, grads = torch.empty(1), torch.empty(1), torch.ones(1)
    backend = choose("cpu", logits.device, logits.dtype)
    calls = {
        "fwd": lambda: backend.token_logps_fwd(logits, targets, logps, lse, ignore_index=-100),
        "bwd": lambda: backend.token_logps_bwd(logits, targets, lse, grads, logits, ignore_index=-100),
    }
    result = {}
    for name, call in calls.items():
        samples = []
        for _ in range(50):
            start = time.perf_counter()
            for _ in range(100):
                call()
            samples.append((time.perf_counter() - start) / 100)
        result[name] = statistics.median(samples) * 1e3
    return result


def report(shape: tuple[int, int], dtype: torch.dtype, medians: dict[str, float]) -> list[dict[str, object]]:
    three_passes = 1.5 * medians["copy"]
    name = str(dtype).removeprefix("torch.")
    ratios = {what: medians[what] / medians["kernel"] for what in ("eager", "compile")}
    print(
        f"{shape[0]} x {shape[1]} {name}: "
        + ", ".join(f"{what} {seconds * 1e3:.2f} ms" for what, seconds in medians.items())
        + f"; {ratios['eager']:.1f} x eager, {ratios['compile']:.1f} x compile, "
        + f"{medians['kernel'] / three_passes:.2f} of three passes"
    )
    return [
        {"rows": shape[0], "vocabulary": shape[1], "dtype": name, "what": what, "ms": seconds * 1e3,
         "vs_kernel": seconds / medians["kernel"], "vs_three_passes": seconds / three_passes}
        for what, seconds in medians.items()
    ]  # fmt: skip


def write(rows: list[dict[str, object]]) -> None:
    device = torch.device("cpu")
    where = {"device": describe_device(device)["device"], "isa": choose("cpu", device, torch.float32).isa()}
    software = describe_software()
    software.pop("cuda")
    path = Path(RESULTS, device_kind(device), "logps.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = [*rows[0], *where, *software]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            numbers = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow({**numbers, **where, **software})
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
