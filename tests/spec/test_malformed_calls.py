"""Every public function against what does not belong in its arguments: the error says which one, and nothing was done.

``test_bad_input.py`` has the rules of each argument one by one.  Here is what no rule was written for at first: things
that Python takes for a flag, numbers that float64 does not hold, tensors that have no strides, states that were
tampered with; and drawn combinations of all of it.
"""

from __future__ import annotations

import copy
import math
import os
import re

import numpy
import pytest
import torch
from drawn import drawn
from helpers import make_batch
from hypothesis import strategies as st

import grpo_kernels as gk

BATCH = make_batch(dtype=torch.float32)  # 4 pairs, 7 tokens, 13 words, 3 groups
HIDDEN, WEIGHT = torch.linspace(-1, 1, 8 * 7 * 5).view(8, 7, 5), torch.linspace(-1, 1, 13 * 5).view(13, 5)
NAN, INF = math.nan, math.inf
HUGE = 10**400  # an int that no float64 holds

LAYOUT = {"ignore_index": -100, "shift": True, "cu_seqlens": None, "tp_group": None, "vocab_start": None}
LAYOUT["backend"] = "auto"
LOSS = {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "pair_weights": None}
PAIRS = {"ref_logps": BATCH.ref_logps, "group_ids": BATCH.group_ids, "group_weights": BATCH.weights}
LOGITS = {"logits": BATCH.logits, "labels": BATCH.labels, "overwrite_logits": False, **LAYOUT}
HEAD = {"bias": None, "softcap": None, "logit_scale": 1.0, "memory_budget": "auto", "num_labelled": None}
LINEAR = {"hidden": HIDDEN, "weight": WEIGHT, "labels": BATCH.labels, **HEAD, **LAYOUT}

GOOD = {
    "fused_grpo_loss": {**LOGITS, **PAIRS, **LOSS, "length_normalize": False},
    "token_logps": LOGITS,
    "sequence_logps": LOGITS,
    "preference_loss": {"policy_logps": torch.zeros(8), "lengths": None, **PAIRS, **LOSS},
    "fused_linear_grpo_loss": {**LINEAR, **PAIRS, **LOSS, "length_normalize": False},
    "linear_token_logps": LINEAR,
    "linear_sequence_logps": LINEAR,
    "exponentiated_step": {
        "log_alpha": torch.zeros(2, 3, dtype=torch.float64),
        "group_losses": torch.ones(3),
        "group_lr": 0.1,
        "adjustment": 0.0,
    },
    "GroupWeights": {
        "group_sizes": [5, 3, 2],
        "group_lr": 0.1,
        "estimator": "importance",
        "prior": "uniform",
        "mixing": 0.0,
        "size_adjustment": 0.0,
        "sampling_probs": None,
        "process_group": None,
    },
}
"""A good call of each public function, every argument by name."""


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert os.listdir(tmp_path) == []


def sparse(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype).to_sparse()


def nested():
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)


NOT_FLAGS = [None, 0, 1, "", "no", torch.tensor(True), torch.ones(2), numpy.array([True, False])]
NOT_NUMBERS = [None, True, "0.1", [0.1], 1j, torch.tensor(0.1), numpy.float32(0.1)]
NOT_FINITE = [NAN, INF, -INF, HUGE, -HUGE, 10**5000]
NOT_NAMES = [None, 3, "gpu", b"cpu", ["cpu"], {"cpu": 1}, numpy.array(["cpu", "torch"])]

