"""Training steps of the coefficients replayed from a CUDA graph; without a GPU, from what stands
for one (graphs.py), on the emulated kernels.
"""

import contextlib

import pytest
import torch
import twa
from conftest import ON_GPU
from graphs import captured
from torch import nn
from zoo import save_candidates

from twa_kernels.backends import cuda

pytestmark = [
    pytest.mark.gpu if ON_GPU else pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(cuda.module is None or not cuda.module.with_cuda, reason="no CUDA backend"),
]
DEVICE = "cuda" if ON_GPU else "cpu"
STEPS, WARM = 6, 2


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 1))


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    return save_candidates(network, tmp_path_factory.mktemp("candidates"), 5)


@pytest.fixture
def made(candidates, monkeypatch):
    """made(options): a model, its optimizer and subspace, which run on the CUDA kernels."""

    def make(rule, options, basis):
        model = network().to(DEVICE)
        subspace = twa.Subspace.from_candidates(model, candidates, bits=4, **basis)
        monkeypatch.setenv("TWA_KERNELS_BACKEND", f"{DEVICE}:cuda")
        return model, twa.SubspaceOptimizer(subspace, rule, **options)

    def fresh(*arguments):
        monkeypatch.delenv("TWA_KERNELS_BACKEND", raising=False)  # packing is not what is tested
        return make(*arguments)

    return fresh


def batch(k):
    generator = torch.Generator().manual_seed(k)
    return [torch.randn(16, width, generator=generator).to(DEVICE) for width in (6, 1)]


def training(model, optimizer, x, y):
    """One whole step: forward, backward, update."""
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


@contextlib.contextmanager
def on_a_side_stream():
    """As PyTorch asks of what runs before a capture."""
    if not ON_GPU:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def state(model, optimizer, loss):
    everything = [loss, optimizer.subspace.coefficients, *model.parameters()]
    return [t.detach().clone() for t in everything]


ADAMW = (torch.optim.AdamW, {"lr": 0.02, "capturable": True})


@pytest.mark.parametrize(
    "rule, options, basis",
    [
        (*ADAMW, {}),
        (*ADAMW, {"granularity": "model", "center": "last"}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, {}),
        (torch.optim.SGD, {"lr": 0.1}, {"constraint": "simplex"}),
        (torch.optim.SGD, {"lr": 0.1}, {"constraint": "simplex", "basis": "differences"}),
        (torch.optim.SGD, {"lr": 0.1}, {"balance": True, "basis": "differences"}),
        (torch.optim.SGD, {"lr": 0.1, "low_memory": True}, {}),
    ],
    ids=str,
)
def test_a_whole_training_step_is_replayed(made, rule, options, basis):
    model, optimizer = made(rule, dict(options), basis)
    expected = []
    for k in range(STEPS):
        loss = training(model, optimizer, *batch(k))
        expected.append(state(model, optimizer, loss))

    model, optimizer = made(rule, dict(options), basis)
    inputs, replay = batch(0), None
    with on_a_side_stream():
        for k in range(WARM):
            for own, new in zip(inputs, batch(k), strict=True):
                own.copy_(new)
            training(model, optimizer, *inputs)
    for k in range(WARM, STEPS):
        for own, new in zip(inputs, batch(k), strict=True):
            own.copy_(new)
        if replay is None:
            optimizer.zero_grad()
            replay, loss = captured(lambda: training(model, optimizer, *inputs))
        else:
            replay()
        ours = state(model, optimizer, loss)
        if not ON_GPU:
            assert all(map(torch.equal, ours, expected[k])), k
        for mine, theirs in zip(ours, expected[k], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected[-1][1], expected[WARM][1])


def warmed(made, rule, **options):
    model, optimizer = made(rule, options, {})
    with on_a_side_stream():
        training(model, optimizer, *batch(0))
    optimizer.zero_grad()
    return model, optimizer


def test_a_capture_does_not_look_whether_weights_have_moved(made):
    """Looking would wait for the device."""
    model, optimizer = warmed(made, torch.optim.AdamW, lr=0.02, capturable=True)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    inputs = batch(1)
    captured(lambda: training(model, optimizer, *inputs))
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.warns(RuntimeWarning, match="was changed by something else"):
        training(model, optimizer, *inputs)


def test_what_a_graph_would_repeat_wrongly_is_refused(made):
    model, optimizer = warmed(made, torch.optim.AdamW, lr=0.02)
    # On a CPU the number of steps is where all else is.
    with pytest.raises(RuntimeError, match="'capturable'" if ON_GPU else "the host reads back"):
        captured(lambda: training(model, optimizer, *batch(1)))
    model, optimizer = made(torch.optim.SGD, {"lr": 0.1}, {})
    with pytest.raises(RuntimeError, match="make the same call once before the capture"):
        captured(lambda: training(model, optimizer, *batch(1)))


def test_a_learning_rate_on_the_device(made):
    """The fused step would read it back; torch's own step follows it from replay to replay."""
    _, optimizer = warmed(made, torch.optim.AdamW, lr=0.02, capturable=True)
    assert optimizer._fused_rule() == "adamw"
    optimizer.param_groups[0]["lr"] = torch.tensor(0.02)
    assert optimizer._fused_rule() == "adamw"
    if not ON_GPU:
        for p in optimizer.subspace.parameters:
            p.grad = torch.zeros_like(p)
        with pytest.raises(RuntimeError, match=r"options\['lr'\] is a tensor on cpu"):
            captured(optimizer.step)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.02, device="meta")
        assert optimizer._fused_rule() is None
        return
    lr = torch.tensor(0.02, device=DEVICE)
    model, optimizer = warmed(made, torch.optim.AdamW, lr=lr, capturable=True)
    assert optimizer._fused_rule() is None
    inputs = batch(1)
    replay, _ = captured(lambda: training(model, optimizer, *inputs))
    before = optimizer.subspace.coefficients.detach().clone()
    lr.zero_()
    replay()
    assert torch.equal(optimizer.subspace.coefficients, before)
    lr.fill_(0.02)
    replay()
    assert not torch.equal(optimizer.subspace.coefficients, before)
