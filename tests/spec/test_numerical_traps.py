"""Where numbers run out: impossible words, logits of ±1e4, vocabularies and replies of a size, losses of 1e4.

From logits and through the head, on every backend that can run here.
"""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from drawn_cases import BACKENDS

from grpo_kernels import (
    GroupWeights,
    fused_grpo_loss,
    fused_linear_grpo_loss,
    linear_sequence_logps,
    linear_token_logps,
    preference_loss,
    sequence_logps,
    token_logps,
)
from grpo_kernels.head import plan as linear_plan

HERE = [name for name in BACKENDS if name != "auto"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BUDGETS = [0, 3_000, 10**9]
ONE = torch.zeros(1, dtype=torch.int64), torch.ones(1)
"""Group ids and weights of one pair."""

# float64 is plain PyTorch's.
TAKEN = [(name, dtype) for name in HERE for dtype in DTYPES if name == "torch" or dtype != torch.float64]

every_backend = pytest.mark.parametrize("backend", HERE)
every_dtype = pytest.mark.parametrize(("backend", "dtype"), TAKEN, ids=lambda x: str(x).removeprefix("torch."))
every_budget = pytest.mark.parametrize("budget", BUDGETS)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(linear_plan, "_LEAST_WORDS", 16)
    monkeypatch.setattr(linear_plan, "_MOST_WORDS", 16)
    monkeypatch.setattr(linear_plan, "_WORDS_MULTIPLE", 1)


def leaf(x):
    return x.detach().clone().requires_grad_()


# ---- words that cannot be


@every_dtype
@pytest.mark.parametrize("words", [1, 2, 50, 2000])
def test_a_word_that_is_alone_possible_is_certain_and_has_no_gradient(backend, dtype, words):
    z = torch.full((2, 3, words), -torch.inf, dtype=dtype)
    z[..., words // 2] = 3.0
    z.requires_grad_()
    labels = torch.full((2, 3), words // 2)
    out = fused_grpo_loss(z, labels, None, *ONE, backend=backend)
    out.loss.backward()
    assert out.policy_logps.tolist() == [0.0, 0.0]
    assert not z.grad.any()


@every_dtype
@every_budget
def test_a_word_that_is_alone_possible_through_the_head(backend, dtype, budget, small_tiles):
    """Padding words of a vocabulary are masked by a bias of -inf."""
    hidden, weight = leaf(torch.randn(2, 3, 4).to(dtype)), leaf(torch.randn(50, 4).to(dtype))
    bias = torch.full((50,), -torch.inf, dtype=dtype)
    bias[33] = 0
    bias.requires_grad_()
    out = linear_token_logps(
        hidden, weight, torch.full((2, 3), 33), bias=bias, memory_budget=budget, backend=backend
    )  # fmt: skip
    out.sum().backward()
    assert not out.any()
    assert not any(x.grad.any() for x in (hidden, weight, bias))


@every_dtype
@every_budget
def test_masked_words_have_no_probability_and_no_gradient_through_the_head(backend, dtype, budget, small_tiles):
    hidden, weight, labels = torch.randn(2, 3, 4).to(dtype), torch.randn(50, 4).to(dtype), torch.randint(0, 40, (2, 3))
    bias = torch.zeros(50, dtype=dtype)
    bias[40:] = -torch.inf
    whole = leaf(hidden), leaf(weight), leaf(bias)
    cut = leaf(hidden), leaf(weight[:40])
    out = linear_token_logps(*whole[:2], labels, bias=whole[2], memory_budget=budget, backend=backend)
    without = linear_token_logps(*cut, labels, memory_budget=budget, backend=backend)
    out.sum().backward()
    without.sum().backward()
    step = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, without, rtol=step, atol=step)
    torch.testing.assert_close(whole[0].grad, cut[0].grad, rtol=step, atol=step)
    torch.testing.assert_close(whole[1].grad[:40], cut[1].grad, rtol=step, atol=step)
    assert not whole[1].grad[40:].any()
    assert not whole[2].grad[40:].any()


@every_backend
@pytest.mark.parametrize("reply", ["chosen", "rejected"])
def test_an_impossible_reply_is_a_loss_without_end_or_none_and_no_step_of_alpha(backend, reply):
    z = torch.zeros(2, 3, 5)
    z[0 if reply == "chosen" else 1, 0, 1] = -torch.inf
    z.requires_grad_()
    gw = GroupWeights.robust([1], 0.1)
    out = fused_grpo_loss(z, torch.ones(2, 3, dtype=torch.int64), None, ONE[0], gw, backend=backend)
    out.loss.backward()
    assert out.loss.item() == (math.inf if reply == "chosen" else 0.0)
    assert z.grad.isfinite().all()
    assert (int(gw.num_updates), int(gw.num_skipped)) == ((0, 1) if reply == "chosen" else (1, 0))


# ---- large numbers


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("base", [1e4, -1e4])
@pytest.mark.parametrize("spread", [0.0, 16.0, 2e4])
def test_logits_of_ten_thousand(backend, dtype, base, spread):
    z = (base + spread * torch.linspace(-1, 1, 300)).to(dtype).expand(2, 5, 300).contiguous().requires_grad_()
    labels = torch.tensor([[0, 1, 150, 298, 299]] * 2)
    out = token_logps(z, labels, shift=False, backend=backend)
    out.sum().backward()
    exact = z.detach().double().log_softmax(-1)
    logps = exact.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert ((out - logps).abs() <= 2.0**-22 * (8 + logps.abs())).all()
    truth = torch.nn.functional.one_hot(labels, 300) - exact.exp()
    # z - lse at |lse| = 3e4 is held to 2^-10; what is stored is rounded to the dtype.
    assert ((z.grad - truth).abs() <= (2.0**-9 + torch.finfo(dtype).eps) * exact.exp() + torch.finfo(dtype).eps).all()


@every_backend
@every_budget
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits_of_ten_thousand_through_the_head(backend, budget, dtype, softcap, small_tiles):
    direction = torch.tensor([100.0, 0, 0, 0])
    weight = leaf(torch.cat([direction * torch.linspace(-1, 1, 60).unsqueeze(1), torch.randn(10, 4)]).to(dtype))
    hidden = leaf(torch.stack([direction, -direction, direction]).expand(2, 3, 4).to(dtype))
    labels = torch.tensor([[59, 0, 3], [0, 59, 65]])
    out = linear_token_logps(
        hidden, weight, labels, shift=False, softcap=softcap, memory_budget=budget, backend=backend
    )  # fmt: skip
    out.sum().backward()
    x, y = leaf(hidden.double()), leaf(weight.double())
    z = x @ y.t()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    truth = z.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    truth.sum().backward()
    # A logit of 1e4 is rounded to the dtype before it is exponentiated; neighbours here are 340 apart.
    assert ((out - truth).abs() <= 2 * torch.finfo(dtype).eps * 1e4 * (1 if softcap is None else 0.01) + 1e-3).all()
    for mine, exact in ((hidden.grad, x.grad), (weight.grad, y.grad)):
        assert mine.isfinite().all()
        assert ((mine - exact).abs() <= 8 * torch.finfo(dtype).eps * (100 + exact.abs())).all()


@every_backend
@every_budget
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_flat_row_over_weights_with_a_mean(backend, budget, dtype):
    """Sixteen thousand exponentials of 1 times weights of 6 is more than float16 holds, were they added up in it."""
    hidden, weight = leaf(torch.zeros(2, 1, 4, dtype=dtype)), leaf(torch.full((16_384, 4), 6.0, dtype=dtype))
    out = linear_sequence_logps(
        hidden, weight, torch.zeros(2, 1, dtype=torch.int64), shift=False, memory_budget=budget, backend=backend
    )  # fmt: skip
    out.sum().backward()
    assert ((out + math.log(16_384)).abs() < 1e-5).all()
    # (1 - p) W[y] - sum of the others: 0, but for the rounding of 6 and of the sum.
    assert (hidden.grad.abs() <= 6 * torch.finfo(dtype).eps).all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [100.0, -100.0])
def test_an_ipo_loss_of_ten_thousand(dtype, gap):
    """m - 1/(2 beta) = ±100: a loss of 1e4, a slope of ±200, and a step of alpha at any rate."""
    logps = torch.tensor([gap + 5, gap + 5, 0.0, 0.0], dtype=dtype, requires_grad=True)
    gw = GroupWeights.robust([3, 1], 10.0, estimator="group_mean")
    out = preference_loss(logps, None, torch.tensor([0, 0]), gw, beta=0.1, loss_type="ipo")
    out.loss.backward()
    assert out.losses.tolist() == [1e4, 1e4]
    assert gw.weights.tolist() == [1.0, 0.0]
    assert logps.grad.tolist() == pytest.approx([gap * 4 / 3, gap * 4 / 3, -gap * 4 / 3, -gap * 4 / 3])
    assert gw.log_alpha.tolist() == [0.0, -1e5]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_ipo_loss_of_ten_thousand_from_logits(backend, dtype):
    z = torch.zeros(2, 6, 9, dtype=dtype)
    z[0, :, 0] = 21.0  # 5 words of about -21 each against 5 of -log 9: a margin near -94
    z.requires_grad_()
    labels = torch.ones(2, 6, dtype=torch.int64)
    out = fused_grpo_loss(z, labels, None, *ONE, beta=0.1, loss_type="ipo", backend=backend)
    out.loss.backward()
    exact = z.detach().double().log_softmax(-1)[:, :-1, 1].sum(-1)
    gap = (exact[0] - exact[1] - 5).item()
    assert 9e3 < gap**2 < 1.1e4
    assert out.loss.item() == pytest.approx(gap**2, rel=1e-6)
    onehot = torch.nn.functional.one_hot(labels, 9)
    truth = 2 * gap * torch.tensor([1.0, -1.0]).view(2, 1, 1) * (onehot - z.detach().double().softmax(-1))
    truth[:, -1] = 0
    torch.testing.assert_close(z.grad.double(), truth, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)


# ---- sizes


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_vocabulary_of_256k(backend, dtype):
    words = 262_144
    z = leaf((3 * torch.randn(2, 3, words)).to(dtype))
    labels = torch.tensor([[0, words - 1, 131_072], [5, 262_143, 1]])
    out = fused_grpo_loss(z, labels, None, *ONE, backend=backend)
    out.loss.backward()
    exact = z.detach().double().log_softmax(-1)
    logps = exact[:, :-1].gather(-1, labels[:, 1:].unsqueeze(-1)).sum((1, 2))
    assert ((out.policy_logps - logps).abs() <= 2.0**-22 * (4 + logps.abs())).all()
    c = -0.1 * torch.sigmoid(-0.1 * (logps[0] - logps[1]))
    c = c * torch.tensor([1.0, -1.0]).view(2, 1, 1)
    onehot = torch.zeros_like(exact[:, :-1]).scatter_(-1, labels[:, 1:].unsqueeze(-1), 1.0)
    truth = c * (onehot - exact[:, :-1].exp())
    room = (torch.finfo(dtype).eps + 2.0**-18) * truth.abs()
    assert ((z.grad[:, :-1] - truth).abs() <= room + 1e-12).all()
    assert not z.grad[:, -1].any()


@every_backend
@every_budget
def test_a_vocabulary_of_256k_through_the_head(backend, budget):
    hidden, weight = torch.randn(2, 3, 8), torch.randn(262_144, 8)
    labels = torch.tensor([[0, 262_143, 131_072], [5, 262_143, 1]])
    check_against_plain(hidden, weight, labels, budget, backend)


def check_against_plain(hidden, weight, labels, budget, backend):
    """In the norm, at most what plain PyTorch's float32 is off by, and four of its roundings."""

    def plain(hidden, weight):
        logps = (hidden @ weight.t()).log_softmax(-1)[:, :-1]
        return logps.gather(-1, labels[:, 1:].unsqueeze(-1)).squeeze(-1).sum(-1)

    def head(hidden, weight):
        return linear_sequence_logps(hidden, weight, labels, memory_budget=budget, backend=backend)

    results = []
    for function, dtype in ((plain, torch.float64), (plain, torch.float32), (head, torch.float32)):
        leaves = leaf(hidden.to(dtype)), leaf(weight.to(dtype))
        out = function(*leaves)
        out.sum().backward()
        results.append([x.double() for x in (out.detach(), leaves[0].grad, leaves[1].grad)])
    for exact, theirs, mine in zip(*results, strict=True):
        allowed = (theirs - exact).norm() + 4 * torch.finfo(torch.float32).eps * exact.norm()
        assert (mine - exact).norm() <= allowed


@every_backend
@pytest.mark.parametrize("packed", [False, True])
def test_replies_of_32k_words(backend, packed):
    """Sums of 32,768 float32 numbers near -3, taken in float64: off by the roundings of the numbers, not of sums."""
    length = 32_768
    z, labels = torch.randn(2, length, 17), torch.randint(0, 17, (2, length))
    labels[1, 30_000:] = -100
    truth = token_logps(z.double(), labels).sum(-1)
    layout = {}
    if packed:
        z, labels = z.flatten(0, 1), labels.flatten()
        layout = {"cu_seqlens": torch.tensor([0, length, 2 * length], dtype=torch.int32)}
    z = leaf(z)
    sums = sequence_logps(z, labels, **layout, backend=backend)
    out = fused_grpo_loss(z, labels, sums.detach(), *ONE, **layout, backend=backend)
    out.loss.backward()
    # A random walk of roundings, and the last one, to float32.
    assert ((sums - truth).abs() <= 2.0**-24 * truth.abs() + 2.0**-22 * 3 * length**0.5).all()
    assert out.loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert z.grad.isfinite().all()
    assert not z.grad.view(2, length, 17)[1, 30_000:].any()


@every_backend
@every_budget
def test_replies_of_32k_words_through_the_head(backend, budget):
    check_against_plain(
        torch.randn(2, 32_768, 4), torch.randn(40, 4), torch.randint(0, 40, (2, 32_768)), budget, backend
    )


@pytest.mark.slow
def test_256k_words_and_32k_tokens_through_the_head():
    """34 GB of bfloat16 logits that never are; a frozen head of 4 features, so that what takes time is the words."""
    words, length = 262_144, 32_768
    hidden, weight = leaf(torch.randn(2, length, 4).bfloat16()), torch.randn(words, 4).bfloat16()
    labels = torch.randint(0, words, (2, length))
    labels[:, 9:99] = -100
    out = linear_token_logps(hidden, weight, labels)
    out.sum().backward()
    rows = torch.tensor([0, 7, length // 2, length - 2])
    z = hidden[:, rows].detach().double() @ weight.double().t()
    scored = labels[:, rows + 1].unsqueeze(-1)
    truth = z.log_softmax(-1).gather(-1, scored).squeeze(-1)
    # One rounding of a logit to bfloat16.
    assert ((out[:, rows + 1] - truth).abs() <= 2.0**-8 * (1 + z.abs().amax(-1))).all()
    assert hidden.grad.isfinite().all()
    assert not hidden.grad[:, 8:98].any()


@every_backend
def test_rows_behind_the_reach_of_32_bits(backend):
    """First and last rows of (2, 32768, 262144) bfloat16, in 34 GB of addresses behind which there is no memory."""
    words, length = 262_144, 32_768
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, 2 * length * words * 2, flags=flags)
    except OSError as error:
        pytest.skip(f"no 34 GB of addresses: {error}")
    z = torch.frombuffer(memory, dtype=torch.bfloat16).view(2, length, words)[:, :: length - 1]
    z.copy_(torch.randn(2, 2, words))
    labels = torch.tensor([[0, words - 1], [5, 77_777]])
    near = leaf(z)
    token_logps(near, labels, shift=False, backend=backend).sum().backward()
    far = z.requires_grad_()
    out = token_logps(far.view_as(far), labels, shift=False, overwrite_logits=True, backend=backend)
    exact = near.detach().double().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)
    out.sum().backward()
    assert torch.equal(far.detach(), near.grad)


# ---- one pair, and a policy that is its reference

LOSS_AT_ZERO = [
    ("sigmoid", 0.0, math.log(2)),
    ("sigmoid", 0.1, math.log(2)),
    ("robust", 0.0, math.log(2)),
    ("hinge", 0.0, 1.0),
    ("ipo", 0.0, 25.0),
]


@every_dtype
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("loss_type", "smoothing", "value"), LOSS_AT_ZERO)
def test_one_pair_of_a_policy_that_is_its_reference(backend, dtype, normalize, loss_type, smoothing, value):
    z, labels = leaf((3 * torch.randn(2, 300, 40)).to(dtype)), torch.randint(0, 40, (2, 300))
    ref = sequence_logps(z, labels, backend=backend).detach()
    out = fused_grpo_loss(
        z, labels, ref, *ONE, loss_type=loss_type, label_smoothing=smoothing, length_normalize=normalize,
        backend=backend,
    )  # fmt: skip
    out.loss.backward()
    exact = torch.tensor(value, dtype=torch.float64).to(out.loss.dtype)
    assert out.margins.tolist() == [0.0]
    assert out.rewards_chosen.tolist() == [0.0]
    assert abs(out.loss - exact) <= (0 if smoothing == 0 else torch.finfo(out.loss.dtype).eps)
    assert z.grad.isfinite().all()


