"""The ops of this backend: tensors to launches. Operands as in ops.py of the package, which has checked them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..native import _contiguous, _targets, _write_back, finish_pack
from ..reference import PROBES
from .config import least_rows, rows_per_program
from .gram import gram_kernel
from .launch import DTYPES, Columns, Launch, Work, address_table, by_dtype, column_items, work_items
from .orthonormalize import norms_kernel, products_kernel, transform_kernel, transformed_kernel
from .pack import pack_kernel
from .project import project_kernel, sum_kernel
from .reconstruct import reconstruct_kernel
from .step import update_kernel
from .unpack import unpack_kernel
from .words import TABLES

#: rows of coefficients are padded to a multiple of this, itself a multiple of every configuration's `rows` of reconstruct
ROW_PADDING = 64


def pack(
    rows: Sequence[Tensor],
    center: Sequence[Tensor],
    numels: Sequence[int],
    tile_segment: Tensor,
    bits: int,
    quantiser: str,
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
    keys = [(row.dtype, center[k // n].dtype if center else torch.float32) for k, row in enumerate(rows)]
    with launch.on_device():
        for (dtype, center_dtype), addresses in by_dtype(rows, keys).items():
            pack_kernel[work.count, n](
                address_table(addresses, codes.device),
                address_table([c.data_ptr() for c in center], codes.device) if center else work.numel,
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
                ABSMAX=quantiser == "absmax",
                TILES=launch.config["tiles"],
                **launch.options(fuse=False),
            )
    return finish_pack(rows, center, numels, tile_segment, bits, codes, scales, sum_sq, max_scale, errors, squares)


def unpack(codes: Tensor, scales: Tensor, row_scale: Tensor, tile_segment: Tensor, numels: Sequence[int], bits: int) -> list[Tensor]:
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


def _partial_sums(codes: Tensor, scales: Tensor, tile_segment: Tensor, grads: Sequence[Tensor], numels, num_segments: int, bits: int):
    """First stage of project: sums per work item (items, n) float32, without row_scale; and the work items."""
    launch = Launch("project", bits, codes.device)
    n, config = codes.shape[1], launch.config
    work = work_items(tile_segment, numels, num_segments, config["item"])
    groups = by_dtype(grads, [g.dtype for g in grads])
    # One dtype for all tensors writes every item; else what is left out is zero.
    complete = len(groups) == 1 and all(address or not numel for address, numel in zip(next(iter(groups.values())), numels, strict=True))
    partial = (torch.empty if complete else torch.zeros)(work.count, n, device=codes.device)
    rows = rows_per_program(n, config["rows"], least_rows(bits))
    with launch.on_device():
        for dtype, addresses in groups.items():
            project_kernel[work.count, -(-n // rows)](
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
                TILES=config["tiles"],
                STAGES=config["stages"],
                **launch.options(),
            )
    return partial, work


def project(
    codes: Tensor, scales: Tensor, row_scale: Tensor, tile_segment: Tensor, grads: Sequence[Tensor], numels: Sequence[int], bits: int
) -> Tensor:
    n, num_segments = row_scale.shape
    partial, work = _partial_sums(codes, scales, tile_segment, _contiguous(grads), numels, num_segments, bits)
    c = torch.empty_like(row_scale)
    launch = Launch("sum", bits, codes.device)
    items, rows = launch.config["items"], launch.config["rows"]
    with launch.on_device():
        sum_kernel[num_segments, -(-n // rows)](
            partial, work.segment_begin, row_scale, c, n, num_segments, ITEMS=items, ROWS=rows, **launch.options(fuse=False)
        )
    return c


@functools.lru_cache(maxsize=64)
def _tables(bits: int, device: torch.device) -> Tensor:
    """(4,) int32: levels as bytes. In memory, because a compiler that knew them would move them into registers at every use."""
    words = TABLES.get(bits, [0, 0, 0, 0])
    return torch.tensor([w - (w >> 31 << 32) for w in words], dtype=torch.int32, device=device)


def _reconstruct(
    codes: Tensor, scales: Tensor, x_rows: Tensor, tile_segment: Tensor, center: Sequence[Tensor], numels, bits: int, out: Sequence[Tensor]
) -> None:
    """out = center + sum over rows; x_rows (L, padded) is x times row_scale, zero past the n rows."""
    launch = Launch("reconstruct", bits, codes.device)
    n, config = codes.shape[1], launch.config
    work = work_items(tile_segment, numels, x_rows.shape[0], config["tiles"])
    keys = [(c.dtype if center else torch.float32, o.dtype) for c, o in zip(center or out, out, strict=True)]
    with launch.on_device():
        for (center_dtype, out_dtype), addresses in by_dtype(out, keys).items():
            reconstruct_kernel[(work.count,)](
                codes.view(torch.int32),
                scales,
                x_rows,
                _tables(bits, codes.device),
                address_table([c.data_ptr() for c in center], codes.device) if center else work.numel,
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
                FEW=n <= 255,
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
        out = [codes.new_empty(numel, dtype=center[k].dtype if center else torch.float32) for k, numel in enumerate(numels)]
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
    partial, work = _partial_sums(codes, scales, tile_segment, _contiguous(grads), numels, num_segments, bits)
    maximize, lr, weight_decay, *rest = options
    if rule == "adamw":
        beta1, beta2, eps = rest
        momentum, nesterov = 0.0, False
        numbers = (lr / (1 - beta1**count), 1 - lr * weight_decay, 1 - beta1, 1 - beta2, beta2, math.sqrt(1 - beta2**count), eps)
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


def gram(codes: Tensor, scales: Tensor, row_scale: Tensor, tile_segment: Tensor, numels: Sequence[int], bits: int) -> Tensor:
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
    total = torch.stack([partial[first:last].sum(0, dtype=torch.float64) for first, last in itertools.pairwise(at)])
    return total * scale[:, :, None] * scale[:, None, :]


#: bytes of all partial Gram matrices of a pass (unless one alone is larger), and of its workspace
PARTIAL_BYTES = WORKSPACE_BYTES = 64 << 20
LEAST_COLUMNS = 1024  # of a work item


@dataclass(frozen=True)
class _Rows:
    """Tensors of one dtype, empty ones left out, and what is subtracted from their rows."""

    rows: Sequence[Tensor]  # n per tensor
    center: Sequence[Tensor]
    parent: Tensor | None  # None: nothing is subtracted
    numels: tuple[int, ...]

    @property
    def n(self) -> int:
        return len(self.rows) // len(self.numels)

    @property
    def dtype(self) -> torch.dtype:
        return self.rows[0].dtype

    @property
    def device(self) -> torch.device:
        return self.rows[0].device

    @property
    def flags(self) -> dict:
        return {"DTYPE": DTYPES[self.dtype], "HAS_CENTER": bool(self.center)}

    @functools.cached_property
    def table(self) -> Tensor:
        return address_table([t.data_ptr() for t in self.rows], self.device)

    @functools.cached_property
    def center_table(self) -> Tensor:
        return address_table([t.data_ptr() for t in self.center], self.device) if self.center else self.table

    def items(self, launch: Launch, bytes_per_item: int) -> Columns:
        most = min(max(PARTIAL_BYTES // bytes_per_item, 1), launch.config["items"])
        return column_items(self.numels, launch.config["columns"], LEAST_COLUMNS, most, self.device)


def _options(launch: Launch, rows: int) -> dict:
    """Fewer rows, fewer warps."""
    options = launch.options()
    return options | {"num_warps": max(1, options["num_warps"] * rows // launch.config["rows"])}


def _block_rows(launch: Launch, n: int) -> int:
    return max(16, 1 << (n - 1).bit_length()) if n <= launch.config["rows"] else launch.config["many"]


def _products(w: _Rows, fast: bool, others: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """V V^T (lower triangle), or V others^T; and squared norms of rows and differences (2, n)."""
    launch = Launch("orthonormalize", 4, w.device)
    n, m = w.n, len(others or w.rows) // len(w.numels)
    columns, rows = launch.config["columns"], _block_rows(launch, n)
    width = rows if others is None else launch.config["probes"]
    work = w.items(launch, 8 * (n * m + 2 * n))
    partial = torch.empty(work.count, n, m, dtype=torch.float64, device=w.device)
    squares = torch.empty(work.count, 2, n, dtype=torch.float64, device=w.device)
    with launch.on_device():
        products_kernel[work.count, -(-n // rows), -(-m // width)](
            w.table,
            w.table if others is None else address_table([t.data_ptr() for t in others], w.device),
            work.piece if w.parent is None else w.parent,
            w.center_table,
            *work.operands,
            partial,
            squares,
            n,
            m,
            **w.flags,
            OTHER=DTYPES[(others or w.rows)[0].dtype],
            SAME=others is None,
            DIFFERENCES=w.parent is not None,
            FLOAT32=fast,
            ONE=others is None and n <= rows,
            ROWS=rows,
            OTHERS=width,
            COLUMNS=columns,
            STAGES=launch.config["stages"],
            **_options(launch, rows),
        )
    return partial.sum(0), squares.sum(0)


def _norms(w: _Rows) -> Tensor:
    launch = Launch("orthonormalize", 4, w.device)
    rows = _block_rows(launch, w.n)
    work = w.items(launch, 8 * w.n)
    squares = torch.empty(work.count, w.n, dtype=torch.float64, device=w.device)
    with launch.on_device():
        norms_kernel[work.count, -(-w.n // rows)](
            w.table,
            *work.operands,
            squares,
            w.n,
            DTYPE=DTYPES[w.dtype],
            ROWS=rows,
            COLUMNS=launch.config["wide"],
            **_options(launch, rows),
        )
    return squares.sum(0)


def _transformed(w: _Rows, transform: Tensor, probes: Tensor | None, first: int, fast: bool, out: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows that a program can hold: in one read."""
    launch = Launch("orthonormalize", 4, w.device)
    n, r, rows = w.n, len(transform), _block_rows(launch, w.n)
    width = PROBES if out else r
    work = w.items(launch, 8 * (r * width + n))
    partial = torch.empty(work.count, r, width, dtype=torch.float64, device=w.device)
    squares = torch.empty(work.count, n, dtype=torch.float64, device=w.device)
    storages = {t.untyped_storage().data_ptr() for t in w.rows}
    with launch.on_device():
        transformed_kernel[(work.count,)](
            w.table,
            w.center_table,
            address_table([t.data_ptr() for t in out], w.device) if out else w.table,
            w.parent,
            transform,
            probes if out else transform,
            *work.operands,
            partial,
            squares,
            n,
            r,
            first,
            **w.flags,
            OUT=DTYPES[out[0].dtype if out else torch.float32],
            STORE=bool(out),
            IN_PLACE=any(t.untyped_storage().data_ptr() in storages for t in out),
            FLOAT32=fast,
            ROWS=rows,
            PROBES=PROBES,
            PADDED=launch.config["probes"],
            COLUMNS=launch.config["columns"],
            STAGES=launch.config["stages"],
            **_options(launch, rows),
        )
    return partial.sum(0), squares.sum(0)


