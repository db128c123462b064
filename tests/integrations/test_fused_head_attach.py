"""attach_fused_head: the model's own forward answers with the log-probabilities of its logits, which never exist."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import (
    FusedHeadOutput,
    GroupWeights,
    UnavailableBackendError,
    attach_fused_head,
    fused_grpo_loss,
    preference_loss,
    token_logps,
)

transformers = pytest.importorskip("transformers")

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def family(name, **more):
    """A function from `tied` to a model of this family."""

    def make(tied):
        config = getattr(transformers, f"{name}Config")(**SMALL, **TOKENS, tie_word_embeddings=tied, **more)
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return make


def gpt2(tied):
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0, resid_pdrop=0,
        embd_pdrop=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def phi(tied):
    """Its head has a bias."""
    config = transformers.PhiConfig(**SMALL, **TOKENS, tie_word_embeddings=tied)
    model = transformers.PhiForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias)
    return model


FAMILIES = {
    "llama": family("Llama"),
    "qwen2": family("Qwen2"),
    "gemma": family("Gemma"),
    "gemma2, softcap": family("Gemma2", final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "gpt2": gpt2,
    "phi, bias": phi,
    "cohere, logit scale": family("Cohere", logit_scale=0.25),
    "granite, logits scaling": family("Granite", logits_scaling=3.0),
}


def build(name="llama", tied=False, dtype=torch.float32):
    torch.manual_seed(0)
    return FAMILIES[name](tied).to(dtype).train()


def batch(sequences=6, length=11, seed=3):
    """Inputs, and labels with prompts and padding ignored; one sequence has none at all."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (sequences, length), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :4] = -100
    for row in range(1, sequences):
        labels[row, length - row % 4 :] = -100
        mask[row, length - row % 4 :] = 0
    labels[-1] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def through_the_logits(model, inputs, labels, slopes):
    model.zero_grad()
    logps = token_logps(model(**inputs).logits, labels)
    (logps * slopes).sum().backward()
    return logps.detach(), gradients(model)


def assert_unhooked(model):
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


# --- what it computes


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", FAMILIES)
def test_log_probabilities_and_gradients_are_those_of_the_logits(name, tied):
    model = build(name, tied, torch.float64)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    inputs, labels = batch()
    slopes = torch.randn(labels.shape, dtype=torch.float64)
    expected, expected_gradients = through_the_logits(model, inputs, labels, slopes)
    with attach_fused_head(model):
        model.zero_grad()
        out = model(**inputs, fused_labels=labels)
        (out.token_logps * slopes).sum().backward()
    assert isinstance(out, FusedHeadOutput)
    torch.testing.assert_close(out.token_logps, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(out.sequence_logps, expected.sum(dim=1), rtol=1e-12, atol=1e-13)
    found = gradients(model)
    assert found.keys() == expected_gradients.keys()
    for parameter, gradient in expected_gradients.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-9, atol=1e-12, msg=parameter)


def test_sums_carry_gradients_and_are_the_loss_of_the_logits():
    model = build()
    inputs, labels = batch()
    rest = (torch.linspace(-30, -20, 6), torch.tensor([0, 1, 1]), GroupWeights.balanced([5, 9]))
    expected = fused_grpo_loss(model(**inputs).logits, labels, *rest).loss
    expected.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    attach_fused_head(model)
    found = preference_loss(model(**inputs, fused_labels=labels).sequence_logps, *rest).loss
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected_gradients[parameter], rtol=1e-4, atol=1e-6, msg=parameter)


def test_a_half_precision_model_answers_in_float32_within_the_error_of_its_logits():
    model = build(dtype=torch.bfloat16)
    inputs, labels = batch()
    attach_fused_head(model)
    with torch.no_grad():
        out = model(**inputs, fused_labels=labels, output_hidden_states=True)
        logits = model(**inputs).logits
        exact = out.model_output.hidden_states[-1].double() @ model.lm_head.weight.double().T
    assert out.sequence_logps.dtype is out.token_logps.dtype is torch.float32
    expected = token_logps(exact, labels)
    error, plain_error = ((logps - expected).abs().max() for logps in (out.token_logps, token_logps(logits, labels)))
    assert error <= plain_error + 1e-6


