"""What a 70B model with 256k words and pairs of a million tokens costs on many GPUs: the tables of docs/scaling.md.

    python -m benchmarks.scaling_on_paper            # writes them into the page, between its marks

Nothing here runs on a GPU.  "measured" is from ``benchmarks/results/cpu-x86_64/vocab_parallel.csv``; all else follows
from the formulas below, in bytes that one GPU holds or sends.  A test holds page and formulas together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import read

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
MEASURED = ROOT / "benchmarks" / "results" / "cpu-x86_64" / "vocab_parallel.csv"

HALF, SINGLE = 2, 4
"""Bytes of a bfloat16 and of a float32."""

TILE_BYTES, LEAST_WORDS, MOST_WORDS = 32 << 20, 512, 16384
"""Of the head's working tile, as ``head/plan.py`` cuts it."""

GPU_MEMORY = 80e9
NEAR, FAR = 400e9, 50e9
"""Bytes a second that a GPU sends within a machine of 8, and beyond; assumed."""
FLOPS = 400e12
"""Operations a second of one GPU in large GEMMs and attention; assumed."""


@dataclass(frozen=True)
class Model:
    """A Llama of 70B parameters with a vocabulary of 256k words."""

    layers: int = 80
    hidden: int = 8192
    inner: int = 28672
    key_value: int = 1024
    vocabulary: int = 262144

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        return self.hidden * (2 * self.hidden + 2 * self.key_value + 3 * self.inner)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + 2 * self.vocabulary * self.hidden


MODEL = Model()
TOKENS = 1 << 20
"""Of a pair: two sequences of half as many, every token scored."""


@dataclass(frozen=True)
class Plan:
    """``tensor`` GPUs share a model's layers and words, ``context`` such groups the tokens of a pair."""

    gpus: int
    tensor: int
    context: int

    @property
    def data(self) -> int:
        """Pairs at a time; FSDP2 spreads the parameters over these and over ``context``."""
        return self.gpus // (self.tensor * self.context)

    @property
    def spread(self) -> int:
        return self.gpus // self.tensor

    @property
    def rows(self) -> int:
        """Tokens of a pair that a tensor-parallel group works on."""
        return TOKENS // self.context

    def __str__(self) -> str:
        return f"{self.tensor} × {self.context} × {self.data}"


PLANS = [
    Plan(8, 8, 1),
    Plan(8, 1, 8),
    Plan(64, 8, 8),
    Plan(64, 1, 64),
    Plan(512, 8, 64),
    Plan(512, 8, 8),
    Plan(512, 1, 64),
]

# ---------------------------------------------------------------------------------------------- the head


