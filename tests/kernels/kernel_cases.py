"""The parity matrix of the kernels: which backends, shapes and layouts, the float64 oracle, and the error budget.

Environment:
    GRPO_KERNELS_TEST_BACKENDS   "cpu,triton": only these, and it is an error if one of them cannot run here
    TRITON_INTERPRET=1           the triton backend runs on the CPU, on small shapes (and see cuda_emulator.py)
"""

from __future__ import annotations

import importlib
import itertools
import os
from types import ModuleType
from typing import NamedTuple

import torch

from grpo_kernels.backends import backends, choose
from grpo_kernels.types import IGNORE_INDEX, LOSS_TYPES, UnavailableBackendError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIGMAS = (3.0, 8.0)
"""Rows both flat and peaked: the largest probability is near 0.01 and near 0.9 at V = 32001."""

EPSILON = 2.0**-22
"""Two float32 roundings: what an error may exceed plain PyTorch's by, relative to the largest number involved."""


class Place(NamedTuple):
    """A backend on a device where it runs."""

    name: str
    device: str

    @property
    def module(self) -> ModuleType:
        return choose(self.name, torch.device(self.device), torch.float32)

    @property
    def interpreted(self) -> bool:
        """A GPU's kernels on the CPU, by Triton's interpreter or the emulator of CUDA: slowly."""
        return self.name in ("triton", "cuda") and self.device == "cpu"


def places() -> list[Place]:
    """Every backend on every device where it runs in this process, or those the environment names."""
    wanted = [name for name in os.environ.get("GRPO_KERNELS_TEST_BACKENDS", "").split(",") if name]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = [Place(name, device) for name in wanted or backends() for device in devices if _runs(name, device)]
    missing = set(wanted) - {place.name for place in found}
    if missing:
        raise RuntimeError(f"asked to test {sorted(missing)}, which cannot run here: {backends()}")
    return found


def _runs(name: str, device: str) -> bool:
    try:
        choose(name, torch.device(device), torch.float32)
    except UnavailableBackendError:
        return False
    return True


def vocabularies(place: Place) -> tuple[int, ...]:
    """Odd ones, powers of two plus one, and a large one; small ones for the interpreter, which is slow."""
    return (1, 2, 31, 257) if place.interpreted else (1, 2, 31, 1000, 32001, 151936)


def wide(place: Place) -> int:
    """One vocabulary of several blocks, for tests that are not about V."""
    return 131 if place.interpreted else 4099


def matrix() -> list:
    """(place, dtype, V) in full."""
    return [(place, dtype, v) for place in places() for dtype in DTYPES for v in vocabularies(place)]


def case_id(value: object) -> str:
    if isinstance(value, Place):
        return f"{value.name}@{value.device}"
    return str(value).removeprefix("torch.")


# ---- inputs


