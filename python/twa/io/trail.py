"""`Trail`: snapshots of a model's tensors, one of them whole, the others as low-bit differences.

    w_i = w_base + sum of the differences between base and i        d_r = w_r - w_(r-1)
    sum_i beta_i w_i = w_base + sum_r (T_r - [r <= base]) d_r       T_r = sum_{i >= r} beta_i

Both are one pass of `twa_kernels.replay` over the codes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import twa_kernels as tk
from twa_kernels.layout import TILE, num_tiles, tile_offsets

from .mapped import (
    MappedFile,
    Part,
    Source,
    TensorInfo,
    Viewed,
    check_torn,
    contiguous_strides,
    shape_of,
    span,
)

COLUMNS = 1 << 24  # of an average that are made at once
ROWS = 256  # that are added at once: they have to be in a GPU's memory together


class Row(Protocol):
    """One difference, of all tensors of a trail."""

    def codes(self, first: int, last: int) -> Tensor:
        """Codes of some tiles: (last - first, 16 * bits) uint8, on the CPU."""

    def scales(self, first: int, last: int) -> Tensor:
        """Their scales: (last - first,) bfloat16, finite and not negative."""

    def prefetch(self, first: int, last: int) -> None:
        """Asks the system to read these tiles soon."""

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """The files that it lies in."""


class Base(Protocol):
    """The whole snapshot of a trail."""

    def columns(self, k: int, begin: int, end: int) -> Tensor:
        """Some weights of tensor k as they lie flat: float32, a copy."""

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """The files that it lies in."""


@dataclass(frozen=True)
class Entry:
    """A recorded tensor, or one rank's part of it.

    Attributes:
        key: in the model's state_dict
        name: of the tensor in the model, see `named_tensors`
        dtype: of the parameter, as an export has it; a float32 master may have been recorded
        shape: of the whole tensor
        begin: where the part begins in it
        sizes: of the part
    """

    key: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Weights of the part."""
        return torch.Size(self.sizes).numel()


