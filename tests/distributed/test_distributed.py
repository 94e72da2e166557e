"""Several ranks (gloo): every sharding trains the coefficients that one process trains; what they
send; what they refuse.
"""

import copy
import pickle
import re
import sys
import textwrap
import types
from pathlib import Path
from unittest import mock

import fuzz_loading
import processes
import pytest
import states
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import twa
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from twa.basis import grams
from twa.distributed import choose
from twa.distributed import ranks as ranks_module
from twa.distributed.ranks import DistributedError, Ranks
from twa.distributed.traffic import Traffic
from twa.dtensors import local, reshard
from twa.io.key_map import match_model
from twa.packing.to_file import PackToFile

SHARDINGS = ("replicate", "rows", "columns")


class Net(nn.Module):
    """Blocks, a tied weight, an unused parameter, a frozen one, sizes that no number of ranks
    divides, tensors of one element.
    """

    def __init__(self, width=6, hidden=9, tokens=11):
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))
            for _ in range(2)
        )
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(3 if width < 100 else 1))
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
        save_file(
            {name: t for name, t in model.state_dict().items() if name != "head.weight"},
            folder / f"c{k}.safetensors",
        )
    return folder, sizes


@pytest.fixture(scope="module")
def heap(tmp_path_factory):
    """Six candidates around a common point."""
    return write_heap(tmp_path_factory.mktemp("heap"), (6, 9, 11))


@pytest.fixture(scope="module")
def aligned_heap(tmp_path_factory):
    """The same, of a size at which shards of 1 and 2 ranks begin at multiples of 128 columns:
    packed shards are then parts of the whole's packed rows. Elsewhere quantisation groups end where
    shards do, and P is another rounding of the same rows."""
    return write_heap(tmp_path_factory.mktemp("aligned"), (256, 256, 16))


@pytest.fixture(scope="module")
def aligned_for_4(tmp_path_factory):
    """As `aligned_heap`, for up to 4 ranks."""
    return write_heap(tmp_path_factory.mktemp("aligned-4"), (512, 512, 16))


def new_model(sharding, group, sizes, policy=None):
    torch.manual_seed(3)
    model = Net(*sizes)
    if sharding == "columns":
        mesh = DeviceMesh.from_group(group, "cpu")
        policy = policy or MixedPrecisionPolicy()
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def whole(model):
    """The model's weights on every rank."""
    reshard(model)
    return states.whole(model)


def train(group, heap, sharding, steps, rule="AdamW", low_memory=False, accumulate=1, **options):
    """Coefficients and weights after training on this rank's share of the data; and the
    coefficients after each step.
    """
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    model = new_model(sharding, group, heap[1])
    with mock.patch.object(grams, "MOST_TILES", 1 << 20):  # all of P, however it is cut
        subspace = twa.Subspace.from_candidates(
            model,
            twa.Candidates(f"{heap[0]}/c*.safetensors"),
            sharding=sharding,
            group=group,
            **options,
        )
    keywords = {"lr": 0.05 if rule == "AdamW" or heap[1][0] < 100 else 0.005} | (
        {"weight_decay": 0.01} if rule == "AdamW" else {"momentum": 0.9}
    )
    optimizer = twa.SubspaceOptimizer(
        subspace, getattr(torch.optim, rule), low_memory=low_memory, **keywords
    )
    history = []
    for step in range(steps):
        for part in range(accumulate):
            last = part + 1 == accumulate
            if low_memory and not last and step % 2:  # both ways to accumulate
                with optimizer.no_sync():
                    (
                        loss_of(model, rank * accumulate + part, size * accumulate) / accumulate
                    ).backward()
            else:
                (
                    loss_of(model, rank * accumulate + part, size * accumulate) / accumulate
                ).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(subspace.coefficients.detach().clone())
    subspace.sharding.ranks.check_drift()
    return history[-1], whole(model), history, subspace.merge_weights()


