"""Inner products of the rows of P, tensor by tensor, from a sample of the columns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Size, Tensor

import twa_kernels as tk
from twa_kernels.layout import TILE, tile_offsets

from .dense import DenseBasis
from .segments import Segments

MOST_TILES = 64  # of a tensor that are looked at, evenly spread


def grams(
    basis: tk.PackedBasis | DenseBasis, segments: Segments, counts: Sequence[bool]
) -> tuple[Tensor, list[int]]:
    """Inner products of the rows of P in groups of segments.

    A group is a tensor, or a segment of several tensors.

    Args:
        basis: this process's part of P
        segments: of the tensors, as the basis has them
        counts: of each tensor, whether this process's part of it counts

    Returns:
        (G, rows, rows) float64, on the CPU; and how many segments each group has, in their order
    """
    sizes = segments.groups
    begins = itertools.accumulate(sizes[:-1], initial=0)
    group = {begin: g for g, begin in enumerate(begins)}
    found = torch.zeros(len(sizes), basis.n, basis.n, dtype=torch.float64)
    for k, first in enumerate(segments.first):
        if counts[k] and basis.shapes[k].numel():
            found[group[first]] += _of_tensor(basis, k)
    return found, sizes


def _of_tensor(basis: tk.PackedBasis | DenseBasis, k: int) -> Tensor:
    """Inner products (rows, rows) of tensor k's rows, estimated from some of its tiles."""
    numel = basis.shapes[k].numel()
    tiles = -(-numel // TILE)
    chosen = torch.linspace(0, tiles - 1, min(tiles, MOST_TILES), dtype=torch.float64)
    chosen = chosen.round().long()
    columns = (len(chosen) - 1) * TILE + numel - (tiles - 1) * TILE  # the last one may be shorter
    if isinstance(basis, DenseBasis):
        at = (chosen[:, None] * TILE + torch.arange(TILE)).flatten()[:columns]
        p = basis.rows[k][:, at.to(basis.device)].double()
        gram = p @ p.T
    else:
        gram = _sampled(basis, tile_offsets(basis.numels)[k] + chosen, columns).gram().sum(0)
    return gram.cpu() * (numel / columns)


def _sampled(basis: tk.PackedBasis, tiles: Tensor, columns: int) -> tk.PackedBasis:
    """A basis of some tiles alone, as one tensor of so many columns."""
    tiles = tiles.to(basis.device)
    used, segment = basis.tile_segment[tiles].unique(return_inverse=True)
    return tk.PackedBasis(
        basis.codes[tiles],
        basis.scales.view(torch.uint8)[tiles].view(basis.scales.dtype),
        basis.row_scale[:, used].contiguous(),
        segment.to(basis.tile_segment.dtype),
        basis.divisor[:, used].contiguous(),
        (Size([columns]),),
        basis.bits,
    )
