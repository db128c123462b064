"""The paper's synthetic study, against independent reference numbers and against exact optima.

Where a test trains for the full 10,000 iterations in the default run, one fixture does it once for all of them.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from experiments.bandits import __main__ as command
from experiments.bandits import corrections, methods, metrics, optimum, rate, reference, study, tables
from experiments.bandits.data import FEATURES, SCENARIOS, draw, make_bandit, phi
from experiments.bandits.objective import GroupObjective
from grpo_kernels import GroupWeights, preference_loss

SEEDS = tuple(range(2021, 2041))
FAMILIES = {"dpo": methods.DPO, "ipo": methods.IPO}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors of a few thousand numbers: a second thread would cost more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def paper_case():
    """Scenario iii, swapped features, all seeds."""
    return make_bandit("swapped", "iii", SEEDS)


@pytest.fixture(scope="module")
def histories(paper_case):
    """The six methods, trained in full."""
    return {name: methods.train(paper_case, family) for name, family in FAMILIES.items()}


def one_run(bandit, seed_index, group_weights, family, theta, learning_rate, iterations):
    """Full-batch descent as a user of the package writes it: one seed, one method; yields theta after each step."""
    sizes = torch.tensor(bandit.train_sizes)
    group_ids = torch.arange(len(sizes)).repeat_interleave(sizes)
    differences = bandit.train[seed_index]
    for _ in range(iterations):
        theta = theta.detach().requires_grad_()
        margins = differences @ theta
        logps = torch.cat([margins, torch.zeros_like(margins)])
        output = preference_loss(logps, None, group_ids, group_weights, beta=family.beta, loss_type=family.loss_type)
        (gradient,) = torch.autograd.grad(output.loss, theta)
        theta = theta.detach() - learning_rate * gradient
        yield theta


class TestData:
    def test_random_stream_is_the_authors(self):
        np.testing.assert_array_equal(draw(SCENARIOS["iii"], reference.TRAJECTORY_SEED).theta0, reference.THETA0)

    @pytest.mark.parametrize("scenario", list(SCENARIOS))
    def test_second_answers_follow_the_scenario(self, scenario):
        pairs = draw(SCENARIOS[scenario], 7).train
        first, second = pairs.actions.T
        assert tuple(np.bincount(pairs.groups)) == SCENARIOS[scenario].train_sizes
        assert (first != second).all()
        if SCENARIOS[scenario].group_rules:
            steps = np.abs(first - second)
            assert (steps[pairs.groups == 0] == 1).all()
            assert (steps[pairs.groups == 1] == 4).all()

    def test_features_of_group_1(self):
        x, y = np.array([[0.2, 0.7]]), np.array([3])
        zero = phi(x, y, 0, "swapped")
        u, angle = 3 / 8 + 1, np.pi * x[0]
        np.testing.assert_allclose(
            zero[0], [u * np.cos(angle[0]), np.sin(angle[0]) / u, u * np.cos(angle[1]), np.sin(angle[1]) / u]
        )
        np.testing.assert_array_equal(phi(x, y, 1, "swapped"), zero[:, [1, 0, 3, 2]])
        np.testing.assert_array_equal(phi(x, y, 1, "same"), zero)
        np.testing.assert_allclose(
            phi(x, y, 1, "flipped")[0],
            [u * np.sin(angle[0]), np.cos(angle[0]) / u, u * np.sin(angle[1]), np.cos(angle[1]) / u],
        )


class TestTrajectory:
    def test_of_the_reference_through_group_weights(self):
        family = methods.DPO
        bandit = make_bandit("swapped", "iii", (reference.TRAJECTORY_SEED,))
        weights = GroupWeights.robust(bandit.train_sizes, family.group_lr, estimator="group_mean")
        run = one_run(bandit, 0, weights, family, bandit.theta0[0], family.lr, max(reference.TRAJECTORY))
        seen = 0
        for iteration, theta in enumerate(run, start=1):
            if iteration in reference.TRAJECTORY:
                point = reference.TRAJECTORY[iteration]
                np.testing.assert_allclose(theta, point["theta"], rtol=0, atol=1e-9)
                np.testing.assert_allclose(weights.weights, point["alpha"], rtol=0, atol=1e-9)
                seen += 1
        assert seen == 7

    @pytest.mark.parametrize("family", [methods.DPO, methods.IPO_GRADIENT], ids=lambda f: f.methods[0])
    @pytest.mark.parametrize("scenario", ["ii", "iii"])
    def test_seeds_and_methods_at_once_are_the_same_as_one_by_one(self, family, scenario):
        bandit = make_bandit("swapped", scenario, (3, 4))
        together = methods.train(bandit, family, iterations=25)
        sizes = bandit.train_sizes
        for seed in range(2):
            singles = [
                GroupWeights.proportional(sizes),
                torch.tensor(methods.IMPORTANCE_WEIGHTS, dtype=torch.float64),
                GroupWeights.robust(sizes, family.group_lr, estimator="group_mean"),
            ]
            for m, weights in enumerate(singles):
                *_, theta = one_run(bandit, seed, weights, family, bandit.theta0[seed], family.lr, 25)
                torch.testing.assert_close(together.theta[-1, seed, m], theta, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(together.alpha[-1, seed], singles[2].weights, rtol=1e-11, atol=1e-11)


class TestAgainstTheReference:
    @pytest.mark.parametrize("name", list(FAMILIES))
    def test_means_over_seeds_within_the_standard_error(self, paper_case, histories, name):
        family, history = FAMILIES[name], histories[name]
        found = metrics.report(
            paper_case, family.methods, history.theta[-1], history.coefficients[-1], family.loss_type, family.beta
        )
        for method in family.methods:
            for key in metrics.HEADLINES:
                mean, sem = reference.FINAL[method][key]
                assert abs(found[method][key]["mean"] - mean) < sem, (method, key)
                # Far inside it, in fact: the same draws and the same arithmetic.
                assert found[method][key]["mean"] == pytest.approx(mean, rel=1e-6), (method, key)
                assert found[method][key]["sem"] == pytest.approx(sem, rel=1e-5), (method, key)

    @pytest.mark.parametrize("name", list(FAMILIES))
    def test_exact_saddle_points_are_the_references(self, paper_case, name):
        family = FAMILIES[name]
        saddle = optimum.saddle_points(paper_case.train, paper_case.train_sizes, family.loss_type, family.beta)
        for seed, points in reference.SADDLE_POINTS.items():
            s = SEEDS.index(seed)
            assert float(saddle.alpha0[s]) == pytest.approx(points[name]["alpha0"], abs=1e-8)
            for loss in saddle.group_losses[s].tolist():
                assert loss == pytest.approx(points[name]["minimax_train"], rel=1e-9)

    @pytest.mark.parametrize("name", list(FAMILIES))
    def test_the_robust_method_ends_at_the_saddle_point(self, paper_case, histories, name):
        family, history = FAMILIES[name], histories[name]
        theta = history.theta[-1][:, methods.ROBUST :]
        losses = metrics.evaluate(paper_case, theta, family.loss_type, family.beta)["train_group_loss"][:, 0]
        for seed, points in reference.SADDLE_POINTS.items():
            for loss in losses[SEEDS.index(seed)].tolist():
                assert loss == pytest.approx(points[name]["minimax_train"], abs=1e-3)
        saddle = optimum.saddle_points(paper_case.train, paper_case.train_sizes, family.loss_type, family.beta)
        assert float((losses - saddle.group_losses).abs().amax()) < 1e-3  # every seed, not the three given alone
        assert float((losses[:, 0] - losses[:, 1]).abs().amax()) < 1e-3

    def test_averaged_iterates_are_near_the_saddle_too(self, paper_case, histories):
        theta = histories["dpo"].average[-1]
        found = metrics.evaluate(paper_case, theta, "sigmoid", 1.0)["train_group_loss"].amax(dim=-1).mean(dim=0)
        plain, importance, robust = found.tolist()
        assert robust < importance < plain


class TestScenarios:
    @pytest.mark.parametrize("features", FEATURES)
    @pytest.mark.parametrize("scenario", list(SCENARIOS))
    def test_robust_lowers_the_worst_training_loss(self, features, scenario):
        bandit = make_bandit(features, scenario, SEEDS[:5])
        theta = methods.train(bandit, methods.IPO).theta[-1]
        plain, _, robust = metrics.evaluate(bandit, theta, "ipo", 0.1)["train_group_loss"].amax(dim=-1).unbind(dim=1)
        assert (robust <= plain + 1e-3).all()

    def test_descent_on_ipo_ends_where_the_closed_form_does(self):
        bandit = make_bandit("swapped", "iii", SEEDS[:1])
        closed = methods.train(bandit, methods.IPO).theta[-1]
        descended = methods.train(bandit, methods.IPO_GRADIENT).theta[-1]
        torch.testing.assert_close(descended, closed, rtol=0, atol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("features", FEATURES)
    @pytest.mark.parametrize("scenario", ["i", "ii"])
    def test_dpo_family_in_full(self, features, scenario):
        bandit = make_bandit(features, scenario, SEEDS)
        theta = methods.train(bandit, methods.DPO).theta[-1]
        found = metrics.evaluate(bandit, theta, "sigmoid", 1.0)["train_group_loss"].amax(dim=-1).mean(dim=0)
        plain, _, robust = found.tolist()
        assert robust <= plain + 1e-3


class TestOptimum:
    def test_gradient_and_hessian(self, paper_case):
        means = optimum.GroupMeans(paper_case.train[:1], paper_case.train_sizes, beta=0.7)
        alpha, theta = torch.tensor([[0.3, 0.7]]).double(), torch.tensor([[0.4, -0.2, 0.1, 0.9]]).double()
        gradient, hessian = means.derivatives(theta, alpha)

        def value(t):
            return (alpha * means.losses(t.unsqueeze(0))).sum()

        torch.testing.assert_close(gradient[0], torch.func.grad(value)(theta[0]))
        torch.testing.assert_close(hessian[0], torch.func.hessian(value)(theta[0]))

    def test_ball_minimum_is_certified(self, paper_case):
        means = optimum.GroupMeans(paper_case.train, paper_case.train_sizes, beta=1.0)
        alpha = torch.linspace(0.05, 0.95, len(SEEDS)).double()
        alpha = torch.stack([alpha, 1 - alpha], dim=1)
        for radius in (1.0, 5.0, 1e3):
            theta, certificate = optimum.minimise_in_ball(means, alpha, radius)
            assert float(theta.norm(dim=1).max()) <= radius * (1 + 1e-12)
            assert float(certificate.max()) < 1e-8


class TestRate:
    def test_runs_at_once_are_algorithm_1_through_group_weights(self):
        bandit, steps = make_bandit("swapped", "iii", (5, 6)), [30, 50]
        theta_mean, alpha_mean = rate.algorithm_1(bandit, steps, sample_seed=9)
        drawn = np.random.default_rng(9).integers(0, 300, size=(30, 4))
        for seed in range(2):
            weights = GroupWeights.robust(bandit.train_sizes, rate.ALPHA_STEP / 30**0.5)
            theta = torch.zeros(4, dtype=torch.float64)
            thetas, alphas = [], []
            for index in drawn[:, seed]:
                theta = theta.detach().requires_grad_()
                margin = (bandit.train[seed, index] @ theta).reshape(1)
                group = torch.tensor([int(index >= bandit.train_sizes[0])])
                output = preference_loss(torch.cat([margin, torch.zeros_like(margin)]), None, group, weights, beta=1.0)
                (gradient,) = torch.autograd.grad(output.loss, theta)
                theta = theta.detach() - rate.THETA_STEP / 30**0.5 * gradient
                theta = theta * min(1.0, rate.RADIUS / float(theta.norm()))
                thetas.append(theta)
                alphas.append(weights.weights)
            torch.testing.assert_close(theta_mean[seed, 0], torch.stack(thetas).mean(dim=0))
            torch.testing.assert_close(alpha_mean[seed, 0], torch.stack(alphas).mean(dim=0))

    def test_gap_is_zero_at_a_saddle_point_and_positive_elsewhere(self, paper_case):
        saddle = optimum.saddle_points(paper_case.train, paper_case.train_sizes, "sigmoid", 1.0)
        alpha = torch.stack([saddle.alpha0, 1 - saddle.alpha0], dim=1).unsqueeze(1)
        theta = saddle.theta.unsqueeze(1)
        gap, _ = rate.duality_gap(paper_case, theta, alpha, radius=1e3)
        assert float(gap.abs().max()) < 1e-8
        gap, _ = rate.duality_gap(paper_case, theta + 0.1, alpha, radius=1e3)
        assert float(gap.min()) > 0

    def test_gap_shrinks(self, paper_case):
        found = rate.study_rate(paper_case, rate.horizons(last=3.5, per_decade=2))
        assert found["largest_solver_error"] < 1e-8
        assert found["gap"] == sorted(found["gap"], reverse=True)

    @pytest.mark.slow
    def test_gap_falls_with_the_root_of_the_steps_or_faster(self, paper_case):
        found = rate.study_rate(paper_case, rate.horizons())
        assert found["largest_solver_error"] < 1e-8
        assert found["slope"] <= -0.5

    def test_slope(self):
        steps = rate.horizons()
        assert rate.loglog_slope(steps, [t**-0.5 for t in steps]) == pytest.approx(-0.5)


def test_wrong_signs_do_harm():
    found = corrections.study_corrections(make_bandit("swapped", "iii", SEEDS[:3]), iterations=600)["variants"]
    end = {name: curve["mean"][-1] for name, curve in found.items()}
    right, alpha, slope, both = (end[name] for name in corrections.VARIANTS)
    assert right < 0.51 < alpha < slope < both


def test_objective_without_gradients_agrees(paper_case):
    objective = GroupObjective(paper_case.train, paper_case.train_sizes, 2, "sigmoid", 1.0)
    theta = torch.randn(len(SEEDS), 2, 4, dtype=torch.float64)
    losses, _ = objective.losses_and_gradients(theta)
    torch.testing.assert_close(objective.losses(theta), losses, rtol=0, atol=0)
    means = optimum.GroupMeans(paper_case.train, paper_case.train_sizes, 1.0)
    torch.testing.assert_close(losses[:, 0], means.losses(theta[:, 0]))


class TestCommand:
    def test_json(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(study, "DPO", methods.DPO._replace(iterations=20))
        monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
        path = tmp_path / "numbers" / "i.json"
        assert command.main(["--features", "swapped", "--scenario", "i", "--seeds", "1-2,5", "--json", str(path)]) == 0
        found = json.loads(path.read_text())
        assert tuple(found) == reference.METHODS
        for numbers in found.values():
            assert set(numbers) == {*metrics.HEADLINES, "per_seed"}
            assert list(numbers["per_seed"]) == ["1", "2", "5"]
            for key in metrics.HEADLINES:
                values = [seed[key] for seed in numbers["per_seed"].values()]
                assert numbers[key]["mean"] == pytest.approx(np.mean(values))
                assert numbers[key]["sem"] == pytest.approx(np.std(values, ddof=1) / 3**0.5)
        assert "GR-DPO" in capsys.readouterr().out

    @pytest.mark.parametrize("text", ["", "x", "3-", "1,1", "5-4"])
    def test_bad_seeds_are_refused(self, text, capsys):
        with pytest.raises(SystemExit):
            command.main(["--seeds", text, "--json", "unused.json"])
        assert "--seeds" in capsys.readouterr().err

    def test_tables_of_the_documentation_are_the_commands(self, tmp_path):
        docs, copy = command.REPOSITORY / "docs", tmp_path / "paper.md"
        shutil.copy(docs / "paper.md", copy)
        tables.write(tables.load(docs / "figures" / "study.json"), copy)
        assert copy.read_text() == (docs / "paper.md").read_text()

    def test_docs_without_the_page_are_refused_before_anything_runs(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            command.main(["--docs", str(tmp_path)])
        assert "paper.md" in capsys.readouterr().err

    def test_a_page_without_markers_is_refused(self, tmp_path):
        page = tmp_path / "paper.md"
        page.write_text("nothing\n")
        with pytest.raises(ValueError, match="markers"):
            tables.write({}, page)
