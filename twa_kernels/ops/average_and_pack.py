"""average_and_pack: the center, one tensor, is the rows' weighted average, which is written.

A backend that has it reads the rows once. Others average, then pack.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..operands import PackArgs
from ..registry import implements, select
from . import average, pack
from .define import define


def _check(args: PackArgs, weights: Sequence[float], backend: str) -> None:
    args.check(backend)
    if len(args.center) != 1:
        raise ValueError(f"center: expected one tensor to write, found {len(args.center)}")
    average.check(args.rows, weights, args.center[0], backend)


def _run(args: PackArgs, weights: Sequence[float], backend: str) -> None:
    _check(args, weights, backend)
    where = args.device.type
    if implements("average_and_pack", where, backend):
        pack.call(select("average_and_pack", where, backend), args, weights)
        return
    average.OP(args.rows, weights, args.center[0], backend)
    pack.run(args, backend)


OP = define(
    "average_and_pack",
    f"({pack.ARGS.format(center='Tensor(a!)[]')}, float[] weights, str backend) -> ()",
    _run,
    _check,
    pack.with_args,
)
