// project:  c[i, l] = row_scale[i, l] * sum over tiles t of segment l of
//                     scales[t, i] * sum_c level[code(t, i, c)] * g[t, c]
//
// Operands   codes (num_tiles, n, 16 * bits) bytes, scales (num_tiles, n) e4m3, g a list of
//            float32/bf16/f16 tensors, c (n, L) fp32.
// Work map   one item = one Block (up to 64 tiles of one tensor and segment). Per tile the gradient
//            becomes 24-bit fixed point, so the dot product with the int8 levels is an exact
//            integer below 2^38 and no order of summation can change it. Tiles are added in float64
//            in order within a block, blocks in float64 in order: same bits for any thread count
//            and tier.
// Bytes      n * D * (bits / 8 + 1 / 128) read once as one stream, plus the gradient once.
// Products   AVX-512, AVX-VNNI: gradient in three int8 limbs, vpdpbusd against (level + 128),
//            corrected by 128 * sum(q); AVX2: two int16 limbs of 12 bits, vpmaddwd.
//            AVX-512 and AVX2 at 1 bit: table look-ups. Portable: two limbs in plain C++.
#include <algorithm>

#include "lanes.h"
#include "neon.h"

namespace twa {
namespace {

// One tile's gradient in fixed point; q lies at a multiple of 64. Returns its unit.
template <class M>
TWA_INLINE double load_fixed(const TensorTable& grads, const Block& block, int64_t tile,
                             int32_t* q) {
  alignas(64) float v[kTileColumns];
  const int64_t column = block.first_column + tile * kTileColumns;
  const int valid = valid_columns(grads.numel, block, tile);
  const Dtype dtype = grads.dtype[block.tensor];
  const int64_t size = size_of(dtype);
  const auto* data = static_cast<const uint8_t*>(grads.data[block.tensor]) + column * size;
  const float* from = v;
  if (dtype == Dtype::f32 && valid == kTileColumns) {
    from = reinterpret_cast<const float*>(data);
  } else {
    load_tile(dtype, grads.data[block.tensor], column, valid, v);
  }
  for (int c = 0; c < kTileColumns * size; c += 64) M::prefetch_input(data + c);
  return M::to_fixed(from, kTileColumns, q);
}

struct Plain {
  TWA_INLINE static double to_fixed(const float* v, int count, int32_t* q) {
    return twa::to_fixed(v, count, q);
  }
  TWA_INLINE static void prefetch_input(const void*) {}
};

// kRows rows of which there are `left`: where they lie, or a copy of the last ones, followed by
// anything.
template <int kRows, int kBits>
TWA_INLINE const uint8_t* whole_rows(const uint8_t* rows, int64_t left, uint8_t* padded) {
  if (left >= kRows) return rows;
  std::memcpy(padded, rows, static_cast<size_t>(left * row_bytes(kBits)));
  return padded;
}

// Portable: limbs of 12 bits.
template <int kBits>
TWA_INLINE void tile_portable(const uint8_t* codes, const uint8_t* scales, int64_t n,
                              const TensorTable& grads, const Block& block, int64_t tile,
                              double* acc) {
  alignas(64) int32_t q[kTileColumns];
  alignas(64) int16_t lev[kTileColumns], of_high[kTileColumns], of_low[kTileColumns];
  const double unit = load_fixed<Plain>(grads, block, tile, q);
  for (int c = 0; c < kTileColumns; ++c) split_int16(q[c], &of_high[c], &of_low[c]);
  for (int64_t i = 0; i < n; ++i) {
    decode_portable<kBits>(codes + i * row_bytes(kBits), lev);
    int32_t high = 0, low = 0;
    for (int c = 0; c < kTileColumns; ++c) high += lev[c] * of_high[c];
    for (int c = 0; c < kTileColumns; ++c) low += lev[c] * of_low[c];
    acc[i] += static_cast<double>(int64_t{4096} * high + low) * (e4m3_to_float(scales[i]) * unit);
  }
}

template <int kBits>
void block_portable(const BasisView& basis, const TensorTable& grads, const Block& block,
                    double* acc) {
  each_tile<kBits>(basis, block, [&](const uint8_t* codes, const uint8_t* scales, int64_t t) {
    tile_portable<kBits>(codes, scales, basis.n, grads, block, t, acc);
  });
}

// Columns in lanes (lanes.h): a row's levels as they lie, kTogether rows at a time, which share the
// gradient's operands; kRows rows are summed across at once.
template <class M, int kBits>
TWA_INLINE void block_lanes(const BasisView& basis, const TensorTable& grads, const Block& block,
                            double* acc) {
  using V = typename M::V;
  constexpr int kBytes = row_bytes(kBits), kRows = M::kRows;
  const typename M::template Levels<kBits> levels;
  const int64_t n = basis.n;
  alignas(64) int32_t q[kTileColumns];
  V by[M::kVectors][M::kOperands], high[kRows], low[kRows];
  for (int64_t tile = 0; tile < block.tiles; ++tile) {
    const double unit = load_fixed<M>(grads, block, tile, q);
    const double offset =
        M::template kOffset<kBits> * static_cast<double>(M::prepare_columns(q, by));
    const uint8_t* codes = basis.codes + (block.first_tile + tile) * n * kBytes;
    const uint8_t* scales = basis.scales + (block.first_tile + tile) * n;
    M::prefetch_scales(scales + kScalesAhead * n);
    for (int64_t i0 = 0; i0 < n; i0 += kRows) {
      alignas(64) uint8_t padded[kRows * kBytes];
      const uint8_t* stream = codes + i0 * kBytes;
      const uint8_t* rows = whole_rows<kRows, kBits>(stream, n - i0, padded);
#pragma GCC unroll 1
      for (int r = 0; r < kRows; r += M::kTogether) {
        V sums[M::kTogether][M::kSums];
        for (int row = 0; row < M::kTogether; ++row)
          for (int k = 0; k < M::kSums; ++k) sums[row][k] = M::zero();
#pragma GCC unroll 8
        for (int v = 0; v < M::kVectors; ++v) {
#pragma GCC unroll 4
          for (int row = 0; row < M::kTogether; ++row)
            M::multiply(levels.get(rows + (r + row) * kBytes, v), by[v], sums[row]);
          if (v * 64 < M::kTogether * kBytes)
            M::prefetch_line(stream + r * kBytes + 64 * v, sums[0]);
        }
        for (int row = 0; row < M::kTogether; ++row)
          M::close(sums[row], high + r + row, low + r + row);
      }
      M::add_rows(M::add_across(high), M::add_across(low), M::kHigh, offset,
                  unit * M::template kFactor<kBits>, scales + i0, n - i0, acc + i0);
    }
  }
}

#ifdef TWA_X86

// 1 bit needs no product: three bits of a row name one of 8 sums of three numbers, which vpermd
// reads from a table for 8 rows at once. A row is four dwords; bit j of dword m is column
// 16 (j % 8) + 4 m + j / 8. sum(level * q) = 254 * sum(bit * q) - 127 * sum(q).
struct BitSums {
  static constexpr int kLookups = 11;  // of a dword
  alignas(32) int32_t sums[4][kLookups][8];

