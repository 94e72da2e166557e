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

from ..basis.dense import AnyPacker, DenseBasis
from ..basis.pieces import Cut, Pieces, by_segments
from ..basis.segments import Segments
from ..basis.streamed import StreamedBasis
from ..dtensors import is_dtensor, local, reshard
from ..io.averaging import average_into
from ..io.candidates import UNIT, Block, Candidates, readable
from ..io.errors import BasisError, TwaError
from ..io.key_map import KeyMap
from ..io.loading import named_tensors
from ..io.mapped import MappedFile, Part
from .host import HostMemory, host_key
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


def spread(sizes: Sequence[int], ranks: int) -> list[int]:
    """A rank for each of these sizes: the largest first, each to the rank with the least so far."""
    load, owner = [0] * ranks, [0] * len(sizes)
    for k in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        owner[k] = min(range(ranks), key=load.__getitem__)
        load[owner[k]] += sizes[k]
    return owner


def project(basis: Basis, grads: Sequence[Tensor | None]) -> Tensor:
    """Projection of the gradients onto the rows: c (n, L).

    float64 gradients are made float32, which is what the kernels read.
    """
    if isinstance(basis, DenseBasis):
        return basis.project(grads)
    grads = [g.float() if g is not None and g.dtype == torch.float64 else g for g in grads]
    return basis.project(grads) if isinstance(basis, StreamedBasis) else tk.project(basis, grads)


def reconstruct(
    basis: Basis,
    x: Tensor,
    center: Sequence[Tensor] | None,
    out: Sequence[Tensor],
    pieces: Pieces | None = None,
    first: int = 0,
) -> None:
    """Writes center + x^T P to `out`, in the dtypes that are there.

    float64 tensors, which the kernels do not write, go through float32.

    Args:
        basis: the rows
        x: coefficients of the rows
        center: in the shapes of out
        out: tensors, from number `first` on
        pieces: those of the tensors that the basis is of; None: the tensors themselves
        first: number of the first tensor in `pieces`
    """
    pieces = pieces or Pieces.of_whole(o.shape for o in out)
    dense, cut = isinstance(basis, DenseBasis), not pieces.whole
    written = [torch.float32 if o.dtype == torch.float64 and not dense else o.dtype for o in out]
    targets = [
        torch.empty(o.shape, dtype=dtype, device=o.device)
        if dtype != o.dtype or (cut and not o.is_contiguous())
        else o
        for o, dtype in zip(out, written, strict=True)
    ]
    if center is not None:
        center = pieces.cut(center, first)
    cuts = pieces.cut(targets, first)
    if isinstance(basis, DenseBasis | StreamedBasis):
        basis.reconstruct(x, center, cuts)
    else:
        tk.reconstruct(basis, x, center, out=cuts)
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

    def cut(self, segments: Segments, dense: bool = False) -> Cut:
        """This rank's parts of the tensors as a basis with these segments has them.

        Args:
            segments: of the whole tensors
            dense: whether it is a basis of float32
        """
        parts, slices = [s.shape for s in self.shards], [s.part for s in self.shards]
        return by_segments(parts, slices, [t.shape for t in self.tensors], segments, dense)

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
        self,
        wanted: Sequence[int],
        rows: slice | None = None,
        within: Sequence[tuple[int, int]] | None = None,
    ) -> Iterator[tuple[int, Block]]:
        """Blocks of columns of some tensors as `read` gives them, each with its tensor's number.

        They are cut in the same places on every rank that holds the tensor.

        Args:
            wanted: numbers of the tensors
            rows: other candidates than this rank's
            within: of each of wanted, only these columns, see `Candidates.stream`
        """
        asked = [(self.keys[k], self.shards[k].part) for k in wanted]
        chosen = self.rows if rows is None else rows
        for block in self.candidates.stream(asked, chosen, self.block_columns, within):
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
        out = torch.empty(rows[0].shape, dtype=torch.float32, device=rows[0].device)
        return average_into(out, rows, weights)

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

    def host_memory(self, size: int, device: torch.device) -> HostMemory | None:
        """Memory for a basis on this device that ranks of one host share; None if none do.

        Ranks call it together.

        Args:
            size: bytes at least
            device: where the basis is built
        """
        return None

    def exchange(
        self, packer: AnyPacker, centers: list[Tensor], memory: HostMemory | None = None
    ) -> None:
        """Completes packing: gets what other ranks have packed, and makes the scales equal.

        Args:
            packer: which has packed this rank's tensors
            centers: of all tensors, those of this rank's are there
            memory: where basis and centers are
        """
        self.ranks.all_reduce_max_(packer.max_scale)

    def share(self, parts: list[list[Tensor]], memory: HostMemory | None) -> None:
        """Sends what one rank has made of its tensors to the others.

        Args:
            parts: of each tensor of the model, what is made of it
            memory: where these are
        """

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
        self, basis: Basis, pieces: Pieces, grads: Sequence[Tensor | None], first: int = 0
    ) -> Tensor:
        """This rank's addend of c (n, L).

        Args:
            basis: the rows that this rank holds
            pieces: those that the basis is of
            grads: of the tensors from number `first` on; sparse ones are made dense
            first: number of the first of them
        """
        grads = [g if g is None or g.layout == torch.strided else g.to_dense() for g in grads]
        weights = [shard.weight for shard in self.shards[first : first + len(grads)]]
        pairs = list(zip(weights, grads, strict=True))
        total = None
        for weight in sorted({w for w, g in pairs if g is not None and w}):
            c = project(basis, pieces.cut([g if w == weight else None for w, g in pairs], first))
            c = c if weight == 1.0 else c * weight
            total = c if total is None else total + c
        self.check_mapped()  # before it is anyone's step
        if total is None:
            shape = basis.n, basis.num_segments
            return torch.zeros(shape, dtype=torch.float32, device=basis.device)
        return total

    def check_mapped(self) -> None:
        """Raises BasisError if a file that P lies in is not what it was, and so nor is P.

        A copy of a subspace has its P in memory: files are not mapped there.
        """
        for file in self.mapped:
            if file.is_mapped:
                file.check(BasisError)

    def all_reduce_async(self, parts: list[Tensor], x: Tensor | None) -> Callable[[], list[Tensor]]:
        """Begins the sum over ranks of parts of c; see `Ranks.all_reduce_async`.

        On the way x is compared between ranks.
        """
        return self.ranks.all_reduce_async(parts, x)

    def coefficient_gradient(
        self, basis: Basis, pieces: Pieces, grads: Sequence[Tensor | None], x: Tensor
    ) -> Tensor:
        """The gradient of the coefficients, c (n, L): the same bits on every rank."""
        mine = self.local_coefficient_gradient(basis, pieces, grads)
        return self.all_reduce_async([mine], x)()[0]

    def write(self, basis: Basis, pieces: Pieces, x: Tensor, center: list[Tensor] | None) -> None:
        """Writes center + x^T P to this rank's weights."""
        reshard(self.model)
        reconstruct(basis, x, center, [local(t) for t in self.tensors], pieces)
        self.check_mapped()

    def part_of(self, name: str, t: Tensor) -> Part | None:
        """This rank's slices of any tensor of the model's state; None for all of it."""
        return self._shard(name, t).part


