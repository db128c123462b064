"""A split vocabulary in its surroundings: PyTorch's meshes and plans, data parallelism, compilers, checkpoints."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import IGNORE, assert_close, make_batch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint
from vocab_ranks import EDGES, VOCABULARY, WIDTH, on_four_ranks, small_tiles

from grpo_kernels import (
    GroupWeights,
    fused_grpo_loss,
    fused_linear_grpo_loss,
    linear_sequence_logps,
    linear_token_logps,
    preference_loss,
    sequence_logps,
    token_logps,
)

SIZES, PAIRS, STEPS = [5, 3, 2], 6, 3


class Model(nn.Module):
    """Embedding, one layer, and a head with a bias."""

    def __init__(self, dtype=torch.float64, vocabulary=VOCABULARY):
        super().__init__()
        rng = torch.Generator().manual_seed(3)
        self.embedding = nn.Embedding(vocabulary, WIDTH, dtype=dtype)
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.lm_head = nn.Linear(WIDTH, vocabulary, dtype=dtype)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64))

    def hidden(self, ids):
        return torch.tanh(self.layer(self.embedding(ids)))

    def forward(self, ids):
        return self.lm_head(self.hidden(ids))


def ids_of(batch):
    return batch.labels.clamp(min=0)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---------------------------------------------------------------------------------------------- data parallelism too


def train(from_logits, dtype, mesh=None):
    """Three steps of the robust loss; the batch is split over "dp", the vocabulary over "tp"."""
    dp, ranks, dp_group = (0, 1, None) if mesh is None else (mesh["dp"].get_local_rank(), 2, mesh["dp"].get_group())
    model, weights = Model(dtype), GroupWeights.robust(SIZES, 0.3, process_group=dp_group)
    if mesh is not None:
        parallelize_module(model, mesh["tp"], {"lm_head": ColwiseParallel(use_local_output=False)})
    history = {"log_alpha": [], "loss": [], "grads": []}
    for step in range(STEPS):
        batch = make_batch(pairs=PAIRS, seed=step, vocabulary=VOCABULARY)
        mine = torch.arange(dp, PAIRS, ranks)
        rows = torch.cat([mine, mine + PAIRS])
        tail = batch.labels[rows], batch.ref_logps[rows], batch.group_ids[mine], weights
        if from_logits:
            loss = fused_grpo_loss(model(ids_of(batch)[rows]), *tail).loss
        else:
            head = model.lm_head
            loss = fused_linear_grpo_loss(model.hidden(ids_of(batch)[rows]), head.weight, *tail, bias=head.bias).loss
        model.zero_grad()
        loss.backward()
        total = loss.detach().clone()
        grads = [whole(parameter.grad).clone() for parameter in model.parameters()]
        for tensor in (total, *grads):
            if mesh is not None:
                dist.all_reduce(tensor, group=dp_group)
                tensor /= ranks
        with torch.no_grad():
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                split = distribute_tensor(grad, mesh["tp"], [Shard(0)]) if isinstance(parameter, DTensor) else grad
                parameter -= 0.1 * split
        history["log_alpha"].append(weights.log_alpha.clone())
        history["loss"].append(total)
        history["grads"].append(grads)
    return history


WAYS = {
    f"{'logits' if from_logits else 'head'}, {dtype}": (from_logits, dtype)
    for from_logits in (True, False)
    for dtype in (torch.float64, torch.float32)
}

# ---------------------------------------------------------------------------------------------- DTensors


def from_dtensors(mesh, vocabulary, placements):
    """Loss, and gradients of hidden, weight and bias; hidden is a DTensor where placements are given."""
    batch = make_batch(vocabulary=vocabulary)
    model = Model(vocabulary=vocabulary)
    hidden = model.hidden(ids_of(batch)).detach()
    tensors = [hidden, model.lm_head.weight.detach(), model.lm_head.bias.detach()]
    if mesh is not None:
        spread = [placements, [Shard(0)], [Shard(0)]]
        tensors = [t if p is None else distribute_tensor(t, mesh, p) for t, p in zip(tensors, spread, strict=True)]
    hidden, weight, bias = (tensor.requires_grad_() for tensor in tensors)
    loss = fused_linear_grpo_loss(hidden, weight, batch.labels, *batch.tail(), bias=bias, softcap=4.0).loss
    loss.backward()
    if mesh is not None:
        assert weight.grad.placements == bias.grad.placements == (Shard(0),)
    return [loss.detach(), *(whole(t.grad) for t in (hidden, weight, bias))]


DTENSORS = {
    "hidden plain": (VOCABULARY, None),
    "hidden replicated": (VOCABULARY, [Replicate()]),
    "hidden sharded along its sequence": (VOCABULARY, [Shard(1)]),
    "more ranks than words": (3, None),
}


def tied(mesh):
    """One table for embedding and head, its rows spread over ranks."""
    batch = make_batch(vocabulary=VOCABULARY)
    table, ids = Model().embedding.weight.detach(), ids_of(batch)
    if mesh is not None:
        table = distribute_tensor(table, mesh, [Shard(0)])
        ids = distribute_tensor(ids, mesh, [Replicate()])
    table.requires_grad_()
    out = linear_sequence_logps(torch.tanh(nn.functional.embedding(ids, table)), table, batch.labels)
    out.cos().sum().backward()
    return [out.detach(), whole(table.grad)]


def tokens_split(mesh, alone=None):
    """Half of every sequence's positions on each "dp" rank, half of the words on each "tp" rank, as in docs/scaling.md.

    All ranks have the same pairs, so the group of alpha is each rank alone.
    """
    batch, model = make_batch(pairs=PAIRS, vocabulary=VOCABULARY), Model()
    weights = GroupWeights.robust(SIZES, 0.3, process_group=alone)
    targets = batch.labels.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    here = slice(None)
    if mesh is not None:
        here = (slice(0, 4), slice(4, None))[mesh["dp"].get_local_rank()]
        parallelize_module(model, mesh["tp"], {"lm_head": ColwiseParallel(use_local_output=False)})
    hidden = model.hidden(ids_of(batch)[:, here])
    head = model.lm_head
    mine = linear_sequence_logps(hidden, head.weight, targets[:, here], bias=head.bias, shift=False)
    logps = mine.detach().clone()
    if mesh is not None:
        dist.all_reduce(logps, group=mesh["dp"].get_group())
    out = preference_loss(logps.requires_grad_(), batch.ref_logps, batch.group_ids, weights)
    out.loss.backward()
    mine.backward(logps.grad)
    grads = [whole(parameter.grad).clone() for parameter in model.parameters()]
    if mesh is not None:
        for grad in grads:
            dist.all_reduce(grad, group=mesh["dp"].get_group())
    return [out.loss.detach(), weights.log_alpha.clone(), *grads]


# ---------------------------------------------------------------------------------------------- a pair of ranks


def shard_of(rank):
    """(batch, hidden, this rank's words of the weight, its first word)."""
    batch = make_batch(vocabulary=VOCABULARY, dtype=torch.float32)
    edges = EDGES["two, uneven"]
    model = Model(torch.float32)
    hidden, weight = model.hidden(ids_of(batch)).detach(), model.lm_head.weight.detach()
    return batch, hidden, weight[edges[rank] : edges[rank + 1]].clone(), edges[rank]


def compiled(rank, group, mesh, how):
    """The same from eager and from compiled code: loss and gradients."""
    batch, hidden, weight, start = shard_of(rank)
    if how == "DTensor":
        weight = distribute_tensor(Model(torch.float32).lm_head.weight.detach(), mesh, [Shard(0)])
    given = {} if how == "DTensor" else {"tp_group": group, "vocab_start": start}

    def function(hidden, weight):
        if how == "logits":
            return fused_grpo_loss(hidden @ weight.t(), batch.labels, *batch.tail(), **given).loss
        return fused_linear_grpo_loss(hidden, weight, batch.labels, *batch.tail(), **given).loss

    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        inputs = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
        loss = run(*inputs)
        loss.backward()
        results.append([loss.detach(), *(whole(x.grad) for x in inputs)])
    return results


def again(rank, group):
    """Twice over a retained graph, within checkpointed regions, without gradients, and with a wrong count."""
    batch, hidden, weight, start = shard_of(rank)
    given = {"tp_group": group, "vocab_start": start}
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_sequence_logps(h, w, batch.labels, **given)
    plain = torch.autograd.grad(out.sum(), (h, w), retain_graph=True)
    results = {"plain": plain, "retained": torch.autograd.grad(out.sum(), (h, w)), "out": out.detach()}
    for reentrant in (False, True):
        x, y = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        checkpoint(
            lambda a, b: linear_token_logps(a, b, batch.labels, **given), x, y, use_reentrant=reentrant
        ).sum().backward()
        results[f"checkpointed {reentrant}"] = (x.grad, y.grad)
    with torch.no_grad():
        results["no grad"] = linear_sequence_logps(h, w, batch.labels, **given)
    count = int((batch.labels[:, 1:] != IGNORE).sum())
    told = [linear_sequence_logps(hidden, weight, batch.labels, num_labelled=count + x, **given) for x in (0, 1)]
    results["told"], results["told wrong"] = told
    nothing = torch.full_like(batch.labels, IGNORE)
    results["no label"] = linear_sequence_logps(h, w, nothing, **given).detach()
    results["no row"] = linear_token_logps(hidden[:0], weight, batch.labels[:0], **given)
    logits = hidden @ weight.t()
    results["sequences from logits"] = sequence_logps(logits, batch.labels, **given)
    results["tokens from logits"] = token_logps(logits, batch.labels, **given)
    return results


def traffic(rank, group):
    """Bytes that one call hands to collectives, forward and backward, as a rank sends them."""
    batch, hidden, weight, start = shard_of(rank)
    given = {"tp_group": group, "vocab_start": start}
    sent = []
    gather, reduce = dist.all_gather, dist.all_reduce

    def counted_gather(outputs, tensor, **kwargs):
        sent.append(("gather", tensor.nbytes))
        return gather(outputs, tensor, **kwargs)

    def counted_reduce(tensor, **kwargs):
        sent.append(("reduce", tensor.nbytes))
        return reduce(tensor, **kwargs)

    results = {}
    dist.all_gather, dist.all_reduce = counted_gather, counted_reduce
    try:
        inputs = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
        linear_sequence_logps(*inputs, batch.labels, **given).sum().backward()
        results["head"], sent[:] = list(sent), []
        sequence_logps(inputs[0] @ inputs[1].t(), batch.labels, **given).sum().backward()
        results["logits"] = list(sent)
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce
    return results


# ---------------------------------------------------------------------------------------------- the ranks' part


def scenarios(rank, groups):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    results = {name: train(*way, mesh) for name, way in WAYS.items()}
    results |= {name: from_dtensors(line, *how) for name, how in DTENSORS.items()}
    results["tied"], results["tokens split"] = (
        tied(line),
        tokens_split(mesh, [dist.new_group([r]) for r in range(4)][rank]),
    )
    results["again"], results["traffic"] = again(rank % 2, groups[2]), traffic(rank % 2, groups[2])
    results["compiled head"] = compiled(rank % 2, groups[2], mesh["tp"], "head")
    return results


def slow_scenarios(rank, groups):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return {f"compiled {how}": compiled(rank % 2, groups[2], mesh["tp"], how) for how in ("logits", "DTensor")}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_four_ranks(str(tmp_path_factory.mktemp("plans")), scenarios)


@pytest.fixture(scope="module")
def slow_ranks(tmp_path_factory):
    return on_four_ranks(str(tmp_path_factory.mktemp("slow")), slow_scenarios)


@pytest.fixture(autouse=True)
def _small_tiles():
    small_tiles()


@pytest.mark.parametrize("name", WAYS)
def test_data_and_vocabulary_parallel_are_one_process(ranks, name):
    from_logits, dtype = WAYS[name]
    alone = train(from_logits, dtype)
    near = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    for result in ranks:
        for step in range(STEPS):
            assert_close(result[name]["loss"][step], alone["loss"][step], **near)
            assert_close(result[name]["log_alpha"][step], alone["log_alpha"][step], **near)
            for mine, theirs in zip(result[name]["grads"][step], alone["grads"][step], strict=True):
                assert_close(mine, theirs, **near)


@pytest.mark.parametrize("name", WAYS)
def test_alpha_has_the_same_bits_on_all_four_ranks(ranks, name):
    for result in ranks[1:]:
        assert all(
            torch.equal(a, b) for a, b in zip(result[name]["log_alpha"], ranks[0][name]["log_alpha"], strict=True)
        )


@pytest.mark.parametrize("name", DTENSORS)
def test_dtensors_say_themselves_who_holds_which_words(ranks, name):
    vocabulary, _ = DTENSORS[name]
    alone = from_dtensors(None, vocabulary, None)
    for result in ranks:
        for mine, theirs in zip(result[name], alone, strict=True):
            assert_close(mine, theirs, rtol=1e-10)


def test_a_tied_table_gets_both_gradients(ranks):
    for result in ranks:
        for mine, theirs in zip(result["tied"], tied(None), strict=True):
            assert_close(mine, theirs, rtol=1e-10)


def test_tokens_of_a_sequence_on_several_ranks_too(ranks):
    alone = tokens_split(None)
    for result in ranks:
        for mine, theirs in zip(result["tokens split"], alone, strict=True):
            assert_close(mine, theirs, rtol=1e-10)


def check_compiled(ranks, how):
    for result in ranks:
        eager, compiled = result[f"compiled {how}"]
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_compiled_without_a_graph_break_the_bits_are_the_same(ranks):
    check_compiled(ranks, "head")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["logits", "DTensor"])
