"""A model of a billion weights averaged on a machine with two cores: memory and time of each part
beside what `twa plan` says.

    python bench/billion.py --folder DIR [--save] [--limit 20e9] [--width 2048] [--depth 20]

Makes 12 checkpoints of a GPT in bfloat16 (24 GB in DIR, kept for the next run), trained on the
standard library's text, four steps between two of them. Then each of these is a job of its own:

    twa pack                  DIR/basis.safetensors, 4 bits, fine segments; on one rank and on two
    twa average --basis       20 steps from the packed basis
    twa average               20 steps from a basis that is packed in memory
    the same on two ranks     with --sharding columns, from the packed basis

Where the system lets a process be limited (a memory cgroup), a job may hold `--limit` bytes, with
the pages of files that it reads. Needs 24 GB and the packed basis (10 GB) on the disk, and most of
an hour. The task that is averaged is in this file, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS
from safetensors.torch import save_file
from torch import Tensor, nn
from twa.basis.segments import segments_of
from twa.distributed import cost
from twa.io.candidates import BLOCK_BYTES
from twa.io.tables import markdown_table
from twa.tasks import chars
from twa.tasks.gpt import GPT

from twa_kernels.machine import processor

WIDTH, DEPTH, ROWS = 2048, 20, 2  # of the model; windows of a batch
CANDIDATES, BETWEEN, STEPS, BITS, RATE = 12, 4, 20, 4, 2e-5
PACK, PACK_RANKS = "twa pack", "twa pack, two ranks"
ANEW, BASIS = "twa average", "twa average --basis"
COLUMNS = "twa average --basis, two ranks, columns"
SIZE = "TWA_BILLION"  # "width depth", for the task in another process

# The task ----------------------------------------------------------------------------------------


def model() -> nn.Module:
    """A GPT whose weights are made in bfloat16."""
    width, depth = map(int, os.environ.get(SIZE, f"{WIDTH} {DEPTH}").split())
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return GPT(chars.VOCABULARY, chars.CONTEXT, width, depth, width // 64)
    finally:
        torch.set_default_dtype(before)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats per character."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def train_data(seed: int = 0) -> chars.Batches:
    return chars.Batches(chars.train_data().data, ROWS, limit=512, shuffle=True, seed=seed)


def val_data() -> chars.Batches:
    return chars.Batches(chars.val_data().data, ROWS, limit=4 * ROWS)


# Its checkpoints ---------------------------------------------------------------------------------


def make(folder: Path) -> None:
    """Trains the model by the signs of its gradients, which takes no memory, and saves it."""
    torch.manual_seed(0)
    net, data = model(), iter(chars.Batches(chars.train_data().data, ROWS, shuffle=True))
    for step in range(1, CANDIDATES * BETWEEN + 1):
        begun = time.perf_counter()
        value = loss(net, next(data))
        value.backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= RATE * p.grad.sign_()
                p.grad = None
        print(f"step {step}: loss {value:.3f}, {time.perf_counter() - begun:.0f} s", flush=True)
        if step % BETWEEN == 0:
            state = {k: v for k, v in net.state_dict().items() if k != "head.weight"}
            path = folder / f"step_{step:03}.safetensors"
            save_file(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)


# Jobs, watched from outside ----------------------------------------------------------------------


@dataclass
class Peak:
    """The most that the processes of a job held at once, in bytes.

    Attributes:
        own: memory of their own; what they share counts once
        files: pages of files, which the system can take back
    """

    own: int = 0
    files: int = 0

    def look(self, pids: Sequence[int]) -> None:
        """Adds what these processes hold now."""
        sizes = [size for pid in pids if (size := resident(pid))]
        shared = max((s["RssShmem"] for s in sizes), default=0)
        self.own = max(self.own, sum(s["RssAnon"] for s in sizes) + shared)
        self.files = max(self.files, sum(s["RssFile"] for s in sizes))


def resident(pid: int) -> dict[str, int]:
    """Bytes of a process in memory, by kind; {} if it has ended."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return {
            k: int(v.split()[0]) * 1024 for k, v in (li.split(":") for li in lines if "Rss" in li)
        }
    return {}


@dataclass
class Run:
    """A finished job."""

    name: str
    seconds: float
    peak: Peak
    limited: bool
    note: str = ""


