"""Meshes of tensor parallelism and of HSDP, with and without FSDP2 beside it: every job gives what
one process gives.
"""

import json
import sys
from pathlib import Path

import processes
import pytest
import states
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import twa
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from twa.cli.main import main
from twa.distributed.batch_shares import share_of
from twa.distributed.ranks import Ranks
from twa.dtensors import reshard

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
#: what the model is sharded by, and on how many ranks
KINDS = [("hsdp", 4), ("tensor", 2), ("tensor and fsdp", 4), ("tensor and data parallel", 4)]
EMA = twa.averages.ema(4, 0.5)
TWO_LAYERS = {"0": ColwiseParallel(), "2": RowwiseParallel()}


class Net(nn.Module):
    """Blocks that can be split between ranks, a tied weight, BatchNorm."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(2)
        )
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        h = self.norm(self.embed(tokens))  # after a bias, whose gradient would be noise alone
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


BATCHES = list(torch.randint(11, (8, 16), generator=torch.Generator().manual_seed(0)))


def loss_of(model, tokens):
    return F.cross_entropy(model(tokens), tokens.roll(1))


def net(kind, group=None):
    """The model, and the group of ranks that each have batches of their own."""
    torch.manual_seed(3)
    model = Net()
    if kind == "whole":
        return model, None
    if kind == "tensor":
        mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tensor",))
        for block in model.blocks:
            parallelize_module(block, mesh, TWO_LAYERS)
        return model, None
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("outer", "inner"))
    if kind != "hsdp":
        for block in model.blocks:
            parallelize_module(block, mesh["inner"], TWO_LAYERS)
    if kind != "tensor and data parallel":
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh if kind == "hsdp" else mesh["outer"])
    return model, group if kind == "hsdp" else mesh.get_group("outer")


def whole(model):
    reshard(model)
    return states.whole(model)


@pytest.fixture(scope="module")
def heap(tmp_path_factory):
    """Four candidates around a common point."""
    folder = tmp_path_factory.mktemp("heap")
    base = net("whole")[0]
    for k in range(4):
        state = {name: t.clone() for name, t in base.state_dict().items() if name != "head.weight"}
        for t in state.values():
            if t.is_floating_point():
                t += 0.2 * torch.randn_like(t).abs()
        save_file(state, folder / f"c{k}.safetensors")
    return folder


def options(kind, group):
    """Of a tensor-parallel mesh alone, the others of the job are not there."""
    return {"group": group} if kind == "tensor" else {}


def trained(group, heap, kind, low_memory):
    """Coefficients, weights and files after some steps, and what is read back of the files."""
    model, data = net(kind, group)
    candidates = twa.Candidates(f"{heap}/c*.safetensors")
    twa.load_average(model, candidates, EMA)
    found = {"average": whole(model)}
    share = share_of(model, Ranks(group))
    found["share"] = share
    mine = BATCHES[share.rank :: share.world_size]
    found["batches"] = twa.update_bn(mine, model, group=data)
    found["statistics"] = whole(model)["norm.running_var"]
    model.eval()  # BatchNorm in training is of one rank's batch
    subspace = twa.Subspace.from_candidates(model, candidates, bits=32, **options(kind, group))
    optimizer = twa.SubspaceOptimizer(
        subspace, torch.optim.SGD, lr=0.05, momentum=0.9, low_memory=low_memory
    )
    for _ in range(6):
        (sum(loss_of(model, batch) for batch in mine) / len(mine)).backward()
        optimizer.step()
        optimizer.zero_grad()
    found |= {"x": subspace.coefficients.detach().clone(), "weights": whole(model)}
    if group is None:
        return found
    subspace.save(heap / kind, dcp=True)
    saved = {"model": model.state_dict()}
    dcp.save(saved, checkpoint_id=heap / kind / "checkpoint", process_group=group)
    other, _ = net(kind, group)
    twa.load_average(other, twa.Candidates(heap / kind / "checkpoint"), torch.ones(1))
    found["again"] = whole(other)
    return found


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("kind, size", KINDS)
def test_all_that_a_model_goes_through(ranks, heap, kind, size, low_memory):
    expected = trained(None, heap, "whole", low_memory)
    results = ranks.run(size, trained, heap, kind, low_memory)
    shares = {"hsdp": 4, "tensor": 1}.get(kind, 2)
    assert [r["share"].world_size for r in results] == [shares] * size
    assert sorted(r["share"].rank for r in results if r["share"].counts) == list(range(shares))
    for r in results:
        assert all(torch.equal(t, expected["average"][key]) for key, t in r["average"].items())
        assert r["batches"] == len(BATCHES)
        torch.testing.assert_close(r["statistics"], expected["statistics"])
        torch.testing.assert_close(r["x"], expected["x"], rtol=0, atol=1e-5)
        assert torch.equal(r["x"], results[0]["x"]) and r["x"].abs().max() > 0.05
        for key, t in expected["weights"].items():
            torch.testing.assert_close(r["weights"][key], t, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(t, r["weights"][key]) for key, t in r["again"].items())
    exported = load_file(heap / kind / "averaged.safetensors")
    assert exported.keys() == twa.Candidates(heap / "c0.safetensors").info.keys()
    sharded = twa.Candidates(heap / kind / "averaged_dcp")[0]
    for key, t in exported.items():
        assert torch.equal(t, results[0]["weights"][key]) and torch.equal(sharded.tensor(key), t)


def recorded(group, path, kind):
    """The weights at each step, and their average: inside, and for good."""
    model, seen = net(kind, group)[0], []
    recorder = twa.Recorder(model, every=1, path=path, **options(kind, group))
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for p in model.parameters():
                move = 0.1 * torch.randn(p.shape, generator=g)
                is_shard = isinstance(p, DTensor)
                p += distribute_tensor(move, p.device_mesh, p.placements) if is_shard else move
        recorder.record(step)
        seen.append(whole(model))
    with recorder.averaged("uniform"):
        inside = whole(model)
    recorder.apply("uniform")
    recorder.close()
    return seen, inside, whole(model)


@pytest.mark.parametrize("kind, size", KINDS)
def test_a_recording(ranks, tmp_path, kind, size):
    results = ranks.run(size, recorded, tmp_path / "run", kind)
    candidates = twa.Candidates(tmp_path / "run")
    read = candidates.average(twa.averages.uniform(len(candidates)))
    for seen, inside, after in results:
        for key, t in inside.items():
            assert torch.equal(t, after[key]) and torch.equal(t, read.get(key, t))
            if t.is_floating_point():
                mean = sum(state[key].double() for state in seen) / 3
                torch.testing.assert_close(t.double(), mean, rtol=0, atol=0.02)  # a code


def from_file(group, folder, kind):
    """This rank's part of a packed basis and the weights: from its file, and packed here."""
    found = []
    for make in (
        lambda m, **o: twa.Subspace.load(folder, m, **o),
        lambda m, **o: twa.Subspace.from_candidates(m, twa.Candidates(f"{folder}/c*"), **o),
    ):
        torch.manual_seed(3)
        model = wide()
        if kind == "hsdp":
            names = {"mesh_dim_names": ("copies", "shards")}
            fully_shard(model, mesh=DeviceMesh("cpu", torch.arange(4).view(2, 2), **names))
        else:
            mesh = DeviceMesh.from_group(group, "cpu")
            parallelize_module(model, mesh, dict.fromkeys("01", ColwiseParallel()))
        s = make(model, group=group)
        with torch.no_grad():
            s.coefficients.copy_(torch.linspace(-1, 1, s.coefficients.numel()).view_as(s.x()))
        s.write_weights()
        found.append(([s.basis.codes, s.basis.scales.view(torch.uint8)], whole(model)))
    return found