  TWA_AVX2 explicit BitSums(const int32_t* q) {
    const __m256i index = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    __m256i has[3];  // all ones where the index has the bit
    for (int j = 0; j < 3; ++j) has[j] = _mm256_srai_epi32(_mm256_slli_epi32(index, 31 - j), 31);
    for (int m = 0; m < 4; ++m)
#pragma GCC unroll 11
      for (int k = 0; k < kLookups; ++k) {
        __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          const int bit = std::min(3 * k + j, 31);  // the last look-up has two bits
          const __m256i number = _mm256_set1_epi32(q[16 * (bit % 8) + 4 * m + bit / 8]);
          sum = _mm256_add_epi32(sum, _mm256_and_si256(number, has[j]));
        }
        _mm256_store_si256(reinterpret_cast<__m256i*>(sums[m][k]), sum);
      }
  }
  // Element r: sum(bit * q) of row r of 8, below 2^30.
  TWA_AVX2 __m256i look_up(const uint8_t* rows) const {
    __m256i u[4];  // rows 2 e and 2 e + 1; then their dword m, lane k element e = row 2 e + k
    for (int e = 0; e < 4; ++e)
      u[e] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + 32 * e));
    Lanes256::transpose_dwords(u);
    __m256i total = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m)
#pragma GCC unroll 11
      for (int k = 0; k < kLookups; ++k)
        total = _mm256_add_epi32(
            total, _mm256_permutevar8x32_epi32(
                       _mm256_load_si256(reinterpret_cast<const __m256i*>(sums[m][k])),
                       _mm256_srli_epi32(u[m], 3 * k)));
    return Lanes256::join_lanes(total);
  }
};

