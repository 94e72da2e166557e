"""`PackedBasis`, a low-bit basis of n rows, and `Packer`, which builds one from a stream."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import dispatch, native
from .native import empty_for_streaming
from .ops import NotFiniteError, check_average, check_bits, check_pack
from .reference import MAX_ROWS, TILE, num_tiles, tile_offsets

NORMALIZE = ("row", "none")


@dataclass(frozen=True)
class PackedBasis:
    """Basis P (n, D) in packed form; the layout is drawn in csrc/packing.h.

    value(i, column c of tile t) = row_scale[i, segment(t)] * scales[t, i] * level[code(t, i, c)]

    n rows, D columns, L segments; tiles of 128 columns, num_tiles of them.

    Attributes:
        codes: (num_tiles, n, 16 * bits) uint8.
        scales: (num_tiles, n) float8_e4m3fn.
        row_scale: (n, L) float32.
        tile_segment: (num_tiles,) int32 in [0, L).
        divisor: (n, L) float64: P[i] = (row i - center) / divisor[i, l] before quantisation; 0
            where that part is zero.
        shapes: shape of each tensor, in order.
        bits: 8, 4, 3, 2 or 1.
        relative_error: per tensor, if it was asked for: the quantiser's
            ||P - dequantised P|| / ||P|| over all rows, 0 for zeros; before the smallest scales of
            a segment lose bits to e4m3 (which a warning reports when they become zero).
    """

    codes: Tensor
    scales: Tensor
    row_scale: Tensor
    tile_segment: Tensor
    divisor: Tensor
    shapes: tuple[torch.Size, ...]
    bits: int
    relative_error: tuple[float, ...] | None = None

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.row_scale.shape[0]

    @property
    def num_segments(self) -> int:
        """Number of segments, L."""
        return self.row_scale.shape[1]

    @property
    def numels(self) -> list[int]:
        """Number of elements of each tensor."""
        return [shape.numel() for shape in self.shapes]

    @property
    def num_columns(self) -> int:
        """D, without the padding of the last tiles."""
        return sum(self.numels)

    @property
    def device(self) -> torch.device:
        """Where all tensors of the basis are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of the packed tensors: about n * D * (bits / 8 + 1 / 128)."""
        return sum(
            t.numel() * t.element_size()
            for t in (self.codes, self.scales, self.row_scale, self.tile_segment)
        )

    def __getstate__(self) -> dict[str, object]:
        # Pickle does not know float8.
        return self.__dict__ | {"scales": self.scales.view(torch.uint8)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"scales": state["scales"].view(torch.float8_e4m3fn)})

    def to(self, device: torch.device | str) -> PackedBasis:
        """Copy on another device; the basis itself where it is there already."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("codes", "scales", "row_scale", "tile_segment", "divisor")
        }
        return replace(self, **moved)

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the ops take: codes, scales, row_scale, tile_segment.

        Scales as bytes, which more of PyTorch understands than float8.
        """
        return self.codes, self.scales.view(torch.uint8), self.row_scale, self.tile_segment

    def gram(self, backend: str = "") -> Tensor:
        """Inner products of the dequantised rows within each segment, `P_l @ P_l.T`.

        Error, relative to the norms of both rows: below 1e-12 on CPUs; on GPUs exact per tile, then
        float32 sums over up to 1024 tiles.

        Args:
            backend: overrides the table in dispatch.py.

        Returns:
            G (L, n, n) float64.

        Raises:
            RuntimeError: the backend does not run here, or a CUDA graph is being captured.
        """
        return torch.ops.twa_kernels.gram(*self.operands, self.numels, self.bits, backend)

    def select(self, k: int) -> tuple[PackedBasis, slice]:
        """The basis of tensor k alone, a view of the codes.

        Also returned: which segments of this basis its coefficients are.
        """
        offsets = tile_offsets(self.numels)
        at = slice(offsets[k], offsets[k + 1])
        segment = self.tile_segment[at]
        first, last = (int(segment.min()), int(segment.max())) if len(segment) else (0, 0)
        columns = slice(first, last + 1)
        basis = PackedBasis(
            self.codes[at],
            self.scales[at],
            self.row_scale[:, columns].contiguous(),
            segment - first,
            self.divisor[:, columns].contiguous(),
            (self.shapes[k],),
            self.bits,
            None if self.relative_error is None else (self.relative_error[k],),
        )
        return basis, columns

    def __repr__(self) -> str:
        return (
            f"PackedBasis(n={self.n}, D={self.num_columns}, L={self.num_segments}, "
            f"bits={self.bits}, tensors={len(self.shapes)}, {self.nbytes / 1e6:.1f} MB, "
            f"{self.device})"
        )


def segments_to_tiles(segments: Sequence[int] | Tensor | None, numels: Sequence[int]) -> Tensor:
    """Segment of each tile, (num_tiles,) int32, from one index per tensor or one per tile.

    None: one segment per tensor.
    """
    offsets = tile_offsets(numels)
    counts = torch.tensor([b - a for a, b in itertools.pairwise(offsets)], dtype=torch.int64)
    index = torch.arange(len(numels)) if segments is None else torch.as_tensor(segments)
    if index.is_floating_point() or index.dim() != 1:
        raise TypeError(
            "segments: expected a flat list of integers, "
            f"found {index.dtype} of shape {tuple(index.shape)}"
        )
    if len(index) == len(numels):
        index = torch.repeat_interleave(index.long(), counts)
    elif len(index) != offsets[-1]:
        raise ValueError(
            f"segments: expected {len(numels)} entries (one per tensor) or {offsets[-1]} "
            f"(one per tile of 128 columns), found {len(index)}"
        )
    if len(index) and index.min() < 0:
        raise ValueError(f"segments: expected indices of at least 0, found {int(index.min())}")
    return index.to(torch.int32)


class Packer:
    """Builds a PackedBasis from tensors that arrive one by one, in order.

    Memory is the packed basis and one tensor's rows.

        packer = Packer(n, shapes, bits=4, segments=None)
        for rows, center in stream:            # rows: n tensors of shapes[k]; center: one, or None
            packer.add(rows, center)
        basis = packer.finish()

    The result has the same bits as `pack` on everything at once.

    Args:
        n: number of rows, 1 to 4096.
        shapes: shape of each tensor, in order.
        bits: 8, 4, 3, 2 or 1.
        segments: segment index of each tensor (or of each tile of 128 columns); None: one segment
            per tensor.
        device: where the basis and the rows are.
        backend: overrides the table in dispatch.py.
        report: also measure the relative error of each tensor, `PackedBasis.relative_error`.
        sink: called with (first tile, codes (tiles, n, 16 * bits) uint8, scales (tiles, n)
            bfloat16) of each part as it is packed, instead of keeping them: memory is then one
            part, which is written over by the next. `Scaling` finishes such scales.
        num_segments: L, where the last segments may have no columns here.

    Raises:
        ValueError: a number is out of range, or segments do not fit the shapes.
        TypeError: segments are not integers.
    """

    def __init__(
        self,
        n: int,
        shapes: Sequence[Sequence[int]],
        bits: int = 4,
        segments: Sequence[int] | Tensor | None = None,
        device: torch.device | str = "cpu",
        backend: str = "",
        report: bool = False,
        sink: Callable[[int, Tensor, Tensor], None] | None = None,
        num_segments: int | None = None,
    ) -> None:
        check_bits(bits)
        if not 1 <= n <= MAX_ROWS:
            raise ValueError(f"n: expected 1 to {MAX_ROWS} rows, found {n}")
        self.n, self.bits, self.backend = n, bits, backend
        self.shapes = tuple(torch.Size(s) for s in shapes)
        numels = [s.numel() for s in self.shapes]
        self._offsets = tile_offsets(numels)
        self._next = 0
        self._filled = 0  # columns of the next tensor that add_columns has packed
        self.tile_segment = segments_to_tiles(segments, numels).to(device)
        given = torch.as_tensor(segments) if segments is not None and len(segments) else None
        seen = int(given.max()) + 1 if given is not None else len(numels)
        self.num_segments = seen if num_segments is None else num_segments
        if self.num_segments < seen:
            raise ValueError(
                f"num_segments: expected at least {seen}, the highest index in segments and one, "
                f"found {num_segments}"
            )
        tiles = self._offsets[-1]
        self.sink = sink
        self._part: tuple[Tensor, Tensor] | None = None
        kept = tiles if sink is None else 0
        self.codes = empty_for_streaming((kept, n, 16 * bits), device)
        self.scales = torch.zeros(kept, n, dtype=torch.bfloat16, device=device)
        self.sum_sq = torch.zeros(n, self.num_segments, dtype=torch.float64, device=device)
        self.max_scale = torch.zeros(n, self.num_segments, dtype=torch.float32, device=device)
        self.errors: Tensor | None = None
        if report:
            self.errors = torch.zeros(len(numels), 2, dtype=torch.float64, device=device)

    def add(self, rows: Sequence[Tensor] | Tensor, center: Tensor | None = None) -> None:
        """Packs the next tensor.

        Args:
            rows: (n, *shape), or n tensors of the tensor's shape; float32, bfloat16 or float16.
            center: one tensor of that shape, subtracted from each row; None: nothing.

        Raises:
            ValueError: sizes do not fit, or all tensors were added.
            TypeError: a dtype is not one of those above.
            NotFiniteError: rows or center hold NaN or Inf; nothing was added.
        """
        if self._next == len(self.shapes):
            raise ValueError(f"Packer: all {len(self.shapes)} tensors were added already")
        k = self._next
        if self._filled:
            raise ValueError(
                f"tensor {k}: expected the rest of its columns, {self._filled} were added already"
            )
        rows = list(rows.unbind(0)) if isinstance(rows, Tensor) else list(rows)
        for i, t in enumerate([*rows] + ([center] if center is not None else [])):
            if t.shape != self.shapes[k]:
                name = f"row {i}" if i < len(rows) else "center"
                raise ValueError(
                    f"tensor {k}, {name}: expected shape {tuple(self.shapes[k])}, "
                    f"found {tuple(t.shape)}"
                )
        if len(rows) != self.n:
            raise ValueError(f"tensor {k}: expected {self.n} rows, found {len(rows)}")
        self._pack(k, rows, center, 0)
        self._next += 1

    def add_columns(
        self,
        rows: Sequence[Tensor] | Tensor,
        begin: int,
        center: Tensor | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        """Packs columns [begin, begin + count) of the next tensor.

        A tensor's columns come in order, in parts that end on multiples of 128 or the tensor's end;
        then `end_tensor`. Parts that end on multiples of 8192 give the bits of the whole (else
        squared norms may differ in their last one).

        Args:
            rows: (n, count), or n tensors of count elements; float32, bfloat16 or float16.
            begin: a multiple of 128.
            center: (count,), subtracted from each row; None: nothing.
            weights: n numbers. The center, contiguous float32, is then written: the rows' weighted
                average as `twa_kernels.average` makes it, on CPUs in the same read of the rows.

        Raises:
            ValueError: sizes do not fit, columns are out of order, or all tensors were added.
            TypeError: a dtype is not one of those above.
            NotFiniteError: rows or center hold NaN or Inf; nothing was added.
        """
        if self._next == len(self.shapes):
            raise ValueError(f"Packer: all {len(self.shapes)} tensors were added already")
        rows = list(rows.unbind(0)) if isinstance(rows, Tensor) else list(rows)
        numel, count = self.shapes[self._next].numel(), rows[0].numel() if rows else 0
        if begin != self._filled:
            raise ValueError(
                f"tensor {self._next}: expected columns from {self._filled} on, found {begin}"
            )
        if (
            begin % TILE
            or (count % TILE and begin + count != numel)
            or begin + count > numel
            or len(rows) != self.n
        ):
            raise ValueError(
                f"tensor {self._next}: expected {self.n} rows and whole tiles of its {numel} "
                f"columns, found {len(rows)} of {count} at {begin}"
            )
        if weights is not None and center is None:
            raise ValueError("weights: expected a center to write, found none")
        self._pack(self._next, rows, center, begin, weights)
        self._filled += count

    def end_tensor(self) -> None:
        """Completes the tensor that `add_columns` was filling.

        Raises:
            ValueError: columns are missing, or all tensors were added.
        """
        if self._next == len(self.shapes):
            raise ValueError(f"Packer: all {len(self.shapes)} tensors were added already")
        if self._filled != self.shapes[self._next].numel():
            raise ValueError(
                f"tensor {self._next}: expected all {self.shapes[self._next].numel()} columns, "
                f"found {self._filled}"
            )
        self._next, self._filled = self._next + 1, 0

    def skip(self) -> None:
        """Leaves the next tensor to another process, which packs it.

        `storage` then says what to receive before `finish`.

        Raises:
            ValueError: all tensors were added, or part of this one was.
        """
        if self._next == len(self.shapes) or self._filled:
            raise ValueError(
                "Packer: expected a tensor that is yet to be packed, "
                f"found {self._next} of {len(self.shapes)} and {self._filled} columns"
            )
        self._next += 1

    def storage(self, k: int) -> list[Tensor]:
        """What `add` writes for tensor k, as uint8 views to send or receive.

        Beside it `sum_sq` is to be summed over processes, `max_scale` to be maximised: together
        they are what one process would have made.
        """
        at = slice(self._offsets[k], self._offsets[k + 1])
        return [self.codes[at], self.scales[at].view(torch.uint8)]

    def resume(self, tensor: int, column: int, sum_sq: Tensor, max_scale: Tensor) -> None:
        """Goes on where another packer with the same arguments and a sink was.

        Args:
            tensor: index of the tensor to go on with.
            column: its first column that is yet to be packed, a multiple of 128.
            sum_sq: (n, L) float64, the other packer's `sum_sq`.
            max_scale: (n, L) float32, the other packer's `max_scale`.

        Raises:
            ValueError: the place or the sums do not fit this packer.
        """
        known = 0 <= tensor < len(self.shapes)
        columns = self.shapes[tensor].numel() if known else 0
        if not (known or tensor == len(self.shapes)) or column % TILE or not 0 <= column <= columns:
            raise ValueError(
                f"Packer: expected a tensor of {len(self.shapes)} and whole tiles of it, "
                f"found {tensor} and column {column}"
            )
        for name, t in (("sum_sq", sum_sq), ("max_scale", max_scale)):
            mine = getattr(self, name)
            if t.shape != mine.shape or not (t >= 0).all() or not torch.isfinite(t).all():
                raise ValueError(
                    f"Packer: {name}: expected {tuple(mine.shape)} finite numbers of at least 0, "
                    f"found shape {tuple(t.shape)}"
                )
            mine.copy_(t)
        self._next, self._filled = tensor, column

    def _averages_while_packing(self) -> bool:
        """Whether the kernel makes the center in the read that packs: only the C++ one does."""
        kernel = dispatch.select("pack", self.tile_segment.device.type, self.backend)
        return kernel is native.pack

    def _pack(
        self,
        k: int,
        rows: list[Tensor],
        center: Tensor | None,
        begin: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        first, tiles = self._offsets[k] + begin // TILE, num_tiles(rows[0].numel())
        at = slice(first, first + tiles)
        if self.sink is None:
            codes, scales = self.codes[at], self.scales[at]
        else:
            # Made once: fresh memory costs more than packing into it.
            if self._part is None or len(self._part[0]) < tiles:
                device = self.tile_segment.device
                self._part = (
                    empty_for_streaming((tiles, self.n, 16 * self.bits), device),
                    torch.empty(tiles, self.n, dtype=torch.bfloat16, device=device),
                )
            codes, scales = (t[:tiles] for t in self._part)
            scales.zero_()
        errors = None if self.errors is None else self.errors[k : k + 1]
        operands = (
            rows,
            [] if center is None else [center],
            [rows[0].numel()],
            self.tile_segment[at],
            self.bits,
            codes,
            scales,
            self.sum_sq,
            self.max_scale,
            errors,
        )
        try:
            if weights is not None and center is not None and self._averages_while_packing():
                check_average(rows, weights, center, self.backend)
                check_pack(*operands, self.backend)
                if bad := native.pack(*operands, weights=weights):
                    raise NotFiniteError(*bad)
            else:
                if weights is not None:
                    torch.ops.twa_kernels.average(rows, list(weights), center, self.backend)
                torch.ops.twa_kernels.pack(*operands, self.backend)
        except NotFiniteError as error:
            raise NotFiniteError(error.row, k, begin + error.column) from None
        if self.sink is not None:
            self.sink(first, codes, scales)

    def finish(self, normalize: str = "row", divisor: Tensor | None = None) -> PackedBasis:
        """The basis, once all tensors were added. Warns where groups became zero.

        Args:
            normalize: "row": every row gets the same norm, the lower quartile of the rows' norms,
                so that a coefficient of 1 moves the weights as far as a near candidate is from the
                center; "none": rows as they are.
            divisor: (n, L) float64 to use instead, for a process that holds some rows of many:
                those rows of `row_divisor(sum_sq of all, normalize)`.

        Returns:
            The basis. It shares its codes with the packer.

        Raises:
            ValueError: tensors are missing, the packer has a sink, or an argument does not fit.
        """
        if self._next != len(self.shapes):
            raise ValueError(f"Packer: {self._next} of {len(self.shapes)} tensors were added")
        if self.sink is not None:
            raise ValueError("Packer: its sink has the codes; finish the scales with Scaling")
        scaling = Scaling.of(self.sum_sq, self.max_scale, normalize, divisor)
        scales = torch.empty(self.scales.shape, dtype=torch.uint8, device=self.scales.device)
        lost = 0
        for first in range(0, len(scales), 1 << 14):
            at = slice(first, first + (1 << 14))
            scales[at], zeros = scaling.apply(self.scales[at], self.tile_segment[at])
            lost += zeros
        if lost:
            warnings.warn(lost_groups(lost, scales.numel()), stacklevel=2)
        error: tuple[float, ...] | None = None
        if self.errors is not None:
            squared, norm = self.errors.unbind(1)
            error = tuple(torch.where(norm > 0, squared / norm, 0.0).sqrt().tolist())
        return PackedBasis(
            self.codes,
            scales.view(torch.float8_e4m3fn),
            scaling.row_scale,
            self.tile_segment,
            scaling.divisor,
            self.shapes,
            self.bits,
            error,
        )


@dataclass(frozen=True)
class Scaling:
    """How scales of 4 significant bits (bfloat16) become e4m3 and a factor per row and segment.

    It is known once all of a segment is packed.

    exponent   (L, n) int16: of the power of two that brings a segment's largest scale into
               [128, 256), inside e4m3's range
    row_scale  (n, L) float32, as in PackedBasis
    divisor    (n, L) float64, as in PackedBasis
    """

    exponent: Tensor
    row_scale: Tensor
    divisor: Tensor

    @classmethod
    def of(
        cls, sum_sq: Tensor, max_scale: Tensor, normalize: str, divisor: Tensor | None = None
    ) -> Scaling:
        """Scaling from a packer's sums; normalize and divisor as in `Packer.finish`."""
        if normalize not in NORMALIZE:
            raise ValueError(f"normalize: expected one of {NORMALIZE}, found {normalize!r}")
        if divisor is None:
            divisor = row_divisor(sum_sq, normalize)
        elif divisor.shape != sum_sq.shape:
            raise ValueError(
                f"divisor: expected shape {tuple(sum_sq.shape)}, found {tuple(divisor.shape)}"
            )
        exponent = torch.frexp(max_scale).exponent - 8
        power = torch.exp2(exponent.double())
        unit = torch.where(max_scale > 0, power, torch.zeros_like(divisor))  # (n, L)
        row_scale = torch.where(divisor > 0, unit / divisor, 0.0).float()
        return cls(exponent.to(torch.int16).T.contiguous(), row_scale, divisor)

    def apply(self, scales: Tensor, tile_segment: Tensor) -> tuple[Tensor, int]:
        """Scales (tiles, n) bfloat16 as the bits of e4m3, uint8; and how many became zero."""
        codes = _e4m3(scales, self.exponent[tile_segment.long()])
        return codes, int(((scales > 0) & (codes == 0)).sum())


