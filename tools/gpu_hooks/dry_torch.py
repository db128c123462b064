"""A CPU that PyTorch takes for an NVIDIA GPU of compute capability 9.0 unless told, for dry runs: "cuda" means the CPU.

Events tell the time, streams are nothing, and a graph is the list of the operations that ran while it was captured.
Tensors say that they are on the CPU.  ``torch.compile`` compiles nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
from types import ModuleType, SimpleNamespace

NAME = "a CPU in place of an NVIDIA GPU"
MEMORY = 8 << 30


def install(torch: ModuleType) -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    cpu = torch.device("cpu")

    def here(value: object) -> object:
        if isinstance(value, torch.device):
            return cpu if value.type == "cuda" else value
        return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.device:  # as it is: code asks which kind it has
                return func(*args, **(kwargs or {}))
            if func is torch.Tensor.cuda:
                return args[0]
            return func(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls, here(device))

    class Event:
        def __init__(self, **options) -> None:
            self.at = 0.0

        def record(self, stream=None) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end) -> float:
            return 1e3 * (end.at - self.at)

    class Stream:
        cuda_stream = 0

        def __init__(self, device=None, **options) -> None:
            pass

        def wait_stream(self, stream) -> None:
            pass

        def synchronize(self) -> None:
            pass

    class Graph:
        def __init__(self) -> None:
            self.calls = []

        def replay(self) -> None:
            for function, args, kwargs, outputs in self.calls:
                for old, new in zip(tree_leaves(outputs), tree_leaves(function(*args, **kwargs)), strict=True):
                    # What shares memory with an input was changed in place.
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    capturing = []

    class Capture(TorchDispatchMode):
        def __init__(self, graph) -> None:
            super().__init__()
            self.graph = graph

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            outputs = func(*args, **(kwargs or {}))
            self.graph.calls.append((func, args, kwargs or {}, outputs))
            return outputs

    @contextlib.contextmanager
    def graph(cuda_graph, **options):
        capturing.append(cuda_graph)
        try:
            with Capture(cuda_graph):
                yield
        finally:
            capturing.pop()

    capability = divmod(int(os.environ.get("GPU_CHECK_ARCHITECTURE") or 90), 10)
    properties = SimpleNamespace(
        name=NAME,
        major=capability[0],
        minor=capability[1],
        total_memory=MEMORY,
        L2_cache_size=1 << 16,
        multi_processor_count=132,
    )
    torch.Generator = Generator
    pretended = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: NAME,
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
        "is_current_stream_capturing": lambda: bool(capturing),
        "Event": Event,
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: Stream(),
        "CUDAGraph": Graph,
        "graph": graph,
    }
    for name, value in pretended.items():
        getattr(torch.cuda, name)  # an error where PyTorch has no such name
        setattr(torch.cuda, name, value)
    torch.compile = lambda function, **options: function  # whose import alone takes seconds
    OnCpu().__enter__()