def make_rows(
    place: Place, dtype: torch.dtype, shape: tuple[int, int, int], sigma: float, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normal logits, labels (every fifth ignored where there are more than one) and gradients of the logps."""
    generator = torch.Generator().manual_seed(seed)
    sequences, length, vocabulary = shape
    rows = sequences * length
    logits = (torch.randn(shape, generator=generator) * sigma).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    if rows > 1:
        targets[1::5] = IGNORE_INDEX
    grads = torch.randn(rows, generator=generator)
    return logits.to(place.device), targets.to(place.device), grads.to(place.device)


def layouts(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers lying differently in memory; the last stride is 1 throughout."""
    sequences, length, vocabulary = logits.shape
    width = vocabulary + 5
    padded = logits.new_full((sequences, length + 2, width), torch.nan)
    unaligned = logits.new_full((logits.numel() + 1,), torch.nan)[1:]
    swapped = logits.new_full((length, sequences, vocabulary), torch.nan).transpose(0, 1)
    views = {
        "contiguous": torch.full_like(logits, torch.nan),
        "shifted": logits.new_full((sequences, length + 1, vocabulary), torch.nan)[:, :-1],
        "padded": padded[:, 1:-1, 3 : 3 + vocabulary],
        "swapped": swapped,
        "unaligned": unaligned.view(logits.shape),
    }
    for view in views.values():
        view.copy_(logits)
    return views


# ---- running a backend


def forward(place: Place, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logps, lse = (torch.full((targets.numel(),), torch.nan, device=logits.device) for _ in range(2))
    place.module.token_logps_fwd(logits, targets, logps, lse, ignore_index=IGNORE_INDEX)
    return logps, lse


def backward(
    place: Place,
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    grads: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.empty_like(logits) if out is None else out
    place.module.token_logps_bwd(logits, targets, lse, grads, out, ignore_index=IGNORE_INDEX)
    return out


# ---- the oracle and its budget


def oracle(
    logits: torch.Tensor, targets: torch.Tensor, grads: torch.Tensor, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and gradient by torch.log_softmax and autograd in ``dtype``: in float64 the truth."""
    z = logits.detach().to("cpu", dtype, copy=True).contiguous().requires_grad_()
    flat, target = torch.log_softmax(z, dim=-1).view(-1, z.shape[-1]), targets.cpu()
    labelled = target != IGNORE_INDEX
    logps = flat.gather(1, torch.where(labelled, target, 0).unsqueeze(1)).squeeze(1)
    logps = torch.where(labelled, logps, 0)
    (gradient,) = torch.autograd.grad(logps, z, grads.cpu().to(dtype))
    return logps.detach(), gradient


def assert_within_budget(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, scale: float) -> None:
    """The largest error is at most plain PyTorch's plus EPSILON * scale."""
    ours, theirs = ((x.double().cpu() - exact).abs().max().item() for x in (got, plain))
    assert ours <= theirs + EPSILON * scale, f"error {ours:.3e}, PyTorch's {theirs:.3e}, epsilon {EPSILON * scale:.3e}"


def assert_relative_budget(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, reach: float) -> None:
    """The same, entry by entry relative to its own size, so that small entries count as much as large ones.

    ``reach`` is the largest |z| or |lse|: float32 holds a difference of two such numbers to EPSILON * reach, which
    the exponential turns into a relative error.  Entries below the dtype's normal range are left out.
    """
    seen = exact.abs() > 2 * torch.finfo(got.dtype).tiny
    if not seen.any():
        return
    size = exact.abs()[seen]
    ours, theirs = (((x.double().cpu() - exact).abs()[seen] / size).max().item() for x in (got, plain))
    allowed = theirs + EPSILON * (4 + reach)
    assert ours <= allowed, f"relative error {ours:.3e}, PyTorch's {theirs:.3e}, allowed {allowed:.3e}"


# ---- the tail


def tail_oracle(
    token_logps: torch.Tensor, targets: torch.Tensor, cu_seqlens: torch.Tensor, ref_logps: torch.Tensor | None,
    group_ids: torch.Tensor, pair_weights: torch.Tensor | None, groups: int,
    *, loss_type: str, beta: float, label_smoothing: float, length_normalize: bool,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Everything the tail writes, in float64 from the sums on, one pair at a time; slopes by autograd."""
    bounds, pairs = cu_seqlens.tolist(), group_ids.numel()
    spans = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    # The sum is rounded once, to the dtype of the tokens, as the boundary has it.
    logps = torch.stack([token_logps[span].double().sum() for span in spans]).to(token_logps.dtype).double()
    lengths = torch.tensor([float((targets[span] != IGNORE_INDEX).sum()) for span in spans], dtype=torch.float64)
    ratios = logps - ref_logps if ref_logps is not None else logps
    if length_normalize:
        ratios = ratios / lengths.clamp(min=1)
    margins = (ratios[:pairs] - ratios[pairs:]).requires_grad_()
    x, e = beta * margins, label_smoothing
    win, lose = -torch.nn.functional.logsigmoid(x), -torch.nn.functional.logsigmoid(-x)
    losses = {
        "sigmoid": lambda: (1 - e) * win + e * lose,
        "robust": lambda: ((1 - e) * win - e * lose) / (1 - 2 * e),
        "hinge": lambda: (1 - x).relu(),
        "ipo": lambda: (margins - 1 / (2 * beta)) ** 2,
    }[loss_type]()
    if pair_weights is not None:
        losses = losses * pair_weights
    (slopes,) = torch.autograd.grad(losses.sum(), margins)
    losses = losses.detach()
    members = [group_ids == g for g in range(groups)]
    valid = (group_ids >= 0) & (group_ids < groups)
    return {
        "policy_logps": logps,
        "lengths": lengths,
        "margins": margins.detach(),
        "rewards": beta * ratios.detach(),
        "losses": losses.masked_fill(~valid, torch.nan),
        "slopes": slopes.masked_fill(~valid, torch.nan),
        "group_sums": torch.stack([losses[m].sum() for m in members]),
        "group_counts": torch.stack([m.sum() for m in members]),
        "group_losses": torch.stack([losses[m].sum() / max(int(m.sum()), 1) for m in members]),
    }


def run_tail(
    place: Place, token_logps: torch.Tensor, targets: torch.Tensor | None, cu_seqlens: torch.Tensor | None,
    ref_logps: torch.Tensor | None, group_ids: torch.Tensor, pair_weights: torch.Tensor | None, groups: int,
    *, loss_type: str, lengths: torch.Tensor | None = None, **options: object,
) -> dict[str, torch.Tensor]:  # fmt: skip
    pairs, dtype, device = group_ids.numel(), token_logps.dtype, place.device

    def on_device(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.to(device)

    def filled(size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((size,), torch.nan if dtype.is_floating_point else -7, dtype=dtype, device=device)

    out = {
        "policy_logps": filled(2 * pairs, dtype),
        "lengths": filled(2 * pairs, torch.float64) if targets is not None else on_device(lengths),
        "margins": filled(pairs, dtype),
        "rewards": filled(2 * pairs, dtype),
        "losses": filled(pairs, dtype),
        "slopes": filled(pairs, dtype),
        "group_sums": filled(groups, torch.float64),
        "group_counts": filled(groups, torch.int64),
        "group_losses": filled(groups, dtype),
    }
    inputs = (token_logps, targets, cu_seqlens, ref_logps, group_ids, pair_weights)
    place.module.preference_tail(
        *map(on_device, inputs), *out.values(),
        loss_type=LOSS_TYPES.index(loss_type), ignore_index=IGNORE_INDEX, **options,
    )  # fmt: skip
    return {name: value.cpu() for name, value in out.items() if value is not None}


def load(name: str) -> ModuleType:
    return importlib.import_module(f"grpo_kernels.backends.{name}")
