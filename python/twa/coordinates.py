"""`Coordinates`: how trained coefficients, rows of P and candidates make each other.

    theta = center + sum_r x[r, l] P[r, :]                x = to_basis(y), y are trained
          = center + sum_i s[i, l] (w_i - center)         s = shares(x)
          = sum_i beta[i, l] w_i                          beta = merge_weights(y)

One object per subspace answers for all of them. `Deltas`, `Differences` and `Orthonormal` say what
the rows of P are, and train the coefficients of the rows themselves: y = x. `Simplex` and
`Balanced` stand on any of them: the one trains merge weights that are positive and sum to 1, the
other combinations of the candidates' distances whose lengths are nearer to each other. l is the
segment; all arithmetic is float64.

New rows are a class here, a name in `BASES`, and a builder in `twa.packing`. Another way to train
the same rows, any map from y to x, is an `OnRows` in `ON_ROWS`.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .io.errors import TwaError

BASES = ("deltas", "differences", "orthonormal")
LEAST = 1e-3  # of 1 / n: the merge weight at which a simplex starts where it should be zero
LEAST_LENGTH = 1e-6  # of the largest: shorter distances are rounding
LEAST_EIGENVALUE = 1e-5  # of the largest: smaller ones are rounding and dependence


class Coordinates:
    """Coefficients of the rows of P, trained as they are; what the rows are is up to the subclass.

    Attributes:
        basis: name of what the rows are, as basis files store it
        constraint: name of what is trained in the place of the rows' coefficients
        is_balanced: whether that is balanced combinations of the candidates' distances
        rows: what the rows of P are, whatever is trained: this object, or the one it stands on
        center_weights: (n,) float64, of the candidates in the center
        origin: (n,) float64, of the candidates in the point that distances in the rows of P are
            from; None: the center
        shape: (rows of P, L), of the trained coefficients
    """

    basis = ""
    constraint = "none"
    is_balanced = False
    origin: Tensor | None = None

    def __init__(self, center_weights: Tensor, shape: tuple[int, int]) -> None:
        self.center_weights, self.shape = center_weights, shape
        self._moved: dict[tuple[torch.device, str], Tensor] = {}

    def _on(self, device: torch.device, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, copied to a device once: a copy in every step would wait for it."""
        if (device, name) not in self._moved:
            self._moved[device, name] = make().to(device)
        return self._moved[device, name]

    @property
    def rows(self) -> Coordinates:
        return self

    # Rows of P and candidates --------------------------------------------------------------------

    def shares(self, x: Tensor) -> Tensor:
        """The shares s (n, L), float64 on the CPU, of the rows' coefficients x (rows, L)."""
        raise NotImplementedError

    def from_shares(self, s: Tensor) -> Tensor:
        """The rows' coefficients x (rows, L) of shares s (n, L)."""
        raise NotImplementedError

    def pull_shares(self, c: Tensor, columns: slice) -> Tensor:
        """The gradient dL/ds of these columns from dL/dx: the transpose of `from_shares`."""
        raise NotImplementedError

    def around(self, weights: Tensor) -> Coordinates:
        """The same rows of P around another center: a point of the span that they are of.

        Args:
            weights: (n,) float64 with sum 1, of the candidates in that center
        """
        raise NotImplementedError

    # Trained coefficients ------------------------------------------------------------------------

    @property
    def balance(self) -> dict[str, Tensor]:
        """What trained coefficients are of, beside the rows."""
        return {}

    def take_balance(self, mix: Tensor, unit: Tensor) -> None:
        """Makes coefficients mean what they did where `balance` was this."""
        raise NotImplementedError

    @property
    def trains_rows(self) -> bool:
        """Whether the trained coefficients y are those of the rows, x."""
        return self.rows is self

    def to_basis(self, y: Tensor) -> Tensor:
        """The rows' coefficients x (rows, L) of the trained ones y, in their dtype."""
        return y.detach()

    def pull_back(self, y: Tensor, c: Tensor, columns: slice) -> Tensor:
        """The gradient dL/dy of these columns from c = dL/dx of them."""
        return c

    def merge_weights(self, y: Tensor) -> Tensor:
        """The merge weights beta (n, L), float64 on the CPU, of the trained coefficients y.

        Columns sum to 1 unless the center is zero.
        """
        s = self.shares(self.to_basis(y))
        return s + self.center_weights[:, None] * (1.0 - s.sum(0, keepdim=True))

    def from_merge_weights(self, beta: Tensor) -> Tensor:
        """The trained coefficients whose merge weights are beta (n, L); columns sum to 1."""
        return self.from_shares(beta)

    def start(self) -> Tensor:
        """The trained coefficients of the center."""
        return torch.zeros(self.shape, dtype=torch.float32, device="cpu")

    def of_groups(self, counts: Sequence[int]) -> Coordinates:
        """The same with one segment in the place of each group of them.

        A row that is zero in some segments of a group, and not in others, counts as it is there.

        Args:
            counts: how many segments each group has
        """
        return self

    def step_sq(self, grams: Tensor, counts: Sequence[int]) -> float:
        """How far a step of 1 in every trained coefficient moves the weights, squared.

        Each has the sign of its gradient, as in the first step of Adam, and the weights' gradient
        is white noise: the mean over it.

        Args:
            grams: (G, r, r) float64, inner products of the rows of P in each group of segments
            counts: (G,), how many segments each group has
        """
        return sum(map(_signs_sq, grams))