def test_what_else_the_model_returns_is_there_without_its_logits():
    model = build()
    inputs, labels = batch()
    attach_fused_head(model)
    out = model(**inputs, fused_labels=labels, output_hidden_states=True).model_output
    assert len(out.hidden_states) == 3
    assert out.logits.numel() == 0
    assert out.past_key_values is None, "a cache nobody asked for"


class Shapes(TorchDispatchMode):
    """The number of elements of everything that was made anew, but for views of parameters."""

    def __init__(self, model):
        super().__init__()
        self.known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.made.append(tensor.numel())
        return result


def largest_made(model, inputs, labels):
    attach_fused_head(model, memory_budget=0, backend="torch")
    with Shapes(model) as shapes:
        model(**inputs, fused_labels=labels).sequence_logps.sum().backward()
    return max(shapes.made)


def wide_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SMALL, "vocab_size": 40000})
    return transformers.LlamaForCausalLM(config)


def test_logits_never_exist():
    inputs, labels = batch(sequences=8, length=20)
    rows = int((labels[:, 1:] != -100).sum())
    assert labels.numel() * 40000 > rows * 16384  # so that a tile of all labelled rows is less than the logits
    assert largest_made(wide_llama(), inputs, labels) < labels.numel() * 40000


# --- adapters


def with_adapters(model, **more):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **more))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_adapters_elsewhere_leave_the_head_without_a_gradient_or_a_tensor_of_its_size():
    inputs, labels = batch(sequences=2)
    labels[:, :7] = -100  # few rows, so that a tile is smaller than the weight
    model = with_adapters(wide_llama())
    weight = model.get_output_embeddings().weight
    assert largest_made(model, inputs, labels) < weight.numel()
    assert weight.grad is None
    assert any(parameter.grad is not None for parameter in model.parameters())
    trained = with_adapters(wide_llama(), modules_to_save=["lm_head"])
    assert largest_made(trained, inputs, labels) >= weight.numel()  # which the measurement above would have seen


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_head_trained_whole_beside_adapters(tied):
    model = with_adapters(build(tied=tied, dtype=torch.float64), modules_to_save=["lm_head"])
    inputs, labels = batch()
    slopes = torch.randn(labels.shape, dtype=torch.float64)
    expected, expected_gradients = through_the_logits(model, inputs, labels, slopes)
    model.zero_grad()
    with attach_fused_head(model):
        out = model(**inputs, fused_labels=labels)
        (out.token_logps * slopes).sum().backward()
        torch.testing.assert_close(out.token_logps, expected, rtol=1e-12, atol=1e-13)
        found = gradients(model)
        assert any("lm_head" in name for name in found)
        assert found.keys() == expected_gradients.keys()
        for parameter, gradient in expected_gradients.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-9, atol=1e-12, msg=parameter)
        # The reference is the model without adapters, and without the trained copy of its head.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.mul_(2)
            with model.disable_adapter():
                reference = model(**inputs, fused_labels=labels).token_logps
                torch.testing.assert_close(reference, token_logps(model(**inputs).logits, labels), rtol=1e-12, atol=0)
            assert not torch.allclose(reference, model(**inputs, fused_labels=labels).token_logps)
    assert_unhooked(model)


def test_an_adapter_on_the_head_is_refused_with_what_to_do():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"LoRA adapter.*take the head out of target_modules.*modules_to_save"):
        attach_fused_head(model)
    assert_unhooked(model)


def test_a_head_that_was_exchanged_since_is_noticed():
    model = with_adapters(build(), modules_to_save=["lm_head"])
    attach_fused_head(model)
    peft = pytest.importorskip("peft")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.set_adapter("second")
    inputs, labels = batch()
    with pytest.raises(RuntimeError, match="attach it again"):
        model(**inputs, fused_labels=labels)


# --- it leaves alone what it was not asked for


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


# --- what is refused