def test_compiled_from_logits_and_from_a_dtensor_too(slow_ranks, how):
    check_compiled(slow_ranks, how)


def test_backward_twice_checkpoints_and_no_grad(ranks):
    for result in ranks:
        found = result["again"]
        for name in ("retained", "checkpointed False", "checkpointed True"):
            assert all(torch.equal(a, b) for a, b in zip(found[name], found["plain"], strict=True)), name
        assert torch.equal(found["no grad"], found["out"])
        assert torch.equal(found["told"], found["out"])
        assert found["told wrong"].isnan().all()
        assert not found["no label"].any()
        assert found["no row"].shape == (0, 7)
        assert_close(found["sequences from logits"], found["out"], rtol=1e-5)
        assert_close(found["tokens from logits"].sum(1), found["out"], rtol=1e-5)


def test_eight_bytes_a_row_pass_between_ranks(ranks):
    batch = shard_of(0)[0]
    labelled, rows = int((batch.labels[:, 1:] != IGNORE).sum()), batch.labels.numel()
    for result in ranks:
        facts, payload, gradient = result["traffic"]["head"]
        assert payload == ("gather", 8 * labelled + 8)
        assert gradient == ("reduce", 4 * labelled * WIDTH)
        assert facts == result["traffic"]["logits"][0] == ("gather", 112)
        assert result["traffic"]["logits"][1:] == [("gather", 8 * rows + 8)]
