"""pack and unpack: bytes equal to the reference, error bounds, special values, streaming."""

import hashlib
from pathlib import Path

import pytest
import torch
from conftest import BITS, SEGMENTS, SHAPES, has_isa, rows_of, run_python, tensors

import twa_kernels as tk
from twa_kernels import native, scaling
from twa_kernels.backends import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def same_bytes(a, b):
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scales.view(torch.uint8), b.scales.view(torch.uint8))
    torch.testing.assert_close(a.row_scale, b.row_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(a.divisor, b.divisor, rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [1, 5, 17])
@pytest.mark.parametrize("bits", BITS)
def test_bytes_equal_reference(bits, n):
    rows, center = rows_of(n, SHAPES), tensors(SHAPES)
    same_bytes(
        tk.pack(rows, bits, center, SEGMENTS),
        tk.pack(rows, bits, center, SEGMENTS, backend="reference"),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_input_dtypes(bits, dtype):
    rows = rows_of(3, SHAPES, dtype=dtype)
    packed = tk.pack(rows, bits)
    same_bytes(packed, tk.pack(rows, bits, backend="reference"))
    same_bytes(packed, tk.pack([r.float() for r in rows], bits))


def test_many_rows():
    rows = rows_of(512, [(130,)])
    same_bytes(tk.pack(rows, 4), tk.pack(rows, 4, backend="reference"))


def test_scales_as_e4m3_at_every_boundary():
    """Every scale of 4 significant bits, at every exponent, against PyTorch's own conversion."""
    mantissa, exponent = torch.arange(8, 16)[:, None], torch.arange(-126, 120)[None, :]
    values = torch.cat(
        [torch.zeros(1), (mantissa / 8 * 2.0 ** exponent.double()).flatten()]
    ).bfloat16()
    for unit in range(-134, 112):
        ours = scaling._e4m3(values, torch.full_like(values, unit, dtype=torch.int16))
        exact = values.double() * 2.0**-unit
        fits = exact < 256
        assert torch.equal(
            ours[fits], exact[fits].float().to(torch.float8_e4m3fn).view(torch.uint8)
        )


@pytest.mark.parametrize("n", [1, 5, 64])
def test_finished_scales_are_those_of_plain_pytorch(n):
    generator = torch.Generator().manual_seed(n)
    tiles, segments = 700, 3
    mantissa = torch.randint(8, 16, (tiles, n), generator=generator)
    power = torch.randint(-40, 5, (tiles, n), generator=generator)
    scales = (mantissa * 2.0**power).bfloat16()
    scales[torch.rand(tiles, n, generator=generator) < 0.1] = 0
    segment = torch.randint(0, segments, (tiles,), generator=generator, dtype=torch.int32)
    exponent = torch.randint(0, 4, (segments, n), generator=generator).to(torch.int16)
    scaling_of = scaling.Scaling(exponent, torch.ones(n, segments), torch.ones(n, segments))
    expected = scaling._e4m3(scales, exponent[segment.long()])
    lost = int(((scales > 0) & (expected == 0)).sum())
    assert lost and (expected >= 8).any() and ((expected > 0) & (expected < 8)).any()
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            codes, zeros = scaling_of.apply(scales, segment)
            assert torch.equal(codes, expected) and int(zeros) == lost
    finally:
        torch.set_num_threads(before)
    segment[-1] = segments
    with pytest.raises(ValueError, match="refused"):
        scaling_of.apply(scales, segment)


def test_a_zero_tensor_in_a_tiny_segment_is_zero():
    basis = tk.pack(
        [1e-36 * torch.randn(3, 300), torch.zeros(3, 200)], 4, segments=[0, 0], normalize="none"
    )
    assert not tk.unpack(basis)[1].any() and tk.unpack(basis)[0].any()


def test_segments_of_tiles_where_there_are_as_many_tensors():
    rows = [torch.zeros(3, 0), torch.randn(3, 256)]  # two tensors, two tiles
    of_tiles = torch.tensor([0, 1], dtype=torch.int32)
    assert tk.pack(rows, 4, segments=of_tiles).tile_segment.tolist() == [0, 1]
    assert tk.pack(rows, 4, segments=[0, 1]).tile_segment.tolist() == [1, 1]


def test_a_part_stays_with_the_sink_while_the_next_one_is_packed():
    rows, sizes, kept = rows_of(3, [(8192,)] * 4), [(8192,)] * 4, []

    def sink(first, codes, scales):
        for at, part in kept[-1:]:
            assert torch.equal(part, whole.codes[at : at + len(part)])
        kept.append((first, codes))

    whole = tk.pack(rows)
    packer = tk.Packer(3, sizes, sink=sink)
    for r in rows:
        packer.add(r)
    assert [first for first, _ in kept] == [0, 64, 128, 192]


def test_a_refused_tensor_adds_nothing():
    packer = tk.Packer(3, [(20000,)])
    bad = torch.ones(3, 20000)
    bad[1, -1] = torch.nan
    with pytest.raises(tk.NotFiniteError):
        packer.add(bad)
    packer.add(torch.ones(3, 20000))
    same_bytes(packer.finish(), tk.pack([torch.ones(3, 20000)]))


def test_below_the_normal_range_counts_as_zero():
    assert not tk.pack([torch.full((3, 300), 1e-40)]).scales.view(torch.uint8).any()


@pytest.mark.parametrize("n", [300, 1100])
@pytest.mark.parametrize("bits", [8, 3])
def test_many_rows_of_many_tiles(bits, n):
    """The kernels pack fewer tiles at a time when rows are many."""
    rows = rows_of(n, [(128 * 11 + 5,)])
    same_bytes(tk.pack(rows, bits), tk.pack(rows, bits, backend="reference"))


def test_8_bits_clip_nothing():
    rows = [torch.distributions.StudentT(2.0).sample((3, 128 * 9 + 40))]
    packed = tk.pack(rows, 8, normalize="none")
    same_bytes(packed, tk.pack(rows, 8, normalize="none", backend="reference"))
    largest = (
        torch.nn.functional.pad(rows[0], (0, 88)).view(3, 10, 128).abs().amax(-1, keepdim=True)
    )
    error = torch.nn.functional.pad(tk.unpack(packed)[0] - rows[0], (0, 88)).view(3, 10, 128).abs()
    # Half a level for rounding to one, and a share for rounding u / s before that,
    # of a scale that is rounded up by at most 1 / 8.
    assert (error <= 0.51 / 127 * 1.125 * largest).all()


@pytest.mark.parametrize("bits", BITS)
def test_relative_error_is_the_measured_one(bits):
    rows = rows_of(1, SHAPES)
    for back, row in zip(tk.unpack(tk.pack(rows, bits, normalize="none")), rows, strict=True):
        measured = float((back.double() - row).norm() / row.double().norm())
        assert tk.relative_error(row, bits) == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1.0, 1e20, 1e37])
