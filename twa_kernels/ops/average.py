"""average: a weighted average of one tensor's versions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..operands import check_list, check_tensor
from ..registry import select
from .define import as_they_are, define


def average(
    rows: Sequence[Tensor],
    weights: Tensor | Sequence[float],
    out: Tensor | None = None,
    backend: str = "",
) -> Tensor:
    """out = sum_i weights[i] * rows[i]: a weighted average of one tensor's versions.

    Each row is read once. Summed in float64 in the order of the rows and rounded once to float32;
    the same bits for any number of threads, any instruction set and any device.

    Plain PyTorch: `sum(w * r.double() for w, r in zip(weights, rows)).float()`.

    Args:
        rows: n tensors of one shape, float32, bfloat16 or float16, mixed as they come; read in
            place if they are contiguous.
        weights: n numbers; rows of weight 0 are not read, so that what they hold (NaN, too) does
            not matter.
        out: contiguous float32 tensor of as many elements to write into; default: a new one of the
            rows' shape.
        backend: the one to run; "": the default of the device (registry.py).

    Returns:
        `out`.

    Raises:
        ValueError: sizes do not fit.
        TypeError: a dtype is not one of those above.
    """
    rows = list(rows)
    weights = [float(w) for w in (weights.tolist() if isinstance(weights, Tensor) else weights)]
    if out is None:
        if not rows:
            raise ValueError("rows: expected at least one tensor, found none")
        out = torch.empty(rows[0].shape, dtype=torch.float32, device=rows[0].device)
    OP(rows, weights, out, backend)
    return out


def check(rows: Sequence[Tensor], weights: Sequence[float], out: Tensor, backend: str) -> None:
    """The op's rules."""
    if not rows or len(weights) != len(rows):
        raise ValueError(
            "weights: expected one number per row, at least one, "
            f"found {len(weights)} for {len(rows)} rows"
        )
    check_tensor("out", out, out.shape, torch.float32, rows[0].device)
    check_list("rows", rows, [out.numel()] * len(rows), rows[0].device, backend)


def _run(rows: Sequence[Tensor], weights: Sequence[float], out: Tensor, backend: str) -> None:
    check(rows, weights, out, backend)
    select("average", out.device.type, backend)(rows, weights, out)


OP = define(
    "average",
    "(Tensor[] rows, float[] weights, Tensor(a!) out, str backend) -> ()",
    _run,
    check,
    as_they_are,
)
