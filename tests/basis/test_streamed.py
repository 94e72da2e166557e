"""`storage="host"`: a basis that passes through two buffers. Here they are those of a GPU on the
CPU; on a GPU see distributed/test_trainer_gpu.py.
"""

import copy
import sys
from pathlib import Path

import processes
import pytest
import torch
import twa
from bounds import assert_within
from conftest import ON_GPU
from safetensors.torch import save_file
from torch import nn
from twa.basis.streamed import Relay, StreamedBasis
from twa.io.errors import TwaError

import twa_kernels as tk

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = [(300, 70), (5,), (), (0, 4), (129,), (64, 128)]
NUMELS = [torch.Size(s).numel() for s in SHAPES]
TILES = [-(-numel // 128) for numel in NUMELS]


def basis_of(bits, segments=None, n=5):
    generator = torch.Generator().manual_seed(bits)
    rows = [[torch.randn(s, generator=generator) for _ in range(n)] for s in SHAPES]
    return tk.pack(rows, bits, segments=segments)


def assert_near(found, expected, basis, grads):
    """Sums over blocks, each rounded to float32, and sums over all: both as near to the exact ones
    as test_project.py has it, by |P_i| |g|."""
    rows = [r.reshape(basis.n, -1).double() for r in tk.unpack(basis, backend="reference")]
    pairs = [
        (r, g.detach().cpu().double()) for r, g in zip(rows, grads, strict=True) if g is not None
    ]
    size = torch.cat([r for r, _ in pairs], 1).norm(dim=1, keepdim=True)
    size = size * torch.cat([g.reshape(-1) for _, g in pairs]).norm()
    assert_within(found.cpu(), expected.cpu().double(), 2 * 2.0**-22 * size)


def streamed(basis, tiles):
    """The basis in blocks of so many tiles."""
    block_bytes = tiles * (basis.n * (16 * basis.bits + 1) + 512)
    return StreamedBasis(basis, "cpu", block_bytes, Relay(torch.device("cpu"), staged=True))


def per_tile():
    """A segment for every two tiles of a tensor."""
    segments, l = [], 0
    for tiles in TILES:
        segments += [l + t // 2 for t in range(tiles)]
        l += -(-tiles // 2)
    return torch.tensor(segments)


@pytest.mark.parametrize("tiles", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_blocks_are_the_basis(bits, tiles):
    basis = basis_of(bits)
    found = streamed(basis, tiles)
    generator = torch.Generator().manual_seed(1)
    center = [torch.randn(s, generator=generator) for s in SHAPES]
    x = torch.randn(basis.n, basis.num_segments, generator=generator)
    out = [torch.empty(s) for s in SHAPES]
    found.reconstruct(x, center, out)
    for o, e in zip(out, tk.reconstruct(basis, x, center), strict=True):
        assert torch.equal(o, e)
    grads = [torch.randn(s, generator=generator) for s in SHAPES]
    c, expected = found.project(grads), tk.project(basis, grads)
    if tiles == 1000:  # one block
        assert torch.equal(c, expected)
    assert_near(c, expected, basis, grads)
    assert c.dtype == torch.float32


@pytest.mark.parametrize("tiles", [2, 4, 6])
def test_segments_inside_of_blocks_have_the_same_bits(tiles):
    """Tensors of an even number of tiles come first, so that no segment of two is cut."""
    shapes = [(300, 256), (128, 128), (129,)]
    rows = [[torch.randn(s) for _ in range(4)] for s in shapes]
    segments = torch.arange(300 * 2 + 128 + 2) // 2
    basis = tk.pack(rows, 4, segments=segments)
    grads = [torch.randn(s) for s in shapes]
    assert torch.equal(streamed(basis, tiles).project(grads), tk.project(basis, grads))


def test_absent_gradients_and_selected_tensors():
    basis = basis_of(4, per_tile())
    found = streamed(basis, 3)
    grads = [torch.randn(s) for s in SHAPES]
    some = [None, grads[1], None, None, None, grads[5]]
    assert_near(found.project(some), tk.project(basis, some), basis, some)
    assert not found.project([None] * len(SHAPES)).any()
    x = torch.randn(basis.n, basis.num_segments)
    whole = tk.reconstruct(basis, x)
    for k, g in enumerate(grads):
        one, columns = found.select(k)
        mine, same = basis.select(k)
        assert columns == same and one.shapes == mine.shapes
        assert_near(one.project([g]), tk.project(mine, [g]), mine, [g])
        out = torch.empty(SHAPES[k])
        one.reconstruct(x[:, columns].contiguous(), None, [out])
        assert torch.equal(out, whole[k])


def test_odd_gradients_and_weights():
    """Strides, half dtypes; what is written counts as written."""
    basis = basis_of(4)
    found = streamed(basis, 7)
    grads = [torch.randn(s, dtype=torch.bfloat16) for s in SHAPES]
    grads[0] = torch.randn(70, 300, dtype=torch.bfloat16).T
    expected = tk.project(basis, grads)
    assert_near(found.project(grads), expected, basis, grads)
    x = torch.randn(basis.n, basis.num_segments)
    out = [nn.Parameter(torch.empty(s, dtype=torch.float16)) for s in SHAPES]
    out[0] = nn.Parameter(torch.empty(70, 300, dtype=torch.float16).T)
    before = [o._version for o in out]
    with torch.no_grad():
        found.reconstruct(x, None, out)
    theirs = [torch.empty(s, dtype=torch.float16) for s in SHAPES]
    tk.reconstruct(basis, x, None, out=theirs)
    for o, e, version, numel in zip(out, theirs, before, NUMELS, strict=True):
        assert torch.equal(o, e) and (o._version > version or not numel)
    grads[5] = grads[5].clone()
    grads[5][0, 0] = float("nan")
    c = found.project(grads)
    assert c[:, 5].isnan().all() and c[:, :5].isfinite().all()


@pytest.mark.parametrize("tiles", [1, 5, 1000])
def test_bytes_are_those_that_plan_says(tiles):
    basis = basis_of(4)
    found = streamed(basis, tiles)
    center = [torch.randn(s) for s in SHAPES]
    found.project([torch.randn(s) for s in SHAPES])
    found.reconstruct(torch.randn(basis.n, basis.num_segments), center, center)
    packed = basis.codes.nbytes + basis.scales.nbytes
    assert found.copied == 2 * packed + 4 * sum(NUMELS)
    least = basis.n * 65 + 512  # of a tile; rows begin at multiples of 256 bytes
    for feed in found.relay.feeds:
        rows = 2 + len(SHAPES)
        assert feed._there.numel() <= min(tiles, sum(TILES)) * least + rows * 256


# In a subspace -----------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.head = nn.Linear(300, 100), nn.Linear(100, 3)
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.head(torch.tanh(self.wide(x))) * self.one


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heap")
    generator = torch.Generator().manual_seed(1)
    for k in range(5):
        state = Model().state_dict()
        for t in state.values():
            t += 0.1 * torch.randn(t.shape, generator=generator)
        save_file(state, folder / f"c{k}.safetensors")
    return twa.Candidates(folder)


@pytest.fixture
def stages(monkeypatch):
    """Every basis in host memory is streamed from now on, also to the CPU; those that were."""
    made = []

    def stream(basis, device):
        made.append(streamed(basis, 9))
        return made[-1]

    monkeypatch.setattr("twa.subspace.in_host_memory", stream)
    return made


def trained(candidates, steps=6, load=None, rule=torch.optim.AdamW, low_memory=False, **options):
    model = Model()
    if load is None:
        subspace = twa.Subspace.from_candidates(model, candidates, **options)
    else:
        subspace = twa.Subspace.load(load, model, candidates, **options)
    optimizer = twa.SubspaceOptimizer(subspace, rule, lr=0.02, low_memory=low_memory)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        x = torch.randn(16, 300, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return subspace


def agree(found, expected):
    assert expected.coefficients.abs().max() > 0.01
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.coefficients, expected.coefficients, **close)
    ours, theirs = found.model.state_dict(), expected.model.state_dict()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], **close)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"low_memory": True},
        {"balance": True, "granularity": 256},
        {"basis": "differences", "bits": 2, "granularity": "model"},
        {"basis": "orthonormal", "constraint": "simplex"},
    ],
    ids=str,
)
def test_training_is_the_same(candidates, stages, options):
    expected = trained(candidates, **copy.deepcopy(options))
    assert not stages
    found = trained(candidates, storage="host", **copy.deepcopy(options))
    agree(found, expected)
    (basis,) = stages
    assert found.basis is basis and found.kept is basis.host and not found.can_fuse()
    assert torch.equal(found.kept.codes, expected.basis.codes)
    assert found.find_moved() is None
    # the first weights, and six steps
    if not options.get("low_memory"):
        packed = basis.host.codes.nbytes + basis.host.scales.nbytes
        center = 4 * sum(basis.host.numels)
        moved = packed + center  # find_moved
        assert basis.copied == 6 * packed + 7 * (packed + center) + moved


