"""The group weights alpha: state that moves by exponentiated gradient, like an optimizer's.

    log alpha_g <- log alpha_g + eta (L_g + C / sqrt(N_g)),      alpha = softmax(log alpha)
    alpha_used   = (1 - mixing) alpha + mixing * prior
    w_g          = alpha_used_g / q_g,                            robust loss = (1/B) sum_i w[g_i] l_i

``L_g`` is ``(1/B) sum_{i in g} l_i / q_g`` ("importance", the paper's, unbiased at any batch size) or the mean over
the group's pairs in the global batch ("group_mean", where an absent group keeps its log alpha).
Source: Ramesh et al. 2024 (arXiv 2405.20304), Algorithm 1; the size adjustment is Sagawa et al. 2020 (1911.08731).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from ..arguments import describe, values_are_readable
from ..distributed import all_reduce_sum_, is_distributed, is_process_group, world_size
from .checks import (
    check_in,
    check_logarithms,
    check_step,
    check_vector,
    names_and_sizes,
    prior_of,
    saved_order,
    saved_vector,
    simplex,
)

Estimator = Literal["importance", "group_mean"]
Prior = Literal["uniform", "proportional"] | torch.Tensor


def exponentiated_step(
    log_alpha: torch.Tensor,
    group_losses: torch.Tensor,
    group_lr: float | torch.Tensor,
    *,
    adjustment: float | torch.Tensor = 0.0,
) -> torch.Tensor:
    """One step of exponentiated gradient ascent on the simplex, in the log domain.

        log alpha' = log_softmax(log alpha + group_lr * (group_losses + adjustment))

    Args:
        log_alpha: (..., G) log weights, float64 for long runs; need not be normalised.
        group_losses: (..., G) the group losses L_g, any float dtype; broadcasts against ``log_alpha``.
        group_lr: eta_alpha >= 0; a tensor broadcasts (one rate a seed, say, as (S, 1)).
        adjustment: C / sqrt(N_g), added to the losses in the exponent only; a tensor broadcasts.

    Returns:
        (..., G) normalised log weights in the dtype of ``log_alpha``; the input is not changed.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came.

    Source: Ramesh et al. 2024, Algorithm 1, lines 6 and 7.
    """
    check_step(log_alpha, group_losses, group_lr, adjustment)
    rate, extra = (x if isinstance(x, torch.Tensor) else float(x) for x in (group_lr, adjustment))
    ascent = group_losses if group_losses.dtype is log_alpha.dtype else group_losses.to(log_alpha.dtype)
    if isinstance(extra, torch.Tensor) or extra:
        ascent = ascent + extra
    moved = (log_alpha + rate * ascent).log_softmax(dim=-1)
    return moved if moved.dtype is log_alpha.dtype else moved.to(log_alpha.dtype)


class GroupWeights(nn.Module):
    """The weights of G groups, fixed or moving, with everything a checkpoint needs to go on.

    Build one with :meth:`proportional` (DPO), :meth:`balanced` (importance-sampled DPO) or :meth:`robust` (GR-DPO).
    Passed to ``fused_grpo_loss`` in training mode it observes the batch, steps, and the batch is weighted with the
    *new* alpha, which is the order of the paper's Algorithm 1.  Ranks agree on alpha by themselves: keep this module
    beside a model that DistributedDataParallel wraps, not inside it, where its buffers would be broadcast from rank 0
    over what the other ranks have observed.  Like an optimizer, a moving one is for one thread at a time; any number
    may read it.

    Args:
        group_sizes: N_g, pairs of each group in the training set: a mapping name → size, or a sequence (then the
            names are "0", "1", ...).  Positive integers, counted after unusable pairs are dropped.
        group_lr: eta_alpha >= 0; 0 holds alpha at the prior.
        estimator: "importance" or "group_mean", what drives alpha (never what is trained on).
        prior: "uniform", "proportional" (N_g / N), or (G,) positive numbers: alpha at the start, and what
            ``mixing`` mixes in.
        mixing: fraction of the prior in the alpha used, in [0, 1]: a floor under every group's weight.
        size_adjustment: C >= 0 of C / sqrt(N_g).
        sampling_probs: (G,) q, the chance that a drawn pair is of each group; None for N_g / N.
        process_group: ranks whose batches form the global batch; None for the default group where one stands.

    Raises:
        TypeError, ValueError: naming the argument, the rule, and what came.
    """

    log_alpha: torch.Tensor
    prior: torch.Tensor
    sampling_probs: torch.Tensor
    adjustment: torch.Tensor
    pending: torch.Tensor
    num_updates: torch.Tensor
    num_skipped: torch.Tensor

    def __init__(
        self,
        group_sizes: Mapping[Any, int] | Sequence[int],
        group_lr: float = 0.0,
        *,
        estimator: Estimator = "importance",
        prior: Prior = "uniform",
        mixing: float = 0.0,
        size_adjustment: float = 0.0,
        sampling_probs: torch.Tensor | Sequence[float] | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.names, sizes = names_and_sizes(group_sizes)
        check_in("group_lr", group_lr, low=0.0)
        check_in("mixing", mixing, low=0.0, high=1.0)
        check_in("size_adjustment", size_adjustment, low=0.0)
        if not isinstance(estimator, str) or estimator not in ("importance", "group_mean"):
            raise ValueError(f"estimator must be 'importance' or 'group_mean', got {describe(estimator)}")
        if not is_process_group(process_group):
            raise TypeError(
                "process_group must be None or a group of torch.distributed that this rank belongs to, "
                f"got {describe(process_group)}"
            )
        self.group_lr = float(group_lr)
        self.estimator: Estimator = estimator
        self.mixing = float(mixing)
        self.size_adjustment = float(size_adjustment)
        self.process_group = process_group
        self.group_sizes = tuple(sizes)

        counts = torch.tensor(sizes, dtype=torch.float64)
        fractions = counts / counts.sum()
        q = fractions if sampling_probs is None else simplex("sampling_probs", sampling_probs, len(sizes))
        start = prior_of(prior, fractions)
        self.register_buffer("prior", start, persistent=False)
        self.register_buffer("sampling_probs", q, persistent=False)
        self.register_buffer("adjustment", float(size_adjustment) / counts.sqrt(), persistent=False)
        self.register_buffer("log_alpha", start.log())
        # What one all-reduce carries, as _packed lays it out.
        self.register_buffer("pending", torch.zeros(2 * len(sizes) + 2, dtype=torch.float64))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_skipped", torch.zeros((), dtype=torch.int64))
        self._accumulating = 0
        self._pending_pairs = 0
        self._maybe_pending = False
        self._largest_boost = float((1 / q).max())
        self._warned = False

    @classmethod
    def proportional(cls, group_sizes: Mapping[Any, int] | Sequence[int], *, sampling_probs=None) -> GroupWeights:
        """Alpha fixed at N_g / N: every pair counts the same.  This is plain DPO (or IPO)."""
        return cls(group_sizes, prior="proportional", sampling_probs=sampling_probs)

    @classmethod
    def balanced(cls, group_sizes: Mapping[Any, int] | Sequence[int], *, sampling_probs=None) -> GroupWeights:
        """Alpha fixed at 1 / G: every group counts the same.  This is importance-sampled DPO (or IPO)."""
        return cls(group_sizes, prior="uniform", sampling_probs=sampling_probs)

    @classmethod
    def robust(
        cls,
        group_sizes: Mapping[Any, int] | Sequence[int],
        group_lr: float,
        *,
        estimator: Estimator = "importance",
        prior: Prior = "uniform",
        mixing: float = 0.0,
        size_adjustment: float = 0.0,
        sampling_probs: torch.Tensor | Sequence[float] | None = None,
        process_group: Any = None,
    ) -> GroupWeights:
        """Alpha moves towards the groups that do worst.  This is GR-DPO (or GR-IPO); arguments as the class."""
        return cls(
            group_sizes,
            group_lr,
            estimator=estimator,
            prior=prior,
            mixing=mixing,
            size_adjustment=size_adjustment,
            sampling_probs=sampling_probs,
            process_group=process_group,
        )

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.names)

    @property
    def moves(self) -> bool:
        """Whether :meth:`step` can change alpha."""
        return self.group_lr > 0

    @property
    def weights(self) -> torch.Tensor:
        """(G,) float64 alpha in use, on the simplex, mixing included."""
        alpha = self.log_alpha.softmax(dim=0)
        return alpha if self.mixing == 0 else torch.lerp(alpha, self.prior, self.mixing)

    @property
    def loss_weights(self) -> torch.Tensor:
        """(G,) float64 ``w_g = alpha_g / q_g``, what a pair's loss is multiplied with."""
        return self.weights / self.sampling_probs

    @property
    def accumulating(self) -> bool:
        """Whether calls of the loss only observe, because an :meth:`accumulate` block is open."""
        return self._accumulating > 0

    @contextmanager
    def accumulate(self) -> Iterator[GroupWeights]:
        """Within the block, calls of the loss observe and weight by the current alpha; call :meth:`step` yourself.

        For gradient accumulation.  Alpha then lags the plain order by one optimizer step, and has to: the first
        micro-batch is weighted before the losses of the last one are known.
        """
        self._accumulating += 1
        try:
            yield self
        finally:
            self._accumulating -= 1

    @torch.no_grad()
    def observe(self, group_sums: torch.Tensor, group_counts: torch.Tensor, losses: torch.Tensor) -> None:
        """Add one local batch to what the next :meth:`step` will see.

        Args:
            group_sums: (G,) sum of losses over this batch's pairs of each group.
            group_counts: (G,) this batch's pairs of each group.
            losses: (B,) all losses of the batch, to tell whether it is finite.

        Raises:
            ValueError: naming the argument, the rule and what came; nothing was added.
        """
        for name, tensor in (("group_sums", group_sums), ("group_counts", group_counts)):
            check_vector(name, tensor, self.num_groups, self.pending.device)
        check_vector("losses", losses, None, self.pending.device)
        self.pending += self._packed(group_sums, group_counts, losses)
        self._pending_pairs += losses.shape[0]
        self._maybe_pending = True

    @torch.no_grad()
    def step(self) -> None:
        """Move alpha once by everything observed since the last step, over all ranks; one all-reduce, no host sync.

        A batch that is not finite, on any rank, moves nothing and is counted in ``num_skipped``.
        """
        if self.moves:
            self._warn_once_if_fast(self._pending_pairs)
            # What stays pending is local; the sum is not written back before it has been used.
            self._move(*self._parts_of(all_reduce_sum_(self.pending.clone(), self.process_group)))
        self.discard()

    @torch.no_grad()
    def observe_and_step(self, group_sums: torch.Tensor, group_counts: torch.Tensor, losses: torch.Tensor) -> None:
        """What a call of the loss does: :meth:`observe`, then :meth:`step` unless :meth:`accumulate` is open.

        The same bits, without the detour through ``pending`` where this batch is all there is.
        """
        if self.accumulating or self._maybe_pending or not self.moves:
            self.observe(group_sums, group_counts, losses)
            if not self.accumulating:
                self.step()
            return
        self._warn_once_if_fast(losses.shape[0])
        if is_distributed(self.process_group):
            observed = all_reduce_sum_(self._packed(group_sums, group_counts, losses), self.process_group)
            self._move(*self._parts_of(observed))
        else:
            self._move(group_sums, group_counts, losses.sum(dtype=torch.float64), losses.shape[0])

    @torch.no_grad()
    def discard(self) -> None:
        """Forget what was observed since the last step, as when a batch is thrown away."""
        self.pending.zero_()
        self._pending_pairs = 0
        self._maybe_pending = False

    def _packed(self, group_sums: torch.Tensor, group_counts: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """Sums of losses (G,), counts (G,), total loss, pairs: what is linear in the samples, as one vector."""
        total = losses.sum(dtype=torch.float64).reshape(1)
        return torch.cat([group_sums.double(), group_counts.double(), total, total.new_full((1,), losses.shape[0])])

    def _parts_of(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return packed[: self.num_groups], packed[self.num_groups : -2], packed[-2], packed[-1]

    def _move(self, sums: torch.Tensor, counts: torch.Tensor, total: torch.Tensor, pairs: torch.Tensor | int) -> None:
        """Alpha one step on by the parts of what was observed, unless one NaN or infinity is among them."""
        if self.estimator == "importance":
            # A step without a single pair is none: C / sqrt(N_g) alone must not move alpha.
            least_one = pairs.clamp(min=1) if isinstance(pairs, torch.Tensor) else max(pairs, 1)
            divisor, present = least_one * self.sampling_probs, pairs > 0
        else:
            # An absent group's exponent is 0, size adjustment and all: it keeps its log alpha.
            divisor, present = counts.clamp(min=1), counts > 0
        adjustment = self.adjustment * present if self.size_adjustment else 0.0
        log_alpha = self.log_alpha
        moved = exponentiated_step(log_alpha, sums / divisor, self.group_lr, adjustment=adjustment)
        # No sum is finite that one NaN or infinity went into; those of the groups have gone into log alpha.
        check = total + moved.sum()
        if values_are_readable(log_alpha):  # a look costs less there than doing without
            if math.isfinite(check.item()):
                log_alpha.copy_(moved)
                self.num_updates.add_(1)
            else:
                self.num_skipped.add_(1)
        else:
            finite = check.isfinite()
            log_alpha.copy_(torch.where(finite, moved, log_alpha))
            self.num_updates.add_(finite)
            self.num_skipped.add_(~finite)

    def _warn_once_if_fast(self, local_pairs: int) -> None:
        if self._warned or self.estimator != "importance" or torch.compiler.is_compiling():
            return
        pairs = local_pairs * world_size(self.process_group)
        if pairs and self.group_lr * self._largest_boost / pairs > 1:
            self._warned = True
            warnings.warn(
                f"group_lr={self.group_lr:g} is large for {pairs} pairs a step: one pair of the rarest group, with a "
                f"loss of 1, multiplies its weight by exp({self.group_lr * self._largest_boost / pairs:.3g}). "
                "Use a smaller group_lr, a larger batch, balanced sampling, or estimator='group_mean'.",
                stacklevel=4,  # the caller of step(), past the frame of torch.no_grad
            )

    def extra_repr(self) -> str:
        kind = f"group_lr={self.group_lr:g}, estimator={self.estimator!r}" if self.moves else "fixed"
        return f"{self.num_groups} groups, {kind}, mixing={self.mixing:g}"

    def _apply(self, fn: Any, recurse: bool = True) -> GroupWeights:
        # .to(), .half(), .bfloat16() reach every buffer through here.  Devices are followed, dtypes are not: a float32
        # log alpha stalls where increments fall under 1e-7, and the paper's eta is 5e-7.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                device = fn(torch.empty(0, dtype=buffer.dtype, device=buffer.device)).device
                moved = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
                self._buffers[name] = moved
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupWeights:
        # A process group is a connection, which cannot be copied: the copy talks over the same one.
        memo[id(self.process_group)] = self.process_group
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def get_extra_state(self) -> dict[str, list[str]]:
        return {"names": list(self.names)}

    def set_extra_state(self, state: dict[str, list[str]]) -> None:
        """The names have done their work in ``_load_from_state_dict``."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}_extra_state"
        if key in state_dict:
            order = saved_order(state_dict[key], self.names)
            state_dict = dict(state_dict)
            groups = len(order)
            if f"{prefix}log_alpha" in state_dict:
                # float64 whatever was saved: load_state_dict(assign=True) would take over the dtype too.
                log_alpha = saved_vector(state_dict, f"{prefix}log_alpha", groups)
                check_logarithms(f"{prefix}log_alpha", log_alpha)
                state_dict[f"{prefix}log_alpha"] = log_alpha.double()[order]
            if f"{prefix}pending" in state_dict:
                rows = torch.cat([order, order + groups, torch.tensor([2 * groups, 2 * groups + 1])])
                state_dict[f"{prefix}pending"] = saved_vector(state_dict, f"{prefix}pending", 2 * groups + 2)[rows]
        self._maybe_pending = True  # whether it is zero only the device knows
        super()._load_from_state_dict(state_dict, prefix, *args)
