// reconstruct:  out[j] = center[j] + sum_i w[t, i] * level[code(t, i, c)],
//               w[t, i] = x[i, l] * row_scale[i, l] * scales[t, i]
//
// Operands   codes (num_tiles, n, 16 * bits) bytes, scales (num_tiles, n) e4m3, x (n, L) fp32,
//            center and out lists of tensors.
// Work map   one item = one Block (up to 64 tiles of one tensor and segment), whose columns nobody
//            else writes. Per tile the n coefficients become 24-bit fixed point, so the sum over
//            rows is an exact integer; it is scaled, added to the center in float64 and rounded to
//            float32, then to the dtype of out: same bits for any thread count and tier.
// Bytes      n * D * (bits / 8 + 1 / 128) read once as one stream, plus D * (center + out).
// Products   AVX-512: rows in groups of 4, their levels interleaved so that one 32-bit lane holds a
//            column's 4 levels + 128; vpdpbusd against 4 coefficient limbs, 3 limbs, 4 x 16
//            columns: 12 accumulators, and all rows once more for the other half of the columns,
//            from cache. Corrected by 128 * sum(q).
//            The packed bytes are interleaved, before they are expanded.
//            AVX2: rows in pairs, two int16 limbs, vpmaddwd. Portable: the same in plain C++.
#include <algorithm>

#include "decode.h"
#include "reconstruct_neon.h"

namespace twa {
namespace {

// Fixed-point coefficients of one tile; rows past n are zero up to a multiple of 16.
struct alignas(64) TileCoefficients {
  float w[kMaxRows];
  int32_t q[kMaxRows];
  int32_t limbs[kMaxRows];  // AVX-512: 4 rows' limbs c, b, a and zeros, one dword each
  int16_t high[kMaxRows], low[kMaxRows];
  double unit;
};

TWA_INLINE int64_t load_coefficients(const float* x_row, const uint8_t* scales, int64_t n,
                                     TileCoefficients* k) {
  const int64_t padded = (n + 15) / 16 * 16;
  for (int64_t i = 0; i < n; ++i) k->w[i] = x_row[i] * e4m3_to_float(scales[i]);
  for (int64_t i = n; i < padded; ++i) k->w[i] = 0.0f;
  k->unit = to_fixed(k->w, static_cast<int>(padded), k->q);
  return padded;
}

TWA_INLINE void finish_tile(const TensorTable& center, const TensorTable& out, const Block& block,
                            int64_t tile, double unit, const double* __restrict__ sum) {
  alignas(64) float base[kTileColumns], value[kTileColumns];
  const int valid = valid_columns(out.numel, block, tile);
  const int64_t column = block.first_column + tile * kTileColumns;
  if (center.data) {
    load_tile(center.dtype[block.tensor], center.data[block.tensor], column, valid, base);
  } else {
    for (int c = 0; c < kTileColumns; ++c) base[c] = 0.0f;
  }
  for (int c = 0; c < kTileColumns; ++c)
    value[c] = static_cast<float>(static_cast<double>(base[c]) + sum[c] * unit);
  store_tile(out.dtype[block.tensor], out.data[block.tensor], column, valid, value);
}

template <int kBits>
TWA_INLINE void tile_portable(const uint8_t* codes, const uint8_t* scales, const float* x_row,
                              int64_t n, const TensorTable& center, const TensorTable& out,
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

template <int kBits>
void block_portable(const BasisView& basis, const float* x_row, const TensorTable& center,
                    const TensorTable& out, const Block& block) {
  static thread_local TileCoefficients workspace;
  each_tile<kBits>(basis, block, [&](const uint8_t* codes, const uint8_t* scales, int64_t t) {
    tile_portable<kBits>(codes, scales, x_row, basis.n, center, out, block, t, &workspace);
  });
}

#ifdef TWA_X86

// Adds two rows' levels (int8, 32 columns) times their limbs (a pair of int16 in each 32-bit lane)
// to 4 x 8 columns.
// in order: byte interleaving works within 128-bit lanes, so p[0 .. 3] hold columns 0-7, 8-15,
// 16-23, 24-31.
TWA_AVX2 inline void add_pair(__m256i lev0, __m256i lev1, __m256i high, __m256i low,
                              __m256i* acc_high, __m256i* acc_low) {
  const __m256i lo = _mm256_unpacklo_epi8(lev0, lev1),
                hi = _mm256_unpackhi_epi8(lev0, lev1);  // per lane: columns 0-7, 8-15
  const __m256i p[4] = {_mm256_cvtepi8_epi16(_mm256_castsi256_si128(lo)),
                        _mm256_cvtepi8_epi16(_mm256_castsi256_si128(hi)),
                        _mm256_cvtepi8_epi16(_mm256_extracti128_si256(lo, 1)),
                        _mm256_cvtepi8_epi16(_mm256_extracti128_si256(hi, 1))};
  for (int j = 0; j < 4; ++j) {
    acc_high[j] = _mm256_add_epi32(acc_high[j], _mm256_madd_epi16(p[j], high));
    acc_low[j] = _mm256_add_epi32(acc_low[j], _mm256_madd_epi16(p[j], low));
  }
}

// One quarter (32 columns) of the tile, all rows: 8 accumulators stay in registers.
template <int kBits, int kQuarter>
TWA_AVX2 inline void quarter_avx2(const uint8_t* codes, int64_t n, const TileCoefficients& k,
                                  __m256i table, double* sum) {
  __m256i high[4], low[4];
  for (int j = 0; j < 4; ++j) high[j] = low[j] = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 2) {
    int32_t h, l;  // limbs of rows i and i + 1; the row past an odd n has zero limbs
    std::memcpy(&h, k.high + i, 4);
    std::memcpy(&l, k.low + i, 4);
    const uint8_t *row0 = codes + i * row_bytes(kBits),
                  *row1 = i + 1 < n ? row0 + row_bytes(kBits) : row0;
    add_pair(decode_avx2<kBits, kQuarter>(row0, table), decode_avx2<kBits, kQuarter>(row1, table),
             _mm256_set1_epi32(h), _mm256_set1_epi32(l), high, low);
  }
  alignas(32) int32_t h[8], l[8];
  for (int j = 0; j < 4; ++j) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(h), high[j]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(l), low[j]);
    for (int c = 0; c < 8; ++c) sum[32 * kQuarter + 8 * j + c] = 4096.0 * h[c] + l[c];
  }
}

