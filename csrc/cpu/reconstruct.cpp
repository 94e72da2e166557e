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
//            AVX-VNNI: the same with 256 bits, four passes. AVX2: the same with two int16 limbs and
//            vpmaddwd. Portable: two limbs in plain C++.
#include <algorithm>
#include <memory>
#include <utility>

#include "lanes.h"
#include "neon.h"

namespace twa {
namespace {

// Fixed-point coefficients of one tile; rows past n are zero up to a multiple of 16.
struct alignas(64) TileCoefficients {
  float w[kMaxRows];
  int32_t q[kMaxRows];
  int32_t limbs[kMaxRows];  // of 4 rows: what multiply() of lanes.h takes; AVX-512: c, b, a, zeros
};

TWA_INLINE double load_coefficients(const float* x_row, const uint8_t* scales, int64_t n,
                                    TileCoefficients* k) {
  for (int64_t i = 0; i < n; ++i) k->w[i] = x_row[i] * e4m3_to_float(scales[i]);
  return to_fixed(k->w, static_cast<int>(n), k->q);
}

// This thread's. By a pointer: in loops, compilers look a thread's own data up again and again.
inline TileCoefficients* own_coefficients() {
  static thread_local const auto own = std::make_unique<TileCoefficients>();
  return own.get();
}

// Where one tile's numbers come from and go to: the tensors themselves, or a copy, where a tile is
// ragged or of another dtype.
class TileEnds {
 public:
  TWA_INLINE TileEnds(const TensorTable& center, const TensorTable& out, const Block& block,
                      int64_t tile)
      : out_(out),
        block_(block),
        valid_(valid_columns(out.numel, block, tile)),
        column_(block.first_column + tile * kTileColumns) {
    to = direct(out) ? static_cast<float*>(out.data[block.tensor]) + column_ : value_;
    if (!center.data) {
      for (int c = 0; c < kTileColumns; ++c) base_[c] = 0.0f;
    } else if (direct(center)) {
      from = static_cast<const float*>(center.data[block.tensor]) + column_;
    } else {
      load_tile(center.dtype[block.tensor], center.data[block.tensor], column_, valid_, base_);
    }
  }
  TWA_INLINE void store() const {
    if (to == value_)
      store_tile(out_.dtype[block_.tensor], out_.data[block_.tensor], column_, valid_, value_);
  }

 private:
  TWA_INLINE bool direct(const TensorTable& t) const {
    return valid_ == kTileColumns && t.dtype[block_.tensor] == Dtype::f32;
  }

  const TensorTable& out_;
  const Block& block_;
  int valid_;
  int64_t column_;
  alignas(64) float base_[kTileColumns], value_[kTileColumns];

