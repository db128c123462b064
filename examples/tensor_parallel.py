"""Group-robust DPO with a model in parts: PyTorch's tensor parallelism, the vocabulary split too, and FSDP2 besides.

    torchrun --standalone --nproc-per-node 2 examples/tensor_parallel.py                  # two CPU processes, one model
    torchrun --standalone --nproc-per-node 4 examples/tensor_parallel.py --tensor 2       # two such pairs, one alpha
    torchrun --standalone --nproc-per-node 8 examples/tensor_parallel.py --model NAME --train pairs.jsonl \\
        --test held_out.jsonl --tensor 4 --learning_rate 1e-6                             # GPUs where there are any

Of the LM head each process has some of the words.  `--head fused` never forms logits; `--head logits` forms each
process's own and leaves them where they are.  Any number of processes, in any arrangement, take the same steps.
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from grpo_kernels import GroupWeights, fused_grpo_loss, linear_sequence_logps, preference_loss, sequence_logps  # (*)

SHARES = {"newcomers": 6, "hobbyists": 3, "experts": 1}

LAYER = {
    **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
    "self_attn.o_proj": RowwiseParallel(),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}
"""PyTorch's plan for a layer of a Llama: heads and inner width are split, and a sum puts them together."""


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
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Policy(torch.nn.Module):
    """A causal language model that answers with log-probabilities, or with its logits as they lie.

    Within its forward FSDP2 has put the head's weight together again, up to the split over the "tp" processes.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs, labels, head: str) -> torch.Tensor:
        hidden = self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        if head == "fused":  # the weight is a DTensor, which says itself who holds which words
            return linear_sequence_logps(hidden, self.model.lm_head.weight, labels)
        return self.model.lm_head(hidden)  # a DTensor, sharded over the vocabulary


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
def score(policy, pairs, tokenizer, device, head, batch_size=32):
    """(2, N) log-probabilities of the replies of N pairs; every process scores all, each time with the same calls."""
    policy.eval()
    parts = []
    for start in range(0, len(pairs), batch_size):
        inputs, labels = collate(pairs[start : start + batch_size], tokenizer, device)
        answer = policy(inputs, labels, head)
        parts.append((answer if head == "fused" else sequence_logps(answer, labels)).view(2, -1))
    policy.reshard()  # FSDP2 keeps the root's parameters gathered after a forward that no backward follows
    return torch.cat(parts, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor", type=int, help="processes that share one model; all of them by default")
    parser.add_argument("--head", choices=["fused", "logits"], default="fused", help="from hidden states, or logits")
    parser.add_argument("--model", help="folder or hub name of a Llama; a tiny model by default")
    parser.add_argument("--train", help="JSON lines with prompt, chosen, rejected, group; made-up pairs by default")
    parser.add_argument("--test", help="the same, held out")
    parser.add_argument("--group_lr", type=float, default=0.05, help="step of the group weights; 0 holds them equal")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="step of the policy; 1e-6 for a real model")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch_size", type=int, default=16, help="pairs a step, over all processes")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --standalone --nproc-per-node 2 examples/tensor_parallel.py")

    cuda = torch.cuda.is_available() and options.model is not None
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # (*) gloo beside NCCL: ranks compare what they were called with over it, and no GPU has to be waited for
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    ranks, tensor = dist.get_world_size(), options.tensor or dist.get_world_size()
    if tensor < 1 or ranks % tensor:
        parser.error(f"--tensor must divide the {ranks} processes, got {tensor}")
    data = ranks // tensor
    if options.batch_size % data:
        parser.error(f"--batch_size must be a multiple of the {data} copies of the model, got {options.batch_size}")
    mesh = init_device_mesh(device.type, (data, tensor), mesh_dim_names=("dp", "tp"))
    copy = mesh["dp"].get_local_rank()

    def say(text: str) -> None:
        if dist.get_rank() == 0:
            print(text, flush=True)

    torch.manual_seed(0)  # the same on every process, which all begin with the whole model
    tokenizer = AutoTokenizer.from_pretrained(options.model) if options.model else ByT5Tokenizer()
    load = AutoModelForCausalLM.from_pretrained
    model = load(options.model, dtype=torch.float32) if options.model else tiny_model(tokenizer)
    if model.lm_head.weight is model.get_input_embeddings().weight:
        parser.error("this program's plan is for a head of its own; split a table that is tied to it as Shard(0)")
    model.to(device)
    for layer in model.get_decoder().layers:
        parallelize_module(layer, mesh["tp"], LAYER)
    # (*) each process keeps its words, (V / tensor, H), and what it makes of them: no logits are gathered
    parallelize_module(model, mesh["tp"], {"lm_head": ColwiseParallel(use_local_output=False)})
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh["dp"])
    policy = fully_shard(Policy(model), mesh=mesh["dp"])
    words = model.lm_head.weight.to_local().shape[0]
    say(
        f"{data} x {tensor} processes on {device.type}, {words} of {len(model.lm_head.weight)} words' rows on the first"
    )

    train, test = (
        [json.loads(line) for line in Path(path).read_text().splitlines()] if path else made_up_pairs(count, seed)
        for path, count, seed in ((options.train, 600, 1), (options.test, 200, 2))
    )
    sizes = Counter(pair["group"] for pair in train)  # (*)
    # (*) alpha sums over the copies of the model: the processes of one copy see the same pairs
    group_weights = GroupWeights.robust(sizes, options.group_lr, process_group=mesh["dp"].get_group()).to(device)
    group_of = {name: i for i, name in enumerate(group_weights.names)}
    # The reference is the policy as it starts: scored once, it takes no memory afterwards.
    ref_logps, ref_test = (score(policy, pairs, tokenizer, device, options.head) for pairs in (train, test))
    # One by one: parameters lie on two meshes, and one operation over many of them takes one.
    optimizer = torch.optim.AdamW(policy.parameters(), lr=options.learning_rate, foreach=False)

    for step in range(1, options.steps + 1):
        policy.train()
        # All draw the same batch, from a stream of the step's own, and each copy of the model takes its part of it.
        rows = torch.randint(len(train), (options.batch_size,), generator=torch.Generator().manual_seed(step))
        rows = rows[copy::data].tolist()
        pairs = [train[row] for row in rows]
        inputs, labels = collate(pairs, tokenizer, device)
        group_ids = torch.tensor([group_of[pair["group"]] for pair in pairs], device=device)
        answer, ref = policy(inputs, labels, options.head), ref_logps[:, rows].flatten()
        # (*) alpha moves in here, by the losses of all copies, and weights this batch
        if options.head == "fused":
            result = preference_loss(answer, ref, group_ids, group_weights, beta=options.beta)
        else:
            result = fused_grpo_loss(answer, labels, ref, group_ids, group_weights, beta=options.beta)
        result.loss.backward()  # FSDP2 averages gradients over the copies, which hold equally many pairs
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, options.steps // 6) == 0:
            named = zip(group_weights.names, group_weights.weights.tolist(), strict=True)
            say(f"step {step}: alpha " + ", ".join(f"{name} {value:.3f}" for name, value in named))

    log_ratios = score(policy, test, tokenizer, device, options.head) - ref_test
    margins = log_ratios[0] - log_ratios[1]
    losses = -torch.nn.functional.logsigmoid(options.beta * margins)
    say(f"\nheld out, after {options.steps} steps")
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
