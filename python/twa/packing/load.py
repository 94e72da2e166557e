"""A packed basis between a subspace and its file: what is written of it, what a model must have to
take it, and which part of it a rank takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import twa_kernels as tk
from twa_kernels.reference import TILE, num_tiles, tile_offsets

from ..basis.dense import DenseBasis
from ..basis.file import DTYPES, NAME, BasisError, Contents, Loaded, Writer, unrounded
from ..basis.segments import Layout, Segments
from ..distributed.sharding import Basis, Columns, Placement, local
from ..io.atomic import DTYPE_NAMES, naming, temporary_of
from ..io.candidates import Candidates

if TYPE_CHECKING:
    from ..subspace import Subspace


def contents_of(
    layout: Layout,
    candidates: Candidates,
    bits: int,
    segments: Segments,
    normalize: str,
    basis: str = "deltas",
    rows: int = 0,
) -> Contents:
    return Contents(
        bits=bits,
        basis=basis,
        normalize=normalize,
        rows=rows or len(candidates),
        candidates=[[str(c.path), c.fingerprint()] for c in candidates],
        kind=candidates.kind,
        info={key: [list(i.shape), DTYPE_NAMES[i.dtype]] for key, i in candidates.info.items()},
        trained=dict(layout.trained),
        fixed=dict(layout.fixed),
        copied=dict(layout.copied),
        aliases=dict(layout.aliases),
        names=dict(layout.names),
        segments=list(segments.first),
        labels=list(segments.labels),
        chunk=segments.chunk,
    )


def untrained(model: nn.Module, contents: Contents) -> Mapping[str, Tensor]:
    """The tensors of the model that are not in the subspace."""
    state = model.state_dict(keep_vars=True)
    found = {key: local(state[name]) for name, key in (contents.fixed | contents.copied).items()}
    return {
        f"state.{key}": t.to("cpu", unrounded(DTYPES[contents.info[key][1]]))
        for key, t in found.items()
    }


def save_basis(path: Path, subspace: Subspace) -> None:
    """The subspace's basis, center and coefficients.

    One process, or the first rank of those that hold all of it, calls it.
    """
    basis, place, coordinates = subspace.basis, subspace.placement, subspace.coordinates
    kind = "deltas" if coordinates is None else "orthonormal"
    contents = contents_of(
        subspace.layout,
        subspace.candidates,
        basis.bits,
        subspace.parts,
        subspace.normalize,
        kind,
        subspace.coefficients.shape[0],
    )
    if coordinates is not None:
        contents.dropped.extend(
            [[i, d] for i, d in of_segment] for of_segment in coordinates.dropped
        )
    # not where `twa pack` has what it will go on with
    writer = Writer(path, contents, temporary_of(path))
    tensors = {
        "codes": basis.codes,
        "scales": basis.scales,
        "row_scale": basis.row_scale,
        "divisor": subspace.divisor if coordinates is None else basis.divisor,
        "center_weights": subspace.center_weights,
        "coefficients": subspace.x(),
    }
    if coordinates is not None:
        tensors |= {
            "transform": coordinates.transform,
            "R": coordinates.R,
            "scale": coordinates.scale,
        }
    writer.lock()
    try:
        with naming(path):
            writer.open()
            for name, t in (tensors | untrained(place.model, contents)).items():
                writer.put(name, t.cpu())
            at = 0
            for center in subspace.center:
                writer.put("center", center.cpu(), at)
                at += center.numel()
            writer.finish()
    finally:
        writer.close()
        writer.partial.unlink(missing_ok=True)


def check_savable(subspace: Subspace) -> None:
    """ValueError unless one rank holds all of a packed basis."""
    if isinstance(subspace.basis, DenseBasis):
        raise ValueError(
            "basis: bits=32 is not packed, and as large as the candidates: there is nothing to gain"
            " from saving it"
        )
    if subspace.placement.name not in ("single", "replicate"):
        raise ValueError(
            f"basis: with placement {subspace.placement.name!r} no rank holds all of it; `twa pack`"
            " writes it from the candidates"
        )


def find_basis(path: str | Path) -> Path:
    path = Path(path)
    return path / NAME if path.is_dir() else path


def check_model(model: nn.Module, contents: Contents, path: Path) -> None:
    """BasisError unless the model has the tensors that the basis was packed for, and trains these."""
    state, trainable = model.state_dict(keep_vars=True), {}
    for name, p in model.named_parameters():
        if p.requires_grad and p.is_floating_point():
            trainable[name] = p
    if odd := sorted(trainable.keys() ^ contents.trained.keys()):
        where = (
            "is trainable in the model but not in the basis"
            if odd[0] in trainable
            else "is in the basis but no trainable parameter of the model"
        )
        raise BasisError(f"{path}: {odd[0]!r} {where}")
    for name, key in (contents.trained | contents.fixed | contents.copied).items():
        if name not in state:
            raise BasisError(f"{path}: tensor {name!r} is not in the model")
        if list(state[name].shape) != contents.info[key][0]:
            raise BasisError(
                f"{path}: tensor {name!r}: expected shape {list(state[name].shape)} as in the"
                f" model, found {contents.info[key][0]}"
            )
    for key, name in contents.names.items():
        if name not in state:
            raise BasisError(
                f"{path}: {key!r} is {name!r} in the model that it was packed for; this one has"
                " none of that name"
            )


def part_of(loaded: Loaded, place: Placement) -> tuple[Basis, list[Tensor] | None]:
    """Basis and center of this rank's rows and columns."""
    basis, center, contents = loaded.basis(), loaded.center(), loaded.contents
    rows = place.rows_of(basis.n)
    if rows != slice(0, basis.n):
        cut = {name: getattr(basis, name)[rows].contiguous() for name in ("row_scale", "divisor")}
        cut |= {
            name: getattr(basis, name).view(torch.uint8)[:, rows].contiguous()
            for name in ("codes", "scales")
        }
        basis = replace(basis, **cut | {"scales": cut["scales"].view(torch.float8_e4m3fn)})
    if isinstance(place, Columns):
        basis, center = _columns_of(basis, center, place, contents)
    return basis, place.own_center(center)


