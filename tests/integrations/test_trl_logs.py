"""What is logged: each group and the worst, under the name of its evaluation set; alpha while training."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from trl_runs import history, model, pairs, plain_logps, robust, rows

from grpo_kernels.integrations.trl.metrics import GroupTally, alpha_metrics, report_metrics


def by_group(trainer, policy, reference, data):
    """name → (losses, margins), each pair by itself and from the logits."""
    prepared = trainer._prepare_dataset(data, trainer.processing_class, trainer.args, "again")
    found = {name: ([], []) for name in trainer.group_weights.names}
    for i in range(len(prepared)):
        batch = trainer.data_collator([prepared[i]])
        with torch.no_grad():
            chosen, rejected = plain_logps(policy, batch) - plain_logps(reference, batch)
        losses, margins = found[prepared[i]["group"]]
        margins.append(float(chosen - rejected))
        losses.append(math.log1p(math.exp(-trainer.args.beta * margins[-1])))
    return found


def mean(values):
    return sum(values) / len(values)


def test_evaluation_reports_every_group_and_the_worst(tmp_path):
    held_out = pairs(11, seed=5)  # three batches, the last not full
    trainer = robust(tmp_path, group_lr=0.1)
    trainer.train()
    metrics = trainer.evaluate(held_out)
    expected = by_group(trainer, trainer.model, model(), held_out)
    for name, (losses, margins) in expected.items():
        assert metrics[f"eval_group_{name}/n"] == len(losses)
        assert metrics[f"eval_group_{name}/loss"] == pytest.approx(mean(losses), abs=1e-5)
        assert metrics[f"eval_group_{name}/margin"] == pytest.approx(mean(margins), abs=1e-4)
        assert metrics[f"eval_group_{name}/accuracy"] == mean([margin > 0 for margin in margins])
    worst = max(expected, key=lambda name: mean(expected[name][0]))
    for field in ("loss", "margin", "accuracy", "n"):
        assert metrics[f"eval_worst_group/{field}"] == metrics[f"eval_group_{worst}/{field}"]
    assert trainer.group_weights.names[metrics["eval_worst_group/index"]] == worst
    every = [loss for losses, _ in expected.values() for loss in losses]
    assert metrics["eval_loss"] == pytest.approx(mean(every), abs=1e-5)  # of pairs, as DPO's
    assert trainer.state.log_history[-1]["eval_worst_group/loss"] == metrics["eval_worst_group/loss"]


def test_metrics_of_ones_own_still_get_logits(tmp_path):
    seen = {}

    def compute_metrics(prediction):
        seen["logits"], seen["ids"] = prediction.predictions, prediction.label_ids
        return {"scored": len(prediction.label_ids)}

    metrics = robust(tmp_path, compute_metrics=compute_metrics).evaluate(pairs(4, seed=5))
    assert seen["logits"].shape == (*seen["ids"].shape, 280)
    assert metrics["eval_scored"] == 8  # replies
    assert metrics["eval_worst_group/n"] > 0


def test_several_evaluation_sets_do_not_share_names(tmp_path):
    sets = {"here": pairs(8, seed=5), "there": pairs(7, seed=6)}
    trainer = robust(tmp_path, eval_dataset=sets, eval_strategy="steps", eval_steps=5, group_lr=0.1)
    trainer.train()
    lines = [line for line in trainer.state.log_history if any("worst_group" in key and "eval" in key for key in line)]
    assert len(lines) == 2
    ours = [{key for key in line if "group" in key} for line in lines]
    assert not ours[0] & ours[1]
    for name, data in sets.items():
        expected = by_group(trainer, trainer.model, model(), data)
        line = next(line for line in lines if f"eval_{name}_loss" in line)
        for group, (losses, _) in expected.items():
            assert line[f"eval_{name}_group_{group}/loss"] == pytest.approx(mean(losses), abs=1e-5)
            assert line[f"eval_{name}_group_{group}/n"] == len(losses)
    again = trainer.evaluate()
    assert {"eval_here_worst_group/loss", "eval_there_worst_group/loss"} <= set(again)


def test_a_group_without_pairs_in_the_evaluation_set_is_said_to_have_none(tmp_path):
    held_out = Dataset.from_list([row for row in rows(20, seed=5) if row["group"] != "few"])
    metrics = robust(tmp_path).evaluate(held_out)
    assert metrics["eval_group_few/n"] == 0
    assert "eval_group_few/loss" not in metrics
    assert metrics["eval_worst_group/index"] != 0


def test_training_logs_alpha_and_the_groups_since_the_line_before(tmp_path):
    trainer = robust(tmp_path, group_lr=0.1, logging_steps=2, max_steps=4)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for line in lines:
        assert sum(line[f"group_{name}/n"] for name in trainer.group_weights.names) == 8
        assert sum(line[f"alpha/{name}"] for name in trainer.group_weights.names) == pytest.approx(1)
        assert line["alpha_steps_skipped"] == 0
    assert [
        lines[-1][f"alpha/{name}"] for name in trainer.group_weights.names
    ] == trainer.group_weights.weights.tolist()
    assert lines[0]["alpha/few"] != lines[1]["alpha/few"]


def test_a_step_that_is_not_finite_is_counted_and_does_not_move_alpha(tmp_path):
    policy = model()
    with torch.no_grad():
        policy.lm_head.weight[0] = torch.nan
    trainer = robust(tmp_path, policy=policy, ref_model=model(), group_lr=0.1, max_steps=2)
    trainer.train()
    assert history(trainer, "alpha_steps_skipped")[-1] == 2
    assert trainer.group_weights.weights.tolist() == pytest.approx([1 / 3] * 3)


def test_with_many_groups_only_the_worst_is_logged(tmp_path):
    data = pairs(24).map(lambda row, i: {"group": i}, with_indices=True)
    trainer = robust(tmp_path, data=data, group_lr=0.01, max_logged_groups=20, max_steps=2)
    trainer.train()
    metrics = trainer.evaluate(data.select(range(6)))
    for keys in (metrics, trainer.state.log_history[0]):
        assert not [key for key in keys if "group_2/" in key or key.startswith("alpha/")]
        assert [key for key in keys if "worst_group/loss" in key]
    assert 23 < trainer.state.log_history[0]["alpha_effective_groups"] <= 24


def test_the_tally_is_a_mean_by_group():
    tally = GroupTally(["a", "b"])
    assert tally.report() is None
    assert report_metrics(None, 10) == {}
    tally.add(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]).double(), torch.tensor([0.0, 3.0]).double())
    tally.add(torch.tensor([0]), torch.tensor([0.5]).double(), torch.tensor([1.0]).double())
    metrics = report_metrics(tally.report(), 10)
    assert metrics["group_b/loss"] == metrics["worst_group/loss"] == 1.5
    assert (metrics["group_b/accuracy"], metrics["group_b/margin"], metrics["group_b/n"]) == (0.5, 1.5, 2)
    assert metrics["worst_group/index"] == 1
    tally.clear()
    assert tally.report() is None


def test_effective_groups_are_all_where_alpha_is_flat_and_one_at_a_corner():
    flat, corner = torch.full((4,), 0.25).double(), torch.tensor([1.0, 0, 0, 0]).double()
    assert alpha_metrics("abcd", flat, 4)["alpha_effective_groups"] == pytest.approx(4)
    assert alpha_metrics("abcd", corner, 4)["alpha_effective_groups"] == pytest.approx(1)
    assert set(alpha_metrics("abcd", flat, 3)) == {"alpha_effective_groups"}


def test_the_model_card_names_the_method(tmp_path):
    trainer = robust(tmp_path)
    trainer.create_model_card(model_name="m")
    card = (tmp_path / "README.md").read_text()
    assert "Group Robust DPO" in card
    assert "2405.20304" in card