TABLE = [
    # (argument, of these functions or None for all that have it, values, error)
    *[(flag, None, NOT_FLAGS, TypeError) for flag in ("shift", "overwrite_logits", "length_normalize")],
    *[(name, None, NOT_NUMBERS, TypeError) for name in ("beta", "label_smoothing", "logit_scale", "mixing")],
    ("softcap", None, NOT_NUMBERS[1:], TypeError),
    ("memory_budget", None, [None, True, [1], torch.tensor(1)], TypeError),
    *[(name, None, NOT_FINITE, ValueError) for name in ("beta", "label_smoothing", "softcap", "logit_scale")],
    *[(name, "GroupWeights", NOT_FINITE, ValueError) for name in ("group_lr", "mixing", "size_adjustment")],
    ("softcap", None, [0.0, -1.0, 1e-19, 1e19, 1e39, 1e-300], ValueError),
    ("logit_scale", None, [0, 1e-19, -1e19, 1e300], ValueError),
    ("memory_budget", None, [NAN, INF, -INF, -1, HUGE, "all", ""], ValueError),
    ("num_labelled", None, [1.0, True, "3", torch.tensor(3)], TypeError),
    ("num_labelled", None, [-1, 57, HUGE], ValueError),
    ("ignore_index", None, [None, True, -100.0, "-100", torch.tensor(-100)], TypeError),
    ("ignore_index", None, [2**63, -(2**63) - 1, HUGE], ValueError),
    ("backend", None, NOT_NAMES, ValueError),
    ("loss_type", None, [None, 0, "dpo", b"ipo", ["ipo"], {"ipo"}, numpy.array(["ipo", "ipo"])], ValueError),
    ("estimator", None, [None, "mean", b"importance", ["importance"], numpy.array(["a", "b"])], ValueError),
    ("logits", None, [sparse(8, 7, 13), nested(), BATCH.logits.to(torch.float8_e4m3fn)], TypeError),
    ("hidden", None, [None, sparse(8, 7, 5), nested(), HIDDEN.to(torch.float8_e5m2)], TypeError),
    ("weight", None, [None, sparse(13, 5), WEIGHT.to(torch.float8_e5m2)], TypeError),
    ("weight", None, [torch.tensor(1.0), torch.zeros(13), torch.zeros(13, 5, 1), torch.zeros(0, 5)], ValueError),
    ("hidden", None, [torch.tensor(1.0), torch.zeros(8, 7), torch.zeros(8, 7, 0)], ValueError),
    ("labels", None, [None, sparse(8, 7, dtype=torch.int64), nested(), BATCH.labels == 0], TypeError),
    ("labels", None, [BATCH.labels.t(), torch.full((8, 7), 2**40), torch.full((8, 7), 13)], ValueError),
    ("ref_logps", None, [sparse(8), nested(), torch.zeros(8, dtype=torch.complex64)], TypeError),
    ("group_ids", None, [None, sparse(4, dtype=torch.int64), torch.zeros(4, dtype=torch.uint8)], TypeError),
    ("group_ids", None, [torch.tensor([0, 0, 0, 2**40]), torch.zeros(4, 1, dtype=torch.int64)], ValueError),
    ("group_weights", None, [None, 1.0, sparse(3), nested(), torch.ones(3, dtype=torch.complex64)], TypeError),
    ("pair_weights", None, [1.0, sparse(4), torch.ones(4, dtype=torch.int64)], TypeError),
    ("bias", None, [0.5, sparse(13), torch.zeros(13, dtype=torch.int64)], TypeError),
    ("bias", None, [torch.zeros(5), torch.zeros(13, 1)], ValueError),
    ("cu_seqlens", "fused_grpo_loss", [torch.tensor([0, 8], dtype=torch.int32)], ValueError),
    ("policy_logps", None, [None, sparse(8), nested(), torch.zeros(8, dtype=torch.int64)], TypeError),
    ("lengths", None, [7, sparse(8), torch.zeros(8, dtype=torch.complex64)], TypeError),
    ("log_alpha", None, [torch.zeros(3).to(torch.float8_e4m3fn), torch.zeros(3, dtype=torch.int64)], TypeError),
    ("group_losses", None, [torch.zeros(3).to(torch.float8_e4m3fn), torch.zeros(3, dtype=torch.int16)], TypeError),
    ("log_alpha", None, [None, [0.0], sparse(3), nested(), torch.zeros(3, dtype=torch.complex64)], TypeError),
    ("log_alpha", None, [torch.tensor(0.0), torch.zeros(0), torch.zeros(3, 0)], ValueError),
    ("group_losses", None, [None, torch.zeros(2), torch.zeros(3, 3), torch.zeros(3, device="meta")], ValueError),
    ("group_losses", None, [torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.bool)], TypeError),
    ("group_lr", "exponentiated_step", [None, True, "fast", torch.tensor(True), torch.tensor(1j)], TypeError),
    ("group_lr", "exponentiated_step", [-1, NAN, HUGE, torch.tensor(-1.0), torch.tensor([0.1, NAN, 0.1])], ValueError),
    ("group_lr", "exponentiated_step", [torch.ones(2), torch.ones(5, 1, 2), torch.tensor(INF)], ValueError),
    ("adjustment", None, [None, True, "1", [0.1, 0.1, 0.1], numpy.ones(3), torch.tensor(1j)], TypeError),
    ("adjustment", None, [NAN, INF, HUGE, torch.ones(2), torch.ones(3, 3)], ValueError),
    ("group_sizes", None, [None, 3, "abc", b"abc", {1, 2}, torch.tensor(3), numpy.array(3), iter([1])], TypeError),
    ("group_sizes", None, [[1.0], ["3"], [[1, 2]], {"a": None}, torch.ones(3), numpy.ones(3)], TypeError),
    ("group_sizes", None, [torch.ones(3, dtype=torch.int64, device="meta"), sparse(3, dtype=torch.int64)], TypeError),
    ("group_sizes", None, [(), {}, [0], {"a": -1}, [2**53 + 1], {"a": HUGE}, {1: 1, "1": 1}], ValueError),
    ("prior", None, [None, [0.5, "x", 0.5], HUGE, sparse(3), torch.ones(3, device="meta"), 1j], TypeError),
    ("prior", None, [0.5, "", "flat", [0.5, 0.5], [NAN, 0.5, 0.5], [1.5, -1.0, 0.5], [[0.2, 0.3, 0.5]]], ValueError),
    ("sampling_probs", None, [[1, 1j, 1], sparse(3), torch.ones(3, dtype=torch.complex64) / 3, [HUGE] * 3], TypeError),
    ("sampling_probs", None, ["abc", {1: 1.0}], TypeError),
    ("sampling_probs", None, [[], [0.5, 0.5], [0.2, 0.3, 0.4], [1.0, 0.0, 0.0], torch.ones(3)], ValueError),
    ("tp_group", None, [0, "gloo", [0, 1], object()], TypeError),
    ("vocab_start", None, [0, -1, 1.0, "0"], (TypeError, ValueError)),
    ("process_group", None, [0, -100, "gloo", [0, 1], object()], TypeError),
]  # fmt: skip


