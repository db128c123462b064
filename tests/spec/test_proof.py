"""``backend="auto"`` on a device of which nothing is recorded: it proves the kernels once, and says how it went.

Processes are started where their end is what is tested; elsewhere a proof is what ``child.run`` returned.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import made_up_backend
import pytest
import torch

from grpo_kernels.backends import cache, child, choose, decided, torch_ops, verdicts
from grpo_kernels.proof.__main__ import no_verdict

registry = sys.modules["grpo_kernels.backends"]
HERE = Path(__file__).parent
RUN = child.run
CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path)


class Machine:
    """A machine whose CPU has a kind of which nothing is recorded, and made-up backends by name."""

    def __init__(self, monkeypatch, tmp_path):
        self.patch, self.folder, self.proofs = monkeypatch, tmp_path / "cache", tmp_path / "proofs"
        monkeypatch.setenv("GRPO_KERNELS_CACHE", str(self.folder))
        monkeypatch.setenv("PROOFS_MADE", str(self.proofs))
        monkeypatch.setenv("PYTHONPATH", str(HERE))
        monkeypatch.delenv("GRPO_KERNELS_PROVE", raising=False)
        monkeypatch.setattr(registry, "device_kind", lambda device: "made-up")
        monkeypatch.setattr(registry, "_load", self.load)
        self.loaded = {"torch": torch_ops}
        self.modes = {}
        self.next_process()

    def offer(self, *, processes=False, **modes):
        """Backends by name, and how the proof of each goes: in a process, or told by ``outcome``."""
        self.modes = modes
        self.patch.setattr(child, "run", RUN if processes else self.outcome)
        self.loaded |= {name: made_up_backend.made_up("right") for name in modes}
        self.patch.setattr(registry, "_MODULES", {**dict.fromkeys(modes, ""), "torch": "torch_ops"})
        self.patch.setattr(child, "command", self.command)

    def load(self, name):
        return self.loaded[name]

    def command(self, name, device, full):
        script = [sys.executable, str(HERE / "made_up_backend.py"), self.modes[name]]
        return [*script, "--backend", name, "--device", str(device)]

    def outcome(self, name, device, *, seconds):
        with self.proofs.open("a") as file:
            file.write(f"{self.modes[name]}\n")
        passed = child.CaseResult(["token_logps_fwd"], "one row", True, 0.1)
        return {
            "right": child.Run("passed", "", [passed]),
            "wrong": child.Run("failed", "one row: error 1", [passed]),
            "memory": child.Run("none", "out of memory"),
        }[self.modes[name]]

    def next_process(self):
        """Forget what a process knows."""
        for name, empty in (("_chosen", {}), ("_warned", set())):
            self.patch.setattr(registry, name, empty)
        for name, empty in (("_seen", {}), ("_decided", set())):
            self.patch.setattr(verdicts, name, empty)

    def started(self):
        """Proofs that were started, by mode."""
        return self.proofs.read_text().split() if self.proofs.exists() else []

    def auto(self, dtype=torch.float32, **options):
        """The name that auto picks, and its warnings."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            chosen = choose("auto", CPU, dtype, **options)
        names = [name for name, module in self.loaded.items() if module is chosen]
        return names[0], [str(warning.message) for warning in caught]

    def kept(self):
        return [json.loads(path.read_text()) for path in self.folder.glob("proof-*.json")]


def test_a_right_backend_is_proven_once_kept_and_taken(machine, caplog):
    machine.offer(kernels="right", processes=True)
    with caplog.at_level(logging.WARNING, "grpo_kernels"):
        assert machine.auto() == ("kernels", [])
    assert [record.message for record in caplog.records] == [
        f"checking the 'kernels' kernels on {cache.describe_device(CPU)['device']} in a process of its own, once "
        f"(up to 300 s); the result is kept in {machine.folder}"
    ]
    assert machine.auto(torch.bfloat16) == ("kernels", [])
    machine.next_process()
    assert machine.auto() == ("kernels", [])
    assert machine.started() == ["right"]
    (kept,) = machine.kept()
    assert kept["status"] == "passed"
    assert kept["key"].keys() >= {"backend", "device", "capability", "driver", "torch", "triton", "source"}


FAILURES = {
    "wrong": "token_logps_fwd+token_logps_bwd: one row, bfloat16: logps: error",
    "segfault": "token_logps_fwd+token_logps_bwd: one row, bfloat16: the process crashed with SIGSEGV",
}


