"""PackedBasis.gram: inner products of the rows."""

import pytest
import torch
from conftest import BITS, SEGMENTS

import twa_kernels as tk


@pytest.mark.parametrize("n", [1, 5, 33])
@pytest.mark.parametrize("bits", BITS)
def test_gram_against_float64(bits, n, basis_of):
    basis = basis_of(n, bits)
    dense = [t.reshape(n, -1).double() for t in tk.unpack(basis)]
    for l in range(basis.num_segments):
        p = torch.cat([d for d, s in zip(dense, SEGMENTS, strict=True) if s == l], 1)
        norms = p.norm(dim=1)
        # Of two float64 sums in any order.
        bound = 2 * p.shape[1] * 2.0**-53 * norms[:, None] * norms[None, :]
        assert ((basis.gram()[l] - p @ p.T).abs() <= bound + 1e-30).all()


def test_gram_with_segments_inside_a_tensor():
    basis = tk.pack([torch.randn(4, 1000)], 4, segments=torch.tensor([0, 0, 1, 1, 1, 0, 2, 2]))
    p = tk.unpack(basis)[0].double()
    tiles = torch.tensor([0, 0, 1, 1, 1, 0, 2, 2]).repeat_interleave(128)[:1000]
    for l in range(3):
        torch.testing.assert_close(
            basis.gram()[l], p[:, tiles == l] @ p[:, tiles == l].T, rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("n", [5, 33])
@pytest.mark.parametrize("bits", BITS)
def test_gpu_gram(bits, n, basis_of, gpu):
    gpu.needs("gram")
    basis = basis_of(n, bits)
    truth = basis.gram("reference")
    norms = truth.diagonal(dim1=1, dim2=2).sqrt()
    error = (gpu.put(basis).gram(gpu.backend).cpu() - truth).abs()
    assert (error <= 2e-6 * norms[:, :, None] * norms[:, None, :]).all()


def test_reference_gram_is_that_of_the_rows(basis_of):
    truth = basis_of(5, 4).gram("reference")
    norms = truth.diagonal(dim1=1, dim2=2).sqrt()
    error = (basis_of(5, 4).gram() - truth).abs()  # cpp rounds rows to float32
    assert (error <= 1e-6 * norms[:, :, None] * norms[:, None, :]).all()
