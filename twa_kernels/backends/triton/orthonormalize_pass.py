"""From tensors to the kernels of orthonormalize.py.

Operands as twa_kernels/operands.py has checked them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from ...operands import PROBES, PassArgs
from ..tensors import current_stream, odd_ones, readable
from .config import warps_and_stages
from .launch import DTYPES, Columns, Launch, address_table, column_items
from .orthonormalize import norms_kernel, products_kernel, transform_kernel, transformed_kernel

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
    def flags(self) -> dict[str, tl.dtype | bool]:
        """Constants that all kernels of rows have."""
        return {"DTYPE": DTYPES[self.dtype], "HAS_CENTER": bool(self.center)}

    @functools.cached_property
    def table(self) -> Tensor:
        return address_table([t.data_ptr() for t in self.rows], self.device)

    @functools.cached_property
    def center_table(self) -> Tensor:
        """Addresses of the centers; where there are none, what is not read."""
        if not self.center:
            return self.table
        return address_table([t.data_ptr() for t in self.center], self.device)

    def items(self, launch: Launch, bytes_per_item: int) -> Columns:
        """Work items, so few that their partial sums fit."""
        most = min(max(PARTIAL_BYTES // bytes_per_item, 1), launch.config["items"])
        block, stream = launch.config["columns"], current_stream(self.device)
        return column_items(self.numels, block, LEAST_COLUMNS, most, self.device, stream)


def _options(launch: Launch, rows: int, staged: bool = True, **kind: bool) -> dict[str, int | bool]:
    """Options of a launch. staged: the kernel's loads are; kind: as in warps_and_stages."""
    warps, stages = warps_and_stages(launch.config, rows, **kind)
    return launch.options() | {"num_warps": warps} | ({"STAGES": stages} if staged else {})


def _block_rows(launch: Launch, n: int) -> int:
    """Rows of a block: all of them, if a program can hold so many."""
    if n <= launch.config["rows"]:
        return max(16, 1 << (n - 1).bit_length())
    return launch.config["many"]


def _products(
    w: _Rows, fast: bool, others: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
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
            **_options(launch, rows, fast=fast),
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
            **_options(launch, rows, staged=False),
        )
    return squares.sum(0)


