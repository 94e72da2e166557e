"""c[i, l] = sum over columns j of segment l of P[i, j] g[j], on packed words.

Work map   program (work item, block of ROWS + MORE rows, which share the gradient's work). An item
           is up to `tiles` tiles of one tensor and one segment; a program takes TILES of them at a
           time. Packed rows stream through shared memory (cp.async, 16 bytes a thread) and are
           decoded in registers.
Product    operands made of packed bytes (words.operands) x three int8 limbs of the tile's gradient
           in 24-bit fixed point, on the matrix units: exact int32 sums, one tile a warp. Where
           operands are not quite the levels, limbs' sums make up for it. 1 and 3 bits have 16
           columns a field, half of what the units contract at once: two rows lie side by side, and
           each meets the gradient in its own half of the limb columns.
Sums       a tile's exact sums times scale and unit are added in float32 over the tiles of an item;
           items are then added in float64 in their order, many of one segment in groups first. No
           atomics: the same bits every time.
Bytes      n * D * (bits / 8 + 1 / 128) + gradients, which are read once per block of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...operands import BasisView
from ..tensors import odd_ones, readable
from .config import least_rows, row_parts
from .launch import DTYPES, Launch, Work, address_table, by_dtype, work_items
from .words import (
    column_of,
    exponent_of,
    in_order,
    limbs,
    magnitude,
    operands,
    scale_of,
    to_fixed,
    unit_of,
)


@triton.jit
def _load_gradient(
    g_ptr, left, TILES: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr, ISA: tl.constexpr
):
    """Gradient of TILES tiles from g_ptr on, `left` elements at most, in the operands' order.

    STEPS tensors (TILES, 32) float32, zero past the last element.
    """
    out = ()
    for step in tl.static_range(STEPS):
        column = column_of(tl.arange(0, 32), step, BITS, ISA)
        at = tl.arange(0, TILES)[:, None] * 128 + column[None, :]
        # Not so, but no wider load can come of it, since nothing is known of the address; it makes
        # Triton before 3.8 give a warp one tile.
        at = tl.max_contiguous(at, [1, 2])
        out = out + (tl.load(g_ptr + at, mask=at < left, other=0).to(tl.float32),)
    return out


@triton.jit
def _limb_columns(q, PAIRED: tl.constexpr):
    """(TILES, 32) int32 -> (TILES, 32, 4) int8: the limbs.

    Paired: (TILES, 32, 8), the first four columns for the row in the first half of K and zero in
    the second, the last four the other way round.
    """
    v = limbs(q)
    if PAIRED:
        first = (tl.arange(0, 32) < 16)[None, :]
        v = tl.join(tl.where(first, v, 0), tl.where(first, 0, v))
    even = tl.join(v.to(tl.int8), (v >> 16).to(tl.int8))
    x = tl.join(even, tl.join((v >> 8).to(tl.int8), (v >> 24).to(tl.int8)))
    return x.reshape(q.shape[0], 32, 8 if PAIRED else 4)


@triton.jit
def _load_rows(here, inside, mask, BITS: tl.constexpr):
    """Packed bytes of some rows of TILES tiles, 32 contracted at once, for `operands`."""
    if BITS == 8:
        return (
            tl.load(here + inside, mask=mask, other=0),
            tl.load(here + inside + 32, mask=mask, other=0),
            tl.load(here + inside + 64, mask=mask, other=0),
            tl.load(here + inside + 96, mask=mask, other=0),
        )
    elif BITS == 4:
        return (
            tl.load(here + inside, mask=mask, other=0),
            tl.load(here + inside + 32, mask=mask, other=0),
        )
    elif BITS == 3:
        return (
            tl.load(here + inside, mask=mask, other=0),
            tl.load(here + inside + 16, mask=mask, other=0),
            tl.load(here + inside + 32, mask=mask, other=0),
        )
    else:
        return (tl.load(here + inside, mask=mask, other=0),)


@triton.jit
def _products(w, limb_columns, lack, UNITS: tl.constexpr, BITS: tl.constexpr, ISA: tl.constexpr):
    """Levels of the rows times limbs, int32 (TILES, UNITS, LIMBS); 1 bit: 2^8 b - 2^7 for a bit b.

    lack: (TILES, 1, LIMBS), what the sums of operands are short of; 1 bit: too much by.
    """
    exact = tl.zeros((lack.shape[0], UNITS, lack.shape[2]), tl.int32)
    if BITS == 4 and ISA == "ptx":
        exact += lack
    STEPS: tl.constexpr = 4 if BITS == 8 or BITS == 4 or BITS == 2 else 8
    PARTS: tl.constexpr = 4 if BITS == 8 else 2 if BITS == 4 else 1
    TWICE: tl.constexpr = 2 if BITS == 4 and ISA == "ptx" else 1
    PER_PART: tl.constexpr = STEPS // PARTS
    for part in tl.static_range(PARTS):
        if BITS == 3:
            x = operands(w[0], w[1], w[2], BITS, ISA)
        else:
            x = operands(w[part], w[part], w[part], BITS, ISA)
        for k in tl.static_range(PER_PART * TWICE):
            exact = tl.dot(
                x[k], limb_columns[part * PER_PART + k // TWICE], acc=exact, out_dtype=tl.int32
            )
    if BITS == 1:
        exact = 2 * exact - lack
    return exact


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
    MORE: tl.constexpr,  # rows of the program beyond ROWS, 0 or a power of two
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
        # Elements of the gradient that the item has, and from which address on.
        left = tl.minimum(columns - begin, count * 128).to(tl.int32)
        g_ptr += begin

        PAIRED: tl.constexpr = BITS == 3 or BITS == 1
        GROUP: tl.constexpr = 2 if PAIRED else 1  # rows that lie side by side
        WIDTH: tl.constexpr = 32 // GROUP  # bytes of a row contracted at once
        STEPS: tl.constexpr = 8 if PAIRED else 4
        LIMBS: tl.constexpr = 4 * GROUP
        UNITS: tl.constexpr = ROWS // GROUP
        MORE_UNITS: tl.constexpr = MORE // GROUP
        # What the operands' sums lack is limbs' sums, see `operands`.
        MASKED: tl.constexpr = BITS == 1
        SHIFTED: tl.constexpr = BITS == 4 and ISA == "ptx"
        row_bytes = 16 * BITS

        t = tl.arange(0, TILES)
        byte = tl.arange(0, 32)[None, None, :]
        row0 = tl.program_id(1) * (ROWS + MORE)
        limb = tl.arange(0, LIMBS)[None, None, :]
        # (1, UNITS, 32) and (1, UNITS, LIMBS). Past the last row the last one once more, whose
        # scale is zero.
        row = row0 + GROUP * tl.arange(0, UNITS)[None, :, None] + byte // WIDTH
        scale_row = row0 + GROUP * tl.arange(0, UNITS)[None, :, None] + limb // 4
        # Addresses within TILES tiles stay far below 2^31: the 64-bit part moves from iteration to
        # iteration.
        tile_row = t[:, None, None] * n
        inside = (tile_row + tl.minimum(row, n - 1)) * row_bytes + byte % WIDTH
        acc = tl.zeros((TILES, UNITS, LIMBS), tl.float32)
        # Gradient and scales of the next tiles are loaded while this one's are used; codes are
        # further ahead, by STAGES.
        g = _load_gradient(g_ptr, left, TILES, STEPS, BITS, ISA)
        live = t[:, None, None] < count
        s = tl.load(
            scales + first * n + (tile_row + scale_row), mask=(scale_row < n) & live, other=0
        )
        if MORE > 0:
            more = row0 + ROWS + GROUP * tl.arange(0, MORE_UNITS)[None, :, None] + byte // WIDTH
            more_scale = row0 + ROWS + GROUP * tl.arange(0, MORE_UNITS)[None, :, None] + limb // 4
            more_inside = (tile_row + tl.minimum(more, n - 1)) * row_bytes + byte % WIDTH
            more_acc = tl.zeros((TILES, MORE_UNITS, LIMBS), tl.float32)
            more_s = tl.load(
                scales + first * n + (tile_row + more_scale), mask=(more_scale < n) & live, other=0
            )
        for done in tl.range(0, count, TILES, num_stages=STAGES):
            here = codes + (first + done) * n * row_bytes
            live = t[:, None, None] < count - done
            w = _load_rows(here, inside, live, BITS)
            if MORE > 0:
                more_w = _load_rows(here, more_inside, live, BITS)
            largest = magnitude(g[0])
            for step in tl.static_range(1, STEPS):
                largest = tl.maximum(largest, magnitude(g[step]))
            largest = tl.max(largest, 1)
            e = exponent_of(largest)
            unit = unit_of(largest, e)[:, None, None]
            q = ()
            low = tl.zeros((TILES, 32), tl.int32)
            high = low
            for step in tl.static_range(STEPS):
                fixed = to_fixed(g[step], e[:, None], ISA)
                if MASKED:  # evens 2^field out
                    low += fixed
                    fixed = -fixed if step == 7 else fixed << (7 - step)
                if SHIFTED:  # sums of limb + 128: of the third and the first, and of the second
                    biased = fixed + 0x808080
                    low += biased & 0xFF00FF
                    high += (biased >> 8) & 0xFF
                q = q + (_limb_columns(fixed, PAIRED),)
            scale = scale_of(s)
            if MORE > 0:
                more_of = scale_of(more_s)
            g_ptr += TILES * 128
            left -= TILES * 128
            g = _load_gradient(g_ptr, left, TILES, STEPS, BITS, ISA)
            ahead = scales + (first + done + TILES) * n
            live = t[:, None, None] < count - done - TILES
            s = tl.load(ahead + (tile_row + scale_row), mask=(scale_row < n) & live, other=0)
            if MORE > 0:
                more_s = tl.load(
                    ahead + (tile_row + more_scale), mask=(more_scale < n) & live, other=0
                )

            lack = tl.zeros((TILES, 1, LIMBS), tl.int32)
            if MASKED:  # 64 times the sum in digits of 8 bits, the last one whatever is left
                low = tl.sum(low, 1)[:, None, None]
                shifted = tl.where(limb % 4 == 0, low << 6, low >> tl.maximum(limb % 4 * 8 - 6, 0))
                lack = tl.where(limb % 4 == 3, shifted, shifted & 255)
            if SHIFTED:
                high = tl.sum(high, 1)[:, None, None]
                low = tl.sum(low, 1)[:, None, None]
                lack = tl.where(limb == 1, high, tl.where(limb == 2, low >> 16, low & 0xFFFF))
                lack -= 128 * 128
            exact = _products(w, q, lack, UNITS, BITS, ISA)
            acc += (exact.to(tl.float32) * scale) * unit
            if MORE > 0:
                exact = _products(more_w, q, lack, MORE_UNITS, BITS, ISA)
                more_acc += (exact.to(tl.float32) * more_of) * unit

        out = partial + item.to(tl.int64) * n
        _store_sums(out, acc, row0, n, TILES, ROWS, BITS)
        if MORE > 0:
            _store_sums(out, more_acc, row0 + ROWS, n, TILES, MORE, BITS)


@triton.jit
def _store_sums(out, acc, row0, n, TILES: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr):
    """Sums over limbs and tiles of the rows from row0 on."""
    limb = tl.arange(0, acc.shape[2])[None, None, :] % 4
    weight = tl.where(limb == 0, 1.0, tl.where(limb == 1, 256.0, 65536.0))
    weight = tl.where(limb == 3, 16777216.0 if BITS == 1 else 0.0, weight)
    sums = tl.sum((acc * weight).reshape(TILES, ROWS, 4), 2)
    row = row0 + tl.arange(0, ROWS)
    total = tl.sum(sums, 0)
    if BITS == 1:  # `_products` has 128 for each 127
        total *= 0.9921875
    tl.store(out + row, total, mask=row < n)


@triton.jit
def _item_sums(partial, begin, end, rows, n, ITEMS: tl.constexpr, ROWS: tl.constexpr):
    """Sum over items begin .. end - 1, float64, for `rows` (ROWS,)."""
    total = tl.zeros((ITEMS, ROWS), tl.float64)
    for first in tl.range(begin, end, ITEMS):
        item = first + tl.arange(0, ITEMS)
        mask = (item < end)[:, None] & (rows < n)[None, :]
        total += tl.load(
            partial + item[:, None].to(tl.int64) * n + rows[None, :], mask=mask, other=0
        ).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def segment_sums(partial, segment_begin, segment, rows, n, ITEMS: tl.constexpr, ROWS: tl.constexpr):
    """Sum over the items (or groups) of one segment, float64, for `rows` (ROWS,)."""
    begin = tl.load(segment_begin + segment)
    end = tl.load(segment_begin + segment + 1)
    return _item_sums(partial, begin, end, rows, n, ITEMS, ROWS)


@triton.jit(do_not_specialize=["n"])
def group_kernel(
    partial,  # (items, n) float32
    segment_begin,  # (L + 1,) int32: items of each segment
    groups,  # (L * GROUPS, n) float64
    n,
    GROUPS: tl.constexpr,
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums over runs of a segment's items, GROUPS of them: between the two stages."""
    group = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    begin = tl.load(segment_begin + group // GROUPS)
    end = tl.load(segment_begin + group // GROUPS + 1)
    items = tl.cdiv(end - begin, GROUPS * ITEMS) * ITEMS
    first = tl.minimum(begin + group % GROUPS * items, end)
    total = _item_sums(partial, first, tl.minimum(first + items, end), rows, n, ITEMS, ROWS)
    tl.store(groups + group.to(tl.int64) * n + rows, total, mask=rows < n)


@triton.jit(do_not_specialize=["n", "num_segments"])
def sum_kernel(
    partial,  # (items, n) float32, or (groups, n) float64
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


def partial_sums(basis: BasisView, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """First stage of project, without row_scale: sums and the first one of each segment.

    Per work item (items, n) float32; or, where one segment has so many that adding them would be a
    long chain of few programs, per group of them (groups, n) float64.
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
    rows, more, blocks = row_parts(n, config["rows"], least_rows(basis.bits))
    with launch.on_device():
        for dtype, addresses in groups.items():
            compiled = project_kernel[work.count, blocks](
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
                MORE=more,
                TILES=config["tiles"],
                STAGES=config["stages"],
                **launch.options(),
            )
            if compiled is not None:  # as it is under the interpreter
                _require_order(compiled)
    return _grouped(partial, work, basis)


#: runs of items that a segment is cut into, and from how many blocks of items in one segment on
GROUPS, LONG = 32, 4


def _grouped(partial: Tensor, work: Work, basis: BasisView) -> tuple[Tensor, Tensor]:
    launch, segments = Launch("sum", basis.bits, basis.device), basis.num_segments
    items, rows = launch.config["items"], launch.config["rows"]
    if work.most < LONG * items:
        return partial, work.segment_begin
    groups = partial.new_empty(segments * GROUPS, basis.n, dtype=torch.float64)
    with launch.on_device():
        group_kernel[segments * GROUPS, -(-basis.n // rows)](
            partial,
            work.segment_begin,
            groups,
            basis.n,
            GROUPS=GROUPS,
            ITEMS=items,
            ROWS=rows,
            **launch.options(fuse=False),
        )
    end = segments * GROUPS + 1
    return groups, torch.arange(0, end, GROUPS, dtype=torch.int32, device=basis.device)


_known_order: set[str] = set()


def _require_order(compiled: triton.compiler.CompiledKernel) -> None:
    """RuntimeError if this Triton laid out bytes in an order that the kernel does not know."""
    if compiled.hash not in _known_order:
        if not in_order(compiled.asm["ttgir"]):
            raise RuntimeError(
                f"Triton {triton.__version__} has a layout of int8 products that project's kernel"
                " does not know: use another version, or the CUDA kernels"
            )
        _known_order.add(compiled.hash)


def project(basis: BasisView, grads: Sequence[Tensor]) -> Tensor:
    partial, begin = partial_sums(basis, grads)
    c = torch.empty_like(basis.row_scale)
    launch = Launch("sum", basis.bits, basis.device)
    items, rows = launch.config["items"], launch.config["rows"]
    with launch.on_device():
        sum_kernel[basis.num_segments, -(-basis.n // rows)](
            partial,
            begin,
            basis.row_scale,
            c,
            basis.n,
            basis.num_segments,
            ITEMS=items,
            ROWS=rows,
            **launch.options(fuse=False),
        )
    return c