@pytest.mark.parametrize("bits", BITS)
def test_any_magnitude(bits, scale):
    rows = [scale * torch.randn(4, 300, generator=torch.Generator().manual_seed(3)).clamp(-3, 3)]
    a = tk.pack(rows, bits, normalize="none")
    same_bytes(a, tk.pack(rows, bits, normalize="none", backend="reference"))
    assert torch.isfinite(tk.unpack(a)[0]).all()


#: relative error on Gaussian data; published min/max per tensor at 4, 3, 2, 1 bits: .20, .43, 1.1,
#: 4.4
GAUSSIAN_ERROR = {8: 0.0075, 4: 0.098, 3: 0.186, 2: 0.345, 1: 0.61}


@pytest.mark.parametrize("bits", BITS)
def test_gaussian_error(bits):
    v = torch.randn(2, 128 * 500, generator=torch.Generator().manual_seed(1))
    back = tk.unpack(tk.pack([v], bits, normalize="none"))[0]
    assert ((back - v).norm() / v.norm()).item() <= GAUSSIAN_ERROR[bits]


@pytest.mark.parametrize("bits", BITS)
def test_unpack_is_the_formula(bits, basis_of):
    basis = basis_of(5, bits)
    for ours, spec in zip(tk.unpack(basis), tk.unpack(basis, backend="reference"), strict=True):
        torch.testing.assert_close(ours, spec, rtol=3e-7, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_code_bit_map(bits):
    """Byte packing and unpacking are inverse, and every column is where the layout says."""
    codes = torch.randint(0, 2**bits, (7, 128), generator=torch.Generator().manual_seed(bits))
    packed = reference.codes_to_bytes(codes, bits)
    assert packed.shape == (7, 16 * bits)
    assert torch.equal(reference.bytes_to_codes(packed, bits), codes)
    for row, expected in zip(packed, codes, strict=True):
        found = [native._C.get_code(bits, bytes(row.tolist()), c) for c in range(128)]
        assert found == expected.tolist()


def test_levels_agree():
    for bits in BITS:
        assert [native._C.level(bits, c) for c in range(2**bits)] == tk.layout.LEVELS[bits]


@pytest.mark.parametrize("bits", BITS)
def test_normalize(bits):
    rows = [
        torch.randn(6, 300) * torch.tensor([0.01, 0.1, 1, 2, 3, 100.0])[:, None],
        torch.randn(6, 77),
    ]
    norms = torch.cat(rows, 1).norm(dim=1).double()
    row = tk.pack(rows, bits, normalize="row")
    torch.testing.assert_close(
        row.divisor, (norms / norms.sort().values[1])[:, None].expand(-1, 2), rtol=1e-6, atol=0
    )
    assert torch.equal(
        tk.pack(rows, bits, normalize="none").divisor, torch.ones(6, 2, dtype=torch.float64)
    )


@pytest.mark.parametrize("bits", BITS)
def test_zero_rows_and_constant_tensors(bits):
    rows = [torch.zeros(3, 200), torch.randn(3, 200)]
    rows[1][1] = 0
    for normalize in ("row", "none"):
        basis = tk.pack(rows, bits, normalize=normalize)
        dense = tk.unpack(basis)
        assert all(torch.isfinite(t).all() for t in dense)
        assert not dense[0].any() and not dense[1][1].any() and dense[1][0].any()
        assert not basis.divisor[:, 0].any()


def test_scales_below_the_range_are_zero_with_a_warning():
    rows = [torch.randn(2, 300), 1e-7 * torch.randn(2, 300)]
    with pytest.warns(UserWarning, match="6 of 12 groups are zero"):
        basis = tk.pack(rows, 4, segments=[0, 0])
    assert not tk.unpack(basis)[1].any()
    assert tk.unpack(tk.pack(rows, 4))[1].any()


def test_packer_streams_to_the_same_bits():
    rows, center = rows_of(4, SHAPES), tensors(SHAPES)
    packer = tk.Packer(4, SHAPES, 4, SEGMENTS)
    for r, c in zip(rows, center, strict=True):
        packer.add(list(r), c)
    a, b = packer.finish(), tk.pack(rows, 4, center, SEGMENTS)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.row_scale, b.row_scale)