class Divided(Coordinates):
    """Rows of P that were divided by a number in each segment.

    Args:
        center_weights: (n,)
        divisor: (rows, L) float64; 0 where a row is zero
    """

    def __init__(self, center_weights: Tensor, divisor: Tensor) -> None:
        super().__init__(center_weights, (divisor.shape[0], divisor.shape[1]))
        self.divisor = divisor

    def divisor_on(self, device: torch.device) -> Tensor:
        """The divisor on a device, where it is copied once."""
        return self._on(device, "divisor", lambda: self.divisor)

    def of_groups(self, counts: Sequence[int]) -> Coordinates:
        parts = self.divisor.split(list(counts), 1)
        largest = torch.stack([part.amax(1) for part in parts], 1)  # (rows, groups)
        return self._with(self.center_weights, largest)

    def around(self, weights: Tensor) -> Coordinates:
        return self._with(weights, self.divisor)

    def _with(self, center_weights: Tensor, divisor: Tensor) -> Divided:
        """The same with another center or divisor."""
        return type(self)(center_weights, divisor)


class Deltas(Divided):
    """P[i] = (w_i - origin) / divisor[i, l]: a row for each candidate.

    The origin is the center, and shares are y = x / divisor, unless rows that are there already are
    used around another center. Then, with the weights a of the origin and b of the center,

        theta = center + sum_i y_i (w_i - origin)
        s = y - (sum_i y_i) a          y = s - (sum_i s_i) b

    Both sum to zero. So the center, where s = b, is at y = 0, whatever quantisation made of rows
    whose combination y = a should be zero.

    Args:
        center_weights: (n,)
        divisor: (n, L) float64; 0 where a candidate is equal to the origin
        origin: (n,) with sum 1, as the center's weights are then; None: the center
    """

    basis = "deltas"

    def __init__(
        self, center_weights: Tensor, divisor: Tensor, origin: Tensor | None = None
    ) -> None:
        super().__init__(center_weights, divisor)
        if origin is not None and not torch.equal(origin, center_weights):
            self.origin = origin

    def _with(self, center_weights: Tensor, divisor: Tensor) -> Deltas:
        origin = self.center_weights if self.origin is None else self.origin
        return Deltas(center_weights, divisor, origin)

    def center_on(self, device: torch.device) -> Tensor:
        """The center's weights (n, 1) on a device."""
        return self._on(device, "center", lambda: self.center_weights[:, None])

    def shares(self, x: Tensor) -> Tensor:
        y = _divided(x.double().cpu(), self.divisor)
        return y if self.origin is None else y - y.sum(0) * self.origin[:, None]

    def from_shares(self, s: Tensor) -> Tensor:
        if self.origin is not None:
            s = s - s.sum(0) * self.center_on(s.device)
        return s * self.divisor_on(s.device)

    def pull_shares(self, c: Tensor, columns: slice) -> Tensor:
        g = c.double() * self.divisor_on(c.device)[:, columns]
        return g if self.origin is None else g - (g * self.center_on(g.device)).sum(0)


