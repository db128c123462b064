"""What a training run promises: bit-for-bit resuming, exact micro-batches, faults that name the pairs, one writer."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny_runs import die_at, lines, tiny_config, write_dropout_model, write_pairs

from grpo_kernels import GroupWeights
from grpo_kernels.trainer import loop
from grpo_kernels.trainer.config import GroupsConfig, LoraConfig, LossConfig, ModelConfig, OptimConfig, SupervisedConfig
from grpo_kernels.trainer.inputs import make_group_weights
from grpo_kernels.trainer.loop import train
from grpo_kernels.trainer.model.optim import NonFiniteError
from grpo_kernels.trainer.run.checkpoint import load_checkpoint, load_latest, sorted_checkpoints
from grpo_kernels.trainer.run.directory import RunDirectory

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small to share out, and threads that wait for each other are slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def last(config):
    checkpoint = load_latest(Path(config.run_dir) / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def assert_same_bits(one, other):
    assert one.step == other.step
    assert one.parts.keys() == other.parts.keys()
    for part, tensors in one.parts.items():
        assert tensors.keys() == other.parts[part].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.parts[part][name]), (part, name)
    assert one.scalars["random"] == other.scalars["random"]


@pytest.mark.parametrize("sampling", ["shuffle", "categorical"])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, monkeypatch, sampling):
    config = tiny_config(tmp_path, sampling=sampling)
    texts = (tmp_path / "train.jsonl").read_text().splitlines()
    # Dropout draws from the global stream at every step; three saves, and the fault lies between two of them.
    model = ModelConfig(name=str(write_dropout_model(tmp_path / "model", texts)))
    optim = OptimConfig(lr=1e-2, weight_decay=0.1, average_iterates=True, projection="start", projection_radius=0.5)
    config = replace(config, model=model, optim=optim, micro_batch_size=4, supervised=SupervisedConfig(2, 8))
    whole = replace(config, run_dir=str(tmp_path / "whole"))
    train(whole)
    with monkeypatch.context() as patch:
        die_at(patch, 5)
        with pytest.raises(RuntimeError, match="the power went"):
            train(config)
    assert last(config).step == 3
    assert lines(config.run_dir)[-1]["step"] == 4  # beyond the checkpoint: it must go
    # Neither the cache nor the policy as it started may be needed; the random streams of this process are elsewhere.
    for file in (Path(config.run_dir) / "reference").iterdir():
        file.unlink()
    monkeypatch.setattr(loop, "reference_logps", None)
    monkeypatch.setattr(loop, "warm_up", None)
    torch.manual_seed(99)
    result = train(replace(config, resume=True))
    assert result.steps == 8
    assert_same_bits(last(config), last(whole))
    for name in ("metrics.jsonl", "final/model.safetensors", "final-average/model.safetensors"):
        assert (Path(config.run_dir) / name).read_bytes() == (Path(whole.run_dir) / name).read_bytes()


def test_resuming_without_a_checkpoint_starts_at_the_beginning(tmp_path, monkeypatch):
    config, whole = tiny_config(tmp_path), tiny_config(tmp_path, "whole")
    train(whole)
    with monkeypatch.context() as patch:
        die_at(patch, 2)
        with pytest.raises(RuntimeError):
            train(config)
    train(replace(config, resume=True))
    assert_same_bits(last(config), last(whole))
    assert (Path(config.run_dir) / "metrics.jsonl").read_bytes() == (Path(whole.run_dir) / "metrics.jsonl").read_bytes()


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    config = tiny_config(tmp_path)
    first = train(config)
    before = (Path(config.run_dir) / "metrics.jsonl").read_bytes()
    again = train(replace(config, resume=True))
    assert (Path(config.run_dir) / "metrics.jsonl").read_bytes() == before
    assert again.report == first.report


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed must be 0"),
        ({"batch_size": 4}, "batch_size must be 8"),
        ({"loss": LossConfig(beta=0.2)}, "loss.beta must be 0.1"),
        ({"groups": GroupsConfig(group_lr=0.06)}, "groups.group_lr must be 0.05"),
        ({"steps": 12}, "steps must be 8.*decays towards the last step"),
    ],
)
def test_resuming_with_another_setting_is_refused_by_name(tmp_path, monkeypatch, change, named):
    config = tiny_config(tmp_path, steps=8)
    with monkeypatch.context() as patch:
        die_at(patch, 4)
        with pytest.raises(RuntimeError):
            train(config)
    with pytest.raises(ValueError, match=named):
        train(replace(config, resume=True, **change))


def test_resuming_with_other_pairs_is_refused(tmp_path):
    config = tiny_config(tmp_path)
    train(config)
    write_pairs(tmp_path / "train.jsonl", 30, seed=7)
    with pytest.raises(ValueError, match=r"data\.train must hold the pairs"):
        train(replace(config, resume=True))


def test_a_constant_schedule_can_be_extended(tmp_path):
    optim = OptimConfig(lr=1e-2, schedule="constant")
    short = tiny_config(tmp_path, "short", optim=optim, steps=6)
    train(short)
    train(replace(short, resume=True, steps=8))
    whole = tiny_config(tmp_path, "whole", optim=optim, steps=8)
    train(whole)
    assert_same_bits(last(short), last(whole))


@pytest.mark.parametrize("method", ["dpo", "is_dpo"])
def test_micro_batches_equal_the_whole_batch_when_alpha_is_fixed(tmp_path, method):
    results = []
    for micro in (None, 2):
        optim = OptimConfig(name="sgd", lr=1e-1, schedule="constant")
        groups = GroupsConfig(method=method)
        config = tiny_config(
            tmp_path,
            f"{method}{micro}",
            micro_batch_size=micro,
            optim=optim,
            groups=groups,
            steps=5,
            sampling="balanced",
        )
        train(config)
        results.append(last(config).parts["model"])
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=0, atol=1e-6)


def test_alpha_moves_once_a_step_and_sees_the_whole_batch(tmp_path):
    # A learning rate of nearly 0 keeps every loss at log 2, so alpha can be told by hand: with the importance
    # estimator log alpha_g moves by group_lr * log 2 * (drawn share / q_g), whatever the micro-batches.
    alphas = []
    for micro in (None, 2):
        optim = OptimConfig(lr=1e-12)
        config = tiny_config(tmp_path, f"run{micro}", micro_batch_size=micro, optim=optim, steps=3)
        train(config)
        parts = last(config).parts["group_weights"]
        assert int(parts["num_updates"]) == 3
        alphas.append(parts["log_alpha"])
    torch.testing.assert_close(alphas[0], alphas[1], rtol=0, atol=1e-5)
    assert not torch.allclose(alphas[0], alphas[0].mean())


def test_gr_dpo_lifts_the_worst_group_over_dpo(tmp_path):
    worst = {}
    for method in ("dpo", "gr_dpo"):
        # lr and steps are enough to fit; "few" is 1 in 10 and wants the opposite of everybody else.
        groups = GroupsConfig(method=method, group_lr=0.2)
        config = tiny_config(tmp_path, method, groups=groups, steps=40, batch_size=16, save_every=0, eval_every=0)
        result = train(config)
        worst[method] = result.report.worst_group_loss
        assert result.report.worst_group == "few" or method == "gr_dpo"
    assert worst["gr_dpo"] < worst["dpo"] - 0.05


def test_a_loss_that_is_not_finite_names_step_pairs_and_groups_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    whole = loop.group_loss
    calls = []

    def poisoned(model, batch, ref_logps, *others, **settings):
        calls.append(batch["pair_index"].tolist())
        if len(calls) == 5:
            ref_logps = ref_logps.clone()
            ref_logps[2] = math.nan
        return whole(model, batch, ref_logps, *others, **settings)

    monkeypatch.setattr(loop, "group_loss", poisoned)
    with pytest.raises(NonFiniteError) as caught:
        train(config)
    pair = calls[4][2]
    row = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[pair])
    assert "step 5: the loss of 1 of 8 pairs" in str(caught.value)
    assert f"train.jsonl:{pair + 1} (group {row['group']!r})" in str(caught.value)
    assert [path.name for path in sorted_checkpoints(Path(config.run_dir) / "checkpoints")] == ["step-00000003"]
    assert not (Path(config.run_dir) / "final").exists()
    # What was saved goes on as if nothing had been.
    monkeypatch.setattr(loop, "group_loss", whole)
    train(replace(config, resume=True))
    clean = tiny_config(tmp_path, "clean")
    train(clean)
    assert_same_bits(last(config), last(clean))


def test_a_gradient_that_is_not_finite_stops_before_the_parameters_move(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    seen = {}
    job = loop._Job._gradients

    def poisoned(self, indices, reference):
        result = job(self, indices, reference)
        seen["model"], seen["before"] = self.model, [p.detach().clone() for p in self.model.parameters()]
        next(iter(self.parameters.values())).grad[0] = math.inf
        return result

    monkeypatch.setattr(loop._Job, "_gradients", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 1: every loss is finite, but the gradient is not .*embed_tokens"):
        train(config)
    assert all(torch.equal(p, q) for p, q in zip(seen["model"].parameters(), seen["before"], strict=True))


def test_an_existing_run_is_refused_and_overwriting_leaves_what_is_not_a_runs(tmp_path):
    config = tiny_config(tmp_path, steps=2)
    train(config)
    before = (Path(config.run_dir) / "summary.json").read_bytes()
    with pytest.raises(ValueError, match="exists and is not empty; say overwrite or resume"):
        train(replace(config, seed=1))
    assert (Path(config.run_dir) / "summary.json").read_bytes() == before
    (Path(config.run_dir) / "notes.txt").write_text("mine")
    (Path(config.run_dir) / ".final.123.tmp").mkdir()  # as a process leaves it that was killed
    train(replace(config, seed=1, overwrite=True))
    assert json.loads((Path(config.run_dir) / "summary.json").read_text())["seed"] == 1
    assert (Path(config.run_dir) / "notes.txt").read_text() == "mine"
    assert not (Path(config.run_dir) / ".final.123.tmp").exists()


def test_two_runs_in_one_folder_refuse_each_other(tmp_path):
    config = tiny_config(tmp_path, steps=2)
    with (
        RunDirectory(config.run_dir),
        pytest.raises(ValueError, match="another run holds its lock"),
    ):
        train(replace(config, resume=True))
    train(replace(config, resume=True))  # let go with the first


def test_nothing_is_written_for_a_run_that_cannot_start(tmp_path):
    config = tiny_config(tmp_path)
    (tmp_path / "test.jsonl").write_text('{"prompt": "a", "chosen": " b", "rejected": " c", "group": "nobody"}\n')
    with pytest.raises(ValueError, match="unknown group 'nobody'"):
        train(config)
    with pytest.raises(ValueError, match="device 'nonsense' cannot be used"):
        train(replace(config, device="nonsense"))
    assert not Path(config.run_dir).exists()


def test_interrupting_says_where_the_last_checkpoint_is(tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path)
    die_at(monkeypatch, 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(config)
    said = capsys.readouterr().err
    assert "interrupted after step 4" in said
    assert "step-00000003" in said


def test_the_run_says_the_table_and_leaves_a_summary_and_a_model_for_transformers(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = tiny_config(tmp_path, quiet=False)
    result = train(config)
    said = capsys.readouterr()
    assert "<- worst" in said.out
    assert "gr_dpo 8/8" in said.err
    assert "\r" not in said.err  # no bar where nobody watches
    summary = json.loads((Path(config.run_dir) / "summary.json").read_text())
    assert summary == result.summary
    assert summary["test"]["worst_group"] == result.report.worst_group
    assert summary["dropped"] == {split: {"reply gone": 0, "replies equal": 0} for split in ("train", "test")}
    assert sum(group["alpha"] for group in summary["train_groups"].values()) == pytest.approx(1)
    model = AutoModelForCausalLM.from_pretrained(Path(config.run_dir) / "final")
    saved = last(config).parts["model"]
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())
    assert len(AutoTokenizer.from_pretrained(Path(config.run_dir) / "final")) == model.config.vocab_size


def test_lora_trains_adapters_alone_and_the_reference_is_the_base(tmp_path):
    pytest.importorskip("peft")
    config = tiny_config(tmp_path, steps=3)
    config.model.lora = LoraConfig(rank=2)
    result = train(config)
    assert all("lora_" in name for name in last(config).parts["model"])
    assert 0 < result.summary["model"]["trainable_parameters"] < result.summary["model"]["parameters"] / 2
    plain = tiny_config(tmp_path, "plain", steps=3)
    train(plain)
    torch.testing.assert_close(last(config).parts["reference"]["train"], last(plain).parts["reference"]["train"])


def test_warming_up_raises_the_chosen_replies_and_freezes_the_reference_after(tmp_path):
    cold, warm = tiny_config(tmp_path, "cold", steps=1), tiny_config(tmp_path, "warm", steps=1)
    train(cold)
    train(replace(warm, supervised=SupervisedConfig(steps=12, batch_size=8)))
    before, after = (last(config).parts["reference"]["train"][:, 0].mean() for config in (cold, warm))
    assert after > before + 1
    kinds = [record["kind"] for record in lines(warm.run_dir)]
    assert kinds == ["supervised"] * 6 + ["train", "eval"]
    # The policy starts at the reference, so the loss of the first step is log 2.
    assert lines(warm.run_dir)[-2]["loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("projection", ["start", "origin"])
def test_every_iterate_stays_in_the_ball(tmp_path, projection):
    config = tiny_config(tmp_path, optim=OptimConfig(lr=1e-2, projection=projection, projection_radius=0.3))
    train(config)
    parts = last(config).parts
    start = parts["start"] if projection == "start" else dict.fromkeys(parts["model"], 0.0)
    squares = [(tensor - start[name]).double().square().sum() for name, tensor in parts["model"].items()]
    assert float(sum(squares)) ** 0.5 == pytest.approx(0.3, rel=1e-5)


def test_group_weights_are_told_how_the_sampler_draws(tmp_path):
    sizes, q = {"a": 30, "b": 10}, [0.5, 0.5]
    for method, alpha in (("dpo", [0.75, 0.25]), ("is_dpo", [0.5, 0.5]), ("gr_dpo", [0.5, 0.5])):
        config = tiny_config(tmp_path, groups=GroupsConfig(method=method))
        weights = make_group_weights(config, sizes, q)
        assert isinstance(weights, GroupWeights)
        assert weights.weights.tolist() == pytest.approx(alpha)
        assert weights.loss_weights.tolist() == pytest.approx([a / 0.5 for a in alpha])
        assert weights.moves == (method == "gr_dpo")


def test_metrics_are_means_over_the_steps_since_the_line_before(tmp_path):
    fine, coarse = tiny_config(tmp_path, "fine", log_every=1), tiny_config(tmp_path, "coarse", log_every=4)
    train(fine)
    train(coarse)
    every = [r for r in lines(fine.run_dir) if r["kind"] == "train"]
    first = next(r for r in lines(coarse.run_dir) if r["kind"] == "train")
    assert first["step"] == 4
    assert first["loss"] == pytest.approx(sum(r["loss"] for r in every[:4]) / 4)
    assert sum(group["n"] for group in first["groups"].values()) == 32


def test_bf16_autocast_keeps_float32_parameters_and_trains(tmp_path):
    config = tiny_config(tmp_path, bf16=True, steps=3)
    result = train(config)
    assert {t.dtype for t in last(config).parts["model"].values()} == {torch.float32}
    assert math.isfinite(result.report.mean_loss)


def test_the_saved_configuration_is_the_runs(tmp_path):
    yaml = pytest.importorskip("yaml")
    config = tiny_config(tmp_path, steps=2)
    train(config)
    saved = yaml.safe_load((Path(config.run_dir) / "config.yaml").read_text())
    assert saved == json.loads(json.dumps(asdict(config)))
    assert load_checkpoint(sorted_checkpoints(Path(config.run_dir) / "checkpoints")[-1]).scalars["config"] == saved
