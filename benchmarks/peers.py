"""How everyone else gets log-probabilities: each as its users call it, imported when it is asked for.

``of_logits`` and ``of_hidden`` give name → function, or why it is absent here.  Functions of logits take (z, labels),
functions of hidden states (h, W, labels), flat; both give the log-probability of each label, 0 where it is ignored.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch.nn import functional

from benchmarks.shapes import IGNORE_INDEX

LogitsFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
HiddenFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

PRELOAD = ("trl.trainer.utils",)
"""What takes seconds to import."""


def missing(package: str, device: torch.device, *, gpu_only: bool = False) -> str | None:
    """Why a package cannot be measured here, or None."""
    if gpu_only and device.type != "cuda":
        return "it needs a GPU"
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def gathered(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    token = log_probs.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    return token.masked_fill(labels == IGNORE_INDEX, 0)


# ---- from logits


def eager(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What people write."""
    return gathered(logits.log_softmax(-1), labels)


def eager_float32(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What DPO's and the method's authors write: all of it in float32."""
    return gathered(logits.float().log_softmax(-1), labels)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -functional.cross_entropy(logits, labels, reduction="none")


def trl_selective_log_softmax(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from trl.trainer.utils import selective_log_softmax

    token = selective_log_softmax(logits, labels.clamp(min=0))
    return token.masked_fill(labels == IGNORE_INDEX, 0)


def liger_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Writes its gradient over the logits in forward."""
    from liger_kernel.transformers.functional import liger_cross_entropy as function

    return -function(logits, labels, reduction="none")


def quack_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from quack.cross_entropy import cross_entropy as function

    return -function(logits, labels, reduction="none")


def of_logits(device: torch.device, dtype: torch.dtype) -> dict[str, LogitsFunction | str]:
    return {
        "eager": eager,
        **({} if dtype == torch.float32 else {"eager, float32": eager_float32}),
        "torch.compile": torch.compile(eager),
        "F.cross_entropy": cross_entropy,
        "TRL selective_log_softmax": missing("trl", device) or trl_selective_log_softmax,
        "Liger cross_entropy": missing("liger_kernel", device, gpu_only=True) or liger_cross_entropy,
        "quack cross_entropy": missing("quack", device, gpu_only=True) or quack_cross_entropy,
    }


# ---- from hidden states


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def of_hidden(device: torch.device, softcap: float | None) -> dict[str, HiddenFunction | str]:
    def eager_head(h: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return gathered(capped(h @ w.t(), softcap).float().log_softmax(-1), labels)

    def linear_cross_entropy(h: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -functional.linear_cross_entropy(h, w, labels, reduction="none")

    def linear_cross_entropy_chunked(h: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        return -functional.linear_cross_entropy(h, w, labels, reduction="none", options=options)

    def trl_fused_head(h: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """As ``add_fused_lm_head`` calls it: on a GPU for the labelled rows, elsewhere for all."""
        from trl.trainer import utils

        mask, compact = labels != IGNORE_INDEX, h.device.type == "cuda"
        token = utils._ChunkedLogProbFunction.apply(
            h[mask] if compact else h, w, None, labels[mask] if compact else labels.clamp(min=0), 1.0,
            utils._CHUNKED_LOGPROB_CHUNK_SIZE, softcap, 1.0, ("log_probs",),
        )[0]  # fmt: skip
        return token.new_zeros(mask.shape).masked_scatter(mask, token) if compact else token.masked_fill(~mask, 0)

    def cut_cross_entropy(impl: str, **settings) -> HiddenFunction:
        def function(h: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            from cut_cross_entropy import linear_cross_entropy as function

            return -function(h, w, labels, softcap=softcap, reduction="none", impl=impl, **settings)

        return function

    def quack_after_gemm(h: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return quack_cross_entropy(capped(h @ w.t(), softcap), labels)

    no_cap = "it has no softcap" if softcap is not None else None
    old = None if hasattr(functional, "linear_cross_entropy") else "this PyTorch does not have it"
    old_chunked = None if hasattr(torch.nn, "LinearCrossEntropyOptions") else "this PyTorch does not have it"
    if device.type == "cpu":
        # Seen with PyTorch 2.13 for 256 rows, H 512, V 128256: 79 s, where eager takes 1.1.
        old_chunked = old_chunked or "with a loss a row it takes minutes at these shapes on a CPU"
    no_cce = missing("cut_cross_entropy", device)
    no_cce_kernel = missing("cut_cross_entropy", device, gpu_only=True)
    return {
        "eager": eager_head,
        "torch.compile": torch.compile(eager_head),
        "PyTorch linear_cross_entropy": no_cap or old or linear_cross_entropy,
        "PyTorch linear_cross_entropy, chunked": no_cap or old_chunked or linear_cross_entropy_chunked,
        "TRL fused head": missing("trl", device) or trl_fused_head,
        "cut-cross-entropy torch_compile": no_cce or cut_cross_entropy("torch_compile"),
        "cut-cross-entropy": no_cce_kernel or cut_cross_entropy("cce"),
        "cut-cross-entropy, nothing filtered": no_cce_kernel or cut_cross_entropy("cce", filter_eps=None),
        "GEMM and quack cross_entropy": missing("quack", device, gpu_only=True) or quack_after_gemm,
    }


class LigerDPO:
    """Liger's DPO loss, which takes hidden states to the loss at once; built at the first call."""

    def __init__(self, beta: float, compiled: bool = True) -> None:
        self.beta, self.compiled = beta, compiled
        self.module = None

    def __call__(self, h: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(2B, T, H), (V, H), (2B, T) → loss and (2B,) summed log-probabilities."""
        if self.module is None:
            from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

            self.module = LigerFusedLinearDPOLoss(beta=self.beta, use_ref_model=False, compiled=self.compiled)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss, (chosen, rejected, *_) = self.module(w, h, labels)
        return loss, torch.cat([chosen, rejected])
