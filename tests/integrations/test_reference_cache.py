"""The reference is scored once and kept under a name that changes with anything it depends on, and draws no number."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny_runs import tiny_config

from grpo_kernels import sequence_logps
from grpo_kernels.trainer.config import LossConfig
from grpo_kernels.trainer.data import PreferenceCollator, pair_texts, read_pairs, tokenize_pairs
from grpo_kernels.trainer.model.models import load_policy
from grpo_kernels.trainer.run import reference_cache
from grpo_kernels.trainer.run.reference_cache import fingerprint, reference_logps

pytest.importorskip("transformers")


@pytest.fixture
def setting(tmp_path):
    config = tiny_config(tmp_path)
    pairs = read_pairs(config.data.train, config.data)
    model, tokenizer = load_policy(config.model, train_texts=pair_texts(pairs))
    dataset = tokenize_pairs(pairs, tokenizer, config.data)
    return model, tokenizer, dataset, config.data, PreferenceCollator(tokenizer.pad_token_id)


def score(folder, setting, **more):
    model, tokenizer, dataset, data, collate = setting
    return reference_logps(folder, model, tokenizer, dataset, data, collate, loss=LossConfig(), batch_size=7, **more)


def test_each_pair_gets_its_own_log_probabilities(tmp_path, setting):
    model, _, dataset, _, collate = setting
    logps = score(tmp_path / "cache", setting)
    assert logps.shape == (30, 2)
    for i in (0, 13, 29):
        batch = collate([dataset[i]])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(logps[i], sequence_logps(logits, batch["labels"]), rtol=1e-5, atol=1e-4)


def test_it_is_computed_once_and_read_back_with_its_bits(tmp_path, setting, monkeypatch):
    first = score(tmp_path / "cache", setting)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr(reference_cache, "pair_logps", lambda *a, **k: pytest.fail("computed again"))
    assert torch.equal(score(tmp_path / "cache", setting), first)


def test_random_streams_and_the_models_mode_are_untouched(tmp_path, setting):
    model = setting[0].train()
    before = torch.get_rng_state()
    for _ in range(2):
        score(tmp_path / "cache", setting)
        assert torch.equal(torch.get_rng_state(), before)
        assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_change_of_anything_is_another_file(setting):
    model, tokenizer, dataset, data, _ = setting

    def name(model=model, tokenizer=tokenizer, dataset=dataset, data=data, bf16=False):
        return fingerprint(model, tokenizer, dataset, data, bf16=bf16)

    nudged = copy.deepcopy(model)
    with torch.no_grad():
        weight = next(nudged.parameters())
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(10.0))
    deeper = copy.deepcopy(model)
    deeper.config.rms_norm_eps *= 2
    templated, taught = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    templated.chat_template = "{{ messages }}"
    taught.add_tokens(["snow"])
    swapped, other = copy.deepcopy(dataset), copy.deepcopy(dataset)
    swapped.pairs[0], swapped.pairs[1] = swapped.pairs[1], swapped.pairs[0]
    other.pairs[3].chosen_ids[0] += 1
    names = [
        name(),
        name(model=nudged),
        name(model=deeper),
        name(tokenizer=templated),
        name(tokenizer=taught),
        name(dataset=swapped),
        name(dataset=other),
        name(data=replace(data, max_length=31)),
        name(data=replace(data, max_prompt_length=19)),
        name(data=replace(data, append_eos=False)),
        name(bf16=True),
    ]
    assert len(set(names)) == len(names)
    # Where the file lies, what it is called, and the mode the model is in are nothing to it.
    assert name(model=copy.deepcopy(model).eval(), data=replace(data, train="elsewhere.jsonl")) == names[0]


@pytest.mark.parametrize("harm", [lambda data: data[:-3], lambda data: b"", lambda data: b"x" * len(data)])
def test_a_damaged_file_is_computed_again(tmp_path, setting, harm):
    first = score(tmp_path / "cache", setting)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(harm(file.read_bytes()))
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(score(tmp_path / "cache", setting), first)
    assert torch.equal(score(tmp_path / "cache", setting), first)


def test_a_reference_that_is_not_finite_names_the_pair_and_is_not_kept(tmp_path, setting):
    with torch.no_grad():
        setting[0].lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match=r"pair 0 \(.*train\.jsonl:1\), 30 of 30 pairs"):
        score(tmp_path / "cache", setting)
    assert not (tmp_path / "cache").exists()
