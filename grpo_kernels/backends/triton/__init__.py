"""The boundary as Triton kernels, for NVIDIA and AMD GPUs.

    p_t = z[t, y_t] - lse_t,   dz[t, v] = c_t * ((v == y_t) - exp(z[t, v] - lse_t))

Accumulation dtype: float32 over the vocabulary, float64 over tokens and pairs.  Importing this module is what
loads Triton; without Triton it still imports, and says so.  With ``TRITON_INTERPRET=1`` in the environment before
the first import the very same kernels run on CPU tensors, slowly: for tests, not for use.
"""

from __future__ import annotations

import importlib.util

import torch

OLDEST_TRITON = (3, 6)
"""The oldest release that the tests run."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

if importlib.util.find_spec("triton") is None:
    _missing: str | None = "the package triton is not installed"
else:
    import triton

    _version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    _missing = None
    if _version < OLDEST_TRITON:
        _missing = f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"

if _missing is None:
    from .head_tile import head_tile_bwd, head_tile_fwd
    from .launch import interpreting
    from .preference_tail import preference_tail, preference_tail_kernel, robust_loss
    from .token_logps import token_logps_bwd, token_logps_fwd

    INTERPRETED = interpreting(preference_tail_kernel)
    """Whether the kernels run in Triton's interpreter in this process."""


def unavailable_reason() -> str | None:
    """None where there is Triton and a GPU or its interpreter, else the sentence that says what is missing."""
    if _missing is not None:
        return _missing
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "PyTorch sees no GPU (TRITON_INTERPRET=1 before the first import runs the kernels on the CPU, slowly)"


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """float32, bfloat16 and float16 on a GPU; in the interpreter on the CPU."""
    wanted = "cpu" if INTERPRETED else "cuda"
    if device.type != wanted:
        return f"it takes tensors on {wanted} devices{' in the interpreter' if INTERPRETED else ''}, not {device.type}"
    if dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 or newer"
    return None


__all__ = [
    "head_tile_bwd", "head_tile_fwd", "preference_tail", "robust_loss", "token_logps_bwd", "token_logps_fwd",
    "unavailable_reason", "unsupported_reason",
]  # fmt: skip
