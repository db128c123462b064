"""Log-probabilities of replies: with this package's head on the model where it can be had, with TRL's otherwise."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import is_peft_model

from ... import attach_fused_head

_log = logging.getLogger(__name__)


class Scores(NamedTuple):
    """A policy's answer to a batch of S sequences."""

    logps: torch.Tensor
    """(S,) summed log-probabilities of the replies in nats, differentiable."""
    aux_loss: torch.Tensor | None
    """() of a mixture of experts, where it was asked for."""
    tokens: Any
    """What TRL's head says of each token; None from the fused one, which never sees a whole row of logits."""


class Heads:
    """Which models carry the fused head.  Each gets it at its first call, when whoever shards has wrapped it.

    Args:
        wanted: False for TRL's head always.
        memory_budget, backend: as in :func:`attach_fused_head`.
    """

    def __init__(self, wanted: bool, memory_budget: float | str | None, backend: str) -> None:
        self.wanted = wanted
        self.options: dict[str, Any] = {"memory_budget": memory_budget, "backend": backend}
        self._fused: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()
        self._warned = False

    def fused(self, model: Any) -> bool:
        """Whether this model answers ``fused_labels``; the first question of a model attaches the head to it."""
        if not self.wanted:
            return False
        if model not in self._fused:
            reason = self._attach(model)
            self._fused[model] = reason is None
            if reason and not self._warned:
                self._warned = True
                _log.warning("the LM head is not fused: %s; log-probabilities come from TRL's head instead", reason)
        return self._fused[model]

    def _attach(self, model: Any) -> str | None:
        """None, or why not."""
        inner = getattr(model, "module", model)
        if is_peft_model(inner) and inner.active_peft_config.is_prompt_learning:
            return "adapters that learn a prompt put positions in front of the text"
        try:
            attach_fused_head(model, **self.options)
        except ValueError as error:
            return str(error)
        return None

    def score(self, model: Any, inputs: dict[str, Any], labels: torch.Tensor) -> Scores:
        """A model's log-probabilities of the labelled tokens, summed by sequence.

        Args:
            model: as the trainer calls it.
            inputs: keyword arguments of its forward.
            labels: (S, T) token ids, -100 outside replies.
        """
        if self.fused(model):
            out = model(**inputs, fused_labels=labels)
            return Scores(out.sequence_logps, getattr(out.model_output, "aux_loss", None), None)
        out = model(**inputs, labels=labels, fused_lm_head=True)
        # Adapters that learn a prompt put positions in front.
        return Scores(out.log_probs[:, 1 - labels.shape[1] :].sum(dim=1), out.aux_loss, out)

    def as_trl_calls_it(self, model: Any) -> Any:
        """A model for TRL's own functions, which ask for ``log_probs`` and sum them by sequence."""
        return _SummedByNow(model) if self.fused(model) else model


class _SummedByNow:
    """Answers TRL's question from the fused head: one column, the sums, which TRL's sum leaves as they are."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *, labels: torch.Tensor, fused_lm_head: bool, **inputs: Any) -> SimpleNamespace:
        out = self.model(**inputs, fused_labels=labels)
        return SimpleNamespace(log_probs=out.sequence_logps[:, None])
