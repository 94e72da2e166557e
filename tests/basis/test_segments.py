"""Segments below tensors, merge weights on the simplex, the running average of coefficients."""

import itertools

import pytest
import torch
import twa
from safetensors.torch import save_file
from torch import nn
from twa.basis.segments import Segments, parse_granularity, segments_of

BITS = (32, 8)


@pytest.fixture
def heap(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 30), nn.Tanh(), nn.Linear(30, 10), nn.Linear(10, 1))
    for i in range(4):
        save_file(
            {k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()},
            tmp_path / f"c{i}.safetensors",
        )
    return model, twa.Candidates(tmp_path / "c*.safetensors")


def reference(subspace: twa.Subspace, beta: torch.Tensor) -> dict[str, torch.Tensor]:
    """sum_i beta[i, l] w_i in float64, segment by segment."""
    found = {}
    for k, (name, p) in enumerate(subspace.model.named_parameters()):
        # (n, numel)
        w = torch.stack([c.tensor(name).double().reshape(-1) for c in subspace.candidates])
        length = subspace.segments.chunk or p.numel()
        runs = zip(subspace.segments.of_tensor(k, p.numel()), w.split(length, 1), strict=True)
        found[name] = torch.cat([beta[:, l] @ part for l, part in runs]).view(p.shape)
    return found


