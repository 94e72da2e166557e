"""record and replay: every backend against the reference, decoded snapshots, weights that cannot be
recorded, threads and instruction sets, bad input.
"""

import os
from pathlib import Path

import pytest
import torch
from conftest import BITS, ON_GPU, SHAPES, has_isa, run_python, tensors

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
    coefficients = [0.3, 1e-50, -1.25, 1.0, 1e-9]  # the second is 0 as a float32
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


# GPU kernels --------------------------------------------------------------------------------------


def recorded_on(gpu, snapshots, bits):
    """As `recorded`, on the GPU; then back on the CPU."""
    start, rows, reference = recorded(gpu.put(list(snapshots)), bits, gpu.backend)
    return [[t.cpu() for t in tensors] for tensors in (start, *rows, reference)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_record(bits, dtype, gpu):
    snapshots = list(trajectory(3, dtype))
    _, *rows, reference = recorded_on(gpu, snapshots, bits)
    _, expected, expected_reference = recorded(snapshots, bits, "reference")
    for row, other in zip(rows, expected, strict=True):
        assert equal(row, other)
    assert equal(reference, expected_reference)


def test_gpu_record_of_several_dtypes(gpu):
    """In one model, with tensors that do not lie in order and that begin anywhere in memory."""
    start, weights = trajectory(2)
    weights = [w.to(DTYPES[k % 3]) for k, w in enumerate(weights)]
    expected_reference = [w.clone() for w in start]
    expected = tk.record(weights, expected_reference, 3, backend="reference")
    moved = []
    for k, w in enumerate(gpu.put(weights)):
        flat = torch.full((w.numel() + 3,), 7.0, dtype=w.dtype, device=gpu.device)
        moved.append(flat[1 : w.numel() + 1].view(w.shape).copy_(w))
        if w.dim() == 2 and k % 2:
            moved[-1] = w.T.contiguous().T
    flats = [torch.full((w.numel() + 3,), 7.0, device=gpu.device) for w in start]
    reference = [
        f[1 : w.numel() + 1].view(w.shape).copy_(w) for f, w in zip(flats, start, strict=True)
    ]
    found = tk.record(moved, reference, 3, backend=gpu.backend)
    assert equal([t.cpu() for t in found[:2]], expected[:2])
    assert not found[2]
    assert equal([r.cpu() for r in reference], expected_reference)
    # nothing beside a reference was written
    assert all((f[0] == 7).all() and (f[-2:] == 7).all() for f in flats)
    # and out begins anywhere, too
    out = [f[2 : w.numel() + 2].view(w.shape) for f, w in zip(flats, start, strict=True)]
    for o, w in zip(out, start, strict=True):
        o.copy_(w)
    tk.replay(out, [found[0]], [found[1]], [1.0], 3, backend=gpu.backend)
    assert equal([o.cpu() for o in out], expected_reference)
    assert all((f[-1:] == 7).all() for f in flats)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 2.0**126])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_a_bad_weight_changes_nothing(value, dtype, gpu):
    start, weights = trajectory(2)
    weights = [w.to(dtype) for w in weights]
    # a single element, the ragged end of a tensor, and what is loaded 16 bytes at a time
    (k, at), device = [(0, 0), (6, -1), (6, 700)][DTYPES.index(dtype)], gpu.device
    weights[k].view(-1)[at] = value
    weights, reference = gpu.put(weights), gpu.put([w.clone() for w in start])
    numels = [w.numel() for w in weights]
    tiles = tk.layout.total_tiles(tuple(numels))
    codes = torch.full((tiles, 64), 7, dtype=torch.uint8, device=device)
    scales = torch.full((tiles,), 7.0, dtype=torch.bfloat16, device=device)
    bad = torch.full((), 7, dtype=torch.int32, device=device)
    operands = codes, scales, bad, gpu.backend
    torch.ops.twa_kernels.record(weights, reference, 4, *operands)
    assert bad == 1
    assert (codes == 7).all()
    assert (scales == 7).all()
    assert equal([r.cpu() for r in reference], start)
    weights[k].view(-1)[at] = 2.0**125 if dtype != torch.float16 else 65504.0
    torch.ops.twa_kernels.record(weights, reference, 4, *operands)
    assert bad == 0
    assert (codes != 7).any()


