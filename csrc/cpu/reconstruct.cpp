// reconstruct:  out[j] = center[j] + sum_i w[t, i] * level[code(t, i, c)],  w[t, i] = x[i, l] * row_scale[i, l] * scales[t, i]
//
// Operands   codes (num_tiles, n, 16 * bits) bytes, scales (num_tiles, n) e4m3, x (n, L) fp32, center and out lists of tensors.
// Work map   one item = one Block (up to 64 tiles of one tensor and segment), whose columns nobody else writes. Per tile the n
//            coefficients become 24-bit fixed point, so the sum over rows is an exact integer; it is scaled, added to the center
//            in float64 and rounded to float32, then to the dtype of out: same bits for any thread count and tier.
// Bytes      n * D * (bits / 8 + 1 / 128) read once as one stream, plus D * (center + out).
// Products   AVX-512: rows in groups of 4, their levels interleaved so that one 32-bit lane holds a column's 4 levels + 128;
//            vpdpbusd against 4 coefficient limbs, 3 limbs, 8 x 16 columns: 24 accumulators. Corrected by 128 * sum(q).
//            AVX2: rows in pairs, two int16 limbs, vpmaddwd. Portable: the same in plain C++.
#include <algorithm>

#include "decode.h"

namespace twa {
namespace {

// Fixed-point coefficients of one tile; rows past n are zero up to a multiple of 16.
struct alignas(64) TileCoefficients {
  float w[kMaxRows];
  int32_t q[kMaxRows];
  int8_t a[kMaxRows], b[kMaxRows], c[kMaxRows];
  int16_t high[kMaxRows], low[kMaxRows];
  double unit;
};

TWA_INLINE int64_t load_coefficients(const float* x_row, const uint8_t* scales, int64_t n, TileCoefficients* k) {
  const int64_t padded = (n + 15) / 16 * 16;
  for (int64_t i = 0; i < n; ++i) k->w[i] = x_row[i] * e4m3_to_float(scales[i]);
  for (int64_t i = n; i < padded; ++i) k->w[i] = 0.0f;
  k->unit = to_fixed(k->w, static_cast<int>(padded), k->q);
  return padded;
}

TWA_INLINE void finish_tile(const TensorTable& center, const TensorTable& out, const Block& block, int64_t tile, double unit,
                            const double* __restrict__ sum) {
  alignas(64) float base[kTileColumns], value[kTileColumns];
  const int valid = valid_columns(out, block, tile);
  const int64_t column = block.first_column + tile * kTileColumns;
  if (center.data) {
    load_tile(center.dtype[block.tensor], center.data[block.tensor], column, valid, base);
  } else {
    for (int c = 0; c < kTileColumns; ++c) base[c] = 0.0f;
  }
  for (int c = 0; c < kTileColumns; ++c) value[c] = static_cast<float>(static_cast<double>(base[c]) + sum[c] * unit);
  store_tile(out.dtype[block.tensor], out.data[block.tensor], column, valid, value);
}

// sum[c] = sum_i q[i] * level[i, c], exact. Returns the unit of q.
using TileKernel = void (*)(const uint8_t* codes, const uint8_t* scales, const float* x_row, int64_t n, const TensorTable& center,
                            const TensorTable& out, const Block& block, int64_t tile, TileCoefficients* k);

template <int kBits>
void tile_portable(const uint8_t* codes, const uint8_t* scales, const float* x_row, int64_t n, const TensorTable& center, const TensorTable& out,
                   const Block& block, int64_t tile, TileCoefficients* k) {
  load_coefficients(x_row, scales, n, k);
  alignas(64) int16_t lev[kTileColumns];
  alignas(64) int32_t high[kTileColumns] = {}, low[kTileColumns] = {};
  for (int64_t i = 0; i < n; ++i) {
    int16_t h, l;
    split_int16(k->q[i], &h, &l);
    decode_portable<kBits>(codes + i * row_bytes(kBits), lev);
    for (int c = 0; c < kTileColumns; ++c) high[c] += lev[c] * h;
    for (int c = 0; c < kTileColumns; ++c) low[c] += lev[c] * l;
  }
  alignas(64) double sum[kTileColumns];
  for (int c = 0; c < kTileColumns; ++c) sum[c] = 4096.0 * high[c] + low[c];
  finish_tile(center, out, block, tile, k->unit, sum);
}

#ifdef TWA_X86

// Adds two rows' levels (int8, 32 columns) times their limbs (a pair of int16 in each 32-bit lane) to 4 x 8 columns.
// in order: byte interleaving works within 128-bit lanes, so p[0 .. 3] hold columns 0-7, 8-15, 16-23, 24-31.
TWA_AVX2 inline void add_pair(__m256i lev0, __m256i lev1, __m256i high, __m256i low, __m256i* acc_high, __m256i* acc_low) {
  const __m256i lo = _mm256_unpacklo_epi8(lev0, lev1), hi = _mm256_unpackhi_epi8(lev0, lev1);  // per lane: columns 0-7, 8-15
  const __m256i p[4] = {_mm256_cvtepi8_epi16(_mm256_castsi256_si128(lo)), _mm256_cvtepi8_epi16(_mm256_castsi256_si128(hi)),
                        _mm256_cvtepi8_epi16(_mm256_extracti128_si256(lo, 1)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(hi, 1))};
  for (int j = 0; j < 4; ++j) {
    acc_high[j] = _mm256_add_epi32(acc_high[j], _mm256_madd_epi16(p[j], high));
    acc_low[j] = _mm256_add_epi32(acc_low[j], _mm256_madd_epi16(p[j], low));
  }
}

// One quarter (32 columns) of the tile, all rows: 8 accumulators stay in registers.
template <int kBits, int kQuarter>
TWA_AVX2 inline void quarter_avx2(const uint8_t* codes, int64_t n, const TileCoefficients& k, __m256i table, double* sum) {
  __m256i high[4], low[4];
  for (int j = 0; j < 4; ++j) high[j] = low[j] = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 2) {
    int32_t h, l;  // limbs of rows i and i + 1; the row past an odd n has zero limbs
    std::memcpy(&h, k.high + i, 4);
    std::memcpy(&l, k.low + i, 4);
    const uint8_t *row0 = codes + i * row_bytes(kBits), *row1 = i + 1 < n ? row0 + row_bytes(kBits) : row0;
    add_pair(decode_avx2<kBits, kQuarter>(row0, table), decode_avx2<kBits, kQuarter>(row1, table), _mm256_set1_epi32(h), _mm256_set1_epi32(l), high,
             low);
  }
  alignas(32) int32_t h[8], l[8];
  for (int j = 0; j < 4; ++j) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(h), high[j]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(l), low[j]);
    for (int c = 0; c < 8; ++c) sum[32 * kQuarter + 8 * j + c] = 4096.0 * h[c] + l[c];
  }
}

