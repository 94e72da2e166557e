"""PackedBasis.gram, and coefficients trained in the basis that its Cholesky factor orthonormalises."""

import pytest
import torch
import twa
from conftest import BITS, SEGMENTS
from safetensors.torch import save_file
from torch import nn

import twa_kernels as tk


@pytest.mark.parametrize("n", [1, 5, 33])
@pytest.mark.parametrize("bits", BITS)
def test_gram_against_float64(bits, n, basis_of):
    basis = basis_of(n, bits)
    dense = [t.reshape(n, -1).double() for t in tk.unpack(basis)]
    for l in range(basis.num_segments):
        p = torch.cat([d for d, s in zip(dense, SEGMENTS, strict=True) if s == l], 1)
        norms = p.norm(dim=1)
        bound = 2 * p.shape[1] * 2.0**-53 * norms[:, None] * norms[None, :]  # of two float64 sums in any order
        assert ((basis.gram()[l] - p @ p.T).abs() <= bound + 1e-30).all()


def test_gram_with_segments_inside_a_tensor():
    basis = tk.pack([torch.randn(4, 1000)], 4, segments=torch.tensor([0, 0, 1, 1, 1, 0, 2, 2]))
    p = tk.unpack(basis)[0].double()
    tiles = torch.tensor([0, 0, 1, 1, 1, 0, 2, 2]).repeat_interleave(128)[:1000]
    for l in range(3):
        torch.testing.assert_close(basis.gram()[l], p[:, tiles == l] @ p[:, tiles == l].T, rtol=1e-5, atol=1e-4)


def make():
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 1))


@pytest.fixture
def candidates(tmp_path):
    """A trajectory: neighbours differ little, so the deltas are far from orthogonal."""
    torch.manual_seed(0)
    model = make()
    for k in range(6):
        save_file({name: p.detach().clone() for name, p in model.named_parameters()}, tmp_path / f"c{k}.safetensors")
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
    return twa.Candidates(tmp_path / "c*.safetensors")


X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [32, 4, 1])
def test_preconditioned_basis_is_orthogonal_and_spans_the_same(candidates, bits):
    subspace = twa.Subspace.from_candidates(make(), candidates, bits=bits, precondition=True)
    gram, a = subspace.basis.gram(), subspace.preconditioner.double()
    for l in range(len(subspace.labels)):
        g = a[l].mT @ gram[l] @ a[l]
        rank = int((torch.linalg.eigvalsh(gram[l]) > 1e-2 * gram[l].diagonal().mean()).sum())
        values = torch.linalg.eigvalsh(g) / gram[l].diagonal().mean()
        assert (values[-rank:] - 1).abs().max() < 0.02 and values.max() < 1.001


@pytest.mark.parametrize("bits", [32, 4])
def test_preconditioned_with_a_constant_tensor(tmp_path, bits):
    for k in range(3):
        torch.manual_seed(k)
        save_file({name: p.detach() if name != "2.bias" else torch.ones(1) for name, p in make().named_parameters()}, tmp_path / f"c{k}.safetensors")
    subspace = twa.Subspace.from_candidates(make(), twa.Candidates(tmp_path / "c*.safetensors"), bits=bits, precondition=True)
    subspace.set_merge_weights(twa.schemes.lawa(3, 2))
    assert torch.isfinite(subspace.coefficients).all() and subspace.model[2].bias.item() == 1.0


@pytest.mark.parametrize("bits", [32, 4])
def test_preconditioned_training(candidates, bits):
    """Merge weights go in and out as before; the gradient is the true one; a low-memory run is the same."""
    results = []
    for low_memory in (False, True):
        model = make()
        subspace = twa.Subspace.from_candidates(model, candidates, bits=bits, precondition=True)
        subspace.set_merge_weights(twa.schemes.ema(6, 0.5))
        torch.testing.assert_close(subspace.merge_weights(), twa.schemes.ema(6, 0.5)[:, None].expand(-1, 4), rtol=1e-3, atol=1e-4)
        optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.05, low_memory=low_memory)
        start = model(X).square().mean()
        start.backward()
        optimizer.step()
        gradient = subspace.coefficients.grad
        assert model(X).square().mean() < start - 0.3 * 0.05 * gradient.square().sum()
        results.append(subspace.coefficients.detach().clone())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [5, 33])
@pytest.mark.parametrize("bits", BITS)
def test_gpu_gram(bits, n, basis_of, gpu):
    gpu.needs("gram")
    basis = basis_of(n, bits)
    truth = basis.gram("reference")
    norms = truth.diagonal(dim1=1, dim2=2).sqrt()
    assert ((gpu.put(basis).gram(gpu.backend).cpu() - truth).abs() <= 2e-6 * norms[:, :, None] * norms[:, None, :]).all()


def test_reference_gram_is_that_of_the_rows(basis_of):
    truth = basis_of(5, 4).gram("reference")
    norms = truth.diagonal(dim1=1, dim2=2).sqrt()
    assert ((basis_of(5, 4).gram() - truth).abs() <= 1e-6 * norms[:, :, None] * norms[:, None, :]).all()  # cpp rounds rows to float32