def _transformed(
    w: _Rows,
    transform: Tensor,
    probes: Tensor | None,
    first: int,
    fast: bool,
    out: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Products of transformed rows, in one read: for rows that a program can hold."""
    launch = Launch("orthonormalize", 4, w.device)
    n, r, rows = w.n, len(transform), _block_rows(launch, w.n)
    width = PROBES if out else r
    work = w.items(launch, 8 * (r * width + n))
    partial = torch.empty(work.count, r, width, dtype=torch.float64, device=w.device)
    squares = torch.empty(work.count, n, dtype=torch.float64, device=w.device)
    storages = {t.untyped_storage().data_ptr() for t in w.rows}
    in_place = any(t.untyped_storage().data_ptr() in storages for t in out)
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
            IN_PLACE=in_place,
            FLOAT32=fast,
            ROWS=rows,
            PROBES=PROBES,
            PADDED=launch.config["probes"],
            COLUMNS=launch.config["columns"],
            **_options(launch, rows, fast=fast, transformed=True, in_place=in_place),
        )
    return partial.sum(0), squares.sum(0)


def _transform(
    w: _Rows,
    tensor: int,
    begin: int,
    end: int,
    transform: Tensor,
    extent: Tensor,
    dtype: torch.dtype,
    fast: bool,
) -> Tensor:
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
    """Column from which on all rows of a block are zero, (blocks,) int32.

    A block is the rows that a program of transform_kernel makes.
    """
    made = Launch("orthonormalize", 4, transform.device).config["made"]
    r, n = transform.shape
    last = ((transform != 0) * torch.arange(1, n + 1, device=transform.device)).amax(1)
    return torch.nn.functional.pad(last, (0, -r % made)).view(-1, made).amax(1).int()


def _transformed_through_a_workspace(
    w: _Rows,
    transform: Tensor,
    probes: Tensor | None,
    first: int,
    fast: bool,
    out: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Products of transformed rows, some columns of one tensor at a time: for more rows.

    All rows of the result are in a workspace before any is stored.
    """
    r, extent = len(transform), _extents(transform)
    gram = torch.zeros(r, PROBES if out else r, dtype=torch.float64, device=w.device)
    norms = _norms(w)  # now: `out` may be the rows
    flat = [o.view(-1) for o in out]
    wide = max(WORKSPACE_BYTES // (8 * r) // 1024, 1) * 1024
    for tensor, numel in enumerate(w.numels):
        for begin in range(0, numel, wide):
            end = min(begin + wide, numel)
            dtype = out[0].dtype if out else torch.float64
            made = _transform(w, tensor, begin, end, transform, extent, dtype, fast)
            v = _Rows(made.unbind(0), (), None, (end - begin,))
            if not out or probes is None:
                gram = gram + _products(v, False)[0]
                continue
            sums = torch.float32 if fast else torch.float64
            onto = _transform(v, 0, 0, end - begin, probes, _extents(probes), sums, fast)
            gram = gram + _products(v, fast, onto.unbind(0))[0]
            if first < r:
                targets = flat[tensor * r + first : (tensor + 1) * r]
                torch._foreach_copy_([o[begin:end] for o in targets], list(made[first:].unbind(0)))
    return gram, norms


def orthonormalize_pass(args: PassArgs) -> tuple[Tensor, Tensor]:
    n, m, transform, out = args.n, args.rank, args.transform, args.out
    rows = readable(args.rows, odd_ones(args.rows))
    center = readable(args.center, odd_ones(args.center))
    # Tensors of one dtype (and one of `out`) are one pass: their sums are added.
    groups: dict[tuple[torch.dtype, ...], list[int]] = {}
    for k in (k for k, numel in enumerate(args.numels) if numel):
        of = [*rows[k * n : (k + 1) * n], *center[k : k + 1]]
        if len({t.dtype for t in of}) > 1:  # copies in float32: a kernel reads one dtype
            rows[k * n : (k + 1) * n] = [t.float() for t in of[:n]]
            center[k : k + 1] = [t.float() for t in of[n:]]
        written = {o.dtype for o in out[k * m : (k + 1) * m]}
        if len(written) > 1:
            raise TypeError(
                f"out: expected one dtype for the rows of tensor {k}, "
                f"found {sorted(map(str, written))}"
            )
        groups.setdefault((rows[k * n].dtype, *written), []).append(k)
    gram = torch.zeros(args.gram_shape, dtype=torch.float64, device=args.device)
    norms = torch.zeros(n, dtype=torch.float64, device=args.device)
    for which in groups.values():
        mine = [t for k in which for t in rows[k * n : (k + 1) * n]]
        centers = [center[k] for k in which] if center else ()
        w = _Rows(mine, centers, args.parent, tuple(args.numels[k] for k in which))
        if transform is None:
            products, squares = _products(w, args.fast)
            if args.fast:
                products.diagonal().copy_(squares[1])
            squares = squares[0]
        elif m == 0:
            products, squares = gram, _norms(w)
        else:
            held = n <= Launch("orthonormalize", 4, w.device).config["rows"]
            run = _transformed if held else _transformed_through_a_workspace
            targets = [o for k in which for o in out[k * m : (k + 1) * m]] if out else ()
            # What is not stored is float64, `fast` or not: it is asked for where float32 is not
            # enough.
            fast = args.fast and bool(out)
            products, squares = run(w, transform, args.probes, args.first, fast, targets)
        gram, norms = gram + products, norms + squares
    if not out:
        gram = gram.tril()  # the rest was not computed
        gram[: args.first] = 0
    return gram, norms
