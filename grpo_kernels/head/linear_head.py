"""The LM head without its logits: tiles of the vocabulary through the platform's GEMM, tile operations between.

    x = h W^T + b,   z = softcap * tanh(logit_scale * x / softcap),   logp = z[y] - logsumexp(z)

The target stands apart from the other words: ``rest = sum_{v != y} exp(z[v] - top)`` with top the largest other
logit.  Then, with a = log(rest) + top - z[y], both ends keep their digits:

    logp = -softplus(a),   1 - p[y] = sigmoid(a),   p[v] = share * exp(z[v] - top),  share = sigmoid(a) / rest

and a gradient row is ``dx = -c * share * (e - rest * onehot)``: no 1 - p is ever taken of a rounded p.

One sweep forward: each tile of logits is made, summed, and, where hidden wants a gradient, exponentiated in place
and multiplied with W at once, as flash attention does with its values, so that backward is a scaling of rows,
``dh = c * unit_grad``, whatever c turns out to be.  The gradient of W needs c first.  Backward makes the tiles
again, or takes those that the memory budget let forward keep; either way a tile of dW is one GEMM over all rows.

    GEMMs of 2 * rows * V * H operations: 1 without gradients, 2 for hidden alone (a frozen head),
    3 for both with every tile kept, 4 with none, in between in proportion to the words kept
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import distributed
from .arguments import HeadInputs, HeadSettings
from .plan import Plan, Tile, accumulation_dtype, make_plan, row_chunk_elements
from .target import TargetOdds, target_odds

KEPT_SHIFT = 64
"""Kept exponentials are stored 2^-64 below the running top: a target's entry, -rest in the scale of the final top,
must fit into the scale of a tile whose running top was lower (see :func:`_finish_kept`)."""


@dataclass
class Saved:
    """What forward hands to backward, which lets go of each once it was used; None where no gradient needs it."""

    index: Any = None
    """(labelled rows,) which rows have a target."""
    count_is_right: Any = None
    """() whether ``num_labelled`` was; None where it was not told."""
    unit_grad: Any = None
    """(rows, H) accumulation dtype: d logp / d hidden."""
    top: Any = None
    """(rows,) the largest logit besides the target's."""
    share: Any = None
    """(rows,) p[v] = share * exp(z[v] - top)."""
    miss: Any = None
    """(rows,) 1 - p[y]."""
    kept_scale: Any = None
    """(kept tiles, rows) what a kept row must be multiplied with to be p, and p - 1 at the target."""
    kept: list[torch.Tensor] = field(default_factory=list)
    """The kept tiles, (rows * words,) each, or all in one (``HeadSettings.separate_tiles``)."""

    @classmethod
    def of(cls, tensors: Sequence[Any]) -> Saved:
        """From :meth:`tensors`."""
        index, count_is_right, unit_grad, top, share, miss, kept_scale, *kept = tensors
        return cls(index, count_is_right, unit_grad, top, share, miss, kept_scale, kept)

    def tensors(self) -> list[Any]:
        vectors = self.top, self.share, self.miss, self.kept_scale
        return [self.index, self.count_is_right, self.unit_grad, *vectors, *self.kept]


def token_logps_fwd(inputs: HeadInputs, needs: Sequence[bool], settings: HeadSettings) -> tuple[torch.Tensor, Saved]:
    """(rows, H), (V, H), (V,), (rows,) → log-probabilities (rows,), 0 where ignored; and what backward needs."""
    targets = inputs.targets
    index, count_is_right = _labelled_rows(targets, settings.ignore_index, settings.num_labelled)
    plan = _plan_of(inputs, index, needs, settings)
    x, words = inputs.hidden[index].to(plan.dtype), _local(targets[index], settings)
    found, saved = _sweep(x, inputs.weight, inputs.bias, words, targets.shape[0], plan, settings)
    saved.index, saved.count_is_right = index, count_is_right
    if count_is_right is not None:
        found.masked_fill_(~count_is_right, torch.nan)
    logps = torch.zeros(targets.shape, dtype=found.dtype, device=found.device).index_copy_(0, index, found)
    if count_is_right is not None:
        # Even the rows that were told to be labelled and are not, and the other way round: no number of them is true.
        logps.masked_fill_(~count_is_right, torch.nan)
    return logps, saved


def hidden_gradient(grad_logps: torch.Tensor, inputs: HeadInputs, saved: Saved, settings: HeadSettings) -> torch.Tensor:
    """``dh[index] = c * unit_grad`` and 0 elsewhere, a few rows at a time; summed over ranks before it is rounded."""
    unit_grad, (shape, dtype) = saved.unit_grad, (inputs.hidden.shape, inputs.hidden.dtype)
    grad_hidden = torch.zeros(shape, dtype=dtype, device=unit_grad.device)
    elements = row_chunk_elements(shape[-1], settings.dtype, unit_grad.device, shared=settings.shard is not None)
    for part in _row_chunks(unit_grad, elements):
        rows = unit_grad[part] * grad_logps[part].unsqueeze(1)
        if settings.shard is not None:
            distributed.all_reduce_sum_(rows, distributed.group_named(settings.shard.group))
        grad_hidden.index_copy_(0, saved.index[part], rows.to(dtype))
    return grad_hidden


