"""NaN and infinity where they should not be, at drawn steps: a loop of one's own skips and counts, the trainer stops.

The trainer stops because a run that goes on past its first NaN has never been seen to get well by itself; it says which
pairs, and what it had saved goes on bit for bit once the cause is gone.
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import make_batch
from tiny_runs import tiny_config
from victims import assert_same_end

from grpo_kernels import GroupWeights, fused_grpo_loss
from grpo_kernels.trainer import loop
from grpo_kernels.trainer.config import OptimConfig
from grpo_kernels.trainer.loop import train
from grpo_kernels.trainer.model.optim import NonFiniteError
from grpo_kernels.trainer.run.checkpoint import load_latest

pytest.importorskip("transformers")

MANY = 200 if os.environ.get("GRPO_KERNELS_NIGHTLY") == "1" else 40
COUNTS = [pytest.param(4, id="4"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("where", ["logits", "reference"])
@pytest.mark.parametrize("estimator", ["importance", "group_mean"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_loop_of_ones_own_skips_the_step_counts_it_and_leaves_alpha(where, estimator, accumulate, count):
    for case in range(count):
        rng = random.Random(f"{where} {estimator} {accumulate} {case}")
        poisoned = set(rng.sample(range(8), rng.randint(1, 4)))
        # An endless reference is another matter: it may well mean a loss of 0.
        value = math.nan if where == "reference" else rng.choice([math.nan, math.inf])
        with_nan, without = (GroupWeights.robust([5, 3, 2], 0.3, estimator=estimator) for _ in range(2))
        for step in range(8):
            batch = make_batch(seed=step, dtype=torch.float32)
            logits, ref_logps = batch.logits.clone(), batch.ref_logps.float().clone()
            if step in poisoned:
                target = logits if where == "logits" else ref_logps
                # At a labelled position, so that the number is read.
                place = rng.choice((batch.labels[:, 1:] != -100).nonzero().tolist())
                index = (
                    (place[0], place[1], rng.randrange(13)) if where == "logits" else (rng.randrange(len(ref_logps)),)
                )
                target[index] = value
            before = with_nan.log_alpha.clone()
            losses = observed(with_nan, logits, batch, ref_logps, accumulate)
            if step in poisoned:
                assert not losses.isfinite().all()
                assert torch.equal(with_nan.log_alpha, before)
            else:
                observed(without, batch.logits, batch, batch.ref_logps.float(), accumulate)
        assert (int(with_nan.num_updates), int(with_nan.num_skipped)) == (8 - len(poisoned), len(poisoned))
        # As if the poisoned batches had never been.
        assert torch.equal(with_nan.log_alpha, without.log_alpha)


def observed(group_weights, logits, batch, ref_logps, accumulate):
    """The losses of one step, in one call or in two."""
    logits = logits.requires_grad_()
    if not accumulate:
        return fused_grpo_loss(logits, batch.labels, ref_logps, batch.group_ids, group_weights).losses
    pairs, losses = len(batch.group_ids), []
    with group_weights.accumulate():
        for half in torch.arange(pairs).chunk(2):
            rows = torch.cat([half, half + pairs])
            out = fused_grpo_loss(
                logits[rows], batch.labels[rows], ref_logps[rows], batch.group_ids[half], group_weights
            )
            losses.append(out.losses)
    group_weights.step()
    return torch.cat(losses)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finite")
    config = tiny_config(folder, steps=6, save_every=2)
    train(config)
    return config


@pytest.mark.parametrize("count", [pytest.param(1, id="1"), pytest.param(MANY // 4, id="many", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["logits", "reference", "gradient", "parameter"])
def test_the_trainer_stops_saves_nothing_of_it_and_goes_on(whole, tmp_path, where, count):
    for case in range(count):
        rng = random.Random(f"{where} {case}")
        step = rng.randint(1, 6)
        config = replace(whole, run_dir=str(tmp_path / f"{case}"))
        with pytest.MonkeyPatch.context() as patch:
            poison(patch, where, step, rng)
            expected = step if where != "parameter" else step + step % 2  # seen when it would be saved
            with pytest.raises(NonFiniteError, match=rf"^step {expected}: "):
                train(config)
        saved = load_latest(Path(config.run_dir) / "checkpoints")
        assert (saved.step if saved else 0) == (expected - 1) // 2 * 2
        if saved:
            assert all(tensor.isfinite().all() for tensor in saved.parts["model"].values())
            assert saved.parts["group_weights"]["log_alpha"].isfinite().all()
            assert int(saved.parts["group_weights"]["num_updates"]) == saved.step
        assert not (Path(config.run_dir) / "final").exists()
        train(replace(config, resume=True))
        assert_same_end(Path(config.run_dir), Path(whole.run_dir))


def poison(patch, where: str, step: int, rng: random.Random) -> None:
    """Let one number of one step be NaN or infinite."""
    value = rng.choice([math.nan, math.inf])
    gradients, optimize = loop._Job._gradients, torch.optim.AdamW.step
    calls = 0

    def put(tensor: torch.Tensor, number: float) -> float:
        flat, at = tensor.detach().view(-1), rng.randrange(tensor.numel())
        before = float(flat[at])
        flat[at] = number
        return before

    def counted(job, indices, reference):
        nonlocal calls
        calls += 1
        if calls != step or where == "parameter":
            return gradients(job, indices, reference)
        if where == "reference":
            reference = reference.clone()
            reference[rng.choice(indices), rng.randrange(2)] = math.nan
            return gradients(job, indices, reference)
        if where == "gradient":
            result = gradients(job, indices, reference)
            put(rng.choice(list(job.parameters.values())).grad, value)
            return result
        head = job.model.get_output_embeddings().weight  # a number of it reaches the logits of every token
        state = rng.getstate()
        before = put(head, value)
        try:
            return gradients(job, indices, reference)
        finally:
            rng.setstate(state)
            put(head, before)

    def stepped(optimizer, *arguments):
        optimize(optimizer, *arguments)
        if calls == step and where == "parameter":
            put(optimizer.param_groups[0]["params"][0], value)

    patch.setattr(loop._Job, "_gradients", counted)
    patch.setattr(torch.optim.AdamW, "step", stepped)


def test_a_learning_rate_that_leads_out_of_float32_is_seen_before_anything_is_saved(tmp_path):
    config = tiny_config(tmp_path, steps=1, eval_every=0)
    config.optim = OptimConfig(name="sgd", lr=1e37, max_grad_norm=0)
    config.loss.beta = 1e4
    with pytest.raises(
        NonFiniteError, match=r"^step 1: \d+ of \d+ parameters are not finite, .* Lower optim\.lr=1e\+37"
    ):
        train(config)
    assert not (Path(config.run_dir) / "checkpoints").exists()
    assert not (Path(config.run_dir) / "final").exists()
