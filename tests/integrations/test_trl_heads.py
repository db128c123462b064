"""Where log-probabilities come from: this package's head if it can be had, else TRL's, which is said and as right."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trl_runs import furthest, history, model, parameters, robust, stock

from grpo_kernels import UnavailableBackendError
from grpo_kernels.integrations.trl import heads

peft = pytest.importorskip("peft")

EXACT = 1e-6
LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def assert_same_run(one, other):
    assert furthest(parameters(one), parameters(other)) < EXACT
    assert history(one, "loss") == pytest.approx(history(other, "loss"), abs=EXACT)
    assert len(set(history(one, "loss"))) > 3  # something was learnt


def test_the_fused_head_is_what_runs_unless_it_is_turned_off(tmp_path):
    fused, theirs = (robust(tmp_path, fused_head=flag, max_steps=1) for flag in (True, False))
    fused.train()
    theirs.train()
    # TRL's head tells the entropy, the fused one does not see a whole row of logits.
    assert "entropy" not in fused.state.log_history[0]
    assert "entropy" in theirs.state.log_history[0]
    assert fused._heads.fused(fused.ref_model)


def test_a_head_that_cannot_be_fused_is_said_once_and_trls_is_used(tmp_path, monkeypatch, caplog):
    def refuse(model, **options):
        raise ValueError("this model's head is odd")

    monkeypatch.setattr(heads, "attach_fused_head", refuse)
    odd, theirs = robust(tmp_path, group_lr=0.1), robust(tmp_path, group_lr=0.1, fused_head=False)
    with caplog.at_level(logging.WARNING, heads.__name__):
        odd.train()
    theirs.train()
    assert [r.message for r in caplog.records if r.name == heads.__name__] == [
        "the LM head is not fused: this model's head is odd; log-probabilities come from TRL's head instead"
    ]
    assert furthest(parameters(odd), parameters(theirs)) == 0


def test_a_backend_that_is_named_and_cannot_run_is_an_error(tmp_path):
    with pytest.raises(UnavailableBackendError, match="cuda"):
        robust(tmp_path, backend="cuda").train()


def test_the_settings_reach_the_head(tmp_path):
    trainer = robust(tmp_path, memory_budget=0, backend="torch", max_steps=1)
    trainer.train()
    attached = heads.attach_fused_head(trainer.model, memory_budget=0, backend="torch")  # that which stands
    assert (attached.options["memory_budget"], attached.options["backend"]) == (0, "torch")


def test_adapters_that_learn_a_prompt_train_with_trls_head(tmp_path, caplog):
    prompt = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    changes = {"peft_config": None, "learning_rate": 1.0}
    theirs = stock(tmp_path, **{**changes, "peft_config": peft.get_peft_config(dict(prompt))})
    ours = robust(tmp_path, method="dpo", **{**changes, "peft_config": peft.get_peft_config(dict(prompt))})
    theirs.train()
    ours.train()
    assert "adapters that learn a prompt" in caplog.text
    assert_same_run(theirs, ours)


def test_a_head_that_adapters_train_whole_is_fused_and_trains(tmp_path):
    config = {**LORA, "modules_to_save": ["lm_head"]}
    theirs = stock(tmp_path, peft_config=peft.LoraConfig(**config))
    ours = robust(tmp_path, method="dpo", peft_config=peft.LoraConfig(**config))
    before = model().lm_head.weight
    theirs.train()
    ours.train()
    assert "entropy" not in ours.state.log_history[0]
    assert_same_run(theirs, ours)
    trained = [tensor for name, tensor in parameters(ours).items() if "lm_head.modules_to_save" in name]
    assert (trained[0] - before).abs().max() > 1e-3


def test_a_mixture_of_experts_keeps_its_auxiliary_loss(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    def mixture():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return MixtralForCausalLM(
                MixtralConfig(
                    vocab_size=280, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, router_aux_loss_coef=0.5,
                    initializer_range=0.3, sliding_window=None,
                )
            )  # fmt: skip

    theirs = stock(tmp_path, policy=mixture(), ref_model=mixture())
    ours = robust(tmp_path, policy=mixture(), method="dpo")
    theirs.train()
    ours.train()
    assert "entropy" not in ours.state.log_history[0]
    assert history(ours, "aux_loss") == pytest.approx(history(theirs, "aux_loss"), abs=1e-5)
    assert_same_run(theirs, ours)


class Shapes(TorchDispatchMode):
    """The shapes of all that operations bring into being."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.seen.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("adapters", [True, False])
def test_adapters_need_no_gradient_of_the_head(tmp_path, adapters):
    trainer = robust(tmp_path, **({"peft_config": peft.LoraConfig(**LORA)} if adapters else {}), max_steps=1)
    trainer.train()  # the head is attached, the optimizer made
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.model.train()
    with Shapes() as shapes:
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
    head = trainer.model.get_output_embeddings().weight
    assert (head.grad is None) == adapters
    of_the_head = {shape for shape in shapes.seen if sorted(shape) == sorted(head.shape)}
    assert bool(of_the_head) != adapters  # and without adapters, where there must be one, it is seen
    # And no logits but of the tokens that are scored.
    scored = int(batch["completion_mask"][:, 1:].sum())
    assert max(math.prod(shape[:-1]) for shape in shapes.seen if shape[-1:] == (280,)) <= scored
