"""One matrix, backend x operation x dtype x shape x layout, against float64 and within an error budget.

The rows' part of the boundary; the pairs' part is in test_preference_tail.py.  See kernel_cases.py for what runs.
"""

import pytest
import torch
from kernel_cases import (
    DTYPES,
    SIGMAS,
    assert_relative_budget,
    assert_within_budget,
    backward,
    case_id,
    forward,
    layouts,
    make_rows,
    matrix,
    oracle,
    places,
    wide,
)

from grpo_kernels.types import IGNORE_INDEX

every_place = pytest.mark.parametrize("place", places(), ids=case_id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=case_id)


def check_against_oracle(place, logits, targets, grads):
    """Forward, lse and backward of one block against float64, with plain float32 PyTorch as the budget.

    Half-precision logits are held to plain PyTorch *in float32*, rounded at the end, which is stricter than what
    PyTorch does in their own dtype.
    """
    exact_logps, exact_grads = oracle(logits, targets, grads)
    plain_logps, plain_grads = oracle(logits, targets, grads, torch.float32)
    labelled = (targets != IGNORE_INDEX).cpu()
    exact_lse = logits.double().logsumexp(-1).flatten().cpu()
    plain_lse = logits.float().logsumexp(-1).flatten().cpu()
    reach = max(logits.double().abs().max().item(), exact_lse.abs().max().item())

    logps, lse = forward(place, logits, targets)
    # A logp is z - max - log(sum) with a sum of 1 or more, whose last bit alone is EPSILON, however small the logp.
    assert_within_budget(logps, plain_logps, exact_logps, max(1.0, exact_logps.abs().max().item()))
    assert_within_budget(lse[labelled], plain_lse[labelled], exact_lse[labelled], exact_lse.abs().max().item())
    assert not logps[~labelled].any()

    gradient = backward(place, logits, targets, lse, grads)
    rounded = plain_grads.to(logits.dtype)
    scale = grads.abs().max().item() * max(1.0, reach)
    assert_within_budget(gradient, rounded, exact_grads, scale)
    is_target = torch.zeros_like(exact_grads, dtype=torch.bool).view(targets.numel(), -1)
    is_target[labelled, targets.cpu()[labelled]] = True
    is_target = is_target.view(gradient.shape).cpu()
    # The target entry has a test of its own: PyTorch's relative error there is no budget to keep.
    others = [x.cpu().masked_fill(is_target, 0) for x in (gradient, rounded, exact_grads)]
    assert_relative_budget(*others, reach)
    assert not gradient.reshape(targets.numel(), -1).cpu()[~labelled].any()


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize(("place", "dtype", "vocabulary"), matrix(), ids=case_id)
def test_rows_within_budget(place, dtype, vocabulary, sigma):
    check_against_oracle(place, *make_rows(place, dtype, (2, 3, vocabulary), sigma))


@every_dtype
@every_place
def test_one_row(place, dtype):
    check_against_oracle(place, *make_rows(place, dtype, (1, 1, wide(place)), 3.0))


@every_dtype
@every_place
def test_layouts(place, dtype):
    logits, targets, grads = make_rows(place, dtype, (3, 4, wide(place)), 3.0)
    for view in layouts(logits).values():
        check_against_oracle(place, view, targets, grads)


@every_dtype
@every_place
def test_layout_of_the_gradient_is_its_own(place, dtype):
    logits, targets, grads = make_rows(place, dtype, (3, 4, wide(place)), 3.0)
    _, lse = forward(place, logits, targets)
    expected = backward(place, logits, targets, lse, grads)
    for name, out in layouts(torch.zeros_like(logits)).items():
        for view in layouts(logits).values():
            out.fill_(torch.nan)
            assert torch.equal(backward(place, view, targets, lse, grads, out), expected), name


@every_place
def test_rows_outside_a_view_stay_as_they_are(place):
    """Neighbouring memory is neither read (NaN would spread) nor written."""
    logits, targets, grads = make_rows(place, torch.bfloat16, (2, 3, 33), 3.0)
    buffer = logits.new_full((2, 5, 40), torch.nan)
    inner = buffer[:, 1:4, 5:38]
    inner.copy_(logits)
    logps, lse = forward(place, inner, targets)
    assert logps.isfinite().all()
    backward(place, inner, targets, lse, grads, inner)
    assert inner.isfinite().all()
    assert buffer.isnan().sum() == buffer.numel() - inner.numel()


