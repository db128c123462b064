"""Group-robust DPO with ``transformers.Trainer``: a group column, alpha once an optimizer step, alpha in checkpoints.

    python examples/hf_trainer.py                         # a tiny model, made on the spot; seconds, no network
    python examples/hf_trainer.py --method dpo            # without robustness: what the smaller group gets then
    python examples/hf_trainer.py --accumulation 2        # batches in two parts: alpha moves once for both
    python examples/hf_trainer.py --resume                # go on from the last checkpoint, alpha and all
    torchrun --nproc-per-node 2 examples/hf_trainer.py    # each process takes a part of every batch

What differs from a Trainer for plain DPO is marked with (*).
"""

import argparse
import contextlib
import json
import random
from collections import Counter
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from grpo_kernels import GroupWeights, attach_fused_head, preference_loss  # (*)

SHARES = {"newcomers": 6, "hobbyists": 3, "experts": 1}


def made_up_pairs(num_pairs: int, seed: int) -> list[dict]:
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


class Collator:
    """B pairs as 2B sequences: the B chosen first, then the B rejected; prompt and padding have label -100."""

    def __init__(self, tokenizer, groups: list[str]) -> None:
        self.tokenizer, self.group_of = tokenizer, {name: i for i, name in enumerate(groups)}

    def __call__(self, pairs: list[dict]) -> dict[str, torch.Tensor]:
        ids, labels = [], []
        for reply in ("chosen", "rejected"):
            for pair in pairs:
                prompt = self.tokenizer(pair["prompt"], add_special_tokens=False).input_ids
                answer = [*self.tokenizer(pair[reply], add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
                ids.append(torch.tensor(prompt + answer))
                labels.append(torch.tensor([-100] * len(prompt) + answer))
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=-100),
            "group_ids": torch.tensor([self.group_of[pair["group"]] for pair in pairs]),  # (*)
            # Scored before training; nothing yet while they are.
            "ref_logps": torch.tensor([pair.get("ref_logps", (0.0, 0.0)) for pair in pairs]).t().flatten(),
        }


