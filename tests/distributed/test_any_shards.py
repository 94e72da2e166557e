"""Shards that begin anywhere: fine segments, and a basis on disk, on ranks as in one process."""

import copy
import dataclasses
import json
import math
import sys
from pathlib import Path
from unittest import mock

import processes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import twa
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from twa.basis import grams
from twa.basis.pieces import by_groups, by_segments
from twa.basis.segments import segments_of
from twa.distributed.ranks import DistributedError
from twa.dtensors import reshard
from twa.packing import load

import twa_kernels as tk
from twa_kernels.shift import shift_columns

X = torch.randn(12, 33, generator=torch.Generator().manual_seed(0))
Y = torch.randint(17, (12,), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Layers of odd sizes, of which `middle` is what tensor parallelism divides."""

    def __init__(self, middle=7):
        super().__init__()
        self.a, self.b = nn.Linear(33, middle), nn.Linear(middle, 100)
        self.c = nn.Linear(100, 17)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def loss_of(model, rank=0, size=1):
    return F.cross_entropy(model(X[rank::size]), Y[rank::size])


def middle_of(kind):
    return 7 if kind == "fsdp" else 102


@pytest.fixture(
    scope="module",
    params=[("fsdp", 2), ("fsdp", 3), ("tensor", 2), ("tensor", 3), ("both", 4)],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def job(request, tmp_path_factory):
    """Five candidates around a common point, how the model is sharded, and over how many ranks."""
    kind, size = request.param
    folder = tmp_path_factory.mktemp(kind)
    torch.manual_seed(0)
    base = Net(middle_of(kind))
    for k in range(5):
        model = copy.deepcopy(base)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
        save_file(model.state_dict(), folder / f"c{k}.safetensors")
    return folder, kind, size


def new_model(kind, group):
    torch.manual_seed(3)
    model = Net(middle_of(kind))
    if group is None:
        return model
    members = dist.get_process_group_ranks(group)
    if kind == "fsdp":
        mesh = DeviceMesh.from_group(group, "cpu")
        fully_shard(model.a, mesh=mesh)
    elif kind == "tensor":
        mesh = DeviceMesh.from_group(group, "cpu")
        plan = {"a": ColwiseParallel(), "b": RowwiseParallel()}
        return parallelize_module(model, mesh, plan)
    else:  # strided shards: `a` lies on the tensor-parallel ranks first
        mesh = DeviceMesh("cpu", torch.tensor(members).view(2, -1), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"a": ColwiseParallel(), "b": RowwiseParallel()})
        mesh = mesh["dp"]
    fully_shard(model, mesh=mesh)
    return model


def share_of_data(kind, group):
    """This rank's number among those with data of their own, and how many these are."""
    if group is None:
        return 0, 1
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return {"fsdp": (rank, size), "tensor": (0, 1), "both": (rank * 2 // size, 2)}[kind]


def whole(model):
    reshard(model)
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
        for name, t in model.state_dict().items()
    }


def trained(group, kind, subspace, low_memory=False):
    """Coefficients after some steps, segments, merge weights, loss and weights."""
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=2.0, low_memory=low_memory)
    for _ in range(6):
        loss_of(subspace.model, *share_of_data(kind, group)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert subspace.find_moved() is None
    weights = whole(subspace.model)
    model = Net(middle_of(kind))
    model.load_state_dict(weights)
    x = subspace.coefficients.detach().clone()
    return x, subspace.segments.labels, subspace.merge_weights(), loss_of(model).detach(), weights


def train(group, job, options):
    folder, kind, _ = job
    options = dict(options)
    low_memory = options.pop("low_memory", False)
    candidates = twa.Candidates(f"{folder}/c*.safetensors")
    model = new_model(kind, group)
    with mock.patch.object(grams, "MOST_TILES", 1 << 20):  # all of P, however it is cut
        subspace = twa.Subspace.from_candidates(model, candidates, group=group, **options)
    found = trained(group, kind, subspace, low_memory)
    return *found, len(subspace.basis.shapes)


#: how much coefficients may differ, relative to the largest: P is another rounding of the same
#: rows at 8 and 4 bits (relative errors .007 and .094), and only sums differ at 32
NEAR = {32: 2e-6, 8: 0.02, 4: 0.2}
OPTIONS = [
    dict(bits=32, granularity=128),
    dict(bits=8, granularity=128),
    dict(bits=4, granularity=256),
    dict(bits=8, granularity="fine", low_memory=True),
    dict(bits=8, granularity=128, basis="differences"),
    dict(bits=8, granularity=128, balance=True),
    dict(bits=32, granularity=128, balance=True, low_memory=True),
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items())
)
def test_fine_segments(ranks, job, options):
    x, labels, beta, loss, weights, _ = train(None, job, options)
    near = NEAR[options["bits"]]
    found = ranks.run(job[2], train, job, options)
    start = loss_of_center(job)
    assert loss < start - 0.1, "nothing was learned"
    for ours in found:
        assert torch.equal(ours[0], found[0][0]) and ours[1] == labels
        assert (ours[0] - x).abs().max() <= near * x.abs().max()
        assert (ours[2] - beta).abs().max() <= near * (beta - 0.2).abs().max()
        assert abs(ours[3] - loss) <= near * (start - loss) + 1e-6
        for name in weights:
            assert torch.equal(ours[4][name], found[0][4][name])
    assert max(ours[5] for ours in found) > 6, "no part was cut"


def loss_of_center(job):
    candidates = twa.Candidates(f"{job[0]}/c*.safetensors")
    model = Net(middle_of(job[1]))
    twa.load_average(model, candidates, twa.averages.uniform(5))
    return float(loss_of(model).detach())


@torch.no_grad()
def record(group, job, path):
    """A recording of a sharded model, whose groups begin where shards do."""
    model = new_model(job[1], group)
    recorder = twa.Recorder(model, every=1, bits=8, path=path, group=group)
    for step in range(5):
        for p in model.parameters():
            generator = torch.Generator().manual_seed(step)
            move = 0.1 * torch.randn(p.shape, generator=generator)
            if group is not None:
                move = distribute_tensor(move, p.device_mesh, p.placements)
            p += move
        recorder.record(step)
    recorder.close()


def train_recorded(group, path, kind):
    options = {"basis": "differences", "granularity": 128, "bits": 8, "group": group}
    with mock.patch.object(grams, "MOST_TILES", 1 << 20):
        subspace = twa.Subspace.from_candidates(
            new_model(kind, group), twa.Candidates(path), **options
        )
    return trained(group, kind, subspace)


@pytest.mark.parametrize("job", [("fsdp", 2)], indirect=True)
@pytest.mark.parametrize("written_by", [1, 2])
def test_fine_segments_of_a_recording(ranks, job, tmp_path, written_by):
    """Its codes are taken as they are only where no segment changes inside a group of theirs."""
    if written_by == 1:
        record(None, job, tmp_path / "run")
    else:
        ranks.run(2, record, job, tmp_path / "run")
    x, labels, beta, loss, _ = train_recorded(None, tmp_path / "run", "fsdp")
    for ours in ranks.run(2, train_recorded, tmp_path / "run", "fsdp"):
        assert ours[1] == labels and (ours[0] - x).abs().max() <= NEAR[8] * x.abs().max()
        assert (ours[2] - beta).abs().max() <= NEAR[8] * (beta - 0.2).abs().max()
        assert abs(ours[3] - loss) <= 1e-3


def not_finite(group, folder, kind):
    with pytest.raises((twa.CandidateError, DistributedError), match=r"c1.*'b\.weight'.* NaN"):
        twa.Subspace.from_candidates(
            new_model(kind, group),
            twa.Candidates(f"{folder}/c*.safetensors"),
            granularity=128,
            group=group,
        )


def test_the_tensor_of_a_nan_is_named(ranks, job, tmp_path):
    for k in range(3):
        state = load_file(job[0] / f"c{k}.safetensors")
        state["b.weight"][-1, -1] = float("nan") if k == 1 else 0.0
        save_file(state, tmp_path / f"c{k}.safetensors")
    ranks.run(job[2], not_finite, tmp_path, job[1])


TASK = """
import torch
from test_any_shards import Net, X, Y

def model():
    return Net(7)

def loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

def train_data(seed=0):
    return [(X[k : k + 4], Y[k : k + 4]) for k in range(0, 12, 4)]

val_data = train_data
"""


def average(size, job, out, *options):
    """Coefficients of `twa average` on so many ranks, and its report."""
    command = [sys.executable, "-m", "twa", "average", str(job[0] / "task.py")]
    command += [*map(str, sorted(job[0].glob("c*.safetensors"))), "-o", str(out), "--steps", "8"]
    for done in processes.finish(*processes.start_job(*[[*command, *options]] * size)):
        assert not done.returncode, done.stderr
    return json.loads((out / "coefficients.json").read_text()), (out / "report.md").read_text()


@pytest.mark.parametrize("job", [("fsdp", 2)], indirect=True)
def test_twa_average_keeps_fine_segments(job, tmp_path):
    task = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{TASK}"
    (job[0] / "task.py").write_text(task)
    options = ["--twa", "t:fine:8", "--batches-per-step", "2"]
    ours, report = average(2, job, tmp_path / "two", *options, "--sharding", "columns")
    theirs, _ = average(1, job, tmp_path / "one", *options)
    assert ours["chunk"] == theirs["chunk"] == 128 and ours["segments"] == theirs["segments"]
    assert "not fine" not in report
    beta, expected = (torch.tensor(c["beta"]) for c in (ours, theirs))
    assert (beta - expected).abs().max() <= NEAR[8] * (expected - 0.2).abs().max()


# A basis on disk ---------------------------------------------------------------------------------


def write_basis(job, tmp_path, options):
    candidates = twa.Candidates(f"{job[0]}/c*.safetensors")
    subspace = twa.Subspace.from_candidates(Net(middle_of(job[1])), candidates, **options)
    subspace.save(tmp_path, basis=True)


def load_and_train(group, job, path):
    """What this rank has of the file, decoded, beside what is there; and a run from it."""
    _, kind, _ = job
    subspace = twa.Subspace.load(path, new_model(kind, group), group=group)
    reference = twa.Subspace.load(path, Net(middle_of(kind)), sharding="single")
    decoded, whole_rows = tk.unpack(subspace.basis), tk.unpack(reference.basis)
    for k, (held, p) in enumerate(zip(subspace.sharding.shards, reference.parameters, strict=True)):
        rows = torch.cat([decoded[j].flatten(1) for j in subspace.pieces.of(k)], 1)
        of_file = whole_rows[k].view(-1, *p.shape)
        center = reference.center[k]
        if held.part is not None:
            of_file, center = of_file[(slice(None), *held.part)], center[held.part]
        assert torch.equal(rows, of_file.flatten(1)), "other codes than the file's"
        assert torch.equal(subspace.center[k], center)
        if held.part is not None:  # a copy of no more than that
            assert subspace.center[k].untyped_storage().nbytes() == 4 * center.numel()
    x = torch.randn(subspace.coefficients.shape, generator=torch.Generator().manual_seed(2))
    for s in (subspace, reference):
        s.coefficients.data.copy_(x)
        s.write_weights()
    at_x = whole(subspace.model)
    assert all(torch.equal(at_x[name], w) for name, w in whole(reference.model).items())
    subspace.coefficients.data.zero_()
    subspace.write_weights()
    return *trained(group, kind, subspace), len(subspace.basis.shapes)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("granularity", ["tensor", 128])
def test_the_codes_of_a_file(ranks, job, tmp_path, bits, granularity):
    """No code is made anew: only the order of sums differs from one process."""
    write_basis(job, tmp_path, {"bits": bits, "granularity": granularity})
    x, labels, beta, loss, _, _ = load_and_train(None, job, tmp_path)
    found = ranks.run(job[2], load_and_train, job, tmp_path)
    for ours in found:
        assert torch.equal(ours[0], found[0][0]) and ours[1] == labels
        torch.testing.assert_close(ours[0], x, rtol=0, atol=5e-6 * float(x.abs().max()))
        torch.testing.assert_close(ours[2], beta, rtol=0, atol=5e-6 * float(x.abs().max()))
        torch.testing.assert_close(ours[3], loss, rtol=1e-5, atol=0)
    assert max(ours[5] for ours in found) > 6, "no part was cut"


def refused(group, job, path):
    with mock.patch.object(load, "MOST_PIECES", 8):
        try:
            twa.Subspace.load(path, new_model(job[1], group), group=group)
        except (twa.BasisError, DistributedError) as error:
            return str(error)


def test_more_pieces_than_a_step_can_take(ranks, job, tmp_path):
    write_basis(job, tmp_path, {})
    for said in ranks.run(job[2], refused, job, tmp_path):
        if job[1] == "fsdp":  # two pieces of a tensor at most
            assert said is None
        else:
            assert "more than 8 pieces of the file" in said and "from_candidates" in said


# Where parts are cut -----------------------------------------------------------------------------

SHAPES = [(1000,), (7, 33), (3, 5, 64), (4, 256), (12, 128), (0, 5), (1,), (2, 3, 4, 50)]


def parts_of(shape):
    """All of a tensor, and blocks of it: (slices or None, shape)."""
    yield None, torch.Size(shape)
    generator = torch.Generator().manual_seed(len(shape))
    for _ in range(8):
        cut = []
        for size in shape:
            a, b = torch.randint(size + 1, (2,), generator=generator).sort().values.tolist()
            cut.append(slice(a, b) if torch.rand((), generator=generator) < 0.7 else slice(0, size))
        yield tuple(cut), torch.Size(c.stop - c.start for c in cut)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [128, 256])
