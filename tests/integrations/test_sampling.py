"""What the samplers promise: the chances they state, batches that depend on seed and step alone, ranks that agree."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch

from grpo_kernels.trainer.data.sampling import KINDS, make_sampler

GROUP_IDS = [0] * 60 + [1] * 30 + [2] * 10


def draws(kind, batches, batch_size=50, seed=0):
    sampler = make_sampler(kind, GROUP_IDS, batch_size, seed)
    return [index for batch in islice(sampler, batches) for index in batch]


@pytest.mark.parametrize(
    ("kind", "probs"), [("shuffle", [0.6, 0.3, 0.1]), ("categorical", [0.6, 0.3, 0.1]), ("balanced", [1 / 3] * 3)]
)
def test_groups_are_drawn_with_the_chance_that_is_stated(kind, probs):
    assert make_sampler(kind, GROUP_IDS, 4, 0).sampling_probs == pytest.approx(probs)
    counts = Counter(GROUP_IDS[index] for index in draws(kind, 400))
    # 20,000 draws: the deviation is at most 0.0035, five times that is never seen.
    assert [counts[g] / 20_000 for g in range(3)] == pytest.approx(probs, abs=0.0175)


@pytest.mark.parametrize("kind", ["categorical", "balanced"])
def test_pairs_of_a_group_are_drawn_alike(kind):
    counts = Counter(draws(kind, 400))
    for members in (range(60), range(60, 90), range(90, 100)):
        seen = [counts[i] for i in members]
        mean = sum(seen) / len(seen)
        assert all(abs(count - mean) < 6 * mean**0.5 for count in seen)


def test_shuffle_sees_every_pair_once_an_epoch_and_every_batch_is_full():
    sampler = make_sampler("shuffle", GROUP_IDS, 30, 0)
    batches = list(islice(sampler, 10))
    assert all(len(batch) == 30 for batch in batches)
    flat = [index for batch in batches for index in batch]
    epochs = [flat[start : start + 100] for start in (0, 100, 200)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_batch_may_be_larger_than_the_data():
    batch = make_sampler("shuffle", [0, 0, 1], 8, 0).batch(0)
    assert sorted(Counter(batch).values()) == [2, 3, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_depends_on_seed_and_step_alone(kind):
    first = list(islice(make_sampler(kind, GROUP_IDS, 16, 3), 20))
    again = make_sampler(kind, torch.tensor(GROUP_IDS), 16, 3)
    torch.manual_seed(123)
    assert [again.batch(step) for step in reversed(range(20))] == first[::-1]
    assert again.step == 0
    assert list(islice(make_sampler(kind, GROUP_IDS, 16, 4), 20)) != first


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_goes_on_with_the_next_batch(kind):
    whole = list(islice(make_sampler(kind, GROUP_IDS, 16, 3), 12))
    sampler = make_sampler(kind, GROUP_IDS, 16, 3)
    iterator = iter(sampler)
    for _ in range(5):
        next(iterator)
    other = make_sampler(kind, GROUP_IDS, 16, 3)
    other.load_state_dict(sampler.state_dict())
    assert list(islice(other, 7)) == whole[5:]


def test_a_state_of_another_sampler_is_refused():
    state = make_sampler("shuffle", GROUP_IDS, 16, 3).state_dict()
    with pytest.raises(ValueError, match="saved with seed=3, this one has 4"):
        make_sampler("shuffle", GROUP_IDS, 16, 4).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with kind='shuffle'"):
        make_sampler("balanced", GROUP_IDS, 16, 3).load_state_dict(state)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_take_equal_slices_of_one_global_batch(kind):
    whole = make_sampler(kind, GROUP_IDS, 12, 0)
    ranks = [make_sampler(kind, GROUP_IDS, 12, 0, rank=rank, world_size=3) for rank in range(3)]
    for step in range(10):
        slices = [sampler.batch(step) for sampler in ranks]
        assert [len(part) for part in slices] == [4, 4, 4]
        assert [index for part in slices for index in part] == whole.batch(step)


def test_steps_end_the_iteration_and_give_it_a_length():
    sampler = make_sampler("balanced", GROUP_IDS, 4, 0, steps=3)
    assert len(sampler) == 3
    assert len(list(sampler)) == 3
    assert list(sampler) == []
    with pytest.raises(TypeError, match="no length"):
        len(make_sampler("balanced", GROUP_IDS, 4, 0))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"kind": "random"}, ValueError, "kind must be one of shuffle, categorical, balanced, got 'random'"),
        ({"group_ids": []}, ValueError, "group_ids must name the group of at least one pair"),
        ({"group_ids": [0, 2, 2]}, ValueError, "got none of group 1"),
        ({"group_ids": [0, 10**12]}, ValueError, "group_ids must leave no group without a pair, got 1000000000000"),
        ({"group_ids": [0, -1]}, ValueError, "group_ids must not be negative, got -1 at 1"),
        ({"group_ids": [0, "a"]}, TypeError, "group_ids must be integers, got str 'a' at 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 5, "world_size": 2}, ValueError, "batch_size must be a multiple of world_size=2, got 5"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank must be less than world_size=2, got 2"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": None}, TypeError, "seed must be an int"),
        ({"steps": -1}, ValueError, "steps must be at least 0"),
    ],
)
def test_bad_arguments_are_named(changes, error, says):
    with pytest.raises(error, match=says):
        make_sampler(**{"kind": "shuffle", "group_ids": [0, 1], "batch_size": 4, "seed": 0, **changes})
