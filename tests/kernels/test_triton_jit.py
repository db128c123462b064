"""The launchers of the Triton backend through Triton's JIT, on a GPU that is not there (``jit_stand_in.py``).

What neither the interpreter nor a compilation ahead of time looks at: how arguments become types and constants, the
check of globals, launch options, Triton's driver and its launchers.  By default a few calls that cover every option of
every kernel; ``-m slow`` adds the whole parity matrix, and both again with the oldest Triton that the package takes.

A process sees one GPU from its start on, so the tests that run by default start pytest anew.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from grpo_kernels.backends import OPERATIONS
from grpo_kernels.backends import triton as backend

HERE = Path(__file__).parent
VARIABLE, MATRIX = "GRPO_KERNELS_STAND_IN", "GRPO_KERNELS_STAND_IN_MATRIX"
GPU = os.environ.get(VARIABLE)

NVIDIA, AMD = ("sm_80", "sm_90", "sm_100"), ("gfx942",)

pytestmark = [
    pytest.mark.skipif(backend._missing is not None, reason=str(backend._missing)),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET=1 replaces the kernels by Python"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which the parity tests launch"),
]
inside = pytest.mark.skipif(GPU is None, reason="runs in the processes that the first tests start")
outside = pytest.mark.skipif(GPU is not None, reason="this is such a process")

if GPU is not None:
    import jit_covering
    import jit_stand_in
    from compiled_code import assert_fits, assert_wide

    from grpo_kernels.proof import Place, cases

    class DryPlace(Place):
        """The Triton backend on CPU tensors, which compiles and launches, and is not interpreted."""

        interpreted = False

    if MATRIX in os.environ:
        jit_stand_in.dry_backend()
CASES = cases(DryPlace("triton", "cpu")) if GPU is not None and MATRIX in os.environ else []


# ---------------------------------------------------------------------------------------------- from outside


def run_inside(gpu: str, tests: list[str], triton: Path | None = None, **environment: str) -> None:
    """These tests in a process that has this GPU, with the Triton in this folder or the installed one."""
    path = [*([str(triton)] if triton else []), str(HERE), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "jit_stand_in", "-p", "no:cacheprovider",
         *(f"{HERE / 'test_triton_jit.py'}::{test}" for test in tests)],
        env={
            **os.environ, **environment, VARIABLE: gpu, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path),
        },
        cwd=HERE.parent.parent, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    print(gpu, *(line for line in (run.stdout + run.stderr).splitlines() if " passed" in line or "compiled" in line))


def kernel_tests(*operations: str) -> list[str]:
    return [f"test_kernel[{name}]" for name in operations or OPERATIONS]


TILES = [name for name in OPERATIONS if name.startswith("head_tile")]
OTHERS = [name for name in OPERATIONS if name not in TILES]


@outside
@pytest.mark.parametrize(
    ("gpu", "tests"),
    [
        pytest.param("sm_90", kernel_tests(*OTHERS), id="sm_90, rows, tail"),
        pytest.param("sm_90", [*kernel_tests(*TILES), "test_the_stand_in_refuses"], id="sm_90, tiles"),
        pytest.param("gfx942", kernel_tests(), id="gfx942"),
    ],
)
def test_launchers(gpu, tests):
    run_inside(gpu, tests)


@outside
@pytest.mark.slow
def test_the_whole_matrix_and_the_oldest_triton():
    """The matrix with the installed Triton and the oldest that the package takes, two processes at a time.

    With the installed one, other GPUs are test_triton_aot.py's.
    """
    matrix = ["test_matrix", "test_matrix_programs"]
    old, reason = oldest_triton()
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run_inside, "sm_90", matrix, path, **{MATRIX: "1"}) for path in dict.fromkeys([None, old])]
        if old is not None:
            runs += [pool.submit(run_inside, gpu, kernel_tests(), old) for gpu in (*NVIDIA, *AMD)]
        for run in runs:
            run.result()
    if old is None:
        pytest.skip(f"the installed Triton passes; the oldest was not tried: {reason}")


def oldest_triton() -> tuple[Path | None, str | None]:
    """A folder with the oldest Triton that the package takes, or why there is none."""
    version = ".".join(map(str, (*backend.OLDEST_TRITON, 0)))
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "grpo_kernels_tests")
    folder = caches / f"triton-{version}-{sys.implementation.cache_tag}"
    if not (folder / "triton").is_dir():
        # Under another name until it is whole: a second run may look at the same time.
        made = caches / f"{folder.name}.{os.getpid()}"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        try:
            command = [*pip, "--only-binary=:all:", "--target", made, f"triton=={version}"]
            subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
        except subprocess.SubprocessError as error:
            shutil.rmtree(made, ignore_errors=True)
            said = getattr(error, "stderr", None) or str(error)
            return None, f"pip cannot install triton {version}: {said.strip().splitlines()[-1]}"
        if not folder.is_dir():
            made.rename(folder)
    return folder, None


# ---------------------------------------------------------------------------------------------- inside


@inside
@pytest.mark.parametrize("name", OPERATIONS)
def test_kernel(name):
    """Every option is compiled, fits, moves 16 bytes at a time and is launched.

    On NVIDIA's GPUs any two values of two options come together in some call; on AMD's each value comes in some call.
    What changes from call to call, or with a setting, compiles nothing new.
    """
    calls = jit_covering.calls(name, 2 if GPU in NVIDIA else 1)
    for call in calls:
        jit_covering.launch(name, call)
    programs = programs_of(name)
    kernel = jit_stand_in.kernels()[f"{name}_kernel"]
    assert jit_covering.seen(kernel, programs) == jit_covering.expected(kernel)
    check(programs)
    for call in calls[:2]:
        for changes in jit_covering.CHANGES[name]:
            jit_covering.launch(name, call, **changes)
            assert len(programs_of(name)) == len(programs), f"{changes} brought another compilation of {call}"
    assert_launched()


@inside
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operations[0]}, {case.name}")
def test_matrix(case):
    case.run()


@inside
def test_matrix_programs():
    """After the matrix: nothing was compiled that ``jit_covering`` does not know of; it fits, and was launched."""
    for name in OPERATIONS:
        programs = programs_of(name)
        kernel = jit_stand_in.kernels()[f"{name}_kernel"]
        wanted, found = jit_covering.expected(kernel), jit_covering.seen(kernel, programs)
        assert all(found[parameter] <= wanted[parameter] for parameter in wanted), (found, wanted)
        check(programs)
    assert_launched()


def programs_of(name: str) -> list:
    return [program for program in jit_stand_in.compiled() if program.kernel == f"{name}_kernel"]


def check(programs: list) -> None:
    """Fits the GPU, is specialised on nothing, and moves rows as wide as test_triton_aot.py asks for."""
    for _, types, constants, program in programs:
        assert_fits(program)
        assert not any(program.src.attrs.values()), program.src.attrs
        if "VEC" not in constants or types.get("bias_ptr", "constexpr") != "constexpr":
            continue  # a bias is moved beside the row
        itemsize, threads = 16 // constants["VEC"], program.metadata.num_warps * program.metadata.target.warp_size
        # Rows: target, lse and gradient, an edge. Tiles: target, its logit, three of its state, and the edges twice.
        scalars = 8 if "CAPPED" in constants else 6
        assert_wide(program, "ld", constants["BLOCK_V"], itemsize, threads, scalars)
        if constants.get("GRAD_HINT", constants.get("OUT_HINT")) == 16:
            assert_wide(program, "st", constants["BLOCK_V"], itemsize, threads)


def assert_launched() -> None:
    """What was checked also went through Triton's own launcher, where there is one."""
    checked, launched = sum(jit_stand_in.DRIVER.launches.values()), jit_stand_in.DRIVER.launched()
    assert checked > 0
    assert launched in (None, checked)


