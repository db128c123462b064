"""Ranks that do not fit together hear so, every one of them, in words that name what is wrong; nobody hangs."""

from __future__ import annotations

import re

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from vocab_ranks import on_four_ranks

from grpo_kernels import linear_token_logps, token_logps

WORDS, WIDTH = 8, 4
START = {0: 0, 1: 8}


def good(rank):
    """Keyword arguments of a call on ranks 0 and 1, eight words each."""
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 5, WIDTH, generator=rng).requires_grad_()
    weight = torch.randn(2 * WORDS, WIDTH, generator=rng)[START[rank] : START[rank] + WORDS]
    labels = torch.randint(0, 2 * WORDS, (2, 5), generator=rng)
    return {"hidden": hidden, "weight": weight, "labels": labels, "vocab_start": START[rank]}


def other(name, value):
    """Rank 1 comes with something else."""

    def fault(rank, call):
        if rank == 1:
            call[name] = value(call[name]) if callable(value) else value

    return fault


def logits_instead(rank, call):
    if rank == 1:
        call["logits"] = call.pop("hidden").detach() @ call.pop("weight").t()


def other_labels(rank, call):
    call["labels"] = call["labels"].clone()
    call["labels"][0, 1] = rank


def one_label_less(rank, call):
    call["labels"] = call["labels"].clone()
    if rank == 1:
        call["labels"][0, 1] = -100


def a_label_of_nobody(rank, call):
    call["labels"] = call["labels"].clone()
    call["labels"][1, 3] = 16


FAULTS = {
    "overlap": (other("vocab_start", 7), r"cover the vocabulary once; they overlap: \[0, 8\) on rank 0, \[7, 15\)"),
    "gap": (other("vocab_start", 9), r"they leave a gap: \[0, 8\) on rank 0, \[9, 17\) on rank 1"),
    "no first word": (lambda rank, call: call.update(vocab_start=START[rank] + 1), r"leave a gap: \[1, 9\)"),
    "nobody": (a_label_of_nobody, r"labels must be in \[0, 16\) .* got \[16\] at 1 of"),
    "labels": (other_labels, "must agree on labels"),
    "labelled": (one_label_less, "must agree on labelled rows, got 8 on rank 0, 7 on rank 1"),
    "dtype": (other("weight", torch.Tensor.double), "must agree on dtype, got torch.float32 on rank 0, torch.float64"),
    "gradient": (other("hidden", torch.Tensor.detach), "must agree on gradient of hidden, got yes on rank 0, no on"),
    "softcap": (other("softcap", 2.5), "must agree on softcap, got 0 on rank 0, 2.5 on rank 1"),
    "scale": (other("logit_scale", 0.5), "must agree on logit_scale, got 1 on rank 0, 0.5 on rank 1"),
    "ignored": (other("ignore_index", -1), "must agree on ignore_index, got -100 on rank 0, -1 on rank 1"),
    "bias": (other("bias", torch.ones(WORDS)), "must agree on bias, got no on rank 0, yes on rank 1"),
    "function": (logits_instead, "must agree on function, got from hidden states on rank 0, from logits on rank 1"),
}  # fmt: skip


def fewer_rows(rank, call):
    if rank == 1:
        call["hidden"], call["labels"] = call["hidden"][:1], call["labels"][:1]


def narrower(rank, call):
    if rank == 1:
        call["hidden"], call["weight"] = call["hidden"][..., :3], call["weight"][:, :3]


FAULTS |= {
    "rows": (fewer_rows, "must agree on rows, got 10 on rank 0, 5 on rank 1"),
    "width": (narrower, "must agree on hidden size, got 4 on rank 0, 3 on rank 1"),
}

LOGITS_TOO = ("overlap", "gap", "nobody", "labels", "dtype", "ignored", "rows")

REFUSED = {
    "refused": (other("logit_scale", 0), "logit_scale must be finite"),
    "refused shape": (other("labels", lambda labels: labels[:1]), r"labels must have shape \(2, 5\)"),
    "refused backend": (other("backend", "cuda"), "backend='cuda' cannot be used here"),
    "refused start": (other("vocab_start", -1), "vocab_start must not be negative"),
    "refused start's type": (other("vocab_start", "8"), "vocab_start must be an int"),
    "refused bias": (other("bias", torch.ones(3)), r"bias must have shape \(8,\)"),
}


def outcome(call, group):
    """The result, or the error in words."""
    try:
        if "logits" in call:
            return token_logps(call.pop("logits"), call.pop("labels"), tp_group=group, **call).detach()
        inputs = [call.pop(name) for name in ("hidden", "weight", "labels")]
        return linear_token_logps(*inputs, tp_group=group, **call).detach()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def as_logits(call):
    hidden, weight = call.pop("hidden").detach(), call.pop("weight")
    call["logits"] = hidden.to(weight.dtype) @ weight.t()
    return call


