// reconstruct:  out[j] = center[j] + sum_i w[t, i] * level[code(t, i, c)],  w[t, i] = x[i, l] * row_scale[i, l] * scales[t, i]
//
// Operands   codes (num_tiles, n, 16 * bits) bytes, scales (num_tiles, n) e4m3, x (n, L) fp32, center and out lists of tensors.
// Work map   one item = one Block (up to 64 tiles of one tensor and segment), whose columns nobody else writes. Per tile the n
//            coefficients become 24-bit fixed point, so the sum over rows is an exact integer; it is scaled, added to the center
//            in float64 and rounded to float32, then to the dtype of out: same bits for any thread count and tier.
// Bytes      n * D * (bits / 8 + 1 / 128) read once as one stream, plus D * (center + out).
// Products   AVX-512: rows in groups of 4, their levels interleaved so that one 32-bit lane holds a column's 4 levels + 128;
//            vpdpbusd against 4 coefficient limbs, 3 limbs, 8 x 16 columns: 24 accumulators. Corrected by 128 * sum(q).
//            The packed bytes are interleaved, before they are expanded.
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

// AVX-512. Four rows at a time; their packed bytes are interleaved so that a dword holds one byte of each row. Expanded, a dword
// holds the 4 levels of one column, and vpdpbusd multiplies it with the 4 rows' limbs. Eight vectors of 16 columns cover
// the tile; dword d of vector u holds column
//
//   bits 8  64 (u / 4) + 16 (d / 4) + 4 (u % 4) + d % 4      one half of the tile after the other
//   bits 4  64 (u % 2) + 16 (d / 4) + 4 (u / 2) + d % 4      u % 2 = field
//   bits 2  16 (2 f + q) + d, u = 4 q + f                    q = half of the row's 32 bytes
//   bits 3  as 2 bits
//   bits 1  16 u + d                                         u = field
template <int kBits>
constexpr int vector_column(int u, int lane) {
  return kBits == 8   ? 64 * (u / 4) + 16 * lane + 4 * (u % 4)
         : kBits == 4 ? 64 * (u % 2) + 16 * lane + 4 * (u / 2)
         : kBits == 1 ? 16 * u + 4 * lane
                      : 16 * (2 * (u % 4) + u / 4) + 4 * lane;
}

// Interleaves the bytes of four rows of 64 bytes: dword d of out[j] has byte 16 (d / 4) + 4 j + d % 4 of each.
TWA_AVX512 inline void interleave_rows(__m512i r0, __m512i r1, __m512i r2, __m512i r3, __m512i* out) {
  const __m512i lo01 = _mm512_unpacklo_epi8(r0, r1), hi01 = _mm512_unpackhi_epi8(r0, r1), lo23 = _mm512_unpacklo_epi8(r2, r3),
                hi23 = _mm512_unpackhi_epi8(r2, r3);
  out[0] = _mm512_unpacklo_epi16(lo01, lo23);
  out[1] = _mm512_unpackhi_epi16(lo01, lo23);
  out[2] = _mm512_unpacklo_epi16(hi01, hi23);
  out[3] = _mm512_unpackhi_epi16(hi01, hi23);
}

// Lane k of v holds dword k of four rows; afterwards its dword d has byte 4 k + d of each row.
TWA_AVX512 inline __m512i transpose_bytes(__m512i v) {
  return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0)));
}

// out[0 .. count): expanded vectors part * count .. of four rows; count = 4 for 8 bits (part = half), 8 otherwise (part = 0).
template <int kBits>
TWA_AVX512 inline void expand_rows4(const uint8_t* const* rows, int part, const LevelTables<kBits>& tables, __m512i* out) {
  if constexpr (kBits == 8) {
    interleave_rows(_mm512_loadu_si512(rows[0] + 64 * part), _mm512_loadu_si512(rows[1] + 64 * part), _mm512_loadu_si512(rows[2] + 64 * part),
                    _mm512_loadu_si512(rows[3] + 64 * part), out);
  } else if constexpr (kBits == 4) {
    __m512i bytes[4];
    interleave_rows(_mm512_loadu_si512(rows[0]), _mm512_loadu_si512(rows[1]), _mm512_loadu_si512(rows[2]), _mm512_loadu_si512(rows[3]), bytes);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) expand_avx512<4>(bytes[j], tables, out + 2 * j);
  } else {
    // dword k of rows 0..3 into lane k
    const __m512i lanes = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    if constexpr (kBits == 1) {
      expand_avx512<1>(transpose_bytes(_mm512_permutexvar_epi32(lanes, four_quarters(rows[0], rows[1], rows[2], rows[3]))), tables, out);
    } else {
      const __m512i r01 = two_halves(rows[0], rows[1]), r23 = two_halves(rows[2], rows[3]);  // 8 dwords a row
      const __m512i q0 = _mm512_set_epi32(27, 19, 11, 3, 26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0), q1 = _mm512_add_epi32(q0, _mm512_set1_epi32(4));
      const __m512i half0 = transpose_bytes(_mm512_permutex2var_epi32(r01, q0, r23)),
                    half1 = transpose_bytes(_mm512_permutex2var_epi32(r01, q1, r23));
      if constexpr (kBits == 2) {
        expand_avx512<2>(half0, tables, out);
        expand_avx512<2>(half1, tables, out + 4);
      } else {
        const __m512i plane1 =
            transpose_bytes(_mm512_permutexvar_epi32(lanes, four_quarters(rows[0] + 32, rows[1] + 32, rows[2] + 32, rows[3] + 32)));
        __m512i even[4], odd[4];
        for (int f = 0; f < 4; ++f)
          even[f] = _mm512_set1_epi8(static_cast<char>(1 << 2 * f)), odd[f] = _mm512_set1_epi8(static_cast<char>(2 << 2 * f));
        expand3_avx512(half0, plane1, even, tables, out);
        expand3_avx512(half1, plane1, odd, tables, out + 4);
      }
    }
  }
}

