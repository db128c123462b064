"""The fused LM head on the device against float64: its tiles one by one, and all of it through the public function."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels import GroupWeights, fused_linear_grpo_loss

DEVICE = "cuda"
PAIRS, LENGTH, WIDTH = 3, 24, 64


def run(hidden, weight, bias, labels, backend, **options):
    """Loss and the gradients of hidden, weight and bias."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    ids = torch.tensor([0, 1, 0], device=DEVICE)
    weights = GroupWeights.robust([50, 30], group_lr=0.1).to(DEVICE)
    reference = torch.zeros(2 * PAIRS, dtype=torch.float64, device=DEVICE)
    output = fused_linear_grpo_loss(
        leaves[0], leaves[1], labels, reference, ids, weights, bias=leaves[2], backend=backend, **options
    )
    return output.loss.detach(), *torch.autograd.grad(output.loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1031, 20000])
@pytest.mark.parametrize("memory_budget", [0, 1 << 30])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_fused_head_against_float64(backend, dtype, vocabulary, memory_budget, softcap):
    """One tile and several, aligned and not, kept and made again; the error is at most that of the torch backend."""
    hidden = torch.randn(2 * PAIRS, LENGTH, WIDTH, device=DEVICE).to(dtype)
    weight = (3 * torch.randn(vocabulary, WIDTH, device=DEVICE) / WIDTH**0.5).to(dtype)
    bias = torch.randn(vocabulary, device=DEVICE).to(dtype)
    labels = torch.randint(0, vocabulary, (2 * PAIRS, LENGTH), device=DEVICE)
    labels[:, :5] = -100
    options = {"softcap": softcap, "logit_scale": 0.75, "memory_budget": memory_budget}
    inputs = hidden, weight, bias, labels
    exact = run(*(x.double() for x in inputs[:3]), labels, "torch", **options)
    plain = run(*inputs, "torch", **options)
    ours = run(*inputs, backend, **options)
    again = run(*inputs, backend, **options)
    epsilon = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 0.5)
    for name, truth, theirs, mine, repeat in zip(
        ("loss", "hidden", "weight", "bias"), exact, plain, ours, again, strict=True
    ):
        error = (mine.double() - truth).norm() / truth.norm()
        allowed = (theirs.double() - truth).norm() / truth.norm() + epsilon
        assert error <= allowed, f"{name}: {error:.2e} where the torch backend has {allowed - epsilon:.2e}"
        assert torch.equal(mine, repeat), name
