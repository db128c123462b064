"""The Triton kernels themselves, run on the CPU by Triton's interpreter.

A process either interprets the kernels or compiles them, from the first import on; so the test that runs by default
starts pytest anew, on the one parity matrix and on what follows here: rows and sequences of several blocks, which the
matrix leaves out for the interpreter as too slow, and starts at every place within 16 bytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_linear_head
import tile_cases
import torch
from kernel_cases import case_id

from grpo_kernels.backends import child
from grpo_kernels.proof.budget import oracle, within_budget, within_relative_budget
from grpo_kernels.proof.places import DTYPES, Place, make_rows
from grpo_kernels.proof.rows import backward, forward
from grpo_kernels.proof.tail import run_tail, tail_oracle
from grpo_kernels.types import IGNORE_INDEX

HERE = Path(__file__).parent
INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = Place("triton", "cpu")

inside = pytest.mark.skipif(not INSIDE, reason="runs in the process that test_in_the_interpreter starts")
small_tiles = test_linear_head.small_tiles
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=case_id)


@pytest.mark.skipif(INSIDE, reason="this is that process")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    files = [HERE / name for name in ("test_parity.py", "test_triton_interpreter.py")]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "triton_interpreter",
            "-p",
            "no:cacheprovider",
            *files,
        ],
        env={
            **os.environ,
            "GRPO_KERNELS_TEST_BACKENDS": "triton",
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
        },
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


PROOF = """
import sys
import triton_interpreter
from grpo_kernels.backends import triton
from grpo_kernels.proof import __main__ as proof, cases

WANTED = (
    "one row, float32", "one row, bfloat16", "7 pairs in 3 groups, float32", "2 pairs in 1 groups", "no pairs",
    "7 words from element 3, float16", "two steps with a moving alpha, packed, float32",
)
proof.cases = lambda place, quick: [case for case in cases(place) if case.name in WANTED]
if sys.argv.pop(1) == "wrong":
    right = triton.preference_tail
    triton.preference_tail = lambda *arguments, beta, **options: right(*arguments, beta=1.001 * beta, **options)
sys.exit(proof.main())
"""


@pytest.mark.skipif(INSIDE, reason="starts a process of its own")
@pytest.mark.parametrize(("kernels", "status"), [("right", "passed"), ("wrong", "failed")])
def test_the_proof_of_a_device_runs_the_kernels(monkeypatch, kernels, status):
    """As on a user's GPU: in a child process, and a kernel that is off by a thousandth is found."""
    pytest.importorskip("triton")
    command = [sys.executable, "-c", PROOF, kernels, "--backend", "triton", "--device", "cpu"]
    monkeypatch.setattr(child, "command", lambda name, device, full: command)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    run = child.run("triton", torch.device("cpu"), seconds=300, environment={"TRITON_INTERPRET": "1"})
    assert run.status == status, run.report()
    assert {"token_logps_bwd", "robust_loss", "head_tile_bwd"} <= run.calls.keys()
    if status == "failed":
        assert run.reason.startswith("preference_tail: 2 pairs in 1 groups and 1 more: rewards: ")