class Louder(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 3
        return out


class Wordier(transformers.LlamaForCausalLM):
    """Forbids a word, as models do whose vocabulary has words that are no text."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.index_fill(-1, torch.tensor([7]), -torch.inf)
        return out


@pytest.mark.parametrize("kind", [Louder, Wordier])
@pytest.mark.parametrize("scale", [1.0, 1e-6], ids=["", "small weights"])
def test_a_model_that_does_more_to_its_logits_is_found_out_whatever_its_weights(kind, scale):
    model = kind(transformers.LlamaConfig(**SMALL))
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    with pytest.raises(ValueError, match="something between hidden states and logits"):
        attach_fused_head(model)
    assert_unhooked(model)


def test_a_head_that_is_more_than_its_weight_is_found_out():
    model = build()
    plain = model.lm_head.forward
    model.lm_head.forward = lambda hidden: plain(hidden) + 1
    with pytest.raises(ValueError, match="something between hidden states and logits"):
        attach_fused_head(model)
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, VOCABULARY))
    with pytest.raises(ValueError, match="a Sequential, not a plain linear layer"):
        attach_fused_head(model)
    assert_unhooked(model)


def test_a_model_that_needs_more_than_ids_is_tried_on_an_example():
    class Particular(transformers.LlamaForCausalLM):
        def forward(self, *args, topic, **kwargs):
            return super().forward(*args, **kwargs)

    model = Particular(transformers.LlamaConfig(**SMALL))
    with pytest.raises(ValueError, match=r"with two input_ids alone failed: .*topic"):
        attach_fused_head(model)
    attach_fused_head(model, example={"input_ids": torch.ones(1, 3, dtype=torch.int64), "topic": "any"})
    inputs, labels = batch()
    assert model(**inputs, topic="any", fused_labels=labels).sequence_logps.shape == (6,)


def test_models_without_a_head_or_without_parameters_are_refused():
    with pytest.raises(TypeError, match="must be a torch"):
        attach_fused_head("llama")
    with pytest.raises(ValueError, match="does not say which part of it is the LM head"):
        attach_fused_head(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="does not say which part of it is the LM head"):
        attach_fused_head(build().model)
    with torch.device("meta"):
        model = FAMILIES["llama"](tied=False)
    with pytest.raises(ValueError, match="meta device"):
        attach_fused_head(model)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"backend": "abacus"}, ValueError),
        ({"backend": "cuda"}, UnavailableBackendError),
        ({"memory_budget": -1}, ValueError),
        ({"memory_budget": None}, TypeError),
        ({"ignore_index": 0.5}, TypeError),
    ],
)
def test_bad_options_are_refused_when_attaching(options, error):
    if options.get("backend") == "cuda" and torch.cuda.is_available():
        pytest.skip("is available here")
    model = build()
    with pytest.raises(error, match=f"{next(iter(options))}|cuda"):
        attach_fused_head(model, **options)
    assert_unhooked(model)


def test_labels_that_do_not_fit_are_refused():
    model = build()
    inputs, labels = batch()
    attach_fused_head(model)
    with pytest.raises(ValueError, match=r"fused_labels must be a tensor of shape \(sequences, tokens\)"):
        model(**inputs, fused_labels=labels.tolist())
    with pytest.raises(ValueError, match=r"labels must not be given with fused_labels"):
        model(**inputs, labels=labels, fused_labels=labels)
    with pytest.raises(ValueError, match=r"fused_labels must have shape \(6, 11\)"):
        model(**inputs, fused_labels=labels[:, 1:])
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(**inputs, fused_labels=labels, logits_to_keep=4)
    with pytest.raises(TypeError, match="labels must be an int"):
        model(**inputs, fused_labels=labels.float())
    with pytest.raises(ValueError, match=r"labels must be in \[0, 61\)"):
        model(**inputs, fused_labels=labels + 30)
    assert model(**inputs, fused_labels=labels).sequence_logps.shape == (6,)


def test_a_head_that_runs_twice_or_never_is_refused():
    class Twice(transformers.LlamaForCausalLM):
        times = 1

        def forward(self, *args, **kwargs):
            hidden = self.model(kwargs["input_ids"]).last_hidden_state
            logits = [self.lm_head(hidden) for _ in range(self.times)]
            return transformers.modeling_outputs.CausalLMOutput(logits=logits[0] if logits else hidden)

    model = Twice(transformers.LlamaConfig(**SMALL))
    inputs, labels = batch()
    attach_fused_head(model)
    model.times = 2
    with pytest.raises(RuntimeError, match="ran twice"):
        model(**inputs, fused_labels=labels)
    model.times = 0
    with pytest.raises(RuntimeError, match="did not run"):
        model(**inputs, fused_labels=labels)
