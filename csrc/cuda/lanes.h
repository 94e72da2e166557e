// Which lane holds what: packed words to 8-bit operands of the matrix units, and the columns and
// rows that they stand for. Host and device; a test runs all of it for every lane and bit width
// against packing.h (tests/test_lanes.cpp).
//
// Lane 4 g + t of a warp holds rows g and g + 8 of a matrix operand, four consecutive bytes of each
// (device.h, multiply_add). The order of the contracted index is free as long as both operands
// agree, so each lane takes bytes that lie together in memory.
#pragma once

#include <utility>

#include "../packing.h"

namespace twa {

// Byte k of the result is byte s & 7 of the eight bytes of a (0 to 3) and b (4 to 7), s = selector
// >> 4 k; with s & 8 the byte's sign, eight times.
TWA_HD uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
#else
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t s = selector >> (4 * k),
                   byte = static_cast<uint32_t>(both >> (8 * (s & 7))) & 0xff;
    d |= (s & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * k);
  }
  return d;
#endif
}

// a where mask is set, else b: one instruction.
TWA_HD uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(d) : "r"(a), "r"(b), "r"(mask));
  return d;
#else
  return (a & mask) | (b & ~mask);
#endif
}

struct alignas(16) Word4 {
  uint32_t w[4];
};
struct alignas(8) Word2 {
  uint32_t w[2];
};

// Codes to levels ---------------------------------------------------------------------------------

// Levels first .. first + 3 as the bytes of a word.
template <int kBits>
TWA_HD constexpr uint32_t level_word(int first) {
  uint32_t w = 0;
  for (int k = 0; k < 4; ++k)
    w |= static_cast<uint32_t>(level(kBits, (first + k) & ((1 << kBits) - 1)) & 0xff) << (8 * k);
  return w;
}

// Level of one code, out of registers: an array indexed by it would lie in memory.
template <int kBits>
TWA_HD int level_of(int code) {
  if constexpr (kBits == 8) return code - 128;
  constexpr uint32_t t0 = level_word<kBits>(0), t1 = level_word<kBits>(4),
                     t2 = level_word<kBits>(8), t3 = level_word<kBits>(12);
  const uint32_t low = byte_perm(t0, t1, static_cast<uint32_t>(code & 7)),
                 high = byte_perm(t2, t3, static_cast<uint32_t>(code & 7));
  return static_cast<int8_t>(kBits == 4 && code >= 8 ? high : low);
}

// nearest_code() of packing.h with its thresholds as constants.
template <int kBits, int... kLower>
TWA_HD int count_thresholds(int k, std::integer_sequence<int, kLower...>) {
  return (0 + ... +
          static_cast<int>(
              2 * k >
              std::integral_constant<int, level(kBits, kLower) + level(kBits, kLower + 1)>::value));
}
template <int kBits>
TWA_HD int nearest_code_of(int k) {
  if constexpr (kBits == 8) return k + 128;
  return count_thresholds<kBits>(k, std::make_integer_sequence<int, (1 << kBits) - 1>());
}

// w >> kBy. Shifts, logic and permutations share a pipe that is the limit of these kernels;
// multiplications have another one.
template <int kBy>
TWA_HD uint32_t shift_right(uint32_t w) {
#if defined(__CUDA_ARCH__)
  uint32_t high;
  asm("mul.hi.u32 %0, %1, %2;" : "=r"(high) : "r"(w), "n"(1u << (32 - kBy)));
  return high;
#else
  return w >> kBy;
#endif
}
TWA_HD uint32_t upper_half(uint32_t w) { return shift_right<16>(w); }

// First words of the tables that look_up() and look_up_halves() permute: given to them, so that
// they stay in registers (in_register() of device.h).
template <int kBits>
TWA_HD constexpr uint32_t first_levels(int k) {
  if (kBits == 4) return k == 0 ? level_word<4>(0) - 0x01010101u : level_word<4>(8);
  return level_word<kBits>(0);
}
// Eight codes below 8, a nibble each, to int8 levels: of the low four and of the high four. The
// nibbles are the selectors of a byte permutation.
template <int kBits>
TWA_HD void look_up(uint32_t codes, const uint32_t* table, uint32_t& low, uint32_t& high) {
  constexpr uint32_t t1 = level_word<kBits>(4);
  low = byte_perm(table[0], t1, codes);
  high = byte_perm(table[0], t1, upper_half(codes));
}

