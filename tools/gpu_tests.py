"""Runs pytest so that a test which hangs costs its own time and no other's result.

    python tools/gpu_tests.py --xml FILE --suite NAME --each SECONDS -- PYTEST-ARGUMENTS

FILE is JUnit XML, whole after every test; a test that is running stands in it as one that did not end.  After
``--each`` seconds a test is interrupted; where that does not help, because it waits inside a driver, the process writes
down where every thread is and ends, and a new process continues with the next test.

Several runs, one after the other, may write to one file, each under a name of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import pytest

OPENING = '<?xml version="1.0" encoding="utf-8"?>\n<testsuites><testsuite name="gpu-check">\n'
CLOSING = "</testsuite></testsuites>\n"
UNENDED = "did not end"
GRACE = 4.0
"""Seconds between the interruption of a test and the end of its process."""

STDERR = os.fdopen(os.dup(2), "w")
"""As it is before pytest takes it away."""


class Outcomes:
    """The file: the cases so far, and the one that is running."""

    def __init__(self, path: Path, suite: str) -> None:
        self.suite = suite
        if not path.exists() or not path.stat().st_size:
            path.write_text(OPENING + CLOSING)
        self.file = os.open(path, os.O_RDWR)
        self.place = path.read_bytes().rindex(CLOSING.encode())

    def put(self, name: str, seconds: float, inner: str, *, ended: bool) -> None:
        """The case at the end of the file; one that has ended stays, the next one comes after it."""
        case = f"<testcase classname={quoteattr(self.suite)} name={quoteattr(name)} time={quoteattr(f'{seconds:.3f}')}>"
        text = f"{case}{inner}</testcase>\n".encode("ascii", "xmlcharrefreplace")
        size = os.fstat(self.file).st_size
        # One write, padded to cover what stood there: the file is whole whenever the process is killed.
        os.pwrite(self.file, (text + CLOSING.encode()).ljust(size - self.place), self.place)
        if ended:
            self.place += len(text)


def cases(path: Path, suite: str) -> list[tuple[str, str]]:
    """(name, outcome) of every case of a suite: "" passed, else what kind of trouble and its first words."""
    if not path.exists():
        return []
    found = []
    for case in ElementTree.parse(path).iter("testcase"):
        if case.get("classname") == suite:
            inner = next(iter(case), None)
            found.append((case.get("name"), "" if inner is None else f"{inner.tag}: {inner.get('message', '')}"))
    return found


def text_of(value: str) -> str:
    """What may stand in XML, and not too much of it."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in value[-3000:])


def first_words(report: pytest.TestReport) -> str:
    """Of what went wrong."""
    crash = getattr(report.longrepr, "reprcrash", None)
    message = report.longreprtext if crash is None else crash.message
    return (message.strip() or "no message").splitlines()[0][:300]


# ---- the plugin


class Plugin:
    def __init__(self, outcomes: Outcomes, before: set[str], seconds: float) -> None:
        self.outcomes, self.before, self.seconds = outcomes, before, seconds
        self.reports: list[pytest.TestReport] = []

    def pytest_collection_modifyitems(self, config, items):
        done = [item for item in items if item.nodeid in self.before]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item not in done]

    def pytest_runtest_logstart(self, nodeid, location):
        self.reports = []
        print(nodeid, file=STDERR, flush=True)
        self.outcomes.put(nodeid, 0, f"<error message={quoteattr(UNENDED)}/>", ended=False)

    def pytest_runtest_logreport(self, report):
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid, location):
        inner = ""
        for report in self.reports:
            if report.failed:
                tag = "failure" if report.when == "call" else "error"
                message, text = quoteattr(text_of(first_words(report))), escape(text_of(report.longreprtext))
                inner = f"<{tag} message={message}>{text}</{tag}>"
                break
            if report.skipped:
                reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longreprtext
                inner = f"<skipped message={quoteattr(text_of(reason))}/>"
        self.outcomes.put(nodeid, sum(report.duration for report in self.reports), inner, ended=True)

    @contextlib.contextmanager
    def limited(self, item):
        def interrupt(number, frame):
            raise pytest.fail.Exception(f"took longer than {self.seconds:g} s", pytrace=True)

        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        faulthandler.dump_traceback_later(self.seconds + GRACE, exit=True, file=STDERR)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGALRM, before)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item):
        with self.limited(item):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        with self.limited(item):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item):
        with self.limited(item):
            return (yield)


def pytest_configure(config):
    path, suite = Path(os.environ["GPU_TESTS_XML"]), os.environ["GPU_TESTS_SUITE"]
    before = {name for name, _ in cases(path, suite)}
    config.pluginmanager.register(Plugin(Outcomes(path, suite), before, float(os.environ["GPU_TESTS_EACH"])))


# ---- the command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--xml", type=Path, required=True, help="the file of outcomes")
    parser.add_argument("--suite", required=True, help="the class name of these tests in the file")
    parser.add_argument("--each", type=float, default=20, help="seconds of a test")
    parser.add_argument("pytest", nargs="+", help="arguments of pytest, after --")
    options = parser.parse_args()
    environment = {
        **os.environ,
        "GPU_TESTS_XML": str(options.xml.resolve()),
        "GPU_TESTS_SUITE": options.suite,
        "GPU_TESTS_EACH": str(options.each),
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_tests", "-p", "no:cacheprovider", *options.pytest]
    known, status = len(cases(options.xml, options.suite)), 0
    found: list[tuple[str, str]] = []
    while True:
        ended, before = subprocess.run(command, env=environment).returncode, len(found)
        found = cases(options.xml, options.suite)[known:]
        # 5: no test is left to run, which is an error only where none has run.
        status = max(status, 0 if ended == 5 and found else ended)
        if len(found) == before or not found[-1][1].endswith(UNENDED):
            break
    troubles = [(name, outcome) for name, outcome in found if outcome and not outcome.startswith("skipped")]
    skipped = sum(outcome.startswith("skipped") for _, outcome in found)
    for name, outcome in troubles:
        print(f"{name}: {outcome[:300]}")
    told = f"{len(found) - len(troubles) - skipped} passed, {len(troubles)} failed, {skipped} skipped"
    print(told + "".join(f", {name.rpartition('/')[2]} {UNENDED}" for name, o in troubles if o.endswith(UNENDED)))
    return 1 if troubles or status else 0


if __name__ == "__main__":
    sys.exit(main())
