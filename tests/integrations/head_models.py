"""Small models of many families for the tests of attach_fused_head, and what is looked for in them."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import attach_fused_head, token_logps

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
