"""``DPOTrainer`` with group weights: the loss of a batch, alpha's step, its checkpoint and its logs."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback
from trl import DPOTrainer

from ... import GroupLossOutput, GroupWeights, preference_loss
from .checkpoint import load_group_weights, save_group_weights
from .config import GroupRobustDPOConfig, loss_settings, make_group_weights
from .groups import GROUP_IDS, GroupCollator, require_column, require_known, training_sizes
from .heads import Heads, Scores
from .metrics import GroupTally, alpha_metrics, report_metrics, token_metrics
from .reference import frozen_copy

NOT_OF_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", GROUP_IDS}
"""Keys of a batch that are not the model's; the model would swallow them without a word."""


class GroupRobustDPOTrainer(DPOTrainer):
    """TRL's ``DPOTrainer`` for pairs in groups: min over the policy of max over alpha of sum_g alpha_g L_g.

        log alpha_g <- log alpha_g + group_lr L_g,     loss = (1/B) sum_i alpha[g_i] / q[g_i] l_i

    Each step moves alpha by the losses of the global batch and weights that batch with the new alpha; with gradient
    accumulation alpha moves once per optimizer step and lags by one, since the first micro-batch is weighted before
    the losses of the last are known.  ``trainer.group_weights`` holds alpha; checkpoints carry it.

    Args:
        model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics,
            callbacks, optimizers, quantization_config, peft_config: as ``DPOTrainer`` takes them, with ``args`` a
            :class:`GroupRobustDPOConfig` and a column ``args.group_column`` in every data set.  Where ``model`` is an
            object without adapters and there is no ``ref_model``, the reference is a frozen copy of it as it is now
            (TRL would load ``model.config._name_or_path`` again, which need not be the same weights, or anything).

    Raises:
        TypeError: ``args`` is a plain ``DPOConfig``.
        ValueError: settings or data, naming what is wrong: a data set without groups, a group of an evaluation set
            that the training set does not have, a group whose pairs TRL dropped as too long.
    """

    args: GroupRobustDPOConfig
    model: Any
    data_collator: Any

    _name = "Group Robust DPO"
    _tag_names = ["trl", "dpo", "group-robust-dpo"]  # noqa: RUF012 - TRL's way
    _paper = {  # noqa: RUF012
        "title": "Group Robust Preference Optimization in Reward-free RLHF",
        "id": "2405.20304",
        "citation": textwrap.dedent("""\
            @inproceedings{ramesh2024group,
                title        = {{Group Robust Preference Optimization in Reward-free RLHF}},
                author       = {Shyam Sundhar Ramesh and Yifan Hu and Iason Chaimalas and Viraj Mehta and Pier Giuseppe Sessa and Haitham Bou Ammar and Ilija Bogunovic},
                year         = 2024,
                booktitle    = {Advances in Neural Information Processing Systems 37},
            }"""),  # noqa: E501
    }

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: GroupRobustDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            args = GroupRobustDPOConfig(f"{name.split('/')[-1] or 'model'}-GR-DPO")
        if not isinstance(args, GroupRobustDPOConfig):
            raise TypeError(
                f"args must be a GroupRobustDPOConfig, which says how groups are weighted, got {args!r:.120}"
            )
        args.check_groups()
        self._loss = loss_settings(args)
        # There before TRL's part begins, which may score every pair with the reference at once.
        self._heads = Heads(args.fused_head, args.memory_budget, args.backend)
        if train_dataset is not None:
            require_column(train_dataset, args.group_column, "train_dataset")
        for name, dataset in _named(eval_dataset).items():
            require_column(dataset, args.group_column, name)
        copied = None
        if ref_model is None and peft_config is None and not isinstance(model, str):
            copied = frozen_copy(model, args)
        super().__init__(
            model=model,
            ref_model=ref_model if copied is None else copied,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if copied is not None and args.precompute_ref_log_probs:
            self.ref_model = None  # it has scored every pair, and would only take room
        sizes = training_sizes(train_dataset, self.train_dataset, args.group_column, args.group_sizes)
        self.group_weights = make_group_weights(args, sizes).to(self.accelerator.device)
        names = self.group_weights.names
        for name, dataset in _named(self.eval_dataset).items():
            require_known(dataset, args.group_column, names, name)
        self.data_collator = GroupCollator(self.data_collator, args.group_column, names)
        self._tallies = {"train": GroupTally(names), "eval": GroupTally(names)}
        self.add_callback(_StepAlpha(self.group_weights))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.args.group_column not in self._signature_columns:
            self._signature_columns.append(self.args.group_column)

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """The reference's log-probabilities of a batch, as ``DPOTrainer`` computes them, of a batch without groups."""
        groups = {GROUP_IDS, self.args.group_column}
        rest = {k: v for k, v in inputs.items() if k not in groups}
        return super().compute_ref_log_probs(self._heads.as_trl_calls_it(model), rest)

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        group_ids = self._group_ids(inputs)
        others = NOT_OF_THE_MODEL | {self.args.group_column}
        model_inputs = {k: v for k, v in inputs.items() if k not in others} | {"use_cache": False}
        completion_mask = inputs["completion_mask"]
        asked = model_inputs | ({"output_router_logits": True} if self.aux_loss_enabled else {})
        scores = self._heads.score(model, asked, inputs["input_ids"].masked_fill(completion_mask == 0, -100))
        policy_logps = scores.logps.to(group_ids.device)  # from the head's device, where a model is spread over several
        if self.precompute_ref_logps:
            chosen, rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        ref_logps = torch.cat([chosen, rejected]).to(policy_logps)
        with self.group_weights.accumulate() if _alpha_lags(self.args) else contextlib.nullcontext():
            out = preference_loss(
                policy_logps,
                ref_logps,
                group_ids,
                self.group_weights,
                beta=self.beta,
                loss_type=self._loss.loss_type,
                label_smoothing=self._loss.label_smoothing,
                lengths=completion_mask.sum(dim=1) if self._loss.length_normalize else None,
            )
        mode = "train" if self.model.training else "eval"
        # Evaluation reports what DPO reports, the mean over pairs; groups are logged beside it.
        loss = out.loss if mode == "train" else out.losses.mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * scores.aux_loss
        self._note(mode, inputs, out, policy_logps - ref_logps, group_ids, scores)
        if return_outputs:
            with torch.no_grad():
                return loss, model(**model_inputs)
        return loss

    def _group_ids(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        ids = inputs.get(GROUP_IDS)
        sequences = inputs["input_ids"].shape[0]
        if not isinstance(ids, torch.Tensor) or 2 * ids.shape[0] != sequences:
            came = "nothing" if ids is None else f"{getattr(ids, 'shape', ids)}"
            raise ValueError(
                f"a batch must say the group of each of its {sequences // 2} pairs in {GROUP_IDS!r}, got {came}: this "
                "trainer's data_collator does, and has been replaced, or the batch was split after it"
            )
        return ids

    def _note(
        self,
        mode: str,
        inputs: Mapping[str, Any],
        out: GroupLossOutput,
        log_ratios: torch.Tensor,
        group_ids: torch.Tensor,
        scores: Scores,
    ) -> None:
        """Keep what the next line of the log will hold; pairs of all ranks, none of them twice in an evaluation."""
        gather = self.accelerator.gather if mode == "train" else self.accelerator.gather_for_metrics
        rewards = (self.beta * log_ratios.detach()).chunk(2)
        logps = out.policy_logps.detach().chunk(2)
        columns = [*rewards, *logps, out.losses, out.margins, group_ids]
        pairs = gather(torch.stack([column.float() for column in columns], dim=1)).double().cpu()
        chosen, rejected, chosen_logps, rejected_logps, losses, margins, ids = pairs.unbind(dim=1)
        self._tallies[mode].add(ids.long(), losses, margins)
        metrics = {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/accuracies": (chosen > rejected).double().mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "logps/chosen": chosen_logps.mean(),
            "logps/rejected": rejected_logps.mean(),
        }
        if scores.tokens is not None:
            metrics |= token_metrics(scores.tokens, inputs["completion_mask"], self.accelerator.gather)
        if self.aux_loss_enabled:
            aux_loss: Any = scores.aux_loss
            metrics["aux_loss"] = self.accelerator.gather(aux_loss.detach()).mean()
        for name, value in metrics.items():
            self._metrics[mode][name].append(float(value))
        if mode == "train":
            tokens = self.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += tokens // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, while training with alpha and the groups' losses since the line before."""
        if self.model.training:
            names, most = self.group_weights.names, self.args.max_logged_groups
            tally = self._tallies["train"]
            logs.update(report_metrics(tally.report(), most))
            logs.update(alpha_metrics(names, self.group_weights.weights, most))
            logs["alpha_steps_skipped"] = int(self.group_weights.num_skipped)
            tally.clear()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate; besides TRL's metrics ``<prefix>_group_<name>/*`` and ``<prefix>_worst_group/*``.

        Raises:
            ValueError: a data set without groups, or with one that the training set does not have.
        """
        for name, dataset in _named(eval_dataset).items():
            require_known(dataset, self.args.group_column, self.group_weights.names, name)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The evaluation of one data set, metrics by group under its own prefix."""
        tally = self._tallies["eval"]
        tally.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        by_group = report_metrics(tally.report(), self.args.max_logged_groups)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in by_group.items()})
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and alpha beside it: what checkpoints are made of, too."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            save_group_weights(output_dir or self.args.output_dir, self.group_weights)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_group_weights(checkpoint, self.group_weights)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        load_group_weights(self.state.best_model_checkpoint, self.group_weights)


class _StepAlpha(TrainerCallback):
    """Moves alpha once per optimizer step, by all that its micro-batches observed, where no batch moves it itself."""

    def __init__(self, group_weights: GroupWeights) -> None:
        self.group_weights = group_weights

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.group_weights.discard()  # of a run that was broken off within a step

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if _alpha_lags(args):
            self.group_weights.step()


def _alpha_lags(args: Any) -> bool:
    """Whether micro-batches only observe: of the settings, so that a last window of one lags like all others."""
    return args.gradient_accumulation_steps > 1


def _named(datasets: Any) -> dict[str, Any]:
    """Evaluation sets under the names that errors use; none for None and for one chosen by its name."""
    if datasets is None or isinstance(datasets, str):
        return {}
    if isinstance(datasets, dict):
        return {f"eval_dataset[{name!r}]": dataset for name, dataset in datasets.items()}
    return {"eval_dataset": datasets}
