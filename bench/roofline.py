"""Percent of a device-to-device copy that each op reaches on a GPU; peers of project and reconstruct in the same run.

Bytes    What the op must move, each input read once and each output written once: the formulas are in BYTES and on the page. Gradients,
         centers, weights and the input of pack are float32. Peers: their own codes and scales, plus the same gradient, center and weights.
Copy     copy_ of a buffer of --gigabytes, bytes read + written, before and after all else; the larger one counts.
Time     Device events around one call, median of 5 to 100 calls (about 0.3 s), after the call that compiles and 0.1 s of warm-up. Before each
         call a buffer of twice the last-level cache is written, then read, so that the call finds none of its data there and has no dirty
         lines to write back; gradients, centers and outputs rotate among several sets. P is random, and far larger than the cache.
Host     Clock time of the call itself, without waiting for the device: below it no loop of such calls can go. An op that waits (pack) shows
         that wait, the flush included.
Checks   Before a kernel is timed, its result for this n on a small basis is compared with backend="reference" on the CPU: relative error below
         1e-4, pack equal in every byte. If not, the table says WRONG and the exit status is 1.
Run: python bench/roofline.py [--quick]; without installing, with PYTHONPATH=. in front. Writes roofline_<gpu>.json and .md to bench/results/.
--rehearse runs everything on CPU tensors of a few tiles, kernels in Triton's interpreter, into a temporary folder: it measures nothing.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined

import torch
from common import RESULTS, hardware
from gpu_peers import PEERS, Peer
from static_cost_cuda import predicted
from torch import Tensor

import twa_kernels as tk
from twa_kernels import dispatch
from twa_kernels.reference import tile_offsets

OPS = ("project", "reconstruct", "step", "gram", "unpack", "pack")
PACKED = ("project", "reconstruct", "step", "gram")  # the others have a dense operand of n rows, which sets their D
TOLERANCE = 1e-4
REHEARSED_TILES = 40
#: percent of the tiles that each tensor has; a tiny tensor is added, and one is ragged
SHARES = (22, 16, 13, 11, 9, 8, 7, 6, 4, 3, 1)
SEGMENTS = (0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 0)
MIN_FLUSH = 512 << 20  # more than twice the largest last-level cache that a driver does not report (AMD: 256 MB)

#: op -> bytes that it must move: printed on the page, and evaluated for every row
BYTES = {
    "project": "n * tiles * (16 * bits + 1) + 4 * D",
    "reconstruct": "n * tiles * (16 * bits + 1) + 8 * D",
    "step": "2 * n * tiles * (16 * bits + 1) + 12 * D",
    "gram": "n * tiles * (16 * bits + 1)",
    "unpack": "n * tiles * (16 * bits + 1) + n * D * 4",
    "pack": "n * D * 4 + n * tiles * (16 * bits + 2)",
}


# Cases -----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """Operands of every op for one basis."""

    basis: tk.PackedBasis
    x: Tensor  # (n, L)
    sets: list[tuple[list[Tensor], list[Tensor], list[Tensor]]]  # gradients, centers, outputs
    rows: list[Tensor]  # input of pack, n per tensor; empty where it would not fit
    scales: Tensor  # (num_tiles, n) bfloat16, output of pack
    state: dict

    def bytes_of(self, op: str) -> int:
        b = self.basis
        return eval(BYTES[op], {"n": b.n, "D": b.num_columns, "tiles": len(b.tile_segment), "bits": b.bits})

    def copy(self, device: torch.device | str) -> Case:
        def put(t: Tensor) -> Tensor:
            return t.to(device, copy=True)

        names = ("codes", "scales", "row_scale", "tile_segment", "divisor")
        basis = replace(self.basis, **{name: put(getattr(self.basis, name)) for name in names})
        sets = [tuple([put(t) for t in tensors] for tensors in s) for s in self.sets]
        return Case(basis, put(self.x), sets, [put(r) for r in self.rows], put(self.scales), {})


def tensor_sizes(tiles: int) -> list[int]:
    """Elements of 12 tensors of unequal size with about `tiles` tiles, among them a ragged and a tiny one."""
    sizes = [128 * max(1, tiles * share // 100) for share in SHARES]
    sizes[2] -= 37
    return [*sizes[:6], 5, *sizes[6:]]


def make_case(n: int, tiles: int, bits: int, device: torch.device | str, sets: int = 1, dense: bool = False) -> Case:
    """Random operands, made on the device: codes uniform, scales e4m3 from 2^-1 to 2^7, rows of P of an rms near 1. Outputs are NaN."""
    numels = tensor_sizes(tiles)
    counts = torch.tensor(tile_offsets(numels)).diff()
    segment = torch.repeat_interleave(torch.tensor(SEGMENTS), counts).int().to(device)
    tiles, columns = int(counts.sum()), max(SEGMENTS) + 1
    codes = torch.empty(tiles, n, 16 * bits, dtype=torch.uint8, device=device).random_(0, 256)
    scales = torch.empty(tiles, n, dtype=torch.uint8, device=device).random_(0x30, 0x71).view(torch.float8_e4m3fn)
    row_scale = (torch.rand(n, columns, device=device) + 0.5) * 5e-4
    divisor = torch.ones(n, columns, dtype=torch.float64, device=device)
    basis = tk.PackedBasis(codes, scales, row_scale, segment, divisor, tuple(torch.Size((numel,)) for numel in numels), bits)

    def vectors(fill: Callable) -> list[Tensor]:
        return [fill(numel, device=device) for numel in numels]

    def nothing(*shape: int, **options) -> Tensor:
        return torch.full(shape, math.nan, **options)

    rows = [row for numel in numels for row in torch.randn(n, numel, device=device)] if dense else []
    packed_scales = nothing(tiles, n, dtype=torch.bfloat16, device=device) if dense else torch.empty(0, device=device)
    made = [(vectors(torch.randn), vectors(torch.randn), vectors(nothing)) for _ in range(sets)]
    return Case(basis, torch.randn(n, columns, device=device), made, rows, packed_scales, {})


def call(op: str, case: Case, backend: str, k: int = 0) -> list[Tensor]:
    """The k-th call of an op; returns what it computed."""
    basis = case.basis
    if op == "unpack":
        return tk.unpack(basis, backend)
    if op == "gram":
        return [basis.gram(backend=backend)]
    if op == "pack":
        sum_sq, max_scale = torch.zeros_like(basis.divisor), torch.zeros_like(basis.row_scale)
        out = (basis.codes, case.scales, sum_sq, max_scale)
        torch.ops.twa_kernels.pack(case.rows, [], basis.numels, basis.tile_segment, basis.bits, "gaussian", *out, None, backend)
        return list(out)
    grads, center, out = case.sets[k % len(case.sets)]
    if op == "project":
        return [tk.project(basis, grads, backend)]
    if op == "reconstruct":
        return tk.reconstruct(basis, case.x, center, out, backend)
    c = tk.step(basis, grads, case.x, out, center, rule="adamw", options={"lr": 1e-2}, state=case.state, backend=backend)
    return [c, case.x, *out]


def backends(op: str, device: torch.device) -> list[str]:
    """Usable backends of an op on this device, without the reference."""
    have = [b for b, devices in dispatch.DEVICES.items() if b != "reference" and device.type in devices and (op, b) in dispatch.IMPLEMENTATIONS]
    return [b for b in have if dispatch.why_unusable(b) is None]


def error_of(op: str, found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative error of the results; infinite where bytes of pack differ."""
    pairs = [(f.cpu(), e) for f, e in zip(found, expected, strict=True)]
    if op == "pack":
        if not all(torch.equal(f, e) for f, e in pairs[:2]):
            return math.inf
        pairs = pairs[2:]
    errors = [float((f.double() - e.double()).norm() / e.double().norm()) for f, e in pairs]
    return max(math.inf if math.isnan(e) else e for e in errors)