class Differences(Divided):
    """P[r] = (w_(r+1) - w_r) / divisor[r, l]: a row for each candidate but the first.

        theta = center + sum_r y[r, l] (w_(r+1) - w_r)        y = x / divisor
        s_i   = y_(i-1) - y_i                                 y_(-1) = y_(n-1) = 0

    Shares sum to zero. Of those that do not, the center takes the rest: with the tail sums
    T_r(v) = sum_(i > r) v_i, y_r = T_r(s) - (sum_i s_i) T_r(center_weights).

    Args:
        center_weights: (n,) with sum 1
        divisor: (n - 1, L) float64; 0 where a candidate is equal to the one before
    """

    basis = "differences"

    def center_tails(self, device: torch.device) -> Tensor:
        """The tail sums (n - 1, 1) of the center's weights."""
        return self._on(device, "tails", lambda: _tails(self.center_weights[:, None]))

    def shares(self, x: Tensor) -> Tensor:
        y = _divided(x.double().cpu(), self.divisor)
        return -torch.nn.functional.pad(y, (0, 0, 1, 1)).diff(dim=0)

    def from_shares(self, s: Tensor) -> Tensor:
        s = s.double()
        y = _tails(s) - s.sum(0) * self.center_tails(s.device)
        return y * self.divisor_on(s.device)

    def pull_shares(self, c: Tensor, columns: slice) -> Tensor:
        g = c.double() * self.divisor_on(c.device)[:, columns]
        before = torch.nn.functional.pad(g.cumsum(0), (0, 0, 1, 0))  # of s_i in the tails r < i
        return before - (g * self.center_tails(g.device)).sum(0)


def _divided(x: Tensor, divisor: Tensor) -> Tensor:
    """x / divisor; 0 where the divisor is."""
    known = divisor > 0
    return torch.where(known, x / torch.where(known, divisor, 1.0), 0.0)


def _tails(v: Tensor) -> Tensor:
    """sum_(i > r) v[i] for each row r but the last: (n - 1, L) of v (n, L)."""
    return v[1:].flip(0).cumsum(0).flip(0)


class Orthonormal(Coordinates):
    """P_l = scale_l * Q_l: in each segment an orthonormal basis of the deltas' span.

    Rows beyond a segment's rank are zero.

    Args:
        center_weights: (n,)
        transform: (L, r, n) float64: Q_l = transform_l @ (W_l - center_l)
        R: (L, n, r) float64: W_l - center_l = R_l @ Q_l
        scale: (L,)
        dropped: per segment, the candidates that depend on earlier ones there, with their relative
            distances
    """

    basis = "orthonormal"

    def __init__(
        self,
        center_weights: Tensor,
        transform: Tensor,
        R: Tensor,
        scale: Tensor,
        dropped: tuple[tuple[tuple[int, float], ...], ...],
    ) -> None:
        super().__init__(center_weights, (transform.shape[1], transform.shape[0]))
        self.transform, self.R, self.scale, self.dropped = transform, R, scale, dropped
        self.inverse = torch.where(scale > 0, 1 / scale, 0.0)

    def shares(self, x: Tensor) -> Tensor:
        return torch.einsum("lri,rl->il", self.transform, x.double().cpu() * self.scale)

    def from_shares(self, s: Tensor) -> Tensor:
        """The rows' coefficients: exact for candidates that were dropped, too."""
        x = torch.einsum("lir,il->rl", self._on(s.device, "R", lambda: self.R), s.double())
        return x * self._on(s.device, "inverse", lambda: self.inverse)

    def pull_shares(self, c: Tensor, columns: slice) -> Tensor:
        R = self._on(c.device, "R", lambda: self.R)[columns]
        scaled = c.double() * self._on(c.device, "inverse", lambda: self.inverse)[columns]
        return torch.einsum("lir,rl->il", R, scaled)

    def around(self, weights: Tensor) -> Orthonormal:
        transform = self.transform - self.transform.sum(2, keepdim=True) * self.center_weights
        R = self.R - torch.einsum("i,lir->lr", weights, self.R)[:, None]
        return Orthonormal(weights, transform, R, self.scale, self.dropped)