@pytest.mark.parametrize("bits", BITS)
def test_gpu_replay(bits, gpu):
    start, rows, reference = recorded(list(trajectory(8)), bits)
    on_gpu = gpu.put(rows)
    for coefficients in ([1.0] * 7, [0.3, 1e-50, -1.25, 1.0, 1e-9, 0.0, 7.0], [0.5, *[0.0] * 6]):
        found = replayed(gpu.put(start), on_gpu, coefficients, bits, gpu.backend)
        assert equal([t.cpu() for t in found], replayed(start, rows, coefficients, bits))
    found = replayed(gpu.put(start), on_gpu, [1.0] * 7, bits, gpu.backend)
    assert equal([t.cpu() for t in found], reference)
    negative = [torch.full_like(w, -0.0) for w in start]
    found = replayed(gpu.put(negative), on_gpu, [0.0] * 7, bits, gpu.backend)
    assert all(torch.signbit(t).all() for t in found)


@pytest.mark.parametrize("bits", BITS)
def test_gpu_replay_of_any_codes(bits, gpu):
    """Every byte, and scales of any size; many rows."""
    n, sizes = 11, [(1000,), (0,), (128 * 65 + 5,), (1,)]
    tiles = tk.layout.total_tiles((1000, 0, 128 * 65 + 5, 1))
    codes = [torch.randint(0, 256, (tiles, 16 * bits), dtype=torch.uint8) for _ in range(n)]
    scales = [
        (torch.randint(8, 16, (tiles,)) * 2.0 ** torch.randint(-120, 100, (tiles,))).bfloat16()
        for _ in range(n)
    ]
    for coefficients in ([1.0] * n, torch.randn(n).tolist()):
        out = tensors(sizes)
        found = tk.replay(
            gpu.put(out), gpu.put(codes), gpu.put(scales), coefficients, bits, backend=gpu.backend
        )
        tk.replay(out, codes, scales, coefficients, bits)
        assert equal([t.cpu() for t in found], out)


def test_gpu_replay_of_codes_that_begin_anywhere(gpu):
    start, rows, reference = recorded(list(trajectory(3)), 4)

    def moved(t):
        flat = torch.empty(t.numel() + 1, dtype=t.dtype, device=gpu.device)
        return flat[1:].view(t.shape).copy_(t)

    rows = [(moved(codes), moved(scales)) for codes, scales in rows]
    found = replayed(gpu.put(start), rows, [1.0, 1.0], 4, gpu.backend)
    assert equal([t.cpu() for t in found], reference)


def test_gpu_columns_of_a_tensor(gpu):
    w, start = torch.randn(5000), torch.randn(5000)
    reference = gpu.put(start.clone())
    codes, scales, _ = tk.record(gpu.put(w), reference, 4, backend=gpu.backend)
    part = gpu.put(start[1280:3000].clone())
    tk.replay(part, [codes[10:24]], [scales[10:24]], [1.0], 4, backend=gpu.backend)
    assert torch.equal(part, reference[1280:3000])


def test_gpu_of_nothing(gpu):
    empty = gpu.put(torch.zeros(0))
    codes, scales, bad = tk.record(empty, empty.clone(), 4, backend=gpu.backend)
    assert len(codes) == len(scales) == 0
    assert bad == 0
    tk.replay([empty], [codes], [scales], [1.0], 4, backend=gpu.backend)
    out = gpu.put(torch.ones(3))
    assert tk.replay(out, [], [], [], 4, backend=gpu.backend)[0] is out
    assert (out == 1).all()


