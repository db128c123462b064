"""From hidden states through the LM head to a preference loss, and back.

    python -m benchmarks head
    python -m benchmarks head --only reference --dtypes bfloat16 float32 --clocks wall cpu

The work: the DPO loss (beta 0.1, no reference, every pair counting the same) of 2B sequences, and its gradients of
hidden states and weight ("full"), of hidden states alone ("head frozen"), or the summed log-probabilities alone ("no
gradient").  By formula that is 2 · labelled · V · H operations, times 3, 2 or 1; the least that has to be moved are
hidden states and weight, read once, and their gradients, written once.  ``three bare GEMMs`` are h Wᵀ, G W and Gᵀ h of
all rows, labelled or not: the share of their rate that a variant reaches is what it has left of the machine.

"budget 0" keeps nothing from forward to backward and makes every tile of logits twice.  Errors are those of the summed
log-probabilities, and of the gradients of 32 rows and 64 words.
"""

from __future__ import annotations

from argparse import Namespace
from typing import NamedTuple

import torch
from torch.nn import functional

from benchmarks import peers, suite
from benchmarks.measure import Line, gemm_line
from benchmarks.results import Row
from benchmarks.shapes import BATCHES, IGNORE_INDEX, LLAMA, Batch, Head, heads, labels_of, normal
from benchmarks.suite import OURS, Errors, Outputs, Settings, Work
from grpo_kernels import available_backends, fused_grpo_loss, fused_linear_grpo_loss, linear_sequence_logps
from grpo_kernels.backends import choose

SETTINGS = Settings(rounds=7, preload=peers.PRELOAD)
BETA = 0.1
FULL, FROZEN, NO_GRADIENT = "full", "head frozen", "no gradient"
GEMMS_OF = {FULL: 3, FROZEN: 2, NO_GRADIENT: 1}
SPREAD = 3.0
"""Standard deviation of the logits."""

REFERENCE = Head("reference", 32000, 1024)
REFERENCE_BATCH = Batch("4 pairs of 256", 4, 256)
MEMORY = {(REFERENCE.name, 1.0, FULL), (REFERENCE.name, 1.0, FROZEN), (LLAMA.name, 0.5, FULL)}
"""(head, share labelled, work) whose peaks are taken where not all are asked for."""

EPSILON = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-5, 2.0**-8), torch.float16: (1e-5, 2.0**-10)}
"""Of sums and gradients, beyond twice plain PyTorch's error."""


class Case(NamedTuple):
    head: Head
    batch: Batch
    work: str
    dtype: str
    curve: str = ""
    thorough: bool = False
    """Every variant, and every peak of memory; else those that tell something of this case."""

    def fields(self) -> Row:
        cap = f", softcap {self.head.softcap:g}" if self.head.softcap else ""
        return {
            "case": f"{self.head.name}, {self.batch.name}{cap}", "work": self.work, "dtype": self.dtype,
            "rows": self.batch.rows, "labelled": round(self.batch.rows * self.batch.labelled),
            "vocabulary": self.head.vocabulary, "hidden": self.head.hidden, "pairs": self.batch.pairs,
            "curve": self.curve,
        }  # fmt: skip


def cases(size: str, dtypes: list[str] | None, thorough: bool) -> list[Case]:
    """The shape that all changes are compared on, the heads of real models, the curve over H; what tells most first."""
    half = REFERENCE_BATCH._replace(name=f"{REFERENCE_BATCH.name}, half labelled", labelled=0.5)
    tiny, llama, qwen, gemma = heads(size)
    batches = BATCHES[size]
    found = [(REFERENCE, REFERENCE_BATCH, FULL), (REFERENCE, REFERENCE_BATCH, FROZEN)]
    found += [(llama, batches["half"], FULL), (gemma, batches["half"], FULL)]
    found += [(tiny, batches["short"], FULL), (tiny, batches["long"], FULL)]
    found += [(REFERENCE, REFERENCE_BATCH, NO_GRADIENT), (REFERENCE, half, FULL), (REFERENCE, half, FROZEN)]
    found.append((qwen, batches["half"], FULL))
    if thorough:
        every = [(head, batch, work) for head in (tiny, llama, qwen, gemma) for batch in batches.values()
                 for work in (FULL, FROZEN)]  # fmt: skip
        found += [case for case in every if case not in found]
    made = [Case(*case, dtype, thorough=thorough) for dtype in dtypes or ["bfloat16"] for case in found]
    width, batch = {"cpu": (256, Batch("256 rows", 1, 128)), "gpu": (1024, Batch("8192 rows", 8, 512))}[size]
    curve = [
        Case(Head(f"curve: H {factor * width}", 32000, factor * width), batch, FULL, "bfloat16", curve="hidden")
        for factor in (1, 2, 4, 8)
    ]
    return made[:4] + curve + made[4:]