@every_place
def test_one_row_for_all_sequences(place):
    """A stride of 0, as an expanded tensor has."""
    logits, targets, grads = make_rows(place, torch.float32, (1, 3, 100), 3.0)
    check_against_oracle(place, logits.expand(4, 3, 100), targets.repeat(4), grads.repeat(4))


@every_dtype
@every_place
def test_large_logits(place, dtype):
    logits, targets, grads = make_rows(place, dtype, (2, 3, wide(place)), 3.0)
    base = torch.tensor([1e4, -1e4, 0.0], device=logits.device).to(dtype).view(1, 3, 1)
    check_against_oracle(place, (logits.float() + base.float()).to(dtype), targets, grads)
    spread = torch.linspace(-1e4, 1e4, wide(place), device=logits.device).to(dtype).expand(2, 3, -1)
    for rows in (spread, spread.flip(-1)):
        check_against_oracle(place, rows.contiguous(), targets, grads)


@every_dtype
@every_place
def test_confident_target_keeps_its_gradient(place, dtype):
    """At p = 0.999 and beyond the entry 1 - p must not be rounded away, whatever the dtype of the logits."""
    vocabulary = wide(place)
    logits = torch.zeros(1, 4, vocabulary, dtype=dtype, device=place.device)
    targets = torch.full((4,), 7, device=place.device)
    top = torch.tensor([4.0, 8.0, 12.0, 16.0], device=place.device) + 5
    logits[0, :, 7] = top.to(dtype)
    grads = torch.ones(4, device=place.device)
    _, lse = forward(place, logits, targets)
    got = backward(place, logits, targets, lse, grads)[0, :, 7].double().cpu()
    exact = -torch.expm1(torch.log_softmax(logits.double(), -1)[0, :, 7]).cpu()
    # lse is rounded to float32 at a size of 21, and that is all that separates the two before the last rounding.
    error = (got - exact).abs() - 21 * 2.0**-24
    assert (error <= exact * torch.finfo(dtype).eps).all(), (got, exact)


SPECIAL_ROWS = {
    "all -inf": lambda z: z.fill_(-torch.inf),
    "some -inf": lambda z: z[5:].fill_(-torch.inf),
    "all -inf but one": lambda z: (z.fill_(-torch.inf), z[3].fill_(2.0)),
    "-inf at the target": lambda z: z[3].fill_(-torch.inf),
    "+inf": lambda z: z[-1].fill_(torch.inf),
    "+inf at the target": lambda z: z[3].fill_(torch.inf),
    "+inf and -inf": lambda z: (z[0].fill_(torch.inf), z[1].fill_(-torch.inf)),
    "NaN first": lambda z: z[0].fill_(torch.nan),
    "NaN last": lambda z: z[-1].fill_(torch.nan),
    "NaN at the target": lambda z: z[3].fill_(torch.nan),
    "all NaN": lambda z: z.fill_(torch.nan),
    "all equal": lambda z: z.fill_(1.5),
    "lowest finite": lambda z: z.fill_(torch.finfo(z.dtype).min),
}


