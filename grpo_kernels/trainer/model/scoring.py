"""How the log-probabilities of replies come out of a model: the one place that calls it.

By the fused head where the model allows it (``attach_fused_head``): logits never exist.  Else, or with
``loss.fused_head=false``, through its logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ... import GroupLossOutput, GroupWeights, attach_fused_head, fused_grpo_loss, preference_loss, sequence_logps
from ...types import IGNORE_INDEX
from ..config import LossConfig
from .distributed import ALONE, Ranks, reshard

_log = logging.getLogger(__name__)
_INPUTS = ("input_ids", "attention_mask")
_NO_HEAD = "_grpo_kernels_no_fused_head"
"""On a model whose head cannot be fused: why, so that it is tried and said once."""


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
        "backend": config.backend,
    }
    pairs, labels = (ref_logps, batch["group_ids"], group_weights), batch["labels"]
    with autocast(batch["input_ids"].device, bf16):
        if _head_is_fused(model, batch, config):
            policy_logps = _forward(model, batch, fused_labels=labels).sequence_logps
            lengths = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1) if config.length_normalize else None
            return preference_loss(policy_logps, *pairs, lengths=lengths, **settings)
        logits = _forward(model, batch).logits
    # Where gradients are on the logits are this function's own, and backward may have their memory.
    return fused_grpo_loss(
        logits, labels, *pairs, length_normalize=config.length_normalize, overwrite_logits=logits.requires_grad,
        **settings,
    )  # fmt: skip


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
        if _head_is_fused(model, batch, config):
            return _forward(model, batch, fused_labels=batch["labels"]).sequence_logps
        logits = _forward(model, batch).logits
    return sequence_logps(logits, batch["labels"], overwrite_logits=logits.requires_grad, backend=config.backend)


def pair_logps(
    model: torch.nn.Module,
    dataset: Any,
    collate: Callable[[list[Any]], Mapping[str, torch.Tensor]],
    *,
    loss: LossConfig,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    ranks: Ranks = ALONE,
) -> torch.Tensor:
    """Summed log-probabilities of every reply of a data set, without gradients.

    Args:
        model: causal language model, on ``device``.
        dataset: a :class:`~.data.PairDataset` of N pairs.
        collate: pairs → batch, a :class:`~.data.PreferenceCollator`.
        loss: of it only the backend, and whether the head is fused.
        batch_size: pairs in one forward pass.
        device: where the batch goes.
        bf16: autocast the forward pass.
        ranks: that share the work, batch by batch; all must call.

    Returns:
        (N, 2) float32 on the CPU, chosen and rejected, in nats.
    """
    device = torch.device(device)
    logps = torch.zeros(len(dataset.pairs), 2)
    with frozen(model):
        for indices, ours in ranks.deal(list(batches_by_length(dataset, batch_size))):
            batch = collate([dataset.pairs[i] for i in indices])
            sums = reply_logps(model, {name: tensor.to(device) for name, tensor in batch.items()}, loss, bf16=bf16)
            if ours:
                logps[indices] = sums.view(2, -1).t().float().cpu()
    return ranks.sum(logps)  # zeros where another rank was


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """No gradients, no dropout, and afterwards the mode that was: nothing inside draws a random number."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        reshard(model)


def batches_by_length(dataset: Any, batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of pairs of similar length, longest first: least padding, and memory shows at once."""

    def length(i: int) -> int:
        pair = dataset.pairs[i]
        return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))

    order = sorted(range(len(dataset.pairs)), key=lambda i: (-length(i), i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def fused_head_unavailable(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], backend: str = "auto"
) -> str | None:
    """Attach the fused head and return None; else one sentence that says why it cannot be."""
    try:
        attach_fused_head(model, backend=backend, example={name: batch[name][:1] for name in _INPUTS})
    except ValueError as error:
        return str(error)
    return None


def _head_is_fused(model: torch.nn.Module, batch: Mapping[str, torch.Tensor], config: LossConfig) -> bool:
    if not config.fused_head or getattr(model, _NO_HEAD, None):
        return False
    reason = fused_head_unavailable(model, batch, config.backend)
    if reason:
        setattr(model, _NO_HEAD, reason)
        _log.warning("the head is not fused: %s; the loss goes through the logits", reason)
    return not reason


def _forward(model: torch.nn.Module, batch: Mapping[str, torch.Tensor], **more: torch.Tensor) -> Any:
    return model(**{name: batch[name] for name in _INPUTS}, use_cache=False, **more)
