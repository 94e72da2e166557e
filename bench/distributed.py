"""Averaging over several ranks, measured: bytes on the wire beside their formulas, memory per rank,
samples per second.

    python bench/distributed.py [--save]

Ranks are processes on this machine, joined by gloo, pinned to one core each as far as there are
cores. Candidates are the demo's model with random changes (48 of them), or a larger network for
memory. --save writes bench/results/distributed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from traffic import Traffic
from twa.distributed import cost as plan
from twa.merge.report import markdown_table, processor_name

ROOT = Path(__file__).parents[1]
PLACEMENTS = ("replicate", "rows", "columns")
CANDIDATES, STEPS, BATCH = 48, 40, 16
LARGE = {"width": 2048, "depth": 8, "candidates": 16}  # 34 M weights


# On a rank ---------------------------------------------------------------------------------------


class Large(nn.Module):
    """Square layers, for memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(LARGE["width"], LARGE["width"]) for _ in range(LARGE["depth"])
        )

    def forward(self, h):
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return h


def status(field: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))


def loopback() -> int:
    """Bytes that have left through the loopback device, of all processes."""
    with open("/proc/net/dev") as f:
        return next(int(line.split()[9]) for line in f if line.strip().startswith("lo:"))


class Clock:
    """Seconds spent in collectives: ours, and FSDP's, made to wait."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in (
            "all_reduce",
            "all_gather_into_tensor",
            "all_gather_single",
            "reduce_scatter_tensor",
            "reduce_scatter_single",
        ):
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


def worker(kind: str, placement: str, folder: str) -> None:
    """One rank of one measurement; the first prints its figures as JSON."""
    import twa
    from twa.distributed.choose import shard_model
    from twa.tasks import chars

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cores = sorted(os.sched_getaffinity(0))  # in a container fewer than os.cpu_count()
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    clock = Clock() if kind == "speed" else None
    make = Large if kind == "memory" else chars.model
    warm = nn.Linear(2, 2)  # the libraries' own memory is not what is measured
    torch.distributed.fsdp.fully_shard(warm)
    warm(torch.ones(1, 2)).sum().backward()
    before = status("VmRSS")
    if kind == "memory" and placement == "columns":  # never whole on any rank
        with torch.device("meta"):
            model = make()
        for module in (*model.layers, model):
            torch.distributed.fsdp.fully_shard(module)
        model.to_empty(device="cpu")
    else:
        model = make()
        if placement == "columns":
            shard_model(model, dist.group.WORLD)
    subspace = twa.Subspace.from_candidates(
        model, twa.Candidates(f"{folder}/c*.safetensors"), bits=4, placement=placement
    )
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=0.002)
    if kind == "memory":
        batch = torch.randn(8, LARGE["width"])

        def loss():
            return model(batch).square().mean()

    else:
        data = iter(chars.train_data(seed=rank))

        def loss():
            return chars.loss(model, next(data))

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    figures = {
        "D": sum(p.numel() for p in subspace.parameters),
        "nL": subspace.coefficients.numel(),
        "segments": len(subspace.labels),
    }
    if kind == "memory":
        for _ in range(3):
            step()
        peak = status("VmHWM") - before
        basis, center = subspace.basis.nbytes, sum(c.numel() * 4 for c in subspace.center or [])
        everyone = [None] * size
        dist.all_gather_object(everyone, (peak, basis, center))
        figures |= {
            "peak": max(p for p, _, _ in everyone),
            "basis": max(b for _, b, _ in everyone),
            "center": max(c for _, _, c in everyone),
        }
    elif kind == "bytes":
        step()
        with Traffic() as model_alone:
            loss().backward()
        optimizer.zero_grad()
        with Traffic() as traffic:
            step()
        dist.barrier()
        start = loopback()
        for _ in range(20):
            step()
        dist.barrier()
        figures |= {
            "messages": traffic.bytes,
            "model": model_alone.bytes,
            "wire": (loopback() - start) / 20 / size,
        }
    else:
        for _ in range(5):
            step()
        times, shares = [], []
        for _ in range(4):  # the middle one of four
            dist.barrier()
            clock.seconds, start = 0.0, time.perf_counter()
            for _ in range(STEPS // 4):
                step()
            seconds = time.perf_counter() - start
            times.append(seconds / (STEPS // 4))
            shares.append(clock.seconds / seconds)
        k = sorted(range(4), key=times.__getitem__)[1]
        figures |= {"step": times[k], "share": shares[k]}
    if rank == 0:
        print(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


# From outside ------------------------------------------------------------------------------------


def measure(kind: str, placement: str, size: int, folder: str) -> dict:
    """Figures of the first rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
    }
    # freed tensors leave the process: memory is what is in use
    environment |= {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    command = [sys.executable, __file__, "--worker", kind, placement, folder]
    ranks = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(size)
    ]
    out = [p.communicate(timeout=600)[0] for p in ranks]
    if any(p.returncode for p in ranks):
        raise SystemExit(f"{kind}, {placement}, {size} ranks: a rank failed")
    return json.loads(out[0].splitlines()[-1])


