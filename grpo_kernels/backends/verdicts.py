"""What is known about a backend on a device: recorded by us, proven here, failed here, or nothing yet.

    recorded   benchmarks/results/ has a passing run for this kind of device (``PROVEN``)
    passed     the device passed the proof here, and the cache folder keeps it
    failed     it did not; the cache folder keeps that too, with the report
    none       no verdict: the proof could not be made, and the next process tries again

A proof is made once for all processes: the first takes a file lock, the others wait for its result.  It is kept under
a key of device, driver, versions and source (``cache.key_of``), so an upgrade of any of them makes it anew.

    GRPO_KERNELS_PROVE   auto (default)   prove where nothing is recorded or kept
                         never            start no proof; take what is recorded or kept
                         always           prove once in every process, whatever is recorded or kept
"""

from __future__ import annotations

import datetime
import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from . import cache

if TYPE_CHECKING:
    from . import child

_log = logging.getLogger("grpo_kernels")

TIME_LIMIT = 300.0
"""Seconds that a proof may take; most of them go into compiling the kernels."""
WAIT_SECONDS = TIME_LIMIT + 60
"""How long a process waits for another one's proof."""

POLICIES = ("auto", "never", "always")

Status = Literal["recorded", "passed", "failed", "none", "unknown"]


class Verdict(NamedTuple):
    """What is known, in a form that a person can be told."""

    status: Status
    reason: str = ""
    """One sentence: which case failed, or why there is no verdict."""
    date: str = ""
    report: str = ""
    """The file with the whole report of a failure."""

    @property
    def passed(self) -> bool:
        return self.status in ("recorded", "passed")


UNKNOWN = Verdict("unknown")

_seen: dict[tuple[str, str], Verdict] = {}
"""What this process knows: by backend and device."""
_decided: set[tuple[str, str]] = set()
"""For which of them it has made a proof, or waited for one: once is enough."""
_lock = threading.RLock()


def _after_fork() -> None:
    """A thread that held the lock is not in the child, and would never release it."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def policy() -> str:
    """GRPO_KERNELS_PROVE.

    Raises:
        ValueError: it is none of the three.
    """
    chosen = os.environ.get("GRPO_KERNELS_PROVE", "auto").strip().lower() or "auto"
    if chosen not in POLICIES:
        raise ValueError(f"GRPO_KERNELS_PROVE must be one of {', '.join(POLICIES)}, got {chosen!r}")
    return chosen


def known(name: str, device: torch.device) -> Verdict:
    """What this process or the cache folder knows, without starting anything."""
    place = (name, str(device))
    if place not in _seen:
        _seen[place] = _kept(name, device) or UNKNOWN
    return _seen[place]


def decide(name: str, device: torch.device) -> Verdict:
    """What is known; where that is nothing, prove the backend, or wait for the process that does.

    Never raises for what happens to the proof: that is a verdict, or none.
    """
    with _lock:
        place = (name, str(device))
        wanted = policy()
        if place in _decided or (wanted != "always" and known(name, device).status != "unknown"):
            return _seen[place]
        if wanted == "never":
            return UNKNOWN
        _seen[place] = _prove_once(name, device, anew=wanted == "always")
        _decided.add(place)
        return _seen[place]


def keep(name: str, device: torch.device, run: child.Run) -> Verdict:
    """Turn the outcome of a proof into a verdict, and keep it in the cache folder where it is one.

    Raises:
        OSError: the cache folder cannot be written to.
    """
    path, key = path_of(name, device), _key(name, device)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    content = {
        "key": key, "status": run.status, "reason": run.reason, "date": date, "time": time.time(),
        "seconds": round(run.seconds, 1), "cases": len(run.cases), "failed": [case.name for case in run.failures],
        "report": "",
    }  # fmt: skip
    if run.status == "none":
        cache.write_json(path.with_suffix(".attempt"), content)
        return Verdict("none", run.reason, date)
    if run.status == "failed":
        report = path.with_suffix(".report.txt")
        cache.write_text(report, run.report())
        content["report"] = str(report)
    cache.write_json(path, content)
    verdict = Verdict(run.status, run.reason, date, str(content["report"]))
    _seen[name, str(device)] = verdict
    return verdict


# ---------------------------------------------------------------------------------------------- the cache folder


def path_of(name: str, device: torch.device) -> Path:
    """The file that keeps the verdict, there or not.

    Raises:
        OSError: no cache folder is known.
    """
    return cache.folder() / cache.file_name(f"proof-{name}", _key(name, device))


def _key(name: str, device: torch.device) -> dict[str, str]:
    return {"backend": name, "isa": os.environ.get("GRPO_KERNELS_ISA", ""), **cache.key_of(device)}


def _kept(name: str, device: torch.device, since: float = 0.0) -> Verdict | None:
    """The verdict in the cache folder, or None where there is none that can be believed, or none since then."""
    try:
        path, key = path_of(name, device), _key(name, device)
    except OSError:
        return None
    found = cache.read_json(path)
    if found is None or found.get("key") != key or found.get("status") not in ("passed", "failed"):
        return None
    made = found.get("time")
    if not isinstance(made, float) or made < since:
        return None
    texts = [found.get(field) for field in ("reason", "date", "report")]
    if not all(isinstance(text, str) for text in texts):
        return None
    return Verdict(found["status"], *texts)  # type: ignore[arg-type]


def _prove_once(name: str, device: torch.device, *, anew: bool) -> Verdict:
    """Prove under the lock that all processes of this user share."""
    from . import child

    since = time.time()
    try:
        import filelock

        path = path_of(name, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(str(path.with_suffix(".lock")), timeout=WAIT_SECONDS)
    except ImportError as error:
        return Verdict("none", f"the package filelock is missing ({error})")
    except OSError as error:
        return Verdict("none", _unwritable(error))
    try:
        lock.acquire()
    except filelock.Timeout:
        return Verdict("none", f"another process has been proving it for more than {WAIT_SECONDS:.0f} s")
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        return Verdict("none", _unwritable(error))
    try:
        # Another process may have been here while this one waited; what it could not decide, this one cannot either.
        if kept := _kept(name, device, since if anew else 0.0):
            return kept
        attempt = cache.read_json(path.with_suffix(".attempt"))
        if attempt and isinstance(attempt.get("time"), float) and since <= attempt["time"] <= time.time():
            return Verdict("none", str(attempt.get("reason", "")))
        _log.warning(
            "checking the %r kernels on %s in a process of its own, once (up to %.0f s); the result is kept in %s",
            name, cache.describe_device(device)["device"], TIME_LIMIT, path.parent,
        )  # fmt: skip
        try:
            run = child.run(name, device, seconds=TIME_LIMIT)
        except Exception as error:  # a training run must not end because its kernels could not be checked
            run = child.Run("none", f"the proof itself failed: {type(error).__name__}: {error}")
        try:
            return keep(name, device, run)
        except OSError as error:
            if run.status == "passed":  # true of this process all the same
                _log.warning("the result could not be kept: %s", _unwritable(error))
            return Verdict(run.status, run.reason)
    finally:
        lock.release()


def _unwritable(error: Exception) -> str:
    return f"the cache folder cannot be written to ({error}); set GRPO_KERNELS_CACHE to one that can"
