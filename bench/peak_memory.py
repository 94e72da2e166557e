"""Peak memory while a 4-bit subspace of 32 candidates x 20 M parameters is built from safetensors
files.

    python bench/peak_memory.py [--candidates 32] [--bits 4]

Bound: packed size + 32 x the largest tensor in float32 + the model + 100 MB, beyond what the
interpreter with torch takes. The build runs in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


def model(width: int = 512, depth: int = 6, vocabulary: int = 2048) -> nn.Module:
    """Shapes of a 20 M parameter transformer."""

    def block() -> nn.Module:
        parts = {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        parts |= {"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)}
        return nn.ModuleDict(parts | {"norm": nn.LayerNorm(width)})

    blocks, embed = nn.ModuleList(block() for _ in range(depth)), nn.Embedding(vocabulary, width)
    return nn.ModuleDict({"embed": embed, "blocks": blocks})


def build(folder: str, bits: int) -> None:
    """Builds the subspace, prints what it took, and ends the process."""
    import twa
    from twa.io.progress import PeakMemory

    m = model()
    model_bytes = sum(p.numel() * 4 for p in m.parameters())
    candidates = twa.Candidates(f"{folder}/*.safetensors")
    memory = PeakMemory()
    before = memory.bytes() - model_bytes
    start = time.perf_counter()
    subspace = twa.Subspace.from_candidates(m, candidates, bits=bits)
    seconds = time.perf_counter() - start
    peak = memory.bytes() - before
    largest = max(p.numel() * 4 for p in m.parameters())
    packed = subspace.basis.nbytes
    bound = packed + len(candidates) * largest + model_bytes + 100e6
    read = len(candidates) * model_bytes
    print(
        f"candidates {len(candidates)} x {model_bytes / 4e6:.1f} M parameters, {read / 1e9:.2f} GB"
        f" of files, {bits} bits"
    )
    print(f"built in {seconds:.1f} s ({read / seconds / 1e9:.2f} GB/s)")
    print(
        f"packed {packed / 1e6:.0f} MB, largest tensor {largest / 1e6:.1f} MB, model"
        f" {model_bytes / 1e6:.0f} MB"
    )
    verdict = "met" if peak <= bound else "MISSED"
    print(
        f"peak {peak / 1e6:.0f} MB beyond the interpreter with torch ({before / 1e6:.0f} MB); bound"
        f" {bound / 1e6:.0f} MB: {verdict}"
    )
    sys.exit(peak > bound)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--build", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        build(args.build, args.bits)
    with tempfile.TemporaryDirectory() as folder:
        base = {name: p.detach() for name, p in model().named_parameters()}
        for k in range(args.candidates):
            torch.manual_seed(k)
            changed = {name: p + 0.01 * torch.randn_like(p) for name, p in base.items()}
            save_file(changed, Path(folder) / f"c{k}.safetensors")
        command = [sys.executable, __file__, "--build", folder, "--bits", str(args.bits)]
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
