"""Shared by the microbenchmarks: random bases, measured bandwidth, and the peers, written from
their definitions.
"""

from __future__ import annotations

import functools
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gpucheck.machine import commit
from torch import Tensor

try:
    import twa_kernels as tk
except ModuleNotFoundError as error:
    if error.name != "twa_kernels":
        raise
    raise SystemExit(
        f"twa_kernels is not installed in {sys.executable}: `make build`, then .venv/bin/python"
    ) from None
from twa_kernels import native as native_backend
from twa_kernels.machine import processor
from twa_kernels.native import empty_for_streaming

RESULTS = Path(__file__).parent / "results"
Run = tuple[Callable[[], object], int]  # and the bytes that it moves


def random_basis(n: int, columns: int, bits: int, tensors: int = 1) -> tk.PackedBasis:
    """Random codes and scales (never zeros), one segment; `tensors` equal parts."""
    part = columns // tensors
    tiles = tensors * -(-part // 128)
    codes = empty_for_streaming((tiles, n, 16 * bits), "cpu")
    codes.random_(0, 256)
    scales = torch.randint(40, 100, (tiles, n), dtype=torch.uint8).view(torch.float8_e4m3fn)
    segment = torch.zeros(tiles, dtype=torch.int32)
    shapes = tuple(torch.Size((part,)) for _ in range(tensors))
    row_scale, divisor = torch.rand(n, 1) + 0.5, torch.ones(n, 1, dtype=torch.float64)
    return tk.PackedBasis(codes, scales, row_scale, segment, divisor, shapes, bits)


def run_times(run, at_least: int, seconds: float, most: float = math.inf) -> list[float]:
    """Seconds of at least `at_least` runs, for about `seconds` seconds, at most `most` of them."""
    times: list[float] = []
    while len(times) < at_least or (sum(times) < seconds and len(times) < most):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def median_seconds(run, at_least: int = 5, seconds: float = 1.0) -> float:
    """Median of at least `at_least` runs and about `seconds` seconds, after one to warm up."""
    run()
    times = run_times(run, at_least, seconds, most=200)
    return sorted(times)[len(times) // 2]


def kernel_runs(n: int, columns: int, bits: int) -> dict[str, Run]:
    """{op: (run, bytes moved)} of project and reconstruct of a random basis."""
    basis, x = random_basis(n, columns, bits), torch.randn(n, 1)
    g, center, out = torch.randn(columns), torch.randn(columns), torch.empty(columns)
    return {
        "project": (lambda: tk.project(basis, [g]), basis.nbytes + 4 * columns),
        "reconstruct": (
            lambda: tk.reconstruct(basis, x, [center], [out]),
            basis.nbytes + 8 * columns,
        ),
    }


def memory_runs(size: int = 1 << 30) -> dict[str, Run]:
    """{name: (run, bytes moved)} of reading `size` bytes by a plain loop, of reading them with
    software prefetch, and of copying them (memcpy; read + write), with the threads that the kernels
    use.
    """
    native, threads = native_backend._C, torch.get_num_threads()
    source, target = empty_for_streaming((size,), "cpu"), empty_for_streaming((size,), "cpu")
    source.random_(0, 256), target.zero_()

    def read(ahead: bool) -> None:
        native.read_bytes(source.data_ptr(), size, threads, ahead=ahead)

    def copy() -> None:
        native.copy_bytes(source.data_ptr(), target.data_ptr(), size, threads)

    return {
        "read": (functools.partial(read, False), size),
        "prefetched read": (functools.partial(read, True), size),
        "copy": (copy, 2 * size),
    }


@functools.cache
def bandwidth() -> dict[str, float]:
    """GB/s of memory_runs(): medians."""
    runs = memory_runs()
    return {name: moved / median_seconds(run) / 1e9 for name, (run, moved) in runs.items()}


class Published:
    """The published implementation's arithmetic: one uint8 code per weight, min/max scale per row,
    broadcast multiply, sum.
    """

    def __init__(self, n: int, columns: int) -> None:
        self.codes = torch.randint(0, 16, (n, columns), dtype=torch.uint8)
        self.scale, self.zero = torch.rand(n, 1) + 0.5, torch.rand(n, 1)

    def project(self, g: Tensor) -> Tensor:
        return (((self.codes.float() - self.zero) * self.scale) * g[None, :]).sum(1)

    def reconstruct(self, x: Tensor, center: Tensor) -> Tensor:
        return center + (x * ((self.codes.float() - self.zero) * self.scale)).sum(0)


def hardware() -> dict[str, str]:
    return {
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "isa": str(native_backend._C.cpu_isa()) if native_backend._C else "native module not built",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def publish(name: str, lines: list[str], save: bool) -> None:
    """Prints a result with the hardware it comes from; with `save` also writes
    bench/results/NAME.md.
    """
    machine = ", ".join(f"{key} {value}" for key, value in hardware().items())
    text = "\n".join([*lines, "", machine, ""])
    print(text)
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text)
