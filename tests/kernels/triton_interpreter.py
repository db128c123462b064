"""A pytest plugin: Triton's kernels run on the CPU, in its interpreter.

    PYTHONPATH=tests/kernels python -m pytest -p triton_interpreter tests/kernels/test_parity.py

The interpreter cuts float32 to bfloat16 by dropping bits, where every GPU rounds to nearest even.  The patch below
puts the rounding right, so that the error budgets that hold on a device can be asked for here.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, which is at the first import of the backend

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    wide = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return wide.bfloat16().view(torch.uint16).numpy()


_cast = interpreter.InterpreterBuilder.cast_impl


def _cast_rounding(self, src, dst_type):
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        return interpreter.TensorHandle(_round_to_bfloat16(src.data), dst_type.scalar)
    return _cast(self, src, dst_type)


interpreter.InterpreterBuilder.cast_impl = _cast_rounding

# Numpy warns of the infinities and NaNs that the kernels meet on purpose.
np.seterr(over="ignore", invalid="ignore", divide="ignore")