def test_two_packers_in_one_memory():
    rows, center = rows_of(4, SHAPES), tensors(SHAPES)
    expected = tk.pack(rows, 4, center, SEGMENTS)
    tiles = len(expected.codes)
    made = []

    def allocator():
        """The first packer makes the memory; the second one gets the same."""
        calls = iter(range(3))

        def allocate(shape, dtype):
            if (k := next(calls)) == len(made):
                made.append(torch.zeros(shape, dtype=dtype))
            assert made[k].shape == shape and made[k].dtype == dtype
            return made[k]

        return allocate

    packers = [tk.Packer(4, SHAPES, 4, SEGMENTS, allocate=allocator()) for _ in range(2)]
    for k, (r, c) in enumerate(zip(rows, center, strict=True)):
        packers[k % 2].add(list(r), c)
        packers[1 - k % 2].skip()
    sum_sq = packers[0].sum_sq + packers[1].sum_sq
    max_scale = torch.maximum(packers[0].max_scale, packers[1].max_scale)
    for packer in packers:
        packer.sum_sq.copy_(sum_sq)
        packer.max_scale.copy_(max_scale)
    bases = [packer.finish() for packer in packers]
    sizes = [((tiles, 4, 64), torch.uint8), ((tiles, 4), torch.bfloat16), ((tiles, 4), torch.uint8)]
    assert [(tuple(t.shape), t.dtype) for t in made] == sizes
    for basis in bases:
        assert basis.codes.data_ptr() == made[0].data_ptr()
        assert basis.scales.data_ptr() == made[2].data_ptr()
        for a, b in zip(basis.operands[:4], expected.operands[:4], strict=True):
            assert torch.equal(a, b)


