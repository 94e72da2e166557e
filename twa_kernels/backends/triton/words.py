"""Packed words to levels and back to sums: the pieces that every kernel is made of.

A GPU decodes four codes at a time: `byte_perm` picks four bytes out of eight by four 4-bit
selectors, so a 16-bit half of a packed word, whose nibbles are codes, *is* the selector that
fetches four int8 levels from a table in two registers. ISA says how a piece is expressed:

    "ptx"      NVIDIA: one instruction (PTX `prmt`, `dp4a`), or a short block of them, as inline
               assembly
    "gcn"      AMD: `v_perm_b32`, whose selectors are whole bytes, and `v_dot4_i32_i8`, as LLVM's
               intrinsics: the compiler then knows how long to wait for a product (three wait
               states before another instruction reads it), which in assembly nobody would
    "generic"  plain Triton arithmetic: the interpreter, and any other GPU

Tables of levels come from reference.LEVELS; tests run each assembly block in a small emulator
against them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import triton
import triton.language as tl

from ...layout import LEVELS


def _table(bits: int, first: int) -> int:
    """Levels first .. first + 3 as the bytes of a 32-bit word."""
    levels = (LEVELS[bits] * 16)[first : first + 4]
    return sum((level & 0xFF) << (8 * k) for k, level in enumerate(levels))


TABLES = {bits: [_table(bits, first) for first in (0, 4, 8, 12)] for bits in (4, 3, 2, 1)}
T4_0, T4_1, T4_2, T4_3 = (tl.constexpr(t) for t in TABLES[4])
T3_0, T3_1 = (tl.constexpr(t) for t in TABLES[3][:2])
T2_0 = tl.constexpr(TABLES[2][0])
T1_0 = tl.constexpr(TABLES[1][0])

# Decoding -----------------------------------------------------------------------------------------
# Four bytes in, four int8 levels out per field: field f of byte b is column
# f * (bytes of a row) + b (csrc/packing.h). 0x6420 and 0x7531 separate what low and high nibbles
# gave, so that output k belongs to byte k whatever layout the compiler chose.

_LOOK_UP_4 = (
    "prmt.b32 a, 0x{:08x}, 0x{:08x}, {{m}}; prmt.b32 b, 0x{:08x}, 0x{:08x}, {{m}}; "
    "prmt.b32 {{to}}, a, b, {{s}};"
).format(*TABLES[4])
_PTX_4 = (
    "{ .reg .b32 m, s, a, b, x, y;"
    # s takes b where bit 3 is set.
    "and.b32 m, $2, 0x77777777; shr.u32 s, $2, 1; and.b32 s, s, 0x44444444; "
    "or.b32 s, s, 0x32103210;"
    + _LOOK_UP_4.format(m="m", s="s", to="x")
    + "shr.u32 m, m, 16; shr.u32 s, s, 16;"
    + _LOOK_UP_4.format(m="m", s="s", to="y")
    + "prmt.b32 $0, x, y, 0x6420; prmt.b32 $1, x, y, 0x7531; }"
)


def _nibble_pair(bits: int, low: int, high: int) -> str:
    """Assembly: levels of the low and high nibbles of m into outputs `low` and `high`.

    m < 8 in every nibble.
    """
    look_up = "prmt.b32 {}, 0x{:08x}, 0x{:08x}, m;"
    t = TABLES[bits]
    return (
        look_up.format("x", t[0], t[1])
        + "shr.u32 m, m, 16;"
        + look_up.format("y", t[0], t[1])
        + f"prmt.b32 ${low}, x, y, 0x6420; prmt.b32 ${high}, x, y, 0x7531;"
    )


_PTX_2 = (
    "{ .reg .b32 m, x, y; and.b32 m, $4, 0x33333333;"
    + _nibble_pair(2, 0, 2)
    + "shr.u32 m, $4, 2; and.b32 m, m, 0x33333333;"
    + _nibble_pair(2, 1, 3)
    + "}"
)


def _shift(amount: int) -> str:
    """Assembly: h is operand 10, shifted right by `amount` bits, left if that is negative."""
    return f"shr.u32 h, $10, {amount};" if amount >= 0 else f"shl.b32 h, $10, {-amount};"


# 3 bits: $8 and $9 are the halves of the 2-bit plane, $10 the 1-bit plane; output 2 f + half. Low
# nibbles hold field k, high ones field k + 2.
_PTX_3 = (
    "{ .reg .b32 m, h, x, y;"
    + "".join(
        f"shr.u32 m, ${8 + half}, {2 * k}; and.b32 m, m, 0x33333333; "
        f"{_shift(2 * k + half - 2)} and.b32 h, h, 0x44444444; or.b32 m, m, h;"
        + _nibble_pair(3, 2 * k + half, 2 * (k + 2) + half)
        for half in (0, 1)
        for k in (0, 1)
    )
    + "}"
)
# 1 bit: prmt's sign mode (selectors 8 to 11) turns the top bit of each byte into 0x00 or 0xff; xor
# and mask make that -127 or 127.
_PTX_1 = (
    "{ .reg .b32 m;"
    + "".join(
        f"shl.b32 m, $8, {7 - f}; prmt.b32 m, m, 0, 0xba98; and.b32 m, m, 0xfefefefe; "
        f"xor.b32 ${f}, m, 0x81818181;"
        for f in range(8)
    )
    + "}"
)
PTX_8 = tl.constexpr("xor.b32 $0, $1, 0x80808080;")
PTX_4, PTX_3, PTX_2, PTX_1 = (tl.constexpr(asm) for asm in (_PTX_4, _PTX_3, _PTX_2, _PTX_1))
OUT_2, OUT_4, OUT_8 = (tl.constexpr(",".join(["=&r"] * k)) for k in (2, 4, 8))


@triton.jit
def level_of(code, BITS: tl.constexpr):
    """int32 code -> int8 level, by a shift of the table: any device."""
    if BITS == 8:
        return (code - 128).to(tl.int8)
    index = (8 * (code & 7)).to(tl.uint64)
    if BITS == 4:
        low: tl.constexpr = T4_1.value << 32 | T4_0.value
        high: tl.constexpr = T4_3.value << 32 | T4_2.value
        upper = tl.full(code.shape, high, tl.uint64)
        table = tl.where((code & 8) != 0, upper, tl.full(code.shape, low, tl.uint64))
    elif BITS == 3:
        three: tl.constexpr = T3_1.value << 32 | T3_0.value
        table = tl.full(code.shape, three, tl.uint64)
    elif BITS == 2:
        table = tl.full(code.shape, T2_0.value, tl.uint64)
    else:
        table = tl.full(code.shape, T1_0.value, tl.uint64)
    return ((table >> index) & 255).to(tl.int32).to(tl.int8)


@triton.jit
def decode(w, w1, w2, BITS: tl.constexpr, ISA: tl.constexpr):
    """Packed bytes (..., K) uint8 -> tuple of int8 levels (..., K), one tensor per field.

    3 bits: w and w1 are the first and second 16 bytes of the 2-bit plane, w2 the 1-bit plane, and
    output 2 f + half is columns 32 f + 16 half + byte; else w1 and w2 are not used.
    """
    i = tl.int8
    if ISA == "ptx":
        if BITS == 8:
            return (tl.inline_asm_elementwise(PTX_8, "=r,r", [w], dtype=i, is_pure=True, pack=4),)
        elif BITS == 4:
            return tl.inline_asm_elementwise(
                PTX_4, OUT_2 + ",r", [w], dtype=(i, i), is_pure=True, pack=4
            )
        elif BITS == 3:
            return tl.inline_asm_elementwise(
                PTX_3,
                OUT_8 + ",r,r,r",
                [w, w1, w2],
                dtype=(i, i, i, i, i, i, i, i),
                is_pure=True,
                pack=4,
            )
        elif BITS == 2:
            return tl.inline_asm_elementwise(
                PTX_2, OUT_4 + ",r", [w], dtype=(i, i, i, i), is_pure=True, pack=4
            )
        else:
            return tl.inline_asm_elementwise(
                PTX_1, OUT_8 + ",r", [w], dtype=(i, i, i, i, i, i, i, i), is_pure=True, pack=4
            )
    else:
        out = ()
        if BITS == 3:
            for f in tl.static_range(4):
                top = w2.to(tl.int32) >> (2 * f)
                out = out + (level_of(((w.to(tl.int32) >> (2 * f)) & 3) | ((top & 1) << 2), 3),)
                out = out + (level_of(((w1.to(tl.int32) >> (2 * f)) & 3) | (top & 2) << 1, 3),)
        else:
            for f in tl.static_range(8 // BITS):
                out = out + (level_of((w.to(tl.int32) >> (BITS * f)) & ((1 << BITS) - 1), BITS),)
        return out


# Decoding for tl.dot ------------------------------------------------------------------------------
# Four bytes in, four int8 operands out per step of a product; an operand stands for four columns.
# The order of the contracted index is free, so on NVIDIA levels stay where a permutation left them,
# and the gradient is put in that order (`column_of`). That takes the four bytes for neighbours
# along K, as they are in the layouts of the matrix units: `in_order` looks whether a compiled
# kernel has those.

# A table in a register: the assembler, which would move it there anew for each permutation, does
# not see that this is a constant (one lane has one bit of the mask).
_TABLE = "mov.b32 z, %lanemask_eq; popc.b32 z, z; xor.b32 {}, z, 0x{:08x};"
_REGISTERS = "{ .reg .b32 z, t, v, m, n, h;"


def _word(levels: Sequence[int]) -> int:
    return sum((level & 0xFF) << (8 * k) for k, level in enumerate(levels))


# 4 bits: 16 levels do not fit into a permutation's eight bytes. Bit 3 of a selector gives a byte's
# sign instead of the byte, so two permutations of the raw codes give two operands whose sum is
# level - 1: the lower levels less 1, or -1 (their sign); and the upper levels, or 0 (theirs). Both
# are multiplied, and the sum of the gradient is added.
_LOW = [_word([level - 1 for level in LEVELS[4][k : k + 4]]) for k in (0, 4)]
_HIGH = [_word(LEVELS[4][k : k + 4]) for k in (8, 12)]
_DOT_4 = (
    _REGISTERS
    + _TABLE.format("t", _LOW[0] ^ 1)
    + _TABLE.format("v", _HIGH[0] ^ 1)
    + f"prmt.b32 $0, t, 0x{_LOW[1]:08x}, $4; xor.b32 m, $4, 0x88888888;"
    f"prmt.b32 $1, v, 0x{_HIGH[1]:08x}, m; shr.u32 n, $4, 16; shr.u32 m, m, 16;"
    f"prmt.b32 $2, t, 0x{_LOW[1]:08x}, n; prmt.b32 $3, v, 0x{_HIGH[1]:08x}, m; }}"
)


def _look_up(bits: int, low: int) -> str:
    """Assembly: levels of the nibbles of m, all below 8, into outputs `low` and `low` + 1."""
    return (
        f"prmt.b32 ${low}, t, 0x{TABLES[bits][1]:08x}, m; shr.u32 m, m, 16;"
        f"prmt.b32 ${low + 1}, t, 0x{TABLES[bits][1]:08x}, m;"
    )


_DOT_2 = (
    _REGISTERS
    + _TABLE.format("t", TABLES[2][0] ^ 1)
    + "and.b32 m, $4, 0x33333333;"
    + _look_up(2, 0)
    + "shr.u32 m, $4, 2; and.b32 m, m, 0x33333333;"
    + _look_up(2, 2)
    + "}"
)


def _shifted(to: str, word: str, amount: int) -> str:
    """Assembly: the word shifted right by `amount` bits, left if that is negative."""
    return (
        f"shr.u32 {to}, {word}, {amount};" if amount >= 0 else f"shl.b32 {to}, {word}, {-amount};"
    )


# 3 bits: $8 and $9 are the halves of the 2-bit plane, $10 the 1-bit plane. Low nibbles hold field
# k, high ones field k + 2.
_DOT_3 = (
    _REGISTERS
    + _TABLE.format("t", TABLES[3][0] ^ 1)
    + "".join(
        f"shr.u32 m, ${8 + half}, {2 * k}; and.b32 m, m, 0x33333333; "
        + _shifted("h", "$10", 2 * k + half - 2)
        + "and.b32 h, h, 0x44444444; or.b32 m, m, h;"
        + _look_up(3, 4 * half + 2 * k)
        for half in (0, 1)
        for k in (0, 1)
    )
    + "}"
)
# 1 bit: bits stay where they are, so that a byte is 0 or 2^field; as a signed byte that is -128 for
# field 7. `project` evens the powers out in the gradient.
DOT_1 = tl.constexpr(" ".join(f"and.b32 ${f}, $8, 0x{0x01010101 << f:08x};" for f in range(8)))
DOT_4, DOT_3, DOT_2 = (tl.constexpr(asm) for asm in (_DOT_4, _DOT_3, _DOT_2))


def in_order(ttgir: str) -> bool:
    """Whether every assembly block of a compiled kernel gets bytes that are neighbours along K.

    ttgir: the kernel in Triton's representation with layouts.
    """
    blocks = [line for line in ttgir.splitlines() if "tt.elementwise_inline_asm" in line]
    others = [re.sub(r"xi8, #ttg\.dot_op<\{[^}]*kWidth = (4|8|16)\}>", "", b) for b in blocks]
    return not any(re.search(r"xi8\b", block) for block in others)


@triton.jit
def operands(w, w1, w2, BITS: tl.constexpr, ISA: tl.constexpr):
    """Packed bytes (..., K) uint8 -> tuple of int8 operands (..., K), for `column_of`'s steps.

    3 bits: w and w1 are the first and second 16 bytes of the 2-bit plane, w2 the 1-bit plane; else
    they are not used. 4 bits on NVIDIA: two operands a step, whose sum is level - 1. 1 bit: 0 or
    2^field (field 7: -128).
    """
    i = tl.int8
    if BITS == 8 or (ISA != "ptx" and BITS != 1):
        return decode(w, w1, w2, BITS, ISA)
    elif ISA == "ptx" and BITS == 4:
        return tl.inline_asm_elementwise(
            DOT_4, OUT_4 + ",r", [w], dtype=(i, i, i, i), is_pure=True, pack=4
        )
    elif ISA == "ptx" and BITS == 3:
        return tl.inline_asm_elementwise(
            DOT_3,
            OUT_8 + ",r,r,r",
            [w, w1, w2],
            dtype=(i, i, i, i, i, i, i, i),
            is_pure=True,
            pack=4,
        )
    elif ISA == "ptx" and BITS == 2:
        return tl.inline_asm_elementwise(
            DOT_2, OUT_4 + ",r", [w], dtype=(i, i, i, i), is_pure=True, pack=4
        )
    elif ISA == "ptx":
        return tl.inline_asm_elementwise(
            DOT_1, OUT_8 + ",r", [w], dtype=(i, i, i, i, i, i, i, i), is_pure=True, pack=4
        )
    else:
        out = ()
        for f in tl.static_range(8):
            out = out + ((w & (1 << f)).to(tl.int8, bitcast=True),)
        return out


@triton.jit
def column_of(k, STEP: tl.constexpr, BITS: tl.constexpr, ISA: tl.constexpr):
    """Column of the tile that place k of K = 32 has in step STEP of the product, as decoded.

    At 8 and 4 bits the packed row is taken 32 bytes at a time. At 3 bits and 1 a row has 16 of
    them, and k - 16 is the same place in the row beside it.
    """
    if ISA == "ptx" and (BITS == 4 or BITS == 3 or BITS == 2):
        # Nibbles in their order: two fields of a byte, then of the next; half a word a step.
        byte = k // 4 * 4 + k % 4 // 2 + STEP % 2 * 2
        if BITS == 4:
            return k % 2 * 64 + STEP // 2 * 32 + byte
        elif BITS == 3:
            return k % 2 * 64 + STEP // 2 % 2 * 32 + STEP // 4 * 16 + byte % 16
        else:
            return k % 2 * 64 + STEP // 2 * 32 + byte
    elif BITS == 4:
        return STEP % 2 * 64 + STEP // 2 * 32 + k
    elif BITS == 3 or BITS == 1:
        return STEP * 16 + k % 16
    else:
        return STEP * 32 + k


# Words of 32 bits, for reconstruct ----------------------------------------------------------------


@tl.core.extern
def amd_perm(high, low, selector, _semantic=None):
    """AMD's v_perm_b32 on int32 tensors."""
    i = tl.core.dtype("int32")
    symbols = {(i, i, i): ("llvm.amdgcn.perm", i)}
    return tl.core.extern_elementwise(
        "", "", [high, low, selector], symbols, is_pure=True, _semantic=_semantic
    )


