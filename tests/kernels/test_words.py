"""The pieces of the Triton kernels.

Every assembly block against the tables of levels, the three ways to express them against each
other.
"""

import re

import interpreter
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conftest import BITS, ON_GPU, SEGMENTS, SHAPES, rows_of, tensors

import twa_kernels as tk
from twa_kernels import layout
from twa_kernels.backends import reference
from twa_kernels.backends.triton import launch, words

interpreted = pytest.mark.skipif(
    ON_GPU, reason="runs in Triton's interpreter, which a session on a GPU does not load"
)
BLOCKS = {8: words.PTX_8, 4: words.PTX_4, 3: words.PTX_3, 2: words.PTX_2, 1: words.PTX_1}


def packed_words(bits, count=4096, seed=0):
    """(count, 128) codes and their packed rows (count, 16 * bits); every byte value occurs."""
    codes = torch.randint(0, 2**bits, (count, 128), generator=torch.Generator().manual_seed(seed))
    return codes, reference.codes_to_bytes(codes, bits).numpy()


@pytest.mark.parametrize("bits", BITS)
def test_ptx_blocks_decode_every_field_of_every_byte(bits):
    """The strings that ship, run by an emulator of PTX.

    Output f, byte b is the level of column f * K + b, K bytes contracted at once.
    """
    codes, packed = packed_words(bits)
    levels = np.array(reference.LEVELS[bits])[codes.numpy()]
    fields = 8 // bits if bits != 3 else 8
    inputs = [packed] if bits != 3 else [packed[:, :16], packed[:, 16:32], packed[:, 32:]]
    arrays = [np.ascontiguousarray(i).reshape(-1).view(np.uint32) for i in inputs]
    for f, out in enumerate(interpreter.run_assembly(BLOCKS[bits].value, fields, arrays)):
        width = 128 // fields
        assert (
            out.view(np.int8).reshape(len(codes), width) == levels[:, f * width : (f + 1) * width]
        ).all()