// 4 bits: 16 levels do not fit into a permutation's eight bytes. Bit 3 of a selector gives a byte's
// sign instead of the byte, so two permutations give two operands whose sum is level - 1: the lower
// levels less 1 where the code is below 8, else -1 (their sign); and the upper levels where it is
// not, else 0 (theirs). Both are multiplied, and the sum of the other operand is added in the end.
TWA_HD void look_up_halves(uint32_t codes, const uint32_t* table, uint32_t (&lower)[2],
                           uint32_t (&upper)[2]) {
  constexpr uint32_t n1 = level_word<4>(4) - 0x01010101u,  // no byte is -128: nothing is borrowed
      p1 = level_word<4>(12);
  const uint32_t flipped = codes ^ 0x88888888u;
  lower[0] = byte_perm(table[0], n1, codes), lower[1] = byte_perm(table[0], n1, upper_half(codes));
  upper[0] = byte_perm(table[1], p1, flipped),
  upper[1] = byte_perm(table[1], p1, upper_half(flipped));
}
// What is to be added to the level that an operand's bytes stand for, times the sum of the other
// operand.
template <int kBits>
constexpr bool kShifted = kBits == 4;

// 2 and 3 bits: the nibbles of w hold two fields each; code number `odd` of each nibble as a
// nibble. top, 3 bits: the nibbles' bits 0 and 2 are the codes' third bits.
template <int kBits>
TWA_HD uint32_t nibble_codes(uint32_t w, uint32_t top, int odd) {
  const uint32_t two = odd ? shift_right<2>(w) : w;
  if constexpr (kBits == 3) return select_bits(0x33333333u, two, odd ? top : top << 2);
  return two & 0x33333333u;
}
// 3 bits: byte b of the 2-bit plane is in half h = b / 16; the third bit of its field f is bit 2 f
// + h of byte b % 16 of the 1-bit plane.
TWA_HD uint32_t top_bits(uint32_t w, int half) { return (w >> half) & 0x55555555u; }

// project: rows of P are rows of the left operand -------------------------------------------------

// Rows of P in one operand of 16 rows. At 1 bit a row has 16 bytes, and two of them lie side by
// side.
template <int kBits>
constexpr int kProjectRows = kBits == 1 ? 32 : 16;
// Multiplications that contract one tile; at 4 bits twice, with the lower and the upper levels.
template <int kBits>
constexpr int kProjectSteps = kBits == 1 ? 8 : 4;
template <int kBits>
constexpr int kProjectPasses = kBits == 4 ? 2 : 1;
// Bytes between groups of 8 rows at 8 bits, so that rows of one operand, 128 bytes apart, lie in
// different banks.
constexpr int kProjectPad = 64;

// Row of P (of the operand's 16 or 32) in row g of the operand, for lane 4 g + t.
template <int kBits>
TWA_HD constexpr int project_row(int g, int t) {
  if (kBits == 8) return g < 8 ? (g & 1) * 8 + (g >> 1) : (g & 1) * 8 + 4 + ((g - 8) >> 1);
  if (kBits == 1) return 2 * g + t / 2;
  return g;
}
// Where that row begins in shared memory.
template <int kBits>
TWA_HD constexpr int project_offset(int row) {
  return kBits == 8 ? row * 128 + row / 8 * kProjectPad : row * row_bytes(kBits);
}

