"""The tuning file: look-ups follow it where it has an entry, and it is believed only where it can be."""

from __future__ import annotations

import importlib
import itertools
import json
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from grpo_kernels import available_backends, fused_linear_grpo_loss
from grpo_kernels.backends import cache, choose, torch_ops, tuned
from grpo_kernels.backends.triton import table
from grpo_kernels.head import plan as linear_plan
from grpo_kernels.head.plan import make_plan
from grpo_kernels.tune import candidates, shape_of

CPU = torch.device("cpu")
HEAD = {"dtype": "float32", "hidden": 8, "vocabulary": 3000, "rows": 40, "tile_words": 1024}
SHAPE = (40, 8, 3000, torch.float32, CPU)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and a process that has read nothing yet."""
    monkeypatch.setenv("GRPO_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GRPO_KERNELS_TUNED", raising=False)
    tuned.forget()
    yield tmp_path / "cache"
    tuned.forget()


def spoil(change) -> None:
    """The file as ``change`` makes it out of the text or the object that it holds."""
    path = tuned.path_of(CPU)
    text = path.read_text()
    changed = change(json.loads(text)) if change.__name__ != "<lambda>" else change(text)
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    tuned.forget()


# ---- what look-ups give


def test_a_plan_takes_the_tuned_width_for_its_shape_and_no_other():
    default = make_plan(*SHAPE).tile_words
    assert default == 3000
    tuned.keep(CPU, {"head": [HEAD]})
    assert make_plan(*SHAPE).tile_words == 1024
    # As much memory for other rows near them; beyond that, and for any other shape or dtype, the package's own.
    assert make_plan(80, *SHAPE[1:]).tile_words == 512
    assert make_plan(20, *SHAPE[1:]).tile_words == 2048
    assert make_plan(40 * tuned.NEAR_ROWS + 1, *SHAPE[1:]).tile_words == default
    assert make_plan(40, 9, 3000, torch.float32, CPU).tile_words == default
    assert make_plan(40, 8, 3001, torch.float32, CPU).tile_words == 3001
    assert make_plan(40, 8, 3000, torch.bfloat16, CPU).tile_words == default


def test_the_nearest_rows_decide():
    tuned.keep(CPU, {"head": [HEAD, {**HEAD, "rows": 160, "tile_words": 512}]})
    assert make_plan(40, *SHAPE[1:]).tile_words == 1024
    assert make_plan(160, *SHAPE[1:]).tile_words == 512
    assert make_plan(130, *SHAPE[1:]).tile_words == 512 * 160 // 130
    assert make_plan(60, *SHAPE[1:]).tile_words == 1024 * 40 // 60


def test_a_tuned_width_stays_within_the_bounds_of_the_plan():
    """float16's above all: its GEMMs answer in float16 on a CPU, whose range more exponentials would leave."""
    tuned.keep(CPU, {"head": [{**HEAD, "dtype": "float16", "tile_words": 2048}, {**HEAD, "tile_words": 16}]})
    assert make_plan(40, 8, 3000, torch.float16, CPU).tile_words == linear_plan._MOST_WORDS_FLOAT16
    assert make_plan(*SHAPE).tile_words == linear_plan._LEAST_WORDS
    assert tuned.MOST_TILE_WORDS == linear_plan._MOST_WORDS
    for dtype in ("float16", "bfloat16"):
        shape = shape_of(vocab=50000, hidden=8, rows=8, dtype=dtype, device="cpu")
        least, most = linear_plan.tile_bounds(50000, shape.dtype, CPU)
        widths = [one["tile_words"] for one in candidates.tiles(shape, 8 << 30)]
        assert all(least <= width <= most for width in widths)
        assert len(widths) == len(set(widths)) > 1


def test_rows_at_a_time_follow_the_file_but_where_ranks_take_them_together():
    default = linear_plan.row_chunk_elements(8, torch.float32, CPU)
    tuned.keep(CPU, {"row_chunk": [{"dtype": "float32", "hidden": 8, "elements": 64}]})
    assert linear_plan.row_chunk_elements(8, torch.float32, CPU) == make_plan(*SHAPE).row_chunk == 64
    assert linear_plan.row_chunk_elements(8, torch.float32, CPU, shared=True) == default
    assert linear_plan.row_chunk_elements(9, torch.float32, CPU) == default


def head_loss(backend: str) -> list[torch.Tensor]:
    torch.manual_seed(3)
    hidden, weight = torch.randn(4, 11, 8).requires_grad_(), torch.randn(3000, 8).requires_grad_()
    bias = torch.randn(3000).requires_grad_()
    labels = torch.randint(0, 3000, (4, 11))
    out = fused_linear_grpo_loss(
        hidden, weight, labels, None, torch.tensor([0, 1]), torch.ones(2), bias=bias, backend=backend
    )
    return [out.loss.detach(), *torch.autograd.grad(out.loss, [hidden, weight, bias])]


