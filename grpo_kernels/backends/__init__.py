"""Who computes: the backends, the boundary that they share, and the rule by which one is chosen for a call.

A backend is a module with the functions of ``boundary.py``, over tensors that the caller allocates; losses, gradients
and groups are the concern of the caller.  :func:`choose` gives the one for a device and a dtype.

    boundary.py      what each function computes, of which shapes and dtypes; ``Backend``, ``OPERATIONS``
    __init__.py      the registry, ``PROVEN``, and the rule of "auto"
    torch_ops.py     backend "torch": PyTorch operations, on any device; torch_ops_head.py, its tiles of the LM head
    native_cpu.py    backend "cpu": the extension _cpu, compiled from csrc/cpu
    native_cuda.py   backend "cuda": the extension _cuda, compiled from csrc/cuda; _native.py, what both need
    triton/          backend "triton": a file an operation, table.py with the sizes of blocks
    verdicts.py      what is known of a backend on a device, and when it is proven there
    child.py         the process that runs such a proof
    records.py       runs of all cases that we recorded: how they are written, and what makes one acceptable
    tuned.py         the tuning file of a device, and the look-ups that follow it
    cache.py         the folder of these files, and what they are keyed by

The rest of the package takes ``choose``, ``decided`` and what belongs to the boundary from here; a backend's own module
is imported only by ``proof`` and ``tune``, which compare with ``torch_ops`` and read Triton's table.  ``tuned``,
``verdicts``, ``child``, ``records`` and ``cache`` are imported by name: by plans of the head, the command line, the
benchmarks.  Nothing here imports more of the package than ``types``, and no backend another one.  Importing the package
loads this file and ``boundary.py``; the others load when first needed.

To add a backend, write a module beside this file with the functions of ``Backend`` (``integer_range`` where it takes
CPU tensors), give it a name and a place in ``_MODULES``, whose order is that of ``auto``, and see that
``grpo-kernels prove --backend NAME`` passes: the parity tests and the proof take their cases from the boundary and so
need no change.  "auto" takes it once a run is recorded in ``PROVEN``, or where the user's own device has proven it.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch

from ..types import UnavailableBackendError
from .boundary import OPERATIONS, OPTIONAL_OPERATIONS, Backend

if TYPE_CHECKING:
    from .verdicts import Verdict

__all__ = [
    "OPERATIONS",
    "OPTIONAL_OPERATIONS",
    "PROVEN",
    "Backend",
    "available_backends",
    "candidates",
    "choose",
    "decided",
    "device_kind",
    "status",
]

_MODULES = {
    "cpu": "native_cpu",
    "cuda": "native_cuda",
    "triton": "triton",
    "torch": "torch_ops",
}
"""Name → module beside this file, in the order in which ``auto`` prefers them."""

PROVEN: dict[tuple[str, str], str] = {
    ("cpu", "cpu-x86_64"): "cpu-x86_64/prove-cpu.json",
}
"""(backend, kind of device) → the recorded passing run that lets ``auto`` pick it, under ``benchmarks/results/``.