def assert_same_run(results, single, tolerance):
    scale = max(1.0, float(single[0].abs().max()))
    for coefficients, weights, history, beta in results:
        assert torch.equal(coefficients, results[0][0]), "the ranks' coefficients differ"
        assert all(torch.equal(w, results[0][1][name]) for name, w in weights.items()), (
            "the ranks' weights differ"
        )
        for ours, theirs in zip(history, single[2], strict=True):
            assert (ours - theirs).abs().max() <= tolerance * scale
        for name, w in single[1].items():
            torch.testing.assert_close(weights[name], w, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(beta, single[3], rtol=0, atol=3e-4)
    assert single[0].abs().max() > 0.1, "nothing was learned"


#: What the order of sums does to coefficients that move by 0.1 and more, ten times over: their
#: order is another on each CPU. Adam divides by the root of small squares, which makes the
#: rounding of the smallest gradients visible.
RULES = {"SGD": 1e-5, "AdamW": 5e-5}


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("size, rule", [(1, "SGD"), (2, "SGD"), (4, "SGD"), (2, "AdamW")])
def test_equal_to_one_process(ranks, heap, aligned_heap, aligned_for_4, size, sharding, rule):
    if sharding == "columns":
        heap = aligned_for_4 if size == 4 else aligned_heap
    results = ranks.run(size, train, heap, sharding, 20, rule)
    assert_same_run(results, train(None, heap, "single", 20, rule), RULES[rule])
    if rule == "SGD":
        again = ranks.run(size, train, heap, sharding, 20, rule)
        assert torch.equal(again[0][0], results[0][0]) and all(
            torch.equal(w, results[0][1][k]) for k, w in again[0][1].items()
        )


OPTIONS = [
    dict(bits=32, granularity="model"),
    dict(bits=2, granularity="block", normalize="none", center="last"),
    dict(basis="differences", rule="SGD"),
    dict(bits=2, basis="differences", granularity=128, center="last", rule="SGD"),
    dict(bits=32, basis="differences", constraint="simplex", granularity="model"),
    dict(bits=8, basis="orthonormal"),
    dict(bits=32, basis="orthonormal", granularity="model"),
    dict(constraint="simplex", granularity="block", rule="SGD"),
    dict(rule="SGD", low_memory=True, accumulate=2),
    dict(low_memory=True, granularity="model"),
    dict(accumulate=2, rule="SGD"),
    dict(granularity=128, bits=8, rule="SGD"),
    dict(granularity="fine", low_memory=True, rule="SGD"),
    dict(granularity="model", constraint="simplex", rule="SGD"),
    dict(balance=True, granularity="fine", rule="SGD"),
    dict(balance=True, basis="differences", low_memory=True, rule="SGD"),
    dict(balance=True, bits=32, granularity="model", rule="SGD"),
]


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items())
)
def test_options_in_every_placement(ranks, heap, aligned_heap, sharding, options):
    heap = aligned_heap if sharding == "columns" and options.get("bits") != 32 else heap
    if sharding == "rows" and options.get("balance"):
        ranks.run(2, refuses_balance, heap, options)
        return
    if sharding == "rows" and options.get("low_memory"):
        ranks.run(2, refuses_low_memory, heap, options)
        return
    if sharding == "rows" and options.get("basis") == "differences":
        ranks.run(2, refuses_differences, heap, options)
        return
    results = ranks.run(2, train_with, heap, sharding, options)
    assert_same_run(results, train_with(None, heap, "single", options), RULES["AdamW"])


def train_with(group, heap, sharding, options):
    return train(group, heap, sharding, steps=12, **options)


def refuses_low_memory(group, heap, options):
    with pytest.raises(ValueError, match="not with sharding='rows'"):
        train_with(group, heap, "rows", options)


def refuses_differences(group, heap, options):
    with pytest.raises(twa.TwaError, match="use 'replicate' or 'columns', or basis='deltas'"):
        train_with(group, heap, "rows", options)


def refuses_balance(group, heap, options):
    with pytest.raises(twa.TwaError, match="balance: expected a sharding other than 'rows'"):
        train_with(group, heap, "rows", options)


def rate(group, heap, sharding, options):
    """What `SubspaceOptimizer` takes without one."""
    model = new_model(sharding, group, heap[1])
    candidates = twa.Candidates(f"{heap[0]}/c*.safetensors")
    subspace = twa.Subspace.from_candidates(
        model, candidates, sharding=sharding, group=group, **options
    )
    return twa.SubspaceOptimizer(subspace).param_groups[0]["lr"]


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("balance", [False, True])
def test_the_rate_is_that_of_one_process(ranks, aligned_heap, sharding, balance):
    options = {"balance": balance and sharding != "rows"}
    found = ranks.run(2, rate, aligned_heap, sharding, options)
    assert found[0] == found[1]
    # rows of two ranks are not compared; samples of shards are others than those of the whole
    near = {"rows": 0.3, "columns": 0.02}.get(sharding, 1e-5)
    assert found[0] == pytest.approx(rate(None, aligned_heap, "single", options), rel=near)


class Packed(nn.Module):
    """Two layers, and between them a matrix that files have in three parts."""

    def __init__(self, part=fuzz_loading.Joining, wrap=lambda m: m):
        super().__init__()
        self.a, self.qkv, self.b = wrap(nn.Linear(4, 4)), part(), wrap(nn.Linear(4, 4))

    def forward(self, x):
        return self.b(self.a(x) @ self.qkv.qkv[:4])


def checkpointed_shards(group, folder):
    """FSDP2 around activation checkpointing, and files of another layout: trained and exported."""
    model = Packed(wrap=checkpoint_wrapper)
    mesh = DeviceMesh.from_group(group, "cpu")
    for block in (model.a, model.b):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    subspace = twa.Subspace.from_candidates(
        model, twa.Candidates(f"{folder}/c*.pt"), bits=32, sharding="columns", group=group
    )
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.1)
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    subspace.save(f"{folder}/out")
    return subspace.segments.labels, subspace.merge_weights()


