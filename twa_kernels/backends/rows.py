"""Rows of replay on their way to a GPU."""

from __future__ import annotations

import array
from dataclasses import dataclass

from torch import Tensor

from ..operands import ReplayArgs

#: bytes that a kernel loads at a time
ALIGNMENT = 16


@dataclass(frozen=True)
class Rows:
    """Rows that a kernel reads, held until it is launched."""

    codes: list[Tensor]
    scales: list[Tensor]
    coefficients: list[float]  # as float32 numbers, none of them 0


def used_rows(args: ReplayArgs) -> Rows:
    """Rows whose coefficient is not 0; codes that a kernel cannot load as they lie are copied."""
    rounded = array.array("f", args.coefficients)
    used = [r for r, c in enumerate(rounded) if c != 0.0]
    codes = [args.codes[r] for r in used]
    codes = [c.clone() if c.data_ptr() % ALIGNMENT else c for c in codes]
    return Rows(codes, [args.scales[r] for r in used], [rounded[r] for r in used])
