"""out[j] = center[j] + sum_i x[i, l] P[i, j], on packed words.

Work map   program = work item: up to TILES tiles of one tensor and one segment, all n rows. A
           thread owns 16 bytes of every row of its tile, so its columns never leave its registers;
           loads of ROWS rows are in flight together.
Product    four rows at a time. Their words are regrouped so that a word holds one column of the
           four rows, looked up as int8 levels, and multiplied by `dp2a` and `dp4a` with the low 16
           and the high 8 bits of the rows' coefficients: x row_scale scale in 24-bit fixed point
           per tile. int32 sums, exact: over all rows at 8, 4 and 2 bits, and at 1 bit up to 255
           rows; else over ROWS rows, then float32. The matrix units would contract more rows at
           once, but their operand wants the rows next to each other: bytes would have to be
           transposed through shared memory.
Bytes      n * D * (bits / 8 + 1 / 128) + center + weights.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import capture
from ...operands import BasisView
from ..tensors import odd_ones, readable, writable
from .launch import DTYPES, Launch, address_table, by_dtype, work_items
from .words import (
    TABLES,
    byte_perm,
    coefficient_words,
    dot_low,
    dp4a,
    exponent_of,
    magnitude,
    scale_of,
    to_fixed,
    unit_of,
)


@triton.jit
def _four_bytes(a, b, c, d, ISA: tl.constexpr):
    """Bytes of four words, transposed: word k holds byte k of a, b, c, d."""
    ab01 = byte_perm(a, b, 0x5140, ISA)
    cd01 = byte_perm(c, d, 0x5140, ISA)
    ab23 = byte_perm(a, b, 0x7362, ISA)
    cd23 = byte_perm(c, d, 0x7362, ISA)
    return (
        byte_perm(ab01, cd01, 0x5410, ISA),
        byte_perm(ab01, cd01, 0x7632, ISA),
        byte_perm(ab23, cd23, 0x5410, ISA),
        byte_perm(ab23, cd23, 0x7632, ISA),
    )


@triton.jit
def _look_up(selector, tables, BITS: tl.constexpr, ISA: tl.constexpr):
    """Eight codes, a nibble each -> two words: int8 levels of the low four and of the high four."""
    if BITS == 4:
        index = selector & 0x77777777
        # Picks from the upper levels where bit 3 is set.
        top = ((selector >> 1) & 0x44444444) | 0x32103210
        low = byte_perm(tables[0], tables[1], index, ISA)
        high = byte_perm(tables[2], tables[3], index, ISA)
        first = byte_perm(low, high, top, ISA)
        low = byte_perm(tables[0], tables[1], index >> 16, ISA)
        high = byte_perm(tables[2], tables[3], index >> 16, ISA)
        return first, byte_perm(low, high, top >> 16, ISA)
    else:
        first = byte_perm(tables[0], tables[1], selector, ISA)
        return first, byte_perm(tables[0], tables[1], selector >> 16, ISA)


@triton.jit
def _four_nibbles(a, b, c, d, tables, HIGH: tl.constexpr, BITS: tl.constexpr, ISA: tl.constexpr):
    """Codes in the low (or high) nibbles of four rows' words -> four words.

    The words hold int8 levels of bytes 0, 1, 2, 3 in the four rows.
    """
    if HIGH:
        ab = ((a >> 4) & 0x0F0F0F0F) | (b & -252645136)  # 0xf0f0f0f0
        cd = ((c >> 4) & 0x0F0F0F0F) | (d & -252645136)
    else:
        ab = (a & 0x0F0F0F0F) | ((b << 4) & -252645136)
        cd = (c & 0x0F0F0F0F) | ((d << 4) & -252645136)
    first = byte_perm(ab, cd, 0x5140, ISA)  # the four rows' codes of byte 0, then of byte 1
    last = byte_perm(ab, cd, 0x7362, ISA)
    return _look_up(first, tables, BITS, ISA) + _look_up(last, tables, BITS, ISA)


@triton.jit
def _codes_of(low, top, FIELD: tl.constexpr, BITS: tl.constexpr):
    """Words whose nibbles hold the codes of field FIELD.

    The low nibbles for fields of the first half, the high ones for those of the second.
    """
    if BITS == 4:
        return low
    elif BITS == 2:
        return (low >> (2 * (FIELD % 2))) & 0x33333333
    else:  # field 2 f + half: low is that half of the 2-bit plane, top the 1-bit plane
        amount: tl.constexpr = FIELD % 4 - 2
        if amount < 0:
            bit = top << -amount
        else:
            bit = top >> amount
        return ((low >> (2 * (FIELD // 2 % 2))) & 0x33333333) | (bit & 0x44444444)


@triton.jit
def _levels(
    raw,
    columns,
    tables,
    GROUP: tl.constexpr,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    ISA: tl.constexpr,
):
    """int8 levels of field FIELD of bytes 0, 1, 2, 3 of each word, for the four rows of a group.

    1 bit: 0 or 1 (level = 254 b - 127).
    """
    if BITS == 8:
        flip: tl.constexpr = -2139062144  # 0x80808080: code - 128
        return (
            columns[4 * GROUP] ^ flip,
            columns[4 * GROUP + 1] ^ flip,
            columns[4 * GROUP + 2] ^ flip,
            columns[4 * GROUP + 3] ^ flip,
        )
    elif BITS == 1:
        return (
            (columns[4 * GROUP] >> FIELD) & 0x01010101,
            (columns[4 * GROUP + 1] >> FIELD) & 0x01010101,
            (columns[4 * GROUP + 2] >> FIELD) & 0x01010101,
            (columns[4 * GROUP + 3] >> FIELD) & 0x01010101,
        )
    else:
        planes: tl.constexpr = 3 if BITS == 3 else 1
        half: tl.constexpr = FIELD % 2 if BITS == 3 else 0
        r: tl.constexpr = 4 * GROUP * planes
        return _four_nibbles(
            _codes_of(raw[r + half], raw[r + planes - 1], FIELD, BITS),
            _codes_of(raw[r + planes + half], raw[r + 2 * planes - 1], FIELD, BITS),
            _codes_of(raw[r + 2 * planes + half], raw[r + 3 * planes - 1], FIELD, BITS),
            _codes_of(raw[r + 3 * planes + half], raw[r + 4 * planes - 1], FIELD, BITS),
            tables,
            2 * FIELD * BITS >= 8 if BITS != 3 else FIELD >= 4,
            BITS,
            ISA,
        )


@triton.jit
def _accumulate(sums, c0, c1, c2, c3, first, second, high, ISA: tl.constexpr):
    """Adds the products of four columns (four rows each) with the coefficients.

    sums[2 k] is the low, sums[2 k + 1] the high part, int32.
    """
    return (
        dot_low(c0, first, second, sums[0], ISA),
        dp4a(c0, high, sums[1], ISA),
        dot_low(c1, first, second, sums[2], ISA),
        dp4a(c1, high, sums[3], ISA),
        dot_low(c2, first, second, sums[4], ISA),
        dp4a(c2, high, sums[5], ISA),
        dot_low(c3, first, second, sums[6], ISA),
        dp4a(c3, high, sums[7], ISA),
    )


@triton.jit
def _add_rows(
    acc,
    total,
    row0,
    tile_codes,
    tile_scales,
    x_row,
    table,
    e,
    n,
    BITS: tl.constexpr,
    ISA: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    EXACT: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """acc and total with rows row0 .. row0 + ROWS - 1 added.

    Past the last row some row once more, whose coefficient is zero.
    """
    FIELDS: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    # 3 bits: two halves of the 2-bit plane, the 1-bit plane.
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    GROUPS: tl.constexpr = ROWS // 4
    raw = ()
    for r in tl.static_range(ROWS):
        row = r if EVEN else tl.where(row0 + r < n, r, 0)
        for plane in tl.static_range(PLANES):
            raw = raw + (tl.load(tile_codes + row0 * (4 * BITS) + (row * (4 * BITS) + plane * 4)),)
    q = ()
    for r in tl.static_range(ROWS):
        s = scale_of(tl.load(tile_scales + row0 + (r if EVEN else tl.where(row0 + r < n, r, 0))))
        q = q + (to_fixed(tl.load(x_row + row0 + r) * s, e, ISA),)
    coefficients = ()
    sum_q = tl.zeros_like(e)
    for group in tl.static_range(GROUPS):
        coefficients = coefficients + coefficient_words(
            q[4 * group], q[4 * group + 1], q[4 * group + 2], q[4 * group + 3], ISA
        )
        sum_q += q[4 * group] + q[4 * group + 1] + q[4 * group + 2] + q[4 * group + 3]
    if SINGLE:
        total += sum_q
    columns = ()  # 8 and 1 bits: bytes of four rows, regrouped
    if BITS == 8 or BITS == 1:
        for group in tl.static_range(GROUPS):
            columns = columns + _four_bytes(
                raw[4 * group], raw[4 * group + 1], raw[4 * group + 2], raw[4 * group + 3], ISA
            )
    new = ()
    for f in tl.static_range(FIELDS):
        sums = ()
        for k in tl.static_range(4):
            if EXACT:
                sums = sums + (acc[8 * f + 2 * k], acc[8 * f + 2 * k + 1])
            elif SINGLE:
                sums = sums + (acc[4 * f + k], tl.zeros_like(raw[0]))
            else:
                sums = sums + (tl.zeros_like(raw[0]), tl.zeros_like(raw[0]))
        for group in tl.static_range(GROUPS):
            c0, c1, c2, c3 = _levels(raw, columns, table, group, f, BITS, ISA)
            first = coefficients[3 * group][:, None]
            second = coefficients[3 * group + 1][:, None]
            sums = _accumulate(
                sums, c0, c1, c2, c3, first, second, coefficients[3 * group + 2][:, None], ISA
            )
        if EXACT:
            new = new + sums
        elif SINGLE:
            for k in tl.static_range(4):
                new = new + (sums[2 * k] + (sums[2 * k + 1] << 16),)
        elif BITS == 1:
            for k in tl.static_range(4):
                # Sum of bits; the levels are 127 (2 b - 1).
                group_sum = sums[2 * k] + (sums[2 * k + 1] << 16)
                new = new + (acc[4 * f + k] + (2 * group_sum - sum_q[:, None]).to(tl.float32),)
        else:
            for k in tl.static_range(4):
                both = sums[2 * k + 1].to(tl.float32) * 65536.0 + sums[2 * k].to(tl.float32)
                new = new + (acc[4 * f + k] + both,)
    return new, total


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["scales"])
def reconstruct_kernel(
    codes,  # (num_tiles, n, 4 * BITS) int32
    scales,  # (num_tiles, n) uint8
    # (L, padded) float32: coefficient times row_scale; zero from n to padded, a multiple of ROWS
    # and of 16
    x,
    tables,  # (TILES, 4) int32: the levels' bytes, once per tile
    center,  # (tensors,) int64: addresses; not read without HAS_CENTER
    out,  # (tensors,) int64: addresses, 0 for a tensor that this launch leaves alone
    numel,  # (tensors,) int64
    tile_begin,  # (tensors,) int64
    item_tensor,  # (items,) int32
    item_tile,  # (items,) int64
    item_tiles,  # (items,) int32
    item_segment,  # (items,) int32
    n,
    padded,
    BITS: tl.constexpr,
    CENTER: tl.constexpr,
    OUT: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    ISA: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,  # n is a multiple of ROWS
    FEW: tl.constexpr,  # n <= 255; matters at 1 bit only
):
    item = tl.program_id(0)
    tensor = tl.load(item_tensor + item)
    address = tl.load(out + tensor)
    if address != 0:
        FIELDS: tl.constexpr = 8 if BITS == 3 else 8 // BITS
        WORDS: tl.constexpr = 32 // FIELDS  # words of a row that hold one code per byte and field

        tile = tl.load(item_tile + item)
        count = tl.load(item_tiles + item)
        x_row = x + tl.load(item_segment + item).to(tl.int64) * padded
        live = tl.arange(0, TILES) < count
        # Past the end the last tile once more, which is not stored.
        t = tl.minimum(tl.arange(0, TILES), count - 1)
        word = tl.arange(0, WORDS)[None, :]
        # One copy a tile: what all threads read at one address would go to uniform registers, and
        # be moved from there at every use.
        copy = tables + 4 * t
        table = (
            tl.load(copy)[:, None],
            tl.load(copy + 1)[:, None],
            tl.load(copy + 2)[:, None],
            tl.load(copy + 3)[:, None],
        )
        # (TILES, WORDS)
        tile_codes = codes + (tile * n) * (4 * BITS) + (t[:, None] * n) * (4 * BITS) + word
        tile_scales = scales + tile * n + t * n  # (TILES,)

        # The WORDS // 4 threads that hold a tile's words read one scale each, so that they have its
        # largest product. With more or fewer threads a tile, all coefficients of the main loop
        # would go through shared memory.
        AT_ONCE: tl.constexpr = WORDS // 4
        largest = tl.zeros((TILES,), tl.int32)
        for row0 in tl.range(0, n, 16):
            for k in tl.static_range(16 // AT_ONCE):
                rows = row0 + k * AT_ONCE + tl.arange(0, AT_ONCE)
                s = tl.load(tile_scales[:, None] + rows[None, :], mask=(rows < n)[None, :], other=0)
                y = tl.load(x_row + rows)[None, :] * scale_of(s)
                largest = tl.maximum(largest, tl.max(magnitude(y), 1))
        e = exponent_of(largest)

        # 8, 4, 2 bits: int32 sums (low, high) of every column over all rows. 3 and 1 bits have too
        # many columns a thread for two registers each: at 1 bit and up to 255 rows the whole sum of
        # coefficients times 0 or 1 is one int32 (255 * 0x7f7f7f < 2^31); else int32 sums over ROWS
        # rows are added in float32.
        EXACT: tl.constexpr = BITS == 8 or BITS == 4 or BITS == 2
        SINGLE: tl.constexpr = BITS == 1 and FEW
        acc = ()
        for k in tl.static_range((8 if EXACT else 4) * FIELDS):
            acc = acc + (tl.zeros((TILES, WORDS), tl.int32 if EXACT or SINGLE else tl.float32),)
        total = tl.zeros((TILES,), tl.int32)  # SINGLE: sum of the coefficients
        if EXACT:
            # Low sums of 256 rows stay below 2^31: 256 * 128 * 2^15 + 2^16.
            for chunk in tl.range(0, n, 256):
                for row0 in tl.range(chunk, tl.minimum(chunk + 256, n), ROWS):
                    acc, total = _add_rows(
                        acc,
                        total,
                        row0,
                        tile_codes,
                        tile_scales,
                        x_row,
                        table,
                        e,
                        n,
                        BITS,
                        ISA,
                        ROWS,
                        EVEN,
                        EXACT,
                        SINGLE,
                    )
                carried = ()
                for k in tl.static_range(4 * FIELDS):
                    carried = carried + (acc[2 * k] & 0xFFFF, acc[2 * k + 1] + (acc[2 * k] >> 16))
                acc = carried
            values = ()
            for k in tl.static_range(4 * FIELDS):
                value = acc[2 * k + 1].to(tl.float32) * 65536.0 + acc[2 * k].to(tl.float32)
                values = values + (value,)
        else:
            for row0 in tl.range(0, n, ROWS):
                acc, total = _add_rows(
                    acc,
                    total,
                    row0,
                    tile_codes,
                    tile_scales,
                    x_row,
                    table,
                    e,
                    n,
                    BITS,
                    ISA,
                    ROWS,
                    EVEN,
                    EXACT,
                    SINGLE,
                )
            values = acc

        unit = unit_of(largest, e)[:, None]
        begin = (tile - tl.load(tile_begin + tensor)) * 128 + tl.arange(0, TILES)[:, None] * 128
        begin += tl.arange(0, 4 * WORDS)[None, :]
        for f in tl.static_range(FIELDS):
            even = tl.join(values[4 * f], values[4 * f + 2])
            both = tl.join(even, tl.join(values[4 * f + 1], values[4 * f + 3]))
            value = both.reshape(TILES, 4 * WORDS)
            if SINGLE:  # sum of q (2 b - 1), which again is below 2^31
                value = (value + value - total[:, None]).to(tl.float32)
            if BITS == 1:
                value *= 127.0
            column = begin + f * 4 * WORDS
            mask = live[:, None] & (column < tl.load(numel + tensor))
            value *= unit
            if HAS_CENTER:
                of_center = tl.load(center + tensor).to(tl.pointer_type(CENTER)) + column
                value += tl.load(of_center, mask=mask, other=0).to(tl.float32)
            tl.store(address.to(tl.pointer_type(OUT)) + column, value.to(OUT), mask=mask)


#: rows of coefficients are padded to a multiple of this, itself a multiple of every configuration's
#: `rows`
ROW_PADDING = 64


@functools.lru_cache(maxsize=64)
def _tables(bits: int, tiles: int, device: torch.device) -> Tensor:
    """(tiles, 4) int32: levels as bytes.

    In memory, because a compiler that knew them would move them into registers at every use.
    """
    capture.refuse_capture(device)
    words = TABLES.get(bits, [0, 0, 0, 0])
    signed = [w - (w >> 31 << 32) for w in words]
    return torch.tensor([signed] * tiles, dtype=torch.int32, device=device)


def weights_of(
    basis: BasisView, x_rows: Tensor, center: Sequence[Tensor], out: Sequence[Tensor]
) -> None:
    """out = center + sum over rows.

    x_rows (L, padded) is x times row_scale, zero past the n rows.
    """
    bits, device = basis.bits, basis.device
    launch = Launch("reconstruct", bits, device)
    config = launch.config
    work = work_items(basis, config["tiles"])
    center = readable(center, odd_ones(center))
    keys = [
        (c.dtype if center else torch.float32, o.dtype)
        for c, o in zip(center or out, out, strict=True)
    ]
    with writable(out, odd_ones(out)) as targets, launch.on_device():
        for (center_dtype, out_dtype), addresses in by_dtype(targets, keys).items():
            reconstruct_kernel[(work.count,)](
                basis.codes.view(torch.int32),
                basis.scales,
                x_rows,
                _tables(bits, config["tiles"], device),
                address_table([c.data_ptr() for c in center], device) if center else work.numel,
                address_table(addresses, device),
                work.numel,
                work.tile_begin,
                work.tensor,
                work.tile,
                work.tiles,
                work.segment,
                basis.n,
                x_rows.shape[1],
                BITS=bits,
                CENTER=DTYPES[center_dtype],
                OUT=DTYPES[out_dtype],
                HAS_CENTER=bool(center),
                ISA=launch.isa,
                TILES=config["tiles"],
                ROWS=config["rows"],
                EVEN=basis.n % config["rows"] == 0,
                FEW=bits > 1 or basis.n <= 255,
                **launch.options(),
            )


def reconstruct(
    basis: BasisView, x: Tensor, center: Sequence[Tensor], out: Sequence[Tensor] | None
) -> list[Tensor]:
    if out is None:
        out = [
            basis.codes.new_empty(numel, dtype=center[k].dtype if center else torch.float32)
            for k, numel in enumerate(basis.numels)
        ]
    scaled = (x * basis.row_scale).T
    x_rows = torch.nn.functional.pad(scaled, (0, -basis.n % ROW_PADDING)).contiguous()
    weights_of(basis, x_rows, center, out)
    return list(out)