# Time ------------------------------------------------------------------------------------------------------------


class Timer:
    """Median of calls on one device, and what launching them costs the host."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.cache = torch.cuda.get_device_properties(device).L2_cache_size if self.gpu else 0
        self.flush = torch.zeros(max(2 * self.cache, MIN_FLUSH) // 4, device=device) if self.gpu else torch.zeros(1)

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def __call__(self, run: Callable[[int], object]) -> dict:
        """run(k): the k-th call. -> ms, quartiles, host_us, calls."""
        run(0)  # compiles
        self.wait()
        count = self.warm_up(run) if self.gpu else 1
        ms, host = [], []
        for k in range(count):
            begin, end = (torch.cuda.Event(enable_timing=True) if self.gpu else None for _ in range(2))
            self.flush.add_(1)
            self.flush.sum()
            if begin:
                begin.record()
            start = time.perf_counter()
            run(k)
            host.append(time.perf_counter() - start)
            if end:
                end.record()
            self.wait()
            ms.append(begin.elapsed_time(end) if begin else 1e3 * host[-1])
        ms, host = sorted(ms), sorted(host)
        at = [ms[count * q // 4] for q in (1, 2, 3)]
        return {"ms": at[1], "quartiles": [at[0], at[2]], "host_us": 1e6 * host[count // 2], "calls": count}

    def warm_up(self, run: Callable[[int], object], seconds: float = 0.1, budget: float = 0.3) -> int:
        """Runs until clocks and caches are up; returns how many calls to time."""
        times: list[float] = []
        while len(times) < 2 or sum(times) < seconds:
            start = time.perf_counter()
            run(len(times))
            self.wait()
            times.append(time.perf_counter() - start)
        return min(100, max(5, int(budget / min(times))))


def copy_rate(timer: Timer, nbytes: int, device: torch.device) -> float:
    """Bytes per second of a device-to-device copy, read + written."""
    source, target = torch.empty(nbytes, dtype=torch.uint8, device=device).random_(0, 256), torch.empty(nbytes, dtype=torch.uint8, device=device)
    return 2 * nbytes / timer(lambda k: target.copy_(source))["ms"] * 1e3


# The run ---------------------------------------------------------------------------------------------------------


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def driver() -> str:
    if shutil.which("nvidia-smi"):
        found = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False)
        return (found.stdout.split() or ["unknown"])[0]
    amd = Path("/sys/module/amdgpu/version")
    return f"amdgpu {amd.read_text().strip()}" if amd.exists() else "unknown"


def machine(device: torch.device, commit: str) -> dict[str, str]:
    """Hardware and versions; `commit` where the tree is a copy without git."""
    found = {"gpu": "none (rehearsal on CPU tensors)"}
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        arch = p.gcnArchName if torch.version.hip else f"sm_{p.major}{p.minor}"
        found = {"gpu": p.name, "architecture": arch, "multiprocessors": str(p.multi_processor_count)}
        found |= {"memory": f"{p.total_memory / 1e9:.0f} GB", "cache": f"{p.L2_cache_size / 1e6:.0f} MB", "driver": driver()}
        found |= {"ROCm": torch.version.hip} if torch.version.hip else {"CUDA": str(torch.version.cuda)}
    if importlib.util.find_spec("triton"):
        import triton

        found["triton"] = triton.__version__
    found |= hardware()
    return found | ({"commit": commit} if commit else {})


class Run:
    """What was asked for, what was measured, and the page."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device, self.timer = args, device, Timer(device)
        self.machine = machine(device, args.commit)
        self.name = "roofline_" + (slug(self.machine["gpu"]) if device.type == "cuda" else "rehearsal")
        self.rows: list[dict] = []
        self.notes: list[str] = []
        self.left_out: list[str] = []
        self.end = time.monotonic() + args.seconds
        static = RESULTS / "cuda_static_cost.json"
        self.static_cost = json.loads(static.read_text()) if static.exists() else []
        self.copies = [copy_rate(self.timer, self.copy_bytes(), device)]
        self.say(f"copy: {self.copies[0] / 1e9:.0f} GB/s, {self.machine['gpu']}")

    def say(self, line: str) -> None:
        print(line, flush=True)

    def copy_bytes(self) -> int:
        return int(min(1e9 * self.args.gigabytes, self.free() / 3)) if self.timer.gpu else 1 << 20

    def free(self) -> float:
        """Bytes that tensors may take."""
        if not self.timer.gpu:
            return 64e6
        torch.cuda.empty_cache()
        return 0.8 * torch.cuda.mem_get_info(self.device)[0]

    def late(self, what: str) -> bool:
        if time.monotonic() < self.end:
            return False
        self.left_out.append(what)
        return True

    def record(self, op: str, kernel: str, bits: int, n: int, columns: int, measure: Callable[[], dict], note: str = "") -> dict:
        """Adds a row with what measure() returns: bytes and times, or a note; a kernel that fails has its error as the note."""
        row = {"op": op, "kernel": kernel, "bits": bits, "n": n, "D": columns, "ms": None, "note": note}
        try:
            row |= measure()
        except Exception as error:
            row["note"] = f"{type(error).__name__}: {' '.join(str(error).replace('|', '/').split())[:120]}"
        if row["ms"]:
            row |= {"GB/s": row["bytes"] / row["ms"] / 1e6, "ps per n D": 1e9 * row["ms"] / (n * columns)}
        self.rows.append(row)
        self.say("  ".join(cell for cell in cells(row, self.copies) if cell))
        return row

    def packed_tiles(self, n: int, bits: int) -> tuple[int, int]:
        """Tiles of P for --gigabytes, or what fits; sets of vectors to rotate among."""
        if not self.timer.gpu:
            return REHEARSED_TILES, 2
        row, vectors = n * (16 * bits + 1), 3 * 512
        tiles, free = int(1e9 * self.args.gigabytes / row), self.free()
        sets = min(8, max(2, math.ceil(2 * self.timer.cache / (512 * tiles))))
        sets = sets if tiles * (row + sets * vectors) < free else 1
        return min(tiles, int(free / (row + sets * vectors))), sets

    def dense_tiles(self, n: int, bits: int) -> int:
        """Tiles for which n dense rows take --gigabytes, or what fits."""
        return int(min(1e9 * self.args.gigabytes / (512 * n), self.free() / (n * (2 * 512 + 16 * bits + 4)))) if self.timer.gpu else REHEARSED_TILES

    def ours(self, n: int, bits: int) -> None:
        """All ops of one basis."""
        small = make_case(n, max(200, 32_000 // n) if self.timer.gpu else REHEARSED_TILES, bits, "cpu", dense=True)
        for group in (PACKED, ("unpack",), ("pack",)):
            case = None
            for op in (op for op in group if op in self.args.ops and backends(op, self.device)):
                if self.late(f"{op} at {bits} bits, n = {n}"):
                    continue
                if case is None:
                    tiles, sets = self.packed_tiles(n, bits) if group == PACKED else (self.dense_tiles(n, bits), 0)
                    case = make_case(n, tiles, bits, self.device, sets, op == "pack")
                expected = call(op, small.copy("cpu"), "reference")
                for backend in backends(op, self.device):
                    measure = functools.partial(self.checked, op, backend, small, expected, case)
                    row = self.record(op, backend, bits, n, case.basis.num_columns, measure)
                    row["ours"] = True
                    del measure  # holds the case

    def checked(self, op: str, backend: str, small: Case, expected: list[Tensor], case: Case) -> dict:
        error = error_of(op, call(op, small.copy(self.device), backend), expected)
        if error >= TOLERANCE:
            return {"note": "WRONG: " + ("packed bytes differ" if math.isinf(error) and op == "pack" else f"relative error {error:.1e}")}
        found = {"error": error, "bytes": case.bytes_of(op)}
        if backend == "cuda" and "H200" in self.machine["gpu"]:
            found["predicted"] = predicted(self.static_cost, op, case.basis.bits, case.basis.n)
        return found | self.timer(lambda k: call(op, case, backend, k))

    def peers(self, n: int) -> None:
        for op in (op for op in ("project", "reconstruct") if op in self.args.ops):
            for peer in PEERS:
                if peer.module and importlib.util.find_spec(peer.module) is None:
                    self.notes.append(f"{peer.name}: not installed")
                elif not self.late(f"{op}, {peer.name}, n = {n}"):
                    ours = 128 * self.packed_tiles(n, peer.bits if peer.bits < 16 else 4)[0]
                    most = min(peer.largest // n, int(self.free() / (peer.memory * n + 32)))  # 32: vectors, in two sets
                    note = "" if most > ours else "smaller D: 32-bit indices" if most == peer.largest // n else "smaller D: memory"
                    columns = min(ours, most) // 1024 * 1024
                    self.record(op, peer.name, peer.bits, n, columns, functools.partial(self.peer, op, peer, n, columns), note)
                    torch._dynamo.reset()  # what it compiled holds tensors

    def peer(self, op: str, peer: Peer, n: int, columns: int) -> dict:
        run, stored = peer.make(op, n, columns, self.device)
        x = torch.randn(n, 1, device=self.device)
        sets = [[torch.randn(columns, device=self.device) for _ in range(2)] for _ in range(2)]  # gradient, or center and result
        timed = self.timer((lambda k: run(sets[k % 2][0])) if op == "project" else (lambda k: run(x, *sets[k % 2])))
        return {"bytes": stored + (4 if op == "project" else 8) * columns} | timed

    def finish(self) -> None:
        """The second copy; then the page is final."""
        self.copies.append(copy_rate(self.timer, self.copy_bytes(), self.device))
        self.write()

    def page(self) -> str:
        copies = ", ".join(f"{rate / 1e9:.0f}" for rate in self.copies)
        lines = [f"# Percent of a device-to-device copy: {self.machine['gpu']}", "", *(f"- {k}: {v}" for k, v in self.machine.items())]
        lines += [f"- copy, bytes read + written: {copies} GB/s (before and after; the larger counts)", ""]
        lines += ["Bytes that an op must move, with tiles of 128 columns; peers: their own codes and scales, then the same 4 * D or 8 * D:", ""]
        lines += [*(f"    {op:12} {formula}" for op, formula in BYTES.items()), ""]
        lines += ["Our bases have 12 tensors in 10 segments, peers one tensor of D columns. Host us: time to launch one call; where it exceeds the"]
        lines += ["median, it limits a loop of such calls. ps per n D: picoseconds per weight of a candidate. Predicted: from the instructions of"]
        lines += ["the CUDA kernels (bench/static_cost_cuda.py), before this run.", ""]
        order = sorted(self.rows, key=lambda r: (OPS.index(r["op"]), r["n"], not r.get("ours"), -r["bits"], r["kernel"]))
        lines += table([cells(row, self.copies) for row in order])
        unusable = [(b, dispatch.why_unusable(b)) for b, devices in dispatch.DEVICES.items() if self.device.type in devices]
        notes = [f"{b}: not usable: {why}" for b, why in unusable if why] + list(dict.fromkeys(self.notes))
        notes += [f"{op}: no usable backend" for op in self.args.ops if not backends(op, self.device)]
        notes += [f"not measured within {self.args.seconds:.0f} s: {'; '.join(self.left_out)}"] if self.left_out else []
        return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])

    def write(self) -> None:
        self.args.output.mkdir(parents=True, exist_ok=True)
        result = {"hardware": self.machine, "copy": self.copies, "bytes": BYTES, "rows": self.rows}
        result |= {"arguments": {k: str(v) for k, v in vars(self.args).items()}, "notes": self.notes, "left out": self.left_out}
        (self.args.output / f"{self.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (self.args.output / f"{self.name}.md").write_text(self.page())


HEADER = ["op", "kernel", "bits", "n", "D", "GB", "median ms", "host us", "GB/s", "of copy", "predicted", "ps per n D", "note"]


def cells(row: dict, copies: list[float]) -> list[str]:
    """One row of the table."""
    start = [row["op"], row["kernel"], str(row["bits"]), str(row["n"]), f"{row['D']:.3g}"]
    if not row["ms"]:
        return [*start, *[""] * 7, row["note"]]
    percent = 100 * row["GB/s"] * 1e9 / max(copies)
    numbers = [f"{row['bytes'] / 1e9:.2f}", f"{row['ms']:.3f}", f"{row['host_us']:.0f}", f"{row['GB/s']:.0f}", f"{percent:.0f} %"]
    numbers.append(f"{row['predicted']:.0f} %" if row.get("predicted") else "")
    return [*start, *numbers, f"{row['ps per n D']:.3f}", row["note"]]


def table(rows: list[list[str]]) -> list[str]:
    """Markdown that is as readable on a terminal: text to the left, numbers to the right."""
    left = {0, 1, len(HEADER) - 1}
    widths = [max(len(row[c]) for row in [HEADER, *rows]) for c in range(len(HEADER))]
    rule = "|" + "|".join("-" * (w + 2) if c in left else "-" * (w + 1) + ":" for c, w in enumerate(widths)) + "|"
    lines = [[cell.ljust(w) if c in left else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))] for row in [HEADER, *rows]]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return [text[0], rule, *text[1:]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.5, help="packed size of P; for pack and unpack, size of the dense rows")
    parser.add_argument("--n", type=int, nargs="+", help="candidates (16 72 256)")
    parser.add_argument("--bits", type=int, nargs="+", choices=(8, 4, 3, 2, 1), help="(all)")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--quick", action="store_true", help="n = 72 at 4, 8 and 1 bits, two minutes at most")
    parser.add_argument("--seconds", type=float, help="start no measurement later than this")
    parser.add_argument("--output", type=Path, help="folder for the results (bench/results)")
    parser.add_argument("--commit", default="", help="commit to name, where the tree is a copy without git")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    args = parser.parse_args()
    args.n = args.n or ([5] if args.rehearse else [72] if args.quick else [72, 16, 256])
    args.bits = args.bits or ([4, 8, 1] if args.quick else [4, 8, 3, 2, 1])  # 4 bits and the peers first, in case time runs out
    args.seconds = args.seconds or (110.0 if args.quick else math.inf)
    args.output = args.output or (Path(tempfile.mkdtemp(prefix="roofline-")) if args.rehearse else RESULTS)
    return args


def main() -> int:
    args = arguments()
    if not args.rehearse and not torch.cuda.is_available():
        found = f"torch.cuda.is_available() is False (torch {torch.__version__})"
        print(f"roofline: needs a CUDA or ROCm device that PyTorch can use; {found}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    run = Run(args, torch.device("cpu") if args.rehearse else torch.device("cuda", 0))
    for n in args.n:
        for k, bits in enumerate(args.bits):
            run.ours(n, bits)
            if k == 0 and not args.no_peers:
                run.peers(n)
            run.write()
    run.finish()
    print("\n" + run.page())
    print(f"written to {args.output / run.name}.md and .json")
    return int(any(row.get("ours") and not row["ms"] for row in run.rows) or not any(row.get("ours") for row in run.rows))


if __name__ == "__main__":
    sys.exit(main())
