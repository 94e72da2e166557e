"""Placements: which part of candidates, basis and model each rank holds, and what has to cross the
wire for it.

    placement   a rank holds                        in a step crosses the wire, besides what the model itself moves
    single      everything                          nothing
    replicate   all of P, all weights               sum of the coefficients' gradient (n, L)
    columns     P for its own shards of the model   the same (the gradient arrives reduce-scattered, weights are gathered by FSDP)
    rows        n / K rows of P, all weights        sum of the gradient (D,), of the coefficients' gradient, of x^T P (D,)

`rows` is the scheme that Li et al. (arXiv 2205.13104v4) describe. Projection is linear, so a rank
may project its own gradient before anything is summed: that is `replicate`. docs/distributed.md has
the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

import twa_kernels as tk
from twa_kernels.ops import FLOATS
from twa_kernels.reference import TILE

from ..basis.dense import DenseBasis
from ..basis.segments import Layout
from ..io.candidates import UNIT, Block, Candidates, Part, average_into
from .ranks import World

Basis = tk.PackedBasis | DenseBasis


@dataclass(frozen=True)
class Held:
    """What this rank holds of one tensor of the model.

    shape   of the local part;  part: its slices of the whole, None if it is the whole
    weight  of this rank's gradient of it in the sum over ranks: 0 for a copy of what another rank
            holds too
    counts  whether this rank's columns of it enter sums over columns (norms, Gram matrices)
    """

    shape: torch.Size
    part: Part | None
    weight: float
    counts: bool


def local(t: Tensor) -> Tensor:
    """This rank's part of a tensor, to read or write in place; the tensor itself if it is not
    sharded.
    """
    with torch.no_grad():
        return t.to_local() if isinstance(t, DTensor) else t.detach()


def reshard(model: nn.Module) -> None:
    """Frees the weights that FSDP2 has gathered, so that the next forward gathers those that are
    written now: the root module keeps gathered weights after a forward without backward, and would
    go on with old ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def spread(sizes: Sequence[int], ranks: int) -> list[int]:
    """A rank for each of these sizes: largest first, each to the rank with the least so far."""
    load, owner = [0] * ranks, [0] * len(sizes)
    for k in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        owner[k] = min(range(ranks), key=load.__getitem__)
        load[owner[k]] += sizes[k]
    return owner


def project(basis: Basis, grads: Sequence[Tensor | None]) -> Tensor:
    """c (n, L); sparse gradients are made dense, float64 ones float32 (what the kernels read)."""
    grads = [g if g is None or g.layout == torch.strided else g.to_dense() for g in grads]
    if isinstance(basis, DenseBasis):
        return basis.project(grads)
    return tk.project(
        basis, [g.float() if g is not None and g.dtype == torch.float64 else g for g in grads]
    )


def reconstruct(
    basis: Basis, x: Tensor, center: Sequence[Tensor] | None, out: Sequence[Tensor]
) -> None:
    """out = center + x^T P in their own dtypes; float64 tensors, which the kernels do not write, go
    through float32.
    """
    if isinstance(basis, DenseBasis):
        basis.reconstruct(x, center, out)
        return
    targets = [
        torch.empty_like(o, dtype=torch.float32) if o.dtype == torch.float64 else o for o in out
    ]
    tk.reconstruct(basis, x, center, out=targets)
    for o, t in zip(out, targets, strict=True):
        if o is not t:
            o.copy_(t)