@tl.core.extern
def amd_dot4(a, b, c, _semantic=None):
    """AMD's v_dot4_i32_i8 on int32 tensors, without clamping."""
    i = tl.core.dtype("int32")
    symbols = {(i, i, i, tl.core.dtype("int1")): ("llvm.amdgcn.sdot4", i)}
    return tl.core.extern_elementwise(
        "", "", [a, b, c, tl.core.constexpr(False)], symbols, is_pure=True, _semantic=_semantic
    )


@triton.jit
def byte_perm(a, b, selector, ISA: tl.constexpr):
    """Four bytes picked from the eight of a (0 to 3) and b (4 to 7), int32.

    Byte k of the result is byte (selector >> 4 k) & 7.
    """
    if ISA == "ptx":
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, selector],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    elif ISA == "gcn":
        wide = (selector & 0xFF) | ((selector & 0xFF00) << 8)
        wide = (wide & 0x000F000F) | ((wide & 0x00F000F0) << 4)
        return amd_perm(b, a, wide)
    else:
        selector += tl.zeros_like(a)
        both = b.to(tl.uint32, bitcast=True).to(tl.uint64) << 32
        both |= a.to(tl.uint32, bitcast=True).to(tl.uint64)
        out = tl.zeros_like(a)
        for k in tl.static_range(4):
            byte = both >> (8 * ((selector >> (4 * k)) & 7)).to(tl.uint64)
            out |= (byte & 255).to(tl.int32) << (8 * k)
        return out