@inside
@pytest.mark.parametrize(("vocabulary", "start"), [(4500, 0), (4500, 1), (9003, 3), (1024, 0), (2056, 5), (7, 3)])
@every_dtype
def test_rows_of_several_blocks_from_any_start(dtype, vocabulary, start):
    """More than one block, whole and partial, with edges in front, behind, both and neither."""
    generator = torch.Generator().manual_seed(vocabulary + start)
    rows = 5
    memory = torch.full((rows * (vocabulary + 1) + start,), torch.nan, dtype=dtype)
    logits = memory[start:].view(1, rows, vocabulary + 1)[..., :vocabulary]
    logits.copy_((3 * torch.randn(rows, vocabulary, generator=generator)).to(dtype))
    targets = torch.tensor([0, vocabulary - 1, vocabulary // 2, IGNORE_INDEX, min(5, vocabulary - 1)])
    grads = torch.randn(rows, generator=generator)
    exact_logps, exact_grads = oracle(logits, targets, grads)
    plain_logps, plain_grads = oracle(logits, targets, grads, torch.float32)
    logps, lse = forward(TRITON, logits, targets)
    within_budget("logps", logps, plain_logps, exact_logps, exact_logps.abs().max().item())
    gradient = backward(TRITON, logits, targets, lse, grads)
    reach = logits.double().abs().max().item()
    # The target's entry is the better one of the two, so PyTorch's is no budget for it: see proof/rows.py.
    hit = torch.nn.functional.one_hot(targets.clamp(min=0), vocabulary).bool().view(gradient.shape)
    others = (g.masked_fill(hit, 0) for g in (gradient, plain_grads.to(dtype), exact_grads))
    within_relative_budget("gradient", *others, reach)
    within_budget("gradient", gradient, plain_grads.to(dtype), exact_grads, reach)
    outside = memory.clone()
    backward(TRITON, logits, targets, lse, grads, logits)
    assert torch.equal(logits, gradient)
    logits.copy_(outside[start:].view(1, rows, vocabulary + 1)[..., :vocabulary])
    assert torch.equal(memory.nan_to_num(nan=9), outside.nan_to_num(nan=9)), "written outside the rows"


@inside
@every_dtype
def test_one_row_within_budget(dtype):
    for seed in range(20):
        logits, targets, grads = make_rows(TRITON, dtype, (1, 1, 131), 3.0, seed)
        exact, _ = oracle(logits, targets, grads)
        plain, _ = oracle(logits, targets, grads, torch.float32)
        logps, _ = forward(TRITON, logits, targets)
        within_budget("logps", logps, plain, exact, max(1.0, exact.abs().max().item()))


@inside
@pytest.mark.parametrize("packed", [False, True])
def test_sequences_of_several_blocks(packed):
    """Longer than a tile of tokens, more pairs than a tile of pairs, more groups than a block of groups."""
    generator = torch.Generator().manual_seed(5)
    for pairs, length, groups in ((5, 1100, 3), (37, 20, 600)):
        counts = (
            torch.randint(0, length, (2 * pairs,), generator=generator) if packed else torch.full((2 * pairs,), length)
        )
        cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        rows = int(counts.sum())
        targets = torch.randint(0, 9, (rows,), generator=generator)
        targets[torch.rand(rows, generator=generator) < 0.3] = IGNORE_INDEX
        logps = torch.where(targets == IGNORE_INDEX, 0.0, -torch.rand(rows, generator=generator))
        ref_logps = -torch.rand(2 * pairs, generator=generator, dtype=torch.float64)
        group_ids = torch.randint(0, groups, (pairs,), generator=generator)
        options = {"loss_type": "robust", "beta": 0.1, "label_smoothing": 0.2, "length_normalize": True}
        inputs = (ref_logps, group_ids, None, groups)
        got = run_tail(TRITON, logps, targets, cu_seqlens if packed else None, *inputs, **options)
        want = tail_oracle(logps, targets, cu_seqlens, *inputs, **options)
        for name, value in want.items():
            tolerance = 1e-12 if got[name].dtype != torch.float32 else 2.0**-23
            torch.testing.assert_close(got[name].double(), value.double(), rtol=tolerance, atol=1e-10)


@inside
@tile_cases.cases_of(test_linear_head.test_tile_operations_against_their_definition)
def test_tiles_against_their_definition(dtype, softcap, logit_scale, biased, words):
    test_linear_head.test_tile_operations_against_their_definition("triton", dtype, softcap, logit_scale, biased, words)


@inside
@tile_cases.cases_of(test_linear_head.test_bad_logits_answer_as_log_softmax_does)
def test_bad_logits_through_the_head(value, whole_row, small_tiles):
    test_linear_head.test_bad_logits_answer_as_log_softmax_does("triton", value, whole_row, small_tiles)


@inside
@tile_cases.cases_of(test_linear_head.test_confident_rows_keep_their_gradient)
def test_confident_rows_through_the_head(dtype, budget, small_tiles):
    test_linear_head.test_confident_rows_keep_their_gradient("triton", dtype, budget, small_tiles)


@inside
def test_this_process_interprets():
    from grpo_kernels.backends import available_backends, triton

    assert triton.INTERPRETED
    assert available_backends()["triton"] is None
    assert "cpu" in triton.unsupported_reason(torch.device("cuda"), torch.float32)
    assert "float64" in triton.unsupported_reason(torch.device("cpu"), torch.float64)
