"""A GPU that is not there: a Triton driver under which the launchers do all that they do on one but run the kernel.

    GRPO_KERNELS_STAND_IN=sm_90 PYTHONPATH=tests/kernels pytest -p jit_stand_in tests/kernels/test_triton_jit.py

Real are Triton's binder, its specialisation of arguments, its cache and check of globals, its options and compiler,
and, where there is a C compiler, its driver and launchers, built against the libraries of stand_in_driver/.  Nothing
runs in the end: ``dry_backend()`` lets plain PyTorch compute what the kernel would have.

A process has one such GPU from its start on: the package reads the vendor when it is imported.

Environment:
    GRPO_KERNELS_STAND_IN   which GPU: a name of ``GPUS``
"""

from __future__ import annotations

import atexit
import collections
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does today, without the warning that it will not

import torch
import triton
from compiled_code import resource_usage
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

SOURCES = Path(__file__).parent / "stand_in_driver"
VARIABLE = "GRPO_KERNELS_STAND_IN"


class Gpu(NamedTuple):
    """What the driver says of itself."""

    target: GPUTarget
    shared: int
    """Bytes that a block may ask for."""

    @property
    def amd(self) -> bool:
        return self.target.backend == "hip"


GPUS = {
    "sm_80": Gpu(GPUTarget("cuda", 80, 32), 166912),
    "sm_90": Gpu(GPUTarget("cuda", 90, 32), 232448),
    "sm_100": Gpu(GPUTarget("cuda", 100, 32), 232448),
    "gfx942": Gpu(GPUTarget("hip", "gfx942", 64), 65536),
}


# ---------------------------------------------------------------------------------------------- the driver


class Driver:
    """Stands in for ``triton.runtime.driver.active``."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.library = _load_library(gpu) if can_build() else None
        self.utils: Any = Utils(gpu, self.library)
        # Triton's launchers ask the active driver for its functions while they are made.
        triton.runtime.driver.set_active(self)
        real = None
        if self.library is not None:
            vendor = _vendor(gpu)
            self.utils.real = vendor.HIPUtils() if gpu.amd else vendor.CudaUtils()
            real = vendor.HIPLauncher if gpu.amd else vendor.CudaLauncher
        self.launches: collections.Counter[str] = collections.Counter()
        self.launcher_cls = lambda source, metadata: Launcher(self, real, source, metadata)

    def launched(self) -> int | None:
        """How many launches came through Triton's own launcher; None where there is none."""
        return None if self.library is None else ctypes.c_long.in_dll(self.library, "stand_in_launches").value

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.gpu.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.gpu.target.arch, 10)


class Utils:
    """The driver's functions: Triton's own where they could be built, with what the stand-in library must be told."""

    def __init__(self, gpu: Gpu, library: ctypes.CDLL | None) -> None:
        self.gpu, self.library, self.real = gpu, library, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def get_device_properties(self, device: int) -> dict[str, Any]:
        if self.real is not None:
            return self.real.get_device_properties(device)
        return {"max_shared_mem": self.gpu.shared, "multiprocessor_count": 132, "warpSize": self.gpu.target.warp_size}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        usage = {"REG": 0, "STACK": 0, "LOCAL": 0} if self.gpu.amd else resource_usage(binary)
        stack = usage["STACK"] + usage["LOCAL"]
        if self.real is None:
            return 0, 0, usage["REG"], stack // 4, 1024
        if not self.gpu.amd:
            ctypes.c_int.in_dll(self.library, "stand_in_registers").value = usage["REG"]
            ctypes.c_int.in_dll(self.library, "stand_in_stack").value = stack
        return self.real.load_binary(name, binary, shared, device)

    def unload_module(self, module: int) -> None:
        if self.real is not None:
            self.real.unload_module(module)


class Launcher:
    """Checks each argument against the kernel's signature, then hands it to Triton's launcher.

    Triton 3.9 silently truncates an integer that does not fit its type.
    """

    def __init__(self, driver: Driver, real: Any, source: Any, metadata: Any) -> None:
        self.driver, self.kernel = driver, source.fn.fn.__name__
        self.signature = dict(source.signature)
        self.real = None if real is None else real(source, metadata)

    def __call__(self, grid_x, grid_y, grid_z, stream, function, packed, metadata, enter, leave, *arguments) -> None:
        for (name, kind), value in zip(self.signature.items(), arguments, strict=True):
            problem = misfit(kind, value)
            if problem:
                raise TypeError(f"{self.kernel}: {name} is a {kind} of the compiled kernel, but {problem}")
        if self.real is not None:
            self.real(grid_x, grid_y, grid_z, stream, function, packed, metadata, enter, leave, *arguments)
        self.driver.launches[self.kernel] += 1


POINTERS = {
    "fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "i64": torch.int64, "i32": torch.int32,
}  # fmt: skip