def test_a_basis_from_its_file(candidates, stages, tmp_path):
    """It stays mapped, and a file that is cut short is noticed before a step."""
    first = trained(candidates, balance=True, storage="host")
    first.save(tmp_path, basis=True)
    loaded = trained(None, steps=0, load=tmp_path, storage="host")
    assert torch.equal(loaded.coefficients, first.coefficients)
    for p, q in zip(loaded.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(p, q)
    file = loaded.sharding.mapped[0]
    assert file.holds(loaded.kept.codes)
    before = loaded.coefficients.detach().clone()
    optimizer = twa.SubspaceOptimizer(loaded, torch.optim.SGD, lr=0.1)
    loaded.model(torch.ones(2, 300)).sum().backward()
    with open(file.path, "r+b") as f:
        f.truncate(4096)
    with pytest.raises(twa.BasisError, match="became shorter"):
        optimizer.step()
    assert torch.equal(before, loaded.coefficients)


@pytest.mark.parametrize("at_hand", [True, False])
def test_a_basis_from_its_file_around_another_center(candidates, stages, tmp_path, at_hand):
    twa.Subspace.from_candidates(Model(), candidates).save(tmp_path, basis=True)
    made = [
        twa.Subspace.load(tmp_path, Model(), candidates if at_hand else None, center=0, **options)
        for options in ({}, {"storage": "host"})
    ]
    assert len(stages) == 1 and made[1].basis is stages[0] and stages[0].copied > 0
    for p, q in zip(made[0].model.parameters(), made[1].model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_on_the_cpu_nothing_is_copied(candidates):
    subspace = trained(candidates, storage="host")
    assert isinstance(subspace.basis, tk.PackedBasis) and subspace.can_fuse()
    expected = trained(candidates)
    assert torch.equal(subspace.coefficients, expected.coefficients)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"storage": "disk"}, r"storage: expected one of \('device', 'host'\), found 'disk'"),
        ({"storage": "host", "bits": 32}, "expected packed bits, found 32"),
        ({"storage": "host", "device": "cuda"}, "expected a basis built on the CPU, found cuda"),
    ],
)
def test_what_cannot_be(candidates, options, message):
    with pytest.raises(TwaError, match=message):
        twa.Subspace.from_candidates(Model(), candidates, **options)
    if "bits" not in options and "device" not in options:
        with pytest.raises(TwaError, match=message):
            twa.average(Model(), candidates, [1], [1], lambda *_: 0, storage="disk")