def write_candidates(folder: Path, model: nn.Module, count: int) -> None:
    folder.mkdir()
    for k in range(count):
        torch.manual_seed(k)
        save_file(
            {name: p.detach() + 0.01 * torch.randn_like(p) for name, p in model.named_parameters()},
            folder / f"c{k}.safetensors",
        )


def wire_table(folder: Path) -> list[str]:
    rows = []
    for size in (2, 4):
        for placement in PLACEMENTS:
            f = measure("bytes", placement, size, str(folder))
            job = plan.Job(f["D"], CANDIDATES, 4, f["segments"], size, weight_bytes=4)
            p, sent = plan.payload(job, placement), plan.sent(job, placement)
            ours = f["messages"] - f["model"]
            rows.append(
                [
                    placement,
                    str(size),
                    f"{ours:,}",
                    f"{p['twa']:,.0f}",
                    f"{f['model']:,}",
                    f"{p['model']:,.0f}",
                ]
            )
            rows[-1] += [f"{f['wire']:,.0f}", f"{sum(sent.values()):,.0f}"]
            print(rows[-1], file=sys.stderr)
    header = [
        "placement",
        "ranks",
        "our messages, counted",
        "formula",
        "FSDP's, counted",
        "formula (at most)",
        "sent per rank, loopback",
        "formula (ring)",
    ]
    return [markdown_table(header, rows)]


def memory_table(folder: Path) -> list[str]:
    rows, whole = [], None
    for placement, size in [
        ("single", 1),
        ("replicate", 2),
        ("rows", 2),
        ("columns", 2),
        ("columns", 4),
    ]:
        f = measure("memory", placement, size, str(folder))
        whole = whole or f["peak"]
        named = "replicate" if placement == "single" else placement
        job = plan.Job(
            f["D"],
            LARGE["candidates"],
            4,
            f["segments"],
            size,
            weight_bytes=4,
            block_share=1 / LARGE["depth"],
        )
        m = plan.memory(job, named)
        rows.append(
            [
                placement,
                str(size),
                f"{f['basis'] / 1e6:.1f}",
                f"{m['basis'] / 1e6:.1f}",
                f"{f['center'] / 1e6:.1f}",
                f"{m['center'] / 1e6:.1f}",
            ]
        )
        rows[-1] += [
            f"{f['peak'] / 1e6:.0f}",
            f"{m['total'] / 1e6:.0f}",
            f"{f['peak'] / whole:.2f}",
        ]
        print(rows[-1], file=sys.stderr)
    header = [
        "placement",
        "ranks",
        "basis MB",
        "formula",
        "center MB",
        "formula",
        "peak MB of a rank",
        "formula (training)",
        "of one process",
    ]
    return [markdown_table(header, rows)]


