"""project against the float64 reference on the same packed basis."""

import mmap

import pytest
import torch
from conftest import BITS, ON_GPU, SHAPES, exhaustive, rows_of, tensors

import twa_kernels as tk
from twa_kernels.backends import reference

#: dtype, bound relative to |P| |g| of the same dtype's values: the docstring's 2^-23 and the
#: result's own rounding
BOUNDS = [(torch.float32, 2**-22), (torch.bfloat16, 2**-22), (torch.float16, 2**-22)]


def exact(basis, grads):
    return reference.project(basis.view, [g.double() for g in grads])


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize("n", [1, 5, 16, 33])
@pytest.mark.parametrize("bits", BITS)
def test_against_float64(bits, n, dtype, bound, basis_of):
    basis, grads = basis_of(n, bits), tensors(SHAPES, 7, dtype)
    norm_p = (
        torch.cat([t.reshape(n, -1) for t in tk.unpack(basis)], 1)
        .double()
        .norm(dim=1, keepdim=True)
    )
    norm_g = torch.cat([g.flatten() for g in grads]).double().norm()
    assert (
        (tk.project(basis, grads).double() - exact(basis, grads)).abs() <= bound * norm_p * norm_g
    ).all()


@pytest.mark.parametrize("bits", BITS)
def test_worst_case_of_the_bound(bits):
    """One large gradient where P is small: the other 127 are rounded to its unit."""
    row = torch.ones(1, 128)
    row[0, 0] = 1e-6
    basis, grads = tk.pack([row], bits, normalize="none"), [torch.full((128,), 2.0**-24 * 1.01)]
    grads[0][0] = 1.0
    p = tk.unpack(basis)[0].double()
    assert (
        tk.project(basis, grads).double() - exact(basis, grads)
    ).abs().item() <= 2.0**-23 * p.abs().sum().item() + 1e-7 * p[0, 0].abs().item()


def test_no_worse_than_plain_pytorch():
    """At most twice the error of a float32 matmul on the dequantised rows."""
    rows = rows_of(64, [(100_000,)])
    basis, grads = tk.pack(rows, 4), tensors([(100_000,)], 7)
    truth = exact(basis, grads)
    plain = tk.unpack(basis)[0] @ grads[0]
    assert (tk.project(basis, grads)[:, 0] - truth[:, 0]).abs().max() <= 2 * (
        plain - truth[:, 0]
    ).abs().max() + 1e-7


@pytest.mark.parametrize("factor", [1e-38, 1e-30, 1e30])
def test_any_gradient_magnitude(factor, basis_of):
    basis, grads = basis_of(5, 4), [g * factor for g in tensors(SHAPES, 7)]
    truth = exact(basis, grads)
    assert ((tk.project(basis, grads) - truth).abs() <= 1e-5 * truth.abs().max()).all()


@pytest.mark.parametrize("bits", BITS)
def test_missing_gradients_count_as_zero(bits, basis_of):
    basis, grads = basis_of(5, bits), tensors(SHAPES, 7)
    some = [g if k % 2 else None for k, g in enumerate(grads)]
    zeros = [g if k % 2 else torch.zeros_like(g) for k, g in enumerate(grads)]
    assert torch.equal(tk.project(basis, some), tk.project(basis, zeros))


def test_strided_gradients(basis_of):
    basis, grads = basis_of(5, 4), tensors(SHAPES, 7)
    strided = [
        g.t().contiguous().t() if g.dim() == 2 else torch.stack([g, g], -1)[..., 0] for g in grads
    ]
    assert not strided[-1].is_contiguous() and not strided[1].is_contiguous()
    assert torch.equal(tk.project(basis, strided), tk.project(basis, grads))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradient_makes_its_segment_nan(bits, value, basis_of):
    basis, grads = basis_of(5, bits), tensors(SHAPES, 7)
    clean = tk.project(basis, grads)
    grads[5].view(-1)[77] = value  # segment 3
    c = tk.project(basis, grads)
    assert c[:, 3].isnan().all()
    others = [0, 1, 2, 4]
    assert torch.equal(c[:, others], clean[:, others])


