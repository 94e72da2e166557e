"""Block Gram-Schmidt: an orthonormal basis of the rows of W in two reads.

Dependent rows are named, they are no failure.

    W - center = R Q      Q (r, D) with orthonormal rows,
                          R (n, r) lower triangular in the order of the rows

1. Neighbouring checkpoints are nearly collinear, their differences are not: row i becomes
   w_i - w_parent(i), the nearest earlier row in a sample of columns. Differences are unit lower
   triangular, so they change neither the spans nor Q.
2. One read: Gram matrix of the differences, and the rows' norms.
3. Row-order Cholesky in float64, where a row is dropped if its distance to the span of the rows
   kept before is at most `tolerance` of its norm. A distance that rounding errors may have made is
   not believed: the row is kept for now, and
4. one more read forms the Gram matrix of what the factor makes of the rows, in float64 (also where
   the condition asks for it).
5. One read: Q = transform * differences, written, and certified by Q Q^T z of the rounded Q for six
   Gaussian vectors z.

Sources: CholeskyQR2 (Fukaya et al. 2014), here on differences and with a rank rule; Li et al. 2023
for the job.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..layout import FLOATS, MAX_ROWS
from ..operands import PROBES, PassArgs
from ..ops.orthonormalize_pass import orthonormalize_pass
from ..ops.pack import NotFiniteError
from .columns import (
    Block,
    Center,
    Out,
    Rows,
    Source,
    StreamError,
    Target,
    Tensors,
    new_rows,
    write,
)
from .gram_schmidt import (
    Factor,
    choose_parents,
    norm2,
    pack_lower,
    probes,
    rounded_inverse,
    row_cholesky,
    row_gram_schmidt,
    schatten4,
    unpack_lower,
)

#: sums a float64 vector in place over ranks
Reduce = Callable[[Tensor], None]

TOLERANCE = 4 * 2.0**-24
#: certificate, an estimate of the loss of orthogonality, above which Q is computed again
LIMITS = {"high": 1e-7, "fast": 3e-7}
#: a prediction above this asks for one more read in float64 (high); fast takes its limit
PREDICTED = {"high": 1e-9, "fast": 2e-7}
MOST_REFINEMENTS = 3
FEWEST_FAST = 1 << 19  # columns from which on "fast" sums Gram matrices in float32
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Report:
    """How a basis was made.

    Attributes:
        accuracy: "high" or "fast".
        reads: times that all of W was read (a sample of columns for the parents not counted).
        refined: how often W was looked at again (a read each, and one more after two).
        certificate: estimate, by six Gaussian vectors, of the loss of orthogonality of the rounded
            Q: the Schatten 4-norm of Q Q^T - I, which is at least its 2-norm; None without an
            explicit Q.
        distances: (n,) distance of each row to the span of the rows kept before it, relative to its
            norm.
        parents: (n,) row that was subtracted, -1: the center.
    """

    accuracy: str
    reads: int
    refined: int
    certificate: float | None
    distances: tuple[float, ...]
    parents: tuple[int, ...]
    _before: Tensor = field(repr=False)
    _after: Tensor = field(repr=False)

    @property
    def condition_before(self) -> float:
        """Condition number of the kept rows, scaled to unit length."""
        return _condition(self._before)

    @property
    def condition_after(self) -> float:
        """Condition number of the kept rows' differences, scaled to unit length."""
        return _condition(self._after)