template <int kBits>
TWA_AVX2 inline void tile_avx2(const uint8_t* codes, const uint8_t* scales, const float* x_row,
                               int64_t n, const TensorTable& center, const TensorTable& out,
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

template <int kBits>
TWA_AVX2 void block_avx2(const BasisView& basis, const float* x_row, const TensorTable& center,
                         const TensorTable& out, const Block& block) {
  static thread_local TileCoefficients workspace;
  each_tile<kBits>(
      basis, block, [&](const uint8_t* codes, const uint8_t* scales, int64_t t) TWA_AVX2 {
        tile_avx2<kBits>(codes, scales, x_row, basis.n, center, out, block, t, &workspace);
      });
}

// AVX-512. Four rows at a time; their packed bytes are interleaved so that a dword holds one byte
// of each row. Expanded, a dword holds the 4 levels of one column, and vpdpbusd multiplies it with
// the 4 rows' limbs. Eight vectors of 16 columns cover the tile; dword d of vector u holds column
//
//   bits 8  64 (u / 4) + 16 (d / 4) + 4 (u % 4) + d % 4      one half of the tile after the other
//   bits 4  64 (u % 2) + 16 (d / 4) + 4 (u / 2) + d % 4      u % 2 = field
//   bits 2  16 (2 f + q) + d, u = 4 q + f                    q = half of the row's 32 bytes
//   bits 3  as 2 bits
//   bits 1  16 u + d                                         u = field
//
// Afterwards vector u has columns 16 u + d.
template <int kBits>
TWA_AVX512 inline void put_in_order(__m512i* v) {
  if constexpr (kBits == 1) return;
  if constexpr (kBits == 8) {
    transpose_lanes(v);
    transpose_lanes(v + 4);
  } else {
    const __m512i even[4] = {v[0], v[2], v[4], v[6]}, odd[4] = {v[1], v[3], v[5], v[7]};
    if constexpr (kBits == 4) {
      for (int j = 0; j < 4; ++j) v[j] = even[j], v[4 + j] = odd[j];
      transpose_lanes(v);
      transpose_lanes(v + 4);
    } else {
      const __m512i first[8] = {v[0], v[4], v[1], v[5], v[2], v[6], v[3], v[7]};
      for (int j = 0; j < 8; ++j) v[j] = first[j];
    }
  }
}

// Interleaves the bytes of four rows of 64 bytes: dword d of out[j] has byte 16 (d / 4) + 4 j + d %
// 4 of each; kLow: j = 0, 1, else j = 2, 3.
template <bool kLow>
TWA_AVX512 inline void interleave_rows(const uint8_t* const* rows, int at, __m512i* out) {
  const auto pair = [at](const uint8_t* x, const uint8_t* y) TWA_AVX512 {
    const __m512i v = _mm512_loadu_si512(x + at), w = _mm512_loadu_si512(y + at);
    return kLow ? _mm512_unpacklo_epi8(v, w) : _mm512_unpackhi_epi8(v, w);
  };
  const __m512i r01 = pair(rows[0], rows[1]), r23 = pair(rows[2], rows[3]);
  out[0] = _mm512_unpacklo_epi16(r01, r23);
  out[1] = _mm512_unpackhi_epi16(r01, r23);
}

// Lane k of v holds dword k of four rows; afterwards its dword d has byte 4 k + d of each row.
TWA_AVX512 inline __m512i transpose_bytes(__m512i v) {
  return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13,
                                                                    9, 5, 1, 12, 8, 4, 0)));
}

