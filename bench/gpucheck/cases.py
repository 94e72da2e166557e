"""Operands, calls and byte formulas of every op, for correctness and for speed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import twa_kernels as tk
from twa_kernels.layout import tile_offsets

#: the check on a CPU, without a GPU: what stands in for each GPU backend
STAND_INS = {"cuda": "cpp", "triton": "reference"}
REHEARSED = os.environ.get("GPUCHECK_REHEARSED") == "1"
DEVICE = torch.device("cpu") if REHEARSED else torch.device("cuda", 0)

PACKED = ("project", "reconstruct", "step", "gram")  # the others have a dense operand of n rows
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: percent of the tiles that each tensor has; a tiny tensor is added, and one is ragged
SHARES = (22, 16, 13, 11, 9, 8, 7, 6, 4, 3, 1)
SEGMENTS = (0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 0)

#: op -> bytes that it must move, each input read once and each output written once; e: bytes of a
#: number of gradient, center, weight and of pack's input
BYTES = {
    "project": "n * tiles * (16 * bits + 1) + e * D",
    "reconstruct": "n * tiles * (16 * bits + 1) + 2 * e * D",
    "step": "2 * n * tiles * (16 * bits + 1) + 3 * e * D",
    "gram": "n * tiles * (16 * bits + 1)",
    "unpack": "n * tiles * (16 * bits + 1) + n * D * 4",
    "pack": "n * D * e + n * tiles * (16 * bits + 2)",
    "orthonormalize": "3 * n * D * 4",
    # weights are read twice, reference and out are float32
    "record": "D * (2 * e + 8) + tiles * (16 * bits + 2)",
    "replay": "n * tiles * (16 * bits + 2) + 8 * D",
}


def bytes_of(op: str, numbers: dict[str, int]) -> int:
    """Its formula with these n, D, tiles, bits and e."""
    return eval(BYTES[op], dict(numbers))


def wait() -> None:
    if not REHEARSED:
        torch.cuda.synchronize()


def backend_of(case: dict) -> str:
    """The backend to call for a case."""
    return STAND_INS[case["backend"]] if REHEARSED else case["backend"]


@dataclass
class Operands:
    """Operands of every op for one basis."""

    basis: tk.PackedBasis
    x: Tensor  # (n, L)
    sets: list[tuple[list[Tensor], list[Tensor], list[Tensor]]]  # gradients, centers, outputs
    rows: list[Tensor]  # input of pack, n per tensor; empty where it would not fit
    scales: Tensor  # (num_tiles, n) bfloat16, output of pack
    state: dict

    @property
    def element(self) -> int:
        tensors = [t for s in self.sets for part in s for t in part] or self.rows
        return tensors[0].element_size()

    def bytes_of(self, op: str) -> int:
        b = self.basis
        names = {"n": b.n, "D": b.num_columns, "tiles": len(b.tile_segment), "bits": b.bits}
        return bytes_of(op, names | {"e": self.element})

    def copy(self, device: torch.device | str, unaligned: bool = False) -> Operands:
        """On `device`, in memory of its own; unaligned: gradients, centers and outputs begin one
        element into a buffer, as parameters in a flat one do."""

        def put(t: Tensor) -> Tensor:
            return t.to(device, copy=True)

        def shift(t: Tensor) -> Tensor:
            if not unaligned:
                return put(t)
            flat = torch.full((t.numel() + 2,), math.nan, dtype=t.dtype, device=device)
            flat[1:-1].copy_(t.reshape(-1))
            return flat[1:-1].view(t.shape)

        names = ("codes", "scales", "row_scale", "tile_segment", "divisor")
        basis = replace(self.basis, **{name: put(getattr(self.basis, name)) for name in names})
        sets = [tuple([shift(t) for t in tensors] for tensors in s) for s in self.sets]
        rows = [shift(r) for r in self.rows]
        return Operands(basis, put(self.x), sets, rows, put(self.scales), {})


def tensor_sizes(tiles: int) -> list[int]:
    """Elements of 12 unequal tensors with about `tiles` tiles, a ragged and a tiny one too."""
    sizes = [128 * max(1, tiles * share // 100) for share in SHARES]
    sizes[2] -= 37
    return [*sizes[:6], 5, *sizes[6:]]


def make(
    n: int,
    tiles: int,
    bits: int,
    device: torch.device | str,
    sets: int = 1,
    dense: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Operands:
    """Random operands, made on the device: codes uniform, scales e4m3 from 2^-1 to 2^7, rows of P
    of an rms near 1; never zeros. Outputs are NaN until an op writes them."""
    numels = tensor_sizes(tiles)
    counts = torch.tensor(tile_offsets(numels)).diff()
    segment = torch.repeat_interleave(torch.tensor(SEGMENTS), counts).int().to(device)
    tiles, columns = int(counts.sum()), max(SEGMENTS) + 1
    codes = torch.empty(tiles, n, 16 * bits, dtype=torch.uint8, device=device).random_(0, 256)
    scales = torch.empty(tiles, n, dtype=torch.uint8, device=device).random_(0x30, 0x71)
    row_scale = (torch.rand(n, columns, device=device) + 0.5) * 5e-4
    divisor = torch.ones(n, columns, dtype=torch.float64, device=device)
    shapes = tuple(torch.Size((numel,)) for numel in numels)
    basis = tk.PackedBasis(
        codes, scales.view(torch.float8_e4m3fn), row_scale, segment, divisor, shapes, bits
    )

    def vectors(fill: Callable) -> list[Tensor]:
        return [fill(numel, dtype=dtype, device=device) for numel in numels]

    def nothing(*shape: int, **options) -> Tensor:
        return torch.full(shape, math.nan, **options)

    rows = (
        [r for numel in numels for r in torch.randn(n, numel, dtype=dtype, device=device)]
        if dense
        else []
    )
    packed_scales = nothing(*((tiles, n) if dense else (0,)), dtype=torch.bfloat16, device=device)
    made = [(vectors(torch.randn), vectors(torch.randn), vectors(nothing)) for _ in range(sets)]
    return Operands(basis, torch.randn(n, columns, device=device), made, rows, packed_scales, {})


def poison(operands: Operands) -> None:
    """What an op does not write shows."""
    for _, _, outputs in operands.sets:
        for out in outputs:
            out.fill_(math.nan)
    operands.scales.fill_(math.nan)


def call(op: str, operands: Operands, backend: str, k: int = 0) -> list[Tensor]:
    """The k-th call of an op; returns what it computed."""
    basis = operands.basis
    if op == "unpack":
        return tk.unpack(basis, backend)
    if op == "gram":
        return [basis.gram(backend=backend)]
    if op == "pack":
        sum_sq, max_scale = torch.zeros_like(basis.divisor), torch.zeros_like(basis.row_scale)
        out = (basis.codes, operands.scales, sum_sq, max_scale)
        options = (basis.numels, basis.tile_segment, basis.bits)
        torch.ops.twa_kernels.pack(operands.rows, [], *options, *out, backend)
        return list(out)
    grads, center, out = operands.sets[k % len(operands.sets)]
    if op == "project":
        return [tk.project(basis, grads, backend)]
    if op == "reconstruct":
        return tk.reconstruct(basis, operands.x, center, out, backend)
    options = {"rule": "adamw", "options": {"lr": 1e-2}, "state": operands.state}
    c = tk.step(basis, grads, operands.x, out, center, backend=backend, **options)
    return [c, operands.x, *out]


def error_of(op: str, found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative error; infinite where bytes of pack differ, or anything is NaN."""
    pairs = [(f.cpu(), e.cpu()) for f, e in zip(found, expected, strict=True)]
    if op == "pack":
        if not all(torch.equal(f, e) for f, e in pairs[:2]):
            return math.inf
        pairs = pairs[2:]
    errors = [
        float((f.double() - e.double()).norm() / e.double().norm().clamp(min=1e-30))
        for f, e in pairs
    ]
    return max(math.inf if math.isnan(e) else e for e in errors)


def walk(
    n: int, columns: int, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(n, columns): a random walk, as checkpoints of one run are."""
    steps = torch.randn(n, columns, device=device)
    return (steps.cumsum(0) * 1e-3 + torch.randn(columns, device=device)).to(dtype)
