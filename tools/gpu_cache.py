"""Triton's kernels compiled without a GPU, for one that is elsewhere: ``make gpu-cache OUT=FILE``.

    python tools/gpu_cache.py --out FILE [--jobs 2] [--architecture 90] [--units smoke,proof,...] [--there FILE]
    python tools/gpu_cache.py --jobs 12 --seconds 60           into TRITON_CACHE_DIR of this machine, no file

The launchers are called with a CPU's tensors, through Triton's own JIT, on a stand-in for the driver (``gpu_hooks/``):
what the smoke script, the proof, the tests, the benchmarks and the sweep launch.  So the keys are those that a GPU's
driver would bring, and ``gpu_check.py --cache FILE`` finds the kernels, if these are the same there:

    Triton's release, and the very build: the key has the hash of libtriton.so, which differs from one minor version of
    Python to the next.  ``--there`` names the wheel of the same release, or its libtriton.so, that will read the cache
    the compute capability, and ptxas, which comes with Triton
    the sources of the kernels, and the lines on which they stand
    variables that change what Triton compiles, of which there should be none: TRITON_DEFAULT_FP_FUSION and the like

What of this differs, ``unpack`` says; the kernels are then compiled there.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path

from gpu_steps import ROOT
from gpu_units import UNITS, units

MANIFEST = "made-by.json"
SOURCES = "kernels"
"""Of the manifest: where only this differs, the kernels that did not change are found."""


# ---------------------------------------------------------------------------------------------- by several processes


def work(wanted: tuple[str, ...], every: int, claims: Path) -> int:
    """Run the units that no other process has taken; how many failed."""
    failed = 0
    for place, (name, run) in enumerate(units(wanted)[::every]):
        try:
            os.close(os.open(claims / str(place), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        try:
            run()
        except Exception:  # another unit may compile all the same
            traceback.print_exc()
            print(f"gpu_cache: {name} failed", flush=True)
            failed += 1
    return failed


def compile_all(options: argparse.Namespace) -> int:
    """Fill TRITON_CACHE_DIR; how many processes found something wrong, the ones that were stopped not counted."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tests = [ROOT / "tests" / name for name in ("", "gpu", "kernels", "distributed")]
        paths = [ROOT / "tools" / "gpu_hooks", ROOT, ROOT / "tools", *tests]
        written = Path(os.environ.get("GPU_CHECK_COMPILATIONS") or Path(folder, "compilations.txt"))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "GPU_CHECK_DRY": os.environ.get("GPU_CHECK_DRY") or "compile",
            "GPU_CHECK_ARCHITECTURE": str(options.architecture),
            "GPU_CHECK_LIBTRITON": str(options.there or ""),
            "GPU_CHECK_COMPILATIONS": str(written),
            "GRPO_KERNELS_TUNED": "never",
            "GRPO_KERNELS_PROVE": "never",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, __file__, "--worker", folder, "--units", options.units]
        command += ["--every", str(options.every)]
        workers = [subprocess.Popen(command, env=environment, cwd=ROOT) for _ in range(options.jobs)]
        wrong, stopped = 0, 0
        for worker in workers:
            try:
                wrong += worker.wait(max(begin + options.seconds - time.monotonic(), 0.1)) != 0
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
                stopped += 1
        done = sum(path.name.isdigit() for path in Path(folder).iterdir())
        lines = written.read_text().splitlines() if written.exists() else []
    counts = Counter(line.split()[0] for line in lines)
    late = f", stopped after {options.seconds:.0f} s" if stopped else ""
    print(
        f"{done} units by {options.jobs} processes: compiled {counts['compiled']} kernels, found {counts['found']} "
        f"in the cache, {time.monotonic() - begin:.0f} s{late}"
    )
    return wrong


# ---------------------------------------------------------------------------------------------- the file


def libtriton_here() -> Path:
    import triton

    return Path(triton.__file__).parent / "_C" / "libtriton.so"


@functools.cache
def sha256_of_libtriton(path: Path) -> str:
    """Of the library itself, or of the one in a wheel."""
    if path.suffix != ".whl":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with zipfile.ZipFile(path) as wheel:
        return hashlib.sha256(wheel.read("triton/_C/libtriton.so")).hexdigest()