def descendants(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


@contextlib.contextmanager
def limited(size: float) -> Iterator[Path | None]:
    """A memory cgroup for a job, where the system has version 1 of them and lets this process."""
    group = Path("/sys/fs/cgroup/memory") / f"billion-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(int(size)))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def watch(name: str, command: list[str], limit: float, env: dict[str, str]) -> Run:
    """Runs a command, looking at its memory; ends this process if it fails."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    begun, peak = time.perf_counter(), Peak()
    with limited(limit) as group:

        def enter() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        process = subprocess.Popen(command, env=env, preexec_fn=enter)
        while process.poll() is None:
            peak.look(descendants(process.pid))
            time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{name}: exit status {process.returncode}")
    found = Run(name, time.perf_counter() - begun, peak, group is not None)
    print(
        f"== {name}: {found.seconds:.0f} s, own memory {peak.own / 1e9:.2f} GB, pages of files"
        f" {peak.files / 1e9:.2f} GB{'' if group else ', no limit could be set'}",
        flush=True,
    )
    return found


# The jobs ----------------------------------------------------------------------------------------


def jobs(folder: Path) -> dict[str, list[str]]:
    """The command of each job."""
    python, task = [sys.executable, "-m"], str(Path(__file__).resolve())
    ranks = [*python, "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    files, basis = str(folder / "step_*.safetensors"), str(folder / "basis.safetensors")
    pack = ["twa", "pack", task, files, "--overwrite", "--granularity", "fine", "-o", basis]
    average = ["twa", "average", task, files, "--overwrite", "--steps", str(STEPS)]
    average += ["--twa", f"t:fine:{BITS}", "-o"]
    columns = ["--basis", basis, "--sharding", "columns"]
    return {
        PACK_RANKS: [*ranks, *pack],
        PACK: [*python, *pack],
        ANEW: [*python, *average, str(folder / "anew")],
        BASIS: [*python, *average, str(folder / "basis"), "--basis", basis],
        COLUMNS: [*ranks, *average, str(folder / "columns"), *columns],
    }


def plans(weights: int, segments: int, width: int, depth: int) -> dict[str, tuple[float, str]]:
    """Bytes of each job as `twa plan` gives them, with activations, and which parts they are of."""
    job = cost.Job(weights, CANDIDATES, BITS, segments, 1, 2, block_share=1 / depth)
    m, block = cost.memory(job, "replicate"), 1.5 * BLOCK_BYTES
    # of each layer's 17 tensors as wide as the model that backward needs, in bfloat16
    activations = 17 * 2 * ROWS * chars.CONTEXT * width * depth
    two = cost.host_memory(replace(job, ranks=2), "columns")
    parts = "center, weights, gradients, activations"
    return {
        PACK_RANKS: (2 * (m["weights"] + block), "the model and a block, of each rank"),
        PACK: (m["weights"] + block, "the model and a block"),
        ANEW: (m["total"] + activations, f"basis, {parts}"),
        BASIS: (m["total"] - m["basis"] + activations, f"{parts}; the basis is mapped"),
        COLUMNS: (two + 2 * activations, f"of both ranks: basis, {parts}, gathered"),
    }


def steps_of(folder: Path) -> str:
    """What a finished run says of its start and its trained average."""
    start, trained = json.loads((folder / "results.json").read_text())["rows"]
    return (
        f"start {start['seconds']} s, TWA {trained['seconds']} s with {trained['steps']} steps;"
        f" val loss {start['val loss']}, then {trained['val loss']}"
    )


def base() -> int:
    """Bytes of its own that a process holds which has imported all and made nothing."""
    code = "import twa, resource, sys; sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    before = -1
    while (size := resident(process.pid).get("RssAnon", 0)) != before:
        before = size
        time.sleep(3)
    process.communicate(b"")
    return size


def page(args: argparse.Namespace, runs: dict[str, Run], weights: int, segments: int) -> str:
    """The results as Markdown."""
    planned, empty, rows = plans(weights, segments, args.width, args.depth), base(), []
    for name, run in runs.items():
        bytes_planned, what = planned[name]
        processes = 3 if "ranks" in name else 1  # torchrun is one, too
        found = run.peak.own - processes * empty
        rows.append(
            [
                name,
                f"{run.seconds:.0f} s",
                f"{run.peak.own / 1e9:.2f}",
                f"{found / 1e9:.2f}",
                f"{bytes_planned / 1e9:.2f}",
                f"{100 * (found / bytes_planned - 1):+.0f} %",
                what,
                run.note,
            ]
        )
    head = ["job", "time", "own memory, GB", "without libraries", "planned", "off by", "of", ""]
    size = weights * 2 * CANDIDATES / 1e9
    return "\n".join(
        [
            "# A billion weights on two cores",
            "",
            f"`python bench/billion.py --folder DIR --save` on {processor()}, {os.cpu_count()}"
            f" cores, torch {torch.__version__}.",
            f"A GPT of {weights:,} weights in bfloat16, {CANDIDATES} checkpoints of"
            f" {weights * 2 / 1e9:.2f} GB in safetensors ({size:.0f} GB: not all of them fit into"
            f" the page cache beside a job), {BITS} bits, {segments} segments.",
            f"A job may hold {args.limit / 1e9:.0f} GB, pages of files included"
            f"{'' if all(r.limited for r in runs.values()) else ' (not enforced here)'}.",
            "Own memory: the most that its processes held together, beside pages of files, which"
            " the system takes back when it needs them. A process that has only imported all holds"
            f" {empty / 1e9:.2f} GB. Planned: what `twa plan` says, and activations, which it"
            " leaves out.",
            "",
            markdown_table(head, rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--depth", type=int, default=DEPTH)
    parser.add_argument("--limit", type=float, default=20e9, help="bytes that a job may hold")
    parser.add_argument("--only", default="", help="jobs whose name has this in it")
    parser.add_argument("--save", action="store_true", help="write bench/results/billion.md")
    args = parser.parse_args()
    os.environ[SIZE] = f"{args.width} {args.depth}"
    args.folder.mkdir(parents=True, exist_ok=True)
    if len(list(args.folder.glob("step_*.safetensors"))) < CANDIDATES:
        make(args.folder)
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
    runs = {}
    for name, command in jobs(args.folder).items():
        if args.only in name:
            env = environment | ({"OMP_NUM_THREADS": "1"} if "ranks" in name else {})
            runs[name] = watch(name, command, args.limit, env)
            if name in (ANEW, BASIS, COLUMNS):
                runs[name].note = steps_of(Path(command[command.index("-o") + 1]))
    with torch.device("meta"):
        numels = [p.numel() for p in model().parameters()]
    segments = len(segments_of([str(k) for k in range(len(numels))], numels, "fine").labels)
    text = page(args, runs, sum(numels), segments)
    print(text)
    if args.save:
        (RESULTS / "billion.md").write_text(text)


if __name__ == "__main__":
    main()
