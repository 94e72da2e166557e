"""Several ranks (gloo) record one run: sharded (FSDP2), copies (DDP), and both (HSDP). Any number
of ranks reads what they wrote.
"""

import shutil
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import twa
from conftest import exhaustive
from states import whole
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from twa.distributed.ranks import DistributedError
from twa.dtensors import local
from twa.io.errors import CandidateError, CandidateWarning, TwaError

KINDS = ("memory", "files")
UNIFORM = twa.averages.uniform(4)


class Net(nn.Module):
    """Sizes that no number of ranks divides, a tied weight, buffers of every kind."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.one = nn.Parameter(torch.ones(1))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))

    def forward(self, tokens):
        return self.head(self.norm(torch.tanh(self.body(self.embed(tokens)))) * self.one)


def net(group=None, kind="whole", seed=0):
    """A model on the ranks of a group: whole, a copy on each, sharded, or sharded copies."""
    torch.manual_seed(seed)
    model = Net()
    if kind == "sharded":
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    elif kind == "sharded copies":
        names = {"mesh_dim_names": ("copies", "shards")}
        fully_shard(model, mesh=DeviceMesh("cpu", torch.arange(4).view(2, 2), **names))
    return model


@torch.no_grad()
def move(model, seed):
    """One step of a run: the same for the same seed, however the model is sharded."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        step = 0.1 * torch.randn(p.shape, generator=g)
        if isinstance(p, DTensor):
            step = distribute_tensor(step, p.device_mesh, p.placements)
        p += step
    model.norm.running_mean += torch.rand(6, generator=g)
    model.norm.num_batches_tracked += 1


def recorded(group, kind, path, steps=range(4), **options):
    """A recorder after so many steps."""
    model = net(group, kind)
    recorder = twa.Recorder(model, every=1, path=path, group=group, **options)
    begun = recorder.count
    for k in range(max(steps) + 1):
        move(model, k)
        if k in steps and (k > begun or not begun):
            recorder.record(k)
    return recorder


