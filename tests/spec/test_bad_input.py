"""Every malformed argument: which error, that it names the argument, and that it says what came.

``BAD`` maps a call to (argument named, what came as a pattern, error, changes to a good call).
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from helpers import make_batch

from grpo_kernels import (
    GroupWeights,
    UnavailableBackendError,
    exponentiated_step,
    fused_grpo_loss,
    linear_token_logps,
    preference_loss,
    sequence_logps,
    token_logps,
)

GOOD = make_batch(dtype=torch.float32)  # 4 pairs, 7 tokens, 13 words, 3 groups
PACKED = make_batch(packed=True, dtype=torch.float32)
NAN = float("nan")


def labels_with(value, at=(0, 0)):
    labels = GOOD.labels.clone()
    labels[at] = value
    return labels


def group_ids_with(value):
    ids = GOOD.group_ids.clone()
    ids[1] = value
    return ids


def fused(**changes):
    """A good call of the fused loss with some arguments exchanged."""
    arguments = {
        "logits": GOOD.logits,
        "labels": GOOD.labels,
        "ref_logps": GOOD.ref_logps,
        "group_ids": GOOD.group_ids,
        "group_weights": GOOD.weights,
    } | changes
    return fused_grpo_loss(**arguments)


def of_sums(**changes):
    """A good call of the loss of sums with some arguments exchanged."""
    arguments = {
        "policy_logps": torch.zeros(8),
        "ref_logps": GOOD.ref_logps,
        "group_ids": GOOD.group_ids,
        "group_weights": GOOD.weights,
    } | changes
    return preference_loss(**arguments)


def packed(**changes):
    """A good call on packed sequences with some arguments exchanged."""
    arguments = {
        "logits": PACKED.logits,
        "labels": PACKED.labels,
        "ref_logps": PACKED.ref_logps,
        "group_ids": PACKED.group_ids,
        "group_weights": PACKED.weights,
        "cu_seqlens": PACKED.cu_seqlens,
    } | changes
    return fused_grpo_loss(**arguments)


def edges_with(position, value):
    edges = PACKED.cu_seqlens.clone()
    edges[position] = value
    return edges


SETTINGS = [
    ("beta", "0", ValueError, {"beta": 0}),
    ("beta", "-0.1", ValueError, {"beta": -0.1}),
    ("beta", "nan", ValueError, {"beta": NAN}),
    ("beta", "inf", ValueError, {"beta": math.inf}),
    ("beta", "str '0.1'", TypeError, {"beta": "0.1"}),
    ("beta", "bool True", TypeError, {"beta": True}),
    ("beta", "torch.float32 tensor", TypeError, {"beta": torch.tensor(0.1)}),
    ("loss_type", "'dpo'", ValueError, {"loss_type": "dpo"}),
    ("loss_type", "None", ValueError, {"loss_type": None}),
    ("label_smoothing", "0.5", ValueError, {"label_smoothing": 0.5}),
    ("label_smoothing", "-0.1", ValueError, {"label_smoothing": -0.1}),
    ("label_smoothing", "nan", ValueError, {"label_smoothing": NAN}),
    ("label_smoothing", "NoneType", TypeError, {"label_smoothing": None}),
    ("label_smoothing", "0.1 with 'hinge'", ValueError, {"label_smoothing": 0.1, "loss_type": "hinge"}),
    ("label_smoothing", "0.1 with 'ipo'", ValueError, {"label_smoothing": 0.1, "loss_type": "ipo"}),
]

PAIRS = [
    ("ref_logps", r"\(7,\)", ValueError, {"ref_logps": torch.zeros(7)}),
    ("ref_logps", r"\(8, 1\)", ValueError, {"ref_logps": torch.zeros(8, 1)}),
    ("ref_logps", "float16", TypeError, {"ref_logps": torch.zeros(8).half()}),
    ("ref_logps", "bfloat16", TypeError, {"ref_logps": torch.zeros(8).bfloat16()}),
    ("ref_logps", "int64", TypeError, {"ref_logps": torch.zeros(8).long()}),
    ("ref_logps", "list", TypeError, {"ref_logps": [0.0] * 8}),
    ("ref_logps", "detach", ValueError, {"ref_logps": torch.zeros(8, requires_grad=True)}),
    ("ref_logps", "meta", ValueError, {"ref_logps": torch.zeros(8, device="meta")}),
    ("group_ids", r"\(3,\)", ValueError, {"group_ids": torch.zeros(3, dtype=torch.long)}),
    ("group_ids", r"\(8,\)", ValueError, {"group_ids": torch.zeros(8, dtype=torch.long)}),
    ("group_ids", "float32", TypeError, {"group_ids": torch.zeros(4)}),
    ("group_ids", "bool", TypeError, {"group_ids": torch.zeros(4, dtype=torch.bool)}),
    ("group_ids", "list", TypeError, {"group_ids": [0, 0, 0, 0]}),
    ("group_ids", "to 3", ValueError, {"group_ids": group_ids_with(3)}),
    ("group_ids", "from -1", ValueError, {"group_ids": group_ids_with(-1)}),
    ("group_ids", "meta", ValueError, {"group_ids": torch.zeros(4, dtype=torch.long, device="meta")}),
    ("group_weights", "list", TypeError, {"group_weights": [1.0, 1.0, 1.0]}),
    ("group_weights", "int64", TypeError, {"group_weights": torch.ones(3, dtype=torch.long)}),
    ("group_weights", r"\(3, 1\)", ValueError, {"group_weights": torch.ones(3, 1)}),
    ("group_weights", r"\(0,\)", ValueError, {"group_weights": torch.ones(0)}),
    ("group_weights", "meta", ValueError, {"group_weights": torch.ones(3, device="meta")}),
    ("group_weights", "meta", ValueError, {"group_weights": GroupWeights.balanced([1, 1, 1]).to("meta")}),
    ("pair_weights", r"\(8,\)", ValueError, {"pair_weights": torch.ones(8)}),
    ("pair_weights", "float16", TypeError, {"pair_weights": torch.ones(4).half()}),
    ("pair_weights", "detach", ValueError, {"pair_weights": torch.ones(4, requires_grad=True)}),
    ("pair_weights", "meta", ValueError, {"pair_weights": torch.ones(4, device="meta")}),
]

LOGITS = [
    ("logits", "list", TypeError, {"logits": [[0.0]]}),
    ("logits", "int64", TypeError, {"logits": GOOD.logits.long()}),
    ("logits", "complex64", TypeError, {"logits": GOOD.logits.to(torch.complex64)}),
    ("logits", r"\(8, 91\)", ValueError, {"logits": GOOD.logits.flatten(1)}),
    ("logits", r"\(8, 7, 0\)", ValueError, {"logits": GOOD.logits[..., :0]}),
    ("logits", "7", ValueError, {"logits": GOOD.logits[:7], "labels": GOOD.labels[:7]}),
    ("labels", "list", TypeError, {"labels": GOOD.labels.tolist()}),
    ("labels", "float32", TypeError, {"labels": GOOD.labels.float()}),
    ("labels", "int16", TypeError, {"labels": GOOD.labels.short()}),
    ("labels", r"\(8, 6\)", ValueError, {"labels": GOOD.labels[:, :-1]}),
    ("labels", r"\(56,\)", ValueError, {"labels": GOOD.labels.flatten()}),
    ("labels", "meta", ValueError, {"labels": GOOD.labels.to("meta")}),
    ("labels", r"\[13\] at 1 of 56", ValueError, {"labels": labels_with(13, (4, 3))}),
    ("labels", r"\[-1\]", ValueError, {"labels": labels_with(-1, (4, 3))}),
    ("labels", r"\[13\]", ValueError, {"labels": labels_with(13, (0, 0))}),  # a position that shift never scores
    ("labels", r"\[-100\]", ValueError, {"ignore_index": -1}),
    ("ignore_index", "float -100.0", TypeError, {"ignore_index": -100.0}),
    ("backend", "'fast'", ValueError, {"backend": "fast"}),
    ("overwrite_logits", "leaf", ValueError, {"logits": GOOD.leaf(), "overwrite_logits": True}),
    (
        "overwrite_logits",
        "strides",
        ValueError,
        {"logits": GOOD.logits.permute(2, 0, 1).contiguous().permute(1, 2, 0), "overwrite_logits": True},
    ),
    (
        "overwrite_logits",
        "strides",
        ValueError,
        {"logits": GOOD.logits[:1].expand(8, 7, 13), "overwrite_logits": True},
    ),
]

CU_SEQLENS = [
    ("cu_seqlens", "list", TypeError, {"cu_seqlens": PACKED.cu_seqlens.tolist()}),
    ("cu_seqlens", "int64", TypeError, {"cu_seqlens": PACKED.cu_seqlens.long()}),
    ("cu_seqlens", r"\(1, 9\)", ValueError, {"cu_seqlens": PACKED.cu_seqlens[None]}),
    ("cu_seqlens", r"\(0,\)", ValueError, {"cu_seqlens": PACKED.cu_seqlens[:0]}),
    ("cu_seqlens", "meta", ValueError, {"cu_seqlens": PACKED.cu_seqlens.to("meta")}),
    ("cu_seqlens", r"\[1, ", ValueError, {"cu_seqlens": edges_with(0, 1)}),
    ("cu_seqlens", "rows", ValueError, {"cu_seqlens": edges_with(-1, 1)}),
    ("cu_seqlens", "rise", ValueError, {"cu_seqlens": edges_with(3, 0)}),
    ("cu_seqlens", "7", ValueError, {"cu_seqlens": torch.cat([PACKED.cu_seqlens[:1], PACKED.cu_seqlens[2:]])}),
    ("logits", r"\(rows, V\)", ValueError, {"logits": PACKED.logits[None]}),
]

SUMS = [
    ("policy_logps", "list", TypeError, {"policy_logps": [0.0] * 8}),
    ("policy_logps", "bfloat16", TypeError, {"policy_logps": torch.zeros(8).bfloat16()}),
    ("policy_logps", r"\(4, 2\)", ValueError, {"policy_logps": torch.zeros(4, 2)}),
    ("policy_logps", "7", ValueError, {"policy_logps": torch.zeros(7)}),
    ("lengths", "list", TypeError, {"lengths": [1] * 8}),
    ("lengths", "bool", TypeError, {"lengths": torch.ones(8, dtype=torch.bool)}),
    ("lengths", r"\(4,\)", ValueError, {"lengths": torch.ones(4)}),
    ("lengths", "meta", ValueError, {"lengths": torch.ones(8, device="meta")}),
    ("lengths", "detach", ValueError, {"lengths": torch.ones(8, requires_grad=True)}),
]

BAD = (
    [(fused, *case) for case in SETTINGS + PAIRS + LOGITS]
    + [(of_sums, *case) for case in SETTINGS + PAIRS + SUMS]
    + [(packed, *case) for case in CU_SEQLENS]
)


@pytest.mark.parametrize(("call", "argument", "came", "error", "changes"), BAD)
def test_bad_argument_is_named_with_what_came(call, argument, came, error, changes):
    call()  # good without the change
    with pytest.raises(error) as caught:
        call(**changes)
    assert type(caught.value) is error
    assert re.search(rf"\b{argument}\b", str(caught.value)), caught.value
    assert re.search(came, str(caught.value)), caught.value


@pytest.mark.parametrize("function", [token_logps, sequence_logps])
@pytest.mark.parametrize(("argument", "came", "error", "changes"), LOGITS[:5] + LOGITS[6:])
def test_the_log_probabilities_name_bad_arguments_too(function, argument, came, error, changes):
    with pytest.raises(error, match=came) as caught:
        function(**({"logits": GOOD.logits, "labels": GOOD.labels} | changes))
    assert argument in str(caught.value)


def test_log_probabilities_take_any_number_of_sequences():
    assert token_logps(GOOD.logits[:3], GOOD.labels[:3]).shape == (3, 7)


def test_a_backend_that_cannot_run_here_says_why():
    with pytest.raises(UnavailableBackendError, match=r"backend='cuda' cannot be used here: .{10,}"):
        fused(backend="cuda", logits=GOOD.logits.double())


def test_nothing_is_computed_or_written_before_the_arguments_are_right():
    gw = GroupWeights.robust([1, 1, 1], 0.5)
    logits, before = GOOD.leaf(), gw.log_alpha.clone()
    with pytest.raises(ValueError, match="label_smoothing"):
        fused(logits=logits, group_weights=gw, label_smoothing=0.7)
    assert torch.equal(gw.log_alpha, before)
    assert int(gw.num_updates) == 0
    assert torch.equal(logits, GOOD.logits)


WEIGHTS = [
    ("group_sizes", "0", ValueError, {"group_sizes": {"a": 3, "b": 0}}),
    ("group_sizes", "-2", ValueError, {"group_sizes": [3, -2]}),
    ("group_sizes", "1.5", TypeError, {"group_sizes": [3, 1.5]}),
    ("group_sizes", "True", TypeError, {"group_sizes": [3, True]}),
    ("group_sizes", "none", ValueError, {"group_sizes": []}),
    ("group_sizes", "int 3", TypeError, {"group_sizes": 3}),
    ("group_sizes", "str 'ab'", TypeError, {"group_sizes": "ab"}),
    ("group_sizes", "'1', '1'", ValueError, {"group_sizes": {"1": 3, 1: 2}}),
    ("group_lr", "-0.1", ValueError, {"group_lr": -0.1}),
    ("group_lr", "nan", ValueError, {"group_lr": NAN}),
    ("group_lr", "NoneType", TypeError, {"group_lr": None}),
    ("estimator", "'mean'", ValueError, {"estimator": "mean"}),
    ("prior", "'flat'", ValueError, {"prior": "flat"}),
    ("prior", r"\(3,\)", ValueError, {"prior": torch.ones(3) / 3}),
    ("prior", "0.0", ValueError, {"prior": torch.tensor([1.0, 0.0])}),
    ("prior", "2", ValueError, {"prior": torch.tensor([1.0, 1.0])}),
    ("prior", "NoneType", TypeError, {"prior": None}),
    ("mixing", "1.5", ValueError, {"mixing": 1.5}),
    ("mixing", "-0.5", ValueError, {"mixing": -0.5}),
    ("size_adjustment", "-1", ValueError, {"size_adjustment": -1}),
    ("sampling_probs", r"\(3,\)", ValueError, {"sampling_probs": [0.2, 0.3, 0.5]}),
    ("sampling_probs", "0.0", ValueError, {"sampling_probs": [1.0, 0.0]}),
    ("sampling_probs", "nan", ValueError, {"sampling_probs": [NAN, 1.0]}),
    ("sampling_probs", "0.9", ValueError, {"sampling_probs": [0.5, 0.4]}),
]


@pytest.mark.parametrize(("argument", "came", "error", "changes"), WEIGHTS)
def test_group_weights_name_bad_settings(argument, came, error, changes):
    with pytest.raises(error) as caught:
        GroupWeights.robust(**({"group_sizes": [3, 2], "group_lr": 0.1} | changes))
    assert argument in str(caught.value)
    assert re.search(came, str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("argument", "error", "arguments"),
    [
        ("log_alpha", TypeError, ([0.0, 0.0], torch.zeros(2), 0.1)),
        ("log_alpha", TypeError, (torch.zeros(2, dtype=torch.long), torch.zeros(2), 0.1)),
        ("group_losses", ValueError, (torch.zeros(2), torch.zeros(3), 0.1)),
        ("group_losses", ValueError, (torch.zeros(2), [0.0, 0.0], 0.1)),
        ("group_lr", ValueError, (torch.zeros(2), torch.zeros(2), -1.0)),
        ("group_lr", TypeError, (torch.zeros(2), torch.zeros(2), "fast")),
    ],
)
def test_exponentiated_step_names_bad_arguments(argument, error, arguments):
    with pytest.raises(error, match=argument):
        exponentiated_step(*arguments)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_transforms_of_torch_func_are_refused_by_name(backend, transform):
    """PyTorch's own messages speak of storage and of ``setup_context``."""
    with pytest.raises(TypeError, match=r"logits must not be inside a transform of torch.func"):
        transform(lambda logits: fused(logits=logits, backend=backend).loss)(GOOD.logits)
    with pytest.raises(TypeError, match=r"policy_logps must not be inside a transform of torch.func"):
        torch.func.grad(lambda sums: of_sums(policy_logps=sums, backend=backend).loss)(torch.zeros(8))
    hidden, weight = torch.randn(8, 7, 5), torch.randn(13, 5)
    with pytest.raises(TypeError, match=r"weight must not be inside a transform of torch.func"):
        torch.func.grad(lambda w: linear_token_logps(hidden, w, GOOD.labels, backend=backend).sum())(weight)
