"""Packing 64 candidates x 100 M parameters from safetensors files at 4 bits: memory, and time
against reading the files once.

Bounds: 2 GB of resident memory beyond the packed size; 70 % of the rate of a plain read of the same
files, both with the files in the page cache and with them on the disk alone. Two ways: into memory
(Subspace.from_candidates) and into a file (`twa pack`, which also writes the packed bytes).

Run: python bench/pack_stream.py [--save] [--candidates 64] [--dtype bfloat16] [--bits 4] [--folder
DIR]. Needs the files' size on the disk (13 GB in bfloat16, with float32 26 GB) and the packed size
once more. Each measurement is a process of its own.
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

BOUND, SHARE = 2e9, 0.7
LIMIT = 1_300_000_000  # of the whole process, of which 0.7 GB are taken before it begins
WIDTH, LAYERS, TOKENS = 768, 12, 20_000


class Model(nn.Module):
    """The tensors of a GPT of 100 M parameters, or a quarter of it."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(int(TOKENS * share), WIDTH))
        for k in range(int(LAYERS * share)):
            for name, shape in {
                "qkv": (3 * WIDTH, WIDTH),
                "out": (WIDTH, WIDTH),
                "up": (4 * WIDTH, WIDTH),
                "down": (WIDTH, 4 * WIDTH),
                "norm": (WIDTH,),
            }.items():
                self.register_parameter(f"layer{k}_{name}", nn.Parameter(torch.zeros(shape)))


def generate(folder: Path, n: int, dtype: torch.dtype, share: float) -> list[Path]:
    """A walk in small steps: neighbouring candidates are near each other, as those of a run are."""
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
        report = PackToFile(
            Path(folder) / "out" / "basis.packed", model, candidates, bits=bits
        ).run()
        packed = report.written
    else:
        packed = twa.Subspace.from_candidates(model, candidates, bits=bits).basis.nbytes
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "seconds": seconds,
                "peak": memory.bytes(),
                "before": before,
                "packed": packed,
                "read": candidates.bytes_read,
            }
        )
    )


def run(folder: Path, way: str, bits: int, limit: int, share: float) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--work", str(folder), way, str(bits), str(limit), str(share)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def once(
    folder: Path, paths: list[Path], where: str, way: str, bits: int, limit: int, size: float
) -> tuple[float, dict[str, float], float]:
    """Share of the plain read, what was measured, the plain read: before and after the packing,
    since the machine's rate changes all the time.
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
    share = result["read"] / result["seconds"] / plain
    print(
        f"{where}, {way}, {limit}: {result['read'] / result['seconds'] / 1e9:.2f} of"
        f" {plain / 1e9:.2f} GB/s: {100 * share:.0f} %",
        file=sys.stderr,
    )
    return share, result, plain


def measure(args: argparse.Namespace, folder: Path, where: str, size: float) -> list[list[str]]:
    """Rows of the table.

    In the page cache a quarter of the model, so that nothing is pushed out of it; on the disk all
    of it.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        folder.mkdir(exist_ok=True)
        paths = generate(folder, args.candidates, getattr(torch, args.dtype), size)
    total, rows = sum(path.stat().st_size for path in paths), []
    for way, limit in (("memory", 0), ("file", 0), ("file", LIMIT)):
        found = sorted(
            (once(folder, paths, where, way, args.bits, limit, size) for _ in range(args.rounds)),
            key=lambda f: f[0],
        )
        share, result, plain = found[len(found) // 2]
        beyond = result["peak"] - (result["packed"] if way == "memory" else 0)
        name = f"into {'memory' if way == 'memory' else 'a file'}" + (
            f", --max-memory {LIMIT / 1e9:g}GB" if limit else ""
        )
        gigabytes = (
            result["read"] / result["seconds"],
            plain,
            result["packed"],
            result["peak"],
            beyond,
        )
        rate, plain, packed, peak, beyond = (f"{v / 1e9:.2f}" for v in gigabytes)
        rows.append(
            [
                where,
                f"{total / 1e9:.1f} GB",
                name,
                f"{result['seconds']:.1f}",
                rate,
                plain,
                f"{100 * share:.0f} %",
                packed,
                peak,
                beyond,
            ]
        )
    return rows


def page(args: argparse.Namespace, rows: list[list[str]]) -> str:
    from twa.merge.report import markdown_table, processor_name

    weights = sum(p.numel() for p in Model().parameters())
    header = [
        "files in",
        "size",
        "packed",
        "seconds",
        "GB/s",
        "plain read GB/s",
        "share",
        "packed GB",
        "peak GB",
        "peak beyond packed GB",
    ]
    lines = [
        f"## {args.dtype}",
        "",
        (
            f"{args.candidates} candidates x {weights / 1e6:.1f} M parameters, in the page cache a"
            f" quarter of them; {args.bits} bits; {processor_name()}, {os.cpu_count()} cores, torch"
            f" {torch.__version__}."
        ),
        (
            f"`python bench/pack_stream.py --dtype {args.dtype}`: median of {args.rounds} rounds by"
            " share; each rate beside the mean of plain"
        ),
        "reads of the same files before and after it.",
        "",
        markdown_table(header, rows),
        "",
        (
            "Peak: resident memory of the whole process; the interpreter with PyTorch and the model"
            " (0.4 GB) are 0.7 GB of it. In memory the center"
        ),
        (
            f"takes {4 * weights / 1e9:.1f} GB. Into a file: packed bytes, center and scales are"
            " written and synced, too."
        ),
        (
            f"Targets: {100 * SHARE:.0f} % of the plain read, {BOUND / 1e9:.0f} GB beyond the"
            " packed size."
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--candidates", type=int, default=64)
    p.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument(
        "--folder",
        type=Path,
        help=(
            "where the files are made, and kept for the next time (default: a temporary directory)"
        ),
    )
    p.add_argument("--save", action="store_true")
    p.add_argument("--work", nargs=5)
    args = p.parse_args()
    if args.work:
        work(args.work[0], args.work[1], int(args.work[2]), int(args.work[3]), float(args.work[4]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        rows = [
            row
            for where, size in (("page cache", 0.25), ("disk", 1.0))
            for row in measure(args, folder / f"{args.dtype}-{size:g}", where, size)
        ]
        text = page(args, rows)
    print(text)
    if args.save:
        target = RESULTS / "pack_stream.md"
        sections = target.read_text().split("\n## ")[1:] if target.exists() else []
        kept = [f"## {s.rstrip()}\n" for s in sections if not s.startswith(f"{args.dtype}\n")]
        target.write_text("# Packing from files\n\n" + "\n".join(sorted([*kept, text])))


if __name__ == "__main__":
    main()
