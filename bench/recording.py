"""Recordings against whole checkpoints: what low bits lose, what an average makes of them, and what
recording costs.

    fidelity   how far decoded snapshots are from what was recorded: closed-loop differences beside
               deltas from the mean, from an EMA and from the last, and differences without
               feedback; on the demo's run, on fine-tunes of one model (whose order means nothing),
               on a run of AdamW and on one of SGD with BatchNorm
    twa        validation loss of averages made of recordings and of float32 checkpoints, by seed
    cost       share of the training time, bytes on disk, peak memory, in the demo

Run: python bench/recording.py fidelity|twa|cost [--seeds 0 1 2] [--scale quick|small].
Training runs go to build/recording, where they are found again.
Writes bench/results/recording_*.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import twa
from claims import soup
from claims.job import Job
from common import RESULTS, hardware
from torch import Tensor
from twa import demo
from twa.io.recording_files import write_snapshot
from twa.io.tables import markdown_table
from twa.merge.evaluate import mean_over
from twa.merge.run import Merge
from twa.merge.settings import Settings, TwaMethod
from twa.recorder import store
from twa.tasks.batches import forever
from twa.tasks.contract import Task, load_task

import twa_kernels as tk

BITS = (8, 4, 3, 2, 1)
ROOT = Path("build/recording")
Heap = list[list[Tensor]]  # of each candidate its tensors


# Heaps -------------------------------------------------------------------------------------------


def demo_run(seed: int) -> tuple[Task, Path]:
    """The demo's task and its checkpoints, trained once."""
    torch.manual_seed(seed)
    task, folder = load_task("chars", seed), ROOT / f"demo-{seed}"
    if len(list(folder.glob("*.safetensors"))) < demo.STEPS // demo.EVERY:
        folder.mkdir(parents=True, exist_ok=True)
        demo.train(task, folder)
    return task, folder


def heaps(scale: str) -> Iterable[tuple[str, twa.Candidates]]:
    """A name and the candidates of each heap."""
    yield "demo: AdamW, constant rate", twa.Candidates(demo_run(0)[1] / "*.safetensors")
    job = Job(0, ROOT / "claims", scale, progress=True)
    for name, text in (("vit", "ViT: AdamW, cosine"), ("resnet", "ResNet: SGD, BatchNorm, steps")):
        (workload,) = job.workloads(name)
        run = job.usual(workload, job.task(workload))
        yield text, run.candidates()
    yield "fine-tunes of one GPT", soup.gpt(job).candidates


def tensors_of(candidates: twa.Candidates) -> Heap:
    """What is trained of each candidate: floating-point tensors but BatchNorm's statistics."""
    keys = [
        key
        for key, info in candidates.info.items()
        if info.dtype.is_floating_point and "running_" not in key
    ]
    return [[c.tensor(key).float().clone() for key in keys] for c in candidates]


def norm(tensors: Iterable[Tensor]) -> float:
    return sum(t.double().square().sum().item() for t in tensors) ** 0.5


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return norm(x - y for x, y in zip(a, b, strict=True))


def mean_of(heap: Heap) -> list[Tensor]:
    return [torch.stack(list(same)).double().mean(0).float() for same in zip(*heap, strict=True)]


def ema_of(heap: Heap, decay: float = 0.9) -> list[Tensor]:
    average = [t.clone() for t in heap[0]]
    for candidate in heap[1:]:
        for a, t in zip(average, candidate, strict=True):
            a.lerp_(t, 1 - decay)
    return average


# What low bits lose ------------------------------------------------------------------------------


def coded(tensors: Sequence[Tensor], around: Sequence[Tensor], bits: int) -> list[Tensor]:
    """Tensors after their distance from others was coded."""
    reference = [t.clone() for t in around]
    tk.record(tensors, reference, bits)
    return reference


def deltas(heap: Heap, around: Sequence[Tensor], bits: int) -> Heap:
    return [coded(candidate, around, bits) for candidate in heap]


def closed_loop(heap: Heap, bits: int) -> Heap:
    """As `twa.Recorder` codes them, but for the first, which is whole."""
    found = [heap[0]]
    for candidate in heap[1:]:
        found.append(coded(candidate, found[-1], bits))
    return found


