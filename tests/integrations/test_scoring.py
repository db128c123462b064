"""The fused head and the model's own logits give the same losses and gradients, or the first is not used."""

from __future__ import annotations

import logging

import pytest
import torch

from grpo_kernels import GroupWeights
from grpo_kernels.trainer.config import LossConfig
from grpo_kernels.trainer.model.scoring import fused_head_unavailable, group_loss, reply_logps

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def llama(**more):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **more))


def gemma2():
    config = transformers.Gemma2Config(**SMALL, final_logit_softcapping=2.0, query_pre_attn_scalar=8)
    return transformers.Gemma2ForCausalLM(config)


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
        )
    )


MODELS = {
    "llama": llama,
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL)),
    "gemma2, softcap": gemma2,
    "gpt2": gpt2,
    "cohere, logit scale": lambda: transformers.CohereForCausalLM(
        transformers.CohereConfig(**SMALL, logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ),
    "granite, logits scaling": lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**SMALL, logits_scaling=3.0)
    ),
}


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().train()


def batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 61, (6, 11), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :4] = -100
    for row, padding in enumerate((0, 1, 2, 3, 0, 2)):
        if padding:
            labels[row, -padding:] = -100
            mask[row, -padding:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "group_ids": torch.tensor([0, 1, 1])}


def run(model, fused, **more):
    """(output, gradients by name, alpha) of one step with a moving alpha."""
    model.zero_grad()
    weights = GroupWeights.robust([5, 9], 0.3)
    ref_logps = torch.linspace(-30, -20, 6)
    out = group_loss(model, batch(), ref_logps, weights, LossConfig(fused_head=fused), **more)
    out.loss.backward()
    return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, weights.weights


def assert_same_both_ways(model):
    assert fused_head_unavailable(model, batch()) is None
    (plain, plain_grads, plain_alpha), (fused, fused_grads, fused_alpha) = run(model, False), run(model, True)
    torch.testing.assert_close(fused.losses, plain.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused_alpha, plain_alpha, rtol=1e-6, atol=0)
    assert fused_grads.keys() == plain_grads.keys()
    for name, expected in plain_grads.items():
        scale = max(float(expected.abs().max()), 1e-3)
        torch.testing.assert_close(fused_grads[name], expected, rtol=1e-4, atol=1e-5 * scale, msg=name)
    with torch.no_grad():
        logps = [reply_logps(model, batch(), LossConfig(fused_head=way)) for way in (False, True)]
    torch.testing.assert_close(*logps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_both_ways_give_the_same_losses_gradients_and_alpha(name):
    assert_same_both_ways(build(name))


def test_gradient_checkpointing_changes_nothing():
    model = build("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_both_ways(model)


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}], ids=["frozen head", "trained head"])
def test_adapters(more):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **more))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    assert_same_both_ways(model)
    gradients = run(model, True)[1]
    assert any("lm_head" in name for name in gradients) == bool(more)


def test_an_adapter_on_the_head_itself_goes_through_the_logits_and_says_so(caplog):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with caplog.at_level(logging.WARNING):
        fused, plain = run(model, True), run(model, False)
    assert "not a plain linear layer" in caplog.text
    assert torch.equal(fused[0].losses, plain[0].losses)
    assert any("lm_head" in name and "lora_A" in name for name in fused[1])


def test_a_model_that_does_more_to_its_logits_goes_through_them(caplog):
    class Louder(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 3
            return out

    torch.manual_seed(0)
    model = Louder(transformers.LlamaConfig(**SMALL)).train()
    with caplog.at_level(logging.WARNING):
        fused, plain = run(model, True), run(model, False)
    assert "something between hidden states and logits" in caplog.text
    assert torch.equal(fused[0].losses, plain[0].losses)
    assert model.training


def test_autocast_is_honoured_both_ways():
    model = build("llama")
    exact = run(model, False)[0].losses
    for fused in (False, True):
        out, gradients, _ = run(model, fused, bf16=True)
        assert out.losses.dtype is torch.float32
        assert all(gradient.dtype is torch.float32 for gradient in gradients.values())
        torch.testing.assert_close(out.losses, exact, rtol=2e-2, atol=2e-2)
        assert not torch.equal(out.losses, exact)
