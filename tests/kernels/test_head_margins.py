"""Margins of long replies, from hidden states: the errors of 2 · 4096 log-probabilities, added up."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels import available_backends, fused_linear_grpo_loss

BACKENDS = [name for name in ("torch", "cpu") if available_backends()[name] is None]
PAIRS, TOKENS, WIDTH, WORDS, BETA = 2, 4096, 64, 256, 0.1


def draw(sigma, seed):
    """Hidden states and weight in bfloat16 whose logits spread by sigma; half of the labels are the likeliest word.

    Multiples of 1/8 and 1/64: a GEMM adds their products up without an error in whatever order it takes them, so that
    each logit has one rounding to bfloat16, the same on every machine.
    """
    rng = torch.Generator().manual_seed(seed)
    hidden = (8 * sigma * torch.randn(2 * PAIRS, TOKENS, WIDTH, generator=rng)).round().clamp(-255, 255) / 8
    weight = (64 * torch.randn(WORDS, WIDTH, generator=rng) / WIDTH**0.5).round() / 64
    labels = torch.randint(0, WORDS, hidden.shape[:2], generator=rng)
    confident = torch.rand(labels.shape, generator=rng) < 0.5
    labels = torch.where(confident, (hidden @ weight.t()).argmax(-1), labels)
    return hidden.bfloat16(), weight.bfloat16(), labels


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def plain(hidden, weight, labels, ref_logps):
    """Sums, margins and gradients by definition: logits in the dtype that came in, all else in float32 at least."""
    h, w = leaves(hidden, weight)
    z = h @ w.t()
    token = z.to(torch.promote_types(z.dtype, torch.float32)).log_softmax(-1).gather(-1, labels.unsqueeze(-1))
    sums = token.squeeze(-1).sum(1)
    ratios = sums - ref_logps.to(sums.dtype)
    margins = ratios[:PAIRS] - ratios[PAIRS:]
    loss = -torch.nn.functional.logsigmoid(BETA * margins).mean()
    return sums.detach(), margins.detach(), *torch.autograd.grad(loss, [h, w])


def ours(hidden, weight, labels, ref_logps, backend):
    h, w = leaves(hidden, weight)
    group_ids, alpha = torch.zeros(PAIRS, dtype=torch.long), torch.ones(1)
    out = fused_linear_grpo_loss(h, w, labels, ref_logps, group_ids, alpha, beta=BETA, shift=False, backend=backend)
    return out.policy_logps.detach(), out.margins.detach(), *torch.autograd.grad(out.loss, [h, w])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sigma", [3.0, 8.0], ids=["flat", "peaked"])
def test_margins_of_4096_tokens_are_as_near_as_those_of_plain_pytorch(backend, sigma):
    """Against float64: no further than plain PyTorch with bfloat16 logits and the log_softmax of them in float32.

    A CPU's GEMM answers in bfloat16 for us too, and that is nearly all of the error.  What is added to it: for a margin
    the roundings of two sums to float32, theirs and ours; for a gradient, in the norm, one rounding to bfloat16.
    """
    for seed in range(2):
        hidden, weight, labels = draw(sigma, seed)
        sums = plain(hidden.double(), weight.double(), labels, torch.zeros(2 * PAIRS))[0]
        ref_logps = sums + torch.tensor([3.0, -2.0, 1.0, 4.0])  # so that the loss still has a slope
        exact = plain(hidden.double(), weight.double(), labels, ref_logps)
        eager = plain(hidden, weight, labels, ref_logps)
        mine = ours(hidden, weight, labels, ref_logps, backend)
        allowed = (eager[1] - exact[1]).abs() + 2 * torch.finfo(torch.float32).eps * sums.abs().max()
        errors = (mine[1] - exact[1]).abs()
        assert (errors <= allowed).all(), f"{errors.tolist()} where {allowed.tolist()} are allowed"
        for what, truth, theirs, got in zip(("hidden", "weight"), exact[2:], eager[2:], mine[2:], strict=True):
            most = (theirs.double() - truth).norm() / truth.norm() + torch.finfo(torch.bfloat16).eps / 2
            error = (got.double() - truth).norm() / truth.norm()
            assert error <= most, f"grad of {what}: {error:.2e} where {most:.2e} are allowed"
