// reconstruct.cpp's kernel for NEON with dot products.
//
// Four rows at a time; their packed bytes are interleaved so that a dword holds one byte of each
// row. Expanded, a dword holds the 4 levels of one column, and sdot multiplies it with the 4 rows'
// limbs, three of them. A pass over the rows adds up 32 of the tile's columns, in 8 vectors of 4:
// 24 sums and their operands stay in registers; the other passes find the rows in the first-level
// cache. Vector u of pass p has columns first_column(p, u) ..+3. 1 bit: as project_neon.h.
#pragma once

#include <algorithm>
#include <memory>

#include "neon.h"

#ifdef TWA_ARM
namespace twa {
namespace {

template <int kBits>
constexpr int first_column(int p, int u) {
  return kBits == 8   ? 32 * p + 4 * u
         : kBits == 4 ? 64 * (u % 2) + 16 * p + 4 * (u / 2)  // u % 2 = field
         : kBits == 1 ? 16 * u + 4 * p                       // u = field
                      : 32 * (u % 4) + 8 * p + 4 * (u / 4);  // u % 4 = field
}

// kBytes bytes of four rows: dword d of all out[.] together has byte d of each row.
template <int kBytes>
TWA_INLINE void interleave(const uint8_t* rows, int stride, uint8x16_t* out) {
  uint8x16_t v[4];
  for (int r = 0; r < 4; ++r) {
    if constexpr (kBytes == 16) v[r] = vld1q_u8(rows + r * stride);
    if constexpr (kBytes == 8) v[r] = vcombine_u8(vld1_u8(rows + r * stride), vcreate_u8(0));
    if constexpr (kBytes == 4) {
      uint32_t bytes;
      std::memcpy(&bytes, rows + r * stride, 4);
      v[r] = vreinterpretq_u8_u32(vsetq_lane_u32(bytes, vdupq_n_u32(0), 0));
    }
  }
  const auto pairs = [&](uint8x16_t a, uint8x16_t b, uint8x16_t* to) {
    const uint16x8_t x = vreinterpretq_u16_u8(a), y = vreinterpretq_u16_u8(b);
    to[0] = vreinterpretq_u8_u16(vzip1q_u16(x, y));
    if constexpr (kBytes > 4) to[1] = vreinterpretq_u8_u16(vzip2q_u16(x, y));
  };
  pairs(vzip1q_u8(v[0], v[1]), vzip1q_u8(v[2], v[3]), out);
  if constexpr (kBytes == 16) pairs(vzip2q_u8(v[0], v[1]), vzip2q_u8(v[2], v[3]), out + 2);
}

// add(u, levels) for the 8 vectors of pass p, from four rows.
template <int kBits, class Add>
TWA_INLINE void expand_rows4(const uint8_t* rows, int p, const NeonTables<kBits>& tables,
                             const Add& add) {
  constexpr int kBytes = 4 * kBits > 16 ? 16
                         : kBits == 3   ? 8
                                        : 4 * kBits,
                kVectors = kBytes / 4,
                kEach = kBits == 3 ? 4 : 8 / kBits;  // fields of each vector
#pragma GCC unroll 2
  for (int half = 0; half < 8 / (kVectors * kEach); ++half) {
    uint8x16_t packed[kVectors], high[2] = {};
    interleave<kBytes>(rows + 4 * kBits * p + kBytes * half, row_bytes(kBits),
                       packed);
    if constexpr (kBits == 3) interleave<8>(rows + 32 + 8 * (p % 2), row_bytes(3), high);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const auto fields = [&] {
        if constexpr (kBits == 3)
          return NeonFields<3>(packed[v], high[v], p / 2);
        else
          return NeonFields<kBits>(packed[v]);
      }();
#pragma GCC unroll 8
      for (int f = 0; f < kEach; ++f) add((half * kVectors + v) * kEach + f, fields.get(f, tables));
    }
  }
}

struct alignas(64) NeonCoefficients {
  float w[kMaxRows];
  int32_t q[kMaxRows];
  int32_t limbs[kMaxRows];  // 4 rows' limbs c, b, a and zeros, one dword each
};

// What a tile's columns are added to, and where the sums go: in place, or in `base` and `value`.
struct NeonTarget {
  const float* from;
  float* to;
  double unit, offset;
  bool narrow;  // 256 b + c stays below 2^31: 256 rows * 128 * 128 * 257
};

template <int kBits, int kPass>
TWA_INLINE void columns_neon(const uint8_t* codes, const uint8_t* last, int64_t n,
                             const int32_t* limbs, const NeonTables<kBits>& tables,
                             const NeonTarget& target) {
  constexpr int kBytes = row_bytes(kBits);
  int32x4_t sum[3][8] = {};
  const auto add_rows4 = [&](const uint8_t* rows, const int32_t* rows_limbs) __attribute__((always_inline)) {
    const int8x16_t k = vreinterpretq_s8_s32(vld1q_s32(rows_limbs));
    expand_rows4<kBits>(rows, kPass, tables, [&](int u, int8x16_t levels) __attribute__((always_inline)) {
      add_dot<0>(&sum[0][u], levels, k);
      add_dot<1>(&sum[1][u], levels, k);
      add_dot<2>(&sum[2][u], levels, k);
    });
  };
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) add_rows4(codes + i * kBytes, limbs + i);
  if (i < n) add_rows4(last, limbs + i);
#pragma GCC unroll 8
  for (int u = 0; u < 8; ++u) {
    float64x2_t dot[2];
    join_limbs(sum[2][u], sum[1][u], sum[0][u], target.narrow, dot);
    if constexpr (kBits == 1)
      for (auto& d : dot) d = vfmaq_n_f64(vdupq_n_f64(target.offset), d, -254.0);
    const float32x4_t base = vld1q_f32(target.from + first_column<kBits>(kPass, u));
    // Every step exact, up to the addition of the center.
    const float64x2_t first = vfmaq_n_f64(vcvt_f64_f32(vget_low_f32(base)), dot[0], target.unit),
                      second = vfmaq_n_f64(vcvt_high_f64_f32(base), dot[1], target.unit);
    vst1q_f32(target.to + first_column<kBits>(kPass, u),
              vcvt_high_f32_f64(vcvt_f32_f64(first), second));
  }
}

