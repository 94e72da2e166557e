"""project: gradients into the subspace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..basis import PackedBasis
from ..operands import BasisView, as_list, check_list, or_empty
from ..registry import select
from .define import BASIS, LIBRARY, Context, define


def project(
    basis: PackedBasis, grads: Tensor | Sequence[Tensor | None], backend: str = ""
) -> Tensor:
    """c[i, l] = sum over columns j of segment l of P[i, j] * g[j].

    Plain PyTorch: `c = P @ g` for one segment. Differentiable in grads (backward: reconstruct).

    Error against float64 on the same packed basis: at most 2^-23 * max|g| * sum|P| summed over
    tiles, because each tile's gradient is carried in 24-bit fixed point and all else is exact or
    float64; so at most sqrt(128) * 2^-23 * |P| |g|, and near 2^-26 * |P| |g| for gradients of a
    common size within a tile. A float32 sum has no better bound. The bits do not depend on the
    number of threads or the instruction set. On GPUs (Triton) the sum of a tile is as exact; up to
    64 tiles are then added in float32.

    Args:
        basis: the packed rows.
        grads: one tensor of shape_k per tensor, float32, bfloat16 or float16, read in place; None
            counts as zero. A tensor that is not contiguous is copied, alone.
        backend: the one to run; "": the default of the device (registry.py).

    Returns:
        (n, L) float32, the gradient of the coefficients. NaN or Inf in a gradient makes its
        segment's coefficients NaN.

    Raises:
        ValueError: sizes or devices do not fit the basis.
        TypeError: a dtype is not one of those above.
    """
    return OP(*basis.operands, present(basis, grads), backend)


def present(basis: PackedBasis, grads: Tensor | Sequence[Tensor | None]) -> list[Tensor]:
    """One tensor per tensor of the basis; absent ones are empty, which is what the ops know."""
    given = as_list(grads)
    if len(given) != len(basis.shapes):
        raise ValueError(f"grads: expected {len(basis.shapes)} tensors, found {len(given)}")
    return or_empty(given, basis.device)


def check(basis: BasisView, grads: Sequence[Tensor], backend: str) -> None:
    """The op's rules."""
    basis.check()
    check_list("grads", grads, basis.numels, basis.device, backend, absent=True)


def _run(basis: BasisView, grads: Sequence[Tensor], backend: str) -> Tensor:
    check(basis, grads, backend)
    return select("project", basis.device.type, backend)(basis, grads).float()


def _fake(basis: BasisView, grads: Sequence[Tensor], backend: str) -> Tensor:
    check(basis, grads, backend)
    return basis.row_scale.new_empty(basis.row_scale.shape)


OP = define("project", f"({BASIS}, Tensor[] grads, str backend) -> Tensor", _run, _fake)


def _setup(
    ctx: Context,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, list[int], int, list[Tensor], str],
    output: Tensor,
) -> None:
    *basis, ctx.numels, ctx.bits, grads, ctx.backend = inputs
    ctx.save_for_backward(*basis)
    ctx.like = [(g.shape, g.dtype) for g in grads]


def _backward(ctx: Context, grad_c: Tensor) -> tuple[list[Tensor] | None, ...]:
    flat = torch.ops.twa_kernels.reconstruct.default(
        *ctx.saved_tensors, ctx.numels, ctx.bits, grad_c.contiguous(), [], ctx.backend
    )
    grads = [
        f.view(shape).to(dtype) if shape.numel() else f.new_empty(shape, dtype=dtype)
        for f, (shape, dtype) in zip(flat, ctx.like, strict=True)
    ]
    return (*[None] * 6, grads, None)


torch.library.register_autograd(
    "twa_kernels::project", _backward, setup_context=_setup, lib=LIBRARY
)
