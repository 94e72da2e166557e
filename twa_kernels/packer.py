"""`pack`, and `Packer`, which builds a basis from a stream."""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .basis import PackedBasis
from .layout import MAX_ROWS, TILE, check_bits, num_tiles, segments_to_tiles, tile_offsets
from .native import empty_for_streaming
from .operands import as_list
from .ops.pack import NotFiniteError
from .recorded import regroup
from .scaling import Scaling, lost_groups


def pack(
    rows: Tensor | Sequence[Tensor | Sequence[Tensor]],
    bits: int = 4,
    center: Tensor | Sequence[Tensor] | None = None,
    segments: Sequence[int] | Tensor | None = None,
    normalize: str = "row",
    backend: str = "",
) -> PackedBasis:
    """P = (rows - center) / divisor, packed at `bits` bits.

    Plain PyTorch, unquantised:

        P = torch.stack(rows) - center
        norms = P.norm(dim=1, keepdim=True)
        P *= norms.quantile(0.25, interpolation="lower") / norms

    Args:
        rows: one entry per tensor of the model, each an (n, *shape_k) tensor or n tensors of
            shape_k; float32, bfloat16 or float16. 1 <= n <= 4096.
        bits: 8 (uniform; nothing is clipped), or 4, 3, 2, 1 (Lloyd-Max levels of a Gaussian,
            least-squares scale per 128 columns of a row). Relative error on Gaussian rows: .007,
            .094, .184, .339, .601.
        center: one tensor of shape_k per tensor, or None to subtract nothing.
        segments: segment index of each tensor (or of each tile of 128 columns); None: one segment
            per tensor.
        normalize: "row" or "none", see `Packer.finish`.
        backend: the one to run; "": the default of the device (registry.py).

    Returns:
        The basis, on the device of the rows.

    Raises:
        ValueError: sizes do not fit, or an option is unknown.
        TypeError: rows are no tensors, or a dtype is not one of those above.
        NotFiniteError: rows or center hold NaN or Inf.
    """
    rows = as_list(rows)
    if not rows:
        raise ValueError("rows: expected at least one tensor, found none")
    centers = [None] * len(rows) if center is None else as_list(center)
    if len(centers) != len(rows):
        raise ValueError(f"center: expected {len(rows)} tensors, found {len(centers)}")
    for k, given in enumerate(rows):
        tensors = given if isinstance(given, list | tuple) else [given]
        if odd := [t for t in tensors if not isinstance(t, Tensor)]:
            raise TypeError(
                f"rows[{k}]: expected (n, *shape) or n tensors, of tensor {k} of the model,"
                f" found {type(odd[0]).__name__}"
            )
    first = rows[0][0]
    shapes = [r[0].shape for r in rows]
    packer = Packer(len(rows[0]), shapes, bits, segments, first.device, backend)
    for r, c in zip(rows, centers, strict=True):
        packer.add(r, c)
    return packer.finish(normalize)


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
        backend: the one to run; "": the default of the device (registry.py).
        sink: called with (first tile, codes (tiles, n, 16 * bits) uint8, scales (tiles, n)
            bfloat16) of each part as it is packed, instead of keeping them: memory is then two
            parts, of which each is written over by the next but one. `Scaling` finishes such
            scales.
        num_segments: L, where the last segments may have no columns here.
        allocate: called with (shape, dtype) for the memory of codes and scales, contiguous zeros
            on the device, such as memory that several processes share: each may then pack its
            tensors and `skip` the others'. It is called in the same order everywhere: codes,
            scales as they are packed, and in `finish`, which no longer needs these, the basis's.

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
        sink: Callable[[int, Tensor, Tensor], None] | None = None,
        num_segments: int | None = None,
        allocate: Callable[[tuple[int, ...], torch.dtype], Tensor] | None = None,
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
        given = None
        if segments is not None and len(segments):
            given = torch.as_tensor(segments, device="cpu")
        seen = int(given.max()) + 1 if given is not None else len(numels)
        self.num_segments = seen if num_segments is None else num_segments
        if self.num_segments < seen:
            raise ValueError(
                f"num_segments: expected at least {seen}, the highest index in segments and one, "
                f"found {num_segments}"
            )
        tiles = self._offsets[-1]
        self.sink = sink
        self._parts: list[tuple[Tensor, Tensor]] = []
        kept = tiles if sink is None else 0
        self._allocate = allocate
        if allocate is None:
            self.codes = empty_for_streaming((kept, n, 16 * bits), device)
            self.scales = torch.zeros(kept, n, dtype=torch.bfloat16, device=device)
        else:
            self.codes = allocate((kept, n, 16 * bits), torch.uint8)
            self.scales = allocate((kept, n), torch.bfloat16)
        self.sum_sq = torch.zeros(n, self.num_segments, dtype=torch.float64, device=device)
        self.max_scale = torch.zeros(n, self.num_segments, dtype=torch.float32, device=device)

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
        self._columns_left()
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
        self._columns_left()
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

    def add_recorded(
        self, codes: Sequence[Tensor], scales: Sequence[Tensor], begin: int = 0
    ) -> None:
        """Takes rows that `record` has coded, as they are, for the next columns of the next tensor.

        Columns come in parts as in `add_columns`, then `end_tensor`. Codes are regrouped tile by
        tile at the speed of memory. Squared norms are those of the decoded rows, and have the same
        bits whatever the parts.

        Args:
            codes: n tensors (tiles, 16 * bits) uint8, of these columns.
            scales: n tensors (tiles,) bfloat16 of 4 significant bits.
            begin: the first column, a multiple of 128.

        Raises:
            ValueError: sizes do not fit, columns are out of order, all tensors were added, or a
                scale is none that `record` makes. Nothing was added.
            TypeError: a dtype is not one of those above.
        """
        if len(codes) != self.n or len(scales) != self.n:
            raise ValueError(
                f"codes, scales: expected {self.n} of each, one per row, "
                f"found {len(codes)} and {len(scales)}"
            )
        tiles, left = len(codes[0]), self._columns_left()
        count = min(tiles * TILE, left)
        if begin != self._filled or tiles != num_tiles(count):
            raise ValueError(
                f"tensor {self._next}: expected at most {num_tiles(left)} tiles from column "
                f"{self._filled} on, found {tiles} from {begin} on"
            )
        first = self._offsets[self._next] + begin // TILE
        into, into_scales = self._room(first, tiles)
        squares = regroup(codes, scales, count, into, into_scales)
        segment = self.tile_segment[first : first + tiles].long()
        total = self.sum_sq.cpu()  # where sums are made tile after tile
        total.index_add_(1, segment.cpu(), squares.cpu())
        self.sum_sq.copy_(total)
        scales_of_rows = into_scales.T.float()
        self.max_scale.scatter_reduce_(1, segment.expand(self.n, -1), scales_of_rows, "amax")
        if self.sink is not None:
            self.sink(first, into, into_scales)
        self._filled += count

    def _columns_left(self) -> int:
        """Columns of the next tensor that are yet to be added; ValueError if there is none."""
        if self._next == len(self.shapes):
            raise ValueError(f"Packer: all {len(self.shapes)} tensors were added already")
        return self.shapes[self._next].numel() - self._filled

    def end_tensor(self) -> None:
        """Completes the tensor that `add_columns` was filling.

        Raises:
            ValueError: columns are missing, or all tensors were added.
        """
        if self._columns_left():
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

    def seek(self, tile: int) -> None:
        """Goes on at another tile, for a packer with a sink whose other tiles others pack.

        Args:
            tile: its number among all tiles; the next columns begin there.

        Raises:
            ValueError: there is no such tile.
        """
        if not 0 <= tile < self._offsets[-1]:
            raise ValueError(f"Packer: expected a tile of {self._offsets[-1]}, found {tile}")
        self._next = bisect.bisect_right(self._offsets, tile) - 1
        self._filled = (tile - self._offsets[self._next]) * TILE

    def _room(self, first: int, tiles: int) -> tuple[Tensor, Tensor]:
        """Where codes and scales of these tiles go."""
        if self.sink is None:
            at = slice(first, first + tiles)
            return self.codes[at], self.scales[at]
        # Made once: fresh memory costs more than packing into it. The sink has the one before.
        device = self.tile_segment.device
        oldest = self._parts.pop(0) if len(self._parts) == 2 else None
        if oldest is None or len(oldest[0]) < tiles:
            oldest = (
                empty_for_streaming((tiles, self.n, 16 * self.bits), device),
                torch.empty(tiles, self.n, dtype=torch.bfloat16, device=device),
            )
        self._parts.append(oldest)
        codes, scales = oldest
        return codes[:tiles], scales[:tiles].zero_()

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
        codes, scales = self._room(first, tiles)
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
        )
        ops = torch.ops.twa_kernels
        try:
            if weights is None:
                ops.pack.default(*operands, self.backend)
            else:
                ops.average_and_pack.default(*operands, list(weights), self.backend)
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
        out = self._allocate(tuple(self.scales.shape), torch.uint8) if self._allocate else None
        scales, zeros = scaling.apply(self.scales, self.tile_segment, out)
        if lost := int(zeros):
            warnings.warn(lost_groups(lost, scales.numel()), stacklevel=2)
        return PackedBasis(
            self.codes,
            scales.view(torch.float8_e4m3fn),
            scaling.row_scale,
            self.tile_segment,
            scaling.divisor,
            self.shapes,
            self.bits,
        )
