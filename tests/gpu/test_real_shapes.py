"""Forward and backward at the sizes of real vocabularies, past 2**31 elements, and with very many rows.

The truth is float64 on the device, a few rows at a time; the budget is plain PyTorch in float32 and EPSILON.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import case_id

from grpo_kernels.proof import Place
from grpo_kernels.proof.budget import EPSILON
from grpo_kernels.types import IGNORE_INDEX

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABULARIES = [32000, 50257, 128256, 151936]


def run(backend, logits, targets, grads, *, in_place=False):
    """logps, lse and the gradient of (S, T, V) logits."""
    module = Place(backend, DEVICE).module
    rows = targets.numel()
    logps, lse = (torch.full((rows,), torch.nan, device=DEVICE) for _ in range(2))
    module.token_logps_fwd(logits, targets, logps, lse, ignore_index=IGNORE_INDEX)
    out = logits if in_place else torch.empty(logits.shape, dtype=logits.dtype, device=DEVICE)
    module.token_logps_bwd(logits, targets, lse, grads, out, ignore_index=IGNORE_INDEX)
    return logps, lse, out


def rows_in(dtype, z, target, grad):
    """logp and gradient of a few rows by torch.log_softmax in ``dtype``."""
    logp = torch.log_softmax(z.to(dtype), dim=-1)
    seen = (target != IGNORE_INDEX).unsqueeze(1)
    index = target.clamp(min=0).unsqueeze(1)
    gradient = -logp.exp().mul(grad.to(dtype).unsqueeze(1))
    gradient.scatter_(1, index, -grad.to(dtype).unsqueeze(1) * torch.expm1(logp.gather(1, index)))
    return (logp.gather(1, index) * seen).squeeze(1), gradient * seen


def check_rows(rows, z, targets, grads, logps, gradient):
    """``rows`` of logps and of the gradient lie within the budget."""
    for part in rows.split(256):
        exact, exact_grad = rows_in(torch.float64, z[part], targets[part], grads[part])
        plain, plain_grad = rows_in(torch.float32, z[part], targets[part], grads[part])
        budget = (plain - exact).abs().max() + EPSILON * z[part].double().abs().max()
        assert (logps[part].double() - exact).abs().max() <= budget
        # Relative to each entry: what float32 holds of z - lse, then one rounding to the dtype of the logits.
        step = torch.finfo(gradient.dtype).eps + EPSILON * (4 + z[part].double().abs().max())
        floor = 2 * torch.finfo(gradient.dtype).tiny + (plain_grad - exact_grad).abs()
        assert ((gradient[part].double() - exact_grad).abs() <= step * exact_grad.abs() + floor).all()


def inputs(shape, dtype, *, ignore_every=7):
    generator = torch.Generator(DEVICE).manual_seed(1)
    logits = torch.empty(shape, dtype=dtype, device=DEVICE).normal_(generator=generator).mul_(3)
    rows = shape[0] * shape[1]
    targets = torch.randint(0, shape[2], (rows,), generator=generator, device=DEVICE)
    targets[3::ignore_every] = IGNORE_INDEX
    grads = torch.randn(rows, generator=generator, device=DEVICE)
    return logits, targets, grads


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_vocabularies_of_real_models(backend, dtype, vocabulary):
    logits, targets, grads = inputs((4, 256, vocabulary), dtype)
    logps, _, gradient = run(backend, logits, targets, grads)
    rows = torch.arange(0, 1024, 2, device=DEVICE)
    check_rows(rows, logits.view(1024, -1), targets, grads, logps, gradient.view(1024, -1))
    run(backend, logits, targets, grads, in_place=True)
    assert torch.equal(logits, gradient)


@pytest.mark.parametrize("vocabulary", [50257, 128256])
def test_a_slice_of_positions(backend, vocabulary):
    """Logits without their last position, as a shifted loss has them: rows do not lie one after the other."""
    whole, targets, grads = inputs((4, 65, vocabulary), torch.bfloat16)
    logits = whole[:, :-1]
    targets, grads = (x.view(4, 65)[:, :-1].flatten().contiguous() for x in (targets, grads))
    logps, _, gradient = run(backend, logits, targets, grads)
    rows = torch.arange(256, device=DEVICE)
    flat = logits.reshape(256, -1).clone()
    check_rows(rows, flat, targets, grads, logps, gradient.view(256, -1))
    last = whole[:, -1].clone()
    run(backend, logits, targets, grads, in_place=True)
    assert torch.equal(logits, gradient)
    assert torch.equal(whole[:, -1], last)


def test_very_many_rows(backend):
    """[70000, 4096]: more rows than a grid's second and third dimensions hold."""
    logits, targets, grads = inputs((1, 70000, 4096), torch.bfloat16)
    logps, _, gradient = run(backend, logits, targets, grads)
    rows = torch.arange(70000, device=DEVICE)[::3]
    check_rows(rows, logits[0], targets, grads, logps, gradient[0])
    assert not gradient[0][targets == IGNORE_INDEX].any()


def test_more_than_2_to_the_31_elements(backend):
    """Rows before, across and after element 2**31, where a 32-bit offset would turn negative."""
    needed = 16 << 30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    vocabulary, rows = 128256, 16900
    logits, targets, grads = inputs((2, rows // 2, vocabulary), torch.bfloat16, ignore_every=rows)
    assert logits.numel() > 2**31
    boundary = 2**31 // vocabulary
    probe = torch.tensor([0, 1, boundary - 1, boundary, boundary + 1, rows - 2, rows - 1], device=DEVICE)
    logps, _, gradient = run(backend, logits, targets, grads)
    z, g = logits.view(rows, -1), gradient.view(rows, -1)
    check_rows(probe, z, targets, grads, logps, g)
    run(backend, logits, targets, grads, in_place=True)
    assert torch.equal(logits, gradient)


def test_fifty_runs_give_the_same_bits(backend):
    logits, targets, grads = inputs((2, 512, 32000), torch.bfloat16)
    first = [x.clone() for x in run(backend, logits, targets, grads)]
    labelled = targets != IGNORE_INDEX
    for _ in range(50):
        again = run(backend, logits, targets, grads)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1][labelled], first[1][labelled])
        assert torch.equal(again[2], first[2])
