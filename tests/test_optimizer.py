"""SubspaceOptimizer: the paper's equivalence, drop-in behaviour, schedulers, state."""

import collections
import copy
import gc
import pickle

import pytest
import torch
import twa
from safetensors.torch import save_file
from torch import nn
from twa.basis.dense import DenseBasis
from twa.basis.segments import Segments
from twa.coordinates import Deltas


def make():
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1))


@pytest.fixture
def candidates(tmp_path):
    for k in range(5):
        torch.manual_seed(k)
        save_file(make().state_dict(), tmp_path / f"c{k}.safetensors")
    return twa.Candidates(tmp_path / "c*.safetensors")


X, Y = (
    torch.randn(64, 6, generator=torch.Generator().manual_seed(0)),
    torch.randn(64, 1, generator=torch.Generator().manual_seed(1)),
)


def loss(model, dtype=torch.float32):
    return (model(X.to(dtype)) - Y.to(dtype)).square().mean()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_projected_sgd_is_sgd_on_coefficients(candidates, momentum):
    """The conference method, theta <- theta - lr * Q^T Q grad with orthonormal Q, step by step in
    float64.
    """
    ours, theirs = make().double(), make().double()
    subspace = twa.Subspace.from_candidates(
        ours, candidates, bits=32, granularity="model", center="last"
    )
    shapes = [p.shape for p in ours.parameters()]
    W = torch.stack(
        [torch.cat([c.tensor(n).flatten() for n in subspace.key_map.trained]) for c in candidates]
    ).double()
    Q = torch.linalg.qr(W.T)[0].T  # (n, D)
    pieces = list(Q.split([s.numel() for s in shapes], dim=1))
    basis = DenseBasis(
        pieces, [0] * len(pieces), torch.ones(5, 1, dtype=torch.float64), tuple(shapes)
    )
    center = [c.double() for c in subspace.center]
    subspace = twa.Subspace(
        subspace.sharding,
        basis,
        center,
        Segments(["model"], [0] * len(pieces)),
        Deltas(subspace.coordinates.center_weights, basis.divisor),
    )
    subspace.write_weights()
    theirs.load_state_dict(ours.state_dict())
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.1, momentum=momentum)
    velocity = torch.zeros(W.shape[1], dtype=torch.float64)
    for _ in range(30):
        loss(ours, torch.float64).backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.zero_grad()
        loss(theirs, torch.float64).backward()
        g = torch.cat([p.grad.flatten() for p in theirs.parameters()])
        velocity = momentum * velocity + Q.T @ (Q @ g)
        with torch.no_grad():
            for p, v in zip(
                theirs.parameters(), velocity.split([s.numel() for s in shapes]), strict=True
            ):
                p -= 0.1 * v.view_as(p)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [32, 8, 4, 2])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
        (torch.optim.AdamW, dict(lr=0.02)),
        (torch.optim.Adagrad, dict(lr=0.2)),
    ],
)
def test_any_torch_optimizer_lowers_the_loss(candidates, bits, kind, options):
    model = make()
    subspace = twa.Subspace.from_candidates(model, candidates, bits=bits)
    optimizer = twa.SubspaceOptimizer(subspace, kind, **options)
    start = loss(model).item()
    for _ in range(60):
        value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss(model).item() < 0.97 * start
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_lbfgs_with_a_closure(candidates):
    model = make()
    subspace = twa.Subspace.from_candidates(model, candidates)
    optimizer = twa.SubspaceOptimizer(
        subspace, torch.optim.LBFGS, lr=1.0, max_iter=20, line_search_fn="strong_wolfe"
    )
    start = loss(model).item()

    def closure():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    optimizer.step(closure)
    assert loss(model).item() < 0.9 * start


