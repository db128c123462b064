"""Nothing grows from step to step, a graph is gone after backward, and what is saved for it is what the docs list."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from helpers import IGNORE, make_batch

from grpo_kernels import (
    GroupWeights,
    available_backends,
    fused_grpo_loss,
    fused_linear_grpo_loss,
    linear_sequence_logps,
    linear_token_logps,
    preference_loss,
    sequence_logps,
    token_logps,
)

ROOT = Path(__file__).resolve().parents[2]
HERE = [name for name in ("torch", "cpu") if available_backends()[name] is None]

STEPS = """
import gc, json, sys, tracemalloc
import torch
from grpo_kernels import *
tracemalloc.start()
torch.set_num_threads(1)
backend = sys.argv[1]
labels, ids = torch.randint(0, 200, (4, 20)), torch.tensor([0, 1])
hidden, weight = torch.randn(4, 20, 16), torch.randn(200, 16, requires_grad=True)
logits = torch.randn(4, 20, 200)
gw = GroupWeights.robust([3, 2], 0.01, mixing=0.1)

def step(number):
    z, h = logits.clone().requires_grad_(), hidden.clone().requires_grad_()
    out = fused_grpo_loss(z * 1, labels, None, ids, gw, overwrite_logits=number % 2 == 0, backend=backend)
    (out.loss - out.policy_logps.mean()).backward()
    options = {"memory_budget": 10_000 + number, "backend": backend}  # another budget at every step
    fused_linear_grpo_loss(h, weight, labels, None, ids, gw, **options).loss.backward()
    weight.grad = None
    with gw.accumulate():
        preference_loss(torch.randn(4, requires_grad=True), None, ids, gw, loss_type="ipo").loss.backward()
    gw.step()
    sequence_logps(z, labels, backend=backend)  # no backward
    with torch.no_grad():
        linear_sequence_logps(hidden, weight, labels, backend=backend)

def measured():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096, tracemalloc.get_traced_memory()[0]

for number in range(250):
    step(number)
marks = [measured()]
for number in range(250, 750):
    step(number)
    if number % 100 == 49:
        marks.append(measured())
