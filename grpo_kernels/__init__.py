"""Group *Robust* Preference Optimization, not Group *Relative* Policy Optimization.

The method is that of Ramesh et al. 2024 (arXiv 2405.20304): GR-DPO and GR-IPO.
The loss is :func:`fused_grpo_loss`; the weights of the groups live in :class:`GroupWeights`.
"""

from .backends import available_backends
from .groups.weights import GroupWeights, exponentiated_step
from .head.attach import FusedHead, FusedHeadOutput, attach_fused_head
from .head.functional import fused_linear_grpo_loss, linear_sequence_logps, linear_token_logps
from .loss.functional import fused_grpo_loss, preference_loss, sequence_logps, token_logps
from .types import GroupLossOutput, LossType, UnavailableBackendError

__version__ = "0.1.0"

__all__ = [
    "FusedHead",
    "FusedHeadOutput",
    "GroupLossOutput",
    "GroupWeights",
    "LossType",
    "UnavailableBackendError",
    "attach_fused_head",
    "available_backends",
    "exponentiated_step",
    "fused_grpo_loss",
    "fused_linear_grpo_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "preference_loss",
    "sequence_logps",
    "token_logps",
]
