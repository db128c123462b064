"""What the held-out report says: means by group, the worst marked, and nothing disturbed by asking."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_runs import tiny_config

from grpo_kernels.trainer.config import LossConfig
from grpo_kernels.trainer.data import PreferenceCollator, pair_texts, read_pairs, tokenize_pairs
from grpo_kernels.trainer.evaluation import evaluate
from grpo_kernels.trainer.model.models import load_policy
from grpo_kernels.trainer.model.scoring import batches_by_length, pair_logps
from grpo_kernels.trainer.run.group_report import GroupReport

REPORT = GroupReport(("a", "b", "c"), (0.5, 0.9, math.nan), (0.6, 0.7, math.nan), (1.0, -2.0, math.nan), (30, 10, 0))


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    pytest.importorskip("transformers")
    config = tiny_config(tmp_path_factory.mktemp("pairs"))
    pairs = read_pairs(config.data.train, config.data)
    model, tokenizer = load_policy(config.model, train_texts=pair_texts(pairs))
    dataset = tokenize_pairs(pairs, tokenizer, config.data)
    return model, dataset, PreferenceCollator(tokenizer.pad_token_id)


@pytest.mark.parametrize(("kind", "normalize"), [("sigmoid", False), ("ipo", True)])
def test_group_means_are_those_of_the_formula(setting, kind, normalize):
    model, dataset, collate = setting
    reference = torch.randn(len(dataset), 2)
    loss = LossConfig(type=kind, beta=0.3, length_normalize=normalize)
    report = evaluate(model, dataset, reference, loss, collate, batch_size=4)
    ratios = pair_logps(model, dataset, collate, loss=LossConfig()).double() - reference
    if normalize:
        ratios /= torch.tensor([[len(p.chosen_ids), len(p.rejected_ids)] for p in dataset.pairs])
    margins = ratios[:, 0] - ratios[:, 1]
    losses = -torch.nn.functional.logsigmoid(0.3 * margins) if kind == "sigmoid" else (margins - 1 / (2 * 0.3)).square()
    ids = torch.tensor(dataset.group_ids)
    for g, name in enumerate(dataset.groups):
        assert report.names[g] == name
        assert report.n[g] == dataset.group_sizes[name]
        assert report.loss[g] == pytest.approx(float(losses[ids == g].mean()), rel=1e-4)
        assert report.accuracy[g] == pytest.approx(float((margins[ids == g] > 0).double().mean()))
        assert report.margin[g] == pytest.approx(float(margins[ids == g].mean()), rel=1e-4, abs=1e-4)


def test_the_batch_size_changes_nothing_but_rounding(setting):
    model, dataset, collate = setting
    reports = [evaluate(model, dataset, None, LossConfig(), collate, batch_size=size) for size in (1, 7, 100)]
    for report in reports[1:]:
        assert report.loss == pytest.approx(reports[0].loss, rel=1e-5)
        assert report.n == reports[0].n


def test_asking_leaves_mode_gradients_and_random_streams_alone(setting):
    model, dataset, collate = setting
    model.train()
    state = torch.get_rng_state()
    evaluate(model, dataset, None, LossConfig(), collate)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_every_pair_is_in_one_batch_the_longest_first(setting):
    _, dataset, _ = setting
    batches = list(batches_by_length(dataset, 7))
    assert sorted(i for batch in batches for i in batch) == list(range(len(dataset)))
    assert [len(batch) for batch in batches] == [7, 7, 7, 7, 2]
    widths = [max(len(dataset[i].prompt_ids) + len(dataset[i].rejected_ids) for i in batch) for batch in batches]
    assert widths == sorted(widths, reverse=True)


def test_bad_arguments_are_named(setting):
    model, dataset, collate = setting
    with pytest.raises(ValueError, match=r"ref_logps must have shape \(30, 2\), got \(30,\)"):
        evaluate(model, dataset, torch.zeros(30), LossConfig(), collate)
    empty = type(dataset)([], dataset.groups, [])
    with pytest.raises(ValueError, match="at least one pair"):
        evaluate(model, empty, None, LossConfig(), collate)


def test_the_worst_group_has_the_highest_loss_and_an_absent_group_is_never_it():
    assert (REPORT.worst_group, REPORT.worst_group_loss) == ("b", 0.9)
    assert REPORT.worst_group_accuracy == 0.6  # of whichever group has it
    broken = GroupReport(("a", "b"), (math.nan, 1.0), (0.0, 0.5), (0.0, 0.0), (3, 3))
    assert broken.worst_group == "a"


def test_the_mean_is_over_pairs_and_other_shares_can_be_asked_for():
    assert REPORT.mean_loss == pytest.approx((30 * 0.5 + 10 * 0.9) / 40)
    assert REPORT.mean_accuracy == pytest.approx((30 * 0.6 + 10 * 0.7) / 40)
    assert REPORT.mean("loss", {"a": 1, "b": 3, "c": 9}) == pytest.approx((0.5 + 3 * 0.9) / 4)
    with pytest.raises(ValueError, match="nothing came for \\['c'\\]"):
        REPORT.mean("loss", {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="field must be"):
        REPORT.mean("losses", {})


def test_the_dictionary_has_no_nan_and_the_table_marks_the_worst():
    groups = REPORT.to_dict()["groups"]
    assert groups["c"] == {"loss": None, "accuracy": None, "margin": None, "n": 0}
    assert groups["b"] == {"loss": 0.9, "accuracy": 0.7, "margin": -2.0, "n": 10}
    table = REPORT.table({"a": 0.2, "b": 0.7, "c": 0.1}).splitlines()
    assert [line.endswith("<- worst") for line in table] == [False, False, False, True, False, False, False]
    assert table[0].split() == ["group", "n", "loss", "accuracy", "margin", "alpha"]
    assert table[-1].split() == ["all", "pairs", "40", "0.6000", "0.625", "+0.25"]
    assert len({len(line) for line in table[:3]}) == 1
