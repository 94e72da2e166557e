"""Backend "cpp": the C++ kernels for CPUs (csrc/cpu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import TILE, tile_offsets
from ..native import _C, empty_for_streaming
from ..operands import BasisView, PackArgs, PassArgs, RecordArgs, ReplayArgs, StepArgs
from .handles import basis_handle, read, read_or_none, update, write


def average(rows: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    _C.average(rows=read(rows, _C), weights=weights, out=out, threads=torch.get_num_threads())


def pack(args: PackArgs) -> tuple[int, int, int] | None:
    return average_and_pack(args, ())


def average_and_pack(args: PackArgs, weights: Sequence[float]) -> tuple[int, int, int] | None:
    center = read_or_none(args.center, _C)
    rows = _C.Rows(rows=read(args.rows, _C), center=center, numel=args.numels, n=args.n)
    target = _C.PackTarget(
        tile_segment=args.tile_segment,
        bits=args.bits,
        codes=args.codes,
        scales=args.scales,
        sum_sq=args.sum_sq,
        max_scale=args.max_scale,
    )
    return _C.pack(rows=rows, weights=weights, target=target, threads=torch.get_num_threads())


def record(args: RecordArgs) -> None:
    bad = _C.record(
        weights=read(args.weights, _C),
        reference=_C.Tensors(args.reference),
        bits=args.bits,
        codes=args.codes,
        scales=args.scales,
        threads=torch.get_num_threads(),
    )
    args.bad.fill_(bad is not None)


def replay(args: ReplayArgs) -> None:
    _C.replay(
        out=_C.Tensors(args.out),
        codes=args.codes,
        scales=args.scales,
        coefficients=args.coefficients,
        bits=args.bits,
        threads=torch.get_num_threads(),
    )


def unpack(basis: BasisView) -> list[Tensor]:
    out = [empty_for_streaming((basis.n, numel), dtype=torch.float32) for numel in basis.numels]
    _C.unpack(basis=basis_handle(basis, _C), out=read(out, _C), threads=torch.get_num_threads())
    return out


def project(basis: BasisView, grads: Sequence[Tensor]) -> Tensor:
    c = torch.empty(basis.row_scale.shape, dtype=torch.float32, device="cpu")
    _C.project(
        basis=basis_handle(basis, _C), grads=read(grads, _C), c=c, threads=torch.get_num_threads()
    )
    return c


def reconstruct(
    basis: BasisView, x: Tensor, center: Sequence[Tensor], out: Sequence[Tensor] | None
) -> list[Tensor]:
    if out is None:
        out = [
            empty_for_streaming((numel,), dtype=center[k].dtype if center else torch.float32)
            for k, numel in enumerate(basis.numels)
        ]
    with write(out, _C) as targets:
        _C.reconstruct(
            basis=basis_handle(basis, _C),
            x=x.contiguous(),
            center=read_or_none(center, _C),
            out=targets,
            threads=torch.get_num_threads(),
        )
    return list(out)


def step(
    basis: BasisView,
    grads: Sequence[Tensor],
    args: StepArgs,
    center: Sequence[Tensor],
    out: Sequence[Tensor],
) -> Tensor:
    c = torch.empty(basis.row_scale.shape, dtype=torch.float32, device="cpu")
    with write(out, _C) as targets:
        _C.step(
            basis=basis_handle(basis, _C),
            grads=read(grads, _C),
            update=update(args, _C),
            x=args.x,
            first=args.first,
            second=args.second,
            center=read_or_none(center, _C),
            out=targets,
            c=c,
            threads=torch.get_num_threads(),
        )
    return c


def gram(basis: BasisView) -> Tensor:
    """From blocks of 64 tiles, dequantised to float32, multiplied and summed in float64."""
    total = torch.zeros(basis.num_segments, basis.n, basis.n, dtype=torch.float64, device="cpu")
    offsets = tile_offsets(basis.numels)
    for k, numel in enumerate(basis.numels):
        for begin in range(offsets[k], offsets[k + 1], 64):
            at = slice(begin, min(begin + 64, offsets[k + 1]))
            # Without the padding of the last tile.
            columns = min(64 * TILE, numel - (begin - offsets[k]) * TILE)
            (rows,) = unpack(
                BasisView(
                    basis.codes[at],
                    basis.scales[at],
                    basis.row_scale,
                    basis.tile_segment[at],
                    (columns,),
                    basis.bits,
                )
            )
            first = 0
            segments, counts = torch.unique_consecutive(basis.tile_segment[at], return_counts=True)
            for l, tiles in zip(segments.tolist(), counts.tolist(), strict=True):
                p = rows[:, first * TILE : (first + tiles) * TILE].double()
                total[l] += p @ p.T
                first += tiles
    return total


def orthonormalize_pass(args: PassArgs) -> tuple[Tensor, Tensor]:
    gram = torch.empty(args.gram_shape, dtype=torch.float64, device="cpu")
    norms = torch.empty(args.n, dtype=torch.float64, device="cpu")
    center = read_or_none(args.center, _C)
    _C.orthonormalize_pass(
        rows=_C.Rows(rows=read(args.rows, _C), center=center, numel=args.numels, n=args.n),
        parent=args.parent,
        transform=args.transform,
        probes=args.probes,
        first=args.first,
        fast=args.fast,
        out=read_or_none(args.out, _C),
        gram=gram,
        norms=norms,
        threads=torch.get_num_threads(),
    )
    return gram, norms
