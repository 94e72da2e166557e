"""Which sharding a job gets, and on which ranks."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..dtensors import device_meshes, is_sharded, local, reshard
from ..io.candidates import Candidates
from ..io.errors import TwaError, check_type
from ..io.key_map import KeyMap
from ..io.memory import proc_bytes
from . import cost
from .ranks import Ranks
from .rows import RowsSharding
from .sharding import ColumnsSharding, ReplicateSharding, Sharding

SHARDINGS = ("auto", "single", *cost.SHARDINGS)

_CLASSES: dict[str, type[Sharding]] = {
    "single": Sharding,
    "replicate": ReplicateSharding,
    "rows": RowsSharding,
    "columns": ColumnsSharding,
}


def find_ranks(sharding: str, model: nn.Module, group: dist.ProcessGroup | None = None) -> Ranks:
    """The ranks that share the job.

    They are those of `group`, else of a sharded model's mesh of one dimension, else all ranks;
    without torch.distributed, or with "single", this process alone.

    A mesh that is a part of a larger one, such as the tensor-parallel dimension, is not all there
    is to a model's ranks.
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
    if sharding == "single":
        return Ranks()
    reshard(model)
    meshes = device_meshes(model)
    if group is None and len(meshes) == 1:
        mesh = next(iter(meshes))
        if mesh.ndim == 1 and _root(mesh).size() == mesh.size():
            group = mesh.get_group()
    return Ranks.find(group)


