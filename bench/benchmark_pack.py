"""pack: bytes moved = rows read + center read + codes and scales written.

That is n * D * (4 + bits / 8 + 2 / 128) + 4 * D for float32.

"kernel alone" packs into memory that was written before; the other rows time `tk.pack`, which also
gets fresh memory from the system (cleared page by page) and finishes the scales.
"""

import pytest
import torch
from conftest import record

import twa_kernels as tk


@pytest.mark.benchmark(group="pack")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_pack(benchmark, bits, dtype, n, columns):
    rows, center = torch.randn(n, columns).to(dtype), torch.randn(columns)
    benchmark.pedantic(tk.pack, ([rows], bits, [center]), rounds=3, warmup_rounds=1)
    moved = int(n * columns * (dtype.itemsize + bits / 8 + 2 / 128)) + 4 * columns
    what = f"{bits} bits" + (" from bfloat16" if dtype == torch.bfloat16 else "")
    record(benchmark, "pack", what, n, columns, moved, "read")


@pytest.mark.benchmark(group="pack")
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_kernel_alone(benchmark, bits, n, columns):
    rows, center = list(torch.randn(n, columns).unbind(0)), torch.randn(columns)
    packer = tk.Packer(n, [(columns,)], bits)
    target = packer.codes, packer.scales, packer.sum_sq, packer.max_scale
    operands = rows, [center], [columns], packer.tile_segment, bits, *target, ""
    benchmark.pedantic(torch.ops.twa_kernels.pack, operands, rounds=5, warmup_rounds=1)
    moved = int(n * columns * (4 + bits / 8 + 2 / 128)) + 4 * columns
    record(benchmark, "pack", f"{bits} bits, kernel alone", n, columns, moved, "read")


@pytest.mark.benchmark(group="unpack")
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_unpack(benchmark, bits, n, columns):
    basis = tk.pack([torch.randn(n, columns)], bits)
    benchmark.pedantic(tk.unpack, (basis,), rounds=3, warmup_rounds=1)
    moved = int(n * columns * (4 + bits / 8 + 1 / 128))
    record(benchmark, "unpack", f"{bits} bits", n, columns, moved, "copy")
