"""The ops of this backend: tensors to launches.

Operands as in ops.py of the package, which has checked them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..native import _contiguous, _targets, _write_back, finish_pack, refuse_capture
from .config import least_rows, row_blocks, rows_per_program
from .gram import gram_kernel
from .launch import DTYPES, Launch, Work, address_table, by_dtype, work_items

# One of the ops, in a file of its own.
from .orthonormalize_ops import orthonormalize_pass as orthonormalize_pass
from .pack import pack_kernel
from .project import project_kernel, sum_kernel
from .reconstruct import reconstruct_kernel
from .step import update_kernel
from .unpack import unpack_kernel
from .words import TABLES

#: rows of coefficients are padded to a multiple of this, itself a multiple of every configuration's
#: `rows` of reconstruct
ROW_PADDING = 64


def pack(
    rows: Sequence[Tensor],
    center: Sequence[Tensor],
    numels: Sequence[int],
    tile_segment: Tensor,
    bits: int,
    codes: Tensor,
    scales: Tensor,
    sum_sq: Tensor,
    max_scale: Tensor,
    errors: Tensor | None,
) -> tuple[int, int, int] | None:
    rows, center = _contiguous(rows), _contiguous(center)
    launch = Launch("pack", bits, codes.device)
    n = sum_sq.shape[0]
    work = work_items(tile_segment, numels, sum_sq.shape[1], launch.config["tiles"])
    squares = torch.empty(codes.shape[0], n, dtype=torch.float64, device=codes.device)
    keys = [
        (row.dtype, center[k // n].dtype if center else torch.float32) for k, row in enumerate(rows)
    ]
    with launch.on_device():
        for (dtype, center_dtype), addresses in by_dtype(rows, keys).items():
            pack_kernel[work.count, n](
                address_table(addresses, codes.device),
                address_table([c.data_ptr() for c in center], codes.device)
                if center
                else work.numel,
                work.numel,
                work.tile_begin,
                work.tensor,
                work.tile,
                work.tiles,
                codes,
                scales,
                squares,
                n,
                BITS=bits,
                DTYPE=DTYPES[dtype],
                CENTER=DTYPES[center_dtype],
                HAS_CENTER=bool(center),
                TILES=launch.config["tiles"],
                **launch.options(fuse=False),
            )
    return finish_pack(
        rows, center, numels, tile_segment, bits, codes, scales, sum_sq, max_scale, errors, squares
    )


def unpack(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    numels: Sequence[int],
    bits: int,
) -> list[Tensor]:
    launch = Launch("unpack", bits, codes.device)
    n, num_segments = row_scale.shape
    out = [row_scale.new_empty(n, numel) for numel in numels]
    work = work_items(tile_segment, numels, num_segments, launch.config["tiles"])
    if work.count:
        with launch.on_device():
            unpack_kernel[work.count, n](
                codes,
                scales,
                row_scale,
                address_table([o.data_ptr() for o in out], codes.device),
                work.numel,
                work.tile_begin,
                work.tensor,
                work.tile,
                work.tiles,
                work.segment,
                n,
                num_segments,
                BITS=bits,
                TILES=launch.config["tiles"],
                **launch.options(fuse=False),
            )
    return out


def _partial_sums(
    codes: Tensor,
    scales: Tensor,
    tile_segment: Tensor,
    grads: Sequence[Tensor],
    numels: Sequence[int],
    num_segments: int,
    bits: int,
) -> tuple[Tensor, Work]:
    """First stage of project: sums per work item (items, n) float32, without row_scale.

    And the work items.
    """
    launch = Launch("project", bits, codes.device)
    n, config = codes.shape[1], launch.config
    work = work_items(tile_segment, numels, num_segments, config["item"])
    groups = by_dtype(grads, [g.dtype for g in grads])
    # One dtype for all tensors writes every item; else what is left out is zero.
    complete = len(groups) == 1 and all(
        address or not numel
        for address, numel in zip(next(iter(groups.values())), numels, strict=True)
    )
    partial = (torch.empty if complete else torch.zeros)(work.count, n, device=codes.device)
    blocks = row_blocks(n, config["rows"], least_rows(bits))
    with launch.on_device():
        for (dtype, addresses), (rows, full, count) in itertools.product(groups.items(), blocks):
            project_kernel[work.count, count](
                codes,
                scales,
                address_table(addresses, codes.device),
                work.numel,
                work.tile_begin,
                work.tensor,
                work.tile,
                work.tiles,
                partial,
                n,
                BITS=bits,
                DTYPE=DTYPES[dtype],
                ISA=launch.isa,
                ROWS=rows,
                FULL=full,
                TILES=config["tiles"],
                STAGES=config["stages"],
                **launch.options(),
            )
    return partial, work


def project(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    grads: Sequence[Tensor],
    numels: Sequence[int],
    bits: int,
) -> Tensor:
    n, num_segments = row_scale.shape
    partial, work = _partial_sums(
        codes, scales, tile_segment, _contiguous(grads), numels, num_segments, bits
    )
    c = torch.empty_like(row_scale)
    launch = Launch("sum", bits, codes.device)
    items, rows = launch.config["items"], launch.config["rows"]
    with launch.on_device():
        sum_kernel[num_segments, -(-n // rows)](
            partial,
            work.segment_begin,
            row_scale,
            c,
            n,
            num_segments,
            ITEMS=items,
            ROWS=rows,
            **launch.options(fuse=False),
        )
    return c


@functools.lru_cache(maxsize=64)
def _tables(bits: int, tiles: int, device: torch.device) -> Tensor:
    """(tiles, 4) int32: levels as bytes.

    In memory, because a compiler that knew them would move them into registers at every use.
    """
    refuse_capture(device)
    words = TABLES.get(bits, [0, 0, 0, 0])
    signed = [w - (w >> 31 << 32) for w in words]
    return torch.tensor([signed] * tiles, dtype=torch.int32, device=device)


def _reconstruct(
    codes: Tensor,
    scales: Tensor,
    x_rows: Tensor,
    tile_segment: Tensor,
    center: Sequence[Tensor],
    numels: Sequence[int],
    bits: int,
    out: Sequence[Tensor],
) -> None:
    """out = center + sum over rows.

    x_rows (L, padded) is x times row_scale, zero past the n rows.
    """
    launch = Launch("reconstruct", bits, codes.device)
    n, config = codes.shape[1], launch.config
    work = work_items(tile_segment, numels, x_rows.shape[0], config["tiles"])
    keys = [
        (c.dtype if center else torch.float32, o.dtype)
        for c, o in zip(center or out, out, strict=True)
    ]
    with launch.on_device():
        for (center_dtype, out_dtype), addresses in by_dtype(out, keys).items():
            reconstruct_kernel[(work.count,)](
                codes.view(torch.int32),
                scales,
                x_rows,
                _tables(bits, config["tiles"], codes.device),
                address_table([c.data_ptr() for c in center], codes.device)
                if center
                else work.numel,
                address_table(addresses, codes.device),
                work.numel,
                work.tile_begin,
                work.tensor,
                work.tile,
                work.tiles,
                work.segment,
                n,
                x_rows.shape[1],
                BITS=bits,
                CENTER=DTYPES[center_dtype],
                OUT=DTYPES[out_dtype],
                HAS_CENTER=bool(center),
                ISA=launch.isa,
                TILES=config["tiles"],
                ROWS=config["rows"],
                EVEN=n % config["rows"] == 0,
                FEW=bits > 1 or n <= 255,
                **launch.options(),
            )


def reconstruct(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    x: Tensor,
    center: Sequence[Tensor],
    numels: Sequence[int],
    bits: int,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    if out is None:
        out = [
            codes.new_empty(numel, dtype=center[k].dtype if center else torch.float32)
            for k, numel in enumerate(numels)
        ]
    targets = _targets(out)
    x_rows = torch.nn.functional.pad((x * row_scale).T, (0, -len(x) % ROW_PADDING)).contiguous()
    _reconstruct(codes, scales, x_rows, tile_segment, _contiguous(center), numels, bits, targets)
    _write_back(out, targets)
    return list(out)


def step(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    grads: Sequence[Tensor],
    x: Tensor,
    state: Sequence[Tensor],
    center: Sequence[Tensor],
    numels: Sequence[int],
    bits: int,
    rule: str,
    options: Sequence[float],
    count: int,
    out: Sequence[Tensor],
) -> Tensor:
    n, num_segments = row_scale.shape
    partial, work = _partial_sums(
        codes, scales, tile_segment, _contiguous(grads), numels, num_segments, bits
    )
    maximize, lr, weight_decay, *rest = options
    if rule == "adamw":
        beta1, beta2, eps = rest
        momentum = nesterov = 0.0
        numbers = (
            lr / (1 - beta1**count),
            1 - lr * weight_decay,
            1 - beta1,
            1 - beta2,
            beta2,
            math.sqrt(1 - beta2**count),
            eps,
        )
    else:
        momentum, dampening, nesterov = rest
        numbers = (lr, weight_decay, momentum, 1 - dampening, 0.0, 0.0, 0.0)
    c = torch.empty_like(row_scale)
    x_rows = torch.empty(num_segments, n + -n % ROW_PADDING, device=x.device)
    moments = [*state, x, x][:2]  # what the rule does not keep, the kernel does not touch
    launch = Launch("sum", bits, codes.device)
    items, rows = launch.config["items"], launch.config["rows"]
    with launch.on_device():
        update_kernel[num_segments, -(-x_rows.shape[1] // rows)](
            partial,
            work.segment_begin,
            row_scale,
            c,
            x,
            *moments,
            x_rows,
            *numbers,
            n,
            x_rows.shape[1],
            num_segments,
            ADAMW=rule == "adamw",
            MAXIMIZE=bool(maximize),
            MOMENTUM=bool(momentum),
            NESTEROV=bool(nesterov),
            FRESH=count == 1,
            ITEMS=items,
            ROWS=rows,
            **launch.options(fuse=False),
        )
    targets = _targets(out)
    _reconstruct(codes, scales, x_rows, tile_segment, _contiguous(center), numels, bits, targets)
    _write_back(out, targets)
    return c


def gram(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    numels: Sequence[int],
    bits: int,
) -> Tensor:
    launch = Launch("gram", bits, codes.device)
    n, num_segments = row_scale.shape
    work: Work = work_items(tile_segment, numels, num_segments, launch.config["item"])
    partial = torch.empty(work.count, n, n, device=codes.device)
    rows = rows_per_program(n, launch.config["rows"])
    blocks = -(-n // rows)
    if work.count:
        with launch.on_device():
            gram_kernel[work.count, blocks, blocks](
                codes,
                scales,
                work.numel,
                work.tile_begin,
                work.tensor,
                work.tile,
                work.tiles,
                partial,
                n,
                BITS=bits,
                ROWS=rows,
                **launch.options(),
            )
    scale = row_scale.double().T  # (L, n)
    at = work.segment_begin.tolist()
    total = torch.stack(
        [partial[first:last].sum(0, dtype=torch.float64) for first, last in itertools.pairwise(at)]
    )
    return total * scale[:, :, None] * scale[:, None, :]
