"""pack: the quantiser of quantise.py, so that every byte equals the other backends'.

Work map   program (work item, row): TILES tiles of one tensor, one group of 128 columns each.
Bytes      n * D * input read, n * D * (bits / 8 + 2 / 128) written; the center is read once per
           row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ...operands import PackArgs
from ..after_pack import finish_pack
from ..tensors import odd_ones, readable
from .launch import DTYPES, Launch, address_table, by_dtype, items_of
from .quantise import quantise, store_codes


@triton.jit(do_not_specialize=["n"])
def pack_kernel(
    rows,  # (tensors, n) int64: addresses, 0 for what this launch leaves alone
    center,  # (tensors,) int64: addresses; not read without HAS_CENTER
    numel,  # (tensors,) int64
    tile_begin,  # (tensors,) int64
    item_tensor,  # (items,) int32
    item_tile,  # (items,) int64
    item_tiles,  # (items,) int32
    codes,  # (num_tiles, n, 16 * BITS) uint8
    scales,  # (num_tiles, n) bfloat16
    squares,  # (num_tiles, n) float64: squared norms; NaN for a group with NaN or Inf
    n,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    TILES: tl.constexpr,
):
    item = tl.program_id(0)
    row = tl.program_id(1)
    tensor = tl.load(item_tensor + item)
    address = tl.load(rows + tensor.to(tl.int64) * n + row)
    if address != 0:
        first = tl.load(item_tile + item)
        t = tl.arange(0, TILES)
        live = t < tl.load(item_tiles + item)
        columns = tl.load(numel + tensor)
        begin = (first - tl.load(tile_begin + tensor) + t) * 128  # (TILES,)
        at = begin[:, None] + tl.arange(0, 128)[None, :]
        real = live[:, None] & (at < columns)
        v = tl.load(address.to(tl.pointer_type(DTYPE)) + at, mask=real, other=0).to(tl.float32)
        if HAS_CENTER:
            of_center = tl.load(center + tensor).to(tl.pointer_type(CENTER)) + at
            v -= tl.load(of_center, mask=real, other=0).to(tl.float32)

        valid = tl.minimum(tl.maximum(columns - begin, 1), 128)
        code, _, scale, total, e, finite = quantise(v, real, valid, BITS, TILES)
        group = (first + t) * n + row  # (TILES,)
        store_codes(codes, group, code, live, BITS, TILES)
        tl.store(scales + group, scale.to(tl.bfloat16), mask=live)
        wide = ((2 * e + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)  # 2^(2 e)
        nan = tl.full(e.shape, 0x7FC00000, tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
        tl.store(squares + group, tl.where(finite, total.to(tl.float64) * wide, nan), mask=live)


def pack(args: PackArgs) -> tuple[int, int, int] | None:
    rows = readable(args.rows, odd_ones(args.rows))
    center = readable(args.center, odd_ones(args.center))
    launch, n, device = Launch("pack", args.bits, args.device), args.n, args.device
    num_segments, tiles = args.sum_sq.shape[1], launch.config["tiles"]
    work = items_of(args.tile_segment, args.numels, num_segments, tiles)
    squares = torch.empty(len(args.codes), n, dtype=torch.float64, device=device)
    keys = [
        (row.dtype, center[k // n].dtype if center else torch.float32) for k, row in enumerate(rows)
    ]
    with launch.on_device():
        for (dtype, center_dtype), addresses in by_dtype(rows, keys).items():
            pack_kernel[work.count, n](
                address_table(addresses, device),
                address_table([c.data_ptr() for c in center], device) if center else work.numel,
                work.numel,
                work.tile_begin,
                work.tensor,
                work.tile,
                work.tiles,
                args.codes,
                args.scales,
                squares,
                n,
                BITS=args.bits,
                DTYPE=DTYPES[dtype],
                CENTER=DTYPES[center_dtype],
                HAS_CENTER=bool(center),
                TILES=tiles,
                **launch.options(fuse=False),
            )
    return finish_pack(replace(args, rows=rows, center=center), squares)