// out[0 .. 3]: levels of vectors 4 * kPass ..+3 of the tile (see above), from four rows.
template <int kBits, int kPass>
TWA_AVX512 inline void expand_rows4(const uint8_t* const* rows, const LevelTables<kBits>& tables,
                                    __m512i* out) {
  if constexpr (kBits == 8) {
    interleave_rows<true>(rows, 64 * kPass, out);
    interleave_rows<false>(rows, 64 * kPass, out + 2);
  } else if constexpr (kBits == 4) {
    __m512i bytes[2];
    interleave_rows<kPass == 0>(rows, 0, bytes);
    expand_avx512<4>(bytes[0], tables, out);
    expand_avx512<4>(bytes[1], tables, out + 2);
  } else if constexpr (kBits == 1) {
    // dword k of rows 0..3 into lane k
    const __m512i lanes = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i bytes = transpose_bytes(
        _mm512_permutexvar_epi32(lanes, four_quarters(rows[0], rows[1], rows[2], rows[3])));
    expand_avx512<1, 4 * kPass, 4 * kPass + 4>(bytes, tables, out);
  } else {
    const __m512i r01 = two_halves(rows[0], rows[1]),
                  r23 = two_halves(rows[2], rows[3]);  // 8 dwords a row
    const __m512i q =
        _mm512_add_epi32(_mm512_set_epi32(27, 19, 11, 3, 26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0),
                         _mm512_set1_epi32(4 * kPass));
    const __m512i half = transpose_bytes(_mm512_permutex2var_epi32(r01, q, r23));
    if constexpr (kBits == 2) {
      expand_avx512<2>(half, tables, out);
    } else {
      const __m512i lanes = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
      const __m512i plane1 = transpose_bytes(_mm512_permutexvar_epi32(
          lanes, four_quarters(rows[0] + 32, rows[1] + 32, rows[2] + 32, rows[3] + 32)));
      expand3_avx512(half, kPass == 0 ? plane1 : _mm512_srli_epi16(plane1, 1), tables, out);
    }
  }
}

