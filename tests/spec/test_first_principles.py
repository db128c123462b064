"""The losses, methods and estimators against formulas written out here from their papers, in Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close, make_batch

from grpo_kernels import GroupWeights, fused_grpo_loss, preference_loss, reference, sequence_logps


def log_sigmoid(x: float) -> float:
    """log σ(x) without overflow at either end."""
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


# The branches of TRL's DPOTrainer, on `delta` = chosen log-ratio minus rejected log-ratio.
FORMULAS = {
    ("sigmoid", 0.0): lambda delta, beta, eps: -log_sigmoid(beta * delta),
    ("sigmoid", 0.1): lambda delta, beta, eps: (
        -log_sigmoid(beta * delta) * (1 - eps) - log_sigmoid(-beta * delta) * eps
    ),
    ("robust", 0.1): lambda delta, beta, eps: (
        (-log_sigmoid(beta * delta) * (1 - eps) + log_sigmoid(-beta * delta) * eps) / (1 - 2 * eps)
    ),
    ("hinge", 0.0): lambda delta, beta, eps: max(0.0, 1 - beta * delta),
    ("ipo", 0.0): lambda delta, beta, eps: (delta - 1 / (2 * beta)) ** 2,
}


@pytest.mark.parametrize(("loss_type", "eps"), FORMULAS)
@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_each_loss_is_its_papers_formula(loss_type, eps, beta):
    logps, ref = -8 * torch.rand(12, dtype=torch.float64), -8 * torch.rand(12, dtype=torch.float64)
    out = preference_loss(
        logps, ref, torch.zeros(6, dtype=torch.long), torch.ones(1), beta=beta, loss_type=loss_type, label_smoothing=eps
    )
    deltas = [(logps[i] - ref[i]).item() - (logps[6 + i] - ref[6 + i]).item() for i in range(6)]
    expected = [FORMULAS[loss_type, eps](delta, beta, eps) for delta in deltas]
    assert_close(out.losses, torch.tensor(expected, dtype=torch.float64))


def test_averaged_ipo_is_ipo_on_the_mean_log_probability_of_a_token():
    """TRL divides both models' sums by the reply's length for IPO; ours does so when told to."""
    batch = make_batch()
    lengths = (batch.labels[:, 1:] != -100).sum(1).clamp(min=1)
    means = sequence_logps(batch.logits, batch.labels) / lengths - batch.ref_logps / lengths
    expected = (means[:4] - means[4:] - 1 / (2 * 0.1)) ** 2
    out = fused_grpo_loss(batch.logits, batch.labels, *batch.tail(), loss_type="ipo", length_normalize=True)
    assert_close(out.losses, expected)


def test_the_robust_loss_is_unbiased_under_flipped_labels():
    """(1-ε) ℓ(m) + ε ℓ(-m) of the corrected loss is the plain loss of m; of cDPO's it is not."""
    m = torch.linspace(-30, 30, 61, dtype=torch.float64)
    eps, settings = 0.2, {"beta": 0.3, "label_smoothing": 0.2}
    plain = reference.pair_losses(m, beta=0.3)
    for loss_type, unbiased in (("robust", True), ("sigmoid", False)):
        seen = (1 - eps) * reference.pair_losses(m, loss_type=loss_type, **settings)
        seen = seen + eps * reference.pair_losses(-m, loss_type=loss_type, **settings)
        assert torch.allclose(seen, plain, rtol=1e-12, atol=1e-12) == unbiased


def plain_dpo(batch, beta=0.1):
    """(B,) -log σ(β margin), from log-softmax and nothing else."""
    logps = batch.logits[:, :-1].log_softmax(-1)
    targets = batch.labels[:, 1:]
    picked = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(targets == -100, 0).sum(1)
    ratios = picked - batch.ref_logps
    return -torch.nn.functional.logsigmoid(beta * (ratios[:4] - ratios[4:]))


@pytest.mark.parametrize("group_lr", [0.0, 0.7])
def test_one_group_is_dpo_exactly(group_lr):
    batch = make_batch(groups=1)
    out = fused_grpo_loss(
        batch.leaf(),
        batch.labels,
        batch.ref_logps,
        torch.zeros(4, dtype=torch.long),
        GroupWeights.robust([9], group_lr),
    )
    assert out.loss.item() == out.losses.mean().item()
    assert_close(out.loss, plain_dpo(batch).mean())


def test_proportional_weights_are_dpo():
    batch = make_batch()
    out = fused_grpo_loss(
        batch.logits, batch.labels, batch.ref_logps, batch.group_ids, GroupWeights.proportional([7, 2, 1])
    )
    assert_close(out.loss, plain_dpo(batch).mean())


def test_balanced_weights_are_importance_sampled_dpo():
    """Each pair weighs N / (G N_g)."""
    batch, sizes = make_batch(), torch.tensor([7.0, 2.0, 1.0], dtype=torch.float64)
    gw = GroupWeights.balanced([7, 2, 1])
    out = fused_grpo_loss(batch.logits, batch.labels, batch.ref_logps, batch.group_ids, gw)
    assert_close(out.loss, (plain_dpo(batch) * (10 / (3 * sizes))[batch.group_ids]).mean())


def test_balanced_sampling_is_corrected_once():
    """Groups drawn uniformly: IS-DPO needs no weights any more, and plain DPO has to undo the sampling."""
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert_close(GroupWeights.balanced([7, 2, 1], sampling_probs=uniform).loss_weights, torch.ones(3))
    expected = torch.tensor([2.1, 0.6, 0.3], dtype=torch.float64)
    assert_close(GroupWeights.proportional([7, 2, 1], sampling_probs=uniform).loss_weights, expected)


