"""Build the compiled kernels: ``_cpu`` always, ``_cuda`` where nvcc is found.  Everything else is in pyproject.toml.

Environment:
    GRPO_KERNELS_CUDA         0, 1 or auto (default): never, always (an error without nvcc), or where nvcc is found
    GRPO_KERNELS_CUDA_ARCHS   "80;90" and the like, the first also as PTX for GPUs that come later.  Default "80"
    CUDA_HOME                 where to look for bin/nvcc instead of PATH
    CXX, CXXFLAGS, LDFLAGS    as everywhere

No network, no git, no question to a GPU.  Without a C++ compiler the package installs without the modules and says
so; a compiler that fails stops the installation with its error.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq"
ISAS = {"Baseline": ""}
if X86:
    ISAS |= {"Avx2": AVX2, "Avx512": AVX512, "Avx512Bf16": f"{AVX512} -mavx512bf16"}


def find_cxx():
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((name for name in names if shutil.which(name.split()[0])), None)


def find_nvcc():
    wish = os.environ.get("GRPO_KERNELS_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"GRPO_KERNELS_CUDA must be 0, 1 or auto, got {wish!r}")
    home = os.environ.get("CUDA_HOME")
    nvcc = None if wish == "0" else shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    if wish == "1" and nvcc is None:
        raise SystemExit("GRPO_KERNELS_CUDA=1, but there is no nvcc on PATH or in CUDA_HOME/bin")
    return nvcc


def find_ninja():
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja") or "ninja"
    return str(Path(ninja.BIN_DIR, "ninja"))


def cpu_build():
    """(source, object, rule, flags) of every object of ``_cpu``: the row kernels once per instruction set."""
    x86 = "-DGRPO_X86" if X86 else ""
    objects = [("bindings_cpu.cpp", "bindings.o", "cxx", x86)]
    objects += [(f"cpu/{name}.cpp", f"{name}.o", "cxx", x86) for name in ("isa", "preference_tail")]
    for isa, flags in ISAS.items():
        for source, table in (("token_logps", "kTokenLogps"), ("head_tile", "kHeadTile")):
            named = f"{x86} {flags} -DGRPO_TABLE={table}{isa}"
            objects.append((f"cpu/{source}.cpp", f"{source}_{isa.lower()}.o", "cxx", named))
    return objects


def cuda_build():
    """The same of ``_cuda``: the kernels once per architecture.

    nvcc links its runtime statically, so that any PyTorch's will do beside it.
    """
    archs = os.environ.get("GRPO_KERNELS_CUDA_ARCHS", "80").replace(",", ";").strip(";").split(";")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}")
    objects = [("bindings_cuda.cpp", "bindings.o", "nvcc", "")]
    objects += [
        (f"cuda/{name}.cu", f"{name}.o", "nvcc", " ".join(codes))
        for name in ("token_logps", "preference_tail", "head_tile")
    ]
    return objects


def ninja_file(objects, target):
    import pybind11

    # gcc sees uninitialized registers inside its own AVX-512 headers, hence the last two; clang lacks one of them.
    warnings = "-Wall -Wextra -Wno-unknown-warning-option -Wno-uninitialized -Wno-maybe-uninitialized"
    cxxflags, ldflags = (os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS"))
    link = "nvcc" if any(rule == "nvcc" for _, _, rule, _ in objects) else "cxx"
    lines = [
        f"common = -std=c++17 -O3 -I{sysconfig.get_paths()['include']} -I{pybind11.get_include()}",
        f"cxx = {find_cxx()} -fPIC -fvisibility=hidden -fopenmp {warnings}",
        f"nvcc = {find_nvcc()} -ccbin {find_cxx().split()[0]} --threads 0 -Xcompiler -fPIC,-fvisibility=hidden",
    ]
    for rule, extra in (("cxx", cxxflags), ("nvcc", "")):
        lines.append(f"rule {rule}")
        lines.append(f"  command = ${rule} $common $flags {extra} -MMD -MF $out.d -c $in -o $out")
        lines += ["  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", f"  command = ${link} -shared $in -o $out {ldflags if link == 'cxx' else ''}"]
    for source, output, rule, flags in objects:
        lines += [f"build {output}: {rule} {(CSRC / source).resolve()}", f"  flags = {flags}"]
    lines.append(f"build {target}: link {' '.join(output for _, output, _, _ in objects)}")
    return "\n".join([*lines, ""])


class NinjaBuild(build_ext):
    """Writes one build.ninja for each module, so that files compile in parallel and only when they changed."""

    def run(self):
        if find_cxx() is None:
            print("grpo_kernels: no C++ compiler found; installing without the compiled kernels", file=sys.stderr)
            self.extensions = []
        super().run()

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp, ext.name).resolve()
        for path in (target.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        objects = cuda_build() if ext.name.endswith("_cuda") else cpu_build()
        (folder / "build.ninja").write_text(ninja_file(objects, target))
        subprocess.run([find_ninja(), "-C", str(folder)], check=True)


SOURCES = {"_cpu": ("*.h", "bindings_cpu.cpp", "cpu/*"), "_cuda": ("*.h", "bindings_cuda.cpp", "cuda/*")}
setup(
    ext_modules=[
        Extension(f"grpo_kernels.{name}", sorted(str(path) for glob in SOURCES[name] for path in CSRC.glob(glob)))
        for name in ("_cpu", *(["_cuda"] if find_nvcc() else []))
    ],
    cmdclass={"build_ext": NinjaBuild},
)