@pytest.mark.parametrize("mode", FAILURES)
def test_a_failure_is_one_warning_with_case_and_report_and_it_is_kept(machine, mode):
    machine.offer(kernels=mode, processes=True)
    picked, (said,) = machine.auto()
    assert picked == "torch"
    assert said.startswith(f"backend 'kernels' is wrong on {cache.describe_device(CPU)['device']}")
    assert FAILURES[mode] in said
    report = Path(said.rpartition("the whole report is in ")[2])
    text = report.read_text()
    assert "FAILED  token_logps_fwd+token_logps_bwd: one row, bfloat16" in text
    assert "what is printed meanwhile goes to the report" in text
    assert machine.auto(torch.bfloat16) == ("torch", []), "said twice"
    machine.next_process()
    assert machine.auto() == ("torch", [said])
    assert machine.started() == [mode]


def test_after_a_failure_the_next_candidate_is_tried(machine):
    machine.offer(first="wrong", second="right")
    picked, (said,) = machine.auto()
    assert picked == "second"
    assert "'first' is wrong" in said
    assert machine.started() == ["wrong", "right"]


NO_VERDICTS = {
    "memory": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. (in one row, bfloat16)",
    "hang": "it was stopped after 10 s",
    "holds": "it was stopped after 10 s",
    "killed": "the process was ended by SIGKILL in token_logps_fwd+token_logps_bwd: one row, bfloat16",
    "exit": "the process ended with exit status 7 in token_logps_fwd",
}


@pytest.mark.parametrize("mode", NO_VERDICTS)
def test_no_verdict_is_one_sentence_and_torch_and_the_next_process_tries_again(machine, mode):
    machine.offer(kernels=mode, processes=True)
    machine.patch.setattr(verdicts, "TIME_LIMIT", 10.0 if mode in ("hang", "holds") else 120.0)
    picked, (said,) = machine.auto()
    assert picked == "torch"
    assert said.startswith("backend 'kernels' could not be proven on ")
    assert NO_VERDICTS[mode] in said
    assert "the next one tries again" in said
    assert machine.auto(torch.bfloat16) == ("torch", [])
    assert machine.kept() == []
    machine.next_process()
    machine.offer(kernels="right")
    assert machine.auto() == ("kernels", [])
    assert machine.started() == [mode, "right"]


SAYS_NOTHING_OF_KERNELS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("HIP error: out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    RuntimeError("Cannot find ptxas"),
    RuntimeError("0 active drivers ([]). There should only be one."),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("CUDA error: the launch timed out and was terminated"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("can't start new thread"),
    subprocess.CalledProcessError(1, ["gcc", "launcher.c"]),
    OSError(28, "No space left on device"),
    MemoryError(),
    ImportError("no module named triton"),
]
IS_THE_KERNELS_FAULT = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"),
    RuntimeError("Global variable _NAN has changed since we compiled this kernel, from nan to nan"),
    TypeError("token_logps_fwd() got an unexpected keyword argument"),
]


@pytest.mark.parametrize("error", [*SAYS_NOTHING_OF_KERNELS, *IS_THE_KERNELS_FAULT], ids=lambda e: f"{e}"[:40])
def test_an_error_of_the_machine_is_no_verdict_and_one_of_a_kernel_is_a_failure(error):
    assert no_verdict(error) is (error in SAYS_NOTHING_OF_KERNELS)


def seen(*, running=False, failed=False, complete=False, reason=""):
    """What a child had said when it ended."""
    case = {"operations": ["robust_loss"], "name": "no pairs"}
    done = [child.CaseResult(**case, passed=not failed, seconds=0.1, message="error 1" if failed else "")]
    calls = {"robust_loss": 1} if complete else None
    return child._Seen(1, done, case if running else None, reason, calls)


