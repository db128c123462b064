"""The CUDA kernels themselves, run on the CPU by the emulator in cuda_emulation/: logic, not speed.

As with Triton's interpreter, the test that runs by default starts pytest anew, on the one parity matrix and on what
follows here: rows that every thread goes over more than once, and more pairs than a block looks at together.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cuda_emulator
import pytest
import test_linear_head
import tile_cases
import torch
from kernel_cases import case_id

from grpo_kernels.backends import native_cuda
from grpo_kernels.proof.budget import oracle, within_budget
from grpo_kernels.proof.places import DTYPES, Place
from grpo_kernels.proof.rows import backward, forward
from grpo_kernels.proof.tail import make_pairs, require_tail, run_tail, tail_oracle
from grpo_kernels.types import IGNORE_INDEX

HERE = Path(__file__).parent
CUDA = Place("cuda", "cpu")
INSIDE = native_cuda.unsupported_reason(torch.device("cpu"), torch.float32) is None

inside = pytest.mark.skipif(not INSIDE, reason="runs in the process that test_in_the_emulator starts")
needs_gcc = pytest.mark.skipif(
    cuda_emulator.compiler() is None or not cuda_emulator.CSRC.exists(), reason="no g++, or no sources to compile"
)
small_tiles = test_linear_head.small_tiles
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=case_id)


@needs_gcc
@pytest.mark.skipif(INSIDE or torch.cuda.is_available(), reason="this is that process, or there is a GPU")
def test_in_the_emulator():
    pytest.importorskip("pybind11")
    files = [HERE / name for name in ("test_parity.py", "test_cuda_emulator.py")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "cuda_emulator", "-p", "no:cacheprovider", *files],
        env={
            **os.environ,
            "GRPO_KERNELS_TEST_BACKENDS": "cuda",
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
        },
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


PROGRAM = """
#include "cuda_runtime.h"
#include <stdio.h>
constexpr int kThreads = 64;
struct Arguments { float* x; };
__global__ void kernel(Arguments args) {
  __shared__ float sum[kThreads];
  sum[threadIdx.x] = args.x[threadIdx.x];
  %s
  args.x[threadIdx.x] = sum[kThreads - 1 - threadIdx.x];
}
int main() {
  alignas(16) float x[kThreads + 4];
  for (int run = 0; run < 4; ++run) {
    for (int i = 0; i < kThreads + 4; ++i) x[i] = run * 100 + i;
    try {
      emulation::launch(kernel, 1, kThreads, Arguments{x});
    } catch (const std::exception& error) {
      puts(error.what());
      return 0;
    }
    for (int i = 0; i < kThreads; ++i) {
      if (x[i] != run * 100 + kThreads - 1 - i) return puts("wrong"), 0;
    }
  }
  puts("right");
}
"""


@needs_gcc
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("__syncthreads();", "right"),
        ("", "wrong"),
        ("if (threadIdx.x < 40) __syncthreads();", "threads of a block wait at different places"),
        ("if (threadIdx.x < 40) {\n__syncthreads();\n} else {\n__syncthreads(); }", "wait at different places"),
        ("if (threadIdx.x %% 2) __shfl_xor_sync(~0u, 1, 1); __syncthreads();", "wait at different places"),
        ("__ldcs(reinterpret_cast<uint4*>(args.x + 1)); __syncthreads();", "not aligned"),
        ("if (__shfl_xor_sync(~0u, threadIdx.x, 4) == (threadIdx.x ^ 4)) __syncthreads();", "right"),
        ("if (__syncthreads_or(threadIdx.x == 63)) __syncthreads();", "right"),
    ],
)
def test_the_emulator_sees_what_goes_wrong_on_a_gpu(tmp_path, body, said):
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(PROGRAM % body.replace("%%", "%"))
    build = [cuda_emulator.compiler(), "-std=c++17", f"-I{cuda_emulator.EMULATION}", source, "-o", program]
    subprocess.run(build, check=True, capture_output=True)
    assert said in subprocess.run([program], capture_output=True, text=True, check=True, timeout=60).stdout


@inside
@pytest.mark.parametrize(("vocabulary", "start"), [(20011, 0), (20011, 3), (8200, 5), (33000, 1)])
@every_dtype
def test_rows_of_several_rounds_from_any_start(dtype, vocabulary, start):
    """Four chunks of each thread under way, then the rest of them, then what is no chunk."""
    rows = 3
    memory = torch.full((rows * (vocabulary + 1) + start,), torch.nan, dtype=dtype)
    logits = memory[start:].view(1, rows, vocabulary + 1)[..., :vocabulary]
    logits.copy_((3 * torch.randn(rows, vocabulary)).to(dtype))
    targets, grads = torch.tensor([vocabulary - 1, vocabulary // 2, IGNORE_INDEX]), torch.randn(rows)
    exact_logps, exact_grads = oracle(logits, targets, grads)
    plain_logps, plain_grads = oracle(logits, targets, grads, torch.float32)
    logps, lse = forward(CUDA, logits, targets)
    within_budget("logps", logps, plain_logps, exact_logps, exact_logps.abs().max().item())
    gradient = backward(CUDA, logits, targets, lse, grads)
    within_budget("gradient", gradient, plain_grads.to(dtype), exact_grads, logits.double().abs().max().item())
    outside = memory.isnan()
    backward(CUDA, logits, targets, lse, grads, logits)
    assert torch.equal(logits, gradient)
    assert torch.equal(memory.isnan(), outside), "written outside the rows"


@inside
@pytest.mark.parametrize("groups", [1, 5, 700])
def test_more_pairs_than_a_block_looks_at_together(groups):
    arguments = make_pairs(1300, groups, torch.float32, length=4)
    options = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "length_normalize": True}
    got = run_tail(CUDA, *arguments, groups, **options)
    require_tail(got, tail_oracle(*arguments, groups, **options), torch.float32)


@inside
@tile_cases.cases_of(test_linear_head.test_tile_operations_against_their_definition)
def test_tiles_against_their_definition(dtype, softcap, logit_scale, biased, words):
    test_linear_head.test_tile_operations_against_their_definition("cuda", dtype, softcap, logit_scale, biased, words)


@inside
@tile_cases.cases_of(test_linear_head.test_bad_logits_answer_as_log_softmax_does)
def test_bad_logits_through_the_head(value, whole_row, small_tiles):
    test_linear_head.test_bad_logits_answer_as_log_softmax_does("cuda", value, whole_row, small_tiles)


@inside
@tile_cases.cases_of(test_linear_head.test_confident_rows_keep_their_gradient)
def test_confident_rows_through_the_head(dtype, budget, small_tiles):
    test_linear_head.test_confident_rows_keep_their_gradient("cuda", dtype, budget, small_tiles)
