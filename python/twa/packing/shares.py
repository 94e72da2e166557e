"""How packing into a file is shared out: runs of columns, and sums that do not depend on the cuts.

Squared norms are float64 sums in a stated order: over 64 tiles of a tensor, or up to the end of a
segment in them, as the kernels add them up; then over such groups of tiles, in their order. Each
group's sum is kept in a file, so that the second sum can wait until all is packed, whoever packed
it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from twa_kernels.layout import TILE, tile_offsets

from ..basis.contents import Contents
from ..io.candidates import UNIT

#: (tensor, first column, end); both are multiples of UNIT, or the tensor's end
Run = tuple[int, int, int]


def all_runs(numels: Sequence[int]) -> list[Run]:
    """All columns of tensors of these sizes."""
    return [(k, 0, numel) for k, numel in enumerate(numels) if numel]


def share_out(runs: Sequence[Run], sizes: Sequence[int], ranks: int, width: int) -> list[list[Run]]:
    """The blocks that each rank packs: one run of columns after the other, of about as many bytes.

    Args:
        runs: what is to be packed
        sizes: bytes of a column of each tensor, in all candidates
        ranks: how many there are
        width: columns of a block, at most; a multiple of UNIT
    """
    total = sum((end - begin) * sizes[k] for k, begin, end in runs)
    found: list[list[Run]] = [[] for _ in range(ranks)]
    before = 0  # bytes
    for k, begin, end in runs:
        while begin < end:
            rank = before * ranks // total
            left = total * (rank + 1) - before * ranks  # of this rank's bytes, times ranks
            units = -(-left // (ranks * sizes[k] * UNIT))
            last = min(end, begin + min(units * UNIT, width))
            found[rank].append((k, begin, last))
            before += (last - begin) * sizes[k]
            begin = last
    return found


def joined(runs: Sequence[Run]) -> list[Run]:
    """The same columns in as few runs as there can be, in order."""
    found: list[Run] = []
    for k, begin, end in sorted(runs):
        if found and found[-1][0] == k and found[-1][2] == begin:
            begin = found.pop()[1]
        found.append((k, begin, end))
    return found


def are_runs(value: object, numels: Sequence[int]) -> bool:
    """Whether a file's value is what `joined` gives, for tensors of these sizes."""
    if not isinstance(value, list):
        return False
    last = (-1, 0)
    for run in value:
        if not isinstance(run, list) or len(run) != 3 or not all(type(v) is int for v in run):
            return False
        k, begin, end = run
        if not 0 <= k < len(numels) or not last <= (k, begin) or not 0 <= begin < end <= numels[k]:
            return False
        if begin % UNIT or (end % UNIT and end != numels[k]):
            return False
        last = (k, end)
    return True


class Groups:
    """The groups of tiles whose squares are added up first.

    Attributes:
        offsets: first tile of each tensor, and the end
        number: the group of each tile, (tiles,) int32
        segment: of each group, (groups,) int64
        tile_segment: of each tile, (tiles,) int32
    """

    def __init__(self, contents: Contents) -> None:
        numels = contents.numels
        self.offsets = tile_offsets(numels)
        self.tile_segment = contents.tensor_segments.of_tiles(numels)
        begins = torch.zeros(self.offsets[-1], dtype=torch.bool, device="cpu")
        for first, end in itertools.pairwise(self.offsets):
            begins[first : end : UNIT // TILE] = True
        begins[1:] |= self.tile_segment.diff() != 0
        self.number = begins.cumsum(0, dtype=torch.int32) - 1
        self.segment = self.tile_segment[begins].long()

    def tile(self, k: int, column: int) -> int:
        """The tile of this column of tensor k."""
        return self.offsets[k] + column // TILE

    def of(self, k: int, begin: int, end: int) -> range:
        """The groups of these columns of tensor k."""
        first, last = self.tile(k, begin), self.tile(k, end - 1)
        return range(int(self.number[first]), int(self.number[last]) + 1)

    def add_up(self, sums: Tensor, first: int, sum_sq: Tensor, max_scale: Tensor) -> None:
        """Adds groups, in order, to the sums of their segments.

        Args:
            sums: (groups, 2, n) float64: squared norms and largest scales of some groups
            first: the number of the first of them
            sum_sq: (n, L) float64, added to
            max_scale: (n, L) float64
        """
        segment = self.segment[first : first + len(sums)]
        squares, largest = sums.permute(1, 2, 0)  # (n, groups)
        sum_sq.index_add_(1, segment, squares)  # one after the other
        max_scale.scatter_reduce_(1, segment.expand_as(largest), largest, "amax")
