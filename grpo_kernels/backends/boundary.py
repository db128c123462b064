"""The boundary: what a backend offers, function by function.

Everything that is fused is one of a few functions over tensors that the caller allocates.  A backend is a
module with these names; it holds no state and allocates nothing of the size of the logits.

``token_logps_fwd(logits, targets, logps, lse, *, ignore_index)``
    One read of the logits.  Row ``r = s * T + t`` is ``logits[s, t, :]``.

    - logits   (S, T, V), last stride 1, any non-negative strides on the first two; float32, bfloat16, float16
      (float64 too in ``torch_ops``)
    - targets  (S*T,) int64, contiguous: the word that row r has to predict, ``ignore_index`` where there is none
    - logps    (S*T,) out, float32 (float64 for float64 logits): ``z[y] - logsumexp(z)``; 0 where ignored;
      NaN where the target is outside [0, V) and is not ``ignore_index``
    - lse      (S*T,) out, same dtype as logps: ``logsumexp(z)`` in nats; unspecified where ignored

    An ignored row is not read.  A row of logits that holds NaN or +inf, or only -inf, gives NaN, as
    ``torch.log_softmax`` does.

``token_logps_bwd(logits, targets, lse, grad_logps, grad_logits, *, ignore_index)``
    One read of the logits and one write:
    ``grad_logits[r, v] = grad_logps[r] * ((v == targets[r]) - exp(z[v] - lse[r]))``.

    - grad_logps   (S*T,) same dtype as lse, contiguous; not looked at where the row is ignored
    - grad_logits  out, shape, dtype and last stride of logits; may be the very same memory (in place);
      zeros where ignored, NaN over the row where the target is out of range

    The target entry is computed in the accumulation dtype as ``-grad * expm1(z[y] - lse)``.

``preference_tail(token_logps, targets, cu_seqlens, ref_logps, group_ids, pair_weights, policy_logps, lengths,
margins, rewards, losses, slopes, group_sums, group_counts, group_losses, *, loss_type, beta, label_smoothing,
length_normalize, ignore_index)``
    From token log-probabilities to losses and slopes, in one launch and in a fixed order of reduction.
    2B sequences, the B chosen first.  Sums over tokens are taken in float64 and rounded once, to the dtype of
    token_logps; the margin is the float64 difference of those.  So a policy that equals its reference, which was
    rounded the same way, has margin 0 and loss log 2 to the bit.

    - token_logps  (rows,) float32 or float64, contiguous, 0 where ignored
    - targets      (rows,) int64, or None: then ``lengths`` is read, where ``length_normalize`` asks for it
    - cu_seqlens   (2B+1,) int32: sequence i is rows ``[cu[i], cu[i+1])``; None: ``rows // 2B`` rows each
    - ref_logps    (2B,) float64 sums, or None for zeros
    - group_ids    (B,) int64; one outside [0, G) makes that pair NaN and is left out of the group sums
    - pair_weights (B,) float64, or None for ones
    - policy_logps (2B,) out, dtype of token_logps, always the plain sums
    - lengths      (2B,) float64: labelled tokens of each sequence (out), or what to divide by (in); None where
      nothing is to be counted and nothing divided
    - rewards      (2B,) out, dtype of token_logps: beta times the log-ratio of each sequence
    - margins, losses, slopes (B,) out, dtype of token_logps; losses and slopes carry the pair weight
    - group_sums   (G,) out, float64: sum of losses over the pairs of each group
    - group_counts (G,) out, int64
    - group_losses (G,) out, dtype of token_logps: ``group_sums / max(group_counts, 1)``
    - loss_type    index into ``types.LOSS_TYPES``

    With ``length_normalize`` policy and reference are divided by ``max(length, 1)`` before the margin.

``robust_loss(losses, group_ids, group_weights, weights, loss)``
    What the alpha step stands before: ``weights[i] = group_weights[group_ids[i]]`` and
    ``loss = (1/B) sum_i weights[i] losses[i]``, summed in float64 and rounded once; 0 where there are no pairs.

    - losses       (B,) float32 or float64, as the tail wrote them
    - group_ids    (B,) int64; one outside [0, G) has a loss of NaN, and takes any weight
    - group_weights (G,) dtype of losses
    - weights      (B,) out, dtype of losses
    - loss         () out, dtype of losses

``head_tile_fwd(logits, bias, targets, top, rest, picked, factor, exps, *, start, softcap, logit_scale, shift)``
    One tile of the LM head (``head/linear_head.py``), words ``[start, start + words)`` of the vocabulary, just out of
    the GEMM.  With ``z = softcap * tanh(logit_scale * (logits + bias) / softcap)``, or without a cap, and over the
    words v that are not the row's target:

        new top = max(top, max z),  factor = exp(top - new top),  rest = rest * factor + sum exp(z - new top)
        exps[v] = 2^-shift exp(z[v] - new top) d[v],  d = 1 - (z / softcap)^2 or 1;  0 at the target

    - logits   (rows, words), last stride 1; the GEMM's output, and scratch: it may be overwritten
    - bias     (words,) dtype of top, or None
    - targets  (rows,) int64, contiguous, words of the whole vocabulary; one outside the tile has no effect
    - top, rest, picked, factor (rows,) float32 (float64 for float64 logits), contiguous; the first two in and out,
      picked out where the target is in the tile (``z[target]``), else left as it is; factor out
    - exps     out, shape of logits, last stride 1, the dtype that goes into GEMMs; may be the memory of logits where
      the dtypes agree; None: not wanted
    - softcap  0 for none

    NaN or +inf in a row make top or rest NaN; a tile of -inf leaves both as they are.

``head_tile_bwd(logits, bias, targets, top, scale, at_target, grads, *, start, softcap, logit_scale)``
    The same tile again: ``grads[v] = scale * exp(z[v] - top) * d[v]``, ``grads[target] = at_target * d[target]``.

    - top, scale, at_target (rows,) float32 (float64 for float64 logits), contiguous
    - grads    out, as ``exps`` above

``integer_range(integers, ignored) -> (low, high)``
    Of the backends for CPU tensors only, for the checks of arguments: the smallest and the largest of 0 and the
    values of an int64 or int32 tensor that are not ``ignored``.

Every backend gives the same bits on every run (no floating-point atomics), whatever the number of threads.  The tile
operations may be missing from a backend; the head then takes those of ``torch`` under ``auto``.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Backend(Protocol):
    """What a backend module offers, besides the functions that the docstring above describes."""

    def unavailable_reason(self) -> str | None:
        """None if the backend can run in this process, else one sentence that says why not."""

    def unsupported_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if the backend takes logits of this dtype on this device, else one sentence."""

    def token_logps_fwd(self, logits, targets, logps, lse, *, ignore_index) -> None: ...

    def token_logps_bwd(self, logits, targets, lse, grad_logps, grad_logits, *, ignore_index) -> None: ...

    def preference_tail(
        self, token_logps, targets, cu_seqlens, ref_logps, group_ids, pair_weights,
        policy_logps, lengths, margins, rewards, losses, slopes, group_sums, group_counts, group_losses,
        *, loss_type, beta, label_smoothing, length_normalize, ignore_index,
    ) -> None: ...  # fmt: skip

    def robust_loss(self, losses, group_ids, group_weights, weights, loss) -> None: ...

    def head_tile_fwd(
        self, logits, bias, targets, top, rest, picked, factor, exps, *, start, softcap, logit_scale, shift
    ) -> None: ...

    def head_tile_bwd(
        self, logits, bias, targets, top, scale, at_target, grads, *, start, softcap, logit_scale
    ) -> None: ...

    def integer_range(self, integers: torch.Tensor, ignored: int) -> tuple[int, int]: ...


OPERATIONS: dict[str, str] = {
    "token_logps_fwd": "log-probabilities of rows of logits",
    "token_logps_bwd": "their gradient",
    "preference_tail": "losses, slopes and group sums",
    "robust_loss": "the weighted mean",
    "head_tile_fwd": "a tile of the LM head",
    "head_tile_bwd": "its gradient",
}
"""The functions of the boundary that run kernels, and what each computes."""

OPTIONAL_OPERATIONS = frozenset({"head_tile_fwd", "head_tile_bwd"})
"""Those that a backend may lack."""