def test_gpu_record_below_the_normal_range(gpu):
    """Differences that count as zero, and the largest ones."""
    weights = [torch.full((300,), 1e-40), torch.full((200,), 8e37), -torch.full((200,), 8e37)]
    expected = [torch.zeros(300), torch.full((200,), -8e37), torch.full((200,), 8e37)]
    for bits in BITS:
        truth, reference = [r.clone() for r in expected], gpu.put([r.clone() for r in expected])
        row = tk.record(weights, truth, bits, backend="reference")
        found = tk.record(gpu.put(weights), reference, bits, backend=gpu.backend)
        assert equal([t.cpu() for t in found], row)
        assert equal([r.cpu() for r in reference], truth)


def test_gpu_opcheck(gpu):
    w, reference = tensors([(300,), (5, 40)]), [torch.zeros(300), torch.zeros(5, 40)]
    w, reference = gpu.put(w), gpu.put(reference)
    codes, scales, bad = tk.record(w, reference, 4, backend=gpu.backend)
    ops = torch.ops.twa_kernels
    torch.library.opcheck(ops.record.default, (w, reference, 4, codes, scales, bad, gpu.backend))
    operands = (reference, [codes, codes], [scales, scales], [0.5, 1.0], 4, gpu.backend)
    torch.library.opcheck(ops.replay.default, operands)


@pytest.mark.parametrize("op", ["weights", "reference", "codes", "scales", "out"])
def test_tensors_of_another_device(op, gpu):
    """Here they are on the meta device."""
    w, reference = gpu.put([torch.randn(300)]), gpu.put([torch.zeros(300)])
    codes, scales, bad = tk.record(w, reference, 4, backend=gpu.backend)
    lists = {"weights": w, "reference": reference, "codes": [codes], "scales": [scales]}
    lists["out"] = [reference[0], *gpu.put([torch.zeros(0)])]
    lists[op][-1] = lists[op][-1].to("meta")
    with pytest.raises(ValueError, match=rf"{op}.*: expected device .*, found"):
        if op in ("weights", "reference"):
            operands = lists["weights"], lists["reference"], 4, codes, scales, bad, gpu.backend
            torch.ops.twa_kernels.record.default(*operands)
        else:
            operands = lists["codes"], lists["scales"], [1.0], 4, gpu.backend
            torch.ops.twa_kernels.replay.default(lists["out"], *operands)


def test_gpu_captured(gpu, capture):
    """A graph's tables are its own, and nothing waits for the device."""
    start, weights = trajectory(2)
    expected = [w.clone() for w in start]
    row = tk.record(weights, expected, 4)
    weights, reference = gpu.put(weights), gpu.put(start)
    out = gpu.put([w.clone() for w in start])
    capture()
    found = tk.record(weights, reference, 4, backend=gpu.backend)
    tk.replay(out, [found[0]], [found[1]], [1.0], 4, backend=gpu.backend)
    assert equal([t.cpu() for t in found], row)
    assert equal([r.cpu() for r in reference], expected)
    assert equal([o.cpu() for o in out], expected)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: streams and CUDA graphs")
def test_replay_of_a_graph_records_again(gpu):
    start, *snapshots = trajectory(5)
    expected = [w.clone() for w in start]
    weights, reference = gpu.put([w.clone() for w in snapshots[0]]), gpu.put(start)
    tk.record(weights, reference, 4, backend=gpu.backend)  # kernels are compiled and loaded
    tk.record(snapshots[0], expected, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        row = tk.record(weights, reference, 4, backend=gpu.backend)
    for snapshot in snapshots[1:]:
        for w, new in zip(weights, snapshot, strict=True):
            w.copy_(new)
        graph.replay()
        assert equal([t.cpu() for t in row], tk.record(snapshot, expected, 4))
        assert equal([r.cpu() for r in reference], expected)
