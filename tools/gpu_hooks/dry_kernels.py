"""The two GPU backends in a dry run: their launchers are called with the CPU's tensors, plain PyTorch has the results.

    triton   every launch goes through Triton's own JIT, on a stand-in for the driver, and is compiled or not
    cuda     the arguments are checked and turned into addresses, and no kernel is called

Nothing here sets a variable of the environment that Triton's cache goes by, and no library stands in for the driver's:
what is compiled has the keys that it would have on a GPU, on a machine that has one too.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType


def with_results(module: ModuleType, dtypes) -> None:
    """The functions of the boundary: first the backend's own, then plain PyTorch's, which writes the same outputs."""
    from grpo_kernels.backends import OPERATIONS, torch_ops

    def both(ours, theirs):
        def function(*args, **kwargs) -> None:
            ours(*args, **kwargs)
            theirs(*args, **kwargs)

        return function

    for name in OPERATIONS:
        if hasattr(module, name):
            setattr(module, name, both(getattr(module, name), getattr(torch_ops, name)))
    module.unavailable_reason = lambda: None
    module.unsupported_reason = lambda device, dtype: None if dtype in dtypes else f"it does not take {dtype}"


def fewer_cases(proof: ModuleType) -> None:
    every, each = proof.cases, int(os.environ.get("GPU_CHECK_DRY_CASES") or 1)

    def cases(place, **options):
        found = every(place, **options)
        first = {case.operations: place for place, case in reversed([*enumerate(found)])}
        return [case for place, case in enumerate(found) if place % each == 0 or place in first.values()]

    proof.cases = cases


def triton(module: ModuleType) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", int(os.environ.get("GPU_CHECK_ARCHITECTURE") or 90), 32)

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device=None) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return target

    triton.runtime.driver.set_active(Driver())
    launch = JITFunction.run
    seen = set()

    def run(kernel, *args, **kwargs):
        compiled = launch(kernel, *args, **{**kwargs, "warmup": True})
        if compiled is not None and id(compiled) not in seen:
            seen.add(id(compiled))
            launcher_of(compiled)
        return compiled

    JITFunction.run = run
    if os.environ["GPU_CHECK_DRY"] == "launch":
        JITFunction._do_compile = lambda self, *args, **kwargs: None
    else:
        read_by_another_build(os.environ.get("GPU_CHECK_LIBTRITON", ""))
    with_results(module, module._DTYPES)


def launcher_of(compiled) -> None:
    """Compile the C that the first launch of this kernel would compile, and load none of it."""
    from triton.backends.nvidia import driver

    if link_without_a_driver():
        driver.CudaUtils()
        if hasattr(driver, "make_launcher"):  # later releases have one function for all signatures
            driver.CudaLauncher(compiled.src, compiled.metadata)


@functools.cache
def link_without_a_driver() -> bool:
    """Whether launchers can be compiled here; where there is no libcuda.so.1, that of the tests is what they link with.

    It has the functions that they call: without them the linker would not write down that the library is needed.
    """
    import triton
    from triton.backends.nvidia import driver
    from triton.runtime import build

    class Module:
        def __getattr__(self, name):
            return None

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return False
    build._load_module_from_path = lambda name, path: Module()
    try:
        driver.library_dirs()
    except (AssertionError, OSError, subprocess.CalledProcessError):
        folder = Path(triton.knobs.cache.dir, "no-driver")
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"{os.getpid()}.so"
        source = Path(__file__).parents[2] / "tests" / "kernels" / "stand_in_driver" / "cuda.c"
        flags = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", f"-I{driver.include_dirs[0]}"]
        subprocess.run([compiler, *flags, str(source), "-o", str(own)], check=True)
        os.replace(own, folder / "libcuda.so.1")
        triton.knobs.nvidia.libcuda_path = str(folder)
        driver.libcuda_dirs.cache_clear()
        driver.library_dirs.cache_clear()
    return True


def read_by_another_build(libtriton: str) -> None:
    """Keys as that build would have them, of the same release for another Python; "" for this one."""
    if not libtriton:
        return
    from gpu_cache import libtriton_here, sha256_of_libtriton
    from triton.runtime import cache

    here, there = sha256_of_libtriton(libtriton_here()), sha256_of_libtriton(Path(libtriton))
    key = cache.triton_key().replace(here, there)
    if key == cache.triton_key() and here != there:
        raise RuntimeError("this release of Triton makes its keys in another way: GPU_CHECK_LIBTRITON cannot be used")
    cache.triton_key = lambda: key


def cuda(module: ModuleType) -> None:
    class Anything:
        def __getattr__(self, name):
            return None

    module._cuda = Anything()
    module._gpu_of = lambda tensor: tensor.device
    module._launch = lambda kernel, device, *arguments: None
    with_results(module, module.DTYPES)