def misfit(kind: str, value: object) -> str | None:
    """Why an argument cannot be of this type of a signature, or None."""
    if kind == "constexpr":
        return None
    if kind.startswith("*"):
        fits = isinstance(value, torch.Tensor) and value.dtype == POINTERS[kind[1:]]
        return None if fits else f"a {getattr(value, 'dtype', type(value).__name__)} came"
    if kind in ("i32", "i64"):
        bits = int(kind[1:]) - 1
        fits = isinstance(value, int) and not isinstance(value, bool) and -(1 << bits) <= value < 1 << bits
        return None if fits else f"{value!r} came"
    if kind == "fp32":
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= torch.finfo().max
        return None if fits else f"{value!r} came"
    return "no launcher here passes such a type"


def can_build() -> bool:
    """Whether Triton's driver and launchers can be compiled on this machine."""
    return _compiler() is not None and Path(sysconfig.get_paths()["include"], "Python.h").exists()


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def _vendor(gpu: Gpu) -> ModuleType:
    if gpu.amd:
        from triton.backends.amd import driver
    else:
        from triton.backends.nvidia import driver
    return driver


def _load_library(gpu: Gpu) -> ctypes.CDLL:
    """The stand-in for the vendor's library, compiled, and loaded under the name by which Triton asks for it."""
    name, source = ("libamdhip64.so", SOURCES / "hip.c") if gpu.amd else ("libcuda.so.1", SOURCES / "cuda.c")
    include = Path(_vendor(gpu).__file__).parent / "include"
    digest = hashlib.sha256(source.read_bytes() + str(include).encode()).hexdigest()[:16]
    folder = Path(triton.knobs.cache.dir, f"grpo_kernels_stand_in_{digest}")
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        built = folder / f"{name}.{os.getpid()}"
        options = ["-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{name}", f"-I{include}"]
        subprocess.run([_compiler(), *options, source, "-o", built], check=True)
        os.replace(built, folder / name)
    library = ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.c_int.in_dll(library, "stand_in_shared").value = gpu.shared
    if gpu.amd:
        os.environ["TRITON_LIBHIP_PATH"] = str(folder / name)
    else:
        ctypes.c_int.in_dll(library, "stand_in_capability").value = gpu.target.arch
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return library


def install(name: str) -> Driver:
    """Make this process one with such a GPU, as far as Triton and the package's launchers can tell."""
    gpu = GPUS[name]
    if "grpo_kernels.backends.triton.table" in sys.modules:
        raise RuntimeError("the package has been imported, and has seen which vendor's GPU there is")
    torch.version.hip = "6.4" if gpu.amd else None
    listen()
    return Driver(gpu)


# ---------------------------------------------------------------------------------------------- what was compiled


class Compiled(NamedTuple):
    """One entry of a kernel's cache: its program, and what it was compiled for."""

    kernel: str
    types: dict[str, str]
    """Of all parameters; "constexpr" for those that are constants of the program."""
    constants: dict[str, Any]
    """Of the parameters that are: None for a pointer that was not given."""
    program: Any


def kernels() -> dict[str, JITFunction]:
    """Every kernel of the package by name: what has been launched, and what could be."""
    from grpo_kernels.backends import triton as backend

    modules = [module for name, module in sys.modules.items() if name.startswith(backend.__name__ + ".")]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    return {kernel.fn.__name__: kernel for kernel in found if kernel.fn.__name__.endswith("_kernel")}


def compiled() -> Iterator[Compiled]:
    """Everything that the kernels' caches hold in this process."""
    for name, kernel in kernels().items():
        for programs, *_ in kernel.device_caches.values():
            for program in programs.values():
                constants = {kernel.arg_names[path[0]]: value for path, value in program.src.constants.items()}
                yield Compiled(name, dict(program.src.signature), constants, program)


SECONDS: dict[str, list[float]] = collections.defaultdict(list)
"""Of every compilation that was not found in Triton's cache on disk, by kernel."""


def listen() -> None:
    def heard(*, src, metadata, metadata_group, times, cache_hit) -> None:
        if not cache_hit:
            SECONDS[src.fn.fn.__name__].append(times.total / 1e6)

    triton.knobs.compilation.listener = heard


# ---------------------------------------------------------------------------------------------- results


def dry_backend() -> ModuleType:
    """The Triton backend, on CPU tensors: a call goes through its launcher, then plain PyTorch computes the result."""
    from grpo_kernels.backends import OPERATIONS, torch_ops
    from grpo_kernels.backends import triton as backend

    for name in OPERATIONS:
        launch = getattr(backend, name)
        if not hasattr(launch, "dry"):
            setattr(backend, name, _dry(launch, getattr(torch_ops, name)))
    backend.unavailable_reason = lambda: None
    backend.unsupported_reason = lambda device, dtype: None if dtype in backend._DTYPES else f"it does not take {dtype}"
    return backend


def _dry(launch, compute):
    def operation(*tensors, **options) -> None:
        launch(*tensors, **options)
        compute(*tensors, **options)

    operation.dry = True
    return operation


if VARIABLE in os.environ:
    DRIVER = install(os.environ[VARIABLE])
    START = time.monotonic()

    @atexit.register
    def _report() -> None:
        totals = {name: f"{len(found)} in {sum(found):.1f} s" for name, found in SECONDS.items()}
        print(f"\ntriton {triton.__version__}: compiled {totals}, launched {dict(DRIVER.launches)}", file=sys.stderr)
