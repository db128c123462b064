"""Settings: TRL's keep their meaning, those of groups are checked, and what the loss cannot be is refused at once."""

from __future__ import annotations

import math

import pytest
from transformers import HfArgumentParser
from trl_runs import DPOConfig, GroupRobustDPOConfig, GroupRobustDPOTrainer, model, pairs, robust, settings, tokenizer

from grpo_kernels.integrations.trl.config import LOSSES, loss_settings


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"loss_type": "nca_pair"}, "loss_type must be one of sigmoid.*got \\['nca_pair'\\]"),
        ({"loss_type": ["sigmoid", "sft"]}, "loss_type must be one of.*mix several"),
        ({"loss_weights": [0.5]}, "loss_weights must be None"),
        ({"ld_alpha": 0.5}, "ld_alpha must be None"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type must be 'reverse_kl'"),
        ({"use_weighting": True}, "use_weighting must be False"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing is defined for"),
        ({"label_smoothing": 0.5}, "label_smoothing must be in"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"loss_type": "sigmoid_norm", "length_normalize": False}, "length_normalize must not be False"),
        ({"method": "grpo"}, "method must be 'dpo', 'is_dpo' or 'gr_dpo', got 'grpo'"),
        ({"group_lr": -1.0}, "group_lr must be finite and at least 0"),
        ({"group_lr": math.nan}, "group_lr must be finite and at least 0"),
        ({"estimator": "mean"}, "estimator must be"),
        ({"prior": "flat"}, "prior must be 'uniform'"),
        ({"prior": {"a": 0.5, "b": 0.6}}, "prior must sum to 1"),
        ({"mixing": 1.5}, "mixing must be in"),
        ({"size_adjustment": -1.0}, "size_adjustment must be finite and at least 0"),
        ({"sampling_probs": {"a": 1.0, "b": 0.0}}, "sampling_probs must be positive"),
        ({"prior": {"a": 1.0}, "sampling_probs": {"b": 1.0}}, "sampling_probs must name the groups \\['a'\\]"),
        ({"group_column": "chosen"}, "group_column must name a column that TRL does not use"),
        ({"group_column": "prompt_ids"}, "group_column must name a column"),
        ({"group_column": ""}, "group_column must name a column"),
        ({"memory_budget": "lots"}, "memory_budget must be 'auto'"),
        ({"memory_budget": -1}, "memory_budget must be 'auto'"),
        ({"memory_budget": 1.5}, "memory_budget must be 'auto'.*got 1.5"),
        ({"backend": "tpu"}, "backend must be 'auto' or one of .*, got 'tpu'"),
        ({"max_logged_groups": -1}, "max_logged_groups must not be negative"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        settings(tmp_path, **changes)


def test_a_setting_changed_after_construction_is_refused_by_the_trainer(tmp_path):
    args = settings(tmp_path)
    args.ld_alpha = 0.3
    with pytest.raises(ValueError, match="ld_alpha must be None"):
        GroupRobustDPOTrainer(model(), args=args, train_dataset=pairs(8), processing_class=tokenizer())


def test_a_plain_dpo_config_is_refused(tmp_path):
    with pytest.raises(TypeError, match="args must be a GroupRobustDPOConfig"):
        GroupRobustDPOTrainer(
            model(), args=settings(tmp_path, DPOConfig), train_dataset=pairs(8), processing_class=tokenizer()
        )


@pytest.mark.parametrize("setting", ["prior", "sampling_probs"])
def test_numbers_by_group_must_name_the_groups_of_the_data(tmp_path, setting):
    with pytest.raises(
        ValueError, match=rf"{setting} must name the groups \['few', 'many', 'some'\], got \['a', 'b'\]"
    ):
        robust(tmp_path, **{setting: {"a": 0.5, "b": 0.5}})


def test_numbers_by_group_go_to_the_groups_they_name(tmp_path):
    q, prior = {"some": 0.3, "few": 0.2, "many": 0.5}, {"many": 0.1, "some": 0.2, "few": 0.7}
    weights = robust(tmp_path, sampling_probs=q, prior=prior, mixing=0.25, size_adjustment=0.5).group_weights
    assert weights.names == ("few", "many", "some")
    assert weights.sampling_probs.tolist() == pytest.approx([0.2, 0.5, 0.3])
    assert weights.weights.tolist() == pytest.approx([0.7, 0.1, 0.2])
    assert weights.mixing == 0.25
    assert weights.adjustment.tolist() == pytest.approx([0.5 / size**0.5 for size in weights.group_sizes])


@pytest.mark.parametrize(
    ("method", "expected"), [("dpo", [0.125, 13 / 24, 1 / 3]), ("is_dpo", [1 / 3] * 3), ("gr_dpo", [1 / 3] * 3)]
)
def test_a_method_is_a_setting_of_the_group_weights(tmp_path, method, expected):
    weights = robust(tmp_path, method=method, group_lr=0.2).group_weights
    assert weights.weights.tolist() == pytest.approx(expected)
    assert weights.moves == (method == "gr_dpo")


def test_smoothed_sigmoid_is_conservative_dpo(tmp_path):
    # TRL ignores label_smoothing with this loss; here it is what it says.
    trainer = robust(tmp_path, label_smoothing=0.2, ref_model=model(seed=4), beta=0.5)
    metrics = trainer.evaluate(pairs(4, groups={"many": 1}))
    plain = robust(tmp_path, ref_model=model(seed=4), beta=0.5).evaluate(pairs(4, groups={"many": 1}))
    x = 0.5 * metrics["eval_group_many/margin"]
    assert metrics["eval_loss"] == pytest.approx(plain["eval_loss"] + 0.2 * x, abs=1e-5)  # -log s(-x) = -log s(x) + x


def test_every_field_of_trls_keeps_its_default():
    ours, theirs = GroupRobustDPOConfig.__dataclass_fields__, DPOConfig.__dataclass_fields__
    assert not [name for name in theirs if ours[name].default != theirs[name].default]
    added = set(ours) - set(theirs)
    assert {"group_column", "group_lr", "method", "estimator", "prior", "mixing", "sampling_probs"} <= added
    assert all(f"        {name}: " in GroupRobustDPOConfig.__doc__ for name in added)


def test_settings_come_from_the_command_line_too():
    argv = "--output_dir out --use_cpu --bf16 false --group_lr 0.02 --method gr_dpo --estimator group_mean --mixing 0.1"
    argv += ' --prior {"a":0.25,"b":0.75} --memory_budget 0 --no_fused_head --loss_type ipo --group_sizes {"a":3,"b":9}'
    (args,) = HfArgumentParser(GroupRobustDPOConfig).parse_args_into_dataclasses(argv.split())
    assert (args.group_lr, args.estimator, args.mixing, args.fused_head) == (0.02, "group_mean", 0.1, False)
    assert args.prior == {"a": 0.25, "b": 0.75}
    assert args.group_sizes == {"a": 3, "b": 9}
    assert args.memory_budget == 0
    assert isinstance(args.memory_budget, int)  # bytes; 0.0 would be a share
    assert loss_settings(args) == ("ipo", 0.0, True)


def test_the_parser_can_say_what_the_settings_are(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(GroupRobustDPOConfig).parse_args_into_dataclasses(["--help"])
    assert "--group_lr" in capsys.readouterr().out


def test_settings_survive_their_own_dictionary(tmp_path):
    args = settings(tmp_path, group_lr=0.3, prior={"a": 0.5, "b": 0.5})
    again = GroupRobustDPOConfig(
        **{k: v for k, v in args.to_dict().items() if k in ("output_dir", "group_lr", "prior", "use_cpu", "bf16")}
    )
    assert (again.group_lr, again.prior) == (0.3, {"a": 0.5, "b": 0.5})


@pytest.mark.parametrize("name", LOSSES)
def test_length_counts_where_trl_lets_it_count(tmp_path, name):
    assert loss_settings(settings(tmp_path, loss_type=name)).length_normalize == (name in ("ipo", "sigmoid_norm"))


def test_ipo_on_sums_is_the_papers_and_can_be_had(tmp_path):
    assert loss_settings(settings(tmp_path, loss_type="ipo", length_normalize=False)) == ("ipo", 0.0, False)
