"""Packing on a device: blocks go there one at a time, and the basis has the CPU's bits.

Without a GPU the CUDA kernels run compiled for the CPU, blocks go through the buffers of a GPU all
the same, and the meta device, which has no data, shows what is left on the CPU by mistake.
"""

import pytest
import torch
import twa
from conftest import ON_GPU
from safetensors.torch import save_file
from torch import nn
from twa.basis.feed import Feed
from twa.io.candidates import Block
from twa.packing import build, to_file
from twa.packing.to_file import PackToFile

import twa_kernels as tk

DEVICE = "cuda" if ON_GPU else "cpu"
BITS = [32, 8, 4, 3, 2, 1]


class Model(nn.Module):
    """Sizes around tiles and blocks of 8192 columns; tensors without elements and of one."""

    def __init__(self):
        super().__init__()
        self.wide, self.head = nn.Linear(300, 100), nn.Linear(100, 3)
        self.one, self.nothing = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(0, 3))

    def forward(self, x):
        return self.head(torch.tanh(self.wide(x))) * self.one + self.nothing.sum()


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    """Five, of which one is bfloat16, in several blocks."""
    folder = tmp_path_factory.mktemp("heap")
    generator, model = torch.Generator().manual_seed(1), Model()
    for k in range(5):
        dtype = torch.bfloat16 if k == 3 else torch.float32
        state = {}
        for key, p in model.state_dict().items():
            state[key] = torch.randn(p.shape, generator=generator).to(dtype)
        save_file(state, folder / f"c{k}.safetensors")
    return twa.Candidates(folder / "c*.safetensors", block_bytes=5 * 4 * 8192)


@pytest.fixture
def feeds(monkeypatch):
    """Every Feed from now on copies, to whatever device; those that were made."""
    made = []

    def make(device):
        made.append(Feed(device, staged=True))
        return made[-1]

    monkeypatch.setattr(build, "Feed", make)
    monkeypatch.setattr(to_file, "Feed", make)
    return made


def nbytes(candidates):
    return sum(info.nbytes for c in candidates for info in c.info.values())


def same_bits(a, b):
    assert type(a.basis) is type(b.basis)
    if isinstance(a.basis, tk.PackedBasis):
        for name in ("codes", "scales", "row_scale", "tile_segment", "divisor"):
            mine, theirs = getattr(a.basis, name).cpu(), getattr(b.basis, name)
            assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)), name
    else:
        pairs = zip(a.basis.rows, b.basis.rows, strict=True)
        assert all(torch.equal(p.cpu(), q) for p, q in pairs)
    assert all(torch.equal(p.cpu(), q) for p, q in zip(a.center, b.center, strict=True))
    assert torch.equal(a.merge_weights(), b.merge_weights())


# Buffers -----------------------------------------------------------------------------------------


def test_a_block_at_a_time_in_the_same_memory():
    feed = Feed("cpu", staged=True)
    a = [torch.randn(1000), torch.randn(1000).bfloat16(), torch.randn(7)]
    b = [torch.randn(500), torch.randn(500).half()]
    first = feed.block(Block(0, 0, 1000, a))
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(first.rows, a, strict=True))
    assert all(row.data_ptr() % 16 == 0 for row in first.rows)
    place = first.rows[0].data_ptr()
    second = feed.rows(b)
    assert all(torch.equal(x, y) for x, y in zip(second, b, strict=True))
    assert second[0].data_ptr() == place  # the first block is gone
    assert feed.copied == sum(row.nbytes for row in a + b)


def test_rows_of_any_strides_and_none():
    feed, wide = Feed("cpu", staged=True), torch.randn(20, 6)
    (row,) = feed.rows([wide.T])
    assert torch.equal(row, wide.T) and row.is_contiguous()
    assert feed.rows([torch.empty(0)])[0].shape == (0,)


def test_what_is_on_the_cpu_stays():
    feed, row = Feed("cpu"), torch.randn(9)
    assert feed.rows([row])[0] is row and feed.whole(row) is row and not feed.copied


def test_whole_tensors(monkeypatch):
    monkeypatch.setattr("twa.basis.feed.BLOCK_BYTES", 1000)
    feed, codes = Feed("meta"), torch.zeros(37, 11, 64, dtype=torch.uint8)
    made = feed.whole(codes)
    assert made.shape == codes.shape and made.device.type == "meta"
    assert feed.copied == codes.nbytes