@pytest.mark.parametrize("backend", [name for name in ("cpu", "torch") if available_backends()[name] is None])
def test_a_loss_takes_the_tuned_tiles_and_gives_the_same_bits_again(backend, monkeypatch):
    module, widths = choose(backend, CPU, torch.float32), []
    forward = module.head_tile_fwd

    def spy(logits, *arguments, **options):
        widths.append(logits.shape[1])
        return forward(logits, *arguments, **options)

    monkeypatch.setattr(module, "head_tile_fwd", spy)
    before = head_loss(backend)
    assert set(widths) == {3000}
    chunk = {"dtype": "float32", "hidden": 8, "elements": 64}
    tuned.keep(CPU, {"head": [{**HEAD, "tile_words": 600}], "row_chunk": [chunk]})
    widths.clear()
    first, second = head_loss(backend), head_loss(backend)
    assert set(widths) == {600}
    for mine, again, default in zip(first, second, before, strict=True):
        assert torch.equal(mine, again)
        torch.testing.assert_close(mine, default)


def test_the_kernels_table_follows_its_entries():
    tuned.keep(CPU, {
        "token_logps": [{**BLOCK, "block_v": 8192, "num_warps": 16}],
        "head_tile": [{"direction": "bwd", "dtype": "float32", "words": 4096, "block_v": 512, "num_warps": 2}],
        "tail": [{"most_length": None, "block_pairs": 2, "block_tokens": 256, "num_warps": 4}],
    })  # fmt: skip
    half, single = torch.bfloat16, torch.float32
    assert table.token_logps_options("fwd", 32000, half, 32, CPU) == (8192, 16, 8)
    assert table.token_logps_options("fwd", 32000, half, 64, CPU) == (8192, 8, 8)  # as many threads
    for other in (("bwd", 32000, half), ("fwd", 32001, half), ("fwd", 32000, torch.float16), ("fwd", 32000, single)):
        assert table.token_logps_options(*other, 32, CPU) == table.token_logps_options(*other, 32)
    assert table.head_tile_options("bwd", 4096, single, 32, CPU) == (512, 2, 4)
    assert table.head_tile_options("bwd", 8000, single, 32, CPU) == (512, 2, 4)
    for other in (("bwd", 8193, single), ("bwd", 2047, single), ("fwd", 4096, single)):
        assert table.head_tile_options(*other, 32, CPU) == table.head_tile_options(*other, 32)
    assert table.tail_options(65, 4, 32, CPU) == (2, 256, 16, 4)
    assert table.tail_options(64, 4, 32, CPU) == table.tail_options(64, 4, 32)
    ends = [end for end, *_ in table.TAIL]
    assert ends == [float("inf") if most is None else most for most in tuned.TAIL_RANGES]