def record(group, kind, path):
    """The average in the model of each rank, the model before and after, and written to a file."""
    recorder = recorded(group, kind, path)
    before = whole(recorder.model)
    with recorder.averaged("uniform"):
        inside = whole(recorder.model)
    after = whole(recorder.model)
    if path:
        recorder.save(f"{path}-saved.safetensors", "uniform")
    recorder.apply("uniform")
    applied = whole(recorder.model)
    recorder.close()
    return inside, before, after, applied, recorder.steps


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def near(a, b):
    for key, t in b.items():
        torch.testing.assert_close(a[key], t, rtol=1e-5, atol=1e-5, msg=key)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The recording of one process, of copies, which is the same for all."""
    recorder = recorded(None, "whole", tmp_path_factory.mktemp("single") / "run")
    recorder.close()
    return twa.Candidates(recorder.path)


@pytest.mark.parametrize(
    "kind, size", [("sharded", 2), ("copies", 2), ("sharded copies", 4), exhaustive("sharded", 4)]
)
@pytest.mark.parametrize("where", KINDS)
def test_averages(ranks, single, tmp_path, kind, size, where):
    """They are the same on all ranks, near those of one process; what was there comes back."""
    path = tmp_path / "run" if where == "files" else None
    results = ranks.run(size, record, kind, path)
    expected = single.average(UNIFORM)
    for inside, before, after, applied, _ in results:
        assert same(inside, results[0][0]) and same(inside, applied)
        assert same(before, after) and same(before, results[0][1])
        # tiles of 128 weights begin elsewhere where tensors are cut
        for key, t in expected.items():
            torch.testing.assert_close(inside[key], t, rtol=0, atol=0.02)
        if kind == "copies":
            near(inside, expected)
    written = [r[4] for r in results if r[4]]
    assert len(written) == {"copies": 1, "sharded copies": 2}.get(kind, size)
    assert all(steps == [0, 1, 2, 3] for steps in written)
    if path:
        found = twa.Candidates(path)
        average = found.average(UNIFORM)
        assert same(average, results[0][0])
        assert same(twa.Candidates(f"{path}-saved.safetensors").average(torch.ones(1)), average)
        net().load_state_dict(average, strict=True)


def read(group, path, sharding):
    """The candidates and what a subspace of them writes into a model."""
    candidates = twa.Candidates(path)
    found = [{key: c.tensor(key).clone() for key in c.info} for c in candidates]
    kind = "sharded" if sharding == "columns" else "copies"
    model = net(group, kind, seed=1)
    # 32 bits: packed rows that are cut are packed again
    options = {"sharding": sharding, "group": group, "center": UNIFORM, "bits": 32}
    subspace = twa.Subspace.from_candidates(model, candidates, basis="differences", **options)
    tokens = torch.arange(8)
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.1)
    model.eval()
    F.cross_entropy(model(tokens), tokens).backward()
    before = whole(model)
    optimizer.step()
    return found, before, whole(model), subspace.coefficients.detach().clone()


def test_other_numbers_of_ranks_read_it(ranks, tmp_path):
    """Written by 2 ranks, read by 1, 2 and 4: the same candidates, bit for bit."""
    path = tmp_path / "run"
    ranks.run(2, record, "sharded", path)
    expected = [{key: c.tensor(key) for key in c.info} for c in twa.Candidates(path)]
    average = twa.Candidates(path).average(UNIFORM)
    results = {
        size: ranks.run(size, read, path, sharding)
        for size, sharding in ((1, "replicate"), (2, "columns"), (4, "columns"), (4, "replicate"))
    }
    for size, found in results.items():
        for candidates, center, stepped, x in found:
            assert all(map(same, candidates, expected)), size
            near(center, average)
            assert same(stepped, found[0][2]) and torch.equal(x, found[0][3])
            torch.testing.assert_close(x, results[1][0][3], rtol=1e-4, atol=1e-6)


def not_a_number(group, kind, path):
    """A record in which rank 1 has a NaN: its steps, warnings, and the average."""
    recorder = recorded(group, kind, path, steps=range(2))
    weight = local(recorder.model.body.weight)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for k in range(2, 5):
            move(recorder.model, k)
            kept = weight[0, 0].clone()
            if k == 2 and dist.get_rank(group) == 1:
                weight[0, 0] = torch.nan
            recorder.record(k)
            weight[0, 0] = kept
    with recorder.averaged("uniform"):
        inside = whole(recorder.model)
    beta, steps = recorder.beta("last"), recorder.steps
    state = recorder.state_dict()
    recorder.close()
    said = [str(w.message) for w in seen if w.category is CandidateWarning]
    other = twa.Recorder(recorder.model, every=1, path=path, group=group, resume=bool(path))
    other.load_state_dict(state)
    with other.averaged("uniform"):
        again = whole(other.model)
    return inside, beta, steps, said, again


@pytest.mark.parametrize("where", KINDS)
def test_a_shard_that_is_not_a_number(ranks, tmp_path, where):
    """That snapshot counts for no rank; later ones do, and are right."""
    path = tmp_path / "run" if where == "files" else None
    first, second = ranks.run(2, not_a_number, "sharded", path)
    assert first[2] == [0, 1, 2, 3, 4] and second[2] == [0, 1, 3, 4]
    assert first[3] == [] and len(second[3]) == 1
    assert "step 2 is not recorded: 'body.weight' has 1 NaN or Inf of 18 weights" in second[3][0]
    assert same(first[0], second[0]) and same(first[0], first[4]) and same(second[0], second[4])
    assert first[1].tolist() == second[1].tolist() == [0, 0, 0, 1]
    model, snapshots = net(), []
    for k in range(5):
        move(model, k)
        snapshots.append(whole(model))
    kept = [snapshots[k] for k in (0, 1, 3, 4)]
    mean = torch.stack([s["body.weight"] for s in kept]).mean(0)
    assert (first[0]["body.weight"] - mean).abs().max() < 0.02
    if path:
        found = twa.Candidates(path)
        assert [c.step for c in found] == [0, 1, 3, 4]
        assert same(found.average(UNIFORM), first[0])
        assert (found[3].tensor("body.weight") - kept[3]["body.weight"]).abs().max() < 0.05


def go_on(group, kind, path):
    """A recorder that resumes: where it begins, and its steps at the end."""
    recorder = twa.Recorder(net(group, kind), every=1, path=path, group=group, resume=True)
    begun = recorder.count
    recorder.close()
    recorder = recorded(group, kind, path, steps=range(6), resume=True)
    recorder.close()
    return begun, recorder.steps


def without(folder, *names):
    for name in names:
        (folder / name).unlink()


def test_resume_when_a_rank_was_killed_earlier(ranks, tmp_path):
    """All go back to the last snapshot that all have, and on to the bits of an undisturbed run."""
    ranks.run(2, record, "sharded", tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    undisturbed = ranks.run(2, go_on, "sharded", tmp_path / "copy")
    assert [r[0] for r in undisturbed] == [3, 3]
    without(tmp_path / "run" / "rank_1_of_2", "step_2.safetensors", "step_3.safetensors")
    resumed = ranks.run(2, go_on, "sharded", tmp_path / "run")
    assert [r[0] for r in resumed] == [1, 1]
    assert [r[1] for r in resumed] == [r[1] for r in undisturbed] == [[0, 1, 2, 3, 4, 5]] * 2
    for rank in (0, 1):
        for path in (tmp_path / "run" / f"rank_{rank}_of_2").glob("*.safetensors"):
            other = tmp_path / "copy" / path.parent.name / path.name
            assert path.read_bytes() == other.read_bytes(), path


def refused(group, kind, path, resume):
    """The error of a recorder, on each rank."""
    try:
        twa.Recorder(net(group, kind), every=1, path=path, group=group, resume=resume)
    except TwaError as error:
        return str(error)
    return "none"


def test_a_rank_that_is_missing(ranks, tmp_path):
    """Nothing is read, and nothing is removed by a run that goes on."""
    path = tmp_path / "run"
    ranks.run(2, record, "sharded", path)
    for size, resume, said in (
        (2, False, "holds a recording; pass resume=True"),
        (4, True, "holds a recording of other ranks, rank_0_of_2/anchor_0.safetensors"),
        (1, True, "holds a recording of other ranks"),
    ):
        for text in ranks.run(size, refused, "sharded", path, resume):
            assert said in text, text
    with pytest.raises(TwaError, match="holds a recording of other ranks"):
        twa.Recorder(net(), every=1, path=path, resume=True)
    os_names = sorted(p.name for p in path.iterdir())
    assert os_names == ["rank_0_of_2", "rank_1_of_2"]
    shutil.rmtree(path / "rank_1_of_2")
    with pytest.raises(CandidateError, match="are the files of all ranks there"):
        twa.Candidates(path)
    for text in ranks.run(2, refused, "sharded", path, True):
        assert "the ranks have no snapshot in common: rank 0 has 4, rank 1 has 0" in text, text
    assert len(list((path / "rank_0_of_2").glob("*.safetensors"))) == 4


def through_dcp(group, kind, path, checkpoint):
    """Recorders of all ranks in one distributed checkpoint; the average before and after."""
    recorder = recorded(group, kind, path)
    with recorder.averaged("uniform"):
        before = whole(recorder.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"recorder": recorder}, checkpoint_id=checkpoint, process_group=group)
        recorder.close()
        other = twa.Recorder(
            recorder.model, every=1, path=path, group=group, resume=path is not None
        )
        dcp.load({"recorder": other}, checkpoint_id=checkpoint, process_group=group)
    with other.averaged("uniform"):
        after = whole(other.model)
    return before, after, other.count == recorder.count


@pytest.mark.parametrize("kind", ["sharded", exhaustive("copies")])
@pytest.mark.parametrize("where", KINDS)
def test_one_checkpoint_of_all_ranks(ranks, tmp_path, kind, where):
    """Each rank gets its own snapshots back, not those of the first."""
    path = tmp_path / "run" if where == "files" else None
    for before, after, counts in ranks.run(2, through_dcp, kind, path, tmp_path / "checkpoint"):
        assert same(before, after) and counts


def odd_models(group):
    """Why they are refused, on each rank."""
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = FullyShardedDataParallel(nn.Linear(4, 4), process_group=group, device_id="cpu")
    for model in (nn.Linear(4, 4 + dist.get_rank(group)), old):
        try:
            twa.Recorder(model, every=1, group=group)
            said.append("none")
        except (TwaError, DistributedError) as error:
            said.append(str(error))
    return said


def test_models_that_are_no_copies(ranks):
    for differs, old in ranks.run(2, odd_models):
        assert "the ranks do not have the same model" in differs
        assert "expected fully_shard" in old


def from_rank_0(group):
    """The first rank's state on all ranks, as a script loads a checkpoint of copies."""
    recorder = recorded(group, "copies", None)
    states = [recorder.state_dict()]
    dist.broadcast_object_list(states, 0, group=group)
    other = twa.Recorder(net(group, "copies"), every=1, group=group)
    other.load_state_dict(states[0])
    other.apply("uniform")
    return whole(other.model)


