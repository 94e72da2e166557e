"""Packing 64 candidates x 100 M parameters from safetensors files at 4 bits: memory, and time
against reading the files once.

    python bench/pack_stream.py [--save] [--candidates 64] [--dtype bfloat16] [--bits 4]
                                [--folder DIR]

Bounds: 2 GB of resident memory beyond the packed size; 70 % of the rate of a plain read of the same
files, both with the files in the page cache and with them on the disk alone. Two ways: into memory
(Subspace.from_candidates) and into a file (`twa pack`, which also writes the packed bytes).

Needs the files' size on the disk (13 GB in bfloat16, with float32 26 GB) and the packed size once
more. Each measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import RESULTS
from safetensors.torch import save_file
from torch import nn
from twa.io.tables import markdown_table

from twa_kernels.machine import processor

BOUND, SHARE = 2e9, 0.7
LIMIT = 1_300_000_000  # of the whole process, of which 0.7 GB are taken before it begins
WIDTH, LAYERS, TOKENS = 768, 12, 20_000
SHAPES = {
    "qkv": (3 * WIDTH, WIDTH),
    "out": (WIDTH, WIDTH),
    "up": (4 * WIDTH, WIDTH),
    "down": (WIDTH, 4 * WIDTH),
    "norm": (WIDTH,),
}


class Model(nn.Module):
    """The tensors of a GPT of 100 M parameters, or a quarter of it."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(int(TOKENS * share), WIDTH))
        for k in range(int(LAYERS * share)):
            for name, shape in SHAPES.items():
                self.register_parameter(f"layer{k}_{name}", nn.Parameter(torch.zeros(shape)))