class Placement:
    """One process that holds everything; the other placements change what has to change."""

    name = "single"

    def __init__(
        self, world: World, model: nn.Module, candidates: Candidates, layout: Layout
    ) -> None:
        self.world, self.model, self.candidates, self.layout = world, model, candidates, layout
        reshard(model)
        named = dict(model.named_parameters())
        self.tensors = [named[name] for name in layout.trained]
        self.keys = list(layout.trained.values())
        self.held = [
            self._held(name, t) for name, t in zip(layout.trained, self.tensors, strict=True)
        ]
        self.rows = self.rows_of(len(candidates))  # candidates that this rank reads

    def _held(self, name: str, t: Tensor) -> Held:
        return Held(t.shape, None, 1.0, True)

    @property
    def device(self) -> torch.device:
        return local(self.tensors[0]).device

    def begin(self, k: int, chunk: int) -> int:
        """The place in tensor k where this rank's part begins, for segments of `chunk` weights; 0
        for a tensor that is one segment. ValueError if the tensor is more than one, and the part no
        run of whole tiles."""
        part, whole = self.held[k].part, self.tensors[k].shape
        if part is None or not self.held[k].shape.numel() or whole.numel() <= chunk:
            return 0
        begin = part[0].start * whole[1:].numel()
        if begin % TILE or any(
            (s.start, s.stop) != (0, size) for s, size in zip(part[1:], whole[1:], strict=True)
        ):
            raise ValueError(
                f"placement 'columns': this rank's shard of {list(self.layout.trained)[k]!r} is no"
                f" run of whole groups of {TILE} weights, which a granularity below tensors needs;"
                " use 'tensor', 'block' or 'model'"
            )
        return begin

    def can_cut(self, chunk: int) -> bool:
        """Whether all ranks' parts can have segments of `chunk` weights. Ranks call it together."""
        try:
            odd = [self.begin(k, chunk) for k in range(len(self.held))] and 0.0
        except ValueError:
            odd = 1.0
        return not float(self.world.max_(torch.tensor([odd]))[0])

    def packs(self, k: int) -> bool:
        """Whether this rank packs tensor k, rather than another that sends the result."""
        return True

    def feeds(self, k: int) -> bool:
        """Whether this rank feeds its columns of tensor k to sums over columns."""
        return self.held[k].counts

    def rows_of(self, n: int) -> slice:
        """This rank's part of n rows of P."""
        return slice(0, n)

    def own_center(self, centers: list[Tensor]) -> list[Tensor] | None:
        """The center that this rank adds to its x^T P."""
        return centers

    # Reading candidates --------------------------------------------------------------------------

    def read(self, k: int, rows: slice | None = None) -> list[Tensor]:
        """This rank's candidates' tensor k, this rank's part of it, in a dtype that the kernels
        read; only float64 is converted.
        """
        rows = self.candidates.tensors(
            self.keys[k], rows=self.rows if rows is None else rows, part=self.held[k].part
        )
        return [r if r.dtype in FLOATS else r.float() for r in rows]

    def stream(
        self, wanted: Sequence[int], rows: slice | None = None, begin: tuple[int, int] = (0, 0)
    ) -> Iterator[tuple[int, Block]]:
        """(k, block) for the blocks of columns of tensors `wanted`, as `read` gives them; cut in
        the same places on every rank that holds the tensor. begin: (place in wanted, column) of the
        first block."""
        asked = [(self.keys[k], self.held[k].part) for k in wanted]
        for block in self.candidates.stream(
            asked, self.rows if rows is None else rows, self.block_columns, begin
        ):
            yield (
                wanted[block.index],
                replace(block, rows=[r if r.dtype in FLOATS else r.float() for r in block.rows]),
            )

    @property
    def block_columns(self) -> int:
        """Columns of a block: the same on every rank, though one may read a row more."""
        n = len(self.candidates)
        most = max(self.candidates.info[key].dtype.itemsize for key in self.keys)
        return (
            max(
                1,
                self.candidates.block_bytes
                // (UNIT * most * (n if self.rows == slice(0, n) else -(-n // self.world.size))),
            )
            * UNIT
        )

    def center(self, k: int, rows: Sequence[Tensor], weights: Tensor) -> Tensor:
        """sum_i weights[i] * w_i of this rank's part of tensor k, or of some of its columns,
        float32.
        """
        return average_into(torch.empty(rows[0].shape), rows, weights)

    def pack(
        self, packer: tk.Packer, k: int, block: Block, weights: Tensor, center: Tensor
    ) -> None:
        """Packs a block of tensor k; center is written."""
        packer.add_columns(block.rows, block.begin, center, weights.tolist())

    def average(self, k: int, weights: Tensor) -> Tensor:
        """The same in the precision of an export: float32, or float64 for float64 files."""
        return self.candidates.average(self.keys[k], weights, self.held[k].part)

    def exchange(self, packer: tk.Packer, centers: list[Tensor]) -> None:
        """After packing: what other ranks have packed, and scales that are the same on all."""
        self.world.max_(packer.max_scale)

    def sum_sq(self, packer: tk.Packer) -> Tensor:
        """(n, L): squared norms of all rows over all columns."""
        return self.world.sum_(packer.sum_sq)

    # A training step -----------------------------------------------------------------------------

    def gradients(self) -> list[Tensor | None]:
        """This rank's part of each gradient."""
        return [self.gradient(t) for t in self.tensors]

    def gradient(self, t: Tensor) -> Tensor | None:
        g = t.grad
        if isinstance(g, DTensor):
            with torch.no_grad():
                g = (
                    g if g.placements == t.placements else g.redistribute(placements=t.placements)
                ).to_local()
        return g

    def project_local(self, basis: Basis, grads: Sequence[Tensor | None], first: int = 0) -> Tensor:
        """This rank's addend of c; grads are those of the tensors from `first` on."""
        held = self.held[first : first + len(grads)]
        total = None
        for weight in sorted(
            {h.weight for h, g in zip(held, grads, strict=True) if g is not None and h.weight}
        ):
            c = project(
                basis, [g if h.weight == weight else None for h, g in zip(held, grads, strict=True)]
            )
            c = c if weight == 1.0 else c * weight
            total = c if total is None else total + c
        return (
            torch.zeros(basis.n, basis.num_segments, device=basis.device)
            if total is None
            else total
        )

    def start_sum(self, parts: list[Tensor], x: Tensor | None) -> Callable[[], list[Tensor]]:
        """Begins the sum over ranks of parts of c; x is compared between ranks on the way."""
        return self.world.start_sum(parts, x)

    def project(self, basis: Basis, grads: Sequence[Tensor | None], x: Tensor) -> Tensor:
        """c (n, L), the gradient of the coefficients: the same bits on every rank."""
        return self.start_sum([self.project_local(basis, grads)], x)()[0]

    def write(self, basis: Basis, x: Tensor, center: list[Tensor] | None) -> None:
        """This rank's weights = center + x^T P."""
        reshard(self.model)
        reconstruct(basis, x, center, [local(t) for t in self.tensors])

    def gram(self, basis: Basis) -> Tensor:
        """G (L, n, n) float64: inner products of the rows, over all columns."""
        return basis.gram()

    def part_of(self, name: str, t: Tensor) -> Part | None:
        """This rank's slices of any tensor of the model's state; None for all of it."""
        return self._held(name, t).part


