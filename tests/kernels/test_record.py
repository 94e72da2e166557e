"""record and replay: every backend against the reference, decoded snapshots, weights that cannot be
recorded, threads and instruction sets, bad input.
"""

import os
from pathlib import Path

import pytest
import torch
from conftest import BITS, SHAPES, has_isa, run_python, tensors

import twa_kernels as tk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [*SHAPES, (0,), (64 * 128 * 2 + 77,)]


def trajectory(n, dtype=torch.float32, step=0.1):
    """n snapshots of a model, float32 and as a run would hold them."""
    first = tensors(SIZES)
    for k in range(n):
        noise = tensors(SIZES, seed=10 + k)
        first = [w + step * d for w, d in zip(first, noise, strict=True)]
        yield [w.to(dtype) for w in first]


def recorded(snapshots, bits, backend=""):
    """The first snapshot, the rows of the others, and the reference after the last."""
    start, *others = snapshots
    reference = [w.float().clone() for w in start]
    rows = [tk.record(weights, reference, bits, backend=backend) for weights in others]
    assert not any(bad for _, _, bad in rows)
    return [w.float() for w in start], [r[:2] for r in rows], reference


def replayed(start, rows, coefficients, bits, backend=""):
    out = [w.clone() for w in start]
    codes, scales = zip(*rows, strict=True)
    return tk.replay(out, codes, scales, coefficients, bits, backend=backend)


def equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_reference(bits, dtype):
    snapshots = list(trajectory(4, dtype))
    _, rows, reference = recorded(snapshots, bits)
    _, expected, expected_reference = recorded(snapshots, bits, "reference")
    for row, other in zip(rows, expected, strict=True):
        assert equal(row, other)
    assert equal(reference, expected_reference)


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_those_of_pack(bits):
    """One row of a basis around the reference."""
    start, weights = trajectory(2)
    codes, scales, _ = tk.record(weights, [w.clone() for w in start], bits)
    packer = tk.Packer(1, SIZES, bits)
    for w, c in zip(weights, start, strict=True):
        packer.add([w], c)
    assert torch.equal(codes, packer.codes[:, 0])
    assert torch.equal(scales, packer.scales[:, 0])


@pytest.mark.parametrize("bits", BITS)
def test_replay_gives_the_bits_of_the_reference(bits):
    snapshots = list(trajectory(5))
    start, rows, reference = recorded(snapshots, bits)
    for k in range(1, 5):
        coefficients = [1.0] * k + [0.0] * (4 - k)
        expected = recorded(snapshots[: k + 1], bits)[2]
        assert equal(replayed(start, rows, coefficients, bits), expected)
    assert equal(replayed(start, rows, torch.ones(4), bits), reference)


def test_errors_do_not_add_up():
    """Closed loop: the error of a decoded snapshot stays that of one difference."""
    snapshots = list(trajectory(40))
    last = torch.cat([w.flatten() for w in snapshots[-1]])
    step = (last - torch.cat([w.flatten() for w in snapshots[-2]])).norm()
    for bits, most in ((8, 0.02), (4, 0.12), (2, 0.5)):
        found = torch.cat([w.flatten() for w in recorded(snapshots, bits)[2]])
        assert (found - last).norm() < most * step


@pytest.mark.parametrize("bits", BITS)
def test_replay_against_the_reference(bits):
    start, rows, _ = recorded(list(trajectory(6)), bits)
    coefficients = [0.3, 0.0, -1.25, 1.0, 1e-9]
    found = replayed(start, rows, coefficients, bits)
    assert equal(found, replayed(start, rows, coefficients, bits, "reference"))
    exact = replayed([w.zero_() for w in start], rows, [0.0, 0.0, 0.0, 1.0, 0.0], bits)
    assert any(t.any() for t in exact)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_columns_of_a_tensor(backend):
    w, start = torch.randn(5000), torch.randn(5000)
    codes, scales, _ = tk.record(w, reference := start.clone(), 4, backend=backend)
    part = start[1280:3000].clone()
    tk.replay(part, [codes[10:24]], [scales[10:24]], [1.0], 4, backend=backend)
    assert torch.equal(part, reference[1280:3000])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 2.0**126, -(2.0**126)])
