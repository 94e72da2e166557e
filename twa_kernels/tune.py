"""`python -m twa_kernels.tune`: launch configurations of the Triton kernels that beat the shipped.

They are measured on this GPU. Nothing is tuned at import or in use: the shipped numbers
(`backends/triton/config.py`) stay until someone puts others there. A line that this prints goes
into OVERRIDES of that file.

    python -m twa_kernels.tune
        project and reconstruct, all bits, n = 64, 1 GB of packed rows
    python -m twa_kernels.tune --op project --bits 4 2 --n 256 --gigabytes 2
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch

from . import registry
from .basis import PackedBasis
from .layout import BITS
from .ops.project import project
from .ops.reconstruct import reconstruct
from .ops.unpack import unpack
from .packer import pack

#: op -> number -> values to try; reconstruct's tiles follow from its warps, because a thread owns
#: 16 bytes of a row
CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
    "project": {
        "rows": (32, 64, 128),
        "tiles": (2, 4, 8),
        "warps": (4, 8),
        "stages": (2, 3, 4),
        "item": (32, 64, 128),
    },
    "reconstruct": {"rows": (4, 8, 16), "warps": (2, 4, 8)},
    "pack": {"tiles": (2, 4, 8, 16), "warps": (1, 2, 4)},
    "unpack": {"tiles": (8, 16, 32), "warps": (2, 4, 8)},
}


def candidates(op: str, bits: int) -> Iterator[dict[str, int]]:
    """Every combination of the values in CANDIDATES."""
    names = CANDIDATES[op]
    for values in itertools.product(*names.values()):
        config = dict(zip(names, values, strict=True))
        if op == "reconstruct":
            config["tiles"] = config["warps"] * 32 // (1 if bits == 3 else bits)
        yield config


def random_case(
    n: int, columns: int, bits: int, device: str
) -> tuple[PackedBasis, list[torch.Tensor]]:
    """A basis of random codes and scales, one segment, and a gradient; never zeros."""
    tiles = -(-columns // 128)
    codes = torch.randint(0, 256, (tiles, n, 16 * bits), dtype=torch.uint8, device=device)
    scales = torch.randint(40, 100, (tiles, n), dtype=torch.uint8, device=device).view(
        torch.float8_e4m3fn
    )
    segment = torch.zeros(tiles, dtype=torch.int32, device=device)
    ones = torch.ones(n, 1, dtype=torch.float32, device=device)
    shapes = (torch.Size((columns,)),)
    basis = PackedBasis(codes, scales, ones, segment, ones.double(), shapes, bits)
    return basis, [torch.randn(columns, dtype=torch.float32, device=device)]


def seconds(run: Callable[[], object], device: str, budget: float) -> float:
    """Median time of a call in seconds, after one to compile and one to warm up."""
    run(), run()
    times: list[float] = []
    while len(times) < 5 or sum(times) < budget:
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def calls(op: str, basis: PackedBasis, g: list[torch.Tensor]) -> tuple[Callable[[], object], float]:
    """The call to time, and the bytes that it must move."""
    packed = basis.codes.numel() + basis.scales.numel()
    x = torch.randn(basis.n, 1, dtype=torch.float32, device=basis.device)
    out = [torch.empty_like(t) for t in g]
    shapes = basis.shapes if op == "pack" else ()
    rows = [torch.randn(basis.n, *s, dtype=torch.float32, device=basis.device) for s in shapes]
    return {
        "project": (lambda: project(basis, g, "triton"), packed + 4 * basis.num_columns),
        "reconstruct": (
            lambda: reconstruct(basis, x, g, out=out, backend="triton"),
            packed + 8 * basis.num_columns,
        ),
        "pack": (
            lambda: pack(rows, basis.bits, backend="triton"),
            packed + 4 * basis.n * basis.num_columns,
        ),
        "unpack": (lambda: unpack(basis, "triton"), packed + 4 * basis.n * basis.num_columns),
    }[op]


def tune(
    op: str, bits: int, n: int, columns: int, device: str, budget: float, most: int | None
) -> str:
    """Line for OVERRIDES, "" where the shipped numbers are the best.

    Measures every candidate, and prints a line for each.
    """
    from .backends.triton import config as shipped

    arch = shipped.architecture(torch.device(device))
    basis, g = random_case(n, columns, bits, device)
    run, moved = calls(op, basis, g)
    current = shipped.configuration(op, bits, arch)
    results = []
    for k, candidate in enumerate([{}, *itertools.islice(candidates(op, bits), most)]):
        try:
            with shipped.overridden(op, bits, arch, candidate):
                took = seconds(run, device, budget)
        except Exception as error:  # what the compiler or the device refuses is a result too
            why = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
            print(f"  {op} {bits} bits {candidate}: {why}")
            continue
        results.append((took, k, candidate))
        name = "shipped" if not k else " ".join(f"{a} {b}" for a, b in candidate.items())
        print(
            f"  {op} {bits} bits  {1e3 * took:9.3f} ms  {moved / took / 1e9:8.1f} GB/s  {name}",
            flush=True,
        )
    if not results:
        print(f"{op} {bits} bits: no configuration runs here")
        return ""
    # It too may be refused.
    shipped_time = next((took for took, k, _ in results if not k), math.inf)
    took, _, best = min(results, key=lambda r: r[:2])
    if took > 0.98 * shipped_time:  # less than two percent is noise
        print(f"{op} {bits} bits: the shipped {current} is the best of {len(results)}")
        return ""
    beside = f"{took / shipped_time:.2f} of the shipped time"
    if shipped_time == math.inf:
        beside = f"{1e3 * took:.3f} ms; the shipped {current} did not run"
    print(f"{op} {bits} bits: {best} takes {beside}")
    return f"    {(op, bits, arch)!r}: {best!r},"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m twa_kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--op", nargs="+", choices=sorted(CANDIDATES), default=["project", "reconstruct"]
    )
    parser.add_argument("--bits", nargs="+", type=int, choices=BITS, default=list(BITS))
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument(
        "--gigabytes",
        type=float,
        default=1.0,
        help="size of the packed rows (pack and unpack: of the dense ones)",
    )
    parser.add_argument(
        "--seconds", type=float, default=0.05, help="time spent on each configuration, at least"
    )
    parser.add_argument("--most", type=int, help="configurations per op and bits, at most")
    args = parser.parse_args()
    device = "cpu" if registry.interpreting() else "cuda"
    if reason := registry.why_unusable("triton"):
        sys.exit(f"twa_kernels.tune: expected a GPU to measure on, found none: {reason}")
    lines = []
    for op, bits in itertools.product(args.op, args.bits):
        bytes_per_column = args.n * (4 if op in ("pack", "unpack") else bits / 8)
        columns = max(1000, int(args.gigabytes * 1e9 / bytes_per_column))
        lines.append(tune(op, bits, args.n, columns, device, args.seconds, args.most))
    found = [line for line in lines if line]
    if found:
        print("\n".join(["", "For OVERRIDES in twa_kernels/backends/triton/config.py:", *found]))
    else:
        print("\nThe shipped configurations are the best measured.")


if __name__ == "__main__":
    main()
