"""A fused head under FSDP2 and DDP: two processes on half the batch each are one process on the whole.

Every layout runs in one pair of gloo processes, which meet in a file.
"""

from __future__ import annotations

import datetime
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from grpo_kernels import GroupWeights, attach_fused_head, preference_loss, token_logps

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

RANKS, STEPS, PAIRS, VOCABULARY = 2, 3, 4, 67
LIMIT = datetime.timedelta(seconds=120)


def build(tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def batch(step, pairs):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, VOCABULARY, (2 * PAIRS, 9), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, -2:] = -100
    rows = torch.cat([pairs, pairs + PAIRS])
    ref_logps = -20 - torch.rand(2 * PAIRS, generator=generator)
    return ids[rows], labels[rows], ref_logps[rows], torch.tensor([0, 1, 2, 1])[pairs]


def train(model, rank=0, ranks=1, groups=None):
    """SGD steps with a moving alpha: gradients of the first step, parameters after the last, losses and alpha."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    weights = GroupWeights.robust([5, 9, 2], 0.3)
    history = {"loss": [], "grads": None}
    for step in range(STEPS):
        ids, labels, ref_logps, group_ids = batch(step, torch.arange(rank, PAIRS, ranks))
        out = model(input_ids=ids, fused_labels=labels)
        result = preference_loss(out.sequence_logps, ref_logps, group_ids, weights)
        result.loss.backward()
        if history["grads"] is None:
            history["grads"] = {name: whole(p.grad) for name, p in named(model) if p.grad is not None}
        history["loss"].append(result.loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    history["alpha"] = weights.log_alpha
    history["parameters"] = {name: whole(p.detach()) for name, p in named(model)}
    return history


def with_adapters(model):
    """Its head is frozen and all the same a part of the root's group."""
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.05, generator=generator)
    return model


def checkpointed(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def named(model):
    return [(name.removeprefix("module."), parameter) for name, parameter in model.named_parameters()]


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def shard(model, mesh, *, layers=False, head=False, **more):
    """The root's group holds what no other has: embedding, last norm and, unless it is sharded alone, the head."""
    if layers:
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=mesh, **more)
    if head == "with the norm":
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, **more)
    elif head:
        fully_shard(model.lm_head, mesh=mesh, **more)
    fully_shard(model, mesh=mesh, **more)
    assert isinstance(model, FSDPModule)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def attached(model, memory_budget=0):
    """Keeping nothing from forward, backward reads the head's weight once more, which must have been gathered again."""
    attach_fused_head(model, memory_budget=memory_budget)
    return model


ADAPTERS = {
    "adapters, FSDP2": lambda model, mesh: attached(shard(with_adapters(model), mesh)),
    "adapters, FSDP2, layers and head": lambda model, mesh: attached(
        shard(with_adapters(model), mesh, layers=True, head=True)
    ),
    "adapters, DDP": lambda model, mesh: DistributedDataParallel(attached(with_adapters(model))),
}
LAYOUTS = {
    "root, tied": (True, lambda model, mesh: attached(shard(model, mesh))),
    "root, untied": (False, lambda model, mesh: attached(shard(model, mesh))),
    "layers, tied": (True, lambda model, mesh: attached(shard(model, mesh, layers=True))),
    "layers and head": (False, lambda model, mesh: attached(shard(model, mesh, layers=True, head=True))),
    "layers, and norm with head": (
        False, lambda model, mesh: attached(shard(model, mesh, layers=True, head="with the norm")),
    ),
    "attached first": (False, lambda model, mesh: shard(attached(model), mesh, layers=True, head=True)),
    "resharded after forward": (
        False, lambda model, mesh: attached(shard(model, mesh, head=True, reshard_after_forward=True)),
    ),
    "root resharded, tied": (True, lambda model, mesh: attached(shard(model, mesh, reshard_after_forward=True))),
    "never resharded": (
        False, lambda model, mesh: attached(shard(model, mesh, head=True, reshard_after_forward=False)),
    ),
    "tiles kept": (
        False, lambda model, mesh: attached(shard(model, mesh, layers=True, head=True), memory_budget="auto"),
    ),
    "outputs cast, head alone": (
        False,
        lambda model, mesh: attached(
            shard(model, mesh, head=True, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float64))
        ),
    ),
    "checkpointed layers": (
        False, lambda model, mesh: attached(shard(checkpointed(model), mesh, layers=True, head=True)),
    ),
    "DDP, tied": (True, lambda model, mesh: DistributedDataParallel(attached(model))),
    "DDP, untied": (False, lambda model, mesh: attached(DistributedDataParallel(model))),
    "DDP, static graph": (False, lambda model, mesh: DistributedDataParallel(attached(model), static_graph=True)),
    "DDP, unused parameters looked for": (
        False, lambda model, mesh: DistributedDataParallel(attached(model), find_unused_parameters=True),
    ),
}  # fmt: skip


