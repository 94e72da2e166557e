"""`Share`: which of the batches a rank takes, where some ranks run one forward pass together."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..dtensors import data_parallel_meshes, device_meshes
from .ranks import Ranks


@dataclass(frozen=True)
class Share:
    """A rank's share of the batches: number `rank` of `world_size`.

    Attributes:
        rank: number of the share
        world_size: how many there are
        counts: whether this rank is the first of those with the share: what is summed over ranks
            counts its batches once
    """

    rank: int
    world_size: int
    counts: bool = True

    @classmethod
    def of(cls, ranks: Ranks) -> Share:
        """That of ranks of which each has its own."""
        return cls(ranks.rank, ranks.world_size)


def share_of(model: nn.Module, ranks: Ranks) -> Share:
    """This rank's share of the batches for a model. Ranks call it together.

    Ranks of a tensor-parallel model see the same batches; along dimensions of a mesh that FSDP has,
    and from one mesh to another, each has its own.
    """
    if ranks.group is None:
        return Share.of(ranks)
    mine = {dist.get_rank()}
    own = data_parallel_meshes(model)
    for mesh in device_meshes(model) - own:
        mine |= _peers(mesh, {name for m in own for name in m.mesh_dim_names or ()})
    members = dist.get_process_group_ranks(ranks.group)
    first = min(members.index(rank) for rank in mine if rank in members)
    firsts = ranks.all_gather_object(first)
    shares = sorted(set(firsts))
    return Share(shares.index(first), len(shares), first == ranks.rank)


def _peers(mesh: DeviceMesh, data_parallel: set[str]) -> set[int]:
    """The ranks of a mesh that differ from this one in dimensions other than these alone."""
    place, names = mesh.get_coordinate(), mesh.mesh_dim_names or [""] * mesh.ndim
    if place is None:
        return set()
    at = tuple(
        c if name in data_parallel else slice(None) for c, name in zip(place, names, strict=True)
    )
    return set(mesh.mesh[at].flatten().tolist())