class Replicated(Placement):
    """Every rank holds all of P and projects its own gradient: n * L numbers are summed.

    Each rank packs its share of the tensors and sends it.
    """

    name = "replicate"

    def __init__(
        self, world: World, model: nn.Module, candidates: Candidates, layout: Layout
    ) -> None:
        super().__init__(world, model, candidates, layout)
        self.owner = spread([t.numel() for t in self.tensors], world.size)

    def _held(self, name: str, t: Tensor) -> Held:
        return Held(t.shape, None, 1.0 / self.world.size, True)

    def packs(self, k: int) -> bool:
        return self.owner[k] == self.world.rank

    def feeds(self, k: int) -> bool:
        return self.packs(k)

    def average(self, k: int, weights: Tensor) -> Tensor:
        shape, dtype = (
            self.held[k].shape,
            torch.promote_types(self.candidates.info[self.keys[k]].dtype, torch.float32),
        )
        value = super().average(k, weights) if self.packs(k) else torch.empty(shape, dtype=dtype)
        return self.world.broadcast_(value, self.owner[k])

    def exchange(self, packer: tk.Packer, centers: list[Tensor]) -> None:
        for k, owner in enumerate(self.owner):
            for t in [*packer.storage(k), centers[k]]:
                self.world.broadcast_(t, owner)
        super().exchange(packer, centers)


class Columns(Placement):
    """Every rank holds P for its own shards of the model's DTensor parameters.

    A parameter that is no DTensor is on every rank, and its gradient is averaged over them."""

    name = "columns"

    def _held(self, name: str, t: Tensor) -> Held:
        if not isinstance(t, DTensor):
            return Held(t.shape, None, 1.0 / self.world.size, self.world.rank == 0)
        if odd := [p for p in t.placements if p.is_partial()]:
            raise ValueError(
                f"placement 'columns': tensor {name!r}: expected Shard or Replicate in each"
                f" dimension of the mesh, found {odd[0]}"
            )
        chunks, shape = t.__create_chunk_list__(), local(t).shape
        if len(chunks) != 1 or chunks[0].sizes != shape:
            raise ValueError(
                f"placement 'columns': tensor {name!r}: expected shards of one block each, found"
                f" placements {t.placements}"
            )
        part = tuple(
            slice(o, o + s) for o, s in zip(chunks[0].offsets, chunks[0].sizes, strict=True)
        )
        # Copies: along dimensions of the mesh that replicate, of which the first one's gradient
        # counts; and on ranks outside the tensor's own mesh (a parameter that FSDP shards between
        # tensor-parallel ranks), over which gradients are averaged.
        mesh = t.device_mesh
        first = all(
            c == 0
            for c, p in zip(mesh.get_coordinate(), t.placements, strict=True)
            if isinstance(p, Replicate)
        )
        with_rank_0 = dist.get_global_rank(self.world.group, 0) in mesh.mesh.flatten().tolist()
        return Held(
            shape, part, mesh.size() / self.world.size if first else 0.0, first and with_rank_0
        )

    def gram(self, basis: Basis) -> Tensor:
        total = torch.zeros(
            basis.num_segments, basis.n, basis.n, dtype=torch.float64, device=basis.device
        )
        for k, held in enumerate(self.held):
            if held.counts and held.shape.numel():
                part, columns = basis.select(k)
                total[columns] += part.gram()
        return self.world.sum_(total)