On other kinds of devices ``auto`` picks what the user's own device has proven (``verdicts.py``).  ``torch`` needs no
entry: PyTorch's own operations are the fallback everywhere.
"""


def device_kind(device: torch.device) -> str:
    """The key under which recorded runs are kept: an architecture for CPUs, a vendor for GPUs."""
    if device.type == "cpu":
        machine = platform.machine().lower()
        return "cpu-" + {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "amd"
        return "nvidia-sm80" if torch.cuda.get_device_capability(device) >= (8, 0) else "nvidia-older"
    return device.type


def available_backends() -> dict[str, str | None]:
    """Every backend by name, and why it is not there.

    Returns:
        {name: None where it can run in this process, else the reason it cannot}, in the order ``auto`` prefers.
    """
    return {name: _unavailable_reason(name) for name in _MODULES}


def choose(name: str, device: torch.device, dtype: torch.dtype, *, may_prove: bool = True) -> Backend:
    """The backend for logits of this dtype on this device.

    ``auto`` takes the first backend, in the order of the registry or of this device's tuning file, that is here, takes
    the dtype and device, and is proven: by a recorded run on this kind of device, or by a proof on this very device,
    which the first call makes in a process of its own and keeps (``verdicts.py``).  Plain PyTorch stands last.

    Args:
        name: "auto" or a name of :func:`available_backends`.
        device: of the logits.
        dtype: of the logits.
        may_prove: False inside a compiled region: ``auto`` takes what is decided, and decides nothing.  So it does
            while a CUDA graph is captured.

    Raises:
        ValueError: no backend has this name.
        UnavailableBackendError: the one named is not here, or does not take this dtype on this device.
    """
    if not (isinstance(name, str) and (name == "auto" or name in _MODULES)):
        came = repr(name) if isinstance(name, str) else f"a {type(name).__name__}"
        raise ValueError(f"backend must be 'auto' or one of {sorted(_MODULES)}, got {came}")
    # The answer cannot change within a process, and asking anew would cost more than a small call's kernels.
    chosen = _chosen.get((name, device, dtype))
    if chosen is None:
        if name != "auto":
            chosen = _chosen[name, device, dtype] = _choose_named(name, device, dtype)
        else:
            may_prove = may_prove and not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
            chosen, final = _choose_auto(device, dtype, may_prove)
            if final:
                _chosen[name, device, dtype] = chosen
    return chosen


_chosen: dict[tuple[str, torch.device, torch.dtype], Backend] = {}


def decided(device: torch.device, dtype: torch.dtype) -> Backend:
    """What ``auto`` would take if it had to be taken now: starts no proof and warns of nothing."""
    place = ("auto", device, dtype)
    if place not in _chosen:
        policy = os.environ.get("GRPO_KERNELS_PROVE", "").strip().lower()
        undecided = False
        for name in candidates(device, dtype):
            if (name, device_kind(device)) in PROVEN or status(name, device).passed:
                break
            undecided = True
        else:
            name = "torch"
        if undecided or policy == "always":
            return _load(name)  # auto may yet prove one that it prefers
        _chosen[place] = _load(name)
    return _chosen[place]


def status(name: str, device: torch.device) -> Verdict:
    """What is known about a backend on a device: recorded, proven here, failed here, or nothing yet."""
    from . import verdicts

    path = PROVEN.get((name, device_kind(device)))
    if path is not None:
        return verdicts.Verdict("recorded", report=path)
    return verdicts.known(name, device)


def _choose_named(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    reason = _unavailable_reason(name)
    if reason is None:
        reason = _load(name).unsupported_reason(device, dtype)
    if reason is not None:
        raise UnavailableBackendError(f"backend={name!r} cannot be used here: {reason}")
    return _load(name)


def candidates(device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """The backends that ``auto`` may pick before ``torch``, best first; each is loaded when its turn comes."""
    order: tuple[str, ...] = ()
    if _cache_is_there():
        from . import tuned

        order = tuned.order(device, dtype)
    for name in dict.fromkeys([*order, *_MODULES]):
        if name == "torch":
            return
        if name not in _MODULES:
            continue  # the tuning file has it, the registry does not
        interpreted = name == "triton" and device.type == "cpu"  # its interpreter is for tests, and slow
        if interpreted or _unavailable_reason(name) is not None:
            continue
        if _load(name).unsupported_reason(device, dtype) is None:
            yield name


def _cache_is_there() -> bool:
    """Whether there may be a tuning file, by the place that ``cache.folder`` names; else nothing is imported."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    folder = os.environ.get("GRPO_KERNELS_CACHE") or os.path.join(base, "grpo_kernels")
    return os.path.isdir(os.path.expanduser(folder))


def _choose_auto(device: torch.device, dtype: torch.dtype, may_prove: bool) -> tuple[Backend, bool]:
    """The backend, and whether that is the answer for the rest of the process."""
    kind, policy = device_kind(device), os.environ.get("GRPO_KERNELS_PROVE", "").strip().lower()
    undecided: list[str] = []
    for name in candidates(device, dtype):
        if (name, kind) in PROVEN and not policy:
            return _load(name), may_prove or not undecided
        from . import verdicts  # not where a run is recorded

        if (name, kind) in PROVEN and verdicts.policy() != "always":
            return _load(name), may_prove or not undecided
        verdict = verdicts.decide(name, device) if may_prove else verdicts.known(name, device)
        if verdict.passed:
            return _load(name), may_prove or not undecided  # else an ordinary call may prove one that is preferred
        if verdict.status == "unknown":
            undecided.append(name)
        else:
            _warn_once(_unproven(name, device, verdict))
    if undecided:
        passed_by = " or ".join(map(repr, undecided))
        why = (
            "GRPO_KERNELS_PROVE=never, and neither a recorded run nor a proof on this device is there"
            if policy == "never"
            else "the first call is where a kernel is proven, and it must not be inside a compiled region or the "
            "capture of a CUDA graph: make one call before"
        )
        _warn_once(
            f"backend='auto' takes plain PyTorch operations here, not {passed_by}: {why}. `grpo-kernels prove` makes "
            f"the proof; backend={undecided[0]!r} takes the kernels unproven."
        )
    return _load("torch"), may_prove


def _unproven(name: str, device: torch.device, verdict: Verdict) -> str:
    from .cache import describe_device

    where = describe_device(device)["device"]
    if verdict.status == "failed":
        kept = f"; the whole report is in {verdict.report}" if verdict.report else ""
        return f"backend {name!r} is wrong on {where} and backend='auto' does not take it ({verdict.reason}){kept}"
    return (
        f"backend {name!r} could not be proven on {where} ({verdict.reason}); backend='auto' does not take it in this "
        "process, and the next one tries again. `grpo-kernels prove` makes the proof now."
    )


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=_outside())


def _outside() -> int:
    """The stack level of the first caller outside this package, whose line a warning should name."""
    package, level, frame = os.path.dirname(os.path.dirname(__file__)), 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        level, frame = level + 1, frame.f_back
    return level


def _load(name: str) -> Backend:
    module: ModuleType = importlib.import_module("." + _MODULES[name], __package__)
    return cast(Backend, module)


def _unavailable_reason(name: str) -> str | None:
    try:
        return _load(name).unavailable_reason()
    except ModuleNotFoundError as error:
        return f"not part of this installation ({error})"