@pytest.mark.parametrize("vocabulary", [5, 130])
@every_dtype
@every_place
def test_special_rows_come_out_as_from_torch(place, dtype, vocabulary):
    logits, _, _ = make_rows(place, dtype, (len(SPECIAL_ROWS), 1, vocabulary), 3.0)
    for row, spoil in zip(logits[:, 0], SPECIAL_ROWS.values(), strict=True):
        spoil(row)
    targets = torch.full((len(SPECIAL_ROWS),), 3, device=place.device)
    grads = torch.linspace(-1, 1, len(SPECIAL_ROWS), device=place.device)
    logps, lse = forward(place, logits, targets)
    gradient = backward(place, logits, targets, lse, grads).cpu().float()
    expected_logps, expected_gradient = oracle(logits, targets, grads, torch.float32)
    for i, name in enumerate(SPECIAL_ROWS):
        torch.testing.assert_close(logps[i].cpu(), expected_logps[i], equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
        if name == "lowest finite":
            continue  # lse in float32 has no room for log V beside 3e38, and logits are held to 1e4
        want = expected_gradient[i].to(dtype).float()
        torch.testing.assert_close(
            gradient[i], want, equal_nan=True, rtol=2 * torch.finfo(dtype).eps, atol=1e-6,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


@every_dtype
@every_place
def test_ignored_rows_are_not_read(place, dtype):
    logits, targets, grads = make_rows(place, dtype, (2, 5, wide(place)), 3.0)
    ignored = targets == IGNORE_INDEX
    assert ignored.any()
    clean_logps, clean_lse = forward(place, logits, targets)
    clean_gradient = backward(place, logits, targets, clean_lse, grads)
    logits.view(10, -1)[ignored] = torch.nan
    grads[ignored] = torch.nan
    logps, lse = forward(place, logits, targets)
    lse[ignored] = torch.nan  # unspecified there, so nothing may depend on it
    gradient = backward(place, logits, targets, lse, grads)
    assert torch.equal(logps, clean_logps)
    assert torch.equal(gradient, clean_gradient)
    assert not gradient.reshape(10, -1)[ignored].any()


@every_dtype
@every_place
def test_labels_out_of_range_are_nan(place, dtype):
    vocabulary = wide(place)
    logits, _, grads = make_rows(place, dtype, (1, 7, vocabulary), 3.0)
    labels = [0, -1, vocabulary - 1, vocabulary, 2**62, -(2**62), IGNORE_INDEX]
    targets = torch.tensor(labels, device=place.device)
    bad = torch.tensor([not 0 <= y < vocabulary and y != IGNORE_INDEX for y in labels])
    logps, lse = forward(place, logits, targets)
    gradient = backward(place, logits, targets, lse, grads)[0].cpu()
    assert torch.equal(logps.isnan().cpu(), bad)
    assert torch.equal(gradient.isnan().all(-1), bad)
    assert gradient[~bad].isfinite().all()


@every_dtype
@every_place
def test_in_place_is_out_of_place(place, dtype):
    logits, targets, grads = make_rows(place, dtype, (3, 4, wide(place)), 8.0)
    for view in layouts(logits).values():
        _, lse = forward(place, view, targets)
        expected = backward(place, view, targets, lse, grads)
        backward(place, view, targets, lse, grads, view)
        assert torch.equal(view, expected)


@every_dtype
@every_place
def test_in_place_is_out_of_place_beyond_the_cache(place, dtype):
    """Large outputs may be written by other instructions (streaming stores), from any alignment."""
    if place.interpreted:
        pytest.skip("the interpreter has no cache to go past")
    rows = 36 << 20 >> (3 if dtype is torch.float32 else 2)
    logits, targets, grads = make_rows(place, dtype, (1, rows // 32001, 32001), 3.0)
    _, lse = forward(place, logits, targets)
    out = torch.empty(logits.numel() + 1, dtype=dtype, device=place.device)[1:].view(logits.shape)
    backward(place, logits, targets, lse, grads, out)
    backward(place, logits, targets, lse, grads, logits)
    assert torch.equal(logits, out)


@every_dtype
@every_place
def test_same_bits_on_every_run_and_any_number_of_threads(place, dtype, threads):
    logits, targets, grads = make_rows(place, dtype, (4, 16, wide(place)), 8.0)
    seen = []
    for count in (1, 4, 4, 3):
        threads(count)
        logps, lse = forward(place, logits, targets)
        labelled = targets != IGNORE_INDEX
        seen.append((logps, lse[labelled], backward(place, logits, targets, lse, grads)))
    for again in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], again, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (0, 0, 5)])
@every_place
def test_no_rows(place, shape):
    logits = torch.empty(shape, device=place.device)
    targets = torch.empty(0, dtype=torch.int64, device=place.device)
    logps, lse = forward(place, logits, targets)
    assert logps.numel() == 0
    backward(place, logits, targets, lse, logps)
