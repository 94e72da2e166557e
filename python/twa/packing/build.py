"""The basis of a subspace, or this rank's part of it, from the candidates in one stream of tensors
(an orthonormal one in three).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

import twa_kernels as tk
from twa_kernels.packed import row_divisor

from ..basis.dense import new_packer
from ..basis.segments import Segments
from ..distributed.sharding import Basis, Placement
from ..distributed.weights import not_finite
from . import orthonormal
from .orthonormal import Coordinates


@torch.no_grad()  # a .pt file may hold parameters, which ask for gradients
def build(
    place: Placement,
    segments: Segments,
    bits: int,
    kind: str,
    normalize: str,
    weights: Tensor,
    progress: Callable[[str, int], None] | None,
) -> tuple[Basis, Tensor, list[Tensor] | None, Coordinates | None]:
    """Basis of this rank's rows and columns; divisors of all rows (n, L); center of this rank's
    columns, float32 (None on a rank that adds none); coordinates of an orthonormal basis. Ranks
    call it together."""
    shapes = [h.shape for h in place.held]
    centers = [torch.empty(shape) for shape in shapes]
    # An orthonormal basis is packed once its rank is known.
    begins = (
        [place.begin(k, segments.chunk) for k in range(len(shapes))] if segments.chunk else None
    )
    packer = (
        new_packer(len(place.candidates[place.rows]), shapes, bits, segments, begins)
        if kind == "deltas"
        else None
    )
    tensors = itertools.groupby(
        place.stream([k for k in range(len(shapes)) if place.packs(k)]), key=lambda kb: kb[0]
    )
    for k, key in enumerate(place.keys):
        if not place.packs(k):
            if packer:
                packer.skip()
            continue
        before = packer.sum_sq.clone() if packer and not place.held[k].counts else None
        for _, block in next(tensors)[1]:
            center = centers[k].view(-1)[block.begin : block.end]
            try:
                if packer:
                    place.pack(packer, k, block, weights, center)
                else:
                    center.copy_(place.center(k, block.rows, weights))
            except tk.NotFiniteError as error:
                raise not_finite(place.candidates[place.rows], key, place.read(k)) from error
            if progress:
                progress(key, sum(r.numel() * r.element_size() for r in block.rows))
        if packer:
            packer.end_tensor()
            if before is not None:  # another rank holds these columns, too, and counts them
                packer.sum_sq.copy_(before)
    if packer:
        place.exchange(packer, centers)
        divisor = row_divisor(place.sum_sq(packer), normalize)
        return (
            packer.finish(normalize, divisor[place.rows]),
            divisor,
            place.own_center(centers),
            None,
        )
    made, coordinates = orthonormal.build(place, centers, segments, bits, normalize)
    return (
        made,
        torch.ones(coordinates.transform.shape[1::-1], dtype=torch.float64),
        place.own_center(centers),
        coordinates,
    )
