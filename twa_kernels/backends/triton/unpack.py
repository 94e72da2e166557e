"""out[i, j] = row_scale[i, l] scales[t, i] level[code(t, i, c)], float32.

The product of the two scales is rounded first.

Work map   program (work item, row): TILES tiles of one tensor. Each column fetches its own byte:
           this op writes 4 bytes a weight and is bound by that.
Bytes      n * D * (bits / 8 + 1 / 128) read, n * D * 4 written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...operands import BasisView
from .launch import Launch, address_table, work_items
from .words import level_of, scale_of


@triton.jit
def levels_at(row, column, BITS: tl.constexpr):
    """int8 levels of columns [0, 128) of packed rows.

    row points to the first byte of each, and broadcasts with column.
    """
    if BITS == 3:
        low = tl.load(row + column % 32).to(tl.int32) >> (2 * (column // 32))
        high = tl.load(row + 32 + column % 16).to(tl.int32) >> (column // 16)
        return level_of((low & 3) | ((high & 1) << 2), 3)
    else:
        byte = tl.load(row + column % (16 * BITS)).to(tl.int32)
        return level_of((byte >> (BITS * (column // (16 * BITS)))) & ((1 << BITS) - 1), BITS)


@triton.jit(do_not_specialize=["n", "num_segments"], do_not_specialize_on_alignment=["scales"])
def unpack_kernel(
    codes,  # (num_tiles, n, 16 * BITS) uint8
    scales,  # (num_tiles, n) uint8
    row_scale,  # (n, L) float32
    out,  # (tensors,) int64: addresses of (n, numel) float32
    numel,  # (tensors,) int64
    tile_begin,  # (tensors,) int64
    item_tensor,  # (items,) int32
    item_tile,  # (items,) int64
    item_tiles,  # (items,) int32
    item_segment,  # (items,) int32
    n,
    num_segments,
    BITS: tl.constexpr,
    TILES: tl.constexpr,
):
    item = tl.program_id(0)
    row = tl.program_id(1)
    tensor = tl.load(item_tensor + item)
    columns = tl.load(numel + tensor)
    first = tl.load(item_tile + item)
    count = tl.load(item_tiles + item)
    live = tl.arange(0, TILES) < count
    # Past the end the last tile once more, which is not stored.
    t = tl.minimum(tl.arange(0, TILES), count - 1)
    group = (first + t) * n + row
    of_row = row_scale + row.to(tl.int64) * num_segments + tl.load(item_segment + item)
    scale = tl.load(of_row) * scale_of(tl.load(scales + group))
    column = tl.arange(0, 128)[None, :]
    level = levels_at(codes + group[:, None] * (16 * BITS), column, BITS).to(tl.float32)
    at = (first - tl.load(tile_begin + tensor) + tl.arange(0, TILES))[:, None] * 128 + column
    to = tl.load(out + tensor).to(tl.pointer_type(tl.float32)) + row.to(tl.int64) * columns
    tl.store(to + at, scale[:, None] * level, mask=live[:, None] & (at < columns))


def unpack(basis: BasisView) -> list[Tensor]:
    launch = Launch("unpack", basis.bits, basis.device)
    out = [basis.row_scale.new_empty(basis.n, numel) for numel in basis.numels]
    work = work_items(basis, launch.config["tiles"])
    if work.count:
        with launch.on_device():
            unpack_kernel[work.count, basis.n](
                basis.codes,
                basis.scales,
                basis.row_scale,
                address_table([o.data_ptr() for o in out], basis.device),
                work.numel,
                work.tile_begin,
                work.tensor,
                work.tile,
                work.tiles,
                work.segment,
                basis.n,
                basis.num_segments,
                BITS=basis.bits,
                TILES=launch.config["tiles"],
                **launch.options(fuse=False),
            )
    return out
