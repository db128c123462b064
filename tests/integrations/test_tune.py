"""``grpo-kernels tune``: what it tries is checked first, what it keeps is faster, and what it says is what it did."""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from grpo_kernels import available_backends, cli, linear_token_logps
from grpo_kernels.backends import choose, tuned
from grpo_kernels.head.plan import make_plan
from grpo_kernels.tune import checks, report, session, shape_of, sweep
from grpo_kernels.tune.results import Report, Result
from grpo_kernels.tune.sweep import Candidate

CPU = torch.device("cpu")
TINY = ["--vocab", "1500", "--hidden", "16", "--rows", "24", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and a process that has read nothing yet."""
    monkeypatch.setenv("GRPO_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GRPO_KERNELS_TUNED", raising=False)
    monkeypatch.setattr(sweep, "last_level_cache", lambda device: 1 << 20)  # few and small buffers
    # Runs end by these, well before their time is over: a busy machine changes nothing.
    monkeypatch.setattr(sweep, "MOST_ROUNDS", 3)
    monkeypatch.setattr(sweep, "FINAL_ROUNDS", 7)
    tuned.forget()
    yield tmp_path / "cache"
    tuned.forget()


@pytest.fixture
def quick(monkeypatch):
    """Whole backends are taken to be right; single candidates are checked all the same."""
    monkeypatch.setattr(checks, "backend", lambda place, dtype: None)


def run(capsys, *arguments):
    code = cli.main(["tune", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


# ---- a run on the CPU


def test_a_cpu_from_the_command_to_the_next_loss(capsys, tmp_path):
    code, out, err = run(capsys, *TINY, "--seconds", 300, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    path = tuned.path_of(CPU)
    content = json.loads(path.read_text())
    assert f"kept in {path}" in out
    assert "GRPO_KERNELS_TUNED=never ignores it" in out
    here = [name for name, reason in available_backends().items() if reason is None and name in ("cpu", "torch")]
    (times,) = content["backends"]
    assert set(times["ms"]) == {"logits", "head"}
    assert all(list(by_name) == here for by_name in times["ms"].values())
    assert "plain PyTorch" in out
    order = ", ".join(tuned.order(CPU, torch.float32))
    assert (f"backends, fastest first: {order} " if order else "the order of the backends stays as it is") in out

    rows = list(csv.DictReader((tmp_path / "out" / "tuned.csv").read_text().splitlines()))
    assert tuple(rows[0]) == report.COLUMNS
    tiles = [row for row in rows if row["operation"] == "tile of the head"]
    assert {row["parameters"] for row in tiles} == {f"tile_words {words}" for words in (1500, 768, 512)}
    assert tiles[0]["chosen"].startswith("the table's")
    assert all(row["status"] == "ok" and float(row["median_ms"]) > 0 for row in tiles)
    assert {"plain PyTorch", *here} <= {row["backend"] for row in rows if row["operation"] == "head step"}

    (entry,) = content["head"]
    changed = entry["tile_words"] != 1500
    assert ('_TILE_BYTES["cpu"] = ' in (tmp_path / "out" / "table.txt").read_text()) == changed
    taken = next(row for row in tiles if "taken" in row["chosen"])
    assert taken["parameters"] == f"tile_words {entry['tile_words']}"
    assert make_plan(24, 16, 1500, torch.float32, CPU).tile_words == entry["tile_words"]
    inputs = torch.randn(1, 24, 16), torch.randn(1500, 16), torch.randint(0, 1500, (1, 24))
    first, second = (linear_token_logps(*inputs, shift=False) for _ in range(2))
    assert torch.equal(first, second)


def test_another_shape_is_added_and_never_still_writes(capsys, monkeypatch, quick):
    run(capsys, *TINY, "--seconds", 0.01)
    monkeypatch.setenv("GRPO_KERNELS_TUNED", "never")
    code, out, _ = run(capsys, "--vocab", 1200, *TINY[2:], "--seconds", 0.01)
    assert code == 0
    assert "GRPO_KERNELS_TUNED=never is set" in out
    content = json.loads(tuned.path_of(CPU).read_text())
    assert sorted(entry["vocabulary"] for entry in content["backends"]) == [1200, 1500]


def candidate(name, *seconds):
    return sweep.Candidate({"backend": name}, lambda turn: None, seconds=list(seconds))


SLOW, FAST = (2.0, 2.1, 2.0, 2.2, 2.1), (1.0, 1.1, 1.0, 1.2, 1.1)


@pytest.mark.parametrize(
    ("first", "second", "sure"),
    [
        (FAST, SLOW, True),  # nothing would change
        (FAST[:1], SLOW[:1], True),
        (SLOW, FAST, True),
        (SLOW, FAST[:1], False),  # one round says nothing
        (SLOW[:3], FAST[:3], False),
        ((1.0, 1.5, 1.2, 1.3, 1.1), (0.9, 1.4, 1.1, 1.2, 1.0), False),  # their quartiles overlap
    ],
)
def test_one_backend_goes_before_another_only_where_its_times_are_sure(first, second, sure):
    timed = [candidate("cpu", *first), candidate("torch", *second)]
    assert sweep.order_is_sure(timed) is sure


def test_times_that_are_not_sure_change_no_order():
    entry = {"dtype": "float32", "hidden": 8, "vocabulary": 9, "rows": 10}
    ms = {"logits": {"cpu": 2.0, "torch": 1.0}}
    tuned.keep(CPU, {"backends": [{**entry, "ms": ms, "unsure": ["logits"]}]})
    assert tuned.order(CPU, torch.float32) == ()
    tuned.keep(CPU, {"backends": [{**entry, "ms": ms, "unsure": []}]})
    tuned.forget()
    assert tuned.order(CPU, torch.float32) == ("torch", "cpu")


def test_a_wrong_candidate_is_refused_and_never_timed(monkeypatch, quick):
    """A backend whose tile operation is wrong for narrow tiles alone, by less than anyone would see."""
    shape = shape_of(vocab=1500, hidden=16, rows=24, dtype="float32", device="cpu")
    module = choose(session.names_here(shape)[0], CPU, torch.float32)
    forward, timing, timed = module.head_tile_fwd, [False], []

    def wrong(logits, bias, targets, top, rest, *more, **options):
        forward(logits, bias, targets, top, rest, *more, **options)
        if timing[0]:
            timed.append(logits.shape[1])
        if logits.shape[1] < 700:
            rest.mul_(1 + 1e-4)

    class Noting(sweep.Timer):
        def __call__(self, function):
            timing[0] = True
            seconds = super().__call__(function)
            timing[0] = False
            return seconds

    monkeypatch.setattr(module, "head_tile_fwd", wrong)
    monkeypatch.setattr(session, "Timer", Noting)
    monkeypatch.setattr(session, "PATHS", {})
    found = session.tune(shape, 300, lambda line: None)
    tiles = {one.parameters["tile_words"]: one for one in found.results[0].candidates}
    assert tiles[512].status.startswith("wrong: logps: relative error")
    assert tiles[512].seconds == tiles[512].final == []
    assert tiles[1500].status == tiles[768].status == "ok"
    assert timed
    assert min(timed) > 700
    assert "tile_words 512: wrong" in " ".join(report.refused(found))
    assert all(entry["tile_words"] != 512 for entry in tuned.of(CPU).sections["head"].values())


def test_a_tile_that_is_faster_is_kept_and_the_next_loss_takes_it(capsys, monkeypatch, quick):
    """On a machine of our own making, where wide tiles take a tenth of a second longer."""
    shape = shape_of(vocab=1500, hidden=16, rows=24, dtype="float32", device="cpu")
    backend = session.names_here(shape)[0]
    module, widths = choose(backend, CPU, torch.float32), []
    forward = module.head_tile_fwd

    def slow(logits, *more, **options):
        widths.append(logits.shape[1])
        if logits.shape[1] > 1000:
            time.sleep(0.1)
        forward(logits, *more, **options)

    monkeypatch.setattr(module, "head_tile_fwd", slow)
    monkeypatch.setattr(session, "PATHS", {})
    code, out, _ = run(capsys, *TINY, "--seconds", 300)
    assert code == 0
    (entry,) = json.loads(tuned.path_of(CPU).read_text())["head"]
    assert entry["tile_words"] in (768, 512)
    line = next(line for line in out.splitlines() if line.startswith("tile of the head ("))
    assert f"tile_words 1500  tile_words {entry['tile_words']} " in line
    assert float(line.split()[-1].rstrip("%")) > 1
    widths.clear()
    inputs = torch.randn(1, 24, 16), torch.randn(1500, 16), torch.randint(0, 1500, (1, 24))
    first, second = (linear_token_logps(*inputs, shift=False, backend=backend) for _ in range(2))
    assert torch.equal(first, second)
    assert max(widths) == entry["tile_words"]


def test_a_backend_that_is_wrong_for_every_tile_is_left_out(monkeypatch, quick):
    shape = shape_of(vocab=600, hidden=16, rows=24, dtype="float32", device="cpu")
    first, *others = session.names_here(shape)
    if not others:
        pytest.skip("there is but one backend")
    monkeypatch.setattr(choose(first, CPU, torch.float32), "head_tile_fwd", lambda *a, **b: None)
    monkeypatch.setattr(session, "PATHS", {})
    said = []
    found = session.tune(shape, 300, said.append)
    assert [result.backend for result in found.results][:2] == [first, others[0]]
    assert any("left out" in line for line in said)
    assert found.results[0].chosen is None


def test_what_had_ended_is_kept_when_it_is_interrupted(capsys, tmp_path, monkeypatch, quick):
    def interrupted(self, ends):
        raise KeyboardInterrupt

    monkeypatch.setattr(session._Session, "row_chunk", interrupted)
    code, out, _ = run(capsys, *TINY, "--seconds", 300, "--out", tmp_path / "out")
    assert code == 130
    assert "tile_words" in (tmp_path / "out" / "tuned.csv").read_text()
    assert "stopped; what had ended by then is in" in out
    assert len(json.loads(tuned.path_of(CPU).read_text())["head"]) == 1


@pytest.mark.slow
def test_the_stages_of_triton_in_its_interpreter(tmp_path):
    """What needs a GPU to be of use runs all the same: every kernel's candidates are checked, and all are right."""
    pytest.importorskip("triton")
    shape = ["--vocab", "1300", "--hidden", "8", "--rows", "4", "--dtype", "float32", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "grpo_kernels.cli", "tune", *shape, "--seconds", "90", "--out", str(tmp_path)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "tuned.csv").read_text().splitlines()))
    for operation in ("head_tile_fwd", "head_tile_bwd", "token_logps_fwd", "token_logps_bwd", "preference_tail"):
        status = [row["status"] for row in rows if row["operation"] == operation]
        assert status.count("ok") > 1
        assert set(status) <= {"ok", sweep.NO_TIME}, operation
    assert "triton" in {row["backend"] for row in rows if row["operation"] == "head step" and row["median_ms"]}
    assert {"# TOKEN_LOGPS", "# HEAD_TILE", "# TAIL"} <= set((tmp_path / "table.txt").read_text().splitlines())


