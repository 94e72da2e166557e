"""Peak memory of SubspaceOptimizer steps with and without low_memory=True.

    python bench/low_memory.py [--save]        --save writes bench/results/low_memory.md

A model of 16 equal Linear layers (41 M parameters, 164 MB of float32 gradients), 8 candidates at 4
bits. low_memory projects each gradient inside backward and frees it, so it should save all
gradients but one.

Each variant runs in a process of its own, with the allocator as it is and with
MALLOC_MMAP_THRESHOLD_=1048576: glibc otherwise takes tensors below 32 MB from its heap once one has
been freed, and keeps the holes they leave. The peak is that of the steps, after the subspace is
built; the median of RUNS runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import publish
from safetensors.torch import save_file
from torch import nn
from twa.io.tables import markdown_table

CANDIDATES, BITS, STEPS, RUNS = 8, 4, 10, 5
ALLOCATORS = {"default": {}, "mmap from 1 MB": {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}}


def model(width: int = 1600, depth: int = 16) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))


def steps(folder: str, low_memory: bool) -> None:
    """The child: prints bytes before the steps and their peak as JSON."""
    import twa
    from twa.io.progress import PeakMemory

    m = model()
    subspace = twa.Subspace.from_candidates(m, twa.Candidates(f"{folder}/*.safetensors"), bits=BITS)
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=0.01, low_memory=low_memory)
    batch = torch.randn(32, m[0].in_features)
    memory = PeakMemory()
    before = memory.bytes()
    for _ in range(STEPS):
        m(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    print(json.dumps({"before": before, "peak": memory.bytes(), "packed": subspace.basis.nbytes}))


def measure(folder: str, low: str, environment: dict[str, str]) -> list[dict[str, int]]:
    """What RUNS child processes have printed, the least peak first."""
    command = [sys.executable, __file__, "--steps", folder, low]
    options = {"check": True, "stdout": subprocess.PIPE, "text": True}
    options["env"] = os.environ | environment
    found = [json.loads(subprocess.run(command, **options).stdout) for _ in range(RUNS)]
    return sorted(found, key=lambda run: run["peak"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="write bench/results/low_memory.md")
    parser.add_argument("--steps", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps:
        return steps(args.steps[0], args.steps[1] == "True")
    m, rows, saved, middle = model(), [], {}, RUNS // 2
    sizes = [4 * p.numel() for p in m.parameters()]
    with tempfile.TemporaryDirectory() as folder:
        for k in range(CANDIDATES):
            torch.manual_seed(k)
            changed = {n: p.detach() + 0.01 * torch.randn_like(p) for n, p in m.named_parameters()}
            save_file(changed, Path(folder) / f"c{k}.safetensors")
        for allocator, environment in ALLOCATORS.items():
            peaks = {}
            for low in ("False", "True"):
                found = measure(folder, low, environment)
                peaks[low] = [run["peak"] for run in found]
                before, peak, packed = (found[middle][k] for k in ("before", "peak", "packed"))
                megabytes = [f"{v / 1e6:.0f}" for v in (before, peak, peak - before)]
                rows.append([f"low_memory={low}", *megabytes, allocator])
            saved[allocator] = [peaks["False"][middle] - peak for peak in reversed(peaks["True"])]
    header = ["optimizer", "before the steps", "peak", "added by the steps", "allocator"]
    lines = [
        f"# Peak memory of {STEPS} optimizer steps",
        "",
        f"{sum(sizes) / 4e6:.1f} M parameters in {len(sizes)} tensors, {CANDIDATES} candidates at"
        f" {BITS} bits, {packed / 1e6:.0f} MB packed. Resident MB of the whole process.",
        "",
        markdown_table(header, rows),
        "",
        f"- gradients: {sum(sizes) / 1e6:.0f} MB in all, the largest {max(sizes) / 1e6:.0f} MB",
    ]
    lines += [
        f"- low_memory saves, allocator {name}: {s[middle] / 1e6:.0f} MB,"
        f" {100 * s[middle] / sum(sizes):.0f} % of the gradients ({s[0] / 1e6:.0f} to"
        f" {s[-1] / 1e6:.0f} MB in {RUNS} runs)"
        for name, s in saved.items()
    ]
    publish("low_memory", lines, args.save)


if __name__ == "__main__":
    main()
