"""Strikes at processes that write files: a preloaded library that sees each call that changes a
file, and a server that forks runs under it.
"""

import json
import os
import random
import select
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import processes
import pytest

SHIM = Path(__file__).with_name("crash.c").read_text()
OFF, PASS, KILL, TEAR, INTERRUPT, STOP, FULL, READ_ONLY = range(8)

SERVER = """
    import ctypes, gc, json, os, resource, signal, sys, time, traceback, uuid, warnings
    import torch
    import torch._dynamo  # which optimizers import
    import torch.distributed.checkpoint as dcp
    import twa
    from twa.basis import file as basis_file
    from twa.cli import main as cli
    from twa.io.candidates import Candidates
    from twa.merge import report, run as merge
    from twa.packing import to_file as pack
    from twa.tasks import contract as tasks

    torch.set_num_threads(1)  # nothing may have started threads when a run is forked
    pack.SAVE_SECONDS = 0.0  # a position after each block
    merge.SAVE_SECONDS = float("inf")  # no state that depends on the machine
    Candidates.__init__.__kwdefaults__["block_bytes"] = 2000  # the smallest blocks
    report.picture = lambda *_: b"a picture, which takes a second"
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])

    def export(folder, candidates, task):
        model = tasks.load_task(task).model()
        subspace = twa.Subspace.from_candidates(model, Candidates(candidates))
        def save():
            try:
                subspace.save(folder, dcp=True, basis=True)
            except OSError as error:
                print("failed:", error)
                return 2
            except dcp.CheckpointException as error:  # quotes tracebacks
                print("failed:", folder, *(e for e, _ in error.failures.values()))
                return 2
            return 0
        return save

    def record(folder, steps, back=None, room=None, **options):
        # Snapshots of these steps; after the last one rewind(back), and as many of another run. At
        # step `room` there is room on the disk again.
        def net(seed, step):  # after so many steps, of which those above `back` depend on the seed
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(9, 40), torch.nn.BatchNorm1d(40))
            for k in range(1, step + 1):
                g = torch.Generator().manual_seed(k + 1000 * seed * (back is not None and k > back))
                for t in (*model.parameters(), model[1].running_mean):
                    t.data += 0.1 * torch.randn(t.shape, generator=g)
            return model

        def take(recorder, seed, last):
            for k in range(recorder.count + 1, last + 1):
                if k == room:
                    shim.strike_at(b"", 0, ctypes.c_long(0), -1)
                recorder.model.load_state_dict(net(seed, k).state_dict())
                recorder.count = k
                taken = recorder.record()
                print("step", k, taken, flush=True)
                if not taken or room:
                    recorder.state_dict()  # waits; what failed is tried again

        def work():
            uuid.uuid4 = lambda: uuid.UUID(int=1)  # the name of the run
            warnings.simplefilter("always", twa.io.errors.CandidateWarning)
            try:
                recorder = twa.Recorder(
                    net(0, 0), every=1, path=folder, bits=8, resume=True, **options
                )
                if back is not None and recorder.count > back:
                    recorder.rewind(back)
                take(recorder, 0, steps)
                if back is not None:
                    recorder.rewind(back)
                    take(recorder, 1, steps)
                recorder.close()
            except OSError as error:
                print("failed:", error)
                return 2
            return 0
        return work

    def run(request):
        work = lambda: cli.main(request["argv"])
        if "record" in request:
            work = record(**request["record"])
        if "export" in request:
            work = export(*request["export"])
        if request.get("no_check"):
            basis_file.shutil.disk_usage = lambda _: type("Usage", (), {"free": 1 << 60})
        log, mode = -1, request["mode"]
        if mode == 1:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        point = ctypes.c_long(request["point"])
        shim.strike_at(os.fsencode(request["below"]), mode, point, log)
        try:
            return work()
        except SystemExit as error:
            return error.code
        except BaseException:
            traceback.print_exc()
            return 99
        finally:
            shim.strike_at(b"", 0, ctypes.c_long(0), -1)

    def answer(pid, options=0):
        _, status = os.waitpid(pid, options)
        stopped = os.WIFSTOPPED(status)
        code = "stopped" if stopped else os.waitstatus_to_exitcode(status)
        print(json.dumps({"pid": pid, "code": code}), flush=True)

    gc.collect(), gc.freeze()  # else each run would copy what its collector touches
    print("ready", flush=True)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "go_on" in request:
            os.kill(request["go_on"], signal.SIGCONT)
            answer(request["go_on"])
            continue
        pid = os.fork()
        if not pid:
            resource.setrlimit(resource.RLIMIT_CPU, (600, 600))  # a run without end
            out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2)
            code = run(request)
            if request.get("whole_exit"):
                sys.exit(code)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        if (signal_after := request.get("signal_after")):
            time.sleep(signal_after[1])
            os.kill(pid, signal_after[0])
        answer(pid, os.WUNTRACED)
"""

