"""What every test starts from: fixed seeds, few threads, and for kernels a memory that lies until it is written."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import pytest
import torch

# A cache folder of their own: the tests read neither the proofs nor the tuning of the user who runs them.  Processes
# that tests start inherit it.
if "PYTEST_CACHE_OF_KERNELS" not in os.environ:
    os.environ["GRPO_KERNELS_CACHE"] = os.environ["PYTEST_CACHE_OF_KERNELS"] = tempfile.mkdtemp(prefix="grpo-kernels-")
    atexit.register(shutil.rmtree, os.environ["GRPO_KERNELS_CACHE"], ignore_errors=True)

KERNEL_FOLDERS = {"spec", "kernels", "gpu"}

# Small tensors on many threads are slower, and workers of pytest-xdist share the cores.
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _same_start():
    """The same random numbers in every test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(request):
    """Fill ``torch.empty`` with NaN: an output element that a kernel forgets to write cannot look right by luck."""
    if request.node.path.parent.name not in KERNEL_FOLDERS:
        yield
        return
    was_on, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(was_on, warn_only=warned)
