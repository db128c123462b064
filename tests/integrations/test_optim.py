"""The step on the policy: schedules, clipping, projection on a ball, the average of the iterates."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_kernels.trainer.config import OptimConfig
from grpo_kernels.trainer.model.optim import (
    BallProjection,
    IterateAverage,
    clip_gradients,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    trained_parameters,
)


def parameters(*values: float):
    return {f"p{i}": torch.nn.Parameter(torch.tensor([float(value)])) for i, value in enumerate(values)}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0] * 5),
        ("linear", [1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [(1 + math.cos(math.pi * k / 5)) / 2 for k in range(5)]),
    ],
)
def test_a_schedule_falls_to_nothing_at_the_last_step(schedule, expected):
    config = OptimConfig(lr=1.0, schedule=schedule)
    assert [learning_rate(step, 5, config) for step in range(5)] == pytest.approx(expected)


def test_warming_up_rises_to_the_peak_and_then_the_schedule_begins():
    config = OptimConfig(lr=1.0, schedule="linear", lr_warmup_steps=3)
    assert [learning_rate(step, 7, config) for step in range(7)] == pytest.approx([0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("rmsprop", torch.optim.RMSprop)]
)
def test_weight_decay_falls_on_matrices_alone(name, kind):
    trained = {"matrix": torch.nn.Parameter(torch.ones(2, 2)), "bias": torch.nn.Parameter(torch.ones(2))}
    optimizer = make_optimizer(trained, OptimConfig(name=name, lr=0.1, weight_decay=0.5))
    assert type(optimizer) is kind
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert (trained["matrix"] < 1).all()
    assert torch.equal(trained["bias"], torch.ones(2))


def test_the_learning_rate_reaches_every_parameter():
    trained = {"matrix": torch.nn.Parameter(torch.ones(2, 2)), "bias": torch.nn.Parameter(torch.ones(2))}
    optimizer = make_optimizer(trained, OptimConfig(name="sgd", lr=0.1))
    set_learning_rate(optimizer, 1.0)
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all((parameter == 0).all() for parameter in trained.values())


def test_only_what_requires_grad_is_trained_and_tied_tensors_once():
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 1)
    )
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    assert list(trained_parameters(model)) == ["0.weight", "2.bias"]
    with pytest.raises(ValueError, match="at least one parameter"):
        make_optimizer({}, OptimConfig())


def test_clipping_bounds_the_norm_of_all_gradients_together_and_returns_the_one_before():
    for limit, after in ((1.0, 1.0), (0.0, 5.0), (9.0, 5.0)):
        trained = parameters(0, 0)
        for parameter, grad in zip(trained.values(), (3.0, 4.0), strict=True):
            parameter.grad = torch.tensor([grad])
        assert float(clip_gradients(trained.values(), limit)) == pytest.approx(5)
        norm = math.hypot(*(float(parameter.grad) for parameter in trained.values()))
        assert norm == pytest.approx(after, rel=1e-4)


@pytest.mark.parametrize("center", [None, (1.0, 1.0)])
def test_projection_takes_the_nearest_point_of_the_ball(center):
    at = (0.0, 0.0) if center is None else center
    trained = parameters(at[0] + 6, at[1] - 8)
    middle = None if center is None else {f"p{i}": torch.tensor([c]) for i, c in enumerate(center)}
    project = BallProjection(trained, 5.0, middle)
    assert project() == pytest.approx(10)
    assert [p.item() - c for p, c in zip(trained.values(), at, strict=True)] == pytest.approx([3, -4])


def test_projection_leaves_the_bits_of_what_is_inside():
    trained = {"w": torch.nn.Parameter(torch.randn(1000))}
    start = {"w": torch.randn(1000)}
    before = trained["w"].detach().clone()
    BallProjection(trained, 1e3, start)()
    assert torch.equal(trained["w"], before)


def test_the_average_is_the_plain_mean_of_the_iterates_and_gives_the_parameters_back():
    trained = parameters(0.0)
    average = IterateAverage(trained)
    for value in (1.0, 2.0, 6.0):
        with torch.no_grad():
            trained["p0"].fill_(value)
        average.update()
    with average:
        assert trained["p0"].item() == pytest.approx(3)
    assert trained["p0"].item() == 6
    assert trained["p0"].requires_grad


def test_the_average_of_half_precision_is_kept_in_float32():
    trained = {"w": torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))}
    average = IterateAverage(trained)
    for k in range(1000):
        with torch.no_grad():
            trained["w"].fill_(1 + (k % 2) / 128)
        average.update()
    assert average.mean["w"].dtype == torch.float32
    assert float(average.mean["w"]) == pytest.approx(1 + 1 / 256, rel=1e-5)
