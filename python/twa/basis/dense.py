"""`DenseBasis`: the float32 basis (bits=32), plain PyTorch.

It costs n * D * 4 bytes and shows what low bits lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from twa_kernels import NotFiniteError, Packer, average
from twa_kernels.packed import row_divisor

from .segments import Segments


class DenseBasis:
    """P as one (n, numel_k) matrix per tensor (float32, or float64 for checks); the counterpart of
    twa_kernels.PackedBasis.

    segment  of each tensor, or its first one if `chunk` columns each make one
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
        self.rows, self.segment, self.divisor, self.shapes, self.chunk = (
            rows,
            segment,
            divisor,
            shapes,
            chunk,
        )

    @property
    def n(self) -> int:
        return self.divisor.shape[0]

    @property
    def num_segments(self) -> int:
        return self.divisor.shape[1]

    @property
    def device(self) -> torch.device:
        return self.divisor.device

    @property
    def dtype(self) -> torch.dtype:
        return self.rows[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(r.numel() * r.element_size() for r in self.rows)

    def to(self, device: torch.device | str) -> DenseBasis:
        return DenseBasis(
            [r.to(device) for r in self.rows],
            self.segment,
            self.divisor.to(device),
            self.shapes,
            self.chunk,
        )

    def _runs(self, k: int) -> list[tuple[int, slice]]:
        """(segment, its columns) of tensor k."""
        numel = self.rows[k].shape[1]
        return [
            (self.segment[k] + j, slice(a, a + (self.chunk or numel)))
            for j, a in enumerate(range(0, numel, self.chunk or max(1, numel)))
        ]

    def project(self, grads: Sequence[Tensor | None]) -> Tensor:
        """c (n, L) = P @ g, per segment."""
        c = torch.zeros(self.n, self.num_segments, device=self.device, dtype=self.dtype)
        for k, (p, g) in enumerate(zip(self.rows, grads, strict=True)):
            if g is not None:
                flat = g.reshape(-1).to(p.dtype)
                for l, at in self._runs(k):
                    c[:, l] += p[:, at] @ flat[at]
        return c

    def gram(self) -> Tensor:
        """G (L, n, n) float64: P_l @ P_l.T."""
        total = torch.zeros(
            self.num_segments, self.n, self.n, dtype=torch.float64, device=self.device
        )
        for k, p in enumerate(self.rows):
            for l, at in self._runs(k):
                total[l] += (p[:, at] @ p[:, at].T).double()
        return total

    def select(self, k: int) -> tuple[DenseBasis, slice]:
        """The basis of tensor k alone, and which segments its coefficients are."""
        columns = slice(self.segment[k], self.segment[k] + max(1, len(self._runs(k))))
        return (
            DenseBasis(
                [self.rows[k]], [0], self.divisor[:, columns], (self.shapes[k],), self.chunk
            ),
            columns,
        )

    def reconstruct(
        self, x: Tensor, center: Sequence[Tensor] | None, out: Sequence[Tensor]
    ) -> None:
        """out = center + x^T P, per segment, in place."""
        for k, (p, o) in enumerate(zip(self.rows, out, strict=True)):
            parts = [x[:, l] @ p[:, at] for l, at in self._runs(k)]
            delta = torch.cat(parts) if parts else p.new_empty(0)
            o.copy_((delta if center is None else center[k].reshape(-1) + delta).view_as(o))


class DensePacker:
    """Collects rows one tensor at a time, as twa_kernels.Packer does."""

    def __init__(self, n: int, shapes: Sequence[torch.Size], segments: Segments) -> None:
        self.shapes, self.segments, self.chunk = tuple(shapes), list(segments.first), segments.chunk
        self.rows: list[Tensor] = []
        self.filling: Tensor | None = None  # the next tensor, (n, numel)
        self.sum_sq = torch.zeros(n, len(segments.labels), dtype=torch.float64)
        self.max_scale = torch.zeros(0)  # nothing to agree on, unlike twa_kernels.Packer

    def add_columns(
        self,
        rows: Tensor | Sequence[Tensor],
        begin: int,
        center: Tensor | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        """Columns from `begin` on of the next tensor, minus center: n rows of as many elements;
        then `end_tensor`. weights: center is written first, as the rows' weighted average."""
        if weights is not None:
            average(list(rows), weights, center)
        k, count = len(self.rows), rows[0].numel()
        if self.filling is None:
            self.filling = torch.empty(len(self.sum_sq), self.shapes[k].numel())
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

    def _of_columns(self, k: int, begin: int, count: int) -> Tensor:
        """The segment of each of these columns of tensor k, with `chunk`."""
        return self.segments[k] + torch.arange(begin, begin + count) // self.chunk

    def end_tensor(self) -> None:
        """The tensor that `add_columns` was filling is complete."""
        if self.filling is None:
            self.filling = torch.empty(len(self.sum_sq), 0)
        self.rows.append(self.filling)
        self.filling = None

    def skip(self) -> None:
        """Leaves the next tensor to another process; `storage` then says what to receive before
        `finish`.
        """
        self.rows.append(torch.empty(len(self.sum_sq), self.shapes[len(self.rows)].numel()))

    def storage(self, k: int) -> list[Tensor]:
        return [self.rows[k]]

    def finish(self, normalize: str, divisor: Tensor | None = None) -> DenseBasis:
        divisor = row_divisor(self.sum_sq, normalize) if divisor is None else divisor
        inverse = torch.where(divisor > 0, 1.0 / divisor, 0.0).float()
        for k, p in enumerate(self.rows):
            p *= (
                inverse[:, self._of_columns(k, 0, p.shape[1])]
                if self.chunk
                else inverse[:, self.segments[k], None]
            )
        return DenseBasis(self.rows, self.segments, divisor, self.shapes, self.chunk)


def new_packer(
    n: int,
    shapes: Sequence[torch.Size],
    bits: int,
    segments: Segments,
    begins: Sequence[int] | None = None,
) -> Packer | DensePacker:
    """For a packed basis, or for bits=32 a dense one. begins: where the parts of tensors that have
    these shapes begin in them.
    """
    numels = [s.numel() for s in shapes]
    if bits != 32:
        return Packer(
            n, shapes, bits, segments.of_tiles(numels, begins), num_segments=len(segments.labels)
        )
    if segments.chunk and begins:
        if any(
            begin % segments.chunk for begin, numel in zip(begins, numels, strict=True) if numel
        ):
            raise ValueError(
                f"bits=32 with granularity {segments.chunk}: expected shards that begin at"
                " multiples of it; use packed bits, or another"
            )
        segments = replace(
            segments,
            first=[
                f + begin // segments.chunk for f, begin in zip(segments.first, begins, strict=True)
            ],
        )
    return DensePacker(n, shapes, segments)