# ---- how candidates are compared, by a clock of our own


def clock(device=CPU):
    """A timer for runs that return how long they would have taken."""

    def timer(function):
        return function()

    timer.device = device
    return timer


def made_up(**seconds: float | Exception) -> list[Candidate]:
    """By name: so many seconds each time, or what the check raises."""

    def check(outcome):
        if isinstance(outcome, Exception):
            raise outcome

    return [
        Candidate({"name": name}, lambda turn, value=value: value, lambda value=value: check(value))
        for name, value in seconds.items()
    ]


def winner(candidates: list[Candidate], seconds: float = 60.0) -> str:
    return sweep.sweep(candidates, clock(), time.monotonic() + seconds).parameters["name"]


def test_the_fastest_is_taken_and_a_tie_goes_to_the_table():
    assert winner(made_up(table=1.0, a=1.2, b=0.9, c=0.5)) == "c"
    assert winner(made_up(table=1.0, a=0.992, b=1.5)) == "table"
    assert winner(made_up(table=1.0, a=0.8, b=0.795)) == "a"  # equal to b, and nearer to the table
    assert winner(made_up(table=1.0)) == "table"


@pytest.mark.parametrize(("later", "wins"), [([0.7], True), ([0.995], False), ([0.7, 0.7, 1.6], False)])
def test_what_was_fast_at_first_must_be_so_in_the_last_rounds(monkeypatch, later, wins):
    """By more than a tie, and nearly always: a median below the table's could be chance."""
    monkeypatch.setattr(sweep, "FINAL_ROUNDS", 15)
    table, other = made_up(table=1.0, other=0.0)
    turns = itertools.chain([0.5] * (1 + sweep.MOST_ROUNDS), itertools.cycle(later))
    other.run = lambda turn: next(turns)
    assert winner([table, other]) == ("other" if wins else "table")
    assert len(other.final) == (15 if len(later) == 1 else 12)  # no longer than it can still win


