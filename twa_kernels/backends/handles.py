"""Views of tensors for the native module (csrc/bindings).

Arguments are checked by the ops before this; the module checks dtypes and sizes once more. Lazily
negated tensors do not come here: torch resolves them on the way to an op.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ..native import made_of
from ..operands import BasisView, StepArgs
from .tensors import readable, writable


def read(tensors: Sequence[Tensor], module: Any) -> Any:
    """_C.Tensors of tensors to read, which it keeps alive; odd ones are copied, one by one."""
    made = made_of(tensors, module)
    return module.Tensors(readable(tensors, made.odd)) if made.odd else made


def read_or_none(tensors: Sequence[Tensor], module: Any) -> Any:
    """The same; None for an empty list."""
    return read(tensors, module) if tensors else None


@contextlib.contextmanager
def write(out: Sequence[Tensor], module: Any) -> Iterator[Any]:
    """_C.Tensors of tensors to write; into odd ones what was written is copied at the end."""
    made = made_of(out, module)
    with writable(out, made.odd) as targets:
        yield module.Tensors(targets) if made.odd else made


def basis_handle(basis: BasisView, module: Any) -> Any:
    """_C.Basis. Making it costs less than looking for one made before."""
    return module.Basis(
        codes=basis.codes,
        scales=basis.scales,
        row_scale=basis.row_scale,
        tile_segment=basis.tile_segment,
        numel=basis.numels,
        bits=basis.bits,
    )


def update(args: StepArgs, module: Any) -> Any:
    """_C.Update: the numbers of an optimizer's step."""
    return module.Update(
        rule=args.rule,
        maximize=args.maximize,
        lr=args.lr,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        dampening=args.dampening,
        nesterov=args.nesterov,
        beta1=args.beta1,
        beta2=args.beta2,
        eps=args.eps,
        step=max(args.count, 1),
    )