def cases():
    for argument, only, values, error in TABLE:
        functions = [name for name, call in GOOD.items() if argument in call and only in (None, name)]
        assert functions, argument
        for function in functions:
            for i, value in enumerate(values):
                yield pytest.param(
                    function, argument, value, error, id=f"{function}-{argument}-{type(value).__name__}{i}"
                )


CASES = list(cases())


def test_there_are_hundreds_of_them():
    assert len(CASES) >= 400


@pytest.mark.parametrize("function", GOOD)
def test_the_good_call_is_good(function):
    getattr(gk, function)(**GOOD[function])


@pytest.mark.parametrize(("function", "argument", "value", "error"), CASES)
def test_a_malformed_argument_is_named(function, argument, value, error):
    with pytest.raises(error) as caught:
        getattr(gk, function)(**{**GOOD[function], argument: value})
    assert re.search(rf"\b{argument}\b", str(caught.value)), caught.value
    assert type(caught.value) in (TypeError, ValueError)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((8, 7, 13), (7, 5, 1)), ((8, 7, 13), (91, 12, 1)), ((8, 7, 13), (13, 13, 1)), ((8, 7, 13), (0, 13, 1))],
)
def test_logits_that_overlap_themselves_are_not_overwritten(shape, strides):
    logits = torch.zeros(1000, requires_grad=True).mul(1).as_strided(shape, strides)
    with pytest.raises(ValueError, match=r"overwrite_logits=True needs logits of which no two share"):
        gk.sequence_logps(logits, torch.zeros(shape[:2], dtype=torch.int64), overwrite_logits=True)