WRONG = """
import triton
import triton.language as tl

_NAN = tl.constexpr(float("nan"))


@triton.jit
def changed_global(x_ptr):
    tl.store(x_ptr, _NAN)


@triton.jit(do_not_specialize=["number"])
def narrow_kernel(x_ptr, number: tl.int32):
    tl.store(x_ptr, number.to(tl.float32))
"""


@inside
def test_the_stand_in_refuses(tmp_path):
    """What a GPU would refuse: the tests above can fail."""
    path = tmp_path / "wrong.py"
    path.write_text(WRONG)
    spec = importlib.util.spec_from_file_location("wrong", path)
    wrong = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wrong)
    x = torch.zeros(1)
    with pytest.raises(RuntimeError, match="_NAN has changed"):
        wrong.changed_global[(1,)](x)
    wrong.narrow_kernel[(1,)](x, 7)
    with pytest.raises(TypeError, match="number is a i32"):
        wrong.narrow_kernel[(1,)](x, 1 << 31)
    with pytest.raises(KeyError, match="registers"):
        wrong.narrow_kernel[(1,)](x, 7, registers=3)
    if jit_stand_in.DRIVER.launched() is not None:
        # Too many blocks for NVIDIA in y, for AMD in x, whose launcher forgets what it was about to raise.
        with pytest.raises((RuntimeError, SystemError), match=r"refused by the stand-in|with an exception set"):
            wrong.narrow_kernel[((1 << 26) + 1, (1 << 16) + 1)](x, 7)
