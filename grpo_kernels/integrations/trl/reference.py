"""The reference of a model that is given as an object: a frozen copy of it, as training starts."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers.integrations import is_deepspeed_zero3_enabled


def frozen_copy(model: torch.nn.Module, args: Any) -> Any:
    """A copy to be the reference, or None where TRL has a reference already or must make it itself.

    TRL disables the adapters of a model that has some, and scores all pairs before the first step where reference
    log-probabilities are precomputed.  Otherwise it loads ``model.config._name_or_path`` again.

    Args:
        model: the policy as it was passed to the trainer.
        args: the trainer's settings.

    Raises:
        ValueError: TRL would have to load the reference, and there is nothing to load it from.
    """
    if is_peft_model(model) or (args.precompute_ref_log_probs and not _shards(args)):
        return None
    if reason := _uncopyable(model):
        if not getattr(model.config, "_name_or_path", ""):
            raise ValueError(
                f"ref_model must be given: the model {reason}, so it cannot be copied, and its configuration does not "
                "say where to load it again"
            )
        return None
    twin = copy.deepcopy(model)
    # A trainer that had this model before may have left a forward of its own, which would run the original.
    for name in ("forward", "_original_forward"):
        twin.__dict__.pop(name, None)
    return twin.requires_grad_(False).eval()


def _shards(args: Any) -> bool:
    # By the settings, or by whoever launched this.
    launched = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    return launched or bool(args.fsdp) or getattr(args, "fsdp_plugin_args", None) is not None


def _uncopyable(model: Any) -> str | None:
    if is_deepspeed_zero3_enabled():
        return "is partitioned by DeepSpeed ZeRO-3"
    if getattr(model, "is_quantized", False):
        return "is quantized"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "is spread over devices"
    return None