def main(options: Namespace) -> int:
    return suite.run("head", cases(options.size, options.dtypes, options.all), build, options, SETTINGS)


def build(case: Case, device: torch.device) -> Work:
    head, batch, dtype = case.head, case.batch, getattr(torch, case.dtype)
    on_cpu = torch.Generator().manual_seed(0)
    generator = torch.Generator(device).manual_seed(0)
    labels = labels_of(batch, head.vocabulary, on_cpu).to(device)
    hidden = normal((*labels.shape, head.hidden), 1.0, dtype, generator)
    weight = normal((head.vocabulary, head.hidden), SPREAD / head.hidden**0.5, dtype, generator)
    group_ids = torch.zeros(batch.pairs, dtype=torch.int64, device=device)
    ones = torch.ones(1, device=device)

    def leaves() -> tuple[torch.Tensor, torch.Tensor]:
        return (
            hidden.detach().requires_grad_(case.work != NO_GRADIENT),
            weight.detach().requires_grad_(case.work == FULL),
        )

    def finished(loss: torch.Tensor, logps: torch.Tensor, h: torch.Tensor, w: torch.Tensor) -> Outputs:
        grads = torch.autograd.grad(loss, [h, w] if case.work == FULL else [h])
        return {"logps": logps.detach(), **dict(zip(("grad_hidden", "grad_weight"), grads, strict=False))}

    def ours(backend: str, budget: int | str) -> Line:
        def run() -> Outputs:
            h, w = leaves()
            settings = {"softcap": head.softcap, "memory_budget": budget, "shift": False, "backend": backend}
            if case.work == NO_GRADIENT:
                return {"logps": linear_sequence_logps(h, w, labels, **settings)}
            out = fused_linear_grpo_loss(h, w, labels, None, group_ids, ones, beta=BETA, **settings)
            return finished(out.loss, out.policy_logps, h, w)

        return Line(run)

    def through_logits(backend: str) -> Line:
        def run() -> Outputs:
            h, w = leaves()
            logits = peers.capped(h @ w.t(), head.softcap)
            out = fused_grpo_loss(
                logits, labels, None, group_ids, ones, beta=BETA, shift=False, overwrite_logits=True, backend=backend
            )
            return finished(out.loss, out.policy_logps, h, w)

        return Line(run)

    def peer(function: peers.HiddenFunction) -> Line:
        def run() -> Outputs:
            h, w = leaves()
            with torch.set_grad_enabled(case.work != NO_GRADIENT):
                token = function(h.flatten(0, 1), w, labels.flatten())
                sums = token.float().view(labels.shape).sum(1)
                if case.work == NO_GRADIENT:
                    return {"logps": sums}
                loss = -functional.logsigmoid(BETA * (sums[: batch.pairs] - sums[batch.pairs :])).mean()
            return finished(loss, sums, h, w)

        return Line(run)

    def plain(h: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return peers.eager(peers.capped(h @ w.t(), head.softcap), labels)

    def liger() -> Line:
        function = peers.LigerDPO(BETA)

        def run() -> Outputs:
            h, w = leaves()
            loss, sums = function(h, w, labels)
            return finished(loss, sums, h, w)

        return Line(run)

    variants: dict[str, Line | str] = {}
    default = next(name for name in available_backends() if has_head(name, device, dtype))
    for name, reason in available_backends().items():
        if runs_on(name, device):
            variants[f"{OURS}{name}"] = reason or ours(name, "auto")
            if name == default and case.work == FULL:
                variants[f"{OURS}{name}, budget 0"] = reason or ours(name, 0)
                variants[f"{OURS}{name}, through logits"] = reason or through_logits(name)
    for name, function in peers.of_hidden(device, head.softcap).items():
        variants[name] = function if isinstance(function, str) else peer(function)
    if case.work != NO_GRADIENT:
        absent = peers.missing("liger_kernel", device) or ("it has no softcap" if head.softcap else None)
        variants["Liger DPO loss"] = absent or liger()
    if not case.thorough:
        variants = {name: variant for name, variant in variants.items() if tells(name, case, f"{OURS}{default}")}
    labelled, words, size = int((labels != IGNORE_INDEX).sum()), head.vocabulary * head.hidden, dtype.itemsize
    rows = batch.rows * head.hidden
    written = {FULL: rows + words, FROZEN: rows, NO_GRADIENT: 0}[case.work]
    return Work(
        variants, ours=f"{OURS}{default}", plain=peer(plain),
        errors=Truth(hidden, weight, labels, head.softcap).errors,
        epsilon=EPSILON[dtype],
        bytes=float(size * (labelled * head.hidden + words + written)),
        operations=2.0 * GEMMS_OF[case.work] * labelled * words,
        copy_bytes=words * size,
        gemms=gemm_line(batch.rows, head.hidden, head.vocabulary, dtype, device),
        gemm_operations=6.0 * batch.rows * words,
        memory=case.thorough or (head.name, batch.labelled, case.work) in MEMORY,
    )  # fmt: skip


def runs_on(backend: str, device: torch.device) -> bool:
    return backend == "torch" or (backend == "cpu") == (device.type == "cpu")


def has_head(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend is here and offers the head's tile operations."""
    return (
        runs_on(backend, device)
        and available_backends()[backend] is None
        and hasattr(choose(backend, device, dtype), "head_tile_fwd")
    )


def tells(variant: str, case: Case, ours: str) -> bool:
    """Whether a variant is worth its time in a case, where not all are asked for."""
    name = case.head.name
    if case.curve or (name == REFERENCE.name and case.batch.labelled < 1):
        return variant in (ours, f"{ours}, budget 0", "eager")
    if variant == "torch.compile":  # cut-cross-entropy's torch_compile is this, for the labelled rows
        return name == REFERENCE.name and case.work == FULL
    if variant == f"{OURS}torch" and variant != ours:
        return name == REFERENCE.name and case.work == FULL
    if variant.endswith("through logits"):
        return name == LLAMA.name
    return True


class Truth:
    """The loss in float64, a few hundred rows at a time, and its gradients of some rows and some words."""

    ROWS, WORDS, CHUNK = 32, 64, 256

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float | None) -> None:
        self.hidden, self.weight, self.labels, self.softcap = hidden, weight, labels, softcap
        self.exact: Outputs = {}

    def errors(self, outputs: Outputs) -> Errors:
        if not self.exact:
            self.compute()
        sums = self.exact["logps"]
        error = ((outputs["logps"].double() - sums).abs().max() / sums.abs().max()).item()
        found = []
        for name, index in (("grad_hidden", self.rows), ("grad_weight", self.words)):
            if name in outputs:
                got = outputs[name].flatten(0, -2)[index].double()
                found.append(((got - self.exact[name]).norm() / self.exact[name].norm()).item())
        return error, max(found, default=None)

    @torch.no_grad()
    def compute(self) -> None:
        h, labels = self.hidden.flatten(0, 1), self.labels.flatten()
        scored = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        spread = torch.linspace(0, len(scored) - 1, min(self.ROWS, len(scored))).long().to(h.device)
        self.rows = scored[spread]
        # Words that are some row's label, and as many that need not be.
        others = torch.linspace(0, self.weight.shape[0] - 1, self.WORDS // 2).long().to(h.device)
        self.words = torch.cat([labels[self.rows], others]).unique()
        w = self.weight.double()
        token = torch.zeros(len(labels), dtype=torch.float64, device=h.device)
        columns = []  # dz of the words, before the scale c of the row
        for part in scored.split(self.CHUNK):
            raw = h[part].double() @ w.t()
            log_p = peers.capped(raw, self.softcap).log_softmax(-1)
            token[part] = log_p.gather(1, labels[part].unsqueeze(1)).squeeze(1)
            columns.append(self.slope(raw, log_p, labels[part])[:, self.words])
        sums = token.view(self.labels.shape).sum(1)
        pairs = sums.shape[0] // 2
        c = BETA * torch.sigmoid(-BETA * (sums[:pairs] - sums[pairs:])) / pairs
        scale = torch.cat([-c, c]).unsqueeze(1).expand(self.labels.shape).flatten()
        raw = h[self.rows].double() @ w.t()
        log_p = peers.capped(raw, self.softcap).log_softmax(-1)
        self.exact = {
            "logps": sums,
            "grad_hidden": scale[self.rows].unsqueeze(1) * (self.slope(raw, log_p, labels[self.rows]) @ w),
            "grad_weight": (scale[scored].unsqueeze(1) * torch.cat(columns)).t() @ h[scored].double(),
        }

    def slope(self, raw: torch.Tensor, log_p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The derivative of each row's log-probability with respect to the GEMM's output."""
        slope = log_p.exp().neg_()
        slope[torch.arange(len(labels), device=labels.device), labels] += 1
        return slope if self.softcap is None else slope * (1 - torch.tanh(raw / self.softcap) ** 2)