def scenarios(rank, groups):
    results = {}
    if rank < 2:
        group = groups[2]
        for name, (fault, _) in (FAULTS | REFUSED).items():
            call = good(rank)
            fault(rank, call)
            results[name] = outcome(call, group)
            results[f"{name}, after"] = outcome(good(rank), group)  # nobody is a collective behind
        for name in LOGITS_TOO:
            call = good(rank)
            FAULTS[name][0](rank, call)
            results[f"{name}, logits"] = outcome(as_logits(call), group)
    results |= own_mistakes(rank, groups[4])
    return results


def own_mistakes(rank, group):
    """Arguments that are wrong by themselves, on every rank."""
    tensors = good(0)
    tensors.pop("vocab_start")
    results = {}
    for name, arguments in {
        "no start": {"tp_group": group},
        "no group": {"vocab_start": 0},
        "no group at all": {"tp_group": "tp", "vocab_start": 0},
        "start is no int": {"tp_group": group, "vocab_start": 1.0},
        "negative": {"tp_group": group, "vocab_start": -1},
    }.items():
        results[name] = mistake(linear_token_logps, **tensors, **arguments)
        results[f"{name}, logits"] = mistake(token_logps, torch.zeros(2, 5, 8), tensors["labels"], **arguments)
    mesh, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    hidden, weight, labels = tensors["hidden"].detach(), tensors["weight"], tensors["labels"]
    spread = {
        "both": (weight, mesh, [Shard(0)]),
        "columns": (weight, mesh, [Shard(1)]),
        "not sharded": (weight, mesh, [Replicate()]),
        "two dimensions": (weight, square, [Shard(0), Shard(0)]),
    }
    for name, (tensor, where, placements) in spread.items():
        group_too = {"tp_group": group, "vocab_start": 0} if name == "both" else {}
        shards = distribute_tensor(tensor, where, placements)
        results[name] = mistake(linear_token_logps, hidden, shards, labels, **group_too)
    shards = distribute_tensor(weight, mesh, [Shard(0)])
    results["bias is plain"] = mistake(linear_token_logps, hidden, shards, labels, bias=torch.zeros(8))
    results["hidden"] = mistake(linear_token_logps, distribute_tensor(hidden, mesh, [Shard(1)]), weight, labels)
    results["logits"] = mistake(token_logps, distribute_tensor(hidden @ weight.t(), mesh, [Shard(0)]), labels)
    leaf = distribute_tensor(hidden @ weight.t(), mesh, [Shard(2)]).requires_grad_()
    results["leaf"] = mistake(token_logps, leaf, labels, overwrite_logits=True)
    return results


def mistake(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


MISTAKES = {
    "no start": "ValueError: vocab_start must be given with tp_group",
    "no group": "ValueError: vocab_start says where this rank's shard starts and needs tp_group, got int 0",
    "no group at all": "TypeError: tp_group must be None or a group of torch.distributed .* got str 'tp'",
    "start is no int": "TypeError: vocab_start must be an int, got float 1.0",
    "negative": "ValueError: vocab_start must not be negative, got int -1",
    "both": "ValueError: tp_group and vocab_start are read from weight, which is a DTensor",
    "columns": r"ValueError: weight must be sharded on dimension 0 .* placements \(Shard\(dim=1\),\)",
    "not sharded": "ValueError: weight must be sharded on dimension 0",
    "two dimensions": "ValueError: weight must be sharded on dimension 0 over a mesh of one dimension",
    "bias is plain": "ValueError: bias must be a DTensor on the mesh of weight",
    "hidden": "TypeError: hidden must be a plain tensor, as weight is, got a DTensor",
    "logits": "ValueError: logits must be sharded on dimension 2",
    "leaf": "ValueError: overwrite_logits=True would write the gradient over a leaf",
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_four_ranks(str(tmp_path_factory.mktemp("faults")), scenarios)


@pytest.mark.parametrize("name", [*FAULTS, *(f"{name}, logits" for name in LOGITS_TOO)])
def test_every_rank_hears_of_it(ranks, name):
    for result in ranks[:2]:
        assert isinstance(result[name], str), f"no error, but {result[name]}"
        assert result[name].startswith("ValueError: ")
        assert re.search(FAULTS[name.removesuffix(", logits")][1], result[name]), result[name]


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_one_rank_refuses_are_refused_by_all(ranks, name):
    assert re.search(REFUSED[name][1], ranks[1][name]), ranks[1][name]
    assert ranks[0][name] == (
        "ValueError: rank 1 of tp_group has refused its arguments; the reason is in its own error"
    )


@pytest.mark.parametrize("name", FAULTS | REFUSED)
def test_the_next_call_is_as_if_nothing_had_been(ranks, name):
    whole = good(0) | {"weight": torch.cat([good(0)["weight"], good(1)["weight"]])}
    whole.pop("vocab_start")
    expected = linear_token_logps(**whole)
    for result in ranks[:2]:
        torch.testing.assert_close(result[f"{name}, after"], expected.detach())


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_wrong_by_itself_is_named(ranks, name):
    for result in ranks:
        for key in {name, f"{name}, logits"} & result.keys():
            assert re.match(MISTAKES[name], str(result[key])), result[key]
