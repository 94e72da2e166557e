"""The small matrices of block Gram-Schmidt.

Which row is subtracted from which, the row-order Cholesky factor, estimates of its errors. All
float64, on the CPU; n is the number of rows of W, r the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..operands import PROBES


def probes(r: int) -> Tensor:
    """(6, r) Gaussian vectors, the same every time, exact in float32."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(PROBES, r, generator=generator, dtype=torch.float32, device="cpu")
    return drawn.double()


@dataclass(frozen=True)
class Factor:
    """Q = A * differences, and differences = L * Q (both float64 on the CPU)."""

    parent: Tensor  # (n,) int32
    A: Tensor  # (r, n)
    L: Tensor  # (n, r)
    kept: tuple[int, ...]
    distances: Tensor  # (n,) to the span before, absolute
    norms: Tensor  # (n,) of the rows
    fast: bool  # A consists of float32 numbers, and float32 is enough to apply it
    loss: float  # predicted loss of orthogonality
    doubt: bool  # a distance may be an artefact of rounding errors
    center: bool  # whether the rows' distances from a center were factorised

    @property
    def rank(self) -> int:
        return len(self.kept)

    @property
    def U(self) -> Tensor:
        """(n, n) unit lower triangular: differences = U (W - center)."""
        n = len(self.parent)
        U = torch.eye(n, dtype=torch.float64, device="cpu")
        child = (self.parent >= 0).nonzero().flatten()
        U[child, self.parent[child].long()] = -1.0
        return U

    def undo_differences(self) -> tuple[Tensor, Tensor]:
        """R = U^-1 L and transform = A U."""
        U = self.U
        R = torch.linalg.solve_triangular(U, self.L, upper=False, unitriangular=True)
        return R, self.A @ U


def choose_parents(
    W: Tensor,
    center: Tensor | None,
    first: int = 0,
    columns: int = 0,
    reduce: Callable[[Tensor], None] = lambda v: None,
    dropped: Sequence[int] = (),
) -> tuple[list[int], int]:
    """Row to subtract from each row of W (n, some columns), from row `first` on.

    It is the nearest earlier row that is not among `dropped`, the latest of equally near ones; -1
    if the center (zero) is nearer. Also returned: the sum of `columns` over ranks.
    """
    x = W if center is None else W - center
    vector = torch.cat([pack_lower(x @ x.T), x.new_tensor([columns])])
    reduce(vector)
    gram = unpack_lower(vector[:-1].cpu(), len(x))
    square = gram.diagonal()
    apart = (square[:, None] + square[None, :] - 2 * gram).clamp(min=0)  # (n, n) squared distances
    apart = apart.nan_to_num(nan=torch.inf).masked_fill(
        torch.ones_like(apart, dtype=torch.bool).triu(), torch.inf
    )
    apart[:, list(dropped)] = torch.inf
    distance, back = apart.flip(1).min(1)  # the first of the flipped ones is the latest
    parents = torch.where((distance <= square) & distance.isfinite(), len(x) - 1 - back, -1)
    return parents[first:].tolist(), int(vector[-1])


def rounded_inverse(L: Tensor, n: int, columns: list[int]) -> Tensor:
    """A (r, n) of float32 numbers with A[:, columns] @ L = I as nearly as those allow.

    L (r, r) is lower triangular. By back substitution, where each entry makes up for the rounding
    of those before it. Rounding the inverse itself leaves their sum, the same for every column of
    W.
    """
    r = len(L)
    a, short, eye = L.new_zeros(r, r), L.new_zeros(r, n), torch.eye(r, dtype=L.dtype, device="cpu")
    for j in range(r - 1, -1, -1):
        a[j:, j] = ((eye[j:, j] - a[j:, j + 1 :] @ L[j + 1 :, j]) / L[j, j]).float().double()
    short[:, columns] = a
    return short


def schatten4(y: Tensor) -> float:
    """Estimate of the Schatten 4-norm of E from y = E z (r, 6) for Gaussian z.

    The norm is at least E's largest singular value. (y_i . y_j)^2 has the expectation tr(E^4).
    Where E has rank one the estimate is below half of the norm once in twenty times.
    """
    products = (y.T @ y).triu(1)
    return float(products.square().sum() / (PROBES * (PROBES - 1) / 2)) ** 0.25


def pack_lower(m: Tensor) -> Tensor:
    """Lower triangle of m (n, n), diagonal included, as a vector."""
    return m[torch.ones_like(m, dtype=torch.bool).tril()]


def unpack_lower(v: Tensor, n: int) -> Tensor:
    """Symmetric matrix (n, n) with the lower triangle that `pack_lower` made v of."""
    m = v.new_zeros(n, n)
    m[torch.ones_like(m, dtype=torch.bool).tril()] = v
    return m + m.tril(-1).T


