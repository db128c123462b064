"""A checkpointed region runs twice: the loss with a moving alpha is refused in it, the rest is not."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, make_batch
from torch.utils.checkpoint import checkpoint

from grpo_kernels import GroupWeights, fused_grpo_loss, preference_loss, sequence_logps


def loss_in(batch, gw):
    return lambda z: fused_grpo_loss(z, batch.labels, batch.ref_logps, batch.group_ids, gw).loss


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_moving_alpha_is_refused_inside_and_does_not_move(reentrant):
    batch, gw = make_batch(), GroupWeights.robust([5, 3, 2], 0.3)
    before = gw.log_alpha.clone()
    with pytest.raises(RuntimeError, match="checkpointed region"):
        checkpoint(loss_in(batch, gw), batch.leaf() * 1, use_reentrant=reentrant).backward()
    assert torch.equal(gw.log_alpha, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_observing_inside_is_refused_too(reentrant):
    batch, gw = make_batch(), GroupWeights.robust([5, 3, 2], 0.3)
    with pytest.raises(RuntimeError, match="checkpointed region"), gw.accumulate():
        checkpoint(loss_in(batch, gw), batch.leaf() * 1, use_reentrant=reentrant).backward()
    assert (gw.pending == 0).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_fixed_alpha_may_be_used_inside(reentrant):
    batch, gw = make_batch(), GroupWeights.balanced([5, 3, 2])
    inside, outside = batch.leaf(), batch.leaf()
    checkpoint(loss_in(batch, gw), inside, use_reentrant=reentrant).backward()
    loss_in(batch, gw)(outside).backward()
    assert_close(inside.grad, outside.grad)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_the_log_probabilities_may_be_checkpointed_with_a_moving_alpha_outside(reentrant, overwrite):
    batch = make_batch()
    grads, alphas = [], []
    for checkpointed in (True, False):
        gw, leaf = GroupWeights.robust([5, 3, 2], 0.3), batch.leaf()

        def sums(z):
            return sequence_logps(z * 2, batch.labels, overwrite_logits=overwrite)

        logps = checkpoint(sums, leaf, use_reentrant=reentrant) if checkpointed else sums(leaf)
        preference_loss(logps, batch.ref_logps, batch.group_ids, gw).loss.backward()
        grads.append(leaf.grad)
        alphas.append(gw.log_alpha)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(alphas[0], alphas[1])


def test_a_hook_that_moves_saved_tensors_is_no_checkpoint():
    batch, gw = make_batch(), GroupWeights.robust([5, 3, 2], 0.3)
    with torch.autograd.graph.save_on_cpu():
        loss_in(batch, gw)(batch.leaf()).backward()
    assert int(gw.num_updates) == 1