def test_a_basis_of_some_tensors():
    rows = rows_of(4, SHAPES)
    basis = tk.pack(rows, 4, tensors(SHAPES), SEGMENTS)
    x = torch.randn(4, basis.num_segments, generator=torch.Generator().manual_seed(5))
    whole = tk.reconstruct(basis, x)
    for first in range(len(SHAPES)):
        for count in range(1, len(SHAPES) - first + 1):
            part, segments = basis.select(first, count)
            assert part.shapes == basis.shapes[first : first + count]
            of_part = tk.reconstruct(part, x[:, segments].contiguous())
            for a, b in zip(of_part, whole[first : first + count], strict=True):
                assert torch.equal(a, b)


def digests(isa):
    """What this instruction set makes of every op, with 1, 2, 3 and 8 threads."""
    code = f"""
import hashlib, torch, twa_kernels as tk, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from conftest import rows_of, tensors, SHAPES, SEGMENTS
for threads in (1, 2, 3, 8):
    torch.set_num_threads(threads)
    h = hashlib.sha256()
    for bits in (8, 4, 3, 2, 1):
        b = tk.pack(rows_of(6, SHAPES), bits, tensors(SHAPES), SEGMENTS)
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(5))
        packed = [b.codes, b.scales.view(torch.uint8), b.row_scale]
        theta = tk.reconstruct(b, x, tensors(SHAPES))
        for t in [*packed, *tk.unpack(b), tk.project(b, tensors(SHAPES, 9)), *theta]:
            h.update(t.contiguous().numpy().tobytes())
        out, options = [torch.empty(s) for s in SHAPES], dict(lr=0.1, momentum=0.9)
        sgd = dict(rule="sgd", options=options, state=dict())
        c = tk.step(b, tensors(SHAPES, 9), x, out, tensors(SHAPES), **sgd)
        for t in [c, x, *out]:
            h.update(t.contiguous().numpy().tobytes())
    print(h.hexdigest())
"""
    found = run_python(code, TWA_KERNELS_ISA=isa).split()
    assert len(found) == 4
    return found


@pytest.fixture(scope="module")
def portable_digests():
    return digests("portable")


def test_every_thread_count_gives_the_same_bits(portable_digests):
    assert len(set(portable_digests)) == 1


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(isa, portable_digests):
    if not has_isa(isa):
        pytest.skip(f"this processor lacks {isa}")
    assert digests(isa) == portable_digests


