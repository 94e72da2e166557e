"""Gram-Schmidt of 64 candidates x 20 M parameters that are read from safetensors files, Q written
to a file: memory and reads.

    python bench/orthonormalize_stream.py [--save] [--candidates 64] [--accuracy high]

Bound: 1 GB of resident memory beyond the interpreter with torch, 2 reads of the files. Needs twice
the files' size on disk (10 GB). The work runs in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import publish
from peak_memory import model
from safetensors.torch import save_file

BOUND = 1e9


class Counted:
    """A stream that counts what is taken from it."""

    def __init__(self, blocks) -> None:
        self.blocks, self.bytes = blocks, 0

    def __iter__(self):
        for block in self.blocks:
            self.bytes += sum(row.numel() * row.element_size() for row in block)
            yield block


def work(folder: str, accuracy: str) -> None:
    """The child: orthonormalizes the files of a folder, and prints what it took."""
    import twa
    from twa.io.progress import PeakMemory

    import twa_kernels as tk

    candidates = twa.Candidates(f"{folder}/*.safetensors")
    columns = sum(torch.Size(info.shape).numel() for info in candidates.info.values())
    stream = Counted(candidates.blocks())
    memory = PeakMemory()
    before = memory.bytes()
    start, done = time.perf_counter(), 0

    def sink(_: int, q: torch.Tensor) -> None:
        nonlocal done
        # q (r, columns of the block) to its place in a file of r rows; the file stays out of memory
        for j, row in enumerate(q):
            out.seek(4 * (j * columns + done))
            out.write(row.numpy().data)
        done += q.shape[1]

    with open(Path(folder) / "Q.f32", "wb") as out:
        o = tk.orthonormalize(stream, accuracy=accuracy, out=sink)
    seconds, peak = time.perf_counter() - start, memory.bytes() - before
    size = 4 * len(candidates) * columns
    q = np.memmap(Path(folder) / "Q.f32", dtype=np.float32, mode="r", shape=(o.rank, columns))
    gram = torch.zeros(o.rank, o.rank, dtype=torch.float64)
    for a in range(0, columns, 1 << 18):
        part = torch.from_numpy(q[:, a : a + (1 << 18)].astype(np.float64))
        gram += part @ part.T
    loss = float(torch.linalg.matrix_norm(gram - torch.eye(o.rank, dtype=torch.float64), 2))
    print(
        f"candidates {len(candidates)} x {columns / 1e6:.1f} M parameters, {size / 1e9:.2f} GB of"
        f" files, accuracy {accuracy}"
    )
    print(
        f"rank {o.rank}, loss of orthogonality {loss:.1e} (certificate {o.report.certificate:.1e}),"
        f" {o.report.reads} reads of the files"
    )
    print(
        f"bytes read / bytes of the files {stream.bytes / size:.3f} (the first blocks once more,"
        " for the parents)"
    )
    print(
        f"{seconds:.1f} s, of them {size / 1e9:.2f} GB written:"
        f" {(stream.bytes + size) / seconds / 1e9:.2f} GB/s"
    )
    verdict = "met" if peak <= BOUND and o.report.reads == 2 else "MISSED"
    print(
        f"peak memory {peak / 1e6:.0f} MB beyond the interpreter with torch ({before / 1e6:.0f} MB)"
    )
    print(f"bound {BOUND / 1e6:.0f} MB and 2 reads: {verdict}")


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--candidates", type=int, default=64)
    p.add_argument("--accuracy", default="high", choices=["high", "fast"])
    save = "write bench/results/orthonormalize_stream.md"
    p.add_argument("--save", action="store_true", help=save)
    p.add_argument("--folder", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.folder:
        work(a.folder, a.accuracy)
        return
    with tempfile.TemporaryDirectory() as folder:
        state = {k: v.detach().clone() for k, v in model().state_dict().items()}
        for k in range(a.candidates):  # a walk: neighbours are near each other
            state = {key: v + 1e-3 * torch.randn_like(v) for key, v in state.items()}
            save_file(state, f"{folder}/step_{k:03d}.safetensors")
        command = [sys.executable, __file__, "--folder", folder, "--accuracy", a.accuracy]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stderr, file=sys.stderr, end="")
    said = [f"    {line}" for line in done.stdout.splitlines()]
    publish("orthonormalize_stream", ["# Gram-Schmidt from files to a file", "", *said], a.save)
    sys.exit(done.returncode or "MISSED" in done.stdout)


if __name__ == "__main__":
    main()