@pytest.mark.parametrize("bits", BITS)
def test_assembly_declares_what_it_uses(bits):
    """One output per field in the constraints, nothing left over.

    Registers are written before they are read, else the emulator raises.
    """
    asm = BLOCKS[bits].value
    operands = {int(k) for k in re.findall(r"\$(\d+)", asm)}
    fields, inputs = (8 // bits if bits != 3 else 8), (3 if bits == 3 else 1)
    assert operands == set(range(fields + inputs))


DOT_BLOCKS = {4: words.DOT_4, 3: words.DOT_3, 2: words.DOT_2, 1: words.DOT_1}


@pytest.mark.parametrize("bits", sorted(DOT_BLOCKS))
def test_operands_stand_for_the_columns_that_they_are_multiplied_with(bits):
    """The blocks of project: step s, place k of 32 is column_of(k, s) of the row (3 bits and 1: of
    two rows side by side).
    """
    codes, packed = packed_words(bits)
    levels = np.array(reference.LEVELS[bits])[codes.numpy()]
    paired, k = bits in (3, 1), np.arange(32)
    planes = [packed] if bits != 3 else [packed[:, :16], packed[:, 16:32], packed[:, 32:]]
    parts = [packed[:, :32], packed[:, 32:]] if bits == 4 else [np.concatenate(planes)]
    steps, step = (8 if paired else 2 if bits == 4 else 4), 0
    for part in parts:
        inputs = [part] if bits != 3 else planes
        arrays = [np.ascontiguousarray(i).reshape(-1).view(np.uint32) for i in inputs]
        outputs = interpreter.run_assembly(DOT_BLOCKS[bits].value, 4 if not paired else 8, arrays)
        found = [o.view(np.int8).reshape(-1, 32).astype(int) for o in outputs]
        if bits == 4:  # two operands whose sum is level - 1
            found = [a + b + 1 for a, b in zip(found[::2], found[1::2], strict=True)]
        assert len(found) == steps
        for operand in found:
            column = words.column_of.fn(k, step, bits, "ptx")
            assert column.min() >= 0 and column.max() < 128
            if bits == 1:  # a bit where it is
                operand = 127 * np.where(operand == 0, -1, 1)
            if paired:
                wanted = levels.reshape(-1, 2, 128)[:, k // 16, column]
            else:
                wanted = levels[:, column]
            assert (operand == wanted).all()
            step += 1


def test_every_column_is_contracted_once():
    for how in ("ptx", "generic"):
        for bits in BITS:
            steps, places = (8, range(16)) if bits in (3, 1) else (4, range(32))
            found = [words.column_of.fn(k, s, bits, how) for s in range(steps) for k in places]
            assert sorted(found) == list(range(128))


def test_a_layout_that_the_blocks_do_not_know_is_noticed():
    ttgir = """
    %x = tt.elementwise_inline_asm "prmt" {packed_element = 4 : i32} %w : \
    tensor<4x64x32xi8, #ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 4}>> -> \
    tensor<4x64x32xi8, #ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 4}>> loc(#loc1)
    %y = tt.elementwise_inline_asm "cvt" {packed_element = 1 : i32} %v : tensor<4x32xi32, #blocked>
    """.replace("\\\n", "")
    assert words.in_order(ttgir)
    assert not words.in_order(ttgir.replace("kWidth = 4", "kWidth = 2"))
    assert not words.in_order(ttgir.replace("xi32, #blocked", "xi8, #blocked"))


@triton.jit
def _pieces(a, b, s, out, K: tl.constexpr, SELECTOR: tl.constexpr, ISA: tl.constexpr):
    k = tl.arange(0, K)
    x, y = tl.load(a + k), tl.load(b + k)
    tl.store(out + k, words.byte_perm(x, y, SELECTOR, ISA))
    tl.store(out + K + k, words.byte_perm(x, y, tl.load(s + k) & 0x7777, ISA))
    tl.store(out + 2 * K + k, words.dp4a(x, y, tl.load(s + k), ISA))


@interpreted
@pytest.mark.parametrize("how", ["ptx", "gcn", "generic"])
@pytest.mark.parametrize("selector", [0x5140, 0x7362, 0x5410, 0x7632])
def test_byte_perm_and_dp4a(how, selector):
    generator = torch.Generator().manual_seed(1)
    a, b, s = (torch.randint(-(2**31), 2**31, (64,), generator=generator).int() for _ in range(3))
    s //= 4
    out = torch.empty(3, 64, dtype=torch.int32)
    _pieces[(1,)](a, b, s, out, K=64, SELECTOR=selector, ISA=how)
    both = torch.cat([a.view(torch.uint8).view(64, 4), b.view(torch.uint8).view(64, 4)], 1)
    for row, selectors in ((0, torch.full((64,), selector)), (1, s & 0x7777)):
        picked = torch.stack(
            [both.gather(1, ((selectors >> 4 * k) & 7).long()[:, None])[:, 0] for k in range(4)], 1
        )
        assert torch.equal(out[row], picked.view(torch.int32)[:, 0])
    products = a.view(torch.int8).view(64, 4).long() * b.view(torch.int8).view(64, 4).long()
    assert torch.equal(out[2].long(), products.sum(1) + s)


@triton.jit
def _fixed(v, q, limbs, units, K: tl.constexpr):
    k = tl.arange(0, K)
    x = tl.load(v + k)
    largest = tl.max(words.magnitude(x), 0)
    e = words.exponent_of(largest)
    fixed = words.to_fixed(x, e, "generic")
    tl.store(q + k, fixed)
    tl.store(limbs + k, words.limbs(fixed))
    tl.store(units + k, words.unit_of(tl.full((K,), largest, tl.int32), e))


@interpreted
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1.0, 3e38])
def test_fixed_point(scale):
    """v = q * unit to half a unit, |q| <= 0x7f7f7f, q = 65536 a + 256 b + c in signed bytes.

    At every magnitude that float32 has.
    """
    v = (
        torch.randn(128, generator=torch.Generator().manual_seed(2))
        .double()
        .clamp(-1, 1)
        .mul(scale)
        .float()
    )
    q, limbs = torch.empty(128, dtype=torch.int32), torch.empty(128, dtype=torch.int32)
    units = torch.empty(128)
    _fixed[(1,)](v, q, limbs, units, K=128)
    unit = units[0].double()
    assert q.abs().max() <= 0x7F7F7F and unit > 0
    assert ((q.double() * unit - v.double()).abs() <= unit / 2).all() and unit <= max(
        v.abs().max().double() * 2.0**-22, 2.0**-149
    )
    c, b, a, top = limbs.view(torch.int8).view(128, 4).long().T
    assert torch.equal(65536 * a + 256 * b + c, q.long()) and not top.any()


