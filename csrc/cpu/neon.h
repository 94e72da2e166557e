// NEON (64-bit Arm): levels of packed bytes, dot products of bytes, fixed point. The bit map is
// drawn in packing.h.
#pragma once

#include "common.h"

#ifdef TWA_ARM
namespace twa {

// Sums of 4 products of signed bytes in each 32-bit lane. As assembly: compilers differ in where
// they offer the intrinsics.
TWA_INLINE void add_dot(int32x4_t* sum, int8x16_t a, int8x16_t b) {
  asm("sdot %0.4s, %1.16b, %2.16b" : "+w"(*sum) : "w"(a), "w"(b));
}
// The same with lane kLane of b in place of every lane.
template <int kLane>
TWA_INLINE void add_dot(int32x4_t* sum, int8x16_t a, int8x16_t b) {
  asm("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(*sum) : "w"(a), "w"(b), "i"(kLane));
}

// A row is kParts times 16 bytes, of kFields fields: field f of part j has columns 16 (f * kParts +
// j) ..+15. 3 bits: parts and fields of the 2-bit plane; the 16 bytes of the 1-bit plane belong to
// both parts.
template <int kBits>
constexpr int kParts = kBits == 3 ? 2 : kBits;
template <int kBits>
constexpr int kFields = 8 / kParts<kBits>;

// Table look-ups take a byte, of which 0 .. 15 name a level: its lower 4 bits, then its upper 4.
// Two fields in these 4 bits have a table each.
template <int kBits>
struct NeonTables {
  int8x16_t table[2];
  TWA_INLINE NeonTables() {
    int8_t t[2][16];
    for (int k = 0; k < 16; ++k) {
      t[0][k] = static_cast<int8_t>(level(kBits, k % (1 << kBits)));
      t[1][k] = static_cast<int8_t>(level(kBits, k / 4 % (1 << kBits)));  // 2 bits
    }
    table[0] = vld1q_s8(t[0]), table[1] = vld1q_s8(t[1]);
  }
};

// The fields of 16 packed bytes.
template <int kBits>
struct NeonFields {
  uint8x16_t lower, upper;  // of each byte; 8 bits and 1 bit: the byte itself in `lower`
  TWA_INLINE explicit NeonFields(uint8x16_t w) : lower(w), upper(w) {
    if constexpr (kBits == 4 || kBits == 2)
      lower = vandq_u8(w, vdupq_n_u8(15)), upper = vshrq_n_u8(w, 4);
  }
  // Levels of field f; 1 bit: -1 where the bit is set, else 0.
  TWA_INLINE int8x16_t get(int f, const NeonTables<kBits>& tables) const {
    if constexpr (kBits == 8) return vreinterpretq_s8_u8(veorq_u8(lower, vdupq_n_u8(128)));
    if constexpr (kBits == 4) return vqtbl1q_s8(tables.table[0], f ? upper : lower);
    if constexpr (kBits == 2) return vqtbl1q_s8(tables.table[f % 2], f / 2 ? upper : lower);
    return vreinterpretq_s8_u8(vtstq_u8(lower, vdupq_n_u8(static_cast<uint8_t>(1 << f))));
  }
};
template <>
struct NeonFields<3> {
  uint8x16_t lower[2], upper[2];  // of even and of odd fields
  // w: of the 2-bit plane, part j; high: of the 1-bit plane, whose bit 2 f + j belongs to field f.
  TWA_INLINE NeonFields(uint8x16_t w, uint8x16_t high, int j) {
    const uint8x16_t low_bits = vdupq_n_u8(0x33);  // the fourth bit means nothing to the table
    const uint8x16_t even = vbslq_u8(low_bits, w, j ? vshlq_n_u8(high, 1) : vshlq_n_u8(high, 2)),
                     odd = vbslq_u8(low_bits, vshrq_n_u8(w, 2), j ? vshrq_n_u8(high, 1) : high);
    lower[0] = vandq_u8(even, vdupq_n_u8(15)), upper[0] = vshrq_n_u8(even, 4);
    lower[1] = vandq_u8(odd, vdupq_n_u8(15)), upper[1] = vshrq_n_u8(odd, 4);
  }
  TWA_INLINE int8x16_t get(int f, const NeonTables<3>& tables) const {
    return vqtbl1q_s8(tables.table[0], f / 2 ? upper[f % 2] : lower[f % 2]);
  }
};
// Part j of a row.
template <int kBits>
TWA_INLINE NeonFields<kBits> fields_of(const uint8_t* row, int j) {
  if constexpr (kBits == 3)
    return NeonFields<3>(vld1q_u8(row + 16 * j), vld1q_u8(row + 32), j);
  else
    return NeonFields<kBits>(vld1q_u8(row + 16 * j));
}

// decode(row, out) as PortableDecoder.
template <int kBits>
struct NeonDecoder {
  NeonTables<kBits> tables;
  TWA_INLINE void operator()(const uint8_t* row, int8_t* out) const {
#pragma GCC unroll 8
    for (int j = 0; j < kParts<kBits>; ++j) {
      const NeonFields<kBits> fields = fields_of<kBits>(row, j);
#pragma GCC unroll 8
      for (int f = 0; f < kFields<kBits>; ++f) {
        int8x16_t lev = fields.get(f, tables);
        if constexpr (kBits == 1)
          lev = vbslq_s8(vreinterpretq_u8_s8(lev), vdupq_n_s8(127), vdupq_n_s8(-127));
        vst1q_s8(out + 16 * (f * kParts<kBits> + j), lev);
      }
    }
  }
};

// e4m3 scales / 256 of up to 4 rows, exact: their bits are those of a float16 but for its exponent.
TWA_INLINE float32x4_t scales_neon(const uint8_t* scales, int64_t rows) {
  uint64_t bytes = 0;
  if (rows >= 4)
    std::memcpy(&bytes, scales, 4);
  else
    std::memcpy(&bytes, scales, static_cast<size_t>(rows));
  return vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(vshll_n_u8(vcreate_u8(bytes), 7))));
}