def wide():
    """Shards that begin at multiples of 128 weights."""
    return nn.Sequential(nn.Linear(128, 8, bias=False), nn.Linear(128, 8, bias=False))


@pytest.mark.parametrize("kind, size", [("hsdp", 4), ("tensor", 2)])
def test_a_packed_basis_on_disk(ranks, tmp_path, kind, size):
    for k in range(3):
        torch.manual_seed(k)
        save_file(wide().state_dict(), tmp_path / f"c{k}.safetensors")
    alone = twa.Subspace.from_candidates(wide(), twa.Candidates(f"{tmp_path}/c*"))
    alone.save(tmp_path, basis=True)
    for (loaded, weights), (packed, expected) in ranks.run(size, from_file, tmp_path, kind):
        assert all(torch.equal(a, b) for a, b in zip(loaded, packed, strict=True))
        assert all(torch.equal(t, expected[key]) for key, t in weights.items())
        assert len(loaded[0]) * 2 == len(alone.basis.codes)


def averaged(group, heap, kind):
    """The rows of `twa.average`, merge weights and the model."""
    model, _ = net(kind, group)
    outcome = twa.average(
        model,
        f"{heap}/c*.safetensors",
        BATCHES[:5],
        BATCHES[5:],
        loss_of,
        test=BATCHES[:3],
        methods=["t:tensor:32"],
        steps=4,
        lr=0.02,
        batches_per_step=3,  # no multiple of the number of shares
        progress=False,
        group=group,
    )
    rows = [(r.method, r.val_loss, r.test_loss, r.averaged_bn_loss) for r in outcome.results]
    return rows, outcome.results[-1].curve, outcome.results[-1].beta, whole(model)


