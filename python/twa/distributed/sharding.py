"""`Sharding`: which part of candidates, basis and model each rank holds, and what crosses the wire.

    name        a rank holds                   a step sums over ranks
    single      everything                     nothing
    replicate   all of P, all weights          the coefficients' gradient (n, L)
    columns     P for its own shards of the    the same
                model
    rows        n / K rows of P, all weights   the gradient (D,), the coefficients' gradient (n, L),
                                               x^T P (D,)

With `columns` the model's own messages come on top: FSDP gathers the weights, and reduce-scatters
the gradient.

Projection is linear, so a rank may project its own gradient before anything is summed: that is
`replicate`. `rows` is in twa.distributed.rows. docs/distributed.md has the picture.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

import twa_kernels as tk
from twa_kernels.layout import TILE

from ..basis.dense import AnyPacker, DenseBasis
from ..basis.streamed import StreamedBasis
from ..dtensors import is_dtensor, local, reshard
from ..io.averaging import average_into
from ..io.candidates import UNIT, Block, Candidates, readable
from ..io.errors import BasisError, TwaError
from ..io.key_map import KeyMap
from ..io.loading import named_tensors
from ..io.mapped import MappedFile, Part
from .ranks import Ranks

#: a basis where its bytes are
KeptBasis = tk.PackedBasis | DenseBasis
#: and as it is computed with
Basis = KeptBasis | StreamedBasis


@dataclass(frozen=True)
class Shard:
    """What this rank holds of one tensor of the model.

    Attributes:
        shape: of the local part
        part: the slices of the whole that it is; None if it is the whole
        weight: of this rank's gradient of it in the sum over ranks: 0 for a copy of what another
            rank holds too
        counts: whether this rank's columns of it enter sums over columns (norms, Gram matrices)
    """

    shape: torch.Size
    part: Part | None
    weight: float
    counts: bool


def begin_of(part: Part | None, shape: torch.Size) -> int | None:
    """Where a part of a tensor begins in it, as it lies flat; None if it is no run of weights."""
    if part is None:
        return 0
    for cut, size in zip(part[1:], shape[1:], strict=True):
        if (cut.start, cut.stop) != (0, size):
            return None
    return part[0].start * shape[1:].numel()


def spread(sizes: Sequence[int], ranks: int) -> list[int]:
    """A rank for each of these sizes: the largest first, each to the rank with the least so far."""
    load, owner = [0] * ranks, [0] * len(sizes)
    for k in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        owner[k] = min(range(ranks), key=load.__getitem__)
        load[owner[k]] += sizes[k]
    return owner


def project(basis: Basis, grads: Sequence[Tensor | None]) -> Tensor:
    """Projection of the gradients onto the rows: c (n, L).

    Sparse gradients are made dense, and float64 ones float32, which is what the kernels read.
    """
    grads = [g if g is None or g.layout == torch.strided else g.to_dense() for g in grads]
    if isinstance(basis, DenseBasis):
        return basis.project(grads)
    grads = [g.float() if g is not None and g.dtype == torch.float64 else g for g in grads]
    return basis.project(grads) if isinstance(basis, StreamedBasis) else tk.project(basis, grads)


def reconstruct(
    basis: Basis, x: Tensor, center: Sequence[Tensor] | None, out: Sequence[Tensor]
) -> None:
    """Writes center + x^T P to `out`, in the dtypes that are there.

    float64 tensors, which the kernels do not write, go through float32.
    """
    if isinstance(basis, DenseBasis):
        basis.reconstruct(x, center, out)
        return
    targets = [
        torch.empty_like(o, dtype=torch.float32) if o.dtype == torch.float64 else o for o in out
    ]
    if isinstance(basis, StreamedBasis):
        basis.reconstruct(x, center, targets)
    else:
        tk.reconstruct(basis, x, center, out=targets)
    for o, t in zip(out, targets, strict=True):
        if o is not t:
            o.copy_(t)


def shard_of(name: str, t: Tensor, ranks: Ranks) -> Shard:
    """What this rank holds of a tensor of a sharded model.

    Args:
        name: of the tensor, for messages
        t: a DTensor, or a tensor that is on every rank
        ranks: the ranks that share the model

    Raises:
        TwaError: it is sharded in a way that is not supported
    """
    if not is_dtensor(t):
        return Shard(t.shape, None, 1.0 / ranks.world_size, ranks.rank == 0)
    if odd := [p for p in t.placements if p.is_partial()]:
        raise TwaError(
            f"sharding 'columns': tensor {name!r}: expected Shard or Replicate in each"
            f" dimension of the mesh, found {odd[0]}"
        )
    chunks, shape = t.__create_chunk_list__(), local(t).shape
    if len(chunks) != 1 or chunks[0].sizes != shape:
        raise TwaError(
            f"sharding 'columns': tensor {name!r}: expected shards of one block each, found"
            f" placements {t.placements}"
        )
    part = tuple(slice(o, o + s) for o, s in zip(chunks[0].offsets, chunks[0].sizes, strict=True))
    # Copies: along dimensions of the mesh that replicate, of which the first one's gradient
    # counts; and on ranks outside the tensor's own mesh (a parameter that FSDP shards between
    # tensor-parallel ranks), over which gradients are averaged.
    mesh, place = t.device_mesh, t.device_mesh.get_coordinate()
    assert place is not None and ranks.group is not None  # this rank holds a part of it
    replicated = [c for c, p in zip(place, t.placements, strict=True) if p.is_replicate()]
    first = not any(replicated)
    weight = mesh.size() / ranks.world_size if first else 0.0
    with_rank_0 = dist.get_global_rank(ranks.group, 0) in mesh.mesh.flatten().tolist()
    return Shard(shape, part, weight, first and with_rank_0)


class Sharding:
    """One process that holds everything; the other shardings change what has to change.

    Attributes:
        ranks: the ranks that share the work
        tensors: the trained parameters of the model
        keys: their keys in the candidate files
        shards: what this rank holds of each of them
        rows: the candidates that this rank reads
        mapped: the files that this rank's part of P lies in, as it is used
    """

    name = "single"
    mapped: tuple[MappedFile, ...] = ()

    def __init__(
        self, ranks: Ranks, model: nn.Module, candidates: Candidates, key_map: KeyMap
    ) -> None:
        self.ranks, self.model, self.candidates, self.key_map = ranks, model, candidates, key_map
        reshard(model)
        named = named_tensors(model)
        self.tensors = [named[name] for name in key_map.trained]
        self.keys = list(key_map.trained.values())
        self.shards = [
            self._shard(name, t) for name, t in zip(key_map.trained, self.tensors, strict=True)
        ]
        self.rows = self.local_rows(len(candidates))

    def _shard(self, name: str, t: Tensor) -> Shard:
        """What this rank holds of a tensor of the model's state."""
        return Shard(t.shape, None, 1.0, True)

    @property
    def device(self) -> torch.device:
        """Where this rank's weights are."""
        return local(self.tensors[0]).device

    def begin(self, k: int, chunk: int) -> int:
        """The place in tensor k where this rank's part begins, for segments of `chunk` weights.

        It is 0 for a tensor that is one segment.

        Raises:
            TwaError: the tensor is more than one segment, and the part no run of whole tiles
        """
        held, whole = self.shards[k], self.tensors[k].shape
        if not held.shape.numel() or whole.numel() <= chunk:
            return 0
        begin = begin_of(held.part, whole)
        if begin is None or begin % TILE:
            raise TwaError(
                f"sharding 'columns': this rank's shard of {list(self.key_map.trained)[k]!r} is no"
                f" run of whole groups of {TILE} weights, which a granularity below tensors needs;"
                " use 'tensor', 'block' or 'model'"
            )
        return begin

    def can_cut(self, chunk: int) -> bool:
        """Whether all ranks' parts can have segments of `chunk` weights. Ranks call it together."""
        odd = 0
        try:
            for k in range(len(self.shards)):
                self.begin(k, chunk)
        except TwaError:
            odd = 1
        return not self.ranks.most(odd)

    def is_packer(self, k: int) -> bool:
        """Whether this rank packs tensor k, rather than another that sends the result."""
        return True

    def sums_columns(self, k: int) -> bool:
        """Whether this rank feeds its columns of tensor k to sums over columns."""
        return self.shards[k].counts

    def local_rows(self, n: int) -> slice:
        """This rank's part of n rows of P."""
        return slice(0, n)

    def local_center(self, centers: list[Tensor]) -> list[Tensor] | None:
        """The center that this rank adds to its x^T P."""
        return centers

    # Reading candidates --------------------------------------------------------------------------

    def read(self, k: int, rows: slice | None = None) -> list[Tensor]:
        """This rank's part of tensor k of this rank's candidates, in a dtype that the kernels read.

        Args:
            k: number of the tensor
            rows: other candidates than this rank's
        """
        chosen = self.rows if rows is None else rows
        return readable(self.candidates.tensors(self.keys[k], chosen, self.shards[k].part))

    def stream(
        self, wanted: Sequence[int], rows: slice | None = None, begin: tuple[int, int] = (0, 0)
    ) -> Iterator[tuple[int, Block]]:
        """Blocks of columns of some tensors as `read` gives them, each with its tensor's number.

        They are cut in the same places on every rank that holds the tensor.

        Args:
            wanted: numbers of the tensors
            rows: other candidates than this rank's
            begin: (place in `wanted`, column) of the first block
        """
        asked = [(self.keys[k], self.shards[k].part) for k in wanted]
        chosen = self.rows if rows is None else rows
        for block in self.candidates.stream(asked, chosen, self.block_columns, begin):
            yield wanted[block.index], replace(block, rows=readable(block.rows))

    def packed_tensors(
        self, rows: slice | None = None, but: Collection[int] = ()
    ) -> Iterator[tuple[int, Iterator[Block] | None]]:
        """Each tensor with its blocks, to be read in order; None if another rank packs it.

        Args:
            rows: other candidates than this rank's
            but: numbers of tensors that are not read: they have no blocks
        """
        mine = [k for k in range(len(self.keys)) if self.is_packer(k) and k not in but]
        groups = itertools.groupby(self.stream(mine, rows), key=lambda k_block: k_block[0])
        for k in range(len(self.keys)):
            if not self.is_packer(k):
                yield k, None
            else:
                yield k, iter(()) if k in but else (block for _, block in next(groups)[1])

    @property
    def block_columns(self) -> int:
        """Columns of a block: the same on every rank, though one may read a row more."""
        n = len(self.candidates)
        widest = max(self.candidates.info[key].dtype.itemsize for key in self.keys)
        most_rows = n if self.rows == slice(0, n) else -(-n // self.ranks.world_size)
        return max(1, self.candidates.block_bytes // (UNIT * widest * most_rows)) * UNIT

    def center(self, k: int, rows: Sequence[Tensor], weights: Tensor) -> Tensor:
        """The center of this rank's part of tensor k, or of some of its columns, in float32.

        It is sum_i weights[i] * rows[i].
        """
        return average_into(torch.empty(rows[0].shape, device=rows[0].device), rows, weights)

    def pack(
        self, packer: AnyPacker, k: int, block: Block, weights: Tensor, center: Tensor
    ) -> None:
        """Packs a block of tensor k, and writes its center to `center`."""
        packer.add_columns(block.rows, block.begin, center, weights.tolist())

    def average(self, k: int, weights: Tensor) -> Tensor:
        """The weighted mean of tensor k as an export needs it: float32, or float64 for such files.

        It is this rank's part of the tensor.
        """
        return self.candidates.weighted(self.keys[k], weights, self.shards[k].part)

    def exchange(self, packer: AnyPacker, centers: list[Tensor]) -> None:
        """Completes packing: gets what other ranks have packed, and makes the scales equal."""
        self.ranks.all_reduce_max_(packer.max_scale)

    def sum_sq(self, packer: AnyPacker) -> Tensor:
        """Squared norms of all rows over all columns: (n, L)."""
        return self.ranks.all_reduce_(packer.sum_sq)

    # A training step -----------------------------------------------------------------------------

    def gradients(self) -> list[Tensor | None]:
        """This rank's part of each tensor's gradient."""
        return [self.gradient(t) for t in self.tensors]

    def gradient(self, t: Tensor) -> Tensor | None:
        """This rank's part of a tensor's gradient."""
        g = t.grad
        # The usual types first, and fast: this runs for every tensor of every step.
        if g is None or type(g) is Tensor or not is_dtensor(g):
            return g
        assert is_dtensor(t)  # as its gradient is
        with torch.no_grad():
            if g.placements != t.placements:
                g = g.redistribute(placements=t.placements)
            return g.to_local()

    def local_coefficient_gradient(
        self, basis: Basis, grads: Sequence[Tensor | None], first: int = 0
    ) -> Tensor:
        """This rank's addend of c (n, L).

        Args:
            basis: the rows that this rank holds
            grads: of the tensors from number `first` on
            first: number of the first of them
        """
        weights = [shard.weight for shard in self.shards[first : first + len(grads)]]
        pairs = list(zip(weights, grads, strict=True))
        total = None
        for weight in sorted({w for w, g in pairs if g is not None and w}):
            c = project(basis, [g if w == weight else None for w, g in pairs])
            c = c if weight == 1.0 else c * weight
            total = c if total is None else total + c
        self.check_mapped()  # before it is anyone's step
        if total is None:
            return torch.zeros(basis.n, basis.num_segments, device=basis.device)
        return total

    def check_mapped(self) -> None:
        """Raises BasisError if a file that P lies in is not what it was, and so nor is P."""
        for file in self.mapped:
            file.check(BasisError)

    def all_reduce_async(self, parts: list[Tensor], x: Tensor | None) -> Callable[[], list[Tensor]]:
        """Begins the sum over ranks of parts of c; see `Ranks.all_reduce_async`.

        On the way x is compared between ranks.
        """
        return self.ranks.all_reduce_async(parts, x)

    def coefficient_gradient(
        self, basis: Basis, grads: Sequence[Tensor | None], x: Tensor
    ) -> Tensor:
        """The gradient of the coefficients, c (n, L): the same bits on every rank."""
        return self.all_reduce_async([self.local_coefficient_gradient(basis, grads)], x)()[0]

    def write(self, basis: Basis, x: Tensor, center: list[Tensor] | None) -> None:
        """Writes center + x^T P to this rank's weights."""
        reshard(self.model)
        reconstruct(basis, x, center, [local(t) for t in self.tensors])
        self.check_mapped()

    def part_of(self, name: str, t: Tensor) -> Part | None:
        """This rank's slices of any tensor of the model's state; None for all of it."""
        return self._shard(name, t).part


class ReplicateSharding(Sharding):
    """A sharding where every rank holds all of P and projects its own gradient.

    n * L numbers are summed. Each rank packs its share of the tensors and sends it.
    """

    name = "replicate"

    def __init__(
        self, ranks: Ranks, model: nn.Module, candidates: Candidates, key_map: KeyMap
    ) -> None:
        super().__init__(ranks, model, candidates, key_map)
        self.owner = spread([t.numel() for t in self.tensors], ranks.world_size)

    def _shard(self, name: str, t: Tensor) -> Shard:
        return Shard(t.shape, None, 1.0 / self.ranks.world_size, True)

    def is_packer(self, k: int) -> bool:
        return self.owner[k] == self.ranks.rank

    def sums_columns(self, k: int) -> bool:
        return self.is_packer(k)

    def average(self, k: int, weights: Tensor) -> Tensor:
        if self.is_packer(k):
            value = super().average(k, weights)
        else:
            dtype = torch.promote_types(self.candidates.info[self.keys[k]].dtype, torch.float32)
            value = torch.empty(self.shards[k].shape, dtype=dtype)
        return self.ranks.broadcast_(value, self.owner[k])

    def exchange(self, packer: AnyPacker, centers: list[Tensor]) -> None:
        for k, owner in enumerate(self.owner):
            for t in [*packer.storage(k), centers[k]]:
                self.ranks.broadcast_(t, owner)
        super().exchange(packer, centers)


class ColumnsSharding(Sharding):
    """A sharding where every rank holds P for its own shards of the model's DTensor parameters.

    A parameter that is no DTensor is on every rank, and its gradient is averaged over them.
    """

    name = "columns"

    def _shard(self, name: str, t: Tensor) -> Shard:
        return shard_of(name, t, self.ranks)
