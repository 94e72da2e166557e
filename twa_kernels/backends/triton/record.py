"""record: codes and scales of weights - reference; then reference += scale * level.

Work map   program = work item: TILES tiles of one tensor. First look_kernel counts groups with a
           weight that cannot be recorded; record_kernel reads that count and does nothing where it
           is not 0. A launch of each for every dtype among the weights.
Rounding   as quantise.py says; scale * level is exact in float32, so the sum is the one rounding.
Bytes      D * (2 * input + 4) read, D * (4 + bits / 8 + 2 / 128) written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...operands import RecordArgs
from ..tensors import odd_ones, readable
from .launch import DTYPES, Launch, address_table, by_dtype, pieces_of, tensor_of
from .quantise import quantise, store_codes
from .words import magnitude


@triton.jit
def _tiles_of(numel, item_begin, tensor, item, TILES: tl.constexpr):
    """Of an item's tiles: their numbers in the tensor; columns, where they are real, the tensor's.

    (TILES,), (TILES, 128), (TILES, 128), ().
    """
    columns = tl.load(numel + tensor)
    t = (item - tl.load(item_begin + tensor)) * TILES + tl.arange(0, TILES)
    at = t[:, None] * 128 + tl.arange(0, 128)[None, :]
    return t, at, at < columns, columns


@triton.jit(do_not_specialize=["count"])
def look_kernel(
    weights,  # (tensors,) int64: addresses, 0 for what this launch leaves alone
    numel,  # (tensors,) int64
    tile_begin,  # (tensors,) int64
    item_begin,  # (tensors,) int64
    count,  # tensors
    bad,  # () int32: groups with such a weight are added
    DTYPE: tl.constexpr,
    TILES: tl.constexpr,
):
    item = tl.program_id(0)
    tensor = tensor_of(item_begin, count, item)
    address = tl.load(weights + tensor)
    if address != 0:
        _, at, real, _ = _tiles_of(numel, item_begin, tensor, item, TILES)
        v = tl.load(address.to(tl.pointer_type(DTYPE)) + at, mask=real, other=0).to(tl.float32)
        largest = tl.max(magnitude(v), 1)
        found = tl.sum((largest >= 0x7E800000).to(tl.int32), 0)  # 2^126
        if found > 0:
            tl.atomic_add(bad, found)  # integers: in any order


@triton.jit(do_not_specialize=["count"])
def record_kernel(
    weights,  # (tensors,) int64: addresses, 0 for what this launch leaves alone
    reference,  # (tensors,) int64: addresses of float32, updated
    numel,  # (tensors,) int64
    tile_begin,  # (tensors,) int64
    item_begin,  # (tensors,) int64
    count,  # tensors
    codes,  # (num_tiles, 16 * BITS) uint8
    scales,  # (num_tiles,) bfloat16
    bad,  # () int32
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    TILES: tl.constexpr,
):
    if tl.load(bad) == 0:
        item = tl.program_id(0)
        tensor = tensor_of(item_begin, count, item)
        address = tl.load(weights + tensor)
        if address != 0:
            t, at, real, columns = _tiles_of(numel, item_begin, tensor, item, TILES)
            to = tl.load(reference + tensor).to(tl.pointer_type(tl.float32)) + at
            before = tl.load(to, mask=real, other=0.0)
            w = tl.load(address.to(tl.pointer_type(DTYPE)) + at, mask=real, other=0).to(tl.float32)
            valid = tl.minimum(tl.maximum(columns - t * 128, 1), 128)
            code, level, scale, _, _, _ = quantise(w - before, real, valid, BITS, TILES)
            live = t * 128 < columns
            group = tl.load(tile_begin + tensor) + t  # (TILES,)
            store_codes(codes, group, code, live, BITS, TILES)
            tl.store(scales + group, scale.to(tl.bfloat16), mask=live)
            tl.store(to, before + scale[:, None] * level.to(tl.float32), mask=real)


def record(args: RecordArgs) -> None:
    weights, device = readable(args.weights, odd_ones(args.weights)), args.device
    look, launch = (Launch(op, args.bits, device) for op in ("look", "record"))
    args.bad.zero_()
    with launch.on_device():
        by = {
            dtype: address_table(addresses, device)
            for dtype, addresses in by_dtype(weights, [w.dtype for w in weights]).items()
        }
        tiles = look.config["tiles"]
        pieces = pieces_of(args.numels, tiles, device)
        for dtype, table in by.items():
            look_kernel[pieces.items,](
                table,
                *pieces.operands,
                args.bad,
                DTYPE=DTYPES[dtype],
                TILES=tiles,
                **look.options(),
            )
        tiles = launch.config["tiles"]
        pieces = pieces_of(args.numels, tiles, device)
        reference = address_table([r.data_ptr() for r in args.reference], device)
        for dtype, table in by.items():
            record_kernel[pieces.items,](
                table,
                reference,
                *pieces.operands,
                args.codes,
                args.scales,
                args.bad,
                BITS=args.bits,
                DTYPE=DTYPES[dtype],
                TILES=tiles,
                **launch.options(fuse=False),
            )