class Trail:
    """n snapshots as one whole one and n - 1 differences.

    Args:
        bits: of the codes
        entries: the tensors, in the order of the codes
        steps: of the snapshots
        base: the whole one
        base_at: which of them it is
        rows: row r - 1 leads from snapshot r - 1 to r
    """

    def __init__(
        self,
        bits: int,
        entries: Sequence[Entry],
        steps: Sequence[int],
        base: Base,
        base_at: int,
        rows: Sequence[Row],
    ) -> None:
        assert len(rows) == len(steps) - 1, (len(rows), len(steps))
        self.bits, self.entries, self.steps = bits, list(entries), list(steps)
        self.base, self.base_at, self.rows = base, base_at, list(rows)
        self.tiles = tile_offsets([e.numel for e in self.entries])
        # the snapshot that was decoded last: (tensor, begin, end, number), and its weights
        self._last: tuple[tuple[int, int, int, int], Tensor] | None = None
        self._lock = threading.Lock()

    def coefficients(self, beta: Tensor) -> list[float]:
        """What the rows are multiplied by in a weighted average of the snapshots.

        Args:
            beta: (n,), sums to 1
        """
        tails = beta.double().flip(0).cumsum(0).flip(0)[1:]
        tails[: self.base_at] -= 1.0
        return tails.tolist()

    def average(
        self, k: int, begin: int, end: int, beta: Tensor, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Weights [begin, end) of tensor k in a weighted average: float32.

        Args:
            k: number of the tensor
            begin, end: of the flat tensor
            beta: merge weights (n,), which sum to 1
            device: where it is computed
        """
        return self._replayed(k, begin, end, self.coefficients(beta), device)

    def average_blocks(
        self, k: int, beta: Tensor, device: torch.device | str = "cpu"
    ) -> Iterator[Tensor]:
        """Tensor k in a weighted average, in blocks of flat columns in order: float32."""
        numel = self.entries[k].numel
        for begin in range(0, numel, COLUMNS):
            yield self.average(k, begin, min(begin + COLUMNS, numel), beta, device)

    def snapshot(self, k: int, begin: int, end: int, number: int) -> Tensor:
        """Weights [begin, end) of tensor k in a snapshot: float32.

        The next snapshot of the same weights takes one row more.
        """
        with self._lock:
            at = (k, begin, end)
            if self._last is not None and self._last[0] == (*at, number - 1):
                found = self._last[1].clone()
                self._add(found, k, begin, end, [0.0] * (number - 1) + [1.0])
            else:
                beta = torch.zeros(len(self.steps), dtype=torch.float64, device="cpu")
                beta[number] = 1.0
                first = begin - begin % TILE
                found = self._replayed(k, first, end, self.coefficients(beta))
                found = found[begin - first :]
            if begin % TILE == 0:
                self._last = ((*at, number), found)
            return found

    def _replayed(
        self,
        k: int,
        begin: int,
        end: int,
        coefficients: Sequence[float],
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The base's weights [begin, end) of tensor k plus a weighted sum of rows."""
        first = begin - begin % TILE
        out = self.base.columns(k, first, end).to(device)
        check_torn(self.base.files)
        self._add(out, k, first, end, coefficients)
        return out[begin - first :]

    def _add(
        self, out: Tensor, k: int, begin: int, end: int, coefficients: Sequence[float]
    ) -> None:
        """Adds a weighted sum of rows to weights [begin, end) of tensor k; begin is a tile's."""
        first = self.tiles[k] + begin // TILE
        last = first + num_tiles(end - begin)
        used = [(c, row) for c, row in zip(coefficients, self.rows, strict=False) if c != 0.0]
        for begin in range(0, len(used), ROWS):
            some = used[begin : begin + ROWS]
            codes = [row.codes(first, last).to(out.device) for _, row in some]
            scales = [row.scales(first, last).to(out.device) for _, row in some]
            tk.replay(out, codes, scales, [c for c, _ in some], self.bits)
            check_torn(file for _, row in some for file in row.files)

    def decoded(self, k: int, of: int | Tensor) -> Decoded:
        """Tensor k in a snapshot, as its dtype has it; or in an average, as float32."""
        entry = self.entries[k]
        dtype = entry.dtype if isinstance(of, int) else torch.float32
        return Decoded(self, k, of, TensorInfo(entry.sizes, dtype))


@dataclass(frozen=True, eq=False)
class Decoded:
    """A tensor of a trail.

    Attributes:
        trail: that it is of
        k: number of the tensor
        of: the snapshot; or merge weights (n,) of all of them
        info: shape and dtype
    """

    trail: Trail
    k: int
    of: int | Tensor
    info: TensorInfo

    @property
    def beta(self) -> Tensor:
        """Merge weights of all snapshots; for an average only."""
        assert isinstance(self.of, Tensor)
        return self.of

    def _span(self, part: Part | None) -> tuple[tuple[int, ...], int, int]:
        """Shape of the part, and the flat weights from its first to its last."""
        shape = shape_of(self.info.shape, part)
        strides = contiguous_strides(self.info.shape)
        starts = [s.indices(n)[0] for s, n in zip(part or (), self.info.shape, strict=False)]
        begin = sum(b * stride for b, stride in zip(starts, strides, strict=False))
        return shape, begin, begin + span(shape, strides)

    def read(self, part: Part | None = None) -> Tensor:
        """The tensor, or a part of it: decoded, and rounded to its dtype."""
        shape, begin, end = self._span(part)
        if begin == end:
            return torch.empty(shape, dtype=self.info.dtype, device="cpu")
        if isinstance(self.of, int):
            flat = self.trail.snapshot(self.k, begin, end, self.of)
        else:
            flat = self.trail.average(self.k, begin, end, self.of)
        strides = contiguous_strides(self.info.shape)
        return flat.as_strided(shape, strides, flat.storage_offset()).to(self.info.dtype)

    def prefetch(self, part: Part | None) -> None:
        """Asks the system to read the row that leads here; others are their snapshots'."""
        if isinstance(self.of, int) and self.of > 0:
            _, begin, end = self._span(part)
            first = self.trail.tiles[self.k]
            self.trail.rows[self.of - 1].prefetch(first + begin // TILE, first + num_tiles(end))

    def view(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Source:
        """A view of the tensor, which counts as contiguous."""
        return Viewed(self, TensorInfo(shape, self.info.dtype), strides, offset)

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """The files of its own row, and of the base."""
        own = self.trail.rows[self.of - 1].files if isinstance(self.of, int) and self.of else ()
        return (*self.trail.base.files, *own)
