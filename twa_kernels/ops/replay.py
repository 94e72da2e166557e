"""replay: what `record` has written, decoded and summed with weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..operands import ReplayArgs, as_list, check_disjoint
from ..registry import select
from .define import Flat, define


def replay(
    out: Tensor | Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    coefficients: Tensor | Sequence[float],
    bits: int,
    backend: str = "",
) -> list[Tensor]:
    """out += sum_r coefficients[r] * d_r, the recorded differences d_r.

    From the first snapshot on, coefficients of 1 for the first k rows give snapshot k, with the
    bits that the reference of `record` had. A weighted average of snapshots, sum_i beta_i w_i, has
    the coefficients c_r = sum_{i >= r} beta_i.

    Args:
        out: float32 tensors, contiguous; updated in place. Some columns of a tensor from a multiple
            of 128 on go with the tiles of these columns.
        codes: of each row, (tiles, 16 * bits) uint8, as `record` returns them.
        scales: of each row, (tiles,) bfloat16.
        coefficients: one number a row; rows of coefficient 0 are not read.
        bits: of the codes.
        backend: the one to run; "": the default of the device (registry.py).

    Returns:
        `out`, as a list. Sums are float32, in the order of the rows.

    Raises:
        ValueError: sizes do not fit.
        TypeError: a dtype is another one.
        RuntimeError: the backend does not run here.
    """
    out = as_list(out)
    numbers = coefficients.tolist() if isinstance(coefficients, Tensor) else list(coefficients)
    OP(out, list(codes), list(scales), numbers, bits, backend)
    return out


def _with_args(*flat: Any) -> Flat:
    return ReplayArgs(*flat[:5]), *flat[5:]


def _run(args: ReplayArgs, backend: str) -> None:
    args.check(backend)
    check_disjoint(args.out, "out")
    if args.out:
        select("replay", args.device.type, backend)(args)


OP = define(
    "replay",
    "(Tensor(a!)[] out, Tensor[] codes, Tensor[] scales, float[] coefficients, int bits, "
    "str backend) -> ()",
    _run,
    ReplayArgs.check,
    _with_args,
)
