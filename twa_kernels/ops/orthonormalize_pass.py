"""orthonormalize_pass: one read of the rows for block Gram-Schmidt (orthonormalize/)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..capture import refuse_reading_back
from ..operands import PassArgs
from ..registry import select
from .define import Flat, define


def orthonormalize_pass(args: PassArgs, backend: str = "") -> tuple[Tensor, Tensor]:
    """One read of the rows: their Gram matrix, or Q and what certifies it.

    Args:
        args: the rows and what is done with them.
        backend: the one to run; "": the default of the device (registry.py).

    Returns:
        V V^T, rows from `first` on, lower triangle: (m, m) float64, m = r with a transform, else n;
        with `out` instead V V^T probes^T, (r, 6). And the rows' squared norms (n,) float64.

    Raises:
        ValueError: sizes or devices do not fit.
        TypeError: a dtype is not supported.
        RuntimeError: a CUDA graph is being captured.
    """
    return OP(
        args.rows,
        args.center,
        args.numels,
        args.parent,
        args.transform,
        args.probes,
        args.first,
        args.fast,
        args.out,
        backend,
    )


def _with_args(*flat: Any) -> Flat:
    rows, center, numels, *others = flat[:9]
    return PassArgs(rows, center, tuple(numels), *others), *flat[9:]


def _run(args: PassArgs, backend: str) -> tuple[Tensor, Tensor]:
    args.check(backend)
    refuse_reading_back("orthonormalize_pass", args.device)
    return select("orthonormalize_pass", args.device.type, backend)(args)


def _fake(args: PassArgs, backend: str) -> tuple[Tensor, Tensor]:
    args.check(backend)
    gram = args.parent.new_empty(args.gram_shape, dtype=torch.float64)
    return gram, args.parent.new_empty(args.n, dtype=torch.float64)


OP = define(
    "orthonormalize_pass",
    "(Tensor[] rows, Tensor[] center, int[] numels, Tensor parent, Tensor? transform, "
    "Tensor? probes, int first, bool fast, Tensor(a!)[] out, str backend) -> (Tensor, Tensor)",
    _run,
    _fake,
    _with_args,
)
