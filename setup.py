"""Build the compiled kernels: ``_cpu`` always, ``_cuda`` where nvcc is found.  Everything else is in pyproject.toml.

Environment:
    GRPO_KERNELS_CUDA         0, 1 or auto (default): never, always (an error without nvcc), or where nvcc is found
    GRPO_KERNELS_CUDA_ARCHS   "80;90" and the like; the first also as PTX, for GPUs that come later. Default "80"
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
ISAS = {
    "Baseline": "",
    "Avx2": "-mavx2 -mfma -mf16c",
    "Avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq",
    "Avx512Bf16": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16",
}
X86 = platform.machine().lower() in ("x86_64", "amd64")


def find_cxx():
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((name for name in names if shutil.which(name.split()[0])), None)


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    wish = os.environ.get("GRPO_KERNELS_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"GRPO_KERNELS_CUDA must be 0, 1 or auto, got {wish!r}")
    nvcc = None if wish == "0" else shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    if wish == "1" and nvcc is None:
        raise SystemExit("GRPO_KERNELS_CUDA=1, but there is no nvcc on PATH or in CUDA_HOME/bin")
    return nvcc


def cuda_archs():
    archs = [a for a in os.environ.get("GRPO_KERNELS_CUDA_ARCHS", "80").replace(",", ";").split(";") if a]
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return " ".join([*flags, f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}"])


class NinjaBuild(build_ext):
    """Writes one build.ninja for each module, so that files compile in parallel and only when they changed."""

    def run(self):
        if find_cxx() is None:
            print("grpo_kernels: no C++ compiler found; installing without the compiled kernels", file=sys.stderr)
            self.extensions = []
        super().run()

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp, ext.name).resolve()
        for folder in (target.parent, build):
            folder.mkdir(parents=True, exist_ok=True)
        rules = cuda_objects() if ext.name.endswith("_cuda") else cpu_objects()
        (build / "build.ninja").write_text(ninja_file(rules, ext.sources, target))
        subprocess.run([ninja(), "-C", str(build), *(["-v"] if self.verbose else [])], check=True)


def ninja():
    found = shutil.which("ninja")
    if found is None:
        import ninja as package

        found = str(Path(package.BIN_DIR, "ninja"))
    return found


def cpu_objects():
    """(source, object, rule, flags) of every object of ``_cpu``."""
    base = "-DGRPO_X86" if X86 else ""
    isas = ISAS if X86 else {"Baseline": ""}
    objects = [("bindings_cpu.cpp", "bindings_cpu.o", "cxx", base)]
    objects += [(f"cpu/{name}.cpp", f"{name}.o", "cxx", base) for name in ("isa", "preference_tail")]
    for isa, flags in isas.items():
        table = f"{base} {flags} -DGRPO_TABLE=kTokenLogps{isa}"
        objects.append(("cpu/token_logps.cpp", f"token_logps_{isa.lower()}.o", "cxx", table))
    return objects


def cuda_objects():
    """(source, object, rule, flags) of every object of ``_cuda``."""
    objects = [("bindings_cuda.cpp", "bindings_cuda.o", "cxx", "")]
    return objects + [(f"cuda/{name}.cu", f"{name}.o", "nvcc", "") for name in ("token_logps", "preference_tail")]


def ninja_file(objects, sources, target):
    import pybind11

    cuda = any(rule == "nvcc" for _, _, rule, _ in objects)
    include = f"-I{sysconfig.get_paths()['include']} -I{pybind11.get_include()}"
    # gcc sees uninitialized registers inside its own AVX-512 headers, hence the last two; clang lacks one of them.
    warnings = "-Wall -Wextra -Wno-unknown-warning-option -Wno-uninitialized -Wno-maybe-uninitialized"
    openmp = "" if cuda else "-fopenmp"
    lines = [
        f"cxxflags = -std=c++17 -O3 -fPIC -fvisibility=hidden {warnings} {openmp} {include}",
        f"userflags = {os.environ.get('CXXFLAGS', '')}",
        f"ldflags = -shared {openmp} {os.environ.get('LDFLAGS', '')} {'' if cuda else '-lm'}",
        "rule cxx",
        f"  command = {find_cxx()} $cxxflags $flags $userflags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {find_cxx()} $in -o $out $ldflags $libraries",
    ]
    if cuda:
        home = Path(find_nvcc()).resolve().parent.parent
        folders = [
            f"-L{home / name}" for name in ("lib64", "lib", "targets/x86_64-linux/lib") if (home / name).is_dir()
        ]
        lines += [
            f"libraries = {' '.join(folders)} -lcudart_static -ldl -lpthread -lrt",
            "rule nvcc",
            f"  command = {find_nvcc()} -std=c++17 -O3 --threads 0 -Xcompiler -fPIC,-fvisibility=hidden {cuda_archs()}"
            " -ccbin $cxx $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        lines.insert(0, f"cxx = {find_cxx().split()[0]}")
    for source, output, rule, flags in objects:
        lines += [f"build {output}: {rule} {(CSRC / source).resolve()}", f"  flags = {flags}"]
    lines.append(f"build {target}: link {' '.join(output for _, output, _, _ in objects)}")
    return "\n".join([*lines, f"default {target}", ""])


modules = ["_cpu", *(["_cuda"] if find_nvcc() and (CSRC / "bindings_cuda.cpp").exists() else [])]
folders = {"_cpu": ("*.h", "*.cpp", "cpu/*"), "_cuda": ("*.h", "*.cpp", "cuda/*")}
setup(
    ext_modules=[
        Extension(f"grpo_kernels.{name}", sorted(str(p) for glob in folders[name] for p in CSRC.glob(glob)))
        for name in modules
    ],
    cmdclass={"build_ext": NinjaBuild},
)
