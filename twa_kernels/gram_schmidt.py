"""The small matrices of block Gram-Schmidt: which row is subtracted from which, the row-order Cholesky factor, estimates of its errors.
All float64, on the CPU; n is the number of rows of W, r the rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import PROBES


def probes(r: int) -> Tensor:
    """(6, r) Gaussian vectors, the same every time, exact in float32."""
    return torch.randn(PROBES, r, generator=torch.Generator().manual_seed(0)).double()


@dataclass(frozen=True)
class Factor:
    """Q = A * differences, and differences = L * Q (both float64 on the CPU)."""

    parent: Tensor  # (n,) int32
    A: Tensor  # (r, n)
    L: Tensor  # (n, r)
    kept: tuple[int, ...]
    distances: Tensor  # (n,) to the span before, absolute
    norms: Tensor  # (n,) of the rows
    short: Tensor | None  # A in float32 numbers, if that is enough
    loss: float  # predicted loss of orthogonality
    doubt: bool  # a distance may be an artefact of rounding errors

    @property
    def rank(self) -> int:
        return len(self.kept)

    def undo_differences(self) -> tuple[Tensor, Tensor]:
        """R = U^-1 L and transform = A U, where U subtracts parents."""
        n = len(self.parent)
        U, child = torch.eye(n, dtype=torch.float64), (self.parent >= 0).nonzero().flatten()
        U[child, self.parent[child].long()] = -1.0
        return torch.linalg.solve_triangular(U, self.L, upper=False, unitriangular=True), self.A @ U


def choose_parents(
    W: Tensor, center: Tensor | None, first: int = 0, columns: int = 0, reduce: Callable[[Tensor], None] = lambda v: None
) -> tuple[list[int], int]:
    """For rows of W (n, some columns) from `first` on: the nearest earlier row, the latest of equally near ones; -1 if the center (zero) is nearer.
    And the sum of `columns` over ranks."""
    x = W if center is None else W - center
    vector = torch.cat([pack_lower(x @ x.T), x.new_tensor([columns])])
    reduce(vector)
    gram = unpack_lower(vector[:-1].cpu(), len(x))
    square = gram.diagonal()
    apart = (square[:, None] + square[None, :] - 2 * gram).clamp(min=0)  # (n, n) squared distances
    apart = apart.nan_to_num(nan=torch.inf).masked_fill(torch.ones_like(apart, dtype=torch.bool).triu(), torch.inf)
    distance, back = apart.flip(1).min(1)  # the first of the flipped ones is the latest
    parents = torch.where((distance <= square) & distance.isfinite(), len(x) - 1 - back, -1)
    return parents[first:].tolist(), int(vector[-1])


def rounded_inverse(L: Tensor, n: int, columns: list[int]) -> Tensor:
    """A (r, n) of float32 numbers with A[:, columns] @ L = I as nearly as those allow, L (r, r) lower triangular: by back substitution, where each
    entry makes up for the rounding of those before it. Rounding the inverse itself leaves their sum, the same for every column of W."""
    r = len(L)
    a, short, eye = L.new_zeros(r, r), L.new_zeros(r, n), torch.eye(r, dtype=L.dtype)
    for j in range(r - 1, -1, -1):
        a[j:, j] = ((eye[j:, j] - a[j:, j + 1 :] @ L[j + 1 :, j]) / L[j, j]).float().double()
    short[:, columns] = a
    return short


def schatten4(y: Tensor) -> float:
    """Estimate of the Schatten 4-norm of E, which is at least its largest singular value, from y = E z (r, 6) for Gaussian z:
    (y_i . y_j)^2 has the expectation tr(E^4)."""
    products = (y.T @ y).triu(1)
    return float(products.square().sum() / (PROBES * (PROBES - 1) / 2)) ** 0.25


def pack_lower(m: Tensor) -> Tensor:
    return m[torch.ones_like(m, dtype=torch.bool).tril()]


def unpack_lower(v: Tensor, n: int) -> Tensor:
    m = v.new_zeros(n, n)
    m[torch.ones_like(m, dtype=torch.bool).tril()] = v
    return m + m.tril(-1).T


def norm2(a: Tensor) -> float:
    """Largest singular value, by a few steps of the power iteration from the longest row: within a few percent, which is enough to decide by."""
    if not a.numel():
        return 0.0
    v = a[int(a.square().sum(1).argmax())]
    value = 0.0
    for _ in range(6):
        u = a @ (v / v.norm())
        value = float(u.norm())
        v = a.T @ u
    return value


def row_cholesky(
    gram: Tensor, first: int, before: Tensor, scale_before: Tensor, shortest: Tensor, noise: float
) -> tuple[Tensor, Tensor, list[int], Tensor, Tensor, bool]:
    """Row-order Cholesky factorisation of rows first .. n - 1 of a Gram matrix, that leaves out dependent rows.

    gram          (n, n), rows from `first` on
    before        (r0, first): A of the earlier rows;  scale_before (first,): their lengths
    shortest      (n - first,): a row this near to the span of those before it is dropped
    noise         root mean square error of an entry of the Gram matrix, relative to both rows' lengths
    returns A (r, n) with orthonormal A * rows, L (n - first, r) with rows = L * Q, kept rows, their distances, lengths of all new rows,
            and whether some distance may be an artefact of `noise`.
    """
    n = gram.shape[0]
    new = n - first
    length = gram.diagonal()[first:].clamp(min=0).sqrt()
    inverse = torch.where(length > 0, 1 / length, 0.0)
    g = gram[first:, first:] * inverse[:, None] * inverse
    lo = (gram[first:, :first] @ before.T) * inverse[:, None]  # (new, r0): coefficients on the earlier Q
    schur = g - lo @ lo.T
    scales = torch.cat([scale_before, length])

    def rows_of_A(T: Tensor, kept: list[int]) -> Tensor:
        """T (m, k): rows of the inverse of the kept rows' factor, in units of length -> (m, n)"""
        a = gram.new_zeros(len(T), n)
        t = T * inverse[kept]
        a[:, [first + i for i in kept]] = t
        a[:, :first] = -(t @ (lo[kept] * length[kept, None])) @ before  # what they have on the earlier rows
        return a

    def error_of(a: Tensor) -> Tensor:
        """Bound of the error of a squared distance, over that distance: of eight times the usual error of an entry."""
        return 8 * noise * (a.abs() @ scales).square()

    factor, info = torch.linalg.cholesky_ex(schur)
    if info == 0:  # the usual case: every row is independent beyond doubt
        T = torch.linalg.solve_triangular(factor, torch.eye(new, dtype=gram.dtype), upper=False)
        A = rows_of_A(T, list(range(new)))
        distances = factor.diagonal() * length
        if bool((distances > shortest * 1.0001).all()) and bool((16 * error_of(A) < 1).all()):
            L = torch.cat([lo, factor], 1) * length[:, None]
            return torch.cat([torch.nn.functional.pad(before, (0, new)), A]), L, list(range(new)), distances, length, False

    kept: list[int] = []
    doubt = False
    T = gram.new_zeros(new, new)  # of the kept rows, grown in place
    L = gram.new_zeros(new, new)
    distances = gram.new_zeros(new)
    for i in range(new):
        k = len(kept)
        t = T[:k, :k]
        l = t @ schur[i, kept]
        L[i, :k] = l
        if length[i] == 0:
            continue
        pivot = float(schur[i, i] - l @ l)
        row = torch.cat([-(l @ t), gram.new_ones(1)])  # of the inverse, times the pivot's root
        members = [*kept, i]
        a = rows_of_A(row[None], members) * length[i]  # for a pivot of 1
        error = float(error_of(a / length[i]))
        square = float(shortest[i] / length[i]) ** 2
        distances[i] = max(pivot, 0.0) ** 0.5 * length[i]
        if pivot + error <= square:
            continue
        if pivot < 16 * error:
            doubt = True
            pivot = max(pivot, error)
        elif pivot <= square:
            continue
        T[k, : k + 1] = row / pivot**0.5
        L[i, k] = pivot**0.5
        kept.append(i)
    k = len(kept)
    A = torch.cat([torch.nn.functional.pad(before, (0, new)), rows_of_A(T[:k, :k], kept)])
    return A, torch.cat([lo, L[:, :k]], 1) * length[:, None], kept, distances, length, doubt
