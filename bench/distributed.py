"""Averaging over several ranks, measured: bytes on the wire beside their formulas, memory per rank,
samples per second.

    python bench/distributed.py [--save]        --save writes bench/results/distributed.md

Ranks are processes on this machine, joined by gloo, pinned to one core each as far as there are
cores. Candidates are the demo's model with random changes (48 of them), or a larger network for
memory.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from twa.cli.plan import quantity
from twa.distributed import cost
from twa.distributed.cost import SHARDINGS
from twa.distributed.traffic import Traffic
from twa.io.tables import markdown_table

from twa_kernels.machine import processor

ROOT = Path(__file__).parents[1]
CANDIDATES, STEPS, BATCH = 48, 40, 16
LARGE = {"width": 2048, "depth": 8, "candidates": 16}  # 34 M weights


# On a rank ---------------------------------------------------------------------------------------


class Large(nn.Module):
    """Square layers, for memory."""

    def __init__(self) -> None:
        super().__init__()
        width, depth = LARGE["width"], LARGE["depth"]
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, h):
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return h


def status(field: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))


def own_memory() -> int:
    """Bytes of this process beside pages of files: of memory that ranks share, its part."""
    with open("/proc/self/smaps_rollup") as f:
        parts = (line.split() for line in f if line.startswith(("Pss_Anon", "Pss_Shmem")))
        return sum(int(part[1]) for part in parts) * 1024


def loopback() -> int:
    """Bytes that have left through the loopback device, of all processes."""
    with open("/proc/net/dev") as f:
        return next(int(line.split()[9]) for line in f if line.strip().startswith("lo:"))


class Clock:
    """Seconds spent in collectives: ours, and FSDP's, made to wait."""

    NAMES = (
        "all_reduce",
        "all_gather_into_tensor",
        "all_gather_single",
        "reduce_scatter_tensor",
        "reduce_scatter_single",
    )

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in self.NAMES:
            if hasattr(dist, name):  # FSDP2 uses the last of each in torch 2.13
                setattr(dist, name, self._timed(getattr(dist, name)))

    def _timed(self, function):
        def run(*args, async_op=False, **keywords):
            start = time.perf_counter()
            work = function(*args, async_op=True, **keywords)
            work.wait()
            self.seconds += time.perf_counter() - start
            return work if async_op else None

        return run


class Job:
    """What a rank measures: a model, its subspace and optimizer, and its own batches."""

    def __init__(self, kind: str, sharding: str, folder: str, rank: int) -> None:
        import twa
        from twa.tasks import chars

        self.model = make_model(Large if kind == "memory" else chars.model, kind, sharding)
        self.subspace = twa.Subspace.from_candidates(
            self.model, twa.Candidates(f"{folder}/c*.safetensors"), bits=4, sharding=sharding
        )
        self.optimizer = twa.SubspaceOptimizer(self.subspace, torch.optim.AdamW, lr=0.002)
        if kind == "memory":
            batch = torch.randn(8, LARGE["width"])
            self.loss = lambda: self.model(batch).square().mean()
        else:
            data = iter(chars.train_data(seed=rank))
            self.loss = lambda: chars.loss(self.model, next(data))

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_model(make: Callable[[], nn.Module], kind: str, sharding: str) -> nn.Module:
    from twa.distributed.choose import shard_model

    if kind == "memory" and sharding == "columns":  # never whole on any rank
        with torch.device("meta"):
            model = make()
        for module in (*model.layers, model):
            fully_shard(module)
        return model.to_empty(device="cpu")
    model = make()
    if sharding == "columns":
        shard_model(model, dist.group.WORLD)
    return model


def worker(kind: str, sharding: str, folder: str) -> None:
    """One rank of one measurement; the first prints its figures as JSON."""
    rank = int(os.environ["RANK"])
    cores = sorted(os.sched_getaffinity(0))  # in a container fewer than os.cpu_count()
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    clock = Clock() if kind == "speed" else None
    warm = nn.Linear(2, 2)  # the libraries' own memory is not what is measured
    fully_shard(warm)
    warm(torch.ones(1, 2)).sum().backward()
    before = status("VmRSS"), own_memory()
    job = Job(kind, sharding, folder, rank)
    figures = {
        "D": sum(p.numel() for p in job.subspace.parameters),
        "nL": job.subspace.coefficients.numel(),
        "segments": len(job.subspace.segments.labels),
    }
    if kind == "memory":
        figures |= memory_figures(job, before)
    elif kind == "bytes":
        figures |= bytes_figures(job)
    else:
        figures |= speed_figures(job, clock)
    if rank == 0:
        print(json.dumps(figures), flush=True)
    dist.barrier()
    os._exit(0)  # the mesh of fully_shard keeps gloo's threads, which may abort the interpreter


