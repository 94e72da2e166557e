"""basis="orthonormal" in the trainer, and the conference method as a preset."""

import pytest
import torch
import twa
from safetensors.torch import save_file
from torch import nn
from twa.distributed.ranks import Ranks
from twa.distributed.sharding import Sharding
from twa.distributed.weights import load_merge
from twa.merge.settings import TwaMethod

import twa_kernels as tk

BITS = [32, 8, 4]


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 33), nn.Tanh(), nn.Linear(33, 3))


def linear():
    """Its loss is convex: one optimum in a subspace."""
    torch.manual_seed(0)
    return nn.Linear(12, 3)


def heap(folder, count=6, step=0.05, duplicate=False, make=make):
    """Checkpoints of a random walk; with `duplicate` one is a copy and one a mean of two others."""
    model, states = make(), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for p in model.parameters():
            p.data += step * torch.randn(p.shape, generator=generator)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    if duplicate:
        states[3] = {k: v.clone() for k, v in states[1].items()}
        states[4] = {k: (states[0][k] + states[2][k]) / 2 for k in states[0]}
    for k, state in enumerate(states):
        save_file(state, folder / f"c{k}.safetensors")
    # of, since the copy would not count otherwise
    return twa.Candidates.of(
        [twa.Candidates(folder / f"c{k}.safetensors")[0] for k in range(count)]
    )


def data():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(200, 12, generator=generator), torch.randn(200, 3, generator=generator)


def loss_of(model):
    x, y = data()
    return (model(x) - y).square().mean()


def value(model):
    return float(loss_of(model).detach())


def flat(model):
    return torch.cat([p.detach().reshape(-1).double() for p in model.parameters()])


def train(
    candidates, steps, optimizer=torch.optim.LBFGS, options=None, make=make, **subspace_options
):
    model = make()
    subspace = twa.Subspace.from_candidates(model, candidates, **subspace_options)
    trainer = twa.SubspaceOptimizer(
        subspace,
        optimizer,
        **(options or {"lr": 1, "max_iter": 25, "line_search_fn": "strong_wolfe"}),
    )

    def closure():
        trainer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(steps):
        trainer.step(closure)
    return value(model), model, subspace


@pytest.mark.parametrize("granularity", ["model", "tensor"])
@pytest.mark.parametrize("bits", BITS)
def test_both_bases_reach_the_same_optimum(tmp_path, bits, granularity):
    candidates = heap(tmp_path, make=linear)
    mean = linear()
    twa.Subspace.from_candidates(mean, candidates, bits=32)
    start = value(mean)
    deltas, model, _ = train(candidates, 40, bits=32, granularity=granularity, make=linear)
    orthonormal, other, subspace = train(
        candidates, 40, bits=bits, granularity=granularity, make=linear, basis="orthonormal"
    )
    assert deltas < 0.98 * start
    # Packed rows span a slightly different space.
    tolerance = {32: 1e-5, 8: 2e-3, 4: 0.05}[bits]
    assert abs(orthonormal - deltas) <= tolerance * start, (orthonormal, deltas, start)
    if bits == 32:
        assert (flat(model) - flat(other)).norm() <= 1e-3 * flat(model).norm()
    assert subspace.coefficients_json()["basis"] == subspace.identity()["basis"] == "orthonormal"


def gram_of(subspace):
    """Inner products of the rows of P, per tensor (one segment each)."""
    rows = subspace.basis.rows if subspace.basis.bits == 32 else tk.unpack(subspace.basis)
    return [(r.flatten(1) @ r.flatten(1).T).double() for r in rows]


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_orthogonal_and_as_long_as_deltas(tmp_path, bits):
    candidates = heap(tmp_path)
    subspace = twa.Subspace.from_candidates(make(), candidates, bits=bits, basis="orthonormal")
    deltas = twa.Subspace.from_candidates(make(), candidates, bits=32)
    for l, gram in enumerate(gram_of(subspace)):
        rank = min(5, subspace.parameters[l].numel())  # deltas from the mean of six: rank five
        size = gram_of(deltas)[l].diagonal().mean()
        expected = torch.zeros_like(gram)
        expected[range(rank), range(rank)] = size
        assert (gram - expected).abs().max() <= {32: 1e-5, 8: 0.02, 4: 0.1}[bits] * size, (
            l,
            gram / size,
        )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", ["model", "tensor", lambda name: name.split(".")[1]])
