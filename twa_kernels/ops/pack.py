"""pack: rows to codes and scales. The public functions are `pack` and `Packer` (packer.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..capture import refuse_reading_back
from ..operands import PackArgs
from ..registry import select
from .define import Flat, define

#: operands of a PackArgs, in its order
ARGS = (
    "Tensor[] rows, {center} center, int[] numels, Tensor tile_segment, int bits, "
    "Tensor(b!) codes, Tensor(c!) scales, Tensor(d!) sum_sq, Tensor(e!) max_scale"
)


class NotFiniteError(ValueError):
    """NaN or Inf in the input of pack.

    Args:
        row: index of the row, from 0.
        tensor: index of the tensor of the model.
        column: index of the element in the flattened row of that tensor.

    The three are attributes, too.
    """

    def __init__(self, row: int, tensor: int, column: int) -> None:
        super().__init__(f"NaN or Inf in row {row} of tensor {tensor} at column {column}")
        self.row, self.tensor, self.column = row, tensor, column


def with_args(*flat: Any) -> Flat:
    """The first operands of a schema that begins with ARGS as one view."""
    rows, center, numels, *others = flat[:9]
    return PackArgs(rows, center, tuple(numels), *others), *flat[9:]


def call(kernel: Callable[..., tuple[int, int, int] | None], *operands: object) -> None:
    """Raises NotFiniteError where the kernel met a NaN or Inf."""
    if bad := kernel(*operands):
        raise NotFiniteError(*bad)


def run(args: PackArgs, backend: str) -> None:
    """The op on real tensors."""
    args.check(backend)
    refuse_reading_back("pack", args.device)
    call(select("pack", args.device.type, backend), args)


# Nothing is returned: the checks are all that the fake does.
OP = define(
    "pack", f"({ARGS.format(center='Tensor[]')}, str backend) -> ()", run, PackArgs.check, with_args
)