@pytest.mark.parametrize("kind, size", KINDS)
def test_the_main_job(ranks, heap, kind, size):
    """Ranks of one tensor-parallel model have the same batches, and count once."""
    rows, curve, beta, model = averaged(None, heap, "whole")
    assert (beta - beta.mean(0)).abs().max() > 1e-3
    for found, ours, weights, other in ranks.run(size, averaged, heap, kind):
        assert [r[0] for r in found] == [r[0] for r in rows]
        for a, b in zip(found, rows, strict=True):
            assert a[1:] == pytest.approx(b[1:], rel=1e-4)
        assert ours == pytest.approx(curve, rel=1e-4)
        torch.testing.assert_close(weights, beta, rtol=0, atol=1e-4)
        for key, t in model.items():
            torch.testing.assert_close(other[key], t, rtol=1e-4, atol=1e-4)


TASK = """
import sys

sys.path.append({folder!r})
from test_meshes import BATCHES, Net, TWO_LAYERS, loss_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

name = "sharded"

def model():
    model = Net()
    if "{kind}" == "hsdp":
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
    elif "{kind}" == "tensor":
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
        for block in model.blocks:
            parallelize_module(block, mesh, TWO_LAYERS)
    return model

def train_data(seed):
    return BATCHES[:5]

def val_data():
    return BATCHES[5:]

loss = loss_of
"""


@pytest.mark.parametrize("kind", ["hsdp", "tensor"])
def test_a_model_that_its_task_has_sharded(heap, tmp_path, kind):
    """`twa average` on two ranks, some of which end in the middle and are continued, and on one."""
    for name in (kind, "whole"):
        (tmp_path / f"{name}.py").write_text(
            TASK.format(kind=name, folder=str(Path(__file__).parent))
        )

    def command(name):
        task, out = str(tmp_path / f"{name}.py"), str(tmp_path / name)
        fixed = ["--twa", "t:tensor:32", "--steps", "4", "--lr", "0.02", "--save-every", "1"]
        more = ["--batches-per-step", "3", "--dcp", "-o", out]
        return ["average", task, f"{heap}/c*.safetensors", *fixed, *more]

    assert main(command("whole")) == 0
    stops = [("3", []), ("0", ["--resume"])] if kind == "tensor" else [("0", [])]
    for last, more in stops:
        processes.job(2, [sys.executable, "-c", PROGRAM, last, *command(kind), *more])
        assert (tmp_path / kind / "state.pt").exists() == (last == "3")
    betas = [
        torch.tensor(json.loads((tmp_path / name / "coefficients.json").read_text())["beta"])
        for name in (kind, "whole")
    ]
    torch.testing.assert_close(*betas, rtol=0, atol=1e-4)
    files = [
        {
            p.relative_to(tmp_path / name)
            for p in (tmp_path / name).rglob("*")
            if p.suffix != ".distcp"
        }
        for name in (kind, "whole")
    ]
    assert files[0] == files[1]


#: `twa`, which ends before step number argv[1] if there is such a step; see processes.leave_job
PROGRAM = """
import sys
import processes
import twa
from twa.cli.main import main

step, left = twa.SubspaceOptimizer.step, int(sys.argv[1])

def counted(self, *args):
    global left
    left -= 1
    if left == 0:
        processes.leave_job()
    return step(self, *args)

twa.SubspaceOptimizer.step = counted
code = main(sys.argv[2:])
assert not code
processes.leave_job()
"""