def made_by(libtriton: Path | None = None, architecture: int = 90) -> dict[str, object]:
    """What has to be the same where the cache is read."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.nvidia.compiler import get_ptxas_version

    kernels = sorted((ROOT / "grpo_kernels" / "backends" / "triton").glob("*.py"))
    return {
        "triton": triton.__version__,
        "libtriton.so": sha256_of_libtriton(libtriton or libtriton_here())[:16],
        "architecture": architecture,
        "ptxas": str(get_ptxas_version(architecture)).strip().splitlines()[-1],
        SOURCES: hashlib.sha256(b"".join(path.read_bytes() for path in kernels)).hexdigest()[:16],
        "variables": dict(sorted(get_cache_invalidating_env_vars().items())),
    }


def pack(folder: Path, manifest: dict[str, object], path: Path) -> int:
    """Write the cache; how many entries it has.  What Triton needs no more once it is compiled stays behind."""
    entries = sorted(entry for entry in folder.iterdir() if entry.is_dir() and any(entry.glob("__grp__*.json")))
    modules = sorted(entry for entry in folder.iterdir() if entry.is_dir() and any(entry.glob("*.so")))
    with tarfile.open(path, "w:xz") as archive:
        content = json.dumps(manifest, indent=2).encode()
        info = tarfile.TarInfo(MANIFEST)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
        for entry in [*entries, *modules]:
            for file in sorted(entry.iterdir()):
                if file.is_file():
                    archive.add(file, f"{entry.name}/{file.name}", filter=without_owner)
    return len(entries)


def without_owner(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime = 0
    return info


def unpack(path: Path, folder: Path, architecture: int = 90) -> str:
    """Put the cache where Triton looks; one sentence of what it holds, or why it is of no use here."""
    try:
        with tarfile.open(path) as archive:
            manifest = json.load(archive.extractfile(MANIFEST))
            here = json.loads(json.dumps(made_by(architecture=architecture)))
            other = [f"{name} {manifest.get(name)}, here {value}" for name, value in here.items()
                     if manifest.get(name) != value and name != SOURCES]  # fmt: skip
            if other:
                return f"the cache is of no use here and was left packed: made with {'; '.join(other)}"[:600]
            folder.mkdir(parents=True, exist_ok=True)
            archive.extractall(folder, filter="data")
    except (OSError, EOFError, KeyError, ValueError, ImportError, lzma.LZMAError, tarfile.TarError) as error:
        return f"the cache cannot be read and was left out ({type(error).__name__}: {error})"
    (folder / MANIFEST).unlink(missing_ok=True)
    groups = list(folder.glob("*/__grp__*.json"))
    for group in groups:
        # Triton writes down whole paths, those of the machine that compiled.
        content = json.loads(group.read_text())
        children = {name: str(group.parent / Path(old).name) for name, old in content["child_paths"].items()}
        group.write_text(json.dumps({**content, "child_paths": children}))
    changed = "" if manifest[SOURCES] == here[SOURCES] else ", of other sources than these: some will not be found"
    return f"unpacked {len(groups)} compiled kernels{changed}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the file; without it the kernels stay in TRITON_CACHE_DIR")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3000, help="after which they are stopped (%(default)s)")
    parser.add_argument("--architecture", type=int, default=90, help="compute capability without its dot (%(default)s)")
    parser.add_argument("--units", default=",".join(UNITS), help="what to compile, of %(default)s")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one in N of that, to see that it runs")
    parser.add_argument("--there", type=Path, help="the Triton that will read the cache: a wheel")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    wanted = tuple(options.units.split(","))
    if not set(wanted) <= set(UNITS):
        parser.error(f"--units: of {', '.join(UNITS)}, got {options.units}")
    if options.worker is not None:
        return 1 if work(wanted, options.every, options.worker) else 0
    if options.out is None:
        return 1 if compile_all(options) else 0
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["TRITON_CACHE_DIR"] = str(folder)
        wrong = compile_all(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        beside = options.out.with_name(options.out.name + ".part")
        count = pack(folder, made_by(options.there, options.architecture), beside)
        shutil.move(beside, options.out)
    print(f"{options.out}: {count} kernels, {options.out.stat().st_size / 2**20:.1f} MiB")
    return 1 if wrong or not count else 0


if __name__ == "__main__":
    sys.exit(main())