def without_feedback(heap: Heap, bits: int) -> Heap:
    """Differences of the candidates themselves, added up."""
    found = [heap[0]]
    for before, candidate in pairwise(heap):
        moved = coded(candidate, before, bits)
        found.append([f + (m - b) for f, m, b in zip(found[-1], moved, before, strict=True)])
    return found


def fidelity(scale: str) -> str:
    lines = []
    for name, candidates in heaps(scale):
        heap = tensors_of(candidates)
        mean, ema, last = mean_of(heap), ema_of(heap), heap[-1]
        steps = [distance(a, b) for a, b in pairwise(heap)]
        far = [distance(c, last) for c in heap[:-1]]
        rows = []
        for bits in BITS:
            ways = {
                "mean": deltas(heap, mean, bits),
                "EMA": deltas(heap, ema, bits),
                "last": deltas(heap, last, bits),
                "loop": closed_loop(heap, bits),
                "open": without_feedback(heap, bits),
            }
            errors = {
                way: sum(distance(a, b) for a, b in zip(heap, found, strict=True)) / len(heap)
                for way, found in ways.items()
            }
            of_mean = [distance(mean_of(ways[way]), mean) for way in ("last", "loop")]
            rows.append(
                [
                    str(bits),
                    *(f"{errors[way]:.3g}" for way in ("mean", "EMA", "last")),
                    f"**{errors['loop']:.3g}**",
                    f"{errors['open']:.3g}",
                    " / ".join(f"{e:.2g}" for e in of_mean),
                    "",
                ]
            )
        header = ["bits", "deltas from the mean", "from the EMA", "from the last"]
        header += ["closed-loop differences", "the same without feedback"]
        header += ["uniform mean: from the last / closed loop", ""]
        lines += [
            f"**{name}**: {len(heap)} candidates, mean length of a step"
            f" {sum(steps) / len(steps):.3g}, mean distance to the last {sum(far) / len(far):.3g}",
            "",
            markdown_table(header, rows),
            "",
        ]
        print("\n".join(lines[-4:]), flush=True)
    return "\n".join(lines)


# What averages make of them ----------------------------------------------------------------------


def record(task: Task, folder: Path, bits: int) -> twa.Candidates:
    """A recording of checkpoints that are there, as if the run had been recorded."""
    path = ROOT / f"{folder.name}-{bits}bits"
    if not path.exists():
        model = task.model()
        recorder = twa.Recorder(model, every=demo.EVERY, bits=bits, path=path)
        for k, candidate in enumerate(twa.Candidates(folder / "*.safetensors")):
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(candidate.tensor(name))
            recorder.record((k + 1) * demo.EVERY)
        recorder.close()
    return twa.Candidates(path)


def trained(seeds: Sequence[int], rate: float) -> str:
    rows = []
    for seed in seeds:
        task, folder = demo_run(seed)
        files = twa.Candidates(folder / "*.safetensors")
        sources = {"float32 files": files} | {
            f"{bits}-bit recording": record(task, folder, bits) for bits in (4, 2)
        }
        for granularity in ("tensor", "fine"):
            losses = {}
            for name, candidates in sources.items():
                bits = 32 if name == "float32 files" else candidates.recording.bits
                settings = Settings(steps=demo.TWA_STEPS, seed=seed, lr=rate)
                merge = Merge(task, candidates, settings, progress=False)
                start = twa.averages.ema(len(candidates), 0.9)
                method = TwaMethod("t", granularity, bits, basis="differences")
                result = merge.train(method, start=start, start_name="EMA .9")
                losses[name] = result.val_loss
                print(seed, granularity, name, f"{result.val_loss:.4f}", flush=True)
            base = losses.pop("float32 files")
            rows.append(
                [f"{seed}", granularity, f"{base:.4f}"]
                + [f"{loss:.4f} ({loss - base:+.4f})" for loss in losses.values()]
                + [""]
            )
    header = ["seed", "TWA-t, coefficients per", "float32 files", "4-bit recording"]
    return markdown_table([*header, "2-bit recording", ""], rows)