def tile_bytes(rows: int, words: int, bytes_of_product: int) -> int:
    """The working tile: what goes into a GEMM, and beside it what came out of one where that is wider."""
    wide = min(max(TILE_BYTES // (rows * HALF), LEAST_WORDS), MOST_WORDS, words)
    return rows * wide * (HALF + (bytes_of_product if bytes_of_product > HALF else 0))


def head_bytes(
    rows: int, hidden: int, words: int, *, frozen: bool = False, kept: int = 0, bytes_of_product: int = SINGLE
) -> int:
    """The most that the fused head holds at one time beyond hidden and this rank's words of the weight.

    Forward: labelled rows of hidden, the sum of exponentials times W in float32, one product (which a CPU widens to add
    it), the tile.  Backward: that sum and dh; then, without the sum, the rows again, dW and the tile, or with all kept
    a copy of the rows for each kept tile.  Throughout: 8 numbers a row, and what is kept.
    """
    each, chunk = rows * hidden, min(rows * hidden, (1 << 22) if bytes_of_product == HALF else (1 << 26))
    widened = SINGLE if bytes_of_product == HALF else 0
    tile = 0 if kept == words else tile_bytes(rows, words, bytes_of_product)
    always = 8 * rows * SINGLE + rows * kept * HALF
    forward = each * (HALF + SINGLE + bytes_of_product + widened) + tile
    backward = each * (SINGLE + HALF) + chunk * (SINGLE + HALF)
    if not frozen:
        scaled = each * HALF + chunk * (SINGLE + widened) if kept else 0
        backward = max(backward, each * 2 * HALF + words * hidden * HALF + tile + scaled)
    return always + max(forward, backward)


def logits_bytes(rows: int, words: int) -> int:
    """Logits and their gradient, which is written over them."""
    return rows * words * HALF


# ---------------------------------------------------------------------------------------------- memory of one GPU


def memory(plan: Plan, *, frozen: bool) -> dict[str, float]:
    """Bytes by what they are for.

    Trained: float32 parameters, gradients and two moments, 16 bytes each.  Frozen, with adapters too small to count:
    the bfloat16 parameters.
    """
    m, t, rows = MODEL, plan.tensor, plan.rows
    activations = 2 * m.hidden + (2 * m.hidden + 2 * m.key_value + 3 * m.inner) / t
    words = m.vocabulary // t
    return {
        "state": m.parameters * (HALF if frozen else 16) / plan.gpus,
        # The layer at work and the next, which is being gathered; of a model that is trained one gradient too.
        "gathered layers": m.layer * HALF * (2 if frozen else 3) / t if plan.spread > 1 else 0,
        "layer inputs": rows * m.hidden * HALF * m.layers / t,
        "one layer again": 2 * rows * HALF * activations,
        "head": words * m.hidden * HALF + rows * m.hidden * HALF + head_bytes(rows, m.hidden, words, frozen=frozen),
    }


def longest(plan: Plan, *, frozen: bool) -> int:
    """Tokens of a pair that fit; everything but the state and the weights grows with them."""
    parts = memory(plan, frozen=frozen)
    head_fixed = MODEL.vocabulary // plan.tensor * MODEL.hidden * HALF * (1 if frozen else 2)
    fixed = parts["state"] + parts["gathered layers"] + head_fixed
    return max(0, int((GPU_MEMORY - fixed) / (sum(parts.values()) - fixed) * TOKENS))


# ---------------------------------------------------------------------------------------------- what one GPU sends


def ring(size: float, ranks: int) -> float:
    """Bytes a rank sends so that each has all of ``size``, or its part of a sum; twice that is an all-reduce."""
    return size * (ranks - 1) / ranks


def head_traffic(plan: Plan, *, frozen: bool = False) -> dict[str, float]:
    """A step's bytes for the head alone, by the way it is done."""
    m, t, rows = MODEL, plan.tensor, plan.rows
    hidden = ring(rows * m.hidden * HALF, t)
    weights = ring(m.vocabulary * m.hidden / t * (2 * HALF + (0 if frozen else SINGLE)), plan.spread)
    return {
        "two numbers a row": 8 * rows * (t - 1),
        "hidden gathered": hidden,
        "dh summed": 2 * ring(rows * m.hidden * SINGLE, t),
        "logits gathered instead": rows * m.vocabulary / t * HALF * (t - 1),
        "weight, by FSDP2": weights,
    }


def traffic(plan: Plan, *, frozen: bool) -> dict[str, float]:
    """A step's bytes by what they are for; every layer runs forward twice, since its activations are not kept."""
    m, t, rows = MODEL, plan.tensor, plan.rows
    head = head_traffic(plan, frozen=frozen)
    # Forward, again, and backward: a gather and a reduce-scatter around attention, and around the MLP.
    within = 3 * 4 * ring(rows * m.hidden * HALF, t) * m.layers
    # Keys and values go round once in forward and once again; in backward they and their gradients.
    passed = 4 * rows * 2 * m.key_value / t * HALF * (plan.context - 1) * m.layers
    parameters = ring(m.layer / t * (2 * HALF + (0 if frozen else SINGLE)), plan.spread) * m.layers
    return {
        "tensor": within,
        "context": passed,
        "FSDP2": parameters + head["weight, by FSDP2"],
        "head": sum(head[name] for name in ("two numbers a row", "hidden gathered", "dh summed")),
    }


def operations(*, frozen: bool) -> dict[str, float]:
    """Of one pair: layers forward twice and backward, causal attention over two sequences, the head with none kept."""
    m, length = MODEL, TOKENS // 2
    forward = 2 * m.layer * TOKENS * m.layers
    attention = 2 * (2 * length**2 * m.hidden) * m.layers
    return {
        "layers": forward * (3 if frozen else 4),
        "attention": attention * 4.5,
        "head": 2 * TOKENS * m.vocabulary * m.hidden * (2 if frozen else 4),
    }


# ---------------------------------------------------------------------------------------------- the tables


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def gb(size: float) -> str:
    """Gigabytes to two digits, or three above 100."""
    value = size / 1e9
    if value == 0:
        return "–"
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.0995 else f"{value:.2g}"


def measured_table() -> str:
    """From the benchmark's file: what one rank computes, holds and sends."""
    rows = [row for row in read(MEASURED) if row["clock"] == "cpu" and row["case"] != "gather logits"]
    alone = {row["case"]: float(row["ms"]) for row in rows if row["curve"] == "1"}
    lines = []
    for row in sorted(rows, key=lambda row: (row["case"], int(row["curve"]))):
        ranks, ms, scored = int(row["curve"]), float(row["ms"]), int(row["rows"])
        expected = expected_peak(row)
        lines.append([
            row["case"], ranks, f"{ms:.0f}", f"{alone[row['case']] / ms:.2f}", f"{float(row['peak_mib']):.0f}",
            f"{expected / 2**20:.0f}" if expected else "", f"{float(row['bytes']) / scored:,.4g}",
        ])  # fmt: skip
    head = ["work", "ranks", "ms of one", "times faster", "peak MiB", "by the formula", "bytes sent a row"]
    return markdown(head, lines)


def expected_peak(row: dict[str, str]) -> int | None:
    """What the formulas say of a row of the benchmark; None where they say nothing."""
    rows, hidden = int(row["labelled"]), int(row["hidden"])
    words = int(row["vocabulary"]) // int(row["curve"])
    if row["case"] == "logits":
        return logits_bytes(rows, words)
    if row["case"] == "head, no gradients":
        return rows * hidden * HALF + tile_bytes(rows, words, HALF) + 8 * rows * SINGLE
    kept = words if row["case"] == "head, all kept" else 0
    return head_bytes(rows, hidden, words, frozen="frozen" in row["case"], kept=kept, bytes_of_product=HALF)


def memory_table(*, frozen: bool) -> str:
    lines = []
    for plan in PLANS:
        parts = memory(plan, frozen=frozen)
        total = sum(parts.values())
        fits = "yes" if total <= GPU_MEMORY else "no"
        tokens = f"{longest(plan, frozen=frozen) // 1024:,}k" if longest(plan, frozen=frozen) else "none"
        lines.append([plan.gpus, plan, *map(gb, parts.values()), f"**{gb(total)}**", fits, tokens])
    names = list(memory(PLANS[0], frozen=frozen))
    return markdown(["GPUs", "tensor × context × data", *names, "all", "fits in 80", "longest pair"], lines)


def head_table() -> str:
    """The head by itself, in three ways."""
    lines = []
    for plan in PLANS:
        rows, words = plan.rows, MODEL.vocabulary // plan.tensor
        sent = head_traffic(plan)
        fused = sent["two numbers a row"] + sent["hidden gathered"] + sent["dh summed"]
        lines.append([
            plan.gpus, plan, gb(head_bytes(rows, MODEL.hidden, words)),
            gb(head_bytes(rows // 8, MODEL.hidden, words)), gb(logits_bytes(rows, words)),
            gb(logits_bytes(rows, MODEL.vocabulary)) if plan.tensor > 1 else "–",
            gb(sent["two numbers a row"]), gb(fused), gb(sent["logits gathered instead"]),
            gb(sent["weight, by FSDP2"]),
        ])  # fmt: skip
    head = [
        "GPUs", "plan", "holds: fused", "fused, by eighths", "own logits", "all logits",
        "sends: two numbers a row", "fused, in all",
        "all logits", "weight and dW, by FSDP2",
    ]  # fmt: skip
    return markdown(head, lines)


def traffic_table(*, frozen: bool) -> str:
    lines = []
    work = operations(frozen=frozen)
    for plan in PLANS:
        sent = traffic(plan, frozen=frozen)
        near = sent["tensor"] + sent["head"]
        far = sent["context"] + sent["FSDP2"]
        beyond = FAR if plan.gpus > 8 else NEAR
        seconds = sum(work.values()) / (plan.tensor * plan.context) / FLOPS
        lines.append([
            plan.gpus, plan, *map(gb, sent.values()), f"{near / NEAR + far / beyond:.1f}", f"{seconds:,.0f}",
            f"{work['head'] / sum(work.values()):.1%}", f"{seconds / plan.data:,.0f}",
        ])  # fmt: skip
    names = list(traffic(PLANS[0], frozen=frozen))
    return markdown(
        ["GPUs", "plan", *names, "s to send", "s to compute", "the head's share", "s a pair"], lines
    )  # fmt: skip


def model_table() -> str:
    m = MODEL
    work = operations(frozen=False)
    return markdown(
        ["what", "number"],
        [
            ["layers, H, inner width, keys and values", f"{m.layers}, {m.hidden:,}, {m.inner:,}, {m.key_value:,}"],
            ["words V", f"{m.vocabulary:,}"],
            ["parameters", f"{m.parameters / 1e9:.1f} billion, {m.vocabulary * m.hidden / 1e9:.2f} in the head"],
            ["tokens of a pair", f"{TOKENS:,}, two sequences of {TOKENS // 2:,}, every one scored"],
            ["logits of a pair, bfloat16", f"{gb(TOKENS * m.vocabulary * HALF)} GB"],
            ["hidden states of a pair, bfloat16", f"{gb(TOKENS * m.hidden * HALF)} GB"],
            ["operations of a step on a pair", ", ".join(f"{k} {v:.2g}" for k, v in work.items())],
        ],
    )


def tables() -> dict[str, str]:
    return {
        "measured": measured_table(),
        "model": model_table(),
        "head": head_table(),
        "memory, trained": memory_table(frozen=False),
        "memory, frozen": memory_table(frozen=True),
        "traffic, trained": traffic_table(frozen=False),
    }


def page(text: str) -> str:
    """The page with its tables as they are now."""
    for name, table in tables().items():
        mark = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not mark.search(text):
            raise ValueError(f"{PAGE.name} must have a place for the table {name!r}")
        text = mark.sub(lambda found, table=table: found[1] + table + "\n" + found[2], text)
    return text


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
