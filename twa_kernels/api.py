"""Public functions: pack, average, unpack, project, reconstruct, step.

Lists hold one tensor per tensor of the model; a single tensor counts as a list of one. n is the
number of rows (candidates), L the number of segments, shape_k the shape of tensor k.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, SupportsFloat, cast

import torch
from torch import Tensor

from .ops import RULES, UNSUPPORTED_OPTIONS
from .packed import PackedBasis, Packer

Tensors = Tensor | Sequence[Tensor]
#: torch.optim's state of a tensor: tensors and numbers of steps, which torch types no further
State = MutableMapping[str, Any]

SGD_DEFAULTS: dict[str, object] = {
    "lr": 1e-3,
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
}
ADAMW_DEFAULTS: dict[str, object] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "maximize": False,
}


def _list(tensors: Tensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def pack(
    rows: Tensor | Sequence[Tensor | Sequence[Tensor]],
    bits: int = 4,
    center: Tensors | None = None,
    segments: Sequence[int] | Tensor | None = None,
    normalize: str = "row",
    backend: str = "",
    report: bool = False,
) -> PackedBasis:
    """P = (rows - center) / divisor, packed at `bits` bits.

    Plain PyTorch, unquantised:

        P = torch.stack(rows) - center
        norms = P.norm(dim=1, keepdim=True)
        P *= norms.quantile(0.25, interpolation="lower") / norms

    Args:
        rows: one entry per tensor of the model, each an (n, *shape_k) tensor or n tensors of
            shape_k; float32, bfloat16 or float16. 1 <= n <= 4096.
        bits: 8 (uniform; nothing is clipped), or 4, 3, 2, 1 (Lloyd-Max levels of a Gaussian,
            least-squares scale per 128 columns of a row). Relative error on Gaussian rows: .007,
            .094, .184, .339, .601.
        center: one tensor of shape_k per tensor, or None to subtract nothing.
        segments: segment index of each tensor (or of each tile of 128 columns); None: one segment
            per tensor.
        normalize: "row" or "none", see `Packer.finish`.
        backend: overrides the table in dispatch.py.
        report: also measure the relative error of each tensor, `PackedBasis.relative_error`.

    Returns:
        The basis, on the device of the rows.

    Raises:
        ValueError: sizes do not fit, or an option is unknown.
        TypeError: a dtype is not one of those above.
        NotFiniteError: rows or center hold NaN or Inf.
    """
    rows = [rows] if isinstance(rows, Tensor) else list(rows)
    if not rows:
        raise ValueError("rows: expected at least one tensor, found none")
    centers = [None] * len(rows) if center is None else _list(center)
    if len(centers) != len(rows):
        raise ValueError(f"center: expected {len(rows)} tensors, found {len(centers)}")
    first = rows[0][0]
    shapes = [r[0].shape for r in rows]
    packer = Packer(len(rows[0]), shapes, bits, segments, first.device, backend, report)
    for r, c in zip(rows, centers, strict=True):
        packer.add(r, c)
    return packer.finish(normalize)


def average(
    rows: Sequence[Tensor],
    weights: Tensor | Sequence[float],
    out: Tensor | None = None,
    backend: str = "",
) -> Tensor:
    """out = sum_i weights[i] * rows[i]: a weighted average of one tensor's versions.

    Each row is read once. Summed in float64 in the order of the rows and rounded once to float32;
    the same bits for any number of threads and any instruction set.

    Plain PyTorch: `sum(w * r.double() for w, r in zip(weights, rows)).float()`.

    Args:
        rows: n tensors of one shape, float32, bfloat16 or float16, mixed as they come, on the CPU;
            read in place if they are contiguous.
        weights: n numbers; rows of weight 0 are not read, so that what they hold (NaN, too) does
            not matter.
        out: contiguous float32 tensor of as many elements to write into; default: a new one of the
            rows' shape.
        backend: overrides the table in dispatch.py.

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
        out = torch.empty(rows[0].shape, device=rows[0].device)
    torch.ops.twa_kernels.average(rows, weights, out, backend)
    return out


def unpack(basis: PackedBasis, backend: str = "") -> list[Tensor]:
    """Dequantised rows of a basis.

    Args:
        basis: the packed rows.
        backend: overrides the table in dispatch.py.

    Returns:
        One (n, *shape_k) float32 tensor per tensor of the model: n * D * 4 bytes.

    Raises:
        RuntimeError: the backend does not run here.
    """
    flat = torch.ops.twa_kernels.unpack(*basis.operands, basis.numels, basis.bits, backend)
    return [f.view(basis.n, *shape) for f, shape in zip(flat, basis.shapes, strict=True)]