ENDS = {
    "complete": (0, seen(complete=True), "", "passed", ""),
    "complete, then a crash at its exit": (-6, seen(complete=True), "", "passed", ""),
    "complete, and it would not end": (None, seen(complete=True), "", "passed", ""),
    "a mismatch": (0, seen(failed=True, complete=True), "", "failed", "robust_loss: no pairs: error 1"),
    "a mismatch, then out of memory": (0, seen(failed=True, reason="out of memory"), "", "failed", "error 1"),
    "a mismatch, then the time limit": (None, seen(failed=True, running=True), "", "failed", "error 1"),
    "a crash in a case": (-11, seen(running=True), "", "failed", "no pairs: the process crashed with SIGSEGV"),
    "a crash for want of memory": (-6, seen(running=True), "what(): std::bad_alloc", "none", "SIGABRT in robust_loss"),
    "a crash before the first case": (-6, child._Seen(), "", "none", "was ended by SIGABRT in starting"),
    "forbidden by the system": (-31, seen(running=True), "", "none", "SIGSYS"),
    "ended from outside": (-15, seen(running=True), "", "none", "was ended by SIGTERM in robust_loss: no pairs"),
    "an exit before the report is complete": (0, seen(), "", "none", "exit status 0 in ending"),
    "no torch": (1, child._Seen(), "ModuleNotFoundError: torch", "none", "in starting (ModuleNotFoundError: torch)"),
    "the time limit": (None, seen(running=True), "", "none", "it was stopped after 9 s in robust_loss: no pairs"),
}


@pytest.mark.parametrize("how", ENDS)
def test_how_a_process_ended_is_what_it_means(how):
    code, said, printed, status, reason = ENDS[how]
    run = child._outcome(code, said, printed, 9.0)
    assert run.status == status
    assert reason in run.reason


PRINTED = [
    *("{}", "[]", "null", "7", "text", "\xff", "[" * 100_000),
    '{"event": "end"}',
    '{"event": ["end"]}',
    '{"event": "done", "passed": true}',
    '{"event": "start", "source": 1, "device": "", "cases": 1}',
]


@pytest.mark.parametrize("line", PRINTED, ids=lambda line: line[:40])
def test_what_else_is_printed_is_no_event(line):
    assert child._event(line.encode("latin-1")) is None


def test_a_proof_that_fails_by_itself_is_no_verdict(machine):
    machine.offer(kernels="right")

    def fault(name, device, *, seconds):
        raise KeyError("an oversight of this package")

    machine.patch.setattr(child, "run", fault)
    picked, (said,) = machine.auto()
    assert picked == "torch"
    assert "the proof itself failed: KeyError" in said


def test_the_process_ends_with_the_one_that_started_it(tmp_path):
    """A training run that is killed leaves nothing behind on the device."""
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import subprocess, torch; from grpo_kernels.backends import child\n"
        "command = child.command('torch', torch.device('cpu'), False)\n"
        "pipe, null = subprocess.PIPE, subprocess.DEVNULL\n"
        "process = subprocess.Popen(command, stdin=pipe, stdout=null, stderr=null, start_new_session=True)\n"
        "print(process.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    ends = time.monotonic() + 30
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < ends, "it lives on alone"
        time.sleep(0.2)


def test_the_child_finds_packages_where_this_process_does(tmp_path, monkeypatch):
    """Neither another grpo_kernels nor a json.py of the working directory is taken."""
    (tmp_path / "grpo_kernels").mkdir()
    for name in ("json.py", "grpo_kernels/__init__.py"):
        (tmp_path / name).write_text("raise RuntimeError('the wrong file')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path] + [tmp_path])
    start, *_ = child.command("torch", CPU, False)[3:4]
    script = child._START.partition("import runpy")[0] + "import grpo_kernels, json; print(grpo_kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", script, start], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(cache.PACKAGE / "__init__.py")