def test_merge_weights_go_there_and_back(tmp_path, bits, granularity):
    candidates = heap(tmp_path, duplicate=True)
    model = make()
    subspace = twa.Subspace.from_candidates(
        model, candidates, bits=bits, granularity=granularity, basis="orthonormal", center="last"
    )
    beta = torch.tensor([0.3, 0.2, -0.1, 0.25, 0.15, 0.2], dtype=torch.float64)
    subspace.set_merge_weights(beta)
    exact = beta @ torch.stack(
        [
            torch.cat([c.tensor(k).reshape(-1).double() for k in subspace.key_map.trained])
            for c in candidates
        ]
    )
    assert (flat(model) - exact).norm() <= {32: 1e-6, 8: 0.01, 4: 0.1}[bits] * exact.norm()
    # Other weights, since candidates are dependent, but the same average.
    found = subspace.merge_weights()
    assert torch.allclose(found.sum(0), torch.ones(1, dtype=torch.float64))
    again = make()
    load_merge(Sharding(Ranks(), again, candidates, subspace.key_map), found[:, 0])
    if granularity == "model":
        # float32 coefficients
        assert (flat(again) - exact).norm() <= 1e-5 * exact.norm()
    dropped = {i for per_segment in subspace.coordinates.dropped for i, _ in per_segment}
    assert {3, 4} <= dropped


def test_packed_and_dense_train_alike(tmp_path):
    candidates = heap(tmp_path)
    options = {"optimizer": torch.optim.AdamW, "options": {"lr": 0.02}, "basis": "orthonormal"}
    dense = train(candidates, 30, bits=32, **options)[0]
    packed = train(candidates, 30, bits=8, **options)[0]
    assert abs(dense - packed) < 2e-3 * dense


def test_constant_tensors_and_equal_candidates(tmp_path):
    model = make()
    for k in range(3):
        state = {key: v.clone() for key, v in model.state_dict().items()}
        state["0.weight"] += (
            k * 0.1 * torch.randn(33, 12, generator=torch.Generator().manual_seed(k))
        )
        save_file(state, tmp_path / f"c{k}.safetensors")
    candidates = twa.Candidates(tmp_path / "c*.safetensors")
    for bits in BITS:
        subspace = twa.Subspace.from_candidates(make(), candidates, bits=bits, basis="orthonormal")
        optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=0.1)
        loss_of(subspace.model).backward()
        optimizer.step()
        assert torch.equal(subspace.model[2].weight, model[2].weight) and not torch.equal(
            subspace.model[0].weight, model[0].weight
        )
        assert torch.isfinite(subspace.merge_weights()).all()
    same = twa.Candidates.of([candidates[0]] * 2)
    subspace = twa.Subspace.from_candidates(make(), same, basis="orthonormal", bits=32)
    assert subspace.coefficients.shape[0] == 1 and torch.equal(flat(subspace.model), flat(make()))


