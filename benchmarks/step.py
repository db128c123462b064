"""One whole preference step of a model: what a user feels.

    python -m benchmarks step

Policy forward and backward, the reference (cached sums, or scored in the step), α, AdamW.  Models: "small" (4 layers,
H 512, V 32000), and one with the width and vocabulary of Llama 3.2 1B (H 2048, V 128256, tied; all 16 layers on a GPU,
one on CPU), trained whole or by LoRA of rank 16 on all linear layers.  Half of every sequence is prompt.

    ours             the trainer's own loss: hidden states, fused head, α moves in the call
    through logits   the same with ``fused_head`` off
    authors' way     logits in float32, log_softmax over all of them, α step with a one-hot mask: the method's code
    TRL              ``DPOTrainer.compute_loss`` with the metrics that it logs; plain DPO, there being no α in it

The learning rate is 0, so that every round does the same; it costs what any other does.  α moves with group sizes as
the sampling has them, so that all pairs start out with weight 1.  By formula a step does 6 operations a parameter and
token (4 under LoRA), the head's for the labelled rows only; it moves every parameter twice, and trained ones eight
times more (gradient written and read, AdamW).  Errors are those of the summed log-probabilities and of the gradient of
one parameter of the last layer, against the head in float64 on the same backbone.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from benchmarks import peers, suite
from benchmarks.measure import Line, gemm_line
from benchmarks.results import Row
from benchmarks.shapes import Batch, labels_of
from benchmarks.suite import OURS, Errors, Outputs, Settings, Work
from benchmarks.tail import Alpha, one_hot
from grpo_kernels import GroupWeights
from grpo_kernels.trainer.config import LossConfig
from grpo_kernels.trainer.model.scoring import group_loss, reply_logps

SETTINGS = Settings(rounds=7, at_once=3, preload=("transformers", "peft", "trl"))
BETA, GROUPS, GROUP_LR = 0.1, 4, 1e-6
WHOLE, LORA = "whole model", "LoRA"
CACHED, ONLINE = "reference cached", "reference in the step"
EPSILON = (1e-4, 2.0**-7)


class Shape(NamedTuple):
    """A Llama by its numbers."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int


SMALL = Shape("small, 4 layers", 4, 512, 1376, 8, 8, 32000)
LARGE = Shape("1B-shaped, 16 layers", 16, 2048, 8192, 32, 8, 128256)
BATCHES = {
    "cpu": {SMALL.name: Batch("4 pairs of 64", 4, 64, 0.5), LARGE.name: Batch("2 pairs of 32", 2, 32, 0.5)},
    "gpu": {SMALL.name: Batch("16 pairs of 512", 16, 512, 0.5), LARGE.name: Batch("4 pairs of 1024", 4, 1024, 0.5)},
}


class Case(NamedTuple):
    model: Shape
    batch: Batch
    trained: str
    reference: str

    def fields(self) -> Row:
        return {
            "case": f"{self.model.name}, {self.batch.name}, {self.trained}", "work": self.reference,
            "dtype": "bfloat16", "rows": self.batch.rows, "labelled": round(self.batch.rows * self.batch.labelled),
            "vocabulary": self.model.vocabulary, "hidden": self.model.hidden, "pairs": self.batch.pairs,
            "groups": GROUPS,
        }  # fmt: skip


def cases(size: str) -> list[Case]:
    small, large = (BATCHES[size][shape.name] for shape in (SMALL, LARGE))
    large_model = LARGE if size == "gpu" else LARGE._replace(name="1B-shaped, 1 of 16 layers", layers=1)
    found = [Case(SMALL, small, trained, CACHED) for trained in (WHOLE, LORA)]
    found += [Case(large_model, large, trained, CACHED) for trained in (WHOLE, LORA)]
    found += [Case(SMALL, small, trained, ONLINE) for trained in (WHOLE, LORA)]
    if size == "gpu":
        found += [Case(large_model, large, trained, ONLINE) for trained in (WHOLE, LORA)]
    return found


def main(options: Namespace) -> int:
    lacking = [package for package in ("transformers", "peft") if importlib.util.find_spec(package) is None]
    if lacking:
        print(f"step: left out, {' and '.join(lacking)} not installed")
        return 0
    return suite.run("step", cases(options.size), build, options, SETTINGS)


