"""The commands of ``make gpu-check`` and ``make gpu-cache`` themselves, run with a CPU in place of the GPU."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not TOOLS.exists(), reason="the tools are not part of a wheel")

STEPS = ["ceilings", "build", "smoke", "proof", "compile", "benchmarks", "tune", "tests", "ranks", "sanitizer"]
"""In the order of the summary: what runs beside the steps stands before the one that waits for it."""

FILES = {
    "gpu-check.log", "summary.txt", "machine.json", "bench.csv", "tests.xml", "tuned.csv",
    "nvidia-sm80/prove-triton.json", "nvidia-sm80/prove-cuda.json",
}  # fmt: skip


@pytest.fixture(autouse=True)
def tools_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))


def python(*words, **environment):
    """Exit status and output of a script."""
    left_out = ("GPU_CHECK_", "GRPO_KERNELS_", "TRITON_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env={**inherited, **environment}, timeout=900, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def check_results(out, code, shown):
    import gpu_report

    log = (out / "gpu-check.log").read_text() if (out / "gpu-check.log").exists() else ""
    assert code == 0, f"{shown}\n{log[-20000:]}"
    table = [line.split()[:2] for line in shown.splitlines()[-len(STEPS) :]]
    assert table == [[name, "passed"] for name in STEPS]
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == FILES
    assert len(FILES) <= gpu_report.MOST_FILES == 8
    assert gpu_report.unfit(out) == []


def test_every_kind_of_command_of_the_check_runs(tmp_path):
    """A wrong option, name or import in any of them fails here, and not on a GPU that is there for minutes."""
    out = tmp_path / "out"
    code, shown = python(
        "tools/gpu_check.py", "--dry-run", "short", "--commit", "abc123", "--out", out, "--scratch", tmp_path / "made"
    )  # fmt: skip
    check_results(out, code, shown)
    machine = json.loads((out / "machine.json").read_text())
    assert machine["commit"] == "abc123"
    assert machine["device"] == "a CPU in place of an NVIDIA GPU", "no one takes this for a run on a GPU"
    assert [step["step"] for step in machine["steps"]] == STEPS
    assert machine["ceilings"]["bfloat16, head"]["TFLOP/s"] > 0
    for backend in ("triton", "cuda"):
        record = json.loads((out / "nvidia-sm80" / f"prove-{backend}.json").read_text())
        assert (record["backend"], record["device_kind"], record["commit"]) == (backend, "nvidia-sm80", "abc123")
        assert record["passed"] > 10
        assert record["failed"] == 0
    with (out / "bench.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    timed = {row["variant"] for row in rows if row["ms"]}
    assert {"ours: triton", "ours: cuda", "eager", "copy", "three bare GEMMs"} <= timed
    assert {row["status"] for row in rows if row["ms"]} == {"ok"}
    with (out / "tuned.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) > 5
    summary = (out / "summary.txt").read_text()
    assert "TOKEN_LOGPS" in summary, "the table, ready to be pasted"
    assert "three bare GEMMs" in summary
    ElementTree.parse(out / "tests.xml")
    log = (out / "gpu-check.log").read_text()
    for kind in ("tests/gpu/test_whole_step.py::test_graph_replays_are_eager_steps[triton-False-False]",
                 "tests/gpu/test_whole_step.py::test_compiled_without_a_graph_break[triton-False]",
                 "tests/gpu/test_vocab_parallel_gpu.py::test_the_numbers_are_those_of_one_process"):  # fmt: skip
        assert kind in log, "collected"


def test_a_cache_of_another_build_is_left_packed(tmp_path):
    import gpu_cache

    entry = tmp_path / "compiled" / "SOMEKEY"
    entry.mkdir(parents=True)
    (entry / "a_kernel.cubin").write_bytes(b"cubin")
    (entry / "a_kernel.json").write_text("{}")
    paths = {name: str(entry / name) for name in ("a_kernel.cubin", "a_kernel.json")}
    (entry / "__grp__a_kernel.json").write_text(json.dumps({"child_paths": paths}))
    (tmp_path / "compiled" / "without_a_group").mkdir()
    manifest = gpu_cache.made_by()
    assert gpu_cache.pack(tmp_path / "compiled", manifest, tmp_path / "cache.tar.xz") == 1
    shutil.rmtree(tmp_path / "compiled")

    there = tmp_path / "there"
    assert gpu_cache.unpack(tmp_path / "cache.tar.xz", there) == "unpacked 1 compiled kernels"
    group = json.loads((there / "SOMEKEY" / "__grp__a_kernel.json").read_text())
    assert {Path(path) for path in group["child_paths"].values()} == {there / "SOMEKEY" / name for name in paths}
    assert all(Path(path).exists() for path in group["child_paths"].values())
    assert {path.name for path in there.iterdir()} == {"SOMEKEY"}

    for changed in ({"triton": "3.5.0"}, {"libtriton.so": "another"}, {"architecture": 80}, {"ptxas": "another"},
                    {"variables": {"TRITON_DEFAULT_FP_FUSION": "true"}}):  # fmt: skip
        (tmp_path / "compiled").mkdir(exist_ok=True)
        gpu_cache.pack(tmp_path / "compiled", {**manifest, **changed}, tmp_path / "other.tar.xz")
        told = gpu_cache.unpack(tmp_path / "other.tar.xz", tmp_path / "nowhere")
        assert told.startswith(f"the cache is of no use here and was left packed: made with {next(iter(changed))} ")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "damaged.tar.xz").write_bytes((tmp_path / "cache.tar.xz").read_bytes()[:100])
    for name in ("damaged.tar.xz", "absent.tar.xz"):
        assert "cannot be read and was left out" in gpu_cache.unpack(tmp_path / name, tmp_path / "nowhere")


@pytest.mark.slow
def test_every_piece_of_the_cache_can_be_launched(tmp_path):
    code, shown = python("tools/gpu_cache.py", "--jobs", "2", GPU_CHECK_DRY="launch", TRITON_CACHE_DIR=str(tmp_path))
    assert code == 0, shown[-20000:]
    assert int(re.search(r"(\d+) units by 2 processes", shown).group(1)) > 200


@pytest.mark.slow
def test_a_cache_serves_where_it_is_unpacked(tmp_path):
    """Every kernel compiled, and each of them found again in another folder."""
    import gpu_cache

    file, written = tmp_path / "cache.tar.xz", tmp_path / "compilations.txt"
    words = ["tools/gpu_cache.py", "--jobs", "2", "--units", "smoke"]
    code, shown = python(*words, "--out", file, GPU_CHECK_COMPILATIONS=str(written))
    assert code == 0, shown[-20000:]
    sources = "".join(path.read_text() for path in (ROOT / "grpo_kernels" / "backends" / "triton").glob("*.py"))
    kernels = set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
    compiled = {line.split()[1] for line in written.read_text().splitlines()}
    assert compiled == kernels, "the smoke script launches every kernel"
    assert gpu_cache.unpack(file, tmp_path / "there").startswith("unpacked ")
    modules = list((tmp_path / "there").glob("*/*.so"))
    assert modules or not shutil.which("gcc")
    assert all(b"libcuda.so.1" in module.read_bytes() for module in modules), "they name what they call"
    code, shown = python(*words, TRITON_CACHE_DIR=str(tmp_path / "there"))
    assert code == 0, shown[-20000:]
    assert re.search(r"compiled 0 kernels, found \d\d", shown), shown


@pytest.mark.slow
def test_the_whole_of_the_dry_run(tmp_path):
    out = tmp_path / "out"
    code, shown = python("tools/gpu_check.py", "--dry-run", "--out", out, "--scratch", tmp_path / "scratch")
    check_results(out, code, shown)
