"""The same numbers: as TRL where groups make no difference, and as the method written out where they do."""

from __future__ import annotations

import pytest
import torch
from trl_runs import (
    by_hand,
    furthest,
    history,
    model,
    pairs,
    parameters,
    plain_logps,
    robust,
    stock,
    watch_alpha,
)

# float32 over five steps; measured 1.2e-7 on parameters and 4e-7 on losses.
EXACT = 1e-6
ONE_GROUP = {"many": 1}
HEADS = pytest.mark.parametrize("fused_head", [True, False])


def assert_same_run(one, other):
    assert furthest(parameters(one), parameters(other)) < EXACT
    assert history(one, "loss") == pytest.approx(history(other, "loss"), abs=EXACT)


@HEADS
@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "hinge"},
        {"loss_type": "ipo", "beta": 0.5, "learning_rate": 0.01},
        {"loss_type": "sigmoid_norm", "beta": 0.5},
        {"loss_type": "robust", "label_smoothing": 0.1},
    ],
    ids=lambda changes: changes["loss_type"],
)
def test_one_group_is_dpo(tmp_path, changes, fused_head):
    data = pairs(24, groups=ONE_GROUP)
    theirs = stock(tmp_path, data=data, **changes)
    ours = robust(tmp_path, data=data, group_lr=0.5, fused_head=fused_head, **changes)
    theirs.train()
    ours.train()
    assert_same_run(theirs, ours)
    assert len(set(history(ours, "loss"))) > 3  # it has learnt something, so the agreement means something


@HEADS
@pytest.mark.parametrize("changes", [{"group_lr": 0.0, "prior": "proportional"}, {"method": "dpo"}])
def test_weights_held_at_the_shares_are_dpo(tmp_path, changes, fused_head):
    theirs, ours = stock(tmp_path), robust(tmp_path, fused_head=fused_head, **changes)
    theirs.train()
    ours.train()
    assert_same_run(theirs, ours)


@HEADS
def test_what_trl_logs_is_still_logged_and_says_the_same(tmp_path, fused_head):
    theirs, ours = (
        make(tmp_path, eval_dataset=pairs(10, seed=5))
        for make in (stock, lambda *a, **k: robust(*a, method="dpo", fused_head=fused_head, **k))
    )
    for trainer in (theirs, ours):
        trainer.train()
        trainer.evaluate()
    of_tokens = {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}
    for mine, his in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        timing = {name for name in his if name.endswith(("runtime", "per_second"))}
        left_out = {name for name in his if name.removeprefix("eval_") in of_tokens} if fused_head else set()
        for name in his.keys() - timing - left_out:
            assert mine[name] == pytest.approx(his[name], abs=2e-5), name  # sums of 30 nats in float32


@pytest.mark.parametrize("estimator", ["importance", "group_mean"])
def test_a_run_is_algorithm_1_step_by_step(tmp_path, estimator):
    trainer = robust(tmp_path, group_lr=0.1, estimator=estimator, train_sampling_strategy="sequential")
    alphas = watch_alpha(trainer)
    trainer.train()
    policy = model()
    expected, losses = by_hand(trainer, policy, model(), size=4, steps=5, lag=False)
    assert torch.stack(alphas).sub(torch.stack(expected)).abs().max() < EXACT
    assert history(trainer, "loss") == pytest.approx(losses, abs=EXACT)
    assert furthest(parameters(trainer), policy.state_dict()) < EXACT
    assert (alphas[-1].exp() - 1 / 3).abs().max() > 0.01  # it has moved