def lost_groups(lost: int, total: int) -> str:
    """The warning about groups whose scale is too small for e4m3."""
    return (
        f"{lost} of {total} groups are zero in the packed basis: their rows differ from the center "
        "by less than 2^-17 of what the same row does elsewhere in the segment; finer segments "
        "keep them"
    )


def _e4m3(scales: Tensor, exponent: Tensor) -> Tensor:
    """Bits of scales * 2^-exponent as e4m3, rounded to nearest even.

    Scales are bfloat16 of 4 significant bits, not negative, below 2^(exponent + 8). A normal number
    keeps its three mantissa bits; only the exponent's bias changes.
    """
    bits = scales.view(torch.int16) >> 4  # biased exponent, then the mantissa bits that are in use
    code = bits - (exponent + 120) * 8
    small = (code < 8) | (bits == 0)
    if small.any():  # below e4m3's normal range, or zero
        exact = scales[small].double() * torch.exp2(-exponent[small].double())
        code[small] = (exact * 512).round().to(torch.int16)
    return code.to(torch.uint8)


def row_divisor(sum_sq: Tensor, normalize: str) -> Tensor:
    """What each row part is divided by, (n, L) float64, from its squared norm sum_sq (n, L).

    0 for parts that are zero.
    """
    if normalize == "none":
        return (sum_sq > 0).double()
    norms = sum_sq.sum(1, keepdim=True).sqrt()  # (n, 1)
    # Lower quartile of the norms that are not zero: far-off rows do not set the scale, a
    # near-duplicate of the center neither.
    ordered = torch.where(norms > 0, norms, torch.inf).sort(0).values
    common = ordered.gather(0, ((norms > 0).sum(0, keepdim=True) - 1).clamp(min=0) // 4)  # (1, 1)
    return torch.where(sum_sq > 0, (norms / common).expand_as(sum_sq), 0.0)