def test_a_compiled_region_does_not_settle_for_the_second_choice(machine):
    """Where a worse candidate is proven already, an ordinary call still proves the better one."""
    machine.offer(second="right")
    machine.auto()
    machine.next_process()
    machine.offer(first="right", second="right")
    assert machine.auto(may_prove=False) == ("second", [])
    assert machine.auto() == ("first", [])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_while_a_thread_proves_does_not_wait_for_it():
    with verdicts._lock:
        pid = os.fork()
        if pid == 0:
            free = verdicts._lock.acquire(timeout=5)
            os._exit(0 if free else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def refuse(*arguments, **options):
    raise OSError(11, "Resource temporarily unavailable")


@pytest.mark.parametrize(
    "how", ["no process", "no executable", "no home", "no such user", "no folder", "no lock", "no filelock"]
)
def test_what_the_machine_refuses_is_one_sentence_and_torch(machine, how):
    machine.offer(kernels="right", processes=True)
    if how == "no process":
        machine.patch.setattr(subprocess, "Popen", refuse)
        expected = "no process could be started ([Errno 11] Resource temporarily unavailable)"
    elif how == "no executable":
        machine.patch.setattr(sys, "executable", "")
        expected = "this Python does not know its own executable"
    elif how == "no home":
        machine.patch.delenv("GRPO_KERNELS_CACHE")
        machine.patch.delenv("XDG_CACHE_HOME", raising=False)
        machine.patch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        expected = "no home folder is known"
    elif how == "no such user":
        machine.patch.setenv("GRPO_KERNELS_CACHE", "~no-such-user/cache")
        expected = "no home folder is known"
    elif how == "no folder":
        machine.folder.write_text("a file where the folder should be")
        expected = "the cache folder cannot be written to"
    elif how == "no lock":
        machine.patch.setattr("filelock.FileLock.acquire", refuse)
        expected = "set GRPO_KERNELS_CACHE to one that can"
    else:
        machine.patch.setitem(sys.modules, "filelock", None)
        expected = "the package filelock is missing"
    picked, (said,) = machine.auto()
    assert picked == "torch"
    assert expected in said
    assert machine.started() == []


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "\x00\xff", "other key", "other status", "no reason"])
def test_a_damaged_or_foreign_file_is_ignored_and_made_anew(machine, damage):
    machine.offer(kernels="right")
    machine.auto()
    (path,) = machine.folder.glob("proof-*.json")
    content = json.loads(path.read_text())
    if damage == "other key":
        damage = json.dumps({**content, "key": {**content["key"], "device": "another"}})
    elif damage == "other status":
        damage = json.dumps({**content, "status": "perhaps"})
    elif damage == "no reason":
        damage = json.dumps({**content, "reason": None})
    path.write_text(damage, encoding="latin-1")
    machine.next_process()
    assert machine.auto() == ("kernels", [])
    assert machine.started() == ["right", "right"]
    assert json.loads(path.read_text())["key"] == content["key"]


@pytest.mark.parametrize("what", ["source", "device", "driver", "torch"])
def test_another_version_or_device_is_proven_anew(machine, what):
    machine.offer(kernels="right")
    machine.auto()
    machine.next_process()
    key = {**cache.key_of(CPU), what: "another"}
    machine.patch.setattr(cache, "key_of", lambda device: key)
    assert machine.auto() == ("kernels", [])
    assert machine.started() == ["right", "right"]
    assert len(machine.kept()) == 2


def test_a_child_that_finds_another_package_gives_no_verdict(machine):
    machine.offer(kernels="right", processes=True)
    machine.patch.setenv("PACKAGE_HASH", "of an older installation")
    picked, (said,) = machine.auto()
    assert picked == "torch"
    assert "the process found another grpo_kernels than this one" in said


def test_a_changed_file_of_the_package_changes_the_hash(tmp_path, monkeypatch):
    (tmp_path / "grpo_kernels").mkdir()
    source = tmp_path / "grpo_kernels" / "kernel.py"
    source.write_text("x = 1\n")
    monkeypatch.setattr(cache, "PACKAGE", tmp_path / "grpo_kernels")
    first = cache.package_hash.__wrapped__()
    assert cache.package_hash.__wrapped__() == first
    source.write_text("x = 2\n")
    assert cache.package_hash.__wrapped__() != first


TWO = """
import sys, torch
sys.path.insert(0, {here!r})
import test_proof, pytest
from pathlib import Path
with pytest.MonkeyPatch.context() as patch:
    machine = test_proof.Machine(patch, Path({folder!r}))
    machine.offer(kernels={mode!r}, processes=True)
    print(machine.auto()[0])
"""


@pytest.mark.parametrize(("mode", "picked"), [("right", "kernels"), ("memory", "torch")])
def test_processes_that_come_together_make_one_proof(tmp_path, mode, picked):
    """Those that waited take the first one's verdict, and its lack of one."""
    code = TWO.format(here=str(HERE), folder=str(tmp_path), mode=mode)
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=240)[0].split()[-1] for process in processes] == [picked] * 2
    assert (tmp_path / "proofs").read_text().split() == [mode]