def in_half_precision(mesh):
    """Token log-probabilities of a bfloat16 forward: fused, by its logits, and of its hidden states in float64."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = attached(shard(build(False), mesh, layers=True, head=True, mp_policy=policy))
    ids, labels, *_ = batch(0, torch.arange(PAIRS))
    weight = model.lm_head.weight.full_tensor().bfloat16().double()
    out = model(input_ids=ids, fused_labels=labels, output_hidden_states=True)
    with torch.no_grad():
        exact = token_logps(out.model_output.hidden_states[-1].double() @ weight.T, labels)
        plain = token_logps(model(input_ids=ids).logits, labels)
    out.sequence_logps.sum().backward()
    result = {"fused": out.token_logps.detach(), "sums": out.sequence_logps.detach(), "plain": plain, "exact": exact}
    result["gradient"] = whole(model.lm_head.weight.grad)
    cast = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    model = attached(shard(build(False), mesh, mp_policy=cast))
    result["cast"] = model(input_ids=ids, fused_labels=labels).sequence_logps.detach()
    return result


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=LIMIT)
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    results = {}
    for name, (tied, prepare) in LAYOUTS.items():
        results[name] = train(prepare(build(tied), mesh), rank, RANKS)
    for name, prepare in ADAPTERS.items():
        results[name] = train(prepare(build(False), mesh), rank, RANKS)
    results["bfloat16"] = in_half_precision(mesh)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # as the trainer's command does: gloo's threads live on, and may abort an interpreter that ends


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.spawn(worker, (str(folder),), nprocs=RANKS, join=False)
    deadline = datetime.datetime.now() + LIMIT
    while not context.join(timeout=5):  # raises what a worker raised
        if datetime.datetime.now() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"two ranks did not finish within {LIMIT}")
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone():
    runs = {tied: train(attached(build(tied))) for tied in (False, True)}
    return runs | {"adapters": train(attached(with_adapters(build(False))))}


@pytest.mark.parametrize("layout", [*LAYOUTS, *ADAPTERS])
def test_two_ranks_are_one_process_on_the_whole_batch(ranks, alone, layout):
    expected = alone["adapters" if layout in ADAPTERS else LAYOUTS[layout][0]]
    for run in ranks:
        found = run[layout]
        for kind in ("grads", "parameters"):
            assert found[kind].keys() == expected[kind].keys()
            for name, tensor in expected[kind].items():
                torch.testing.assert_close(found[kind][name], tensor, rtol=1e-6, atol=1e-6, msg=f"{kind} of {name}")
        torch.testing.assert_close(found["alpha"], expected["alpha"], rtol=1e-6, atol=0)
    losses = torch.stack([torch.stack(run[layout]["loss"]) for run in ranks]).mean(dim=0)
    torch.testing.assert_close(losses.to(expected["loss"][0].dtype), torch.stack(expected["loss"]), rtol=1e-6, atol=0)


def test_a_frozen_head_has_no_gradient(ranks):
    for layout in ADAPTERS:
        assert all("lora" in name for name in ranks[0][layout]["grads"])


def test_mixed_precision_answers_in_float32_within_the_error_of_its_logits(ranks):
    for run in ranks:
        found = run["bfloat16"]
        assert found["fused"].dtype is found["sums"].dtype is torch.float32
        error, plain_error = ((found[way] - found["exact"]).abs().max() for way in ("fused", "plain"))
        assert error <= plain_error + 1e-6
        assert found["gradient"].isfinite().all()
        assert found["gradient"].abs().max() > 0


def test_outputs_that_a_policy_rounds_to_half_precision_are_refused_by_the_loss(ranks):
    rounded = ranks[0]["bfloat16"]["cast"]
    assert rounded.dtype is torch.bfloat16
    with pytest.raises(TypeError, match="policy_logps must be a float32 or float64 tensor"):
        preference_loss(rounded, None, torch.zeros(PAIRS, dtype=torch.int64), torch.ones(1))


@pytest.mark.parametrize("layout", [*LAYOUTS, *ADAPTERS])
def test_ranks_end_with_the_same_bits(ranks, layout):
    first, second = (run[layout] for run in ranks)
    assert torch.equal(first["alpha"], second["alpha"])
    assert all(torch.equal(first["parameters"][name], second["parameters"][name]) for name in first["parameters"])
