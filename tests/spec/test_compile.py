"""The operators behind torch.compile: clean by PyTorch's own checks, and a whole step without a graph break."""

from __future__ import annotations

import pytest
import torch
from helpers import make_batch

from grpo_kernels import (
    GroupWeights,
    available_backends,
    fused_grpo_loss,
    fused_linear_grpo_loss,
    linear_sequence_logps,
    linear_token_logps,
    preference_loss,
    sequence_logps,
    token_logps,
)
from grpo_kernels.types import LOSS_TYPES

HERE = [name for name, reason in available_backends().items() if reason is None and name in ("cpu", "torch")]
every_backend = pytest.mark.parametrize("backend", HERE)


def rows(seed=0):
    """(logits, targets, logps, lse, grad_logps, grad_logits) of 2 sequences of 5 rows, two of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 5, 33, generator=generator)
    targets = torch.randint(0, 33, (10,), generator=generator)
    targets[[0, 7]] = -100
    return (
        logits,
        targets,
        torch.zeros(10),
        torch.zeros(10),
        torch.randn(10, generator=generator),
        torch.zeros(2, 5, 33),
    )


@every_backend
def test_token_logps_operators_pass_opcheck(backend):
    logits, targets, logps, lse, grad_logps, grad_logits = rows()
    ops = torch.ops.grpo_kernels
    torch.library.opcheck(ops.token_logps_fwd, (logits, targets, logps, lse, -100, backend))
    ops.token_logps_fwd(logits, targets, logps, lse, -100, backend)
    torch.library.opcheck(ops.token_logps_bwd, (logits, targets, lse, grad_logps, grad_logits, -100, backend))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@every_backend
def test_the_tail_operator_passes_opcheck(backend, loss_type):
    outputs = [torch.zeros(6), torch.zeros(6, dtype=torch.float64), *(torch.zeros(n) for n in (3, 6, 3, 3))]
    outputs += [torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), torch.zeros(2)]
    inputs = (-torch.rand(30), torch.ones(30, dtype=torch.int64), None, torch.full((6,), -3.0, dtype=torch.float64))
    pairs = (torch.tensor([0, 1, 1]), None)
    settings = (LOSS_TYPES.index(loss_type), 0.1, 0.0, True, -100, backend)
    torch.library.opcheck(torch.ops.grpo_kernels.preference_tail, (*inputs, *pairs, *outputs, *settings))


@every_backend
def test_the_robust_loss_operator_passes_opcheck(backend):
    inputs = (torch.rand(3), torch.tensor([0, 1, 1]), torch.rand(2), torch.zeros(3), torch.zeros(()))
    torch.library.opcheck(torch.ops.grpo_kernels.robust_loss, (*inputs, backend))


def weights_of(kind):
    return GroupWeights.robust([3, 5, 7], 0.1) if kind == "moving" else torch.tensor([0.5, 1.0, 2.0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["plain", "moving"])
@pytest.mark.parametrize("overwrite", [False, True])
@every_backend
def test_a_compiled_step_has_no_graph_break_and_the_same_bits(backend, kind, packed, overwrite):
    batch = make_batch(packed=packed, dtype=torch.float32)

    def loss_of(logits, group_weights):
        return fused_grpo_loss(
            logits * 1.0, batch.labels, batch.ref_logps, batch.group_ids, group_weights,
            cu_seqlens=batch.cu_seqlens, overwrite_logits=overwrite, backend=backend,
        )  # fmt: skip

    results = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        leaf, group_weights = batch.leaf(), weights_of(kind)
        for _ in range(2):  # alpha moves on, and the compiled step with it
            leaf.grad = None
            out = function(leaf, group_weights)
            (out.loss + out.policy_logps.mean()).backward()
        results.append([*out, leaf.grad])
    for plain, compiled in zip(*results, strict=True):
        assert torch.equal(plain, compiled)
    torch.compiler.reset()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_compiled_alpha_step_skips_a_batch_that_is_not_finite(bad):
    """Without a look at the values, as on a device."""
    group_weights = GroupWeights.robust([3, 5, 7], 0.1)
    step = torch.compile(group_weights.observe_and_step, fullgraph=True, backend="aot_eager")
    seen = []
    for worst in (1.0, bad, 1.0):
        losses = torch.tensor([0.5, worst, 0.25])
        step(losses.double(), torch.ones(3, dtype=torch.int64), losses)
        seen.append(group_weights.log_alpha.clone())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert (int(group_weights.num_updates), int(group_weights.num_skipped)) == (2, 1)
    torch.compiler.reset()


def test_inductor_compiles_a_step_too():
    """The default compiler: its own code around the operators, which are what they are outside of it."""
    batch = make_batch(dtype=torch.float32)
    hidden = torch.randn(*batch.labels.shape, 16, generator=torch.Generator().manual_seed(5))
    results = []
    for compiled in (False, True):
        head, group_weights = torch.nn.Linear(16, batch.logits.shape[-1]), GroupWeights.robust([3, 5, 7], 0.1)
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(6))
        torch.nn.init.zeros_(head.bias)

        def step(hidden, head=head, group_weights=group_weights):
            logits = head(hidden)
            return fused_grpo_loss(logits, batch.labels, batch.ref_logps, batch.group_ids, group_weights)

        out = (torch.compile(step, fullgraph=True) if compiled else step)(hidden)
        out.loss.backward()
        results.append([out.loss, out.group_weights, head.weight.grad])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.parametrize("frozen", [False, True])
def test_the_head_and_preference_loss_compile_whole(frozen):
    batch = make_batch(dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(*batch.labels.shape, 16, generator=generator)
    weight = torch.randn(13, 16, generator=generator)

    def both(hidden, weight, group_weights):
        out = fused_linear_grpo_loss(hidden, weight, batch.labels, *batch.tail()[:2], group_weights)
        again = preference_loss(out.policy_logps, *batch.tail()[:2], batch.weights.float(), loss_type="ipo")
        return out.loss + again.loss, out.group_weights

    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        loss, alpha = function(h, w, GroupWeights.robust([3, 5, 7], 0.1))
        loss.backward()
        results.append([loss, alpha, h.grad, *([] if frozen else [w.grad])])
    for plain, compiled in zip(*results, strict=True):
        assert torch.equal(plain, compiled)
    torch.compiler.reset()


SHAPES = ((4, 5), (4, 6), (3, 6))
"""Pairs and tokens."""


def inputs_of(pairs, length, packed):
    """Hidden (packed or padded), weight, labels, group ids, and where sequences begin."""
    generator = torch.Generator().manual_seed(10 * pairs + length)
    shape = (2 * pairs * length,) if packed else (2 * pairs, length)
    hidden, weight = torch.randn(*shape, 5, generator=generator), torch.randn(13, 5, generator=generator)
    labels = torch.randint(0, 13, shape, generator=generator)
    edges = torch.arange(0, 2 * pairs * length + 1, length, dtype=torch.int32) if packed else None
    return hidden.requires_grad_(), weight.requires_grad_(), labels, torch.arange(pairs) % 3, edges


STEPS = {
    "fused_grpo_loss": lambda h, w, y, g, cu: fused_grpo_loss(h @ w.t(), y, None, g, W, cu_seqlens=cu).loss,
    "token_logps": lambda h, w, y, g, cu: token_logps(h @ w.t(), y, cu_seqlens=cu).square().sum(),
    "sequence_logps": lambda h, w, y, g, cu: sequence_logps(h @ w.t(), y, cu_seqlens=cu).square().sum(),
    "preference_loss": lambda h, w, y, g, cu: (
        preference_loss(sequence_logps(h @ w.t(), y, cu_seqlens=cu), None, g, W).loss
    ),
    "fused_linear_grpo_loss": lambda h, w, y, g, cu: fused_linear_grpo_loss(h, w, y, None, g, W, cu_seqlens=cu).loss,
    "linear_token_logps": lambda h, w, y, g, cu: linear_token_logps(h, w, y, cu_seqlens=cu).square().sum(),
    "linear_sequence_logps": lambda h, w, y, g, cu: linear_sequence_logps(h, w, y, cu_seqlens=cu).square().sum(),
}
W = torch.tensor([0.5, 1.0, 2.0])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", STEPS)
def test_a_compiled_step_takes_batches_of_other_shapes(name, packed):
    """As the batches of a training loop are; the second shape makes sizes symbolic."""
    compiled = torch.compile(STEPS[name], fullgraph=True, backend="aot_eager")
    for shape in SHAPES:
        inputs = inputs_of(*shape, packed)
        plain, found = STEPS[name](*inputs), compiled(*inputs)
        assert torch.equal(plain, found)
        for a, b in zip(*(torch.autograd.grad(out, inputs[:2]) for out in (plain, found)), strict=True):
            torch.testing.assert_close(a, b)
    torch.compiler.reset()
