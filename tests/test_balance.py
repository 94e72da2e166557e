"""Balanced coordinates: the same space, other combinations of its rows; and the rate that fits."""

import pytest
import torch
import twa
from torch import nn
from twa.coordinates import Balanced
from twa.io.errors import TwaError
from twa.io.steps import steps_between
from twa.rate import learning_rate

KINDS = ["deltas", "differences"]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))


def heap(n=6, drift=1.0, noise=0.3):
    """Candidates of a run that drifts: their distances from any center are nearly parallel."""
    torch.manual_seed(1)
    base = model().state_dict()
    way = {k: torch.randn_like(t) for k, t in base.items()}
    states = [
        {k: t + drift * i * way[k] / n + noise * torch.randn_like(t) for k, t in base.items()}
        for i in range(n)
    ]
    return twa.Candidates.of_states(states, names=[f"step_{100 * (i + 1)}" for i in range(n)])


def made(**options):
    net = model()
    return twa.Subspace.from_candidates(net, heap(), **{"bits": 32, "balance": True} | options)


def weights(subspace):
    return torch.cat([p.detach().double().flatten() for p in subspace.parameters])


def moved(subspace, y):
    """The weights at these trained coefficients."""
    with torch.no_grad():
        subspace.coefficients.copy_(y)
    subspace.write_weights()
    return weights(subspace)