def test_what_there_is_no_time_to_make_sure_of_changes_nothing():
    candidates = made_up(table=2.0, other=1.0)
    assert winner(candidates, seconds=10) == "table"  # six rounds of both would take 18
    assert candidates[1].undecided
    assert winner(made_up(table=2.0, other=1.0), seconds=20) == "other"


def test_a_few_rounds_change_nothing():
    least = sweep.LEAST_FINAL_ROUNDS
    assert sweep._chance(least, least) <= sweep.CHANCE < sweep._chance(least - 1, least)
    assert sweep._chance(12, 15) <= sweep.CHANCE < sweep._chance(11, 15)
    assert all(sweep._chance(n, n) > sweep.CHANCE for n in range(6))


def test_what_is_wrong_or_fails_is_refused_and_the_rest_goes_on():
    wrong, failed = checks.Mismatch("logps: error 1"), RuntimeError("no such instruction\nand more")
    candidates = made_up(table=1.0, wrong=wrong, failed=failed, memory=torch.OutOfMemoryError("none"), good=0.5)
    assert winner(candidates) == "good"
    status = {one.parameters["name"]: one.status for one in candidates}
    assert status == {
        "table": "ok", "wrong": "wrong: logps: error 1", "failed": "failed: RuntimeError: no such instruction",
        "memory": "out of memory", "good": "ok",
    }  # fmt: skip
    assert [bool(one.seconds) for one in candidates] == [True, False, False, False, True]
    broken = made_up(table=wrong, other=wrong)
    assert sweep.sweep(broken, clock(), time.monotonic() + 1) is None
    assert winner(made_up(table=wrong, other=3.0)) == "other"


