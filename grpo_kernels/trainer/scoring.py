"""How the log-probabilities of replies come out of a model: the one place that calls it.

By the fused head where the model allows it: the backbone gives hidden states, the LM head's weight goes to
``fused_linear_grpo_loss``, and logits never exist.  Else, or with ``loss.fused_head=false``, through its logits.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from .. import (
    GroupLossOutput,
    GroupWeights,
    fused_grpo_loss,
    fused_linear_grpo_loss,
    linear_sequence_logps,
    sequence_logps,
)
from .config import LossConfig

_log = logging.getLogger(__name__)
_NO_HEAD = "_grpo_kernels_no_fused_head"


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 where asked for."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()


def group_loss(
    model: torch.nn.Module,
    batch: Mapping[str, torch.Tensor],
    ref_logps: torch.Tensor | None,
    group_weights: GroupWeights | torch.Tensor,
    config: LossConfig,
    *,
    bf16: bool = False,
) -> GroupLossOutput:
    """The loss of one batch of B pairs.

    Args:
        model: causal language model.
        batch: from :class:`~.data.PreferenceCollator`, on the model's device.
        ref_logps: (2B,) float32, the reference's, chosen first; None for zeros.
        group_weights: alpha, which moves in here if it does anywhere; or (G,) weights.
        config: the loss, the backend, and whether the head is fused.
        bf16: autocast to bfloat16.
    """
    settings: dict[str, Any] = {
        "beta": config.beta,
        "loss_type": config.type,
        "label_smoothing": config.label_smoothing,
        "length_normalize": config.length_normalize,
        "backend": config.backend,
    }
    pairs = (batch["labels"], ref_logps, batch["group_ids"], group_weights)
    with autocast(batch["input_ids"].device, bf16):
        parts = _hidden_and_head(model, batch, config)
        if parts is not None:
            return fused_linear_grpo_loss(parts.hidden, parts.weight, *pairs, **(parts.options | settings))
        logits = _logits(model, batch)
    # Where gradients are on the logits are this function's own, and backward may have their memory.
    return fused_grpo_loss(logits, *pairs, overwrite_logits=logits.requires_grad, **settings)


def reply_logps(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], config: LossConfig, *, bf16: bool = False
) -> torch.Tensor:
    """Summed log-probabilities of the labelled tokens of every sequence, with gradients where they are on.

    Args:
        model, batch, config, bf16: as in :func:`group_loss`; of the loss only backend and head matter.

    Returns:
        (sequences,) float32, in nats.
    """
    with autocast(batch["input_ids"].device, bf16):
        parts = _hidden_and_head(model, batch, config)
        if parts is not None:
            return linear_sequence_logps(
                parts.hidden, parts.weight, batch["labels"], backend=config.backend, **parts.options
            )
        logits = _logits(model, batch)
    return sequence_logps(logits, batch["labels"], overwrite_logits=logits.requires_grad, backend=config.backend)


class _Parts(NamedTuple):
    """A forward pass up to the head, and the head."""

    hidden: torch.Tensor
    weight: torch.Tensor
    options: dict[str, Any]


def _logits(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


def _hidden_and_head(model: torch.nn.Module, batch: Mapping[str, torch.Tensor], config: LossConfig) -> _Parts | None:
    if not config.fused_head:
        return None
    reason = getattr(model, _NO_HEAD, None)
    if reason is None:
        reason = fused_head_unavailable(model, batch)
        setattr(model, _NO_HEAD, reason or "")
        if reason:
            _log.warning("the head is not fused: %s; the loss goes through the logits", reason)
    return None if reason else _forward(model, batch)


def fused_head_unavailable(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> str | None:
    """None if backbone and LM head, put together by hand, give what the model gives; else one sentence that says why.

    Models do more between hidden states and logits than any list of names would cover, so this looks: the last logits
    of the first sequence both ways.
    """
    inner = _without_adapters(model)
    if not hasattr(inner, "get_decoder") or not hasattr(inner, "get_output_embeddings"):
        return f"{type(inner).__name__} does not say which part of it is the backbone and which the head"
    head = _plain_head(inner)
    if head is None:
        return f"the LM head is a {type(inner.get_output_embeddings()).__name__}, not a plain linear layer"
    if inner.get_decoder() is None or inner.get_decoder() is inner:
        return f"{type(inner).__name__} has no backbone of its own"
    one = {name: batch[name][:1] for name in ("input_ids", "attention_mask")}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = _forward(model, one)
            logits = _logits(model, one)[:, -1].float()
            off = float((_last_logits(parts) - logits).abs().max()) / (1 + float(logits.abs().max()))
    finally:
        model.train(training)
    # Half-precision models round their logits; anything a model does to them on purpose is larger than this.
    if not off <= 0.02:
        return f"{type(inner).__name__} does something between hidden states and logits that is not known here"
    return None


def _last_logits(parts: _Parts) -> torch.Tensor:
    bias, scale, cap = (parts.options[name] for name in ("bias", "logit_scale", "softcap"))
    logits = torch.nn.functional.linear(parts.hidden[:, -1].float(), parts.weight.float())
    logits = scale * (logits if bias is None else logits + bias.float())
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _forward(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> _Parts:
    inner = _without_adapters(model)
    head = _plain_head(inner)
    hidden = inner.get_decoder()(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    config = inner.config
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    divisor = getattr(config, "logits_scaling", None)  # Granite divides
    options = {
        "bias": head.bias,
        "softcap": getattr(config, "final_logit_softcapping", None),
        "logit_scale": float(scale) if scale else 1 / float(divisor) if divisor else 1.0,
    }
    return _Parts(hidden, head.weight, options)


def _without_adapters(model: Any) -> Any:
    # The adapters are inside the layers; what peft puts around the model only forwards to it.
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _plain_head(inner: Any) -> Any:
    """The LM head if it is a linear layer and nothing more; a trained copy that peft keeps of it counts as it."""
    head = inner.get_output_embeddings()
    if hasattr(head, "modules_to_save") and hasattr(head, "active_adapter"):
        copies = head.modules_to_save
        trained = head.active_adapter in copies
        head = copies[head.active_adapter] if trained else head.original_module
    return head if type(head) is torch.nn.Linear else None