def test_copies_load_the_state_of_the_first(ranks, single):
    first, second = ranks.run(2, from_rank_0)
    assert same(first, second)
    near(first, single.average(UNIFORM))


def evaluated(group, before):
    """Outputs before, inside and after averaged(), with forwards that gather what FSDP2 shards."""
    recorder = recorded(group, "sharded", None)
    model, tokens = recorder.model.eval(), torch.arange(8) % 11

    @torch.no_grad()
    def outputs():
        return model(tokens).clone()

    start, weights = outputs() if before else None, whole(model)
    if before:
        outputs()  # the root stays gathered
    with recorder.averaged("uniform"):
        inside = outputs()
    return start, inside, outputs(), weights, whole(model)


@pytest.mark.parametrize("before", [True, False])
def test_what_was_gathered_does_not_outlive_an_average(ranks, before):
    for start, inside, after, weights, left in ranks.run(2, evaluated, before):
        assert same(weights, left)
        assert not torch.equal(inside, after)
        if before:
            assert torch.equal(start, after)


def begun_by_one(group, path):
    """All go on where only the first rank had begun."""
    recorder = recorded(group, "sharded", path, resume=True)
    recorder.close()
    dist.barrier(group=group)
    return len(twa.Candidates(path))


def test_going_on_where_one_rank_had_begun(ranks, tmp_path):
    path = str(tmp_path / "run")
    ranks.run(2, record, "sharded", path)
    shutil.rmtree(tmp_path / "run" / "rank_1_of_2")
    for step in (1, 2, 3):
        (tmp_path / "run" / "rank_0_of_2" / f"step_{step}.safetensors").unlink()
    assert ranks.run(2, begun_by_one, path) == [4, 4]
