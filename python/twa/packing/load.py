"""A packed basis from its file: what a model must have for it, and which part a rank takes."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import twa_kernels as tk
from twa_kernels.layout import TILE, tile_offsets
from twa_kernels.shift import shift_columns

from ..basis.contents import Contents
from ..basis.file import NAME, Loaded
from ..basis.pieces import Pieces, by_groups
from ..distributed.sharding import ColumnsSharding, KeptBasis, Sharding, reconstruct
from ..dtensors import local
from ..io.errors import BasisError, TwaError
from ..io.key_map import aliases_of
from ..io.loading import named_tensors
from ..io.torch_zip import EXTRA_STATE
from .build import Progress, build_center

MOST_PIECES = 8192  # of a rank's shards, beside one each: each costs a step about a microsecond


def find_basis(path: str | Path) -> Path:
    """The file of a basis, given by itself or by its directory."""
    path = Path(path)
    return path / NAME if os.path.isdir(path) else path


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


def rows_of(loaded: Loaded, sharding: Sharding) -> tuple[KeptBasis, Pieces]:
    """This rank's rows and columns of P, and the columns as the basis has them.

    BasisError if the file would be cut into too many pieces.
    """
    basis = loaded.basis()
    pieces = Pieces.of_whole(loaded.contents.shapes)
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
        basis, pieces = _columns_of(basis, sharding, loaded.contents)
    return basis, pieces


def center_of(loaded: Loaded, sharding: Sharding) -> list[Tensor] | None:
    """This rank's part of the file's center, float32; mapped, where it is all of it."""
    center = loaded.center()
    if isinstance(sharding, ColumnsSharding):
        center = [
            whole if held.part is None else whole[held.part].clone()
            for whole, held in zip(center, sharding.shards, strict=True)
        ]
    return sharding.local_center(center)


def _cut_scales(scales: Tensor, tiles: Tensor | slice, rows: slice) -> Tensor:
    """Some tiles and rows of the scales, cut as bytes, which more of PyTorch takes than float8."""
    return scales.view(torch.uint8)[tiles, rows].contiguous().view(scales.dtype)


def _columns_of(
    basis: tk.PackedBasis, sharding: Sharding, contents: Contents
) -> tuple[tk.PackedBasis, Pieces]:
    """Basis of this rank's shards of the trained tensors: the file's codes and scales."""
    index, shift, sizes = [], [], []
    offsets, left = tile_offsets(contents.numels), MOST_PIECES
    for k, (name, held) in enumerate(zip(contents.trained, sharding.shards, strict=True)):
        found = by_groups(held.part, contents.shapes[k], left)
        if found is None:
            raise BasisError(
                f"sharding 'columns': this rank's shard of {name!r} is no run of weights, and no"
                f" rows of whole groups of {TILE}: its codes lie in more than {MOST_PIECES} pieces"
                " of the file; pack the candidates on the ranks instead (Subspace.from_candidates)"
            )
        index.append(offsets[k] + found.index)
        shift.append(found.shift)
        sizes.append(found.sizes)
        left -= len(found.sizes) - 1
    at = torch.cat(index)
    codes = basis.codes[at]
    shift_columns(codes, torch.cat(shift), basis.bits)
    pieces = Pieces(tuple(held.shape for held in sharding.shards), tuple(sizes))
    cut = replace(
        basis,
        codes=codes,
        scales=_cut_scales(basis.scales, at, slice(None)),
        tile_segment=basis.tile_segment[at],
        shapes=pieces.shapes,
    )
    return cut, pieces


@torch.no_grad()
def center_at(
    loaded: Loaded,
    sharding: Sharding,
    basis: KeptBasis,
    pieces: Pieces,
    weights: Tensor,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> list[Tensor] | None:
    """Another center than the file's, float32, of this rank's columns. Ranks call it together.

    It is the candidates' exact average where they are at hand; else what the rows of P make of the
    file's center, with the error of their quantisation.

    Args:
        loaded: the file
        sharding: which part this rank holds
        basis: this rank's rows and columns of P
        pieces: the columns as the basis has them
        weights: (n,), the merge weights of the center
        progress: called with (key of the tensor, bytes read)
        device: where it is made of the candidates; None: the model's

    Raises:
        CandidateError: a candidate holds NaN or Inf
        TwaError: no rank has all rows, and the candidates are not at hand
    """
    if sharding.candidates.at_hand:
        return build_center(sharding, weights, progress, device)
    if sharding.name == "rows":
        raise TwaError("sharding 'rows': another center needs the candidates: pass them to load")
    rows = loaded.coordinates().rows
    x = rows.from_merge_weights(weights[:, None].expand(-1, rows.shape[1])).float()
    held = center_of(loaded, sharding) or []
    made = [torch.empty_like(c) for c in held]
    reconstruct(basis, x.contiguous(), held, made, pieces)
    return made


@torch.no_grad()
def load_state(loaded: Loaded, sharding: Sharding) -> None:
    """Writes to the model the tensors that are not in the subspace, as the basis holds them."""
    state = named_tensors(sharding.model)
    for name, key in (loaded.contents.fixed | loaded.contents.copied).items():
        part = sharding.part_of(name, state[name])
        value = loaded.read(f"state.{key}")
        local(state[name]).copy_(value if part is None else value[part])
