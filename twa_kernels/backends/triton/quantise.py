"""The quantiser of csrc/packing.h, step by step: the pieces that pack and record are made of.

Rounding   every float operation rounds once: launched without fused multiply-add, with div_rn and
           sqrt_rn; sums run as the halving tree, each level an addition of two halves, so that no
           compiler's order of reduction matters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...layout import LEVELS
from ..reference import MAX_SHARE, RMS_SHARE
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
def power(e):
    """2^e as float32, for -126 <= e <= 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def quantise(v, real, valid, BITS: tl.constexpr, TILES: tl.constexpr):
    """Groups (TILES, 128) float32, zero where not `real`, of `valid` (TILES,) columns.

    Returns codes and levels (TILES, 128) int32, scales (TILES,) float32 of 4 significant bits; and,
    with 2^e the power of two that a group was divided by, the sum of the squares then, e, and
    whether the group is finite.
    """
    m = tl.max(magnitude(v), 1)
    finite = m < 0x7F800000
    usable = finite & (m >= 0x00800000)
    e = tl.where(usable, (m >> 23) - 126, 0)
    half = (e + ((e >> 31) & 1)) >> 1  # e / 2, towards zero
    down = power(-half)
    down2 = power(half - e)
    u = tl.where(usable[:, None], v * down[:, None] * down2[:, None], 0.0)
    largest = tl.where(usable, m.to(tl.float32, bitcast=True) * down * down2, 0.0)
    total = _tree_sum(u * u, TILES)
    if BITS == 8:
        s = _round_scale(tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32)), True)
    else:
        rms = tl.sqrt_rn(tl.div_rn(total, valid.to(tl.float32)))
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
    code, level = _encode(u, s, BITS)
    scale = s * power(half) * power(e - half)
    # Exact in bfloat16: 4 significant bits.
    scale = tl.where(scale.to(tl.int32, bitcast=True) < 0x00800000, 0.0, scale)
    return code, level, scale, total, e, finite


@triton.jit
def store_codes(codes, group, code, live, BITS: tl.constexpr, TILES: tl.constexpr):
    """Codes (TILES, 128) as the bytes of rows `group` (TILES,) where `live`."""
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
