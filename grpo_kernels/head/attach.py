"""The fused head inside a model's own forward: hooks on the model and on its LM head, and no logits in between.

    out = model(input_ids=..., fused_labels=labels)      p_t = z[t, y_t] - logsumexp_v z[t, v],   log pi = sum_t p_t

Whatever spreads a model over devices (DDP, FSDP2, ZeRO-3) works by hooks on the calls of modules: they gather a weight
before and let go of it after.  So the model is called, and the model calls its head; only that the head's call yields
log-probabilities.  Around the head's own forward, which is left no rows to work on, stand three hooks, and their order
among everybody's makes it right:

    last before    takes the hidden states as whoever shards has cast and marked them
    first after    weight and bias are still there: hidden → token log-probabilities, the result of the head's call
    last after     takes that result, with the marks of whoever shards on it, and gives the model empty logits
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..arguments import describe
from ..distributed import reshard
from ..types import IGNORE_INDEX
from .functional import linear_token_logps

_thread = threading.local()
"""``call``: the one under way in this thread.  Not on the hooks, which copies of a model and its threads share."""

_TRIAL_RANGE = 50.0
"""Logits from -50 to 50 show a cap or a scale however small the weights still are."""

_TRIAL_TOLERANCE = 0.02
"""Half-precision models round their logits; anything a model does to them on purpose is larger than this."""


class FusedHeadOutput(NamedTuple):
    """What a model with a fused head returns for ``fused_labels``: S sequences of T tokens."""

    sequence_logps: torch.Tensor
    """(S,) summed log-probabilities of the labelled tokens in nats, differentiable."""
    token_logps: torch.Tensor
    """(S, T) log p(labels[t]) at t in nats, 0 where the label is ignored and at t = 0, differentiable."""
    model_output: Any
    """What the model's own forward returned, for whatever else is in it; its logits are empty."""