def test_beyond_2_to_the_31_columns():
    """Two tensors, the second past column 2^31.

    They are on memory of which only the pages that are written exist.
    """
    first, second = 2**31 + 128, 300

    def sparse(count, dtype):
        memory = mmap.mmap(
            -1,
            count * dtype.itemsize,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0),
        )
        return torch.frombuffer(memory, dtype=dtype, count=count)

    tiles = first // 128 + 3
    codes = sparse(tiles * 16, torch.uint8).view(tiles, 1, 16)
    scales = torch.full((tiles, 1), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)  # 1.0
    segment = torch.zeros(tiles, dtype=torch.int32)
    segment[-3:] = 1
    shapes = (torch.Size((first,)), torch.Size((second,)))
    basis = tk.PackedBasis(
        codes, scales, torch.ones(1, 2), segment, torch.ones(1, 2, dtype=torch.float64), shapes, 1
    )
    grads = [sparse(first, torch.bfloat16), torch.arange(300.0)]
    grads[0][-1], grads[0][5] = 2.0, 0.5
    codes[-1, 0, 0] = 1  # column 256 of the second tensor: +127 instead of -127
    expected = [-127 * 2.5, -127.0 * (sum(range(300)) - 2 * 256)]
    assert tk.project(basis, grads).tolist() == [expected]


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ([torch.zeros(3)], ValueError, "grads: expected 9 tensors, found 1"),
        (
            [torch.zeros(s) for s in SHAPES[:-1]] + [torch.zeros(7)],
            ValueError,
            r"grads\[8\]: expected 3300 elements",
        ),
        ([torch.zeros(s, dtype=torch.float64) for s in SHAPES], TypeError, r"grads\[0\].*float64"),
        (
            [torch.zeros(s, device="meta") for s in SHAPES],
            ValueError,
            r"grads\[0\]: expected device cpu, found meta",
        ),
    ],
)
def test_bad_input(grads, error, message, basis_of):
    with pytest.raises(error, match=message):
        tk.project(basis_of(5, 4), grads)


# GPU kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "n", "dtype"),
    [(bits, n, torch.float32) for bits in BITS for n in (1, 33)]
    + [exhaustive(bits, 17, torch.float32) for bits in BITS]
    + [(bits, 5, d) for bits in (4, 1) for d in (torch.bfloat16, torch.float16)],
)
def test_gpu_against_float64(bits, n, dtype, basis_of, gpu):
    gpu.needs("project")
    basis, grads = basis_of(n, bits), tensors(SHAPES, 7, dtype)
    norm_p = (
        torch.cat([t.reshape(n, -1) for t in tk.unpack(basis)], 1)
        .double()
        .norm(dim=1, keepdim=True)
    )
    norm_g = torch.cat([g.flatten() for g in grads]).double().norm()
    ours = tk.project(gpu.put(basis), gpu.put(grads), gpu.backend).cpu().double()
    assert ((ours - exact(basis, grads)).abs() <= 2**-22 * norm_p * norm_g).all()


@pytest.mark.parametrize("n", [72, 130])
@pytest.mark.parametrize("bits", [4, 1])
def test_gpu_blocks_of_rows(bits, n, gpu):
    gpu.needs("project")
    shapes = [(130,), (700,)]
    basis, grads = tk.pack(rows_of(n, shapes), bits, segments=[1, 0]), tensors(shapes, 7)
    truth = exact(basis, grads)
    ours = tk.project(gpu.put(basis), gpu.put(grads), gpu.backend).cpu()
    assert ((ours - truth).abs() <= 2e-6 * truth.abs().max()).all()


def test_gpu_mixed_dtypes_missing_and_strided_gradients(basis_of, gpu):
    gpu.needs("project")
    basis, grads = basis_of(5, 4), tensors(SHAPES, 7)
    grads[2], grads[6] = grads[2].bfloat16(), grads[6].half()
    grads[1], grads[5] = None, grads[5].t().contiguous().t()
    full = [torch.zeros(s) if g is None else g for g, s in zip(grads, SHAPES, strict=True)]
    truth = exact(basis, full)
    ours = tk.project(gpu.put(basis), gpu.put(grads), gpu.backend).cpu()
    assert ((ours - truth).abs() <= 2e-6 * truth.abs().max()).all()


@pytest.mark.parametrize("factor", [1e-38, 1e-30, 1e30])
def test_gpu_any_gradient_magnitude(factor, basis_of, gpu):
    gpu.needs("project")
    basis, grads = basis_of(5, 4), [g * factor for g in tensors(SHAPES, 7)]
    truth = exact(basis, grads)
    assert (
        (tk.project(gpu.put(basis), gpu.put(grads), gpu.backend).cpu() - truth).abs()
        <= 1e-5 * truth.abs().max()
    ).all()


@pytest.mark.parametrize("bits", BITS)
def test_gpu_gradient_of_one_sign(bits, gpu):
    """Sums over rows of both signs, of numbers of one sign: what codes stand for, less what they
    are, is a sum far larger than the result.
    """
    gpu.needs("project")
    basis, grads = tk.pack(rows_of(8, [(1000,)]), bits), [torch.linspace(1, 1.1, 1000)]
    truth, plain = exact(basis, grads), tk.unpack(basis)[0] @ grads[0]
    ours = tk.project(gpu.put(basis), gpu.put(grads), gpu.backend).cpu()[:, 0]
    assert (ours - truth[:, 0]).abs().max() <= 2 * (plain - truth[:, 0]).abs().max() + 1e-7


