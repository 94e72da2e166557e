// project:  c[i, l] = row_scale[i, l] * sum_{t in segment l} scales[t, i] * sum_c level[code(t, i, c)] * g[t, c]
//
// Operands   codes (num_tiles, n, 16 * bits) bytes, scales (num_tiles, n) e4m3, g a list of float32/bf16/f16 tensors, c (n, L) fp32.
// Work map   one item = one Block (up to 64 tiles of one tensor and segment). Per tile the gradient becomes 24-bit fixed point, so
//            the dot product with the int8 levels is an exact integer below 2^38 and no order of summation can change it. Tiles
//            are added in float64 in order within a block, blocks in float64 in order: same bits for any thread count and tier.
// Bytes      n * D * (bits / 8 + 1 / 128) read once as one stream, plus the gradient once.
// Products   AVX-512: gradient in three int8 limbs, vpdpbusd against (level + 128), corrected by 128 * sum(q).
//            AVX2: two int16 limbs of 12 bits, vpmaddwd. Portable: the same in plain C++.
#include "decode.h"

namespace twa {
namespace {

// One tile's gradient as an operand.
struct alignas(64) TileGradient {
  int32_t q[kTileColumns];
  int8_t a[kTileColumns], b[kTileColumns], c[kTileColumns];
  int16_t high[kTileColumns], low[kTileColumns];
  int64_t sum;  // of q
  double unit;
};

TWA_INLINE void load_gradient(const TensorTable& grads, const Block& block, int64_t tile, TileGradient* g) {
  alignas(64) float v[kTileColumns];
  load_tile(grads.dtype[block.tensor], grads.data[block.tensor], block.first_column + tile * kTileColumns, valid_columns(grads, block, tile), v);
  g->unit = to_fixed(v, kTileColumns, g->q);
}
TWA_INLINE void split_gradient_int16(TileGradient* g) {
  for (int c = 0; c < kTileColumns; ++c) split_int16(g->q[c], &g->high[c], &g->low[c]);
}

// acc[i] += scale[i] * unit * sum_c level[i, c] * q[c] for the n rows of one tile.
using TileKernel = void (*)(const uint8_t* codes, const uint8_t* scales, int64_t n, const TensorTable& grads, const Block& block, int64_t tile,
                            double* acc);

template <int kBits>
void tile_portable(const uint8_t* codes, const uint8_t* scales, int64_t n, const TensorTable& grads, const Block& block, int64_t tile, double* acc) {
  TileGradient g;
  load_gradient(grads, block, tile, &g);
  split_gradient_int16(&g);
  alignas(64) int16_t lev[kTileColumns];
  for (int64_t i = 0; i < n; ++i) {
    decode_portable<kBits>(codes + i * row_bytes(kBits), lev);
    int32_t high = 0, low = 0;
    for (int c = 0; c < kTileColumns; ++c) high += lev[c] * g.high[c];
    for (int c = 0; c < kTileColumns; ++c) low += lev[c] * g.low[c];
    acc[i] += static_cast<double>(int64_t{4096} * high + low) * (e4m3_to_float(scales[i]) * g.unit);
  }
}

#ifdef TWA_X86

template <int kBits>
TWA_AVX2 void tile_avx2(const uint8_t* codes, const uint8_t* scales, int64_t n, const TensorTable& grads, const Block& block, int64_t tile,
                        double* acc) {
  TileGradient g;
  load_gradient(grads, block, tile, &g);
  split_gradient_int16(&g);
  const __m256i table = level_table_avx2<kBits>();
  const auto operand = [](const int16_t* p, int k) TWA_AVX2 { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p) + k); };
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t* row = codes + i * row_bytes(kBits);
    __m256i high = _mm256_setzero_si256(), low = high;
    const auto add = [&](__m256i lev, int k) TWA_AVX2 {
      const __m256i l0 = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(lev)), l1 = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(lev, 1));
      high = _mm256_add_epi32(high, _mm256_add_epi32(_mm256_madd_epi16(l0, operand(g.high, 2 * k)), _mm256_madd_epi16(l1, operand(g.high, 2 * k + 1))));
      low = _mm256_add_epi32(low, _mm256_add_epi32(_mm256_madd_epi16(l0, operand(g.low, 2 * k)), _mm256_madd_epi16(l1, operand(g.low, 2 * k + 1))));
    };
    add(decode_avx2<kBits, 0>(row, table), 0);
    add(decode_avx2<kBits, 1>(row, table), 1);
    add(decode_avx2<kBits, 2>(row, table), 2);
    add(decode_avx2<kBits, 3>(row, table), 3);
    // [high x4 | low x4 pairs] -> one sum each
    const __m256i pairs = _mm256_hadd_epi32(high, low);
    const __m128i quads = _mm_hadd_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));  // [h, l, h, l]
    const __m128i sums = _mm_add_epi32(quads, _mm_shuffle_epi32(quads, 0x4e));
    const int64_t dot = int64_t{4096} * _mm_extract_epi32(sums, 0) + _mm_extract_epi32(sums, 1);
    acc[i] += static_cast<double>(dot) * (e4m3_to_float(scales[i]) * g.unit);
  }
}