class FusedHead:
    """The fused head on a model; as a context manager it is taken off at the end.

    :func:`attach_fused_head` makes it.  It lives in the model's hooks, so a copy or a pickle of the model has its own.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        """What :func:`linear_token_logps` is called with."""
        self._handles: list[RemovableHandle] = []
        self._must_be_last: list[RemovableHandle] = []
        self._trial = False
        self._differences: list[float] = []

    def remove(self) -> None:
        """Take every hook off, after which the model is what it was.  Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._must_be_last = [], []

    def __enter__(self) -> FusedHead:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _attach(self, model: nn.Module, heads: list[nn.Module]) -> None:
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            # First, since whoever shards marks what leaves the model; and after an exception too.
            model.register_forward_hook(self._end, prepend=True, always_call=True),
        ]
        for head in heads:
            self._must_be_last += [
                head.register_forward_pre_hook(self._take_hidden),
                head.register_forward_hook(self._take_logps),
            ]
            self._handles.append(head.register_forward_hook(self._score, prepend=True))
        self._handles += self._must_be_last

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before the model's forward, which must not see the labels."""
        if "fused_labels" not in kwargs:
            if _current(self) is not None:  # left by an interrupt, after which no hook runs
                _thread.call = None
            return None
        labels = kwargs["fused_labels"]
        if not isinstance(labels, torch.Tensor) or labels.dim() != 2:
            raise ValueError(f"fused_labels must be a tensor of shape (sequences, tokens), got {describe(labels)}")
        if kwargs.get("labels") is not None:
            raise ValueError("labels must not be given with fused_labels: the model's own loss would need logits")
        if not torch.compiler.is_compiling():
            for handle in self._must_be_last:
                _move_to_end(handle)
        _thread.call = _Call(self, labels, getattr(_thread, "call", None))
        rest = {name: value for name, value in kwargs.items() if name != "fused_labels"}
        return args, {"use_cache": False} | rest

    def _take_hidden(self, head: nn.Module, args: Any) -> Any:
        """Last before the head's forward."""
        call = _current(self)
        if call is None:
            return None
        hidden, *others = args
        if call.hidden is not None or call.logps is not None:
            raise RuntimeError(
                "the LM head ran twice in one forward of the model, and fused_labels are for one of them"
            )
        if hidden.shape[:-1] != call.labels.shape:
            raise ValueError(
                f"fused_labels must have shape {tuple(hidden.shape[:-1])}, a label for every hidden state that reaches "
                f"the head, got {describe(call.labels)} (no logits_to_keep, please: rows without a label cost nothing)"
            )
        call.hidden = hidden
        return (hidden[:1, -1:] if self._trial else hidden[:, :0], *others)

    def _score(self, head: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """First after the head's forward."""
        call = _current(self)
        if call is None:
            return None
        weight, bias = head.weight, head.bias
        if hasattr(weight, "to_local"):
            raise ValueError(
                "the LM head's weight is spread over ranks (a DTensor) during its own forward; linear_token_logps "
                "takes hidden states and such a weight (examples/tensor_parallel.py)"
            )
        call.logits = output.detach()
        if self._trial:
            self._differences.append(_distance(output, nn.functional.linear(args[0], weight, bias)))
            ramp = torch.linspace(-_TRIAL_RANGE, _TRIAL_RANGE, output.shape[-1], device=output.device)
            call.logits = ramp.to(output.dtype).expand_as(output)
        logps = linear_token_logps(
            call.hidden.to(weight.device), weight, call.labels.to(weight.device), bias=bias, **self.options
        )
        return logps.clone()  # what FSDP2 marks had better not be a view

    def _take_logps(self, head: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """Last after the head's forward."""
        call = _current(self)
        if call is None:
            return None
        call.logps = output
        return call.logits

    def _end(self, model: nn.Module, args: Any, output: Any) -> Any:
        """First after the model's forward; ``output`` is None where that raised."""
        call = _current(self)
        if call is None:
            return None
        _thread.call = call.outer
        if output is None:
            return None
        if call.logps is None:
            raise RuntimeError(
                "the LM head did not run in the model's forward, or it is another one than was there when the fused "
                "head was attached (an adapter was added since, say): remove() it and attach it again"
            )
        if self._trial:
            scale, cap = self.options["logit_scale"], self.options["softcap"]
            known = scale * call.logits.float()
            found = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
            self._differences.append(_distance(found, cap * torch.tanh(known / cap) if cap else known))
        logps = call.logps
        return FusedHeadOutput(logps.sum(dim=1, dtype=torch.float64).to(logps.dtype), logps, output)


class _Call:
    """One call of a model with labels, from its first hook to its last."""

    def __init__(self, owner: FusedHead, labels: torch.Tensor, outer: _Call | None) -> None:
        self.owner, self.labels, self.outer = owner, labels, outer
        self.hidden: Any = None
        self.logits: Any = None
        self.logps: Any = None


def attach_fused_head(
    model: nn.Module,
    *,
    ignore_index: int = IGNORE_INDEX,
    memory_budget: int | float | str = "auto",
    backend: str = "auto",
    example: Mapping[str, Any] | None = None,
) -> FusedHead:
    """Teach a causal language model to answer ``fused_labels`` with log-probabilities, without ever forming logits.

        out = model(input_ids=ids, attention_mask=mask, fused_labels=labels)
        loss = preference_loss(out.sequence_logps, ref_logps, group_ids, group_weights).loss

    ``fused_labels`` are Hugging Face's labels: (S, T) token ids, ``ignore_index`` at prompt and padding, and position
    t-1 predicts label t.  The answer is a :class:`FusedHeadOutput`.  A call without them is what it was.
    All goes through the calls of model and head, so DDP, FSDP2 (``fully_shard``, with the head in the root's group or
    sharded by itself) and ZeRO-3 gather the weight as ever; attach before or after wrapping, and on every rank.
    A trial call of the model on two tokens, in eval mode and without gradients, holds what is known of the model
    (bias, softcap, logit scale) against what it does.

    Args:
        model: causal language model with ``get_output_embeddings()`` (Hugging Face), adapters of peft around it or not;
            what DDP or DeepSpeed wrap around that is looked through.
        ignore_index: label of positions that are not scored.
        memory_budget, backend: as in :func:`fused_linear_grpo_loss`.
        example: keyword arguments of the trial call, with ``input_ids`` (1, T) among them, for a model that needs more
            than those; None for two tokens.

    Returns:
        FusedHead, to ``remove()`` or to use in ``with``.  That of an earlier call with the same options, if one stands.

    Raises:
        TypeError: model is not a module, or an option is of the wrong type.
        ValueError: the head cannot be fused, with the reason; or one is attached with other options.
        UnavailableBackendError: the backend named cannot run here, or has no tile operations for the head.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {describe(model)}")
    _check_example(example)
    model = _unwrapped(model)
    inner = _without_adapters(model)
    heads = _linear_heads(inner)
    options = {
        "ignore_index": ignore_index,
        "memory_budget": memory_budget,
        "backend": backend,
        **_logit_options(inner),
    }
    for hook in model._forward_pre_hooks.values():
        attached = getattr(hook, "__self__", None)
        if isinstance(attached, FusedHead):
            if attached.options != options:
                raise ValueError(f"a fused head is attached to this model with {attached.options}, got {options}")
            return attached
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model must have its parameters, got some on the meta device: attach when they are loaded")
    _check_options(options, heads[0])
    fused = FusedHead(options)
    fused._attach(model, heads)
    try:
        _try_out(fused, model, example)
    except BaseException:
        fused.remove()
        raise
    return fused


def _check_example(example: Any) -> None:
    if example is None:
        return
    if not isinstance(example, Mapping):
        raise TypeError(f"example must be a mapping of keyword arguments or None, got {describe(example)}")
    ids = example.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[0] != 1:
        raise ValueError(f"example must hold input_ids of shape (1, T), got {describe(ids)}")


def _check_options(options: dict[str, Any], head: Any) -> None:
    """Raise what one number would make the head raise, before the model is touched."""
    one = torch.zeros(1, 1, 1, dtype=head.weight.dtype, device=head.weight.device)
    linear_token_logps(one, one[0], one[0].long(), **options)


def _try_out(fused: FusedHead, model: nn.Module, example: Mapping[str, Any] | None) -> None:
    """Raise ValueError unless the model does what the options say between its head's input and its logits.

    The head's own forward is held against weight and bias on one row, and what the model makes of logits against
    softcap and scale on a ramp that is given to it as the head's answer.
    """
    inputs = example
    if inputs is None:
        device = next(model.parameters()).device
        inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.int64, device=device)}
    labels = torch.full_like(inputs["input_ids"], fused.options["ignore_index"])
    fused._trial, fused._differences = True, []
    try:
        with torch.no_grad(), _in_eval_mode(model), torch.compiler.set_stance("force_eager"):
            model(**inputs, fused_labels=labels)
    except Exception as error:
        if example is not None:
            raise
        raise ValueError(f"a trial call of the model with two input_ids alone failed: {error}") from error
    finally:
        fused._trial = False
        reshard(model)
    in_head, after = fused._differences
    if not (in_head <= _TRIAL_TOLERANCE and after <= _TRIAL_TOLERANCE):
        raise ValueError(
            f"{type(model).__name__} does something between hidden states and logits that is not known here"
        )


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _unwrapped(model: Any) -> Any:
    """What DDP, DeepSpeed or ``torch.compile`` have put around a model, taken off; the user goes on calling theirs."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif not hasattr(model, "get_output_embeddings") and isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def _without_adapters(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # peft


def _linear_heads(inner: Any) -> list[nn.Module]:
    """The LM head if it is a linear layer and nothing more, and with it every trained copy that peft keeps of it."""
    name = type(inner).__name__
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise ValueError(f"{name} does not say which part of it is the LM head (get_output_embeddings)")
    if hasattr(head, "lora_A"):
        raise ValueError(
            "the LM head carries a LoRA adapter and is not a plain linear layer: its weight would have to be put "
            "together, (V, H), at every step; take the head out of target_modules, or train it whole with "
            "modules_to_save"
        )
    heads: list[Any] = [head]
    copies: Any = getattr(head, "modules_to_save", None)
    if copies is not None:
        heads = [head.original_module, *copies.values()]
    for part in heads:
        # By its forward: FSDP2 makes a class of its own of every class it shards.
        if not (isinstance(part, nn.Linear) and type(part).forward is nn.Linear.forward):
            raise ValueError(f"the LM head is a {type(part).__name__}, not a plain linear layer")
    return heads


def _logit_options(inner: Any) -> dict[str, Any]:
    """What models are known to do with their logits, from the names they give it in their configuration."""
    config: Any = getattr(inner, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    divisor = getattr(config, "logits_scaling", None)  # Granite divides
    return {
        "softcap": getattr(config, "final_logit_softcapping", None),
        "logit_scale": float(scale) if scale else 1 / float(divisor) if divisor else 1.0,
    }


def _current(owner: FusedHead) -> _Call | None:
    call: _Call | None = getattr(_thread, "call", None)
    return call if call is not None and call.owner is owner else None


def _distance(found: Any, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected, NaN where there is a NaN."""
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return float("inf")
    largest = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    return float((found.float() - expected.float()).abs().max()) / largest


def _move_to_end(handle: RemovableHandle) -> None:
    hooks = handle.hooks_dict_ref()
    if hooks and next(reversed(hooks)) != handle.id:
        hooks.move_to_end(handle.id)
