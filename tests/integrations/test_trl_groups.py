"""A pair always has its group: what is dropped, missing or unknown is an error, and the model never sees it."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, IterableDataset
from trl_runs import (
    DataCollatorForPreference,
    GroupRobustDPOTrainer,
    model,
    pairs,
    robust,
    rows,
    settings,
    tokenizer,
)

from grpo_kernels.integrations.trl.groups import GroupCollator, count_groups


@pytest.fixture
def spied(monkeypatch):
    """Every keyword that a model is called with, whichever model, adapters and all."""
    from transformers.models.llama import modeling_llama

    seen: set[str] = set()
    for kind in (modeling_llama.LlamaForCausalLM, modeling_llama.LlamaModel):
        whole = kind.__call__

        def call(self, *args, _whole=whole, **kwargs):
            seen.update(kwargs)
            return _whole(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__call__", call)
    return seen


def without_group(data):
    return data.remove_columns("group")


def test_a_training_set_without_groups_is_refused_before_anything_is_tokenized(tmp_path, monkeypatch):
    monkeypatch.setattr(GroupRobustDPOTrainer, "_prepare_dataset", None)
    with pytest.raises(ValueError, match=r"train_dataset must have the column 'group'.*\['prompt', 'chosen'"):
        robust(tmp_path, data=without_group(pairs(8)))


@pytest.mark.parametrize("several", [False, True])
def test_an_evaluation_set_without_groups_is_refused(tmp_path, several):
    held_out = without_group(pairs(8))
    with pytest.raises(ValueError, match=r"eval_dataset.* must have the column 'group'"):
        robust(tmp_path, eval_dataset={"good": pairs(8), "bad": held_out} if several else held_out)


def test_so_is_one_that_evaluate_is_given(tmp_path):
    trainer = robust(tmp_path)
    with pytest.raises(ValueError, match="eval_dataset must have the column 'group'"):
        trainer.evaluate(without_group(pairs(8)))


def test_a_group_that_training_does_not_know_is_refused_in_evaluation(tmp_path):
    strangers = Dataset.from_list([{**row, "group": "late"} for row in rows(4)])
    with pytest.raises(ValueError, match=r"eval_dataset must have groups of the training set.*\['late'\] as well"):
        robust(tmp_path, eval_dataset=strangers)
    with pytest.raises(ValueError, match=r"must have groups of the training set"):
        robust(tmp_path).evaluate({"later": strangers})
    stream = strangers.to_iterable_dataset()
    with pytest.raises(ValueError, match=r"unknown group 'late': the groups of the training set are \['few', 'many'"):
        robust(tmp_path).evaluate(stream)


@pytest.mark.parametrize("keep_all_columns", [False, True])
@pytest.mark.parametrize("precompute", [False, True])
def test_the_model_is_never_called_with_a_group(tmp_path, spied, keep_all_columns, precompute):
    trainer = robust(
        tmp_path, eval_dataset=pairs(6, seed=5), max_steps=1, precompute_ref_log_probs=precompute,
        remove_unused_columns=not keep_all_columns,
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    assert {"input_ids", "attention_mask", "use_cache"} <= spied
    assert not [key for key in spied if "group" in key]


def test_a_collator_that_passes_everything_on_does_not_reach_the_model_either(tmp_path, spied):
    class Passing(DataCollatorForPreference):
        def torch_call(self, examples):
            return {**super().torch_call(examples), "group": torch.zeros(len(examples))}

    trainer = robust(tmp_path, data_collator=Passing(pad_token_id=2), precompute_ref_log_probs=True, max_steps=1)
    trainer.train()
    assert not [key for key in spied if "group" in key]


def test_a_collator_of_ones_own_cannot_drop_the_group(tmp_path):
    trainer = robust(tmp_path, data_collator=DataCollatorForPreference(pad_token_id=2), max_steps=1)
    trainer.train()
    assert int(trainer.group_weights.num_updates) == 1


def test_a_collator_put_in_place_afterwards_is_an_error_not_plain_dpo(tmp_path):
    trainer = robust(tmp_path)
    trainer.data_collator = DataCollatorForPreference(pad_token_id=2)
    with pytest.raises(ValueError, match="the group of each of its 4 pairs in 'group_ids', got nothing"):
        trainer.train()


def test_columns_dropped_behind_the_trainers_back_are_an_error(tmp_path):
    trainer = robust(tmp_path)
    trainer._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    trainer.train()  # put back, since it is asked for each time
    trainer.train_dataset = without_group(trainer.train_dataset)
    with pytest.raises(ValueError, match="a pair came without the column 'group'"):
        trainer.train()


def test_half_a_batch_is_an_error(tmp_path):
    trainer = robust(tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    batch["group_ids"] = batch["group_ids"][:3]
    with pytest.raises(ValueError, match="group of each of its 4 pairs"):
        trainer.compute_loss(trainer.model, batch)


def test_sizes_are_of_what_is_left_after_truncation(tmp_path):
    data = rows(20)
    long = {**data[0], "group": "many", "prompt": "weather " * 40}
    trainer = robust(tmp_path, data=Dataset.from_list([*data, long, long]), max_length=32)
    left = sum(row["group"] == "many" for row in data)
    assert dict(zip(trainer.group_weights.names, trainer.group_weights.group_sizes, strict=True))["many"] == left
    assert trainer.group_weights.sampling_probs.sum() == pytest.approx(1)


def test_a_group_that_truncation_removes_altogether_is_an_error(tmp_path):
    data = [row if row["group"] != "few" else {**row, "prompt": "weather " * 40} for row in rows(20)]
    with pytest.raises(ValueError, match=r"must keep a pair of every group, TRL dropped all of \{'few': \d+\}"):
        robust(tmp_path, data=Dataset.from_list(data), max_length=32)


def test_a_stream_must_say_its_sizes(tmp_path):
    with pytest.raises(ValueError, match="group_sizes must be given for an IterableDataset"):
        robust(tmp_path, data=pairs(24).to_iterable_dataset())


def test_a_stream_without_groups_is_refused(tmp_path):
    def unnamed():
        yield from ({k: v for k, v in row.items() if k != "group"} for row in rows(8))

    for data in (without_group(pairs(8)).to_iterable_dataset(), IterableDataset.from_generator(unnamed)):
        with pytest.raises(ValueError, match="train_dataset must have the column 'group'"):
            robust(tmp_path, data=data, group_sizes={"many": 8})


def test_a_stream_trains_as_the_data_set_it_is_made_of(tmp_path):
    data = pairs(24)
    whole = robust(tmp_path, data=data, group_lr=0.05, train_sampling_strategy="sequential")
    sizes = dict(zip(whole.group_weights.names, whole.group_weights.group_sizes, strict=True))
    stream = robust(tmp_path, data=data.to_iterable_dataset(), group_lr=0.05, group_sizes=sizes)
    whole.train()
    stream.train()
    assert torch.equal(whole.group_weights.log_alpha, stream.group_weights.log_alpha)
    assert torch.equal(whole.model.lm_head.weight, stream.model.lm_head.weight)


def test_sizes_that_are_not_the_data_sets_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"group_sizes must be what train_dataset has, \{'few': "):
        robust(tmp_path, group_sizes={"few": 1, "many": 1, "some": 1})


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "null"), ("  ", "str '  '"), (0.5, "float 0.5"), (True, "bool True")]
)
def test_a_value_that_names_no_group_is_refused(tmp_path, value, shown):
    data = Dataset.from_list([{**row, "group": value} for row in rows(8)])
    with pytest.raises(ValueError, match=rf"train_dataset: column 'group' must hold text or integers.*got {shown}"):
        robust(tmp_path, data=data)


def test_groups_may_be_numbers_and_their_column_any(tmp_path):
    data = Dataset.from_list(rows(24)).map(lambda row: {"region": {"many": 10, "some": 9, "few": 1}[row["group"]]})
    trainer = robust(tmp_path, data=data.remove_columns("group"), group_column="region", max_steps=1)
    assert trainer.group_weights.names == ("1", "9", "10")
    trainer.train()
    assert int(trainer.group_weights.num_updates) == 1


def test_counting_does_not_depend_on_how_a_data_set_shows_its_values():
    data = Dataset.from_list([{"group": i % 3, "x": 0} for i in range(9)])
    assert count_groups(data.with_format("torch"), "group", "it") == {"0": 3, "1": 3, "2": 3}
    with pytest.raises(ValueError, match="it must hold at least one pair"):
        count_groups(data.select([]), "group", "it")


def test_the_collator_says_which_column_is_missing():
    collate = GroupCollator(lambda examples: {"n": len(examples)}, "group", ["a", "b"])
    assert collate([{"group": "b"}, {"group": "a"}])["group_ids"].tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"without the column 'group', .*its columns are \['prompt'\]"):
        collate([{"prompt": "x"}])


def test_workers_collate_too(tmp_path):
    here, there = (robust(tmp_path, dataloader_num_workers=n, max_steps=2) for n in (0, 1))
    here.train()
    there.train()
    assert torch.equal(here.group_weights.log_alpha, there.group_weights.log_alpha)


def test_without_settings_the_trainer_makes_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # TRL's default is bfloat16, which is refused where there is neither a GPU nor ``use_cpu``.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    trainer = GroupRobustDPOTrainer(model(), train_dataset=pairs(8), processing_class=tokenizer())
    assert trainer.args.output_dir.endswith("-GR-DPO")
    assert trainer.group_weights.moves


def test_no_training_set_is_trls_error(tmp_path):
    with pytest.raises(ValueError, match="train_dataset"):
        GroupRobustDPOTrainer(model(), args=settings(tmp_path), processing_class=tokenizer())
