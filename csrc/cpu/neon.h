// NEON (64-bit Arm): levels of packed bytes, and the tier with sdot, as lanes.h describes tiers.
// The bit map is drawn in packing.h.
#pragma once

#include "common.h"

#ifdef TWA_ARM
namespace twa {

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
  uint8x16_t lower, upper;  // of each byte; 8 bits: the byte itself in `lower`, 1 bit: inverted
  TWA_INLINE explicit NeonFields(uint8x16_t w) : lower(w), upper(w) {
    if constexpr (kBits == 4 || kBits == 2)
      lower = vandq_u8(w, vdupq_n_u8(15)), upper = vshrq_n_u8(w, 4);
    if constexpr (kBits == 1) {
      lower = vmvnq_u8(w);
      asm("" : "+w"(lower));  // once, not with every field
    }
  }
  // Levels of field f; 1 bit: 0 where the bit is set, else -1.
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
          lev = vbslq_s8(vreinterpretq_u8_s8(lev), vdupq_n_s8(-127), vdupq_n_s8(127));
        vst1q_s8(out + 16 * (f * kParts<kBits> + j), lev);
      }
    }
  }
};

// sdot: q = 65536 a + 256 b + c, three int8 limbs. Operands: c, b, a. 1 bit: a product with -1
// where the bit is not set takes one instruction less: levels are 254 * (it + 0.5).
struct Neon {
  using V = int32x4_t;
  static constexpr int kVectors = 8, kTogether = 4, kRows = 4, kPasses = 4, kPerPass = 8,
                       kOperands = 3, kSums = 3;
  static constexpr double kHigh = 65536.0;
  template <int kBits>
  static constexpr double kFactor = kBits == 1 ? 254.0 : 1.0;
  template <int kBits>
  static constexpr double kOffset = kBits == 1 ? 0.5 : 0.0;

  template <int kBits>
  struct Levels {
    NeonTables<kBits> tables;
    TWA_INLINE int8x16_t get(const uint8_t* row, int v) const {
      return fields_of<kBits>(row, v % kParts<kBits>).get(v / kParts<kBits>, tables);
    }
  };

  // The packed bytes are interleaved, a few at a time, and then expanded: vector u has columns
  // column(u) ..+3.
  template <int kBits, int kPass>
  class FourRows {
   public:
    TWA_INLINE FourRows(const Levels<kBits>& levels, const uint8_t* rows)
        : tables_(levels.tables), rows_(rows + 4 * kBits * kPass) {
      if constexpr (kBits == 3) {  // the 2-bit plane's bytes 8 * kPass ..+7, and their bits
        rows_ = rows + 8 * kPass;
        interleave(rows + 32 + 8 * (kPass % 2), high_);
      }
    }
    TWA_INLINE int8x16_t get(int u) {
      if (u % (kCount * kEach) == 0) interleave(rows_ + kBytes * (u / (kCount * kEach)), packed_);
      const int v = u / kEach % kCount;
      if constexpr (kBits == 3)
        return NeonFields<3>(packed_[v], high_[v], kPass / 2).get(u % kEach, tables_);
      else
        return NeonFields<kBits>(packed_[v]).get(u % kEach, tables_);
    }
    static constexpr int column(int u) {
      return kBits == 8   ? 32 * kPass + 4 * u
             : kBits == 4 ? 64 * (u % 2) + 16 * kPass + 4 * (u / 2)
             : kBits == 1 ? 16 * u + 4 * kPass
                          : 32 * (u % 4) + 8 * kPass + 4 * (u / 4);
    }

   private:
    // Bytes of a row at a time, vectors that those of four rows fill, fields of each.
    static constexpr int kBytes = kBits == 8   ? 16
                                  : kBits == 1 ? 4
                                               : 8,
                         kCount = kBytes / 4, kEach = kFields<kBits>;
    // Dword d of all out[.] together has byte d of each row.
    TWA_INLINE static void interleave(const uint8_t* rows, uint8x16_t* out) {
      uint8x16_t v[4];
      for (int r = 0; r < 4; ++r) {
        const uint8_t* p = rows + r * row_bytes(kBits);
        if constexpr (kBytes == 16) v[r] = vld1q_u8(p);
        if constexpr (kBytes == 8) v[r] = vcombine_u8(vld1_u8(p), vcreate_u8(0));
        if constexpr (kBytes == 4) {
          uint32_t bytes;
          std::memcpy(&bytes, p, 4);
          v[r] = vreinterpretq_u8_u32(vsetq_lane_u32(bytes, vdupq_n_u32(0), 0));
        }
      }
      const auto pairs = [](uint8x16_t a, uint8x16_t b, uint8x16_t* to) {
        const uint16x8_t x = vreinterpretq_u16_u8(a), y = vreinterpretq_u16_u8(b);
        to[0] = vreinterpretq_u8_u16(vzip1q_u16(x, y));
        if constexpr (kBytes > 4) to[1] = vreinterpretq_u8_u16(vzip2q_u16(x, y));
      };
      pairs(vzip1q_u8(v[0], v[1]), vzip1q_u8(v[2], v[3]), out);
      if constexpr (kBytes == 16) pairs(vzip2q_u8(v[0], v[1]), vzip2q_u8(v[2], v[3]), out + 2);
    }