def _signs_sq(gram: Tensor) -> float:
    """The mean of |sign(P z) P|^2 over white noise z, where P P^T = gram (r, r).

    Signs of two Gaussians with correlation c are alike with a mean product of 2 / pi asin(c).
    """
    lengths = gram.diagonal().clamp(min=0).sqrt()
    correlation = gram / lengths.outer(lengths).clamp(min=1e-300)
    return float((gram * correlation.clamp(-1, 1).asin()).sum()) * 2 / math.pi


class OnRows(Coordinates):
    """Trained coefficients of another kind than the rows', over rows of any kind.

    Args:
        rows: what the rows of P are
    """

    def __init__(self, rows: Coordinates) -> None:
        n, (count, num_segments) = len(rows.center_weights), rows.shape
        super().__init__(rows.center_weights, (self.count(n, count), num_segments))
        self._rows, self.basis = rows, rows.basis

    @staticmethod
    def count(n: int, rows: int) -> int:
        """How many coefficients are trained a segment, for n candidates and so many rows of P."""
        return rows

    @property
    def rows(self) -> Coordinates:
        return self._rows

    def shares(self, x: Tensor) -> Tensor:
        return self.rows.shares(x)

    def from_shares(self, s: Tensor) -> Tensor:
        return self.rows.from_shares(s)

    def pull_shares(self, c: Tensor, columns: slice) -> Tensor:
        return self.rows.pull_shares(c, columns)

    def of_groups(self, counts: Sequence[int]) -> OnRows:
        return type(self)(self.rows.of_groups(counts))

    def step_sq(self, grams: Tensor, counts: Sequence[int]) -> float:
        whole, total = self.of_groups(counts), 0.0
        y = whole.start()
        for group, gram in enumerate(grams):
            at = slice(group, group + 1)
            rows = torch.eye(len(gram), dtype=torch.float32, device="cpu")
            columns = [whole.pull_back(y, row[:, None], at) for row in rows]
            jacobian = torch.cat(columns, 1).double()  # (trained, r)
            total += _signs_sq(jacobian @ gram @ jacobian.T)
        return total


class Simplex(OnRows):
    """beta = softmax(sqrt(n) y), whatever the rows of P are: learned soup.

    With the factor, a learning rate for unconstrained coefficients fits here, too: merge weights
    near 1 / n move by lr / sqrt(n) a step.
    """

    constraint = "simplex"

    @staticmethod
    def count(n: int, rows: int) -> int:
        return n

    @property
    def factor(self) -> float:
        return math.sqrt(self.shape[0])

    def _beta(self, y: Tensor) -> Tensor:
        return (y.detach().double() * self.factor).softmax(0)

    def to_basis(self, y: Tensor) -> Tensor:
        return self.from_shares(self._beta(y)).to(y.dtype)

    def pull_back(self, y: Tensor, c: Tensor, columns: slice) -> Tensor:
        beta, g = self._beta(y[:, columns]), self.pull_shares(c, columns)
        return (self.factor * beta * (g - (beta * g).sum(0))).to(c.dtype)

    def merge_weights(self, y: Tensor) -> Tensor:
        return self._beta(y).cpu()

    def from_merge_weights(self, beta: Tensor) -> Tensor:
        """The trained coefficients; where beta is not positive, LEAST / n is taken."""
        return beta.double().clamp(min=LEAST / len(beta)).log() / self.factor

    def start(self) -> Tensor:
        return self.from_merge_weights(self.center_weights[:, None].expand(self.shape))


