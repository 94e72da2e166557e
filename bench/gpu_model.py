"""What the CUDA kernels should reach on GPUs that are not at hand: a model that a measurement can
refute, line by line.

From the machine code of one tile (static_cost_cuda.py) and the shape of the launch, per op, bits, n
and dtype; times are seconds of one multiprocessor, for one tile:

    memory    the bytes that must move, at the rate of a copy
    issue     instructions, four a cycle
    alu, fma, xu, uniform   those of each pipe, at its rate; the fullest of these five counts
    matrix    products of the matrix units
    shared    wavefronts of shared memory: 128 bytes a cycle, what copies write included
    latency   bytes that must be on their way (rate times latency) over those that are

They overlap: t = (sum of the fourth powers)^(1/4), which is what is assumed, not known. A block
does an item's tiles, then the next block starts anew. That takes START without a use of memory, and
other blocks of the multiprocessor use it: mean value analysis of a closed queue with the blocks as
its customers. The last blocks leave half a block's time unused.

    python bench/gpu_model.py                  tables to bench/results/gpu_model.{md,json}
    python bench/gpu_model.py --library FILE   of the kernels in an object or library instead
    python bench/gpu_model.py --architectures 100,120    of others, too, which nvcc compiles first
    python bench/gpu_model.py --terms project 4 72 fp32 H200     the terms of one line
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import static_cost_cuda

RESULTS = Path(__file__).parent / "results"
BITS, ROWS, DTYPES = (8, 4, 3, 2, 1), (16, 64, 72, 128, 256), {"fp32": 4, "bf16": 2}
COLUMNS = 1.13e8
WARPS, STAGES, RING, STEP_BLOCKS = 4, 8, 10 << 10, 3  # csrc/cuda/common.h, csrc/twa.h
POWER = 4
INSTRUCTIONS = {"issue": 4, "alu": 2, "fma": 2, "xu": 0.5, "uniform": 2}  # a cycle
#: seconds of a block without a use of memory: three loads that wait for each other (an item's
#: numbers, its tensor's, their addresses), the first copy, its begin and end
BEGIN, WAIT, FIRST = 0.25e-6, 0.3e-6, 0.6e-6
START = {"project": BEGIN + 3 * WAIT + FIRST, "reconstruct": BEGIN + 3 * WAIT + FIRST}
#: in a fused step a task's begin and the end of the one before overlap; one is taken and counted
START["step"] = 2 * WAIT + FIRST + 0.25e-6


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU.

    Args:
        arch: whose machine code it runs
        clock: Hz, while memory is the limit
        copy: bytes a second, read + written, of a large copy
        latency: seconds until loads come, with memory busy
        products: of 8-bit integers, a cycle and multiprocessor, by mma.sync
        shared: bytes of shared memory of a multiprocessor
    """

    name: str
    arch: str
    multiprocessors: int
    clock: float
    copy: float
    latency: float
    products: int
    shared: int


# Copies and latency: of figures that others measured (gpu_model_published.py), asynchronous copies'
# 0.15 us above those of plain loads; B200 and RTX 5090: 0.9 of the data sheet, latency assumed.
# Products: data sheets; from Hopper on mma.sync reaches about 0.6 of what wgmma does; of Blackwell
# assumed.
GPUS = {
    g.name: g
    for g in (
        Gpu("H100", "sm_90", 132, 1.755e9, 3.1e12, 0.6e-6, 2560, 228 << 10),
        Gpu("H200", "sm_90", 132, 1.755e9, 4.15e12, 0.6e-6, 2560, 228 << 10),
        Gpu("A100", "sm_80", 108, 1.41e9, 1.75e12, 0.6e-6, 2048, 164 << 10),
        Gpu("B200", "sm_100", 148, 1.85e9, 7.2e12, 0.7e-6, 2048, 228 << 10),
        Gpu("RTX 5090", "sm_120", 170, 2.4e9, 1.6e12, 0.6e-6, 1024, 100 << 10),
    )
}

# The shape of a launch, as csrc/cuda has it ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
    """A launch.

    Args:
        rows: that a kernel is built for, and a block takes
        row_blocks: blocks of rows
        slots, slot_bytes: of a warp's ring
        shared_bytes: of a block
        item: tiles of a block
    """

    rows: int
    row_blocks: int
    slots: int
    slot_bytes: int
    shared_bytes: int
    item: int


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _built(units: int) -> int:
    return units if units <= 6 else 8 if units <= 8 else 16