@triton.jit
def dp4a(a, b, c, ISA: tl.constexpr):
    """c + the sum of products of the four int8 bytes of a and b; int32."""
    if ISA == "ptx":
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, c],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    elif ISA == "gcn":
        return amd_dot4(a, b, c)
    else:
        for k in tl.static_range(4):
            c += ((a << (24 - 8 * k)) >> 24) * ((b << (24 - 8 * k)) >> 24)
        return c


@triton.jit
def coefficient_words(q0, q1, q2, q3, ISA: tl.constexpr):
    """Fixed-point coefficients of four rows -> the words that their levels are multiplied by.

    dot_low takes the first two, dp4a the third, such that q = 65536 high + low. AMD has no product
    of 16-bit and 8-bit numbers: there the first two words are the lower and the middle limbs.
    """
    if ISA == "gcn":
        v0, v1, v2, v3 = limbs(q0), limbs(q1), limbs(q2), limbs(q3)
        ab = byte_perm(v0, v1, 0x5140, ISA)
        cd = byte_perm(v2, v3, 0x5140, ISA)
        first = byte_perm(ab, cd, 0x5410, ISA)
        second = byte_perm(ab, cd, 0x7632, ISA)
    else:
        # Byte 2 is then the high part.
        v0, v1, v2, v3 = q0 + 0x8000, q1 + 0x8000, q2 + 0x8000, q3 + 0x8000
        first = byte_perm(q0, q1, 0x5410, ISA)
        second = byte_perm(q2, q3, 0x5410, ISA)
    high01 = byte_perm(v0, v1, 0x6262, ISA)
    return first, second, byte_perm(high01, byte_perm(v2, v3, 0x6262, ISA), 0x5410, ISA)