def fixed(seeds: Sequence[int]) -> str:
    """Validation loss of fixed averages of recordings and of the files."""
    rows = []
    for seed in seeds:
        task, folder = demo_run(seed)
        files = twa.Candidates(folder / "*.safetensors")
        n, model = len(files), task.model()
        for name, beta in (
            ("uniform", twa.averages.uniform(n)),
            ("EMA .9", twa.averages.ema(n, 0.9)),
            ("LAWA 8", twa.averages.lawa(n, 8)),
            ("WSM 16, sqrt", twa.averages.wsm(n, 16, "sqrt")),
        ):
            losses = []
            for source in (files, record(task, folder, 4), record(task, folder, 2)):
                model.load_state_dict(source.average(beta), strict=False)
                losses.append(mean_over(model, task.loss, task.val))
            rows.append(
                [f"{seed}", name, f"{losses[0]:.4f}"]
                + [f"{loss:.4f} ({loss - losses[0]:+.4f})" for loss in losses[1:]]
                + [""]
            )
    header = ["seed", "average", "float32 files", "4-bit recording", "2-bit recording", ""]
    return markdown_table(header, rows)


# What recording costs ----------------------------------------------------------------------------


def peak_memory(recorded: bool) -> float:
    """MB that a process with a model of 64 M weights, its gradients and a step or two takes."""
    code = f"""
import resource, tempfile, torch, twa
from torch import nn
model = nn.Sequential(*[nn.Linear(2000, 2000) for _ in range(16)])
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
with tempfile.TemporaryDirectory() as folder:
    if {recorded}:
        recorder = twa.Recorder(model, every=1, path=folder)
        recorder.attach(optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 2000)).square().mean().backward()
        optimizer.step()
    if {recorded}:
        recorder.close()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def cost(steps: int) -> str:
    """The demo's training with a recorder: time inside it, and bytes on disk."""
    written = 0.0

    def timed_write(*args: object) -> None:
        nonlocal written
        at = time.perf_counter()
        write_snapshot(*args)
        written += time.perf_counter() - at

    store.write_snapshot = timed_write
    rows = []
    for bits in (4, 2):
        torch.manual_seed(0)
        task, path = load_task("chars", 0), ROOT / f"cost-{bits}bits"
        for old in path.glob("*.safetensors"):
            old.unlink()
        model = task.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=demo.RATE)
        recorder = twa.Recorder(model, every=demo.EVERY, bits=bits, path=path)
        inside, written, begun = 0.0, 0.0, time.perf_counter()
        for _, batch in zip(range(steps), forever(task.train), strict=False):
            loss = task.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            at = time.perf_counter()
            recorder.step()
            inside += time.perf_counter() - at
        total = time.perf_counter() - begun
        recorder.close()
        snapshots = len(list(path.glob("step_*"))) + 1
        weights = sum(p.numel() for p in model.parameters())
        disk = sum(f.stat().st_size for f in path.glob("*.safetensors"))
        each = (disk - (path / f"anchor_{demo.EVERY}.safetensors").stat().st_size) / (snapshots - 1)
        rows.append(
            [
                str(bits),
                f"{weights:,}",
                f"{100 * inside / total:.2f} %",
                f"{100 * written / total:.2f} %",
                f"{1e3 * inside / snapshots:.1f} ms",
                f"{disk / 1e6:.2f} MB of {4 * weights * snapshots / 1e6:.1f}"
                f" (1 / {4 * weights * snapshots / disk:.1f})",
                f"{each / weights:.4f} B",
                "",
            ]
        )
    header = ["bits", "weights", "share of the training time", "beside it, a thread that writes"]
    header += ["a snapshot", "on disk, of float32 safetensors", "a weight and snapshot", ""]
    without, recorded = peak_memory(False), peak_memory(True)
    text = (
        f"Peak memory of a process that trains 64 M weights: {without:.0f} MB, with a recorder"
        f" {recorded:.0f} MB: {(recorded - without) / 256.1:.2f} float32 copies more."
    )
    return f"{markdown_table(header, rows)}\n\n{text}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("fidelity", "twa", "cost"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", choices=("quick", "small"), default="quick")
    parser.add_argument("--rate", type=float, default=Settings.lr)
    parser.add_argument("--steps", type=int, default=demo.STEPS)
    args = parser.parse_args()
    machine = ", ".join(f"{key} {value}" for key, value in hardware().items())
    if args.what == "fidelity":
        text = fidelity(args.scale)
    elif args.what == "twa":
        text = f"{trained(args.seeds, args.rate)}\n\n{fixed(args.seeds)}"
    else:
        text = cost(args.steps)
    out = RESULTS / f"recording_{args.what}.md"
    out.write_text(f"{machine}\n\n{text}\n")
    print(f"\n{text}\nwritten to {out}")


if __name__ == "__main__":
    main()
