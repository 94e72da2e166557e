"""Inner products of the rows of P, tensor by tensor, from a sample of the columns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Size, Tensor

import twa_kernels as tk
from twa_kernels.layout import TILE, tile_offsets

from .dense import DenseBasis
from .pieces import Pieces
from .segments import Segments

MOST_TILES = 64  # of a tensor that are looked at


def grams(
    basis: tk.PackedBasis | DenseBasis, pieces: Pieces, segments: Segments, counts: Sequence[bool]
) -> tuple[Tensor, list[int]]:
    """Inner products of the rows of P in groups of segments.

    A group is a tensor, or a segment of several tensors.

    Args:
        basis: this process's part of P
        pieces: those of the tensors that the basis is of
        segments: of the tensors
        counts: of each tensor, whether this process's part of it counts

    Returns:
        (G, rows, rows) float64, on the CPU; and how many segments each group has, in their order
    """
    sizes = segments.groups
    begins = itertools.accumulate(sizes[:-1], initial=0)
    group = {begin: g for g, begin in enumerate(begins)}
    offsets = tile_offsets([shape.numel() for shape in basis.shapes])
    found = torch.zeros(len(sizes), basis.n, basis.n, dtype=torch.float64, device="cpu")
    for k, first in enumerate(segments.first):
        for piece in pieces.of(k) if counts[k] else ():
            if basis.shapes[piece].numel():
                found[group[first]] += _of_tensor(basis, piece, offsets[piece])
    return found, sizes


def _of_tensor(basis: tk.PackedBasis | DenseBasis, k: int, first: int) -> Tensor:
    """Inner products (rows, rows) of tensor k, whose first tile is `first`, by some of its tiles.

    Tiles are taken by the squared length of the rows in them, and weigh by its inverse, so that
    none that matters is missed: of an embedding few rows may have moved.
    """
    numel = basis.shapes[k].numel()
    tiles = -(-numel // TILE)
    if tiles <= MOST_TILES:
        chosen, columns = torch.arange(tiles, device="cpu"), numel
        weights = torch.ones(tiles, dtype=torch.float64, device="cpu")
    else:
        energy = _energies(basis, k, first, tiles)
        if numel % TILE:
            energy[-1] = 0.0  # the last tile is shorter
        places = (torch.arange(MOST_TILES, device="cpu").double() + 0.5) / MOST_TILES * energy.sum()
        chosen = torch.searchsorted(energy.cumsum(0), places).clamp(max=tiles - 1)
        weights = energy.sum() / (MOST_TILES * energy[chosen].clamp(min=1e-300))
        columns = MOST_TILES * TILE
    if isinstance(basis, DenseBasis):
        at = (chosen[:, None] * TILE + torch.arange(TILE, device="cpu")).flatten()[:columns]
        p = basis.rows[k][:, at.to(basis.device)].double().cpu()
        p *= weights.sqrt().repeat_interleave(TILE)[:columns]
        return p @ p.T
    # on the CPU, wherever the basis is: a few tiles, and the same bits everywhere
    return _sampled(basis, first + chosen, columns, weights).gram().sum(0)


def _energies(basis: tk.PackedBasis | DenseBasis, k: int, first: int, tiles: int) -> Tensor:
    """About the squared length of all rows in each tile of tensor k, (tiles,) float64."""
    if isinstance(basis, DenseBasis):
        squares = basis.rows[k].double().square().sum(0).cpu()
        return (
            torch.nn.functional.pad(squares, (0, tiles * TILE - len(squares))).view(-1, TILE).sum(1)
        )
    parts, row_scale = [], basis.row_scale.cpu()
    for begin in range(first, first + tiles, 1 << 16):
        at = slice(begin, min(begin + (1 << 16), first + tiles))
        segments = basis.tile_segment[at].cpu().long()
        scales = basis.scales[at].cpu().float() * row_scale[:, segments].T  # (tiles, rows)
        parts.append(scales.double().square().sum(1))
    return torch.cat(parts)


def _sampled(basis: tk.PackedBasis, tiles: Tensor, columns: int, weights: Tensor) -> tk.PackedBasis:
    """A basis of some tiles alone, each a segment, as one tensor of so many columns.

    Its rows are longer in each tile, by the root of the tile's weight. It is on the CPU.
    """
    tiles = tiles.to(basis.device)
    segments = basis.tile_segment[tiles].long()
    longer = weights.sqrt().to(basis.row_scale.dtype)
    return tk.PackedBasis(
        basis.codes[tiles].cpu(),
        basis.scales.view(torch.uint8)[tiles].cpu().view(basis.scales.dtype),
        (basis.row_scale[:, segments].cpu() * longer).contiguous(),
        torch.arange(len(tiles), dtype=basis.tile_segment.dtype, device="cpu"),
        basis.divisor[:, segments].cpu().contiguous(),
        (Size([columns]),),
        basis.bits,
    )
