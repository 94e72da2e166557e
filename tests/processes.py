"""Child processes of tests: waited for while they get on, however slow the machine is; ended with
all of their own children when they hang or the test does not wait for them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

#: looks, a second or more apart, that find nothing new, after which a child hangs. On a busy
#: machine the looks come late too.
QUIET_LOOKS = 120
#: CPU seconds, for each process asked about, that are something new: threads that wait for a
#: message of gloo wake up a hundred times a second
STEP = 2.0
#: CPU seconds after which a child never ends: some hundred times what the longest one needs
ENDLESS = 4 * 3600

#: from which pytest lets tests import, see pyproject.toml
FOLDERS = [str(Path(__file__).parents[1] / name) for name in ("tests", "bench")]
RUNNING = set()  # children that nobody has seen end


def cpu_seconds(*pids):
    """CPU time so far of processes, of their children, and of the process groups they lead."""
    ticks, wanted = 0, {str(pid) for pid in pids}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended since
            _, parent, group, *fields = (process / "stat").read_text().rpartition(")")[2].split()
            if wanted & {process.name, parent, group}:
                ticks += sum(map(int, fields[8:12]))  # user, system, and both of its dead children
    return ticks / os.sysconf("SC_CLK_TCK")


class Patience:
    """hung(), asked again and again: whether these processes have for long used no CPU time and
    written nothing. Where the system does not tell (no /proc), they never hang."""

    def __init__(self, *pids, written=lambda: 0):
        self.pids, self.written = pids, written
        self.seen, self.quiet, self.next = (0.0, 0), 0, time.monotonic()

    def hung(self):
        if time.monotonic() < self.next or not Path("/proc/self/stat").exists():
            return False
        cpu, written = cpu_seconds(*self.pids), self.written()
        if abs(cpu - self.seen[0]) >= STEP * len(self.pids) or written != self.seen[1]:
            self.seen, self.quiet = (cpu, written), 0
        self.quiet, self.next = self.quiet + 1, time.monotonic() + 1
        return self.quiet > QUIET_LOOKS or cpu > ENDLESS


class Child(subprocess.Popen):
    """A command that leads a session of its own and writes its output into files."""

    def __init__(self, command, **options):
        self.files = {name: tempfile.TemporaryFile() for name in ("stdout", "stderr")}  # noqa: SIM115
        super().__init__(command, **self.files | {"start_new_session": True} | options)
        RUNNING.add(self)

    def output(self, name):
        """What it has written so far. Its own position in the file stays where it is."""
        file = self.files[name].fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")

    def written(self):
        return sum(os.fstat(f.fileno()).st_size for f in self.files.values())


def wait(*children, until=None, every=0.02):
    """Until all have ended; with until, until it is true or one has ended. They are one job:
    while one gets on, another may wait for it. When they hang: an error with their output."""
    patience = Patience(
        *(c.pid for c in children), written=lambda: sum(c.written() for c in children)
    )
    ended = any if until else all
    try:
        while not (until and until()) and not ended(c.poll() is not None for c in children):
            if patience.hung():
                said = "\n".join(c.output(name)[-2000:] for c in children for name in c.files)
                raise AssertionError(
                    f"no end, no output, no use of the CPU: {[c.args for c in children]}\n{said}"
                )
            time.sleep(every)
    except BaseException:
        end(*children)
        raise


def end(*children):
    """Ends them and what they have started, in whatever state they are."""
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        RUNNING.discard(child)


def finish(*children):
    """Waits for children and whatever they left running is ended: exit status and texts of each."""
    wait(*children)
    end(*children)
    return [
        subprocess.CompletedProcess(c.args, c.returncode, *map(c.output, c.files)) for c in children
    ]


def run(command, **options):
    """subprocess.run of a command, its output captured as text, for as long as it gets on."""
    (done,) = finish(Child(command, **options))
    return done


def environment():
    """That of a child with one thread, which imports what tests do."""
    path = os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def start_job(*commands):
    """Ranks, as torchrun starts them: one command each. They import what tests do."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = environment() | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(len(commands)),
        "LOCAL_WORLD_SIZE": str(len(commands)),
    }
    return [
        Child(command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, command in enumerate(commands)
    ]


def job(size, command):
    """What each of so many ranks of a command prints; an error if one fails."""
    done = finish(*start_job(*[command] * size))
    failed = [f"rank {k}:\n{d.stderr}" for k, d in enumerate(done) if d.returncode]
    assert not failed, "\n".join(failed)
    return [child.stdout for child in done]


def leave_job():
    """Ends the process of a rank whose work is done. Threads of gloo that still let go of their
    last message abort an interpreter that ends, and DDP and device meshes keep them alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