def test_wrapped_shards_and_files_of_another_layout(ranks, tmp_path):
    states = []
    for k in range(3):
        torch.manual_seed(k)
        states.append(Packed(fuzz_loading.Apart).state_dict())
        for t in states[-1].values():
            nn.init.uniform_(t)
        torch.save(states[-1], tmp_path / f"c{k}.pt")
    labels, beta = ranks.run(2, checkpointed_shards, tmp_path)[0]
    assert labels == ["a.weight", "a.bias", "qkv.qkv", "b.weight", "b.bias"]
    assert (beta - 1 / 3).abs().max() > 1e-3  # it has moved
    exported = load_file(tmp_path / "out" / "averaged.safetensors")
    assert exported.keys() == states[0].keys()
    for key, t in exported.items():
        l = labels.index("qkv.qkv" if key.startswith("qkv") else key)
        mean = sum(b * s[key].double() for b, s in zip(beta[:, l], states, strict=True))
        torch.testing.assert_close(t.double(), mean, rtol=1e-5, atol=1e-6)


# What crosses the wire ---------------------------------------------------------------------------


def count_bytes(group, heap, sharding, low_memory=False):
    """Bytes of one step's messages on this rank: of forward and backward alone, and with the
    subspace's step.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    model = new_model(sharding, group, heap[1])
    with Traffic() as plain:
        loss_of(model, rank, size).backward()
    model.zero_grad()
    subspace = twa.Subspace.from_candidates(
        model, twa.Candidates(f"{heap[0]}/c*.safetensors"), sharding=sharding, group=group
    )
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=0.01, low_memory=low_memory)
    with Traffic() as traffic:
        loss_of(model, rank, size).backward()
        optimizer.step()
    D = sum(p.numel() for p in subspace.parameters)
    return plain.bytes, traffic.bytes, subspace.coefficients.numel(), D


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_bytes_on_the_wire(ranks, heap, sharding, low_memory):
    if sharding == "rows" and low_memory:
        return
    for plain, bytes_, nL, D in ranks.run(2, count_bytes, heap, sharding, low_memory):
        coefficients = 4 * nL + 8  # and the stamp
        assert plain == 0 or sharding == "columns"
        assert bytes_ - plain == coefficients + (8 * D if sharding == "rows" else 0)


# Sharded models ----------------------------------------------------------------------------------


def evaluate_between_steps(group, heap):
    """FSDP keeps the root's weights gathered after a forward without backward: the next one must
    not use them.
    """
    model = new_model("columns", group, heap[1])
    candidates = twa.Candidates(f"{heap[0]}/c*.safetensors")
    subspace = twa.Subspace.from_candidates(model, candidates, bits=32, group=group)
    alone = new_model("single", None, heap[1])
    reference = twa.Subspace.from_candidates(alone, candidates, bits=32, sharding="single")
    losses = []
    for k in range(3):
        with torch.no_grad():
            losses.append((float(loss_of(model)), float(loss_of(alone))))
        for s in (subspace, reference):
            s.set_merge_weights(twa.averages.candidate(6, k))
    return losses


def test_evaluation_sees_weights_that_were_just_written(ranks, heap):
    for losses in ranks.run(2, evaluate_between_steps, heap):
        assert len({round(b, 4) for _, b in losses}) == 3
        for ours, theirs in losses:
            assert ours == pytest.approx(theirs, rel=1e-5)


def read_own_bytes(group, heap):
    model = new_model("columns", group, heap[1])
    candidates = twa.Candidates(f"{heap[0]}/c*.safetensors")
    subspace = twa.Subspace.from_candidates(model, candidates, group=group)
    held = sum(h.shape.numel() for h in subspace.sharding.shards) * 4 * len(candidates)
    fixed = sum(candidates.info[key].nbytes for key in subspace.key_map.fixed.values()) * len(
        candidates
    )
    return (
        candidates.bytes_read,
        held + fixed,
        sum(i.nbytes for i in candidates.info.values()) * len(candidates),
    )


def test_a_rank_reads_its_own_bytes_only(ranks, aligned_for_4):
    for read, own, everything in ranks.run(4, read_own_bytes, aligned_for_4):
        assert read <= own + 1000 and own < 0.3 * everything


def hybrid(heap, kind):
    """Meshes of two dimensions:

    HSDP (copies of shards), tensor parallelism under FSDP, and beside plain data parallelism.
    """
    torch.manual_seed(3)
    model = Net(*heap[1])
    full = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("outer", "inner"))
    if kind == "hsdp":
        for block in model.blocks:
            fully_shard(block, mesh=full)
        fully_shard(model, mesh=full)
    else:
        for block in model.blocks:
            parallelize_module(
                block, full["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()}
            )
        if kind == "tensor and fsdp":
            for block in model.blocks:
                fully_shard(block, mesh=full["outer"])
            fully_shard(model, mesh=full["outer"])
    return model


def train_hybrid(group, heap, kind):
    model = hybrid(heap, kind)
    rank = dist.get_rank()
    data, parts = (rank, 4) if kind == "hsdp" else (rank // 2, 2)
    candidates = twa.Candidates(f"{heap[0]}/c*.safetensors")
    subspace = twa.Subspace.from_candidates(model, candidates, bits=32)
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.05, momentum=0.9)
    for _ in range(10):
        loss_of(model, data, parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert subspace.sharding.ranks.world_size == 4
    return subspace.coefficients.detach().clone(), whole(model)


@pytest.mark.parametrize("kind", ["hsdp", "tensor and fsdp", "tensor and data parallel"])
def test_two_dimensional_meshes(ranks, tmp_path, kind):
    heap = write_heap(tmp_path, (6, 8, 11))
    model = Net(*heap[1])
    subspace = twa.Subspace.from_candidates(
        model, twa.Candidates(f"{heap[0]}/c*.safetensors"), bits=32
    )
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.05, momentum=0.9)
    for _ in range(10):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    for coefficients, weights in ranks.run(4, train_hybrid, heap, kind):
        torch.testing.assert_close(coefficients, subspace.coefficients.detach(), rtol=0, atol=1e-5)
        for name, w in model.state_dict().items():
            torch.testing.assert_close(weights[name], w, rtol=1e-5, atol=1e-5)


# Mixed precision ---------------------------------------------------------------------------------


def train_mixed(group, heap, sharding, kind):
    """autocast over float32 weights, bfloat16 weights, or (columns) FSDP's own mixed precision."""
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if kind == "policy" and sharding == "columns"
        else None
    )
    torch.manual_seed(3)
    model = Net(*heap[1])
    if kind == "bfloat16":
        model = model.bfloat16()
    if sharding == "columns":
        mesh = DeviceMesh.from_group(group, "cpu")
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
        fully_shard(model, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
    subspace = twa.Subspace.from_candidates(
        model,
        twa.Candidates(f"{heap[0]}/c*.safetensors"),
        bits=32,
        sharding=sharding,
        group=group,
    )
    optimizer = twa.SubspaceOptimizer(
        subspace,
        torch.optim.SGD,
        lr=0.05,
        momentum=0.9,
        low_memory=kind == "autocast" and sharding != "rows",
    )
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            loss = loss_of(model, rank, size)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return (
        subspace.coefficients.detach().clone(),
        losses,
        {str(p.dtype) for p in subspace.parameters},
    )


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("kind", ["autocast", "bfloat16", "policy"])
def test_mixed_precision(ranks, heap, sharding, kind):
    if kind == "policy" and sharding != "columns":
        return
    reference, losses, _ = train_mixed(
        None, heap, "single", "autocast" if kind == "policy" else kind
    )
    results = ranks.run(2, train_mixed, heap, sharding, kind)
    for coefficients, ours, dtypes in results:
        assert torch.equal(coefficients, results[0][0]) and coefficients.dtype == torch.float32
        assert dtypes == {"torch.bfloat16" if kind == "bfloat16" else "torch.float32"}
        assert ours[-1] < ours[0]
        # rounded to 8 bits along the way
        assert (coefficients - reference).norm() < 0.1 * reference.norm()
    # bfloat16 has 2^-7 between a number and the next; it fell to less than half
    assert sum(ours[-1] for _, ours, _ in results) / 2 == pytest.approx(losses[-1], rel=0.05)


# Export ------------------------------------------------------------------------------------------


def save(group, heap, sharding, folder):
    model = new_model(sharding, group, heap[1])
    subspace = twa.Subspace.from_candidates(
        model, twa.Candidates(f"{heap[0]}/c*.safetensors"), sharding=sharding, group=group
    )
    subspace.set_merge_weights(twa.averages.ema(6, 0.5))
    subspace.save(folder, dcp=True)
    return whole(model)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_export_whole_and_sharded(ranks, heap, sharding, tmp_path):
    for _ in range(2):  # the second one replaces the first
        results = ranks.run(2, save, heap, sharding, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "averaged.safetensors",
        "averaged_dcp",
        "coefficients.json",
    }
    exported = load_file(tmp_path / "out" / "averaged.safetensors")
    loaded = {name: torch.zeros_like(t) for name, t in exported.items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "out" / "averaged_dcp", no_dist=True)
    assert exported.keys() == twa.Candidates(f"{heap[0]}/c0.safetensors").info.keys()
    for name, t in exported.items():
        assert torch.equal(t, results[0][name]) and torch.equal(t, loaded[name]), name
    read = twa.Candidates(tmp_path / "out" / "averaged_dcp")[0]
    assert read.info == twa.Candidates(tmp_path / "out" / "averaged.safetensors")[0].info
    for name, t in exported.items():
        assert torch.equal(read.tensor(name), t), name
        for begin, end in ((0, t.numel()), (t.numel() // 3, t.numel() // 2)):
            assert torch.equal(read.columns(name, begin, end), t.reshape(-1)[begin:end])
    if sharding == "columns":  # every rank wrote its own part
        assert len(list((tmp_path / "out" / "averaged_dcp").glob("*.distcp"))) == 2


def load_packed(group, heap, sharding, path):
    """This rank's part of the basis and the weights that it makes: loaded, and packed here."""
    candidates = twa.Candidates(f"{heap[0]}/c*.safetensors")
    found = []
    for make in (
        lambda m, **o: twa.Subspace.load(path, m, **o),
        lambda m, **o: twa.Subspace.from_candidates(m, candidates, **o),
    ):
        model = new_model(sharding, group, heap[1])
        s = make(model, sharding=sharding, group=group)
        with torch.no_grad():
            s.coefficients.copy_(
                torch.randn(s.coefficients.shape, generator=torch.Generator().manual_seed(0))
            )
        s.write_weights()
        parts = (
            s.basis.codes,
            s.basis.scales.view(torch.uint8),
            s.basis.row_scale,
            s.basis.tile_segment,
            s.coordinates.divisor,
        )
        found.append((list(parts), whole(model)))
    return found


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_packed_basis_on_disk(ranks, aligned_heap, heap, sharding, tmp_path):
    """Each rank takes its part of the file: what it would have packed."""
    of = aligned_heap if sharding == "columns" else heap
    path = tmp_path / "basis.safetensors"
    PackToFile(path, Net(*of[1]), twa.Candidates(f"{of[0]}/c*.safetensors")).run()
    for (loaded, weights), (packed, expected) in ranks.run(2, load_packed, of, sharding, path):
        # its center is summed over ranks, in another order than in one process
        if sharding == "rows":
            assert [t.shape for t in loaded] == [t.shape for t in packed]
        else:
            assert all(torch.equal(a, b) for a, b in zip(loaded, packed, strict=True))
        for key in expected:
            torch.testing.assert_close(
                weights[key], expected[key], rtol=0, atol=1e-5 if sharding == "rows" else 0
            )


def load_differences(group, heap, sharding, path):
    """This rank's part of a basis of differences from its file, and the weights that it makes."""
    model = new_model(sharding, group, heap[1])
    s = twa.Subspace.load(path, model, sharding=sharding, group=group)
    s.set_merge_weights(twa.averages.ema(6, 0.5))
    return s.basis.n, s.coordinates.divisor, whole(model)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_differences_on_disk(ranks, aligned_heap, sharding, tmp_path):
    """Rows of them are cut as any others, though ranks cannot make them like that."""
    candidates = twa.Candidates(f"{aligned_heap[0]}/c*.safetensors")
    model = Net(*aligned_heap[1])
    subspace = twa.Subspace.from_candidates(model, candidates, basis="differences")
    subspace.save(tmp_path, basis=True)
    subspace.set_merge_weights(twa.averages.ema(6, 0.5))
    found = ranks.run(2, load_differences, aligned_heap, sharding, tmp_path / "basis.safetensors")
    assert [n for n, _, _ in found] == ([2, 3] if sharding == "rows" else [5, 5])
    for _, divisor, weights in found:
        assert torch.equal(divisor, subspace.coordinates.divisor)
        for key, t in whole(model).items():
            torch.testing.assert_close(weights[key], t, rtol=0, atol=1e-5)


def few_rows(group, heap, path):
    with pytest.raises(twa.TwaError, match="the basis has 1 rows, fewer than there are ranks"):
        twa.Subspace.load(path, Net(*heap[1]), sharding="rows", group=group)


def test_fewer_rows_on_disk_than_ranks(ranks, heap, tmp_path):
    candidates = twa.Candidates([heap[0] / "c0.safetensors", heap[0] / "c1.safetensors"])
    subspace = twa.Subspace.from_candidates(Net(*heap[1]), candidates, basis="differences")
    subspace.save(tmp_path, basis=True)
    ranks.run(2, few_rows, heap, tmp_path / "basis.safetensors")


def packed_differences(group, heap):
    """What this rank holds of a basis of differences that ranks have packed together."""
    s = twa.Subspace.from_candidates(
        Net(*heap[1]),
        twa.Candidates(f"{heap[0]}/c*.safetensors"),
        basis="differences",
        sharding="single" if group is None else "replicate",
        group=group,
    )
    scales = s.basis.scales.view(torch.uint8)
    return [s.basis.codes, scales, s.basis.row_scale, s.basis.divisor, *s.center]


def test_replicas_of_differences_have_the_bits_of_one_process(ranks, heap):
    expected = packed_differences(None, heap)
    for found in ranks.run(2, packed_differences, heap):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Refusals ----------------------------------------------------------------------------------------


def refused(group, heap, what):
    """The error of each rank."""
    rank = dist.get_rank(group)
    candidates, model, options = (
        twa.Candidates(f"{heap[0]}/c*.safetensors"),
        Net(*heap[1]),
        {"sharding": "replicate"},
    )
    if what == "files" and rank == 1:
        candidates = twa.Candidates(f"{heap[0]}/other/c*.safetensors")
    elif what == "order" and rank == 1:
        candidates = twa.Candidates([heap[0] / f"c{k}.safetensors" for k in (0, 3, 2, 1, 4, 5)])
    elif what == "bad bits" and rank == 1:
        options["bits"] = 7
    elif what == "model" and rank == 1:
        model.blocks[0][0].bias.requires_grad = False
    elif what == "options" and rank == 1:
        options["bits"] = 2
    elif what == "version" and rank == 1:
        ranks_module.__version__ = "0.0.0"
    elif what in ("nan", "nan rows"):
        candidates = twa.Candidates(f"{heap[0]}/nan/c*.safetensors")
        options["sharding"] = "rows" if what == "nan rows" else "replicate"
    elif what == "rows":
        candidates = twa.Candidates([c.path for c in candidates][:1])
        options["sharding"] = "rows"
    elif what == "columns":
        options["sharding"] = "columns"
    elif what == "ddp":
        model = nn.parallel.DistributedDataParallel(
            model, process_group=group, find_unused_parameters=True
        )
    elif what == "sharded":
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    elif what == "partial":
        mesh = DeviceMesh.from_group(group, "cpu")
        model.scale = nn.Parameter(DTensor.from_local(model.scale.detach(), mesh, [Partial()]))
        options["sharding"] = "auto"
    try:
        twa.Subspace.from_candidates(model, candidates, group=group, **options)
    except (ValueError, DistributedError) as error:
        return type(error).__name__, str(error)
    finally:
        ranks_module.__version__ = VERSION
    return "nothing", ""


def test_nccl_needs_a_gpu(heap):
    """As far as it can be seen without one."""
    ranks, model, candidates = Ranks(), Net(*heap[1]), twa.Candidates(f"{heap[0]}/c*.safetensors")
    ranks.backend = "nccl"
    with pytest.raises(ValueError, match="NCCL needs the model on a CUDA device, found cpu"):
        choose.choose_sharding(
            "replicate", model, candidates, match_model(model, candidates)[1], 4, ranks
        )


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_nccl_needs_the_model_on_the_current_device(heap, monkeypatch, backend):
    """Its collectives of what is not on a GPU, and those of Python objects, go through the current
    one.
    """
    ranks, model, candidates = Ranks(), Net(*heap[1]), twa.Candidates(f"{heap[0]}/c*.safetensors")
    ranks.backend = backend
    monkeypatch.setattr(
        choose, "local", lambda parameter: types.SimpleNamespace(device=torch.device("cuda:1"))
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(
        ValueError,
        match=r"current device, cuda:0, and the model is on cuda:1; call torch\.cuda\.set_device",
    ):
        choose.choose_sharding(
            "replicate", model, candidates, match_model(model, candidates)[1], 4, ranks
        )


def held_bytes(group, heap):
    subspace = twa.Subspace.from_candidates(
        new_model("columns", group, heap[1]),
        twa.Candidates(f"{heap[0]}/c*.safetensors"),
        group=group,
    )
    weights = sum(local(p).numel() * 4 for p in subspace.parameters)
    return subspace.basis.nbytes, sum(c.numel() * 4 for c in subspace.center), weights


def test_two_ranks_hold_half_each(ranks, aligned_heap):
    """Basis, center and weights; bench/distributed.py measures the peak."""
    alone = twa.Subspace.from_candidates(
        Net(*aligned_heap[1]), twa.Candidates(f"{aligned_heap[0]}/c*.safetensors")
    )
    whole = (
        alone.basis.nbytes,
        sum(c.numel() * 4 for c in alone.center),
        sum(p.numel() * 4 for p in alone.parameters),
    )
    for held in ranks.run(2, held_bytes, aligned_heap):
        assert all(0.49 * w <= h <= 0.52 * w for h, w in zip(held, whole, strict=True)), (
            held,
            whole,
        )


VERSION = twa.__version__
REFUSALS = {
    "files": (
        r"do not have the same candidate 4: rank 0 has c4 \([0-9a-f]+\), rank 1 has c4"
        r" \([0-9a-f]+\)"
    ),
    "order": (
        r"do not have the same candidate 1: rank 0 has c1 \([0-9a-f]+\), rank 1 has c3"
        r" \([0-9a-f]+\)"
    ),
    "model": "do not have the same model",
    "options": "do not have the same bits: rank 0 has 4, rank 1 has 2",
    "bad bits": "bits: expected one of .*, found 7",
    "version": f"same version of twa: rank 0 has {re.escape(VERSION)}, rank 1 has 0.0.0",
    "nan": "c2.safetensors: tensor 'blocks.1.0.weight' has 1 NaN",
    "nan rows": "c2.safetensors: tensor 'blocks.1.0.weight' has 1 NaN",
    "rows": "at most one rank per candidate, 1, found 2 ranks",
    "columns": "call torch.distributed.fsdp.fully_shard",
    "ddp": "pass model.module",
    "sharded": "parameters are sharded .DTensor.; expected 'columns'",
    "partial": "'scale': expected Shard or Replicate",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_every_rank_refuses(ranks, heap, what):
    """What is wrong on one rank stops all of them, with its reason."""
    for name, key in (("other", "c4"), ("nan", "c2")):
        folder = Path(heap[0]) / name
        folder.mkdir(exist_ok=True)
        for k in range(6):
            state = load_file(Path(heap[0]) / f"c{k}.safetensors")
            if f"c{k}" == key:
                state["blocks.1.0.weight"][0, 0] = float("nan") if name == "nan" else 0.123
            save_file(state, folder / f"c{k}.safetensors")
    answers = ranks.run(2, refused, heap, what)
    for kind, message in answers:
        assert kind in ("CandidateError", "TwaError", "DistributedError") and re.search(
            REFUSALS[what], message
        ), (kind, message)


def drift(group, heap):
    subspace = twa.Subspace.from_candidates(
        Net(*heap[1]),
        twa.Candidates(f"{heap[0]}/c*.safetensors"),
        sharding="replicate",
        group=group,
    )
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.1)
    rank = dist.get_rank(group)
    caught = []
    for step in range(12):
        loss_of(subspace.model, rank, 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 4:
            good = optimizer.state_dict()
        if step == 5 and rank == 1:
            with torch.no_grad():
                subspace.coefficients[0, 0] += 1e-6
        if step in (5, 11):
            try:
                optimizer.state_dict()
            except DistributedError as error:
                caught.append((step, str(error)))
    optimizer.load_state_dict(good)  # equal again
    loss_of(subspace.model, rank, 2).backward()
    optimizer.step()
    optimizer.state_dict()
    return caught


def test_drift_is_noticed(ranks, heap):
    for caught in ranks.run(2, drift, heap):
        assert [step for step, _ in caught] == [11] and "drifted apart" in caught[0][1]


def choose_by_memory(group, heap):
    candidates, chosen = twa.Candidates(f"{heap[0]}/c*.safetensors"), []
    for free in (1 << 40, 11000, 1000):  # replicate needs 10112 bytes beside the weights, rows 7584
        choose.free_memory = lambda device, free=free: free if dist.get_rank(group) else 1 << 40
        try:
            chosen.append(
                twa.Subspace.from_candidates(
                    Net(*heap[1]), candidates, bits=32, group=group
                ).sharding.name
            )
        except ValueError as error:
            chosen.append(str(error))
    chosen.append(
        twa.Subspace.from_candidates(
            new_model("columns", group, heap[1]), candidates, bits=32, group=group
        ).sharding.name
    )
    return chosen


def test_auto_goes_by_the_smallest_memory(ranks, heap):
    for replicate, rows, neither, sharded in ranks.run(2, choose_by_memory, heap):
        assert (replicate, rows, sharded) == (
            "replicate",
            "rows",
            "columns",
        ) and "fit into no rank's memory" in neither
    ranks.stop()  # free_memory was replaced there
    assert (
        twa.Subspace.from_candidates(
            Net(*heap[1]), twa.Candidates(f"{heap[0]}/c*.safetensors")
        ).sharding.name
        == "single"
    )


def average_bn(group):
    torch.manual_seed(0)
    model, data = (
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)),
        [torch.randn(b, 4) for b in (8, 3, 8, 5, 1)],
    )
    mine = data if group is None else data[dist.get_rank(group) :: dist.get_world_size(group)]
    used = twa.update_bn(mine, model, group=group)
    return used, model[1].running_mean, model[1].running_var


def test_update_bn_over_ranks(ranks):
    expected = average_bn(None)
    for used, mean, var in ranks.run(2, average_bn):
        assert used == expected[0] == 4
        torch.testing.assert_close(mean, expected[1])
        torch.testing.assert_close(var, expected[2])


# Uncommon uses -----------------------------------------------------------------------------------


def discard(group, heap):
    """Coefficients' gradients after backward calls whose results were thrown away: a micro-batch,
    and one that failed.
    """
    rank = dist.get_rank(group)
    subspace = twa.Subspace.from_candidates(
        Net(*heap[1]),
        twa.Candidates(f"{heap[0]}/c*.safetensors"),
        sharding="replicate",
        group=group,
    )
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.1, low_memory=True)
    found = []
    loss_of(subspace.model, rank, 2).backward()
    found.append(subspace.coefficients.grad.clone())
    optimizer.zero_grad()
    with optimizer.no_sync():
        (100 * loss_of(subspace.model, rank, 2)).backward()
    optimizer.zero_grad()
    loss_of(subspace.model, rank, 2).backward()
    found.append(subspace.coefficients.grad.clone())
    optimizer.zero_grad()

    def fail(grad):
        raise ValueError("a bad batch")

    for clean in (True, False):
        # the last gradient that backward makes
        handle = subspace.model.embed.weight.register_hook(fail)
        with pytest.raises(ValueError, match="a bad batch"):
            loss_of(subspace.model, rank, 2).backward()
        handle.remove()
        if clean:
            optimizer.zero_grad()
        else:
            with pytest.raises(RuntimeError, match="After an error in backward, call optimizer"):
                loss_of(subspace.model, rank, 2).backward()
            subspace.model.zero_grad()
        loss_of(subspace.model, rank, 2).backward()
        found.append(subspace.coefficients.grad.clone())
        optimizer.zero_grad()
    return found


def test_discarded_gradients_do_not_come_back(ranks, heap):
    for first, *others in ranks.run(2, discard, heap):
        assert all(torch.equal(g, first) for g in others)


def line_search(group, heap):
    model = Net(*heap[1])
    subspace = twa.Subspace.from_candidates(
        model,
        twa.Candidates(f"{heap[0]}/c*.safetensors"),
        sharding="replicate",
        group=group,
        bits=32,
    )
    optimizer = twa.SubspaceOptimizer(
        subspace, torch.optim.LBFGS, max_iter=15, line_search_fn="strong_wolfe"
    )
    rank, calls = dist.get_rank(group), 0

    def closure():
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = loss_of(model, rank, 2) * (1 + rank)  # ranks whose own losses differ much
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.state_dict()
    return calls, subspace.coefficients.detach().clone()


def test_a_line_search_goes_by_the_mean_loss(ranks, heap):
    (calls, x), (theirs, y) = ranks.run(2, line_search, heap)
    assert calls == theirs > 5 and torch.equal(x, y) and x.abs().max() > 0.1


def copies(group, heap):
    subspace = twa.Subspace.from_candidates(
        Net(*heap[1]),
        twa.Candidates(f"{heap[0]}/c*.safetensors"),
        sharding="replicate",
        group=group,
    )
    optimizer = copy.deepcopy(
        twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.1, low_memory=True)
    )
    loss_of(optimizer.subspace.model, dist.get_rank(group), 2).backward()
    optimizer.step()
    with pytest.raises(TypeError, match="of several ranks cannot be pickled"):
        pickle.dumps(optimizer)
    return optimizer.subspace.coefficients.detach().clone(), subspace.coefficients.detach().clone()


def test_copies(ranks, heap):
    (x, untouched), (y, _) = ranks.run(2, copies, heap)
    assert torch.equal(x, y) and x.abs().max() > 0 and untouched.abs().max() == 0


def foreign_parameter(group, heap, low_memory):
    """A parameter that FSDP leaves alone, with a gradient on one rank only."""
    torch.manual_seed(3)
    model, rank = Net(*heap[1]), dist.get_rank(group)
    mesh = DeviceMesh.from_group(group, "cpu")
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={model.unused})
    subspace = twa.Subspace.from_candidates(
        model, twa.Candidates(f"{heap[0]}/c*.safetensors"), bits=32, group=group
    )
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.1, low_memory=low_memory)
    for _ in range(4):
        loss = loss_of(model, rank, 2)
        (loss + model.unused.square().sum() if rank else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.state_dict()
    return subspace.coefficients.detach().clone()


def test_parameters_that_are_not_sharded(ranks, heap):
    (x, y), (u, v) = (
        ranks.run(2, foreign_parameter, heap, low_memory) for low_memory in (False, True)
    )
    assert torch.equal(x, y) and torch.equal(u, v)
    torch.testing.assert_close(x, u)


def save_under_a_file(group, heap, sharding, path):
    subspace = twa.Subspace.from_candidates(
        new_model(sharding, group, heap[1]),
        twa.Candidates(f"{heap[0]}/c*.safetensors"),
        sharding=sharding,
        group=group,
    )
    try:
        subspace.save(path / "out")
    except (OSError, DistributedError) as error:
        return str(error)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_an_output_that_cannot_be_made(ranks, heap, tmp_path, sharding):
    (tmp_path / "file").write_text("no directory")
    for error in ranks.run(2, save_under_a_file, heap, sharding, tmp_path / "file"):
        assert "Not a directory" in error


def order_of_messages(group, heap, sharding):
    """What happens in one backward with low_memory:

    "gradient" for each that is projected, "send" for each message.
    """
    model = new_model(sharding, group, heap[1])
    subspace = twa.Subspace.from_candidates(
        model, twa.Candidates(f"{heap[0]}/c*.safetensors"), sharding=sharding, group=group
    )
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.1, low_memory=True)
    events = []
    take, send = subspace.take_gradient, subspace.sharding.all_reduce_async
    subspace.take_gradient = lambda k: (events.append("gradient"), take(k))[1]
    subspace.sharding.all_reduce_async = lambda parts, x: (events.append("send"), send(parts, x))[1]
    loss_of(model, dist.get_rank(group), 2).backward()
    optimizer.step()
    return events


def test_sums_start_while_backward_goes_on(ranks, heap):
    for events in ranks.run(2, order_of_messages, heap, "replicate"):
        last = len(events) - 1 - events[::-1].index("gradient")
        assert events.count("send") == 4 and 1 <= events[:last].count("send") <= 3
    for events in ranks.run(2, order_of_messages, heap, "columns"):
        assert events.count("send") == 1 and events[-1] == "send"


def test_gloos_threads_end_with_the_group():
    """Whatever is imported in between: at the end of the process they may abort it."""
    code = """
        import gc, torch
        from pathlib import Path
        from twa.distributed import ranks
        assert ranks.initialise("cpu", 60).world_size == 1
        torch.distributed.all_reduce(torch.ones(3))
        import torch.distributed.checkpoint
        torch.distributed.destroy_process_group()
        gc.collect()
        print([(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()])
    """
    (said,) = processes.job(1, [sys.executable, "-c", textwrap.dedent(code)])
    assert "python" in said and "gloo" not in said
