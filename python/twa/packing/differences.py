"""`basis="differences"`: what each candidate has that the one before it has not.

It is coded in a closed loop: a difference is from what a reader of the codes before it gets. So
the sum of the first k rows is the k-th candidate's distance from the first up to the error of one
row, and the errors of many do not add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

import twa_kernels as tk

from ..basis.dense import AnyPacker
from ..distributed.sharding import Sharding
from ..io.candidates import Block, average_into
from ..io.errors import TwaError

#: what `twa_kernels.record` takes for infinite
MOST_WEIGHT = tk.reference.MOST_WEIGHT


def check(sharding: Sharding) -> None:
    """TwaError unless there are differences, and this rank has the candidates that they are of."""
    where = "basis='differences'"
    if len(sharding.candidates) < 2:
        raise TwaError(f"expected at least 2 candidates, found {len(sharding.candidates)}", where)
    if sharding.name == "rows":
        raise TwaError(
            "each row is coded after the one before it, which sharding 'rows' has on another rank;"
            " use 'replicate' or 'columns', or basis='deltas'",
            where,
        )


def pack(packer: AnyPacker, k: int, block: Block, weights: Tensor, center: Tensor) -> None:
    """Packs a block of tensor k, and writes its center, the candidates' own average, to `center`.

    Packed rows have the same bits wherever blocks end.
    """
    average_into(center, block.rows, weights)
    first, *others = (row.reshape(-1) for row in block.rows)
    reference = first.to(torch.float32, copy=True)
    if not (reference.abs() < MOST_WEIGHT).all():
        raise tk.NotFiniteError(0, k, block.begin)
    if isinstance(packer, tk.Packer):
        codes, scales = [], []
        for r, row in enumerate(others, 1):
            code, scale, bad = tk.record([row], [reference], packer.bits)
            if bad:
                raise tk.NotFiniteError(r, k, block.begin)
            codes.append(code)
            scales.append(scale)
        packer.add_recorded(codes, scales, block.begin)
        return
    rows = []
    for row in others:
        rows.append(row.float() - reference)
        reference += rows[-1]
    packer.add_columns(rows, block.begin)
