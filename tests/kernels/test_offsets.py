"""Offsets of the largest sizes, 4096 rows and 2^33 columns, whose memory is there where it is
touched only: one item at the end of a basis must give what it gives alone.
"""

import math
import mmap

import pytest
import torch
from conftest import ON_GPU, exhaustive, rows_of, tensors

import twa_kernels as tk
from twa_kernels import registry
from twa_kernels.backends import cuda

pytestmark = pytest.mark.skipif(ON_GPU, reason="needs CPU tensors: memory that is not there")
COLUMNS = 2**33 - 57  # the last tile is not full
TILES = 2**26
LAST = 3  # tiles that are there
SMALL = (LAST * 128 - 57,)
MAP_NORESERVE = 0x4000


def sparse(shape, dtype):
    """A tensor of zeros, of which only pages that are touched take memory."""
    size = math.prod(shape) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).view(shape)
    except OSError as error:
        pytest.skip(f"needs {size} bytes of addresses: {error}")


def at_the_end(small):
    """A basis of COLUMNS columns, whose last tiles are those of `small`."""
    n = small.n
    codes = sparse((TILES, n, 16 * small.bits), torch.uint8)
    scales = sparse((TILES, n), torch.uint8)
    codes[-LAST:], scales[-LAST:] = small.codes, small.scales.view(torch.uint8)
    return tk.PackedBasis(
        codes,
        scales.view(torch.float8_e4m3fn),
        small.row_scale,
        sparse((TILES,), torch.int32),
        small.divisor,
        (torch.Size([COLUMNS]),),
        small.bits,
    )


def weights(small):
    """COLUMNS weights, the last of them these."""
    large = sparse((COLUMNS,), small.dtype)
    large[-len(small) :] = small
    return large


@pytest.fixture
def last_item(monkeypatch):
    """Every backend's work is one item, the last tiles."""
    numbers = {
        "item_tensor": torch.zeros(1, dtype=torch.int32),
        "item_tile": torch.tensor([TILES - LAST]),
        "item_tiles": torch.full((1,), LAST, dtype=torch.int32),
        "item_segment": torch.zeros(1, dtype=torch.int32),
        "item_group": torch.zeros(1, dtype=torch.int32),
        "group_begin": torch.tensor([0, 1], dtype=torch.int32),
        "segment_groups": torch.tensor([0, 1], dtype=torch.int32),
        "numel": torch.tensor([COLUMNS]),
        "tile_begin": torch.zeros(1, dtype=torch.int64),
    }

    def set_up(backend):
        if backend == "cuda":
            work = cuda.Work(numbers, None, cuda.module.Work(**numbers), 1, 1, {})
            monkeypatch.setattr(cuda, "work_items", lambda basis: work)
            order = torch.tensor([0, -1], dtype=torch.int32)
            monkeypatch.setattr(cuda, "step_tasks", lambda *_: order)
            return
        from twa_kernels.backends.triton import launch, project, reconstruct

        arrays = [numbers[f"item_{name}"] for name in ("tensor", "tile", "tiles", "segment")]
        begin = torch.tensor([0, 1], dtype=torch.int32)
        work = launch.Work(*arrays, begin, numbers["numel"], numbers["tile_begin"], 1)
        for module in (project, reconstruct):
            monkeypatch.setattr(module, "work_items", lambda basis, size: work)

    return set_up


@pytest.mark.parametrize(
    ("backend", "bits", "n"),
    [
        *[("cuda", bits, 4096) for bits in (8, 4, 3, 2, 1)],
        ("cuda", 4, 72),
        ("triton", 4, 33),
        exhaustive("triton", 8, 72),
        exhaustive("triton", 1, 72),
    ],
)
def test_the_last_item_of_2_to_the_33_columns(backend, bits, n, last_item):
    if reason := registry.why_unusable(backend):
        pytest.skip(reason)
    small = tk.pack(rows_of(n, [SMALL]), bits, backend="cpp")
    (g,), (center,) = tensors([SMALL], 7), tensors([SMALL], 9)
    g = g.to(torch.bfloat16)
    options = {"rule": "sgd", "options": {"lr": 0.1}, "state": {}, "backend": backend}

    def run(basis, g, center, out):
        x = torch.linspace(-1, 1, n)[:, None].contiguous()
        c = tk.project(basis, [g], backend)
        tk.reconstruct(basis, x, [center], [out], backend)
        theta = out[-SMALL[0] :].clone()
        stepped = tk.step(basis, [g], x, [out], [center], **options)
        return c, theta, stepped, x, out[-SMALL[0] :]

    expected = run(small, g, center, torch.empty(SMALL))
    assert all(t.abs().max() > 0 for t in expected)
    last_item(backend)
    found = run(at_the_end(small), weights(g), weights(center), sparse((COLUMNS,), torch.float32))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_items_of_2_to_the_33_columns():
    """The host's own arithmetic: items, their tiles, the order of a step's tasks."""
    if cuda.module is None:
        pytest.skip("the native module is not built")
    numels, size = (5, COLUMNS, 130), 64  # tiles of an item at 1 bit
    tiles = 1 + TILES + 2
    segment = sparse((tiles,), torch.int32)
    work = cuda.module.HostWork(numel=numels, tile_segment=segment, segments=1, bits=1)

    def numbers(name, dtype):
        return torch.frombuffer(bytearray(work.arrays[name]), dtype=dtype)

    assert numbers("numel", torch.int64).tolist() == list(numels)
    assert numbers("tile_begin", torch.int64).tolist() == [0, 1, 1 + TILES]
    tile, items = numbers("item_tile", torch.int64), 1 + TILES // size + 1
    assert len(tile) == items and tile[:2].tolist() == [0, 1] and int(tile[-1]) == 1 + TILES
    assert bool((tile[1:-1] == 1 + size * torch.arange(items - 2)).all())
    groups = numbers("group_begin", torch.int32)
    assert len(groups) == -(-items // 64) + 1 and int(groups[-1]) == items
    tasks = torch.frombuffer(bytearray(work.tasks(528)), dtype=torch.int32)
    assert len(tasks) == 2 * items and int(tasks[items]) == -items and int(tasks[-1]) == -1