@triton.jit
def dot_low(c, first, second, total, ISA: tl.constexpr):
    """total + the sum over four rows of level times the low part of the coefficient; int32.

    The levels are the int8 bytes of c.
    """
    if ISA == "ptx":
        half = tl.inline_asm_elementwise(
            "dp2a.lo.s32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [first, c, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        return tl.inline_asm_elementwise(
            "dp2a.hi.s32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [second, c, half],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    elif ISA == "gcn":
        return dp4a(c, first, total, ISA) + (dp4a(c, second, 0, ISA) << 8)
    else:
        for k in tl.static_range(2):
            total += ((c << (24 - 8 * k)) >> 24) * ((first << (16 - 16 * k)) >> 16)
            total += ((c << (8 - 8 * k)) >> 24) * ((second << (16 - 16 * k)) >> 16)
        return total


# Fixed point --------------------------------------------------------------------------------------


@triton.jit
def exponent_of(largest):
    """Bits of max|v| as int32 -> e with 2^(23 - e) |v| <= 0x7f7f7f.

    That is the largest integer with three balanced int8 limbs.
    """
    # The addend carries into the exponent where the mantissa is above that.
    return ((largest + 65793) >> 23) - 126


@triton.jit
def power_of_two(e):
    """2^e as float32, for -149 <= e <= 127."""
    normal = ((e + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(e >= -126, normal, (1 << tl.maximum(e + 149, 0)).to(tl.float32, bitcast=True))


@triton.jit
def to_fixed(v, e, ISA: tl.constexpr):
    """round(v * 2^(23 - e)), ties to even: float32 -> int32. v and e broadcast.

    The factor may pass float32's range, so it is two.
    """
    up = 23 - e
    half = up >> 1
    scaled = v * power_of_two(half) * power_of_two(up - half)
    if ISA == "ptx":
        return tl.inline_asm_elementwise(
            "cvt.rni.s32.f32 $0, $1;",
            "=r,r",
            [scaled.to(tl.int32, bitcast=True)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    # Below 2^24 and above 2^23 float32 numbers are integers, and the last bits of their words.
    size = (tl.abs(scaled) + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    return tl.where(scaled < 0, -size, size)


@triton.jit
def limbs(q):
    """q = 65536 a + 256 b + c with a, b, c in [-128, 127]: bytes 2, 1, 0 of the result.

    Byte 3 is 0.
    """
    return (q + 0x808080) ^ 0x808080


@triton.jit
def unit_of(largest, e):
    """2^(e - 23), the value of 1 in fixed point; NaN where the input held NaN or Inf."""
    nan = tl.full(largest.shape, 0x7FC00000, tl.int32).to(tl.float32, bitcast=True)
    return tl.where(largest >= 0x7F800000, nan, power_of_two(e - 23))


@triton.jit
def scale_of(bits):
    """e4m3 bytes (no sign, no NaN) -> float32, exact.

    The bits moved up give the number times 2^-120, subnormal ones too.
    """
    return (bits.to(tl.int32) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def magnitude(v):
    """Bits of |v|: integer order is magnitude order, and Inf and NaN come last."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
