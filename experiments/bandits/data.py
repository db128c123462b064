"""States, actions, features and rewards of the bandit, and the data sets of one seed.

A state is x in [0, 1]^2, an action y in 0..7, a group g in {0, 1}; the policy is log-linear with one theta in R^4 for
both groups, pi(y | x, g) proportional to exp <phi(x, y, g), theta>, and its reference is uniform.  The margin of a
pair is then ``<phi(winner) - phi(loser), theta>``, so a data set is a matrix of feature differences.

The draws follow the stream of the authors' code number for number: numpy's legacy generator, which is frozen, seeded
once, and asked in the same order, draws that are thrown away included.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch

NUM_ACTIONS = 8
NUM_GROUPS = 2
NUM_FEATURES = 4
NUM_TRAIN = 300
NUM_EVAL = 1000
FEATURES = ("swapped", "same", "flipped")
REWARD_PARAMETERS = np.array([[1.0, 3.0, 1.0, 3.0], [3.0, 1.0, 3.0, 1.0]])
"""(G, 4) the true theta*_g that rewards come from."""


class Scenario(NamedTuple):
    """How many training pairs each group has, and how the second answer of a pair is drawn."""

    train_sizes: tuple[int, int]
    group_rules: bool
    """True: group 0 compares neighbouring actions, group 1 actions four apart.  False: any two."""
    what: str


SCENARIOS = {
    "i": Scenario((60, 240), False, "imbalanced groups, same response distribution"),
    "ii": Scenario((150, 150), True, "balanced groups, different response distributions"),
    "iii": Scenario((60, 240), True, "imbalanced groups, different response distributions"),
}


class Pairs(NamedTuple):
    """Compared answers: groups (N,), states (N, 2), actions (N, 2), not yet ordered by reward."""

    groups: np.ndarray
    states: np.ndarray
    actions: np.ndarray


class Draws(NamedTuple):
    """Everything random about one seed; features are no part of it."""

    train: Pairs
    validation: Pairs
    test_states: np.ndarray
    theta0: np.ndarray


@cache  # the kinds of features share their draws, which take longer than anything built on them
def draw(scenario: Scenario, seed: int) -> Draws:
    """The data sets and the starting point of one seed; not to be written to."""
    rng = np.random.RandomState(seed)
    half = NUM_EVAL // 2
    rng.uniform(size=2)
    train = _draw_pairs(rng, scenario.train_sizes, scenario.group_rules, discard=scenario.group_rules)
    test = _draw_pairs(rng, (half, half), group_rules=False, discard=False)
    validation = _draw_pairs(rng, (half, half), scenario.group_rules, discard=True)
    rng.standard_normal(4)
    rng.uniform(size=2)
    return Draws(train, validation, test.states, rng.uniform(0, 5, NUM_FEATURES))


def _draw_pairs(rng: np.random.RandomState, sizes: tuple[int, int], group_rules: bool, discard: bool) -> Pairs:
    groups = [0] * sizes[0] + [1] * sizes[1]
    rng.shuffle(groups)
    uniform = np.full(NUM_ACTIONS, 1 / NUM_ACTIONS)
    states, actions = [], []
    for group in groups:
        states.append(rng.uniform(0, 1, 2))
        if not group_rules:
            first, second = rng.choice(NUM_ACTIONS, size=2, replace=False, p=uniform)
        else:
            first = rng.choice(NUM_ACTIONS, size=1, replace=False, p=uniform)[0]
            if group == 0:
                upwards = rng.choice(2, size=1, replace=False, p=[0.5, 0.5])[0] == 1
                second = first + 1 if upwards else first - 1
                if not 0 <= second < NUM_ACTIONS:  # reflected at the ends
                    second = 2 * first - second
            else:
                second = (first + NUM_ACTIONS // 2) % NUM_ACTIONS
        actions.append((first, second))
        if discard:  # the authors' code draws a number here for noisy labels, which this study does not have
            rng.uniform(0, 1)
    return Pairs(np.array(groups), np.array(states), np.array(actions))


def phi(states: np.ndarray, actions: np.ndarray, group: int, features: str) -> np.ndarray:
    """(..., 4) the features of an action in a state, for one group; states (..., 2), actions (...)."""
    u = actions / NUM_ACTIONS + 1
    cos, sin = np.cos(np.pi * states), np.sin(np.pi * states)
    if group == 1 and features == "flipped":
        cos, sin = sin, cos
    values = [u * cos[..., 0], sin[..., 0] / u, u * cos[..., 1], sin[..., 1] / u]
    if group == 1 and features == "swapped":
        values = [values[1], values[0], values[3], values[2]]
    return np.stack(values, axis=-1)


def feature_differences(pairs: Pairs, features: str) -> np.ndarray:
    """(N, 4) ``phi(winner) - phi(loser)``; the answer of higher reward wins, the second one in a tie."""
    differences = np.empty((len(pairs.groups), NUM_FEATURES))
    for group in range(NUM_GROUPS):
        mine = pairs.groups == group
        first, second = (phi(pairs.states[mine], pairs.actions[mine, k], group, features) for k in (0, 1))
        reward = REWARD_PARAMETERS[group]
        first_wins = (first * reward).sum(axis=-1) > (second * reward).sum(axis=-1)
        differences[mine] = np.where(first_wins[:, None], first - second, second - first)
    return differences


class Bandit(NamedTuple):
    """The data sets of S seeds as float64 tensors; pairs stand group by group, so that group 0 is the first N_0."""

    seeds: tuple[int, ...]
    train_sizes: tuple[int, int]
    train: torch.Tensor
    """(S, 300, 4) feature differences."""
    validation: torch.Tensor
    """(S, 1000, 4) feature differences, 500 of each group."""
    test_features: torch.Tensor
    """(S, G, 1000, 8, 4) features of every action in every test state, as each group sees them."""
    test_rewards: torch.Tensor
    """(S, G, 1000, 8) their rewards."""
    theta0: torch.Tensor
    """(S, 4) where the methods start."""

    @property
    def validation_sizes(self) -> tuple[int, int]:
        """Pairs of each group in the validation set."""
        return NUM_EVAL // 2, NUM_EVAL // 2


def make_bandit(features: str, scenario: str, seeds: tuple[int, ...]) -> Bandit:
    """Draw S seeds and stack them."""
    draws = [draw(SCENARIOS[scenario], seed) for seed in seeds]
    actions = np.arange(NUM_ACTIONS)
    test_features = np.stack(
        [np.stack([phi(d.test_states[:, None], actions, g, features) for g in range(NUM_GROUPS)]) for d in draws]
    )
    return Bandit(
        seeds=tuple(seeds),
        train_sizes=SCENARIOS[scenario].train_sizes,
        train=_stack([_by_group(d.train, features) for d in draws]),
        validation=_stack([_by_group(d.validation, features) for d in draws]),
        test_features=torch.from_numpy(test_features),
        test_rewards=torch.from_numpy(np.einsum("sgmyk,gk->sgmy", test_features, REWARD_PARAMETERS)),
        theta0=_stack([d.theta0 for d in draws]),
    )


def _by_group(pairs: Pairs, features: str) -> np.ndarray:
    return feature_differences(pairs, features)[np.argsort(pairs.groups, kind="stable")]


def _stack(arrays: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays))