    const NeonTables<kBits>& tables_;
    const uint8_t* rows_;
    uint8x16_t packed_[kCount], high_[2];
  };

  // Four rows' limbs c in the first dword, then b, then a.
  struct RowOperands {
    int8x16_t limbs;
    TWA_INLINE explicit RowOperands(const int32_t* dwords)
        : limbs(vreinterpretq_s8_s32(vld1q_s32(dwords))) {}
  };

  TWA_INLINE static V zero() { return vdupq_n_s32(0); }
  // None: what they are worth on these machines has not been measured.
  TWA_INLINE static void prefetch_line(const uint8_t*, V*) {}
  TWA_INLINE static void prefetch_input(const void*) {}
  TWA_INLINE static void prefetch_scales(const void*) {}

  // As assembly: compilers differ in where they offer the intrinsics. Volatile: in this order, else
  // more levels are expanded early than there are registers.
  TWA_INLINE static void multiply(int8x16_t levels, const V* by, V* sums) {
    for (int k = 0; k < kSums; ++k)
      asm volatile("sdot %0.4s, %1.16b, %2.16b" : "+w"(sums[k]) : "w"(levels), "w"(by[k]));
  }
  TWA_INLINE static void multiply(int8x16_t levels, const RowOperands& by, V* sums) {
    asm volatile("sdot %0.4s, %1.16b, %2.4b[0]" : "+w"(sums[0]) : "w"(levels), "w"(by.limbs));
    asm volatile("sdot %0.4s, %1.16b, %2.4b[1]" : "+w"(sums[1]) : "w"(levels), "w"(by.limbs));
    asm volatile("sdot %0.4s, %1.16b, %2.4b[2]" : "+w"(sums[2]) : "w"(levels), "w"(by.limbs));
  }
  TWA_INLINE static void close(const V* sums, V* high, V* low) {
    *high = sums[2];
    *low = vaddq_s32(vshlq_n_s32(sums[1], 8), sums[0]);  // below 2^31 for the 32 columns of a lane
  }

  TWA_INLINE static int64_t prepare_columns(const int32_t* q, V (*by)[kOperands]) {
    int32x4_t total = zero();
    for (int v = 0; v < kVectors; ++v) {
      uint8x16_t limbs[4];
      for (int j = 0; j < 4; ++j) {
        const int32x4_t number = vld1q_s32(q + 16 * v + 4 * j);
        total = vaddq_s32(total, number);
        limbs[j] = limb_bytes(number);
      }
      const uint8x16_t ca0 = vuzp1q_u8(limbs[0], limbs[1]), ca1 = vuzp1q_u8(limbs[2], limbs[3]),
                       b0 = vuzp2q_u8(limbs[0], limbs[1]), b1 = vuzp2q_u8(limbs[2], limbs[3]);
      by[v][0] = vreinterpretq_s32_u8(vuzp1q_u8(ca0, ca1));
      by[v][1] = vreinterpretq_s32_u8(vuzp1q_u8(b0, b1));
      by[v][2] = vreinterpretq_s32_u8(vuzp2q_u8(ca0, ca1));
    }
    return vaddlvq_s32(total);
  }
  TWA_INLINE static void prepare_rows(const int32_t* q, int32_t* dwords) {
    const uint8x16_t order = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    vst1q_s32(dwords, vreinterpretq_s32_u8(vqtbl1q_u8(limb_bytes(vld1q_s32(q)), order)));
  }