@dataclass(frozen=True)
class Orthonormal:
    """An orthonormal basis of the rows of W (minus a center).

    Attributes:
        Q: (r, *shape), one tensor per tensor of W if W was a list; None
            (form="implicit", or given to a function).
        R: (n, r) float64: W - center = R Q, up to rounding and the tolerance of dropped rows.
        transform: (r, n) float64: Q = transform @ (W - center). So project with Q is
            `transform @ (P @ g)` and coefficients y of Q are `transform.T @ y` of the rows.
        kept: rows that Q's rows stand for, in order.
        dropped: the other rows, (row, relative distance to the span of those before).
        report: reads, distances, conditions, certificate.
    """

    Q: Tensor | list[Tensor] | None
    R: Tensor
    transform: Tensor
    kept: tuple[int, ...]
    dropped: tuple[tuple[int, float], ...]
    report: Report
    _factor: Factor = field(repr=False)

    @property
    def rank(self) -> int:
        """r, the number of rows of Q."""
        return len(self.kept)

    @torch.no_grad()
    def apply(
        self,
        W: Block | Sequence[Block],
        center: Tensor | Sequence[Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str = "",
    ) -> Tensor | list[Tensor]:
        """Q's columns for some columns of W: the counterpart of form="implicit".

        Args:
            W: (n, *shape), or a list of blocks, rows as in `orthonormalize`; any part of the
                columns at a time.
            center: the same columns of the center, if there was one: one tensor of shape per block.
            dtype: of the result: float32, bfloat16 or float16.
            backend: the one to run; "": the default of the device (registry.py).

        Returns:
            (r, *shape), or a list of them if W is one.

        Raises:
            ValueError: sizes do not fit, or a center is missing or was not there before.
            TypeError: a dtype is not one of those above.
        """
        source = Source(W, center, empty=True)
        if (center is not None) != self._factor.center:
            expected = "the one" if self._factor.center else "none,"
            raise ValueError(f"center: expected {expected} that the basis was made with")
        n = self.transform.shape[1]
        out: list[Tensor] = []
        for block in source:
            if block.n != n:
                raise ValueError(f"W: expected {n} rows, found {block.n}")
            rows = new_rows(self.rank, block, dtype)
            if self.rank:
                write(block, self._factor, rows, 0, backend)
            out += rows
        return out[0] if source.single else out


def orthonormalize(
    W: Rows,
    *,
    center: Center = None,
    accuracy: str = "high",
    form: str = "explicit",
    dtype: torch.dtype = torch.float32,
    out: Out = None,
    tolerance: float = TOLERANCE,
    extend: Orthonormal | None = None,
    reduce: Reduce | None = None,
    backend: str = "",
) -> Orthonormal:
    """Gram-Schmidt on the rows of W, in order: W - center = R Q.

    Duplicates, zero rows and n > D are no errors: dependent rows are in `Orthonormal.dropped`.

    W - center = R Q holds row by row up to `tolerance` of the row's norm, also where steps too
    small to keep add up. Where W had to be looked at twice again, one read more takes R from W (not
    beyond 2048 rows: there rows within a hundred times `tolerance` of combinations of others may
    miss up to about that).

    Error of Q against Gram-Schmidt in exact arithmetic: rounding to `dtype`, plus 2^-52 times the
    square of the condition number of the differences, at most 1e-9 (one read more makes it 2^-52
    times the condition number).

    Plain PyTorch: `q, r = torch.linalg.qr(W.T); Q, R = q.T, r.T`.

    Args:
        W: (n, *shape) tensor; or a list with (n, *shape_k), or n tensors of shape_k, per tensor of
            a model; or a stream of such blocks of columns that can be read more than once (an
            object with __iter__, or a function that returns an iterator), each alone in memory.
            float32, bfloat16, float16; 1 <= n <= 4096.
        center: subtracted from every row: one tensor of shape_k per block (a stream if W is one),
            or None.
        accuracy: "high": float64 products, loss of orthogonality at most 1e-7, plus the rounding of
            Q to `dtype`. "fast": float32 products over few columns, summed in float64, about
            3e-7; what is estimated to be more is computed again in float64.
        form: "explicit": Q in `dtype`, new or in `out`. "implicit": no Q; `Orthonormal.apply` and
            `.transform` stand for it, one read less.
        dtype: of Q: float32, bfloat16 or float16.
        out: tensors to write Q to (row j of rank r to out[k][j]; the rest is left alone); may be W
            itself, which then is Q. Or a function that is called with (block number, Q of the block
            (r, *shape)), for results that do not fit into memory; again from 0 if Q is computed
            again.
        tolerance: a row is dropped if its distance to the span of the rows kept before it is at
            most this share of its norm (norm of the row as given, before the center is subtracted,
            since that is what its rounding errors are relative to).
        extend: an earlier result for the first rows of W (and the same center): its rows of R, and
            of a Q that it holds, stay as they are, bit by bit, and only rows after them are
            factorised. Not in place.
        reduce: called with float64 vectors of at most max(n (n + 1) / 2 + n + 1, 7 n) numbers to
            sum in place over ranks, which hold different columns (perhaps none), pass the same
            options, and all write in place or none. An error in the arguments of one rank alone
            leaves the others waiting in `reduce`.
        backend: the one to run; "": the default of the device (registry.py).

    Returns:
        The basis, its factors, and a report of how it was made.

    Raises:
        ValueError: sizes do not fit, or an option is unknown.
        TypeError: a dtype is not one of those above, or W cannot be read twice.
        NotFiniteError: W or center hold NaN or Inf; it says in which row.
        StreamError: blocks change between reads, or do not fit each other.
        RuntimeError: W, written over by Q, was too badly conditioned.
    """
    if accuracy not in LIMITS:
        raise ValueError(f"accuracy: expected one of {sorted(LIMITS)}, found {accuracy!r}")
    if form not in ("explicit", "implicit"):
        raise ValueError(f"form: expected 'explicit' or 'implicit', found {form!r}")
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected one of {FLOATS}, found {dtype}")
    if out is not None and form != "explicit":
        raise ValueError(f"out: only form='explicit' writes Q, found form={form!r}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: expected a number from 0 to 1, found {tolerance}")
    with torch.no_grad():
        source = Source(W, center, empty=reduce is not None)
        job = Job(source, accuracy, tolerance, extend, reduce, backend)
        factor = job.factorise()
        if form == "implicit":
            return job.result(None, factor, None)
        target = Target(job.source, dtype, out, extend)
        certificate = job.write(factor, target)
        while not job.good_enough(certificate, factor, target) and job.refined < MOST_REFINEMENTS:
            if target.in_place:  # W is gone: Q itself is what is left to work on
                made = job.result(target.finish(), factor, certificate)
                return _once_more(made, target.tensors, reduce, backend)
            factor, before = job.refine(job.all_rows), certificate
            certificate = job.write(factor, target)
            if certificate > 0.5 * before:  # the rounding of Q itself: no factor is better
                break
        if not certificate <= max(job.limit(factor, target), job.rounding(factor, target)):
            warnings.warn(
                f"orthonormalize: the certificate of Q is {certificate:.1e}, "
                "which W's conditioning leaves",
                stacklevel=2,
            )
        return job.result(target.finish(), factor, certificate)


def _once_more(
    o: Orthonormal, tensors: list[Tensor], reduce: Reduce | None, backend: str
) -> Orthonormal:
    """A better Q in place of Q: W = R Q = (R R') Q'.

    Once: Q has no conditioning left that could call for more.
    """
    f, rows = o._factor, [t[: o.rank] for t in tensors]
    job = Job(Source(rows, None, empty=reduce is not None), "high", 0.0, None, reduce, backend)
    on_q = job.factorise()
    if on_q.rank != o.rank:
        raise RuntimeError(
            f"orthonormalize: Q of rank {o.rank}, written in place of W, has rank {on_q.rank}: "
            "W was too badly conditioned"
        )
    target = Target(job.source, tensors[0].dtype, rows, None)
    certificate = job.write(on_q, target)
    R, transform = on_q.undo_differences()
    report = replace(
        o.report,
        reads=o.report.reads + job.reads,
        refined=o.report.refined + 1,
        certificate=certificate,
    )
    factor = replace(f, A=transform @ f.A, L=f.L @ R, fast=False)
    return Orthonormal(o.Q, o.R @ R, transform @ o.transform, o.kept, o.dropped, report, factor)


# The job ------------------------------------------------------------------------------------------


class Job:
    """Reads of one W, and what they have shown so far."""

    #: the last factor before anything was dropped from it: what another look starts from
    all_rows: Factor

    def __init__(
        self,
        source: Source,
        accuracy: str,
        tolerance: float,
        extend: Orthonormal | None,
        reduce: Reduce | None,
        backend: str,
    ) -> None:
        self.source, self.backend = source, backend
        self.accuracy, self.tolerance = accuracy, tolerance
        self.reduce: Reduce = reduce or (lambda v: None)
        self.distributed = reduce is not None
        self.fast = accuracy == "fast"
        self.extend, self.before = extend, extend._factor if extend is not None else None
        self.first = len(self.before.parent) if self.before else 0
        self.reads = self.refined = 0
        self.norms = torch.empty(0, dtype=torch.float64, device="cpu")  # squared, of the first read
        self.short = False  # whether that read was in float32
        self.columns = 0  # of all ranks

    # Reads ----------------------------------------------------------------------------------------

    def _read(
        self,
        parent: Tensor,
        A: Tensor | None,
        first: int,
        fast: bool,
        part: Callable[[Tensor], Tensor],
        copies: int = 1,
    ) -> Tensor:
        """One read, of W or of two copies of it under each other.

        Gram matrix of the differences, or of A times them, rows from `first` on: of it the vector
        that `part` takes (as few numbers as are needed), summed over ranks.
        """

        def products(t: Tensors) -> tuple[Tensor, Tensor]:
            starts = range(0, len(t.rows), t.n)
            args = PassArgs(
                rows=[r for at in starts for r in t.rows[at : at + t.n] * copies],
                center=t.center,
                numels=t.numels,
                parent=parent.to(t.device),
                transform=None if A is None else A.to(t.device),
                probes=None,
                first=first,
                fast=fast,
                out=[],
            )
            gram, norms = orthonormalize_pass(args, self.backend)
            return part(gram), norms[: t.n]

        blocks = map(products, self.source)
        found, norms = next(blocks)  # a source without a block raises ValueError
        for more, more_norms in blocks:
            found, norms = found + more, norms + more_norms
        # With the norms, and the number of columns.
        columns = norms.new_tensor([sum(s.numel() for s in self.source.shapes)])
        vector = torch.cat([found, norms, columns])
        self.reduce(vector)
        vector = vector.cpu()
        found, norms = vector[: len(found)], vector[len(found) : -1]
        self.columns = int(vector[-1])
        if not self.columns:
            raise ValueError("W: expected at least one column, found none on any rank")
        self.reads += 1
        if fast and not (norms.isfinite().all() and found.isfinite().all()):
            return found  # a square overflows float32: factorise() looks again
        self._check_norms(norms, fast)
        if not found.isfinite().all():
            raise ValueError(
                "center: NaN or Inf"
                if self.source.has_center
                else "W: inner products of its rows overflow float64"
            )
        return found

    def _gram(self, parent: Tensor, A: Tensor | None, first: int, fast: bool) -> Tensor:
        """One read: Gram matrix of the differences, or of A times them, rows from `first` on."""
        return unpack_lower(
            self._read(parent, A, first, fast, pack_lower), len(parent) if A is None else len(A)
        )

    def _coordinates(self, f: Factor) -> Tensor:
        """One read: inner products of the rows of W - center with A * differences (n, r).

        Those of a row with vectors made for later rows are zero.
        """
        n, r = f.L.shape
        kept = torch.tensor(f.kept, dtype=torch.int64, device="cpu")
        earlier = torch.arange(n, device="cpu")[:, None] >= kept  # (n, r)
        parent = torch.cat([f.parent, torch.full_like(f.parent, -1)])
        both = torch.block_diag(f.A, torch.eye(n, dtype=f.A.dtype, device="cpu"))
        rows = f.A.new_zeros(n, r)
        rows[earlier] = self._read(
            parent, both, r, False, lambda gram: gram[r:, :r][earlier.to(gram.device)], copies=2
        )
        return rows

    def _check_norms(self, norms: Tensor, fast: bool) -> None:
        if bad := (~norms.isfinite()).nonzero().flatten().tolist():
            raise _not_finite(bad, self.source, self.distributed)
        if not self.norms.numel():
            self.norms, self.short = norms, fast
            return
        apart = (norms - self.norms).abs() > (1e-6 if fast or self.short else 1e-12) * self.norms
        if apart.any():
            i = int(apart.nonzero()[0])
            before, now = float(self.norms[i]), float(norms[i])
            raise StreamError(
                f"W changed between two reads: row {i} had squared norm {before:.17g}, "
                f"now {now:.17g}; a stream must give the same blocks each time"
            )

    # Factors --------------------------------------------------------------------------------------

    def factorise(self) -> Factor:
        """Factor of W: parents, Gram matrix, row-order Cholesky.

        More reads while the outcome asks for them.
        """
        sample = self.source.sample()
        n = self.source.n
        old: list[int] = []
        dropped: list[int] = []
        if self.before:
            if n < self.first:
                raise ValueError(
                    f"extend: expected at least the {self.first} rows of the earlier result, "
                    f"found {n}"
                )
            if self.source.has_center != self.before.center:
                expected = "a" if self.before.center else "no"
                raise ValueError(f"extend: expected {expected} center, as the earlier result had")
            old = self.before.parent.tolist()
            dropped = sorted(set(range(self.first)) - set(self.before.kept))
        sampled_center = sample[1] if self.source.has_center else None
        new, columns = choose_parents(
            sample[0], sampled_center, self.first, self.source.columns, self.reduce, dropped
        )
        parent = torch.tensor(old + new, dtype=torch.int32, device="cpu")
        if columns < FEWEST_FAST:  # float32 sums over few are less exact, and not much faster
            self.fast = False
        gram = self._gram(parent, None, 0, self.fast)
        if self.fast and not self._usable(gram):
            self.fast, self.norms = False, torch.empty(0, dtype=torch.float64, device="cpu")
            gram = self._gram(parent, None, 0, False)
        if self.before:
            self._check_earlier(self.before, gram)
        factor = self._factor(parent, gram)
        # What float32 sums cannot tell, float64 sums of the same kind may; where they will not
        # either, only a second look at the result does.
        most = PREDICTED["high"] * self._noise(True) / self._noise(False)
        if self.fast and (factor.doubt or PREDICTED["fast"] < factor.loss < most):
            self.fast = False
            gram = self._gram(parent, None, 0, False)
            factor = self._factor(parent, gram)

        def look_again(f: Factor) -> bool:
            promised = "fast" if self.accuracy == "fast" and not self.refined else "high"
            return f.doubt or f.loss > PREDICTED[promised]

        # The second look will decide about all rows: what is dropped now has no exact place among
        # vectors that are not orthonormal yet.
        if look_again(factor):
            factor = self._factor(parent, gram, keep_all=True)
        self.all_rows = factor
        while look_again(factor):
            if self.refined == MOST_REFINEMENTS:
                if factor.doubt:
                    warnings.warn(
                        "orthonormalize: whether some row of W depends on others remains in doubt "
                        "after three looks",
                        stacklevel=4,
                    )
                break
            factor = self.refine(factor)
        return factor

    def _check_earlier(self, f: Factor, gram: Tensor) -> None:
        """Raises ValueError where the first rows of W are not those of the result f to extend.

        They have the same norms, and their Q is orthonormal.
        """
        first = self.first
        apart = (self.norms[:first].sqrt() - f.norms).abs() > 1e-6 * f.norms
        if apart.any():
            i = int(apart.nonzero()[0])
            raise ValueError(
                f"extend: row {i} of W is not the one of the earlier result: their norms differ"
            )
        if f.rank:
            products = f.A @ gram[:first, :first] @ f.A.T
            eye = torch.eye(f.rank, dtype=gram.dtype, device="cpu")
            error = float((products - eye).abs().max())
            lengths = gram.diagonal()[:first].clamp(min=0).sqrt()
            if not error <= 1e-3 + 100 * self._noise(self.fast) * norm2(f.A * lengths) ** 2:
                raise ValueError(
                    f"extend: the first {first} rows of W (or their center) are not those of the "
                    "earlier result"
                )

    def _usable(self, gram: Tensor) -> bool:
        """Whether no square of a row or a difference can have left the range of float32.

        It may overflow, or vanish.
        """
        norms = self.norms if self.norms.numel() else gram.new_full((1,), torch.inf)
        squares = torch.cat([gram.diagonal()[self.first :], norms])
        return bool(((squares > 1e-25 * self.columns) & (squares < 1e25 * self.columns)).all())

    def _noise(self, fast: bool) -> float:
        """Error of an entry of a Gram matrix by rounding, relative to the rows' lengths.

        Root mean square. Float64 sums; or (fast) float32 sums over 32 columns, whose errors average
        out.
        """
        return 2.0**-24 / max(self.columns / 32, 1.0) ** 0.5 if fast else 2.0**-53

    def _factor(self, parent: Tensor, gram: Tensor, keep_all: bool = False) -> Factor:
        n, first = len(parent), self.first
        norms = self.norms.sqrt()
        before = self.before.A if self.before else gram.new_zeros(0, 0)
        before_length = self.before.L.norm(dim=1) if self.before else gram.new_zeros(0)
        noise = self._noise(self.fast)
        shortest = self.tolerance * norms[first:]
        A, L, kept, distances, length, doubt, parent = row_cholesky(
            gram, first, before, before_length, shortest, noise, parent, keep_all
        )
        loss = _predicted_loss(A, len(before), torch.cat([before_length, length]), noise)
        fast = False
        if self.accuracy == "fast" and not first and not doubt and self._usable(gram):
            short = rounded_inverse(L[kept], n, kept)
            # Rounding the factor shifts every column alike: what it does to Q Q^T, in the
            # certificate's norm, is known before Q is.
            shift = short @ L @ L.T @ short.T - torch.eye(len(kept), dtype=gram.dtype, device="cpu")
            fast = float((shift @ shift).norm()) ** 0.5 <= 0.8 * LIMITS["fast"]
            A = short if fast else A
        rows = tuple(first + i for i in kept)
        if self.before:  # with the earlier rows in front
            new = L.shape[1] - self.before.L.shape[1]
            L = torch.cat([torch.nn.functional.pad(self.before.L, (0, new)), L])
            distances = torch.cat([self.before.distances, distances])
            rows = self.before.kept + rows
        center = self.source.has_center
        return Factor(parent, A, L, rows, distances, norms, fast, loss, doubt, center)

    def refine(self, f: Factor) -> Factor:
        """One more read: the Gram matrix of A * differences, formed column by column in float64.

        It makes an orthonormal frame, in which every row of W is a short vector; Gram-Schmidt on
        these, rank rule and all, decides anew about all rows.
        """
        r0 = self.before.rank if self.before else 0
        gram = self._gram(f.parent, f.A, r0, False)
        self.refined += 1
        noise = self._noise(False)
        eye = torch.eye(r0, dtype=gram.dtype, device="cpu")
        length = gram.diagonal()[r0:].clamp(min=0).sqrt()
        # Rows whose second look still finds nothing but noise have nothing; at the last look,
        # whatever is in doubt is taken for that.
        negligible = 1e-15 if self.refined < MOST_REFINEMENTS else torch.inf
        lone = torch.full((len(gram),), -1, dtype=torch.int32, device="cpu")
        # What a row has outside of the span may be lost where it is far below the tolerance for
        # all rows together: scaled up once more, rounding errors would pass for directions.
        kept = list(f.kept[r0:])
        scale = f.A[range(r0, len(f.A)), kept].abs()  # what the row was scaled by
        lost = self.tolerance * f.norms[kept] * scale / (8 * len(f.norms))
        shortest = torch.maximum(1e-9 * length, lost)
        to_frame, L, of_frame, _, _, doubt, _ = row_cholesky(
            gram, r0, eye, gram.new_ones(r0), shortest, noise, lone, negligible=negligible
        )
        # Rows of A * differences in the frame.
        provisional = torch.cat([torch.nn.functional.pad(eye, (0, L.shape[1] - r0)), L])
        loss = _predicted_loss(to_frame, r0, torch.cat([gram.new_ones(r0), length]), noise)
        A, L = to_frame @ f.A, f.L @ provisional
        A[:r0] = f.A[:r0]
        frame = f.kept[:r0] + tuple(f.kept[r0 + j] for j in of_frame)
        self.all_rows = Factor(
            f.parent, A, L, frame, f.distances, f.norms, False, loss, doubt, f.center
        )
        if doubt or loss > PREDICTED["high"]:
            # Not orthonormal yet: all rows stay, and the next look decides.
            return self.all_rows
        rows = torch.linalg.solve_triangular(f.U, L, upper=False, unitriangular=True)
        if self.refined > 1 and 2 * len(rows) <= MAX_ROWS:
            # Two provisional factors in a row leave L less exact than the tolerance.
            rows[self.first :] = self._coordinates(self.all_rows)[self.first :]
        B, R, kept, distances = row_gram_schmidt(rows, self.first, r0, self.tolerance * f.norms)
        all_distances = f.distances.clone()
        all_distances[self.first :] = distances
        A, L = B @ A, f.U @ R
        A[:r0] = f.A[:r0]
        all_kept = f.kept[:r0] + tuple(kept)
        return Factor(
            f.parent, A, L, all_kept, all_distances, f.norms, False, loss, False, f.center
        )

    # When Q is good enough ------------------------------------------------------------------------

    def limit(self, f: Factor, target: Target) -> float:
        """Largest certificate of a good Q.

        What was promised, or what rounding Q to its dtype does to rows of many different numbers.
        """
        return max(LIMITS[self.accuracy], 4 * UNIT[target.dtype] * f.rank / self.columns**0.5)

    def rounding(self, f: Factor, target: Target) -> float:
        """What rounding can do to rows of few different numbers.

        All of their errors may have one sign.
        """
        return 8 * UNIT[target.dtype] * f.rank**0.5

    def good_enough(self, certificate: float, f: Factor, target: Target) -> bool:
        """Whether no factor would give a much better Q."""
        # W is well conditioned: what is left is rounding.
        exact = f.loss <= PREDICTED["high"] and not f.fast and not self.refined
        return certificate <= self.limit(f, target) or (
            exact and certificate <= self.rounding(f, target)
        )

    # Q --------------------------------------------------------------------------------------------

    def write(self, f: Factor, target: Target) -> float:
        """One read: writes Q to the target; returns the certificate."""
        target.begin(f.rank)
        if not f.rank:
            return 0.0
        y = torch.zeros(f.rank, PROBES, dtype=torch.float64, device=self.source.device)
        norms = torch.zeros(self.source.n, dtype=torch.float64, device=self.source.device)
        for number, t in enumerate(self.source):
            for piece, out, done in target.pieces(number, t):
                got = write(piece, f, out, target.first, self.backend)
                done()
                y, norms = y + got[0], norms + got[1]
        vector = torch.cat([y.flatten(), norms])
        self.reduce(vector)
        self.reads += 1
        self._check_norms(vector[y.numel() :].cpu(), f.fast)
        return schatten4(vector[: y.numel()].view_as(y).cpu() - probes(f.rank).T)

    def result(
        self,
        Q: Tensor | list[Tensor] | None,
        f: Factor,
        certificate: float | None,
    ) -> Orthonormal:
        """What `orthonormalize` returns."""
        R, transform = f.undo_differences()
        if self.extend is not None:  # bit by bit
            r0 = self.extend.rank
            R[: self.first], transform[:r0] = 0.0, 0.0
            R[: self.first, :r0] = self.extend.R
            transform[:r0, : self.first] = self.extend.transform
        without_norm = torch.where(f.distances > 0, torch.inf, 0.0)
        relative = torch.where(f.norms > 0, f.distances / f.norms, without_norm).tolist()
        kept = set(f.kept)
        dropped = tuple((i, relative[i]) for i in range(len(f.norms)) if i not in kept)
        rows = list(f.kept)
        report = Report(
            self.accuracy,
            self.reads,
            self.refined,
            certificate,
            tuple(relative),
            tuple(f.parent.tolist()),
            R[rows],
            f.L[rows],
        )
        return Orthonormal(Q, R, transform, f.kept, dropped, report, f)


def _predicted_loss(A: Tensor, first: int, lengths: Tensor, noise: float) -> float:
    """Loss of orthogonality in A * rows, for rows of A from `first` on.

    When entries of the Gram matrix of rows of these lengths are off by `noise`.
    """
    return 2 * noise * max(len(A), 1) ** 0.5 * norm2(A[first:] * lengths) ** 2


def _condition(rows: Tensor) -> float:
    """Condition number of rows scaled to unit length."""
    if not rows.numel():
        return 1.0
    values = torch.linalg.svdvals(rows / rows.norm(dim=1, keepdim=True))
    return float(values[0] / values[-1]) if values[-1] > 0 else float("inf")


def _not_finite(rows: list[int], source: Source, distributed: bool) -> ValueError:
    """The error that says where the first NaN or Inf is."""
    for k, tensors in enumerate(source):
        for at, r in enumerate(tensors.rows):
            if at % tensors.n in rows and not torch.isfinite(r).all():
                column = int((~torch.isfinite(r.reshape(-1))).nonzero()[0])
                error = NotFiniteError(
                    at % tensors.n, k if source.streamed else at // tensors.n, column
                )
                error.args = (
                    f"{error.args[0]} (rows with NaN or Inf: {rows}); expected finite numbers",
                )
                return error
    if distributed:
        return ValueError(
            f"NaN or Inf in rows {rows}, in columns of another rank; expected finite numbers"
        )
    return StreamError(
        f"W changed between two reads: rows {rows} held NaN or Inf in one of them, not in the other"
    )
