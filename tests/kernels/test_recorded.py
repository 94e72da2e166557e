"""Packer.add_recorded: codes of `record` side by side, squared norms of what they decode to."""

import itertools

import pytest
import torch
from conftest import BITS, SEGMENTS, SHAPES, tensors

import twa_kernels as tk
from twa_kernels.backends import reference
from twa_kernels.layout import tile_offsets
from twa_kernels.recorded import squared_norms

SIZES = [(1,), (0,), (8192 * 2 + 77,), (130, 10), (64, 256)]


def recorded(shapes, bits, n=3):
    """Per tensor: codes and scales of each of n rows."""
    made = []
    for k, shape in enumerate(shapes):
        ref, rows = torch.zeros(shape), []
        for r in range(n):
            (w,) = tensors([shape], seed=10 * k + r)
            rows.append(tk.record([w], [ref], bits)[:2])
        made.append(tuple(zip(*rows, strict=True)))
    return made


def packed(shapes, bits, made, segments=None, parts=None, **options):
    """The packer after all tensors, each in parts that end at these tiles."""
    packer = tk.Packer(len(made[0][0]), shapes, bits, segments, **options)
    for codes, scales in made:
        ends = [*(p for p in parts or () if p < len(codes[0])), len(codes[0])]
        for a, b in itertools.pairwise([0, *ends]):
            packer.add_recorded([c[a:b] for c in codes], [s[a:b] for s in scales], 128 * a)
        packer.end_tensor()
    return packer


def decoded(shape, codes, scales, bits):
    (out,) = tk.replay([torch.zeros(shape)], [codes], [scales], [1.0], bits)
    return out.double().flatten()


@pytest.mark.parametrize("bits", BITS)
def test_codes_and_sums(bits):
    """Against rows decoded one by one; tensor 1 shares its segment with tensor 3."""
    made, segments = recorded(SIZES, bits), [0, 1, 2, 1, 3]
    packer = packed(SIZES, bits, made, segments)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for k, (shape, (codes, scales)) in enumerate(zip(SIZES, made, strict=True)):
        found, found_scales = packer.storage(k)
        assert torch.equal(found, torch.stack(codes, 1))
        assert torch.equal(found_scales.view(torch.bfloat16), torch.stack(scales, 1))
        for r in range(3):
            row = decoded(shape, codes[r], scales[r], bits)
            expected[r, segments[k]] += row.square().sum()
    torch.testing.assert_close(packer.sum_sq, expected, rtol=1e-13, atol=0)
    for l, at in enumerate(([0], [1, 3], [2], [4])):
        most = [max(made[k][1][r].amax().item() for k in at if k != 1) for r in range(3)]
        assert packer.max_scale[:, l].tolist() == most


@pytest.mark.parametrize("bits", BITS)
def test_squared_norms_are_exact(bits):
    """Every byte, everywhere in a tile; the padding does not count."""
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 256, (9000, 16 * bits), generator=g, dtype=torch.uint8)
    scales = torch.rand(9000, generator=g).view(torch.int32).bitwise_and_(~0xFFFFF)
    scales = scales.view(torch.float32).bfloat16()
    levels = torch.tensor(tk.layout.LEVELS[bits])[reference.bytes_to_codes(codes, bits)]
    for numel in (9000 * 128, 9000 * 128 - 1, 8999 * 128 + 1):
        whole = levels.square()
        whole[-1, numel - 8999 * 128 :] = 0
        expected = whole.sum(1).double() * scales.double().square()
        assert torch.equal(squared_norms(codes, scales, bits, numel), expected)


