"""twa.Recorder, Subspace and IterateAverage in a training with FSDP2 and its checkpoints: two ranks
train, save all through torch.distributed.checkpoint and go on; 1 and 4 ranks read what they wrote.
"""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import twa
from states import whole
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
POLICIES = {"fp32": {}, "bf16": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 13), nn.Linear(13, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks that are sharded by themselves, of sizes that no number of ranks divides."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(11, 6), nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 11)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(group=None, policy="fp32", seed=0):
    """Sharded over a group, block by block; whole without one."""
    torch.manual_seed(seed)
    model = Net()
    if group is not None:
        mesh = DeviceMesh.from_group(group, "cpu")
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh, **POLICIES[policy])
    return model


class Run:
    """A training of one rank, with its own batches."""

    def __init__(self, group, path, policy="fp32", rule="adamw", **options):
        self.group, self.model = group, net(group, policy)
        make = {
            "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
            "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        }
        self.optimizer = make[rule](self.model.parameters())
        given = {"every": 2, "path": path, "group": group} | options
        self.recorder = twa.Recorder(self.model, **given)
        self.recorder.attach(self.optimizer)

    def train(self, steps, begin=0):
        """The weights after each step that is recorded."""
        rank, seen = dist.get_rank(self.group), []
        for k in range(begin, begin + steps):
            g = torch.Generator().manual_seed(100 * rank + k)
            tokens = torch.randint(11, (8,), generator=g)
            F.cross_entropy(self.model(tokens), tokens.roll(1)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if k % 2:
                seen.append(whole(self.model))
        return seen


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_near(found, expected, limit):
    for key, t in expected.items():
        assert (found[key] - t).abs().max() <= limit, key


# A training, and its checkpoint -------------------------------------------------------------------


def trained(group, path, folder, policy):
    """Trains, saves, trains on; then again from the checkpoint. Both averages and states."""
    run = Run(group, path, policy)
    assert isinstance(run.model.head.weight, DTensor)
    seen = run.train(6)
    model, optimizer = get_state_dict(run.model, run.optimizer)
    kept = {"model": model, "optimizer": optimizer, "recorder": run.recorder}
    dcp.save(kept, checkpoint_id=folder, process_group=group)
    seen += run.train(6, begin=6)
    live = whole(run.model)
    with run.recorder.averaged("ema", half_life=4):
        inside = whole(run.model)
        F.cross_entropy(run.model(torch.arange(8)), torch.arange(8))  # gathers
    assert same(whole(run.model), live)
    run.recorder.close()
    other = Run(group, path, policy, resume=path is not None)
    model, optimizer = get_state_dict(other.model, other.optimizer)
    kept = {"model": model, "optimizer": optimizer, "recorder": other.recorder}
    dcp.load(kept, checkpoint_id=folder, process_group=group)
    set_state_dict(other.model, other.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    assert other.recorder.count == 6 and other.recorder.steps == [2, 4, 6]
    other.train(6, begin=6)
    assert same(whole(other.model), live) and other.recorder.steps == [2, 4, 6, 8, 10, 12]
    other.recorder.apply("ema", half_life=4)
    applied = whole(other.model)
    other.recorder.close()
    return seen, inside, applied


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("where", ["memory", "files"])
def test_train_average_and_go_on(ranks, tmp_path, where, policy):
    """As if it had never stopped. What is recorded are the float32 weights, whatever FSDP2
    computes in; 1 and 4 ranks read them."""
    path = tmp_path / "run" if where == "files" else None
    (seen, inside, applied), other = ranks.run(2, trained, path, tmp_path / "c", policy)
    assert same(inside, applied) and same(inside, other[1]) and same(inside, other[2])
    beta = twa.averages.of_steps([2, 4, 6, 8, 10, 12], "ema", half_life=4)
    expected = {
        key: torch.einsum("n,n...->...", beta.float(), torch.stack([s[key] for s in seen]))
        for key in inside
    }
    assert_near(inside, expected, 0.003)
    assert all(t.dtype == torch.float32 for t in inside.values())
    if where == "memory":
        return
    found = twa.Candidates(path)
    assert [c.step for c in found] == [2, 4, 6, 8, 10, 12]
    assert same(found.average(beta), inside)
    for states in ranks.run(4, read, path, beta):
        assert same(states, inside)
    for c, state in zip(found, seen, strict=True):  # two steps move weights by 0.02
        assert_near({key: c.tensor(key) for key in c.info}, state, 0.008)


def read(group, path, beta):
    """The average in a model that other ranks share."""
    model = net(group, seed=1)
    twa.load_average(model, twa.Candidates(path), beta)
    return whole(model)


# Optimizers' states -------------------------------------------------------------------------------


def counted(group, rule):
    """Counts beside get_state_dict, which steps optimizers that have no state."""
    run = Run(group, None, rule=rule, every=1)
    counts, live = [], whole(run.model)
    get_state_dict(run.model, run.optimizer)
    counts.append(run.recorder.count)
    assert same(whole(run.model), live)
    run.train(2)
    get_state_dict(run.model, run.optimizer)
    counts.append(run.recorder.count)
    return counts, run.recorder.steps


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_steps_that_only_fill_the_optimizers_state(ranks, rule):
    assert ranks.run(2, counted, rule) == [([0, 2], [1, 2])] * 2


# Coefficients -------------------------------------------------------------------------------------


class Coefficients:
    """A subspace of a recording, its optimizer and the average, in training."""

    def __init__(self, group, path):
        self.group, self.model = group, net(group)
        self.subspace = twa.Subspace.from_candidates(
            self.model, twa.Candidates(path), basis="differences", group=group
        )
        self.optimizer = twa.SubspaceOptimizer(self.subspace, torch.optim.SGD, lr=0.5)
        self.average = twa.IterateAverage(self.subspace)

    def train(self, steps, begin=0):
        for k in range(begin, begin + steps):
            tokens = torch.arange(k, k + 8) % 11
            F.cross_entropy(self.model(tokens), tokens.roll(1)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update()

    def state(self):
        with self.average.applied():
            inside = whole(self.model)
        return self.subspace.coefficients.detach().clone(), whole(self.model), inside


def coefficients(group, path, folder):
    """Subspace, average and recorder in one checkpoint, and what they are after it is loaded."""
    first = Coefficients(group, path)
    first.train(3)
    kept = {"subspace": first.subspace, "average": first.average}
    dcp.save(kept, checkpoint_id=folder, process_group=group)
    before = first.state()
    first.train(2, begin=3)
    second = Coefficients(group, path)
    kept = {"subspace": second.subspace, "average": second.average}
    dcp.load(kept, checkpoint_id=folder, process_group=group)
    after = second.state()
    second.train(2, begin=3)
    return before, after, first.state(), second.state()


def test_coefficients_in_a_checkpoint(ranks, tmp_path):
    """Subspace and IterateAverage go on with the same bits, and the model is where they are."""
    ranks.run(2, trained, tmp_path / "run", tmp_path / "c", "fp32")
    for size in (1, 2):
        for results in ranks.run(size, coefficients, tmp_path / "run", tmp_path / f"x{size}"):
            for (x, model, inside), (y, other, again) in (results[:2], results[2:]):
                assert torch.equal(x, y) and same(model, other) and same(inside, again)
