"""Every Triton kernel at every entry of its table, compiled ahead of time for GPUs that need not be here.

What the compiler's output can tell is asked of it: no spilled registers, shared memory that any GPU has, 16-byte
loads and stores.  By default one architecture and the entries of long rows; ``-m slow`` takes all.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import case_id

from grpo_kernels.types import LOSS_TYPES

triton = pytest.importorskip("triton")

from compiled_code import assert_fits, assert_wide  # noqa: E402
from jit_covering import GROUPS, calls  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from grpo_kernels.backends import triton as backend  # noqa: E402
from grpo_kernels.backends.triton import table  # noqa: E402
from grpo_kernels.backends.triton.head_tile import head_tile_bwd_kernel, head_tile_fwd_kernel  # noqa: E402
from grpo_kernels.backends.triton.preference_tail import preference_tail_kernel, robust_loss_kernel  # noqa: E402
from grpo_kernels.backends.triton.token_logps import token_logps_bwd_kernel, token_logps_fwd_kernel  # noqa: E402

pytestmark = pytest.mark.skipif(backend.INTERPRETED, reason="TRITON_INTERPRET=1 replaces the kernels by Python")

TARGETS = {f"sm_{cc}": GPUTarget("cuda", cc, 32) for cc in (80, 90, 100)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VOCABULARIES = {"V<=1024": 1024, "V<=8192": 8192, "V>8192": 128256}

ROWS = {"targets_ptr": "*i64", "logps_ptr": "*fp32", "lse_ptr": "*fp32", "grad_logps_ptr": "*fp32"}
TAIL = {
    "token_logps_ptr": "*fp32", "targets_ptr": "*i64", "cu_seqlens_ptr": "*i32", "ref_logps_ptr": "*fp64",
    "group_ids_ptr": "*i64", "pair_weights_ptr": "*fp64", "policy_logps_ptr": "*fp32", "lengths_ptr": "*fp64",
    "margins_ptr": "*fp32", "rewards_ptr": "*fp32", "losses_ptr": "*fp32", "slopes_ptr": "*fp32",
    "group_sums_ptr": "*fp64", "group_counts_ptr": "*i64", "group_losses_ptr": "*fp32",
}  # fmt: skip
TILE = {
    "bias_ptr": "*fp32", "targets_ptr": "*i64", "top_ptr": "*fp32", "rest_ptr": "*fp32", "picked_ptr": "*fp32",
    "factor_ptr": "*fp32", "scale_ptr": "*fp32", "at_target_ptr": "*fp32",
}  # fmt: skip
AS_THE_LOSS = {
    "dtype": torch.float32, "loss_type": "sigmoid", "normalize": False, "entry": 1, "groups": "few", "packed": False,
    "reference": True, "weights": False, "lengths": "absent",
}  # fmt: skip
"""``fused_grpo_loss`` by default: padded, no weights of pairs, a sum of tokens."""


def compile_kernel(kernel, types, constants, target, num_warps, registers=None):
    """Numbers are of the types that the kernel gives them, pointers of those told."""
    signature = {p.name: p.annotation_type or types.get(p.name, "constexpr") for p in kernel.params}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constexprs=constants)
    limit = {} if registers is None or target.backend == "hip" else {"maxnreg": registers}
    return triton.compile(source, target=target, options={"num_warps": num_warps, **limit})


def row_kernels(target, dtype_name, vocabulary):
    """Forward and backward at one entry of the table, for rows that are aligned and rows that are not."""
    dtype = DTYPES[dtype_name]
    types = {**ROWS, "logits_ptr": "*" + dtype_name, "grad_logits_ptr": "*" + dtype_name}
    variants = [("fwd", token_logps_fwd_kernel, {"ALIGNED": a}) for a in (True, False)]
    variants += [("bwd", token_logps_bwd_kernel, {"ALIGNED": a, "GRAD_HINT": h}) for a, h in ((1, 16), (0, 16), (0, 1))]
    for direction, kernel, constants in variants:
        options = table.token_logps_options(direction, vocabulary, dtype, target.warp_size)
        constants = {"BLOCK_V": options.block_v, "VEC": options.vec, **constants}
        yield direction, constants, options, compile_kernel(kernel, types, constants, target, options.num_warps)


def check_row_kernels(target, dtype_name, vocabulary):
    for direction, constants, options, compiled in row_kernels(target, dtype_name, vocabulary):
        assert_fits(compiled)
        moved = (options.block_v, DTYPES[dtype_name].itemsize, options.num_warps * target.warp_size)
        assert_wide(compiled, "ld", *moved)
        if direction == "bwd" and constants["GRAD_HINT"] == 16:
            assert_wide(compiled, "st", *moved)


def check_tail(target, call):
    """The tail at one entry of the table, with the arguments of a call of ``jit_covering.py``."""
    options = table.tail_options(64 if call["entry"] == 0 else 512, GROUPS[call["groups"]], target.warp_size)
    given = {
        "targets_ptr": call["lengths"] == "counted", "lengths_ptr": call["lengths"] != "absent",
        "cu_seqlens_ptr": call["packed"], "ref_logps_ptr": call["reference"], "pair_weights_ptr": call["weights"],
    }  # fmt: skip
    constants = {
        "LOSS_TYPE": LOSS_TYPES.index(call["loss_type"]), "LENGTH_NORMALIZE": call["normalize"],
        "BLOCK_PAIRS": options.block_pairs, "BLOCK_TOKENS": options.block_tokens,
        "BLOCK_GROUPS": options.block_groups, **{name: None for name, there in given.items() if not there},
    }  # fmt: skip
    types = TAIL
    if call["dtype"] is torch.float64:
        types = {name: kind.replace("fp32", "fp64") for name, kind in TAIL.items()}
    registers = table.tail_registers(options.num_warps)
    assert_fits(compile_kernel(preference_tail_kernel, types, constants, target, options.num_warps, registers))


def check_tile_kernels(target, logits, out, words, variants):
    """Both tile operations at one entry of the table: dtypes of tile and output, (aligned, capped, biased)."""
    types = {**TILE, "logits_ptr": "*" + logits, "exps_ptr": "*" + out, "grads_ptr": "*" + out}
    size = DTYPES[logits].itemsize
    kernels = (("fwd", head_tile_fwd_kernel), ("bwd", head_tile_bwd_kernel))
    for (direction, kernel), (aligned, capped, biased) in itertools.product(kernels, variants):
        options = table.head_tile_options(direction, words, DTYPES[logits], target.warp_size)
        constants = {
            "BLOCK_V": options.block_v, "VEC": options.vec, "ALIGNED": aligned, "CAPPED": capped, "BIAS_HINT": 16,
            "OUT_HINT": options.vec * DTYPES[out].itemsize, **({} if biased else {"bias_ptr": None}),
        }  # fmt: skip
        registers = table.head_tile_registers(direction, aligned=aligned, capped=capped, biased=biased)
        compiled = compile_kernel(kernel, types, constants, target, options.num_warps, registers)
        assert_fits(compiled)
        if not biased:
            moved = (options.block_v, size, options.num_warps * target.warp_size)
            # Forward reads target, top, rest and the target's logit, and the edges, two a thread, twice.
            assert_wide(compiled, "ld", *moved, scalars=8)
            if logits == out:
                assert_wide(compiled, "st", *moved)


@pytest.mark.parametrize("out", ["bf16", "fp32"])
def test_tiles_of_many_words(out):
    check_tile_kernels(TARGETS["sm_90"], "fp32", out, 16384, [(True, False, False), (False, True, True)])


@pytest.mark.slow
@pytest.mark.parametrize("words", [1024, 4096, 16384])
@pytest.mark.parametrize(
    ("logits", "out"), [("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "bf16"), ("fp16", "fp16")]
)
@pytest.mark.parametrize("target", TARGETS)
def test_tiles_everywhere(target, logits, out, words):
    check_tile_kernels(TARGETS[target], logits, out, words, list(itertools.product((True, False), repeat=3)))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_rows_of_a_large_vocabulary(dtype):
    check_row_kernels(TARGETS["sm_90"], dtype, 128256)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_tail_as_the_loss_calls_it(target, packed):
    check_tail(TARGETS[target], {**AS_THE_LOSS, "packed": packed})


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_robust_loss(target, dtype):
    types = {"losses_ptr": "*" + dtype, "group_ids_ptr": "*i64", "group_weights_ptr": "*" + dtype,
             "weights_ptr": "*" + dtype, "loss_ptr": "*" + dtype}  # fmt: skip
    warps = 128 // TARGETS[target].warp_size
    assert_fits(compile_kernel(robust_loss_kernel, types, {"BLOCK": table.ROBUST_LOSS_BLOCK}, TARGETS[target], warps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("options_of", "entries"),
    [(table.token_logps_options, table.TOKEN_LOGPS), (table.head_tile_options, table.HEAD_TILE)],
)
def test_no_two_threads_share_an_element(options_of, entries, dtype):
    """In place, a thread may only read what it alone writes: a block has no more threads than 16-byte groups."""
    for direction, warp_size in itertools.product(("fwd", "bwd"), (32, 64)):
        for most, *_ in entries[direction, dtype.itemsize]:
            options = options_of(direction, min(most, 1 << 20), dtype, warp_size)
            assert options.block_v // options.vec >= options.num_warps * warp_size
            assert options.num_warps >= 1


def test_a_spill_is_seen():
    """The check above can fail: eight times the tail's tile does not fit in registers."""
    constants = {
        "LOSS_TYPE": 0, "LENGTH_NORMALIZE": True, "BLOCK_PAIRS": 16, "BLOCK_TOKENS": 512, "BLOCK_GROUPS": 16,
    }  # fmt: skip
    compiled = compile_kernel(preference_tail_kernel, TAIL, constants, TARGETS["sm_90"], 8)
    with pytest.raises(AssertionError, match="STACK"):
        assert_fits(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_rows_everywhere(target, dtype, vocabulary):
    check_row_kernels(TARGETS[target], dtype, VOCABULARIES[vocabulary])


@pytest.mark.slow
@pytest.mark.parametrize("call", calls("preference_tail", 2), ids=lambda call: " ".join(map(case_id, call.values())))
@pytest.mark.parametrize("target", TARGETS)
def test_the_tail_everywhere(target, call):
    check_tail(TARGETS[target], call)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("entry", [0, 1])
@pytest.mark.parametrize("target", TARGETS)
def test_the_tail_of_every_loss(target, entry, packed, loss_type):
    for groups in GROUPS:
        check_tail(
            TARGETS[target],
            {**AS_THE_LOSS, "entry": entry, "packed": packed, "loss_type": loss_type, "groups": groups},
        )
