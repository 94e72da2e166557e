"""project: bytes moved = codes + scales + gradient = n * D * (bits / 8 + 1 / 128) + 4 * D."""

import pytest
import torch
from common import Published, random_basis
from conftest import record
from peers import PEERS

import twa_kernels as tk


@pytest.mark.benchmark(group="project")
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_packed(benchmark, bits, n, columns):
    basis, g = random_basis(n, columns, bits), torch.randn(columns)
    benchmark(tk.project, basis, [g])
    record(benchmark, "project", f"{bits} bits", n, columns, basis.nbytes + 4 * columns, "read")


@pytest.mark.benchmark(group="project")
def test_400_tensors(benchmark, n, columns):
    """A model's list of tensors instead of one."""
    basis = random_basis(n, columns, 4, tensors=400)
    grads = [torch.randn(s) for s in basis.shapes]
    benchmark(tk.project, basis, grads)
    moved = basis.nbytes + 4 * columns
    record(benchmark, "project", "4 bits, 400 tensors", n, columns, moved, "read")


@pytest.mark.benchmark(group="project")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_dense(benchmark, dtype, n, columns):
    p, g = torch.randn(n, columns).to(dtype), torch.randn(columns).to(dtype)
    benchmark(torch.mv, p, g)
    what, moved = f"torch {str(dtype)[6:]} dense", (n + 1) * columns * dtype.itemsize
    record(benchmark, "project", what, n, columns, moved, "read")


@pytest.mark.benchmark(group="project")
def test_dequantise_then_matmul(benchmark, n, columns):
    basis, g = random_basis(n, columns, 4), torch.randn(columns)
    benchmark.pedantic(lambda: tk.unpack(basis)[0] @ g, rounds=3, warmup_rounds=1)
    moved = basis.nbytes + 8 * n * columns + 4 * columns
    record(benchmark, "project", "4 bits, unpack then matmul", n, columns, moved)


@pytest.mark.benchmark(group="project")
def test_published(benchmark, n, columns):
    peer, g = Published(n, columns), torch.randn(columns)
    benchmark.pedantic(peer.project, (g,), rounds=3, warmup_rounds=1)
    record(benchmark, "project", "published arithmetic", n, columns, n * columns + 4 * columns)


@pytest.mark.benchmark(group="project")
@pytest.mark.parametrize("make", PEERS)
def test_low_bit_peer(benchmark, make, n, columns):
    if reason := make.why_unusable(n, columns):
        pytest.skip(reason)
    peer, g = make(n, columns), torch.randn(columns)
    benchmark(peer.project, g)
    record(benchmark, "project", peer.name, n, columns, peer.nbytes[0] + 4 * columns, "read")