class Rows(Placement):
    """Every rank holds some rows of P; gradient and weights are summed whole, as published."""

    name = "rows"

    def __init__(
        self, world: World, model: nn.Module, candidates: Candidates, layout: Layout
    ) -> None:
        if world.size > len(candidates):
            raise ValueError(
                f"placement 'rows': expected at most one rank per candidate, {len(candidates)},"
                f" found {world.size} ranks; 'replicate' and 'columns' have no such limit"
            )
        super().__init__(world, model, candidates, layout)
        self.feeder = spread([t.numel() for t in self.tensors], world.size)

    def feeds(self, k: int) -> bool:
        return self.feeder[k] == self.world.rank

    def own_center(self, centers: list[Tensor]) -> list[Tensor] | None:
        return centers if self.world.rank == 0 else None

    def rows_of(self, n: int) -> slice:
        """Parts differ by one row at most."""
        return slice(
            n * self.world.rank // self.world.size, n * (self.world.rank + 1) // self.world.size
        )

    def center(self, k: int, rows: Sequence[Tensor], weights: Tensor) -> Tensor:
        partial = average_into(
            torch.empty(rows[0].shape, dtype=torch.float64), rows, weights[self.rows]
        )
        if not torch.isfinite(partial).all():  # before the sum makes it everyone's
            raise tk.NotFiniteError(0, k, 0)
        return self.world.sum_(partial).float()

    def pack(
        self, packer: tk.Packer, k: int, block: Block, weights: Tensor, center: Tensor
    ) -> None:
        center.copy_(self.center(k, block.rows, weights))
        packer.add_columns(block.rows, block.begin, center)

    def average(self, k: int, weights: Tensor) -> Tensor:
        out = torch.empty(
            self.held[k].shape,
            dtype=torch.promote_types(self.candidates.info[self.keys[k]].dtype, torch.float32),
        )
        for block in self.candidates.stream([(self.keys[k], None)], self.rows, self.block_columns):
            partial = average_into(
                torch.empty(block.end - block.begin, dtype=torch.float64),
                block.rows,
                weights[self.rows],
            )
            out.view(-1)[block.begin : block.end] = self.world.sum_(partial)
        return out

    def exchange(self, packer: tk.Packer, centers: list[Tensor]) -> None:
        pass  # rows and their scales are this rank's alone, centers are summed already

    def sum_sq(self, packer: tk.Packer) -> Tensor:
        total = torch.zeros(len(self.candidates), packer.sum_sq.shape[1], dtype=torch.float64)
        total[self.rows] = packer.sum_sq
        return self.world.sum_(total)

    def _flat(self) -> tuple[Tensor, list[Tensor]]:
        """A float32 vector for all of the model, yet to be filled, and its parts in the shapes of
        the tensors.
        """
        flat = torch.empty(sum(t.numel() for t in self.tensors), device=self.device)
        parts = flat.split([t.numel() for t in self.tensors])
        return flat, [part.view(t.shape) for part, t in zip(parts, self.tensors, strict=True)]

    def project(self, basis: Basis, grads: Sequence[Tensor | None], x: Tensor) -> Tensor:
        flat, parts = self._flat()
        for part, g in zip(parts, grads, strict=True):
            if g is None:
                part.zero_()
            else:
                part.copy_(g if g.layout == torch.strided else g.to_dense())
        self.world.sum_(flat)
        c = torch.zeros_like(x)
        c[self.rows_of(len(x))] = project(basis, parts) / self.world.size
        return self.start_sum([c], x)()[0]

    def write(self, basis: Basis, x: Tensor, center: list[Tensor] | None) -> None:
        flat, parts = self._flat()
        first = self.world.rank == 0
        reconstruct(basis, x[self.rows_of(len(x))].contiguous(), center if first else None, parts)
        self.world.sum_(flat)
        for t, part in zip(self.tensors, parts, strict=True):
            t.detach().copy_(part)

    def gram(self, basis: Basis) -> Tensor:
        raise ValueError(
            "precondition: not with placement='rows', where no rank has two rows to multiply; use"
            " 'replicate' or 'columns'"
        )