def test_a_bad_weight_changes_nothing(backend, value):
    start, weights = trajectory(2)
    weights[6][-1] = value
    reference = [w.clone() for w in start]
    *_, bad = tk.record(weights, reference, 4, backend=backend)
    assert bad
    assert equal(reference, start)
    weights[6][-1] = 2.0**125
    *_, bad = tk.record(weights, reference, 4, backend=backend)
    assert not bad
    assert torch.isfinite(reference[6]).all()


@pytest.mark.parametrize("bits", BITS)
def test_weights_that_do_not_change_code_as_zero(bits):
    (start,) = trajectory(1)
    reference = [w.clone() for w in start]
    _, scales, bad = tk.record(start, reference, bits)
    assert not bad
    assert not scales.any()
    assert equal(reference, start)


def test_threads_and_instruction_sets_give_the_same_bits():
    code = """
import hashlib, torch, twa_kernels as tk
from test_record import recorded, trajectory
found = set()
for threads in (1, 2, 3, 8):
    torch.set_num_threads(threads)
    digest = hashlib.sha256()
    for bits in (8, 4, 3, 2, 1):
        _, rows, reference = recorded(list(trajectory(3)), bits)
        for t in [*(t for row in rows for t in row), *reference]:
            digest.update(t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    found.add(digest.hexdigest())
print(*found)
"""
    paths = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    found = {
        run_python(code, TWA_KERNELS_ISA=isa, PYTHONPATH=paths)
        for isa in ("portable", "avx2", "avx512")
        if has_isa(isa)
    }
    assert len(found) == 1
    assert len(found.pop().split()) == 1


def test_weights_that_do_not_lie_in_order():
    w, reference = torch.randn(70, 30).T, torch.zeros(30, 70)
    codes, scales, _ = tk.record(w, reference, 8)
    same = torch.zeros(30, 70)
    tk.record(w.contiguous(), same, 8)
    assert torch.equal(reference, same)
    assert torch.equal(*tk.replay(torch.zeros(30, 70), [codes], [scales], [1.0], 8), reference)


def test_bad_input():
    w, reference = torch.randn(300), torch.zeros(300)
    with pytest.raises(ValueError, match="bits must be one of"):
        tk.record(w, reference, 5)
    with pytest.raises(ValueError, match="at least one tensor, found none"):
        tk.record([], [], 4)
    with pytest.raises(ValueError, match=r"reference\[0\]: expected 300 elements, found 299"):
        tk.record(w, reference[1:], 4)
    with pytest.raises(ValueError, match="reference: expected 1 tensors, found 2"):
        tk.record(w, [reference, reference.clone()], 4)
    with pytest.raises(ValueError, match="share memory"):
        tk.record([w, w], [reference, reference], 4)
    with pytest.raises(TypeError, match=r"reference\[0\]: expected torch.float32"):
        tk.record(w, reference.bfloat16(), 4)
    with pytest.raises(TypeError, match="weights"):
        tk.record(w.double(), reference, 4)
    with pytest.raises(ValueError, match="contiguous"):
        tk.record(torch.randn(20, 30), torch.zeros(30, 20).T, 4)
    codes, scales, _ = tk.record(w, reference, 4)
    with pytest.raises(ValueError, match="expected 2 of each"):
        tk.replay(reference, [codes], [scales], [1.0, 1.0], 4)
    with pytest.raises(ValueError, match=r"codes\[0\]: expected shape \(3, 32\)"):
        tk.replay(reference, [codes], [scales], [1.0], 2)
    with pytest.raises(TypeError, match=r"scales\[0\]"):
        tk.replay(reference, [codes], [scales.float()], [1.0], 4)
    assert tk.replay(reference, [], [], [], 4)[0] is reference
    assert tk.replay([], [], [], [], 4) == []


def test_opcheck():
    w, reference = tensors([(300,), (5, 40)]), [torch.zeros(300), torch.zeros(5, 40)]
    codes, scales, bad = tk.record(w, reference, 4)
    ops = torch.ops.twa_kernels
    torch.library.opcheck(ops.record.default, (w, reference, 4, codes, scales, bad, "cpp"))
    operands = (reference, [codes, codes], [scales, scales], [0.5, 1.0], 4, "cpp")
    torch.library.opcheck(ops.replay.default, operands)