def _columns_of(
    basis: tk.PackedBasis, center: list[Tensor], place: Placement, contents: Contents
) -> tuple[Basis, list[Tensor]]:
    tiles, centers, offsets = [], [], tile_offsets(contents.numels)
    for k, (name, held) in enumerate(zip(contents.trained, place.held, strict=True)):
        inner = contents.shapes[k][1:].numel()
        part = held.part or (slice(0, contents.numels[k]),)
        begin = part[0].start * inner if held.part else 0
        whole = (
            all(
                (s.start, s.stop) == (0, size)
                for s, size in zip(part[1:], contents.shapes[k][1:], strict=True)
            )
            if held.part
            else True
        )
        if not whole or (begin % TILE and held.shape.numel()):
            raise BasisError(
                f"placement 'columns': this rank's shard of {name!r} is no run of whole groups of"
                f" {TILE} weights; pack the candidates on the ranks instead"
                " (Subspace.from_candidates)"
            )
        first = offsets[k] + begin // TILE
        tiles.append(torch.arange(first, first + num_tiles(held.shape.numel())))
        centers.append(center[k].reshape(-1)[begin : begin + held.shape.numel()].view(held.shape))
    at = torch.cat(tiles)
    cut = {
        "codes": basis.codes[at],
        "scales": basis.scales.view(torch.uint8)[at].view(torch.float8_e4m3fn),
        "tile_segment": basis.tile_segment[at],
    }
    return replace(basis, **cut, shapes=tuple(h.shape for h in place.held)), centers


@torch.no_grad()
def load_state(loaded: Loaded, place: Placement) -> None:
    """The model's tensors that are not in the subspace, as the basis holds them."""
    state = place.model.state_dict(keep_vars=True)
    for name, key in (loaded.contents.fixed | loaded.contents.copied).items():
        part = place.part_of(name, state[name])
        value = loaded.read(f"state.{key}")
        local(state[name]).copy_(value if part is None else value[part])
