"""From candidates to a basis, in one stream of their tensors; an orthonormal one takes three."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import twa_kernels as tk
from twa_kernels.layout import tile_offsets
from twa_kernels.scaling import row_divisor

from ..basis.dense import AnyPacker, new_packer
from ..basis.feed import Feed
from ..basis.pieces import Pieces
from ..basis.segments import Segments
from ..coordinates import Coordinates, Deltas, Differences
from ..distributed.host import HostMemory
from ..distributed.sharding import KeptBasis, Sharding
from ..io.averaging import not_finite
from ..io.candidates import Block
from . import differences, orthonormal

Progress = Callable[[str, int], None]
#: packs a block of tensor k and writes its center: (packer, k, block, weights, center)
Pack = Callable[[AnyPacker, int, Block, Tensor, Tensor], None]


@dataclass(frozen=True)
class Built:
    """A basis, or this rank's rows and columns of it.

    Attributes:
        basis: the rows of P
        coordinates: how coefficients, rows of P and merge weights make each other
        center: float32, of this rank's columns; None on a rank that adds none
        pieces: this rank's columns as the basis has them
    """

    basis: KeptBasis
    coordinates: Coordinates
    center: list[Tensor] | None
    pieces: Pieces


@torch.no_grad()  # a .pt file may hold parameters, which ask for gradients
def build(
    sharding: Sharding,
    segments: Segments,
    bits: int,
    basis: str,
    normalize: str,
    weights: Tensor,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> Built:
    """The basis of some candidates around a center; ranks call it together.

    Candidates are read on the CPU, and a block at a time is on the device.

    Args:
        sharding: the candidates, and which part of the basis this rank holds
        segments: of the trained tensors
        bits: of the basis
        basis: what its rows are, "deltas", "differences" or "orthonormal"
        normalize: "row" or "none", see `Subspace.from_candidates`
        weights: (n,), the merge weights of the center
        progress: called with (key of the tensor, bytes read)
        device: where it is built, basis and center; None: see `usual_device`
    """
    feed = Feed(usual_device(sharding.device) if device is None else device)
    n, shapes = len(sharding.candidates), [shard.shape for shard in sharding.shards]
    memory = None
    if bits != 32:
        memory = sharding.host_memory(_most_bytes(n, shapes, bits), feed.device)
    options = (segments, bits, normalize, weights, progress, feed, memory)
    if basis == "deltas":
        return _in_one_stream(sharding, n, sharding.pack, Deltas, *options)
    if basis == "differences":
        differences.check(sharding)
        return _in_one_stream(sharding, n - 1, differences.pack, Differences, *options)
    centers = _centers(sharding, weights, progress, feed, memory)
    made, rows = orthonormal.build(
        sharding, centers, segments, bits, normalize, weights, feed, memory
    )
    return Built(made, rows, sharding.local_center(centers), Pieces.of_whole(shapes))


@torch.no_grad()
def build_center(
    sharding: Sharding,
    weights: Tensor,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> list[Tensor] | None:
    """The center of some candidates alone, float32; ranks call it together.

    Args:
        sharding: the candidates, and which part of it this rank holds
        weights: (n,), the merge weights of the center
        progress: called with (key of the tensor, bytes read)
        device: where it is made; None: see `usual_device`
    """
    feed = Feed(usual_device(sharding.device) if device is None else device)
    size = 4 * sum(shard.shape.numel() for shard in sharding.shards) + mmap.PAGESIZE
    memory = sharding.host_memory(size, feed.device)
    centers = _centers(sharding, weights, progress, feed, memory)
    sharding.share([[center] for center in centers], memory)
    sharding.ranks.barrier()  # others of this host may have written last
    return sharding.local_center(centers)


def usual_device(device: torch.device) -> torch.device:
    """Where a basis for a model on this device is built: there, if it has kernels; else the CPU."""
    return device if tk.registry.default_backend("pack", device.type) else torch.device("cpu")


def _in_one_stream(
    sharding: Sharding,
    n: int,
    pack: Pack,
    kind: Callable[[Tensor, Tensor], Coordinates],
    segments: Segments,
    bits: int,
    normalize: str,
    weights: Tensor,
    progress: Progress | None,
    feed: Feed,
    memory: HostMemory | None,
) -> Built:
    """A basis of n rows that are made of some columns at a time, as the center is.

    Args:
        sharding, segments, bits, normalize, weights, progress: as for `build`
        feed: to the device where it is built
        memory: what ranks of one host share for it
        n: rows of P
        pack: makes codes and center of a block
        kind: makes the coordinates of the center's weights and the divisor (n, L)
    """
    rows = sharding.local_rows(n)
    cut = sharding.cut(segments, dense=bits == 32)
    pieces, allocate = cut.pieces, memory.allocate if memory else None
    packer = new_packer(rows.stop - rows.start, cut, bits, segments, feed.device, allocate)
    centers = _no_centers(sharding, feed.device, memory)
    recorded = differences.recorded(sharding, bits) if kind is Differences else {}
    recorded = {k: place for k, place in recorded.items() if len(pieces.of(k)) == 1}
    for k, blocks in _tensors(sharding, progress, feed, recorded.keys()):
        if blocks is None:
            packer.skip()
            continue
        before = packer.sum_sq.clone()
        if k in recorded and isinstance(packer, tk.Packer):
            differences.take(packer, sharding, k, recorded[k], weights, centers[k], progress, feed)
        for begin, block in pieces.blocks(k, blocks):
            if begin and not block.begin:
                packer.end_tensor()  # the piece before
            center = centers[k].view(-1)[begin : begin + block.end - block.begin]
            try:
                pack(packer, k, block, weights, center)
            except tk.NotFiniteError as error:
                raise _where(sharding, k) from error
        packer.end_tensor()
        if not sharding.shards[k].counts:  # another rank holds these columns, too
            packer.sum_sq.copy_(before)
    sharding.exchange(packer, centers, memory)
    divisor = row_divisor(sharding.sum_sq(packer).cpu(), normalize)
    basis = packer.finish(normalize, divisor[rows])
    if memory and isinstance(packer, tk.Packer):
        memory.settle(packer.codes, packer.scales)
    return Built(basis, kind(weights, divisor), sharding.local_center(centers), pieces)


def _most_bytes(n: int, shapes: Sequence[torch.Size], bits: int) -> int:
    """Bytes of n packed rows and their center, and of the scales as they are packed."""
    numels = [shape.numel() for shape in shapes]
    row = 16 * bits + 1 + 2  # of a tile
    return tile_offsets(numels)[-1] * n * row + 4 * sum(numels) + 4 * mmap.PAGESIZE


def _no_centers(
    sharding: Sharding, device: torch.device, memory: HostMemory | None
) -> list[Tensor]:
    """A place for the center of this rank's columns, float32."""
    shapes = [shard.shape for shard in sharding.shards]
    if memory is None or memory.allocate is None:
        return [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
    numels = [shape.numel() for shape in shapes]
    parts = memory.allocate((sum(numels),), torch.float32).split(numels)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _centers(
    sharding: Sharding,
    weights: Tensor,
    progress: Progress | None,
    feed: Feed,
    memory: HostMemory | None,
) -> list[Tensor]:
    """The center of this rank's columns, float32."""
    centers = _no_centers(sharding, feed.device, memory)
    for k, blocks in _tensors(sharding, progress, feed):
        for block in blocks or ():
            try:
                made = sharding.center(k, block.rows, weights)
            except tk.NotFiniteError as error:
                raise _where(sharding, k) from error
            centers[k].view(-1)[block.begin : block.end] = made
    return centers


def _tensors(
    sharding: Sharding, progress: Progress | None, feed: Feed, but: Collection[int] = ()
) -> Iterator[tuple[int, Iterator[Block] | None]]:
    """`packed_tensors` by way of `feed`, with progress as blocks are read; none of `but`."""

    def counted(k: int, blocks: Iterator[Block]) -> Iterator[Block]:
        for block in blocks:
            yield feed.block(block)
            if progress:
                progress(sharding.keys[k], sum(r.nbytes for r in block.rows))

    for k, blocks in sharding.packed_tensors(but=but):
        yield k, None if blocks is None else counted(k, blocks)


def _where(sharding: Sharding, k: int) -> Exception:
    """The error that says which candidate's tensor k holds NaN or Inf."""
    return not_finite(sharding.candidates[sharding.rows], sharding.keys[k], sharding.read(k))