TASK = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(8, {wide}), nn.BatchNorm1d({wide})
            self.last = nn.Linear({wide}, 1)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            return self.last(torch.tanh(self.norm(self.first(x))))

    def data(seed, count):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 8, generator=g)
        return list(zip(x.split(10), x.sum(1, keepdim=True).sin().split(10)))

    def model():
        return Net()

    def train_data():
        return data(1, 40)

    def val_data():
        return train_data()  # so that a trained average is the best

    def loss(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])
"""


def start(folder):
    """A server, with its files in this folder; skips the test where there can be none."""
    if (
        not sys.platform.startswith("linux")
        or (compiler := shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")) is None
    ):
        pytest.skip("needs Linux and a C compiler, for the library that strikes at calls")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"],
        check=True,
    )
    return Server(folder)


class Server:
    """server(argv=...) runs `twa ARGV`, server(export=(folder, candidates, task)) Subspace.save,
    server(record={"folder": ..., "steps": ...}) a twa.Recorder; returns (exit status, negative for
    a signal; output).

    below, mode, point   strike at this call below this folder
    signal_after         (signal, seconds): sent from outside
    """

    def __init__(self, folder):
        self.folder, self.calls = folder, []
        self.process = processes.Child(
            [sys.executable, "-c", textwrap.dedent(SERVER)],
            env=os.environ | {"LD_PRELOAD": str(folder / "shim.so"), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        assert self._line() == "ready\n"
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        processes.end(self.process)
        self.process.stdout.close()

    def _line(self):
        """The next line it says, for which it may take as long as it gets on."""
        said = [self.process.stdout]
        processes.wait(self.process, until=lambda: select.select(said, [], [], 0.5)[0], every=0)
        return self.process.stdout.readline()

    def _ask(self, request):
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        self.process.stdin.flush()
        line = self._line()
        assert line, self.process.output("stderr")
        return json.loads(line)

    def __call__(self, below="", mode=OFF, point=0, name="output", **request):
        files = {"output": self.folder / name, "log": self.folder / "log"}
        if "argv" in request:
            request["argv"] = [str(a) for a in request["argv"]]
        reply = self._ask({"below": below, "mode": mode, "point": point} | files | request)
        self.pid = reply["pid"]
        if mode == PASS:
            self.calls = [line.split("\t") for line in files["log"].read_text().splitlines()]
        return reply["code"], files["output"].read_text()

    def go_on(self, pid, name="output"):
        """A run that was stopped, to its end."""
        return self._ask({"go_on": pid})["code"], (self.folder / name).read_text()


def points_of(calls, count, seed=0):
    """(mode, point) of a kill before every call and in the middle of every write; a sample of
    `count` of them unless all are asked for.
    """
    points = [
        (mode, k)
        for k, (call, *_) in enumerate(calls, 1)
        for mode in ((KILL, TEAR) if call == "write" else (KILL,))
    ]
    return (
        points
        if os.environ.get("TWA_CRASH_POINTS") == "all"
        else sorted(random.Random(seed).sample(points, min(count, len(points))))
    )
