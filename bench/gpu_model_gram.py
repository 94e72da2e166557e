"""What a pass of Gram-Schmidt (csrc/cuda/orthonormalize.cu) should take on a GPU that is not at
hand: a model that a measurement can refute, like gpu_model.py, whose `Gpu` it takes.

Seconds of a multiprocessor for a chunk of 32 columns, each resource alone:

    memory   bytes that must move, at the rate of a copy
    cache    bytes that blocks read from the second-level cache, at CACHE times that rate (assumed)
    matrix   float64 products of the busiest warp, by whose tiles the others wait
    convert  float32 to float64 and back, on a pipe of its own
    shared   wavefronts of 128 bytes

They overlap, t = (sum of the fourth powers)^(1/4), which is what is assumed, not known. Kernels of
several launches add up; a launch costs LAUNCH.

Its table is in that of gpu_model.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from gpu_model import Gpu

CHUNK, COLUMNS, POWER = 32, 1.13e8, 4
#: products of float64 by the matrix units, and conversions, a cycle and multiprocessor
MATRIX = {"sm_80": 64, "sm_90": 128, "sm_100": 64, "sm_120": 2}
CONVERT = {"sm_80": 16, "sm_90": 16, "sm_100": 16, "sm_120": 2}
CACHE = 1.4
#: seconds between the work of one launch and the next one's
LAUNCH = 4e-6
HELD, WRITTEN, PANEL_BYTES = 128, 256, 64 << 20  # csrc/cuda/orthonormalize.cuh
#: how often four warps read a tile of V, by their units: of a triangle of 8 blocks of 16 rows 50 of
#: 16 tiles, of a square of 64 rows 32 of 16
TILES_READ = 2.5
TRIANGLE = {1: 4, 2: 8, 3: 14, 4: 20}  # instructions for 8 columns, n <= 64, one warp


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass over all columns.

    Args:
        seconds: of all launches
        limit: the largest term of the longest launch
        moved: bytes that must move, of n and r rows of float32
        products: float64 multiply-adds that the result asks for
        multiprocessors: busy in the longest launch
    """

    seconds: float
    limit: str
    moved: float
    products: float
    multiprocessors: int


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What a multiprocessor does for a chunk in one kernel.

    Args:
        memory, cache, shared: bytes
        warp: products of 16 x 8 rows and 8 columns (one instruction from sm_90 on) of the busiest
            of four warps, one on each quarter of the multiprocessor
        conversions: numbers
        blocks: of the launch
    """

    memory: float
    warp: float
    conversions: float = 0.0
    shared: float = 0.0
    cache: float = 0.0
    blocks: int = 1 << 20

    def terms(self, gpu: Gpu) -> dict[str, float]:
        rate = gpu.copy / gpu.multiprocessors
        return {
            "memory": self.memory / rate,
            "cache": self.cache / (CACHE * rate),
            "matrix": self.warp * 4 * 1024 / MATRIX[gpu.arch] / gpu.clock,
            "convert": self.conversions / CONVERT[gpu.arch] / gpu.clock,
            "shared": self.shared / 128 / gpu.clock,
        }

    def busy(self, gpu: Gpu) -> int:
        return min(gpu.multiprocessors, self.blocks)

    def seconds(self, gpu: Gpu, chunks: float) -> float:
        t = sum(v**POWER for v in self.terms(gpu).values()) ** (1 / POWER)
        return t * chunks / self.busy(gpu)


def _up(value: float, unit: int) -> int:
    return int(-(-value // unit))


def _small(n: int, form: str) -> list[Chunk]:
    """Up to 64 rows; a warp does all of a chunk, four quarters four chunks."""
    pairs = _up(n, 16)
    triangle = 4 * TRIANGLE[pairs]
    warp = triangle * {"gram": 1, "again": 2, "write": 1}[form] / 4
    rows = n + 1
    memory = 4 * CHUNK * (rows + (n if form == "write" else 0))
    conversions = 16 * pairs * CHUNK * (3 if form == "write" else 2)
    return [Chunk(memory, warp, conversions, 4 * memory, blocks=1056)]


def _strips(blocks: int, team: int) -> float:
    """Instructions of the busiest quarter for 8 columns: strips i and j of 2 i + 2 tiles."""
    quarter = [0] * 4
    for warp in range(team):
        for strip in (blocks - 1 - warp, warp + blocks - 2 * team):
            quarter[warp % 4] += 2 * strip + 2 if strip >= 0 else 0
    return max(quarter)


def _held(n: int, form: str) -> list[Chunk]:
    """A block holds V: all rows."""
    blocks = _up(n, 16)
    rows, team = 16 * blocks, 8 if blocks > 8 else 4
    triangle, transform = 4 * _up(blocks * (blocks + 1), 4), 4 * _strips(blocks, team)
    warp = {"gram": triangle, "again": triangle + transform, "write": transform}[form]
    conversions = rows * CHUNK * (3 if form == "write" else 2)
    memory = 4 * CHUNK * (n + 1 + (n if form == "write" else 0))
    of_v = 8 * CHUNK * rows
    # Rows written, read twice, V written; tiles of V read by four warps.
    shared = 20 * CHUNK * rows + TILES_READ * of_v * (2 if form == "again" else 1)
    fragments = 0.0
    if form != "gram":  # the transform, which fits in the first-level cache up to 128 rows
        size = blocks * (2 * blocks + 2) / 2 * 2 * 512
        times = 2 if form == "again" else 1
        shared += times * size
        fragments = times * size if team == 8 else 0.0
    return [Chunk(memory, warp, conversions, shared, fragments, 792)]


def _groups(m: int) -> tuple[int, int]:
    count = _up(m, 64)
    return count, 3 if m <= 48 * count else 4


def _pairs(m: int, parts: int, row: int, conversions: int) -> list[Chunk]:
    """The triangle of m rows, group by group; `row` bytes of a chunk's row."""
    count, blocks = _groups(m)
    rows, pairs = 16 * blocks, count * (count - 1) // 2
    out = []
    for tasks, held, units in (
        (count, rows, blocks * (blocks + 1)),
        (pairs, 2 * rows, 2 * blocks * blocks),
    ):
        if tasks:
            read = tasks * (held + 1) * row
            # As in _held, but that a panel's V is there.
            staged = 20 if conversions else 8
            shared = tasks * held * CHUNK * (staged + 8 * TILES_READ)
            out.append(
                Chunk(
                    m * row,
                    tasks * 4 * _up(units, 4),
                    tasks * held * CHUNK * conversions,
                    shared,
                    read,
                    tasks * parts,
                )
            )
    return out