grown = [[after[i] - before[i] for before, after in zip(marks, marks[1:])] for i in (0, 1)]
print(json.dumps(dict(zip(("resident", "python"), grown))))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("backend", [HERE[-1], *(pytest.param(name, marks=pytest.mark.slow) for name in HERE[:-1])])
def test_five_hundred_steps_leave_nothing_behind(backend):
    """Five hundreds of steps: what leaks does so in each, and an allocator that still settles does not.

    One float32 row of the vocabulary left behind by each step would be 80 kB a hundred, the smallest of Python's
    objects 6 kB.
    """
    run = subprocess.run(
        [sys.executable, "-c", STEPS, backend],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    grown = json.loads(run.stdout)
    print(backend, grown)
    assert len(grown["resident"]) == 5
    assert min(grown["resident"]) < 40_000
    assert sum(grown["resident"]) < 2_000_000
    assert min(grown["python"]) < 3_000


# ---- the graph


@pytest.fixture
def no_collector():
    """What has to go goes by itself, without a look for cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def batch_and_head(learns=True):
    batch = make_batch(dtype=torch.float32)
    hidden, weight = torch.randn(8, 7, 5).requires_grad_(), torch.randn(13, 5).requires_grad_(learns)
    return batch, hidden, weight


def losses():
    """Name → () → (what the graph was made of, a scalar)."""
    batch, hidden, weight = batch_and_head()
    gw = GroupWeights.robust([5, 3, 2], 0.1)
    tail = batch.ref_logps, batch.group_ids, gw

    def logits(function):
        z = batch.leaf() * 1
        return z, function(z)

    def states(function):
        h = hidden * 1
        return h, function(h)

    return {
        "fused": lambda: logits(lambda z: fused_grpo_loss(z, batch.labels, *tail).loss),
        "overwritten": lambda: logits(lambda z: fused_grpo_loss(z, batch.labels, *tail, overwrite_logits=True).loss),
        "tokens": lambda: logits(lambda z: token_logps(z, batch.labels).sum()),
        "sequences": lambda: logits(lambda z: preference_loss(sequence_logps(z, batch.labels), *tail).loss),
        "head": lambda: states(lambda h: fused_linear_grpo_loss(h, weight, batch.labels, *tail).loss),
        "head tokens": lambda: states(lambda h: linear_token_logps(h, weight, batch.labels).sum()),
    }


@pytest.mark.parametrize("name", list(losses()))
def test_the_graph_is_gone_after_backward_though_the_loss_is_kept(name, no_collector):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(weakref.ref(x)) or x, lambda x: x):
        source, loss = losses()[name]()
    source_ref = weakref.ref(source)
    del source
    assert source_ref() is not None or "head" in name
    loss.backward()
    assert source_ref() is None
    assert loss.grad_fn is not None
    gone = [ref() is None for ref in saved]
    # What outlives it are the parameter and what was handed in by the caller.
    alive = [ref() for ref in saved if ref() is not None]
    assert all(x.is_leaf or x.dtype == torch.int32 for x in alive), gone


@pytest.mark.parametrize("name", list(losses()))
def test_a_loss_that_is_dropped_takes_its_graph_along(name, no_collector):
    source, loss = losses()[name]()
    source_ref, loss_ref = weakref.ref(source), weakref.ref(loss)
    del source, loss
    assert source_ref() is None
    assert loss_ref() is None


def test_an_output_that_is_kept_keeps_no_logits(no_collector):
    """As a list of outputs for the log would: after backward it holds numbers a pair and a group."""
    batch, *_ = batch_and_head()
    logits = batch.leaf() * 1
    out = fused_grpo_loss(logits, batch.labels, *batch.tail())
    ref = weakref.ref(logits)
    del logits
    out.loss.backward()
    assert ref() is None
    assert sum(x.untyped_storage().nbytes() for x in out) < 400


# ---- what is saved


def saved_by(call):
    """(shape, dtype, bytes of memory behind it) of all that the graph of a call holds."""
    saved = []

    def pack(x):
        saved.append((tuple(x.shape), x.dtype, x.untyped_storage().nbytes()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sorted(saved, key=str)


def listed(**tensors):
    """The list of the docs: name → (shape, dtype), or (shape, dtype, bytes) where that is less than the shape says."""
    full = [
        (shape, dtype, *(more or [dtype.itemsize * torch.Size(shape).numel()]))
        for shape, dtype, *more in tensors.values()
    ]
    return sorted(full, key=str)


F32, F64, I64, I32 = torch.float32, torch.float64, torch.int64, torch.int32
PAIRS = {"weights": ((4,), F32), "slopes": ((4,), F32)}
LENGTHS, EDGES = {"lengths": ((8,), F64)}, {"cu_seqlens": ((9,), I32)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_loss_of_logits_saves_what_the_docs_list(dtype, packed, normalize):
    batch = make_batch(packed=packed, dtype=dtype)
    leaf, rows = batch.leaf(), batch.labels.numel()
    vocabulary = {"logits": (tuple(leaf.shape), dtype), "targets": ((rows,), I64), "lse": ((rows,), F32)}
    edges = EDGES if packed else {}
    layout = {"cu_seqlens": batch.cu_seqlens}

    def loss():
        fused_grpo_loss(leaf, batch.labels, *batch.tail(), **layout, length_normalize=normalize)

    lengths = LENGTHS if normalize else {}
    assert saved_by(loss) == listed(**vocabulary, **PAIRS, **lengths, **edges)
    assert saved_by(lambda: token_logps(leaf, batch.labels, **layout)) == listed(**vocabulary)
    assert saved_by(lambda: sequence_logps(leaf, batch.labels, **layout)) == listed(**vocabulary, **edges)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_loss_of_sums_saves_two_numbers_a_pair(normalize):
    batch, sums = make_batch(), torch.zeros(8, requires_grad=True)
    lengths = torch.ones(8) if normalize else None
    expected = listed(**PAIRS, **(LENGTHS if normalize else {}))
    assert saved_by(lambda: preference_loss(sums, *batch.tail(), lengths=lengths)) == expected


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("budget", [0, 10**6])
def test_the_head_saves_what_the_docs_list(biased, told, learns, budget):
    batch, hidden, weight = batch_and_head(learns)
    scored = int((batch.labels[:, 1:] != IGNORE).sum())
    bias = torch.zeros(13, requires_grad=learns) if biased else None
    options = {"bias": bias, "memory_budget": budget, "num_labelled": scored if told else None}
    tensors = {"index": ((scored,), I64), "unit_grad": ((scored, 5), F32)}
    if told:
        tensors["right"] = ((), torch.bool)
    if learns:
        tensors |= {"hidden": ((56, 5), F32), "weight": ((13, 5), F32), "targets": ((56,), I64)}
        tensors |= dict.fromkeys(("top", "share", "miss"), ((scored,), F32))
        if biased:
            tensors["bias"] = ((13,), F32)
        if budget:
            tensors |= {"kept": ((scored * 13,), F32), "kept_scale": ((1, scored), F32)}
    else:
        tensors["shape of hidden"] = ((56, 5), F32, 4)  # one number, expanded
    assert saved_by(lambda: linear_token_logps(hidden, weight, batch.labels, **options)) == listed(**tensors)
    assert saved_by(lambda: linear_sequence_logps(hidden, weight, batch.labels, **options)) == listed(**tensors)
    loss = saved_by(lambda: fused_linear_grpo_loss(hidden, weight, batch.labels, *batch.tail(), **options))
    assert loss == listed(**tensors, **PAIRS)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_where_gradients_are_off(off):
    batch, hidden, weight = batch_and_head()
    with off():
        assert not saved_by(lambda: fused_grpo_loss(batch.leaf(), batch.labels, *batch.tail()))
        assert not saved_by(lambda: fused_linear_grpo_loss(hidden, weight, batch.labels, *batch.tail()))
