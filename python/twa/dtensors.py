"""Whether tensors and modules are sharded by PyTorch's DTensor or FSDP2.

Who has made one has imported them; this package does not, which halves the time of `import twa`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(t: object) -> TypeIs[DTensor]:
    """Whether this is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter of a model is a DTensor."""
    return any(is_dtensor(p) for p in model.parameters())


def device_meshes(model: nn.Module) -> set[DeviceMesh]:
    """The meshes that a model's parameters lie on."""
    return {p.device_mesh for p in model.parameters() if is_dtensor(p)}


def data_parallel_meshes(model: nn.Module) -> set[DeviceMesh]:
    """The meshes over which FSDP2 shares out batches: along them each rank has its own."""
    if (fsdp := sys.modules.get("torch.distributed.fsdp")) is None:
        return set()
    found = set()
    for state in (m._get_fsdp_state() for m in model.modules() if isinstance(m, fsdp.FSDPModule)):
        if hasattr(state, "_fsdp_param_groups"):
            groups = state._fsdp_param_groups
        else:  # older PyTorch: one group, or None
            groups = filter(None, [state._fsdp_param_group])
        found |= {group.mesh_info.mesh for group in groups}
    return found


def local(t: Tensor) -> Tensor:
    """This rank's part of a tensor, to read or write in place; an unsharded tensor itself."""
    with torch.no_grad():
        return t.to_local() if is_dtensor(t) else t.detach()


def reshard(model: nn.Module) -> None:
    """Frees the weights that FSDP2 has gathered: the next forward gathers those written since.

    The root module keeps gathered weights after a forward without backward, and would go on with
    old ones.
    """
    if (fsdp := sys.modules.get("torch.distributed.fsdp")) is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
