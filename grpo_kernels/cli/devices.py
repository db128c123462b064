"""``grpo-kernels info`` and ``grpo-kernels prove``: what is here, and whether the kernels are right on it."""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

_PROVE_ABOUT = """\
Check the kernels on a device against PyTorch in float64, within the error budget of this package's own tests, and keep
the result: backend="auto" takes a backend that passed.  Each backend is checked in a process of its own.

exit status: 0 all passed; 1 a case failed; 2 bad arguments, or no backend to check; 3 no verdict (out of memory, a time
limit, ...)
"""

NO_VERDICT = 3
PROVABLE = ("cpu", "cuda", "triton")
"""``torch`` is what the others are compared with."""


def info(arguments: list[str]) -> int:
    """Uses nothing but torch, so that it can say what is missing."""
    if arguments:
        if set(arguments) <= {"-h", "--help"}:
            print(
                "usage: grpo-kernels info\n\nVersions, devices, which backends are here and why the others are not, "
                "and what is known\nabout each on each device: recorded, proven here, failed, or not proven yet."
            )
            return 0
        raise ValueError(f"info takes no arguments, got {' '.join(arguments)}")
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from .. import __version__, available_backends

    print(f"grpo_kernels  {__version__}")
    print(f"python        {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "triton", "transformers", "peft", "datasets", "trl", "tensorboard", "matplotlib"):
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        print(f"{package:<13} {found}")
    print("\ndevices")
    print(f"  cpu     {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        capability = f"sm_{device.major}{device.minor}" if torch.version.hip is None else device.gcnArchName
        print(f"  cuda:{i}  {device.name}, {capability}, {device.total_memory / 2**30:.0f} GiB")
    print("\nsettings")
    for name, value in _settings().items():
        print(f"  {name:<20} {value}")
    print("\nbackends")
    for name, reason in available_backends().items():
        print(f"  {name:<7} {'here' if reason is None else 'not here: ' + ' '.join(reason.split())}")
        if reason is None:
            for device in _devices():
                known = _known(name, device)
                if known:
                    print(f"          {device}: {known}")
    return 0


def _settings() -> dict[str, str]:
    """The environment variables that decide what ``auto`` takes, and the tuning files that it follows."""
    import torch

    from ..backends import cache, tuned, verdicts

    folder = cache.folder()
    told = {
        "GRPO_KERNELS_CACHE": str(folder),
        "GRPO_KERNELS_PROVE": verdicts.policy(),
        "GRPO_KERNELS_TUNED": tuned.setting(),
    }
    for device in _devices():
        tuning = tuned.of(device)
        if tuning is not None:
            dtypes = sorted({entry["dtype"] for entry in tuning.sections["backends"].values()})
            orders = [f"{dtype}: {', '.join(tuned.order(device, getattr(torch, dtype)))}" for dtype in dtypes]
            told[f"tuned on {device}"] = (
                f"{tuned.path_of(device).name}; backends by speed, {'; '.join(orders) or 'as ever'}"
            )
    return told


def _devices() -> list[Any]:
    import torch

    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _known(name: str, device: Any) -> str:
    """What is known about a backend on a device; "" where it does not run on it."""
    import torch

    from ..backends import choose, status
    from ..types import UnavailableBackendError

    try:
        choose(name, device, torch.float32)
    except UnavailableBackendError:
        return ""
    if name == "torch":
        return "PyTorch's own operations, the fallback"
    verdict = status(name, device)
    return {
        "recorded": f"proven by the run recorded in benchmarks/results/{verdict.report} of the repository",
        "passed": f"proven here, {verdict.date}",
        "failed": f"failed here, {verdict.date}: {verdict.reason}; the report is in {verdict.report}",
        "none": f"no verdict: {verdict.reason}",
        "unknown": "not proven yet; " + _who_proves(name, device),
    }[verdict.status]


def _who_proves(name: str, device: Any) -> str:
    """What will make the proof that is missing."""
    import torch

    from ..backends import candidates, verdicts

    if verdicts.policy() == "never":
        return "GRPO_KERNELS_PROVE=never: only grpo-kernels prove does it"
    names = list(candidates(device, torch.float32))
    if name not in names:
        return 'backend="auto" does not take it on this device'
    before = names[: names.index(name)]
    if before:
        return f'backend="auto" tries {", ".join(before)} before it; grpo-kernels prove does it now'
    return 'the first call with backend="auto" does it, or grpo-kernels prove'


def prove(arguments: list[str]) -> int:
    """Run the proof of one or all backends on a device, in the foreground."""
    import torch

    from ..backends import choose, records, verdicts
    from ..types import UnavailableBackendError

    options = _prove_options(arguments)
    verdicts.policy()  # a value that it cannot have is better said here than in the first call
    device = _device(options.device)
    names = [options.backend] if options.backend else PROVABLE
    wanted = []
    for name in names:
        try:
            choose(name, device, torch.float32)
        except UnavailableBackendError as error:
            if options.backend:
                raise
            print(f"{name}: left out, {str(error).partition(': ')[2]}")
        else:
            wanted.append(name)
    if not wanted:
        raise ValueError(f"no backend of this package runs on {device}: grpo-kernels info says why")
    codes = []
    for name in wanted:
        run = _prove_one(name, device, options)
        verdict = verdicts.keep(name, device, run)
        if run.status != "none":
            print(f"kept in {verdicts.path_of(name, device)}")
        if verdict.report:
            print(f"the whole report is in {verdict.report}")
        if options.record:
            record = records.make(name, device, {name: run}, _command(arguments), options.commit)
            print(f"recorded in {records.write(record, Path(options.record))}")
        codes.append({"passed": 0, "failed": 1, "none": NO_VERDICT}[run.status])
    return 1 if 1 in codes else max(codes)


def _prove_options(arguments: list[str]) -> argparse.Namespace:
    from ..backends import cache

    parser = argparse.ArgumentParser(
        prog="grpo-kernels prove", description=_PROVE_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda or cuda:N; the first GPU unless told, the CPU where there is none")
    parser.add_argument("--backend", help="cpu, cuda or triton; every one that runs on the device unless told")
    parser.add_argument("--full", action="store_true", help="all cases, as the tests run them, not only the quick ones")
    parser.add_argument("--seconds", type=float, default=600.0, help="time limit of each backend (600)")
    parser.add_argument("--record", metavar="DIR", help="also write DIR/<kind of device>/prove-<backend>.json")
    parser.add_argument("--commit", default="", help="what the record calls the source; what git says unless told")
    parser.error = _raise  # type: ignore[method-assign]
    options = parser.parse_args(arguments)
    if not 0 < options.seconds <= 86400:
        raise ValueError(f"--seconds must be positive and at most 86400, got {options.seconds:g}")
    if options.backend is not None and options.backend not in PROVABLE:
        raise ValueError(f"--backend must be {', '.join(PROVABLE[:-1])} or {PROVABLE[-1]}, got {options.backend!r}")
    for name, folder in (("--record", options.record), ("GRPO_KERNELS_CACHE", cache.folder())):
        if folder is not None:
            _check_writable(name, Path(folder))
    return options


def _check_writable(name: str, folder: Path) -> None:
    """Before minutes are spent on a result that could not be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{name} must be a folder that can be written to, got {str(folder)!r} ({error})") from None


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _command(arguments: Sequence[str]) -> str:
    return " ".join(["grpo-kernels prove", *arguments])


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise ValueError(f"--device {name}: PyTorch sees {count} GPUs on this machine")
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return torch.device("cpu")


def _prove_one(name: str, device: Any, options: argparse.Namespace) -> Any:
    """Run the proof, showing how far it is, and print the table."""
    from ..backends import child
    from ..backends.cache import describe_device

    print(f"backend {name} on device {device} ({describe_device(device)['device']})", flush=True)
    progress = _Progress()
    run = child.run(name, device, full=options.full, seconds=options.seconds, progress=progress)
    progress.close()
    if run.cases:
        print(f"  {'operations':<34}{'cases':>6}{'failed':>8}{'seconds':>9}")
    rows: dict[str, list[Any]] = {}
    for case in run.cases:
        rows.setdefault(", ".join(case.operations), []).append(case)
    for title, cases in rows.items():
        failed = sum(not case.passed for case in cases)
        print(f"  {title:<34}{len(cases):>6}{failed:>8}{sum(case.seconds for case in cases):>9.1f}")
    for case in run.failures[:20]:
        print(f"  FAILED {case.name}\n         {case.message.splitlines()[0][:300]}")
    if run.status == "none" and run.output.strip():
        print("  the last lines that the process printed:")
        print("\n".join(f"    {line[:200]}" for line in run.output.strip().splitlines()[-10:]))
    told = {
        "passed": f"passed in {run.seconds:.0f} s",
        "failed": f"FAILED: {run.reason}",
        "none": f"no verdict: {run.reason}; nothing is kept.  The time limit is --seconds {options.seconds:g}",
    }[run.status]
    print(f"  {told}", flush=True)
    return run


class _Progress:
    """One line that is written over on a terminal; elsewhere a line for each kind of operation."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.operations = ""
        self.terminal = sys.stderr.isatty()

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "start":
            self.total = event["cases"]
        elif event["event"] == "done":
            self.done += 1
        elif event["event"] == "case":
            operations = ", ".join(event["operations"])
            if self.terminal:
                text = f"  {self.done + 1} of {self.total}: {operations}: {event['name']}"
                print(f"\r\x1b[K{text[:110]}", end="", file=sys.stderr, flush=True)
            elif operations != self.operations:
                print(f"  checking {operations} (case {self.done + 1} of {self.total}) ...", flush=True)
            self.operations = operations

    def close(self) -> None:
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
