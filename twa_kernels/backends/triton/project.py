"""c[i, l] = sum over columns j of segment l of P[i, j] g[j], on packed words.

Work map   program (work item, block of ROWS rows). An item is up to `tiles` tiles of one tensor and
           one segment; a program takes TILES of them at a time. Packed rows stream through shared
           memory (cp.async, 16 bytes a thread) and are decoded in registers.
Product    level (int8) x three int8 limbs of the tile's gradient in 24-bit fixed point, on the
           matrix units: exact int32 sums, one tile a warp. 1 and 3 bits have 16 columns a field,
           half of what the units contract at once: two rows lie side by side, and each meets the
           gradient in its own half of the limb columns.
Sums       a tile's exact sums times scale and unit are added in float32 over the tiles of an item;
           items are then added in float64 in their order. No atomics: the same bits every time.
Bytes      n * D * (bits / 8 + 1 / 128) + gradients, which are read once per block of rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...operands import BasisView
from ..tensors import odd_ones, readable
from .config import least_rows, row_blocks
from .launch import DTYPES, Launch, Work, address_table, by_dtype, work_items
from .words import decode, exponent_of, limbs, magnitude, scale_of, to_fixed, unit_of


@triton.jit
def _load_fields(
    g_ptr, tile_column, inside, columns, byte, WIDTH: tl.constexpr, FIELDS: tl.constexpr
):
    """Gradient of TILES tiles, each from column tile_column (TILES, 1) on.

    FIELDS tensors (TILES, K) float32, zero past the tensor's end.
    """
    out = ()
    for f in tl.static_range(FIELDS):
        at = tile_column + (f * WIDTH + byte % WIDTH)[None, :]
        out = out + (tl.load(g_ptr + at, mask=inside & (at < columns), other=0).to(tl.float32),)
    return out


@triton.jit
def _limb_columns(q, byte, PAIRED: tl.constexpr):
    """(TILES, K) int32 -> (TILES, K, 4) int8: three limbs and a zero.

    Paired: (TILES, K, 8), the first four columns for the row in the first half of K and zero in the
    second, the last four the other way round.
    """
    v = limbs(q)
    if PAIRED:
        v = tl.join(tl.where(byte[None, :] < 16, v, 0), tl.where(byte[None, :] < 16, 0, v))
    even = tl.join(v.to(tl.int8), (v >> 16).to(tl.int8))
    x = tl.join(even, tl.join((v >> 8).to(tl.int8), (v >> 24).to(tl.int8)))
    return x.reshape(q.shape[0], q.shape[1], 8 if PAIRED else 4)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["scales"])
def project_kernel(
    codes,  # (num_tiles, n, 16 * BITS) uint8
    scales,  # (num_tiles, n) uint8
    grads,  # (tensors,) int64: addresses, 0 for a tensor that this launch leaves alone
    numel,  # (tensors,) int64
    tile_begin,  # (tensors,) int64
    item_tensor,  # (items,) int32
    item_tile,  # (items,) int64
    item_tiles,  # (items,) int32
    partial,  # (items, n) float32
    n,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    ISA: tl.constexpr,
    ROWS: tl.constexpr,
    FULL: tl.constexpr,  # rows of a block of the launch before, which had all full blocks; 0: none
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    item = tl.program_id(0)
    tensor = tl.load(item_tensor + item)
    address = tl.load(grads + tensor)
    if address != 0:
        g_ptr = address.to(tl.pointer_type(DTYPE))
        first = tl.load(item_tile + item)
        count = tl.load(item_tiles + item)
        columns = tl.load(numel + tensor)  # of this tensor
        begin = (first - tl.load(tile_begin + tensor)) * 128

        PAIRED: tl.constexpr = BITS == 3 or BITS == 1
        GROUP: tl.constexpr = 2 if PAIRED else 1  # rows that lie side by side
        WIDTH: tl.constexpr = 32 if PAIRED else 16 * BITS  # bytes contracted at once
        FIELDS: tl.constexpr = 8 if PAIRED else 8 // BITS
        LIMBS: tl.constexpr = 4 * GROUP
        UNITS: tl.constexpr = ROWS // GROUP
        row_bytes = 16 * BITS

        t = tl.arange(0, TILES)
        byte = tl.arange(0, WIDTH)[None, None, :]
        row0 = tl.program_id(1) * ROWS
        if FULL > 0:
            row0 += n // FULL * FULL
        # (1, UNITS, WIDTH) and (1, UNITS, LIMBS)
        row = row0 + GROUP * tl.arange(0, UNITS)[None, :, None] + byte // (WIDTH // GROUP)
        limb = tl.arange(0, LIMBS)[None, None, :]
        scale_row = row0 + GROUP * tl.arange(0, UNITS)[None, :, None] + limb // 4
        live = row < n
        # Addresses within TILES tiles stay far below 2^31: the 64-bit part moves from iteration to
        # iteration.
        inside = (t[:, None, None] * n + row) * row_bytes + byte % (WIDTH // GROUP)
        scale_inside = t[:, None, None] * n + scale_row

        acc = tl.zeros((TILES, UNITS, LIMBS), tl.float32)
        # Gradient and scales of the next tiles are loaded while this one's are used; codes are
        # further ahead, by STAGES.
        at = begin + t[:, None] * 128
        g = _load_fields(
            g_ptr, at, t[:, None] < count, columns, tl.arange(0, WIDTH), 128 // FIELDS, FIELDS
        )
        s = tl.load(
            scales + first * n + scale_inside,
            mask=(scale_row < n) & (t[:, None, None] < count),
            other=0,
        )
        for done in tl.range(0, count, TILES, num_stages=STAGES):
            here = codes + (first + done) * n * row_bytes
            mask = live & (t[:, None, None] < count - done)
            w = tl.load(here + inside, mask=mask, other=0)
            w1 = w
            w2 = w
            if BITS == 3:
                w1 = tl.load(here + inside + 16, mask=mask, other=0)
                w2 = tl.load(here + inside + 32, mask=mask, other=0)
            largest = magnitude(g[0])
            for f in tl.static_range(1, FIELDS):
                largest = tl.maximum(largest, magnitude(g[f]))
            largest = tl.max(largest, 1)
            e = exponent_of(largest)
            unit = unit_of(largest, e)
            scale = scale_of(s)
            q = ()
            for f in tl.static_range(FIELDS):
                q = q + (to_fixed(g[f], e[:, None]),)
            at += TILES * 128
            g = _load_fields(
                g_ptr,
                at,
                t[:, None] < count - done - TILES,
                columns,
                tl.arange(0, WIDTH),
                128 // FIELDS,
                FIELDS,
            )
            ahead = scales + (first + done + TILES) * n
            s = tl.load(
                ahead + scale_inside,
                mask=(scale_row < n) & (t[:, None, None] < count - done - TILES),
                other=0,
            )

            levels = decode(w, w1, w2, BITS, ISA)
            exact = tl.zeros((TILES, UNITS, LIMBS), tl.int32)
            for f in tl.static_range(FIELDS):
                exact = tl.dot(
                    levels[f],
                    _limb_columns(q[f], tl.arange(0, WIDTH), PAIRED),
                    acc=exact,
                    out_dtype=tl.int32,
                )
            acc += (exact.to(tl.float32) * scale) * unit[:, None, None]

        weight = tl.where(
            limb % 4 == 0,
            1.0,
            tl.where(limb % 4 == 1, 256.0, tl.where(limb % 4 == 2, 65536.0, 0.0)),
        )
        sums = tl.sum((acc * weight).reshape(TILES, ROWS, 4), 2)
        out_row = row0 + tl.arange(0, ROWS)
        tl.store(partial + item.to(tl.int64) * n + out_row, tl.sum(sums, 0), mask=out_row < n)


@triton.jit
def segment_sums(partial, segment_begin, segment, rows, n, ITEMS: tl.constexpr, ROWS: tl.constexpr):
    """Sum over the items of one segment, float64, for `rows` (ROWS,)."""
    begin = tl.load(segment_begin + segment)
    end = tl.load(segment_begin + segment + 1)
    total = tl.zeros((ITEMS, ROWS), tl.float64)
    for first in tl.range(begin, end, ITEMS):
        item = first + tl.arange(0, ITEMS)
        mask = (item < end)[:, None] & (rows < n)[None, :]
        total += tl.load(
            partial + item[:, None].to(tl.int64) * n + rows[None, :], mask=mask, other=0
        ).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["n", "num_segments"])
def sum_kernel(
    partial,  # (items, n) float32
    segment_begin,  # (L + 1,) int32: items of each segment
    row_scale,  # (n, L) float32
    c,  # (n, L) float32
    n,
    num_segments,
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """c = row_scale * sum over items: the second stage."""
    segment = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = segment_sums(partial, segment_begin, segment, rows, n, ITEMS, ROWS)
    at = rows.to(tl.int64) * num_segments + segment
    scale = tl.load(row_scale + at, mask=rows < n, other=0)
    tl.store(c + at, (total * scale).to(tl.float32), mask=rows < n)


def partial_sums(basis: BasisView, grads: Sequence[Tensor]) -> tuple[Tensor, Work]:
    """First stage of project: sums per work item (items, n) float32, without row_scale.

    And the work items.
    """
    grads = readable(grads, odd_ones(grads))
    launch, n = Launch("project", basis.bits, basis.device), basis.n
    config = launch.config
    work = work_items(basis, config["item"])
    groups = by_dtype(grads, [g.dtype for g in grads])
    # One dtype for all tensors writes every item; else what is left out is zero.
    complete = len(groups) == 1 and all(
        address or not numel
        for address, numel in zip(next(iter(groups.values())), basis.numels, strict=True)
    )
    partial = (torch.empty if complete else torch.zeros)(work.count, n, device=basis.device)
    blocks = row_blocks(n, config["rows"], least_rows(basis.bits))
    with launch.on_device():
        for (dtype, addresses), (rows, full, count) in itertools.product(groups.items(), blocks):
            project_kernel[work.count, count](
                basis.codes,
                basis.scales,
                address_table(addresses, basis.device),
                work.numel,
                work.tile_begin,
                work.tensor,
                work.tile,
                work.tiles,
                partial,
                n,
                BITS=basis.bits,
                DTYPE=DTYPES[dtype],
                ISA=launch.isa,
                ROWS=rows,
                FULL=full,
                TILES=config["tiles"],
                STAGES=config["stages"],
                **launch.options(),
            )
    return partial, work


def project(basis: BasisView, grads: Sequence[Tensor]) -> Tensor:
    partial, work = partial_sums(basis, grads)
    c = torch.empty_like(basis.row_scale)
    launch = Launch("sum", basis.bits, basis.device)
    items, rows = launch.config["items"], launch.config["rows"]
    with launch.on_device():
        sum_kernel[basis.num_segments, -(-basis.n // rows)](
            partial,
            work.segment_begin,
            basis.row_scale,
            c,
            basis.n,
            basis.num_segments,
            ITEMS=items,
            ROWS=rows,
            **launch.options(fuse=False),
        )
    return c