TWA_AVX2 void block_look_up(const BasisView& basis, const TensorTable& grads, const Block& block,
                            double* acc) {
  constexpr int kBytes = row_bytes(1), kRows = 8;
  const int64_t n = basis.n;
  alignas(64) int32_t q[kTileColumns];
  for (int64_t tile = 0; tile < block.tiles; ++tile) {
    const double unit = load_fixed<Lanes256>(grads, block, tile, q);
    const double offset = -127.0 * static_cast<double>(Lanes256::sum(q));
    const BitSums table(q);
    const uint8_t* codes = basis.codes + (block.first_tile + tile) * n * kBytes;
    const uint8_t* scales = basis.scales + (block.first_tile + tile) * n;
    Lanes256::prefetch_scales(scales + kScalesAhead * n);
    for (int64_t i0 = 0; i0 < n; i0 += kRows) {
      alignas(64) uint8_t padded[kRows * kBytes];
      const uint8_t* stream = codes + i0 * kBytes;
      const uint8_t* rows = whole_rows<kRows, 1>(stream, n - i0, padded);
      __m256i low = Lanes256::zero();
      Lanes256::prefetch_line(stream, &low);
      Lanes256::prefetch_line(stream + 64, &low);
      Lanes256::add_rows(table.look_up(rows), low, 254.0, offset, unit, scales + i0, n - i0,
                         acc + i0);
    }
  }
}

template <int kBits>
TWA_AVX2 void block_avx2(const BasisView& basis, const TensorTable& grads, const Block& block,
                         double* acc) {
  if constexpr (kBits == 1) return block_look_up(basis, grads, block, acc);
  block_lanes<Avx2, kBits>(basis, grads, block, acc);
}
#ifdef TWA_AVXVNNI
template <int kBits>
TWA_AVXVNNI void block_avxvnni(const BasisView& basis, const TensorTable& grads, const Block& block,
                               double* acc) {
  block_lanes<AvxVnni, kBits>(basis, grads, block, acc);
}
#endif
template <int kBits>
TWA_AVX512VL void block_avx512vl(const BasisView& basis, const TensorTable& grads,
                                 const Block& block, double* acc) {
  block_lanes<Avx512Vl, kBits>(basis, grads, block, acc);
}