def _transform(w: _Rows, tensor: int, begin: int, end: int, transform: Tensor, extent: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """(r, end - begin): the transform of some columns of one tensor, rounded to `dtype`."""
    launch = Launch("orthonormalize", 4, w.device)
    config, r = launch.config, len(transform)
    to = torch.empty(r, end - begin, dtype=dtype, device=w.device)
    made, wide = config["made"], config["wide"]
    with launch.on_device():
        transform_kernel[-(-(end - begin) // wide), -(-r // made)](
            w.table,
            extent if w.parent is None else w.parent,
            w.center_table,
            transform,
            extent,
            to,
            tensor,
            begin,
            end,
            w.n,
            r,
            **w.flags,
            OUT=DTYPES[dtype],
            DIFFERENCES=w.parent is not None,
            FLOAT32=fast,
            MADE=made,
            ROWS=config["of"],
            COLUMNS=wide,
            **launch.options(),
        )
    return to


def _extents(transform: Tensor) -> Tensor:
    """Per block of rows that transform_kernel makes: the column from which on all of them are zero."""
    made = Launch("orthonormalize", 4, transform.device).config["made"]
    r, n = transform.shape
    last = ((transform != 0) * torch.arange(1, n + 1, device=transform.device)).amax(1)
    return torch.nn.functional.pad(last, (0, -r % made)).view(-1, made).amax(1).int()


def _transformed_through_a_workspace(
    w: _Rows, transform: Tensor, probes: Tensor | None, first: int, fast: bool, out: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """More rows than a program can hold: some columns of one tensor at a time, all rows of the result in a workspace before any is stored."""
    r, extent, gram = len(transform), _extents(transform), 0.0
    norms = _norms(w)  # now: `out` may be the rows
    flat = [o.view(-1) for o in out]
    wide = max(WORKSPACE_BYTES // (8 * r) // 1024, 1) * 1024
    for tensor, numel in enumerate(w.numels):
        for begin in range(0, numel, wide):
            end = min(begin + wide, numel)
            made = _transform(w, tensor, begin, end, transform, extent, out[0].dtype if out else torch.float64, fast)
            v = _Rows(made.unbind(0), (), None, (end - begin,))
            if not out:
                gram = gram + _products(v, False)[0]
                continue
            onto = _transform(v, 0, 0, end - begin, probes, _extents(probes), torch.float32 if fast else torch.float64, fast)
            gram = gram + _products(v, fast, onto.unbind(0))[0]
            if first < r:
                torch._foreach_copy_([o[begin:end] for o in flat[tensor * r + first : (tensor + 1) * r]], list(made[first:].unbind(0)))
    return gram, norms


def orthonormalize_pass(
    rows: Sequence[Tensor],
    center: Sequence[Tensor],
    numels: Sequence[int],
    parent: Tensor,
    transform: Tensor | None,
    probes: Tensor | None,
    first: int,
    fast: bool,
    out: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    n, m = len(parent), len(parent) if transform is None else len(transform)
    rows, center = _contiguous(rows), _contiguous(center)
    # Tensors of one dtype (and one of `out`) are one pass: their sums are added.
    groups: dict[tuple, list[int]] = {}
    for k in (k for k, numel in enumerate(numels) if numel):
        of = [*rows[k * n : (k + 1) * n], *center[k : k + 1]]
        if len({t.dtype for t in of}) > 1:  # copies in float32: a kernel reads one dtype
            rows[k * n : (k + 1) * n] = [t.float() for t in of[:n]]
            center[k : k + 1] = [t.float() for t in of[n:]]
        written = {o.dtype for o in out[k * m : (k + 1) * m]} if out else set()
        if len(written) > 1:
            raise TypeError(f"out: expected one dtype for the rows of tensor {k}, found {sorted(map(str, written))}")
        groups.setdefault((rows[k * n].dtype, *written), []).append(k)
    gram = torch.zeros(m, PROBES if out else m, dtype=torch.float64, device=parent.device)
    norms = torch.zeros(n, dtype=torch.float64, device=parent.device)
    for which in groups.values():
        mine = [t for k in which for t in rows[k * n : (k + 1) * n]]
        w = _Rows(mine, [center[k] for k in which] if center else (), parent, tuple(numels[k] for k in which))
        if transform is None:
            products, squares = _products(w, fast)
            if fast:
                products.diagonal().copy_(squares[1])
            squares = squares[0]
        elif m == 0:
            products, squares = gram, _norms(w)
        else:
            run = _transformed if n <= Launch("orthonormalize", 4, w.device).config["rows"] else _transformed_through_a_workspace
            targets = [o for k in which for o in out[k * m : (k + 1) * m]] if out else ()
            # What is not stored is float64, `fast` or not: it is asked for where float32 is not enough.
            products, squares = run(w, transform, probes, first, fast and bool(out), targets)
        gram, norms = gram + products, norms + squares
    if not out:
        gram = gram.tril()  # the rest was not computed
        gram[:first] = 0
    return gram, norms
