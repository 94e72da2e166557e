"""Worker: how near an op comes to a device-to-device copy. `python -m gpucheck.speed`.

Bytes    What the op must move (cases.BYTES); peers: their own codes and scales, and the same
         gradient, center and weights.
Copy     copy_ of a buffer of GIGABYTES, bytes read + written: the case "copy", first and last.
Time     Device events around one call, median of 5 to 100 calls (about 0.3 s), after the call that
         compiles and 0.1 s of warm-up. Before each call a buffer of twice the last-level cache is
         written and read, so that the call finds none of its data there and no dirty lines; then
         the device sleeps for twice the time that launching the call takes the host, so that no
         gap between launches counts as work. Gradients, centers and outputs rotate among sets.
Kernels  Time of the kernels alone, by the profiler, of one more call.
Host     Clock time of the call itself, without waiting for the device: no loop of such calls is
         faster. An op that waits (pack) shows that wait, the flush included.
Check    Results of a second backend at the same size are compared with those of the first.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from . import recorded, rehearsal
from .cases import (
    BYTES,
    DEVICE,
    DTYPES,
    PACKED,
    REHEARSED,
    Operands,
    backend_of,
    call,
    make,
    wait,
    walk,
)
from .children import launched, one_line, serve
from .plan import BACKENDS

import twa_kernels as tk  # isort: skip

GIGABYTES = 1.5  # packed size of P; of pack, unpack and orthonormalize the size of the dense rows
REHEARSED_TILES = 40
#: more than twice any last-level cache that a driver does not report (AMD: 256 MB)
MIN_FLUSH = 512 << 20
ONCE = os.environ.get("GPUCHECK_ONCE") == "1"  # two calls and no timing: a profiler counts
AGREE = {"fp32": 2e-5, "bf16": 8e-3, "fp16": 1e-3}


class Timer:
    """Median of calls on the device, and what launching them costs the host."""

    def __init__(self) -> None:
        self.cache = 0 if REHEARSED else torch.cuda.get_device_properties(DEVICE).L2_cache_size
        size = 4 if REHEARSED else max(2 * self.cache, MIN_FLUSH)
        self.flush = torch.zeros(size // 4, device=DEVICE)

    def __call__(self, run: Callable, budget: float = 0.3, profile: bool = True) -> dict:
        """run(k): the k-th call. -> ms, quartiles, kernel_ms, host_us, calls, peak_mb."""
        if ONCE:
            run(0), run(1)
            wait()
            return {"ms": None}
        if REHEARSED:
            begin = time.perf_counter()
            run(0)
            ms = 1e3 * (time.perf_counter() - begin)
            return {"ms": ms, "quartiles": [ms, ms], "host_us": 1e3 * ms, "calls": 1}
        run(0)  # compiles
        launched()
        wait()
        before = torch.cuda.memory_allocated(DEVICE)
        torch.cuda.reset_peak_memory_stats(DEVICE)
        count, host_seconds = self.warm_up(run, budget / 3, budget)
        peak = torch.cuda.max_memory_allocated(DEVICE) - before
        cycles = int(1.98e9 * min(0.02, 2 * host_seconds + 50e-6))
        ms, host = [], []
        for k in range(count):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.add_(1)
            self.flush.sum()
            torch.cuda._sleep(cycles)
            begin.record()
            start = time.perf_counter()
            run(k)
            host.append(time.perf_counter() - start)
            end.record()
            wait()
            ms.append(begin.elapsed_time(end))
        ms, host = sorted(ms), sorted(host)
        at = [ms[count * q // 4] for q in (1, 2, 3)]
        found = {"ms": at[1], "quartiles": [at[0], at[2]], "host_us": 1e6 * host[count // 2]}
        found |= {"calls": count, "peak_mb": peak / 1e6}
        return found | ({"kernel_ms": self.kernels(run)} if profile else {})

    def warm_up(self, run: Callable, seconds: float, budget: float) -> tuple[int, float]:
        """Runs until clocks are up: how many calls to time, and the host's time of one."""
        times, host = [], []
        while len(times) < 2 or sum(times) < seconds:
            start = time.perf_counter()
            run(len(times))
            host.append(time.perf_counter() - start)
            wait()
            times.append(time.perf_counter() - start)
        return min(100, max(5, int(budget / min(times)))), sorted(host)[len(host) // 2]

    def kernels(self, run: Callable) -> float | None:
        """Milliseconds of the kernels of one call; None where the profiler does not work."""
        try:
            from torch.profiler import ProfilerActivity, profile

            self.flush.add_(1)
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                run(0)
                wait()
            mine = [
                e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA
            ]
            return sum(e.self_device_time_total for e in mine) / 1e3 or None
        except Exception as error:
            print(f"profiler: {type(error).__name__}: {error}", flush=True)
            return None


@functools.cache
def timer() -> Timer:
    return Timer()


def free() -> float:
    """Bytes that tensors may take."""
    if REHEARSED:
        return 64e6
    torch.cuda.empty_cache()
    return 0.8 * torch.cuda.mem_get_info(DEVICE)[0]


def copy(case: dict) -> dict:
    size = int(min(1e9 * GIGABYTES, free() / 3)) if not REHEARSED else 1 << 20
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE).random_(0, 256)
    target = torch.empty_like(source)
    return {"bytes": 2 * size} | timer()(lambda k: target.copy_(source))


