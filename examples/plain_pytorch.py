"""Group-robust DPO in a loop of one's own: communities that want different answers, and one has a tenth of the pairs.

    python examples/plain_pytorch.py                      # a tiny model, made on the spot; seconds, no network
    python examples/plain_pytorch.py --method dpo         # without robustness: what the smaller group gets then
    python examples/plain_pytorch.py --model NAME --train pairs.jsonl --test held_out.jsonl --learning_rate 1e-6

What differs from a loop for plain DPO is marked with (*).
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import torch
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
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
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
    """(2, N) log-probabilities of the replies of N pairs, chosen and rejected."""
    model.eval()
    parts = []
    for start in range(0, len(pairs), batch_size):
        inputs, labels = collate(pairs[start : start + batch_size], tokenizer, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            parts.append(model(**inputs, fused_labels=labels).sequence_logps.view(2, -1))
    return torch.cat(parts, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name; a tiny model by default")
    parser.add_argument("--train", help="JSON lines with prompt, chosen, rejected, group; made-up pairs by default")
    parser.add_argument("--test", help="the same, held out")
    parser.add_argument("--method", default="gr_dpo", choices=["gr_dpo", "is_dpo", "dpo"])
    parser.add_argument("--group_lr", type=float, default=0.05, help="step of the group weights")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="step of the policy; 1e-6 for a real model")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch_size", type=int, default=16, help="pairs a step")
    parser.add_argument("--checkpoint", type=Path, help="written at the end; gone on from where it exists")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() and options.model else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(options.model) if options.model else ByT5Tokenizer()
    # In float32 whatever is stored: at a step of 1e-6 a bfloat16 parameter never changes.
    load = AutoModelForCausalLM.from_pretrained
    model = load(options.model, dtype=torch.float32) if options.model else tiny_model(tokenizer)
    model.to(device)
    train, test = (
        [json.loads(line) for line in Path(path).read_text().splitlines()] if path else made_up_pairs(count, seed)
        for path, count, seed in ((options.train, 600, 1), (options.test, 200, 2))
    )

    sizes = Counter(pair["group"] for pair in train)  # (*)
    group_weights = {  # (*)
        "gr_dpo": lambda: GroupWeights.robust(sizes, options.group_lr),
        "is_dpo": lambda: GroupWeights.balanced(sizes),
        "dpo": lambda: GroupWeights.proportional(sizes),
    }[options.method]().to(device)
    group_of = {name: i for i, name in enumerate(group_weights.names)}

    attach_fused_head(model)  # (*) `fused_labels` bring log-probabilities, and the logits never exist
    # The reference is the policy as it starts: scored once, it takes no memory afterwards.
    ref_logps, ref_test = (score(model, pairs, tokenizer, device) for pairs in (train, test))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    done = 0
    if options.checkpoint and options.checkpoint.exists():
        saved = torch.load(options.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        group_weights.load_state_dict(saved["group_weights"])  # (*) alpha is state, as the optimizer's moments are
        done = saved["steps"]
        print(f"going on after step {done}")

    for step in range(done + 1, options.steps + 1):
        model.train()
        # Every step draws from a stream of its own, so that a run that was interrupted draws the same.
        rows = torch.randint(len(train), (options.batch_size,), generator=torch.Generator().manual_seed(step)).tolist()
        pairs = [train[row] for row in rows]
        inputs, labels = collate(pairs, tokenizer, device)
        group_ids = torch.tensor([group_of[pair["group"]] for pair in pairs], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            policy_logps = model(**inputs, fused_labels=labels).sequence_logps
        # (*) alpha moves in here, by the losses of this batch, and weights this batch
        result = preference_loss(
            policy_logps, ref_logps[:, rows].flatten(), group_ids, group_weights, beta=options.beta
        )
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, options.steps // 6) == 0:
            named = zip(group_weights.names, group_weights.weights.tolist(), strict=True)
            print(f"step {step}: alpha " + ", ".join(f"{name} {value:.3f}" for name, value in named))

    done = max(done, options.steps)
    if options.checkpoint:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "steps": done}
        torch.save(state | {"group_weights": group_weights.state_dict()}, options.checkpoint)  # (*)

    log_ratios = score(model, test, tokenizer, device) - ref_test
    margins = log_ratios[0] - log_ratios[1]
    losses = -torch.nn.functional.logsigmoid(options.beta * margins)
    print(f"\nheld out, after {done} steps of {options.method}")
    by_group = {}
    for name, alpha in zip(group_weights.names, group_weights.weights.tolist(), strict=True):
        of_group = torch.tensor([pair["group"] == name for pair in test], device=device)
        by_group[name], accuracy = float(losses[of_group].mean()), float((margins[of_group] > 0).float().mean())
        print(f"{name:>12}  loss {by_group[name]:.3f}  accuracy {accuracy:.3f}  alpha {alpha:.3f}")
    worst = max(by_group, key=by_group.__getitem__)
    print(f"worst group: {worst}, loss {by_group[worst]:.3f}")


if __name__ == "__main__":
    main()