// One half of the tile's columns, all rows: 12 accumulators and their operands stay in registers.
template <int kBits, int kPass>
TWA_AVX512 inline void sum_half(const uint8_t* codes, int64_t n, const int32_t* limbs,
                                const LevelTables<kBits>& tables, __m512i* a, __m512i* b,
                                __m512i* c) {
  constexpr int kBytes = row_bytes(kBits);
#pragma GCC unroll 4
  for (int u = 0; u < 4; ++u) a[u] = b[u] = c[u] = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 4) {
    const uint8_t* rows[4];
    for (int r = 0; r < 4; ++r)
      rows[r] = codes + std::min(i + r, n - 1) * kBytes;  // rows past n have zero limbs
    const __m512i kc = _mm512_set1_epi32(limbs[i]), kb = _mm512_set1_epi32(limbs[i + 1]),
                  ka = _mm512_set1_epi32(limbs[i + 2]);
    __m512i levels[4];
    expand_rows4<kBits, kPass>(rows, tables, levels);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      if constexpr (kPass == 0) {  // four rows are kBits lines
        if (u < kBits) prefetch_line(codes + i * kBytes + 64 * u, &a[u]);
        if (u + 4 < kBits) prefetch_line(codes + i * kBytes + 64 * (u + 4), &b[u]);
      }
      a[u] = _mm512_dpbusd_epi32(a[u], levels[u], ka);
      b[u] = _mm512_dpbusd_epi32(b[u], levels[u], kb);
      c[u] = _mm512_dpbusd_epi32(c[u], levels[u], kc);
    }
  }
}

// finish_tile for sums 65536 a + 256 b + c + offset, in vectors of 16 consecutive columns.
TWA_AVX512 inline void finish_avx512(const TensorTable& center, const TensorTable& out,
                                     const Block& block, int64_t tile, int64_t n, double unit,
                                     double offset, const __m512i* a, const __m512i* b,
                                     const __m512i* c) {
  alignas(64) float base[kTileColumns], value[kTileColumns];
  const int valid = valid_columns(out.numel, block, tile);
  const int64_t column = block.first_column + tile * kTileColumns;
  const auto direct = [&](const TensorTable& t) {
    return valid == kTileColumns && t.dtype[block.tensor] == Dtype::f32;
  };
  float* to = direct(out) ? static_cast<float*>(out.data[block.tensor]) + column : value;
  const float* from = base;
  if (!center.data) {
    for (int k = 0; k < kTileColumns; ++k) base[k] = 0.0f;
  } else if (direct(center)) {
    from = static_cast<const float*>(center.data[block.tensor]) + column;
  } else {
    load_tile(center.dtype[block.tensor], center.data[block.tensor], column, valid, base);
  }
  const __m512d two16 = _mm512_set1_pd(65536.0), two8 = _mm512_set1_pd(256.0),
                offsets = _mm512_set1_pd(offset), units = _mm512_set1_pd(unit);
  const bool narrow = n <= 256;  // 256 b + c stays below 2^31: 256 rows * 255 * 128 * 257
#pragma GCC unroll 8
  for (int u = 0; u < 8; ++u) {
    __m512i low = narrow ? _mm512_add_epi32(_mm512_slli_epi32(b[u], 8), c[u]) : c[u];
    prefetch_input(from + 16 * u, &low);
    prefetch_input(to + 16 * u, &low);
    const auto column8 = [&](__m256i x, __m256i y, __m256i z, const float* p) TWA_AVX512 {
      __m512d sum = _mm512_cvtepi32_pd(z);  // every step exact, up to the addition of the center
      if (!narrow) sum = _mm512_fmadd_pd(_mm512_cvtepi32_pd(y), two8, sum);
      sum = _mm512_add_pd(_mm512_fmadd_pd(_mm512_cvtepi32_pd(x), two16, sum), offsets);
      return _mm512_cvtpd_ps(_mm512_fmadd_pd(sum, units, _mm512_cvtps_pd(_mm256_loadu_ps(p))));
    };
    const auto upper = [](__m512i v) TWA_AVX512 { return _mm512_extracti64x4_epi64(v, 1); };
    const float* p = from + 16 * u;
    const __m256 first = column8(_mm512_castsi512_si256(a[u]), _mm512_castsi512_si256(b[u]),
                                 _mm512_castsi512_si256(low), p),
                 second = column8(upper(a[u]), upper(b[u]), upper(low), p + 8);
    _mm256_storeu_ps(to + 16 * u, first);
    _mm256_storeu_ps(to + 16 * u + 8, second);
  }
  if (to == value)
    store_tile(out.dtype[block.tensor], out.data[block.tensor], column, valid, value);
}

