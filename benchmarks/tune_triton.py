"""Time the candidates for the table of the Triton kernels and print the table: ``python -m benchmarks.tune_triton``.

For each direction, bytes per element and range of vocabularies: every block size and number of warps that leaves each
thread 16 to 128 bytes of a block.  Prints each candidate's share of a copy's bandwidth, then the winners in the form in
which ``grpo_kernels/backends/triton/table.py`` holds them.  Needs a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

# One vocabulary to stand for each range of the table, and the range's end.
RANGES = ((1000, 1024), (8192, 8192), (128256, float("inf")))
BLOCKS = (512, 1024, 2048, 4096, 8192, 16384)
WARPS = (1, 2, 4, 8, 16, 32)
TIE = 0.99
"""A candidate this close to the best is as good; among those the one with the fewest threads is taken."""


def candidates(itemsize: int, largest: float) -> list[tuple[int, int]]:
    """(block_v, num_warps), no thread without 16 bytes and none with more than 128, warps counted in threads of 32."""
    pairs = itertools.product(BLOCKS, WARPS)
    return [(b, w) for b, w in pairs if 16 <= b * itemsize // (32 * w) <= 128 and b <= max(largest, 1024)]


def bench(function) -> float:
    """Median milliseconds."""
    import triton

    return triton.testing.do_bench(function, warmup=10, rep=60, return_mode="median")


def tune(direction: str, dtype: torch.dtype, vocabulary: int, largest: float, gigabytes: float) -> tuple[int, int]:
    from grpo_kernels.backends.triton import table, token_logps_bwd, token_logps_fwd

    rows = max(1, int(gigabytes * 2**30) // (vocabulary * dtype.itemsize))
    logits = torch.randn(1, rows, vocabulary, device="cuda").to(dtype)
    out = torch.empty_like(logits)
    targets = torch.randint(0, vocabulary, (rows,), device="cuda")
    logps, lse, grads = (torch.ones(rows, device="cuda") for _ in range(3))
    passes = 1 if direction == "fwd" else 2
    copy_rate = 2 / bench(lambda: out.copy_(logits))
    token_logps_fwd(logits, targets, logps, lse, ignore_index=-100)

    def run():
        if direction == "fwd":
            token_logps_fwd(logits, targets, logps, lse, ignore_index=-100)
        else:
            token_logps_bwd(logits, targets, lse, grads, out, ignore_index=-100)

    key = (direction, dtype.itemsize)
    entries, shares = table.TOKEN_LOGPS[key], {}
    for block_v, num_warps in candidates(dtype.itemsize, largest):
        table.TOKEN_LOGPS[key] = ((float("inf"), block_v, num_warps),)
        try:
            shares[block_v, num_warps] = passes / bench(run) / copy_rate
        finally:
            table.TOKEN_LOGPS[key] = entries
        print(f"  {direction} {dtype} V={vocabulary} block_v={block_v} num_warps={num_warps}: "
              f"{shares[block_v, num_warps]:.0%} of copy", flush=True)  # fmt: skip
    best = max(shares.values())
    return min((pair for pair, share in shares.items() if share >= TIE * best), key=lambda pair: (pair[1], pair[0]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of logits; more than the last-level cache")
    arguments = parser.parse_args()
    from grpo_kernels import backends

    reason = "PyTorch sees no GPU on this machine" if not torch.cuda.is_available() else backends()["triton"]
    if reason is not None:
        print(f"tune_triton: {reason}; nothing was timed", file=sys.stderr)
        return 2
    lines = []
    for direction, dtype in itertools.product(("fwd", "bwd"), (torch.bfloat16, torch.float32)):
        winners = [(end, *tune(direction, dtype, v, end, arguments.gigabytes)) for v, end in RANGES]
        ends = ['float("inf")' if end == float("inf") else str(end) for end, _, _ in winners]
        entry = ", ".join(f"({end}, {b}, {w})" for end, (_, b, w) in zip(ends, winners, strict=True))
        lines.append(f'    ("{direction}", {dtype.itemsize}): ({entry}),')
    print(f"\n# {torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("TOKEN_LOGPS: dict[tuple[Direction, int], tuple[tuple[float, int, int], ...]] = {")
    print("\n".join([*lines, "}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
