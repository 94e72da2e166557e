"""The trainer on a GPU: 20 steps against the CPU's kernels, low_memory with a GradScaler, a stream
of its own, a CUDA graph. Without a GPU the same kernels run emulated, or interpreted for a few
steps."""

import copy

import pytest
import torch
import twa
from conftest import ON_GPU
from torch import nn
from zoo import save_candidates

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: streams and CUDA graphs")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 1))


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    return save_candidates(network, tmp_path_factory.mktemp("candidates"), 5)


def batches(device, steps):
    generator = torch.Generator().manual_seed(1)
    pairs = [torch.randn(32, 7, generator=generator).to(device) for _ in range(steps)]
    return [(pair[:, :6], pair[:, 6:]) for pair in pairs]


def train(candidates, device, steps, scaler=None, basis=None, **options):
    """The model and its subspace after some steps; `basis`: options of the subspace."""
    model = copy.deepcopy(network()).to(device)
    subspace = twa.Subspace.from_candidates(model, candidates, **({"bits": 4} | (basis or {})))
    rule = options.pop("rule", {"cls": torch.optim.AdamW, "lr": 0.02})
    optimizer = twa.SubspaceOptimizer(
        subspace, rule["cls"], **{k: v for k, v in rule.items() if k != "cls"}, **options
    )
    for x, y in batches(device, steps):
        loss = (model(x) - y).square().mean()
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
    return model, subspace


@pytest.fixture
def chosen(gpu, monkeypatch):
    """(device, steps), with this backend for everything but packing, which is done on the CPU."""
    gpu.needs("step")
    steps = 20 if ON_GPU or gpu.backend == "cuda" else 2
    if ON_GPU:
        monkeypatch.setenv("TWA_KERNELS_BACKEND", f"cuda:{gpu.backend}")
        return gpu.device, steps
    from_candidates = twa.Subspace.from_candidates

    def packed_by_cpp(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setenv("TWA_KERNELS_BACKEND", "cpu:cpp")
            return from_candidates(*arguments, **options)

    monkeypatch.setattr(twa.Subspace, "from_candidates", packed_by_cpp)
    monkeypatch.setenv("TWA_KERNELS_BACKEND", f"cpu:{gpu.backend}")
    return gpu.device, steps


def agree(found, expected):
    (model, subspace), (other, theirs) = found, expected
    x, y = subspace.coefficients.detach().cpu(), theirs.coefficients.detach().cpu()
    assert y.abs().max() > 0.03  # it went somewhere
    torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-3, atol=1e-4)


def on_the_cpu(candidates, steps, monkeypatch, **options):
    monkeypatch.setenv("TWA_KERNELS_BACKEND", "")
    return train(candidates, "cpu", steps, **options)


@pytest.mark.parametrize("low_memory", [False, True])
def test_steps_are_those_of_the_cpu(candidates, chosen, monkeypatch, low_memory):
    found = train(candidates, *chosen, low_memory=low_memory)
    agree(found, on_the_cpu(candidates, chosen[1], monkeypatch, low_memory=low_memory))


def test_low_memory_with_a_grad_scaler(candidates, chosen, monkeypatch):
    scaler = torch.amp.GradScaler(torch.device(chosen[0]).type, init_scale=1024.0)
    found = train(candidates, *chosen, scaler, low_memory=True)
    agree(found, on_the_cpu(candidates, chosen[1], monkeypatch))


MOMENTUM = {"cls": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}


@pytest.mark.parametrize(
    "options",
    [
        {"basis": {"bits": 32}},
        {"basis": {"bits": 2, "granularity": "model"}},
        {"basis": {"constraint": "simplex"}},
        {"basis": {"basis": "differences"}},
        {"basis": {"basis": "orthonormal"}},
        {"rule": MOMENTUM},
    ],
    ids=str,
)
def test_other_subspaces_and_rules(candidates, chosen, monkeypatch, options):
    found = train(candidates, *chosen, **copy.deepcopy(options))
    agree(found, on_the_cpu(candidates, chosen[1], monkeypatch, **copy.deepcopy(options)))


@needs_gpu
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_basis_in_host_memory(candidates, chosen, monkeypatch, low_memory, stream):
    """Blocks of a few tiles, on two streams; the weights are in one block and in many."""
    from twa.basis import streamed

    monkeypatch.setattr(streamed, "BLOCK_BYTES", 1 << 12)
    user = torch.cuda.Stream() if stream else torch.cuda.current_stream()
    user.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(user):
        found = train(candidates, *chosen, basis={"storage": "host"}, low_memory=low_memory)
    torch.cuda.current_stream().wait_stream(user)
    assert not found[1].kept.codes.is_cuda and found[1].basis.copied > 0
    agree(found, on_the_cpu(candidates, chosen[1], monkeypatch, low_memory=low_memory))


@needs_gpu
def test_a_stream_of_its_own(candidates, chosen, monkeypatch):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = train(candidates, *chosen)
    torch.cuda.current_stream().wait_stream(stream)
    agree(found, on_the_cpu(candidates, chosen[1], monkeypatch))


@needs_gpu
@pytest.mark.gpu
def test_steps_replayed_from_a_graph(candidates, monkeypatch):
    """optimizer.step() captured once; gradients change between replays."""
    monkeypatch.setenv("TWA_KERNELS_BACKEND", "cuda:cuda")

    def make():
        model = network().cuda()
        subspace = twa.Subspace.from_candidates(model, candidates, bits=4)
        optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=0.02, capturable=True)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        return model, subspace, optimizer

    def fill(model, k):
        generator = torch.Generator().manual_seed(k)
        for p in model.parameters():
            p.grad.copy_(torch.randn(p.shape, generator=generator))

    model, subspace, optimizer = make()
    expected = []
    for k in range(6):
        fill(model, k)
        optimizer.step()
        expected.append(
            [
                subspace.coefficients.detach().clone(),
                *(p.detach().clone() for p in model.parameters()),
            ]
        )
    model, subspace, optimizer = make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for k in range(2):
            fill(model, k)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for k in range(2, 6):
        fill(model, k)
        graph.replay()
        for ours, theirs in zip(
            [subspace.coefficients, *model.parameters()], expected[k], strict=True
        ):
            torch.testing.assert_close(ours.detach(), theirs, rtol=1e-6, atol=1e-7)
