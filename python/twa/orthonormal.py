"""`basis="orthonormal"`: in each segment an orthonormal basis of the candidates' distances from the center, instead of the distances themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import twa_kernels as tk
from twa_kernels.columns import PACK_COLUMNS
from twa_kernels.packed import row_divisor

from .dense import DenseBasis

#: rows (n tensors) and center of one tensor of the model
Read = Callable[[int], tuple[list[Tensor], Tensor]]


@dataclass(frozen=True)
class Coordinates:
    """What the coefficients of an orthonormal basis are in terms of the candidates; float64. Rows beyond a segment's rank are zero.

    transform  (L, r, n): Q_l = transform_l @ (W_l - center_l), P_l = scale_l * Q_l
    R          (L, n, r): W_l - center_l = R_l @ Q_l
    scale      (L,)
    dropped    per segment, the candidates that depend on earlier ones there, with their relative distances
    """

    transform: Tensor
    R: Tensor
    scale: Tensor
    dropped: tuple[tuple[tuple[int, float], ...], ...]

    def shares(self, x: Tensor) -> Tensor:
        """Coefficients x (r, L) -> s (n, L) with theta = center + sum_i s[i, l] (w_i - center)."""
        return torch.einsum("lri,rl->il", self.transform, x.double().cpu() * self.scale)

    def coefficients(self, shares: Tensor) -> Tensor:
        """s (n, L) -> x (r, L): exactly, also for candidates that were dropped."""
        inverse = torch.where(self.scale > 0, 1 / self.scale, 0.0)
        return torch.einsum("lir,il->rl", self.R, shares.double().cpu()) * inverse


def build(
    read: Read, shapes: list[torch.Size], segments: list[int], num_segments: int, bits: int, normalize: str
) -> tuple[tk.PackedBasis | DenseBasis, Coordinates]:
    """Reads every tensor three times (sample and Gram matrix, then Q), one at a time. Packed bits: Q is never dense in memory."""
    members = [[k for k, l in enumerate(segments) if l == segment] for segment in range(num_segments)]
    found = [_of_segment(read, tensors, [s.numel() for s in shapes]) for tensors in members]
    n, r = len(read(0)[0]), max(1, max(o.rank if o else 0 for o in found))
    transform, R = torch.zeros(num_segments, r, n, dtype=torch.float64), torch.zeros(num_segments, n, r, dtype=torch.float64)
    for l, o in enumerate(found):
        if o is None:
            continue
        transform[l, : o.rank], R[l, :, : o.rank] = o.transform, o.R
    # Rows as long as those of the basis of deltas are on average (root mean square), so that the same learning rates fit.
    sum_sq = R.square().sum(2).T  # (n, L): squared lengths of the deltas
    if normalize == "none":
        scale = torch.ones(num_segments, dtype=torch.float64)
    else:
        divisor = row_divisor(sum_sq, normalize)
        scale = torch.where(divisor > 0, sum_sq / divisor.clamp(min=1e-300).square(), 0.0).mean(0).sqrt()
    coordinates = Coordinates(transform, R, scale, tuple(o.dropped if o else () for o in found))
    if bits == 32:
        rows = []
        for k, l in enumerate(segments):
            w, center = read(k)
            q = torch.zeros(r, shapes[k].numel())
            if shapes[k].numel():
                q[: found[l].rank] = found[l].apply([w], center=[center])[0].view(found[l].rank, shapes[k].numel()) * float(scale[l])
            rows.append(q)
        divisor = torch.ones(r, num_segments, dtype=torch.float64)
        return DenseBasis(rows, segments, divisor, tuple(shapes)), coordinates
    packer = tk.Packer(r, shapes, bits, segments)
    for k, l in enumerate(segments):
        w, center = read(k)
        w, center = [row.reshape(-1) for row in w], center.reshape(-1)
        for begin in range(0, shapes[k].numel(), PACK_COLUMNS):
            at = slice(begin, begin + PACK_COLUMNS)
            q = found[l].apply([[row[at] for row in w]], center=[center[at]])[0]
            packer.add_columns(torch.nn.functional.pad(q, (0, 0, 0, r - len(q))), begin)
        packer.end_tensor()
    basis = packer.finish("none")
    return replace(basis, row_scale=(basis.row_scale.double() * scale).float()), coordinates


def _of_segment(read: Read, tensors: list[int], numels: list[int]) -> tk.Orthonormal | None:
    """The implicit basis of one segment, streamed tensor by tensor."""

    def part(which: int) -> Callable[[], Iterator]:
        return lambda: (read(k)[which] for k in tensors)

    try:
        if not any(numels[k] for k in tensors):  # parameters without elements
            return None
        return tk.orthonormalize(part(0), center=part(1), form="implicit")
    except tk.NotFiniteError as error:
        raise tk.NotFiniteError(error.row, tensors[error.tensor], error.column) from error
