"""Arguments are read once: into one object that is checked, normalised and immutable, and never looked at again."""

from __future__ import annotations

import inspect
import itertools
import sys
import weakref
from collections import Counter

import pytest
import torch
from helpers import IGNORE, make_batch
from torch.multiprocessing.reductions import StorageWeakRef

import grpo_kernels
from grpo_kernels import GroupWeights, available_backends, linear_token_logps
from grpo_kernels.backends import choose
from grpo_kernels.head import arguments as head_arguments
from grpo_kernels.head.arguments import HeadArguments
from grpo_kernels.head.ops import from_schema, to_schema
from grpo_kernels.loss import arguments as loss_arguments
from grpo_kernels.loss.arguments import GivenPairs, LossArguments
from grpo_kernels.loss.ops import OperatorBackend
from grpo_kernels.types import LOSS_TYPES
from grpo_kernels.vocab.shards import Shard

GOOD = make_batch(dtype=torch.float32)  # 4 pairs, 7 tokens, 13 tokens of vocabulary, 3 groups
PACKED = make_batch(packed=True, dtype=torch.float32)
LAYOUT = {"ignore_index": IGNORE, "shift": True, "cu_seqlens": None, "tp_group": None, "vocab_start": None}
LAYOUT["backend"] = "torch"
CPU = torch.device("cpu")
HIDDEN, WEIGHT, BIAS = torch.randn(8, 7, 5), torch.randn(13, 5), torch.randn(13)
HEAD = {"bias": None, "softcap": None, "logit_scale": 1.0, "memory_budget": "auto", "num_labelled": None, **LAYOUT}


def given(**changes) -> GivenPairs:
    good = GivenPairs(GOOD.ref_logps, GOOD.group_ids, GOOD.weights, 0.1, "sigmoid", 0.0, None)
    return good._replace(**changes)


def from_logits(logits=GOOD.logits, labels=GOOD.labels, pairs=None, **changes):
    return LossArguments.from_logits(logits, labels, pairs, **{"overwrite_logits": False, **LAYOUT, **changes})


def from_hidden(hidden=HIDDEN, weight=WEIGHT, labels=GOOD.labels, pairs=None, **changes):
    return HeadArguments.from_hidden(hidden, weight, labels, pairs, **{**HEAD, **changes})


# ---- what comes out


def expected_targets(labels, shift, edges):
    """One row at a time, in Python: the label of the next row, none in the last row of a sequence."""
    flat, last = labels.flatten().tolist(), {edge - 1 for edge in edges}
    return [IGNORE if row in last else flat[row + 1] for row in range(len(flat))] if shift else flat


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("read", [from_logits, from_hidden], ids=["logits", "hidden"])
def test_targets_are_what_each_row_has_to_predict(read, shift):
    *_, padded = read(shift=shift)
    packed_input = {from_logits: PACKED.logits, from_hidden: torch.randn(PACKED.logits.shape[0], 5)}[read]
    *_, packed = read(packed_input, labels=PACKED.labels, cu_seqlens=PACKED.cu_seqlens, shift=shift)
    for arguments, labels, edges in (
        (padded, GOOD.labels, range(7, 57, 7)),
        (packed, PACKED.labels, PACKED.cu_seqlens.tolist()),
    ):
        rows = (arguments.loss if isinstance(arguments, HeadArguments) else arguments).rows
        assert rows.targets.tolist() == expected_targets(labels, shift, edges)
        assert (rows.num_rows, rows.num_sequences) == (labels.numel(), 8)
        values = torch.where(rows.targets == IGNORE, 0.0, torch.arange(1.0, rows.num_rows + 1))
        by_label = rows.per_label(values)
        assert by_label.shape == labels.shape
        scored = by_label.flatten() != 0
        assert labels.flatten()[scored].tolist() == rows.targets[rows.targets != IGNORE].tolist()


ODD_FORMS = {
    "int32 labels": ({"labels": GOOD.labels.int()}, {}),
    "labels with strides": ({"labels": GOOD.labels.repeat_interleave(2, dim=1)[:, ::2]}, {}),
    "logits with strides": ({"logits": GOOD.logits.transpose(0, 2).contiguous().transpose(0, 2)}, {}),
    "int32 group_ids": ({}, {"group_ids": GOOD.group_ids.int()}),
    "group_ids with strides": ({}, {"group_ids": GOOD.group_ids.repeat_interleave(3)[::3]}),
    "float64 ref_logps": ({}, {"ref_logps": GOOD.ref_logps.double()}),
    "ref_logps with strides": ({}, {"ref_logps": GOOD.ref_logps.repeat_interleave(2)[::2]}),
    "float32 pair_weights": ({}, {"pair_weights": GOOD.pair_weights.float()}),
    "pair_weights with strides": ({}, {"pair_weights": GOOD.pair_weights.double().repeat_interleave(2)[::2]}),
    "numbers as int": ({}, {"beta": 1, "label_smoothing": 0}),
}