def test_gradient_of_coefficients_is_the_true_gradient(candidates):
    """x.grad against finite differences of the loss along each coefficient, for the quantised basis
    itself.
    """
    model = make()
    subspace = twa.Subspace.from_candidates(model, candidates, bits=2, granularity="tensor")
    loss(model).backward()
    c, h = subspace.project_gradients(), 1e-2
    for i, l in [(0, 0), (3, 1), (4, 2), (2, 3)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                subspace.coefficients[i, l] = sign * h
            subspace.write_weights()
            values.append(loss(model).item())
            with torch.no_grad():
                subspace.coefficients[i, l] = 0
        assert (values[0] - values[1]) / (2 * h) == pytest.approx(
            c[i, l].item(), rel=0.05, abs=2e-4
        )


@pytest.mark.parametrize(
    "make_schedule",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)),
    ],
)
def test_schedulers_drive_the_inner_optimizer(candidates, make_schedule):
    model = make()
    optimizer = twa.SubspaceOptimizer(
        twa.Subspace.from_candidates(model, candidates), torch.optim.AdamW, lr=0.1
    )
    schedule = make_schedule(optimizer)
    rates = []
    for _ in range(8):
        loss(model).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        rates.append(optimizer.inner.param_groups[0]["lr"])
    assert len(set(rates)) > 4
    assert optimizer.param_groups[0]["lr"] == rates[-1] == schedule.get_last_lr()[0]


def test_state_dict_continues_bit_identically(candidates):
    def start():
        model = make()
        optimizer = twa.SubspaceOptimizer(
            twa.Subspace.from_candidates(model, candidates), torch.optim.AdamW, lr=0.05
        )
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def steps(model, optimizer, schedule, count):
        for _ in range(count):
            loss(model).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    whole = start()
    steps(*whole, 8)
    first = start()
    steps(*first, 5)
    second = start()
    second[1].load_state_dict(first[1].state_dict())
    second[2].load_state_dict(first[2].state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True)
    )
    steps(*second, 3)
    assert torch.equal(whole[1].subspace.coefficients, second[1].subspace.coefficients)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True)
    )


def test_gradient_accumulation(candidates):
    results = []
    for parts in (1, 4):
        model = make()
        optimizer = twa.SubspaceOptimizer(
            twa.Subspace.from_candidates(model, candidates), torch.optim.SGD, lr=0.1
        )
        for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
            ((model(x) - y).square().mean() / parts).backward()
        optimizer.step()
        results.append(optimizer.subspace.coefficients.detach().clone())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_bad_use(candidates):
    model = make()
    optimizer = twa.SubspaceOptimizer(twa.Subspace.from_candidates(model, candidates), lr=0.1)
    with pytest.raises(RuntimeError, match="no parameter of the model has a gradient"):
        optimizer.step()
    with pytest.raises(ValueError, match="coefficients only"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    other = twa.SubspaceOptimizer(
        twa.Subspace.from_candidates(model, candidates, center="last"), lr=0.1
    )
    with pytest.raises(ValueError, match="another subspace: center_weights"):
        optimizer.load_state_dict(other.state_dict())


def test_copies_are_whole(candidates):
    model = make()
    optimizer = twa.SubspaceOptimizer(twa.Subspace.from_candidates(model, candidates), lr=0.1)
    twin = copy.deepcopy(optimizer)
    for o in (optimizer, twin):
        loss(o.subspace.model).backward()
        o.step()
    assert twin.subspace.model is not model and torch.equal(
        twin.subspace.coefficients, optimizer.subspace.coefficients
    )
    calls = []
    optimizer.register_state_dict_post_hook(lambda o, s: calls.append("saved"))
    optimizer.register_step_post_hook(lambda o, a, k: calls.append("stepped"))
    optimizer.state_dict()
    loss(model).backward()
    optimizer.step()
    assert calls == ["saved", "stepped"]
    optimizer.state = collections.defaultdict(dict)
    assert not optimizer.inner.state


def test_stale_graphs_are_refused(candidates):
    """Weights change in place: as with every torch optimizer, going back through the old ones is an
    error, not a wrong gradient.
    """
    for bits in (4, 32):
        model = make()
        optimizer = twa.SubspaceOptimizer(
            twa.Subspace.from_candidates(model, candidates, bits=bits), lr=0.1
        )
        first, second = loss(model), loss(model)
        first.backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            second.backward()


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_low_memory_is_the_same_training(candidates, bits, granularity):
    runs = []
    for low_memory in (False, True):
        model = make()
        subspace = twa.Subspace.from_candidates(
            model, candidates, bits=bits, granularity=granularity
        )
        optimizer = twa.SubspaceOptimizer(
            subspace, torch.optim.AdamW, lr=0.02, low_memory=low_memory
        )
        for _ in range(5):
            for x, y in zip(X.chunk(2), Y.chunk(2), strict=True):  # accumulates
                (model(x) - y).square().mean().backward()
                assert not low_memory or all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        runs.append(subspace.coefficients.detach())
    torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-5)


