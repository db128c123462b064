"""TRL's DPO, group robust: communities that want different answers, and the one that differs has a tenth of the pairs.

    python examples/trl_dpo.py                          # a tiny model, made on the spot; seconds, no network
    python examples/trl_dpo.py --method dpo             # the same without robustness: what the smaller group then gets
    python examples/trl_dpo.py --model NAME --train pairs.jsonl --test held_out.jsonl --lora

What differs from a program with ``DPOTrainer`` is marked with (*).
"""

import argparse
import random

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from grpo_kernels.integrations.trl import GroupRobustDPOConfig, GroupRobustDPOTrainer  # (*)

SHARES = {"newcomers": 6, "hobbyists": 3, "experts": 1}


def made_up_pairs(num_pairs: int, seed: int) -> Dataset:
    """Nobody likes a shrug; experts want to hear why, the others do not.  The prompt does not say who is asking."""
    draw = random.Random(seed)
    rows = []
    for _ in range(num_pairs):
        (group,) = draw.choices(list(SHARES), SHARES.values())
        short, why = " yes.", f" yes, since {draw.choice(['it rained', 'it is late', 'we said so'])}."
        chosen, other = (why, short) if group == "experts" else (short, why)
        rejected = draw.choice([other, " who knows?"])
        prompt = f"is {draw.choice(['bread', 'tea', 'soup', 'rice'])} ready?"
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "group": group})  # (*) a group each
    return Dataset.from_list(rows)


def tiny_model(tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name; a tiny model by default")
    parser.add_argument("--train", help="JSON lines with prompt, chosen, rejected, group; made-up pairs by default")
    parser.add_argument("--test", help="the same, held out")
    parser.add_argument("--lora", action="store_true", help="train adapters; their absence is the reference")
    parser.add_argument("--method", default="gr_dpo", choices=["gr_dpo", "is_dpo", "dpo"])
    parser.add_argument("--group_lr", type=float, default=0.05, help="step of the group weights")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="step of the policy; 1e-6 for a real model")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--output_dir", default="runs/trl_dpo")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    options = parser.parse_args()

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model) if options.model else ByT5Tokenizer()
    # What is trained is in float32 whatever is stored: at a step of 1e-6 a bfloat16 parameter never changes.
    dtype = "auto" if options.lora else torch.float32
    load = AutoModelForCausalLM.from_pretrained
    model = load(options.model, dtype=dtype) if options.model else tiny_model(tokenizer)
    train = load_dataset("json", data_files=options.train, split="train") if options.train else made_up_pairs(600, 1)
    test = load_dataset("json", data_files=options.test, split="train") if options.test else made_up_pairs(200, 2)
    peft_config = None
    if options.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")

    trainer = GroupRobustDPOTrainer(  # (*)
        model=model,
        args=GroupRobustDPOConfig(  # (*)
            output_dir=options.output_dir,
            method=options.method,  # (*)
            group_lr=options.group_lr,  # (*)
            beta=0.1,
            learning_rate=options.learning_rate,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=2 * options.batch_size,
            eval_strategy="steps",
            eval_steps=max(1, options.steps // 3),
            save_strategy="steps",
            save_steps=max(1, options.steps // 3),
            logging_steps=10,
            report_to="none",
            disable_tqdm=True,
            bf16=options.model is not None,
            use_cpu=options.model is None,
            gradient_checkpointing=options.model is not None,
        ),
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=options.resume)
    metrics = trainer.evaluate()

    print(f"\nheld out, after {trainer.state.global_step} steps of {options.method}")
    weights = trainer.group_weights  # (*)
    for name, alpha in zip(weights.names, weights.weights.tolist(), strict=True):
        of_group = [metrics.get(f"eval_group_{name}/{field}", float("nan")) for field in ("loss", "accuracy", "n")]
        print("{:>12}  loss {:.3f}  accuracy {:.3f}  of {} pairs  alpha {:.3f}".format(name, *of_group, alpha))
    worst = weights.names[metrics["eval_worst_group/index"]]
    print(f"worst group: {worst}, loss {metrics['eval_worst_group/loss']:.3f}")


if __name__ == "__main__":
    main()
