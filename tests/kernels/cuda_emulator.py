"""A pytest plugin: the CUDA kernels run on the CPU, in the small emulator of cuda_emulation/.

    PYTHONPATH=tests/kernels python -m pytest -p cuda_emulator tests/kernels/test_parity.py

Sources and bindings are the ones that nvcc compiles; a launch, which is no C++, is rewritten into a call.  Without a
CUDA device in sight the backend then takes tensors on the CPU, for the parity matrix to run on small shapes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import torch

CSRC = Path(__file__).parents[2] / "csrc"
EMULATION = Path(__file__).parent / "cuda_emulation"
LAUNCH = re.compile(r"(\w+(?:<[\w, ]+>)?)<<<(.+?), (\w+), 0, stream>>>\((\w+)\)")


def compiler() -> str | None:
    """g++, for it has _Float16 and statement macros as the headers here use them."""
    return shutil.which(os.environ.get("CXX") or "g++")


def build(folder: Path, *flags: str) -> Path:
    """``_cuda`` made of the sources in csrc, emulated."""
    import pybind11

    copy = folder / "csrc"
    shutil.copytree(CSRC, copy, ignore=shutil.ignore_patterns("cpu"))
    sources = [copy / "bindings_cuda.cpp"]
    for path in (copy / "cuda").glob("*.cu"):
        text, launches = LAUNCH.subn(r"emulation::launch(\1, \2, \3, \4)", path.read_text())
        if launches == 0 or "<<<" in text:
            raise RuntimeError(f"{path.name} launches in a way that the emulator does not know")
        sources.append(path.with_suffix(".cpp"))
        sources[-1].write_text(text)
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = [EMULATION, sysconfig.get_paths()["include"], pybind11.get_include()]
    subprocess.run(
        [compiler(), "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-unknown-pragmas", *flags,
         *(f"-I{path}" for path in include), *sources, "-o", target],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return target


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("grpo_kernels._cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def take_the_place_of_the_device(emulated: ModuleType) -> None:
    """``native_cuda`` with the emulated kernels, for tensors on the CPU."""
    sys.modules["grpo_kernels._cuda"] = emulated
    import grpo_kernels
    from grpo_kernels.backends import native_cuda

    grpo_kernels._cuda = native_cuda._cuda = emulated
    native_cuda.unavailable_reason = lambda: None
    native_cuda.unsupported_reason = lambda device, dtype: (
        None if device.type == "cpu" and dtype in native_cuda.DTYPES else "emulated, it takes CPU tensors"
    )
    native_cuda._gpu_of = lambda tensor: tensor.device
    native_cuda._launch = lambda kernel, device, *arguments: kernel(*arguments, 0, 0)


def pytest_configure(config):
    folder = Path(tempfile.mkdtemp(prefix="cuda-emulator-"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    if torch.cuda.is_available():
        raise RuntimeError("there is a GPU: run the kernels themselves")
    take_the_place_of_the_device(load(build(folder)))