// AVX-512. 16 rows at a time; transposing 4 x 4 dwords in each 128-bit lane gives vectors U[m]
// whose elements are rows, so that vpdpbusd adds 4 columns of a row and few lanes are left to sum.
// Which columns lie in lane k of U[m], field f:
//
//   bits 8  two vectors a row:  half h, 64 h + 16 k + 4 m ..+3          4 rows per transposition,
//           element e = row e
//   bits 4  one vector a row:   64 f + 16 k + 4 m ..+3                  the same
//   bits 2  two rows a vector:  32 f + 16 (k % 2) + 4 m ..+3            8 rows, lane k element e =
//           row 2 e + k / 2
//   bits 3  as 2 bits, with the 1-bit plane's 16 bytes in both lanes of a row
//   bits 1  four rows a vector: 16 f + 4 m ..+3                         16 rows, lane k element e =
//           row 4 e + k
//
// The gradient's limbs are laid out to match: one vector for each (field, limb, m).
//
// 1 bit needs no product: a nibble of U[m] names 4 columns of a row, and their 16 possible sums,
// whole 24-bit numbers, are a table that vpermd reads for 16 rows at once. sum(level * q) = 254 *
// sum(bit * q) - 127 * sum(q).
template <int kBits>
struct alignas(64) Operands {  // 128 columns: 64 of half 0 or field 0, then of 1; 2 and 3 bits: 32
                               // of each field, which all pairs of lanes share
  int8_t v[2][3][4][64];
  TWA_AVX512 __m512i get(int f, int limb, int m) const {
    if constexpr (kBits == 8 || kBits == 4) return _mm512_load_si512(v[f][limb][m]);
    return _mm512_broadcast_i64x4(
        _mm256_load_si256(reinterpret_cast<const __m256i*>(v[f / 2][limb][m] + 32 * (f % 2))));
  }
};
template <>
struct alignas(64) Operands<1> {
  int32_t v[4][4][2][16];  // byte j of the dwords of U[m], nibble h: columns 16 (4 h + i) + 4 m + j
};

// One tile's gradient, ready to multiply.
template <int kBits>
struct Prepared {
  Operands<kBits> operands;
  double unit, offset;  // offset: what the dot products lack because levels are not signed
};

struct Avx512 : Lanes256 {  // for load_fixed
  TWA_AVX512 static double to_fixed(const float* v, int count, int32_t* q) {
    return to_fixed_avx512(v, count, q);
  }
};

template <int kBits>
TWA_AVX512 inline void prepare(const TensorTable& grads, const Block& block, int64_t tile,
                               Prepared<kBits>* out) {
  alignas(64) int32_t q[kTileColumns];
  out->unit = load_fixed<Avx512>(grads, block, tile, q);
  __m512i total = _mm512_setzero_si512();
  for (int c = 0; c < kTileColumns; c += 16)
    total = _mm512_add_epi32(total, _mm512_load_si512(q + c));
  out->offset =
      (kBits == 1 ? -127.0 : -128.0) * _mm512_reduce_add_epi32(total);  // |sum| <= 128 * 2^23
  if constexpr (kBits == 1) {
    for (int b = 0; b < 16; ++b)
      for (int h = 0; h < 2; ++h) {
        const int32_t* g = q + 64 * h + b;
        __m512i t = _mm512_maskz_set1_epi32(0xaaaa, g[0]);
        t = _mm512_mask_add_epi32(t, 0xcccc, t, _mm512_set1_epi32(g[16]));
        t = _mm512_mask_add_epi32(t, 0xf0f0, t, _mm512_set1_epi32(g[32]));
        t = _mm512_mask_add_epi32(t, 0xff00, t, _mm512_set1_epi32(g[48]));
        _mm512_store_si512(out->operands.v[b / 4][b % 4][h], t);
      }
  } else {
#pragma GCC unroll 2
    for (int f = 0; f < 2; ++f) {
      __m512i lane[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) lane[k] = limb_dwords(_mm512_load_si512(q + 64 * f + 16 * k));
      transpose_lanes(lane);
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) {
        _mm512_store_si512(out->operands.v[f][0][m],
                           _mm512_shuffle_epi32(lane[m], static_cast<_MM_PERM_ENUM>(0xaa)));
        _mm512_store_si512(out->operands.v[f][1][m],
                           _mm512_shuffle_epi32(lane[m], static_cast<_MM_PERM_ENUM>(0x55)));
        _mm512_store_si512(out->operands.v[f][2][m],
                           _mm512_shuffle_epi32(lane[m], static_cast<_MM_PERM_ENUM>(0x00)));
      }
    }
  }
}