def memory_figures(job: Job, before: tuple[int, int]) -> dict[str, float]:
    """Bytes above those before: of the rank that has most, and after a step of all ranks."""
    for _ in range(3):
        job.step()
    peak, center = status("VmHWM") - before[0], job.subspace.center or []
    job.loss().backward()  # with gradients, as formulas have them
    held = own_memory() - before[1]
    mine = (peak, job.subspace.basis.nbytes, sum(c.numel() * 4 for c in center), held)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    peaks, bases, centers, helds = zip(*everyone, strict=True)
    most = {"peak": max(peaks), "basis": max(bases), "center": max(centers)}
    return most | {"host": sum(helds)}


def bytes_figures(job: Job) -> dict[str, float]:
    """Bytes of a step: of all messages, of the model's own, and per rank on the wire."""
    job.step()
    with Traffic() as model_alone:
        job.loss().backward()
    job.optimizer.zero_grad()
    with Traffic() as traffic:
        job.step()
    dist.barrier()
    start = loopback()
    for _ in range(20):
        job.step()
    dist.barrier()
    wire = (loopback() - start) / 20 / dist.get_world_size()
    return {"messages": traffic.bytes, "model": model_alone.bytes, "wire": wire}


def speed_figures(job: Job, clock: Clock) -> dict[str, float]:
    """Seconds of a step, and the share of it in collectives: of the middle one of four runs."""
    for _ in range(5):
        job.step()
    runs = []
    for _ in range(4):
        dist.barrier()
        clock.seconds, start = 0.0, time.perf_counter()
        for _ in range(STEPS // 4):
            job.step()
        seconds = time.perf_counter() - start
        runs.append((seconds / (STEPS // 4), clock.seconds / seconds))
    step, share = sorted(runs)[1]
    return {"step": step, "share": share}


# From outside ------------------------------------------------------------------------------------


def measure(kind: str, sharding: str, size: int, folder: str) -> dict:
    """Figures of the first rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    # freed tensors leave the process: memory is what is in use
    environment |= {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    command = [sys.executable, __file__, "--worker", kind, sharding, folder]
    ranks = []
    for r in range(size):
        mine = environment | {"RANK": str(r), "LOCAL_RANK": str(r)}
        ranks.append(subprocess.Popen(command, env=mine, stdout=subprocess.PIPE, text=True))
    out = [p.communicate(timeout=600)[0] for p in ranks]
    if any(p.returncode for p in ranks):
        raise SystemExit(f"{kind}, {sharding}, {size} ranks: a rank failed")
    return json.loads(out[0].splitlines()[-1])


def write_candidates(folder: Path, model: nn.Module, count: int) -> None:
    folder.mkdir()
    for k in range(count):
        torch.manual_seed(k)
        changed = {
            name: p.detach() + 0.01 * torch.randn_like(p) for name, p in model.named_parameters()
        }
        save_file(changed, folder / f"c{k}.safetensors")


def wire_table(folder: Path) -> str:
    rows = []
    for size in (2, 4):
        for sharding in SHARDINGS:
            f = measure("bytes", sharding, size, str(folder))
            job = cost.Job(f["D"], CANDIDATES, 4, f["segments"], size, weight_bytes=4)
            p, sent = cost.payload(job, sharding), cost.sent(job, sharding)
            row = [sharding, str(size), f"{f['messages'] - f['model']:,}", f"{p['twa']:,.0f}"]
            row += [f"{f['model']:,}", f"{p['model']:,.0f}"]
            rows.append([*row, f"{f['wire']:,.0f}", f"{sum(sent.values()):,.0f}"])
            print(rows[-1], file=sys.stderr)
    header = ["sharding", "ranks", "our messages, counted", "formula", "FSDP's, counted"]
    header += ["formula (at most)", "sent per rank, loopback", "formula (ring)"]
    return markdown_table(header, rows)


def memory_table(folder: Path) -> str:
    rows, whole = [], None
    cases = [("single", 1), *((s, k) for k in (2, 4) for s in SHARDINGS)]
    for sharding, size in cases:
        f = measure("memory", sharding, size, str(folder))
        whole = whole or f["peak"]
        options = {"weight_bytes": 4, "block_share": 1 / LARGE["depth"]}
        job = cost.Job(f["D"], LARGE["candidates"], 4, f["segments"], size, **options)
        name = "replicate" if sharding == "single" else sharding
        m, host = cost.memory(job, name), cost.host_memory(job, name)
        row = [sharding, str(size)]
        for name in ("basis", "center"):
            row += [f"{f[name] / 1e6:.1f}", f"{m[name] / 1e6:.1f}"]
        row += [f"{f['peak'] / 1e6:.0f}", f"{m['total'] / 1e6:.0f}", f"{f['peak'] / whole:.2f}"]
        row += [f"{f['host'] / 1e6:.0f}", f"{host / 1e6:.0f}"]
        rows.append(row)
        print(rows[-1], file=sys.stderr)
    header = ["sharding", "ranks", "basis MB", "formula", "center MB", "formula"]
    header += ["peak MB of a rank", "formula (training)", "of one process"]
    header += ["MB of all ranks", "formula (host)"]
    return markdown_table(header, rows)


def speed_table(folder: Path) -> str:
    rows, one = [], None
    for sharding, size in [("single", 1), *((p, k) for k in (1, 2) for p in SHARDINGS)]:
        f = measure("speed", sharding, size, str(folder))
        rate = BATCH * size / f["step"]
        one = one or rate
        row = [sharding, str(size), f"{f['step'] * 1e3:.1f}", f"{rate:.0f}", f"{rate / one:.2f}"]
        rows.append([*row, f"{100 * f['share']:.1f} %"])
        print(rows[-1], file=sys.stderr)
    header = ["sharding", "ranks", "step ms", "samples / s", "of one process", "in collectives"]
    return markdown_table(header, rows)


def formula_table() -> str:
    rows = []
    for params in (1e8, 7e9, 7e10):
        for ranks in (8, 64, 512):
            job = cost.Job(params, 64, 4, 200, ranks)
            cells = [quantity(params), str(ranks)]
            for sharding in SHARDINGS:
                if cost.obstacle(job, sharding):
                    cells += ["-", "-"]
                    continue
                held, sent = cost.memory(job, sharding)["total"], cost.payload(job, sharding)["twa"]
                cells += [quantity(held, "B"), quantity(sent, "B")]
            cells.append(quantity(cost.payload(job, "columns")["model"], "B"))
            rows.append(cells)
    header = ["D", "ranks", *(f"{p}: {what}" for p in SHARDINGS for what in ("memory", "bytes"))]
    return markdown_table([*header, "FSDP's bytes"], rows)


# The page ----------------------------------------------------------------------------------------


def page(demo: Path, large: Path, weights: int) -> str:
    lines = [
        "# Averaging over several ranks",
        "",
        f"`python bench/distributed.py --save`; {processor()}, {os.cpu_count()} cores, torch"
        f" {torch.__version__}, gloo on one machine.",
        "",
        "## Bytes of one step",
        "",
        f"The demo's model ({weights:,} weights, float32), {CANDIDATES} candidates, coefficients"
        " per tensor. Messages as they are handed to torch.distributed, in bytes, per rank; what"
        " leaves a rank, counted by the loopback device, with the protocol's headers.",
        "",
        wire_table(demo),
        "",
        "FSDP's formula is an upper bound: the root module's weights are not gathered again for"
        " backward; padding adds a little.",
        "",
        "## Memory of a rank",
        "",
        f"{LARGE['depth']} layers of {LARGE['width']} x {LARGE['width']} (34 M weights, 134 MB),"
        f" {LARGE['candidates']} candidates at 4 bits, three training steps. Peak: highest resident"
        " memory above that before the model was made; it includes n x the largest tensor's part,"
        " mapped from files while it is packed. The formula counts what is held in training. All"
        " ranks: what they hold together in training, beside pages of files; with replicate they"
        " share basis and center, which the peak of a rank counts in full.",
        "",
        memory_table(large),
        "",
        "## Speed",
        "",
        f"The demo's training step, {BATCH} sequences of 128 characters per rank, one core per"
        " rank.",
        "",
        speed_table(demo),
        "",
        "## From the formulas",
        "",
        "n = 64 candidates at 4 bits, 200 segments, bfloat16 weights: memory of a rank (without"
        " activations), bytes of our messages per step. `twa plan` prints more.",
        "",
        formula_table(),
        "",
    ]
    return "\n".join(textwrap.fill(line, 100) if line[:1] != "|" else line for line in lines)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--save", action="store_true", help="write bench/results/distributed.md")
    p.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    from twa.tasks import chars

    with tempfile.TemporaryDirectory() as folder:
        demo, large = Path(folder) / "demo", Path(folder) / "large"
        write_candidates(demo, chars.model(), CANDIDATES)
        write_candidates(large, Large(), LARGE["candidates"])
        text = page(demo, large, sum(p.numel() for p in chars.model().parameters()))
    print(text)
    if args.save:
        (ROOT / "bench/results/distributed.md").write_text(text)


if __name__ == "__main__":
    main()
