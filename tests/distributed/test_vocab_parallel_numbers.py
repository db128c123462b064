"""What half precision, large logits, confident rows and impossible words cost where the vocabulary is split."""

from __future__ import annotations

import itertools

import pytest
import torch
from vocab_ranks import VOCABULARY, WIDTH, Call, batch_of, on_four_ranks, run, small_tiles, together

FIRST = 15
"""Words of the first of two shards."""


def first_words_lower(batch, hidden, weight):
    """By 100, a kept tile's scale among them."""
    hidden[..., 0], weight[:FIRST, 0], weight[FIRST:, 0] = 1, -100, 0


def last_words_lower(batch, hidden, weight):
    hidden[..., 0], weight[:FIRST, 0], weight[FIRST:, 0] = 1, 0, -100


def confident(batch, hidden, weight):
    """1 - p of every label is about 1e-8."""
    words = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    weight.copy_(words / words.norm(dim=1, keepdim=True))
    hidden.copy_(100 * weight[batch.labels.clamp(min=0).roll(-1, -1)])


ROWS = {
    "flat": {},
    "peaked": {"spread": 8.0},
    "at 1e4": {"offset": 1e4, "biased": True},
    "first words lower": {"change": first_words_lower},
    "last words lower": {"change": last_words_lower},
    "confident": {"change": confident},
}
EPSILON = {torch.float32: 4e-7, torch.bfloat16: 1e-3, torch.float16: 2e-4}
"""Beside the error of one process: four roundings of the dtype that results are rounded to, say."""

CALLS = {
    f"{'head' if head else 'logits'}, {str(dtype).removeprefix('torch.')}, {name}, {edges}": Call(
        edges=edges, head=head, dtype=dtype, late=False, **rows
    )
    for head, dtype, (name, rows), edges in itertools.product(
        (True, False), EPSILON, ROWS.items(), ("two", "four, uneven")
    )
    if not (dtype == torch.float16 and name == "at 1e4")
}


def impossible(batch, hidden, weight):
    """Some words, the whole second shard of two and some targets among them, at -inf."""
    hidden[..., 0] = 1
    weight[2, 0] = weight[FIRST:, 0] = -torch.inf
    batch.labels[4, 3:] = 1
    batch.labels[5, 4] = 2
    batch.labels[6, 4] = FIRST


def one_word_possible(batch, hidden, weight):
    hidden[..., 0] = 1
    weight[:, 0] = -torch.inf
    weight[4, 0] = 0
    batch.labels[:] = 4


def impossible_stand_ins(batch, hidden, weight):
    """Both shards' first words at -inf, as targets too."""
    hidden[..., 0] = 1
    weight[0, 0] = weight[FIRST, 0] = -torch.inf
    batch.labels[4, 3:] = 1
    batch.labels[5, 4] = 0
    batch.labels[6, 4] = FIRST


def one_shard_impossible(batch, hidden, weight):
    hidden[..., 0], weight[FIRST:, 0] = 1, -torch.inf


def no_number(batch, hidden, weight):
    """In the second shard, of one row."""
    hidden[4, 2, 0], weight[FIRST + 3, 0] = torch.nan, 1
    batch.labels[4, 3] = 2


ODD = {
    "head, impossible": Call(edges="two", change=impossible, late=False),
    "head, impossible, nothing kept": Call(
        edges="two", change=impossible, late=False, options={"memory_budget": 0}
    ),
    "head, one word possible": Call(edges="two", change=one_word_possible, late=False),
    "head, no number": Call(edges="two", change=no_number, late=False),
    "logits, impossible": Call(edges="two", head=False, change=impossible_stand_ins, late=False),
    "logits, impossible, float32": Call(
        edges="two", head=False, change=impossible_stand_ins, late=False, dtype=torch.float32
    ),
    "logits, no number": Call(edges="two", head=False, change=no_number, late=False),
}  # fmt: skip


NAN = {"logits, one shard impossible": Call(edges="two", head=False, change=one_shard_impossible, late=False)}
"""What one process has numbers for and shards have not: documented, and never a wrong number."""


def scenarios(rank, groups):
    results = {}
    for name, call in (CALLS | ODD | NAN).items():
        group = groups[call.ranks]
        results[name] = run(call, group, rank % group.size())
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_four_ranks(str(tmp_path_factory.mktemp("numbers")), scenarios)


@pytest.fixture(autouse=True)
def _small_tiles():
    small_tiles()


def error(actual, exact):
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("name", CALLS)
def test_the_error_is_that_of_one_process(ranks, name):
    call = CALLS[name]
    shared = together(call, [result[name] for result in ranks[: call.ranks]])
    alone, exact = run(call), run(call, exact=True)
    keys = ["policy_logps", *(key for key in exact if "grad of" in key)]
    # Each rank rounds once how far below its sum one of its logits is, which may be as far as logits lie apart.
    logits = batch_of(call)[0].logits
    rounding = 2.0**-24 * float((logits.amax(-1) - logits.amin(-1)).max())
    for key in keys:
        epsilon = EPSILON[call.dtype if "grad" in key else torch.float32] + rounding
        assert error(shared[key], exact[key]) <= 1.5 * error(alone[key], exact[key]) + epsilon, key


@pytest.mark.parametrize("name", ODD)
def test_impossible_words_are_what_they_are_to_one_process(ranks, name):
    call = ODD[name]
    shared, alone = together(call, [result[name] for result in ranks[:2]]), run(call)
    assert alone["policy_logps"].isfinite().any()
    for key, expected in alone.items():
        near = {"rtol": 1e-5, "atol": 1e-6} if call.dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-13}
        torch.testing.assert_close(shared[key], expected, equal_nan=True, **near)


def test_a_shard_of_logits_that_is_impossible_throughout_gives_nan(ranks):
    for result in ranks:
        found = result["logits, one shard impossible"]
        scored = found["policy_logps"] != 0
        assert scored.any()
        assert found["policy_logps"][scored].isnan().all()