// Lane j of the result is the sum of the 16 lanes of v[j].
TWA_AVX512 inline __m512i sum_lanes(const __m512i* v) {
  __m512i quad[4];
  for (int k = 0; k < 4; ++k) {
    const __m512i *p = v + 4 * k, ab = _mm512_add_epi32(_mm512_unpacklo_epi32(p[0], p[1]), _mm512_unpackhi_epi32(p[0], p[1])),
                  cd = _mm512_add_epi32(_mm512_unpacklo_epi32(p[2], p[3]), _mm512_unpackhi_epi32(p[2], p[3]));
    quad[k] = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));  // each 128-bit lane: parts of v[4k .. 4k+3]
  }
  const __m512i lo = _mm512_add_epi32(_mm512_shuffle_i32x4(quad[0], quad[1], 0x88), _mm512_shuffle_i32x4(quad[0], quad[1], 0xdd));
  const __m512i hi = _mm512_add_epi32(_mm512_shuffle_i32x4(quad[2], quad[3], 0x88), _mm512_shuffle_i32x4(quad[2], quad[3], 0xdd));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(lo, hi, 0x88), _mm512_shuffle_i32x4(lo, hi, 0xdd));
}

TWA_AVX512 inline __m512 e4m3_to_float_avx512(__m128i bytes) {
  const __m512i m = _mm512_cvtepu8_epi32(bytes);
  const __m512 normal = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(m, 20), _mm512_set1_epi32(120 << 23)));
  const __m512 small = _mm512_mul_ps(_mm512_cvtepi32_ps(m), _mm512_set1_ps(0x1p-9f));
  return _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(m, _mm512_set1_epi32(8)), normal, small);
}