def weight_gradient(
    grad_logps: torch.Tensor, inputs: HeadInputs, saved: Saved, needs: Sequence[bool], settings: HeadSettings
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(labelled rows,) gradients of the log-probabilities → gradients of weight and bias, as ``needs`` asks for."""
    hidden, weight, bias, targets = inputs
    plan = _plan_of(inputs, saved.index, needs, settings)
    x, targets = hidden[saved.index].to(plan.dtype), _local(targets[saved.index], settings)
    accumulate = accumulation_dtype(plan.dtype)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
    grad_bias = torch.empty(plan.vocabulary, dtype=accumulate, device=x.device) if needs[2] else None
    work = _Workspace(plan, x.device)
    c = grad_logps * settings.logit_scale
    scale, at_target = -c * saved.share, c * saved.miss
    tiles = plan.tiles()
    kept = _kept_tiles(saved.kept, tiles, plan.rows)
    saved.kept.clear()  # from here on `kept` alone holds them
    scaled = torch.empty_like(x) if kept and needs[1] else None
    row_scale: torch.Tensor | None
    for tile in reversed(tiles):
        if not tile.kept:
            w, b = _words(weight, bias, tile, plan.dtype)
            row_scale, x_tile = None, x
            grads = work.exps(tile)
            logits = work.logits(tile, grads)
            work.gemm(x, w.t(), logits)
            settings.backend.head_tile_bwd(
                logits, b, targets, saved.top, scale, at_target, grads,
                start=tile.start, softcap=settings.softcap, logit_scale=settings.logit_scale,
            )  # fmt: skip
        else:
            # dW = E^T (diag(c) h): the factor of a row goes to h, which is narrower than the tile.
            grads = kept.pop()
            row_scale = -c * saved.kept_scale[len(kept)]
            if scaled is not None:
                _scale_rows(x, row_scale, scaled, plan.row_chunk)
                x_tile = scaled
        words = slice(tile.start, tile.stop)
        if grad_weight is not None:
            _mm_into(grads.t(), x_tile, grad_weight[words])
        if grad_bias is not None:
            _column_sums(grads, row_scale, grad_bias[words], plan.row_chunk)
        del grads  # a kept tile goes before the next part of dW comes
    return grad_weight, None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)


def _labelled_rows(
    targets: torch.Tensor, ignore_index: int, num_labelled: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Indices of the rows that have a target.  Counting them is the one value that is read from the device.

    Told a wrong number, the index still holds rows that exist, and the second result is false.
    """
    labelled = targets != ignore_index
    if num_labelled is None:
        return labelled.nonzero().squeeze(1), None
    index = torch.nonzero_static(labelled, size=num_labelled, fill_value=0).squeeze(1)
    return index, labelled.sum() == num_labelled


def _local(targets: torch.Tensor, settings: HeadSettings) -> torch.Tensor:
    """Targets that count from this rank's first word; those of other ranks are no word of its tiles."""
    return targets if settings.shard is None else targets - settings.shard.start


def _plan_of(inputs: HeadInputs, index: torch.Tensor, needs: Sequence[bool], settings: HeadSettings) -> Plan:
    hidden, weight = inputs.hidden, inputs.weight
    return make_plan(
        index.shape[0], hidden.shape[1], weight.shape[0], settings.dtype, hidden.device, settings.memory_budget,
        grad_hidden=needs[0], grad_weight=needs[1] or needs[2],
    )  # fmt: skip


def _sweep(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    all_rows: int,
    plan: Plan,
    settings: HeadSettings,
) -> tuple[torch.Tensor, Saved]:
    """Labelled rows only: (rows, H) → (rows,) log-probabilities, and what backward needs."""
    device, tiles = x.device, plan.tiles()
    accumulate = accumulation_dtype(plan.dtype)
    top, rest, picked, factor = torch.empty(4, plan.rows, dtype=accumulate, device=device)
    top.fill_(torch.finfo(accumulate).min)
    rest.zero_()
    picked.fill_(torch.nan)  # stays where the target is no word at all
    work = _Workspace(plan, device)
    total: Any = None
    part: Any = None
    tops: list[torch.Tensor] = []
    if plan.grad_hidden:
        total = torch.zeros(plan.rows, plan.hidden, dtype=accumulate, device=device)
        part = torch.empty(plan.rows, plan.hidden, dtype=work.gemm_dtype, device=device)
    kept_tiles = [tile for tile in tiles if tile.kept]
    sizes = [plan.rows * (tile.stop - tile.start) for tile in kept_tiles]
    if not settings.separate_tiles:
        sizes = [sum(sizes)] if sizes else []
    kept = [torch.empty(size, dtype=plan.dtype, device=device) for size in sizes]
    views = _kept_tiles(kept, tiles, plan.rows)
    for tile in tiles:
        w, b = _words(weight, bias, tile, plan.dtype)
        exps: Any = None
        if tile.kept:
            exps = views[len(tops)]
        elif total is not None:
            exps = work.exps(tile)
        logits = work.logits(tile, exps)
        work.gemm(x, w.t(), logits)
        settings.backend.head_tile_fwd(
            logits, b, targets, top, rest, picked, factor, exps, start=tile.start, softcap=settings.softcap,
            logit_scale=settings.logit_scale, shift=KEPT_SHIFT if tile.kept else 0,
        )  # fmt: skip
        if total is not None:
            work.gemm(exps, w, part)
            if tile.kept and not tops:
                factor.mul_(2.0**-KEPT_SHIFT)  # from here on in the scale of kept exponentials
            torch.addcmul(part, total, factor.unsqueeze(1), out=total)
        if tile.kept:
            tops.append(top.clone())
    del work, part
    # As in torch.log_softmax: -inf at the target is a probability of 0, +inf is no number.
    picked.masked_fill_(picked == torch.inf, torch.nan)
    odds, miss, share = _odds(top, rest, picked, targets, all_rows, bias is not None, plan, settings)
    logps = torch.nn.functional.logsigmoid(-odds.log_odds).to(accumulate)
    if total is not None:
        scale = share * 2.0**KEPT_SHIFT if kept else share
        _finish_unit_grad(total, weight, targets, odds.target_logit, miss, scale, plan, settings)
    if not plan.grad_weight:
        return logps, Saved(unit_grad=total)
    kept_scale = None
    if kept:
        kept_scale = torch.stack(tops).sub_(top)
        if odds.log_scale is not None:  # in the scale of all ranks' sum, where that is 1 and its share 1 - p[y]
            kept_scale.add_(odds.log_scale)
            _finish_kept(
                views, kept_tiles, kept_scale, targets, odds.target_logit, torch.ones_like(rest), miss, settings
            )
        else:
            _finish_kept(views, kept_tiles, kept_scale, targets, picked, rest, share, settings)
    return logps, Saved(None, None, total, top.clone(), share, miss, kept_scale, kept)


def _odds(
    top: torch.Tensor,
    rest: torch.Tensor,
    picked: torch.Tensor,
    targets: torch.Tensor,
    all_rows: int,
    biased: bool,
    plan: Plan,
    settings: HeadSettings,
) -> tuple[TargetOdds, torch.Tensor, torch.Tensor]:
    """What all words, of all ranks, say of each row: the odds against its target, 1 - p[y], and share."""
    if settings.shard is None:
        against = rest.log().add_(top).sub_(picked)
        miss = against.sigmoid()
        return TargetOdds(against, picked, None), miss, (miss / rest).masked_fill_(rest == 0, 0)
    odds = target_odds(top, rest, picked, targets, all_rows, biased, plan, settings)
    miss = odds.log_odds.sigmoid()
    share = miss * odds.log_scale.exp()
    rounded = TargetOdds(odds.log_odds, odds.target_logit.to(top.dtype), odds.log_scale.to(top.dtype))
    return rounded, miss.to(top.dtype), share.to(top.dtype)


def _kept_tiles(kept: Sequence[torch.Tensor], tiles: Sequence[Tile], rows: int) -> list[torch.Tensor]:
    """(rows, words) of each kept tile, whether they lie in a tensor each or all in one."""
    words = [tile.stop - tile.start for tile in tiles if tile.kept]
    apart = kept if len(kept) == len(words) else kept[0].split([rows * n for n in words])
    return [flat.view(rows, n) for flat, n in zip(apart, words, strict=True)]


class _Workspace:
    """The one working tile.  A CPU's GEMM answers in the dtype it was asked in, CUDA's in float32."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        wide = device.type == "cuda" and plan.dtype in (torch.bfloat16, torch.float16)
        self.gemm_dtype = torch.float32 if wide else plan.dtype
        self._wide, self._dtype, self._device = wide, plan.dtype, device
        self._size = plan.rows * plan.tile_words
        self._rows = plan.rows
        self._logits: torch.Tensor | None = None
        self._exps: torch.Tensor | None = None

    def exps(self, tile: Tile) -> torch.Tensor:
        """(rows, words) in the dtype that goes into GEMMs."""
        if self._exps is None:
            self._exps = torch.empty(self._size, dtype=self._dtype, device=self._device)
        return self._view(self._exps, tile)

    def logits(self, tile: Tile, exps: torch.Tensor | None) -> torch.Tensor:
        """(rows, words) in the dtype that comes out; the very memory of ``exps`` where the dtypes agree."""
        if not self._wide:
            return self.exps(tile) if exps is None else exps
        if self._logits is None:
            self._logits = torch.empty(self._size, dtype=self.gemm_dtype, device=self._device)
        return self._view(self._logits, tile)

    def gemm(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        if self._wide:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out=out)

    def _view(self, flat: torch.Tensor, tile: Tile) -> torch.Tensor:
        words = tile.stop - tile.start
        return flat[: self._rows * words].view(self._rows, words)


def _finish_unit_grad(
    total: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    picked: torch.Tensor,
    miss: torch.Tensor,
    share: torch.Tensor,
    plan: Plan,
    settings: HeadSettings,
) -> None:
    """In place: sum_v e[v] d[v] W[v] → d logp / dh = (1 - p[y]) d[y] W[y] - share * sum, times logit_scale."""
    if not plan.vocabulary:  # more ranks than words
        return
    inside = (targets >= 0) & (targets < plan.vocabulary)
    at_target = (miss * _slope_at(picked, settings) * settings.logit_scale).masked_fill_(~inside, 0)
    others = share * -settings.logit_scale
    safe = targets.clamp(0, plan.vocabulary - 1)
    for part in _row_chunks(total, plan.row_chunk):
        rows = weight.index_select(0, safe[part]).to(plan.dtype).to(total.dtype)
        total[part] = total[part].mul_(others[part].unsqueeze(1)).addcmul_(rows, at_target[part].unsqueeze(1))


def _finish_kept(
    kept: list[torch.Tensor],
    tiles: list[Tile],
    drop: torch.Tensor,
    targets: torch.Tensor,
    picked: torch.Tensor,
    rest: torch.Tensor,
    share: torch.Tensor,
    settings: HeadSettings,
) -> None:
    """Write each target's entry into its kept tile; turn ``drop``, in place, into the scale of each kept row.

    A tile was stored as ``2^-64 exp(z - tops)``, so with drop = tops - top its rows want the scale
    ``2^64 exp(drop) * share`` and the target's entry is -rest over that factor.  Where top rose by more than 2^64
    after the tile, that entry would overflow; but then the row's other words are below 2^-64 of the final top, and
    taking them 2^64 too large at most still leaves less than any rounding.  There the scale is share and the entry
    -rest.
    """
    room = KEPT_SHIFT * 0.6931471805599453
    rows = torch.arange(rest.shape[0], device=rest.device)
    for exps, tile, below in zip(kept, tiles, drop, strict=True):
        words, exps = tile.stop - tile.start, exps.view(-1)
        index = targets - tile.start
        inside = (index >= 0) & (index < words)
        below.copy_(torch.where(inside, below.clamp(min=-room), below))
        entry = -rest * _slope_at(picked, settings) * torch.exp(-below) * 2.0**-KEPT_SHIFT
        # By the place in memory: scatter_ along rows would copy the tile.
        place = rows * words + torch.where(inside, index, 0)
        exps.index_copy_(0, place, torch.where(inside, entry.to(exps.dtype), exps[place]))
    drop.exp_().mul_(share * 2.0**KEPT_SHIFT)


def _slope_at(picked: torch.Tensor, settings: HeadSettings) -> torch.Tensor | float:
    """1 - (z / softcap)^2: what the cap leaves of a change."""
    return 1 - (picked / settings.softcap).square() if settings.softcap else 1.0


def _mm_into(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """``out = a b``, accumulated over all rows within one GEMM."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _column_sums(tile_grads: torch.Tensor, row_scale: torch.Tensor | None, out: torch.Tensor, elements: int) -> None:
    """Sums over all rows in the accumulation dtype, a few rows at a time."""
    out.zero_()
    for part in _row_chunks(tile_grads, elements):
        rows = tile_grads[part].to(out.dtype)
        out.add_(rows.sum(dim=0) if row_scale is None else row_scale[part] @ rows)


def _scale_rows(x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, elements: int) -> None:
    for part in _row_chunks(x, elements):
        out[part] = x[part] * scale[part].unsqueeze(1)


def _words(
    weight: torch.Tensor, bias: torch.Tensor | None, tile: Tile, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of one tile in the dtypes that GEMM and tile operations take."""
    words = slice(tile.start, tile.stop)
    return weight[words].to(dtype), None if bias is None else bias[words].to(accumulation_dtype(dtype))


def _row_chunks(tensor: torch.Tensor, elements: int) -> Iterator[slice]:
    rows, width = tensor.shape
    step = max(1, elements // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
