"""`Pieces`: how a rank's part of each tensor is cut into what the kernels take for tensors.

Kernels give every 128 weights of a tensor one scale and one segment. Where a rank's part of a
tensor begins anywhere, its segments change between, or the groups of a file end between. There it
is cut, and each piece is a tensor to the kernels, whose last group is shorter. Parts that begin at
multiples of 128 weights are one piece, itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from twa_kernels.layout import TILE, num_tiles

from ..io.candidates import Block
from ..io.mapped import Part
from .segments import Segments

Given = TypeVar("Given", Tensor, Tensor | None)


@dataclass(frozen=True)
class Pieces:
    """How this rank's part of each tensor is cut.

    Attributes:
        parts: shape of each part
        sizes: weights of each part's pieces, in the order in which they lie in it
        whole: whether each part is one piece
    """

    parts: tuple[torch.Size, ...]
    sizes: tuple[tuple[int, ...], ...]
    whole: bool = field(init=False, repr=False, compare=False)
    _begins: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ends = itertools.accumulate(map(len, self.sizes), initial=0)
        object.__setattr__(self, "_begins", list(ends))
        object.__setattr__(self, "whole", all(len(sizes) == 1 for sizes in self.sizes))

    @classmethod
    def of_whole(cls, parts: Iterable[torch.Size]) -> Pieces:
        """Parts that are not cut."""
        parts = tuple(parts)
        return cls(parts, tuple((part.numel(),) for part in parts))

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Shape of each piece, as the kernels' tensors."""
        return tuple(
            part if len(sizes) == 1 else torch.Size([size])
            for part, sizes in zip(self.parts, self.sizes, strict=True)
            for size in sizes
        )

    def of(self, k: int) -> range:
        """Numbers of the pieces of tensor k."""
        return range(self._begins[k], self._begins[k + 1])

    def cut(self, tensors: Sequence[Given], first: int = 0) -> list[Given]:
        """The pieces of parts of tensors: views where these are contiguous.

        Args:
            tensors: parts of the tensors from number `first` on; None has pieces of None
            first: number of the first of them
        """
        if self.whole:
            return list(tensors)
        found: list[Given] = []
        for t, sizes in zip(tensors, self.sizes[first : first + len(tensors)], strict=True):
            if len(sizes) == 1 or t is None:
                found += [t] * len(sizes)
            else:
                found += t.reshape(-1).split(sizes)
        return found

    def blocks(self, k: int, blocks: Iterable[Block]) -> Iterator[tuple[int, Block]]:
        """Blocks of columns of tensor k, cut so that kernels take them.

        Returns:
            where each begins in the part, and the block, which begins and ends in its piece: there,
            or at a multiple of 128. The first one of each piece begins at 0
        """
        if len(self.sizes[k]) == 1:
            yield from ((block.begin, block) for block in blocks)
            return
        sizes, at, done = iter(self.sizes[k]), 0, 0  # `at` of the part, `done` of the piece
        size, held = next(sizes), list[Tensor]()  # less than a group, from the block before
        for block in blocks:
            rows = [row.reshape(-1) for row in block.rows]
            if held:
                rows = [torch.cat([a, b]) for a, b in zip(held, rows, strict=True)]
            while len(rows[0]):
                count = min(len(rows[0]), size - done)
                if done + count < size:
                    count -= count % TILE
                if not count:
                    break
                taken = [row[:count] for row in rows]
                yield at, replace(block, begin=done, end=done + count, rows=taken)
                rows, at, done = [row[count:] for row in rows], at + count, done + count
                if done == size:
                    size, done = next(sizes, 0), 0
            held = [row.clone() for row in rows]


def _below(position: int, part: Part | None, shape: Sequence[int]) -> int:
    """How many weights of a part of a tensor lie before a position of it, as it lies flat."""
    if part is None:
        return position
    found, inner = 0, math.prod(shape)
    inside = math.prod(cut.stop - cut.start for cut in part)
    for cut, size in zip(part, shape, strict=True):
        inner, inside = inner // size, inside // (cut.stop - cut.start)
        index, position = divmod(position, inner)
        found += (min(max(index, cut.start), cut.stop) - cut.start) * inside
        if not cut.start <= index < cut.stop:
            break
    return found