// to_fixed of common.h, 4 numbers at a time; count is a multiple of 16.
TWA_INLINE double to_fixed_neon(const float* __restrict__ v, int count, int32_t* __restrict__ q) {
  uint32x4_t most[4] = {};
  for (int c = 0; c < count; c += 16)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
      most[k] = vmaxq_u32(most[k], vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(v + c + 4 * k))));
  const auto largest = static_cast<int32_t>(
      vmaxvq_u32(vmaxq_u32(vmaxq_u32(most[0], most[1]), vmaxq_u32(most[2], most[3]))));
  int e = (largest >> 23) - 126;
  if (largest == 0 || e < -100 || e > 120)
    return to_fixed(v, count, q);  // zero, tiny, huge or not finite
  if (bits_float(static_cast<uint32_t>(largest)) * pow2f(23 - e) > static_cast<float>(kMaxFixed))
    ++e;
  const float factor = pow2f(23 - e);  // a power of two: the product is exact
  for (int c = 0; c < count; c += 4)
    vst1q_s32(q + c, vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(v + c), factor)));
  return static_cast<double>(pow2f(e - 23));
}

// Bytes c, b, a, 0 of each dword: the signed limbs of q = 65536 a + 256 b + c.
TWA_INLINE uint8x16_t limbs_neon(const int32_t* q) {
  const uint32x4_t bias = vdupq_n_u32(0x808080);
  return vreinterpretq_u8_u32(
      veorq_u32(vaddq_u32(vreinterpretq_u32_s32(vld1q_s32(q)), bias), bias));
}

// 65536 a + 256 b + c of 4 sums. narrow: 256 b + c stays below 2^31.
TWA_INLINE void join_limbs(int32x4_t a, int32x4_t b, int32x4_t c, bool narrow, float64x2_t* out) {
  int64x2_t first = vshll_n_s32(vget_low_s32(a), 16), second = vshll_high_n_s32(a, 16);
  int32x4_t low = c;
  if (narrow) {
    low = vaddq_s32(vshlq_n_s32(b, 8), c);
  } else {
    first = vaddq_s64(first, vshll_n_s32(vget_low_s32(b), 8));
    second = vaddq_s64(second, vshll_high_n_s32(b, 8));
  }
  out[0] = vcvtq_f64_s64(vaddw_s32(first, vget_low_s32(low)));
  out[1] = vcvtq_f64_s64(vaddw_high_s32(second, low));
}

}  // namespace twa
#endif  // TWA_ARM
