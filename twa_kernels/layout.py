"""How a packed basis is laid out: tiles, sizes, segments. csrc/packing.h draws it bit by bit."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

TILE = 128  # columns of a tile = quantisation group
BITS = (8, 4, 3, 2, 1)
MAX_ROWS = 4096
MOST_WEIGHT = 2.0**126  # weights of this size count as infinite to `record`
#: dtypes of gradients, centers and weights that every backend takes
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

#: Lloyd-Max levels of a unit Gaussian, outermost scaled to 127, rounded; 8 bits: uniform
LEVELS: dict[int, list[int]] = {
    8: list(range(-128, 128)),
    4: [-127, -96, -75, -58, -44, -31, -18, -6, 6, 18, 31, 44, 58, 75, 96, 127],
    3: [-127, -79, -45, -14, 14, 45, 79, 127],
    2: [-127, -38, 38, 127],
    1: [-127, 127],
}


def check_bits(bits: int) -> None:
    """Raises ValueError unless there is a code of so many bits."""
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, found {bits!r}")


def num_tiles(numel: int) -> int:
    """Tiles of 128 columns that a tensor of so many elements takes."""
    return -(-numel // TILE)


def tile_offsets(numels: Sequence[int]) -> list[int]:
    """First tile of each tensor, then the total."""
    return list(itertools.accumulate((-(-numel // TILE) for numel in numels), initial=0))


@functools.lru_cache(maxsize=256)
def total_tiles(numels: tuple[int, ...]) -> int:
    """Tiles of all tensors of these sizes."""
    return sum(-(-numel // TILE) for numel in numels)


def segments_to_tiles(segments: Sequence[int] | Tensor | None, numels: Sequence[int]) -> Tensor:
    """Segment of each tile, (num_tiles,) int32, from one index per tensor or one per tile.

    None: one segment per tensor. Where there are as many tensors as tiles, an int32 tensor is taken
    for one index per tile, as this function gives it, and anything else for one per tensor.
    """
    offsets = tile_offsets(numels)
    tiles = [b - a for a, b in itertools.pairwise(offsets)]
    counts = torch.tensor(tiles, dtype=torch.int64, device="cpu")
    if segments is None:
        index = torch.arange(len(numels), device="cpu")
    else:
        index = torch.as_tensor(segments, device="cpu")
    if index.is_floating_point() or index.dim() != 1:
        raise TypeError(
            "segments: expected a flat list of integers, "
            f"found {index.dtype} of shape {tuple(index.shape)}"
        )
    per_tile = len(index) == offsets[-1] and index.dtype == torch.int32
    if len(index) == len(numels) and not per_tile:
        index = torch.repeat_interleave(index.long(), counts)
    elif len(index) != offsets[-1]:
        raise ValueError(
            f"segments: expected {len(numels)} entries (one per tensor) or {offsets[-1]} "
            f"(one per tile of 128 columns), found {len(index)}"
        )
    if len(index) and index.min() < 0:
        raise ValueError(f"segments: expected indices of at least 0, found {int(index.min())}")
    return index.to(torch.int32)


def check_segments(tile_segment: Tensor, num_segments: int) -> None:
    """Raises ValueError unless all are indices of segments. It waits for the device."""
    if not len(tile_segment):
        return
    least, most = torch.stack(tile_segment.aminmax()).tolist()
    if least < 0 or most >= num_segments:
        raise ValueError(
            f"tile_segment: expected indices from 0 to {num_segments - 1}, found"
            f" {least if least < 0 else most}"
        )