@dataclass(frozen=True)
class Cut:
    """Parts of tensors as they are packed.

    Attributes:
        pieces: the parts, cut where their segment changes
        firsts: the segment of each piece's begin
        runs: (segment, groups of 128) of groups that follow each other
    """

    pieces: Pieces
    firsts: list[int]
    runs: list[tuple[int, int]]

    def tile_segments(self) -> Tensor:
        """The segment of each group of 128, (groups,) int32."""
        segment, count = torch.tensor(self.runs or [(0, 0)], dtype=torch.int64, device="cpu").T
        return segment.int().repeat_interleave(count)


def by_segments(
    parts: Sequence[torch.Size],
    slices: Sequence[Part | None],
    shapes: Sequence[Sequence[int]],
    segments: Segments,
    dense: bool = False,
) -> Cut:
    """Parts of tensors, cut where their segment changes.

    It does not matter that it changes where a group of 128 of the piece ends.

    Args:
        parts: shape of this rank's part of each tensor
        slices: of the tensor that it is; None: all of it
        shapes: of the whole tensors
        segments: of the whole tensors
        dense: `segments.chunk` columns of a piece each make a segment, which follow each other
    """
    chunk, unit = segments.chunk, segments.chunk if dense else TILE
    sizes: list[tuple[int, ...]] = []
    firsts: list[int] = []
    runs: list[tuple[int, int]] = []
    for first, part, cut, shape in zip(segments.first, parts, slices, shapes, strict=True):
        numel = part.numel()
        if not chunk or not numel:
            sizes.append((numel,))
            firsts.append(first)
            runs.append((first, num_tiles(numel)))
            continue
        count = -(-math.prod(shape) // chunk)
        places = [_below(m * chunk, cut, shape) for m in range(count)] + [numel]
        begins: list[int] = []
        for segment, (at, end) in enumerate(itertools.pairwise(places), first):
            if at == end:
                continue
            follows = begins and (at - begins[-1]) % unit == 0
            if dense and follows:
                follows = segment == firsts[-1] + (at - begins[-1]) // chunk
            if not follows:
                begins.append(at)
                firsts.append(segment)
            runs.append((segment, num_tiles(end - at)))
        sizes.append(tuple(b - a for a, b in itertools.pairwise([*begins, numel])))
    return Cut(Pieces(tuple(parts), tuple(sizes)), firsts, runs)


@dataclass(frozen=True)
class Groups:
    """Which groups of 128 weights of a whole tensor a part of it takes its weights from.

    Attributes:
        index: of each group, in the order of the part, (groups,)
        shift: how many of the group's weights lie before the part, (groups,)
        sizes: weights of the pieces that the part is cut into, where a group is not whole
    """

    index: Tensor
    shift: Tensor
    sizes: tuple[int, ...]


def by_groups(cut: Part | None, shape: Sequence[int], most: int) -> Groups | None:
    """The groups of 128 that a part of a tensor lies in, as the whole is packed.

    Args:
        cut: slices of the tensor; None: all of it
        shape: of the tensor
        most: pieces

    Returns:
        None if there would be more pieces
    """
    starts, width = _runs(cut, shape)
    if not len(starts) or not width:
        nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
        return Groups(nothing, nothing, (0,))
    first, last = starts // TILE, (starts + width - 1) // TILE
    counts = last - first + 1  # groups of each run
    ends = counts.cumsum(0)
    index = torch.arange(int(ends[-1]), device="cpu")
    index = index + (first - ends + counts).repeat_interleave(counts)
    shift = torch.zeros_like(index)
    shift[ends - counts] = starts % TILE
    taken = torch.full_like(index, TILE)
    taken[ends - 1] = (starts + width - 1) % TILE + 1
    taken -= shift
    done = taken.cumsum(0)
    is_end = taken < TILE
    is_end[-1] = True
    if int(is_end.sum()) > most:
        return None
    return Groups(index, shift, tuple(done[is_end].diff(prepend=done.new_zeros(1)).tolist()))


def _runs(cut: Part | None, shape: Sequence[int]) -> tuple[Tensor, int]:
    """A part of a tensor as runs of weights that lie flat in it: where each begins, and how long.

    All are equally long.
    """
    if not cut:
        return torch.zeros(1, dtype=torch.int64, device="cpu"), math.prod(shape)
    inner = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    d = len(shape) - 1
    while d and (cut[d].start, cut[d].stop) == (0, shape[d]):
        d -= 1
    starts = torch.tensor([cut[d].start * inner[d]], dtype=torch.int64, device="cpu")
    for outer in range(d - 1, -1, -1):
        places = torch.arange(cut[outer].start, cut[outer].stop, device="cpu") * inner[outer]
        starts = (places[:, None] + starts).flatten()
    return starts, (cut[d].stop - cut[d].start) * inner[d]