def test_every_launcher_asks_for_the_entry_of_its_device(monkeypatch):
    pytest.importorskip("triton")
    names = ("token_logps", "head_tile", "preference_tail")
    token_logps, head_tile, preference_tail = (
        importlib.import_module(f"grpo_kernels.backends.triton.{name}") for name in names
    )

    class Asked(Exception):
        pass

    def asked(*sizes, device):
        raise Asked(device)

    for module, name in (
        (token_logps, "token_logps_options"),
        (head_tile, "head_tile_options"),
        (preference_tail, "tail_options"),
    ):
        monkeypatch.setattr(module, name, asked)
    logits, row, words = torch.randn(1, 2, 16), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    tile = {"start": 0, "softcap": 0.0, "logit_scale": 1.0}
    plain = {"loss_type": 0, "beta": 0.1, "label_smoothing": 0.0, "length_normalize": False, "ignore_index": -100}
    for launch in (
        lambda: token_logps.token_logps_fwd(logits, words, row, row, ignore_index=-100),
        lambda: token_logps.token_logps_bwd(logits, words, row, row, logits, ignore_index=-100),
        lambda: head_tile.head_tile_fwd(logits[0], None, words, row, row, row, row, None, **tile, shift=0),
        lambda: head_tile.head_tile_bwd(logits[0], None, words, row, row, row, logits[0], **tile),
        lambda: preference_tail.preference_tail(
            row, words, None, None, words[:1], None, row, row, row, row, row, row, row, words, row, **plain
        ),
    ):
        with pytest.raises(Asked) as said:
            launch()
        assert said.value.args == (CPU,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_candidate_lets_two_threads_share_an_element(dtype):
    """In place, a thread may only read what it alone writes; and what is a candidate can be kept."""
    vec = 16 // dtype.itemsize
    for direction, length in itertools.product(("fwd", "bwd"), (1, 700, 8192, 128256)):
        options = table.token_logps_options(direction, length, dtype, 32)
        own = {"block_v": options.block_v, "num_warps": options.num_warps}
        found = candidates.rows_of_logits(direction, length, dtype, own)
        assert found[0] == own
        assert len({tuple(one.values()) for one in found}) == len(found) >= (5 if length > 1000 else 1)
        for one in found:
            assert one["block_v"] // vec >= 32 * one["num_warps"] >= 64
            assert tuned.fits_block(**one, itemsize=dtype.itemsize)
    for most in tuned.TAIL_RANGES:
        options = table.tail_options(most or 512, 4, 32)
        own = {"block_pairs": options.block_pairs, "block_tokens": options.block_tokens, "num_warps": options.num_warps}
        found = candidates.tails(most, own)
        assert found[0] == own
        assert len(found) > 3
        assert all(tuned.fits_tail(**one) for one in found)


# ---- the order of backends


def times(**ms: float) -> dict:
    return {**{name: HEAD[name] for name in ("dtype", "hidden", "vocabulary", "rows")}, "ms": {"logits": ms}}


def test_the_order_is_by_time_and_a_tie_keeps_the_registrys():
    assert tuned.rank([]) == ()
    assert tuned.rank([{"cuda": 2.0, "triton": 1.0, "torch": 3.0}]) == ("triton", "cuda", "torch")
    assert tuned.rank([{"cuda": 1.009, "triton": 1.0, "torch": 3.0}]) == ("cuda", "triton", "torch")
    # Over several shapes by the product of ratios; one that is missing somewhere has no place.
    assert tuned.rank([{"cuda": 1.0, "triton": 2.0}, {"cuda": 1.5, "triton": 1.0}]) == ("cuda", "triton")
    assert tuned.rank([{"cuda": 1.0, "triton": 2.0}, {"triton": 1.0}]) == ("triton",)
    tuned.keep(CPU, {"backends": [times(cpu=2.0, torch=1.0)]})
    assert tuned.order(CPU, torch.float32) == ("torch", "cpu")
    assert tuned.order(CPU, torch.bfloat16) == ()


def test_auto_takes_the_fastest_of_those_it_may_take(monkeypatch):
    registry = __import__("grpo_kernels.backends", fromlist=["backends"])
    monkeypatch.setattr(registry, "_chosen", {})
    before = choose("auto", CPU, torch.float32)
    tuned.keep(CPU, {"backends": [times(cpu=2.0, torch=1.0, nosuch=0.5)]})  # the last is no backend, and passed over
    monkeypatch.setattr(registry, "_chosen", {})
    assert choose("auto", CPU, torch.float32) is torch_ops
    assert choose("auto", CPU, torch.bfloat16) is before


# ---- the file


def test_never_leaves_the_file_unread(monkeypatch):
    tuned.keep(CPU, {"head": [HEAD]})
    monkeypatch.setenv("GRPO_KERNELS_TUNED", "never")
    tuned.forget()
    assert make_plan(*SHAPE).tile_words == 3000
    monkeypatch.setenv("GRPO_KERNELS_TUNED", "sometimes")
    tuned.forget()
    with pytest.raises(ValueError, match="GRPO_KERNELS_TUNED must be one of auto, never, got 'sometimes'"):
        make_plan(*SHAPE)


def test_who_never_tuned_pays_for_no_key(monkeypatch, folder):
    def read_all():
        raise AssertionError("the package's source was read")

    monkeypatch.setattr(cache, "package_hash", read_all)
    assert make_plan(*SHAPE).tile_words == 3000
    assert not folder.exists()
    monkeypatch.setattr(tuned, "_read_wanted", lambda device: read_all())
    assert make_plan(*SHAPE).tile_words == 3000  # not asked again


def other_key(content):
    return {**content, "key": {**content["key"], "torch": "1.0"}}


def other_format(content):
    return {**content, "format": tuned.FORMAT + 1}


def no_key(content):
    return {name: value for name, value in content.items() if name != "key"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "", "is damaged"),
        (lambda text: "[1, 2]", "is damaged"),
        (lambda text: text.replace('"rows"', '"\udc80"').encode("utf-8", "replace").decode(), "cannot be used"),
        (other_key, "another device or by another version"),
        (other_format, "another device or by another version"),
        (no_key, "another device or by another version"),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning_and_made_anew(change, said):
    tuned.keep(CPU, {"head": [HEAD]})
    spoil(change)
    with pytest.warns(UserWarning, match=rf"the tuning file .* {said}.*grpo-kernels tune"):
        assert make_plan(*SHAPE).tile_words == 3000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_plan(*SHAPE).tile_words == 3000
    with pytest.warns(UserWarning, match="it is replaced"):
        tuned.keep(CPU, {"head": [HEAD]})
    assert make_plan(*SHAPE).tile_words == 1024


BLOCK = {"direction": "fwd", "dtype": "bfloat16", "vocabulary": 32000, "block_v": 4096, "num_warps": 8}
TAIL = {"most_length": 64, "block_pairs": 8, "block_tokens": 32, "num_warps": 8}


@pytest.mark.parametrize(
    ("section", "entry"),
    [
        ("token_logps", {**BLOCK, "num_warps": 32}),  # two threads would hold one element
        ("token_logps", {**BLOCK, "num_warps": 1}),
        ("token_logps", {**BLOCK, "block_v": 4000}),
        ("token_logps", {**BLOCK, "block_v": 4096.0}),
        ("token_logps", {**BLOCK, "block_v": 1 << 20}),
        ("token_logps", {**BLOCK, "direction": "up"}),
        ("token_logps", {**BLOCK, "dtype": "nn"}),
        ("token_logps", {name: value for name, value in BLOCK.items() if name != "vocabulary"}),
        ("head_tile", BLOCK),
        ("head_tile", {**BLOCK, "words": True}),
        ("tail", {**TAIL, "most_length": 100}),
        ("tail", {**TAIL, "block_tokens": 0}),
        ("tail", {**TAIL, "block_pairs": 1024}),
        ("head", {**HEAD, "tile_words": 0}),
        ("head", {**HEAD, "tile_words": tuned.MOST_TILE_WORDS + 1}),
        ("head", {**HEAD, "rows": "40"}),
        ("row_chunk", {"dtype": "float32", "hidden": 8, "elements": 1 << 40}),
        ("backends", times(cpu=-1.0)),
        ("backends", times(cpu=float("nan"))),
        ("backends", {**times(), "ms": 3}),
        ("head", "no entry"),
        ("head", [HEAD]),
    ],
)  # fmt: skip
def test_a_value_that_no_kernel_accepts_makes_the_file_one_to_ignore(section, entry):
    with pytest.raises(ValueError, match="that no kernel accepts"):
        tuned.keep(CPU, {section: [entry]})
    tuned.keep(CPU, {"head": [HEAD]})

    def add(content):
        return {**content, section: [*content.get(section, []), entry]}

    spoil(add)
    with pytest.warns(UserWarning, match="cannot be used"):
        assert make_plan(*SHAPE).tile_words == 3000


def test_shapes_accumulate_and_the_same_one_is_replaced():
    path = tuned.keep(CPU, {"head": [HEAD]})
    tuned.keep(
        CPU, {"head": [{**HEAD, "vocabulary": 5000}], "row_chunk": [{"dtype": "float32", "hidden": 8, "elements": 64}]}
    )
    tuned.keep(CPU, {"head": [{**HEAD, "tile_words": 600}]})
    content = json.loads(path.read_text())
    assert [entry["tile_words"] for entry in content["head"]] == [600, 1024]
    assert len(content["row_chunk"]) == 1
    assert content["key"] == cache.key_of(CPU)


def test_several_at_once_lose_no_entry():
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda rows: tuned.keep(CPU, {"head": [{**HEAD, "rows": rows}]}), range(1, 17)))
    assert len(json.loads(tuned.path_of(CPU).read_text())["head"]) == 16


def test_the_lock_is_not_waited_for_without_end():
    filelock = pytest.importorskip("filelock")
    path = tuned.path_of(CPU)
    path.parent.mkdir(parents=True)
    with filelock.FileLock(f"{path}.lock"), pytest.raises(OSError, match="another process has held"):
        tuned.keep(CPU, {"head": [HEAD]}, wait_seconds=0.1)


def test_a_cache_folder_that_cannot_be_read_is_as_good_as_none(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("GRPO_KERNELS_CACHE", str(folder))
        tuned.forget()
        assert make_plan(*SHAPE).tile_words == 3000
        with pytest.raises(OSError):
            tuned.keep(CPU, {"head": [HEAD]})


def test_entries_hold_only_while_they_are_used():
    tuned.keep(CPU, {"head": [HEAD]})
    with tuned.using(CPU, {"head": [{**HEAD, "tile_words": 700}]}):
        assert make_plan(*SHAPE).tile_words == 700
        with tuned.using(CPU, {}):
            assert make_plan(*SHAPE).tile_words == 3000
        assert make_plan(*SHAPE).tile_words == 700
    assert make_plan(*SHAPE).tile_words == 1024