def tiles_of(op: str, n: int, bits: int, element: int) -> tuple[int, int]:
    """Tiles for GIGABYTES, or what fits; and sets of vectors to rotate among."""
    if REHEARSED:
        return REHEARSED_TILES, 2
    if op not in PACKED:
        most = free() / (n * (256 * element + 16 * bits + 4))
        return int(min(1e9 * GIGABYTES / (128 * element * n), most)), 0
    row, vectors = n * (16 * bits + 1), 3 * 128 * element
    tiles = int(1e9 * GIGABYTES / row)
    sets = min(8, max(2, math.ceil(2 * timer().cache / (128 * element * tiles))))
    sets = sets if tiles * (row + sets * vectors) < free() else 1
    return min(tiles, int(free() / (row + sets * vectors))), sets


class Held:
    """Operands of the latest cases, and the first backend's result for a second one."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.key: tuple = ()
        self.operands: Operands | None = None
        self.first: dict[str, list[Tensor]] = {}

    def get(self, op: str, n: int, bits: int, dtype: str) -> Operands:
        group = "packed" if op in PACKED else op
        if self.key != (group, n, bits, dtype):
            self.clear()
            tiles, sets = tiles_of(op, n, bits, DTYPES[dtype].itemsize)
            torch.manual_seed(n + bits)
            self.operands = make(n, tiles, bits, DEVICE, sets, op == "pack", DTYPES[dtype])
            self.key = (group, n, bits, dtype)
        return self.operands

    def differs(self, op: str, result: list[Tensor], dtype: str) -> str:
        """What is wrong with a second result, "" if nothing; the first is kept."""
        if op not in self.first:
            self.first[op] = [t.clone() for t in result]
            return ""
        error = max(
            float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
            for a, b in zip(result, self.first[op], strict=True)
        )
        limit = 0.0 if op == "pack" else AGREE[dtype]
        return "" if error <= limit else f"differs from the other backend by {error:.1e}"


held = Held()


def ours(case: dict) -> dict:
    op, n, bits, dtype = case["op"], case["n"], case["bits"], case["dtype"]
    of, backend = held.get(op, n, bits, dtype), backend_of(case)
    wrong = ""
    if op in ("project", "reconstruct", "pack"):  # step changes x, unpack and gram are large
        result = call(op, of, backend)
        wrong = held.differs(op, result[:2] if op == "pack" else result, dtype)
        del result
    found = {"D": of.basis.num_columns, "bytes": of.bytes_of(op)} | timer()(
        lambda k: call(op, of, backend, k)
    )
    return found | ({"result": "wrong", "note": wrong} if wrong else {"result": "measured"})


def orthonormalize(case: dict) -> dict:
    n, backend = case["n"], backend_of(case)
    columns = 5000 if REHEARSED else int(min(1e9 * GIGABYTES, free() / 6) / (4 * n)) // 128 * 128
    W = walk(n, columns, DEVICE)
    Q = torch.empty_like(W)
    held.clear()

    def run(k: int) -> None:
        tk.orthonormalize(W, out=Q, accuracy=case["accuracy"], backend=backend)

    found = {"D": columns, "bytes": eval(BYTES["orthonormalize"], {"n": n, "D": columns})}
    return found | timer()(run)


def trajectory(case: dict) -> dict:
    """record and replay; peers of record."""
    held.clear()
    return recorded.speed(case, timer(), 0.0 if REHEARSED else min(1e9 * GIGABYTES, free() / 2))


def peer(case: dict) -> dict:
    from gpu_peers import PEERS

    chosen = next(p for p in PEERS if (p.name, p.bits) == (case["backend"], case["bits"]))
    op, n = case["op"], case["n"]
    held.clear()
    tiles = tiles_of(op, n, chosen.bits if chosen.bits < 16 else 4, 4)[0]
    vectors = 32  # bytes a column, in two sets
    most = min(chosen.largest // n, int(free() / (chosen.memory * n + vectors)))
    columns = max(1024, min(128 * tiles, most) // 1024 * 1024)
    try:
        run, stored = chosen.make(op, n, columns, DEVICE)
    except (ValueError, ImportError) as error:  # a size or a package that it needs
        return {"result": "skipped", "note": one_line(error)}
    x = torch.randn(n, 1, device=DEVICE)
    sets = [[torch.randn(columns, device=DEVICE) for _ in range(2)] for _ in range(2)]
    timed = timer()(
        (lambda k: run(sets[k % 2][0])) if op == "project" else (lambda k: run(x, *sets[k % 2]))
    )
    torch._dynamo.reset()  # what it compiled holds tensors
    note = "smaller D: 32-bit indices or memory" if most < 128 * tiles else ""
    return {
        "D": columns,
        "bytes": stored + (4 if op == "project" else 8) * columns,
        "note": note,
    } | timed


def run(case: dict) -> dict:
    rehearsal.plant("speed", case)
    alone = {"copy": copy, "orthonormalize": orthonormalize}
    alone |= dict.fromkeys(recorded.OPS, trajectory)
    run = alone.get(case["op"], ours if case["backend"] in BACKENDS else peer)
    return {"result": "measured"} | run(case)


if __name__ == "__main__":
    serve(run, wait)
