"""The cache folder of this user, and what the files in it are keyed by: device, driver, versions, source.

    GRPO_KERNELS_CACHE, else XDG_CACHE_HOME/grpo_kernels, else ~/.cache/grpo_kernels

Files are JSON, replaced as a whole, and believed only where their key is the one asked for: a file that is damaged,
or was made on another device or by another version, reads as if it were not there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parents[1]

_CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "asimd", "sve")


def folder() -> Path:
    """The cache folder, which need not exist yet.

    Raises:
        OSError: no home folder is known.
    """
    chosen = os.environ.get("GRPO_KERNELS_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser()
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(f"no home folder is known ({error}); set GRPO_KERNELS_CACHE to a folder") from error
    return Path(base) / "grpo_kernels"


def read_json(path: Path) -> dict | None:
    """The object in the file, or None where there is no such file or it holds anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, content: dict) -> None:
    """Replace the file as a whole, so that a reader sees the old content or the new; makes the folder.

    Raises:
        OSError: the folder cannot be written to.
    """
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """As :func:`write_json`, for any text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=path.name + ".", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # others may read what is shared: a record, a cache of several users
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def file_name(what: str, key: dict) -> str:
    """``what-<digest of the key>.json``."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"{what}-{digest[:16]}.json"


# ---- what results depend on


def key_of(device: torch.device) -> dict[str, str]:
    """Everything that a result measured on this device depends on, by name."""
    where = describe_device(device)
    found = {name: str(where[name]) for name in ("device", "capability", "driver")}
    return {**found, **{name: versions()[name] for name in ("torch", "triton")}, "source": package_hash()}


@functools.cache
def package_hash() -> str:
    """Hash of the package's source files and compiled modules."""
    digest = hashlib.sha256()
    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".so", ".pyd")]
    for path in sorted(files):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:32]


def versions() -> dict[str, str]:
    """Python, torch, its GPU toolkit and Triton."""
    triton = "none"
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu"):  # PyTorch's builds rename it
        with contextlib.suppress(PackageNotFoundError):
            triton = version(name)
            break
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "toolkit": str(torch.version.hip or torch.version.cuda or "none"),
        "triton": triton,
    }


def describe_device(device: torch.device) -> dict[str, object]:
    """Name, capability (of a CPU: its vector instructions) and driver of the device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        architecture = getattr(properties, "gcnArchName", "") if torch.version.hip is not None else ""
        return {
            "device": properties.name,
            "capability": architecture or f"sm_{properties.major}{properties.minor}",
            "driver": _gpu_driver(),
        }
    fields = _cpu_fields()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "device": fields.get("model name") or platform.processor() or platform.machine(),
        "capability": " ".join(flag for flag in _CPU_FLAGS if flag in flags) or platform.machine(),
        "driver": "none",
        "cores": os.cpu_count(),
    }


@functools.cache
def _cpu_fields() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


@functools.cache
def _gpu_driver() -> str:
    """Version of the kernel's driver; where the system does not say, that of the driver's interface."""
    for place in ("/proc/driver/nvidia/version", "/sys/module/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            found = re.search(r"\d+\.\d+(?:\.\d+)*", Path(place).read_text())
            if found:
                return found.group()
    with contextlib.suppress(AttributeError, RuntimeError):
        return f"interface {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]
    return "unknown"
