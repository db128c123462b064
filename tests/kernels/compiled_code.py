"""What the compiler's output says of a Triton kernel: registers, spills, shared memory, widths of loads and stores."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

SHARED_LIMIT = 48 * 1024
"""Bytes that a block gets on every GPU without asking for more."""


def assert_fits(compiled) -> None:
    """No register went to memory, and the block's shared memory is there on any GPU."""
    assert compiled.metadata.shared <= SHARED_LIMIT
    if compiled.metadata.target.backend == "hip":
        # Scalar registers that do not fit go to lanes of vector registers, which costs no memory.
        assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"]) == ["0"]
        return
    usage = resource_usage(compiled.asm["cubin"])
    assert usage["STACK"] == 0, usage
    assert usage["LOCAL"] == 0, usage


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, bytes of its stack and local memory, and shared memory of a block, by cuobjdump."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(cubin)
        binary.flush()
        report = subprocess.run(
            [cuobjdump, "--dump-resource-usage", binary.name], capture_output=True, text=True, check=True
        )
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", report.stdout)}


def memory_widths(compiled, access: str) -> list[int]:
    """Bytes of every load ("ld") or store ("st") of global memory in the program text, per thread."""
    if compiled.metadata.target.backend == "hip":
        name = "load" if access == "ld" else "store"
        widths = {"dwordx4": 16, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "short_d16": 2, "short_d16_hi": 2}
        found = re.findall(rf"(?:global|buffer|flat)_{name}_(\w+)", compiled.asm["amdgcn"])
        return [widths[kind] for kind in found]
    found = re.findall(rf"\b{access}\.global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)\s", compiled.asm["ptx"])
    return [int(lanes or 1) * int(bits) // 8 for lanes, bits in found]


def assert_wide(compiled, access: str, block_v: int, itemsize: int, threads: int, scalars: int = 6) -> None:
    """All of a block of the vocabulary moves 16 bytes at a time; what is narrower is a handful of scalars."""
    widths = memory_widths(compiled, access)
    needed = block_v * itemsize // (16 * threads)
    assert widths.count(16) >= needed, widths
    assert len(widths) - widths.count(16) <= scalars, widths