// acc[g][limb] += products of field f, dword m, for two groups of rows that share the operands.
template <int kBits>
TWA_AVX512 inline void multiply(__m512i levels0, __m512i levels1, const Operands<kBits>& operands,
                                int f, int m, __m512i (*acc)[3]) {
#pragma GCC unroll 3
  for (int limb = 0; limb < 3; ++limb) {
    const __m512i k = operands.get(f, limb, m);
    acc[0][limb] = _mm512_dpbusd_epi32(acc[0][limb], levels0, k);
    acc[1][limb] = _mm512_dpbusd_epi32(acc[1][limb], levels1, k);
  }
}

// Sums of lanes 0..3 of four vectors: lane k of the result = sum of the lanes of v[k].
TWA_AVX512 inline __m512i add_lanes4(__m512i v0, __m512i v1, __m512i v2, __m512i v3) {
  const __m512i a =
      _mm512_add_epi32(_mm512_shuffle_i32x4(v0, v1, 0x88), _mm512_shuffle_i32x4(v0, v1, 0xdd));
  const __m512i b =
      _mm512_add_epi32(_mm512_shuffle_i32x4(v2, v3, 0x88), _mm512_shuffle_i32x4(v2, v3, 0xdd));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

// Exact sums over the tile's columns for 16 rows, element r = row r, as add_rows16 takes them.
// `stream` is where the rows lie in memory, to prefetch what follows them; `codes` may be a copy.
template <int kBits>
TWA_AVX512 inline void sum_rows16(const uint8_t* codes, const uint8_t* stream,
                                  const LevelTables<kBits>& tables, const Operands<kBits>& operands,
                                  __m512i* high, __m512i* low) {
  constexpr int kBytes = row_bytes(kBits);
  __m512i sums[3];
  if constexpr (kBits == 8 || kBits == 4) {
    __m512i acc[4][3];
#pragma GCC unroll 2
    for (int g = 0; g < 4; g += 2) {
      for (int limb = 0; limb < 3; ++limb) acc[g][limb] = acc[g + 1][limb] = _mm512_setzero_si512();
#pragma GCC unroll 2
      for (int h = 0; h < kBytes / 64; ++h) {
        __m512i u[8];
#pragma GCC unroll 8
        for (int e = 0; e < 8; ++e)
          u[e] = _mm512_loadu_si512(codes + (4 * g + e) * kBytes + 64 * h);
        transpose_dwords(u);
        transpose_dwords(u + 4);
#pragma GCC unroll 4
        for (int m = 0; m < 4; ++m) {
          __m512i levels0[2], levels1[2];
          const uint8_t* lines = stream + (4 * g + 2 * m) * kBytes +
                                 128 * h;  // two of the 8 that these rows' halves have
          prefetch_line(kBits == 8 ? stream + (4 * g + 4 * h + m) * kBytes : lines, &acc[g][0]);
          prefetch_line(kBits == 8 ? stream + (4 * g + 4 * h + m) * kBytes + 64 : lines + kBytes,
                        &acc[g + 1][0]);
          expand_avx512<kBits>(u[m], tables, levels0);
          expand_avx512<kBits>(u[4 + m], tables, levels1);
          multiply<kBits>(levels0[0], levels1[0], operands, h, m, acc + g);
          if constexpr (kBits == 4)
            multiply<kBits>(levels0[1], levels1[1], operands, 1, m, acc + g);
        }
      }
    }
    for (int limb = 0; limb < 3; ++limb)
      sums[limb] = add_lanes4(acc[0][limb], acc[1][limb], acc[2][limb], acc[3][limb]);
  } else if constexpr (kBits == 1) {
    __m512i u[4], acc[4];
    for (int e = 0; e < 4; ++e) u[e] = _mm512_loadu_si512(codes + 64 * e);
    transpose_dwords(u);
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      acc[m] = _mm512_setzero_si512();
      prefetch_line(stream + 64 * m, &acc[m]);
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k)
        acc[m] = _mm512_add_epi32(
            acc[m], _mm512_permutexvar_epi32(_mm512_srli_epi32(u[m], static_cast<unsigned>(4 * k)),
                                             _mm512_load_si512(operands.v[m][k / 2][k % 2])));
    }
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4,
                                           0);  // row 4 e + k <- lane k element e
    *high = _mm512_permutexvar_epi32(order, _mm512_add_epi32(_mm512_add_epi32(acc[0], acc[1]),
                                                             _mm512_add_epi32(acc[2], acc[3])));
    return;
  } else {
    __m512i acc[2][3], u[2][4], w[2][4];
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g) {
      for (int limb = 0; limb < 3; ++limb) acc[g][limb] = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int e = 0; e < 4; ++e) {
        const uint8_t *even = codes + (8 * g + 2 * e) * kBytes, *odd = even + kBytes;
        u[g][e] = two_halves(even, odd);
        if constexpr (kBits == 3) w[g][e] = four_quarters(even + 32, even + 32, odd + 32, odd + 32);
      }
      transpose_dwords(u[g]);
      if constexpr (kBits == 3) transpose_dwords(w[g]);
    }
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      __m512i levels0[4], levels1[4];
#pragma GCC unroll 3
      for (int line = m * kBits; line < (m + 1) * kBits; ++line)
        prefetch_line(stream + 64 * line, &acc[line % 2][line / 2 % 3]);
      if constexpr (kBits == 3) {
        const __m512i odd_lanes = _mm512_set_epi64(0x0001000100010001, 0x0001000100010001, 0, 0,
                                                   0x0001000100010001, 0x0001000100010001, 0, 0);
        expand3_avx512(u[0][m], _mm512_srlv_epi16(w[0][m], odd_lanes), tables, levels0);
        expand3_avx512(u[1][m], _mm512_srlv_epi16(w[1][m], odd_lanes), tables, levels1);
      } else {
        expand_avx512<kBits>(u[0][m], tables, levels0);
        expand_avx512<kBits>(u[1][m], tables, levels1);
      }
