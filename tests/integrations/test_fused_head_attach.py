"""attach_fused_head: the model's own forward answers with the log-probabilities of its logits, which never exist."""

from __future__ import annotations

import pytest
import torch
from head_models import (
    FAMILIES,
    assert_unhooked,
    batch,
    build,
    gradients,
    largest_made,
    through_the_logits,
    wide_llama,
)

from grpo_kernels import (
    FusedHeadOutput,
    GroupWeights,
    attach_fused_head,
    fused_grpo_loss,
    preference_loss,
    token_logps,
)

transformers = pytest.importorskip("transformers")

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