def test_a_label_is_not_taken_for_an_ignore_index_that_int32_cannot_hold():
    """2^32 + 13 is 13 in 32 bits."""
    labels = torch.full((8, 7), 13, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 13\)"):
        gk.sequence_logps(BATCH.logits, labels, ignore_index=2**32 + 13)


# ---- what GroupWeights is told after it was made


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("group_sums", torch.zeros(2), ValueError),
        ("group_sums", torch.zeros(1, 3), ValueError),
        ("group_sums", [0.0] * 3, TypeError),
        ("group_sums", torch.zeros(3, dtype=torch.complex64), TypeError),
        ("group_counts", torch.zeros(4), ValueError),
        ("group_counts", None, TypeError),
        ("group_counts", torch.zeros(3, device="meta"), ValueError),
        ("losses", torch.zeros(()), ValueError),
        ("losses", torch.zeros(2, 2), ValueError),
        ("losses", sparse(4), TypeError),
    ],
)
def test_what_is_observed_has_the_shape_of_the_groups(argument, value, error):
    """Sums for two groups beside counts for four would fill the eight places of three groups."""
    gw = gk.GroupWeights.robust([5, 3, 2], 0.1)
    good = {"group_sums": torch.ones(3), "group_counts": torch.ones(3), "losses": torch.ones(3)}
    with pytest.raises(error, match=argument):
        gw.observe(**{**good, argument: value})
    if argument == "group_sums" and error is ValueError:
        with pytest.raises(ValueError, match="group_sums"):
            gw.observe(value, torch.ones(4), torch.ones(3))
    assert not gw.pending.any()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("log_alpha", torch.zeros(2), r"log_alpha in the state must be 3 floating numbers, got .*\(2,\)"),
        ("log_alpha", torch.zeros(3, 1), "log_alpha in the state must be 3"),
        ("log_alpha", torch.zeros(3, dtype=torch.int64), "floating numbers, got a torch.int64"),
        ("log_alpha", [0.0, 0.0, 0.0], "floating numbers, got list"),
        ("log_alpha", torch.tensor([0.0, NAN, 0.0]), "logarithms of weights, got list .*nan"),
        ("log_alpha", torch.tensor([0.0, INF, 0.0]), "logarithms of weights"),
        ("log_alpha", torch.full((3,), -INF), "logarithms of weights"),
        ("pending", torch.zeros(3), "pending in the state must be 8 floating numbers"),
        ("pending", torch.zeros(8, dtype=torch.complex64), "pending in the state"),
        ("_extra_state", None, "names of its groups, got NoneType"),
        ("_extra_state", {"name": ["0", "1", "2"]}, "names of its groups"),
        ("_extra_state", {"names": "012"}, "names of its groups"),
        ("_extra_state", {"names": ["0", "1", "1"]}, "different sets of groups"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "weights."])
def test_a_state_that_was_tampered_with_is_refused_and_changes_nothing(prefix, key, value, message):
    gw = gk.GroupWeights.robust([5, 3, 2], 0.1)
    gw.observe(torch.ones(3), torch.ones(3), torch.ones(3))
    module = torch.nn.ModuleDict({"weights": gw}) if prefix else gw
    before = copy.deepcopy(gw.state_dict())
    with pytest.raises(ValueError, match=message):
        module.load_state_dict({**module.state_dict(), prefix + key: value})
    assert all(torch.equal(before[name], now) for name, now in gw.state_dict().items() if name != "_extra_state")


def test_the_result_has_the_dtype_of_log_alpha_whatever_the_rate_is():
    step = gk.exponentiated_step(torch.zeros(3), torch.ones(3), torch.full((2, 1), 0.1, dtype=torch.float64))
    assert step.dtype == torch.float32
    step = gk.exponentiated_step(torch.zeros(3), torch.ones(3), 1, adjustment=torch.zeros(3, dtype=torch.float64))
    assert step.dtype == torch.float32


# ---- a model's own call


