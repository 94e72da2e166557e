"""A packed basis from its file: what a model must have for it, and which part a rank takes."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import twa_kernels as tk
from twa_kernels.layout import TILE, num_tiles, tile_offsets

from ..basis.contents import Contents
from ..basis.file import NAME, Loaded
from ..distributed.sharding import ColumnsSharding, KeptBasis, Sharding, begin_of
from ..dtensors import local
from ..io.errors import BasisError
from ..io.key_map import aliases_of
from ..io.loading import named_tensors
from ..io.torch_zip import EXTRA_STATE


def find_basis(path: str | Path) -> Path:
    """The file of a basis, given by itself or by its directory."""
    path = Path(path)
    return path / NAME if path.is_dir() else path


def check_model(model: nn.Module, contents: Contents, path: Path) -> None:
    """BasisError unless the model has and trains the tensors that the basis was packed for."""
    state = named_tensors(model)
    aliases = aliases_of(state)
    trainable = {
        name
        for name, t in state.items()
        if t.requires_grad and t.is_floating_point() and name not in aliases
    }
    if odd := sorted(trainable ^ contents.trained.keys()):
        where = "is in the basis but no trainable parameter of the model"
        if odd[0] in trainable:
            where = "is trainable in the model but not in the basis"
        raise BasisError(f"{odd[0]!r} {where}", path)
    for name, key in (contents.trained | contents.fixed | contents.copied).items():
        if name not in state:
            raise BasisError(f"tensor {name!r} is not in the model", path)
        if nn.parameter.is_lazy(state[name]):
            raise BasisError(
                f"tensor {name!r} of the model has no shape yet: run a batch through it first", path
            )
        if list(state[name].shape) != contents.info[key][0]:
            raise BasisError(
                f"tensor {name!r}: expected shape {list(state[name].shape)} as in the"
                f" model, found {contents.info[key][0]}",
                path,
            )
    for key, name in contents.names.items():
        if name not in state:
            raise BasisError(
                f"{key!r} is {name!r} in the model that it was packed for; this one has"
                " none of that name",
                path,
            )


def warn_of_extra_state(model: nn.Module, path: Path) -> None:
    """Warns of modules that keep something beside their tensors, which a basis does not hold."""
    keys = [key for key in model.state_dict() if key.rpartition(".")[2] == EXTRA_STATE]
    if keys:
        warnings.warn(
            f"{path}: {keys[0]!r} ({len(keys)} in all) stays as the model has it: a basis does not"
            " hold the extra state of modules; pass candidates to load it",
            stacklevel=3,
        )


def part_of(loaded: Loaded, sharding: Sharding) -> tuple[KeptBasis, list[Tensor] | None]:
    """Basis and center of this rank's rows and columns.

    BasisError if the file cannot be cut where this rank's shards begin.
    """
    basis, center = loaded.basis(), loaded.center()
    rows = sharding.local_rows(basis.n)
    if sharding.name == "rows" and basis.n < sharding.ranks.world_size:
        raise BasisError(
            f"sharding 'rows': the basis has {basis.n} rows, fewer than there are ranks; use"
            " 'replicate' or 'columns'"
        )
    if rows != slice(0, basis.n):
        basis = replace(
            basis,
            codes=basis.codes[:, rows].contiguous(),
            scales=_cut_scales(basis.scales, slice(None), rows),
            row_scale=basis.row_scale[rows].contiguous(),
            divisor=basis.divisor[rows].contiguous(),
        )
    if isinstance(sharding, ColumnsSharding):
        basis, center = _columns_of(basis, center, sharding, loaded.contents)
    return basis, sharding.local_center(center)


def _cut_scales(scales: Tensor, tiles: Tensor | slice, rows: slice) -> Tensor:
    """Some tiles and rows of the scales, cut as bytes, which more of PyTorch takes than float8."""
    return scales.view(torch.uint8)[tiles, rows].contiguous().view(scales.dtype)


def _columns_of(
    basis: tk.PackedBasis, center: list[Tensor], sharding: Sharding, contents: Contents
) -> tuple[tk.PackedBasis, list[Tensor]]:
    """Basis and center of this rank's shards of the trained tensors."""
    tiles, centers, offsets = [], [], tile_offsets(contents.numels)
    for k, (name, held) in enumerate(zip(contents.trained, sharding.shards, strict=True)):
        begin, count = begin_of(held.part, contents.shapes[k]), held.shape.numel()
        if begin is None or (begin % TILE and count):
            raise BasisError(
                f"sharding 'columns': this rank's shard of {name!r} is no run of whole groups of"
                f" {TILE} weights; pack the candidates on the ranks instead"
                " (Subspace.from_candidates)"
            )
        first = offsets[k] + begin // TILE
        tiles.append(torch.arange(first, first + num_tiles(count)))
        centers.append(center[k].reshape(-1)[begin : begin + count].view(held.shape))
    at = torch.cat(tiles)
    cut = replace(
        basis,
        codes=basis.codes[at],
        scales=_cut_scales(basis.scales, at, slice(None)),
        tile_segment=basis.tile_segment[at],
        shapes=tuple(held.shape for held in sharding.shards),
    )
    return cut, centers


@torch.no_grad()
def load_state(loaded: Loaded, sharding: Sharding) -> None:
    """Writes to the model the tensors that are not in the subspace, as the basis holds them."""
    state = named_tensors(sharding.model)
    for name, key in (loaded.contents.fixed | loaded.contents.copied).items():
        part = sharding.part_of(name, state[name])
        value = loaded.read(f"state.{key}")
        local(state[name]).copy_(value if part is None else value[part])