// sum[column] = 65536 a + 256 b + c + offset for the 16 columns of vector u.
template <int kBits>
TWA_AVX512 inline void store_sums(int u, __m512i a, __m512i b, __m512i c, __m512d offset, double* sum) {
  const __m512d two16 = _mm512_set1_pd(65536.0), two8 = _mm512_set1_pd(256.0);
  const auto combine = [&](__m256i x, __m256i y, __m256i z) TWA_AVX512 {
    const __m512d low = _mm512_add_pd(_mm512_mul_pd(_mm512_cvtepi32_pd(y), two8), _mm512_cvtepi32_pd(z));
    return _mm512_add_pd(_mm512_add_pd(_mm512_mul_pd(_mm512_cvtepi32_pd(x), two16), low), offset);
  };
  const __m512d lanes01 = combine(_mm512_castsi512_si256(a), _mm512_castsi512_si256(b), _mm512_castsi512_si256(c));
  const __m512d lanes23 = combine(_mm512_extracti64x4_epi64(a, 1), _mm512_extracti64x4_epi64(b, 1), _mm512_extracti64x4_epi64(c, 1));
  _mm256_store_pd(sum + vector_column<kBits>(u, 0), _mm512_castpd512_pd256(lanes01));
  _mm256_store_pd(sum + vector_column<kBits>(u, 1), _mm512_extractf64x4_pd(lanes01, 1));
  _mm256_store_pd(sum + vector_column<kBits>(u, 2), _mm512_castpd512_pd256(lanes23));
  _mm256_store_pd(sum + vector_column<kBits>(u, 3), _mm512_extractf64x4_pd(lanes23, 1));
}

template <int kBits>
TWA_AVX512 void tile_avx512(const uint8_t* codes, const uint8_t* scales, const float* x_row, int64_t n, const TensorTable& center,
                            const TensorTable& out, const Block& block, int64_t tile, TileCoefficients* k) {
  const int padded = static_cast<int>((n + 15) / 16 * 16);
  for (int i = 0; i < padded; i += 16) {
    const __mmask16 mask = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
    const __m512 scale = e4m3_to_float_avx512(_mm_maskz_loadu_epi8(mask, scales + i));
    _mm512_store_ps(k->w + i, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x_row + i), scale));
  }
  k->unit = to_fixed_avx512(k->w, padded, k->q);
  const int64_t total = split_avx512(k->q, padded, k->a, k->b, k->c);
  const LevelTables<kBits> tables = level_tables_avx512<kBits>();
  constexpr int kParts = kBits == 8 ? 2 : 1, kVectors = 8 / kParts;
  __m512i a[8], b[8], c[8];
#pragma GCC unroll 8
  for (int u = 0; u < 8; ++u) a[u] = b[u] = c[u] = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 4) {
    const uint8_t* rows[4];
    for (int r = 0; r < 4; ++r) rows[r] = codes + std::min(i + r, n - 1) * row_bytes(kBits);  // rows past n have zero limbs
    prefetch_ahead(codes + i * row_bytes(kBits), 4 * row_bytes(kBits));
    const auto limbs = [i](const int8_t* p) TWA_AVX512 {
      int32_t four;
      std::memcpy(&four, p + i, 4);
      return _mm512_set1_epi32(four);
    };
    const __m512i ka = limbs(k->a), kb = limbs(k->b), kc = limbs(k->c);
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      __m512i levels[kVectors];
      expand_rows4<kBits>(rows, part, tables, levels);
#pragma GCC unroll 8
      for (int u = 0; u < kVectors; ++u) {
        const int at = part * kVectors + u;
        a[at] = _mm512_dpbusd_epi32(a[at], levels[u], ka);
        b[at] = _mm512_dpbusd_epi32(b[at], levels[u], kb);
        c[at] = _mm512_dpbusd_epi32(c[at], levels[u], kc);
      }
    }
  }
  alignas(64) double sum[kTileColumns];
  const __m512d offset = _mm512_set1_pd(-128.0 * static_cast<double>(total));
#pragma GCC unroll 8
  for (int u = 0; u < 8; ++u) store_sums<kBits>(u, a[u], b[u], c[u], offset, sum);
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
  return with_bits(bits, [](auto b) { return pick<b()>(); });
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