def generate(folder: Path, n: int, dtype: torch.dtype, share: float) -> list[Path]:
    """Files of a walk in small steps: neighbours are near each other, as those of a run are."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.02 * torch.randn(p.shape, generator=generator)
        for name, p in Model(share).named_parameters()
    }
    noise = torch.randn(1 << 24, generator=generator)
    paths = []
    for k in range(n):
        for j, w in enumerate(weights.values()):
            start = (k * 7_368_787 + j * 15_485_863) % ((1 << 24) - 1)
            flat = w.view(-1)
            for at in range(0, len(flat), 1 << 24):
                part = flat[at : at + (1 << 24)]
                part += 1e-3 * torch.cat([noise[start:], noise[:start]])[: len(part)]
        paths.append(folder / f"step_{k:03}.safetensors")
        save_file({name: w.to(dtype) for name, w in weights.items()}, paths[-1])
    os.sync()
    return paths


def evict(paths: list[Path]) -> None:
    for path in paths:
        with open(path, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(paths: list[Path]) -> float:
    """Bytes per second of reading every file once from begin to end, through one buffer of 8 MB."""
    buffer, count, start = bytearray(8 << 20), 0, time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as f:
            while got := f.readinto(buffer):
                count += got
    return count / (time.perf_counter() - start)


def work(folder: str, way: str, bits: int, limit: int, share: float) -> None:
    """One packing, as a process of its own; prints what it measured as JSON."""
    import twa
    from twa.io.memory import limit_memory
    from twa.io.progress import PeakMemory
    from twa.packing.to_file import PackToFile

    torch.set_grad_enabled(False)
    model, candidates = Model(share), twa.Candidates(folder)
    memory = PeakMemory()
    before, start = memory.bytes(), time.perf_counter()
    if way == "file":
        if limit:
            limit_memory(candidates, limit)
        path = Path(folder) / "out" / "basis.packed"
        packed = PackToFile(path, model, candidates, bits=bits).run().written
    else:
        packed = twa.Subspace.from_candidates(model, candidates, bits=bits).basis.nbytes
    found = {"seconds": time.perf_counter() - start, "peak": memory.bytes(), "before": before}
    print(json.dumps(found | {"packed": packed, "read": candidates.bytes_read}))


def run(folder: Path, way: str, bits: int, limit: int, share: float) -> dict[str, float]:
    """What `work` prints, of a child process."""
    options = [str(folder), way, str(bits), str(limit), str(share)]
    command = [sys.executable, __file__, "--work", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def once(
    folder: Path, paths: list[Path], where: str, way: str, bits: int, limit: int, size: float
) -> tuple[float, dict[str, float], float]:
    """Share of the plain read, what was measured, and the plain read, which is taken before and
    after the packing, since the machine's rate changes all the time.
    """
    prepare = evict if where == "disk" else read_all
    prepare(paths)
    before = read_all(paths)
    prepare(paths)
    result = run(folder, way, bits, limit, size)
    for left in (folder / "out").glob("*"):
        left.unlink()
    prepare(paths)
    plain = (before + read_all(paths)) / 2
    rate = result["read"] / result["seconds"]
    rates = f"{rate / 1e9:.2f} of {plain / 1e9:.2f} GB/s: {100 * rate / plain:.0f} %"
    print(f"{where}, {way}, {limit}: {rates}", file=sys.stderr)
    return rate / plain, result, plain


def measure(args: argparse.Namespace, folder: Path, where: str, size: float) -> list[list[str]]:
    """Rows of the table: in the page cache of a quarter of the model, so that nothing is pushed out
    of it; on the disk of all of it.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        folder.mkdir(exist_ok=True)
        paths = generate(folder, args.candidates, getattr(torch, args.dtype), size)
    total, rows = sum(path.stat().st_size for path in paths), []
    for way, limit in (("memory", 0), ("file", 0), ("file", LIMIT)):
        found = [
            once(folder, paths, where, way, args.bits, limit, size) for _ in range(args.rounds)
        ]
        share, result, plain = sorted(found, key=lambda f: f[0])[len(found) // 2]
        beyond = result["peak"] - (result["packed"] if way == "memory" else 0)
        name = "into memory" if way == "memory" else "into a file"
        name += f", --max-memory {LIMIT / 1e9:g}GB" if limit else ""
        rates = [f"{v / 1e9:.2f}" for v in (result["read"] / result["seconds"], plain)]
        sizes = [f"{v / 1e9:.2f}" for v in (result["packed"], result["peak"], beyond)]
        row = [where, f"{total / 1e9:.1f} GB", name, f"{result['seconds']:.1f}"]
        rows.append([*row, *rates, f"{100 * share:.0f} %", *sizes])
    return rows


def page(args: argparse.Namespace, rows: list[list[str]]) -> str:
    weights = sum(p.numel() for p in Model().parameters())
    header = ["files in", "size", "packed", "seconds", "GB/s", "plain read GB/s", "share"]
    header += ["packed GB", "peak GB", "peak beyond packed GB"]
    lines = [
        f"## {args.dtype}",
        "",
        f"{args.candidates} candidates x {weights / 1e6:.1f} M parameters, in the page cache a"
        f" quarter of them; {args.bits} bits; {processor()}, {os.cpu_count()} cores, torch"
        f" {torch.__version__}.",
        f"`python bench/pack_stream.py --dtype {args.dtype}`: median of {args.rounds} rounds by"
        " share; each rate beside the mean of plain reads of the same files before and after it.",
        "",
        markdown_table(header, rows),
        "",
        "Peak: resident memory of the whole process; the interpreter with PyTorch and the model"
        " (0.4 GB) are 0.7 GB of it.",
        f"In memory the center takes {4 * weights / 1e9:.1f} GB. Into a file: packed bytes, center"
        " and scales are written and synced, too.",
        f"Targets: {100 * SHARE:.0f} % of the plain read, {BOUND / 1e9:.0f} GB beyond the packed"
        " size.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--candidates", type=int, default=64)
    p.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--rounds", type=int, default=3)
    folder = "where the files are made, and kept for the next time (default: a temporary directory)"
    p.add_argument("--folder", type=Path, help=folder)
    p.add_argument("--save", action="store_true")
    p.add_argument("--work", nargs=5)
    args = p.parse_args()
    if args.work:
        work(args.work[0], args.work[1], int(args.work[2]), int(args.work[3]), float(args.work[4]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        rows = measure(args, folder / f"{args.dtype}-0.25", "page cache", 0.25)
        rows += measure(args, folder / f"{args.dtype}-1", "disk", 1.0)
        text = page(args, rows)
    print(text)
    if args.save:
        target = RESULTS / "pack_stream.md"
        sections = target.read_text().split("\n## ")[1:] if target.exists() else []
        kept = [f"## {s.rstrip()}\n" for s in sections if not s.startswith(f"{args.dtype}\n")]
        target.write_text("# Packing from files\n\n" + "\n".join(sorted([*kept, text])))


if __name__ == "__main__":
    main()