PACKED_ALIKE = """
import hashlib, torch, twa_kernels as tk

# One full group of each size of number, zeros and numbers below the normal range among them, in the
# quads of the kernels at every place; all tails.
n, sizes = 9, [1, 31, 32, 127, 128, 8 * 128, 9 * 128 + 5, 21 * 128 + 100]
generator = torch.Generator().manual_seed(7)
powers = torch.tensor([0.0, 1e-44, 1e-38, 1e-30, 1e-3, 1.0, 2.0, 1e4, 1e30, 1e37])
for threads in (1, 3):
    torch.set_num_threads(threads)
    h = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bits in (8, 4, 3, 2, 1):
            packer = tk.Packer(n, [(size,) for size in sizes], bits)
            for size in sizes:
                rows = torch.randn(n, size, generator=generator.manual_seed(size)).clamp(-3, 3)
                power = powers[torch.randint(10, (n, -(-size // 128)), generator=generator)]
                if dtype == torch.float16:
                    power = power.clamp(0, 1e4)
                rows = (rows * power.repeat_interleave(128, 1)[:, :size]).to(dtype)
                center = torch.empty(size)
                packer.add_columns(rows, 0, center, torch.rand(n, generator=generator).tolist())
                packer.end_tensor()
                h.update(center.numpy().tobytes())
            for t in (packer.codes, packer.scales.view(torch.int16), packer.sum_sq):
                h.update(t.numpy().tobytes())
    print(h.hexdigest())
"""


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_every_instruction_set_packs_any_input_alike(isa):
    if not has_isa(isa):
        pytest.skip(f"this processor lacks {isa}")
    portable = run_python(PACKED_ALIKE, TWA_KERNELS_ISA="portable").split()
    assert run_python(PACKED_ALIKE, TWA_KERNELS_ISA=isa).split() == portable
    assert len(portable) == 2 and len(set(portable)) == 1


def test_repeats_give_the_same_bits(basis_of):
    basis, grads = basis_of(5, 4), tensors(SHAPES, 9)
    digests = {
        hashlib.sha256(tk.project(basis, grads).numpy().tobytes()).hexdigest() for _ in range(12)
    }
    assert len(digests) == 1


def test_not_finite_is_located():
    rows = rows_of(4, SHAPES)
    rows[6][2, 8000] = float("inf")
    for backend in ("cpp", "reference"):
        with pytest.raises(tk.NotFiniteError, match="row 2 of tensor 6 at column 8000") as error:
            tk.pack(rows, 4, backend=backend)
        assert (error.value.row, error.value.tensor, error.value.column) == (2, 6, 8000)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(bits=5), ValueError, "bits must be one of"),
        (dict(rows=[]), ValueError, "at least one tensor"),
        (
            dict(rows=[torch.zeros(2, 3, dtype=torch.int32)]),
            TypeError,
            r"rows\[0\]: expected one of .* found torch.int32",
        ),
        (dict(rows=[torch.zeros(2, 3, dtype=torch.float64)]), TypeError, "float64"),
        (dict(rows={"weight": torch.zeros(2, 3)}), TypeError, r"rows\[0\]: .*found str"),
        (dict(rows=[{"weight": torch.zeros(3)}]), TypeError, r"rows\[0\]: .*found dict"),
        (dict(rows=[[torch.zeros(3), [0.0] * 3]]), TypeError, r"rows\[0\]: .*found list"),
        (
            dict(rows=[[torch.zeros(3), torch.zeros(4)]]),
            ValueError,
            r"row 1: expected shape \(3,\), found \(4,\)",
        ),
        (dict(center=[torch.zeros(4)]), ValueError, r"center: expected shape \(3,\), found \(4,\)"),
        (dict(center=[torch.zeros(3)] * 2), ValueError, "center: expected 1 tensors, found 2"),
        (dict(segments=[0, 1]), ValueError, "segments: expected 1 entries"),
        (dict(segments=[-1]), ValueError, "at least 0"),
        (dict(segments=[0.5]), TypeError, "integers"),
        (dict(normalize="segment"), ValueError, "normalize: expected one of"),
        (dict(backend="fpga"), RuntimeError, "unknown backend 'fpga'"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(rows=[torch.randn(2, 3)], bits=4) | change
    with pytest.raises(error, match=message):
        tk.pack(**arguments)


def test_a_basis_is_saved_loaded_and_compared(tmp_path):
    basis = tk.pack([torch.randn(3, 300), torch.randn(3, 7, 5)], bits=2)
    torch.save(basis, tmp_path / "basis.pt")
    with torch.serialization.safe_globals([tk.PackedBasis]):
        loaded = torch.load(tmp_path / "basis.pt")
    assert all(map(torch.equal, tk.unpack(loaded), tk.unpack(basis)))
    assert basis == basis and loaded != basis


# GPU kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_gpu_bytes_equal_reference(bits, gpu):
    rows, center = rows_of(3, SHAPES), tensors(SHAPES)
    rows[3][1] = rows[3][0]
    rows[4][2] = center[4]  # a zero row
    ours = tk.pack(gpu.put(rows), bits, gpu.put(center), SEGMENTS, backend=gpu.backend)
    truth = tk.pack(rows, bits, center, SEGMENTS, backend="reference")
    same_bytes(ours.to("cpu"), truth)


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e37])
@pytest.mark.parametrize("bits", [8, 4])
def test_gpu_any_magnitude(bits, scale, gpu):
    rows = [r * scale for r in rows_of(2, [(300,), (5, 7)])]
    same_bytes(
        tk.pack(gpu.put(rows), bits, backend=gpu.backend).to("cpu"),
        tk.pack(rows, bits, backend="reference"),
    )


