"""What the build promises: no torch in csrc, no instruction leaking out of its set, no spills, a wheel that travels."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import grpo_kernels

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
WHEEL_ARCHS = (80, 86, 89, 90, 100, 120)
KERNELS = 3 + 3 + 2 + 2 + 5 + 5
"""Forward and backward in three dtypes, the tail and the robust loss in two, both tiles in five pairs of dtypes."""

needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")
needs_cxx = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def run(*command, cwd=ROOT, check=True, **environment):
    environment = {**os.environ, **{k: str(v) for k, v in environment.items()}}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def build(tmp_path, check=True, **environment):
    folders = ("--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib")
    return run(sys.executable, ROOT / "setup.py", "build_ext", *folders, check=check, **environment)


@needs_sources
def test_csrc_includes_no_torch_header():
    sources = [path for path in CSRC.rglob("*") if path.is_file()]
    assert len(sources) > 10
    for path in sources:
        assert not re.search(r'#include\s*[<"](torch|ATen|c10)', path.read_text()), path


@pytest.mark.skipif(shutil.which("nm") is None or shutil.which("readelf") is None, reason="no binutils")
@pytest.mark.parametrize("module", ["_cpu", "_cuda"])
def test_modules_have_no_torch_symbol(module):
    """So that one wheel serves every torch version."""
    spec = importlib.util.find_spec(f"grpo_kernels.{module}")
    if spec is None:
        pytest.skip(f"{module} is not built")
    lines = run("nm", "-D", spec.origin).stdout.splitlines()
    symbols = "\n".join(line.split()[-1] for line in lines)  # not the addresses: one may well end in c10
    assert "PyInit_" in symbols
    assert not re.search(r"torch|c10|_ZN2at|aten", symbols)
    needed = run("readelf", "-d", spec.origin).stdout
    assert not re.search(r"NEEDED.*(torch|c10|cudart)", needed)


@needs_sources
def test_without_a_compiler_the_build_says_so_and_goes_on(tmp_path):
    done = build(tmp_path, PATH=tmp_path, CXX="", GRPO_KERNELS_CUDA="0")
    assert "no C++ compiler found" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@needs_sources
@pytest.mark.skipif(shutil.which("false") is None, reason="no `false`")
def test_a_compiler_that_fails_stops_the_build(tmp_path):
    assert build(tmp_path, check=False, CXX=shutil.which("false"), GRPO_KERNELS_CUDA="0").returncode != 0


@needs_sources
@pytest.mark.parametrize(("wish", "message"), [("1", "there is no nvcc"), ("yes", "must be 0, 1 or auto")])
def test_cuda_wishes_that_cannot_be_met(tmp_path, wish, message):
    done = build(tmp_path, check=False, GRPO_KERNELS_CUDA=wish, CUDA_HOME=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.slow
@needs_sources
@needs_cxx
@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set only")
def test_sets_of_instructions_share_no_function(tmp_path):
    """A weak symbol compiled for AVX-512 could be the one the linker keeps for everyone."""
    build(tmp_path, GRPO_KERNELS_CUDA="0")
    objects = [*tmp_path.rglob("token_logps_*.o"), *tmp_path.rglob("head_tile_*.o")]
    assert len(objects) == 8
    for path in objects:
        defined = [line.split() for line in run("nm", "--defined-only", path).stdout.splitlines()]
        shared = [name for *_, kind, name in defined if kind in "TDBWVu" and not name.startswith("DW.ref")]
        assert len(shared) == 1, shared
        assert "kTokenLogps" in shared[0] or "kHeadTile" in shared[0]


@pytest.mark.slow
@needs_sources
@needs_nvcc
@pytest.mark.parametrize("arch", WHEEL_ARCHS)
def test_cuda_kernels_stay_in_registers(tmp_path, arch):
    """No spills, no stack frame, and rows read 16 bytes at a time, in every kernel."""
    frames, wide_loads = [], 0
    for name in ("token_logps", "preference_tail", "head_tile"):
        cubin = tmp_path / f"{name}.cubin"
        done = run("nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v",
                   CSRC / "cuda" / f"{name}.cu", "-o", cubin)  # fmt: skip
        frames += re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
        if name != "preference_tail" and shutil.which("cuobjdump"):
            wide_loads += len(re.findall(r"\bLDG\.E\S*\.128", run("cuobjdump", "-sass", cubin).stdout))
    assert len(frames) == KERNELS
    assert set(frames) == {("0", "0", "0")}
    if shutil.which("cuobjdump"):
        # Four chunks under way in each of the six row kernels; a tile is read at three places forward, at one backward.
        assert wide_loads >= 6 * 4 + 5 * (3 + 1)


@pytest.mark.slow
@needs_sources
@needs_cxx
def test_wheel_works_away_from_the_source_tree(tmp_path, monkeypatch):
    """Built, installed into a clean virtual environment, and put through the parity matrix there.

    Torch comes from the environment that runs this test, by a .pth file that stands behind the wheel's own folder.
    """
    monkeypatch.delenv("PYTHONPATH", raising=False)  # it may lead to the source tree
    wheels, home = tmp_path / "wheels", tmp_path / "venv"
    run(sys.executable, "-m", "pip", "wheel", ROOT, "--no-deps", "--no-build-isolation", "-w", wheels)
    (wheel,) = wheels.glob("grpo_kernels-*.whl")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "zz_torch.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    tests = tmp_path / "tests"
    shutil.copytree(ROOT / "tests" / "kernels", tests, ignore=shutil.ignore_patterns("__pycache__", "test_triton*"))

    modules = ["_cpu", *(["_cuda"] if shutil.which("nvcc") else [])]
    code = f"import torch, grpo_kernels; from grpo_kernels import {', '.join(modules)}; print(grpo_kernels.__file__)"
    assert str(home) in run(python, "-c", code, cwd=tests).stdout
    parity = run(
        python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_parity.py",
        cwd=tests, GRPO_KERNELS_TEST_BACKENDS="cpu",
    )  # fmt: skip
    assert " passed" in parity.stdout
    assert "skipped" not in parity.stdout


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_is_within_budget(isa):
    done = run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_parity.py",
        cwd=Path(__file__).parent, check=False,
        GRPO_KERNELS_ISA=isa, GRPO_KERNELS_TEST_BACKENDS="cpu", PYTHONPATH=Path(grpo_kernels.__file__).parents[1],
    )  # fmt: skip
    if "is not available here" in done.stdout + done.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert done.returncode == 0, done.stdout
