"""Where `orthonormalize` reads W from and writes Q to.

Tensors in memory, streams of blocks of columns.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..layout import FLOATS, MAX_ROWS
from ..native import empty_for_streaming
from ..operands import PassArgs
from ..ops.orthonormalize_pass import orthonormalize_pass
from .gram_schmidt import Factor, probes

if TYPE_CHECKING:
    from .job import Orthonormal

SAMPLE = 4096  # columns that parents are chosen by

T = TypeVar("T")
#: some columns of W: (n, *shape), or n tensors of one shape
Block = Tensor | Sequence[Tensor]
#: what can be read again and again
Stream = Iterable[T] | Callable[[], Iterable[T]]
#: W, and its center: of one block, of a list of blocks, or of a stream of them
Rows = Block | Sequence[Block] | Stream[Block]
Center = Tensor | Sequence[Tensor] | Stream[Tensor] | None
#: where Q is written: tensors, or a function of (block number, Q of that block)
Sink = Callable[[int, Tensor], None]
Out = Tensor | Sequence[Tensor] | Sink | None


class StreamError(ValueError):
    """A stream of column blocks that does not give the same blocks each time.

    Or one whose blocks do not fit each other.
    """


@dataclass
class Tensors:
    """Some tensors of the model: rows[k * n + i] is row i of tensor k."""

    rows: list[Tensor]
    center: list[Tensor]
    shapes: list[torch.Size]
    n: int

    @property
    def numels(self) -> tuple[int, ...]:
        """Number of elements of each tensor."""
        return tuple(s.numel() for s in self.shapes)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.rows[0].device

    def only(self, k: int) -> Tensors:
        """Tensor k alone."""
        return Tensors(
            self.rows[k * self.n : (k + 1) * self.n],
            self.center[k : k + 1],
            self.shapes[k : k + 1],
            self.n,
        )

    def part(self, k: int, columns: slice) -> Tensors:
        """Some columns of tensor k, as views where rows are contiguous."""
        rows = [r.reshape(-1)[columns] for r in self.rows[k * self.n : (k + 1) * self.n]]
        center = [c.reshape(-1)[columns] for c in self.center[k : k + 1]]
        return Tensors(rows, center, [rows[0].shape], self.n)


def _open(stream: Stream[T]) -> Iterator[T]:
    """A new reading of the stream, from its beginning."""
    return iter(stream() if callable(stream) else stream)


class Source:
    """W as an iterable of Tensors that can be read again.

    One of all tensors if they are in memory, else one per block of the stream.

    empty: a W without columns is no error.
    """

    def __init__(self, W: Rows, center: Center, empty: bool = False) -> None:
        self.single = isinstance(W, Tensor)
        self.streamed = not isinstance(W, Tensor | list | tuple)
        self._W, self._center, self._empty = W, center, empty
        self._whole: Tensors | None = None  # if it is in memory
        self.has_center = center is not None
        self._shapes: list[torch.Size] = []  # of a stream's blocks, after the first read
        self.n = 0
        self.device = torch.device("cpu")
        if not isinstance(W, Tensor | list | tuple):
            if isinstance(W, Iterator) or isinstance(center, Iterator):
                raise TypeError(
                    "W: expected a stream that can be read again (an object with __iter__, or a "
                    "function), found an iterator, which is read once"
                )
            if not callable(W) and not isinstance(W, Iterable):
                raise TypeError(
                    "W: expected a tensor, a list of tensors or a stream of them, "
                    f"found {type(W).__name__}"
                )
            return
        blocks: list[Block] = [W] if isinstance(W, Tensor) else list(W)
        centers: list[Tensor | None]
        if center is None:
            centers = [None] * len(blocks)
        elif isinstance(center, Tensor):
            centers = [center]
        elif isinstance(center, Iterable):
            centers = list(center)
        else:
            raise TypeError(
                f"center: expected a tensor or a list of tensors, found {type(center).__name__}"
            )
        if not blocks:
            raise ValueError("W: expected at least one tensor, found none")
        if len(centers) != len(blocks):
            raise ValueError(f"center: expected {len(blocks)} tensors, found {len(centers)}")
        parts = [
            _block(b, c, k, None) for k, (b, c) in enumerate(zip(blocks, centers, strict=True))
        ]
        self.n = parts[0].n
        for k, p in enumerate(parts):
            if p.n != self.n:
                raise ValueError(f"W[{k}]: expected {self.n} rows as in W[0], found {p.n}")
        self._whole = Tensors(
            [r for p in parts for r in p.rows],
            [c for p in parts for c in p.center],
            [p.shapes[0] for p in parts],
            self.n,
        )
        self._shapes, self.device = self._whole.shapes, self._whole.device
        self._check()

    def _check(self) -> None:
        columns = sum(s.numel() for s in self._shapes)
        if not columns and not self._empty:
            shapes = [tuple(s) for s in self._shapes[:4]]
            raise ValueError(f"W: expected at least one column, found blocks of shapes {shapes}")

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of all blocks; of a stream known after the first read."""
        return self._shapes

    @property
    def columns(self) -> int:
        """Number of columns of all blocks in memory.

        Of a stream, whose length nobody knows before it is read, very many.
        """
        return 1 << 40 if self.streamed else sum(s.numel() for s in self._shapes)

    def __iter__(self) -> Iterator[Tensors]:
        if self._whole is not None:
            yield self._whole
            return
        blocks: Iterator[Block] = _open(self._W)
        centers: Iterator[Tensor] | None = None if self._center is None else _open(self._center)
        shapes: list[torch.Size] = []
        for k, rows in enumerate(blocks):
            c = None if centers is None else next(centers, None)
            if centers is not None and c is None:
                raise StreamError(f"center: expected one tensor per block of W, found {k}")
            block = _block(rows, c, k, self.n or None)
            self.n, self.device = block.n, block.device
            shapes += block.shapes
            known = self._shapes  # empty in the first read
            if known and (k >= len(known) or block.shapes[0] != known[k]):
                expected = tuple(known[k]) if k < len(known) else "no more blocks"
                raise StreamError(
                    f"block {k}: expected {expected} as in the first read, "
                    f"found shape {tuple(block.shapes[0])}: the stream changed"
                )
            yield block
        if centers is not None and next(centers, None) is not None:
            raise StreamError(
                f"center: expected one tensor per block of W, found more than {len(shapes)}"
            )
        if self._shapes and len(shapes) != len(self._shapes):
            raise StreamError(
                f"expected {len(self._shapes)} blocks as in the first read, "
                f"found {len(shapes)}: the stream changed"
            )
        if not self._shapes:
            if not shapes:
                raise ValueError("W: expected at least one block of columns, found none")
            self._shapes = shapes
            self._check()

    def sample(self) -> list[Tensor]:
        """Some columns in float64, on the CPU: (n, columns) of W, and (1, columns) of a center.

        Runs of columns spread over the tensors in memory, or the first blocks of a stream.
        """
        taken: list[Tensor] = []
        left = SAMPLE
        for tensors in self:
            total = max(sum(tensors.numels), 1)
            for k, numel in enumerate(tensors.numels):
                share = numel if self.streamed else -(-SAMPLE * numel // total)
                share = min(numel, share, left if self.streamed else share)
                if share:
                    runs = max(1, min(16, share // 64))
                    apart, width = numel // runs, share // runs
                    group = [
                        *tensors.rows[k * tensors.n : (k + 1) * tensors.n],
                        *tensors.center[k : k + 1],
                    ]
                    flat = [r.reshape(-1).as_strided((runs, width), (apart, 1)) for r in group]
                    taken.append(torch.stack(flat).double().flatten(1).cpu())
                    left -= runs * width
            if self.streamed and left <= 0:
                break
        x = torch.zeros(self.n + self.has_center, 0, dtype=torch.float64, device="cpu")
        if taken:
            x = torch.cat(taken, 1)
        return [x[: self.n], x[self.n :]] if self.has_center else [x]


def _block(rows: Block, center: Tensor | None, k: int, n: int | None) -> Tensors:
    """Checks one block: n tensors of one shape, floating, on one device."""
    if isinstance(rows, Tensor):
        if rows.dim() == 0:
            raise ValueError(f"W[{k}]: expected n rows, found a 0-d tensor")
        rows = rows.detach().unbind(0)
    rows = [r.detach() for r in rows]
    if not rows:
        raise ValueError(f"W[{k}]: expected at least one row, found none")
    if len(rows) > MAX_ROWS:
        raise ValueError(f"W[{k}]: expected at most {MAX_ROWS} rows, found {len(rows)}")
    if n is not None and len(rows) != n:
        raise StreamError(
            f"block {k}: expected {n} rows as in the blocks before, found {len(rows)}"
        )
    for i, r in enumerate([*rows] + ([center] if center is not None else [])):
        name = f"W[{k}], row {i}" if i < len(rows) else f"center[{k}]"
        if r.dtype not in FLOATS:
            raise TypeError(f"{name}: expected one of {FLOATS}, found {r.dtype}")
        if r.shape != rows[0].shape:
            raise ValueError(
                f"{name}: expected shape {tuple(rows[0].shape)} as row 0, found {tuple(r.shape)}"
            )
        if r.device != rows[0].device:
            raise ValueError(f"{name}: expected device {rows[0].device} as row 0, found {r.device}")
    return Tensors(rows, [] if center is None else [center.detach()], [rows[0].shape], len(rows))


def write(
    tensors: Tensors, f: Factor, out: list[Tensor], first: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Writes Q's columns for these columns of W into `out`, one tensor per tensor.

    Into its first rows, from row `first` on. Returns the op's products with the probes, and the
    rows' squared norms.
    """
    device = tensors.device
    args = PassArgs(
        rows=tensors.rows,
        center=tensors.center,
        numels=tensors.numels,
        parent=f.parent.to(device),
        transform=f.A.to(device),
        probes=probes(f.rank).to(device),
        first=first,
        fast=f.fast,
        out=[row for o in out for row in o[: f.rank].unbind(0)],
    )
    return orthonormalize_pass(args, backend)


def new_rows(r: int, tensors: Tensors, dtype: torch.dtype) -> list[Tensor]:
    """Uninitialised rows (r, *shape) of Q for each of these tensors."""
    return [empty_for_streaming((r, *shape), tensors.device, dtype) for shape in tensors.shapes]


#: some tensors of W, tensors that take Q's columns for them, and what to call when they are filled
Piece = tuple[Tensors, list[Tensor], Callable[[], None]]


class Target:
    """Where Q goes: tensors, given or new; or a function, one block at a time."""

    in_place = False
    first = 0  # row of Q from which on it is written

    def __init__(
        self, source: Source, dtype: torch.dtype, out: Out, extend: Orthonormal | None
    ) -> None:
        self.source, self.dtype = source, dtype
        self.tensors: list[Tensor] = []  # that Q is written to, if it is
        self.sink: Sink | None = out if callable(out) else None
        self.earlier: list[Tensor] | None = None  # rows of Q that an extended result holds
        if extend is not None and self.sink is None and extend.Q is not None:
            self.earlier = [extend.Q] if isinstance(extend.Q, Tensor) else extend.Q
            shapes, dtypes = [q.shape[1:] for q in self.earlier], {q.dtype for q in self.earlier}
            if list(shapes) != list(source.shapes):
                raise ValueError(
                    f"extend: expected blocks of shapes {shapes[:4]} as in the earlier result, "
                    f"found {source.shapes[:4]}"
                )
            self.first = extend.rank
            if out is None:
                self.dtype = dtypes.pop()
        if out is not None and not callable(out):
            self.tensors = [out] if isinstance(out, Tensor) else list(out)
            self._check(source)
            if self.in_place and extend is not None:
                raise ValueError(
                    "out: an extended basis is not written in place of W, whose first rows are "
                    "still needed; expected other tensors"
                )

    def _check(self, source: Source) -> None:
        if len(self.tensors) != len(source.shapes):
            raise ValueError(
                f"out: expected {len(source.shapes)} tensors, one per block of W, "
                f"found {len(self.tensors)}"
            )
        for k, (t, shape) in enumerate(zip(self.tensors, source.shapes, strict=True)):
            if not isinstance(t, Tensor):
                raise TypeError(
                    f"out[{k}]: expected one tensor (r, *shape) per tensor of W, "
                    f"found {type(t).__name__}"
                )
            if t.dim() != len(shape) + 1 or t.shape[1:] != shape:
                raise ValueError(
                    f"out[{k}]: expected shape (at least r, {', '.join(map(str, shape))}), "
                    f"found {tuple(t.shape)}"
                )
            if t.dtype != self.tensors[0].dtype or t.dtype not in FLOATS:
                raise TypeError(
                    f"out[{k}]: expected one dtype of {FLOATS} for all, found {t.dtype}"
                )
            if t.requires_grad and t.is_leaf:
                raise ValueError(
                    f"out[{k}]: expected a tensor that does not require grad; pass `t.detach()`"
                )
        self.dtype = self.tensors[0].dtype
        rows = [
            (_span(row), f"out[{k}][{j}]")
            for k, t in enumerate(self.tensors)
            for j, row in enumerate(t.unbind(0))
            if row.numel()
        ]
        rows.sort()
        for (one, name), (two, other) in itertools.pairwise(rows):
            if two[0] < one[1]:
                raise ValueError(f"{name} and {other} share memory: expected separate rows")
        if not source.streamed:
            for k, t in enumerate(self.tensors):
                self.in_place |= self._is_in_place(t, next(iter(source)), k)

    @staticmethod
    def _is_in_place(out: Tensor, tensors: Tensors, k: int) -> bool:
        """Whether rows of `out` are rows of tensor k of W.

        Raises ValueError if they share memory in any other way.
        """
        own = {
            r.data_ptr(): r.dtype
            for r in tensors.rows[k * tensors.n : (k + 1) * tensors.n]
            if r.is_contiguous()
        }
        spans = sorted(_span(t) for t in [*tensors.rows, *tensors.center] if t.numel())
        # Of the ends up to each span.
        furthest = list(itertools.accumulate((end for _, end in spans), max))
        found = False
        for j, row in enumerate(out.unbind(0) if out.numel() else ()):
            begin, end = _span(row)
            at = bisect.bisect_left(spans, (end, 0)) - 1  # the last that begins before the end
            if at >= 0 and furthest[at] > begin:
                if own.get(begin) != row.dtype or not row.is_contiguous():
                    raise ValueError(
                        f"out[{k}][{j}] shares memory with W or the center: expected none, or "
                        "exactly a row of the same tensor of W in the same dtype"
                    )
                found = True
        return found

    def begin(self, rank: int) -> None:
        """Prepares for one writing of Q, which has `rank` rows."""
        if self.tensors and rank > min(len(t) for t in self.tensors):
            room = min(len(t) for t in self.tensors)
            raise ValueError(f"out: expected room for {rank} rows of Q, found {room}")
        self.rank = rank

    def pieces(self, number: int, tensors: Tensors) -> Iterator[Piece]:
        """Parts of these tensors of W, the first of which is block `number`."""
        if self.sink is not None:
            for k in range(len(tensors.shapes)):
                rows = new_rows(self.rank, tensors.only(k), self.dtype)
                yield tensors.only(k), rows, partial(self.sink, number + k, rows[0])
            return
        count = len(tensors.shapes)
        if len(self.tensors) < number + count:
            self.tensors += new_rows(self.rank, tensors, self.dtype)
        here = self.tensors[number : number + count]
        if self.source.streamed and self._is_in_place(here[0], tensors, 0):
            raise ValueError(
                f"out[{number}] is a block of the stream: expected other tensors; to work in "
                "place, pass W as a list of tensors"
            )
        if self.earlier is not None:
            for new, old in zip(here, self.earlier[number : number + count], strict=True):
                new[: self.first] = old
        yield tensors, here, lambda: None

    def finish(self) -> Tensor | list[Tensor] | None:
        """Q, as `Orthonormal` holds it."""
        if self.sink is not None:
            return None
        if not self.tensors:  # rank 0
            self.tensors = [
                torch.empty(0, *shape, dtype=self.dtype, device="cpu")
                for shape in self.source.shapes
            ]
        rows = [t[: self.rank] for t in self.tensors]
        return rows[0] if self.source.single else rows


def _span(t: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and behind the last."""
    last = sum((s - 1) * d for s, d in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + t.element_size() * (1 + last)
