"""The registry of backends: what each must offer, which are here, and the rule that picks one.

The boundary
------------
Everything that is fused is one of a few functions over tensors that the caller allocates.  A backend is a
module with these names; it holds no state and allocates nothing of the size of the logits.

``token_logps_fwd(logits, targets, logps, lse, *, ignore_index)``
    One read of the logits.  Row ``r = s * T + t`` is ``logits[s, t, :]``.

    - logits   (S, T, V), last stride 1, any non-negative strides on the first two; float32, bfloat16, float16
      (float64 too in ``torch_ops``)
    - targets  (S*T,) int64, contiguous: the word that row r has to predict, ``ignore_index`` where there is none
    - logps    (S*T,) out, float32 (float64 for float64 logits): ``z[y] - logsumexp(z)``; 0 where ignored;
      NaN where the target is outside [0, V) and is not ``ignore_index``
    - lse      (S*T,) out, same dtype as logps: ``logsumexp(z)`` in nats; unspecified where ignored

    An ignored row is not read.  A row of logits that holds NaN or +inf, or only -inf, gives NaN, as
    ``torch.log_softmax`` does.

``token_logps_bwd(logits, targets, lse, grad_logps, grad_logits, *, ignore_index)``
    One read of the logits and one write:
    ``grad_logits[r, v] = grad_logps[r] * ((v == targets[r]) - exp(z[v] - lse[r]))``.

    - grad_logps   (S*T,) same dtype as lse, contiguous; not looked at where the row is ignored
    - grad_logits  out, shape, dtype and last stride of logits; may be the very same memory (in place);
      zeros where ignored, NaN over the row where the target is out of range

    The target entry is computed in the accumulation dtype as ``-grad * expm1(z[y] - lse)``.

``preference_tail(token_logps, targets, cu_seqlens, ref_logps, group_ids, pair_weights, policy_logps, lengths,
margins, rewards, losses, slopes, group_sums, group_counts, group_losses, *, loss_type, beta, label_smoothing,
length_normalize, ignore_index)``
    From token log-probabilities to losses and slopes, in one launch and in a fixed order of reduction.
    2B sequences, the B chosen first.  Sums over tokens are taken in float64 and rounded once, to the dtype of
    token_logps; the margin is the float64 difference of those.  So a policy that equals its reference, which was
    rounded the same way, has margin 0 and loss log 2 to the bit.

    - token_logps  (rows,) float32 or float64, contiguous, 0 where ignored
    - targets      (rows,) int64, or None: then ``lengths`` is read, where ``length_normalize`` asks for it
    - cu_seqlens   (2B+1,) int32: sequence i is rows ``[cu[i], cu[i+1])``; None: ``rows // 2B`` rows each
    - ref_logps    (2B,) float64 sums, or None for zeros
    - group_ids    (B,) int64; one outside [0, G) makes that pair NaN and is left out of the group sums
    - pair_weights (B,) float64, or None for ones
    - policy_logps (2B,) out, dtype of token_logps, always the plain sums
    - lengths      (2B,) float64: labelled tokens of each sequence (out), or what to divide by (in); None where
      nothing is to be counted and nothing divided
    - rewards      (2B,) out, dtype of token_logps: beta times the log-ratio of each sequence
    - margins, losses, slopes (B,) out, dtype of token_logps; losses and slopes carry the pair weight
    - group_sums   (G,) out, float64: sum of losses over the pairs of each group
    - group_counts (G,) out, int64
    - group_losses (G,) out, dtype of token_logps: ``group_sums / max(group_counts, 1)``
    - loss_type    index into ``types.LOSS_TYPES``

    With ``length_normalize`` policy and reference are divided by ``max(length, 1)`` before the margin.

``robust_loss(losses, group_ids, group_weights, weights, loss)``
    What the alpha step stands before: ``weights[i] = group_weights[group_ids[i]]`` and
    ``loss = (1/B) sum_i weights[i] losses[i]``, summed in float64 and rounded once; 0 where there are no pairs.

    - losses       (B,) float32 or float64, as the tail wrote them
    - group_ids    (B,) int64; one outside [0, G) has a loss of NaN, and takes any weight
    - group_weights (G,) dtype of losses
    - weights      (B,) out, dtype of losses
    - loss         () out, dtype of losses

``head_tile_fwd(logits, bias, targets, top, rest, picked, factor, exps, *, start, softcap, logit_scale, shift)``
    One tile of the LM head (``linear_head``), words ``[start, start + words)`` of the vocabulary, just out of the
    GEMM.  With ``z = softcap * tanh(logit_scale * (logits + bias) / softcap)``, or without a cap, and over the words v
    that are not the row's target:

        new top = max(top, max z),  factor = exp(top - new top),  rest = rest * factor + sum exp(z - new top)
        exps[v] = 2^-shift exp(z[v] - new top) d[v],  d = 1 - (z / softcap)^2 or 1;  0 at the target

    - logits   (rows, words), last stride 1; the GEMM's output, and scratch: it may be overwritten
    - bias     (words,) dtype of top, or None
    - targets  (rows,) int64, contiguous, words of the whole vocabulary; one outside the tile has no effect
    - top, rest, picked, factor (rows,) float32 (float64 for float64 logits), contiguous; the first two in and out,
      picked out where the target is in the tile (``z[target]``), else left as it is; factor out
    - exps     out, shape of logits, last stride 1, the dtype that goes into GEMMs; may be the memory of logits where
      the dtypes agree; None: not wanted
    - softcap  0 for none

    NaN or +inf in a row make top or rest NaN; a tile of -inf leaves both as they are.

``head_tile_bwd(logits, bias, targets, top, scale, at_target, grads, *, start, softcap, logit_scale)``
    The same tile again: ``grads[v] = scale * exp(z[v] - top) * d[v]``, ``grads[target] = at_target * d[target]``.

    - top, scale, at_target (rows,) float32 (float64 for float64 logits), contiguous
    - grads    out, as ``exps`` above

``integer_range(integers, ignored) -> (low, high)``
    Of the backends for CPU tensors only, for the checks of arguments: the smallest and the largest of 0 and the
    values of an int64 or int32 tensor that are not ``ignored``.

Every backend gives the same bits on every run (no floating-point atomics), whatever the number of threads.  The tile
operations may be missing from a backend; the head then takes those of ``torch`` under ``auto``.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, cast

import torch

from ..types import UnavailableBackendError

if TYPE_CHECKING:
    from .verdicts import Verdict


class Backend(Protocol):
    """What a backend module offers, besides the functions of the boundary (see the module's docstring)."""

    def unavailable_reason(self) -> str | None:
        """None if the backend can run in this process, else one sentence that says why not."""

    def unsupported_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if the backend takes logits of this dtype on this device, else one sentence."""

    def token_logps_fwd(self, logits, targets, logps, lse, *, ignore_index) -> None: ...

    def token_logps_bwd(self, logits, targets, lse, grad_logps, grad_logits, *, ignore_index) -> None: ...

    def preference_tail(
        self, token_logps, targets, cu_seqlens, ref_logps, group_ids, pair_weights,
        policy_logps, lengths, margins, rewards, losses, slopes, group_sums, group_counts, group_losses,
        *, loss_type, beta, label_smoothing, length_normalize, ignore_index,
    ) -> None: ...  # fmt: skip

    def robust_loss(self, losses, group_ids, group_weights, weights, loss) -> None: ...

    def head_tile_fwd(
        self, logits, bias, targets, top, rest, picked, factor, exps, *, start, softcap, logit_scale, shift
    ) -> None: ...

    def head_tile_bwd(
        self, logits, bias, targets, top, scale, at_target, grads, *, start, softcap, logit_scale
    ) -> None: ...

    def integer_range(self, integers: torch.Tensor, ignored: int) -> tuple[int, int]: ...


OPERATIONS: dict[str, str] = {
    "token_logps_fwd": "log-probabilities of rows of logits",
    "token_logps_bwd": "their gradient",
    "preference_tail": "losses, slopes and group sums",
    "robust_loss": "the weighted mean",
    "head_tile_fwd": "a tile of the LM head",
    "head_tile_bwd": "its gradient",
}
"""The functions of the boundary that run kernels, and what each computes."""

OPTIONAL_OPERATIONS = frozenset({"head_tile_fwd", "head_tile_bwd"})
"""Those that a backend may lack."""

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