def speed_table(folder: Path) -> list[str]:
    rows, one = [], None
    for placement, size in [("single", 1), *((p, k) for k in (1, 2) for p in PLACEMENTS)]:
        f = measure("speed", placement, size, str(folder))
        rate = BATCH * size / f["step"]
        one = one or rate
        rows.append(
            [
                placement,
                str(size),
                f"{f['step'] * 1e3:.1f}",
                f"{rate:.0f}",
                f"{rate / one:.2f}",
                f"{100 * f['share']:.1f} %",
            ]
        )
        print(rows[-1], file=sys.stderr)
    return [
        markdown_table(
            ["placement", "ranks", "step ms", "samples / s", "of one process", "in collectives"],
            rows,
        )
    ]


def formula_table() -> list[str]:
    rows = []
    for params in (1e8, 7e9, 7e10):
        for ranks in (8, 64, 512):
            job = plan.Job(params, 64, 4, 200, ranks)
            cells = [plan.quantity(params, ""), str(ranks)]
            for placement in PLACEMENTS:
                if plan.obstacle(job, placement):
                    cells += ["-", "-", "-"]
                    continue
                t = plan.seconds(job, placement)
                cells += [
                    plan.quantity(plan.memory(job, placement)["total"], "B"),
                    plan.quantity(plan.payload(job, placement)["twa"], "B"),
                ]
                cells.append(plan.quantity(t["basis"] + t["twa"], "s"))
            cells.append(plan.quantity(plan.payload(job, "columns")["model"], "B"))
            rows.append(cells)
    header = [
        "D",
        "ranks",
        *(f"{p}: {what}" for p in PLACEMENTS for what in ("memory", "bytes", "time")),
        "FSDP's bytes",
    ]
    return [markdown_table(header, rows)]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
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
        D = sum(p.numel() for p in chars.model().parameters())
        lines = ["# Averaging over several ranks", ""]
        lines += [
            (
                f"`python bench/distributed.py --save`; {processor_name()}, {os.cpu_count()} cores,"
                f" torch {torch.__version__}, gloo on one machine."
            ),
            "",
        ]
        lines += ["## Bytes of one step", ""]
        lines += [
            f"The demo's model ({D:,} weights, float32), {CANDIDATES} candidates, coefficients per"
            " tensor. Messages as they are handed to"
        ]
        lines += [
            (
                "torch.distributed, in bytes, per rank; what leaves a rank, counted by the loopback"
                " device, with the protocol's headers."
            ),
            "",
        ]
        lines += wire_table(demo)
        lines += [
            "",
            (
                "FSDP's formula is an upper bound: the root module's weights are not gathered again"
                " for backward; padding adds a little."
            ),
            "",
        ]
        lines += ["## Memory of a rank", ""]
        lines += [
            f"{LARGE['depth']} layers of {LARGE['width']} x {LARGE['width']} (34 M weights, 134"
            f" MB), {LARGE['candidates']} candidates at 4 bits,"
        ]
        lines += [
            "three training steps. Peak: highest resident memory above that before the model was"
            " made; it includes n x the largest tensor's part,"
        ]
        lines += [
            "mapped from files while it is packed. The formula counts what is held in training.",
            "",
        ]
        lines += memory_table(large)
        lines += ["", "## Speed", ""]
        lines += [
            (
                f"The demo's training step, {BATCH} sequences of 128 characters per rank, one core"
                " per rank."
            ),
            "",
        ]
        lines += speed_table(demo)
        lines += ["", "## From the formulas", ""]
        lines += [
            "n = 64 candidates at 4 bits, 200 segments, bfloat16 weights, 400 Gbit/s and 3350 GB/s"
            " per rank: memory of a rank (without"
        ]
        lines += [
            (
                "activations), bytes of our messages per step, time per step for the basis and our"
                " messages. `twa plan` prints more."
            ),
            "",
        ]
        lines += formula_table()
    text = "\n".join(lines) + "\n"
    print(text)
    if args.save:
        (ROOT / "bench/results/distributed.md").write_text(text)


if __name__ == "__main__":
    main()
