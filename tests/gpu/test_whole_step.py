"""A whole step through the public function: loss, alpha and backward, eager, captured and compiled."""

from __future__ import annotations

import pytest
import torch
from helpers import make_batch

from grpo_kernels import GroupWeights, fused_grpo_loss

DEVICE = "cuda"


class Step:
    """Static tensors and one step over them, as a CUDA graph wants it."""

    def __init__(self, backend, *, packed=False, vocabulary=4099, overwrite=False):
        batch = make_batch(pairs=4, length=64, vocabulary=vocabulary, groups=3, packed=packed)
        self.logits = batch.logits.to(DEVICE, torch.bfloat16).requires_grad_()
        self.labels, self.group_ids = batch.labels.to(DEVICE), batch.group_ids.to(DEVICE)
        self.ref_logps = batch.ref_logps.to(DEVICE)
        self.cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.to(DEVICE)
        self.group_weights = GroupWeights.robust([50, 30, 20], group_lr=0.1).to(DEVICE)
        self.backend, self.overwrite = backend, overwrite

    def loss(self):
        # A leaf is refused for overwriting; what a model returns is not a leaf.
        logits = self.logits * 1 if self.overwrite else self.logits
        return fused_grpo_loss(
            logits, self.labels, self.ref_logps, self.group_ids, self.group_weights,
            cu_seqlens=self.cu_seqlens, overwrite_logits=self.overwrite, backend=self.backend,
        )  # fmt: skip

    def run(self):
        """Everything that a step makes: loss, gradient, log alpha."""
        output = self.loss()
        (gradient,) = torch.autograd.grad(output.loss, self.logits)
        return output.loss.detach(), gradient, self.group_weights.log_alpha

    def rewind(self):
        """Back to the alpha of the start, in place: a graph holds the buffers' addresses."""
        start = GroupWeights.robust([50, 30, 20], group_lr=0.1).to(DEVICE)
        for name, buffer in self.group_weights.named_buffers():
            buffer.copy_(getattr(start, name))


def clones(tensors):
    return [tensor.clone() for tensor in tensors]


def assert_same(first, second):
    for name, a, b in zip(("loss", "gradient", "log_alpha"), first, second, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_graph_replays_are_eager_steps(backend, packed, overwrite):
    """Alpha moves with every replay exactly as it does in eager mode."""
    step = Step(backend, packed=packed, overwrite=overwrite)
    eager = [clones(step.run()) for _ in range(4)]
    assert not torch.equal(eager[0][2], eager[1][2]), "alpha did not move"

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.run()
    step.rewind()
    for expected in eager:
        graph.replay()
        assert_same(captured, expected)


def test_graph_sees_new_inputs(backend):
    """A replay computes with what lies in the static tensors then, not with what lay there at capture."""
    step = Step(backend)
    step.run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.run()
    with torch.no_grad():
        step.logits.mul_(0.5)
        step.labels.copy_(torch.where(step.labels == -100, -100, (step.labels + 1) % 4099))
    step.rewind()
    expected = clones(step.run())
    step.rewind()
    graph.replay()
    assert_same(captured, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_fifty_steps_give_the_same_bits(backend, packed):
    step = Step(backend, packed=packed)
    first = clones(step.run())
    for _ in range(50):
        step.rewind()
        assert_same(step.run(), first)


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_never_waits_for_the_device(backend, packed):
    step = Step(backend, packed=packed)
    step.run()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_without_a_graph_break(backend, packed):
    eager, compiled = Step(backend, packed=packed), Step(backend, packed=packed)

    def loss_of(logits):
        return fused_grpo_loss(
            logits, compiled.labels, compiled.ref_logps, compiled.group_ids, compiled.group_weights,
            cu_seqlens=compiled.cu_seqlens, backend=backend,
        ).loss  # fmt: skip

    function = torch.compile(loss_of, fullgraph=True)
    for _ in range(3):
        loss, gradient, log_alpha = eager.run()
        got = function(compiled.logits)
        (got_gradient,) = torch.autograd.grad(got, compiled.logits)
        # The scalar and alpha's step are the compiler's to fuse; the kernels in between are the same.
        torch.testing.assert_close(got, loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(compiled.group_weights.log_alpha, log_alpha, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got_gradient, gradient, rtol=2**-7, atol=1e-9)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_device_that_is_not_the_current_one(backend):
    step = Step(backend)
    expected = clones(step.run())
    step.rewind()
    for name in ("labels", "group_ids", "ref_logps"):
        setattr(step, name, getattr(step, name).to("cuda:1"))
    step.logits = step.logits.detach().to("cuda:1").requires_grad_()
    step.group_weights.to("cuda:1")
    assert_same([x.to(DEVICE) for x in step.run()], expected)