 public:
  const float* from = base_;
  float* to;
};

template <int kBits>
TWA_INLINE void tile_portable(const uint8_t* codes, const uint8_t* scales, const float* x_row,
                              int64_t n, const TileEnds& ends, TileCoefficients* k) {
  const double unit = load_coefficients(x_row, scales, n, k);
  alignas(64) int16_t lev[kTileColumns];
  alignas(64) int32_t high[kTileColumns] = {}, low[kTileColumns] = {};
  for (int64_t i = 0; i < n; ++i) {
    int16_t h, l;
    split_int16(k->q[i], &h, &l);
    decode_portable<kBits>(codes + i * row_bytes(kBits), lev);
    for (int c = 0; c < kTileColumns; ++c) high[c] += lev[c] * h;
    for (int c = 0; c < kTileColumns; ++c) low[c] += lev[c] * l;
  }
  for (int c = 0; c < kTileColumns; ++c)
    ends.to[c] =
        static_cast<float>(static_cast<double>(ends.from[c]) + (4096.0 * high[c] + low[c]) * unit);
}

template <int kBits>
void block_portable(const BasisView& basis, const float* x_row, const TensorTable& center,
                    const TensorTable& out, const Block& block) {
  TileCoefficients* const k = own_coefficients();
  each_tile<kBits>(basis, block, [&](const uint8_t* codes, const uint8_t* scales, int64_t t) {
    const TileEnds ends(center, out, block, t);
    tile_portable<kBits>(codes, scales, x_row, basis.n, ends, k);
    ends.store();
  });
}

// The last four rows where n is no multiple of 4: the last one for those past n, whose limbs are
// zero.
template <int kBits>
TWA_INLINE void copy_tail(const uint8_t* codes, int64_t n, uint8_t* tail) {
  if (n % 4 == 0) return;
  for (int64_t r = 0; r < 4; ++r)
    std::memcpy(tail + r * row_bytes(kBits),
                codes + std::min(n / 4 * 4 + r, n - 1) * row_bytes(kBits), row_bytes(kBits));
}

// Columns in lanes (lanes.h): four rows at a time, a 32-bit lane with one column's four levels;
// each pass over the rows sums a part of the tile's columns, so that its sums stay in registers.
template <class M, int kBits, int kPass>
TWA_INLINE void pass_lanes(const uint8_t* codes, int64_t n, const uint8_t* tail,
                           const int32_t* limbs, const typename M::template Levels<kBits>& levels,
                           double offset, double unit, const TileEnds& ends) {
  using V = typename M::V;
  constexpr int kBytes = row_bytes(kBits);
  V sums[M::kPerPass][M::kSums];
#pragma GCC unroll 8
  for (int u = 0; u < M::kPerPass; ++u)
    for (int k = 0; k < M::kSums; ++k) sums[u][k] = M::zero();
#pragma GCC unroll 1
  for (int64_t i = 0; i < n; i += 4) {
    const uint8_t* rows = i + 4 <= n ? codes + i * kBytes : tail;
    const typename M::RowOperands by(limbs + i);
    typename M::template FourRows<kBits, kPass> four(levels, rows);
#pragma GCC unroll 8
    for (int u = 0; u < M::kPerPass; ++u) {
      if (kPass == 0 && u * 64 < 4 * kBytes)
        M::prefetch_line(codes + i * kBytes + 64 * u, &sums[u][0]);
      if (kPass == 1 && u * 64 + 256 < 4 * kBytes)
        M::prefetch_line(codes + i * kBytes + 64 * u + 256, &sums[u][0]);
      M::multiply(four.get(u), by, sums[u]);
    }
  }
  M::template finish<kBits, kPass, M>(sums, offset, unit, ends.from, ends.to);
}

template <class M, int kBits, int... kPass>
TWA_INLINE void tile_lanes(const uint8_t* codes, const uint8_t* scales, const float* x_row,
                           int64_t n, const typename M::template Levels<kBits>& levels,
                           const TileEnds& ends, TileCoefficients* k,
                           std::integer_sequence<int, kPass...>) {
  const int padded = static_cast<int>((n + 7) / 8 * 8);
  for (int i = 0; i < padded; i += 8) M::scale_rows(x_row + i, scales + i, n - i, k->w + i);
  const double unit = M::to_fixed(k->w, padded, k->q) * M::template kFactor<kBits>;
  int64_t total = 0;
  for (int i = 0; i < padded; i += 4) {
    M::prepare_rows(k->q + i, k->limbs + i);
    total += k->q[i] + k->q[i + 1] + k->q[i + 2] + k->q[i + 3];
  }
  alignas(64) uint8_t tail[4 * row_bytes(kBits)];
  copy_tail<kBits>(codes, n, tail);
  const double offset = M::template kOffset<kBits> * static_cast<double>(total);
  (pass_lanes<M, kBits, kPass>(codes, n, tail, k->limbs, levels, offset, unit, ends), ...);
  M::prefetch_scales(scales + kScalesAhead * n);
}

template <class M, int kBits>
TWA_INLINE void block_lanes(const BasisView& basis, const float* x_row, const TensorTable& center,
                            const TensorTable& out, const Block& block) {
  TileCoefficients* const k = own_coefficients();
  const typename M::template Levels<kBits> levels;
  for (int64_t t = 0; t < block.tiles; ++t) {
    const int64_t group = (block.first_tile + t) * basis.n;
    const TileEnds ends(center, out, block, t);
    for (int c = 0; c < kTileColumns; c += 16) {
      M::prefetch_input(ends.from + c);
      M::prefetch_input(ends.to + c);
    }
    tile_lanes<M, kBits>(basis.codes + group * row_bytes(kBits), basis.scales + group, x_row,
                         basis.n, levels, ends, k, std::make_integer_sequence<int, M::kPasses>());
    ends.store();
  }
}

#ifdef TWA_X86

template <int kBits>
TWA_AVX2 void block_avx2(const BasisView& basis, const float* x_row, const TensorTable& center,
                         const TensorTable& out, const Block& block) {
  block_lanes<Avx2, kBits>(basis, x_row, center, out, block);
}
#ifdef TWA_AVXVNNI
template <int kBits>
TWA_AVXVNNI void block_avxvnni(const BasisView& basis, const float* x_row,
                               const TensorTable& center, const TensorTable& out,
                               const Block& block) {
  block_lanes<AvxVnni, kBits>(basis, x_row, center, out, block);
}
#endif
template <int kBits>
TWA_AVX512VL void block_avx512vl(const BasisView& basis, const float* x_row,
                                 const TensorTable& center, const TensorTable& out,
                                 const Block& block) {
  block_lanes<Avx512Vl, kBits>(basis, x_row, center, out, block);
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
TWA_AVX512 inline void interleave_rows(const uint8_t* rows, int stride, __m512i* out) {
  const auto pair = [](const uint8_t* x, const uint8_t* y) TWA_AVX512 {
    const __m512i v = _mm512_loadu_si512(x), w = _mm512_loadu_si512(y);
    return kLow ? _mm512_unpacklo_epi8(v, w) : _mm512_unpackhi_epi8(v, w);
  };
  const __m512i r01 = pair(rows, rows + stride), r23 = pair(rows + 2 * stride, rows + 3 * stride);
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
TWA_AVX512 inline void expand_rows4(const uint8_t* rows, const LevelTables<kBits>& tables,
                                    __m512i* out) {
  constexpr int kBytes = row_bytes(kBits);
  const auto quarters = [](const uint8_t* p) TWA_AVX512 {
    return four_quarters(p, p + kBytes, p + 2 * kBytes, p + 3 * kBytes);
  };
  if constexpr (kBits == 8) {
    interleave_rows<true>(rows + 64 * kPass, kBytes, out);
    interleave_rows<false>(rows + 64 * kPass, kBytes, out + 2);
  } else if constexpr (kBits == 4) {
    __m512i bytes[2];
    interleave_rows<kPass == 0>(rows, kBytes, bytes);
    expand_avx512<4>(bytes[0], tables, out);
    expand_avx512<4>(bytes[1], tables, out + 2);
  } else if constexpr (kBits == 1) {
    // dword k of rows 0..3 into lane k
    const __m512i lanes = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i bytes = transpose_bytes(_mm512_permutexvar_epi32(lanes, quarters(rows)));
    expand_avx512<1, 4 * kPass, 4 * kPass + 4>(bytes, tables, out);
  } else {
    const __m512i r01 = two_halves(rows, rows + kBytes),
                  r23 = two_halves(rows + 2 * kBytes, rows + 3 * kBytes);  // 8 dwords a row
    const __m512i q =
        _mm512_add_epi32(_mm512_set_epi32(27, 19, 11, 3, 26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0),
                         _mm512_set1_epi32(4 * kPass));
    const __m512i half = transpose_bytes(_mm512_permutex2var_epi32(r01, q, r23));
    if constexpr (kBits == 2) {
      expand_avx512<2>(half, tables, out);
    } else {
      const __m512i lanes = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
      const __m512i plane1 = transpose_bytes(_mm512_permutexvar_epi32(lanes, quarters(rows + 32)));
      expand3_avx512(half, kPass == 0 ? plane1 : _mm512_srli_epi16(plane1, 1), tables, out);
    }
  }
}

// One half of the tile's columns, all rows: 12 accumulators and their operands stay in registers.
// tail: as copy_tail makes it.
template <int kBits, int kPass>
TWA_AVX512 inline void sum_half(const uint8_t* codes, int64_t n, const uint8_t* tail,
                                const int32_t* limbs, const LevelTables<kBits>& tables,
                                __m512i (*sums)[8]) {
  constexpr int kBytes = row_bytes(kBits);
  __m512i a[4], b[4], c[4];
#pragma GCC unroll 4
  for (int u = 0; u < 4; ++u) a[u] = b[u] = c[u] = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 4) {
    const uint8_t* rows = i + 4 <= n ? codes + i * kBytes : tail;  // rows past n have zero limbs
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
#pragma GCC unroll 4
  for (int u = 0; u < 4; ++u) {
    sums[0][4 * kPass + u] = a[u];
    sums[1][4 * kPass + u] = b[u];
    sums[2][4 * kPass + u] = c[u];
  }
}

// to = from + unit * (65536 a + 256 b + c + offset), in vectors of 16 consecutive columns.
TWA_AVX512 inline void finish_avx512(const TileEnds& ends, int64_t n, double unit, double offset,
                                     const __m512i (*sums)[8]) {
  const __m512i *a = sums[0], *b = sums[1], *c = sums[2];
  const float* from = ends.from;
  float* to = ends.to;
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
}

template <int kBits>
TWA_AVX512 inline void tile_avx512(const uint8_t* codes, const uint8_t* scales, const float* x_row,
                                   int64_t n, const TileEnds& ends, TileCoefficients* k) {
  const int padded = static_cast<int>((n + 15) / 16 * 16);
  for (int i = 0; i < padded; i += 16) {
    const __mmask16 mask = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
    const __m512 scale = e4m3_to_float_avx512(_mm_maskz_loadu_epi8(mask, scales + i));
    _mm512_store_ps(k->w + i, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x_row + i), scale));
  }
  const double unit = to_fixed_avx512(k->w, padded, k->q);
  int64_t total = 0;
  for (int i = 0; i < padded; i += 16) {
    const __m512i q = _mm512_load_si512(k->q + i);
    _mm512_store_si512(k->limbs + i, limb_dwords(q));
    total += _mm512_reduce_add_epi32(q);  // 16 numbers of 24 bits
  }
  const LevelTables<kBits> tables;
  alignas(64) uint8_t tail[4 * row_bytes(kBits)];
  copy_tail<kBits>(codes, n, tail);
  __m512i sums[3][8];
  sum_half<kBits, 0>(codes, n, tail, k->limbs, tables, sums);
  sum_half<kBits, 1>(codes, n, tail, k->limbs, tables, sums);
  _mm_prefetch(reinterpret_cast<const char*>(scales + kScalesAhead * n), _MM_HINT_T0);
#pragma GCC unroll 3
  for (int limb = 0; limb < 3; ++limb) put_in_order<kBits>(sums[limb]);
  finish_avx512(ends, n, unit, -128.0 * static_cast<double>(total), sums);
}

template <int kBits>
TWA_AVX512 void block_avx512(const BasisView& basis, const float* x_row, const TensorTable& center,
                             const TensorTable& out, const Block& block) {
  TileCoefficients* const k = own_coefficients();
  each_tile<kBits>(basis, block,
                   [&](const uint8_t* codes, const uint8_t* scales, int64_t t) TWA_AVX512 {
                     const TileEnds ends(center, out, block, t);
                     tile_avx512<kBits>(codes, scales, x_row, basis.n, ends, k);
                     ends.store();
                   });
}

#elif defined(TWA_ARM)

template <int kBits>
TWA_NEON void block_neon(const BasisView& basis, const float* x_row, const TensorTable& center,
                         const TensorTable& out, const Block& block) {
  block_lanes<Neon, kBits>(basis, x_row, center, out, block);
}

#endif

TWA_ALL_TIERS(ReconstructBlock)

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
  if (!in_segments(blocks, segments)) return Status::bad_argument;
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
