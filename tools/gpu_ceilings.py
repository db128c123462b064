"""What this GPU can do at best, on random data: bytes a second of a copy, operations a second of cuBLAS.

    python tools/gpu_ceilings.py --json FILE [--seconds 8] [--tiny]

Medians of one interleaved run, the last-level cache overwritten before each (``benchmarks/measure.py``).  float32 is
multiplied in float32, without TensorFloat-32.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.measure import Line, copy_lines, interleaved
from benchmarks.shapes import normal

ROUNDS = 15


def gemm(rows: int, words: int, hidden: int, dtype: torch.dtype, device: torch.device) -> Line:
    """h Wᵀ of random numbers, into memory that is there."""
    generator = torch.Generator(device).manual_seed(0)
    h, weight = (normal((n, hidden), 1.0, dtype, generator) for n in (rows, words))
    out = torch.empty(rows, words, dtype=dtype, device=device)
    return Line(lambda: torch.mm(h, weight.t(), out=out))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go")
    parser.add_argument("--seconds", type=float, default=8, help="no more than 5 rounds after this")
    parser.add_argument("--tiny", action="store_true", help="shapes that say nothing, to see that it runs")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_ceilings: PyTorch sees no GPU on this machine", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    square, head, size = ((64,) * 3, (64, 128, 32), 1 << 16) if options.tiny else (
        (8192,) * 3, (16384, 128256, 4096), 2 << 30
    )  # fmt: skip
    gemms = {
        "bfloat16": (*square, torch.bfloat16),
        "bfloat16, head": (*head, torch.bfloat16),
        "float32": (*square, torch.float32),
    }
    lines = {"copy": copy_lines(size, device)["copy"]}
    lines |= {name: gemm(*shape, device) for name, shape in gemms.items()}
    for line in lines.values():
        line()
    times = interleaved(lines, device, rounds=ROUNDS, most_seconds=options.seconds)
    found = {"copy": {"bytes read and written": 2 * size, "TB/s": 2 * size / times["copy"].median / 1e12}}
    for name, (rows, words, hidden, _) in gemms.items():
        rate = 2 * rows * words * hidden / times[name].median / 1e12
        found[name] = {"rows, words, hidden": [rows, words, hidden], "TFLOP/s": rate}
    for name, entry in found.items():
        entry |= {"ms": 1e3 * times[name].median, "quartiles": [1e3 * x for x in times[name].quartiles]}
        entry["rounds"] = len(times[name].seconds)
        print(f"{name}: {entry}")
    options.json.write_text(json.dumps(found, indent=2) + "\n")
    rates = (f"{name} {entry['TFLOP/s']:.0f} TFLOP/s" for name, entry in found.items() if name != "copy")
    print(f"copy {found['copy']['TB/s']:.2f} TB/s, " + ", ".join(rates))
    return 0


if __name__ == "__main__":
    sys.exit(main())
