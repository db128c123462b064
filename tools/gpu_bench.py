"""Times of every backend on this GPU, beside plain PyTorch and torch.compile: the rows that ``gpu_check.py`` keeps.

Each variant does the same work, log-probabilities of the targets and the gradient of the logits, through autograd.
A variant whose result is wrong gets no time.  Rounds are interleaved, so that a clock that sags sags for all; medians.
GB/s is by formula (one read forward; one read and one write backward), beside a copy of the same bytes in the same run.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from grpo_kernels import backends, token_logps
from grpo_kernels.backends import choose

SHAPES = [(16384, 128256, torch.bfloat16), (8192, 32000, torch.float32), (8192, 50257, torch.bfloat16)]
TAILS = [(64, 256, 4), (64, 4096, 4), (64, 256, 10000)]
COLUMNS = ["what", "variant", "dtype", "ms", "p10", "p90", "GB/s", "of copy", "peak MiB", "error"]
ROUNDS = 15

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def plain(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What people write: log_softmax in float32, then gather."""
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def variants() -> dict[str, Function]:
    found: dict[str, Function] = {}
    for name in ("triton", "cuda", "torch"):
        if backends()[name] is None:
            found[name] = lambda z, y, name=name: token_logps(z, y, shift=False, backend=name)
    return {**found, "eager": plain, "torch.compile": torch.compile(plain)}