@pytest.mark.parametrize("dense", [False, True])
def test_pieces_by_segments(shape, chunk, dense):
    segments = segments_of(["other", "t"], [130, math.prod(shape)], chunk)
    for cut, part in parts_of(shape):
        of_weight = segments.first[1] + torch.arange(math.prod(shape)).view(shape) // chunk
        expected = (of_weight if cut is None else of_weight[cut]).flatten().tolist()
        made = by_segments(
            [torch.Size([130]), part], [None, cut], [torch.Size([130]), shape], segments, dense
        )
        pieces, tiles, found = made.pieces, iter(made.tile_segments().tolist()[2:]), []
        for first, size in zip(made.firsts[1:], pieces.sizes[1], strict=True):
            groups = [next(tiles) for _ in range(-(-size // 128))]
            if dense:
                found += [first + j // chunk for j in range(size)]
            else:
                assert not size or groups[0] == first
                found += [groups[j // 128] for j in range(size)]
        assert found == expected and not list(tiles)
        assert len(pieces.sizes[1]) <= max(1, len(set(expected)))
        if cut is None:
            assert pieces.whole


@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_by_groups(shape):
    places = torch.arange(math.prod(shape)).view(shape)
    for cut, part in parts_of(shape):
        expected = (places if cut is None else places[cut]).flatten().tolist()
        groups, found = by_groups(cut, shape, 1 << 20), []
        tiles = zip(groups.index.tolist(), groups.shift.tolist(), strict=True)
        for size in groups.sizes:
            for begin in range(0, size, 128):
                index, shift = next(tiles)
                found += [index * 128 + shift + j for j in range(min(128, size - begin))]
        assert found == expected and not list(tiles)
        assert part.numel() == len(expected)
        if len(groups.sizes) > 1:
            assert by_groups(cut, shape, len(groups.sizes) - 1) is None


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_shifted_groups(bits):
    rows = torch.randn(3, 640, generator=torch.Generator().manual_seed(0))
    basis = tk.pack(rows, bits)
    (before,) = tk.unpack(basis)
    shift = torch.tensor([0, 1, 37, 127, 64])
    codes = basis.codes.clone()
    shift_columns(codes, shift, bits)
    (after,) = tk.unpack(dataclasses.replace(basis, codes=codes))
    for g, s in enumerate(shift.tolist()):
        old, new = (t[:, 128 * g : 128 * (g + 1)] for t in (before, after))
        assert torch.equal(new[:, : 128 - s], old[:, s:])
