"""`basis="orthonormal"`: in each segment an orthonormal basis of the candidates' distances from the
center, instead of the distances themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import twa_kernels as tk
from twa_kernels.columns import PACK_COLUMNS
from twa_kernels.packed import row_divisor

from ..basis.dense import DenseBasis, new_packer
from ..basis.segments import Segments
from ..distributed.sharding import Placement
from ..distributed.weights import not_finite


@dataclass(frozen=True)
class Coordinates:
    """What the coefficients of an orthonormal basis are in terms of the candidates; float64.

    Rows beyond a segment's rank are zero.

    transform  (L, r, n): Q_l = transform_l @ (W_l - center_l), P_l = scale_l * Q_l
    R          (L, n, r): W_l - center_l = R_l @ Q_l
    scale      (L,)
    dropped    per segment, the candidates that depend on earlier ones there, with their relative
               distances
    """

    transform: Tensor
    R: Tensor
    scale: Tensor
    dropped: tuple[tuple[tuple[int, float], ...], ...]

    def shares(self, x: Tensor) -> Tensor:
        """Coefficients x (r, L) -> s (n, L) with theta = center + sum_i s[i, l] (w_i - center)."""
        return torch.einsum("lri,rl->il", self.transform, x.double().cpu() * self.scale)

    def coefficients(self, shares: Tensor) -> Tensor:
        """s (n, L) -> x (r, L): exactly, also for candidates that were dropped."""
        inverse = torch.where(self.scale > 0, 1 / self.scale, 0.0)
        return torch.einsum("lir,il->rl", self.R, shares.double().cpu()) * inverse


def build(
    place: Placement, centers: list[Tensor], segments: Segments, bits: int, normalize: str
) -> tuple[tk.PackedBasis | DenseBasis, Coordinates]:
    """Reads every tensor twice more than its center took (Gram matrix with a sample before it, then
    Q), one at a time. Packed bits: Q is never dense in memory. Each rank feeds its own columns to
    Gram-Schmidt, so that all get the same factors, and keeps its part of Q."""
    n, num_segments = len(place.candidates), len(segments.labels)
    everything = slice(0, n)
    flat = [c.view(-1) for c in centers]

    numels = [t.numel() for t in place.tensors]
    members = [
        [k for k, l in enumerate(segments.first) if l == segment] for segment in range(num_segments)
    ]
    found = [
        _of_segment(place, flat, tensors, sum(numels[k] for k in tensors)) for tensors in members
    ]
    r = max(1, max(o.rank if o else 0 for o in found))
    transform, R = (
        torch.zeros(num_segments, r, n, dtype=torch.float64),
        torch.zeros(num_segments, n, r, dtype=torch.float64),
    )
    for l, o in enumerate(found):
        if o is None:
            continue
        transform[l, : o.rank], R[l, :, : o.rank] = o.transform, o.R
    # Rows as long as those of the basis of deltas are on average (root mean square), so that the
    # same learning rates fit.
    sum_sq = R.square().sum(2).T  # (n, L): squared lengths of the deltas
    if normalize == "none":
        scale = torch.ones(num_segments, dtype=torch.float64)
    else:
        divisor = row_divisor(sum_sq, normalize)
        scale = (
            torch.where(divisor > 0, sum_sq / divisor.clamp(min=1e-300).square(), 0.0)
            .mean(0)
            .sqrt()
        )
    coordinates = Coordinates(transform, R, scale, tuple(o.dropped if o else () for o in found))
    mine = place.rows_of(r)  # rows of Q that this rank keeps
    if mine.start == mine.stop:
        raise ValueError(
            f"placement {place.name!r}: the orthonormal basis has {r} rows, fewer than there are"
            " ranks; use 'replicate' or 'columns'"
        )
    shapes = [h.shape for h in place.held]
    packer = new_packer(mine.stop - mine.start, shapes, bits, segments)
    tensors = itertools.groupby(
        place.stream([k for k in range(len(shapes)) if place.packs(k)], everything),
        key=lambda kb: kb[0],
    )
    for k, l in enumerate(segments.first):
        if not place.packs(k):
            packer.skip()
            continue
        for _, block in next(tensors)[1]:
            for first in range(0, block.end - block.begin, PACK_COLUMNS):
                at = slice(first, min(first + PACK_COLUMNS, block.end - block.begin))
                q = found[l].apply(
                    [[row[at] for row in block.rows]],
                    center=[flat[k][block.begin + at.start : block.begin + at.stop]],
                )[0]
                q = torch.nn.functional.pad(q, (0, 0, 0, r - len(q)))[mine]
                packer.add_columns(q if bits != 32 else q * float(scale[l]), block.begin + first)
        packer.end_tensor()
    place.exchange(packer, centers)
    basis = packer.finish("none", torch.ones_like(packer.sum_sq))
    if bits == 32:
        return basis, coordinates
    return replace(basis, row_scale=(basis.row_scale.double() * scale).float()), coordinates


def _of_segment(
    place: Placement, flat: list[Tensor], tensors: list[int], columns: int
) -> tk.Orthonormal | None:
    """The implicit basis of one segment, streamed in blocks of columns. flat: the center of each
    tensor.
    """
    if not columns:  # parameters without elements
        return None
    fed = [k for k in tensors if place.feeds(k)]
    everything = slice(0, len(place.candidates))
    # of the pass under way: tensor and first column of each block, for messages
    read: list[tuple[int, int]] = []

    def rows() -> Iterator[list[Tensor]]:
        read.clear()
        for k, block in place.stream(fed, everything):
            read.append((k, block.begin))
            yield block.rows
        if not fed:  # a rank without columns of this segment takes part all the same
            yield [torch.zeros(0)] * len(place.candidates)

    def center() -> Iterator[Tensor]:
        for k in fed:
            for begin in range(0, max(1, flat[k].numel()), place.block_columns):
                yield flat[k][begin : begin + place.block_columns]
        if not fed:
            yield torch.zeros(0)

    reduce = place.world.sum_ if place.world.group is not None else None
    try:
        return tk.orthonormalize(rows, center=center, form="implicit", reduce=reduce)
    except tk.NotFiniteError as error:
        k = read[error.tensor][0]
        raise not_finite(place.candidates, place.keys[k], place.read(k, everything)) from error
