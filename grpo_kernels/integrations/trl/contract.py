"""What is relied on in TRL and transformers beyond their documented interfaces, by name and parameters.

Importing the integration compares this list with what is installed, so that a release which changed one of these fails
here, by name, and not as a number that is quietly different.
"""

from __future__ import annotations

import inspect
from typing import Any

METHODS: dict[str, tuple[str, ...]] = {
    # The whole loss of a batch, training and evaluation; there is no hook for the loss of a pair alone.
    "_compute_loss": ("self", "model", "inputs", "return_outputs"),
    # Passes what is left of the batch to the model, so the group has to be gone by then.
    "compute_ref_log_probs": ("self", "model", "inputs"),
    # Says which columns survive ``remove_unused_columns``.
    "_set_signature_columns_if_needed": ("self",),
    "log": ("self", "logs", "start_time"),
    "evaluate": ("self", "eval_dataset", "ignore_keys", "metric_key_prefix"),
    "evaluation_loop": (
        "self", "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"
    ),
    "save_model": ("self", "output_dir", "_internal_call"),
    # Called for every resumed run, sharded or not, after the parameters are there.
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
    "_load_best_model": ("self",),
}  # fmt: skip
"""Methods of ``DPOTrainer`` that are overridden, with the parameters they are called with."""

INIT = (
    "self", "model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class",
    "compute_metrics", "callbacks", "optimizers", "quantization_config", "peft_config",
)  # fmt: skip
"""Parameters of ``DPOTrainer.__init__``, all of which are passed on."""

ATTRIBUTES = (
    "self._metrics",  # {"train": {name: [numbers]}, "eval": ...}, averaged and emptied by log()
    "self._total_train_tokens",
    "self._tp_size",
    "self._signature_columns",
    "self.precompute_ref_logps",
    "self.aux_loss_enabled",
    "self.router_aux_loss_coef",
    "self.ref_model",
    "self.beta",
    "fused_lm_head=True",  # TRL's own head: model(..., labels=labels, fused_lm_head=True).log_probs
    "outputs.log_probs",
    "outputs.entropy",
    "outputs.mean_logits",
    "outputs.is_top1",
    "outputs.aux_loss",
)
"""What this trainer uses as ``DPOTrainer`` does: each is written like this somewhere in its source."""

SETTINGS = (
    "beta", "loss_type", "loss_weights", "label_smoothing", "ld_alpha", "f_divergence_type", "use_weighting",
    "precompute_ref_log_probs", "sync_ref_model", "max_length",
)  # fmt: skip
"""Fields of ``DPOConfig`` that are read or refused."""


def broken_promises() -> list[str]:
    """What is relied on and not as it was, one sentence each; empty where all is well."""
    from trl import DPOConfig, DPOTrainer

    broken = []
    for name, expected in METHODS.items():
        found = _parameters(getattr(DPOTrainer, name, None))
        if found != expected:
            broken.append(f"DPOTrainer.{name} should have the parameters {expected}, found {found}")
    found = _parameters(DPOTrainer.__init__)
    if found != INIT:
        broken.append(f"DPOTrainer.__init__ should have the parameters {INIT}, found {found}")
    source = inspect.getsource(inspect.getmodule(DPOTrainer) or DPOTrainer)
    broken += [f"DPOTrainer should use {name}, and does not" for name in ATTRIBUTES if name not in source]
    if getattr(DPOTrainer, "loss_is_scaled_for_ga", None) is not False:
        broken.append("DPOTrainer.loss_is_scaled_for_ga should be False: Trainer divides the loss by the micro-batches")
    fields = DPOConfig.__dataclass_fields__
    broken += [f"DPOConfig should have the field {name}" for name in SETTINGS if name not in fields]
    return broken


def check_contract() -> None:
    """Refuse a TRL that is not the one this was written for.

    Raises:
        ImportError: naming everything that differs.
    """
    broken = broken_promises()
    if broken:
        import transformers
        import trl

        raise ImportError(
            f"grpo_kernels does not fit trl {trl.__version__} with transformers {transformers.__version__} "
            "(pyproject.toml names the versions it fits):\n  " + "\n  ".join(broken)
        )


def _parameters(function: Any) -> tuple[str, ...] | None:
    return None if function is None else tuple(inspect.signature(function).parameters)