@pytest.mark.parametrize("name", ODD_FORMS)
def test_every_form_of_an_argument_becomes_the_one_that_backends_take(name):
    changes, pairs = ODD_FORMS[name]
    logits, arguments = from_logits(**changes, pairs=given(**pairs))
    assert logits.stride(-1) == 1
    rows, read = arguments.rows, arguments.pairs
    for tensor, dtype in ((rows.targets, torch.int64), (read.group_ids, torch.int64), (read.ref_logps, torch.float64)):
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
    assert torch.equal(rows.targets, from_logits()[1].rows.targets)
    assert torch.equal(read.group_ids, GOOD.group_ids)
    assert torch.equal(read.ref_logps.to(GOOD.ref_logps.dtype), GOOD.ref_logps)
    assert (type(read.beta), type(read.label_smoothing)) == (float, float)
    if "pair_weights" in pairs:
        assert read.pair_weights.dtype == torch.float64
        assert read.pair_weights.is_contiguous()
        assert torch.equal(read.pair_weights, pairs["pair_weights"].double())


@pytest.mark.parametrize("read", [from_logits, from_hidden], ids=["logits", "hidden"])
def test_boundaries_of_packed_sequences_become_contiguous(read):
    edges = PACKED.cu_seqlens.repeat_interleave(2)[::2]
    packed_input = {from_logits: PACKED.logits, from_hidden: torch.randn(PACKED.logits.shape[0], 5)}[read]
    arguments = read(packed_input, labels=PACKED.labels, cu_seqlens=edges)[-1]
    cu_seqlens = (arguments.loss if isinstance(arguments, HeadArguments) else arguments).rows.cu_seqlens
    assert cu_seqlens.is_contiguous()
    assert torch.equal(cu_seqlens, PACKED.cu_seqlens)