template <int kBits>
TWA_AVX2 void tile_avx2(const uint8_t* codes, const uint8_t* scales, const float* x_row, int64_t n, const TensorTable& center, const TensorTable& out,
                        const Block& block, int64_t tile, TileCoefficients* k) {
  const int64_t padded = load_coefficients(x_row, scales, n, k);
  for (int64_t i = 0; i < padded; ++i) split_int16(k->q[i], &k->high[i], &k->low[i]);
  const __m256i table = level_table_avx2<kBits>();
  alignas(64) double sum[kTileColumns];
  quarter_avx2<kBits, 0>(codes, n, *k, table, sum);
  quarter_avx2<kBits, 1>(codes, n, *k, table, sum);
  quarter_avx2<kBits, 2>(codes, n, *k, table, sum);
  quarter_avx2<kBits, 3>(codes, n, *k, table, sum);
  finish_tile(center, out, block, tile, k->unit, sum);
}

// Four rows' levels of one half tile, interleaved: 32-bit element m of 128-bit lane v of out[j] holds column 16 v + 4 j + m.
template <int kBits, int kHalf>
TWA_AVX512 inline void interleave_rows(const uint8_t* const* rows, __m512i table, __m512i* out) {
  const __m512i r0 = decode_avx512<kBits, kHalf>(rows[0], table), r1 = decode_avx512<kBits, kHalf>(rows[1], table),
                r2 = decode_avx512<kBits, kHalf>(rows[2], table), r3 = decode_avx512<kBits, kHalf>(rows[3], table);
  const __m512i lo01 = _mm512_unpacklo_epi8(r0, r1), hi01 = _mm512_unpackhi_epi8(r0, r1), lo23 = _mm512_unpacklo_epi8(r2, r3),
                hi23 = _mm512_unpackhi_epi8(r2, r3);
  out[0] = _mm512_unpacklo_epi16(lo01, lo23);
  out[1] = _mm512_unpackhi_epi16(lo01, lo23);
  out[2] = _mm512_unpacklo_epi16(hi01, hi23);
  out[3] = _mm512_unpackhi_epi16(hi01, hi23);
}

