// project.cpp's kernel for NEON with dot products.
//
// Gradient in three int8 limbs, each limb's 128 bytes in the order of the columns. Four rows at a
// time, 16 columns of each: levels, times the three limbs that the four rows share, into 12
// vectors of sums over every fourth lane. 1 bit: sdot with -1 where the bit is set; sum(level * q)
// = -254 * sum(-bit * q) - 127 * sum(q).
#pragma once

#include <algorithm>

#include "neon.h"

#ifdef TWA_ARM
namespace twa {
namespace {

struct alignas(64) NeonGradient {
  int8_t limbs[3][kTileColumns];  // c, b, a
  double unit;
  double offset;  // 1 bit: -127 * sum(q)
};

TWA_INLINE void load_gradient_neon(const TensorTable& grads, const Block& block, int64_t tile,
                                   NeonGradient* g) {
  alignas(64) float v[kTileColumns];
  alignas(64) int32_t q[kTileColumns];
  const int64_t column = block.first_column + tile * kTileColumns;
  const int valid = valid_columns(grads.numel, block, tile);
  const float* from = v;
  if (grads.dtype[block.tensor] == Dtype::f32 && valid == kTileColumns)
    from = static_cast<const float*>(grads.data[block.tensor]) + column;
  else
    load_tile(grads.dtype[block.tensor], grads.data[block.tensor], column, valid, v);
  g->unit = to_fixed_neon(from, kTileColumns, q);
  for (int c = 0; c < kTileColumns; c += 16) {
    const uint8x16_t q0 = limbs_neon(q + c), q1 = limbs_neon(q + c + 4), q2 = limbs_neon(q + c + 8),
                     q3 = limbs_neon(q + c + 12);
    const uint8x16_t ca0 = vuzp1q_u8(q0, q1), ca1 = vuzp1q_u8(q2, q3);
    const uint8x16_t b = vuzp1q_u8(vuzp2q_u8(q0, q1), vuzp2q_u8(q2, q3));
    vst1q_s8(g->limbs[0] + c, vreinterpretq_s8_u8(vuzp1q_u8(ca0, ca1)));
    vst1q_s8(g->limbs[1] + c, vreinterpretq_s8_u8(b));
    vst1q_s8(g->limbs[2] + c, vreinterpretq_s8_u8(vuzp2q_u8(ca0, ca1)));
  }
  int32_t total = 0;  // below 128 * 2^23
  for (int c = 0; c < kTileColumns; ++c) total += q[c];
  g->offset = static_cast<double>(int64_t{-127} * total);
}

// Sums of the lanes of four vectors.
TWA_INLINE int32x4_t add_lanes(int32x4_t v0, int32x4_t v1, int32x4_t v2, int32x4_t v3) {
  return vpaddq_s32(vpaddq_s32(v0, v1), vpaddq_s32(v2, v3));
}

// acc[r] += scale * unit * sum over the tile's columns, for up to 4 rows.
template <int kBits>
TWA_INLINE void add_rows4(const uint8_t* codes, const uint8_t* scales, int64_t rows,
                          const NeonGradient& g, const NeonTables<kBits>& tables, double* acc) {
  constexpr int kBytes = row_bytes(kBits);
  uint8_t last[4 * kBytes];
  if (rows < 4) {  // followed by anything
    std::memcpy(last, codes, static_cast<size_t>(rows * kBytes));
    codes = last;
  }
  int32x4_t sum[3][4] = {};
#pragma GCC unroll 8
  for (int j = 0; j < kParts<kBits>; ++j) {
    const NeonFields<kBits> fields[4] = {
        fields_of<kBits>(codes, j), fields_of<kBits>(codes + kBytes, j),
        fields_of<kBits>(codes + 2 * kBytes, j), fields_of<kBits>(codes + 3 * kBytes, j)};
#pragma GCC unroll 8
    for (int f = 0; f < kFields<kBits>; ++f) {
      int8x16_t k[3];
      for (int limb = 0; limb < 3; ++limb)
        k[limb] = vld1q_s8(g.limbs[limb] + 16 * (f * kParts<kBits> + j));
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const int8x16_t lev = fields[r].get(f, tables);
        for (int limb = 0; limb < 3; ++limb) add_dot(&sum[limb][r], lev, k[limb]);
      }
    }
  }
  int32x4_t of_row[3];
  for (int limb = 0; limb < 3; ++limb)
    of_row[limb] = add_lanes(sum[limb][0], sum[limb][1], sum[limb][2], sum[limb][3]);
  float64x2_t dot[2];
  join_limbs(of_row[2], of_row[1], of_row[0], true, dot);  // below 2^31: 128 * 128 * 128 * 257
  const float32x4_t scale = scales_neon(scales, rows);
  const float64x2_t factor[2] = {vmulq_n_f64(vcvt_f64_f32(vget_low_f32(scale)), 256.0 * g.unit),
                                 vmulq_n_f64(vcvt_high_f64_f32(scale), 256.0 * g.unit)};
  double sums[4] = {};
  double* to = acc;
  if (rows < 4) to = sums, std::memcpy(sums, acc, static_cast<size_t>(rows) * sizeof(double));
  for (int h = 0; h < 2; ++h) {
    if (kBits == 1) dot[h] = vfmaq_n_f64(vdupq_n_f64(g.offset), dot[h], -254.0);
    // The product is exact: the dot product has 38 bits, the scale 4.
    vst1q_f64(to + 2 * h, vfmaq_f64(vld1q_f64(to + 2 * h), dot[h], factor[h]));
  }
  if (rows < 4) std::memcpy(acc, sums, static_cast<size_t>(rows) * sizeof(double));
}

template <int kBits>
TWA_NEON void block_neon(const BasisView& basis, const TensorTable& grads, const Block& block,
                         double* acc) {
  const NeonTables<kBits> tables;
  const int64_t n = basis.n;
  each_tile<kBits>(
      basis, block, [&](const uint8_t* codes, const uint8_t* scales, int64_t t) TWA_NEON {
        NeonGradient g;
        load_gradient_neon(grads, block, t, &g);
        for (int64_t i = 0; i < n; i += 4)
          add_rows4<kBits>(codes + i * row_bytes(kBits), scales + i, n - i, g, tables, acc + i);
      });
}

}  // namespace
}  // namespace twa
#endif  // TWA_ARM