@every_dtype
@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "learns"])
@pytest.mark.parametrize("budget", [0, 10**9])
def test_one_pair_of_a_policy_that_is_its_reference_through_the_head(backend, dtype, learns, budget):
    """The same bits where the same words are in a tile: with nothing kept for backward, or everything."""
    hidden, weight = (torch.randn(2, 300, 16)).to(dtype), torch.randn(3000, 16).to(dtype)
    labels = torch.randint(0, 3000, (2, 300))
    with torch.no_grad():
        ref = linear_sequence_logps(hidden, weight, labels, backend=backend)
    out = fused_linear_grpo_loss(
        leaf(hidden), weight.requires_grad_(learns), labels, ref, *ONE, memory_budget=budget, backend=backend
    )  # fmt: skip
    assert out.margins.tolist() == [0.0]
    assert out.loss == torch.tensor(2.0, dtype=out.loss.dtype).log()


@every_backend
def test_a_budget_that_keeps_some_words_moves_the_reference_point_by_a_rounding_at_most(backend, small_tiles):
    """Tiles begin where kept words do, and a sum over words has another order."""
    hidden, weight = torch.randn(8, 40, 64) / 4, torch.randn(300, 64) / 8
    labels = torch.randint(0, 300, (8, 40))
    with torch.no_grad():
        ref = linear_sequence_logps(hidden, weight, labels, backend=backend)
    tail = ref, torch.zeros(4, dtype=torch.int64), torch.ones(1)
    for budget in (20_000, 100_000, 300_000):
        out = fused_linear_grpo_loss(hidden, leaf(weight), labels, *tail, memory_budget=budget, backend=backend)
        assert (out.margins.abs() <= 2.0**-23 * (ref[:4].abs() + ref[4:].abs())).all()
