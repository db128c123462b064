"""Two ranks that share a vocabulary on one device: by NCCL where there are two devices, else by gloo on one."""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[1] / "distributed"))

import vocab_ranks

from grpo_kernels import available_backends

RANKS, LIMIT = 2, datetime.timedelta(seconds=120)
EPSILON = {torch.float32: 4e-6, torch.bfloat16: 4e-3}

CALLS = {
    f"{'head' if head else 'logits'}, {str(dtype).removeprefix('torch.')}, {backend}": vocab_ranks.Call(
        edges="two, uneven", head=head, dtype=dtype, biased=head, options={"backend": backend}
    )
    for head in (True, False)
    for dtype in EPSILON
    for backend in ("torch", "triton", "cuda")
}


def work(rank, folder, kind, names):
    device = f"{kind}:{rank % torch.cuda.device_count()}" if kind == "cuda" else kind
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= RANKS else "gloo"
    dist.init_process_group(backend, f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=LIMIT)
    results = {}
    for name in names:
        results[name] = vocab_ranks.run(CALLS[name], dist.group.WORLD, rank, device=device)
        if kind == "cuda":  # on a CPU it is an error
            broken = vocab_ranks.Call(**vars(CALLS[name]) | {"change": no_such_word})
            losses = vocab_ranks.run(broken, dist.group.WORLD, rank, device=device)["losses"]
            results[f"{name}, label of nobody"] = losses
    torch.save({name: cpu(value) for name, value in results.items()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def cpu(value):
    return {name: tensor.cpu() for name, tensor in value.items()} if isinstance(value, dict) else value.cpu()


def no_such_word(batch, hidden, weight):
    """A label that no rank holds: NaN in its pair, and in no other."""
    batch.labels[0, 5] = vocab_ranks.VOCABULARY


def on_two_ranks(folder, kind, names):
    torch.multiprocessing.spawn(work, (str(folder), kind, names), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def check(name, results, kind):
    call = CALLS[name]
    shared = vocab_ranks.together(call, [result[name] for result in results])
    alone, exact = (vocab_ranks.run(call, exact=e, device="cpu" if e else kind) for e in (False, True))
    for key in ("policy_logps", *(key for key in exact if "grad of" in key)):
        errors = [float((x.cpu().double() - exact[key]).norm() / exact[key].norm()) for x in (shared[key], alone[key])]
        assert errors[0] <= 1.5 * errors[1] + EPSILON[call.dtype], key
    for key in ("loss", "policy_logps"):
        assert torch.equal(results[0][name][key], results[1][name][key])


def backends_here():
    """Those that can run, of the ones that the environment names where it names any."""
    wanted = [name for name in os.environ.get("GRPO_KERNELS_TEST_BACKENDS", "").split(",") if name]
    here = [name for name, reason in available_backends().items() if reason is None]
    return [name for name in here if not wanted or name in wanted or name == "torch"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    names = [name for name in CALLS if name.split(", ")[-1] in backends_here()]
    return on_two_ranks(tmp_path_factory.mktemp("vocabulary"), "cuda", names)


@pytest.mark.parametrize("name", CALLS)
def test_the_numbers_are_those_of_one_process(results, name):
    if name not in results[0]:
        pytest.skip("this backend is not here, or was not asked for")
    check(name, results, "cuda")


@pytest.mark.parametrize("name", CALLS)
def test_a_label_that_nobody_holds_makes_its_pair_nan(results, name):
    if name not in results[0]:
        pytest.skip("this backend is not here, or was not asked for")
    for result in results:
        losses = result[f"{name}, label of nobody"]
        assert losses[0].isnan()
        assert losses[1:].isfinite().all()
