"""Log-probabilities of the labels from logits, forward and backward over the vocabulary.

    python -m benchmarks logps

The work: log-probability of each row's label, and for "forward + backward" the gradient of the logits for a given
gradient of each log-probability.  By formula it has to read the logits once forward, and to read and write them once
backward: rows · V · itemsize · (1 or 3) bytes, labelled rows only but for the write; 4 operations an element forward
(maximum, difference, exponential, sum) and 3 backward.  "in place" lets backward write over the logits; "kernels
alone" are a backend's own two functions, the gradient in memory that is there already.

Errors are taken of 64 rows spread over the batch.
"""

from __future__ import annotations

from argparse import Namespace
from typing import NamedTuple

import torch

from benchmarks import peers, suite
from benchmarks.measure import Line, gemm_line
from benchmarks.results import Row
from benchmarks.shapes import HEADS, IGNORE_INDEX, normal
from benchmarks.suite import OURS, Errors, Outputs, Settings, Work
from grpo_kernels import available_backends, token_logps
from grpo_kernels.backends import choose

SETTINGS = Settings(rounds=15, most_seconds=5.0, preload=peers.PRELOAD)
FORWARD, BOTH = "forward", "forward + backward"
SAMPLE = 64
GEMM = (1024, 1024, 4096)
"""Rows, H and V of the bare GEMMs whose rate stands beside the times."""

EPSILON = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Of the gradient, beyond twice plain PyTorch's error: a rounding to the dtype.  Log-probabilities are float32."""


class Case(NamedTuple):
    case: str
    work: str
    dtype: str
    rows: int
    vocabulary: int
    labelled: float = 1.0
    curve: str = ""

    def fields(self) -> Row:
        return {
            "case": self.case, "work": self.work, "dtype": self.dtype, "rows": self.rows,
            "labelled": round(self.rows * self.labelled), "vocabulary": self.vocabulary, "curve": self.curve,
        }  # fmt: skip


