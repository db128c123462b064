"""Where policy and reference are the same, to the bit: on every backend that can run here."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_kernels import available_backends, fused_grpo_loss, preference_loss, sequence_logps

RUNNING = [name for name, reason in available_backends().items() if reason is None and name in ("cpu", "torch")]


@pytest.fixture(params=RUNNING)
def call(request):
    """(logits, labels, group_ids, weights, backend) of long replies, with logps in the thousands."""
    generator = torch.Generator().manual_seed(7)
    logits = 3 * torch.randn(6, 700, 40, generator=generator)
    labels = torch.randint(0, 40, (6, 700), generator=generator)
    labels[:, :11] = -100
    return logits, labels, torch.tensor([0, 1, 1]), torch.tensor([0.4, 0.6]), request.param


def test_a_policy_equal_to_its_reference_has_loss_log_2_to_the_bit(call):
    logits, labels, group_ids, weights, backend = call
    ref_logps = sequence_logps(logits, labels, backend=backend)
    assert ref_logps.abs().min() > 2000
    out = fused_grpo_loss(logits, labels, ref_logps, group_ids, weights, backend=backend)
    assert torch.equal(out.margins, torch.zeros(3))
    assert torch.equal(out.losses, torch.full((3,), math.log(2)))
    assert torch.equal(out.rewards_chosen, torch.zeros(3))


def test_preference_loss_of_sequence_logps_is_the_fused_loss_to_the_bit(call):
    logits, labels, group_ids, weights, backend = call
    ref_logps = torch.linspace(-4000, -3000, 6)
    logps = sequence_logps(logits, labels, backend=backend)
    fused = fused_grpo_loss(logits, labels, ref_logps, group_ids, weights, backend=backend)
    apart = preference_loss(logps, ref_logps, group_ids, weights)
    assert torch.equal(fused.policy_logps, logps)
    assert torch.equal(fused.margins, apart.margins)
    assert torch.equal(fused.losses, apart.losses)
