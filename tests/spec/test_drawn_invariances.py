"""What may be done to a batch without changing its losses, and what it changes where it does; on drawn batches.

Bit for bit where nothing is computed in another order, to stated roundings where it is.

Of "scaling logits changes nothing" this holds, and is held here: a factor on all of a row's unnormalised
probabilities e^z, that is, a number added to its logits; a factor moved from hidden states to ``logit_scale`` or to
the weight; a factor moved from log-probabilities to beta.  A factor on the logits themselves is a temperature, and
changes the policy.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from drawn import drawn
from drawn_cases import BACKENDS, Case, draw_case, draw_logits, epsilon, lay_out, tiny, words_of
from helpers import same_bits
from hypothesis import strategies as st

from grpo_kernels import (
    GroupWeights,
    exponentiated_step,
    fused_grpo_loss,
    linear_token_logps,
    preference_loss,
    sequence_logps,
    token_logps,
)

pytestmark = pytest.mark.filterwarnings("ignore:group_lr=")


def backend_of(data, dtype):
    names = [name for name in BACKENDS if dtype != torch.float64 or name in ("auto", "torch")]
    return data.draw(st.sampled_from(names), label="backend")


def loss_of(case: Case, logits, backend, weights=None, **changes):
    """The loss and the gradient of the logits; a GroupWeights is copied, so that it may be asked again."""
    weights = copy.deepcopy(case.weights) if weights is None else weights
    leaf = logits.detach().clone().requires_grad_()
    call = {"labels": case.labels, "ref_logps": case.ref_logps, "group_ids": case.group_ids, **case.options, **changes}
    out = fused_grpo_loss(leaf, group_weights=weights, backend=backend, **call)
    out.loss.backward()
    return out, leaf.grad, weights


def padded(data, **options):
    """A case of sequences that may be taken one by one."""
    case = draw_case(data, **options)
    if case.cu_seqlens is not None:
        counts = case.cu_seqlens.diff().long()
        length = int(counts.max()) if len(counts) else 0
        labels = torch.full((case.sequences, length), case.options["ignore_index"], dtype=case.labels.dtype)
        for i, piece in enumerate(case.labels.split(counts.tolist())):
            labels[i, : len(piece)] = piece
        case.labels, case.rows, case.cu_seqlens = labels, tuple(labels.shape), None
        case.options["cu_seqlens"] = None
    return case


def reordered(case: Case, rows, pairs):
    """What a call needs of this case with its sequences and pairs in another order."""
    weights = case.options["pair_weights"]
    return {
        "labels": case.labels[rows],
        "ref_logps": None if case.ref_logps is None else case.ref_logps[rows],
        "group_ids": case.group_ids[pairs],
        "pair_weights": None if weights is None else weights[pairs],
    }


@drawn(default=10, slow=100, nightly=1_500)
def test_swapping_chosen_and_rejected_negates_the_margins(data):
    case = padded(data)
    logits, backend = draw_logits(data, case), backend_of(data, case.dtype)
    rows = torch.arange(case.sequences).roll(case.pairs)
    out, *_ = loss_of(case, logits, backend)
    swapped, *_ = loss_of(case, logits[rows], backend, **reordered(case, rows, torch.arange(case.pairs)))
    assert same_bits(swapped.margins, -out.margins)
    assert same_bits(swapped.rewards_chosen, out.rewards_rejected)
    assert same_bits(swapped.rewards_rejected, out.rewards_chosen)


@drawn(default=10, slow=100, nightly=1_500)
def test_permuting_pairs_permutes_losses_and_leaves_alpha(data):
    """Losses and, under the same weights, gradients bit for bit; alpha to the order of a float64 sum over pairs."""
    case = padded(data)
    logits, backend = draw_logits(data, case), backend_of(data, case.dtype)
    order = torch.randperm(case.pairs, generator=case.rng)
    rows = torch.cat([order, order + case.pairs])
    out, _, weights = loss_of(case, logits, backend)
    again, _, moved = loss_of(case, logits[rows], backend, **reordered(case, rows, order))
    assert same_bits(again.losses, out.losses[order])
    assert torch.equal(again.group_counts, out.group_counts)
    if isinstance(weights, GroupWeights):
        size = weights.group_lr * (out.losses.double().abs().sum() / weights.sampling_probs.min()).item()
        torch.testing.assert_close(moved.log_alpha, weights.log_alpha, rtol=1e-13, atol=1e-14 * (1 + size))
        plain = weights.loss_weights
    else:
        plain = weights
    _, grad, _ = loss_of(case, logits, backend, weights=plain)
    _, permuted, _ = loss_of(case, logits[rows], backend, weights=plain, **reordered(case, rows, order))
    assert same_bits(permuted, grad[rows])


@drawn(default=10, slow=100, nightly=1_500)
def test_a_factor_on_the_odds_of_a_row_changes_nothing(data):
    """e^z times a constant is z plus a constant: where both can be written, the log-probabilities are the same bits."""
    case = draw_case(data)
    case.dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    backend = backend_of(data, case.dtype)
    logits = (draw_logits(data, case).clamp(-256, 256) * 64).round() / 64
    by_row = torch.randint(-4096, 4096, (*case.rows, 1), generator=case.rng).to(case.dtype)
    plain, shifted = (token_logps(z, case.labels, **case.layout, backend=backend) for z in (logits, logits + by_row))
    assert same_bits(plain, shifted)
    (out, grad, gw), (again, other, moved) = (loss_of(case, z, backend) for z in (logits, logits + by_row))
    assert same_bits(out.losses, again.losses)
    assert same_bits(out.loss, again.loss)
    if isinstance(gw, GroupWeights):
        assert torch.equal(gw.log_alpha, moved.log_alpha)
    # Backward has z - lse to EPSILON times their size, here up to 4352, and multiplies p of it with c of the row.
    if grad.numel():
        p = logits.double().softmax(-1)
        error = (F.one_hot(words_of(case), case.vocabulary) - p).abs().amax(-1, keepdim=True)
        c = (grad.abs().amax(-1, keepdim=True) / error).nan_to_num(0, 0, 0)
        room = epsilon(case.dtype) * (4400 * 2 * c * p + grad.abs()) + 4 * tiny(case.dtype)
        assert ((grad - other).abs() <= room).all()


@drawn(default=10, slow=100, nightly=1_500)
def test_a_factor_may_move_between_hidden_states_weight_and_logit_scale(data):
    """A power of two, so that nothing is rounded anew: the same bits."""
    case = draw_case(data)
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    hidden = torch.randn(*case.rows, 5, generator=case.rng).to(dtype)
    weight = torch.randn(case.vocabulary, 5, generator=case.rng).to(dtype)
    factor = 2.0 ** data.draw(st.integers(-6, 3), label="log2 of the factor")
    options = {**case.layout, "backend": backend_of(data, dtype)}
    options["softcap"] = data.draw(st.sampled_from([None, 3.0]), label="softcap")
    grads, logps = [], []
    for h, w, scale in ((hidden, weight, factor), (hidden * factor, weight, 1.0), (hidden, weight * factor, 1.0)):
        leaves = h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
        out = linear_token_logps(*leaves, case.labels, logit_scale=scale, memory_budget=0, **options)
        out.sum().backward()
        logps.append(out)
        grads.append([leaf.grad for leaf in leaves])
    (dh, dw), (dh_hidden, _), (_, dw_weight) = grads
    assert all(same_bits(logps[0], other) for other in logps[1:])
    # The factor is a factor of the gradient; where it is multiplied in is a matter of a rounding.
    for mine, theirs in ((dh_hidden * factor, dh), (dw_weight * factor, dw)):
        room = 64 * epsilon(dtype) * theirs.abs().max() if theirs.numel() else 0
        assert ((mine - theirs).abs() <= room + tiny(dtype)).all()


@drawn(default=10, slow=100, nightly=1_500)
def test_a_factor_may_move_between_log_probabilities_and_beta(data):
    """Losses of beta times the margin stay as they are; ipo, a square of nats, grows by the square of the factor."""
    case = draw_case(data)
    factor = 2.0 ** data.draw(st.integers(-10, 10), label="log2 of the factor")
    sums = -30 * torch.rand(case.sequences, generator=case.rng, dtype=torch.float64)
    ref = None if case.ref_logps is None else case.ref_logps.double()
    names = ("beta", "loss_type", "label_smoothing", "pair_weights")
    options = {name: case.options[name] for name in names}
    tail = case.group_ids, torch.ones(64)
    out = preference_loss(sums, ref, *tail, **options)
    options["beta"] /= factor
    scaled = preference_loss(sums * factor, None if ref is None else ref * factor, *tail, **options)
    assert same_bits(scaled.losses, out.losses * (factor**2 if options["loss_type"] == "ipo" else 1.0))
    assert same_bits(scaled.rewards_chosen, out.rewards_chosen)


@drawn(default=10, slow=100, nightly=1_500)
def test_uniform_everything_is_plain_dpo(data):
    """By five lines of PyTorch that know nothing of groups."""
    case = padded(data)
    logits, backend = draw_logits(data, case), backend_of(data, case.dtype)
    groups = 41
    sizes = torch.randint(1, 9, (groups,), generator=case.rng).tolist()
    weights = data.draw(
        st.sampled_from(
            [
                GroupWeights.proportional(sizes),
                GroupWeights.robust(sizes, 0.0, prior="proportional"),
                GroupWeights.balanced([7] * groups),
                GroupWeights.balanced(sizes, sampling_probs=[1 / groups] * groups),
                torch.ones(groups),
            ]
        ),
        label="weights",
    )
    beta = case.options["beta"]
    settings = {"loss_type": "sigmoid", "label_smoothing": 0.0, "length_normalize": False, "pair_weights": None}
    out, grad, _ = loss_of(case, logits, backend, weights=weights, **settings)

    z = logits.double().clone().requires_grad_()
    logp, labels, aligned = z.log_softmax(-1), case.labels.long(), case.options["shift"]
    logp, labels = (logp[:, :-1], labels[:, 1:]) if aligned else (logp, labels)
    seen = labels != case.options["ignore_index"]
    sums = logp.gather(-1, labels.where(seen, 0).unsqueeze(-1)).squeeze(-1).where(seen, 0).sum(-1)
    chosen, rejected = (
        (sums if case.ref_logps is None else sums - case.ref_logps).chunk(2) if case.pairs else (sums,) * 2
    )
    loss = -F.logsigmoid(beta * (chosen - rejected)).sum() / max(case.pairs, 1)
    loss.backward()
    off = epsilon(case.dtype) * (2 + z.detach().where(z.isfinite(), 0).abs().max().item() if z.numel() else 1)
    tokens = max(case.rows[1], 1)
    assert abs(out.loss.item() - loss.item()) <= 2 * off * tokens * beta + 2 * epsilon(case.dtype) * loss.item()
    info = torch.finfo(case.dtype)
    room = (8 * off * tokens * max(beta, beta**2) / max(case.pairs, 1)) + info.eps * z.grad.abs() + info.tiny
    assert ((grad.double() - z.grad).abs() <= room).all()


@drawn(default=10, slow=100, nightly=1_500)
def test_how_a_batch_lies_in_memory_and_how_ids_are_written_changes_no_bit(data):
    case = draw_case(data)
    logits, backend = draw_logits(data, case).contiguous(), backend_of(data, case.dtype)
    out, grad, gw = loss_of(case, logits, backend)
    labels = case.labels.long()
    ignore = case.options["ignore_index"]
    other = {"group_ids": case.group_ids.long(), "ignore_index": -7, "labels": labels.masked_fill(labels == ignore, -7)}
    view = lay_out(logits, data.draw(st.sampled_from(["padded", "unaligned", "swapped", "shifted"]), label="view"))
    leaf, twin = view.detach().requires_grad_(), copy.deepcopy(case.weights)
    call = {"ref_logps": case.ref_logps, **case.options, **other}
    again = fused_grpo_loss(leaf, group_weights=twin, backend=backend, **call)
    again.loss.backward()
    for name, value in out._asdict().items():
        assert same_bits(getattr(again, name), value), name
    assert same_bits(leaf.grad, grad)
    if isinstance(gw, GroupWeights):
        assert torch.equal(twin.log_alpha, gw.log_alpha)


@drawn(default=10, slow=100, nightly=1_500)
def test_packed_is_padded(data):
    """Tokens bit for bit; sums in another order, so to a rounding."""
    case = padded(data)
    logits, backend = draw_logits(data, case), backend_of(data, case.dtype)
    lengths = torch.randint(0, case.rows[1] + 1, (case.sequences,), generator=case.rng)
    inside = torch.arange(case.rows[1]) < lengths.unsqueeze(1)
    labels = case.labels.where(inside, case.options["ignore_index"])
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    options = {name: case.options[name] for name in ("ignore_index", "shift")} | {"backend": backend}
    whole = token_logps(logits, labels, **options)
    packed = token_logps(logits[inside], labels[inside], cu_seqlens=cu_seqlens, **options)
    assert same_bits(packed, whole[inside])
    assert not whole[~inside].any()
    sums = sequence_logps(logits, labels, **options)
    again = sequence_logps(logits[inside], labels[inside], cu_seqlens=cu_seqlens, **options)
    assert ((sums - again).abs() <= epsilon(case.dtype) * sums.abs()).all()


@drawn(default=10, slow=100, nightly=1_500)
def test_micro_batches_observe_what_the_whole_batch_does(data):
    case = padded(data)
    sums = (-30 * torch.rand(case.sequences, generator=case.rng)).requires_grad_()
    sizes = torch.randint(1, 9, (64,), generator=case.rng)
    estimator = data.draw(st.sampled_from(["importance", "group_mean"]), label="estimator")
    whole, parts = (GroupWeights.robust(sizes, 0.5, estimator=estimator) for _ in range(2))
    names = ("beta", "loss_type", "label_smoothing")
    options = {name: case.options[name] for name in names}
    out = preference_loss(sums, None, case.group_ids, whole, **options)
    with parts.accumulate():
        for some in torch.randperm(case.pairs, generator=case.rng).tensor_split(3):
            rows = torch.cat([some, some + case.pairs])
            preference_loss(sums[rows], None, case.group_ids[some], parts, **options)
    parts.step()
    size = 0.5 * out.losses.double().abs().sum().item() * sizes.sum().item() / max(case.pairs, 1)
    torch.testing.assert_close(parts.log_alpha, whole.log_alpha, rtol=1e-13, atol=1e-14 * (1 + size))


@drawn(default=20, slow=200, nightly=3_000)
def test_alpha_stays_on_the_simplex_and_steps_add_up(data):
    """Two steps are one of the sum, in either order; a number added to all losses changes nothing."""
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    groups = data.draw(st.sampled_from([1, 2, 3, 30, 1000]), label="groups")
    rate = data.draw(st.sampled_from([0.0, 5e-7, 0.01, 1.0, 10.0]), label="group_lr")
    size = 10.0 ** data.draw(st.integers(-8, 4), label="log10 of the losses")
    start = (3 * torch.randn(groups, generator=rng, dtype=torch.float64)).log_softmax(0)
    first, second = size * torch.rand(2, groups, generator=rng, dtype=torch.float64)
    one = exponentiated_step(exponentiated_step(start, first, rate), second, rate)
    other = exponentiated_step(exponentiated_step(start, second, rate), first, rate)
    both = exponentiated_step(start, first + second, rate)
    offset = exponentiated_step(start, first + second + size, rate)
    off = 2.0**-50 * (20 + 4 * rate * size)
    for end in (one, other, both, offset):
        assert end.isfinite().all()
        assert abs(end.exp().sum().item() - 1) < 1e-12
        assert (end - both).abs().max() <= off
    # Whoever had at least as much and loses at least as much keeps at least as much.
    worst = first.argmax()
    assert exponentiated_step(start, first, rate)[worst] >= start[worst] - off
