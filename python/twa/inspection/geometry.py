"""Norms, distances and angles of candidates, from their coordinates in an orthonormal basis.

They take n^2 numbers, whatever the size of the models.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAME = 1e-6  # relative distance of candidates that differ by rounding alone
OUTLIER = 5.0  # times the usual distance
MOST_HULLS = 256  # candidates, beyond which weighted means among them are not looked for


def cosines(gram: Tensor) -> Tensor:
    """Cosine similarities (n, n) from inner products (n, n); 0 with a vector of zeros."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    products = norms[:, None] * norms
    return torch.where(products > 0, gram / products, 0.0)


class Geometry:
    """Norms, distances and angles of candidates, all in float64 and in O(n^2) numbers.

    Args:
        names: of the n candidates
        matrices: (n, r) coordinates of their matrices in an orthonormal basis
        others: (n, s) coordinates of their other float tensors
        reference: position of the candidate that is the center; None: their mean

    Attributes:
        norms: (n,) of the weights
        scale: mean of the norms
        distances: (n, n) between the candidates, divided by the scale
        from_center: (n,) from the center, divided by the scale
        cosines: (n, n) of the matrices
        delta_cosines: (n, n) of the differences from the center
    """

    def __init__(
        self, names: list[str], matrices: Tensor, others: Tensor, reference: int | None = None
    ) -> None:
        self.names, self.reference = names, reference
        self.points = torch.cat([matrices, others], 1)  # (n, r): the weights, up to a rotation
        self.norms = self.points.norm(dim=1)
        self.scale = float(self.norms.mean()) or 1.0
        exact = "donot_use_mm_for_euclid_dist"
        self.distances = torch.cdist(self.points, self.points, compute_mode=exact) / self.scale
        center = self.points.mean(0) if reference is None else self.points[reference]
        deltas = self.points - center
        self.from_center = deltas.norm(dim=1) / self.scale
        self.cosines = cosines(matrices @ matrices.T)
        self.delta_cosines = cosines(deltas @ deltas.T)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def center(self) -> str:
        """What the center is called."""
        return "the mean" if self.reference is None else self.names[self.reference]

    def farthest(self) -> tuple[int, int]:
        """The two candidates that are farthest apart, in order."""
        return divmod(int(self.distances.triu().argmax()), len(self))

    def distinct(self) -> list[int]:
        """The first of each set of candidates that are the same up to rounding."""
        return [i for i in range(len(self)) if not (self.distances[i, :i] <= SAME).any()]

    def outliers(self) -> list[tuple[int, float]]:
        """Candidates far from the most central one: (position, times the median distance).

        They are farther than OUTLIER times.
        """
        rows = self.distinct()
        if len(rows) < 4:
            return []
        apart = self.distances[rows][:, rows]
        from_medoid = apart[int(apart.sum(1).argmin())]
        usual = float(from_medoid[from_medoid > 0].median())
        pairs = zip(rows, from_medoid, strict=True)
        return [(i, float(d) / usual) for i, d in pairs if d > OUTLIER * usual]

    def weighted_means(self, unit: float) -> list[tuple[int, list[tuple[int, float]]]]:
        """Candidates that are a weighted mean of others, up to their rounding.

        Args:
            unit: relative error of the rounding

        Returns:
            for each, its position and (position, weight) of the others, largest first
        """
        rows = self.distinct()
        found = []
        for i in rows if 3 <= len(rows) <= MOST_HULLS else ():
            others = [j for j in rows if j != i]
            beta = affine_weights(self.points[others], self.points[i])
            distance = float((beta @ self.points[others] - self.points[i]).norm())
            if distance <= unit * float(self.norms[i]) and float(beta.min()) > -0.01:
                weights = zip(others, beta.tolist(), strict=True)
                found.append((i, sorted(weights, key=lambda pair: -pair[1])))
        return found


def affine_weights(points: Tensor, target: Tensor) -> Tensor:
    """Weights beta (m,) of sum 1 with beta @ points (m, r) as near to target (r,) as can be."""
    base = int((points - target).norm(dim=1).argmin())
    rest = [j for j in range(len(points)) if j != base]
    edges, wanted = (points[rest] - points[base]).T, (target - points[base])[:, None]
    solution = torch.linalg.lstsq(edges, wanted, driver="gelsd").solution[:, 0]
    beta = points.new_zeros(len(points))
    beta[rest] = solution
    beta[base] = 1.0 - solution.sum()
    return beta