def test_waiting_for_another_process_has_an_end(machine):
    import filelock

    machine.offer(kernels="right")
    machine.patch.setattr(verdicts, "WAIT_SECONDS", 0.2)
    machine.folder.mkdir()
    with filelock.FileLock(str(verdicts.path_of("kernels", CPU).with_suffix(".lock"))):
        picked, (said,) = machine.auto()
    assert picked == "torch"
    assert "another process has been proving it for more than 0 s" in said


def test_inside_a_compiled_region_nothing_is_proven_and_nothing_is_settled(machine):
    machine.offer(kernels="right")
    picked, (said,) = machine.auto(may_prove=False)
    assert picked == "torch"
    assert "it must not be inside a compiled region or the capture of a CUDA graph: make one call before" in said
    assert machine.auto(may_prove=False) == ("torch", [])
    assert machine.started() == []
    assert machine.auto() == ("kernels", [])
    assert machine.auto(may_prove=False) == ("kernels", [])


def test_while_a_graph_is_captured_nothing_is_proven(machine, monkeypatch):
    machine.offer(kernels="right")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(verdicts, "known", lambda name, device: verdicts.UNKNOWN)
    monkeypatch.setattr(verdicts, "decide", refuse)
    with pytest.warns(UserWarning, match="the capture of a CUDA graph"):
        assert choose("auto", torch.device("cuda", 0), torch.float32) is torch_ops


def test_the_policy_never_starts_no_proof_and_takes_what_is_kept(machine):
    machine.offer(kernels="right")
    machine.patch.setenv("GRPO_KERNELS_PROVE", "never")
    picked, (said,) = machine.auto()
    assert picked == "torch"
    assert "GRPO_KERNELS_PROVE=never" in said
    assert "`grpo-kernels prove`" in said
    machine.next_process()
    machine.patch.setenv("GRPO_KERNELS_PROVE", "auto")
    machine.auto()
    machine.next_process()
    machine.patch.setenv("GRPO_KERNELS_PROVE", "never")
    assert machine.auto() == ("kernels", [])
    assert machine.started() == ["right"]


def test_the_policy_always_proves_in_every_process_whatever_is_kept_or_recorded(machine):
    machine.offer(kernels="right")
    machine.patch.setattr(registry, "PROVEN", {("kernels", "made-up"): "a run"})
    assert machine.auto() == ("kernels", [])
    assert machine.started() == []
    machine.next_process()
    machine.patch.setenv("GRPO_KERNELS_PROVE", "always")
    for count in (1, 2):
        machine.next_process()
        assert machine.auto() == ("kernels", [])
        assert machine.auto(torch.bfloat16) == ("kernels", [])
        assert machine.started() == ["right"] * count


def test_an_unknown_policy_is_an_error(machine):
    machine.offer(kernels="right")
    machine.patch.setenv("GRPO_KERNELS_PROVE", "sometimes")
    with pytest.raises(ValueError, match="GRPO_KERNELS_PROVE must be one of auto, never, always, got 'sometimes'"):
        choose("auto", CPU, torch.float32)


def test_checks_of_arguments_start_no_proof(machine):
    machine.offer(kernels="right")
    assert decided(CPU, torch.float32) is torch_ops
    assert machine.started() == []
    machine.auto()
    assert decided(CPU, torch.float32) is machine.loaded["kernels"]


def test_a_result_that_cannot_be_kept_holds_for_this_process(machine, caplog):
    machine.offer(kernels="right")
    machine.patch.setattr(cache, "write_json", refuse)
    with caplog.at_level(logging.WARNING, "grpo_kernels"):
        assert machine.auto() == ("kernels", [])
    assert "the result could not be kept" in caplog.records[-1].message


def test_where_a_run_is_recorded_a_call_asks_neither_the_cache_nor_the_device(machine, monkeypatch):
    machine.offer(kernels="right")
    monkeypatch.setattr(registry, "PROVEN", {("kernels", "made-up"): "a run"})
    for name in ("known", "decide"):
        monkeypatch.setattr(verdicts, name, refuse)
    for name in ("package_hash", "describe_device"):
        monkeypatch.setattr(cache, name, refuse)
    assert machine.auto() == ("kernels", [])


def test_the_child_leaves_the_ranks_behind(monkeypatch):
    """The child is no rank of the job that started it, and proves nothing of its own."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    environment = child._environment({})
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & environment.keys()
    assert environment["GRPO_KERNELS_PROVE"] == environment["GRPO_KERNELS_TUNED"] == "never"
