"""What a GPU's pack leaves to PyTorch: where a NaN is, for Triton sums over tiles."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..operands import PackArgs


def finish_pack(args: PackArgs, squares: Tensor) -> tuple[int, int, int] | None:
    """Adds up what the kernel wrote; returns (row, tensor, column) of a NaN or Inf.

    It waits for the device once; where there are several runs of segments, twice.

    squares: (num_tiles, n) float64, squared norms of the groups, NaN where one was not finite.
    """
    if not len(squares):
        return None
    # Runs of one segment are summed as slices: a fixed order, without float atomics.
    changes = args.tile_segment.diff() != 0
    bad, runs, segment = torch.stack(
        [squares.isnan().any().int(), changes.sum(dtype=torch.int32), args.tile_segment[0]]
    ).tolist()
    if bad:
        return first_not_finite(args)
    begins, segments = [0], [segment]
    if runs:
        at = changes.nonzero()[:, 0] + 1
        begins += at.tolist()
        segments += args.tile_segment[at].tolist()
    for (first, last), l in zip(itertools.pairwise([*begins, None]), segments, strict=True):
        args.sum_sq[:, l] += squares[first:last].sum(0)
        top = args.scales[first:last].float().amax(0)
        args.max_scale[:, l] = torch.maximum(args.max_scale[:, l], top)
    return None


def first_not_finite(args: PackArgs) -> tuple[int, int, int]:
    """(row, tensor, column) of the first NaN or Inf, of which there is one."""
    for at in range(len(args.rows)):
        k, i = divmod(at, args.n)
        finite = torch.isfinite(_difference(args, k, i))
        if not finite.all():
            return i, k, int(torch.nonzero(~finite)[0])
    raise RuntimeError(
        "pack: the kernel met a NaN or Inf that is not there: rows changed meanwhile"
    )


def _difference(args: PackArgs, k: int, i: int) -> Tensor:
    """Row i of tensor k minus the center, float32."""
    row = args.rows[k * args.n + i].reshape(-1).float()
    return row - args.center[k].reshape(-1).float() if args.center else row