def test_the_main_job(candidates, stages):
    batches = [torch.randn(8, 300, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    options = {"steps": 2, "methods": ["t:tensor:4"], "progress": False, "lr": 0.02}

    def loss(model, x):
        return model(x).square().mean()

    found = twa.average(Model(), candidates, batches, batches, loss, storage="host", **options)
    assert len(stages) == 1 and stages[0].copied > 0
    expected = twa.average(Model(), candidates, batches, batches, loss, **options)
    assert len(stages) == 1
    losses = [[row.val_loss for row in o.results] for o in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


RANKS = """
import sys, torch, twa, processes
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import test_streamed
import twa.subspace
dist.init_process_group("gloo")
candidates = twa.Candidates(sys.argv[1])
def train(**options):
    model = test_streamed.Model()
    if options["sharding"] == "columns":
        fully_shard(model)
    subspace = twa.Subspace.from_candidates(model, candidates, **options)
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=0.02)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(16, 300, generator=generator)).square().mean().backward()
        optimizer.step()
    return subspace
for sharding in ("replicate", "columns", "rows"):
    plain = train(sharding=sharding)
    made = []
    def stream(basis, device):
        made.append(test_streamed.streamed(basis, 9))
        return made[-1]
    original, twa.subspace.in_host_memory = twa.subspace.in_host_memory, stream
    found = train(sharding=sharding, storage="host")
    twa.subspace.in_host_memory = original
    assert len(made) == 1 and made[0].copied > 0
    assert plain.coefficients.abs().max() > 0.01
    torch.testing.assert_close(found.coefficients, plain.coefficients, rtol=1e-4, atol=1e-5)
    found.state_dict()
    print(sharding)
processes.leave_job()
"""


def test_every_sharding(candidates):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{RANKS}"
    said = processes.job(2, [sys.executable, "-c", code, str(candidates[0].path.parent)])
    assert all(text.split() == ["replicate", "columns", "rows"] for text in said)


@pytest.mark.parametrize("tiles", [3, 64])
def test_blocks_with_the_kernels_of_gpus(gpu, monkeypatch, tiles):
    """On a GPU many small blocks, one after the other on two streams, are right each time."""
    gpu.needs("project").needs("reconstruct")
    monkeypatch.setenv("TWA_KERNELS_BACKEND", f"{gpu.device}:{gpu.backend}")
    basis, device = basis_of(4), torch.device(gpu.device)
    block_bytes = tiles * (basis.n * 65 + 512)
    found = StreamedBasis(basis, device, block_bytes, Relay(device, staged=True))
    whole, center = basis.to(device), [torch.randn(s) for s in SHAPES]
    for k in range(20 if ON_GPU else 1):
        torch.manual_seed(k)
        x = torch.randn(basis.n, basis.num_segments, device=device)
        grads = [torch.randn(s, device=device) for s in SHAPES]
        out = [torch.empty(s, device=device) for s in SHAPES]
        found.reconstruct(x, center, out)
        expected = tk.reconstruct(whole, x, [c.to(device) for c in center])
        assert all(torch.equal(o, e) for o, e in zip(out, expected, strict=True))
        c = found.project(grads)
        assert_near(c, tk.project(whole, grads), basis, grads)
