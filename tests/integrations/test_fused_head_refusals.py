"""What attach_fused_head cannot serve is refused, with the reason, and the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from head_models import FAMILIES, SMALL, VOCABULARY, assert_unhooked, batch, build

from grpo_kernels import UnavailableBackendError, attach_fused_head

transformers = pytest.importorskip("transformers")


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
