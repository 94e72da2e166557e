"""What happens to `twa average` on several ranks when something goes wrong, and the bytes of a step
between two hosts, counted on the interface.

    python bench/faults.py [--save] [--only WORD] [--sharding columns]

--save writes bench/results/faults.md. Hosts are namespaces on this machine (tests/hosts.py), which
need root; ranks are processes joined by gloo under torchrun. Each fault strikes a rank in its step
12 of 24. Then the run is continued with --resume, and its coefficients are compared with those of a
run that nothing has disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import hosts  # noqa: E402
import processes  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from twa.io.tables import markdown_table  # noqa: E402

from twa_kernels.machine import processor  # noqa: E402

STEPS, AT, TIMEOUT = 24, 12, 8
SHARDINGS = ("replicate", "columns")
PAGE = ROOT / "bench" / "results" / "faults.md"

STRIKE = f"""
    import json, os, signal, sys, time
    from pathlib import Path

    fault, folder = json.loads(os.environ["FAULT"]), Path(os.environ["FOLDER"])
    rank, steps = int(os.environ["RANK"]), 0

    def strike(place):
        here = place == fault["place"] and rank == fault["rank"] and steps == {AT - 1}
        if here and not (folder / "struck").exists():
            (folder / "struck").touch()
            exec(fault["what"], globals())

    def until(name):
        while not (folder / name).exists():
            time.sleep(0.01)
"""

TASK = """
    import torch
    from strike import strike
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(8, 64), nn.Tanh(), nn.Dropout(0.2), nn.Linear(64, 1))

        def forward(self, x):
            if self.training:
                strike("forward")
            y = super().forward(x)
            if y.requires_grad:
                y.register_hook(lambda _: strike("backward"))
            return y

    class Data(TensorDataset):
        def __getitem__(self, k):
            strike("data")
            return super().__getitem__(k)

    def data(seed, count):
        x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
        return DataLoader(Data(x, x.sum(1, keepdim=True).sin()), batch_size=10, shuffle=seed == 1)

    def model():
        return Net()

    def train_data(seed=0):
        return data(1, 130)

    def val_data():
        return data(2, 50)

    def loss(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])