#pragma GCC unroll 4
      for (int f = 0; f < 4; ++f) multiply<kBits>(levels0[f], levels1[f], operands, f, m, acc);
    }
    // lanes 0, 1 hold parts of even rows, 2, 3 of odd rows
    const __m512i order = _mm512_set_epi32(15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
    for (int limb = 0; limb < 3; ++limb) {
      const __m512i pairs =
          _mm512_add_epi32(_mm512_shuffle_i32x4(acc[0][limb], acc[1][limb], 0x88),
                           _mm512_shuffle_i32x4(acc[0][limb], acc[1][limb], 0xdd));
      sums[limb] = _mm512_permutexvar_epi32(order, pairs);
    }
  }
  *high = sums[0];
  *low = _mm512_add_epi32(_mm512_slli_epi32(sums[1], 8),
                          sums[2]);  // below 2^31: 128 * 255 * 128 * 257
}

// acc[i] += scale[i] * unit * (65536 high[i] + low[i] + offset) for up to 16 rows; 1 bit: (254
// high[i] + offset).
template <int kBits>
TWA_AVX512 inline void add_rows16(__m512i high, __m512i low, __m512d offset, __m512d unit,
                                  const uint8_t* scales, int64_t rows, double* acc) {
  const __mmask16 mask = static_cast<__mmask16>(rows >= 16 ? 0xffff : (1 << rows) - 1);
  const __m512 scale = e4m3_to_float_avx512(_mm_maskz_loadu_epi8(mask, scales));
  const auto add = [&](__m256i h, __m256i l, __m256 s, __mmask8 m, double* out) TWA_AVX512 {
    // Exact: the dot product has 38 bits, the scale 4.
    const __m512d dot =
        kBits == 1 ? _mm512_fmadd_pd(_mm512_cvtepi32_pd(h), _mm512_set1_pd(254.0), offset)
                   : _mm512_add_pd(_mm512_fmadd_pd(_mm512_cvtepi32_pd(h), _mm512_set1_pd(65536.0),
                                                   _mm512_cvtepi32_pd(l)),
                                   offset);
    const __m512d term = _mm512_mul_pd(dot, _mm512_mul_pd(_mm512_cvtps_pd(s), unit));
    _mm512_mask_storeu_pd(out, m, _mm512_add_pd(_mm512_maskz_loadu_pd(m, out), term));
  };
  add(_mm512_castsi512_si256(high), _mm512_castsi512_si256(low), _mm512_castps512_ps256(scale),
      static_cast<__mmask8>(mask), acc);
  add(_mm512_extracti64x4_epi64(high, 1), _mm512_extracti64x4_epi64(low, 1),
      _mm512_extractf32x8_ps(scale, 1), static_cast<__mmask8>(mask >> 8), acc + 8);
}

