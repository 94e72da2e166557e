"""replay: out += sum_r coefficient[r] * scale[r] * level[r], row after row.

Work map   program = work item: TILES tiles of one tensor, whose sums stay in registers while the
           rows pass by, ROWS of them in flight.
Rounding   coefficient * scale, times the level, plus the sum: three roundings to float32 a row;
           launched without fused multiply-add.
Bytes      rows * D * (bits / 8 + 2 / 128) + D * 4 read, D * 4 written.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from ...operands import ReplayArgs
from ..rows import used_rows
from .launch import Launch, address_table, pieces_of, tensor_of
from .words import decode


@triton.jit
def _add_rows(sums, rows, row, n, tile, BITS: tl.constexpr, ISA: tl.constexpr, ROWS: tl.constexpr):
    """sums, one (TILES, WIDTH) per field, with rows row .. row + ROWS - 1 added in order."""
    WIDTH: tl.constexpr = 16 if BITS == 3 else 16 * BITS
    FIELDS: tl.constexpr = 128 // WIDTH
    # 3 bits: two halves of the 2-bit plane, the 1-bit plane.
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    raw = ()
    scales = ()
    for r in tl.static_range(ROWS):
        codes = tl.load(rows + row + r).to(tl.pointer_type(tl.uint8))
        codes = tl.multiple_of(codes, 16) + tile[:, None] * (16 * BITS)
        for plane in tl.static_range(PLANES):
            raw = raw + (tl.load(codes + (plane * WIDTH + tl.arange(0, WIDTH)[None, :])),)
        of_row = tl.load(rows + n + row + r).to(tl.pointer_type(tl.bfloat16))
        coefficient = tl.load(rows + 2 * n + row + r).to(tl.int32).to(tl.float32, bitcast=True)
        scales = scales + (coefficient * tl.load(of_row + tile).to(tl.float32),)
    for r in tl.static_range(ROWS):
        first = raw[PLANES * r]
        if BITS == 3:
            levels = decode(first, raw[PLANES * r + 1], raw[PLANES * r + 2], BITS, ISA)
        else:
            levels = decode(first, first, first, BITS, ISA)
        new = ()
        for k in tl.static_range(FIELDS):
            new = new + (sums[k] + scales[r][:, None] * levels[k].to(tl.float32),)
        sums = new
    return sums


@triton.jit(do_not_specialize=["n", "count"])
def replay_kernel(
    out,  # (tensors,) int64: addresses of float32, updated
    numel,  # (tensors,) int64
    tile_begin,  # (tensors,) int64
    item_begin,  # (tensors,) int64
    count,  # tensors
    # (3, n) int64: addresses of codes (num_tiles, 16 * BITS) uint8, multiples of 16; of scales
    # (num_tiles,) bfloat16; bits of the coefficients
    rows,
    n,
    BITS: tl.constexpr,
    ISA: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    WIDTH: tl.constexpr = 16 if BITS == 3 else 16 * BITS
    FIELDS: tl.constexpr = 128 // WIDTH
    item = tl.program_id(0)
    tensor = tensor_of(item_begin, count, item)
    columns = tl.load(numel + tensor)
    t = (item - tl.load(item_begin + tensor)) * TILES + tl.arange(0, TILES)
    # Past the end the last tile once more, which is not stored.
    tile = tl.load(tile_begin + tensor) + tl.minimum(t, (columns - 1) // 128)
    at = t[:, None] * 128 + tl.arange(0, WIDTH)[None, :]
    to = tl.load(out + tensor).to(tl.pointer_type(tl.float32)) + at
    sums = ()
    for k in tl.static_range(FIELDS):
        sums = sums + (tl.load(to + k * WIDTH, mask=at + k * WIDTH < columns, other=0.0),)
    most = n // ROWS * ROWS
    for row in tl.range(0, most, ROWS):
        sums = _add_rows(sums, rows, row, n, tile, BITS, ISA, ROWS)
    for row in tl.range(most, n):
        sums = _add_rows(sums, rows, row, n, tile, BITS, ISA, 1)
    for k in tl.static_range(FIELDS):
        tl.store(to + k * WIDTH, sums[k], mask=at + k * WIDTH < columns)


def replay(args: ReplayArgs) -> None:
    rows, device = used_rows(args), args.device
    launch = Launch("replay", args.bits, device)
    n, tiles = len(rows.coefficients), launch.config["tiles"]
    bits = [struct.unpack("<i", struct.pack("<f", c))[0] for c in rows.coefficients]
    with launch.on_device():
        pieces = pieces_of(args.numels, tiles, device)
        if n == 0 or pieces.items == 0:
            return
        addresses = [t.data_ptr() for t in (*rows.codes, *rows.scales)]
        replay_kernel[pieces.items,](
            address_table([o.data_ptr() for o in args.out], device),
            *pieces.operands,
            address_table([*addresses, *bits], device),
            n,
            BITS=args.bits,
            ISA=launch.isa,
            TILES=tiles,
            ROWS=launch.config["rows"],
            **launch.options(fuse=False),
        )
