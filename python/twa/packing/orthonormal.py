"""`basis="orthonormal"`: in each segment an orthonormal basis of the candidates' distances.

They are the distances from the center, which the basis of deltas has as its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import twa_kernels as tk
from twa_kernels.scaling import row_divisor

from ..basis.dense import AnyPacker, new_packer
from ..basis.feed import Feed
from ..basis.segments import Segments
from ..coordinates import Orthonormal
from ..distributed.host import HostMemory
from ..distributed.sharding import KeptBasis, Sharding
from ..io.averaging import not_finite
from ..io.errors import TwaError

PACK_COLUMNS = 1 << 15  # of Q in float32 at a time on the way to packed codes


def build(
    sharding: Sharding,
    centers: list[Tensor],
    segments: Segments,
    bits: int,
    normalize: str,
    weights: Tensor,
    feed: Feed,
    memory: HostMemory | None = None,
) -> tuple[KeptBasis, Orthonormal]:
    """The orthonormal basis, and its coordinates.

    Every tensor is read twice more than its center took, one at a time: for the Gram matrix, with a
    sample before it, and for Q. With packed bits Q is never dense in memory. Each rank feeds its
    own columns to Gram-Schmidt, so that all get the same factors, and keeps its part of Q.

    Args:
        sharding: the candidates, and which part of the basis this rank holds
        centers: float32, of this rank's columns of each tensor
        segments: of the trained tensors
        bits: of the basis
        normalize: "row" or "none"
        weights: (n,), the merge weights of the center
        feed: to the device where Gram-Schmidt runs and Q is packed, which has the centers
        memory: what ranks of one host share for it
    """
    flat = [c.view(-1) for c in centers]
    numels = [t.numel() for t in sharding.tensors]
    found = []
    for segment in range(len(segments.labels)):
        members = [k for k, l in enumerate(segments.first) if l == segment]
        columns = sum(numels[k] for k in members)
        # there are none of parameters without elements
        found.append(_of_segment(sharding, flat, members, feed) if columns else None)
    coordinates = _coordinates(found, normalize, weights)
    r, scale = coordinates.shape[0], coordinates.scale
    mine = sharding.local_rows(r)  # rows of Q that this rank keeps
    if mine.start == mine.stop:
        raise TwaError(
            f"sharding {sharding.name!r}: the orthonormal basis has {r} rows, fewer than there are"
            " ranks; use 'replicate' or 'columns'"
        )
    allocate = memory.allocate if memory else None
    packer = new_packer(
        mine.stop - mine.start, sharding.cut(segments), bits, segments, feed.device, allocate
    )

    def rows_of_q(k: int, columns: list[Tensor], begin: int) -> Tensor:
        """Some columns of tensor k, (n, count), as this rank's rows of Q there."""
        o = found[segments.first[k]]
        assert o is not None  # it has columns
        center = flat[k][begin : begin + columns[0].numel()]
        q = o.apply([columns], center=[center])[0]
        q = torch.nn.functional.pad(q, (0, 0, 0, r - len(q)))[mine]
        return q if bits != 32 else q * float(scale[segments.first[k]])

    _pack(sharding, packer, rows_of_q, feed)
    sharding.exchange(packer, centers, memory)
    basis = packer.finish("none", torch.ones_like(packer.sum_sq))
    if memory and isinstance(packer, tk.Packer):
        memory.settle(packer.codes, packer.scales)
    if isinstance(basis, tk.PackedBasis):
        row_scale = (basis.row_scale.double() * scale.to(feed.device)).float()
        basis = replace(basis, row_scale=row_scale)
    return basis, coordinates


def _coordinates(
    found: Sequence[tk.Orthonormal | None], normalize: str, weights: Tensor
) -> Orthonormal:
    """The coordinates of all segments' bases, None for a segment without columns.

    Rows are as long as those of the basis of deltas are on average (root mean square), so that the
    same learning rates fit.
    """
    n, num_segments = len(weights), len(found)
    r = max(1, max(o.rank if o else 0 for o in found))
    transform = torch.zeros(num_segments, r, n, dtype=torch.float64, device="cpu")
    R = torch.zeros(num_segments, n, r, dtype=torch.float64, device="cpu")
    for l, o in enumerate(found):
        if o is not None:
            transform[l, : o.rank], R[l, :, : o.rank] = o.transform, o.R
    scale = torch.ones(num_segments, dtype=torch.float64, device="cpu")
    if normalize != "none":
        sum_sq = R.square().sum(2).T  # (n, L): squared lengths of the deltas
        divisor = row_divisor(sum_sq, normalize)
        lengths_sq = sum_sq / divisor.clamp(min=1e-300).square()
        scale = torch.where(divisor > 0, lengths_sq, 0.0).mean(0).sqrt()
    dropped = tuple(o.dropped if o else () for o in found)
    return Orthonormal(weights, transform, R, scale, dropped)


def _pack(
    sharding: Sharding,
    packer: AnyPacker,
    rows_of_q: Callable[[int, list[Tensor], int], Tensor],
    feed: Feed,
) -> None:
    """Packs Q, PACK_COLUMNS columns at a time.

    Args:
        sharding: says which tensors this rank packs
        packer: takes Q
        rows_of_q: called with a tensor's index, columns of the candidates and the first column
        feed: to the packer's device
    """
    for k, blocks in sharding.packed_tensors(slice(0, len(sharding.candidates))):
        if blocks is None:
            packer.skip()
            continue
        for block in map(feed.block, blocks):
            count = block.end - block.begin
            for first in range(0, count, PACK_COLUMNS):
                at = slice(first, min(first + PACK_COLUMNS, count))
                begin = block.begin + first
                packer.add_columns(rows_of_q(k, [row[at] for row in block.rows], begin), begin)
        packer.end_tensor()


def _of_segment(
    sharding: Sharding, flat: list[Tensor], tensors: list[int], feed: Feed
) -> tk.Orthonormal:
    """The implicit basis of one segment, streamed in blocks of columns.

    Args:
        sharding: the candidates
        flat: the center of each tensor, (numel,)
        tensors: those of the segment
        feed: to the device where they are summed, which has the centers
    """
    fed = [k for k in tensors if sharding.sums_columns(k)]
    everything = slice(0, len(sharding.candidates))
    # of the pass under way: tensor and first column of each block, for messages
    read: list[tuple[int, int]] = []

    def rows() -> Iterator[list[Tensor]]:
        read.clear()
        for k, block in sharding.stream(fed, everything):
            read.append((k, block.begin))
            yield feed.rows(block.rows)
        if not fed:  # a rank without columns of this segment takes part all the same
            nothing = torch.zeros(0, dtype=torch.float32, device=feed.device)
            yield [nothing] * len(sharding.candidates)

    def center() -> Iterator[Tensor]:
        step = sharding.block_columns
        for k in fed:
            for begin in range(0, max(1, flat[k].numel()), step):
                yield flat[k][begin : begin + step]
        if not fed:
            yield torch.zeros(0, dtype=torch.float32, device=feed.device)

    def add_up(t: Tensor) -> None:
        sharding.ranks.all_reduce_(t)

    reduce = None if sharding.ranks.group is None else add_up
    try:
        return tk.orthonormalize(rows, center=center, form="implicit", reduce=reduce)
    except tk.NotFiniteError as error:
        k = read[error.tensor][0]
        raise not_finite(
            sharding.candidates, sharding.keys[k], sharding.read(k, everything)
        ) from error