class Tiny(torch.nn.Module):
    """The least that a causal language model is."""

    def __init__(self):
        super().__init__()
        self.table, self.head = torch.nn.Embedding(13, 5), torch.nn.Linear(5, 13)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False, labels=None):
        return self.head(self.table(input_ids))


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("model", None, TypeError),
        ("model", "gpt2", TypeError),
        ("model", torch.nn.Linear(5, 13), ValueError),
        ("model", Tiny().to("meta"), ValueError),
        ("ignore_index", None, TypeError),
        ("ignore_index", 2**63, ValueError),
        ("memory_budget", "all", ValueError),
        ("memory_budget", -1, ValueError),
        ("memory_budget", None, TypeError),
        ("backend", "fast", ValueError),
        ("backend", ["cpu"], ValueError),
        ("example", [1, 2], TypeError),
        ("example", {}, ValueError),
        ("example", {"input_ids": [1, 2]}, ValueError),
        ("example", {"input_ids": torch.zeros(2, dtype=torch.int64)}, ValueError),
        ("example", {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}, ValueError),
    ],
)
def test_a_head_that_cannot_be_attached_says_why_and_leaves_no_hook(argument, value, error):
    model = Tiny()
    with pytest.raises(error, match="LM head" if isinstance(value, torch.nn.Linear) else argument):
        gk.attach_fused_head(**{"model": model, argument: value})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "labels",
    [
        None,
        [[1, 2, 3]],
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(2, 4, dtype=torch.int64),
        torch.zeros(2, 3),
        torch.full((2, 3), 13),
        torch.zeros(2, 3, dtype=torch.int64).to_sparse(),
    ],
)
def test_a_call_with_bad_labels_says_so_and_leaves_the_model_as_it_was(labels):
    model, ids = Tiny(), torch.randint(0, 13, (2, 3))
    plain = model(ids)
    with gk.attach_fused_head(model):
        with pytest.raises((TypeError, ValueError), match="labels"):
            model(ids, fused_labels=labels)
        with pytest.raises(ValueError, match="labels must not be given with fused_labels"):
            model(ids, fused_labels=ids, labels=ids)
        assert torch.equal(model(ids), plain)
        expected = gk.token_logps(plain, ids)
        torch.testing.assert_close(model(ids, fused_labels=ids).token_logps, expected)


# ---- anything, anywhere

ANYTHING = [
    *[value for *_, values, _ in TABLE for value in values],
    *[value for call in GOOD.values() for value in call.values()],
    torch.zeros(0), torch.zeros(3, 3), torch.zeros(4).half(), torch.zeros(8, 7, 13).bfloat16(), torch.zeros(1, 1, 1),
    torch.zeros(8, 7, dtype=torch.int32), torch.zeros(8, dtype=torch.int32), torch.full((4,), NAN),
    torch.tensor([0, 56], dtype=torch.int32), torch.zeros(13), torch.zeros(5, 13).t(), object(), lambda: 0, range(3),
]  # fmt: skip


@drawn(default=150, slow=600, nightly=6000)
def test_whatever_comes_is_taken_or_refused_by_name(data):
    """No argument, nor any three at once, gets a call past its checks into an error of somebody else's."""
    function = data.draw(st.sampled_from(sorted(GOOD)), label="function")
    names = data.draw(st.lists(st.sampled_from(sorted(GOOD[function])), min_size=1, max_size=3, unique=True))
    junk = {name: ANYTHING[data.draw(st.integers(0, len(ANYTHING) - 1), label=name)] for name in names}
    gw = gk.GroupWeights.robust([5, 3, 2], 0.1)
    call = {**GOOD[function], **junk}
    if call.get("group_weights") is BATCH.weights:
        call["group_weights"] = gw
    refused = None
    try:
        getattr(gk, function)(**call)
    except (TypeError, ValueError, gk.UnavailableBackendError) as error:
        refused = str(error)
    assert refused is None or any(re.search(rf"\b{name}\b", refused) for name in GOOD[function]), refused
    assert not gw.pending.any()
    assert int(gw.num_updates) == 0  # nothing here requires grad