def test_low_memory_with_tied_weights_and_a_grad_scaler(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 5)
            self.head = nn.Linear(5, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    for k in range(3):
        torch.manual_seed(k)
        save_file({"embed.weight": torch.randn(11, 5)}, tmp_path / f"c{k}.safetensors")
    grads = []
    for low_memory in (False, True):
        model = Tied()
        subspace = twa.Subspace.from_candidates(model, twa.Candidates(tmp_path / "c*.safetensors"))
        optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=1e-3, low_memory=low_memory)
        value = model(torch.arange(11)).square().mean()
        if low_memory:
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            value.backward()
            optimizer.step()
        grads.append(subspace.coefficients.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_low_memory_hooks_come_and_go(candidates):
    model = make()
    first = twa.SubspaceOptimizer(
        twa.Subspace.from_candidates(model, candidates), low_memory=True, lr=0.1
    )
    second = twa.SubspaceOptimizer(
        twa.Subspace.from_candidates(model, candidates), low_memory=True, lr=0.1
    )
    with pytest.raises(RuntimeError, match="another low_memory optimizer"):
        loss(model).backward()
    first.close()
    loss(model).backward()
    assert second.subspace.coefficients.grad.abs().sum() > 0
    second.step()
    del second
    gc.collect()
    loss(model).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("low_memory", [False, True])
def test_copies_with_a_scheduler(candidates, low_memory):
    optimizer = twa.SubspaceOptimizer(
        twa.Subspace.from_candidates(make(), candidates), lr=0.1, low_memory=low_memory
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0)
    twin = pickle.loads(pickle.dumps(optimizer)) if not low_memory else copy.deepcopy(optimizer)
    for o in (optimizer, twin):
        loss(o.subspace.model).backward()
        o.step()
    schedule.step()
    assert optimizer.subspace.coefficients.abs().sum() > 0
    assert torch.equal(twin.subspace.coefficients, optimizer.subspace.coefficients)


@pytest.mark.parametrize(
    "change",
    [{"constraint": "simplex"}, {"normalize": "none"}, {"granularity": "model"}, {"bits": 8}],
)
def test_state_of_another_subspace_is_refused(candidates, change):
    saved = twa.SubspaceOptimizer(
        twa.Subspace.from_candidates(make(), candidates, **change), lr=0.1
    ).state_dict()
    with pytest.raises(
        ValueError,
        match=(
            f"another subspace: {'segment_of' if 'granularity' in change else next(iter(change))}"
        ),
    ):
        twa.SubspaceOptimizer(
            twa.Subspace.from_candidates(make(), candidates), lr=0.1
        ).load_state_dict(saved)


def test_low_memory_without_backward(candidates):
    optimizer = twa.SubspaceOptimizer(
        twa.Subspace.from_candidates(make(), candidates), low_memory=True, lr=0.1
    )
    with pytest.raises(RuntimeError, match="no gradient has reached the coefficients"):
        optimizer.step()