@interpreted
@pytest.mark.parametrize("mantissa", [0x7F7F7E, 0x7F7F7F, 0x7F7F80, 0x7FFFFF, 0x400000])
def test_fixed_point_at_the_largest_integer(mantissa):
    """A number whose 24 bits are just below, at and above three limbs of 127."""
    v = torch.zeros(16)
    v[3], v[4] = float(mantissa), -float(mantissa) - 0.5 * (mantissa < 2**22)
    q, limbs, units = (
        torch.empty(16, dtype=torch.int32),
        torch.empty(16, dtype=torch.int32),
        torch.empty(16),
    )
    _fixed[(1,)](v, q, limbs, units, K=16)
    assert q.abs().max() <= 0x7F7F7F
    assert (q.double() * units[0].double() - v.double()).abs().max() <= units[0].double() / 2


@interpreted
@pytest.mark.parametrize("bits", BITS)
def test_every_isa_gives_the_same_bits(bits, monkeypatch):
    """project and reconstruct with NVIDIA's assembly, AMD's, and none.

    Exact integer sums, so equal bits.
    """
    shapes, numbers = SHAPES[3:6], SEGMENTS[3:6]
    basis = tk.pack(rows_of(5, shapes), bits, segments=[numbers.index(s) for s in numbers])
    grads, x = (
        tensors(shapes, 7),
        torch.randn(5, basis.num_segments, generator=torch.Generator().manual_seed(0)),
    )
    results = []
    for how in ("ptx", "gcn", "generic"):
        monkeypatch.setattr(launch, "isa", lambda arch, how=how: how)
        results.append(
            [tk.project(basis, grads, "triton"), *tk.reconstruct(basis, x, backend="triton")]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_work_items_cover_every_tile_once():
    generator = torch.Generator().manual_seed(3)
    numels = [1, 5000, 0, 128, 300, 64 * 128 + 1, 0]
    tiles = layout.tile_offsets(numels)[-1]
    segment = (
        torch.randint(0, 3, (tiles,), generator=generator)
        .sort(stable=True)
        .values[torch.randperm(tiles, generator=generator)]
        .int()
    )
    work = launch.items_of(segment, numels, 5, 4)
    offsets, seen = layout.tile_offsets(numels), []
    for tensor, first, count, s in zip(
        work.tensor.tolist(),
        work.tile.tolist(),
        work.tiles.tolist(),
        work.segment.tolist(),
        strict=True,
    ):
        covered = range(first, first + count)
        assert 1 <= count <= 4 and offsets[tensor] <= first and first + count <= offsets[tensor + 1]
        assert all(segment[t] == s for t in covered)
        seen += covered
    assert sorted(seen) == list(range(tiles))
    assert work.segment.tolist() == sorted(work.segment.tolist())
    counts = torch.diff(work.segment_begin).tolist()
    assert counts == [work.segment.tolist().count(s) for s in range(5)]
    assert launch.items_of(segment, numels, 5, 4) is work  # kept
    segment[0] += 1
    assert launch.items_of(segment, numels, 5, 4) is not work  # and noticed when the map changes
