"""What a run of ``gpu_check.py`` launches of Triton's kernels, piece by piece, for ``gpu_cache.py`` to compile.

For a process of a dry run (``gpu_hooks/``): a CPU's tensors stand in for a GPU's, with few rows, since what is compiled
goes by the width of a row, its alignment and its dtype.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

UNITS = ("smoke", "proof", "benchmarks", "tune", "tests")
"""In the order in which a run on a GPU needs them."""
TUNED_SHAPE = {"--vocab": 128256, "--hidden": 4096, "--rows": 16384}
"""What the step ``tune`` of a run tunes for, as ``grpo-kernels tune`` takes it."""
TUNED_STAGES = ("head_tile", "token_logps", "tail")
Unit = tuple[str, Callable[[], object]]


def units(wanted: tuple[str, ...]) -> list[Unit]:
    """Names and what to run."""
    found: list[Unit] = []
    for kind in wanted:
        found += [(f"{kind}: {name}", run) for name, run in globals()[f"units_of_{kind}"]()]
    return found


def units_of_smoke() -> Iterator[Unit]:
    import torch
    from smoke import checks

    from grpo_kernels.backends import choose

    module = choose("triton", torch.device("cuda"), torch.float32)
    for name, check in checks().items():
        yield name, functools.partial(check, module)


def units_of_proof() -> Iterator[Unit]:
    from grpo_kernels.proof import Place, cases

    for case in cases(Place("triton", "cuda")):
        yield case.name, case.run


def units_of_first_call() -> Iterator[Unit]:
    """Of the proof, the quick cases: what the first call with ``backend="auto"`` compiles.  Within ``proof``."""
    from grpo_kernels.proof import Place, cases

    for case in cases(Place("triton", "cuda"), quick=True):
        yield case.name, case.run


def units_of_tests() -> Iterator[Unit]:
    """What tests/gpu launches, once each; their modules have the shapes."""
    import test_fused_head
    import test_real_shapes
    import test_vocab_parallel_gpu
    import test_whole_step
    import vocab_ranks

    for packed, overwrite in itertools.product((False, True), repeat=2):
        step = functools.partial(test_whole_step.Step, "triton", packed=packed, overwrite=overwrite)
        yield f"a step, packed={packed}, overwrite={overwrite}", lambda step=step: step().run()
    for vocabulary in test_real_shapes.VOCABULARIES:
        yield from rows(vocabulary)
    yield from rows(4096, "bfloat16")
    for name, call in test_vocab_parallel_gpu.CALLS.items():
        if call.options["backend"] == "triton":
            yield name, functools.partial(vocab_ranks.run, call, device="cuda")
    for parameters in parameters_of(test_fused_head.test_fused_head_against_float64):
        yield (
            f"head, {parameters}",
            functools.partial(test_fused_head.test_fused_head_against_float64, "triton", **parameters),
        )


def parameters_of(test: Callable) -> Iterator[dict[str, object]]:
    """What pytest gives it, besides the backend."""
    marks = [mark.args for mark in test.pytestmark if mark.name == "parametrize"]
    for values in itertools.product(*(values for _, values in marks)):
        yield dict(zip((name for name, _ in marks), values, strict=True))


def units_of_benchmarks() -> Iterator[Unit]:
    import torch
    from gpu_bench import JOBS

    from benchmarks import head, tail
    from grpo_kernels.head.plan import make_plan

    for job in JOBS:
        case = job.case
        if job.command == "logps":
            yield from rows(case.vocabulary, case.dtype)
        elif job.command == "tail":
            yield case.fields()["case"], functools.partial(one_tail, tail, case)
        elif job.command == "head":
            dtype = getattr(torch, case.dtype)
            for budget in ("auto", 0):
                plan = make_plan(
                    case.batch.rows, case.head.hidden, case.head.vocabulary, dtype, torch.device("cuda"), budget,
                    grad_weight=case.work == head.FULL,
                )  # fmt: skip
                for words in sorted({tile.stop - tile.start for tile in plan.tiles()}):
                    yield f"tile of {words} words", functools.partial(one_tile, words, dtype)


def units_of_tune() -> Iterator[Unit]:
    """The stages of the sweep that are about Triton's kernels, over the vocabulary of ``TUNED_SHAPE``.

    With few rows a tile of the head is as wide as it can be, and its candidates are all that there are.
    """
    from grpo_kernels.tune import session, shape_of

    shape = shape_of(vocab=TUNED_SHAPE["--vocab"], hidden=64, rows=16, device="cuda:0")

    def stages() -> dict[str, Callable[[float], None]]:
        made = session._Session(shape, lambda line: None, lambda content: Path(os.devnull))
        partial = [stage for _, stage in made.stages() if isinstance(stage, functools.partial)]
        return {f"{one.func.__name__}, {one.args[0]}": one for one in partial if one.func.__name__ in TUNED_STAGES}

    for name in stages():
        yield name, lambda name=name: stages()[name](time.monotonic() + 600)


def rows(vocabulary: int, dtype: str = "") -> Iterator[Unit]:
    """Forward and backward over a few rows, aligned and not: block sizes go by the vocabulary, not by the rows."""
    for name in [dtype] if dtype else ["float32", "bfloat16", "float16"]:
        yield f"rows, V={vocabulary}, {name}", functools.partial(few_rows, vocabulary, name)


def few_rows(vocabulary: int, dtype: str) -> None:
    import smoke
    import torch

    from grpo_kernels.backends import choose

    module = choose("triton", torch.device("cuda"), torch.float32)
    for start in (0, 1):
        smoke.rows(module, getattr(torch, dtype), vocabulary, start)


def one_tile(words: int, dtype) -> None:
    import smoke
    import torch

    from grpo_kernels.backends import choose

    smoke.tile(choose("triton", torch.device("cuda"), dtype), dtype, dtype != torch.float32, words, 0, 0.0)


def one_tail(module, case) -> None:
    import torch

    module.build(case, torch.device("cuda")).variants["ours: triton"]()