// Operand words of one row of a tile for lane 4 g + t: a[2 s], a[2 s + 1] are the first and second
// word of multiplication s; at 4 bits a[8 + ..] those of the second pass. table: first_levels().
template <int kBits>
TWA_HD void project_operand(const uint8_t* row, int t, const uint32_t* table, uint32_t* a) {
  if constexpr (kBits == 8) {
    const Word4 x = *reinterpret_cast<const Word4*>(row + 16 * t),
                y = *reinterpret_cast<const Word4*>(row + 64 + 16 * t);
    for (int k = 0; k < 4; ++k) a[k] = x.w[k] ^ 0x80808080u, a[4 + k] = y.w[k] ^ 0x80808080u;
  } else if constexpr (kBits == 4) {
    const Word4 x = *reinterpret_cast<const Word4*>(row + 16 * t);
    for (int k = 0; k < 4; ++k) {
      uint32_t lower[2], upper[2];
      look_up_halves(x.w[k], table, lower, upper);
      a[2 * k] = lower[0], a[2 * k + 1] = lower[1], a[8 + 2 * k] = upper[0],
            a[8 + 2 * k + 1] = upper[1];
    }
  } else if constexpr (kBits == 1) {  // `row` is where the pair of rows begins; bits stay where
                                      // they are: 0 or 2^field
    const Word2 x = *reinterpret_cast<const Word2*>(row + 8 * t);
    for (int f = 0; f < 8; ++f)
      a[2 * f] = x.w[0] & (0x01010101u << f), a[2 * f + 1] = x.w[1] & (0x01010101u << f);
  } else {
    const Word2 x = *reinterpret_cast<const Word2*>(row + 8 * t);
    Word2 top = {{0, 0}};
    if constexpr (kBits == 3) top = *reinterpret_cast<const Word2*>(row + 32 + 8 * (t % 2));
    for (int k = 0; k < 2; ++k) {
      const uint32_t third = kBits == 3 ? top_bits(top.w[k], t / 2) : 0;
      for (int odd = 0; odd < 2; ++odd)
        look_up<kBits>(nibble_codes<kBits>(x.w[k], third, odd), table, a[4 * k + 2 * odd],
                       a[4 * k + 2 * odd + 1]);
    }
  }
}

// The gradient's side: lane r converts the four columns that are one word of the operand, and puts
// each limb's word at project_word(r). Column k (0 to 3) of lane r:
template <int kBits>
TWA_HD constexpr int project_column(int r, int k) {
  if (kBits == 8 || kBits == 1) return 4 * r + k;
  return 2 * r + k / 2 + 64 * (k % 2);
}
// Words 8 t .. 8 t + 7 are what lane 4 g + t multiplies with (1 bit: 16 (t % 2) .. 16 (t % 2) +
// 15), in project_operand's order.
template <int kBits>
TWA_HD constexpr int project_word(int r) {
  if (kBits == 8) return r / 4 % 4 * 8 + r / 16 * 4 + r % 4;
  if (kBits == 4) return r;
  if (kBits == 1) return r / 2 % 2 * 16 + r / 4 * 2 + r % 2;
  return r / 4 % 4 * 8 + r / 2 % 2 * 4 + r / 16 * 2 + r % 2;
}

// reconstruct -------------------------------------------------------------------------------------
// Columns of a tile are rows of the left operand, rows of P are contracted, 32 at a time.

constexpr int kReconstructRows = 32;
// Bytes between groups of 8 rows at 8 bits.
constexpr int kReconstructPad = 32;

// Row of the 32 that is byte j of the eight that lane 4 g + t contracts.
template <int kBits>
TWA_HD constexpr int reconstruct_row(int t, int j) {
  return kBits == 8 ? 8 * t + j : 4 * j + t;
}
// The inverse: at which byte of a limb's 32 the coefficient of a row goes, 8 t + j.
template <int kBits>
TWA_HD constexpr int reconstruct_byte(int row) {
  return kBits == 8 ? row : row % 4 * 8 + row / 4;
}
template <int kBits>
TWA_HD constexpr int reconstruct_offset(int row) {
  return kBits == 8 ? row * 128 + row / 8 * kReconstructPad : row * row_bytes(kBits);
}

// Column of the tile in row g (second: g + 8) of multiplication m, 0 to 7.
template <int kBits>
TWA_HD constexpr int reconstruct_column(int m, int second, int g) {
  const int p = m % 2 * 2 + second;  // byte of a word
  if (kBits == 8 || kBits == 4) return 64 * (m / 4) + 8 * g + 4 * (m / 2 % 2) + p;
  if (kBits == 1) return 64 * (g / 4) + 16 * (m / 2) + 4 * (g % 4) + p;
  return 32 * (m / 2) + 4 * g + p;
}
// At 1 bit a level counts 0 or 2^field; the field of a column.
TWA_HD constexpr int bit_field(int column) { return column / 16; }