def cases(size: str, dtypes: list[str] | None) -> list[Case]:
    """The shapes of real vocabularies, then the two curves."""
    tiny, llama, qwen, gemma = (head.vocabulary for head in HEADS)
    rows = {"cpu": {tiny: 2048, llama: 512, 151936: 512, gemma: 256},
            "gpu": {tiny: 16384, llama: 16384, qwen: 8192, gemma: 8192}}[size]  # fmt: skip
    if size == "gpu":
        rows = {vocabulary: fitting(count, vocabulary) for vocabulary, count in rows.items()}
    made = []
    for vocabulary, count in rows.items():
        reference = vocabulary in (tiny, 151936)
        for dtype in dtypes or (["float32", "bfloat16"] if reference else ["bfloat16"]):
            made.append(Case(f"{count} x {vocabulary}", BOTH, dtype, count, vocabulary))
    made.sort(key=lambda case: case.vocabulary != tiny)  # with what tells most first
    fixed, count = {"cpu": 256, "gpu": 4096}[size], rows[tiny]
    curves = [
        Case(f"curve: {n} rows", BOTH, "bfloat16", n, tiny, curve="rows")
        for n in (fixed // 4, fixed // 2, fixed, 2 * fixed, 4 * fixed, 8 * fixed)
    ]
    curves += [
        Case(f"curve: V {v}", BOTH, "bfloat16", fixed, v, curve="vocabulary")
        for v in (4000, 8000, 16000, tiny, 64000, llama, gemma)
    ]
    others = [Case(f"{count} x {tiny}, half labelled", BOTH, "bfloat16", count, tiny, labelled=0.5),
              Case(f"{count} x {tiny}", FORWARD, "bfloat16", count, tiny)]  # fmt: skip
    return made[:2] + curves + made[2:] + others


def fitting(rows: int, vocabulary: int) -> int:
    """Fewer rows where the GPU has less memory: in float32, eager holds the logits several times over."""
    while torch.cuda.is_available() and rows > 64 and 28 * rows * vocabulary > torch.cuda.mem_get_info()[0]:
        rows //= 2
    return rows


def main(options: Namespace) -> int:
    return suite.run("logps", cases(options.size, options.dtypes), build, options, SETTINGS)


def build(case: Case, device: torch.device) -> Work:
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.rows, case.vocabulary)
    source = normal(shape, 3, dtype, generator)
    labels = torch.randint(0, case.vocabulary, (case.rows,), generator=generator, device=device)
    labels[: round(case.rows * (1 - case.labelled))] = IGNORE_INDEX
    grads = torch.randn(case.rows, generator=generator, device=device)
    leaf = source.clone().requires_grad_()
    backward = case.work == BOTH

    def line(function: peers.LogitsFunction) -> Line:
        def run() -> Outputs:
            if not backward:
                with torch.no_grad():
                    return {"logps": function(leaf, labels)}
            # A leaf may not be written over; what a model returns is none.
            logits = leaf.view(shape)
            logps = function(logits, labels)
            (grad,) = torch.autograd.grad(logps, logits, grads.to(logps.dtype))
            return {"logps": logps.detach(), "grad": grad}

        return Line(run, restore)  # some write over the logits

    def restore() -> None:
        with torch.no_grad():
            leaf.copy_(source)

    def ours(backend: str, overwrite: bool) -> peers.LogitsFunction:
        def function(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return token_logps(
                logits.unsqueeze(0), labels.unsqueeze(0), shift=False, overwrite_logits=overwrite, backend=backend
            ).squeeze(0)

        return function

    def kernels(name: str) -> Line:
        """The backend's two functions on memory that is there: no autograd, no allocation."""
        module, targets, out = choose(name, device, dtype), labels.long(), torch.empty_like(source).unsqueeze(0)
        logps, lse = torch.empty_like(grads), torch.empty_like(grads)

        def run() -> Outputs:
            module.token_logps_fwd(leaf.detach().unsqueeze(0), targets, logps, lse, ignore_index=IGNORE_INDEX)
            if not backward:
                return {"logps": logps}
            module.token_logps_bwd(leaf.detach().unsqueeze(0), targets, lse, grads, out, ignore_index=IGNORE_INDEX)
            return {"logps": logps, "grad": out.squeeze(0)}

        return Line(run, restore)

    variants: dict[str, Line | str] = {}
    for name, reason in available_backends().items():
        if (name == "cpu" and device.type != "cpu") or (name in ("cuda", "triton") and device.type != "cuda"):
            continue
        # Plain PyTorch operations are no faster in place.
        places = {", in place": True, "": False} if backward and name != "torch" else {"": False}
        for suffix, overwrite in places.items():
            if reason is not None:
                variants[f"{OURS}{name}{suffix}"] = reason
            else:
                variants[f"{OURS}{name}{suffix}"] = line(ours(name, overwrite))
        if reason is None and name != "torch":
            variants[f"{OURS}{name}, kernels alone"] = kernels(name)
    ours_here = next(name for name, variant in variants.items() if isinstance(variant, Line))
    for name, function in peers.of_logits(device, dtype).items():
        variants[name] = function if isinstance(function, str) else line(function)
    if case.curve:
        variants = {name: variants[name] for name in (ours_here, "eager")}
    rows, words, size = round(case.rows * case.labelled), case.vocabulary, dtype.itemsize
    return Work(
        variants, ours=ours_here, plain=line(peers.eager),
        errors=Truth(source, labels, grads).errors,
        epsilon=(1e-6, EPSILON[dtype]),
        bytes=words * size * (rows + (rows + case.rows if backward else 0)),
        operations=float(rows * words * (7 if backward else 4)),
        copy_bytes=case.rows * words * size,
        gemms=gemm_line(*GEMM, dtype, device), gemm_operations=6.0 * GEMM[0] * GEMM[1] * GEMM[2],
        memory=backward and not case.curve and case.labelled == 1 and case.vocabulary == HEADS[0].vocabulary,
    )  # fmt: skip


class Truth:
    """float64 of a sample of rows."""

    def __init__(self, logits: torch.Tensor, labels: torch.Tensor, grads: torch.Tensor) -> None:
        count = labels.shape[0]
        self.index = torch.linspace(0, count - 1, min(SAMPLE, count)).long().to(labels.device)
        self.logits, self.labels, self.grads = logits, labels[self.index], grads[self.index]

    def errors(self, outputs: Outputs) -> Errors:
        z = self.logits[self.index].double().requires_grad_()
        truth = peers.eager(z, self.labels)
        logps_off = outputs["logps"][self.index].double() - truth.detach()
        error = (logps_off.abs().max() / truth.detach().abs().max()).item()
        if "grad" not in outputs:
            return error, None
        (grad,) = torch.autograd.grad(truth, z, self.grads.double())
        return error, ((outputs["grad"][self.index].double() - grad).norm() / grad.norm()).item()