  // count is a multiple of 8.
  TWA_INLINE static double to_fixed(const float* v, int count, int32_t* q) {
    uint32x4_t most[2] = {};
    for (int c = 0; c < count; c += 8)
      for (int k = 0; k < 2; ++k)
        most[k] = vmaxq_u32(most[k], vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(v + c + 4 * k))));
    const int e = fixed_exponent(static_cast<int32_t>(vmaxvq_u32(vmaxq_u32(most[0], most[1]))));
    if (e == kUnusual) return twa::to_fixed(v, count, q);
    const float factor = pow2f(23 - e);  // a power of two: the product is exact
    for (int c = 0; c < count; c += 4)
      vst1q_s32(q + c, vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(v + c), factor)));
    return static_cast<double>(pow2f(e - 23));
  }

  // w[r] = x[r] * scale of row r, for 8 rows; zero past `rows`.
  TWA_INLINE static void scale_rows(const float* x, const uint8_t* bytes, int64_t rows, float* w) {
    for (int r = 0; r < 8; r += 4) {
      float four[4] = {};
      if (rows >= r + 4)
        std::memcpy(four, x + r, sizeof four);
      else if (rows > r)
        std::memcpy(four, x + r, static_cast<size_t>(rows - r) * sizeof(float));
      vst1q_f32(w + r, vmulq_f32(vld1q_f32(four), scales(bytes + r, rows - r)));
    }
  }

  // Element r: the sum of the lanes of v[r].
  TWA_INLINE static V add_across(const V* v) {
    return vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3]));
  }
  // acc[r] += scale[r] * unit * (kHigh * high[r] + low[r] + offset) for 4 rows; acc has room for 4,
  // whatever `rows` is.
  TWA_INLINE static void add_rows(V high, V low, double, double offset, double unit,
                                  const uint8_t* bytes, int64_t rows, double* acc) {
    const float32x4_t scale = scales(bytes, rows);
    const auto add = [&](int64x2_t dot, float64x2_t s, double* to) {
      // Exact up to the last addition: the dot product has 39 bits, the scale 4.
      const float64x2_t scaled = vmulq_f64(vaddq_f64(vcvtq_f64_s64(dot), vdupq_n_f64(offset)), s);
      vst1q_f64(to, vfmaq_n_f64(vld1q_f64(to), scaled, unit));
    };
    add(vaddw_s32(vshll_n_s32(vget_low_s32(high), 16), vget_low_s32(low)),
        vcvt_f64_f32(vget_low_f32(scale)), acc);
    add(vaddw_high_s32(vshll_high_n_s32(high, 16), low), vcvt_high_f64_f32(scale), acc + 2);
  }

  // to[c] = from[c] + unit * (sums of column c + offset) for the columns of one pass.
  template <int kBits, int kPass, class Tier>
  TWA_INLINE static void finish(const V (*sums)[kSums], double offset, double unit,
                                const float* from, float* to) {
#pragma GCC unroll 8
    for (int u = 0; u < kPerPass; ++u) {
      const V c = sums[u][0], b = sums[u][1], a = sums[u][2];
      const int64x2_t first =
                          vaddq_s64(vshll_n_s32(vget_low_s32(a), 16),
                                    vaddw_s32(vshll_n_s32(vget_low_s32(b), 8), vget_low_s32(c))),
                      second = vaddq_s64(vshll_high_n_s32(a, 16),
                                         vaddw_high_s32(vshll_high_n_s32(b, 8), c));
      const int column = FourRows<kBits, kPass>::column(u);
      const float32x4_t base = vld1q_f32(from + column);
      // Every step exact, up to the addition of the base.
      const auto add = [&](int64x2_t dot, float64x2_t start) {
        const float64x2_t sum = vcvtq_f64_s64(dot);
        return vfmaq_n_f64(start, kBits == 1 ? vaddq_f64(sum, vdupq_n_f64(offset)) : sum, unit);
      };
      vst1q_f32(to + column,
                vcvt_high_f32_f64(vcvt_f32_f64(add(first, vcvt_f64_f32(vget_low_f32(base)))),
                                  add(second, vcvt_high_f64_f32(base))));
    }
  }

 private:
  // Of up to 4 rows; zero past `rows`. The bits of e4m3 are those of a float16 but for the
  // exponent.
  TWA_INLINE static float32x4_t scales(const uint8_t* bytes, int64_t rows) {
    uint64_t four = 0;
    if (rows >= 4)
      std::memcpy(&four, bytes, 4);
    else if (rows > 0)
      std::memcpy(&four, bytes, static_cast<size_t>(rows));
    const uint16x8_t half = vshll_n_u8(vcreate_u8(four), 7);
    return vmulq_n_f32(vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(half))), 256.0f);
  }
  // Bytes c, b, a, 0 of each dword: the signed limbs of q.
  TWA_INLINE static uint8x16_t limb_bytes(int32x4_t q) {
    const int32x4_t bias = vdupq_n_s32(0x808080);
    return vreinterpretq_u8_s32(veorq_s32(vaddq_s32(q, bias), bias));
  }
};

}  // namespace twa
#endif  // TWA_ARM