template <int kBits>
TWA_AVX512 void tile_avx512(const uint8_t* codes, const uint8_t* scales, int64_t n, const TensorTable& grads, const Block& block, int64_t tile,
                            double* acc) {
  TileGradient g;
  load_gradient(grads, block, tile, &g);
  g.sum = 0;
  for (int c = 0; c < kTileColumns; ++c) split_int8(g.q[c], &g.a[c], &g.b[c], &g.c[c]);
  int32_t sum = 0;  // |sum| < 2^30
  for (int c = 0; c < kTileColumns; ++c) sum += g.q[c];
  const __m512i table = level_table_avx512<kBits>();
  const __m512i a0 = _mm512_load_si512(g.a), a1 = _mm512_load_si512(g.a + 64), b0 = _mm512_load_si512(g.b), b1 = _mm512_load_si512(g.b + 64),
                c0 = _mm512_load_si512(g.c), c1 = _mm512_load_si512(g.c + 64);
  const __m512d offset = _mm512_set1_pd(-128.0 * sum), unit = _mm512_set1_pd(g.unit), two16 = _mm512_set1_pd(65536.0);
  for (int64_t i0 = 0; i0 < n; i0 += 16) {
    __m512i high[16], low[16];  // per row: sums of a, and of 256 b + c, over 8 columns a lane
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      const uint8_t* row = codes + (i0 + r < n ? i0 + r : n - 1) * row_bytes(kBits);
      const __m512i l0 = decode_avx512<kBits, 0>(row, table), l1 = decode_avx512<kBits, 1>(row, table), zero = _mm512_setzero_si512();
      high[r] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, l0, a0), l1, a1);
      const __m512i b = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, l0, b0), l1, b1);
      low[r] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_slli_epi32(b, 8), l0, c0), l1, c1);
    }
    const __m512i h = sum_lanes(high), l = sum_lanes(low);
    const __mmask16 rows = static_cast<__mmask16>(n - i0 >= 16 ? 0xffff : (1 << (n - i0)) - 1);
    const __m512 scale = e4m3_to_float_avx512(_mm_maskz_loadu_epi8(rows, scales + i0));
    const auto add = [&](__m256i hh, __m256i ll, __m256 s, __mmask8 mask, double* out) TWA_AVX512 {
      // Exact: the dot product has 38 bits, the scale 4.
      const __m512d dot = _mm512_add_pd(_mm512_add_pd(_mm512_mul_pd(_mm512_cvtepi32_pd(hh), two16), _mm512_cvtepi32_pd(ll)), offset);
      const __m512d term = _mm512_mul_pd(dot, _mm512_mul_pd(_mm512_cvtps_pd(s), unit));
      _mm512_mask_storeu_pd(out, mask, _mm512_add_pd(_mm512_maskz_loadu_pd(mask, out), term));
    };
    add(_mm512_castsi512_si256(h), _mm512_castsi512_si256(l), _mm512_castps512_ps256(scale), static_cast<__mmask8>(rows), acc + i0);
    add(_mm512_extracti64x4_epi64(h, 1), _mm512_extracti64x4_epi64(l, 1), _mm512_extractf32x8_ps(scale, 1), static_cast<__mmask8>(rows >> 8),
        acc + i0 + 8);
  }
}

#endif  // TWA_X86

template <int kBits>
TileKernel pick() {
#ifdef TWA_X86
  if (isa() == Isa::avx512) return tile_avx512<kBits>;
  if (isa() == Isa::avx2) return tile_avx2<kBits>;
#endif
  return tile_portable<kBits>;
}
TileKernel pick(int bits) {
  switch (bits) {
    case 8: return pick<8>();
    case 4: return pick<4>();
    case 3: return pick<3>();
    case 2: return pick<2>();
    default: return pick<1>();
  }
}

}  // namespace

Status project_cpu(const BasisView& basis, const TensorTable& grads, float* c, int threads) {
  const int64_t n = basis.n, segments = basis.num_segments;
  if (!valid_bits(basis.bits) || n < 1 || n > kMaxRows || total_tiles(grads) != basis.num_tiles) return Status::bad_argument;
  const std::vector<Block> blocks = make_blocks(grads, basis.tile_segment);
  std::vector<double> partial(blocks.size() * n, 0.0), total(segments * n, 0.0);
  const TileKernel kernel = pick(basis.bits);
  parallel_for(static_cast<int64_t>(blocks.size()), threads, [&](int64_t k) {
    const Block& b = blocks[k];
    for (int64_t t = 0; t < b.tiles; ++t) {
      const int64_t group = (b.first_tile + t) * n;
      kernel(basis.codes + group * row_bytes(basis.bits), basis.scales + group, n, grads, b, t, partial.data() + k * n);
    }
  });
  for (size_t k = 0; k < blocks.size(); ++k)
    for (int64_t i = 0; i < n; ++i) total[blocks[k].segment * n + i] += partial[k * n + i];
  for (int64_t i = 0; i < n; ++i)
    for (int64_t l = 0; l < segments; ++l) c[i * segments + l] = static_cast<float>(total[l * n + i] * basis.row_scale[i * segments + l]);
  return Status::ok;
}

}  // namespace twa
