"""unpack: the dequantised rows of a basis."""

from __future__ import annotations

from torch import Tensor

from ..basis import PackedBasis
from ..operands import BasisView
from ..registry import select
from .define import BASIS, define


def unpack(basis: PackedBasis, backend: str = "") -> list[Tensor]:
    """Dequantised rows of a basis.

    Args:
        basis: the packed rows.
        backend: the one to run; "": the default of the device (registry.py).

    Returns:
        One (n, *shape_k) float32 tensor per tensor of the model: n * D * 4 bytes.

    Raises:
        RuntimeError: the backend does not run here.
    """
    flat = OP(*basis.operands, backend)
    return [f.view(basis.n, *shape) for f, shape in zip(flat, basis.shapes, strict=True)]


def _run(basis: BasisView, backend: str) -> list[Tensor]:
    basis.check()
    return select("unpack", basis.device.type, backend)(basis)


def _fake(basis: BasisView, backend: str) -> list[Tensor]:
    basis.check()
    return [basis.row_scale.new_empty(basis.n, numel) for numel in basis.numels]


OP = define("unpack", f"({BASIS}, str backend) -> Tensor[]", _run, _fake)
