"""`rows`: every rank holds some rows of P, and gradient and weights are summed whole.

This is the scheme that Li et al. (arXiv 2205.13104v4) describe. `replicate` sends n * L numbers in
the place of 2 * D, and is to be preferred where P fits into a rank's memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import twa_kernels as tk

from ..basis.dense import AnyPacker
from ..basis.pieces import Pieces
from ..io.averaging import average_into
from ..io.candidates import Block, Candidates
from ..io.errors import TwaError
from ..io.key_map import KeyMap
from .host import HostMemory
from .ranks import Ranks
from .sharding import Basis, Sharding, project, reconstruct, spread


class RowsSharding(Sharding):
    """A sharding where every rank holds some rows of P.

    Gradient and weights are summed whole, as published.
    """

    name = "rows"

    def __init__(
        self, ranks: Ranks, model: nn.Module, candidates: Candidates, key_map: KeyMap
    ) -> None:
        if ranks.world_size > len(candidates):
            raise TwaError(
                f"sharding 'rows': expected at most one rank per candidate, {len(candidates)},"
                f" found {ranks.world_size} ranks; 'replicate' and 'columns' have no such limit"
            )
        super().__init__(ranks, model, candidates, key_map)
        self.feeder = spread([t.numel() for t in self.tensors], ranks.world_size)

    def sums_columns(self, k: int) -> bool:
        return self.feeder[k] == self.ranks.rank

    def local_center(self, centers: list[Tensor]) -> list[Tensor] | None:
        """The center on rank 0 alone, since x^T P is summed over ranks."""
        return centers if self.ranks.rank == 0 else None

    def local_rows(self, n: int) -> slice:
        """This rank's part of n rows of P; parts differ by one row at most."""
        rank, world_size = self.ranks.rank, self.ranks.world_size
        return slice(n * rank // world_size, n * (rank + 1) // world_size)

    def center(self, k: int, rows: Sequence[Tensor], weights: Tensor) -> Tensor:
        partial = torch.empty(rows[0].shape, dtype=torch.float64, device=rows[0].device)
        average_into(partial, rows, weights[self.rows])
        if not torch.isfinite(partial).all():  # before the sum makes it everyone's
            raise tk.NotFiniteError(0, k, 0)
        return self.ranks.all_reduce_(partial).float()

    def pack(
        self, packer: AnyPacker, k: int, block: Block, weights: Tensor, center: Tensor
    ) -> None:
        center.copy_(self.center(k, block.rows, weights))
        packer.add_columns(block.rows, block.begin, center)

    def average(self, k: int, weights: Tensor) -> Tensor:
        dtype = torch.promote_types(self.candidates.info[self.keys[k]].dtype, torch.float32)
        out = torch.empty(self.shards[k].shape, dtype=dtype, device="cpu")
        for block in self.candidates.stream([(self.keys[k], None)], self.rows, self.block_columns):
            partial = torch.empty(block.end - block.begin, dtype=torch.float64, device="cpu")
            average_into(partial, block.rows, weights[self.rows])
            out.view(-1)[block.begin : block.end] = self.ranks.all_reduce_(partial)
        return out

    def exchange(
        self, packer: AnyPacker, centers: list[Tensor], memory: HostMemory | None = None
    ) -> None:
        pass  # rows and their scales are this rank's alone, centers are summed already

    def sum_sq(self, packer: AnyPacker) -> Tensor:
        total = torch.zeros(
            len(self.candidates), packer.sum_sq.shape[1], dtype=torch.float64, device="cpu"
        )
        total[self.rows] = packer.sum_sq.cpu()
        return self.ranks.all_reduce_(total)

    def _flat(self) -> tuple[Tensor, list[Tensor]]:
        """A float32 vector (D,) for all of the model, yet to be filled, and its parts.

        The parts are views of it in the shapes of the tensors.
        """
        numels = [t.numel() for t in self.tensors]
        flat = torch.empty(sum(numels), dtype=torch.float32, device=self.device)
        parts = flat.split(numels)
        return flat, [part.view(t.shape) for part, t in zip(parts, self.tensors, strict=True)]

    def coefficient_gradient(
        self, basis: Basis, pieces: Pieces, grads: Sequence[Tensor | None], x: Tensor
    ) -> Tensor:
        flat, parts = self._flat()
        for part, g in zip(parts, grads, strict=True):
            if g is None:
                part.zero_()
            else:
                part.copy_(g if g.layout == torch.strided else g.to_dense())
        self.ranks.all_reduce_(flat)
        c = torch.zeros_like(x)
        c[self.local_rows(len(x))] = project(basis, parts) / self.ranks.world_size
        self.check_mapped()  # before it is anyone's step
        return self.all_reduce_async([c], x)()[0]

    def write(self, basis: Basis, pieces: Pieces, x: Tensor, center: list[Tensor] | None) -> None:
        flat, parts = self._flat()
        mine = x[self.local_rows(len(x))].contiguous()
        reconstruct(basis, mine, center if self.ranks.rank == 0 else None, parts)
        self.check_mapped()
        self.ranks.all_reduce_(flat)
        for t, part in zip(self.tensors, parts, strict=True):
            t.detach().copy_(part)