def test_rounds_begin_elsewhere_each_time_and_the_slow_leave():
    order = []
    candidates = made_up(table=1.0, a=0.9, slow=5.0)
    for one in candidates:
        one.run = lambda turn, run=one.run, name=one.parameters["name"]: (order.append(name), run(turn))[1]
        one.check = None
    sweep.time_all(candidates, clock(), time.monotonic() + 5)
    assert order[:5] == ["table", "a", "slow", "a", "table"]
    assert len(candidates[2].seconds) == 1
    assert len(candidates[1].seconds) == len(candidates[0].seconds) == sweep.MOST_ROUNDS


def test_late_only_the_near_run_three_rounds_and_everything_has_a_time():
    candidates = made_up(table=1.0, near=1.05, far=1.3, crawling=1.0)
    candidates[3].first = 4.0  # of the run before the rounds
    candidates[0].run = lambda turn: (time.sleep(0.02), 1.0)[1]  # so that the first round is the last in time
    sweep.time_all(candidates, clock(), time.monotonic() + 0.02)
    assert [len(one.seconds) for one in candidates] == [3, 3, 1, 1]
    assert candidates[3].seconds == [4.0]


def test_no_time_left_leaves_the_tables_entry():
    candidates = made_up(table=1.0, a=0.5)
    assert winner(candidates, seconds=-1) == "table"
    assert candidates[1].status == sweep.NO_TIME


def test_each_run_takes_other_buffers_and_each_candidate_its_entries():
    turns, seen = [], []
    entry = {"dtype": "float32", "hidden": 8, "elements": 64}

    def run(turn):
        turns.append(turn)
        seen.append(tuned.row_chunk(CPU, torch.float32, 8))
        return 1.0

    sweep.sweep([Candidate({}, run), Candidate({}, run, None, {"row_chunk": [entry]})], clock(), time.monotonic() + 1)
    assert all(b == a + 1 for a, b in itertools.pairwise(turns))
    assert set(seen) == {None, 64}
    assert sweep.copies(1000, CPU, 1 << 40) == 64
    assert sweep.copies(1 << 20, CPU, 1 << 40) == 3  # twice the cache, and one
    assert sweep.copies(1 << 40, CPU, 1 << 30) == 2


def test_stages_share_what_is_left():
    now = time.monotonic()
    ends = sweep.fair_ends([3, 1, 1], now + 5)
    assert next(ends) == pytest.approx(now + 3, abs=0.1)
    assert next(ends) == pytest.approx(now + 2.5, abs=0.1)  # the first took no time
    assert next(ends) == pytest.approx(now + 5, abs=0.1)


# ---- what is written for the package's table


