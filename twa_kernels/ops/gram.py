"""gram: inner products of the dequantised rows. The public function is `PackedBasis.gram`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..capture import refuse_reading_back
from ..operands import BasisView
from ..registry import select
from .define import BASIS, define


def _run(basis: BasisView, backend: str) -> Tensor:
    basis.check()
    refuse_reading_back("gram", basis.device)
    return select("gram", basis.device.type, backend)(basis)


def _fake(basis: BasisView, backend: str) -> Tensor:
    basis.check()
    shape = basis.num_segments, basis.n, basis.n
    return basis.row_scale.new_empty(shape, dtype=torch.float64)


OP = define("gram", f"({BASIS}, str backend) -> Tensor", _run, _fake)
