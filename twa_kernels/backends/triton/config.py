"""Launch configurations that ship: (op, bits, architecture) -> numbers.

Nothing is tuned at import; `python -m twa_kernels.tune` measures others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ...layout import BITS

#: op -> bits -> configuration, for every architecture that has no row of its own in OVERRIDES.
#: rows: rows of P a program takes at most; tiles: tiles it takes at a time; item: tiles of a work
#: item; warps; stages of the copy pipeline.
DEFAULTS: dict[str, dict[int, dict[str, int]]] = {
    "project": {
        8: {"rows": 80, "tiles": 4, "item": 64, "warps": 4, "stages": 3},
        4: {"rows": 128, "tiles": 4, "item": 64, "warps": 4, "stages": 3},
        3: {"rows": 128, "tiles": 4, "item": 64, "warps": 4, "stages": 3},
        2: {"rows": 160, "tiles": 4, "item": 64, "warps": 4, "stages": 3},
        1: {"rows": 192, "tiles": 4, "item": 64, "warps": 4, "stages": 4},
    },
    # 16 bytes a thread and row: `tiles` is what the threads of a program cover. rows: in flight.
    "reconstruct": {
        8: {"tiles": 16, "rows": 8, "warps": 4},
        4: {"tiles": 32, "rows": 8, "warps": 4},
        3: {"tiles": 128, "rows": 4, "warps": 4},
        2: {"tiles": 64, "rows": 8, "warps": 4},
        1: {"tiles": 128, "rows": 4, "warps": 4},
    },
    "pack": {bits: {"tiles": 4, "warps": 1} for bits in BITS},
    "unpack": {bits: {"tiles": 16, "warps": 4} for bits in BITS},
    "record": {bits: {"tiles": 4, "warps": 1} for bits in BITS},
    "look": {bits: {"tiles": 16, "warps": 4} for bits in BITS},  # for weights that are not finite
    # 32 sums a thread (8 bits: 16), for each 4 to 16 bytes of a row. rows: in flight.
    "replay": {
        8: {"tiles": 16, "rows": 4, "warps": 4},
        4: {"tiles": 32, "rows": 4, "warps": 4},
        3: {"tiles": 32, "rows": 4, "warps": 4},
        2: {"tiles": 32, "rows": 4, "warps": 4},
        1: {"tiles": 32, "rows": 4, "warps": 4},
    },
    "gram": {bits: {"rows": 64, "item": 1024, "warps": 4} for bits in BITS},
    # second stage of project and the update of a step: items and rows that a program adds at a time
    "sum": {bits: {"items": 128, "rows": 16, "warps": 4} for bits in BITS},
    # rows of W that a program holds at most, columns of a block, work items at most, probes with
    # padding; many: rows of a block where W has more; made, of: transform_kernel makes so many rows
    # at a time, of so many, in blocks of `wide` columns
    "orthonormalize": {
        bits: {
            "rows": 64,
            "columns": 16,
            "warps": 8,
            "stages": 3,
            "items": 1024,
            "probes": 8,
            "many": 32,
            "made": 64,
            "of": 16,
            "wide": 64,
        }
        for bits in BITS
    },
}

BLACKWELL = ("sm_100", "sm_120")
#: (op, bits, architecture) -> what differs from DEFAULTS there
OVERRIDES: dict[tuple[str, int, str], dict[str, int]] = {
    # two programs in the shared memory of a multiprocessor
    **{("project", 8, arch): {"rows": 64} for arch in ("sm_80", "sm_86", "sm_89", "sm_120")},
    ("project", 1, "sm_100"): {"rows": 128},  # spills
    ("project", 8, "gfx942"): {"rows": 32},
    **{("project", bits, "gfx942"): {"rows": 64} for bits in (4, 3, 2, 1)},
    **{("gram", bits, arch): {"rows": 32} for bits in BITS for arch in (*BLACKWELL, "gfx942")},
    # float64 products are multiply-adds there, which need more registers: 64 rows would spill
    **{
        ("orthonormalize", bits, arch): {"rows": 32, "made": 32}
        for bits in BITS
        for arch in BLACKWELL
    },
    **{
        ("orthonormalize", bits, "gfx942"): {"probes": 16} for bits in BITS
    },  # its matrix units have no narrower tiles
}

ARCHITECTURES = ("sm_80", "sm_90", "gfx942")


def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...; "interpreter" for CPU tensors."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def isa(arch: str) -> str:
    """How words.py expresses its pieces on an architecture."""
    return "ptx" if arch.startswith("sm_") else "gcn" if arch.startswith("gfx") else "generic"


def configuration(op: str, bits: int, arch: str) -> dict[str, int]:
    """Numbers of the op's launch on an architecture."""
    config = DEFAULTS[op][bits] | OVERRIDES.get((op, bits, arch), {})
    if arch.startswith("gfx9"):  # 64 lanes a warp: as many threads in half as many warps
        config["warps"] = max(1, config["warps"] // 2)
    return config


@contextlib.contextmanager
def overridden(op: str, bits: int, arch: str, change: dict[str, int]) -> Iterator[None]:
    """Other numbers for a while: to measure them."""
    key = (op, bits, arch)
    before = OVERRIDES.get(key)
    OVERRIDES[key] = (before or {}) | change
    try:
        yield
    finally:
        OVERRIDES.pop(key)
        if before is not None:
            OVERRIDES[key] = before


def rows_per_program(n: int, most: int) -> int:
    """Power of two from 16 to `most` that wastes least.

    Waste is rows of padding, and 16 rows' worth of gradient work for each block of rows.
    """
    sizes = [size for size in (16, 32, 64, 128) if size <= most]
    return min(sizes, key=lambda size: -(-n // size) * (size + 16))


#: what a block of rows costs `project` beside its rows, in rows: the gradient's fixed point
ROW_OVERHEAD = 48


def row_parts(n: int, most: int, least: int) -> tuple[int, int, int]:
    """(rows, more, programs) of project: a program takes `rows` + `more` rows at a time.

    Both are powers of two, more may be 0; the sum is at most `most`, and chosen so that rows of
    padding and the gradient's work cost least: 64 + 16 rows for n = 72.
    """
    powers = [size for size in (16, 32, 64, 128) if least <= size <= most]
    choices = [(rows, 0) for rows in powers]
    choices += [(rows, more) for rows in powers for more in powers if more < rows]
    sizes = [c for c in choices if sum(c) <= most]

    def cost(size: tuple[int, int]) -> tuple[int, int]:
        return -(-n // sum(size)) * (sum(size) + ROW_OVERHEAD), size[1]

    rows, more = min(sizes, key=cost)
    return rows, more, -(-n // (rows + more))


def warps_and_stages(
    config: dict[str, int],
    rows: int,
    fast: bool = False,
    transformed: bool = False,
    in_place: bool = False,
) -> tuple[int, int]:
    """Warps and stages of orthonormalize's kernels: fewer rows, fewer warps.

    The exceptions are what keeps everything in registers with Triton 3.6 and 3.9 alike (`make
    triton-versions`).
    """
    warps = max(1, config["warps"] * rows // config["rows"])
    if rows == 16 and not transformed:
        return 2 * warps, 2
    if fast and transformed and rows == 32:
        return 2 * warps, 1
    if fast and in_place and rows == 64:
        return warps // 2, config["stages"]
    return warps, config["stages"] if rows > 16 else 2


def least_rows(bits: int) -> int:
    """Least rows of a program of project.

    Below that, its threads would load less than 16 bytes each at 3 bits and 1.
    """
    return 32 if bits in (3, 1) else 16