// Bytes of four words, transposed: word k holds byte k of a, b, c, d.
TWA_HD void transpose_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t* out) {
  const uint32_t ab = byte_perm(a, b, 0x5140), cd = byte_perm(c, d, 0x5140),
                 ab2 = byte_perm(a, b, 0x7362), cd2 = byte_perm(c, d, 0x7362);
  out[0] = byte_perm(ab, cd, 0x5410), out[1] = byte_perm(ab, cd, 0x7632);
  out[2] = byte_perm(ab2, cd2, 0x5410), out[3] = byte_perm(ab2, cd2, 0x7632);
}
// Low (or high) nibbles of four words: out[0] holds those of byte 0 of a, b, c, d, then of byte 1;
// out[1] bytes 2 and 3.
template <bool kHigh>
TWA_HD void transpose_nibbles(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t* out) {
  constexpr uint32_t low = 0x0f0f0f0fu;
  const uint32_t ab = kHigh ? select_bits(low, shift_right<4>(a), b) : select_bits(low, a, b << 4);
  const uint32_t cd = kHigh ? select_bits(low, shift_right<4>(c), d) : select_bits(low, c, d << 4);
  out[0] = byte_perm(ab, cd, 0x5140), out[1] = byte_perm(ab, cd, 0x7362);
}

// A word of four rows of P (w[0..3]; top: of the 1-bit plane, top_bits() taken) to levels, four
// rows a word. kPart is which half of the tile at 8 bits, which nibble at 4, which field at 3, 2
// and 1. out[p] belongs to byte p of the words; at 4 bits out[4 + p] is the second operand.
template <int kBits, int kPart>
TWA_HD void reconstruct_operand(const uint32_t* w, const uint32_t* top, int g,
                                const uint32_t* table, uint32_t* out) {
  if constexpr (kBits == 8) {
    transpose_bytes(w[0], w[1], w[2], w[3], out);
    for (int p = 0; p < 4; ++p) out[p] ^= 0x80808080u;
  } else if constexpr (kBits == 1) {  // w: transposed bytes already; bits stay where they are
    const uint32_t mask = (0x01010101u << kPart) << (g & 4);
    for (int p = 0; p < 4; ++p) out[p] = w[p] & mask;
  } else {
    uint32_t n[2], third[2] = {0, 0};
    transpose_nibbles<(kBits == 4 ? kPart : kPart / 2) != 0>(w[0], w[1], w[2], w[3], n);
    if constexpr (kBits == 3)
      transpose_nibbles<kPart / 2 != 0>(top[0], top[1], top[2], top[3], third);
    for (int k = 0; k < 2; ++k) {
      if constexpr (kBits == 4) {
        uint32_t lower[2], upper[2];
        look_up_halves(n[k], table, lower, upper);
        out[2 * k] = lower[0], out[2 * k + 1] = lower[1], out[4 + 2 * k] = upper[0],
                out[4 + 2 * k + 1] = upper[1];
      } else {
        look_up<kBits>(nibble_codes<kBits>(n[k], third[k], kPart % 2), table, out[2 * k],
                       out[2 * k + 1]);
      }
    }
  }
}

// Fixed point -------------------------------------------------------------------------------------

// Bits of max|v| to e with 2^(23 - e) |v| <= 0x7f7f7f, the largest integer with three balanced
// 8-bit limbs.
TWA_HD int fixed_exponent(uint32_t largest) {
  return static_cast<int>((largest + 65793u) >> 23) - 126;
}  // carries where the mantissa is above that
// 2^e as two factors, each a normal float32, where e alone may pass its range.
struct TwoFactors {
  float first, second;
};
TWA_HD TwoFactors pow2_factors(int e) { return {pow2f(e >> 1), pow2f(e - (e >> 1))}; }
// q = sum of 256^k limb[k], limbs in [-128, 127], as the bytes of the result: three limbs of a
// 24-bit number, four of one below 2^31 - 2^24.
TWA_HD constexpr uint32_t limbs3(int q) {
  return (static_cast<uint32_t>(q) + 0x808080u) ^ 0x808080u;
}
TWA_HD constexpr uint32_t limbs4(int q) {
  return (static_cast<uint32_t>(q) + 0x80808080u) ^ 0x80808080u;
}
// e4m3 to float times 2^-120, subnormal numbers too: exact.
TWA_HD float e4m3_shifted(uint32_t byte) { return bits_float(byte << 20); }

// replay ------------------------------------------------------------------------------------------
// A lane holds the sums of 32 columns of a tile (8 bits: 16), and reads their codes of every row:
// 16 bytes at 8 and 4 bits, 8 at 2, 4 at 1, and at 3 bits 8 of each plane. Levels become bytes that
// count from level - bias, so that 2^23 plus a byte is a float whose last byte it is.

