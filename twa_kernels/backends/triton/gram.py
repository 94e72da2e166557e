"""G[l, i, k] = sum over columns j of segment l of P[i, j] P[k, j], on packed words.

Before row_scale.

Work map   program (work item, block of ROWS rows i, block of ROWS rows k); int8 levels meet on the
           matrix units, a tile at a time.
Sums       a tile's exact int32 sums times both scales are added in float32 over the tiles of an
           item; items in float64, in their order.
Bytes      n * D * (bits / 8 + 1 / 128), once per pair of blocks.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...operands import BasisView
from .config import rows_per_program
from .launch import Launch, work_items
from .unpack import levels_at
from .words import scale_of


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["scales"])
def gram_kernel(
    codes,  # (num_tiles, n, 16 * BITS) uint8
    scales,  # (num_tiles, n) uint8
    numel,  # (tensors,) int64
    tile_begin,  # (tensors,) int64
    item_tensor,  # (items,) int32
    item_tile,  # (items,) int64
    item_tiles,  # (items,) int32
    partial,  # (items, n, n) float32
    n,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    item = tl.program_id(0)
    tensor = tl.load(item_tensor + item)
    first = tl.load(item_tile + item)
    # Columns from here to the tensor's end.
    left = tl.load(numel + tensor) - (first - tl.load(tile_begin + tensor)) * 128
    row_i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_k = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    i = tl.minimum(row_i, n - 1)
    k = tl.minimum(row_k, n - 1)
    column = tl.arange(0, 128)
    acc = tl.zeros((ROWS, ROWS), tl.float32)
    for done in tl.range(0, tl.load(item_tiles + item)):
        tile = (first + done) * n
        a = levels_at(codes + (tile + i)[:, None] * (16 * BITS), column[None, :], BITS)
        b = levels_at(codes + (tile + k)[None, :] * (16 * BITS), column[:, None], BITS)
        # Zero on one side is enough: padding then counts for nothing.
        a = tl.where((column < left - done * 128)[None, :], a, 0).to(tl.int8)
        exact = tl.dot(a, b, out_dtype=tl.int32).to(tl.float32)
        scale_i = scale_of(tl.load(scales + tile + i))[:, None]
        acc += exact * (scale_i * scale_of(tl.load(scales + tile + k))[None, :])
    at = (item.to(tl.int64) * n + row_i[:, None]) * n + row_k[None, :]
    tl.store(partial + at, acc, mask=(row_i < n)[:, None] & (row_k < n)[None, :])


def gram(basis: BasisView) -> Tensor:
    launch, n = Launch("gram", basis.bits, basis.device), basis.n
    work = work_items(basis, launch.config["item"])
    partial = torch.empty(work.count, n, n, dtype=torch.float32, device=basis.device)
    rows = rows_per_program(n, launch.config["rows"])
    blocks = -(-n // rows)
    if work.count:
        with launch.on_device():
            gram_kernel[work.count, blocks, blocks](
                basis.codes,
                basis.scales,
                work.numel,
                work.tile_begin,
                work.tensor,
                work.tile,
                work.tiles,
                partial,
                n,
                BITS=basis.bits,
                ROWS=rows,
                **launch.options(),
            )
    scale = basis.row_scale.double().T  # (L, n)
    at = work.segment_begin.tolist()
    total = torch.stack(
        [partial[first:last].sum(0, dtype=torch.float64) for first, last in itertools.pairwise(at)]
    )
    return total * scale[:, :, None] * scale[:, None, :]
