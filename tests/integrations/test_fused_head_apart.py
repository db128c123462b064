"""attach_fused_head leaves alone what it was not asked for: copies, threads, checkpointing, hooks, the compiler."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from head_models import SMALL, VOCABULARY, assert_unhooked, batch, build, gradients, through_the_logits

from grpo_kernels import attach_fused_head, token_logps

transformers = pytest.importorskip("transformers")


def test_a_call_without_labels_is_what_it_was():
    model = build().eval()
    inputs, labels = batch()
    before, tokens = model(**inputs), model.generate(**inputs, max_new_tokens=5, do_sample=False)
    handle = attach_fused_head(model)
    model(**inputs, fused_labels=labels)
    for _ in range(2):
        after = model(**inputs)
        assert type(after) is type(before)
        assert torch.equal(after.logits, before.logits)
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)
        handle.remove()
    handle.remove()
    assert_unhooked(model)


def test_attaching_twice_gives_the_handle_that_stands():
    model = build()
    handle = attach_fused_head(model)
    assert attach_fused_head(model) is handle
    with pytest.raises(ValueError, match="attached to this model with"):
        attach_fused_head(model, memory_budget=0)
    handle.remove()
    with attach_fused_head(model, memory_budget=0) as another:
        assert another is not handle
    assert_unhooked(model)


def test_attaching_moves_neither_modes_nor_random_numbers():
    model = build()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    attach_fused_head(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


def test_copies_and_pickles_have_a_fused_head_of_their_own():
    model = build()
    inputs, labels = batch()
    handle = attach_fused_head(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    expected = model(**inputs, fused_labels=labels).sequence_logps
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert torch.equal(other(**inputs, fused_labels=labels).sequence_logps, expected)
        with torch.no_grad():
            other.lm_head.weight.zero_()
        uniform = -(labels[:, 1:] != -100).sum(dim=1) * torch.tensor(VOCABULARY).log()
        torch.testing.assert_close(other(**inputs, fused_labels=labels).sequence_logps, uniform)
        own = attach_fused_head(other)
        assert own is not handle
        own.remove()
        assert_unhooked(other)
    assert torch.equal(model(**inputs, fused_labels=labels).sequence_logps, expected)


def test_a_model_is_saved_as_without(tmp_path):
    model = build()
    attach_fused_head(model)
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert_unhooked(again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["layer", "after the head"])
def test_a_forward_that_breaks_off_leaves_nothing_behind(error, place):
    class Breaking(transformers.LlamaForCausalLM):
        breaks = False

        def forward(self, *args, **kwargs):
            if self.breaks and place == "layer":
                raise error("here")
            out = super().forward(*args, **kwargs)
            if self.breaks:
                raise error("here")
            return out

    model = Breaking(transformers.LlamaConfig(**SMALL))
    inputs, labels = batch()
    expected = model(**inputs).logits
    attach_fused_head(model)
    model.breaks = True
    with pytest.raises(error, match="here"):
        model(**inputs, fused_labels=labels)
    model.breaks = False
    assert torch.equal(model(**inputs).logits, expected)
    torch.testing.assert_close(
        model(**inputs, fused_labels=labels).token_logps, token_logps(expected, labels), rtol=1e-5, atol=1e-6
    )


def test_threads_do_not_see_each_others_labels():
    model = build().requires_grad_(False)
    attach_fused_head(model)
    batches = [batch(sequences=2 + i, length=8 + i, seed=i) for i in range(4)]
    expected = [model(**inputs, fused_labels=labels).sequence_logps for inputs, labels in batches]
    logits = model(**batches[0][0]).logits
    wrong, barrier = [], threading.Barrier(5)

    def score(i):
        barrier.wait()
        for _ in range(20):
            inputs, labels = batches[i]
            if not torch.equal(model(**inputs, fused_labels=labels).sequence_logps, expected[i]):
                wrong.append(i)

    def ask_for_logits():
        barrier.wait()
        for _ in range(20):
            if not torch.equal(model(**batches[0][0]).logits, logits):
                wrong.append("logits")

    threads = [threading.Thread(target=score, args=(i,)) for i in range(4)] + [threading.Thread(target=ask_for_logits)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


# --- what wraps it


def test_checkpointed_layers_change_nothing():
    model = build(dtype=torch.float64)
    inputs, labels = batch()
    attach_fused_head(model)
    results = []
    for _ in range(2):
        model.zero_grad()
        out = model(**inputs, fused_labels=labels)
        out.sequence_logps.sum().backward()
        results.append((out.sequence_logps.detach(), gradients(model)))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(gradient, results[1][1][name]) for name, gradient in results[0][1].items())


@pytest.mark.parametrize("order", ["attached first", "compiled first", "in place"])
def test_a_compiled_model_is_one_graph(order):
    torch._dynamo.reset()
    model = build()
    inputs, labels = batch()
    slopes = torch.ones(labels.shape)
    expected, expected_gradients = through_the_logits(model, inputs, labels, slopes)
    model.zero_grad()
    settings = {"fullgraph": True, "backend": "aot_eager"}
    if order == "attached first":
        attach_fused_head(model)
        compiled = torch.compile(model, **settings)
    elif order == "compiled first":
        compiled = torch.compile(model, **settings)
        compiled(**inputs)
        attach_fused_head(compiled)
    else:
        model.compile(**settings)
        attach_fused_head(model)
        compiled = model
    out = compiled(**inputs, fused_labels=labels)
    out.sequence_logps.sum().backward()
    torch.testing.assert_close(out.token_logps, expected, rtol=1e-5, atol=1e-5)
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected_gradients[parameter], rtol=1e-4, atol=1e-5, msg=parameter)
    torch.testing.assert_close(token_logps(compiled(**inputs).logits, labels), expected, rtol=1e-5, atol=1e-5)


def test_hooks_of_others_see_the_log_probabilities_and_may_replace_them():
    """As DeepSpeed's do, which put an autograd Function around what a module takes and what it returns."""
    model = build()
    attach_fused_head(model)
    seen = []

    def after(module, args, output):
        seen.append(tuple(output.shape))
        return output * 1

    def before(module, args):
        return (args[0] * 1,)

    model.lm_head.register_forward_hook(after)
    model.lm_head.register_forward_pre_hook(before)
    inputs, labels = batch()
    out = model(**inputs, fused_labels=labels)
    assert seen == [tuple(labels.shape)]
    assert out.token_logps.grad_fn.name() == "MulBackward0"
