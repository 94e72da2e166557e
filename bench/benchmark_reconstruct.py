"""reconstruct: bytes moved = codes + scales + center + result.

That is n * D * (bits / 8 + 1 / 128) + 8 * D.
"""

import pytest
import torch
from common import Published, random_basis
from conftest import record
from peers import PEERS

import twa_kernels as tk


@pytest.mark.benchmark(group="reconstruct")
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_packed(benchmark, bits, n, columns):
    basis, x = random_basis(n, columns, bits), torch.randn(n, 1)
    center, out = torch.randn(columns), torch.empty(columns)
    benchmark(tk.reconstruct, basis, x, [center], [out])
    record(benchmark, "reconstruct", f"{bits} bits", n, columns, basis.nbytes + 8 * columns, "copy")


@pytest.mark.benchmark(group="reconstruct")
def test_400_tensors(benchmark, n, columns):
    basis, x = random_basis(n, columns, 4, tensors=400), torch.randn(n, 1)
    center, out = [torch.randn(s) for s in basis.shapes], [torch.empty(s) for s in basis.shapes]
    benchmark(tk.reconstruct, basis, x, center, out)
    moved = basis.nbytes + 8 * columns
    record(benchmark, "reconstruct", "4 bits, 400 tensors", n, columns, moved, "copy")


@pytest.mark.benchmark(group="reconstruct")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_dense(benchmark, dtype, n, columns):
    p, x, center = (torch.randn(*s).to(dtype) for s in ((n, columns), (n,), (columns,)))
    benchmark(lambda: torch.addmv(center, p.T, x))
    what, moved = f"torch {str(dtype)[6:]} dense", (n + 2) * columns * dtype.itemsize
    record(benchmark, "reconstruct", what, n, columns, moved, "copy")


@pytest.mark.benchmark(group="reconstruct")
def test_dequantise_then_matmul(benchmark, n, columns):
    basis, x, center = random_basis(n, columns, 4), torch.randn(n), torch.randn(columns)

    def run():
        torch.addmv(center, tk.unpack(basis)[0].T, x)

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    moved = basis.nbytes + 8 * n * columns + 8 * columns
    record(benchmark, "reconstruct", "4 bits, unpack then matmul", n, columns, moved)


@pytest.mark.benchmark(group="reconstruct")
def test_published(benchmark, n, columns):
    peer, x, center = Published(n, columns), torch.randn(n, 1), torch.randn(columns)
    benchmark.pedantic(peer.reconstruct, (x, center), rounds=3, warmup_rounds=1)
    record(benchmark, "reconstruct", "published arithmetic", n, columns, n * columns + 8 * columns)


@pytest.mark.benchmark(group="reconstruct")
@pytest.mark.parametrize("make", PEERS)
def test_low_bit_peer(benchmark, make, n, columns):
    if reason := make.why_unusable(n, columns):
        pytest.skip(reason)
    peer, x, center = make(n, columns), torch.randn(n, 1), torch.randn(columns)
    benchmark(peer.reconstruct, x, center)
    record(benchmark, "reconstruct", peer.name, n, columns, peer.nbytes[1] + 8 * columns, "copy")
