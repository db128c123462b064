"""The error of the CPU module's exponential: ``python exp_accuracy.py PATH_OF_THE_MODULE`` prints it in ulp.

A script of its own, without torch, because a process has one instruction set and there are four to look at.
"""

import importlib.util
import sys

import numpy as np


def load_module(path):
    spec = importlib.util.spec_from_file_location("_cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernel_exp(module, x):
    y = np.full_like(x, np.nan)
    module.exp_float32(x.ctypes.data, y.ctypes.data, x.size)
    return y


def error_in_ulp(module):
    """The largest error over every 211th float32 from -104 to 88.72, and over all of them in [-1, -0.5].

    An ulp is the spacing of float32 at the exact result, so subnormal results are held to their own coarse grid.
    """

    def bits(x):
        return int(np.float32(x).view(np.uint32))

    samples = [
        np.arange(bits(-0.0), bits(-104.0), 211, dtype=np.uint32),
        np.arange(bits(0.0), bits(88.72), 211, dtype=np.uint32),
        np.arange(bits(-0.5), bits(-1.0), dtype=np.uint32),
    ]
    worst = 0.0
    for patterns in samples:
        for part in np.array_split(patterns, 1 + patterns.size // 2**20):
            x = part.view(np.float32)
            exact = np.exp(x.astype(np.float64))
            ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
            worst = max(worst, float(np.max(np.abs(kernel_exp(module, x) - exact) / ulp)))
    return worst


if __name__ == "__main__":
    loaded = load_module(sys.argv[1])
    print(loaded.isa(), error_in_ulp(loaded))
