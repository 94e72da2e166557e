"""NCCL with one rank: every sharding on CUDA tensors, a replicate step in a CUDA graph.

Needs a GPU; tests/test_distributed.py runs gloo on CPUs.
"""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import twa
from ranks import LIMIT
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from zoo import save_candidates

GPU = torch.cuda.is_available() and dist.is_nccl_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPU, reason="needs a GPU and a PyTorch with NCCL"),
]


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    # one rank: a machine without a network will do
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    store = tmp_path_factory.mktemp("nccl") / "store"
    dist.init_process_group(
        "nccl",
        init_method=f"file://{store}",
        rank=0,
        world_size=1,
        timeout=LIMIT,
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 7))


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    return save_candidates(new_model, tmp_path_factory.mktemp("candidates"), 6)


X, Y = (
    torch.randn(64, 40, generator=torch.Generator().manual_seed(1)),
    torch.randn(64, 7, generator=torch.Generator().manual_seed(2)),
)


def train(candidates, sharding, group, low_memory=False, steps=20, **options):
    model = new_model().cuda()
    if sharding == "columns":
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cuda"))
    subspace = twa.Subspace.from_candidates(
        model,
        candidates,
        sharding=sharding,
        group=group if sharding != "single" else None,
        **options,
    )
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=0.02, low_memory=low_memory)
    x, y = X.cuda(), Y.cuda()
    for _ in range(steps):
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.state_dict()  # looks at the stamps
    return subspace


@pytest.mark.parametrize(
    "options",
    [{}, {"low_memory": True}, {"bits": 2, "granularity": "model"}, {"basis": "orthonormal"}],
    ids=str,
)
@pytest.mark.parametrize("sharding", ["replicate", "rows", "columns"])
def test_one_rank_is_one_process(group, candidates, sharding, options):
    if sharding == "rows" and "low_memory" in options:
        with pytest.raises(ValueError, match="low_memory: not with sharding='rows'"):
            train(candidates, sharding, group, **options)
        return
    ours, alone = (
        train(candidates, sharding, group, **options),
        train(candidates, "single", None, **options),
    )
    assert ours.coefficients.is_cuda and ours.coefficients.abs().max() > 0.03
    torch.testing.assert_close(ours.coefficients, alone.coefficients, rtol=0, atol=5e-6)


def test_export(group, candidates, tmp_path):
    for sharding in ("replicate", "rows", "columns"):
        subspace = train(candidates, sharding, group, steps=2)
        subspace.save(tmp_path / sharding, sharded=True)
        exported = twa.Candidates(tmp_path / sharding / "averaged.safetensors")
        assert all(torch.isfinite(exported[0].tensor(key)).all() for key in exported.info)


def test_a_model_on_the_cpu_is_refused(group, candidates):
    with pytest.raises(ValueError, match="NCCL needs the model on a CUDA device, found cpu"):
        twa.Subspace.from_candidates(new_model(), candidates, sharding="replicate", group=group)


def test_replicate_step_in_a_graph(group, candidates):
    """The step with its all-reduce, captured once and replayed, against the same steps without a
    graph.
    """

    def make():
        model = new_model().cuda()
        subspace = twa.Subspace.from_candidates(
            model, candidates, sharding="replicate", group=group
        )
        optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=0.02, capturable=True)
        for k, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k)).cuda()
        return subspace, optimizer

    subspace, optimizer = make()
    expected = []
    for _ in range(6):
        optimizer.step()
        expected.append(subspace.coefficients.detach().clone())
    subspace, optimizer = make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for k in range(2, 6):
        graph.replay()
        torch.testing.assert_close(
            subspace.coefficients.detach(), expected[k], rtol=1e-6, atol=1e-7
        )
    subspace.sharding.ranks.check_drift()
