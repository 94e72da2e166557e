"""bench/gpu_model.py: its shapes are those of the launches, and what it says follows from what it
counts.
"""

import ctypes
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import BITS, ON_GPU, rows_of, tensors

import twa_kernels as tk
from twa_kernels.backends import cuda

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import gpu_model  # noqa: E402
import gpu_model_gram  # noqa: E402
import gpu_model_published  # noqa: E402

emulated = pytest.mark.skipif(
    ON_GPU or cuda.why_unusable() is not None, reason="the launches are those of the emulator"
)
SHAPES = [(128 * 3,), (200,)]
ROWS = json.loads((ROOT / "bench/results/cuda_static_cost.json").read_text())
H200 = gpu_model.GPUS["H200"]


def launches():
    """(blocks, threads, shared bytes) of each since the last call."""
    take = ctypes.CDLL(cuda.module.__file__).twa_emulator_launches
    take.restype = ctypes.c_int64
    numbers = (ctypes.c_int64 * 300)()
    count = take(numbers, ctypes.c_int64(len(numbers)))
    return [tuple(numbers[k : k + 3]) for k in range(0, count, 3)]


@emulated
@pytest.mark.parametrize("n", [1, 16, 33, 64, 72, 96, 120, 128, 200, 300])
@pytest.mark.parametrize("bits", BITS)
def test_shapes_are_those_of_the_launches(bits, n):
    basis = tk.pack(rows_of(n, SHAPES), bits, segments=[0, 1])
    grads, x = tensors(SHAPES, 7), torch.randn(n, 2)
    found = {}
    launches()
    tk.project(basis, grads, "cuda")
    found["project"] = max(launches(), key=lambda of: of[2])
    tk.reconstruct(basis, x, backend="cuda")
    found["reconstruct"] = max(launches(), key=lambda of: of[2])
    options = {"rule": "sgd", "options": {"lr": 0.1}, "state": {}, "backend": "cuda"}
    tk.step(basis, grads, x, [torch.empty(s) for s in SHAPES], **options)
    found["step"] = max(launches(), key=lambda of: of[2])
    for op, shape in (gpu_model.SHAPES | {"step": gpu_model.step_shape}).items():
        of = shape(bits, n)
        assert found[op][2] == of.shared_bytes, op
    assert found["project"][0] == 2 * gpu_model.project_shape(bits, n).row_blocks
    assert found["reconstruct"][0] == 2


def line(op="project", bits=4, n=72, size=4, gpu=H200, rows=ROWS):
    return gpu_model.line(rows, op, bits, n, size, gpu)


def test_memory_is_the_limit_where_nothing_else_takes_time():
    """And a kernel of many blocks loses no more than the last ones' half."""
    rows = [dict(r) for r in ROWS]
    for r in rows:
        if "mix" in r:
            r["mix"] = {key: dict.fromkeys(mix, 0) for key, mix in r["mix"].items()}
            r["products"] = 0
    assert 0.97 < line(rows=rows).share <= 1


def test_more_of_anything_takes_longer():
    before = line()
    assert before.share < 1
    slow = line(gpu=dataclasses.replace(H200, clock=H200.clock / 2))
    far = line(gpu=dataclasses.replace(H200, latency=4 * H200.latency))
    assert slow.share < before.share and far.share < before.share
    # Memory that is slower leaves more time for the rest.
    assert line(gpu=dataclasses.replace(H200, copy=H200.copy / 2)).share > before.share
    assert line(bits=1).share < before.share and line(bits=1, size=2).share < line(bits=1).share


def test_fewer_blocks_and_longer_starts_leave_memory_idle():
    assert gpu_model.busy(1.0, 0.0, 1) == 1.0 and gpu_model.busy(1.0, 1.0, 1) == 0.5
    assert 0.5 < gpu_model.busy(1.0, 1.0, 2) < gpu_model.busy(1.0, 1.0, 4) < 1.0
    assert gpu_model.busy(1.0, 3.0, 4) < gpu_model.busy(1.0, 1.0, 4)


def test_what_was_not_counted_is_not_predicted():
    case = {"op": "project", "bits": 4, "n": 72, "dtype": "fp32"}
    assert 90 < gpu_model.predicted(ROWS, case, 132, 4.3e12) < 100
    assert gpu_model.predicted([], case, 132, 4.3e12) is None
    for change in ({"op": "pack"}, {"dtype": "fp64"}):
        assert gpu_model.predicted(ROWS, case | change, 132, 4.3e12) is None
    assert gpu_model.predicted(ROWS, case | {"op": "reconstruct", "n": 300}, 132, 4.3e12) is None
    assert gpu_model.predicted(ROWS, case, 0, 4.3e12) is None


@pytest.mark.parametrize("form", ["gram", "again", "write"])
def test_gram_schmidt_takes_what_bytes_and_products_do_and_has_no_cliff(form):
    passes = {}
    for n in (64, 65, 72, 128, 256):
        passes[n] = gpu_model_gram.orthonormalize_model(n, 1.13e8, form, H200)
        assert passes[n].seconds >= gpu_model_gram.floor(passes[n], H200)
        assert passes[n].multiprocessors == H200.multiprocessors
    assert passes[64].seconds < passes[65].seconds < 2 * passes[64].seconds
    assert passes[65].seconds <= passes[72].seconds < passes[128].seconds < passes[256].seconds


def test_kernels_of_others():
    """A term or a unit that is wrong misses most of them by more."""
    cases = gpu_model_published.copies() + gpu_model_published.others()
    misses = [abs(gpu_model_published.predict(c) / c.published - 1) for c in cases]
    assert sum(misses) / len(misses) < 0.10 and sum(m <= 0.10 for m in misses) >= 20