template <int kBits>
TWA_INLINE void tile_neon(const uint8_t* codes, const uint8_t* scales,
                                                  const float* x_row, int64_t n,
                                                  const TensorTable& center, const TensorTable& out,
                                                  const Block& block, int64_t tile,
                                                  const NeonTables<kBits>& tables,
                                                  NeonCoefficients* k) {
  const int64_t padded = (n + 15) / 16 * 16, whole = n / 4 * 4;
  for (int64_t i = 0; i < whole; i += 4)
    vst1q_f32(k->w + i,
              vmulq_f32(vld1q_f32(x_row + i), vmulq_n_f32(scales_neon(scales + i, 4), 256.0f)));
  for (int64_t i = whole; i < n; ++i) k->w[i] = x_row[i] * e4m3_to_float(scales[i]);
  for (int64_t i = n; i < padded; ++i) k->w[i] = 0.0f;
  NeonTarget target;
  target.unit = to_fixed_neon(k->w, static_cast<int>(padded), k->q);
  target.narrow = n <= 256;
  const uint8x16_t transposed = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  int64_t total = 0;
  for (int64_t i = 0; i < n; i += 4) {
    const uint8x16_t limbs = vqtbl1q_u8(limbs_neon(k->q + i), transposed);
    vst1q_s32(k->limbs + i, vreinterpretq_s32_u8(limbs));
    if (kBits == 1) total += vaddlvq_s32(vld1q_s32(k->q + i));
  }
  target.offset = static_cast<double>(-127 * total);

  alignas(64) float base[kTileColumns], value[kTileColumns];
  const int valid = valid_columns(out.numel, block, tile);
  const int64_t column = block.first_column + tile * kTileColumns;
  const auto direct = [&](const TensorTable& t) {
    return valid == kTileColumns && t.dtype[block.tensor] == Dtype::f32;
  };
  target.to = direct(out) ? static_cast<float*>(out.data[block.tensor]) + column : value;
  target.from = base;
  if (!center.data) {
    for (int c = 0; c < kTileColumns; ++c) base[c] = 0.0f;
  } else if (direct(center)) {
    target.from = static_cast<const float*>(center.data[block.tensor]) + column;
  } else {
    load_tile(center.dtype[block.tensor], center.data[block.tensor], column, valid, base);
  }
  alignas(16) uint8_t
      last[4 * row_bytes(kBits)];  // the rows past the last multiple of 4, followed by anything
  std::memcpy(last, codes + whole * row_bytes(kBits),
              static_cast<size_t>((n - whole) * row_bytes(kBits)));
  columns_neon<kBits, 0>(codes, last, n, k->limbs, tables, target);
  columns_neon<kBits, 1>(codes, last, n, k->limbs, tables, target);
  columns_neon<kBits, 2>(codes, last, n, k->limbs, tables, target);
  columns_neon<kBits, 3>(codes, last, n, k->limbs, tables, target);
  if (target.to == value)
    store_tile(out.dtype[block.tensor], out.data[block.tensor], column, valid, value);
}

template <int kBits>
TWA_NEON void block_neon(const BasisView& basis, const float* x_row, const TensorTable& center,
                         const TensorTable& out, const Block& block) {
  // By a pointer: the address of a thread's own data is worked out anew wherever it is used.
  static thread_local const auto workspace = std::make_unique<NeonCoefficients>();
  NeonCoefficients* k = workspace.get();
  const NeonTables<kBits> tables;
  each_tile<kBits>(
      basis, block, [&](const uint8_t* codes, const uint8_t* scales, int64_t t) TWA_NEON {
        tile_neon<kBits>(codes, scales, x_row, basis.n, center, out, block, t, tables, k);
      });
}

}  // namespace
}  // namespace twa
#endif  // TWA_ARM
