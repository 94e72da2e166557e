"""Which placement a job gets, and on which ranks."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ..basis.segments import Layout
from ..io.candidates import Candidates
from . import cost as plan
from .ranks import World
from .sharding import Columns, Placement, Replicated, Rows, local, reshard

PLACEMENTS = ("auto", "single", *plan.PLACEMENTS)

_CLASSES: dict[str, type[Placement]] = {
    "single": Placement,
    "replicate": Replicated,
    "rows": Rows,
    "columns": Columns,
}


def find_world(placement: str, model: nn.Module, group: dist.ProcessGroup | None = None) -> World:
    """The ranks that share the job:

    `group`, else a sharded model's mesh of one dimension, else all ranks; this process alone
    without torch.distributed. A mesh that is a part of a larger one, such as the tensor-parallel
    dimension, is not all there is to a model's ranks."""
    if placement == "single":
        return World()
    reshard(model)
    meshes = {p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}
    if (
        group is None
        and len(meshes) == 1
        and (mesh := next(iter(meshes))).ndim == 1
        and _root(mesh).size() == mesh.size()
    ):
        group = mesh.get_group()
    return World.find(group)


def _root(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that this one was sliced from, or itself."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed.device_mesh import _mesh_resources  # PyTorch before 2.10

    return _mesh_resources.get_root_mesh(mesh)


def resolve(
    placement: str,
    model: nn.Module,
    candidates: Candidates,
    layout: Layout,
    bits: int,
    world: World,
) -> Placement:
    """The placement of that name.

    "auto": columns for a sharded model; else replicate if that fits into every rank's memory, else
    rows; single on one rank. Ranks call it together."""
    if placement not in PLACEMENTS:
        raise ValueError(f"placement: expected one of {PLACEMENTS}, found {placement!r}")
    device = local(next(model.parameters())).device
    if world.backend == "nccl" and device.type != "cuda":
        raise ValueError(
            f"placement {placement!r}: NCCL needs the model on a CUDA device, found {device}; move"
            " the model, or use gloo (for offloaded shards 'cpu:gloo,cuda:nccl')"
        )
    if (
        "nccl" in world.backend
        and device.type == "cuda"
        and device.index != torch.cuda.current_device()
    ):
        raise ValueError(
            f"placement {placement!r}: NCCL talks from the current device,"
            f" cuda:{torch.cuda.current_device()}, and the model is on {device}; call"
            " torch.cuda.set_device(int(os.environ['LOCAL_RANK'])) before init_process_group"
        )
    meshes = {p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}
    if meshes:
        if placement not in ("auto", "columns"):
            raise ValueError(
                f"placement {placement!r}: the model's parameters are sharded (DTensor); expected"
                " 'columns' or 'auto'"
            )
        members = set(dist.get_process_group_ranks(world.group))
        for mesh in meshes:
            if not members.issuperset(mesh.mesh.flatten().tolist()) or len(members) % mesh.size():
                raise ValueError(
                    "placement 'columns': expected a process group that holds the model's device"
                    f" meshes, found one of ranks {sorted(members)} and a mesh of ranks"
                    f" {sorted(mesh.mesh.flatten().tolist())}"
                )
        return Columns(world, model, candidates, layout)
    if placement == "columns":
        raise ValueError(
            "placement 'columns': expected a model whose parameters are sharded: call"
            " torch.distributed.fsdp.fully_shard(model) before, or choose 'replicate' or 'rows'"
        )
    if world.group is None and placement in ("replicate", "rows"):
        raise ValueError(
            f"placement {placement!r}: torch.distributed is not initialised; start with torchrun"
            " and call init_process_group first"
        )
    if placement == "auto":
        placement = choose(world, model, candidates, bits)
    return _CLASSES[placement](
        world if placement != "single" else World(), model, candidates, layout
    )


def choose(world: World, model: nn.Module, candidates: Candidates, bits: int) -> str:
    """What "auto" is for a model that is not sharded."""
    if world.size == 1:
        return "single"
    trained = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    weights = {"params": sum(p.numel() for p in trained), "weight_bytes": trained[0].element_size()}
    job = plan.Job(candidates=len(candidates), bits=bits, segments=1, ranks=world.size, **weights)
    choices = ("replicate", "rows", None)
    mine = choices.index(plan.automatic(job, free_memory(trained[0].device)))
    chosen = choices[int(world.max_(torch.tensor([mine])))]  # by the rank that has least
    if chosen is None:
        raise ValueError(
            f"placement 'auto': {len(candidates)} candidates at {bits} bits fit into no rank's"
            " memory beside the model, whole or as rows; shard the model with fully_shard, use"
            " fewer bits, or name a placement (`twa plan` prints what each needs)"
        )
    return chosen


def shard_model(model: nn.Module, group: dist.ProcessGroup) -> None:
    """fully_shard on the members of every ModuleList (a transformer's blocks) and on the whole."""
    device = next(model.parameters()).device.type
    if not isinstance(group, dist.ProcessGroup) or device == "meta":
        raise ValueError(
            "placement 'columns': expected a model in memory and a process group, found a model on"
            f" {device}"
        )
    mesh = DeviceMesh.from_group(group, device)
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def free_memory(device: torch.device) -> int:
    """Bytes that this rank may still take: of its GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        with open("/proc/meminfo") as f:
            available = next(
                int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable")
            )
    except (OSError, StopIteration):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return available // max(1, ranks_here)
