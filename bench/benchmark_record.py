"""record and replay: bytes moved, against packing one row and against a copy of the weights, which
is what a snapshot or an average in memory costs.

record    D * (2 * e + 8 + bits / 8 + 2 / 128), e bytes a weight: they are read twice (once for NaN
          and Inf), the float32 reference is read and written.
replay    n * D * (bits / 8 + 2 / 128) + 8 * D for n rows.
copy      2 * e * D.

Rows of record have 16 times the columns that those of replay have for each row.
"""

import itertools

import pytest
import torch
from conftest import record

import twa_kernels as tk

BITS = [8, 4, 3, 2, 1]


def large(columns: int) -> int:
    """Weights of a model that no cache holds."""
    return 16 * columns


@pytest.mark.benchmark(group="record")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_record(benchmark, bits, dtype, columns):
    columns = large(columns)
    reference = torch.randn(columns)
    # Two in turn: differences do not become small.
    snapshots = itertools.cycle(
        [(reference + 0.01 * torch.randn(columns)).to(dtype) for _ in range(2)]
    )
    codes = torch.empty(-(-columns // 128), 16 * bits, dtype=torch.uint8)
    scales, bad = torch.empty(len(codes), dtype=torch.bfloat16), torch.zeros((), dtype=torch.int32)

    def run():
        row = codes, scales, bad, ""
        torch.ops.twa_kernels.record([next(snapshots)], [reference], bits, *row)

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    moved = int(columns * (2 * dtype.itemsize + 8 + bits / 8 + 2 / 128))
    what = f"{bits} bits" + (" from bfloat16" if dtype == torch.bfloat16 else "")
    record(benchmark, "record", what, 1, columns, moved, "copy")


@pytest.mark.benchmark(group="record")
@pytest.mark.parametrize("bits", BITS)
def test_pack_of_one_row(benchmark, bits, columns):
    """Around a center, into memory that was written before: the kernel alone."""
    columns = large(columns)
    row, center = torch.randn(columns), torch.randn(columns)
    packer = tk.Packer(1, [(columns,)], bits)
    target = packer.codes, packer.scales, packer.sum_sq, packer.max_scale
    operands = [row], [center], [columns], packer.tile_segment, bits, *target, ""
    benchmark.pedantic(torch.ops.twa_kernels.pack, operands, rounds=5, warmup_rounds=1)
    moved = int(columns * (8 + bits / 8 + 2 / 128))
    record(benchmark, "record", f"{bits} bits, pack of one row", 1, columns, moved, "read")


@pytest.mark.benchmark(group="record")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_of_the_weights(benchmark, dtype, columns):
    columns = large(columns)
    weights = torch.randn(columns).to(dtype)
    target = weights.clone()
    benchmark.pedantic(target.copy_, (weights,), rounds=5, warmup_rounds=1)
    what = f"torch copy, {str(dtype).removeprefix('torch.')}"
    record(benchmark, "record", what, 1, columns, 2 * dtype.itemsize * columns, "copy")


@pytest.mark.benchmark(group="record")
def test_unquantised(benchmark, columns):
    """d = w - reference; reference += d."""
    columns = large(columns)
    weights, reference = torch.randn(columns), torch.randn(columns)
    d = torch.empty_like(weights)

    def run():
        torch.sub(weights, reference, out=d)
        reference.add_(d)

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    record(benchmark, "record", "torch, unquantised", 1, columns, 24 * columns, "copy")


@pytest.mark.benchmark(group="replay")
@pytest.mark.parametrize("ones", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_replay(benchmark, bits, ones, n, columns):
    out, tiles = torch.randn(columns), -(-columns // 128)
    codes = [torch.randint(0, 256, (tiles, 16 * bits), dtype=torch.uint8) for _ in range(n)]
    scales = [(torch.randint(8, 16, (tiles,)) * 2.0**-17).bfloat16() for _ in range(n)]
    coefficients = [1.0 if ones else (n - r) / n for r in range(n)]
    benchmark.pedantic(
        tk.replay, (out, codes, scales, coefficients, bits), rounds=5, warmup_rounds=1
    )
    moved = int(n * columns * (bits / 8 + 2 / 128)) + 8 * columns
    what = f"{bits} bits" + ("" if ones else ", an average")
    record(benchmark, "replay", what, n, columns, moved, "read")