def strided(tensor):
    """The same numbers, no two of them beside each other in memory."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


STRIDED_HEADS = {
    "hidden": {"hidden": strided(HIDDEN)},
    "hidden, transposed": {"hidden": HIDDEN.transpose(0, 1).contiguous().transpose(0, 1)},
    "weight": {"weight": strided(WEIGHT)},
    "weight, transposed": {"weight": WEIGHT.t().contiguous().t()},
    "bias": {"bias": strided(BIAS)},
    "bias, expanded": {"bias": torch.tensor(0.5).expand(13)},
    "labels": {"labels": strided(GOOD.labels)},
    "everything": {"hidden": strided(HIDDEN), "weight": strided(WEIGHT), "bias": strided(BIAS)},
}


@pytest.mark.parametrize("backend", [name for name in ("torch", "cpu") if available_backends()[name] is None])
@pytest.mark.parametrize("name", STRIDED_HEADS)
def test_a_head_takes_tensors_of_any_strides(name, backend):
    good = {"hidden": HIDDEN, "weight": WEIGHT, "bias": BIAS, "labels": GOOD.labels}
    changed = good | STRIDED_HEADS[name]
    results = []
    for arguments in ({key: value.clone().contiguous() for key, value in changed.items()}, changed):
        leaves = [arguments[key].detach().requires_grad_() for key in ("hidden", "weight", "bias")]
        out = linear_token_logps(*leaves[:2], arguments["labels"], bias=leaves[2], backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(plain, found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_settings_of_the_loss_arrive_as_the_boundary_takes_them(loss_type):
    pairs = from_logits(pairs=given(loss_type=loss_type, length_normalize=True))[1].pairs
    assert (LOSS_TYPES[pairs.loss_type], pairs.length_normalize, pairs.lengths) == (loss_type, True, None)
    assert (pairs.num_pairs, pairs.num_groups) == (4, 3)


def test_lengths_are_copied_and_mean_normalising():
    lengths = torch.ones(8)
    logps, arguments = LossArguments.from_logps(torch.zeros(8), given(lengths=lengths), backend="torch")
    lengths.zero_()
    assert arguments.pairs.length_normalize
    assert arguments.pairs.lengths.tolist() == [1.0] * 8
    assert logps.shape == (8,)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("learns", ["logits", "hidden", "weight", "bias", None])
def test_whether_the_result_carries_a_gradient(learns, grad):
    leaves = {name: torch.zeros(shape) for name, shape in (("hidden", (8, 7, 5)), ("weight", (13, 5)), ("bias", (13,)))}
    with torch.set_grad_enabled(grad):
        if learns == "logits":
            arguments = from_logits(GOOD.leaf())[1]
        else:
            leaves = {name: leaf.requires_grad_(name == learns) for name, leaf in leaves.items()}
            arguments = from_hidden(**leaves)[3].loss
    assert arguments.differentiable == (grad and learns is not None)


def objects():
    loss = from_logits(pairs=given())[1]
    head = from_hidden(pairs=given())[3]
    return [loss, loss.rows, loss.pairs, head, head.loss, head.settings]


@pytest.mark.parametrize("number", range(len(objects())))
def test_an_object_cannot_be_changed(number):
    arguments = objects()[number]
    for field in arguments._fields:
        with pytest.raises(AttributeError):
            setattr(arguments, field, None)


GRAPHS = {
    "fused_grpo_loss": lambda f, tail: f(GOOD.leaf() * 1, GOOD.labels, *tail[:3], pair_weights=tail[3]).loss,
    "preference_loss": lambda f, tail: f(torch.zeros(8, requires_grad=True), *tail[:3], pair_weights=tail[3]).loss,
    "fused_linear_grpo_loss": lambda f, tail: f(
        HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_(), GOOD.labels, *tail[:3], pair_weights=tail[3]
    ).loss,
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_keeps_no_argument_about_pairs_alive(name):
    """Given in the form that backends take, so that no copy was made; what backward needs was computed from them."""
    tail = [
        GOOD.ref_logps.double().clone(),
        GOOD.group_ids.clone(),
        GroupWeights.robust([5, 3, 2], 0.1),
        torch.ones(4).double(),
    ]
    storages = [StorageWeakRef(x.untyped_storage()) for x in tail if isinstance(x, torch.Tensor)]
    weights = weakref.ref(tail[2])
    loss = GRAPHS[name](getattr(grpo_kernels, name), tail)
    tail.clear()
    assert loss.grad_fn is not None
    assert [storage.expired() for storage in storages] == [True] * 3
    assert weights() is None


def test_what_backward_keeps_of_a_head_holds_no_tensor():
    settings = from_hidden(bias=torch.zeros(13), pairs=given())[3].settings
    assert not [field for field, value in settings._asdict().items() if isinstance(value, torch.Tensor)]


SETTINGS = {
    "dtype": torch.float64, "ignore_index": -7, "num_labelled": 3, "memory_budget": 0.25, "softcap": 2.0,
    "logit_scale": 0.5, "grad": False, "shard": Shard("a group", 8, 16),
}  # fmt: skip


@pytest.mark.parametrize("field", [*SETTINGS, "nothing"])
def test_every_setting_of_the_head_reaches_a_compiled_step(field):
    """So that none is dropped between the caller and the operators."""
    plain = from_hidden()[3].settings
    assert set(plain._fields) == {*SETTINGS, "backend", "separate_tiles"}
    settings = plain._replace(**{field: SETTINGS[field]} if field in SETTINGS else {})
    named = settings._replace(backend=OperatorBackend("torch"))
    arrived = from_schema(CPU, *to_schema(named))
    assert arrived == settings._replace(backend=choose("torch", CPU, settings.dtype), separate_tiles=False)
    assert field == "nothing" or arrived != plain._replace(separate_tiles=False)


# ---- each argument once


@pytest.fixture
def checked(monkeypatch):
    """How often each check ran for each argument, wherever in the package it was called from."""
    counts = Counter()

    def counting(name, check):
        names = list(inspect.signature(check).parameters)

        def wrapper(*args, **kwargs):
            which = args[0] if names[0] == "name" else None
            counts[name, which] += 1
            return check(*args, **kwargs)

        return wrapper

    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("grpo_kernels."):
            for name, value in list(vars(module).items()):
                if name.lstrip("_").startswith(("check_", "read_")) and inspect.isfunction(value):
                    monkeypatch.setattr(module, name, counting(name, value))
    return counts


MOVING = GroupWeights.robust([5, 3, 2], 0.1)
TAIL = (GOOD.ref_logps, GOOD.group_ids, MOVING)
CALLS = {
    "fused_grpo_loss": lambda f: f(GOOD.leaf(), GOOD.labels, *TAIL, length_normalize=True).loss,
    "token_logps": lambda f: f(GOOD.leaf(), GOOD.labels).sum(),
    "sequence_logps": lambda f: f(GOOD.leaf(), GOOD.labels).sum(),
    "preference_loss": lambda f: f(torch.zeros(8, requires_grad=True), *TAIL, lengths=torch.ones(8)).loss,
    "fused_linear_grpo_loss": lambda f: f(HIDDEN.clone().requires_grad_(), WEIGHT, GOOD.labels, *TAIL).loss,
    "linear_token_logps": lambda f: f(HIDDEN.clone().requires_grad_(), WEIGHT, GOOD.labels, bias=WEIGHT[:, 0]).sum(),
    "linear_sequence_logps": lambda f: f(HIDDEN.clone().requires_grad_(), WEIGHT, GOOD.labels).sum(),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_check_runs_once_and_none_in_backward(checked, name):
    loss = CALLS[name](getattr(grpo_kernels, name))
    assert checked
    shared = {("check_device", None), ("read_number", None)}  # parts of other checks
    assert {key: n for key, n in checked.items() if n > 1 and key not in shared} == {}
    before = checked.copy()
    loss.backward()
    assert checked == before


LOGPS_ORDER = (
    ("policy_logps", None), ("ref_logps", 3), ("group_weights", None), ("group_ids", None), ("beta", -1.0),
    ("loss_type", "dpo"), ("label_smoothing", 0.7), ("lengths", 3), ("pair_weights", 3), ("backend", "fast"),
)  # fmt: skip
ORDER = (
    # what the other tensors are measured by comes first: the layout, and how many groups there are
    ("tp_group", 3), ("logits", None), ("labels", None), ("cu_seqlens", 3), ("ref_logps", 3), ("group_weights", None),
    ("group_ids", None), ("beta", -1.0), ("loss_type", "dpo"), ("label_smoothing", 0.7), ("length_normalize", None),
    ("pair_weights", 3), ("ignore_index", None), ("shift", None), ("overwrite_logits", None), ("backend", "fast"),
)  # fmt: skip
HEAD_ORDER = (
    ("tp_group", 3), ("hidden", None), ("weight", None), ("labels", None), ("cu_seqlens", 3), ("ref_logps", 3),
    ("group_weights", None), ("group_ids", None), ("beta", -1.0), ("loss_type", "dpo"), ("label_smoothing", 0.7),
    ("length_normalize", None), ("pair_weights", 3), ("bias", 3), ("softcap", -1.0), ("logit_scale", 0.0),
    ("memory_budget", "all"), ("num_labelled", -1), ("ignore_index", None), ("shift", None), ("backend", "fast"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        (name, *pair)
        for name, order in (
            ("fused_grpo_loss", ORDER),
            ("fused_linear_grpo_loss", HEAD_ORDER),
            ("preference_loss", LOGPS_ORDER),
        )
        for pair in itertools.pairwise(order)
    ],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_of_two_wrong_arguments_the_one_that_is_read_first_is_named(name, first, second):
    arguments = {
        "fused_grpo_loss": {"logits": GOOD.logits, "labels": GOOD.labels},
        "fused_linear_grpo_loss": {"hidden": HIDDEN, "weight": WEIGHT, "labels": GOOD.labels},
        "preference_loss": {"policy_logps": torch.zeros(8)},
    }[name] | {"ref_logps": GOOD.ref_logps}
    arguments |= {"group_ids": GOOD.group_ids, "group_weights": GOOD.weights} | dict([first, second])
    if "cu_seqlens" in (first[0], second[0]):  # packed, or the layout would be what is wrong
        arguments |= {"labels": PACKED.labels} if "labels" not in (first[0], second[0]) else {}
        flat = PACKED.logits if name == "fused_grpo_loss" else torch.randn(PACKED.logits.shape[0], 5)
        arguments["logits" if name == "fused_grpo_loss" else "hidden"] = flat
    with pytest.raises((TypeError, ValueError), match=rf"^{first[0]} must"):
        getattr(grpo_kernels, name)(**arguments)


def test_the_public_signatures_and_the_readers_have_the_same_arguments():
    """So that none is dropped on the way: each name of a signature is a parameter of what reads it."""
    pairs = set(GivenPairs._fields)
    readers = {
        "fused_grpo_loss": (LossArguments.from_logits, pairs - {"lengths"}),
        "token_logps": (LossArguments.from_logits, set()),
        "sequence_logps": (LossArguments.from_logits, set()),
        "preference_loss": (LossArguments.from_logps, pairs - {"length_normalize"}),
        "fused_linear_grpo_loss": (HeadArguments.from_hidden, pairs - {"lengths"}),
        "linear_token_logps": (HeadArguments.from_hidden, set()),
        "linear_sequence_logps": (HeadArguments.from_hidden, set()),
    }
    for name, (reader, of_pairs) in readers.items():
        public = set(inspect.signature(getattr(grpo_kernels, name)).parameters)
        assert public == set(inspect.signature(reader).parameters) - {"pairs"} | of_pairs, name
    assert loss_arguments.__doc__
    assert head_arguments.__doc__
