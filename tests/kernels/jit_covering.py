"""What the launchers of the Triton backend may be called with: a few calls that cover it, and what must have been seen.

``calls(name, strength)`` are calls of one operation in which every value of every factor occurs (strength 1), or every
pair of values that go together (2).  ``expected(kernel)`` is counted from the kernel's own parameters: a new option, a
new pointer or a new entry of a table that no call covers is an error.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from grpo_kernels.backends import triton as backend
from grpo_kernels.backends.triton import table
from grpo_kernels.types import IGNORE_INDEX, LOSS_TYPES

LOGITS = (torch.float32, torch.bfloat16, torch.float16)
TILES = (*((torch.float32, out) for out in LOGITS), *((dtype, dtype) for dtype in LOGITS[1:]))
"""(dtype of the GEMM's output, dtype of what goes into the next GEMM): the same on a CPU, float32 first on a GPU."""
ENTRIES = range(3)
GROUPS = {"few": 4, "many": 600}
PAIRS = 2

Call = Mapping[str, Any]


def covering(everything: Sequence[Call], strength: int) -> list[Call]:
    """A few of these, such that any ``strength`` values that occur together in one of all occur in one of the few."""
    groups = list(itertools.combinations(everything[0], min(strength, len(everything[0]))))
    parts = [{(group, tuple(call[name] for name in group)) for group in groups} for call in everything]
    missing, chosen = set().union(*parts), []
    while missing:
        best = max(range(len(everything)), key=lambda i: len(parts[i] & missing))
        chosen.append(everything[best])
        missing -= parts[best]
    return chosen


FACTORS: dict[str, dict[str, Sequence]] = {
    "token_logps_fwd": {"dtype": LOGITS, "entry": ENTRIES, "aligned": (True, False)},
    "token_logps_bwd": {"dtype": LOGITS, "entry": ENTRIES, "rows": ("aligned", "alike", "different")},
    "preference_tail": {
        "dtype": (torch.float32, torch.float64), "loss_type": LOSS_TYPES, "normalize": (False, True),
        "entry": range(2), "groups": tuple(GROUPS), "packed": (False, True), "reference": (False, True),
        "weights": (False, True), "lengths": ("counted", "given", "absent"),
    },
    "robust_loss": {"dtype": (torch.float32, torch.float64)},
    "head_tile_fwd": {
        "dtypes": TILES, "entry": ENTRIES, "aligned": (True, False), "out": ("alike", "different", "absent"),
        "bias": ("aligned", "different", "absent"), "capped": (False, True), "factor": (False, True),
    },
    "head_tile_bwd": {
        "dtypes": TILES, "entry": ENTRIES, "aligned": (True, False), "out": ("alike", "different"),
        "bias": ("aligned", "different", "absent"), "capped": (False, True),
    },
}  # fmt: skip


def calls(name: str, strength: int) -> list[Call]:
    """A covering set of the calls that a caller may make."""
    factors = FACTORS[name]
    everything = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    if name == "preference_tail":
        everything = [call for call in everything if not (call["normalize"] and call["lengths"] == "absent")]
    if name.startswith("head_tile"):
        # What goes out follows from two factors, and is one of its own.
        for call in everything:
            tile, out = call["dtypes"]
            call["type"] = None if call["out"] == "absent" else out
            call["bytes"] = out.itemsize * 16 // tile.itemsize if call["out"] == "alike" else 1
    return covering(everything, strength)


# ---------------------------------------------------------------------------------------------- launching


def launch(name: str, call: Call, **changes: Any) -> None:
    """One call of the operation's launcher; ``changes`` are of what should compile nothing new.

    Args:
        name: of the operation.
        call: of :func:`calls`.
        changes: other options, ``strides`` of the only row, or ``large``: logits in a storage of more than 2 GiB.
    """
    {
        "token_logps_fwd": _rows, "token_logps_bwd": _rows, "preference_tail": _tail, "robust_loss": _robust,
        "head_tile_fwd": _tile, "head_tile_bwd": _tile,
    }[name](name, call, changes)  # fmt: skip


def _size(entries: Sequence[tuple], entry: int, aligned: bool) -> int:
    """Elements of a row that falls into this entry of a table, a multiple of 16 bytes or odd."""
    sizes = [most for most, *_ in entries[:-1]]
    size = [*sizes, 2 * sizes[-1]][entry]
    return size if aligned else size - 1


def _rows(name: str, call: Call, changes: Mapping) -> None:
    direction = name.removeprefix("token_logps_")
    aligned = call["aligned"] if direction == "fwd" else call["rows"] == "aligned"
    vocabulary = _size(table.TOKEN_LOGPS[direction, call["dtype"].itemsize], call["entry"], aligned)
    memory = torch.zeros(2 * vocabulary + 1, dtype=call["dtype"])
    if changes.get("large"):
        memory = torch.empty(1 << 31, dtype=call["dtype"], device="meta")[: memory.numel()]
    logits, row = memory[:-1].view(1, 2, vocabulary), torch.zeros(2)
    strides = changes.get("strides")
    if strides is not None:
        logits = logits[:, :1].as_strided((1, 1, vocabulary), (*strides, 1))
        row = row[:1]
    targets, options = torch.zeros(row.numel(), dtype=torch.int64), {"ignore_index": IGNORE_INDEX}
    options |= {key: value for key, value in changes.items() if key in options}
    if direction == "fwd":
        backend.token_logps_fwd(logits, targets, row, row, **options)
        return
    different = call["rows"] == "different"
    grads = memory[1:].view(1, 2, vocabulary)[:, : row.numel()] if different else logits
    backend.token_logps_bwd(logits, targets, row, row, grads, **options)


def _tail(name: str, call: Call, changes: Mapping) -> None:
    length = 8 if call["entry"] == 0 else 100
    rows, groups, dtype = 2 * PAIRS * length, GROUPS[call["groups"]], call["dtype"]
    sequence, pair, group = (torch.zeros(n, dtype=dtype) for n in (2 * PAIRS, PAIRS, groups))
    exact = torch.zeros(max(2 * PAIRS, groups), dtype=torch.float64)
    options = {"beta": 0.1, "label_smoothing": 0.1, "ignore_index": IGNORE_INDEX}
    options |= {key: value for key, value in changes.items() if key in options}
    backend.preference_tail(
        torch.zeros(rows, dtype=dtype),
        torch.zeros(rows, dtype=torch.int64) if call["lengths"] == "counted" else None,
        torch.arange(0, rows + 1, length, dtype=torch.int32) if call["packed"] else None,
        exact[: 2 * PAIRS] if call["reference"] else None,
        torch.zeros(PAIRS, dtype=torch.int64),
        exact[:PAIRS] if call["weights"] else None,
        sequence,
        None if call["lengths"] == "absent" else exact[: 2 * PAIRS],
        pair, sequence, pair, pair, exact[:groups], torch.zeros(groups, dtype=torch.int64), group,
        loss_type=LOSS_TYPES.index(call["loss_type"]), length_normalize=call["normalize"], **options,
    )  # fmt: skip


def _robust(name: str, call: Call, changes: Mapping) -> None:
    x = torch.zeros(PAIRS, dtype=call["dtype"])
    backend.robust_loss(x, torch.zeros(PAIRS, dtype=torch.int64), x, x, x[0])


def _tile(name: str, call: Call, changes: Mapping) -> None:
    direction, (dtype, out_dtype) = name.removeprefix("head_tile_"), call["dtypes"]
    words = _size(table.HEAD_TILE[direction, dtype.itemsize], call["entry"], call["aligned"])
    logits, row = torch.zeros(2, words, dtype=dtype), torch.zeros(2)
    shift = 1 if call["out"] == "different" else 0
    out = None if call["out"] == "absent" else torch.zeros(2 * words + 1, dtype=out_dtype)[shift:][: 2 * words]
    out = out if out is None else out.view(2, words)
    shift = 1 if call["bias"] == "different" else 0
    bias = None if call["bias"] == "absent" else torch.zeros(words + 1)[shift : words + shift]
    options = {"start": 1000, "softcap": 20.0 if call["capped"] else 0.0, "logit_scale": 0.75}
    options |= {key: value for key, value in changes.items() if key in options and (key != "softcap" or call["capped"])}
    targets = torch.zeros(2, dtype=torch.int64)
    if direction == "bwd":
        backend.head_tile_bwd(logits, bias, targets, row, row, row, out, **options)
        return
    factor = row if call["factor"] else None
    backend.head_tile_fwd(logits, bias, targets, row, row, row, factor, out, **options, shift=changes.get("shift", 3))


CHANGES: dict[str, tuple[dict[str, Any], ...]] = {
    "token_logps_fwd": (
        {"ignore_index": 1}, {"ignore_index": 1 << 40}, {"strides": (1 << 36, 1 << 34)}, {"large": True},
    ),
    "preference_tail": (
        {"label_smoothing": 0.0}, {"beta": 1.0, "ignore_index": 0}, {"beta": -(2.0**-1074), "ignore_index": -(1 << 40)},
    ),
    "robust_loss": ({},),  # the same again
    "head_tile_fwd": ({"start": 0}, {"start": 1}, {"logit_scale": 1, "softcap": 30}, {"shift": 0}, {"shift": 64}),
}  # fmt: skip
"""What changes from call to call, or with a setting, and must not bring another compilation."""
CHANGES["token_logps_bwd"] = CHANGES["token_logps_fwd"]
CHANGES["head_tile_bwd"] = CHANGES["head_tile_fwd"][:3]


# ---------------------------------------------------------------------------------------------- what must be seen


def types(*names: str) -> set[str | None]:
    return {f"*{name}" for name in names}


_ANY, _HALF, _WIDE = types("fp32", "bf16", "fp16"), types("fp32"), types("fp32", "fp64")
POINTERS: dict[str, set[str | None]] = {
    **dict.fromkeys(("logits_ptr", "grad_logits_ptr", "exps_ptr", "grads_ptr"), _ANY),
    **dict.fromkeys(
        ("logps_ptr", "lse_ptr", "grad_logps_ptr", "bias_ptr", "top_ptr", "rest_ptr", "picked_ptr", "factor_ptr",
         "scale_ptr", "at_target_ptr"), _HALF,
    ),
    **dict.fromkeys(
        ("token_logps_ptr", "policy_logps_ptr", "margins_ptr", "rewards_ptr", "losses_ptr", "slopes_ptr",
         "group_losses_ptr", "group_weights_ptr", "weights_ptr", "loss_ptr"), _WIDE,
    ),
    **dict.fromkeys(("targets_ptr", "group_ids_ptr", "group_counts_ptr"), types("i64")),
    **dict.fromkeys(("ref_logps_ptr", "pair_weights_ptr", "lengths_ptr", "group_sums_ptr"), types("fp64")),
    "cu_seqlens_ptr": types("i32"),
}  # fmt: skip
"""Types of what a pointer may point to; whether it may be None is read off the kernels' text."""


def constants(kernel: str) -> dict[str, set[Any]]:
    """Values that each constant of a kernel takes, over the tables and the callers."""
    direction = "fwd" if kernel.endswith("fwd_kernel") else "bwd"
    by_size = {"token_logps": table.TOKEN_LOGPS, "head_tile": table.HEAD_TILE}
    entries = [line for start, one in by_size.items() if kernel.startswith(start) for key in one
               if key[0] == direction for line in one[key]]  # fmt: skip
    return {
        "BLOCK_V": {block_v for _, block_v, _ in entries},
        "VEC": {16 // dtype.itemsize for dtype in LOGITS},
        "ALIGNED": {True, False},
        "CAPPED": {True, False},
        "GRAD_HINT": {1, 16},
        "OUT_HINT": {1, *(16 // a.itemsize * b.itemsize for a, b in TILES)},
        "BIAS_HINT": {1, 16},
        "LOSS_TYPE": set(range(len(LOSS_TYPES))),
        "LENGTH_NORMALIZE": {True, False},
        "BLOCK_PAIRS": {pairs for _, pairs, _ in table.TAIL},
        "BLOCK_TOKENS": {tokens for *_, tokens in table.TAIL},
        "BLOCK_GROUPS": {table.tail_options(1, groups).block_groups for groups in GROUPS.values()},
        "BLOCK": {table.ROBUST_LOSS_BLOCK},
    }


def optional(function: JITFunction) -> set[str]:
    """Parameters that a function, or one that it hands them to, compares with None."""
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function.fn)))):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            found.add(ast.unparse(node.left))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called = function.fn.__globals__.get(node.func.id)
            if isinstance(called, JITFunction):
                inner = optional(called)
                found |= {ast.unparse(a) for a, name in zip(node.args, called.arg_names, strict=False) if name in inner}
    return found


def expected(kernel: JITFunction) -> dict[str, set[Any]]:
    """By parameter: values of a constant, types of a pointer and None where it may be absent, the type of a number."""
    found, may_be_none = {}, optional(kernel)
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            found[name] = constants(kernel.fn.__name__)[name]
        elif name.endswith("_ptr"):
            found[name] = POINTERS[name] | ({None} if name in may_be_none else set())
        else:
            found[name] = {parameter.annotation_type}
    return found


def seen(kernel: JITFunction, programs: Iterable[Any]) -> dict[str, set[Any]]:
    """The same of what was compiled (``jit_stand_in.Compiled``)."""
    found: dict[str, set[Any]] = {parameter.name: set() for parameter in kernel.params}
    for program in programs:
        for name, kind in program.types.items():
            found[name].add(program.constants.get(name) if kind == "constexpr" else kind)
    return found
