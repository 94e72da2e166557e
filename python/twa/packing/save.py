"""A packed basis in memory as a file, and what a basis file says of what it is packed from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import twa_kernels as tk

from ..basis.contents import Contents, unrounded, written_json
from ..basis.dense import DenseBasis
from ..basis.file import Writer
from ..basis.segments import Segments
from ..coordinates import Coordinates, Deltas, Orthonormal
from ..distributed.sharding import KeptBasis, Sharding
from ..dtensors import local
from ..io.atomic import naming, temporary_of
from ..io.candidates import Candidates
from ..io.errors import TwaError
from ..io.key_map import KeyMap
from ..io.loading import named_tensors
from ..io.safetensors import DTYPE_NAMES, DTYPES


def contents_of(
    key_map: KeyMap,
    candidates: Candidates,
    bits: int,
    segments: Segments,
    normalize: str,
    coordinates: Coordinates | None = None,
    rows: int = 0,
) -> Contents:
    """What a basis file says of what it is packed from.

    Args:
        key_map: which tensor of the model is which of the candidates
        candidates: the n checkpoints
        bits: of the basis
        segments: of the trained tensors
        normalize: "row" or "none"
        coordinates: of the basis; None: those of deltas without a constraint
        rows: of the basis; 0: one per candidate
    """
    return Contents(
        bits=bits,
        basis=coordinates.basis if coordinates else "deltas",
        constraint=coordinates.constraint if coordinates else "none",
        balanced=coordinates.is_balanced if coordinates else False,
        moved=coordinates is not None and coordinates.rows.origin is not None,
        normalize=normalize,
        rows=rows or len(candidates),
        candidates=[[str(c.path), c.fingerprint()] for c in candidates],
        kind=candidates.kind,
        info={key: [list(i.shape), DTYPE_NAMES[i.dtype]] for key, i in candidates.info.items()},
        trained=dict(key_map.trained),
        fixed=dict(key_map.fixed),
        copied=dict(key_map.copied),
        aliases=dict(key_map.aliases),
        names=dict(key_map.names),
        written=written_json(key_map.written),
        checked=key_map.checked,
        segments=list(segments.first),
        labels=list(segments.labels),
        chunk=segments.chunk,
    )


def untrained(model: nn.Module, contents: Contents) -> dict[str, Tensor]:
    """The tensors of the model that are not in the subspace, under their names in the file."""
    state = named_tensors(model)
    found = {key: local(state[name]) for name, key in (contents.fixed | contents.copied).items()}
    return {
        f"state.{key}": t.to("cpu", unrounded(DTYPES[contents.info[key][1]]))
        for key, t in found.items()
    }


def check_savable(basis: KeptBasis, sharding: Sharding) -> tk.PackedBasis:
    """The basis, if it is packed and one rank holds all of it; else TwaError."""
    if isinstance(basis, DenseBasis):
        raise TwaError(
            "bits=32 is not packed, and as large as the candidates: there is nothing to gain from"
            " saving it",
            "basis",
        )
    if sharding.name not in ("single", "replicate"):
        raise TwaError(
            f"with sharding {sharding.name!r} no rank holds all of it; `twa pack` writes it from"
            " the candidates",
            "basis",
        )
    return basis


@torch.no_grad()
def save_basis(
    path: Path,
    sharding: Sharding,
    basis: tk.PackedBasis,
    center: list[Tensor],
    coordinates: Coordinates,
    segments: Segments,
    normalize: str,
    coefficients: Tensor,
) -> None:
    """Writes all that `Subspace.load` needs; one rank that holds all of it calls this.

    Args:
        path: the file
        sharding: candidates and model
        basis: all of it
        center: float32, in the shapes of the trained tensors
        coordinates: of the basis
        segments: of the trained tensors
        normalize: "row" or "none"
        coefficients: in the shape that the coordinates say
    """
    contents = contents_of(
        sharding.key_map, sharding.candidates, basis.bits, segments, normalize, coordinates, basis.n
    )
    tensors = {
        "codes": basis.codes,
        "scales": basis.scales,
        "row_scale": basis.row_scale,
        "center_weights": coordinates.center_weights,
        "coefficients": coefficients.detach().float(),
    }
    rows = coordinates.rows
    if isinstance(rows, Orthonormal):
        contents.dropped.extend([[i, d] for i, d in pairs] for pairs in rows.dropped)
        tensors |= {"transform": rows.transform, "R": rows.R, "scale": rows.scale}
    if rows.origin is not None:
        tensors["origin"] = rows.origin
    tensors |= {name: t.cpu() for name, t in coordinates.balance.items()}
    tensors["divisor"] = rows.divisor if isinstance(rows, Deltas) else basis.divisor
    writer = Writer(path, contents, temporary_of(path))  # beside what `twa pack` will go on with
    writer.lock()
    try:
        with naming(path):
            writer.open()
            for name, t in (tensors | untrained(sharding.model, contents)).items():
                assert t.shape == writer.info[name].shape, f"{name}: {t.shape}"
                writer.put(name, t.cpu())
            at = 0
            for part in center:
                writer.put("center", part.cpu(), at)
                at += part.numel()
            sharding.check_mapped()
            writer.finish()
    except OSError:  # of reading: the system refuses to write bytes that are gone
        sharding.check_mapped()
        raise
    finally:
        writer.close()
        writer.partial.unlink(missing_ok=True)
