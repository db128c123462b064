"""A vocabulary that is split over two or four ranks gives the numbers of one process, the same bits on every rank."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import IGNORE, assert_close
from vocab_ranks import EDGES, Call, on_four_ranks, run, small_tiles, together


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


def scenarios(rank, groups):
    results = {}
    for name, call in CALLS.items():
        group = groups[len(EDGES[call.edges]) - 1]
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
    call = CALLS[name]
    size = len(EDGES[call.edges]) - 1
    alone = run(call)
    for first in range(0, 4, size):
        shared = together(call, [result[name] for result in ranks[first : first + size]])
        assert shared.keys() == alone.keys()
        for key, expected in alone.items():
            assert_close(shared[key], expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", CALLS)
def test_every_rank_has_the_same_bits(ranks, name):
    first = ranks[0][name]
    for other in ranks[1:]:
        for key in first.keys() - {"grad of weight", "grad of bias", "grad of logits"}:
            if len(EDGES[CALLS[name].edges]) - 1 == 4 or other is ranks[1]:
                assert torch.equal(first[key], other[name][key]), key