def test_the_lines_for_the_table_hold_what_was_found():
    shape = shape_of(vocab=128256, hidden=64, rows=24, dtype="bfloat16", device="cpu")
    found = Report(shape)

    def result(operation, section, entry, faster=True):
        own, best = Candidate({"a": 1}, print), Candidate({"a": 2}, print, adds={section: [entry]})
        own.adds, own.seconds, best.seconds, own.final, best.final = best.adds, [2.0], [1.0], [2.0, 2.0], [1.0, 1.0]
        found.results.append(Result(operation, "head", "triton", "", [own, best], best if faster else own))

    block = {"direction": "fwd", "dtype": "bfloat16", "vocabulary": 128256, "block_v": 8192, "num_warps": 16}
    result("token_logps_fwd", "token_logps", block)
    result("head_tile_bwd", "head_tile", {**block, "dtype": "float32", "words": 900, "block_v": 512, "num_warps": 4})
    result("preference_tail", "tail", {"most_length": None, "block_pairs": 2, "block_tokens": 1024, "num_warps": 4})
    text = report.as_table(found)
    assert '    ("fwd", 2): ((1024, 1024, 2), (8192, 2048, 4), (float("inf"), 8192, 16)),\n' in text
    assert '    ("bwd", 4): ((1024, 512, 4), (4096, 1024, 4), (float("inf"), 2048, 8)),\n' in text
    assert '= ((64, 8, 32), (float("inf"), 2, 1024))\n# TAIL_WARPS of these: 8, 4' in text
    assert '("fwd", 4)' not in text
    gains = report.gains(found)
    assert "2000.000   1000.000  50.0%" in gains
    found.results.clear()
    result("token_logps_fwd", "token_logps", block, faster=False)
    assert "the same" in report.gains(found)
    assert "# the same" in report.as_table(found)


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "tune needs a shape: --model FOLDER (with a config.json), or --vocab V and --hidden H"),
        (["--vocab", "10"], "--hidden must be given with --vocab"),
        (["--hidden", "10"], "--vocab must be given with --hidden"),
        (["--model", ".", "--vocab", "10"], "leave out --vocab and --hidden"),
        (["--model", "nowhere"], "--model must be a folder with a config.json, and nowhere/config.json is not there"),
        (["--model", "broken"], "--model: broken/config.json cannot be read"),
        (["--model", "empty"], "--model: empty/config.json has no vocab_size; give --vocab and --hidden instead"),
        (["--model", "wrong"], "--model: vocab_size in wrong/config.json must be a positive integer, got many"),
        (["--vocab", "0", "--hidden", "8"], "--vocab must be from 1"),
        (["--vocab", "8", "--hidden", "-8"], "--hidden must be from 1"),
        (["--vocab", "8", "--hidden", "8", "--rows", "0"], "--rows must be from 1"),
        (["--vocab", "8", "--hidden", "8", "--rows", "many"], "argument --rows: invalid int value: 'many'"),
        (["--vocab", "8", "--hidden", "8", "--dtype", "float64"], "--dtype must be one of bfloat16, float16, float32"),
        (["--vocab", "8", "--hidden", "8", "--device", "tpu9"], "--device must be"),
        (["--vocab", "8", "--hidden", "8", "--device", "meta"], "--device must be cpu or a cuda device, got 'meta'"),
        (["--vocab", "8", "--hidden", "8", "--seconds", "0"], "--seconds must be a positive number, got 0.0"),
        (["--vocab", "8", "--hidden", "8", "--seconds", "nan"], "--seconds must be a positive number, got nan"),
        (["--vocab", "8", "--hidden", "8", "--out", "file"], "--out must be a folder"),
        (["--vocab", "8", "--hidden", "8", "--nosuch", "1"], "unrecognized arguments: --nosuch 1"),
    ],
)
def test_a_users_error_is_one_line_that_names_it(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    for name, text in (("broken", "{"), ("empty", "{}"), ("wrong", '{"vocab_size": "many", "hidden_size": 8}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, *(["--device", "cpu"] if "--device" not in arguments else []), *arguments)
    assert code == 2
    assert err.startswith("grpo-kernels: error: ")
    assert err.count("\n") == 1
    assert said in err


def test_no_gpu_and_no_folder_are_said_before_anything_is_timed(capsys, tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        code, _, err = run(capsys, "--vocab", 8, "--hidden", 8, "--device", "cuda")
        assert (code, "--device cuda: PyTorch sees no GPU here" in err) == (2, True)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRPO_KERNELS_CACHE", str(tmp_path / "file" / "below"))
    code, out, err = run(capsys, *TINY)
    assert (code, out) == (2, "")
    assert "set GRPO_KERNELS_CACHE to a folder that can be" in err


@pytest.mark.parametrize(
    "config",
    [
        {"vocab_size": 1500, "hidden_size": 16},
        {"text_config": {"vocab_size": 1500, "hidden_size": 16}},
        {"vocab_size": 1500, "text_config": {"vocab_size": 9, "hidden_size": 16}},
    ],
)
def test_sizes_come_from_a_models_config(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = shape_of(model=str(tmp_path), device="cpu")
    assert (shape.vocabulary, shape.hidden, shape.rows, shape.dtype) == (1500, 16, 2048, torch.bfloat16)
