"""The waits of the other tests: a child that hangs is ended with its own children, one that gets on
is not.
"""

import os
import sys
import time
from pathlib import Path

import processes
import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="needs /proc: elsewhere nothing hangs"
)
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(10_000)"])
print(child.pid, flush=True)
time.sleep(10_000)
"""


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_child_that_hangs_is_ended_with_its_own(monkeypatch):
    child = processes.Child([sys.executable, "-c", HANGS])
    processes.wait(child, until=child.written)
    grandchild = int(child.output("stdout"))
    assert runs(grandchild)
    monkeypatch.setattr(processes, "QUIET_LOOKS", 2)
    with pytest.raises(AssertionError, match=rf"no use of the CPU.*\n{grandchild}\n"):
        processes.wait(child)
    assert not runs(child.pid) and child not in processes.RUNNING
    while runs(grandchild):  # the signal is on its way
        time.sleep(0.01)


@pytest.mark.parametrize("what", ["CPU", "output"])
def test_patience_starts_anew_when_a_child_gets_on(monkeypatch, what):
    now = {"CPU": 0.0, "output": 0}
    monkeypatch.setattr(processes, "cpu_seconds", lambda *_: now["CPU"])
    patience = processes.Patience(1, 2, written=lambda: now["output"])

    def look(by):
        now[what] += by
        patience.next = 0.0
        return patience.hung()

    assert not any(look(2 * processes.STEP) for _ in range(2 * processes.QUIET_LOOKS))
    assert [look(0) for _ in range(processes.QUIET_LOOKS + 1)].index(
        True
    ) >= processes.QUIET_LOOKS - 1
    assert not look(2 * processes.STEP)


def test_cpu_time_is_that_of_children_too():
    before, code = (
        processes.cpu_seconds(os.getpid()),
        "import time\nwhile time.process_time() < 0.5: pass",
    )
    assert processes.run([sys.executable, "-c", code]).returncode == 0
    assert processes.cpu_seconds(os.getpid()) - before > 0.4


def test_exit_status_and_output():
    done = processes.run(
        [sys.executable, "-c", "import sys; print(1); print(2, file=sys.stderr); sys.exit(3)"]
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "1\n", "2\n")