def milliseconds(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def row(what: str, variant: str, dtype: object, times: list[float], moved: float = 0, copy: float = 0, **more) -> dict:
    """One line of the table; ``moved`` in bytes, ``copy`` in bytes a second."""
    times = sorted(times)
    median = statistics.median(times)
    rate = moved / median * 1e3
    line = {
        "what": what, "variant": variant, "dtype": str(dtype).removeprefix("torch."), "ms": f"{median:.3f}",
        "p10": f"{times[len(times) // 10]:.3f}", "p90": f"{times[-1 - len(times) // 10]:.3f}",
    }  # fmt: skip
    if moved:
        line["GB/s"] = f"{rate / 1e9:.0f}"
    if copy:
        line["of copy"] = f"{rate / copy:.0%}"
    return {**dict.fromkeys(COLUMNS, ""), **line, **more}


def failed(what: str, variant: str, dtype: object, why: object) -> dict:
    first = str(why).strip().splitlines()[0][:60] if str(why).strip() else type(why).__name__
    line = {"what": what, "variant": variant, "dtype": str(dtype).removeprefix("torch."), "error": first}
    return {**dict.fromkeys(COLUMNS, ""), **{key: text.replace(",", ";") for key, text in line.items()}}


def error_of(function: Function, logits: torch.Tensor, labels: torch.Tensor, grads: torch.Tensor) -> float:
    """Largest error of the logps of some rows, and of the gradient relative to its largest entry, against float64."""
    part = slice(0, min(64, logits.shape[1]))
    z = logits[:, part].detach().clone().requires_grad_()
    logps = function(z, labels[:, part])
    (got,) = torch.autograd.grad(logps, z, grads[:, part])
    exact = z.detach().double().requires_grad_()
    truth = torch.log_softmax(exact, -1).gather(-1, labels[:, part].unsqueeze(-1)).squeeze(-1)
    (want,) = torch.autograd.grad(truth, exact, grads[:, part].double())
    # float32 holds z - lse to some 1e-6, which the exponential hands on; bfloat16's own rounding is larger.
    step = max(torch.finfo(logits.dtype).eps, 2.0**-18)
    gradient_error = ((got.double() - want).abs().max() / want.abs().max()).item() / (2 * step)
    return max((logps.double() - truth).abs().max().item(), gradient_error * 1e-4)


def vocabulary_rows(rows: int, vocabulary: int, dtype: torch.dtype, ends: float) -> list[dict]:
    size = rows * vocabulary * dtype.itemsize
    # Eager holds the logits in float32 three times over: leave it room, and all variants the same rows.
    while size * 8 * (4 / (2 * dtype.itemsize)) > torch.cuda.mem_get_info()[0]:
        rows, size = rows // 2, size // 2
    what = f"{rows}x{vocabulary}"
    logits = torch.empty(1, rows, vocabulary, dtype=dtype, device="cuda").normal_().mul_(3).requires_grad_()
    labels = torch.randint(0, vocabulary, (1, rows), device="cuda")
    grads = torch.randn(1, rows, device="cuda")
    steps: dict[tuple[str, str], Callable[[], object]] = {}
    lines, errors, peaks = [], {}, {}
    for name, function in variants().items():

        def forward(function=function):
            with torch.no_grad():
                return function(logits, labels)

        def both(function=function):
            return torch.autograd.grad(function(logits, labels), logits, grads)

        try:
            errors[name] = error_of(function, logits, labels, grads)
            if not errors[name] < 1e-4:
                raise ValueError(f"wrong: error {errors[name]:.1e}; not timed")
            for part, step in (("forward", forward), ("forward+backward", both)):
                step()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step()
                torch.cuda.synchronize()
                peaks[name, part] = (torch.cuda.max_memory_allocated() - before) >> 20
                steps[name, part] = step
        except Exception as error:
            lines.append(failed(what, name, dtype, error))
            steps = {key: step for key, step in steps.items() if key[0] != name}
    target = torch.empty_like(logits)
    steps["copy", "copy"] = lambda: target.copy_(logits.detach())
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(ROUNDS):
        if time.monotonic() > ends and times["copy", "copy"]:
            break
        for key, step in steps.items():
            times[key].append(milliseconds(step))
    copy = 2 * size / statistics.median(times["copy", "copy"]) * 1e3
    for (name, part), seen in times.items():
        passes = {"forward": 1, "forward+backward": 3, "copy": 2}[part]
        extra = {} if name == "copy" else {"error": f"{errors[name]:.0e}", "peak MiB": str(peaks[name, part])}
        lines.append(row(f"{what} {part}", name, dtype, seen, passes * size, copy, **extra))
    return lines


def tail_rows(pairs: int, length: int, groups: int) -> list[dict]:
    """The tail alone, replayed from a CUDA graph so that launches do not count."""
    rows, lines, what = 2 * pairs * length, [], f"tail {2 * pairs}x{length} G={groups}"
    logps, targets = -torch.rand(rows, device="cuda"), torch.zeros(rows, dtype=torch.int64, device="cuda")
    ids = torch.randint(0, groups, (pairs,), device="cuda")
    sizes = (2 * pairs, 2 * pairs, pairs, 2 * pairs, pairs, pairs, groups, groups, groups)
    outputs = [torch.zeros(n, device="cuda") for n in sizes]
    outputs[1], outputs[6], outputs[7] = outputs[1].double(), outputs[6].double(), outputs[7].long()
    for name in ("triton", "cuda"):
        if backends()[name] is not None:
            continue
        module = choose(name, torch.device("cuda"), torch.float32)

        def run(module=module):
            module.preference_tail(
                logps, targets, None, None, ids, None, *outputs, loss_type=0, beta=0.1, label_smoothing=0.0,
                length_normalize=False, ignore_index=-100,
            )  # fmt: skip

        try:
            run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(20):
                    run()
            times = [milliseconds(graph.replay) / 20 for _ in range(ROUNDS)]
            lines.append(row(what, name, torch.float32, times, 12 * rows))
        except Exception as error:
            lines.append(failed(what, name, torch.float32, error))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=75, help="no new measurement begins after this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_bench: PyTorch sees no GPU on this machine", file=sys.stderr)
        return 2
    ends = time.monotonic() + arguments.seconds
    lines: list[dict] = []
    jobs = [lambda shape=shape: tail_rows(*shape) for shape in TAILS]
    jobs += [lambda shape=shape: vocabulary_rows(*shape, ends) for shape in SHAPES]
    for job in jobs:
        if time.monotonic() < ends:
            lines += job()
            torch.cuda.empty_cache()
            # After each job, so that a run which is stopped leaves what it has.
            with open(arguments.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(lines)
    print(f"{len(lines)} rows in {arguments.csv.name}")
    return 1 if any(line["error"].startswith("wrong") for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