def test_gpu_input_dtypes(gpu):
    """Rows of several dtypes in one tensor, a center of another."""
    rows = [[t.to(d) for t, d in zip(r, DTYPES, strict=True)] for r in rows_of(3, [(300,), (129,)])]
    center = [t.bfloat16() for t in tensors([(300,), (129,)])]
    wide = [torch.stack([t.float() for t in r]) for r in rows]
    ours = tk.pack(gpu.put(rows), 4, gpu.put(center), backend=gpu.backend).to("cpu")
    same_bytes(ours, tk.pack(wide, 4, [c.float() for c in center], backend="reference"))


def test_gpu_not_finite_is_located(gpu):
    rows = rows_of(3, [(10,), (300,)])
    rows[1][2, 7] = torch.inf
    with pytest.raises(tk.NotFiniteError, match="row 2 of tensor 1 at column 7"):
        tk.pack(gpu.put(rows), 4, backend=gpu.backend)


@pytest.mark.parametrize("bits", BITS)
def test_gpu_unpack(bits, basis_of, gpu):
    gpu.needs("unpack")
    basis = basis_of(5, bits)
    ours = tk.unpack(gpu.put(basis), gpu.backend)
    assert all(torch.equal(o.cpu(), t) for o, t in zip(ours, tk.unpack(basis), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 127, 129, 1024, 1025, 8192 + 77, 30_000])
def test_the_center_in_the_same_read(dtype, numel):
    """Packing with weights is averaging, then packing: the same bits of center and basis.

    For rows whose weight is 0, too.
    """
    generator = torch.Generator().manual_seed(numel)
    rows = [torch.randn(numel, generator=generator).to(dtype) for _ in range(5)]
    weights = [0.25, 0.0, -0.5, 1.0, 0.25]
    made = []
    for fused in (True, False):
        packer, center = tk.Packer(5, [(numel,)]), torch.full((numel,), torch.nan)
        if not fused:
            tk.average(rows, weights, center)
        for begin in range(0, numel, 8192):
            at = slice(begin, begin + 8192)
            packer.add_columns([r[at] for r in rows], begin, center[at], weights if fused else None)
        packer.end_tensor()
        made.append((packer.finish(), center))
    (a, center), (b, expected) = made
    assert (
        torch.equal(center, expected)
        and torch.equal(a.codes, b.codes)
        and torch.equal(a.scales.view(torch.uint8), b.scales.view(torch.uint8))
    )
    assert torch.equal(a.row_scale, b.row_scale) and torch.equal(a.divisor, b.divisor)


def test_the_center_in_the_same_read_refuses():
    packer, rows = tk.Packer(2, [(200,)]), [torch.zeros(200)] * 2
    with pytest.raises(ValueError, match="found 3 for 2 rows"):
        packer.add_columns(rows, 0, torch.zeros(200), [1.0, 1.0, 1.0])
    with pytest.raises(TypeError, match=r"out: expected torch\.float32"):
        packer.add_columns(rows, 0, torch.zeros(200, dtype=torch.bfloat16), [1.0, 1.0])
    with pytest.raises(tk.NotFiniteError):
        packer.add_columns(
            [torch.full((200,), torch.nan), rows[0]], 0, torch.zeros(200), [1.0, 1.0]
        )