def test_segments_of_tensors_and_their_parts():
    s = segments_of(["a", "b", "c"], [300, 128, 0], 128)
    assert (
        s.labels == ["a[0:128]", "a[128:256]", "a[256:300]", "b[0:128]"]
        and s.first == [0, 3, 4]
        and s.chunk == 128
    )
    assert [list(s.of_tensor(k, numel)) for k, numel in enumerate([300, 128, 0])] == [
        [0, 1, 2],
        [3],
        [],
    ]
    assert s.of_tiles([300, 128, 0]).tolist() == [0, 1, 2, 3]
    assert segments_of(["a"], [1000], 256).of_tiles([1000]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    per_tensor = segments_of(["a", "b", "c"], [0, 200, 300], "tensor")
    assert per_tensor.of_tiles([0, 200, 300]).tolist() == [1, 1, 2, 2, 2]
    assert segments_of(["a", "b"], [10, 20], "tensor") == Segments(["a", "b"], [0, 1])
    for numels in ([100], [128 * 5000, 3], [10**9, 10**6], [5] * 5000):
        fine = segments_of([str(k) for k in range(len(numels))], numels, "fine")
        assert len(fine.labels) <= max(4096, len(numels)) and (
            fine.chunk == 128 or len(fine.labels) > 2040
        )


def test_granularities_that_are_none():
    for bad in (0, 100, -128, True):
        with pytest.raises(ValueError, match="granularity: expected"):
            segments_of(["a"], [1000], bad)
    assert parse_granularity("256") == 256 and parse_granularity("fine") == "fine"
    for bad in ("129", "-128", "0", "x", "١٢٨"):
        with pytest.raises(ValueError, match="expected model, block, tensor, fine, or a number"):
            parse_granularity(bad)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", [128, 256, "fine", "tensor"])
@pytest.mark.parametrize("constraint", ["none", "simplex"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_gradient_is_that_of_autograd(heap, bits, granularity, constraint, low_memory):
    """One step of SGD moves the trained coefficients along the derivative of the loss by them."""
    model, candidates = heap
    subspace = twa.Subspace.from_candidates(
        model, candidates, bits=bits, granularity=granularity, constraint=constraint
    )
    data = torch.randn(20, 50)
    y = torch.randn(4, len(subspace.segments.labels)) * 0.1
    with torch.no_grad():
        subspace.coefficients.add_(y)
    subspace.write_weights()
    before = subspace.coefficients.detach().clone()
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=1.0, low_memory=low_memory)
    model(data).square().mean().backward()
    optimizer.step()
    moved = before - subspace.coefficients.detach()
    for i, l in itertools.islice(
        itertools.product(range(4), range(len(subspace.segments.labels))), 0, None, 3
    ):
        losses = []
        for h in (0.05, -0.05):
            with torch.no_grad():
                subspace.coefficients.copy_(before)
                subspace.coefficients[i, l] += h
            subspace.write_weights()
            losses.append(model(data).square().mean().item())
        assert moved[i, l].item() == pytest.approx(
            (losses[0] - losses[1]) / 0.1, abs=2e-4 + 0.02 * abs(moved[i, l].item())
        )


@pytest.mark.parametrize("granularity", [128, 256, "fine"])
def test_merge_weights_below_tensors(heap, granularity):
    model, candidates = heap
    subspace = twa.Subspace.from_candidates(model, candidates, bits=32, granularity=granularity)
    beta = torch.softmax(torch.randn(4, len(subspace.segments.labels), dtype=torch.float64), 0)
    subspace.set_merge_weights(beta)
    torch.testing.assert_close(subspace.merge_weights(), beta, atol=1e-6, rtol=0)
    for name, expected in reference(subspace, beta).items():
        torch.testing.assert_close(
            dict(model.named_parameters())[name].double(), expected, atol=1e-6, rtol=0
        )


def test_saved_and_loaded(heap, tmp_path):
    model, candidates = heap
    subspace = twa.Subspace.from_candidates(model, candidates, bits=4, granularity=256)
    with torch.no_grad():
        subspace.coefficients.normal_()
    subspace.write_weights()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    subspace.save(tmp_path / "out", basis=True)
    loaded = twa.Subspace.load(tmp_path / "out", model)
    assert loaded.segments == subspace.segments and torch.equal(
        loaded.coefficients, subspace.coefficients
    )
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    other = twa.SubspaceOptimizer(
        twa.Subspace.from_candidates(model, candidates, bits=4, granularity=128),
        torch.optim.SGD,
        lr=1.0,
    )
    with pytest.raises(ValueError, match="another subspace: segment_of"):
        other.load_state_dict(twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=1.0).state_dict())


def test_simplex_stays_there_and_starts_at_the_center(heap):
    model, candidates = heap
    for center, expected in (
        ("mean", [0.25] * 4),
        (torch.tensor([0.5, 0.25, 0.25, 0.0]), [0.5, 0.25, 0.25, 0.0]),
        (1, [0, 1, 0, 0]),
    ):
        subspace = twa.Subspace.from_candidates(
            model, candidates, bits=32, center=center, constraint="simplex"
        )
        torch.testing.assert_close(
            subspace.merge_weights()[:, 0],
            torch.tensor(expected, dtype=torch.float64),
            atol=1e-3,
            rtol=0,
        )
        optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=0.5)
        for _ in range(10):
            model(torch.randn(8, 50)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        beta = subspace.merge_weights()
        assert (
            float(beta.min()) > -1e-6
            and torch.allclose(beta.sum(0), torch.ones(1, dtype=torch.float64))
            and float((beta - 0.25).abs().max()) > 0.1
        )
        for name, merged in reference(subspace, beta).items():
            torch.testing.assert_close(
                dict(model.named_parameters())[name].double(), merged, atol=1e-5, rtol=0
            )
    target = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    subspace.set_merge_weights(target)
    torch.testing.assert_close(subspace.merge_weights()[:, 0], target, atol=1e-5, rtol=0)


def test_orthonormal_basis_wants_whole_tensors(heap):
    with pytest.raises(ValueError, match="segments of whole tensors"):
        twa.Subspace.from_candidates(*heap, basis="orthonormal", granularity=128)


@pytest.mark.parametrize("eta", [0.0, 3.0])
def test_iterate_average(heap, eta):
    """Weights of the steps as documented; eta = 0 is the plain mean.

    The model is at the average inside `applied`, and where it was outside.
    """
    model, candidates = heap
    subspace = twa.Subspace.from_candidates(model, candidates, bits=32)
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.5)
    average, expected, xs = twa.IterateAverage(subspace, eta), None, []
    for t in range(1, 8):
        model(torch.randn(8, 50)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        xs.append(subspace.coefficients.detach().clone().double())
        g = (1 + eta) / (t + eta)
        expected = xs[-1] if expected is None else (1 - g) * expected + g * xs[-1]
    torch.testing.assert_close(average.coefficients.double(), expected, atol=1e-6, rtol=1e-5)
    if eta == 0:
        torch.testing.assert_close(expected, torch.stack(xs).mean(0))
    weights = [p.detach().clone() for p in model.parameters()]
    with average.applied():
        assert torch.equal(subspace.coefficients, average.coefficients)
        at_average = [p.detach().clone() for p in model.parameters()]
    assert all(
        torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True)
    ) and torch.equal(subspace.coefficients.double(), xs[-1])
    average.apply()
    assert all(
        torch.equal(p, w) for p, w in zip(model.parameters(), at_average, strict=True)
    ) and not torch.equal(at_average[0], weights[0])
    with pytest.raises(ValueError, match="eta: expected at least 0"):
        twa.IterateAverage(subspace, -1)


def test_a_simplex_needs_a_center(heap):
    with pytest.raises(twa.TwaError, match="constraint='simplex': expected a center"):
        twa.Subspace.from_candidates(*heap, constraint="simplex", center="zero")
    with pytest.raises(twa.TwaError, match="constraint: expected one of"):
        twa.Subspace.from_candidates(*heap, constraint="convex")
