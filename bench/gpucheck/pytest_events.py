"""A pytest plugin (-p gpucheck.pytest_events): an event per test; no test spoils another.

After each test the device is waited for. If it reports an error that stays, or a test takes longer
than GPUCHECK_TEST_SECONDS, the process ends at once with that test to blame; xdist starts another.
Needs -s: events must not be captured.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading

import pytest

from .events import emit

SECONDS = float(os.environ.get("GPUCHECK_TEST_SECONDS", "60"))
NAMES = {"passed": "right", "failed": "wrong", "skipped": "skipped"}


def pytest_configure(config) -> None:
    # The controller of the processes, or the only one, reports.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reporter(), "gpucheck-reporter")


def pytest_collection_modifyitems(items) -> None:
    """What compiles for long, last."""
    items.sort(key=lambda item: "triton" in item.nodeid)


class Reporter:
    def __init__(self) -> None:
        self.failed: set[str] = set()
        self.listed = False

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids) -> None:
        self.list(ids)

    def pytest_collection_finish(self, session) -> None:
        self.list([item.nodeid for item in session.items])

    def list(self, names: list[str]) -> None:
        """What is to come, once: a run that is cut off can then say what it did not reach."""
        if names and not self.listed:
            self.listed = True
            emit(1, event="todo", cases=list(names))

    def pytest_collectreport(self, report) -> None:
        if report.failed and report.nodeid not in self.failed:  # each process says so
            self.failed.add(report.nodeid)
            emit(1, event="test", case=report.nodeid, result="error", note=reason(report)[:300])

    def pytest_runtest_logreport(self, report) -> None:
        """An event per test: its call, or its first failure, or why it was skipped."""
        call = report.when == "call" or (report.when == "setup" and report.skipped)
        if report.nodeid in self.failed or not (call or report.failed):
            return
        note = ""
        if report.failed:
            self.failed.add(report.nodeid)
            note = reason(report)
        elif report.skipped and isinstance(report.longrepr, tuple):
            note = str(report.longrepr[2])
        result = NAMES[report.outcome]
        if report.failed and "crashed while running" in note:
            result = "fault"
        seconds = round(report.duration, 2)
        emit(1, event="test", case=report.nodeid, result=result, note=note[:300], seconds=seconds)


def reason(report) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return " ".join(text.split()) or "no message"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """In the process that runs the test: limits its time, the second time without Python."""
    emit(2, event="running", case=item.nodeid)
    seconds = SECONDS * (3 if "triton" in item.nodeid else 1)  # it compiles
    faulthandler.dump_traceback_later(seconds + 10, exit=True, file=sys.__stderr__)
    timer = threading.Timer(
        seconds, blame, (item.nodeid, "hang", f"not over after {seconds:.0f} s")
    )
    timer.daemon = True
    timer.start()
    try:
        return (yield)
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    finally:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                blame(item.nodeid, "fault", f"the device is lost: {str(error).splitlines()[0]}")


def blame(test: str, result: str, note: str) -> None:
    """Ends this process, on standard error: standard output belongs to xdist."""
    emit(2, event="test", case=test, result=result, note=note)
    faulthandler.dump_traceback(file=sys.__stderr__)
    os._exit(70)