TWA_AVX512 inline void store_sums(const __m512i* a, const __m512i* b, const __m512i* c, __m512d offset, double* sum) {
  const __m512d two16 = _mm512_set1_pd(65536.0), two8 = _mm512_set1_pd(256.0);
  for (int j = 0; j < 4; ++j) {
    const auto combine = [&](__m256i x, __m256i y, __m256i z) TWA_AVX512 {
      const __m512d low = _mm512_add_pd(_mm512_mul_pd(_mm512_cvtepi32_pd(y), two8), _mm512_cvtepi32_pd(z));
      return _mm512_add_pd(_mm512_add_pd(_mm512_mul_pd(_mm512_cvtepi32_pd(x), two16), low), offset);
    };
    const __m512d lanes01 = combine(_mm512_castsi512_si256(a[j]), _mm512_castsi512_si256(b[j]), _mm512_castsi512_si256(c[j]));
    const __m512d lanes23 = combine(_mm512_extracti64x4_epi64(a[j], 1), _mm512_extracti64x4_epi64(b[j], 1), _mm512_extracti64x4_epi64(c[j], 1));
    _mm256_store_pd(sum + 4 * j, _mm512_castpd512_pd256(lanes01));
    _mm256_store_pd(sum + 16 + 4 * j, _mm512_extractf64x4_pd(lanes01, 1));
    _mm256_store_pd(sum + 32 + 4 * j, _mm512_castpd512_pd256(lanes23));
    _mm256_store_pd(sum + 48 + 4 * j, _mm512_extractf64x4_pd(lanes23, 1));
  }
}

template <int kBits>
TWA_AVX512 void tile_avx512(const uint8_t* codes, const uint8_t* scales, const float* x_row, int64_t n, const TensorTable& center,
                            const TensorTable& out, const Block& block, int64_t tile, TileCoefficients* k) {
  const int64_t padded = load_coefficients(x_row, scales, n, k);
  for (int64_t i = 0; i < padded; ++i) split_int8(k->q[i], &k->a[i], &k->b[i], &k->c[i]);
  int64_t total = 0;
  for (int64_t i = 0; i < padded; ++i) total += k->q[i];
  const __m512i table = level_table_avx512<kBits>();
  __m512i a[8], b[8], c[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) a[j] = b[j] = c[j] = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 4) {
    const uint8_t* rows[4];
    for (int r = 0; r < 4; ++r) rows[r] = codes + std::min(i + r, n - 1) * row_bytes(kBits);
    const auto limbs = [i](const int8_t* p) TWA_AVX512 {
      int32_t four;
      std::memcpy(&four, p + i, 4);
      return _mm512_set1_epi32(four);
    };
    const __m512i ka = limbs(k->a), kb = limbs(k->b), kc = limbs(k->c);
    __m512i lev[4];
    const auto add = [&](int first) TWA_AVX512 {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        a[first + j] = _mm512_dpbusd_epi32(a[first + j], lev[j], ka);
        b[first + j] = _mm512_dpbusd_epi32(b[first + j], lev[j], kb);
        c[first + j] = _mm512_dpbusd_epi32(c[first + j], lev[j], kc);
      }
    };
    interleave_rows<kBits, 0>(rows, table, lev);
    add(0);
    interleave_rows<kBits, 1>(rows, table, lev);
    add(4);
  }
  alignas(64) double sum[kTileColumns];
  const __m512d offset = _mm512_set1_pd(-128.0 * static_cast<double>(total));
  store_sums(a, b, c, offset, sum);
  store_sums(a + 4, b + 4, c + 4, offset, sum + 64);
  finish_tile(center, out, block, tile, k->unit, sum);
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

Status reconstruct_cpu(const BasisView& basis, const float* x, const TensorTable& center, const TensorTable& out, int threads) {
  const int64_t n = basis.n, segments = basis.num_segments;
  if (!valid_bits(basis.bits) || n < 1 || n > kMaxRows || total_tiles(out) != basis.num_tiles) return Status::bad_argument;
  const std::vector<Block> blocks = make_blocks(out, basis.tile_segment);
  // x * row_scale by segment, so that a block reads n consecutive numbers.
  std::vector<float> scaled(segments * n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t l = 0; l < segments; ++l) scaled[l * n + i] = x[i * segments + l] * basis.row_scale[i * segments + l];
  const TileKernel kernel = pick(basis.bits);
  parallel_for(static_cast<int64_t>(blocks.size()), threads, [&](int64_t item) {
    static thread_local TileCoefficients workspace;
    const Block& b = blocks[item];
    for (int64_t t = 0; t < b.tiles; ++t) {
      const int64_t group = (b.first_tile + t) * n;
      kernel(basis.codes + group * row_bytes(basis.bits), basis.scales + group, scaled.data() + b.segment * n, n, center, out, b, t, &workspace);
    }
  });
  return Status::ok;
}

}  // namespace twa