def project(
    basis: PackedBasis, grads: Tensors | Sequence[Tensor | None], backend: str = ""
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
        backend: overrides the table in dispatch.py.

    Returns:
        (n, L) float32, the gradient of the coefficients. NaN or Inf in a gradient makes its
        segment's coefficients NaN.

    Raises:
        ValueError: sizes or devices do not fit the basis.
        TypeError: a dtype is not one of those above.
    """
    return torch.ops.twa_kernels.project(
        *basis.operands, _present(basis, grads), basis.numels, basis.bits, backend
    )


def _present(basis: PackedBasis, grads: Tensors | Sequence[Tensor | None]) -> list[Tensor]:
    """One tensor per tensor of the basis; absent ones are empty, which is what the ops know."""
    given = [grads] if isinstance(grads, Tensor) else list(grads)
    if len(given) != len(basis.shapes):
        raise ValueError(f"grads: expected {len(basis.shapes)} tensors, found {len(given)}")
    empty = basis.row_scale.new_empty(0)
    return [empty if g is None else g for g in given]


def reconstruct(
    basis: PackedBasis,
    x: Tensor,
    center: Tensors | None = None,
    out: Tensors | None = None,
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
        backend: overrides the table in dispatch.py.

    Returns:
        One tensor of shape_k per tensor of the model. NaN or Inf in a coefficient makes its segment
        NaN.

    Raises:
        ValueError: sizes or devices do not fit the basis, or two outputs share memory.
        TypeError: a dtype is not one of those above.
    """
    centers = [] if center is None else _list(center)
    if out is None:
        flat = torch.ops.twa_kernels.reconstruct(
            *basis.operands, x, centers, basis.numels, basis.bits, backend
        )
        return [f.view(shape) for f, shape in zip(flat, basis.shapes, strict=True)]
    targets = _list(out)
    with torch.no_grad():
        torch.ops.twa_kernels.reconstruct_out(
            *basis.operands,
            x.detach(),
            centers,
            basis.numels,
            basis.bits,
            [t.detach() for t in targets],
            backend,
        )
    # So that autograd refuses to go back through the old values.
    torch.autograd.graph.increment_version(targets)
    return targets


def step(
    basis: PackedBasis,
    grads: Tensors | Sequence[Tensor | None],
    x: Tensor,
    out: Tensors,
    center: Tensors | None = None,
    *,
    rule: str,
    options: Mapping[str, object],
    state: State,
    backend: str = "",
) -> Tensor:
    """One training step of the coefficients in one call.

    `c = project(basis, grads)`, the optimizer's update of x, `reconstruct(basis, x, center,
    out=out)`; a segment at a time, where segments are small and many, so that their packed rows are
    read from memory once. c and out have the bits of the separate calls on the same x; x itself
    agrees with torch's optimizer to float32 rounding.

    Plain PyTorch, per segment: `x.grad = P @ g; optimizer.step(); theta = center + x @ P`.

    Args:
        basis: the packed rows.
        grads: as in `project`; no gradient may share memory with an output.
        x: (n, L) float32, contiguous, updated in place.
        out: as in `reconstruct`, written.
        center: as in `reconstruct`.
        rule: "sgd" (torch.optim.SGD, with momentum) or "adamw" (torch.optim.AdamW).
        options: lr, weight_decay, momentum, dampening, nesterov, betas, eps, maximize: a
            param_group of that optimizer, or a dict; what is left out has torch's default. amsgrad
            and differentiable must be false. capturable (adamw) counts steps on the device, so that
            a CUDA graph can capture the call, after one that was not captured.
        state: that optimizer's state of x, updated in place: {} at first, then step (a number or a
            0-d tensor) with exp_avg and exp_avg_sq, or momentum_buffer, tensors (n, L): torch's
            names, so that either may continue what the other began.
        backend: overrides the table in dispatch.py.

    Returns:
        c (n, L) float32, the gradient of the coefficients, for clipping thresholds and logs.

    Raises:
        ValueError: sizes or devices do not fit the basis, or the rule or an option is unknown.
        TypeError: a dtype is not one of those above.
        RuntimeError: a CUDA graph cannot capture this call.
    """
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {sorted(RULES)}, found {rule!r}")
    for name in UNSUPPORTED_OPTIONS:
        if options.get(name):
            raise ValueError(f"options: {name}=True is not supported by the fused step")
    given = {**(SGD_DEFAULTS if rule == "sgd" else ADAMW_DEFAULTS), **options}
    betas = cast(Sequence[float], given.get("betas", (0.0, 0.0)))
    given["beta1"], given["beta2"] = betas
    numbers = [float(cast(SupportsFloat, given[name])) for name in RULES[rule][0]]
    x = x.detach()
    moments = RULES[rule][1] if rule == "adamw" or given["momentum"] else ()
    # torch's SGD counts no steps: its first one is the one that finds no buffer.
    counter = x.device if given.get("capturable") else "cpu"
    steps = state.get("step", torch.zeros((), device=counter))
    on_device = rule == "adamw" and (
        given.get("capturable") or (isinstance(steps, Tensor) and steps.device.type != "cpu")
    )
    if on_device:  # not read here: that would wait for the device
        count = 0
    else:
        count = 1 + (
            int(steps) if rule == "adamw" else int(state.get("momentum_buffer") is not None)
        )
    held = [torch.zeros_like(x) if state.get(name) is None else state[name] for name in moments]
    targets = _list(out)
    with torch.no_grad():
        c = torch.ops.twa_kernels.step(
            *basis.operands,
            _present(basis, grads),
            x,
            [*held, steps] if on_device else held,
            [] if center is None else _list(center),
            basis.numels,
            basis.bits,
            rule,
            numbers,
            count,
            targets,
            backend,
        )
    # Only now: a call that was refused leaves the state as it was.
    state.update(zip(moments, held, strict=True))
    if rule == "adamw":
        state["step"] = steps
        state["step"] += 1
    torch.autograd.graph.increment_version([x, *held, *targets])
    return c