template <int kBits>
TWA_AVX512 void block_avx512(const BasisView& basis, const TensorTable& grads, const Block& block,
                             double* acc) {
  constexpr int kBytes = row_bytes(kBits);
  const LevelTables<kBits> tables;
  const int64_t n = basis.n;
  Prepared<kBits> g;
  for (int64_t tile = 0; tile < block.tiles; ++tile) {
    prepare(grads, block, tile, &g);
    const uint8_t* codes = basis.codes + (block.first_tile + tile) * n * kBytes;
    const uint8_t* scales = basis.scales + (block.first_tile + tile) * n;
    _mm_prefetch(reinterpret_cast<const char*>(scales + kScalesAhead * n), _MM_HINT_T0);
    const __m512d offset = _mm512_set1_pd(g.offset), unit = _mm512_set1_pd(g.unit);
    for (int64_t i0 = 0; i0 < n; i0 += 16) {
      alignas(64) uint8_t padded[16 * kBytes];
      const uint8_t* stream = codes + i0 * kBytes;
      const uint8_t* rows = whole_rows<16, kBits>(stream, n - i0, padded);
      __m512i high, low = _mm512_setzero_si512();
      sum_rows16<kBits>(rows, stream, tables, g.operands, &high, &low);
      add_rows16<kBits>(high, low, offset, unit, scales + i0, n - i0, acc + i0);
    }
  }
}

#elif defined(TWA_ARM)

template <int kBits>
TWA_NEON void block_neon(const BasisView& basis, const TensorTable& grads, const Block& block,
                         double* acc) {
  block_lanes<Neon, kBits>(basis, grads, block, acc);
}

#endif

TWA_ALL_TIERS(ProjectBlock)

}  // namespace

ProjectBlock project_block(int bits) {
  return with_bits(bits, [](auto b) { return pick(tiers<b()>()); });
}

void project_partial(ProjectBlock kernel, const BasisView& basis, const TensorTable& grads,
                     const Block& block, double* partial) {
  static thread_local std::vector<double> acc;
  acc.assign(static_cast<size_t>(basis.n + 7), 0.0);  // rows in eights
  kernel(basis, grads, block, acc.data());
  std::copy_n(acc.begin(), basis.n, partial);
}

Status project_cpu(const BasisView& basis, const TensorTable& grads, float* c, int threads) {
  const int64_t n = basis.n, segments = basis.num_segments;
  if (!valid_bits(basis.bits) || n < 1 || n > kMaxRows || total_tiles(grads) != basis.num_tiles)
    return Status::bad_argument;
  const std::vector<Block> blocks = blocks_of(grads, basis.tile_segment);
  if (!in_segments(blocks, segments)) return Status::bad_argument;
  std::vector<double> partial(blocks.size() * n), total(segments * n, 0.0);
  const ProjectBlock kernel = project_block(basis.bits);
  parallel_for(static_cast<int64_t>(blocks.size()), threads, [&](int64_t k) {
    project_partial(kernel, basis, grads, blocks[k], partial.data() + k * n);
  });
  for (size_t k = 0; k < blocks.size(); ++k)
    for (int64_t i = 0; i < n; ++i) total[blocks[k].segment * n + i] += partial[k * n + i];
  for (int64_t i = 0; i < n; ++i)
    for (int64_t l = 0; l < segments; ++l)
      c[i * segments + l] =
          static_cast<float>(total[l * n + i] * basis.row_scale[i * segments + l]);
  return Status::ok;
}

}  // namespace twa
