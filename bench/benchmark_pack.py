"""pack: bytes moved = rows read + center read + codes and scales written = n * D * (4 + bits / 8 + 2 / 128) + 4 * D for float32."""

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
    record(benchmark, "pack", f"{bits} bits" + (" from bfloat16" if dtype == torch.bfloat16 else ""), n, columns, moved, "read")
