"""Alpha is state: in every checkpoint, restored with the rest of the run, and never silently begun anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import TrainerCallback
from trl_runs import history, model, pairs, parameters, robust, stock, watch_alpha

from grpo_kernels import GroupWeights
from grpo_kernels.integrations.trl.checkpoint import FILE, load_group_weights, save_group_weights

RUN = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 3,
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
    "learning_rate": 1e-2,
    "group_lr": 0.1,
}


class DieAt(TrainerCallback):
    """Ends a run at a step, as if the power went."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("the power went")


@pytest.mark.parametrize(
    "changes",
    [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "data": pairs(22)},
     {"precompute_ref_log_probs": True, "save_only_model": False}],
    ids=["plain", "accumulated", "precomputed"],
)  # fmt: skip
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, changes):
    whole = robust(tmp_path / "whole", **RUN, **changes)
    path = watch_alpha(whole)
    whole.train()
    broken = robust(tmp_path / "broken", **RUN, **changes, callbacks=[DieAt(5)])
    with pytest.raises(RuntimeError, match="the power went"):
        broken.train()
    torch.manual_seed(99)  # the random streams of a new process are elsewhere
    resumed = robust(tmp_path / "broken", **RUN, **changes)
    rest = watch_alpha(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert len(rest) == 5  # from step 4 on
    assert all(torch.equal(one, other) for one, other in zip(path[3:], rest, strict=True))
    assert not torch.equal(path[2], path[7])
    mine, theirs = parameters(resumed), parameters(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert int(resumed.group_weights.num_updates) == 8
    assert history(resumed, "loss") == history(whole, "loss")
    assert history(resumed, "alpha/few") == history(whole, "alpha/few")


def test_every_checkpoint_and_the_saved_model_hold_alpha_with_the_names(tmp_path):
    trainer = robust(tmp_path, **RUN, save_only_model=True)
    path = watch_alpha(trainer)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder, step in (("checkpoint-3", 3), ("checkpoint-6", 6), ("checkpoint-8", 8), ("final", 8)):
        with safe_open(tmp_path / folder / FILE, framework="pt") as file:
            assert torch.equal(file.get_tensor("log_alpha"), path[step - 1])
            assert file.get_tensor("log_alpha").dtype == torch.float64
            assert '"few": ' in file.metadata()["groups"]


def test_a_checkpoint_without_alpha_is_not_resumed_from(tmp_path):
    stock(tmp_path, **{k: v for k, v in RUN.items() if k != "group_lr"}).train()
    with pytest.raises(ValueError, match=rf"checkpoint-8 must hold {FILE} to resume from.*start anew"):
        robust(tmp_path, **RUN).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    # Held at the prior there is nothing to restore.
    fixed = robust(tmp_path, **{**RUN, "max_steps": 9}, method="dpo")
    fixed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert fixed.state.global_step == 9


def test_a_checkpoint_of_other_groups_is_not_resumed_from(tmp_path):
    robust(tmp_path, **RUN).train()
    others = pairs(24).map(lambda row: {"group": row["group"] + "!"})
    with pytest.raises(ValueError, match=r"checkpoint-6.*does not fit: the state was saved for groups \['few', "):
        robust(tmp_path, data=others, **RUN).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_a_damaged_file_is_named(tmp_path):
    robust(tmp_path, **RUN).train()
    (tmp_path / "checkpoint-3" / FILE).write_bytes(b"half")
    with pytest.raises(ValueError, match=rf"checkpoint-3.{FILE} cannot be read"):
        robust(tmp_path, **RUN).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_groups_in_another_order_keep_their_weights(tmp_path):
    saved = GroupWeights.robust({"b": 2, "a": 5, "c": 3}, 0.5)
    saved.observe(torch.tensor([3.0, 2.0, 1.0]), torch.ones(3), torch.ones(3))
    saved.step()
    saved.observe(torch.ones(3), torch.ones(3), torch.ones(3))  # of a step that is never taken
    save_group_weights(tmp_path, saved)
    read = GroupWeights.robust({"a": 5, "b": 2, "c": 3}, 0.5)
    load_group_weights(tmp_path, read)
    assert torch.equal(read.log_alpha, saved.log_alpha[torch.tensor([1, 0, 2])])
    assert int(read.num_updates) == 1
    read.step()  # nothing is pending
    assert torch.equal(read.log_alpha, saved.log_alpha[torch.tensor([1, 0, 2])])


def test_the_best_model_has_its_alpha_back(tmp_path):
    trainer = robust(
        tmp_path, **{**RUN, "save_steps": 2}, eval_strategy="steps", eval_steps=2, eval_dataset=pairs(10, seed=5),
        load_best_model_at_end=True, metric_for_best_model="worst_group/loss",
    )  # fmt: skip
    path = watch_alpha(trainer)
    trainer.train()
    best = int(Path(trainer.state.best_model_checkpoint).name.split("-")[1])
    found = history(trainer, "eval_worst_group/loss")
    assert trainer.state.best_metric == min(found) == found[best // 2 - 1]
    assert best < 8
    assert torch.equal(trainer.group_weights.log_alpha, path[best - 1])
    assert not torch.equal(path[best - 1], path[-1])


def test_a_second_call_of_train_goes_on_with_alpha(tmp_path):
    trainer = robust(tmp_path, **{**RUN, "save_strategy": "no", "max_steps": 2}, policy=model())
    trainer.train()
    moved = trainer.group_weights.log_alpha.clone()
    path = watch_alpha(trainer)
    trainer.train()
    assert int(trainer.group_weights.num_updates) == 4
    assert not torch.equal(path[0], moved)


def test_what_a_broken_step_observed_is_forgotten(tmp_path):
    class BreakOnce(TrainerCallback):
        broken = False

        def on_substep_end(self, args, state, control, **kwargs):
            if not self.broken:
                self.broken = True
                raise KeyboardInterrupt

    changes = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.0,
        "group_lr": 0.1,
    }
    whole, broken = robust(tmp_path, **changes), robust(tmp_path, **changes, callbacks=[BreakOnce()])
    path, again = watch_alpha(whole), watch_alpha(broken)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert broken.group_weights.pending.any()
    broken.train()
    assert torch.equal(path[0], again[0])
