"""A vocabulary that is split over two or four ranks gives the numbers of one process, the same bits on every rank."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from helpers import IGNORE, assert_close
from vocab_ranks import EDGES, VOCABULARY, Call, on_four_ranks, run, small_tiles, together


def ignore_7(batch, hidden, weight):
    batch.labels[batch.labels == IGNORE] = 7


CALLS = {
    f"{name}; {edges}": Call(edges=edges, **settings)
    for (name, settings), edges in itertools.product(
        {
            "head": {},
            "frozen head": {"frozen": True},
            "head, nothing kept, bias": {"biased": True, "options": {"memory_budget": 0}},
            "head, some kept, cap, scale": {
                "packed": True, "biased": True, "options": {"softcap": 3.0, "logit_scale": -0.5, "memory_budget": 2000}
            },
            "logits": {"head": False},
            "logits, packed, overwritten": {
                "head": False, "packed": True, "options": {"overwrite_logits": True, "length_normalize": True}
            },
        }.items(),
        EDGES,
    )
}  # fmt: skip
CALLS |= {
    "head, backwards": Call(edges="four, uneven", reverse=True),
    "logits, backwards": Call(edges="four, uneven", head=False, reverse=True),
    "head, ignore_index is a word": Call(options={"ignore_index": 7}, change=ignore_7),
    "logits, ignore_index is a word": Call(head=False, options={"ignore_index": 7}, change=ignore_7),
}


def drawn(number):
    """Any split, any settings."""
    draw = random.Random(number)
    ranks = draw.choice([2, 4])
    inner = sorted(draw.choices(range(VOCABULARY + 1), k=ranks - 1))
    options = {
        "shift": draw.random() < 0.5, "length_normalize": draw.random() < 0.5,
        "loss_type": draw.choice(["sigmoid", "robust", "hinge", "ipo"]), "backend": draw.choice(["auto", "torch"]),
    }  # fmt: skip
    head = draw.random() < 0.6
    if head:
        options |= {
            "memory_budget": draw.choice([0, 300, 1500, 4000, "auto"]), "softcap": draw.choice([None, 2.0, 20.0]),
            "logit_scale": draw.choice([1.0, 0.3, -2.0]),
        }  # fmt: skip
    else:
        options["overwrite_logits"] = draw.random() < 0.5
    return Call(
        edges=(0, *inner, VOCABULARY), head=head, packed=draw.random() < 0.5, biased=draw.random() < 0.5,
        frozen=draw.random() < 0.3, options=options, reverse=draw.random() < 0.3, spread=draw.choice([1.0, 3.0, 10.0]),
    )  # fmt: skip


DRAWN = {f"drawn {number}": drawn(number) for number in range(200)}


def drawn_scenarios(rank, groups):
    return scenarios(rank, groups, DRAWN)


def scenarios(rank, groups, calls=CALLS):
    results = {}
    for name, call in calls.items():
        group = groups[call.ranks]
        results[name] = run(call, group, rank % group.size())
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_four_ranks(str(tmp_path_factory.mktemp("vocabulary")), scenarios)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    small_tiles()


@pytest.mark.parametrize("name", CALLS)
def test_the_numbers_are_those_of_one_process(ranks, name):
    check(CALLS[name], [result[name] for result in ranks])


@pytest.mark.slow
def test_any_split_with_any_settings(tmp_path):
    ranks = on_four_ranks(str(tmp_path), drawn_scenarios)
    for name, call in DRAWN.items():
        check(call, [result[name] for result in ranks])


def check(call, results):
    """Against one process, pair of ranks by pair where two share."""
    alone = run(call)
    for first in range(0, len(results), call.ranks):
        shared = together(call, results[first : first + call.ranks])
        assert shared.keys() == alone.keys()
        for key, expected in alone.items():
            assert_close(shared[key], expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", CALLS)
def test_every_rank_has_the_same_bits(ranks, name):
    first = ranks[0][name]
    for other in ranks[1:]:
        for key in first.keys() - {"grad of weight", "grad of bias", "grad of logits"}:
            if CALLS[name].ranks == 4 or other is ranks[1]:
                assert torch.equal(first[key], other[name][key]), key