def build(case: Case, device: torch.device) -> Work:
    setup = Setup(case, device)
    trainable = sum(p.numel() for p in setup.model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in setup.model.parameters())
    head, labelled = case.model.hidden * case.model.vocabulary, round(case.batch.rows * case.batch.labelled)
    passes = 3 if case.trained == WHOLE else 2
    scored = 1 if case.reference == ONLINE else 0  # forward once more, for the reference
    return Work(
        {
            f"{OURS}fused head": Line(lambda: setup.ours(fused_head=True)),
            f"{OURS}through logits": Line(lambda: setup.ours(fused_head=False)),
            "authors' way": Line(setup.authors),
            "TRL DPOTrainer": setup.no_trainer or Line(setup.trl),
        },
        ours=f"{OURS}fused head",
        plain=Line(lambda: setup.authors(torch.bfloat16)),
        errors=setup.errors,
        epsilon=EPSILON,
        bytes=2.0 * (everything * (2 + scored) + 8 * trainable),
        operations=2.0 * (passes + scored) * ((everything - head) * case.batch.rows + head * labelled),
        copy_bytes=256 << 20,
        gemms=gemm_line(case.batch.rows, case.model.hidden, case.model.vocabulary, torch.bfloat16, device),
        gemm_operations=6.0 * case.batch.rows * head,
        memory=case.reference == CACHED,
    )