def test_a_device_without_kernels_has_its_basis_built_on_the_cpu():
    for name, expected in {"cpu": "cpu", "mps": "cpu", "meta": "cpu", "cuda:1": "cuda:1"}.items():
        assert build.usual_device(torch.device(name)) == torch.device(expected)


# Bases -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["deltas", "differences"])
@pytest.mark.parametrize("bits", BITS)
def test_the_bits_of_the_cpu(bits, basis, candidates, feeds, monkeypatch):
    options = dict(bits=bits, basis=basis, granularity=384)  # segments that no block ends with
    expected = twa.Subspace.from_candidates(Model(), candidates, **options)
    monkeypatch.setenv("TWA_KERNELS_BACKEND", f"{DEVICE}:cuda")
    found = twa.Subspace.from_candidates(Model().to(DEVICE), candidates, **options)
    same_bits(found, expected)
    assert feeds[-1].device == torch.device(found.basis.device.type)
    assert feeds[-1].copied == nbytes(candidates)


@pytest.mark.parametrize("bits", [32, 4])
def test_an_orthonormal_basis_is_made_there(bits, candidates, feeds, monkeypatch):
    options = dict(bits=bits, basis="orthonormal")
    expected = twa.Subspace.from_candidates(Model(), candidates, **options)
    monkeypatch.setenv("TWA_KERNELS_BACKEND", f"{DEVICE}:cuda")
    found = twa.Subspace.from_candidates(Model().to(DEVICE), candidates, **options)
    assert found.coordinates.shape == expected.coordinates.shape
    assert torch.allclose(found.coordinates.transform, expected.coordinates.transform, rtol=1e-6)
    assert all(torch.equal(p.cpu(), q) for p, q in zip(found.center, expected.center, strict=True))
    # the center, a sample and the Gram matrix, Q
    assert feeds[-1].copied >= 3 * nbytes(candidates)


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("basis", ["deltas", "differences", "orthonormal"])
def test_nothing_of_a_block_is_left_on_the_cpu(basis, bits, candidates, feeds):
    """The meta device has no data: every block gets there, until a number is to be read."""
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        twa.Subspace.from_candidates(Model(), candidates, bits=bits, basis=basis, device="meta")
    one_pass = (basis, bits) == ("deltas", 4)
    assert feeds[-1].copied >= (nbytes(candidates) if one_pass else 1)


def test_balanced_rows_have_the_same_bits(candidates, feeds):
    plain = twa.Subspace.from_candidates(Model(), candidates, granularity="fine", balance=True)
    assert feeds[-1].copied == nbytes(candidates)
    mix = plain.coordinates.balance["mix"]
    assert mix.device.type == "cpu" and mix.dtype == torch.float64


def test_the_file_has_the_same_bits(candidates, feeds, tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("cpu.safetensors", "device.safetensors")]
    PackToFile(files[0], Model(), candidates, granularity=384).run()
    monkeypatch.setenv("TWA_KERNELS_BACKEND", f"{DEVICE}:cuda")
    PackToFile(files[1], Model(), candidates, granularity=384, device=DEVICE).run()
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_nan_is_named_as_on_the_cpu(tmp_path, feeds, monkeypatch):
    monkeypatch.setenv("TWA_KERNELS_BACKEND", f"{DEVICE}:cuda")
    for k in range(3):
        state = {key: torch.randn(p.shape) for key, p in Model().state_dict().items()}
        if k == 1:
            state["wide.weight"][7, 5] = torch.nan
        save_file(state, tmp_path / f"c{k}.safetensors")
    for basis in ("deltas", "differences"):
        with pytest.raises(twa.CandidateError, match=r"c1.*'wide.weight' has 1 NaN"):
            twa.Subspace.from_candidates(
                Model().to(DEVICE), twa.Candidates(tmp_path / "c*"), basis=basis
            )


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU that PyTorch can use")
def test_a_gpu_holds_a_block_beside_the_basis(tmp_path):
    model = nn.Linear(4096, 2048, bias=False)
    for k in range(8):
        save_file({"weight": torch.randn(2048, 4096)}, tmp_path / f"c{k}.safetensors")
    candidates = twa.Candidates(tmp_path / "c*", block_bytes=8 << 20)
    model.cuda()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    subspace = twa.Subspace.from_candidates(model, candidates)
    held = subspace.basis.nbytes + sum(c.nbytes for c in subspace.center)
    scales = 3 * subspace.basis.scales.numel()  # two bytes each, and once more as they are finished
    # a block, its squared norms, and two float64 rows of it for its center
    assert torch.cuda.max_memory_allocated() - before < held + scales + 3 * (8 << 20)
