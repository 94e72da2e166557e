"""One read of the rows for block Gram-Schmidt.

V = W - parents, or T (W - parents); sums over columns of V V^T, of V (V^T probes^T), and of W^2.

    no transform           gram = V V^T                                     products_kernel
    transform              V = T V in float64, gram = V V^T                 transformed_kernel
    transform and `out`    V = T V, rounded and stored, V (V^T probes^T)    transformed_kernel

Work map   n <= 64: a program is a work item, a range of columns of all tensors joined; it holds all
           rows of a block of COLUMNS columns at a time, so that rows are read once, and all of them
           before any of the block is written: `out` may be the rows.
           More rows: products_kernel takes pairs of blocks of ROWS rows (work item, i, k <= i); a
           transform goes through a workspace, some columns of one tensor at a time
           (transform_kernel, a program MADE rows x COLUMNS columns), whose products are then formed
           like those of rows, and which is copied to `out` last.
Sums       float64 throughout, on the matrix units where they have it; or (FLOAT32) differences,
           transform and products in float32 over a block of columns, added in float64 after it.
           Squares are always sums in float64: float32 differences of float32 weights are multiples
           of a coarse unit, the roundings of their squares do not cancel, and float32 sums of them
           are off by 2e-8. Each item has its partial sums in global memory; how many items there
           are does not depend on the device, and they are added afterwards: no atomics.
Bytes      n <= 64: n * D * input read (again from the caches, as parents); r * D * output written.
           More rows: about n / 32 times that through the second-level cache, and norms_kernel reads
           the rows once more where there is a transform.
Precision  every product says "ieee", those of float64 too: for AMD, Triton 3.6 compiles no float64
           product that may be TF32, its default.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _addresses(rows, parent, center, tensor, row, n, HAS_CENTER: tl.constexpr):
    """(ROWS,) int64: addresses of rows of a tensor and of what is subtracted from them.

    0 past the last row, and where nothing is subtracted.
    """
    live = row < n
    own = tl.load(rows + tensor * n + row, mask=live, other=0)
    before = tl.load(parent + row, mask=live, other=-1)
    other = tl.load(rows + tensor * n + before, mask=before >= 0, other=0)
    if HAS_CENTER:
        other = tl.where(live & (before < 0), tl.load(center + tensor), other)
    return own, other


@triton.jit
def _block(address, column, end, DTYPE: tl.constexpr):
    """(ROWS, COLUMNS) of the rows at these addresses.

    Zero where the address is, and from column `end` on.
    """
    mask = (address != 0)[:, None] & (column < end)[None, :]
    at = address.to(tl.pointer_type(DTYPE))[:, None] + column[None, :]
    return tl.load(at, mask=mask, other=0)


@triton.jit
def _apart(v):
    """v, (ROWS, COLUMNS), as a sum of one term: free and exact.

    Triton does not look behind a sum for where an operand of tl.dot comes from. What it finds there
    misleads it before 3.9: of a narrower type it makes a layout in which float64 has no products,
    and on AMD 3.6 cannot hand one float64 product to the next.
    """
    return tl.sum(v[:, :, None], 2)


@triton.jit
def _wide(v, REAL: tl.constexpr):
    """v in the type of the sums, exactly."""
    if REAL == tl.float64 and v.dtype.primitive_bitwidth == 16:
        v = _apart(v.to(tl.float32))
    return v.to(REAL)


@triton.jit
def _squares(v):
    wide = v.to(tl.float64)
    return wide * wide


@triton.jit(do_not_specialize=["n", "m"])
def products_kernel(
    rows,  # (tensors, n) int64: addresses
    others,  # (tensors, m) int64: addresses of the right factor; not read if the rows are (SAME)
    parent,  # (n,) int32; not read without DIFFERENCES
    center,  # (tensors,) int64: addresses; not read without HAS_CENTER
    piece_tensor,  # (pieces,) int64
    piece_column,  # (pieces,) int64: first column of a piece in its tensor
    piece_end,  # (pieces,) int64: column after its last
    item_piece,  # (items + 1,) int32: first piece of each item
    partial,  # (items, n, m) float64: blocks k <= i only, if SAME
    squares,  # (items, 2, n) float64: of the rows, of the differences; written with DIFFERENCES
    n,
    m,
    DTYPE: tl.constexpr,
    OTHER: tl.constexpr,
    SAME: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    FLOAT32: tl.constexpr,
    ONE: tl.constexpr,  # all rows in one block
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    REAL: tl.constexpr = tl.float32 if FLOAT32 else tl.float64
    item = tl.program_id(0)
    i = tl.program_id(1)
    k = tl.program_id(2)
    if SAME:
        m = n  # a register less
    if k <= i or not SAME:
        row = i * ROWS + tl.arange(0, ROWS)
        other = k * OTHERS + tl.arange(0, OTHERS)
        total = tl.zeros((ROWS, OTHERS), tl.float64)
        of_rows = tl.zeros((ROWS, COLUMNS), tl.float64)  # summed over columns at the end
        of_differences = tl.zeros((ROWS, COLUMNS), tl.float64)
        for piece in tl.range(tl.load(item_piece + item), tl.load(item_piece + item + 1)):
            tensor = tl.load(piece_tensor + piece)
            end = tl.load(piece_end + piece)
            if DIFFERENCES:
                own_i, before_i = _addresses(rows, parent, center, tensor, row, n, HAS_CENTER)
                own_k, before_k = _addresses(rows, parent, center, tensor, other, n, HAS_CENTER)
            else:
                own_i = tl.load(rows + tensor * n + row, mask=row < n, other=0)
                own_k = tl.load(
                    (rows if SAME else others) + tensor * m + other, mask=other < m, other=0
                )
            for first in tl.range(tl.load(piece_column + piece), end, COLUMNS, num_stages=STAGES):
                column = first + tl.arange(0, COLUMNS)
                w = _block(own_i, column, end, DTYPE)
                a = _wide(w, REAL)
                if DIFFERENCES:
                    a -= _wide(_block(before_i, column, end, DTYPE), REAL)
                if ONE:
                    b = a
                else:
                    b = _wide(_block(own_k, column, end, OTHER), REAL)
                    if DIFFERENCES:
                        b -= _wide(_block(before_k, column, end, DTYPE), REAL)
                if FLOAT32:
                    total += tl.dot(a, tl.trans(b), input_precision="ieee").to(tl.float64)
                else:
                    total = tl.dot(
                        a, tl.trans(b), total, input_precision="ieee", out_dtype=tl.float64
                    )
                if DIFFERENCES:
                    if ONE or i == k:
                        of_rows += _squares(w)
                        if FLOAT32:
                            of_differences += _squares(a)
        at = (item.to(tl.int64) * n + row[:, None]) * m + other[None, :]
        tl.store(partial + at, total, mask=(row < n)[:, None] & (other < m)[None, :])
        if DIFFERENCES:
            if ONE or i == k:
                to = squares + item.to(tl.int64) * 2 * n + row
                tl.store(to, tl.sum(of_rows, 1), mask=row < n)
                tl.store(to + n, tl.sum(of_differences, 1), mask=row < n)


@triton.jit(do_not_specialize=["n", "r", "skip"])
def transformed_kernel(
    rows,  # (tensors, n) int64: addresses
    center,  # (tensors,) int64: addresses; not read without HAS_CENTER
    out,  # (tensors, r) int64: addresses; not read without STORE
    parent,  # (n,) int32
    transform,  # (r, n) float64
    probes,  # (PROBES, r) float64; not read without STORE
    piece_tensor,  # (pieces,) int64
    piece_column,  # (pieces,) int64: first column of a piece in its tensor
    piece_end,  # (pieces,) int64: column after its last
    item_piece,  # (items + 1,) int32: first piece of each item
    partial,  # (items, r, r) float64, or with STORE (items, r, PROBES)
    squares,  # (items, n) float64: of the rows
    n,
    r,
    skip,  # rows of `out` before this one are not stored
    DTYPE: tl.constexpr,
    OUT: tl.constexpr,
    STORE: tl.constexpr,
    IN_PLACE: tl.constexpr,  # `out` is the rows
    HAS_CENTER: tl.constexpr,
    FLOAT32: tl.constexpr,
    ROWS: tl.constexpr,  # at least n
    PROBES: tl.constexpr,
    PADDED: tl.constexpr,  # PROBES, as matrix units want them
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    REAL: tl.constexpr = tl.float32 if FLOAT32 else tl.float64
    WIDTH: tl.constexpr = PADDED if STORE else ROWS
    item = tl.program_id(0)
    row = tl.arange(0, ROWS)
    t = tl.load(
        transform + row[:, None] * n + row[None, :],
        mask=(row < r)[:, None] & (row < n)[None, :],
        other=0,
    ).to(REAL)
    if STORE:
        probe = tl.arange(0, WIDTH)
        z = tl.load(
            probes + probe[:, None] * r + row[None, :],
            mask=(probe < PROBES)[:, None] & (row < r)[None, :],
            other=0,
        ).to(REAL)
    total = tl.zeros((ROWS, WIDTH), tl.float64)
    of_rows = tl.zeros((ROWS, COLUMNS), tl.float64)
    for piece in tl.range(tl.load(item_piece + item), tl.load(item_piece + item + 1)):
        tensor = tl.load(piece_tensor + piece)
        end = tl.load(piece_end + piece)
        own, before = _addresses(rows, parent, center, tensor, row, n, HAS_CENTER)
        if STORE:
            to = tl.load(out + tensor * r + row, mask=(row >= skip) & (row < r), other=0)
        for first in tl.range(tl.load(piece_column + piece), end, COLUMNS, num_stages=STAGES):
            column = first + tl.arange(0, COLUMNS)
            w = _block(own, column, end, DTYPE)
            of_rows += _squares(w)
            v = _wide(w, REAL) - _wide(_block(before, column, end, DTYPE), REAL)
            q = tl.dot(t, v, input_precision="ieee", out_dtype=REAL)
            if STORE:
                rounded = q.to(tl.float32).to(OUT)
                if IN_PLACE:
                    # Every thread has read its columns of the rows; and no block is read ahead.
                    tl.debug_barrier()
                mask = (to != 0)[:, None] & (column < end)[None, :]
                tl.store(to.to(tl.pointer_type(OUT))[:, None] + column[None, :], rounded, mask=mask)
                x = rounded.to(tl.float32)
                x = x if FLOAT32 else _apart(x).to(REAL)
                u = tl.dot(z, x, input_precision="ieee", out_dtype=REAL)
                if FLOAT32:
                    total += tl.dot(x, tl.trans(u), input_precision="ieee").to(tl.float64)
                else:
                    total = tl.dot(
                        x, tl.trans(u), total, input_precision="ieee", out_dtype=tl.float64
                    )
            else:
                q = _apart(q)
                total = tl.dot(q, tl.trans(q), total, input_precision="ieee", out_dtype=tl.float64)
    width = PROBES if STORE else r
    place = tl.arange(0, WIDTH)
    at = (item.to(tl.int64) * r + row[:, None]) * width + place[None, :]
    tl.store(partial + at, total, mask=(row < r)[:, None] & (place < width)[None, :])
    tl.store(squares + item.to(tl.int64) * n + row, tl.sum(of_rows, 1), mask=row < n)


@triton.jit(do_not_specialize=["tensor", "begin", "end", "n", "r"])
def transform_kernel(
    rows,  # (tensors, n) int64: addresses
    parent,  # (n,) int32; not read without DIFFERENCES
    center,  # (tensors,) int64: addresses; not read without HAS_CENTER
    transform,  # (r, n) float64
    # (blocks of r rows,) int32: columns of the transform from here on are zero in a block's rows
    extent,
    to,  # (r, end - begin) OUT
    tensor,
    begin,  # first column, of one tensor
    end,
    n,
    r,
    DTYPE: tl.constexpr,
    OUT: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    FLOAT32: tl.constexpr,
    MADE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`to` = transform times differences, or times rows: for more rows than a program can hold.

    A program makes MADE rows of COLUMNS columns.
    """
    REAL: tl.constexpr = tl.float32 if FLOAT32 else tl.float64
    column = begin + tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    made = tl.program_id(1) * MADE + tl.arange(0, MADE)
    acc = tl.zeros((MADE, COLUMNS), REAL)
    tensor = tensor.to(tl.int64)
    for first in tl.range(0, tl.load(extent + tl.program_id(1)), ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (made < r)[:, None] & (row < n)[None, :]
        of_block = transform + made.to(tl.int64)[:, None] * n + row[None, :]
        t = tl.load(of_block, mask=mask, other=0).to(REAL)
        if DIFFERENCES:
            own, before = _addresses(rows, parent, center, tensor, row, n, HAS_CENTER)
            v = _wide(_block(own, column, end, DTYPE), REAL)
            v -= _wide(_block(before, column, end, DTYPE), REAL)
        else:
            own = tl.load(rows + tensor * n + row, mask=row < n, other=0)
            v = _wide(_block(own, column, end, DTYPE), REAL)
        acc = tl.dot(t, v, acc, input_precision="ieee", out_dtype=REAL)
    at = to + made.to(tl.int64)[:, None] * (end - begin) + (column - begin)[None, :]
    value = acc if OUT == tl.float64 else acc.to(tl.float32).to(OUT)
    tl.store(at, value, mask=(made < r)[:, None] & (column < end)[None, :])


@triton.jit(do_not_specialize=["n"])
def norms_kernel(
    rows,  # (tensors, n) int64: addresses
    piece_tensor,  # (pieces,) int64
    piece_column,  # (pieces,) int64: first column of a piece in its tensor
    piece_end,  # (pieces,) int64: column after its last
    item_piece,  # (items + 1,) int32: first piece of each item
    squares,  # (items, n) float64
    n,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    item = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    for piece in tl.range(tl.load(item_piece + item), tl.load(item_piece + item + 1)):
        end = tl.load(piece_end + piece)
        own = tl.load(rows + tl.load(piece_tensor + piece) * n + row, mask=row < n, other=0)
        for first in tl.range(tl.load(piece_column + piece), end, COLUMNS):
            total += _squares(_block(own, first + tl.arange(0, COLUMNS), end, DTYPE))
    tl.store(squares + item.to(tl.int64) * n + row, tl.sum(total, 1), mask=row < n)
