"""The quantiser of csrc/packing.h, step by step, so that every byte equals the other backends'.

Work map   program (work item, row): TILES tiles of one tensor, one group of 128 columns each.
Rounding   every float operation rounds once: launched without fused multiply-add, with div_rn and
           sqrt_rn; sums run as the halving tree, each level an addition of two halves, so that no
           compiler's order of reduction matters.
Bytes      n * D * input read, n * D * (bits / 8 + 2 / 128) written; the center is read once per
           row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ...layout import LEVELS
from ...operands import PackArgs
from ..after_pack import finish_pack
from ..reference import MAX_SHARE, RMS_SHARE
from ..tensors import odd_ones, readable
from .launch import DTYPES, Launch, address_table, by_dtype, items_of
from .words import magnitude

# The positive levels, as bytes of one number; the others mirror them.
POSITIVE_4, POSITIVE_3, POSITIVE_2, POSITIVE_1 = (
    tl.constexpr(sum(level << (8 * j) for j, level in enumerate(LEVELS[bits][2**bits // 2 :])))
    for bits in (4, 3, 2, 1)
)
RMS_4, RMS_3, RMS_2, RMS_1 = (tl.constexpr(RMS_SHARE[bits]) for bits in (4, 3, 2, 1))
MAX_4, MAX_3 = (tl.constexpr(MAX_SHARE[bits]) for bits in (4, 3))


@triton.jit
def _tree_sum(v, TILES: tl.constexpr):
    """(TILES, 128) float32 -> (TILES,): v[c] += v[c + h] for h = 64, 32, ..., 1."""
    for level in tl.static_range(7):
        v = tl.sum(v.reshape(TILES, 2, 64 >> level), 1)  # two terms: one addition
    return v.reshape(TILES)


@triton.jit
def _nearest(k, POSITIVE: tl.constexpr, HALF: tl.constexpr):
    """Code and level of integers k in [-127, 127]: the nearest level, the lower one at a tie.

    There are HALF positive levels.
    """
    twice = tl.where(k > 0, 2 * k, 1 - 2 * k)  # of a negative number, a tie goes outwards
    steps = tl.zeros_like(k)
    size = tl.full(k.shape, POSITIVE & 255, tl.int32)
    for j in tl.static_range(HALF - 1):
        above = twice > ((POSITIVE >> (8 * j)) & 255) + ((POSITIVE >> (8 * j + 8)) & 255)
        steps += above.to(tl.int32)
        size = tl.where(above, (POSITIVE >> (8 * j + 8)) & 255, size)
    return tl.where(k > 0, HALF + steps, HALF - 1 - steps), tl.where(k > 0, size, -size)


@triton.jit
def _encode(u, s, BITS: tl.constexpr):
    """Codes and int32 levels of u / s."""
    one = tl.full(s.shape, 1.0, tl.float32)
    inverse = tl.where(s > 0, tl.div_rn(one, tl.where(s > 0, s, 1.0)), 0.0)
    v = tl.minimum(tl.maximum(u * inverse[:, None], -127.0), 127.0)
    # 1.5 * 2^23: rounds to an integer, ties to even.
    k = ((v + 12582912.0) - 12582912.0).to(tl.int32)
    if BITS == 8:
        return k + 128, k
    elif BITS == 4:
        return _nearest(k, POSITIVE_4, 8)
    elif BITS == 3:
        return _nearest(k, POSITIVE_3, 4)
    elif BITS == 2:
        return _nearest(k, POSITIVE_2, 2)
    else:
        return _nearest(k, POSITIVE_1, 1)


@triton.jit
def _round_scale(s, UP: tl.constexpr):
    """Positive float32 to 4 significant bits, up or to nearest even."""
    u = s.to(tl.int32, bitcast=True)
    if UP:
        u += 0xFFFFF
    else:
        u += 0x7FFFF + ((u >> 20) & 1)
    return (u & -1048576).to(tl.float32, bitcast=True)  # 0xfff00000


@triton.jit
def _power(e):
    """2^e as float32, for -126 <= e <= 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


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

        m = tl.max(magnitude(v), 1)
        finite = m < 0x7F800000
        usable = finite & (m >= 0x00800000)
        e = tl.where(usable, (m >> 23) - 126, 0)
        half = (e + ((e >> 31) & 1)) >> 1  # e / 2, towards zero
        down = _power(-half)
        down2 = _power(half - e)
        u = tl.where(usable[:, None], v * down[:, None] * down2[:, None], 0.0)
        largest = m.to(tl.float32, bitcast=True) * down * down2
        total = _tree_sum(u * u, TILES)
        if BITS == 8:
            s = _round_scale(tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32)), True)
        else:
            valid = tl.minimum(tl.maximum(columns - begin, 1), 128).to(tl.float32)
            rms = tl.sqrt_rn(tl.div_rn(total, valid))
            if BITS == 4:
                s = rms * RMS_4 + largest * MAX_4
            elif BITS == 3:
                s = rms * RMS_3 + largest * MAX_3
            elif BITS == 2:
                s = rms * RMS_2
            else:
                s = rms * RMS_1
            _, level = _encode(u, s, BITS)
            # At least 1: it is 0 only past the end of the item.
            norm = tl.maximum(tl.sum(tl.where(real, level * level, 0), 1), 1)
            product = _tree_sum(u * level.to(tl.float32), TILES)
            s = _round_scale(tl.div_rn(product, norm.to(tl.float32)), False)
        s = tl.where(usable, s, 0.0)
        code, _ = _encode(u, s, BITS)

        group = (first + t) * n + row  # (TILES,)
        if BITS == 3:
            field = tl.arange(0, 4)[None, :, None]
            low = tl.sum((code & 3).reshape(TILES, 4, 32) << (2 * field), 1)
            high = tl.sum((code >> 2).reshape(TILES, 8, 16) << tl.arange(0, 8)[None, :, None], 1)
            to = codes + group[:, None] * 48
            tl.store(to + tl.arange(0, 32)[None, :], low.to(tl.uint8), mask=live[:, None])
            tl.store(to + 32 + tl.arange(0, 16)[None, :], high.to(tl.uint8), mask=live[:, None])
        else:
            BYTES: tl.constexpr = 16 * BITS
            field = tl.arange(0, 8 // BITS)[None, :, None]
            byte = tl.sum(code.reshape(TILES, 8 // BITS, BYTES) << (BITS * field), 1)
            to = codes + group[:, None] * BYTES
            tl.store(to + tl.arange(0, BYTES)[None, :], byte.to(tl.uint8), mask=live[:, None])
        scale = s * _power(half) * _power(e - half)
        # Exact in bfloat16: 4 significant bits.
        scale = tl.where(scale.to(tl.int32, bitcast=True) < 0x00800000, 0.0, scale)
        tl.store(scales + group, scale.to(tl.bfloat16), mask=live)
        wide = ((2 * e + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)  # 2^(2 e)
        nan = tl.full(m.shape, 0x7FC00000, tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
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
