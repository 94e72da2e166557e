"""`basis="orthonormal"`: in each segment an orthonormal basis of the candidates' distances from the center, instead of the distances themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import twa_kernels as tk
from twa_kernels.columns import PACK_COLUMNS
from twa_kernels.packed import row_divisor

from .dense import DenseBasis, new_packer
from .placement import Placement
from .weights import not_finite


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


def build(place: Placement, centers: list[Tensor], segments: list[int], bits: int, normalize: str) -> tuple[tk.PackedBasis | DenseBasis, Coordinates]:
    """Reads every tensor twice more than its center took (Gram matrix with a sample before it, then Q), one at a time. Packed bits: Q is never
    dense in memory. Each rank feeds its own columns to Gram-Schmidt, so that all get the same factors, and keeps its part of Q."""
    n, num_segments = len(place.candidates), max(segments) + 1
    everything = slice(0, n)

    def read(k: int) -> tuple[list[Tensor], Tensor]:
        return place.read(k, everything), centers[k]

    numels = [t.numel() for t in place.tensors]
    members = [[k for k, l in enumerate(segments) if l == segment] for segment in range(num_segments)]
    found = [_of_segment(place, read, tensors, sum(numels[k] for k in tensors)) for tensors in members]
    r = max(1, max(o.rank if o else 0 for o in found))
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
    mine = place.rows_of(r)  # rows of Q that this rank keeps
    if mine.start == mine.stop:
        raise ValueError(f"placement {place.name!r}: the orthonormal basis has {r} rows, fewer than there are ranks; use 'replicate' or 'columns'")
    shapes = [h.shape for h in place.held]
    packer = new_packer(mine.stop - mine.start, shapes, bits, segments)
    for k, l in enumerate(segments):
        if not place.packs(k):
            packer.skip()
            continue
        w, center = read(k)
        w, center, numel = [row.reshape(-1) for row in w], center.reshape(-1), shapes[k].numel()
        for begin in range(0, numel, PACK_COLUMNS):
            at = slice(begin, begin + PACK_COLUMNS)
            q = found[l].apply([[row[at] for row in w]], center=[center[at]])[0]
            q = torch.nn.functional.pad(q, (0, 0, 0, r - len(q)))[mine]
            packer.add_columns(q if bits != 32 else q * float(scale[l]), begin)
        packer.end_tensor()
    place.exchange(packer, centers)
    basis = packer.finish("none", torch.ones_like(packer.sum_sq))
    if bits == 32:
        return basis, coordinates
    return replace(basis, row_scale=(basis.row_scale.double() * scale).float()), coordinates


def _of_segment(place: Placement, read: Callable, tensors: list[int], columns: int) -> tk.Orthonormal | None:
    """The implicit basis of one segment, streamed tensor by tensor."""
    if not columns:  # parameters without elements
        return None
    fed = [k for k in tensors if place.feeds(k)]

    def part(which: int) -> Callable[[], Iterator]:
        nothing = [torch.zeros(0)] * len(place.candidates), torch.zeros(0)  # a rank without columns of this segment takes part all the same
        return lambda: (read(k)[which] for k in fed) if fed else iter([nothing[which]])

    reduce = place.world.sum_ if place.world.group is not None else None
    try:
        return tk.orthonormalize(part(0), center=part(1), form="implicit", reduce=reduce)
    except tk.NotFiniteError as error:
        rows = read(fed[error.tensor])[0]
        raise not_finite(place.candidates, list(place.layout.trained)[fed[error.tensor]], rows) from error