def _slots(slot_bytes: int) -> int:
    return min(max(RING // slot_bytes, 2), STAGES)


def project_units(bits: int, units: int) -> int:
    most = {8: 3, 1: 16}.get(bits, 8)
    return _built(-(-units // -(-units // most)))


def _project_slot(bits: int, rows: int) -> int:
    return rows * 16 * bits + (rows // 8 * 64 if bits == 8 else 0)


def _reconstruct_slot(bits: int, rows: int) -> int:
    return rows * 16 * bits + (rows // 8 * 32 if bits == 8 else 0)


def _reconstruct_parts(bits: int, n: int) -> tuple[int, int, int]:
    """Rows that a kernel is built for, groups of 32 in them, rows of a slot."""
    units = min(_built(-(-n // 16)), 16 if bits == 1 else 8)
    groups = -(-units // 2)
    parts = -(-groups // {8: 1, 4: 3, 3: 3, 2: 4, 1: 8}[bits])
    return 16 * units, groups, 32 * -(-groups // parts)


def project_shape(bits: int, n: int) -> Shape:
    rows = 16 * project_units(bits, -(-n // 16))
    slot_bytes = _project_slot(bits, min(n, rows)) + 512
    slots, most = _slots(slot_bytes), _project_slot(bits, rows)
    warp = _up(64 + 624 + _up(rows, 32) * 4 + slots * slot_bytes, 128)
    shared = WARPS * warp + max(0, most - slot_bytes)
    return Shape(rows, -(-n // rows), slots, slot_bytes, shared, item_tiles(bits))


def reconstruct_shape(bits: int, n: int) -> Shape:
    rows, groups, slot_rows = _reconstruct_parts(bits, n)
    slot_bytes = _reconstruct_slot(bits, min(n, slot_rows))
    slots, most = _slots(slot_bytes), _reconstruct_slot(bits, slot_rows)
    warp = _up(_up(64 + 96 * groups + 32, 16) + 2560 + slots * slot_bytes, 128)
    shared = _up(n, 32 * groups) * 4 + WARPS * warp + max(0, most - slot_bytes)
    return Shape(rows, 1, slots, slot_bytes, shared, item_tiles(bits))


def step_shape(bits: int, n: int) -> Shape:
    rows, groups, slot_rows = _reconstruct_parts(bits, n)
    units = rows // 16 if n <= rows else 16 * 256  # many rows: as many as there can be
    of_project = 16 * project_units(bits, units)
    slot_bytes = max(
        _project_slot(bits, min(n, of_project)) + 512, _reconstruct_slot(bits, min(n, slot_rows))
    )
    most = max(_project_slot(bits, of_project), _reconstruct_slot(bits, slot_rows))
    slots = _slots(slot_bytes)
    header = max(
        64 + 624 + _up(of_project, 32) * 4, _up(64 + 96 * groups + 32, 16) + 2560
    )  # of project, and of reconstruct
    shared = 128 + 1024 + _up(n, 32 * groups) * 4 + max(0, most - slot_bytes)
    shared += WARPS * _up(header + slots * slot_bytes, 128)
    return Shape(rows, -(-n // of_project), slots, slot_bytes, shared, item_tiles(bits))


def item_tiles(bits: int) -> int:
    return 16 if bits >= 4 else 32 if bits >= 2 else 64


SHAPES: dict[str, Callable[[int, int], Shape]] = {
    "project": project_shape,
    "reconstruct": reconstruct_shape,
}

# Time --------------------------------------------------------------------------------------------


def moved(op: str, bits: int, n: int, size: int) -> int:
    """Bytes of one tile: packed rows and scales, and a gradient, or center and weights."""
    return n * (16 * bits + 1) + 128 * size * (1 if op == "project" else 2)


@dataclasses.dataclass(frozen=True)
class Line:
    """What one launch should take.

    Args:
        terms: seconds a tile of a multiprocessor, each alone
        tile: seconds, together
        blocks: on a multiprocessor at once
        busy: share of the time in which blocks that start leave memory something to do
        share: of a copy's speed, for COLUMNS columns
    """

    terms: dict[str, float]
    tile: float
    blocks: int
    busy: float
    share: float


def terms(row: dict, op: str, n: int, size: int, shape: Shape, blocks: int, gpu: Gpu) -> dict:
    """Seconds of a multiprocessor for one tile, by each bound."""
    cycle, mix = 1 / gpu.clock, row["mix"]["bf16" if size == 2 else "fp32"]
    nbytes = moved(op, row["bits"], n, size) + (shape.row_blocks - 1) * 128 * size
    times = shape.row_blocks if op == "project" else 1
    per = gpu.copy / gpu.multiprocessors
    unused = 128 * (4 - size) if op == "project" else 0  # of a slot: there is room for float32
    on_their_way = blocks * WARPS * (shape.slots - 0.5) * (shape.slot_bytes - unused)
    if op == "reconstruct":  # and the center of the next tile
        on_their_way += blocks * WARPS * 128 * size
    found = {name: times * mix[name] / rate * cycle for name, rate in INSTRUCTIONS.items()}
    return {
        "memory": moved(op, row["bits"], n, size) / per,
        **found,
        "matrix": times * row["products"] * 8 / gpu.products * cycle,
        "shared": (times * mix["shared"] + nbytes / 128) * cycle,
        "latency": nbytes * gpu.latency / on_their_way,
    }


def together(each: dict[str, float]) -> float:
    """Seconds of a tile, from its terms."""
    instructions = max(each[name] for name in INSTRUCTIONS)
    others = [each[name] for name in ("memory", "matrix", "shared", "latency")]
    return sum(t**POWER for t in [instructions, *others]) ** (1 / POWER)


def busy(service: float, start: float, customers: int) -> float:
    """Share of the time in which the server of a closed queue works (mean value analysis).

    Args:
        service: seconds that a customer needs the server for
        start: seconds that it spends elsewhere in between
    """
    waiting = rate = 0.0
    for k in range(1, customers + 1):
        response = service * (1 + waiting)
        rate = k / (response + start)
        waiting = rate * response
    return rate * service


def line(rows: list[dict], op: str, bits: int, n: int, size: int, gpu: Gpu) -> Line | None:
    """The model of one launch; None where no whole tile was counted.

    Args:
        rows: of static_cost_cuda.measure_all()
        size: bytes of a gradient, or of center and weight
    """
    shape = SHAPES[op](bits, n)
    found = _counted(rows, op, bits, shape.rows, gpu.arch)
    if found is None or (op == "reconstruct" and n > shape.rows):
        return None
    registers = 65536 // (_up(found["registers"], 8) * 128)
    blocks = min(gpu.shared // (shape.shared_bytes + 1024), registers, 16)
    each = terms(found, op, n, size, shape, blocks, gpu)
    tile = together(each)
    service = tile * shape.item / shape.row_blocks
    share_busy = busy(service, START[op], blocks)
    total = COLUMNS / 128 * tile / gpu.multiprocessors / share_busy
    total += 0.5 * (service * blocks + START[op])
    ideal = COLUMNS / 128 * moved(op, bits, n, size) / gpu.copy
    return Line(each, tile, blocks, share_busy, ideal / total)


def step(rows: list[dict], bits: int, n: int, size: int, gpu: Gpu) -> float | None:
    """Speed of a fused step over that of project and then reconstruct, nothing found in a cache."""
    both = [line(rows, op, bits, n, size, gpu) for op in SHAPES]
    if None in both:
        return None
    shape = step_shape(bits, n)
    found = next((r for r in rows if _is(r, "step", bits, shape.rows, gpu.arch)), None)
    registers = 65536 // (_up(found["registers"], 8) * 128) if found else STEP_BLOCKS
    blocks = min(gpu.shared // (shape.shared_bytes + 1024), registers, STEP_BLOCKS)
    apart = fused = 0.0
    for of in both:
        service = of.tile * shape.item
        apart += of.tile / of.busy
        fused += of.tile / busy(service, START["step"], blocks)
    return apart / fused


def _is(r: dict, op: str, bits: int, rows: int, arch: str) -> bool:
    return (r["op"], r["bits"], r["rows"], r["many"], r["arch"]) == (op, bits, rows, False, arch)


def _counted(rows: list[dict], op: str, bits: int, built: int, arch: str) -> dict | None:
    return next((r for r in rows if _is(r, op, bits, built, arch) and "mix" in r), None)


def predicted(rows: list[dict], case: dict, multiprocessors: int, copy: float) -> float | None:
    """Percent of a copy that a case of gpu_check should reach on an NVIDIA GPU of Hopper's kind.

    Args:
        case: with op, bits, n and dtype
        copy: bytes a second, measured there
    """
    if case["op"] not in SHAPES or case["dtype"] not in DTYPES or not (multiprocessors and copy):
        return None
    gpu = dataclasses.replace(GPUS["H200"], multiprocessors=multiprocessors, copy=copy)
    found = line(rows, case["op"], case["bits"], case["n"], DTYPES[case["dtype"]], gpu)
    return 100 * found.share if found else None


# Tables ------------------------------------------------------------------------------------------


def tables(rows: list[dict]) -> dict[str, dict]:
    """{"GPU, op, dtype, n": {bits: percent}} of everything that was compiled."""
    found: dict[str, dict] = {}
    for gpu in GPUS.values():
        for op in (*SHAPES, "step"):
            for dtype, size in DTYPES.items():
                for n in ROWS:
                    shares = {}
                    for bits in BITS:
                        if op == "step":
                            share = step(rows, bits, n, size, gpu)
                        else:
                            of = line(rows, op, bits, n, size, gpu)
                            share = of.share if of else None
                        if share is not None:
                            shares[bits] = round(100 * share)
                    if shares:
                        found[f"{gpu.name}, {op}, {dtype}, {n}"] = shares
    return found


def limits(rows: list[dict], gpu: Gpu, n: int) -> list[str]:
    """What takes how much of the time at n rows, float32."""
    names = [*INSTRUCTIONS, "matrix", "shared", "latency"]
    lines = [f"| op | bits | {' | '.join(names)} | blocks | busy | percent |"]
    lines.append("|---" * 2 + "|--:" * (len(names) + 3) + "|")
    for op in SHAPES:
        for bits in BITS:
            if (of := line(rows, op, bits, n, 4, gpu)) is None:
                continue
            cells = [f"{of.terms[name] / of.terms['memory']:.2f}" for name in names]
            cells += [str(of.blocks), f"{of.busy:.2f}", f"{100 * of.share:.0f}"]
            lines.append(f"| {op} | {bits} | {' | '.join(cells)} |")
    return lines


def markdown(rows: list[dict], found: dict[str, dict]) -> str:
    import gpu_model_gram  # which takes its numbers from here

    lines = [
        "# Predictions for GPUs that were not at hand",
        "",
        "Percent of the speed of a copy, from the machine code and the shape of the launch"
        " (`python bench/gpu_model.py`; its docstring has the model). `step`: percent of the speed"
        " of its two passes, with nothing found in a cache. 1.13e8 weights.",
        "",
        "**No GPU has confirmed a line of this.** `bench/gpu_check.py` prints each beside its"
        " measurement.",
        "",
    ]
    for gpu in GPUS.values():
        of = {key: shares for key, shares in found.items() if key.startswith(f"{gpu.name}, ")}
        if not of:
            continue
        lines += [f"## {gpu.name}", "", f"Copy {gpu.copy / 1e12:g} TB/s, {gpu.arch}.", ""]
        lines += ["| op | dtype | n | " + " | ".join(f"{b} bits" for b in BITS) + " |"]
        lines += ["|---|---|--:" + "|--:" * len(BITS) + "|"]
        for key, shares in of.items():
            _, op, dtype, n = key.split(", ")
            cells = " | ".join(str(shares.get(bits, "")) for bits in BITS)
            lines.append(f"| {op} | {dtype} | {n} | {cells} |")
        lines.append("")
    lines += ["## What takes the time", "", "H200, n = 72, float32; memory is 1.", ""]
    lines += limits(rows, GPUS["H200"], 72)
    lines += ["", "## Passes of Gram-Schmidt", "", "H200, float32; `gpu_model_gram.py`.", ""]
    gpu_model_gram.table(GPUS["H200"], lines.append)
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", type=Path, nargs="+", help="objects, archives or libraries")
    parser.add_argument("--architectures", default="", help="to compile for, such as 100,120")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--terms", nargs=5, metavar=("OP", "BITS", "N", "DTYPE", "GPU"))
    args = parser.parse_args()
    if args.library is None:
        from twa_kernels import native

        if native._C is None or not native._C.with_cuda:
            sys.exit("the native module was built without CUDA: nothing to count")
        args.library = [Path(native._C.__file__)]
    for architecture in filter(None, args.architectures.split(",")):
        args.library += static_cost_cuda.compiled(architecture)
    rows = [row for path in args.library for row in static_cost_cuda.measure_all(path)]
    if args.terms:
        op, bits, n, dtype, name = args.terms
        of = line(rows, op, int(bits), int(n), DTYPES[dtype], GPUS[name])
        if of is None:
            sys.exit("no whole tile of this was counted")
        for term, seconds in of.terms.items():
            print(f"{term:8} {1e9 * seconds:7.1f} ns a tile")
        print(f"together {1e9 * of.tile:7.1f}; {of.blocks} blocks, busy {of.busy:.3f}")
        print(f"{100 * of.share:.1f} % of a copy")
        return
    found = tables(rows)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "gpu_model.md").write_text(markdown(rows, found))
    (args.output / "gpu_model.json").write_text(json.dumps(found, indent=0) + "\n")
    print(markdown(rows, found))


if __name__ == "__main__":
    main()