def test_accumulation_with_fixed_weights_changes_nothing(tmp_path):
    whole = robust(tmp_path, method="is_dpo")
    parts = robust(tmp_path, method="is_dpo", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    whole.train()
    parts.train()
    assert_same_run(whole, parts)


def test_accumulation_with_moving_weights_lags_by_exactly_one_step(tmp_path):
    # 22 pairs make five windows of two micro-batches and a last one of a single, smaller micro-batch.
    trainer = robust(
        tmp_path, data=pairs(22), group_lr=0.1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        train_sampling_strategy="sequential", max_steps=-1, num_train_epochs=1,
    )  # fmt: skip
    alphas = watch_alpha(trainer)
    trainer.train()
    policy = model()
    expected, losses = by_hand(trainer, policy, model(), size=4, steps=6, lag=True)
    assert len(alphas) == 6
    assert torch.stack(alphas).sub(torch.stack(expected)).abs().max() < EXACT
    assert history(trainer, "loss") == pytest.approx(losses, abs=EXACT)
    assert furthest(parameters(trainer), policy.state_dict()) < EXACT
    unlagged = model()
    by_hand(trainer, unlagged, model(), size=4, steps=6, lag=False)
    assert furthest(parameters(trainer), unlagged.state_dict()) > 100 * EXACT  # and the lag is there to be seen


@pytest.mark.parametrize("estimator", ["importance", "group_mean"])
def test_accumulation_moves_alpha_as_the_whole_batch_would(tmp_path, estimator):
    # A policy that stands still has the same losses either way, so alpha must take the same path.
    common = {"learning_rate": 0.0, "ref_model": model(seed=7), "group_lr": 0.1, "estimator": estimator}
    whole = robust(tmp_path, **common)
    parts = robust(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **common)
    paths = [watch_alpha(trainer) for trainer in (whole, parts)]
    whole.train()
    parts.train()
    one, other = (torch.stack(path) for path in paths)
    assert (one - other).abs().max() < EXACT
    assert (one[-1] - one[0]).abs().max() > 0.1


@pytest.mark.parametrize("adapters", [False, True])
def test_a_precomputed_reference_is_the_same_reference(tmp_path, adapters, lora):
    changes = {"group_lr": 0.1, "eval_dataset": pairs(6, seed=5)} | ({"peft_config": lora} if adapters else {})
    online, before = (robust(tmp_path, precompute_ref_log_probs=flag, **changes) for flag in (False, True))
    online.train()
    before.train()
    assert_same_run(online, before)
    assert online.evaluate()["eval_loss"] == pytest.approx(before.evaluate()["eval_loss"], abs=EXACT)


@HEADS
def test_checkpointed_activations_change_nothing(tmp_path, fused_head):
    kept, recomputed = (
        robust(tmp_path, group_lr=0.1, gradient_checkpointing=flag, fused_head=fused_head) for flag in (False, True)
    )
    kept.train()
    recomputed.train()
    assert recomputed.model.is_gradient_checkpointing
    assert furthest(parameters(kept), parameters(recomputed)) == 0
    assert torch.equal(kept.group_weights.log_alpha, recomputed.group_weights.log_alpha)


@HEADS
def test_adapters_train_as_trl_trains_them_with_themselves_disabled_as_reference(tmp_path, lora, fused_head):
    theirs = stock(tmp_path, peft_config=lora)
    ours = robust(tmp_path, method="dpo", peft_config=lora, fused_head=fused_head)
    theirs.train()
    ours.train()
    assert ours.ref_model is None
    assert_same_run(theirs, ours)
    assert len(set(history(ours, "loss"))) > 3


def test_the_reference_of_a_model_in_memory_is_the_model_in_memory(tmp_path):
    # Loaded from a folder and changed since: what its name leads to is not what training starts from.
    model(seed=1).save_pretrained(tmp_path / "saved")
    policy = type(model()).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.5)
    trainer = robust(tmp_path, policy=policy)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    started_from = plain_logps(policy, batch).detach()
    trainer.train()
    # The first step has rewards of 0, and afterwards the reference is where the policy was.
    assert history(trainer, "rewards/margins")[0] == 0
    assert (plain_logps(trainer.ref_model, batch) - started_from).abs().max() < 1e-5
    assert (plain_logps(trainer.model, batch) - started_from).abs().max() > 0.1
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())


def test_a_model_named_by_its_folder_trains_as_the_model_itself(tmp_path):
    model().save_pretrained(tmp_path / "saved")
    named, given = robust(tmp_path, policy=str(tmp_path / "saved"), group_lr=0.1), robust(tmp_path, group_lr=0.1)
    named.train()
    given.train()
    assert furthest(parameters(named), parameters(given)) == 0
    assert torch.equal(named.group_weights.log_alpha, given.group_weights.log_alpha)


def test_a_model_trained_twice_has_a_new_reference_each_time(tmp_path):
    policy = model()
    robust(tmp_path, policy=policy).train()
    again = robust(tmp_path, policy=policy)
    again.train()
    assert history(again, "rewards/margins")[0] == 0
    assert history(again, "loss")[0] != history(again, "loss")[1]


def test_a_model_that_cannot_be_copied_nor_loaded_again_needs_a_reference(tmp_path):
    policy = model()
    policy.is_quantized = True
    with pytest.raises(ValueError, match="ref_model must be given: the model is quantized, so it cannot be copied"):
        robust(tmp_path, policy=policy)
    policy.is_quantized = False
    assert robust(tmp_path, policy=policy, ref_model=model(seed=2)).ref_model is not None


@pytest.fixture
def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
