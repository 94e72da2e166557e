"""From tensors to launches: work items, tables of addresses, the numbers that go with a device."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import capture
from ...layout import check_segments, tile_offsets
from ...operands import BasisView
from ..tensors import Recent, current_stream, kept, on_device
from .config import architecture, configuration, isa

K = TypeVar("K", bound=Hashable)

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


@dataclass(frozen=True)
class Work:
    """Work items of one basis, on its device.

    An item is up to `size` tiles of one tensor and one segment; items are ordered by segment.
    """

    tensor: Tensor  # (items,) int32
    tile: Tensor  # (items,) int64: first tile in the basis
    tiles: Tensor  # (items,) int32
    segment: Tensor  # (items,) int32
    segment_begin: Tensor  # (L + 1,) int32: first item of each segment
    numel: Tensor  # (tensors,) int64
    tile_begin: Tensor  # (tensors,) int64
    most: int  # items of the segment that has most

    @property
    def count(self) -> int:
        return len(self.tensor)


def _build(tile_segment: Tensor, numels: Sequence[int], num_segments: int, size: int) -> Work:
    offsets = torch.tensor(tile_offsets(numels), dtype=torch.int64, device="cpu")
    segment, tiles = tile_segment.cpu().long(), int(offsets[-1])
    check_segments(segment, num_segments)
    # A run starts where a tensor or a segment does, an item every `size` tiles of a run.
    starts = torch.zeros(tiles, dtype=torch.bool, device="cpu")
    starts[offsets[:-1][offsets[:-1] < tiles]] = True
    starts[1:] |= segment[1:] != segment[:-1]
    run = torch.nonzero(starts)[:, 0]
    length = torch.diff(run, append=torch.tensor([tiles], dtype=torch.int64, device="cpu"))
    pieces = (length + size - 1) // size
    which = torch.repeat_interleave(torch.arange(len(run), device="cpu"), pieces)
    piece = torch.arange(len(which), device="cpu") - (pieces.cumsum(0) - pieces)[which]
    tile = run[which] + piece * size
    count = (length[which] - piece * size).clamp(max=size)
    if tiles:
        order = torch.argsort(segment[tile], stable=True)
    else:
        order = torch.empty(0, dtype=torch.int64, device="cpu")
    tile, count = tile[order], count[order]
    # Tensors without columns have no tile.
    tensor = torch.searchsorted(offsets[1:], tile, right=True)
    every = torch.arange(num_segments + 1, device="cpu")
    begin = torch.searchsorted(segment[tile].contiguous(), every)
    put = functools.partial(Tensor.to, device=tile_segment.device)
    return Work(
        put(tensor.int()),
        put(tile),
        put(count.int()),
        put(segment[tile].int()),
        put(begin.int()),
        put(torch.tensor(list(numels), dtype=torch.int64, device="cpu")),
        put(offsets[:-1].clone()),
        int(begin.diff().max()),
    )


def items_of(tile_segment: Tensor, numels: Sequence[int], num_segments: int, size: int) -> Work:
    """Work items of tensors of these sizes, made on the first call.

    That call reads tile_segment back, which waits for the device.
    """
    key = ("triton", tuple(numels), num_segments, size)
    return kept(tile_segment, key, lambda: _build(tile_segment, numels, num_segments, size))


def work_items(basis: BasisView, size: int) -> Work:
    """Work items of a basis, as `items_of`."""
    return items_of(basis.tile_segment, basis.numels, basis.num_segments, size)


_tables = Recent()


def address_table(addresses: Sequence[int], device: torch.device) -> Tensor:
    """(tensors,) int64 on the device: addresses, or other numbers.

    The copy is not waited for, and only its own stream is sure to come after it: each stream has
    tables of its own. A CUDA graph knows only the table's address, so it gets one made by kernels
    that have the addresses as arguments.
    """
    if capture.capturing(device):
        table = torch.zeros(len(addresses), dtype=torch.int64, device=device)
        torch._foreach_add_(list(table.unbind()), list(addresses))
        return table

    def make() -> Tensor:
        table = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table

    key = (tuple(addresses), device, current_stream(device))
    return _tables.get(key, len(addresses), make)


@dataclass(frozen=True)
class Pieces:
    """Work items of up to so many tiles of one tensor, which a program finds by their number.

    Three tables, so that a CUDA graph can have its own of each.
    """

    numel: Tensor  # (tensors,) int64
    tile_begin: Tensor  # (tensors,) int64
    item_begin: Tensor  # (tensors,) int64: first item of each tensor
    tensors: int
    items: int

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """As the kernels take them; the last one is the number of tensors."""
        return self.numel, self.tile_begin, self.item_begin, self.tensors


def pieces_of(numels: Sequence[int], size: int, device: torch.device) -> Pieces:
    """Items of up to `size` tiles of tensors of these sizes."""
    tiles = tile_offsets(numels)
    items = [0]
    for first, end in itertools.pairwise(tiles):
        items.append(items[-1] - -(end - first) // size)

    def put(numbers: Sequence[int]) -> Tensor:
        return address_table(numbers, device)

    return Pieces(put(numels), put(tiles[:-1]), put(items[:-1]), len(numels), items[-1])


@triton.jit
def tensor_of(begin, count, at):
    """Last k < count with begin[k] <= at, int32: the tensor of an item."""
    low = count * 0
    high = count
    while low + 1 < high:
        middle = (low + high) // 2
        before = tl.load(begin + middle) <= at
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@dataclass(frozen=True)
class Columns:
    """Work items that are ranges of the columns of all tensors joined.

    An item has as many pieces as there are tensors in its range.
    """

    tensor: Tensor  # (pieces,) int64
    column: Tensor  # (pieces,) int64: first column in the tensor, a multiple of a block
    end: Tensor  # (pieces,) int64
    piece: Tensor  # (items + 1,) int32: first piece of each item

    @property
    def count(self) -> int:
        return len(self.piece) - 1

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return self.tensor, self.column, self.end, self.piece


@functools.lru_cache(maxsize=64)
def column_items(
    numels: tuple[int, ...], block: int, least: int, most: int, device: torch.device, stream: int
) -> Columns:
    """At most about `most` items of at least about `least` columns, the same on every device.

    They are cut at multiples of `block` in a tensor. Per stream: what the cache drops, the same
    stream may still be reading when its memory is used again, and no other one.
    """
    per_item = max(least, -(-sum(numels) // most))
    tensor: list[int] = []
    column: list[int] = []
    ends: list[int] = []
    piece, room = [0], per_item
    for t, numel in enumerate(numels):
        at = 0
        while at < numel:
            if room <= 0:
                piece.append(len(tensor))
                room = per_item
            take = min(-(-room // block) * block, numel - at)
            tensor.append(t)
            column.append(at)
            ends.append(at + take)
            at, room = at + take, room - take
    if tensor:
        piece.append(len(tensor))
    put = functools.partial(torch.tensor, dtype=torch.int64, device=device)
    begins = torch.tensor(piece, dtype=torch.int32, device=device)
    return Columns(put(tensor), put(column), put(ends), begins)


def by_dtype(tensors: Sequence[Tensor], keys: Sequence[K]) -> dict[K, list[int]]:
    """Addresses of the tensors per key, 0 where a tensor has another one.

    One launch per key leaves the other tensors alone.
    """
    groups: dict[K, list[int]] = {}
    for k, (t, key) in enumerate(zip(tensors, keys, strict=True)):
        if t.numel():
            if key not in groups:
                groups[key] = [0] * len(tensors)
            groups[key][k] = t.data_ptr()
    return groups


class Launch:
    """What a kernel's launch needs besides its operands.

    Configuration, ISA, options of the compiler.
    """

    def __init__(self, op: str, bits: int, device: torch.device) -> None:
        arch = architecture(device)
        self.device, self.isa = device, isa(arch)
        self.config = configuration(op, bits, arch)

    def options(self, fuse: bool = True) -> dict[str, int | bool]:
        """Options of the compiler. fuse: a * b + c may be rounded once."""
        return {"num_warps": self.config["warps"], "enable_fp_fusion": fuse}

    def on_device(self) -> AbstractContextManager[object]:
        """Context in which this device is the current one."""
        return on_device(self.device)