def test_a_parameter_without_elements(tmp_path):
    def model():
        torch.manual_seed(0)
        m = nn.Linear(4, 3)
        m.nothing = nn.Parameter(torch.zeros(0))
        return m

    for k in range(3):
        generator = torch.Generator().manual_seed(k)
        state = {
            key: v + k * torch.randn(v.shape, generator=generator)
            for key, v in model().state_dict().items()
        }
        save_file(state, tmp_path / f"c{k}.safetensors")
    for bits in BITS:
        subspace = twa.Subspace.from_candidates(
            model(), twa.Candidates(tmp_path / "c*.safetensors"), bits=bits, basis="orthonormal"
        )
        subspace.set_merge_weights(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
        assert torch.isfinite(subspace.merge_weights()).all()


def test_low_memory_and_fused_steps_agree(tmp_path):
    candidates = heap(tmp_path)
    weights = []
    for low_memory in (False, True):
        subspace = twa.Subspace.from_candidates(make(), candidates, bits=8, basis="orthonormal")
        optimizer = twa.SubspaceOptimizer(
            subspace, torch.optim.AdamW, lr=0.02, low_memory=low_memory
        )
        for _ in range(3):
            loss_of(subspace.model).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(flat(subspace.model))
    assert torch.allclose(*weights, atol=1e-6)


def test_bad_options(tmp_path):
    candidates = heap(tmp_path)
    with pytest.raises(ValueError, match="basis: expected one of"):
        twa.Subspace.from_candidates(make(), candidates, basis="pca")
    state = {k: v.clone() for k, v in make().state_dict().items()}
    state["2.weight"][1, 3] = torch.nan
    save_file(state, tmp_path / "c9.safetensors")
    with pytest.raises(twa.CandidateError, match=r"c9.*'2\.weight' has 1 NaN"):
        twa.Subspace.from_candidates(
            make(), twa.Candidates(tmp_path / "c*.safetensors"), basis="orthonormal"
        )


@pytest.mark.parametrize("start", [None, 2])
def test_conference_method_is_projected_sgd_step_by_step(tmp_path, start):
    """The published form in float64:

    SGD with momentum and weight decay on theta, its gradient replaced by P^T P g.
    """
    candidates = heap(tmp_path, duplicate=True)
    model, steps = make(), 12
    _, optimizer, schedule = twa.conference_method(
        model, candidates, steps=steps, lr=0.3, weight_decay=0.05, start=start
    )
    names = list(dict(model.named_parameters()))
    W = torch.stack(
        [torch.cat([c.tensor(k).reshape(-1).double() for k in names]) for c in candidates]
    )
    P = torch.linalg.qr(W[[0, 1, 2, 5]].T)[0].T  # candidates 3 and 4 depend on these
    theta = (W.mean(0) if start is None else W[start]).clone()
    assert torch.allclose(flat(model), theta, atol=1e-6)
    momentum, published = torch.zeros_like(theta), make().double()
    x, y = data()
    for step in range(steps):
        torch.nn.utils.vector_to_parameters(theta, published.parameters())
        g = torch.autograd.grad(
            (published(x.double()) - y.double()).square().mean(), list(published.parameters())
        )
        g = torch.cat([v.reshape(-1) for v in g])
        momentum = 0.9 * momentum + P.T @ (P @ g) + 0.05 * theta
        theta = theta - 0.3 * 0.1 ** ((step >= 6) + (step >= 9)) * momentum
        loss_of(model).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert torch.allclose(flat(model), theta, atol=2e-5), step


def test_conference_method_at_low_bits_starts_where_it_should(tmp_path):
    candidates = heap(tmp_path)
    model = make()
    _, optimizer, _ = twa.conference_method(model, candidates, steps=10, bits=4, start=2, lr=0.1)
    assert torch.allclose(
        flat(model),
        torch.cat(
            [candidates[2].tensor(k).reshape(-1).double() for k in dict(model.named_parameters())]
        ),
    )
    before = value(model)
    for _ in range(10):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert value(model) < before
    with pytest.raises(ValueError, match="steps"):
        twa.conference_method(model, candidates, steps=0)


def test_twa_average_takes_the_basis():
    method = TwaMethod.parse("t:tensor:4:orthonormal")
    assert method.basis == "orthonormal" and method.name.endswith("orthonormal")
    assert TwaMethod.parse("v:model:32").basis == "deltas"
    assert (
        TwaMethod.parse("v:model:4:simplex").constraint == "simplex"
        and TwaMethod.parse("t:1024:2").granularity == 1024
    )
    for text, expected in {
        "t:tensor:4:pca": "expected KIND.*option differences, orthonormal or simplex",
        "t:100:4": "model, block, tensor, fine, or a number of weights",
        "x:tensor:4": "kind t or v",
        "t": "kind t or v",
    }.items():
        with pytest.raises(ValueError, match=expected):
            TwaMethod.parse(text)