template <int kBits>
TWA_AVX512 inline void tile_avx512(const uint8_t* codes, const uint8_t* scales, const float* x_row,
                                   int64_t n, const TensorTable& center, const TensorTable& out,
                                   const Block& block, int64_t tile, TileCoefficients* k) {
  const int padded = static_cast<int>((n + 15) / 16 * 16);
  for (int i = 0; i < padded; i += 16) {
    const __mmask16 mask = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
    const __m512 scale = e4m3_to_float_avx512(_mm_maskz_loadu_epi8(mask, scales + i));
    _mm512_store_ps(k->w + i, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x_row + i), scale));
  }
  k->unit = to_fixed_avx512(k->w, padded, k->q);
  int64_t total = 0;
  for (int i = 0; i < padded; i += 16) {
    const __m512i q = _mm512_load_si512(k->q + i);
    _mm512_store_si512(k->limbs + i, limb_dwords(q));
    total += _mm512_reduce_add_epi32(q);  // 16 numbers of 24 bits
  }
  const LevelTables<kBits> tables;
  __m512i a[8], b[8], c[8];
  sum_half<kBits, 0>(codes, n, k->limbs, tables, a, b, c);
  sum_half<kBits, 1>(codes, n, k->limbs, tables, a + 4, b + 4, c + 4);
  _mm_prefetch(reinterpret_cast<const char*>(scales + kScalesAhead * n), _MM_HINT_T0);
  for (__m512i* sums : {a, b, c}) put_in_order<kBits>(sums);
  finish_avx512(center, out, block, tile, n, k->unit, -128.0 * static_cast<double>(total), a, b, c);
}

template <int kBits>
TWA_AVX512 void block_avx512(const BasisView& basis, const float* x_row, const TensorTable& center,
                             const TensorTable& out, const Block& block) {
  static thread_local TileCoefficients workspace;
  each_tile<kBits>(
      basis, block, [&](const uint8_t* codes, const uint8_t* scales, int64_t t) TWA_AVX512 {
        tile_avx512<kBits>(codes, scales, x_row, basis.n, center, out, block, t, &workspace);
      });
}

#endif  // TWA_X86

TWA_TIERS(ReconstructBlock)

}  // namespace

ReconstructBlock reconstruct_block(int bits) {
  return with_bits(bits, [](auto b) { return pick(tiers<b()>()); });
}

Status reconstruct_cpu(const BasisView& basis, const float* x, const TensorTable& center,
                       const TensorTable& out, int threads) {
  const int64_t n = basis.n, segments = basis.num_segments;
  if (!valid_bits(basis.bits) || n < 1 || n > kMaxRows || total_tiles(out) != basis.num_tiles)
    return Status::bad_argument;
  const std::vector<Block> blocks = blocks_of(out, basis.tile_segment);
  // x * row_scale by segment, so that a block reads n consecutive numbers.
  std::vector<float> scaled(segments * n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t l = 0; l < segments; ++l)
      scaled[l * n + i] = x[i * segments + l] * basis.row_scale[i * segments + l];
  const ReconstructBlock kernel = reconstruct_block(basis.bits);
  parallel_for(static_cast<int64_t>(blocks.size()), threads, [&](int64_t k) {
    kernel(basis, scaled.data() + blocks[k].segment * n, center, out, blocks[k]);
  });
  return Status::ok;
}

}  // namespace twa