def test_many_items_of_a_segment_are_added_in_groups(basis_of, monkeypatch):
    """Of Triton: as without groups but for the last bit, whatever the segments' sizes."""
    module = pytest.importorskip("twa_kernels.backends.triton.project")
    if ON_GPU:
        pytest.skip("runs in Triton's interpreter")
    basis, grads = basis_of(5, 4), tensors(SHAPES, 7)
    plain = tk.project(basis, grads, "triton")
    used, group = [], module.group_kernel

    class Counted:
        def __getitem__(self, grid):
            used.append(grid)
            return group[grid]

    monkeypatch.setattr(module, "group_kernel", Counted())
    monkeypatch.setattr(module, "LONG", 0)
    grouped = tk.project(basis, grads, "triton")
    assert used == [(module.GROUPS * basis.num_segments, 1)]
    assert ((grouped - plain).abs() <= 2**-23 * plain.abs()).all()


@pytest.mark.parametrize("count", [1, 31, 128, 4095, 4096, 4097, 9000])
def test_groups_cover_every_item(count):
    """Sums of whole numbers, which are exact in any order: two segments, the first without an item
    of the second.
    """
    project = pytest.importorskip("twa_kernels.backends.triton.project")
    if ON_GPU:
        pytest.skip("runs in Triton's interpreter")
    partial = torch.arange(count * 2.0).reshape(count, 2)
    begin = torch.tensor([0, count // 3, count], dtype=torch.int32)
    groups = torch.full((2 * project.GROUPS, 2), float("nan"), dtype=torch.float64)
    project.group_kernel[2 * project.GROUPS, 1](
        partial, begin, groups, 2, GROUPS=project.GROUPS, ITEMS=128, ROWS=16
    )
    found = groups.view(2, project.GROUPS, 2).sum(1)
    cut = count // 3
    wanted = torch.stack([partial[:cut].double().sum(0), partial[cut:].double().sum(0)])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_gpu_non_finite_gradient_makes_its_segment_nan(value, basis_of, gpu):
    gpu.needs("project")
    basis, grads = gpu.put(basis_of(5, 4)), gpu.put(tensors(SHAPES, 7))
    clean = tk.project(basis, grads, gpu.backend)
    grads[5].view(-1)[77] = value  # segment 3
    c = tk.project(basis, grads, gpu.backend)
    assert c[:, 3].isnan().all()
    assert torch.equal(c[:, [0, 1, 2, 4]], clean[:, [0, 1, 2, 4]])


def test_gpu_repeats_give_the_same_bits(basis_of, gpu):
    gpu.needs("project")
    basis, grads = gpu.put(basis_of(5, 4)), gpu.put(tensors(SHAPES, 7))
    first = tk.project(basis, grads, gpu.backend)
    assert all(
        torch.equal(first, tk.project(basis, grads, gpu.backend))
        for _ in range(11 if gpu.device == "cuda" else 1)
    )


def test_gpu_segments_inside_a_tensor(gpu):
    gpu.needs("project")
    tiles = torch.tensor([0, 0, 1, 1, 1, 0, 2, 2])
    basis, g = tk.pack([torch.randn(4, 1000)], 4, segments=tiles), torch.randn(1000)
    truth = exact(basis, [g])
    assert (
        (tk.project(gpu.put(basis), gpu.put(g), gpu.backend).cpu() - truth).abs()
        <= 2e-6 * truth.abs().max()
    ).all()


def test_gpu_beyond_2_to_the_31_columns(gpu):
    """A tensor past column 2^31, on a GPU's memory; the interpreter would take hours."""
    gpu.needs("project")
    if gpu.device != "cuda":
        pytest.skip("needs a GPU: 16.8 million tiles are too many for Triton's interpreter")
    first, second = 2**31 + 128, 300
    tiles = first // 128 + 3
    codes = torch.zeros(tiles, 1, 16, dtype=torch.uint8, device="cuda")
    scales = torch.full((tiles, 1), 0x38, dtype=torch.uint8, device="cuda").view(
        torch.float8_e4m3fn
    )
    segment = torch.zeros(tiles, dtype=torch.int32)
    segment[-3:] = 1
    shapes = (torch.Size((first,)), torch.Size((second,)))
    one = torch.ones(1, 2, device="cuda")
    basis = tk.PackedBasis(codes, scales, one, segment.cuda(), one.double(), shapes, 1)
    grads = [
        torch.zeros(first, dtype=torch.bfloat16, device="cuda"),
        torch.arange(300.0, device="cuda"),
    ]
    grads[0][-1], grads[0][5] = 2.0, 0.5
    codes[-1, 0, 0] = 1
    assert tk.project(basis, grads, gpu.backend).tolist() == [
        [-127 * 2.5, -127.0 * (sum(range(300)) - 2 * 256)]
    ]
    out = [torch.empty_like(g) for g in grads]
    tk.reconstruct(basis, one, out=out, backend=gpu.backend)
    assert out[0][-1] == -127 and out[1][0] == -127 and out[1][256] == 127
