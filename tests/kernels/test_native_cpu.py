"""What is the CPU module's own: its exponential, its instruction sets, its threads, and how it refuses."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import exp_accuracy
import numpy as np
import pytest
import torch
from kernel_cases import load

import grpo_kernels

native_cpu = load("native_cpu")
if native_cpu.unavailable_reason() is not None:
    pytest.skip(native_cpu.unavailable_reason(), allow_module_level=True)
from grpo_kernels import _cpu  # noqa: E402

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")


def run_python(*arguments, **environment):
    """A fresh process, because an instruction set is chosen once; the output, or a skip where there is no such set."""
    path = os.pathsep.join([str(Path(grpo_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "is not available here" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("isa", ISAS)
def test_exponential_is_within_2_ulp(isa):
    """Over the whole range in which the result is neither 0 nor infinite, subnormal results included."""
    name, worst = run_python("exp_accuracy.py", _cpu.__file__, GRPO_KERNELS_ISA=isa).split()
    assert name == isa
    assert float(worst) <= 2.0


def test_exponential_at_its_ends():
    x = np.array([0.0, -0.0, -np.inf, -1e38, -104.0, np.nan], dtype=np.float32)
    want = np.array([1, 1, 0, 0, 0, np.nan], dtype=np.float32)
    np.testing.assert_array_equal(exp_accuracy.kernel_exp(_cpu, x), want)


def test_an_unknown_instruction_set_is_an_unavailable_backend():
    code = "from grpo_kernels.backends import available_backends; print(available_backends()['cpu'])"
    assert "GRPO_KERNELS_ISA must be" in run_python("-c", code, GRPO_KERNELS_ISA="sse9")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_threads_are_torchs_own():
    """No thread beyond torch.set_num_threads, and one OpenMP runtime for both (two would fight over the cores)."""
    code = """
import os, torch
from grpo_kernels.proof import rows as k
place = k.Place("cpu", "cpu")
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
data = k.make_rows(place, torch.float32, (1, 64, 4099), 3.0)
before = count()
k.forward(place, *data[:2])
one = count()
torch.set_num_threads(3)
k.forward(place, *data[:2])
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
print(one - before, count() - before, len(runtimes))
"""
    one, three, runtimes = map(int, run_python("-c", code).split())
    assert one == 0
    assert three <= 2
    assert runtimes == 1


def test_other_python_threads_go_on_meanwhile(threads):
    threads(1)
    logits = torch.zeros(1, 256, 32001)
    targets = torch.zeros(256, dtype=torch.int64)
    logps, lse = torch.empty(256), torch.empty(256)
    spans = []

    def work():
        for _ in range(10):
            start = time.perf_counter()
            native_cpu.token_logps_fwd(logits, targets, logps, lse, ignore_index=-100)
            spans.append((start, time.perf_counter()))

    worker = threading.Thread(target=work)
    seen = []
    worker.start()
    while worker.is_alive():
        seen.append(time.perf_counter())
        time.sleep(1e-4)
    # With the lock held there would be no moment of this thread's inside a call, only between two.
    assert sum(any(a < t < b for a, b in spans) for t in seen) >= len(spans)


@pytest.mark.parametrize("backend", ["native_cpu", "torch_ops"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_range_of_integers(backend, dtype):
    """0 counts as one of them, for every range asked about holds it; the ignored do not count."""
    integer_range = load(backend).integer_range
    limits = torch.iinfo(dtype)
    for values, expected in (
        ([], (0, 0)),
        ([5, 3], (0, 5)),
        ([-100, 7, -2, -100], (-2, 7)),
        ([-100, -100], (0, 0)),
        ([limits.min, limits.max], (limits.min, limits.max)),
    ):
        assert integer_range(torch.tensor(values, dtype=dtype), -100) == expected
    assert integer_range(torch.tensor([[1, 9], [2, -9]], dtype=dtype)[:, 0], -100) == (0, 2)


def test_integers_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="int64 or int32"):
        native_cpu.integer_range(torch.zeros(3, dtype=torch.int16), 0)


def test_missing_lengths_are_refused_where_they_are_needed():
    given = [torch.zeros(2), None, None, None, torch.zeros(1, dtype=torch.int64), None, torch.zeros(2), None]
    given += [torch.zeros(n) for n in (1, 2, 1, 1)]
    given += [torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64), torch.zeros(1)]
    options = {"loss_type": 0, "beta": 0.1, "label_smoothing": 0.0, "ignore_index": -100}
    native_cpu.preference_tail(*given, **options, length_normalize=False)
    with pytest.raises(ValueError, match="lengths"):
        native_cpu.preference_tail(*given, **options, length_normalize=True)


def arguments():
    logits, targets = torch.zeros(2, 3, 5), torch.zeros(6, dtype=torch.int64)
    return {"logits": logits, "targets": targets, "logps": torch.empty(6), "lse": torch.empty(6)}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("logits", torch.zeros(2, 3, 5, dtype=torch.float64), TypeError),
        ("logits", torch.zeros(6, 5), ValueError),
        ("logits", torch.zeros(2, 3, 10)[:, :, ::2], ValueError),
        ("logits", torch.zeros(2, 3, 5, device="meta"), TypeError),
        ("targets", torch.zeros(6, dtype=torch.int32), ValueError),
        ("targets", torch.zeros(5, dtype=torch.int64), ValueError),
        ("logps", torch.empty(12)[::2], ValueError),
        ("lse", torch.empty(6, dtype=torch.float64), ValueError),
    ],
)
def test_a_wrong_tensor_is_named(name, value, error):
    with pytest.raises(error, match=name):
        native_cpu.token_logps_fwd(**{**arguments(), name: value}, ignore_index=-100)


def test_a_gradient_unlike_the_logits_is_refused():
    given = arguments()
    with pytest.raises(ValueError, match="grad_logits must be like logits"):
        native_cpu.token_logps_bwd(
            given["logits"], given["targets"], given["lse"], given["logps"], torch.zeros(3, 2, 5), ignore_index=-100
        )
