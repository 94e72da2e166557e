"""reconstruct: weights out of the coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..basis import PackedBasis
from ..operands import BasisView, as_list, check_disjoint, check_is_tensor, check_list
from ..registry import select
from .define import BASIS, LIBRARY, Context, define


def reconstruct(
    basis: PackedBasis,
    x: Tensor,
    center: Tensor | Sequence[Tensor] | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
    backend: str = "",
) -> list[Tensor]:
    """theta[j] = center[j] + sum_i x[i, l] * P[i, j], l the segment of column j.

    Plain PyTorch: `theta = center + x.T @ P` for one segment. Without `out` differentiable in x
    (backward: project) and center; with `out` it writes in place, outside autograd.

    The sum is float64-exact per tile up to 24-bit coefficients (on GPUs at 3 bits, and at 1 bit
    past 255 rows: float32 over groups of 4), added to the center and rounded to float32, then to
    the dtype of the result.

    Args:
        basis: the packed rows.
        x: (n, L) float32 coefficients.
        center: one tensor of shape_k per tensor, float32, bfloat16 or float16; None for zero.
        out: tensors to write, such as a model's parameters, each in its own dtype; without it new
            ones in the center's dtype.
        backend: the one to run; "": the default of the device (registry.py).

    Returns:
        One tensor of shape_k per tensor of the model. NaN or Inf in a coefficient makes its segment
        NaN.

    Raises:
        ValueError: sizes or devices do not fit the basis, or two outputs share memory.
        TypeError: a dtype is not one of those above.
    """
    check_is_tensor("x", x)
    centers = [] if center is None else as_list(center)
    if out is None:
        flat = OP(*basis.operands, x, centers, backend)
        return [f.view(shape) for f, shape in zip(flat, basis.shapes, strict=True)]
    targets = as_list(out)
    with torch.no_grad():
        OUT(*basis.operands, x, centers, targets, backend)
    # So that autograd refuses to go back through the old values.
    torch.autograd.graph.increment_version(targets)
    return targets


def check(basis: BasisView, x: Tensor, center: Sequence[Tensor], backend: str) -> None:
    """The op's rules."""
    basis.check()
    basis.check_coefficients(x)
    if center:
        check_list("center", center, basis.numels, basis.device, backend)


def _run(basis: BasisView, x: Tensor, center: Sequence[Tensor], backend: str) -> list[Tensor]:
    check(basis, x, center, backend)
    return select("reconstruct", basis.device.type, backend)(basis, x, center, None)


def _fake(basis: BasisView, x: Tensor, center: Sequence[Tensor], backend: str) -> list[Tensor]:
    check(basis, x, center, backend)
    return [
        x.new_empty(numel, dtype=center[k].dtype if center else torch.float32)
        for k, numel in enumerate(basis.numels)
    ]


OP = define(
    "reconstruct", f"({BASIS}, Tensor x, Tensor[] center, str backend) -> Tensor[]", _run, _fake
)


def _setup(
    ctx: Context,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, list[int], int, Tensor, list[Tensor], str],
    output: list[Tensor],
) -> None:
    *basis, ctx.numels, ctx.bits, _, center, ctx.backend = inputs
    ctx.save_for_backward(*basis)
    ctx.like = [(c.shape, c.dtype) for c in center]


def _backward(
    ctx: Context, grads: Sequence[Tensor | None]
) -> tuple[Tensor | list[Tensor | None] | None, ...]:
    empty = ctx.saved_tensors[2].new_empty(0)
    given = [empty if g is None else g for g in grads]
    c = torch.ops.twa_kernels.project.default(
        *ctx.saved_tensors, ctx.numels, ctx.bits, given, ctx.backend
    )
    center = [
        None if g is None else g.view(shape).to(dtype)
        for g, (shape, dtype) in zip(grads, ctx.like, strict=False)
    ]
    return (*[None] * 6, c, center, None)


torch.library.register_autograd(
    "twa_kernels::reconstruct", _backward, setup_context=_setup, lib=LIBRARY
)


# The same into tensors that exist.


def _check_out(
    basis: BasisView, x: Tensor, center: Sequence[Tensor], out: Sequence[Tensor], backend: str
) -> None:
    check(basis, x, center, backend)
    check_list("out", out, basis.numels, basis.device, backend)


def _run_out(
    basis: BasisView, x: Tensor, center: Sequence[Tensor], out: Sequence[Tensor], backend: str
) -> None:
    _check_out(basis, x, center, out, backend)
    check_disjoint(out)
    select("reconstruct", basis.device.type, backend)(basis, x, center, out)


OUT = define(
    "reconstruct_out",
    f"({BASIS}, Tensor x, Tensor[] center, Tensor(a!)[] out, str backend) -> ()",
    _run_out,
    _check_out,
)
