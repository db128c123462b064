"""The head's tiles and its plan: each backend's tile operations, every budget, the error budget, promises of memory."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import linear_token_logps
from grpo_kernels.backends import available_backends, choose
from grpo_kernels.head import linear_head
from grpo_kernels.head import plan as linear_plan
from grpo_kernels.head.plan import make_plan

CPU = torch.device("cpu")
BACKENDS = [name for name in ("torch", "cpu") if available_backends()[name] is None]
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of this many words, whatever the cache would hold, so that small tests cross many of them."""

    def set_words(words: int) -> None:
        monkeypatch.setattr(linear_plan, "_LEAST_WORDS", words)
        monkeypatch.setattr(linear_plan, "_MOST_WORDS", words)
        monkeypatch.setattr(linear_plan, "_WORDS_MULTIPLE", 1)

    return set_words


def plain(hidden, weight, labels, bias=None, softcap=None, logit_scale=1.0):
    """The definition, in the dtype that came in; labels belong to their own row."""
    z = hidden @ weight.t()
    z = logit_scale * (z if bias is None else z + bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logps = z.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels == -100, 0.0, logps)


def draw(rows, width, vocabulary, sigma, *, confident=0.5, seed=0):
    """float64 rows whose logits spread by sigma; a share of the labels is the likeliest word."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, rows, width, generator=rng, dtype=torch.float64) * sigma
    weight = torch.randn(vocabulary, width, generator=rng, dtype=torch.float64) / width**0.5
    labels = torch.randint(0, vocabulary, (1, rows), generator=rng)
    best = (hidden @ weight.t()).argmax(-1)
    labels = torch.where(torch.rand(1, rows, generator=rng) < confident, best, labels)
    labels[0, :: max(rows // 5, 1)] = -100
    grads = torch.randn(1, rows, generator=rng, dtype=torch.float64) * 1e-2
    return hidden, weight, labels, grads


def gradients(function, grads, *leaves):
    """The value of the function at fresh leaves, and its gradients."""
    leaves = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    return value, *torch.autograd.grad(value, [leaf for leaf in leaves if leaf is not None], grads.to(value.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    ("softcap", "logit_scale", "biased"), [(0.0, 1.0, False), (5.0, 0.5, True), (30.0, 1.0, False)]
)
@pytest.mark.parametrize("words", [1, 63, 200])
def test_tile_operations_against_their_definition(backend, dtype, softcap, logit_scale, biased, words):
    rows, start = 9, 40
    x = (4 * torch.randn(rows, words)).to(dtype)
    bias = torch.randn(words) if biased else None
    targets = torch.tensor([40, 40 + words - 1, 0, 39, 40 + words, 10**6, -7, 40 + words // 2, 40])
    top, rest = torch.randn(rows), torch.rand(rows) + 0.5
    z = x.double() if bias is None else x.double() + bias.double()
    z = softcap * torch.tanh(z * logit_scale / softcap) if softcap else z * logit_scale
    slope = 1 - (z / softcap) ** 2 if softcap else torch.ones_like(z)
    inside = (targets >= start) & (targets < start + words)
    local = torch.where(inside, targets - start, 0).unsqueeze(1)
    others = z.scatter(1, local, torch.where(inside.unsqueeze(1), -torch.inf, z.gather(1, local)))
    new_top = torch.maximum(top.double(), others.amax(1))
    factor = torch.exp(top.double() - new_top)
    exps = torch.exp(others - new_top.unsqueeze(1))
    new_rest = rest.double() * factor + exps.sum(1)

    state = top.clone(), rest.clone(), torch.full((rows,), 7.0), torch.empty(rows)
    tile = x.clone()
    options = {"start": start, "softcap": softcap, "logit_scale": logit_scale}
    choose(backend, CPU, dtype).head_tile_fwd(tile, bias, targets, *state, tile, **options, shift=3)
    near = {"rtol": 2e-5, "atol": 2e-5}
    half = {"rtol": 2e-5 + torch.finfo(dtype).eps, "atol": 1e-6 + torch.finfo(dtype).tiny}
    torch.testing.assert_close(state[0].double(), new_top, **near)
    torch.testing.assert_close(state[1].double(), new_rest, **near)
    picked = torch.where(inside, z.gather(1, local).squeeze(1), 7.0)
    torch.testing.assert_close(state[2].double(), picked, **near)
    torch.testing.assert_close(state[3].double(), factor, **near)
    torch.testing.assert_close(tile.double(), torch.where(exps > 0, exps * slope / 8, 0.0), **half)

    without = top.clone(), rest.clone(), torch.full((rows,), 7.0), torch.empty(rows)
    choose(backend, CPU, dtype).head_tile_fwd(x.clone(), bias, targets, *without, None, **options, shift=0)
    assert all(torch.equal(a, b) for a, b in zip(state, without, strict=True))

    scale, at_target = torch.randn(rows), torch.randn(rows)
    grads = x.clone()
    choose(backend, CPU, dtype).head_tile_bwd(grads, bias, targets, state[0], scale, at_target, grads, **options)
    expected = scale.double().unsqueeze(1) * exps
    expected = expected.scatter(
        1, local, torch.where(inside.unsqueeze(1), at_target.double().unsqueeze(1), expected.gather(1, local))
    )
    torch.testing.assert_close(grads.double(), expected * slope, **half)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("whole_row", [False, True])
def test_bad_logits_answer_as_log_softmax_does(backend, value, whole_row, small_tiles):
    small_tiles(8)
    weight = torch.eye(24)
    hidden = torch.randn(1, 5, 24)
    labels = torch.tensor([[3, 9, 9, 20, 23]])
    hidden[0, 1, :] = value if whole_row else hidden[0, 1, :]
    bias = None
    if not whole_row:
        bias = torch.zeros(24)
        bias[9] = value
    with torch.no_grad():
        expected = plain(hidden.nan_to_num(0, 0, 0), weight, labels, bias)
        if whole_row:
            expected[0, 1] = torch.nan
        actual = linear_token_logps(hidden, weight, labels, bias=bias, shift=False, backend=backend)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("sigma", [3.0, 8.0])
@pytest.mark.parametrize("budget", [0, 300_000, 10**9])
def test_errors_are_at_most_those_of_plain_pytorch(backend, dtype, sigma, budget, small_tiles):
    """Against float64, in the norm; what is added is one rounding of the dtype (half precision), four of float32."""
    small_tiles(512)
    hidden, weight, labels, grads = draw(120, 64, 4000, sigma)
    hidden, weight = hidden.to(dtype).double(), weight.to(dtype).double()
    exact = gradients(lambda h, w: plain(h, w, labels), grads, hidden, weight)
    eager = gradients(lambda h, w: plain(h, w, labels), grads, hidden.to(dtype), weight.to(dtype))
    ours = gradients(
        lambda h, w: linear_token_logps(h, w, labels, shift=False, memory_budget=budget, backend=backend),
        grads, hidden.to(dtype), weight.to(dtype),
    )  # fmt: skip
    epsilon = torch.finfo(dtype).eps * (0.5 if dtype in HALVES else 4)
    for what, truth, theirs, mine in zip(("logps", "hidden", "weight"), exact, eager, ours, strict=True):
        error = (mine.double() - truth).norm() / truth.norm()
        allowed = (theirs.double() - truth).norm() / truth.norm() + epsilon
        assert error <= allowed, f"{what}: {error:.2e} where plain PyTorch has {allowed - epsilon:.2e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [0, 10**9])
def test_confident_rows_keep_their_gradient(backend, dtype, budget, small_tiles):
    """At p = 1 - 1e-5 the one-hot part and p cancel all but 1e-5 of it; both gradients keep the digits of the dtype."""
    small_tiles(16)
    weight = torch.zeros(50, 4)
    weight[:, 0] = torch.linspace(0, 0.5, 50)
    weight[7, 1] = 1.0
    hidden = torch.zeros(1, 3, 4)
    hidden[0, :, 1] = torch.tensor([16.0, 15.5, 15.0])
    hidden[0, :, 0] = 1.0
    labels = torch.full((1, 3), 7)
    weight, hidden = weight.bfloat16().to(dtype), hidden.to(dtype)
    grads = torch.ones(1, 3)
    exact = gradients(lambda h, w: plain(h, w, labels), grads, hidden.double(), weight.double())
    ours = gradients(
        lambda h, w: linear_token_logps(h, w, labels, shift=False, memory_budget=budget, backend=backend),
        grads, hidden, weight,
    )  # fmt: skip
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-5
    for truth, mine in zip(exact[1:], ours[1:], strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=tolerance, atol=tolerance * truth.abs().max().item())
        assert truth.abs().max() < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", [0, 17, 40])
def test_a_kept_tile_far_below_the_final_top_keeps_its_target(backend, low, small_tiles):
    """The target's tile was stored in the scale of a top that later rose by hundreds of nats."""
    small_tiles(8)
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 6, 16), torch.randn(48, 16) * 0.1
    offset = torch.zeros(48)
    offset[low % 41 : low % 41 + 8] -= 400
    offset[40:] += 90
    labels = torch.randint(0, 48, (1, 6))
    grads = torch.randn(1, 6)
    exact = gradients(lambda h, w, b: plain(h, w, labels, b), grads, hidden.double(), weight.double(), offset.double())
    ours = gradients(
        lambda h, w, b: linear_token_logps(h, w, labels, bias=b, shift=False, memory_budget=10**9, backend=backend),
        grads, hidden, weight, offset,
    )  # fmt: skip
    for truth, mine in zip(exact, ours, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_plan_gives_the_same_and_the_same_bits_again(backend, small_tiles):
    small_tiles(200)
    hidden, weight, labels, grads = (x.float() if x.is_floating_point() else x for x in draw(40, 32, 1000, 3.0))

    def run(h, w, budget):
        value = linear_token_logps(h, w, labels, shift=False, memory_budget=budget, backend=backend)
        leaves = [leaf for leaf in (h, w) if leaf.requires_grad]
        return value.detach(), *(torch.autograd.grad(value, leaves, grads) if leaves else ())

    leaf_h, leaf_w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    first = run(leaf_h, leaf_w, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, run(leaf_h, leaf_w, 0), strict=True))
    for budget in (32 * 4 * 100, 32 * 4 * 450, 10**9, 1e-5, "auto"):
        kept = run(leaf_h, leaf_w, budget)
        assert all(torch.equal(a, b) for a, b in zip(kept, run(leaf_h, leaf_w, budget), strict=True))
        for a, b in zip(first, kept, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
    frozen, only_weight = run(leaf_h, weight, 0), run(hidden, leaf_w, 0)
    assert torch.equal(frozen[0], first[0])
    assert torch.equal(frozen[1], first[1])
    torch.testing.assert_close(only_weight[1], first[2], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(run(hidden, weight, 0)[0], first[0], rtol=2e-6, atol=2e-6)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="_cpu is not built")
@pytest.mark.parametrize("shift", [0, 64])
def test_threads_do_not_change_the_bits_of_a_tile(threads, shift):
    x = torch.randn(64, 999).bfloat16()
    targets = torch.randint(0, 999, (64,))
    results = []
    for count in (1, 3):
        threads(count)
        state = torch.zeros(64), torch.zeros(64), torch.zeros(64), torch.empty(64)
        tile = x.clone()
        choose("cpu", CPU, x.dtype).head_tile_fwd(
            tile, None, targets, *state, tile, start=0, softcap=0.0, logit_scale=1.0, shift=shift
        )
        results.append((*state, tile))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Allocations(TorchDispatchMode):
    """The largest tensor that any operation brings into being, in elements."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.dtype.itemsize)
        return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [True, False])
def test_nothing_of_the_size_of_logits_or_weight_is_allocated(backend, frozen, small_tiles):
    """With a frozen head no V x H and no rows x V; with one that trains its gradient alone, V x H."""
    small_tiles(64)
    rows, width, vocabulary = 96, 32, 4096
    hidden, weight = torch.randn(1, rows, width).requires_grad_(), torch.randn(vocabulary, width)
    weight.requires_grad_(not frozen)
    labels = torch.randint(0, vocabulary, (1, rows))
    with Allocations() as seen:
        linear_token_logps(hidden, weight, labels, shift=False, memory_budget=0, backend=backend).sum().backward()
    if frozen:
        assert seen.largest <= rows * 64  # one tile; rows x H is smaller
        assert weight.grad is None
    else:
        assert seen.largest == vocabulary * width < rows * vocabulary


def test_a_frozen_head_keeps_rows_times_hidden_and_nothing_else():
    hidden, weight = torch.randn(1, 20, 8).requires_grad_(), torch.randn(500, 8)
    labels = torch.randint(0, 500, (1, 20))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (kept.append(x.untyped_storage().nbytes()), x)[1], lambda x: x
    ):
        linear_token_logps(hidden, weight, labels, shift=False)
    assert sum(kept) <= 20 * 8 * 4 + 20 * 8 + 2 * 4 + 64


@pytest.mark.parametrize("budget", [0, 10_000, 123_456, 10**9])
def test_the_budget_is_kept(budget):
    hidden, weight = torch.randn(1, 40, 8).requires_grad_(), torch.randn(3000, 8).requires_grad_()
    labels = torch.randint(0, 3000, (1, 40))
    plan = make_plan(40, 8, 3000, torch.float32, CPU, budget)
    assert plan.kept_bytes <= budget
    assert plan.kept_bytes == 40 * plan.kept_words * 4
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append((x.shape, x.nbytes)), x)[1], lambda x: x):
        linear_token_logps(hidden, weight, labels, shift=False, memory_budget=budget)
    for tile in plan.tiles():
        if tile.kept:
            kept.remove(((40 * (tile.stop - tile.start),), 40 * (tile.stop - tile.start) * 4))
    assert all(len(shape) != 1 or shape[0] <= 40 for shape, _ in kept)  # and no other


@pytest.mark.parametrize("retain", [False, True])
def test_backward_lets_kept_tiles_go_as_it_uses_them(monkeypatch, small_tiles, retain):
    """Unless the graph is retained: then the second backward has the bits of the first."""
    small_tiles(64)
    hidden, weight = torch.randn(1, 40, 8).requires_grad_(), torch.randn(300, 8).requires_grad_()
    labels = torch.randint(0, 300, (1, 40))
    tiles, alive = [], []

    def mm_into(a, b, out):
        alive.append(sum(not tile.expired() for tile in tiles))
        tiles.append(StorageWeakRef(a.untyped_storage()))
        product(a, b, out)

    product = linear_head._mm_into
    monkeypatch.setattr(linear_head, "_mm_into", mm_into)
    loss = linear_token_logps(hidden, weight, labels, shift=False, memory_budget=10**9).sum()
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=retain)
    assert len(alive) > 3
    assert alive == (list(range(len(alive))) if retain else [0] * len(alive))
    if retain:
        second = torch.autograd.grad(loss, [hidden, weight])
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    else:
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, [hidden, weight])


def test_a_plan_says_what_it_will_do():
    sizes = (2048, 1024, 32000, torch.bfloat16, CPU)
    everything = 2048 * 32000 * 2
    assert make_plan(*sizes, 0).gemms == 4
    assert make_plan(*sizes, everything).gemms == 3
    assert make_plan(*sizes, everything // 2).gemms == pytest.approx(3.5, abs=0.01)
    assert make_plan(*sizes, everything, grad_weight=False).gemms == 2
    assert make_plan(*sizes, everything, grad_weight=False).kept_bytes == 0
    assert make_plan(*sizes, 0, grad_weight=False, grad_hidden=False).gemms == 1
    assert make_plan(*sizes, "auto") == make_plan(*sizes, "auto") == make_plan(*sizes, 0.1)
    for budget in (0, everything // 3, everything):
        tiles = make_plan(*sizes, budget).tiles()
        assert [t.start for t in tiles] == [0, *(t.stop for t in tiles)][:-1]
        assert tiles[-1].stop == 32000


def test_a_plan_is_logged_once(caplog):
    linear_plan._logged.clear()
    hidden, weight = torch.randn(1, 4, 3), torch.randn(11, 3)
    labels = torch.randint(0, 11, (1, 4))
    with caplog.at_level(logging.INFO, "grpo_kernels.head.plan"):
        for _ in range(3):
            linear_token_logps(hidden, weight, labels)
    assert len(caplog.records) == 1
    assert "V 11" in caplog.text