@pytest.mark.parametrize("basis", KINDS)
@pytest.mark.parametrize("granularity", ["model", "tensor", 128])
def test_the_gradient_is_that_of_the_weights(basis, granularity):
    subspace = made(basis=basis, granularity=granularity)
    start = weights(subspace)
    g = [torch.randn_like(p) for p in subspace.parameters]
    for p, of in zip(subspace.parameters, g, strict=True):
        p.grad = of.clone()
    c = subspace.project_gradients()
    y = torch.randn_like(subspace.coefficients)
    change = moved(subspace, y) - start
    expected = torch.dot(change, torch.cat([t.double().flatten() for t in g]))
    torch.testing.assert_close((c * y).double().sum(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("basis", KINDS)
@pytest.mark.parametrize("bits", [32, 4])
def test_rows_are_nearer_to_each_other_in_length(basis, bits):
    """The singular values of a tensor's balanced rows are the square roots of the deltas'."""
    subspace = made(basis=basis, bits=bits, granularity="tensor")
    n, start = len(subspace.candidates), weights(subspace)
    rows = []
    for i in range(n):
        y = torch.zeros_like(subspace.coefficients)
        y[i] = 1.0
        rows.append(moved(subspace, y) - start)
    of_first = torch.stack(rows)[:, :600]
    x = torch.stack([c.tensor("0.weight").double().flatten() for c in subspace.candidates])
    deltas = x - x.mean(0)
    whole = torch.stack(
        [
            torch.cat([c.tensor(k).double().flatten() for k in subspace.candidates.info])
            for c in subspace.candidates
        ]
    )
    norms = (whole - whole.mean(0)).norm(dim=1)
    deltas = deltas / norms[:, None]
    expected = torch.linalg.svdvals(deltas)[: n - 1].sqrt()
    found = torch.linalg.svdvals(of_first)[: n - 1]
    tolerance = 0.01 if bits == 32 else 0.2
    torch.testing.assert_close(
        found / found[0], expected / expected[0], rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("basis", KINDS)
@pytest.mark.parametrize("granularity", ["model", "tensor", 128])
def test_merge_weights_there_and_back(basis, granularity):
    subspace = made(basis=basis, granularity=granularity)
    beta = torch.tensor([0.5, 0.0, 0.1, 0.2, -0.2, 0.4], dtype=torch.float64)
    subspace.set_merge_weights(beta)
    names = list(subspace.candidates.info)
    expected = sum(
        b * torch.cat([c.tensor(k).double().flatten() for k in names])
        for b, c in zip(beta, subspace.candidates, strict=True)
    )
    torch.testing.assert_close(weights(subspace), expected, rtol=1e-4, atol=1e-5)
    again = sum(
        b * torch.cat([c.tensor(k).double().flatten() for k in names])
        for b, c in zip(subspace.merge_weights()[:, 0], subspace.candidates, strict=True)
    )
    if granularity == "model":
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)


def test_low_memory_projects_the_same():
    def trained(low_memory):
        subspace = made(granularity=128, bits=4)
        optimizer = twa.SubspaceOptimizer(subspace, low_memory=low_memory)
        for _ in range(3):
            subspace.model(torch.ones(4, 20)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return subspace.coefficients.detach().clone()

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-4, atol=1e-6)


def test_a_candidate_at_the_center_and_a_constant_tensor():
    net = model()
    states = [{k: t.clone() for k, t in net.state_dict().items()} for _ in range(3)]
    for i in (1, 2):
        states[i]["0.weight"] += i * torch.randn(30, 20)
    candidates = twa.Candidates.of_states(states, names=["a", "b", "c"])
    subspace = twa.Subspace.from_candidates(
        net, candidates, bits=4, granularity="tensor", center=0, balance=True
    )
    assert torch.isfinite(moved(subspace, torch.ones_like(subspace.coefficients))).all()
    assert torch.isfinite(subspace.merge_weights()).all()
    assert learning_rate(subspace) > 0


@pytest.mark.parametrize("basis", KINDS)
@pytest.mark.parametrize("center", ["last", 0, 2, "mean"])
@pytest.mark.parametrize("bits", [32, 4])
def test_a_candidate_at_the_center(basis, center, bits):
    """Its distance, computed from the others' differences, is rounding and no direction."""
    subspace = made(basis=basis, center=center, bits=bits, granularity=128)
    start = weights(subspace)
    assert torch.isfinite(subspace.coordinates.mix).all()
    far = moved(subspace, torch.ones_like(subspace.coefficients)) - start
    widths = [
        (c.tensor("0.weight") - subspace.candidates[0].tensor("0.weight")).norm()
        for c in subspace.candidates
    ]
    assert 0 < float(far.norm()) < 100 * float(max(widths))


def test_a_file_keeps_that_it_is_balanced(tmp_path):
    subspace = made(granularity=128, bits=4)
    expected = moved(subspace, torch.randn_like(subspace.coefficients))
    subspace.save(tmp_path, basis=True)
    loaded = twa.Subspace.load(tmp_path, model())
    assert isinstance(loaded.coordinates, Balanced)
    torch.testing.assert_close(weights(loaded), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(TwaError, match=r"learning rate: .*not at hand"):
        twa.SubspaceOptimizer(loaded)


def test_a_file_at_its_center_can_be_balanced(tmp_path):
    for basis in KINDS:
        folder = tmp_path / basis
        plain = made(granularity=128, bits=4, balance=False, basis=basis)
        center = weights(plain)
        plain.save(folder, basis=True)
        loaded = twa.Subspace.load(folder, model(), plain.candidates, balance=True)
        assert isinstance(loaded.coordinates, Balanced) and not loaded.coefficients.any()
        torch.testing.assert_close(weights(loaded), center)
        assert learning_rate(loaded) == pytest.approx(
            learning_rate(made(granularity=128, bits=4, basis=basis))
        )
        moved(plain, torch.ones_like(plain.coefficients))
        plain.save(folder, basis=True)
        with pytest.raises(TwaError, match="balance: its coefficients are trained"):
            twa.Subspace.load(folder, model(), balance=True)


@pytest.mark.parametrize(
    "options",
    [
        {"basis": "orthonormal", "granularity": "tensor"},
        {"constraint": "simplex"},
        {"center": "zero"},
    ],
)
def test_what_cannot_be_balanced_is_refused(options):
    with pytest.raises(TwaError, match="balance: expected a"):
        made(**options)


def test_coefficients_of_other_rows_are_refused():
    plain, balanced = made(balance=False), made()
    with pytest.raises(TwaError, match="balanced: expected False, found True"):
        plain.load_state_dict(balanced.state_dict())


# The rate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", KINDS)
@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("granularity", ["model", "tensor", 128])
def test_a_unit_step_is_as_long_as_it_says(basis, balance, granularity):
    """Against the mean over gradients of white noise, moved in fact."""
    subspace = made(basis=basis, balance=balance, granularity=granularity, bits=8)
    start, squares = weights(subspace), []
    for _ in range(200):
        for p in subspace.parameters:
            p.grad = torch.randn_like(p)
        y = subspace.project_gradients().sign()
        squares.append(float((moved(subspace, y) - start).square().sum()))
    expected = (sum(squares) / len(squares)) ** 0.5
    assert subspace.unit_step() == pytest.approx(expected, rel=0.15)


def test_a_unit_step_of_a_simplex():
    subspace = made(constraint="simplex", balance=False, granularity="model", bits=8)
    start, squares, y0 = weights(subspace), [], subspace.coefficients.detach().clone()
    for _ in range(200):
        moved(subspace, y0)
        for p in subspace.parameters:
            p.grad = torch.randn_like(p)
        y = subspace.project_gradients().sign() * 1e-3
        squares.append(float((moved(subspace, y0 + y) - start).square().sum()) * 1e6)
    expected = (sum(squares) / len(squares)) ** 0.5
    assert subspace.unit_step() == pytest.approx(expected, rel=0.15)


def test_the_first_step_is_as_long_as_one_of_training():
    """Candidates are 100 steps apart, a random walk: a step is a tenth of the distance."""
    subspace = made(granularity="tensor", bits=8)
    names = list(subspace.candidates.info)
    x = torch.stack(
        [torch.cat([c.tensor(k).double().flatten() for k in names]) for c in subspace.candidates]
    )
    step = 1.25 * x.diff(dim=0).norm(dim=1).median() / 10
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.Adam)
    start = weights(subspace)
    for p in subspace.parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert float((weights(subspace) - start).norm()) == pytest.approx(float(step), rel=0.3)


def test_other_optimizers_keep_their_own_rate():
    assert twa.SubspaceOptimizer(made(), torch.optim.NAdam).param_groups[0]["lr"] == 2e-3
    assert twa.SubspaceOptimizer(made(), lr=0.5).param_groups[0]["lr"] == 0.5


def test_steps_between(tmp_path):
    from safetensors.torch import save_file

    def steps(*names, per_epoch=None):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for k, name in enumerate(names):
            path = folder / f"{name}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"a": torch.full((3,), float(k))}, path)
        return steps_between(
            twa.Candidates([folder / f"{name}.safetensors" for name in names]), per_epoch
        )

    assert steps("step_100", "step_200", "step_350") == [100, 150]
    assert steps("checkpoint-5/model", "checkpoint-25/model") == [20]
    assert steps("run-step1k", "run-step3k") == [2000]
    assert steps("epoch=1-step=10", "epoch=2-step=20") == [10]
    assert steps("epoch_1", "epoch_3") == []
    assert steps("epoch_1", "epoch_3", per_epoch=7) == [14]
    assert steps("tokens_1B", "tokens_2B") == []
    assert steps("ckpt-0.91", "ckpt-0.95") == []
    assert steps("a", "b") == []
    assert steps("step_100", "b") == []


# Real shapes -------------------------------------------------------------------------------------


def uneven(rows=600, moved=20, n=5):
    """Candidates of an embedding of which few rows move, and the first not at all."""
    torch.manual_seed(3)
    base = {"weight": torch.randn(rows, 64)}
    states = []
    for i in range(n):
        w = base["weight"].clone()
        w[1 : 1 + moved] += 0.3 * i * torch.randn(moved, 64) + i
        states.append({"weight": w})
    names = [f"step_{100 * (i + 1)}" for i in range(n)]
    return nn.Embedding(rows, 64), twa.Candidates.of_states(states, names=names)


def measured_step(subspace, draws=100):
    start, squares = weights(subspace), []
    for _ in range(draws):
        for p in subspace.parameters:
            p.grad = torch.randn_like(p)
        y = subspace.project_gradients().sign()
        squares.append(float((moved(subspace, y) - start).square().sum()))
    return (sum(squares) / len(squares)) ** 0.5


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", 128])
def test_rows_that_are_still_in_most_of_a_large_tensor(bits, balance, granularity):
    net, candidates = uneven()
    subspace = twa.Subspace.from_candidates(
        net, candidates, bits=bits, balance=balance, granularity=granularity
    )
    assert subspace.unit_step() == pytest.approx(measured_step(subspace), rel=0.2)
    apart = (candidates[1].tensor("weight") - candidates[0].tensor("weight")).norm()
    assert learning_rate(subspace) > 0.2 * float(apart) / 10 / subspace.unit_step()


def test_states_say_what_balanced_coefficients_are_of():
    """Other samples of P give other matrices: those of the state count."""
    first, second = made(granularity=128, bits=4), made(granularity=128, bits=4)
    second.coordinates.take_balance(first.coordinates.mix * 1.1, first.coordinates.unit)
    expected = moved(first, torch.randn_like(first.coefficients))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(weights(second), expected, rtol=0, atol=0)
    optimizer, other = twa.SubspaceOptimizer(first), twa.SubspaceOptimizer(second)
    second.coordinates.take_balance(first.coordinates.mix * 1.1, first.coordinates.unit)
    other.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(weights(second), expected, rtol=0, atol=0)
    with pytest.raises(TwaError, match=r"balance: mix: expected shape"):
        second.coordinates.take_balance(torch.zeros(1), first.coordinates.unit)