template <int kBits>
constexpr int kReplayColumns = kBits == 8 ? 16 : 32;
template <int kBits>
constexpr int kReplayLanes = kTileColumns / kReplayColumns<kBits>;  // of a tile
template <int kBits>
constexpr int kReplayBytes = kBits >= 4   ? 16
                             : kBits == 1 ? 4
                                          : 8;  // 3 bits: of either plane
template <int kBits>
constexpr int kReplayBias = kBits == 4 ? 127 : 128;

// Column of the i-th sum of lane t of a tile. Four sums, from a multiple of four on, are
// neighbours.
template <int kBits>
TWA_HD constexpr int replay_column(int t, int i) {
  if (kBits == 8) return 16 * t + i;
  if (kBits == 4) return 64 * (i / 16) + 16 * t + i % 16;
  if (kBits == 1) return 16 * (i / 4) + 4 * t + i % 4;
  return 32 * (i / 8) + 8 * t + i % 8;
}
// Sum that byte j of word e of replay_levels() goes to; at 1 bit: bit 8 j + e of the word.
template <int kBits>
TWA_HD constexpr int replay_sum(int e, int j) {
  if (kBits == 8 || kBits == 1) return 4 * e + j;
  const int nibble = 4 * (e % 2) + j;
  if (kBits == 4) return 16 * (nibble % 2) + 4 * (e / 2) + nibble / 2;
  return 8 * (2 * (nibble % 2) + e / 2 % 2) + 4 * (e / 4) + nibble / 2;
}
// First words of the tables of levels, as first_levels().
template <int kBits>
TWA_HD constexpr uint32_t replay_table(int k) {
  return first_levels<kBits>(k) ^ (kBits == 4 ? 0u : 0x80808080u);
}
// Levels + bias of a lane's columns as bytes, kReplayColumns / 4 words of them. third: 3 bits, lane
// t's 8 bytes of the 1-bit plane. table: replay_table(0) and (1). Not for 1 bit.
template <int kBits>
TWA_HD void replay_levels(const uint32_t* codes, const uint32_t* third, int t,
                          const uint32_t* table, uint32_t* out) {
  if constexpr (kBits == 8) {
    for (int k = 0; k < 4; ++k) out[k] = codes[k];
  } else if constexpr (kBits == 4) {  // as look_up_halves()
    constexpr uint32_t n1 = level_word<4>(4) - 0x01010101u, p1 = level_word<4>(12);
    for (int k = 0; k < 4; ++k) {
      const uint32_t flipped = codes[k] ^ 0x88888888u;
      const uint32_t lower[2] = {byte_perm(table[0], n1, codes[k]),
                                 byte_perm(table[0], n1, upper_half(codes[k]))};
      const uint32_t upper[2] = {byte_perm(table[1], p1, flipped),
                                 byte_perm(table[1], p1, upper_half(flipped))};
      // Every byte of `lower` is 0x80 or more, so that adding 0x80, or 0x7f and the carry from
      // below, carries from each byte; adding `upper` carries from none.
      for (int h = 0; h < 2; ++h) out[2 * k + h] = lower[h] + 0x7f7f7f80u + upper[h];
    }
  } else {
    constexpr uint32_t t1 = level_word<kBits>(4) ^ 0x80808080u;
    for (int k = 0; k < 2; ++k) {
      const uint32_t top = kBits == 3 ? top_bits(third[k], t / 2) : 0;
      for (int odd = 0; odd < 2; ++odd) {
        const uint32_t nibbles = nibble_codes<kBits>(codes[k], top, odd);
        out[4 * k + 2 * odd] = byte_perm(table[0], t1, nibbles);
        out[4 * k + 2 * odd + 1] = byte_perm(table[0], t1, upper_half(nibbles));
      }
    }
  }
}
// The float level that byte j of a word of replay_levels() stands for.
template <int kBits>
TWA_HD float replay_level(uint32_t word, int j) {
  const uint32_t bits = byte_perm(word, 0x4b000000u, 0x7440u | static_cast<uint32_t>(j));
  return bits_float(bits) - (0x1p23f + static_cast<float>(kReplayBias<kBits>));
}
// 1 bit: v where bit b of the word is set, else -v.
TWA_HD float replay_sign(uint32_t word, int b, float v) {
  return bits_float(float_bits(v) ^ (~(word << (31 - b)) & 0x80000000u));
}

}  // namespace twa
