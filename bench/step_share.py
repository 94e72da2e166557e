"""What the optimizer's step costs in the demo's training step: project + update + reconstruct,
fused and as three calls.

    make demo
    python bench/step_share.py [--checkpoints 'twa-demo/checkpoints/*.safetensors']

writes bench/results/step_share.md. Medians over interleaved steps on the demo's model and its own
checkpoints, at 4 bits. "share" is step / (forward + backward + step).
"""

from __future__ import annotations

import argparse
import glob
import sys
import time

import torch
import twa
from common import RESULTS, hardware
from twa.io.tables import markdown_table
from twa.tasks.batches import forever
from twa.tasks.contract import load_task

STEPS = 60


def measure(pattern: str, granularity: str) -> list[str]:
    task, candidates = load_task("chars"), twa.Candidates(pattern)
    model = task.model()
    subspace = twa.Subspace.from_candidates(
        model, candidates, bits=4, granularity=granularity, center="last"
    )
    optimizer = twa.SubspaceOptimizer(subspace, lr=1e-3)
    times: dict[str, list[float]] = {"model": [], "fused": [], "three calls": []}
    for k, batch in zip(range(2 * STEPS), forever(task.train), strict=False):
        fused = k % 2 == 0
        subspace.can_fuse = (lambda: True) if fused else (lambda: False)
        start = time.perf_counter()
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        middle = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        times["model"].append(middle - start)
        times["fused" if fused else "three calls"].append(end - middle)
    work, fused, three = (sorted(times[name])[len(times[name]) // 2] for name in times)
    share = [f"{100 * t / (work + t):.1f} %" for t in (fused, three)]
    basis = subspace.basis
    packed = f"{basis.n} x {basis.num_columns / 1e6:.2f} M, {basis.nbytes / 1e6:.0f} MB"
    calls = [f"{1e3 * fused:.2f}", share[0], f"{1e3 * three:.2f}", share[1]]
    return [granularity, packed, f"{1e3 * work:.1f}", *calls]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", default="twa-demo/checkpoints/*.safetensors")
    pattern = parser.parse_args().checkpoints
    if not glob.glob(pattern):
        sys.exit(f"no checkpoints match {pattern}: run `make demo` first, or pass --checkpoints")
    torch.manual_seed(0)
    header = ["granularity", "basis (4 bits)", "forward + backward, ms"]
    header += ["fused step, ms", "share", "three calls, ms", "share"]
    table = markdown_table(header, [measure(pattern, g) for g in ("tensor", "model")])
    print(table)
    machine = [f"{k}: {v}" for k, v in hardware().items()]
    lines = ["# The step's share of the demo's training step", "", *machine, "", table, ""]
    (RESULTS / "step_share.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