class GroupRobustTrainer(Trainer):
    """The loss is that of pairs in groups; ``group_weights`` holds alpha, which moves as the data are seen."""

    def __init__(self, *args, group_weights: GroupWeights, beta: float, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs: Trainer divides by the accumulation
        self.beta = beta
        self.group_weights = group_weights.to(self.args.device)  # (*) beside the model: DDP must not broadcast it
        attach_fused_head(self.model)  # (*) `fused_labels` bring log-probabilities, and the logits never exist
        self.add_callback(AlphaCallback(self))

    def policy_logps(self, model, inputs) -> torch.Tensor:
        """(2B,) log-probabilities of the replies."""
        return model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], fused_labels=inputs["labels"]
        ).sequence_logps

    def preferences(self, model, inputs):
        return preference_loss(
            self.policy_logps(model, inputs), inputs["ref_logps"], inputs["group_ids"], self.group_weights,
            beta=self.beta,
        )  # fmt: skip

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # (*) With accumulation alpha is observed here and moves at the optimizer step, by all parts of the batch.
        accumulates = self.args.gradient_accumulation_steps > 1
        with self.group_weights.accumulate() if accumulates else contextlib.nullcontext():
            loss = self.preferences(model, inputs).loss
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Margins for predictions and groups for labels: what compute_metrics needs."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            result = self.preferences(model, inputs)
        return result.losses.mean(), result.margins, inputs["group_ids"]

    def log(self, logs, *args, **kwargs) -> None:
        if "loss" in logs:
            alpha = zip(self.group_weights.names, self.group_weights.weights.tolist(), strict=True)
            logs |= {f"alpha/{name}": round(value, 4) for name, value in alpha}  # (*)
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def score_reference(self, pairs: list[dict]) -> None:
        """Write the log-probabilities of the policy as it is now into the pairs."""
        self.model.to(self.args.device).eval()
        for start in range(0, len(pairs), 32):
            part = pairs[start : start + 32]
            logps = self.policy_logps(self.model, self._prepare_inputs(self.data_collator(part)))
            for pair, scores in zip(part, logps.view(2, -1).t().tolist(), strict=True):
                pair["ref_logps"] = scores

    def train(self, resume_from_checkpoint=None, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            saved = torch.load(Path(resume_from_checkpoint) / "group_weights.pt", weights_only=True)
            self.group_weights.load_state_dict(saved)  # (*) by the groups' names, in whatever order they come
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


class AlphaCallback(TrainerCallback):
    """Alpha moves when the optimizer does, and is saved when it is."""

    def __init__(self, trainer: GroupRobustTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        if args.gradient_accumulation_steps > 1:
            self.trainer.group_weights.step()  # (*)

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.trainer.group_weights.state_dict(), folder / "group_weights.pt")  # (*)


def by_group(names: list[str], beta: float):
    """compute_metrics: loss and accuracy of every group, and the worst."""

    def metrics(prediction) -> dict[str, float]:
        margins, group_ids = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
        losses = -torch.nn.functional.logsigmoid(beta * margins)
        found = {}
        for i, name in enumerate(names):
            found[f"{name}_loss"] = float(losses[group_ids == i].mean())
            found[f"{name}_accuracy"] = float((margins[group_ids == i] > 0).float().mean())
        return found | {"worst_group_loss": max(found[f"{name}_loss"] for name in names)}

    return metrics


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
    parser.add_argument("--batch_size", type=int, default=16, help="pairs of a process at a time")
    parser.add_argument("--accumulation", type=int, default=1, help="batches a step")
    parser.add_argument("--output_dir", default="runs/hf_trainer")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    options = parser.parse_args()

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model) if options.model else ByT5Tokenizer()
    # In float32 whatever is stored: at a step of 1e-6 a bfloat16 parameter never changes.
    load = AutoModelForCausalLM.from_pretrained
    model = load(options.model, dtype=torch.float32) if options.model else tiny_model(tokenizer)
    train, test = (
        [json.loads(line) for line in Path(path).read_text().splitlines()] if path else made_up_pairs(count, seed)
        for path, count, seed in ((options.train, 600, 1), (options.test, 200, 2))
    )
    sizes = Counter(pair["group"] for pair in train)  # (*)
    group_weights = {  # (*)
        "gr_dpo": lambda: GroupWeights.robust(sizes, options.group_lr),
        "is_dpo": lambda: GroupWeights.balanced(sizes),
        "dpo": lambda: GroupWeights.proportional(sizes),
    }[options.method]()
    every = max(1, options.steps // 6)
    trainer = GroupRobustTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output_dir,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=2 * options.batch_size,
            gradient_accumulation_steps=options.accumulation,
            remove_unused_columns=False,  # (*) the model knows no groups, and Trainer would drop them
            label_names=["group_ids"],
            logging_steps=every,
            save_steps=max(1, options.steps // 2),
            report_to="none",
            disable_tqdm=True,
            use_cpu=options.model is None,
            bf16=options.model is not None and torch.cuda.is_available(),
        ),
        train_dataset=train,
        eval_dataset=test,
        data_collator=Collator(tokenizer, group_weights.names),
        compute_metrics=by_group(group_weights.names, options.beta),
        group_weights=group_weights,
        beta=options.beta,
    )
    # The reference is the policy as it starts: scored once, it takes no memory afterwards.
    for pairs in (train, test):
        trainer.score_reference(pairs)
    trainer.train(resume_from_checkpoint=options.resume)
    metrics = trainer.evaluate()

    if trainer.is_world_process_zero():
        print(f"\nheld out, after {trainer.state.global_step} steps of {options.method}")
        for name, alpha in zip(group_weights.names, group_weights.weights.tolist(), strict=True):
            loss, accuracy = metrics[f"eval_{name}_loss"], metrics[f"eval_{name}_accuracy"]
            print(f"{name:>12}  loss {loss:.3f}  accuracy {accuracy:.3f}  alpha {alpha:.3f}")
        print(f"worst group: loss {metrics['eval_worst_group_loss']:.3f}")


if __name__ == "__main__":
    main()
