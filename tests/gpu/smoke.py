"""Every kernel of one backend on a few small shapes: ``python tests/gpu/smoke.py triton``.

What has to work before anything else is worth its time, and what compute-sanitizer watches.  No test framework and few
tensors, because there each access is checked.  Under the sanitizer tensors have allocations of their own
(PYTORCH_NO_CUDA_MEMORY_CACHING=1, set by ``tools/gpu_check.py``), so that a stray access does not fall into a
neighbour.  Results are compared with plain PyTorch's in float64, roughly: what is exact is held by the proof.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch

from grpo_kernels.backends import choose, torch_ops

IGNORE_INDEX = -100
DEVICE = "cuda"
ROUGHLY = 2.0**-5
"""Relative and absolute: some steps of bfloat16."""

Check = Callable[[ModuleType], None]


class WrongResultError(Exception):
    """Something was computed, and it is not what plain PyTorch computes."""


def require(what: str, got: torch.Tensor, want: torch.Tensor, allowed: float = ROUGHLY) -> None:
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    same_nan = torch.equal(got.isnan(), want.isnan())
    off = (got - want).abs().nan_to_num(nan=0.0)
    if not same_nan or (off > allowed * (1 + want.abs().nan_to_num(nan=0.0))).any():
        raise WrongResultError(f"{what}: off by {off.max().item():.3g}{'' if same_nan else ', NaN elsewhere'}")


def rows(module: ModuleType, dtype: torch.dtype, vocabulary: int, start: int) -> None:
    """Forward, backward and backward in place, of rows that begin ``start`` elements into their memory."""
    count = 6
    # Contiguous, and therefore of its own start: a slice of it is what moves the rows off 16 bytes.
    memory = torch.randn(count * vocabulary + start).to(dtype)
    targets = torch.tensor([0, vocabulary - 1, IGNORE_INDEX, vocabulary, -1, vocabulary // 2])
    results = {}
    for backend, place, wide in ((torch_ops, "cpu", torch.float64), (module, DEVICE, torch.float32)):
        source = memory.double() if backend is torch_ops else memory
        logits, labels = source.to(place)[start:].view(2, 3, vocabulary), targets.to(place)
        logps, lse, grads = (torch.full((count,), value, dtype=wide).to(place) for value in (0.0, 0.0, 0.5))
        out = torch.full(logits.shape, 0.0, dtype=logits.dtype).to(place)
        backend.token_logps_fwd(logits, labels, logps, lse, ignore_index=IGNORE_INDEX)
        backend.token_logps_bwd(logits, labels, lse, grads, out, ignore_index=IGNORE_INDEX)
        backend.token_logps_bwd(logits, labels, lse, grads, logits, ignore_index=IGNORE_INDEX)
        require("in place and out of place", logits, out, 0.0)
        results[place] = logps, out
    for name, got, want in zip(("log-probabilities", "gradient"), results[DEVICE], results["cpu"], strict=True):
        require(name, got, want)


def tail(module: ModuleType, pairs: int, groups: int, length: int) -> None:
    """The tail, packed and padded, and the weighted mean."""
    count = 2 * pairs * length
    inputs = {
        "token_logps": -torch.rand(count),
        "targets": torch.zeros(count, dtype=torch.int64),
        "ref_logps": torch.zeros(2 * pairs, dtype=torch.float64),
        "group_ids": torch.arange(pairs) % groups,
        "pair_weights": torch.ones(pairs, dtype=torch.float64),
    }
    boundaries = (torch.arange(2 * pairs + 1) * length).int()
    options = {"loss_type": 0, "beta": 0.1, "label_smoothing": 0.1, "length_normalize": True}
    for packed in (True, False):
        results = {}
        for backend, place in ((torch_ops, "cpu"), (module, DEVICE)):
            logps, targets, reference, ids, weights = (x.to(place) for x in inputs.values())
            f32, f64, i64 = (partial(torch.zeros, dtype=d) for d in (torch.float32, torch.float64, torch.int64))
            outputs = [
                x.to(place)
                for x in (f32(2 * pairs), f64(2 * pairs), f32(pairs), f32(2 * pairs), f32(pairs), f32(pairs),
                          f64(groups), i64(groups), f32(groups))
            ]  # fmt: skip
            backend.preference_tail(
                logps, targets, boundaries.to(place) if packed else None, reference, ids, weights, *outputs, **options,
                ignore_index=IGNORE_INDEX,
            )  # fmt: skip
            alpha, loss = torch.linspace(0.5, 1.5, groups).to(place), torch.zeros(()).to(place)
            backend.robust_loss(outputs[4], ids, alpha, torch.zeros(pairs).to(place), loss)
            results[place] = [*outputs, loss]
        names = ("sums", "lengths", "margins", "rewards", "losses", "slopes", "group sums", "counts", "means", "loss")
        for name, got, want in zip(names, results[DEVICE], results["cpu"], strict=True):
            require(name, got, want)


def tile(module: ModuleType, dtype: torch.dtype, wide: bool, words: int, first: int, softcap: float) -> None:
    """Both operations on one tile of the head; ``wide``: of a GEMM that answered in float32."""
    count = 5
    memory = torch.randn(count * words + first).to(torch.float32 if wide else dtype)
    targets = torch.tensor([7, 7 + words - 1, 0, 7 + words, -1])
    bias = torch.randn(words) if softcap else None
    options = {"start": 7, "softcap": softcap, "logit_scale": 0.5}
    results = {}
    for backend, place, state in ((torch_ops, "cpu", torch.float64), (module, DEVICE, torch.float32)):
        exact = backend is torch_ops
        logits = (memory.double() if exact else memory).to(place)[first:].view(count, words)
        exps, grads = (torch.zeros(count, words, dtype=torch.float64 if exact else dtype).to(place) for _ in range(2))
        labels, shift = targets.to(place), None if bias is None else bias.to(state).to(place)
        top, rest, picked, factor, scale = (
            torch.full((count,), value, dtype=state).to(place) for value in (-2.0, 1.0, 0.0, 0.0, 0.5)
        )
        again = logits.clone()
        backend.head_tile_fwd(again, shift, labels, top, rest, picked, factor, None, **options, shift=0)
        again.copy_(logits)
        backend.head_tile_fwd(again, shift, labels, top, rest, picked, factor, exps, **options, shift=3)
        again.copy_(logits)
        backend.head_tile_bwd(again, shift, labels, top, scale, scale, grads, **options)
        if not wide:
            again.copy_(logits)
            backend.head_tile_bwd(again, shift, labels, top, scale, scale, again, **options)
            require("in place and out of place", again, grads, 0.0)
        results[place] = top, rest, picked, factor, exps, grads
    names = ("top", "rest", "picked", "factor", "exponentials", "gradient")
    for name, got, want in zip(names, results[DEVICE], results["cpu"], strict=True):
        require(name, got, want)


def checks() -> dict[str, Check]:
    """By name, each kernel among the first."""
    f32, bf16 = torch.float32, torch.bfloat16
    found: dict[str, Check] = {
        "rows, bfloat16, V=1031, unaligned": partial(rows, dtype=bf16, vocabulary=1031, start=1),
        "tail, 9 pairs, 300 groups": partial(tail, pairs=9, groups=300, length=70),
        "tile, bfloat16, 1031 words, unaligned": partial(
            tile, dtype=bf16, wide=False, words=1031, first=1, softcap=0.0
        ),
    }
    for dtype, name in ((f32, "float32"), (bf16, "bfloat16")):
        for vocabulary, start in ((1, 0), (1031, 1), (4096, 0), (9001, 3)):
            check = partial(rows, dtype=dtype, vocabulary=vocabulary, start=start)
            found.setdefault(f"rows, {name}, V={vocabulary}{', unaligned' if start else ''}", check)
    found["tail, 1 pair"] = partial(tail, pairs=1, groups=1, length=5)
    found["tile, float32 logits, softcap"] = partial(tile, dtype=bf16, wide=True, words=2048, first=0, softcap=20.0)
    found["tile, 5001 words, softcap"] = partial(tile, dtype=bf16, wide=False, words=5001, first=3, softcap=20.0)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=("triton", "cuda"))
    backend = parser.parse_args().backend
    torch.manual_seed(0)
    module = choose(backend, torch.device(DEVICE), torch.float32)
    begin = time.monotonic()
    for name, check in checks().items():
        # Before it runs, for what comes back where a kernel hangs.
        print(f"{name} ...", end=" ", flush=True)
        start = time.monotonic()
        check(module)
        torch.cuda.synchronize()
        print(f"{time.monotonic() - start:.2f} s", flush=True)
    print(f"{backend}: every kernel ran, in {time.monotonic() - begin:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