@pytest.mark.filterwarnings("ignore:group_lr")  # batches of one and a large step, to make 60 steps go far
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_one_pair_at_a_time_is_the_papers_algorithm_1(loss_type):
    """A log-linear policy over 5 replies, in numbers: draw, α with this sample's loss, then θ with the new α."""
    sizes, eta_alpha, eta_theta, beta = [6, 3, 1], 0.4, 0.05, 0.5
    rng = torch.Generator().manual_seed(3)
    draws = [
        (
            int(torch.multinomial(torch.tensor(sizes, dtype=torch.float64), 1, generator=rng)),
            *torch.randperm(5, generator=rng)[:2].tolist(),
        )
        for _ in range(60)
    ]
    reference_logps = [math.log(1 / 5)] * 5

    # The paper, in Python floats.  With softmax logits, the normaliser cancels in the margin.
    theta, alpha = [0.0] * 5, [1 / 3] * 3
    history = []
    for g, win, lose in draws:
        m = theta[win] - theta[lose]
        loss = -log_sigmoid(beta * m) if loss_type == "sigmoid" else (m - 1 / (2 * beta)) ** 2
        slope = -beta * math.exp(log_sigmoid(-beta * m)) if loss_type == "sigmoid" else 2 * (m - 1 / (2 * beta))
        alpha[g] *= math.exp(eta_alpha * 10 * loss / sizes[g])
        alpha = [a / sum(alpha) for a in alpha]
        step = eta_theta * 10 * alpha[g] / sizes[g] * slope
        theta[win] -= step
        theta[lose] += step
        history.append((loss, list(alpha), list(theta)))

    gw = GroupWeights.robust(sizes, eta_alpha)
    parameters = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    for (g, win, lose), (loss, alpha_then, theta_then) in zip(draws, history, strict=True):
        out = fused_grpo_loss(
            parameters.expand(2, 1, 5) * 1,
            torch.tensor([[win], [lose]]),
            torch.tensor([reference_logps[win], reference_logps[lose]], dtype=torch.float64),
            torch.tensor([g]),
            gw,
            beta=beta,
            loss_type=loss_type,
            shift=False,
        )
        (grad,) = torch.autograd.grad(out.loss, parameters)
        with torch.no_grad():
            parameters -= eta_theta * grad
        assert_close(out.losses, torch.tensor([loss], dtype=torch.float64))
        assert_close(out.group_weights, torch.tensor(alpha_then, dtype=torch.float64))
        # softmax of the margin's normalisers leaves their rounding in the gradient: 60 steps of it
        assert_close(parameters.detach(), torch.tensor(theta_then, dtype=torch.float64), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("q", [[0.6, 0.3, 0.1], [1 / 3, 1 / 3, 1 / 3], [0.05, 0.05, 0.9]])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_importance_estimate_has_the_group_mean_as_its_expectation(q, batch_size):
    """Exactly: every batch that can be drawn, times its chance.  Whatever q, whatever the batch size."""
    probs = torch.tensor(q, dtype=torch.float64)
    pairs = [(0, 0.4), (0, 1.0), (1, 2.0), (1, 0.2), (2, 3.0)]  # (group, loss)
    sizes = [2, 2, 1]
    expectation = torch.zeros(3, dtype=torch.float64)
    for batch in torch.cartesian_prod(*[torch.arange(len(pairs))] * batch_size).reshape(-1, batch_size).tolist():
        ids = torch.tensor([pairs[i][0] for i in batch])
        losses = torch.tensor([pairs[i][1] for i in batch], dtype=torch.float64)
        chance = math.prod(q[pairs[i][0]] / sizes[pairs[i][0]] for i in batch)
        expectation += chance * reference.importance_losses(losses, ids, probs)
    assert_close(expectation, torch.tensor([0.7, 1.1, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("parts", [2, 4])
def test_the_importance_estimate_adds_up_over_micro_batches(parts):
    """Equal parts of a batch, averaged, are the whole: so ranks and micro-batches may sum what they see."""
    losses, ids = torch.rand(8, dtype=torch.float64), torch.randint(0, 3, (8,))
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    whole = reference.importance_losses(losses, ids, q)
    pieces = [reference.importance_losses(a, b, q) for a, b in zip(losses.chunk(parts), ids.chunk(parts), strict=True)]
    assert_close(torch.stack(pieces).mean(0), whole)


def test_the_module_steps_by_the_oracles_formulas():
    for estimator in ("importance", "group_mean"):
        batch = make_batch()
        gw = GroupWeights.robust([5, 3, 2], 0.8, estimator=estimator)
        out = fused_grpo_loss(batch.leaf(), batch.labels, batch.ref_logps, batch.group_ids, gw)
        q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        if estimator == "importance":
            seen = reference.importance_losses(out.losses, batch.group_ids, q)
        else:
            seen = reference.group_mean_losses(out.losses, batch.group_ids, 3)
        alpha = reference.alpha_step(torch.full((3,), 1 / 3, dtype=torch.float64), seen, 0.8)
        assert_close(gw.weights, alpha)
        # What is trained on is the same line for both estimators.
        assert_close(out.loss, reference.robust_loss(out.losses, batch.group_ids, alpha / q))