"""

#: `twa`, with its errors in a file, and a lock that is held until the process has ended
PROGRAM = """
    import fcntl, os, sys
    import strike
    log = os.open(strike.folder / f"rank{strike.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    running = open(strike.folder / f"rank{strike.rank}.running", "w")
    fcntl.flock(running, fcntl.LOCK_EX)
    import twa
    from twa.cli import main as cli

    step = twa.SubspaceOptimizer.step

    def struck(self, *arguments):
        strike.strike("step")
        done = step(self, *arguments)
        strike.steps += 1
        return done

    twa.SubspaceOptimizer.step = struck
    sys.exit(cli.main([a for a in sys.argv[1:] if strike.fault.get("drops") != [strike.rank, a]]))
"""

WAITS = "until('go')"
DIES = "os.kill(os.getpid(), signal.SIGKILL)"


@dataclass
class Fault:
    """What happens, where, and how the run is continued."""

    name: str
    what: str = ""  # code that the rank runs
    place: str = "step"
    rank: int = 1
    hosts: int = 0  # 0: this machine as it is
    ranks: int = 2
    outside: Callable[[Run], None] | None = None  # meanwhile, from outside
    options: list[str] = field(default_factory=list)
    torchrun: list[str] = field(default_factory=list)
    drops: str = ""  # an argument that the rank does not get
    gone: tuple[int, ...] = ()  # ranks whose end is not waited for
    again: int = 0  # ranks that continue; 0: as many
    on_the_rest: bool = False  # they are the hosts that are left


class Run:
    """A job in a folder of its own."""

    def __init__(self, base: Path, fault: Fault, sharding: str, network: hosts.Hosts | None):
        self.base, self.fault, self.sharding, self.network = base, fault, sharding, network
        self.folder = Path(tempfile.mkdtemp(dir=base))
        self.out = self.folder / "disk" / "out"
        self.out.parent.mkdir()
        self.notes: list[str] = []

    def start(self, ranks: int, fault: Fault | None, *more: str) -> list[processes.Child]:
        """torchrun on this machine, or on every host."""
        candidates = [str(self.base / f"c{k}.safetensors") for k in range(6)]
        arguments = [
            *(str(self.base / "program.py"), "average", str(self.base / "task.py"), *candidates),
            *("-o", str(self.out), "--steps", str(STEPS), "--save-every", "1", "--patience", "0"),
            *("--twa", "t:tensor:4", "--batches-per-step", "6", "--sharding", self.sharding, *more),
        ]
        what = {"place": "", "rank": 0}
        if fault is not None:
            what = {"place": fault.place, "rank": fault.rank, "what": fault.what}
            if fault.drops:
                what["drops"] = [fault.rank, str(self.base / fault.drops)]
        given = {"FAULT": json.dumps(what), "FOLDER": str(self.folder)}
        options = fault.torchrun if fault else []
        if options:  # a new store after a restart
            given["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        if self.network is not None:
            return self.network.torchrun(arguments, options=options, **given)
        if fault is None:  # torchrun would only take time
            set_ = ["env", *(f"{name}={value}" for name, value in given.items())]
            return processes.start_job(*[[*set_, sys.executable, *arguments]] * ranks)
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        run += ["--nproc-per-node", str(ranks), *options, *arguments]
        return [processes.Child(run, env=processes.environment() | given)]

    def struck(self) -> float:
        """When it happened; 0: not at all."""
        file = self.folder / "struck"
        return file.stat().st_mtime if file.exists() else 0.0

    def is_running(self, rank: int) -> bool:
        """Whether the process of a rank is there."""
        try:
            with open(self.folder / f"rank{rank}.running") as f:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            pass
        return False

    def disturbed(self) -> dict[str, str]:
        """The run with its fault: what ranks said, and seconds until they had stopped."""
        fault = self.fault
        children, begin = self.start(fault.ranks, fault, *fault.options), time.time()
        if fault.what or fault.outside:
            processes.wait(*children, until=self.struck)
        if fault.outside:
            fault.outside(self)
            (self.folder / "go").touch()
        others = [rank for rank in range(fault.ranks) if rank not in fault.gone]
        while any(self.is_running(r) for r in others) and any(c.poll() is None for c in children):
            time.sleep(0.02)
        seconds = time.time() - (self.struck() or begin)
        last = time.time() + 60  # an agent of torchrun may wait for one that is gone
        while any(c.poll() is None for c in children) and time.time() < last:
            time.sleep(0.05)
        if any(c.poll() is None for c in children):
            self.notes.append("an agent of torchrun waited for more than a minute")
        processes.end(*children)
        said = [f"rank {r}: {self.said(r)}" for r in range(fault.ranks)]
        stopped = f"{seconds:.1f}" if fault.what and not self.is_finished() else "-"
        return {"said": "; ".join([*said, *self.notes]), "stopped": stopped, "state": self.state()}

    def said(self, rank: int) -> str:
        """The lines with an error in what a rank has printed."""
        log = self.folder / f"rank{rank}.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        pattern = r"(?:twa: (?:error|warning|stopped)|\S*(?:Error|Exit)\b).*"
        lines = [re.sub(r"^\[rank\d+\]: ", "", line) for line in re.split(r"[\n\r]", text)]
        found = dict.fromkeys(line for line in lines if re.fullmatch(pattern, line))
        short = [line.replace(str(self.folder), "").replace(str(self.base), "") for line in found]
        short = [shortened(line) for line in short if "Exception raised from" not in line]
        return " / ".join(short[-2:]) or "nothing"

    def is_finished(self) -> bool:
        return (self.out / "results.json").exists() and not (self.out / "state.pt").exists()

    def state(self) -> str:
        """Whether a whole state is there."""
        if self.is_finished():
            return "finished"
        if not (self.out / "state.pt").exists():
            return "none"
        saved = torch.load(self.out / "state.pt", weights_only=True)
        return f"whole, step {saved['under_way']['position']['step']}"

    def result(self) -> tuple[torch.Tensor, bytes]:
        """Coefficients, and the bits of what was written."""
        x = json.loads((self.out / "coefficients.json").read_text())["x"]
        return torch.tensor(x), (self.out / "averaged.safetensors").read_bytes()

    def resumed(self, expected: tuple[torch.Tensor, bytes]) -> str:
        """The run continued, and how its result compares."""
        fault = self.fault
        if not fault.on_the_rest:
            self.network = None
        ranks = len(self.network.alive) if self.network else fault.again or fault.ranks
        if not self.is_finished():
            children = self.start(ranks, None, "--resume")
            done = processes.finish(*children)
            if any(d.returncode for d in done):
                return "failed: " + " / ".join(self.said(r) for r in range(ranks))
        x, data = self.result()
        same = torch.equal(x, expected[0]) and data == expected[1]
        apart = float((x - expected[0]).abs().max() / expected[0].abs().max())
        how = "the same bits" if same else f"agrees to {apart:.1e}"
        return how if ranks == fault.ranks else f"{how} (on {ranks} of {fault.ranks} ranks)"


# From outside ------------------------------------------------------------------------------------


def cut_for_seconds(run: Run) -> None:
    run.network.cut(1)
    (run.folder / "go").touch()
    time.sleep(5)
    run.network.mend(1)


def slow_down(run: Run) -> None:
    try:
        run.network.slow(1, "netem", "delay", "20ms", "rate", "1mbit")
        run.notes.append("netem, 20 ms and 1 Mbit/s")
    except OSError:
        run.network.slow(1, "tbf", "rate", "1mbit", "burst", "16kbit", "latency", "400ms")
        run.notes.append("1 Mbit/s by tbf: this kernel has no netem for a delay")


def second_run(run: Run) -> None:
    (run.folder / "second").mkdir()
    first, run.folder = run.folder, run.folder / "second"
    done, _ = processes.finish(*run.start(2, None, "--resume"))
    said, run.folder = run.said(0).replace(str(first), ""), first
    run.notes.append(f"the second run: {said}, exit status {done.returncode}")


def fill_disk(run: Run) -> None:
    with contextlib.suppress(OSError), open(run.out.parent / "filler", "wb", buffering=0) as f:
        while True:
            f.write(bytes(1 << 12))


FAULTS = [
    Fault("a rank raises in forward", "raise RuntimeError('3 is not 4')", "forward"),
    Fault("a rank raises in backward", "raise ValueError('too short')", "backward"),
    Fault("a rank raises in its data", "raise OSError(5, 'Input/output error', 'x.bin')", "data"),
    Fault("a rank raises in the step", "raise FloatingPointError('of rank 0')", rank=0),
    Fault("a rank is out of memory", "raise MemoryError('no room for 7 GB')"),
    Fault("a rank calls sys.exit(3)", "sys.exit(3)", "forward"),
    Fault("Ctrl-C (SIGINT) on one rank", "signal.raise_signal(signal.SIGINT)"),
    Fault("SIGTERM on one rank", "os.kill(os.getpid(), signal.SIGTERM)"),
    Fault("kill -9 of rank 1", DIES),
    Fault("kill -9 of rank 0", DIES, rank=0),
    Fault("kill -9 of one of 3 ranks, resumed on 1", DIES, ranks=3, again=1),
    Fault(
        f"a rank hangs (SIGSTOP), --timeout {TIMEOUT}",
        "os.kill(os.getpid(), signal.SIGSTOP)",
        options=["--timeout", str(TIMEOUT)],
        gone=(1,),
    ),
    Fault(
        "kill -9, torchrun restarts",
        DIES,
        rank=0,
        torchrun=["--max-restarts", "3"],
        options=["--resume"],
    ),
    Fault("the disk is full at a save", WAITS, outside=fill_disk),
    Fault("a second run in the same directory", WAITS, outside=second_run),
    Fault("a rank has other candidates", drops="c5.safetensors"),
    Fault("nothing, 2 hosts", hosts=2),
    Fault("nothing, 3 hosts", hosts=3, ranks=3),
    Fault("a link is cut for 5 s", WAITS, hosts=2, outside=cut_for_seconds),
    Fault(
        f"a link is cut for good, --timeout {TIMEOUT}",
        WAITS,
        hosts=2,
        outside=lambda run: run.network.cut(1),
        options=["--timeout", str(TIMEOUT)],
    ),
    Fault("a link is slow", WAITS, hosts=2, outside=slow_down),
    Fault(
        "a host is killed, resumed on the rest",
        WAITS,
        hosts=3,
        ranks=3,
        outside=lambda run: run.network.kill(2),
        gone=(2,),
        on_the_rest=True,
    ),
    Fault(
        "the host of the meeting point is killed",
        WAITS,
        hosts=2,
        outside=lambda run: run.network.kill(0),
        gone=(0,),
        on_the_rest=True,
    ),
]


@contextlib.contextmanager
def small_disk(run: Run) -> Iterator[None]:
    """A file system of 1 MB for the output, for a run that is to fill it."""
    if run.fault.outside is not fill_disk:
        yield
        return
    where = str(run.out.parent)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "twa", where], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", where], check=True)


def measure(base: Path, fault: Fault, sharding: str, expected: Expected) -> dict[str, str]:
    """One row of the table."""
    network = hosts.Hosts(fault.hosts) if fault.hosts else contextlib.nullcontext()
    with network as up:
        run = Run(base, fault, sharding, up)
        with small_disk(run):
            row = run.disturbed()
            (run.out.parent / "filler").unlink(missing_ok=True)
            row["result"] = run.resumed(expected(sharding, fault.ranks))
        shutil.rmtree(run.folder)
    return {"fault": fault.name, "sharding": sharding} | row


class Expected:
    """Results of runs that nothing disturbs, on one host."""

    def __init__(self, base: Path) -> None:
        self.base, self.known = base, {}

    def __call__(self, sharding: str, ranks: int) -> tuple[torch.Tensor, bytes]:
        key = sharding, ranks
        if key not in self.known:
            run = Run(self.base, Fault("nothing", ranks=ranks), sharding, None)
            for rank, done in enumerate(processes.finish(*run.start(ranks, None))):
                assert done.returncode == 0, run.said(rank)
            self.known[key] = run.result()
        return self.known[key]


def prepare(base: Path) -> None:
    """The task, its six candidates, and the program."""
    for name, text in {"strike.py": STRIKE, "task.py": TASK, "program.py": PROGRAM}.items():
        (base / name).write_text(textwrap.dedent(text))
    torch.manual_seed(0)
    start = {"0.weight": (64, 8), "0.bias": (64,), "3.weight": (1, 64), "3.bias": (1,)}
    weights = {name: torch.randn(shape) * 0.3 for name, shape in start.items()}
    for k in range(6):
        weights = {name: w + 0.05 * torch.randn(w.shape) for name, w in weights.items()}
        save_file(weights, base / f"c{k}.safetensors")


# Bytes on the wire -------------------------------------------------------------------------------

#: (candidates, inputs, outputs, granularity, segments)
SIZES = [(12, 80, 80, 128, 50), (16, 1024, 512, 128, 4096)]
FIRST, LAST = 20, 120  # steps between which bytes are counted
LOOP = """
    import json, os, sys
    import processes, torch, twa
    import torch.distributed as dist

    folder, inputs, outputs, granularity, first, last = sys.argv[1], *map(int, sys.argv[2:])

    def sent():
        with open("/proc/net/dev") as f:
            fields = next(line.split() for line in f if "eth0:" in line)
        return {"bytes": int(fields[9]), "packets": int(fields[10]), "received": int(fields[1])}

    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    model = torch.nn.Linear(inputs, outputs, bias=False)
    subspace = twa.Subspace.from_candidates(
        model, twa.Candidates(f"{folder}/w*.safetensors"), granularity=granularity,
        sharding="replicate")
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=1e-3)
    counts = []
    for step in range(last + 1):
        if step in (first, last):
            dist.barrier()
            counts.append(sent())
        model(torch.randn(8, inputs)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    each = {name: (counts[1][name] - counts[0][name]) / (last - first) for name in counts[0]}
    dist.barrier()
    print(json.dumps(each | {"nL": subspace.coefficients.numel()}))
    processes.leave_job()
"""


def wire(base: Path) -> list[dict[str, str]]:
    """Bytes of a step that leave each of two hosts, beside the formula."""
    (base / "loop.py").write_text(textwrap.dedent(LOOP))
    rows = []
    for n, inputs, outputs, granularity, segments in SIZES:
        folder = base / f"wire{n}"
        folder.mkdir()
        for k in range(n):
            save_file({"weight": torch.randn(outputs, inputs)}, folder / f"w{k}.safetensors")
        numbers = map(str, (inputs, outputs, granularity, FIRST, LAST))
        with hosts.Hosts(2) as network:
            done = processes.finish(
                *network.torchrun([str(base / "loop.py"), str(folder), *numbers])
            )
        for rank, d in enumerate(done):
            assert d.returncode == 0, d.stderr
            found = json.loads(d.stdout.splitlines()[-1])
            assert found["nL"] == n * segments
            message = 4 * found["nL"] + 8
            rows.append(
                {
                    "n x L": f"{n} x {segments}",
                    "rank": str(rank),
                    "message, 4 n L + 8": f"{message}",
                    "ring, 2 (K - 1) / K of it": f"{message}",
                    "4 n L + 1 KB": f"{4 * found['nL'] + 1024}",
                    "sent": f"{found['bytes']:.0f}",
                    "packets": f"{found['packets']:.1f}",
                    "without 66 bytes a packet": f"{found['bytes'] - 66 * found['packets']:.0f}",
                    "received": f"{found['received']:.0f}",
                }
            )
    return rows


def shortened(line: str) -> str:
    """A line of a rank without what gloo guesses, and what the table says of it anyway."""
    line = re.sub(
        r"(?:another rank died or does not answer) \((.*?)\)?$", r"lost a rank (\1)", line
    )
    line = re.sub(r"\. This is typically caused.*", "", line)
    line = re.sub(r"^twa: (error: )?(rank \d+: )?", "", line)
    return line[:160] + ")" * (line.count("(", 0, 160) - line.count(")", 0, 160))


def page(rows: list[dict[str, str]], bytes_: list[dict[str, str]], seconds: float) -> str:
    """The result as Markdown."""
    names = {
        "fault": "fault",
        "sharding": "sharding",
        "stopped": "s until the other ranks had stopped",
        "state": "state",
        "result": "coefficients after `--resume`",
        "said": "what each rank printed",
    }
    table = [[row[k].replace("|", "/") for k in names] for row in rows]
    return (
        "# Faults, and bytes on the wire\n\n"
        f"`python bench/faults.py --save` on {processor()}, {len(os.sched_getaffinity(0))} cores,"
        f" torch {torch.__version__}; {seconds / 60:.0f} minutes. Ranks are processes joined by"
        " gloo under torchrun; hosts are namespaces of one machine, each with its own name,"
        f" address and processes. A fault strikes one rank in step {AT} of {STEPS}; states are"
        " saved after every step. Seconds count from the fault to the end of the last process of"
        " the other ranks (of all, where no process was stopped or killed from outside).\n\n"
        "With `columns`, shards of this small model end within groups of 128 weights, so that P is"
        " another rounding on another number of ranks; in these rows coefficients are of two"
        " different bases.\n\n"
        + markdown_table(list(names.values()), table)
        + "\n\n## Bytes of a step between two hosts\n\n"
        f"Replicate, one rank a host, counted on the host's interface over steps {FIRST} to {LAST},"
        " with the headers of Ethernet, IP and TCP.\n\n"
        + markdown_table(list(bytes_[0]), [list(row.values()) for row in bytes_])
        + "\n"
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--save", action="store_true")
    p.add_argument("--only", default="", help="faults whose names have this in them")
    p.add_argument("--sharding", choices=SHARDINGS)
    p.add_argument("--wire", action="store_true", help="bytes only")
    args = p.parse_args()
    if why := hosts.why_not("tc"):
        sys.exit(why)
    begin, rows = time.time(), []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        prepare(base)
        expected = Expected(base)
        bytes_ = wire(base) if not args.only else [{"bytes": "not measured"}]
        print(json.dumps(bytes_, indent=1), flush=True)
        for fault in [] if args.wire else FAULTS:
            for sharding in [args.sharding] if args.sharding else SHARDINGS:
                if args.only in fault.name:
                    rows.append(measure(base, fault, sharding, expected))
                    print(json.dumps(rows[-1]), flush=True)
                    if args.save:
                        PAGE.write_text(page(rows, bytes_, time.time() - begin))
    print(page(rows, bytes_, time.time() - begin))


if __name__ == "__main__":
    main()