class Balanced(OnRows):
    """Combinations of the candidates' distances that are nearer to each other in length.

        theta = center + sum_i y[i, l] B_g[i, :]        B_g = A_g N,  A_g = c_g (N N^T)^(-1/4)

    N are the distances from the center, each of the same norm over all weights; g is the tensor, or
    the segment if that is larger. The distances of a run all point back to where it came from, so
    that gradient steps go there first of all. With the singular values of N their square roots are
    taken: between N, which overrates those directions, and an orthonormal basis of the span, which
    forgets them (docs/notes/balance.md). c_g keeps the sum of the squared lengths.

    Args:
        rows: what the rows of P are
        grams: (G, r, r) float64, inner products of the rows of P in each group of segments
        counts: (G,), how many segments each group has, one group after the other
    """

    is_balanced = True

    def __init__(self, rows: Coordinates, grams: Tensor, counts: list[int]) -> None:
        super().__init__(rows)
        self.counts, self.ends = counts, list(itertools.accumulate(counts))
        self._sizes: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        whole = rows.of_groups(counts)
        raw = torch.stack([_distances(whole, gram, g) for g, gram in enumerate(grams)])
        raw = (raw + raw.mT) / 2
        norms = raw.diagonal(dim1=1, dim2=2).sum(0).clamp(min=0).sqrt()  # (n,)
        known = norms > LEAST_LENGTH * norms.max()  # a candidate may be the center
        common = norms[known].quantile(0.25) if bool(known.any()) else norms.sum()
        self.unit = torch.where(known, common / norms.clamp(min=1e-300), 0.0)  # (n,)
        raw *= self.unit.outer(self.unit)  # N N^T
        self.mix = torch.stack([_balancing(gram) for gram in raw])  # (G, n, n)
        pairs = zip(self.mix, raw, strict=True)
        self._step_sq = sum(_signs_sq(a @ gram @ a) for a, gram in pairs)

    @staticmethod
    def count(n: int, rows: int) -> int:
        return n

    @property
    def balance(self) -> dict[str, Tensor]:
        """As `mix` (G, n, n) and `unit` (n,), float64: other samples of P give others."""
        return {"mix": self.mix, "unit": self.unit}

    def take_balance(self, mix: Tensor, unit: Tensor) -> None:
        """As `balance` has them; TwaError if their shapes are others."""
        for name, ours, theirs in (("mix", self.mix, mix), ("unit", self.unit, unit)):
            if ours.shape != theirs.shape:
                expected, found = tuple(ours.shape), tuple(theirs.shape)
                raise TwaError(f"expected shape {expected}, found {found}", f"balance: {name}")
        self.mix, self.unit = mix.to(self.mix), unit.to(self.unit)

    def step_sq(self, grams: Tensor, counts: Sequence[int]) -> float:
        return self._step_sq

    def _mixed(self, y: Tensor, columns: slice) -> Tensor:
        """A_g y in float64, of the group g of each column; y has these columns and no others."""
        if self.mix.device != y.device:
            self.mix, self.unit = self.mix.to(y.device), self.unit.to(y.device)
        y = y.double()
        if columns == slice(None):
            return self._all_mixed(y)
        begin, last, _ = columns.indices(self.shape[1])
        out, first = torch.empty_like(y), begin
        for group in range(bisect.bisect_right(self.ends, begin), len(self.ends)):
            if first >= last:
                break
            end = min(self.ends[group], last)
            at = slice(first - begin, end - begin)
            out[:, at] = self.mix[group] @ y[:, at]
            first = end
        return out

    def _all_mixed(self, y: Tensor) -> Tensor:
        """The same of all columns (n, L), with one product for all groups of a size."""
        if y.device not in self._sizes:
            self._sizes[y.device] = [(g.to(y.device), at.to(y.device)) for g, at in self._by_size()]
        out, n = torch.empty_like(y), len(y)
        for groups, at in self._sizes[y.device]:
            parts = y[:, at].view(n, len(groups), -1).transpose(0, 1)  # (groups, n, size)
            out[:, at] = torch.bmm(self.mix[groups], parts).transpose(0, 1).reshape(n, -1)
        return out

    def _by_size(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Groups of each size, and the columns of all of them."""
        counts = torch.tensor(self.counts, dtype=torch.int64, device="cpu")
        ends = torch.tensor(self.ends, dtype=torch.int64, device="cpu")
        for size in sorted(set(self.counts)):
            groups = (counts == size).nonzero().flatten()
            yield groups, (ends[groups, None] - size + torch.arange(size, device="cpu")).flatten()

    def to_basis(self, y: Tensor) -> Tensor:
        s = self._mixed(y.detach(), slice(None))
        return self.from_shares(s * self.unit[:, None]).to(y.dtype)

    def pull_back(self, y: Tensor, c: Tensor, columns: slice) -> Tensor:
        g = self.pull_shares(c, columns)
        return self._mixed(g * self.unit.to(g.device)[:, None], columns).to(c.dtype)

    def from_merge_weights(self, beta: Tensor) -> Tensor:
        unit = self.unit.to(beta.device)[:, None]
        s = torch.where(unit > 0, beta.double() / unit.clamp(min=1e-300), 0.0)
        parts, mixes = s.split(self.counts, 1), self.mix.to(beta.device)
        return torch.cat([torch.linalg.solve(a, p) for a, p in zip(mixes, parts, strict=True)], 1)


def _distances(rows: Coordinates, gram: Tensor, group: int) -> Tensor:
    """Inner products (n, n) of the candidates' distances, from those of the rows of P."""
    columns = slice(group, group + 1)
    half = torch.cat([rows.pull_shares(c[:, None], columns) for c in gram], 1)  # (n, r)
    return torch.cat([rows.pull_shares(c[:, None], columns) for c in half], 1)


def _balancing(gram: Tensor) -> Tensor:
    """c G^(-1/4) with the trace of A G A that G has; the identity for rows without length."""
    trace = gram.trace()
    if not bool(trace > 0):
        return torch.eye(len(gram), dtype=gram.dtype, device="cpu")
    values, vectors = torch.linalg.eigh(gram / trace)
    values = values.clamp(min=float(values[-1]) * LEAST_EIGENVALUE)
    a = (vectors * values**-0.25) @ vectors.T
    return (a + a.T) / 2 / values.sqrt().sum().sqrt()


#: what can be trained in the place of the rows' coefficients, by the name in files and options
ON_ROWS: dict[str, type[OnRows]] = {"simplex": Simplex}
CONSTRAINTS = ("none", *ON_ROWS)


def constrained(rows: Coordinates, constraint: str) -> Coordinates:
    """The coordinates of these rows with what a constraint of this name trains; KeyError for none.

    Args:
        rows: what the rows of P are
        constraint: one of CONSTRAINTS
    """
    return rows if constraint == "none" else ON_ROWS[constraint](rows)


def trained_count(constraint: str, n: int, rows: int, balanced: bool = False) -> int:
    """Trained coefficients a segment, for n candidates and so many rows of P."""
    if balanced:
        return Balanced.count(n, rows)
    return rows if constraint == "none" else ON_ROWS[constraint].count(n, rows)