class Setup:
    """A model that all variants share, with its optimizer, its batch and its reference."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        generator = torch.Generator().manual_seed(0)
        batch = case.batch
        labels = labels_of(batch, case.model.vocabulary, generator)
        ids = torch.randint(0, case.model.vocabulary, labels.shape, generator=generator)
        self.labels = labels.to(device)
        self.ids = torch.where(labels < 0, ids, labels).to(device)
        self.mask = torch.ones_like(self.ids)
        self.group_ids = (torch.arange(batch.pairs) % GROUPS).to(device)
        self.ref_logps = torch.full((2 * batch.pairs,), -11.0 * batch.tokens * batch.labelled, device=device)
        self.group_weights = GroupWeights.robust([100] * GROUPS, group_lr=GROUP_LR).to(device)
        self.alpha = Alpha(GROUPS, torch.float64, device)
        self.base = make_model(case.model, device)
        self.frozen = copy.deepcopy(self.base).requires_grad_(False) if self.has_frozen_copy else None
        self.trainer, self.no_trainer = None, peers.missing("trl", device)
        if not self.no_trainer:
            try:
                self.trainer = self.make_trainer()
            except Exception as error:
                self.no_trainer = f"its trainer cannot be built, {type(error).__name__}: {error}"[:160]
        self.model = self.trainer.model if self.trainer else self.adapted()
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0, fused=True
        )
        self.watched = self.watched_parameter()

    @property
    def has_frozen_copy(self) -> bool:
        """Under LoRA the reference is the model without its adapters."""
        return self.case.reference == ONLINE and self.case.trained == WHOLE

    def lora(self) -> Any:
        from peft import LoraConfig

        return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

    def adapted(self) -> torch.nn.Module:
        if self.case.trained == WHOLE:
            return self.base
        from peft import get_peft_model

        return get_peft_model(self.base, self.lora())

    def watched_parameter(self) -> torch.nn.Parameter:
        """The one whose gradient is compared: the last norm's weight, or the last adapter."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        wanted = "model.norm.weight" if self.case.trained == WHOLE else "lora_B"
        return [p for name, p in named if wanted in name][-1]

    # ---- the ways

    def ours(self, *, fused_head: bool) -> Outputs:
        config = LossConfig(beta=BETA, fused_head=fused_head)
        batch = {"input_ids": self.ids, "attention_mask": self.mask, "labels": self.labels, "group_ids": self.group_ids}
        reference = self.ref_logps
        if self.case.reference == ONLINE:
            with torch.no_grad(), self.reference_model() as model:
                reference = reply_logps(model, batch, config)
        out = group_loss(self.model, batch, reference, self.group_weights, config)
        return self.finished(out.loss, out.policy_logps)

    def authors(self, dtype: torch.dtype = torch.float32) -> Outputs:
        reference = self.ref_logps
        if self.case.reference == ONLINE:
            with torch.no_grad(), self.reference_model() as model:
                reference = self.summed(model, dtype)
        policy, pairs = self.summed(self.model, dtype), self.case.batch.pairs
        ratios = policy - reference
        losses = -functional.logsigmoid(BETA * (ratios[:pairs] - ratios[pairs:]))
        return self.finished(self.alpha.weighted(losses, self.group_ids, one_hot), policy)

    def summed(self, model: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
        logits = model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits[:, :-1].to(dtype)
        labels = self.labels[:, 1:]
        token = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (token * (labels >= 0)).sum(-1).float()

    def trl(self) -> Outputs:
        completion = (self.labels >= 0).long()
        inputs = {"input_ids": self.ids, "attention_mask": self.mask, "completion_mask": completion}
        if self.case.reference == CACHED:
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = self.ref_logps.chunk(2)
        seen: list[torch.Tensor] = []

        def look(module: Any, inputs: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                seen.append(output.log_probs.detach().sum(1))

        base = self.model.get_base_model() if self.case.trained == LORA else self.model
        hook = base.register_forward_hook(look)
        try:
            with quiet():
                loss = self.trainer.compute_loss(self.model, inputs)
        finally:
            hook.remove()
        return self.finished(loss, seen[-1])

    @contextlib.contextmanager
    def reference_model(self) -> Iterator[torch.nn.Module]:
        if self.frozen is not None:
            yield self.frozen
        else:
            with self.model.disable_adapter():
                yield self.model

    def finished(self, loss: torch.Tensor, logps: torch.Tensor) -> Outputs:
        loss.backward()
        self.optimizer.step()
        watched = self.watched.grad
        self.optimizer.zero_grad()
        return {"logps": logps.detach(), "grad": watched}

    # ---- TRL's trainer

    def make_trainer(self) -> Any:
        from datasets import Dataset, disable_progress_bars
        from trl import DPOConfig, DPOTrainer

        disable_progress_bars()
        cached = self.case.reference == CACHED
        # Cached sums come with the batch.  A trainer told to make them hashes the model and goes over the data first;
        # one that is given a reference model does not, and then the model is not looked at.
        stand_in = make_model(SMALL._replace(layers=1, hidden=16, intermediate=16, heads=1, kv_heads=1), self.device)
        rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
        with quiet(), tempfile.TemporaryDirectory() as folder:
            trainer = DPOTrainer(
                model=self.base,
                ref_model=None if self.case.trained == LORA else stand_in if cached else self.frozen,
                args=DPOConfig(
                    folder, beta=BETA, report_to=[], use_cpu=self.device.type == "cpu", bf16=False, disable_tqdm=True,
                    gradient_checkpointing=False, per_device_train_batch_size=self.case.batch.pairs,
                ),
                train_dataset=Dataset.from_list(rows),
                processing_class=make_tokenizer(),
                peft_config=self.lora() if self.case.trained == LORA else None,
            )  # fmt: skip
        if cached:
            trainer.precompute_ref_logps, trainer.ref_model = True, None
        return trainer

    # ---- the truth

    def errors(self, outputs: Outputs) -> Errors:
        sums, grad = self.exact
        error = ((outputs["logps"].double() - sums).abs().max() / sums.abs().max()).item()
        return error, ((outputs["grad"].double() - grad).norm() / grad.norm()).item()

    @cached_property
    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        inner = self.model.get_base_model() if self.case.trained == LORA else self.model
        pairs, reference = self.case.batch.pairs, self.ref_logps.double()
        if self.case.reference == ONLINE:
            with torch.no_grad(), self.reference_model() as model:
                there = model.get_base_model() if self.case.trained == LORA else model
                reference = self.sums_in_float64(there)
        sums = self.sums_in_float64(inner)
        ratios = sums - reference
        loss = -functional.logsigmoid(BETA * (ratios[:pairs] - ratios[pairs:])).mean()
        (grad,) = torch.autograd.grad(loss, self.watched)
        return sums.detach(), grad.double()

    def sums_in_float64(self, inner: Any) -> torch.Tensor:
        decoder, weight = inner.get_decoder(), inner.get_output_embeddings().weight.double()
        hidden = decoder(input_ids=self.ids, attention_mask=self.mask, use_cache=False).last_hidden_state
        sums = []
        for h, labels in zip(hidden[:, :-1], self.labels[:, 1:], strict=True):
            scored = labels >= 0
            token = functional.cross_entropy(h[scored].double() @ weight.t(), labels[scored], reduction="sum")
            sums.append(-token)
        return torch.stack(sums)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what TRL has to say about two pairs of one word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def make_model(shape: Shape, device: torch.device) -> Any:
    """A Llama in bfloat16 with drawn weights; a million numbers repeated, as in ``shapes.normal``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.shapes import normal

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
            else:
                parameter.copy_(normal(tuple(parameter.shape), 0.02, torch.bfloat16, generator))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffers are computed, not drawn
    model.tie_weights()
    return model


def make_tokenizer() -> Any:
    """As little as a trainer asks for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {word: place for place, word in enumerate(("<unk>", "<pad>", "<eos>", "a", "b", "c"))}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), unk_token="<unk>", pad_token="<pad>",
        eos_token="<eos>",
    )  # fmt: skip
