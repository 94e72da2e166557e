"""average: every backend against float64, mixed dtypes, sizes around the tile and the work item,
threads and instruction sets, bad input.
"""

import os
from pathlib import Path

import pytest
import torch
from conftest import has_isa, run_python

import twa_kernels as tk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def heap(n, numel, seed=0, dtypes=DTYPES):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(numel, generator=generator).to(dtypes[i % len(dtypes)]) for i in range(n)]
    return rows, torch.randn(n, generator=generator, dtype=torch.float64)


def exact(rows, weights):
    return sum(w * r.double() for w, r in zip(weights, rows, strict=True))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("numel", [0, 1, 127, 128, 129, 1023, 1024, 1025, 8193, 70_001])
def test_against_float64(backend, numel):
    rows, weights = heap(7, numel)
    found = tk.average(rows, weights, backend=backend)
    assert found.dtype == torch.float32
    assert torch.equal(found, exact(rows, weights).float())  # the same sums in the same order


@pytest.mark.parametrize("numel", [0, 1, 129, 70_001])
def test_gpus_have_the_bits_of_the_cpu(numel, gpu, monkeypatch):
    """In parts, too; a row of weight 0 is not read."""
    monkeypatch.setattr("twa_kernels.backends.average.CHUNK", 1000)
    rows, weights = heap(7, numel)
    weights[2] = 0.0
    rows[2][:] = torch.nan
    found = tk.average(gpu.put(rows), weights, backend=gpu.backend)
    assert torch.equal(found.cpu(), tk.average(rows, weights))


@pytest.mark.parametrize("n", [1, 2, 64, 512])
def test_candidates(n):
    rows, weights = heap(n, 3000, seed=n)
    assert torch.equal(tk.average(rows, weights), exact(rows, weights).float())


def test_shapes_strides_and_out():
    a, b = torch.randn(5, 7), torch.randn(7, 5).T
    out = torch.full((5, 7), torch.nan)
    assert tk.average([a, b], [0.25, 0.75], out) is out
    assert torch.equal(out, (0.25 * a.double() + 0.75 * b.double()).float())


def test_rows_of_weight_zero_are_not_read():
    a, bad = torch.randn(300), torch.full((300,), torch.nan)
    assert torch.equal(tk.average([a, bad], torch.tensor([1.0, 0.0])), a)
    assert tk.average([a, bad], [1.0, 1e-9]).isnan().all()


def test_one_rounding_where_a_float32_sum_is_lost():
    """1e8 + 1 - 1e8: float32 sums give 0."""
    rows = [torch.full((200,), v) for v in (1e8, 1.0, -1e8)]
    assert torch.equal(tk.average(rows, [1.0, 1.0, 1.0]), torch.ones(200))


def test_threads_and_instruction_sets_give_the_same_bits():
    code = """
import hashlib, torch, twa_kernels as tk
from test_average import heap
rows, weights = heap(33, 30_001)
found = set()
for threads in (1, 2, 3, 8):
    torch.set_num_threads(threads)
    found.add(hashlib.sha256(tk.average(rows, weights).numpy().tobytes()).hexdigest())
print(*found)
"""
    tiers = [isa for isa in ("portable", "avx2", "avx512") if has_isa(isa)]
    found = {
        run_python(
            code,
            TWA_KERNELS_ISA=isa,
            PYTHONPATH=os.pathsep.join(map(str, Path(__file__).parents[:2])),
        )
        for isa in tiers
    }
    assert len(found) == 1 and len(found.pop().split()) == 1


@pytest.mark.parametrize(
    "rows, weights, error, message",
    [
        ([], [], ValueError, "at least one"),
        ([torch.zeros(3)], [1.0, 2.0], ValueError, "found 2 for 1 rows"),
        (
            [torch.zeros(3), torch.zeros(4)],
            [1.0, 2.0],
            ValueError,
            r"rows\[1\]: expected 3 elements",
        ),
        ([torch.zeros(3, dtype=torch.float64)], [1.0], TypeError, "float64"),
    ],
)
def test_bad_input(rows, weights, error, message):
    with pytest.raises(error, match=message):
        tk.average(rows, weights)


def test_opcheck():
    rows, weights = heap(3, 200)
    torch.library.opcheck(
        torch.ops.twa_kernels.average.default, (rows, weights.tolist(), torch.empty(200), "")
    )