def norm2(a: Tensor) -> float:
    """Largest singular value, by a few steps of the power iteration from the longest row.

    Within a few percent, which is enough to decide by.
    """
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
    gram: Tensor,
    first: int,
    before: Tensor,
    scale_before: Tensor,
    shortest: Tensor,
    noise: float,
    parent: Tensor,
    keep_all: bool = False,
    negligible: float = 0.0,
) -> tuple[Tensor, Tensor, list[int], Tensor, Tensor, bool, Tensor]:
    """Row-order Cholesky factorisation of rows first .. n - 1 of a Gram matrix of differences.

    Dependent rows are left out.

    gram          (n, n), rows from `first` on
    before        (r0, first): A of the earlier rows
    scale_before  (first,): lengths of the earlier rows
    shortest      (n - first,): a row this near to the span of those before it is dropped
    noise         root mean square error of an entry of the Gram matrix, relative to both rows'
                  lengths
    parent        (n,): what was subtracted from each row. Differences from a row that is dropped
                  become differences from that row's own parent: else what the dropped row has
                  outside of the span would be lost to all rows after it
    keep_all      leave out zeros only, and call the rest in doubt
    negligible    a squared distance, relative to the row's length, that is in doubt but at most
                  this is taken for zero

    Returns A (r, n) with orthonormal A * rows, L (n - first, r) with rows = L * Q, kept rows, their
    distances, lengths of all new rows, whether some distance may be an artefact of `noise`, and the
    parents.
    """
    n = gram.shape[0]
    new = n - first
    shortest = shortest.clone()

    def scaled(gram: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        length = gram.diagonal()[first:].clamp(min=0).sqrt()
        inverse = torch.where(length > 0, 1 / length, 0.0)
        # (new, r0): coefficients on the earlier Q
        lo = (gram[first:, :first] @ before.T) * inverse[:, None]
        return length, inverse, lo, gram[first:, first:] * inverse[:, None] * inverse - lo @ lo.T

    length, inverse, lo, schur = scaled(gram)

    def rows_of_A(T: Tensor, kept: list[int]) -> Tensor:
        """Rows (m, n) of A from rows T (m, k) of the inverse of the kept rows' factor.

        T is in units of length.
        """
        a = gram.new_zeros(len(T), n)
        t = T * inverse[kept]
        a[:, [first + i for i in kept]] = t
        # What they have on the earlier rows.
        a[:, :first] = -(t @ (lo[kept] * length[kept, None])) @ before
        return a

    def error_of(a: Tensor) -> Tensor:
        """Bound of the error of a squared distance, over that distance.

        For entries that are off by eight times the usual error.
        """
        return 8 * noise * (a.abs() @ torch.cat([scale_before, length])).square()

    factor, info = torch.linalg.cholesky_ex(schur)
    if info == 0 and not keep_all:  # the usual case: every row is independent beyond doubt
        eye = torch.eye(new, dtype=gram.dtype, device="cpu")
        T = torch.linalg.solve_triangular(factor, eye, upper=False)
        A = rows_of_A(T, list(range(new)))
        distances = factor.diagonal() * length
        if bool((distances > shortest * 1.0001).all()) and bool((16 * error_of(A) < 1).all()):
            A = torch.cat([torch.nn.functional.pad(before, (0, new)), A])
            L = torch.cat([lo, factor], 1) * length[:, None]
            return A, L, list(range(new)), distances, length, False, parent

    gram, parent = gram.clone(), parent.clone()
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
        pivot = float(schur[i, i] - l @ l)
        dropped = bool(length[i] == 0)
        if not dropped:
            row = torch.cat([-(l @ t), gram.new_ones(1)])  # of the inverse, times the pivot's root
            error = float(error_of(rows_of_A(row[None], [*kept, i])))
            square = float(shortest[i] / length[i]) ** 2
            distances[i] = max(pivot, 0.0) ** 0.5 * length[i]
            uncertain = keep_all or (pivot + error > square and pivot < 16 * error)
            if not keep_all and 16 * error <= negligible:
                uncertain = False
                square = max(square, 16 * error)
            dropped = not uncertain and pivot <= square
        if dropped:
            children = (parent == first + i).nonzero().flatten()
            for c in children.tolist():
                gram[c, :] += gram[first + i, :]
                gram[:, c] += gram[:, first + i]
                parent[c] = parent[first + i]
            if len(children):
                length, inverse, lo, schur = scaled(gram)
            continue
        if uncertain:
            doubt = True
            pivot = max(pivot, error, 1e-30)
        T[k, : k + 1] = row / pivot**0.5
        L[i, k] = pivot**0.5
        kept.append(i)
    k = len(kept)
    A = torch.cat([torch.nn.functional.pad(before, (0, new)), rows_of_A(T[:k, :k], kept)])
    return A, torch.cat([lo, L[:, :k]], 1) * length[:, None], kept, distances, length, doubt, parent


def row_gram_schmidt(
    rows: Tensor, first: int, r0: int, shortest: Tensor
) -> tuple[Tensor, Tensor, list[int], Tensor]:
    """Gram-Schmidt, twice a row, of short rows (n, k) in the coordinates of an orthonormal frame.

    Rows before `first` span its first r0 vectors.

    shortest  (n,): a row this near to the span of the rows kept before it is dropped

    Returns B (r, k) with orthonormal rows, R (n, r) with rows = R B up to what is dropped, kept
    rows from `first` on, distances (n - first,).
    """
    n, size = rows.shape
    B = rows.new_zeros(r0 + n - first, size)
    B[:r0, :r0] = torch.eye(r0, dtype=rows.dtype, device="cpu")
    R = rows.new_zeros(n, r0 + n - first)
    R[:first, :r0] = rows[:first, :r0]
    kept: list[int] = []
    distances = rows.new_zeros(n - first)
    for i in range(first, n):
        r = r0 + len(kept)
        v = rows[i].clone()
        for _ in range(2):
            c = B[:r] @ v
            v -= c @ B[:r]
            R[i, :r] += c
        distances[i - first] = v.norm()
        if float(v.norm()) > float(shortest[i]):
            B[r] = v / v.norm()
            R[i, r] = v.norm()
            kept.append(i)
    r = r0 + len(kept)
    return B[:r], R[:, :r], kept, distances