def _root(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that this one was sliced from, or itself."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed.device_mesh import _mesh_resources  # PyTorch before 2.10

    return _mesh_resources.get_root_mesh(mesh)


def choose_sharding(
    name: str,
    model: nn.Module,
    candidates: Candidates,
    key_map: KeyMap,
    bits: int,
    ranks: Ranks,
    *,
    may_shard: bool = False,
    storage: str = "device",
) -> Sharding:
    """The sharding of that name. Ranks call it together.

    Args:
        name: one of `SHARDINGS`. "auto": columns for a sharded model, single on one rank; else the
            first of replicate, columns (if the model may be sharded here) and rows that fits into
            every rank's memory
        model: whole on every rank, or sharded
        candidates: what is averaged
        key_map: which tensor of the model is which of the candidates'
        bits: of the basis, for what fits into memory
        ranks: those that share the job
        may_shard: whether "columns" shards a model that is whole
        storage: where basis and center are kept, "device" or "host"

    Raises:
        TwaError: there is no such sharding, or the model cannot have it on these ranks
    """
    if name not in SHARDINGS:
        raise TwaError(f"expected one of {SHARDINGS}, found {name!r}", "sharding")
    _check_device(name, model, ranks)
    sharded = is_sharded(model)
    if name == "auto":
        name = "columns"
        if not sharded:
            name = _fitting(ranks, model, candidates, bits, may_shard, storage)
    if name == "columns" and not sharded and may_shard:
        if ranks.group is None:
            raise _not_initialised(name)
        shard_model(model, ranks.group)
        sharded = True
    if sharded:
        _check_meshes(name, model, ranks)
    elif name == "columns":
        raise TwaError(
            "expected a model whose parameters are sharded: call"
            " torch.distributed.fsdp.fully_shard(model) before, or choose 'replicate' or 'rows'",
            "sharding 'columns'",
        )
    elif name in ("replicate", "rows") and ranks.group is None:
        raise _not_initialised(name)
    return _CLASSES[name](ranks if name != "single" else Ranks(), model, candidates, key_map)


def _not_initialised(name: str) -> TwaError:
    """The error for a sharding that needs other ranks, where there are none."""
    return TwaError(
        "torch.distributed is not initialised; start with torchrun and call init_process_group"
        " first",
        f"sharding {name!r}",
    )


def _check_device(name: str, model: nn.Module, ranks: Ranks) -> None:
    """Raises TwaError if NCCL could not reach the model."""
    device = local(next(model.parameters())).device
    if ranks.needs_cuda and device.type != "cuda":
        raise TwaError(
            f"NCCL needs the model on a CUDA device, found {device}; move the model, or use gloo"
            " (for offloaded shards 'cpu:gloo,cuda:nccl')",
            f"sharding {name!r}",
        )
    if ranks.has_nccl and device.type == "cuda" and device.index != torch.cuda.current_device():
        raise TwaError(
            f"NCCL talks from the current device, cuda:{torch.cuda.current_device()}, and the model"
            f" is on {device}; call torch.cuda.set_device(int(os.environ['LOCAL_RANK'])) before"
            " init_process_group",
            f"sharding {name!r}",
        )


def _check_meshes(name: str, model: nn.Module, ranks: Ranks) -> None:
    """Raises TwaError unless a sharded model can have this sharding on these ranks."""
    if name != "columns":
        raise TwaError(
            "the model's parameters are sharded (DTensor); expected 'columns' or 'auto'",
            f"sharding {name!r}",
        )
    members = set(dist.get_process_group_ranks(ranks.group))
    for mesh in device_meshes(model):
        on_mesh = mesh.mesh.flatten().tolist()
        if not members.issuperset(on_mesh) or len(members) % mesh.size():
            raise TwaError(
                "expected a process group that holds the model's device meshes, found one of ranks"
                f" {sorted(members)} and a mesh of ranks {sorted(on_mesh)}",
                "sharding 'columns'",
            )


def _fitting(
    ranks: Ranks,
    model: nn.Module,
    candidates: Candidates,
    bits: int,
    may_shard: bool,
    storage: str,
) -> str:
    """The sharding that "auto" is for a model that is whole on every rank."""
    if ranks.world_size == 1:
        return "single"
    trained = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    job = cost.Job(
        params=sum(p.numel() for p in trained),
        candidates=len(candidates),
        bits=bits,
        segments=1,
        ranks=ranks.world_size,
        weight_bytes=trained[0].element_size(),
        storage=storage if trained[0].is_cuda else "device",  # both are one memory elsewhere
        sharers=_ranks_here() if trained[0].device.type == "cpu" else 1,
    )
    limit = cost.whole_model_limit(job, free_memory(trained[0].device))
    choices = ("replicate", "columns", "rows", None)
    mine = choices.index(cost.choose(job, limit, may_shard=may_shard))
    chosen = choices[ranks.most(mine)]  # by the rank that has least memory
    if may_shard:
        return chosen if chosen == "replicate" else "columns"  # which holds least
    if chosen is None:
        raise TwaError(
            f"{len(candidates)} candidates at {bits} bits fit into no rank's memory beside the"
            " model, whole or as rows; shard the model with fully_shard, use fewer bits, or name a"
            " sharding (`twa plan` prints what each needs)",
            "sharding 'auto'",
        )
    return chosen


def shard_model(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Calls fully_shard on the members of every ModuleList (a transformer's blocks), and on all."""
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device.type
    is_fake = dist.get_backend(group) == "fake"  # of `simulate`, whose model has no weights
    if not isinstance(group, dist.ProcessGroup) or (device == "meta" and not is_fake):
        raise TwaError(
            "sharding 'columns': expected a model in memory and a process group, found a model on"
            f" {device}"
        )
    mesh = DeviceMesh.from_group(group, "cpu" if device == "meta" else device)
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def free_memory(device: torch.device) -> int:
    """Bytes that this rank may still take: of its GPU, or of its share of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = proc_bytes("/proc/meminfo", "MemAvailable")
    if available is None:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return available // _ranks_here()


def _ranks_here() -> int:
    """How many ranks the launcher has started on this host."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def training_bytes(sharding: Sharding, bits: int) -> int:
    """Bytes that training will hold on this rank beside what it holds now, without activations.

    They are of basis, center, gradients, and the best weights so far.
    """
    held = sum(shard.shape.numel() for shard in sharding.shards)
    itemsize = sharding.tensors[0].element_size()
    job = cost.Job(
        params=sum(t.numel() for t in sharding.tensors),
        candidates=len(sharding.candidates),
        bits=bits,
        segments=1,
        ranks=sharding.ranks.world_size,
        weight_bytes=itemsize,
    )
    name = "replicate" if sharding.name == "single" else sharding.name
    total = int(cost.memory(job, name)["total"])
    return total - held * itemsize + held * 4  # the weights are there; the best so far as float32
