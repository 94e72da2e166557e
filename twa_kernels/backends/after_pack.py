"""What a GPU's pack leaves to PyTorch: sums over tiles, errors, where a NaN is."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import TILE, tile_offsets
from ..operands import PackArgs
from .reference import bytes_to_codes, squared_error


def finish_pack(args: PackArgs, squares: Tensor) -> tuple[int, int, int] | None:
    """Adds up what the kernel wrote; returns (row, tensor, column) of a NaN or Inf.

    squares: (num_tiles, n) float64, squared norms of the groups, NaN where one was not finite.
    """
    if squares.isnan().any():
        for at in range(len(args.rows)):
            k, i = divmod(at, args.n)
            finite = torch.isfinite(_difference(args, k, i))
            if not finite.all():
                return i, k, int(torch.nonzero(~finite)[0])
    if args.errors is not None:
        _add_errors(args, squares, args.errors)
    # Runs of one segment are summed as slices: a fixed order, without float atomics.
    values, counts = torch.unique_consecutive(args.tile_segment, return_counts=True)
    first = 0
    for segment, count in zip(values.tolist(), counts.tolist(), strict=True):
        args.sum_sq[:, segment] += squares[first : first + count].sum(0)
        top = args.scales[first : first + count].float().amax(0)
        args.max_scale[:, segment] = torch.maximum(args.max_scale[:, segment], top)
        first += count
    return None


def _difference(args: PackArgs, k: int, i: int) -> Tensor:
    """Row i of tensor k minus the center, float32."""
    row = args.rows[k * args.n + i].reshape(-1).float()
    return row - args.center[k].reshape(-1).float() if args.center else row


def _add_errors(args: PackArgs, squares: Tensor, errors: Tensor) -> None:
    """Adds quantisation errors, from the packed bytes, a row at a time."""
    offsets = tile_offsets(args.numels)
    for k, numel in enumerate(args.numels):
        at = slice(offsets[k], offsets[k + 1])
        tiles = torch.arange(offsets[k + 1] - offsets[k], device=args.device)
        valid = (numel - TILE * tiles).clamp(max=TILE)
        for i in range(args.n):
            v = torch.nn.functional.pad(_difference(args, k, i), (0, len(tiles) * TILE - numel))
            codes = bytes_to_codes(args.codes[at, i], args.bits)
            scales = args.scales[at, i].float()
            errors[k, 0] += squared_error(v.view(-1, TILE), codes, scales, valid, args.bits)
        errors[k, 1] += squares[at].sum()