def _parts(n: int, m: int) -> int:
    tiles = _up(m, 8)
    stride = tiles * (tiles + 1) / 2 * 64 + n
    return max(1, min(264, int((64 << 20) / 8 / stride)))


def _panels(n: int, form: str) -> tuple[list[Chunk], int]:
    """A launch for each step; and chunks of a panel."""
    rows = 32 * _up(n, 32)
    per_chunk = 8 * CHUNK * (2 * rows + (8 if form == "write" else 0))
    panel = max(1, PANEL_BYTES // per_chunk)
    strips = _up(n, 32)
    tiles = sum(16 * (4 * s + 4) / 2 for s in range(strips))  # of 16 x 8 rows, all 32 columns
    v = 8 * CHUNK * n
    steps = [
        Chunk(4 * CHUNK * n + v, 0.0, 2 * n * CHUNK),
        # Each warp reads 4 KiB for 8 products, a quarter of it past the first-level cache.
        Chunk(2 * v, tiles / 4, 0.0, 512 * tiles, 128 * tiles, _up(panel, 4) * _up(strips, 4)),
    ]
    if form == "write":
        return [*steps, Chunk(v + 4 * CHUNK * n, 0.0), Chunk(v, 0.0)], panel
    tiles_of_triangle = _up(n, 8) * (_up(n, 8) + 1) / 2
    slices = max(1, min(128, _up(32 << 10, n), int((16 << 20) / 8 / (tiles_of_triangle * 64))))
    added = 2 * 8 * 64 * tiles_of_triangle * slices / panel
    pairs = [
        dataclasses.replace(c, memory=c.memory + added / 2) for c in _pairs(n, slices, 8 * CHUNK, 0)
    ]
    return [*steps, *pairs], panel


def orthonormalize_model(n: int, d: float, form: str, gpu: Gpu) -> Pass:
    """A pass over n rows of d float32 columns with as many rows of results.

    Args:
        n: rows
        d: columns
        form: gram, again or write
        gpu: gpu_model.Gpu, or the like
    """
    chunks, launches = d / CHUNK, 1.0
    if n <= 64:
        steps = _small(n, form)
    elif n <= (WRITTEN if form == "write" else HELD):
        steps = _held(n, form)
    elif form == "gram":
        steps = _pairs(n, _parts(n, n), 4 * CHUNK, 2)
        launches = 2
    else:
        steps, panel = _panels(n, form)
        launches = chunks / panel * len(steps)
    times = [step.seconds(gpu, chunks) for step in steps]
    longest = max(range(len(steps)), key=times.__getitem__)
    terms = steps[longest].terms(gpu)
    triangle = n * (n + 1) / 2 * d
    return Pass(
        seconds=sum(times) + launches * LAUNCH,
        limit=max(terms, key=terms.__getitem__),
        moved=4 * n * d * (2 if form == "write" else 1),
        products=triangle * (2 if form == "again" else 1),
        multiprocessors=steps[longest].busy(gpu),
    )


def floor(p: Pass, gpu: Gpu) -> float:
    """Seconds that bytes alone, or products alone, would take."""
    rate = MATRIX[gpu.arch] * gpu.clock * gpu.multiprocessors
    return max(p.moved / gpu.copy, p.products / rate)


def table(gpu: Gpu, show: Callable[[str], None]) -> None:
    """The lines of a table of passes, to `show`."""
    head = ("rows", "form", "GB moved", "1e12 products", "busy", "ms", "ms at least", "limit")
    show(f"| {' | '.join(head)} |")
    show("|--:|---|--:|--:|--:|--:|--:|---|")
    for n in (64, 65, 72, 96, 128, 129, 256, 257, 512):
        for form in ("gram", "again", "write"):
            p = orthonormalize_model(n, COLUMNS, form, gpu)
            show(
                f"| {n} | {form} | {p.moved / 1e9:.0f} | {p.products / 1e12:.2f} | "
                f"{p.multiprocessors} | {p.seconds * 1e3:.1f} | {floor(p, gpu) * 1e3:.1f} | "
                f"{p.limit} |"
            )
