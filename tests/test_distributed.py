"""Several ranks (gloo): every placement trains the coefficients that one process trains; what they send; what they refuse."""

import copy

import pytest
import ranks as pool
import torch
import torch.distributed as dist
import torch.nn.functional as F
import twa
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from twa import placement as placements
from twa.world import DistributedError

PLACEMENTS = ("replicate", "rows", "columns")
SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def ranks():
    made = pool.Ranks()
    yield made
    made.stop()


class Net(nn.Module):
    """Blocks, a tied weight, an unused parameter, a frozen one, sizes that no number of ranks divides, tensors of one element."""

    def __init__(self, width=6, hidden=9, tokens=11):
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width)) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(width), requires_grad=False)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens):
        h = self.embed(tokens) * self.frozen
        for block in self.blocks:
            h = h + block(h)
        return self.head(h * self.scale)


X = torch.randint(11, (16, 5), generator=torch.Generator().manual_seed(0))
Y = torch.randint(11, (16, 5), generator=torch.Generator().manual_seed(1))


def loss_of(model, rank=0, size=1):
    x, y = X[rank::size], Y[rank::size]
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def write_heap(folder, sizes):
    torch.manual_seed(0)
    base = Net(*sizes)
    for k in range(6):
        model = copy.deepcopy(base)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.2 * torch.randn_like(p) * (6 / sizes[0]) ** 0.5
        save_file({name: t for name, t in model.state_dict().items() if name != "head.weight"}, folder / f"c{k}.safetensors")
    return folder, sizes


@pytest.fixture(scope="module")
def heap(tmp_path_factory):
    """Six candidates around a common point."""
    return write_heap(tmp_path_factory.mktemp("heap"), (6, 9, 11))


@pytest.fixture(scope="module")
def aligned_heap(tmp_path_factory):
    """The same, of a size at which shards of 1, 2 and 4 ranks begin at multiples of 128 columns: packed shards are then parts of the whole's packed
    rows. Elsewhere quantisation groups end where shards do, and P is another rounding of the same rows."""
    return write_heap(tmp_path_factory.mktemp("aligned"), (512, 512, 16))


def new_model(placement, group, sizes, policy=None):
    torch.manual_seed(3)
    model = Net(*sizes)
    if placement == "columns":
        mesh = DeviceMesh.from_group(group, "cpu")
        policy = policy or MixedPrecisionPolicy()
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def whole(model):
    """The model's weights on every rank."""
    placements.reshard(model)
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in model.state_dict().items()}


def train(group, heap, placement, steps=50, rule="AdamW", low_memory=False, accumulate=1, **options):
    """Coefficients and weights after training on this rank's share of the data; and the coefficients after each step."""
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    model = new_model(placement, group, heap[1])
    subspace = twa.Subspace.from_candidates(model, twa.Candidates(f"{heap[0]}/c*.safetensors"), placement=placement, group=group, **options)
    keywords = {"lr": 0.05 if rule == "AdamW" or heap[1][0] < 100 else 0.005} | ({"weight_decay": 0.01} if rule == "AdamW" else {"momentum": 0.9})
    optimizer = twa.SubspaceOptimizer(subspace, getattr(torch.optim, rule), low_memory=low_memory, **keywords)
    history = []
    for step in range(steps):
        for part in range(accumulate):
            last = part + 1 == accumulate
            if low_memory and not last and step % 2:  # both ways to accumulate
                with optimizer.no_sync():
                    (loss_of(model, rank * accumulate + part, size * accumulate) / accumulate).backward()
            else:
                (loss_of(model, rank * accumulate + part, size * accumulate) / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(subspace.coefficients.detach().clone())
    subspace.placement.world.check()
    return history[-1], whole(model), history, subspace.merge_weights()


def assert_same_run(results, single, tolerance=1e-6):
    scale = max(1.0, float(single[0].abs().max()))
    for coefficients, weights, history, beta in results:
        assert torch.equal(coefficients, results[0][0]), "the ranks' coefficients differ"
        assert all(torch.equal(w, results[0][1][name]) for name, w in weights.items()), "the ranks' weights differ"
        for ours, theirs in zip(history, single[2], strict=True):
            assert (ours - theirs).abs().max() <= tolerance * scale
        for name, w in single[1].items():
            torch.testing.assert_close(weights[name], w, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(beta, single[3], rtol=0, atol=1e-5)
    assert single[0].abs().max() > 0.1, "nothing was learned"


#: Adam divides by the root of small squares, which makes float32's rounding of the smallest gradients visible
RULES = {"SGD": 1e-6, "AdamW": 5e-6}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("size", SIZES)
def test_equal_to_one_process(ranks, heap, aligned_heap, size, placement, rule):
    heap = aligned_heap if placement == "columns" else heap
    results = ranks.run(size, train, heap, placement, 50, rule)
    assert_same_run(results, train(None, heap, "single", 50, rule), RULES[rule])
    again = ranks.run(size, train, heap, placement, 50, rule)
    assert torch.equal(again[0][0], results[0][0]) and all(torch.equal(w, results[0][1][k]) for k, w in again[0][1].items())


OPTIONS = [
    dict(bits=32, granularity="model"),
    dict(bits=2, granularity="block", normalize="segment", center="last"),
    dict(bits=8, basis="orthonormal"),
    dict(bits=32, basis="orthonormal", granularity="model"),
    dict(precondition=True, granularity="block", rule="SGD"),
    dict(rule="SGD", low_memory=True, accumulate=2),
    dict(low_memory=True, granularity="model"),
    dict(accumulate=2, rule="SGD"),
]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_options_in_every_placement(ranks, heap, aligned_heap, placement, options):
    heap = aligned_heap if placement == "columns" and options.get("bits") != 32 else heap
    if placement == "rows" and (options.get("low_memory") or options.get("precondition")):
        with pytest.raises(AssertionError, match="not with placement='rows'"):
            ranks.run(2, train_with, heap, placement, options)
        return
    results = ranks.run(2, train_with, heap, placement, options)
    assert_same_run(results, train_with(None, heap, "single", options), 1e-5 if "precondition" in options else 5e-6)


def train_with(group, heap, placement, options):
    return train(group, heap, placement, steps=12, **options)
