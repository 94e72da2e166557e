"""`DenseBasis`: the float32 basis (bits=32), plain PyTorch.

It costs n * D * 4 bytes and shows what low bits lose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from twa_kernels import NotFiniteError, Packer, average
from twa_kernels.scaling import row_divisor

from .pieces import Cut
from .segments import Segments


class DenseBasis:
    """P as one matrix per tensor; the counterpart of twa_kernels.PackedBasis.

    Args:
        rows: for each tensor k (n, numel_k); float32, or float64 for checks
        segment: of each tensor, or its first one if `chunk` columns each make one
        divisor: (n, L) float64, what the rows were divided by
        shapes: of the tensors
        chunk: see `Segments`
    """

    bits = 32

    def __init__(
        self,
        rows: list[Tensor],
        segment: list[int],
        divisor: Tensor,
        shapes: tuple[torch.Size, ...],
        chunk: int = 0,
    ) -> None:
        self.rows, self.segment, self.chunk = rows, segment, chunk
        self.divisor, self.shapes = divisor, shapes

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.divisor.shape[0]

    @property
    def num_segments(self) -> int:
        """Number of segments, L."""
        return self.divisor.shape[1]

    @property
    def device(self) -> torch.device:
        """Where all tensors of the basis are."""
        return self.divisor.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self.rows[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return sum(r.nbytes for r in self.rows)

    def to(self, device: torch.device | str) -> DenseBasis:
        """The basis on another device."""
        rows, divisor = [r.to(device) for r in self.rows], self.divisor.to(device)
        return DenseBasis(rows, self.segment, divisor, self.shapes, self.chunk)

    def _runs(self, k: int) -> list[tuple[int, slice]]:
        """(segment, its columns) for each segment of tensor k."""
        numel = self.rows[k].shape[1]
        width = self.chunk or max(1, numel)
        starts = enumerate(range(0, numel, width))
        return [(self.segment[k] + j, slice(a, a + width)) for j, a in starts]

    def project(self, grads: Sequence[Tensor | None]) -> Tensor:
        """c (n, L) = P @ g, per segment; a gradient of None counts as zero."""
        c = torch.zeros(self.n, self.num_segments, device=self.device, dtype=self.dtype)
        for k, (p, g) in enumerate(zip(self.rows, grads, strict=True)):
            if g is not None:
                flat = g.reshape(-1).to(p.dtype)
                for l, at in self._runs(k):
                    c[:, l] += p[:, at] @ flat[at]
        return c

    def select(self, k: int, count: int = 1) -> tuple[DenseBasis, slice]:
        """The basis of `count` tensors from k on, and which segments their coefficients are."""
        at = range(k, k + count)
        first = min(self.segment[j] for j in at)
        columns = slice(first, max(self.segment[j] + max(1, len(self._runs(j))) for j in at))
        divisor, shapes = self.divisor[:, columns], self.shapes[k : k + count]
        segment = [self.segment[j] - first for j in at]
        return DenseBasis(self.rows[k : k + count], segment, divisor, shapes, self.chunk), columns

    def reconstruct(
        self, x: Tensor, center: Sequence[Tensor] | None, out: Sequence[Tensor]
    ) -> None:
        """Writes center + x^T P to `out`, per segment, in the dtypes that are there."""
        for k, (p, o) in enumerate(zip(self.rows, out, strict=True)):
            parts = [x[:, l] @ p[:, at] for l, at in self._runs(k)]
            delta = torch.cat(parts) if parts else p.new_empty(0)
            o.copy_((delta if center is None else center[k].reshape(-1) + delta).view_as(o))


class DensePacker:
    """Collects rows one tensor at a time, as twa_kernels.Packer does.

    Args:
        n: number of rows
        shapes: of the tensors
        segments: of the tensors
        device: where the rows are
    """

    def __init__(
        self,
        n: int,
        shapes: Sequence[torch.Size],
        segments: Segments,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shapes, self.segments, self.chunk = tuple(shapes), list(segments.first), segments.chunk
        self.rows: list[Tensor] = []
        self.filling: Tensor | None = None  # the next tensor, (n, numel)
        self.sum_sq = torch.zeros(n, len(segments.labels), dtype=torch.float64, device=device)
        # nothing to agree on, unlike twa_kernels.Packer
        self.max_scale = torch.zeros(0, dtype=torch.float32, device=device)

    def add_columns(
        self,
        rows: Tensor | Sequence[Tensor],
        begin: int,
        center: Tensor | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        """Takes columns of the next tensor; `end_tensor` follows the last of them.

        Args:
            rows: n rows of as many elements
            begin: the first column
            center: subtracted from each row
            weights: (n,); the center is written first, as the rows' average with these weights
        """
        if weights is not None:
            average(list(rows), weights, center)
        k, count = len(self.rows), rows[0].numel()
        if self.filling is None:
            self.filling = self._room(self.shapes[k].numel())
        p = self.filling[:, begin : begin + count]
        for to, row in zip(p, rows, strict=True):
            to.copy_(row.reshape(-1))
        if center is not None:
            p -= center.reshape(-1)
        if not torch.isfinite(p).all():
            row, column = torch.nonzero(~torch.isfinite(p))[0].tolist()
            raise NotFiniteError(row, k, begin + column)
        if self.chunk:
            self.sum_sq.index_add_(1, self._of_columns(k, begin, count), p.double().square())
        else:
            self.sum_sq[:, self.segments[k]] += p.double().square().sum(1)

    def _room(self, columns: int) -> Tensor:
        """A place for so many columns."""
        return torch.empty(
            len(self.sum_sq), columns, dtype=torch.float32, device=self.sum_sq.device
        )

    def _of_columns(self, k: int, begin: int, count: int) -> Tensor:
        """The segment of each of these columns of tensor k, with `chunk`."""
        columns = torch.arange(begin, begin + count, device=self.sum_sq.device)
        return self.segments[k] + columns // self.chunk

    def end_tensor(self) -> None:
        """Completes the tensor that `add_columns` was filling."""
        if self.filling is None:
            self.filling = self._room(0)
        self.rows.append(self.filling)
        self.filling = None

    def skip(self) -> None:
        """Leaves the next tensor to another process.

        `storage` then says what to receive before `finish`.
        """
        self.rows.append(self._room(self.shapes[len(self.rows)].numel()))

    def storage(self, k: int) -> list[Tensor]:
        """What `add_columns` writes for tensor k, to send or receive."""
        return [self.rows[k]]

    def finish(self, normalize: str, divisor: Tensor | None = None) -> DenseBasis:
        """The basis; its rows are divided in place.

        Args:
            normalize: "row" or "none"
            divisor: (n, L), in the place of what normalize gives
        """
        if divisor is None:
            divisor = row_divisor(self.sum_sq.cpu(), normalize)
        divisor = divisor.to(self.sum_sq.device)
        inverse = torch.where(divisor > 0, 1.0 / divisor, 0.0).float()
        for k, p in enumerate(self.rows):
            if self.chunk:
                p *= inverse[:, self._of_columns(k, 0, p.shape[1])]
            else:
                p *= inverse[:, self.segments[k], None]
        return DenseBasis(self.rows, self.segments, divisor, self.shapes, self.chunk)


#: what collects the rows of a basis of any bits
AnyPacker = Packer | DensePacker


def new_packer(
    n: int,
    cut: Cut,
    bits: int,
    segments: Segments,
    device: torch.device | str = "cpu",
    allocate: Callable[[tuple[int, ...], torch.dtype], Tensor] | None = None,
) -> AnyPacker:
    """A packer for a packed basis, or for bits=32 a dense one.

    Args:
        n: rows
        cut: the tensors, or the parts of them that are packed here
        bits: of the basis
        segments: of the tensors
        device: where the rows and the basis are
        allocate: makes the memory of a packed basis, see `twa_kernels.Packer`
    """
    shapes = cut.pieces.shapes
    if bits != 32:
        tiles, count = cut.tile_segments(), len(segments.labels)
        return Packer(n, shapes, bits, tiles, device, num_segments=count, allocate=allocate)
    return DensePacker(n, shapes, replace(segments, first=cut.firsts), device)
