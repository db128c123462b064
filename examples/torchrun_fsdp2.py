"""Group-robust DPO over several processes with FSDP2: parameters in parts, one alpha.

    torchrun --standalone --nproc-per-node 2 examples/torchrun_fsdp2.py            # a tiny model on two CPU processes
    torchrun --standalone --nproc-per-node 8 examples/torchrun_fsdp2.py --model NAME --train pairs.jsonl \\
        --test held_out.jsonl --learning_rate 1e-6 --checkpoint runs/fsdp2         # GPUs where there are any

Runs on any number of processes take the same steps, and a checkpoint of one number goes on with another.
What differs from a loop for plain DPO is marked with (*).
"""

import argparse
import json
import os
import random
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from grpo_kernels import GroupWeights, attach_fused_head, preference_loss  # (*)

SHARES = {"newcomers": 6, "hobbyists": 3, "experts": 1}


def made_up_pairs(num_pairs: int, seed: int) -> list[dict[str, str]]:
    """Nobody likes a shrug; experts want to hear why, the others do not.  The prompt does not say who is asking."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(num_pairs):
        (group,) = draw.choices(list(SHARES), SHARES.values())
        short, why = " yes.", f" yes, since {draw.choice(['it rained', 'it is late', 'we said so'])}."
        chosen, other = (why, short) if group == "experts" else (short, why)
        rejected = draw.choice([other, " who knows?"])
        prompt = f"is {draw.choice(['bread', 'tea', 'soup', 'rice'])} ready?"
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "group": group})  # (*) a group each
    return pairs


def tiny_model(tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def collate(pairs, tokenizer, device):
    """Model inputs and labels of 2B sequences: the B chosen first, then the B rejected; prompt and padding are -100."""
    ids, labels = [], []
    for reply in ("chosen", "rejected"):
        for pair in pairs:
            prompt = tokenizer(pair["prompt"], add_special_tokens=False).input_ids
            answer = [*tokenizer(pair[reply], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
    inputs = {"input_ids": pad(ids, batch_first=True).to(device), "attention_mask": mask.to(device)}
    return inputs, pad(labels, batch_first=True, padding_value=-100).to(device)


@torch.no_grad()
def score(model, pairs, tokenizer, device, batch_size=32):
    """(2, N) log-probabilities of the replies of N pairs; every rank scores all, each time with the same calls."""
    model.eval()
    parts = []
    for start in range(0, len(pairs), batch_size):
        inputs, labels = collate(pairs[start : start + batch_size], tokenizer, device)
        parts.append(model(**inputs, fused_labels=labels).sequence_logps.view(2, -1))
    model.reshard()  # FSDP2 keeps the root's parameters gathered after a forward that no backward follows
    return torch.cat(parts, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name; a tiny model by default")
    parser.add_argument("--train", help="JSON lines with prompt, chosen, rejected, group; made-up pairs by default")
    parser.add_argument("--test", help="the same, held out")
    parser.add_argument("--group_lr", type=float, default=0.05, help="step of the group weights; 0 holds them equal")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="step of the policy; 1e-6 for a real model")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch_size", type=int, default=16, help="pairs a step, over all processes")
    parser.add_argument("--checkpoint", type=Path, help="folder, written to at the end; the last in it is gone on from")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --standalone --nproc-per-node 2 examples/torchrun_fsdp2.py")

    cuda = torch.cuda.is_available() and options.model is not None
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if options.batch_size % ranks:
        parser.error(f"--batch_size must be a multiple of the {ranks} processes, got {options.batch_size}")

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    torch.manual_seed(0)  # the same on every rank, which all begin with the whole model
    tokenizer = AutoTokenizer.from_pretrained(options.model) if options.model else ByT5Tokenizer()
    # In float32 whatever is stored: at a step of 1e-6 a bfloat16 parameter never changes.
    load = AutoModelForCausalLM.from_pretrained
    model = load(options.model, dtype=torch.float32) if options.model else tiny_model(tokenizer)
    model.to(device)
    train, test = (
        [json.loads(line) for line in Path(path).read_text().splitlines()] if path else made_up_pairs(count, seed)
        for path, count, seed in ((options.train, 600, 1), (options.test, 200, 2))
    )
    mesh = dist.device_mesh.init_device_mesh(device.type, (ranks,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if cuda else None
    sharding = {"mesh": mesh} | ({"mp_policy": policy} if policy else {})
    for layer in model.get_decoder().layers:
        fully_shard(layer, **sharding)
    if model.lm_head.weight is not model.get_input_embeddings().weight:
        fully_shard(model.lm_head, **sharding)
    fully_shard(model, **sharding)
    attach_fused_head(model)  # (*) `fused_labels` bring log-probabilities, and the logits never exist
    local = sum(parameter.to_local().numel() for parameter in model.parameters())
    say(f"{ranks} processes on {device.type}, {local} of {sum(p.numel() for p in model.parameters())} numbers on each")

    sizes = Counter(pair["group"] for pair in train)  # (*)
    # (*) beside the model, not inside: every rank has all of alpha, and step() sums over ranks by itself
    group_weights = GroupWeights.robust(sizes, options.group_lr).to(device)
    group_of = {name: i for i, name in enumerate(group_weights.names)}
    # The reference is the policy as it starts: scored once, it takes no memory afterwards.
    ref_logps, ref_test = (score(model, pairs, tokenizer, device) for pairs in (train, test))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)

    start = done = 0
    folders = sorted(options.checkpoint.glob("step-*"), key=lambda p: int(p.name[5:])) if options.checkpoint else []
    if folders:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments, "group_weights": group_weights.state_dict(), "steps": 0}
        dcp.load(state, checkpoint_id=folders[-1])
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        group_weights.load_state_dict(state["group_weights"])  # (*) alpha is state, as the optimizer's moments are
        start = done = state["steps"]
        say(f"going on after step {done}")

    for step in range(done + 1, options.steps + 1):
        model.train()
        # All ranks draw the same batch, from a stream of the step's own, and each takes its part of the pairs.
        rows = torch.randint(len(train), (options.batch_size,), generator=torch.Generator().manual_seed(step))
        rows = rows[rank::ranks].tolist()
        pairs = [train[row] for row in rows]
        inputs, labels = collate(pairs, tokenizer, device)
        group_ids = torch.tensor([group_of[pair["group"]] for pair in pairs], device=device)
        policy_logps = model(**inputs, fused_labels=labels).sequence_logps
        # (*) alpha moves in here, by the losses of the batch of all ranks, and weights this batch
        result = preference_loss(
            policy_logps, ref_logps[:, rows].flatten(), group_ids, group_weights, beta=options.beta
        )
        result.loss.backward()  # FSDP2 averages gradients over ranks, which hold equally many pairs
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, options.steps // 6) == 0:
            named = zip(group_weights.names, group_weights.weights.tolist(), strict=True)
            say(f"step {step}: alpha " + ", ".join(f"{name} {value:.3f}" for name, value in named))

    done = max(done, options.steps)
    if options.checkpoint and done > start:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments, "group_weights": group_weights.state_dict(), "steps": done}
        dcp.save(state, checkpoint_id=options.checkpoint / f"step-{done}")

    log_ratios = score(model, test, tokenizer, device) - ref_test
    margins = log_ratios[0] - log_ratios[1]
    losses = -torch.nn.functional.logsigmoid(options.beta * margins)
    say(f"\nheld out, after {done} steps")
    by_group = {}
    for name, alpha in zip(group_weights.names, group_weights.weights.tolist(), strict=True):
        of_group = torch.tensor([pair["group"] == name for pair in test], device=device)
        by_group[name], accuracy = float(losses[of_group].mean()), float((margins[of_group] > 0).float().mean())
        say(f"{name:>12}  loss {by_group[name]:.3f}  accuracy {accuracy:.3f}  alpha {alpha:.3f}")
    worst = max(by_group, key=by_group.__getitem__)
    say(f"worst group: {worst}, loss {by_group[worst]:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