class ReplicateSharding(Sharding):
    """A sharding where every rank holds all of P and projects its own gradient.

    n * L numbers are summed. Each rank packs its share of the tensors and sends it. In CPU memory
    the ranks of one host hold one packed basis and one center between them.
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
            value = torch.empty(self.shards[k].shape, dtype=dtype, device="cpu")
        return self.ranks.broadcast_(value, self.owner[k])

    def host_memory(self, size: int, device: torch.device) -> HostMemory | None:
        # between hosts it would go through the CPU
        is_shared = device.type == "cpu" and not self.ranks.needs_cuda
        memory = HostMemory(self.ranks, size, host_key() if is_shared else "")
        return memory if memory.is_shared else None

    def exchange(
        self, packer: AnyPacker, centers: list[Tensor], memory: HostMemory | None = None
    ) -> None:
        self.share([[*packer.storage(k), c] for k, c in enumerate(centers)], memory)
        super().exchange(packer, centers)  # and nobody is before it

    def share(self, parts: list[list[Tensor]], memory: HostMemory | None) -> None:
        if memory is not None:
            memory.send(self.owner, parts)
            return
        for owner, tensors in zip(self.owner, parts, strict=True):
            for t in tensors:
                self.ranks.broadcast_(t, owner)


class ColumnsSharding(Sharding):
    """A sharding where every rank holds P for its own shards of the model's DTensor parameters.

    A parameter that is no DTensor is on every rank, and its gradient is averaged over them.
    """

    name = "columns"

    def _shard(self, name: str, t: Tensor) -> Shard:
        return shard_of(name, t, self.ranks)
