"""The middle of a fused step, between the kernels of `project` and of `reconstruct`.

c = row_scale * sum of partial sums, the optimizer's update of x and its state, and x times
row_scale, transposed, for reconstruct.

Work map   program (segment, block of ROWS rows).
Update     torch.optim.SGD and AdamW in float32; what all coefficients share is computed once in
           float64 on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...operands import BasisView, StepArgs
from .launch import Launch
from .project import partial_sums, segment_sums
from .reconstruct import ROW_PADDING, weights_of


@triton.jit(
    do_not_specialize=["n", "num_segments"], do_not_specialize_on_alignment=["x", "first", "second"]
)
def update_kernel(
    partial,  # (items, n) float32, or (groups, n) float64
    segment_begin,  # (L + 1,) int32
    row_scale,  # (n, L) float32
    c,  # (n, L) float32, written: the gradient of the coefficients
    x,  # (n, L) float32, updated
    first,  # (n, L) float32, updated: momentum buffer or first moment; not touched without MOMENTS
    second,  # (n, L) float32, updated: second moment (adamw)
    x_rows,  # (L, padded) float32, written: x * row_scale
    lr,  # sgd: learning rate; adamw: divided by the first moment's bias correction
    decay,  # sgd: weight decay; adamw: 1 - lr * weight decay
    w1,  # sgd: momentum; adamw: 1 - beta1
    w2,  # sgd: 1 - dampening; adamw: 1 - beta2
    beta2,
    root,  # adamw: root of the second moment's bias correction
    eps,
    n,
    padded,
    num_segments,
    ADAMW: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    FRESH: tl.constexpr,
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    segment = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    at = rows.to(tl.int64) * num_segments + segment
    scale = tl.load(row_scale + at, mask=live, other=0)
    g = (segment_sums(partial, segment_begin, segment, rows, n, ITEMS, ROWS) * scale).to(tl.float32)
    tl.store(c + at, g, mask=live)
    if MAXIMIZE:
        g = -g
    value = tl.load(x + at, mask=live, other=0)
    if ADAMW:
        mean = tl.load(first + at, mask=live, other=0)
        square = tl.load(second + at, mask=live, other=0)
        value *= decay
        # torch.lerp, exact at both ends.
        mean = tl.where(w1 < 0.5, mean + w1 * (g - mean), g - (g - mean) * (1.0 - w1))
        square = square * beta2 + w2 * g * g
        step = lr * mean
        value -= tl.div_rn(step, tl.div_rn(tl.sqrt_rn(square), tl.zeros_like(square) + root) + eps)
        tl.store(first + at, mean, mask=live)
        tl.store(second + at, square, mask=live)
    else:
        g += decay * value
        if MOMENTUM:
            buffer = g
            if not FRESH:
                buffer = tl.load(first + at, mask=live, other=0) * w1 + w2 * g
            tl.store(first + at, buffer, mask=live)
            g = g + w1 * buffer if NESTEROV else buffer
        value -= lr * g
    tl.store(x + at, value, mask=live)
    tl.store(
        x_rows + segment.to(tl.int64) * padded + rows,
        tl.where(live, value * scale, 0.0),
        mask=rows < padded,
    )


def step(
    basis: BasisView,
    grads: Sequence[Tensor],
    args: StepArgs,
    center: Sequence[Tensor],
    out: Sequence[Tensor],
) -> Tensor:
    partial, begin = partial_sums(basis, grads)
    if args.rule == "adamw":
        numbers = (
            args.lr / (1 - args.beta1**args.count),
            1 - args.lr * args.weight_decay,
            1 - args.beta1,
            1 - args.beta2,
            args.beta2,
            math.sqrt(1 - args.beta2**args.count),
            args.eps,
        )
    else:
        numbers = (args.lr, args.weight_decay, args.momentum, 1 - args.dampening, 0.0, 0.0, 0.0)
    n, x = basis.n, args.x
    c = torch.empty_like(basis.row_scale)
    x_rows = torch.empty(
        basis.num_segments, n + -n % ROW_PADDING, dtype=torch.float32, device=basis.device
    )
    launch = Launch("sum", basis.bits, basis.device)
    items, rows = launch.config["items"], launch.config["rows"]
    with launch.on_device():
        update_kernel[basis.num_segments, -(-x_rows.shape[1] // rows)](
            partial,
            begin,
            basis.row_scale,
            c,
            x,
            # What the rule does not keep, the kernel does not touch.
            x if args.first is None else args.first,
            x if args.second is None else args.second,
            x_rows,
            *numbers,
            n,
            x_rows.shape[1],
            basis.num_segments,
            ADAMW=args.rule == "adamw",
            MAXIMIZE=args.maximize,
            MOMENTUM=bool(args.momentum),
            NESTEROV=args.nesterov,
            FRESH=args.count == 1,
            ITEMS=items,
            ROWS=rows,
            **launch.options(fuse=False),
        )
    weights_of(basis, x_rows, center, out)
    return c