@pytest.mark.parametrize("bits", [4, 3])
def test_the_basis_decodes_to_the_rows(bits):
    made = recorded(SHAPES, bits)
    basis = packed(SHAPES, bits, made, SEGMENTS).finish("none")
    for k, rows in enumerate(tk.unpack(basis)):
        for r, row in enumerate(rows):
            expected = decoded(SHAPES[k], made[k][0][r], made[k][1][r], bits)
            torch.testing.assert_close(row.double().flatten(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bits", BITS)
def test_parts_and_threads_give_the_same_bits(bits):
    made = recorded(SIZES, bits)
    tiles = tile_offsets([torch.Size(shape).numel() for shape in SIZES])
    segments = [t // 3 for t in range(tiles[-1])]  # below tensors, as `chunk` makes them
    expected, threads = packed(SIZES, bits, made, segments), torch.get_num_threads()
    try:
        for count, parts in ((1, [64, 128]), (2, [64]), (8, [1, 2, 5, 77]), (3, None)):
            torch.set_num_threads(count)
            found = packed(SIZES, bits, made, segments, parts)
            for name in ("codes", "scales", "sum_sq", "max_scale"):
                assert torch.equal(getattr(found, name), getattr(expected, name)), name
    finally:
        torch.set_num_threads(threads)


def test_a_sink_gets_the_parts():
    made, parts = recorded(SIZES, 4), {}

    def sink(first, codes, scales):
        parts[first] = codes.clone(), scales.clone()

    packed(SIZES, 4, made, parts=[64], sink=sink)
    whole = packed(SIZES, 4, made)
    for first, (codes, scales) in parts.items():
        at = slice(first, first + len(codes))
        assert torch.equal(codes, whole.codes[at])
        assert torch.equal(scales, whole.scales[at])


def test_after_other_columns():
    """Rows as they are and recorded ones in one tensor."""
    rows = [torch.randn(384) for _ in range(2)]
    packer = tk.Packer(2, [(384,)])
    packer.add_columns([r[:128] for r in rows], 0)
    rest = [tk.record([r[128:]], [torch.zeros(256)])[:2] for r in rows]
    packer.add_recorded(*zip(*rest, strict=True), 128)
    packer.end_tensor()
    expected = tk.pack([torch.stack(rows)])
    found = packer.finish()
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales.view(torch.uint8), expected.scales.view(torch.uint8))


def test_bad_input():
    ((codes, scales),) = recorded([(300,)], 4)
    packer = tk.Packer(3, [(300,)])
    for args, message in (
        ((codes[:2], scales), "expected 3 of each, one per row, found 2 and 3"),
        ((codes, scales, 128), "tensor 0: expected at most 3 tiles from column 0 on, found 3 from"),
        (([torch.cat([c, c]) for c in codes], scales), "expected at most 3 tiles .* found 6"),
        (([c[:2] for c in codes], scales), r"scales\[0\]: expected shape \(2,\), found \(3,\)"),
        (([c[:, :32] for c in codes], scales), r"codes\[0\]: expected shape \(3, 64\)"),
        ((codes, [*scales[:2], -scales[2]]), "scales: expected finite numbers of 4 significant"),
        ((codes, [*scales[:2], scales[2] / 0]), "scales: expected finite numbers of 4 significant"),
        ((codes, [*scales[:2], scales[2] * 1.3]), "scales: expected finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            packer.add_recorded(*args)
    with pytest.raises(TypeError, match=r"scales\[0\]: expected torch.bfloat16"):
        packer.add_recorded(codes, [s.float() for s in scales])
    with pytest.raises(TypeError, match=r"codes\[0\]: expected torch.uint8"):
        packer.add_recorded([c.int() for c in codes], scales)
    with pytest.raises(ValueError, match="expected all 300 columns, found 0"):
        packer.end_tensor()
    assert not packer.sum_sq.any()
    packer.add_recorded([c[:2] for c in codes], [s[:2] for s in scales])
    with pytest.raises(ValueError, match="expected the rest of its columns, 256 were added"):
        packer.add([torch.zeros(300)] * 3)
    packer.add_recorded([c[2:] for c in codes], [s[2:] for s in scales], 256)
    packer.end_tensor()
    with pytest.raises(ValueError, match="all 1 tensors were added already"):
        packer.add_recorded(codes, scales)
