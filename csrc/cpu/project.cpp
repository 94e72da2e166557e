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
      high =
          _mm256_add_epi32(high, _mm256_add_epi32(_mm256_madd_epi16(l0, operand(g.high, 2 * k)), _mm256_madd_epi16(l1, operand(g.high, 2 * k + 1))));
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

// AVX-512. 16 rows at a time; transposing 4 x 4 dwords in each 128-bit lane gives vectors U[m] whose elements are rows, so that
// vpdpbusd adds 4 columns of a row and few lanes are left to sum. Which columns lie in lane k of U[m], field f:
//
//   bits 8  two vectors a row:  half h, 64 h + 16 k + 4 m ..+3          4 rows per transposition, element e = row e
//   bits 4  one vector a row:   64 f + 16 k + 4 m ..+3                  the same
//   bits 2  two rows a vector:  32 f + 16 (k % 2) + 4 m ..+3            8 rows, lane k element e = row 2 e + k / 2
//   bits 1  four rows a vector: 16 f + 4 m ..+3                         16 rows, lane k element e = row 4 e + k
//   bits 3  as 2 bits, with the 1-bit plane's 16 bytes in both lanes of a row
//
// The gradient's limbs are laid out to match: operand(f, limb, m), one vector each.
template <int kBits>
struct alignas(64) Operands {
  static constexpr int kFields = kBits == 8 ? 2 : fields_per_byte(kBits);  // 8 bits: the two halves
  int8_t v[kFields][3][4][64];
};
template <>
struct alignas(64) Operands<1> {  // all lanes hold the same columns: a dword, broadcast by the multiplication's load
  int32_t v[3][kTileColumns / 4];
};

template <int kBits>
TWA_AVX512 inline void lay_out(const TileGradient& g, Operands<kBits>* operands) {
  const int8_t* limbs[3] = {g.a, g.b, g.c};
  if constexpr (kBits == 1) {
    for (int limb = 0; limb < 3; ++limb) std::memcpy(operands->v[limb], limbs[limb], kTileColumns);
  } else {
    constexpr int kColumns = kTileColumns / Operands<kBits>::kFields;  // of one field: 64 or 32
    for (int f = 0; f < Operands<kBits>::kFields; ++f)
      for (int limb = 0; limb < 3; ++limb) {
        const int8_t* p = limbs[limb] + f * kColumns;
        const __m512i v = kColumns == 64 ? _mm512_load_si512(p) : _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
        _mm512_store_si512(operands->v[f][limb][0], _mm512_shuffle_epi32(v, static_cast<_MM_PERM_ENUM>(0x00)));
        _mm512_store_si512(operands->v[f][limb][1], _mm512_shuffle_epi32(v, static_cast<_MM_PERM_ENUM>(0x55)));
        _mm512_store_si512(operands->v[f][limb][2], _mm512_shuffle_epi32(v, static_cast<_MM_PERM_ENUM>(0xaa)));
        _mm512_store_si512(operands->v[f][limb][3], _mm512_shuffle_epi32(v, static_cast<_MM_PERM_ENUM>(0xff)));
      }
  }
}

// acc[limb] += products of field f, dword m.
template <int kBits>
TWA_AVX512 inline void multiply(__m512i levels, const Operands<kBits>& operands, int f, int m, __m512i* acc) {
#pragma GCC unroll 3
  for (int limb = 0; limb < 3; ++limb) {
    if constexpr (kBits == 1) {
      acc[limb] = _mm512_dpbusd_epi32(acc[limb], levels, _mm512_set1_epi32(operands.v[limb][4 * f + m]));
    } else {
      acc[limb] = _mm512_dpbusd_epi32(acc[limb], levels, _mm512_load_si512(operands.v[f][limb][m]));
    }
  }
}

// Sums of lanes 0..3 of four vectors: lane k of the result = sum of the lanes of v[k].
TWA_AVX512 inline __m512i add_lanes4(__m512i v0, __m512i v1, __m512i v2, __m512i v3) {
  const __m512i a = _mm512_add_epi32(_mm512_shuffle_i32x4(v0, v1, 0x88), _mm512_shuffle_i32x4(v0, v1, 0xdd));
  const __m512i b = _mm512_add_epi32(_mm512_shuffle_i32x4(v2, v3, 0x88), _mm512_shuffle_i32x4(v2, v3, 0xdd));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

// sums[limb]: element r = exact sum over the tile's columns of (level + 128) * limb for row r of 16 rows.
template <int kBits>
TWA_AVX512 inline void sum_rows16(const uint8_t* codes, const LevelTables<kBits>& tables, const Operands<kBits>& operands, __m512i* sums) {
  constexpr int kBytes = row_bytes(kBits);
  if constexpr (kBits == 8 || kBits == 4) {
    __m512i acc[4][3];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      acc[g][0] = acc[g][1] = acc[g][2] = _mm512_setzero_si512();
#pragma GCC unroll 2
      for (int h = 0; h < kBytes / 64; ++h) {
        __m512i u[4], levels[2];
#pragma GCC unroll 4
        for (int e = 0; e < 4; ++e) u[e] = _mm512_loadu_si512(codes + (4 * g + e) * kBytes + 64 * h);
        transpose_dwords(u);
#pragma GCC unroll 4
        for (int m = 0; m < 4; ++m) {
          expand_avx512<kBits>(u[m], tables, levels);
          multiply(levels[0], operands, h, m, acc[g]);
          if constexpr (kBits == 4) multiply(levels[1], operands, 1, m, acc[g]);
        }
      }
    }
    for (int limb = 0; limb < 3; ++limb) sums[limb] = add_lanes4(acc[0][limb], acc[1][limb], acc[2][limb], acc[3][limb]);
  } else if constexpr (kBits == 1) {
    __m512i u[4], levels[8];
    __m512i acc[4][3];  // one chain of additions per m: 16 rows make too few for the multiplier's latency otherwise
    for (int e = 0; e < 4; ++e) u[e] = _mm512_loadu_si512(codes + 64 * e);
    transpose_dwords(u);
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      acc[m][0] = acc[m][1] = acc[m][2] = _mm512_setzero_si512();
      expand_avx512<1>(u[m], tables, levels);
#pragma GCC unroll 8
      for (int f = 0; f < 8; ++f) multiply(levels[f], operands, f, m, acc[m]);
    }
    for (int limb = 0; limb < 3; ++limb)
      sums[limb] = _mm512_add_epi32(_mm512_add_epi32(acc[0][limb], acc[1][limb]), _mm512_add_epi32(acc[2][limb], acc[3][limb]));
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);  // row 4 e + k <- lane k element e
    for (int limb = 0; limb < 3; ++limb) sums[limb] = _mm512_permutexvar_epi32(order, sums[limb]);
  } else {
    __m512i acc[2][3], bits[4];
    for (int f = 0; f < 4; ++f)
      bits[f] = _mm512_set_epi64(0x0202020202020202ll << 2 * f, 0x0202020202020202ll << 2 * f, 0x0101010101010101ll << 2 * f,
                                 0x0101010101010101ll << 2 * f, 0x0202020202020202ll << 2 * f, 0x0202020202020202ll << 2 * f,
                                 0x0101010101010101ll << 2 * f, 0x0101010101010101ll << 2 * f);
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g) {
      acc[g][0] = acc[g][1] = acc[g][2] = _mm512_setzero_si512();
      __m512i u[4], w[4], levels[4];
#pragma GCC unroll 4
      for (int e = 0; e < 4; ++e) {
        const uint8_t *even = codes + (8 * g + 2 * e) * kBytes, *odd = even + kBytes;
        u[e] = two_halves(even, odd);
        if constexpr (kBits == 3) w[e] = four_quarters(even + 32, even + 32, odd + 32, odd + 32);
      }
      transpose_dwords(u);
      if constexpr (kBits == 3) transpose_dwords(w);
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) {
        if constexpr (kBits == 3) {
          expand3_avx512(u[m], w[m], bits, tables, levels);
        } else {
          expand_avx512<kBits>(u[m], tables, levels);
        }
#pragma GCC unroll 4
        for (int f = 0; f < 4; ++f) multiply(levels[f], operands, f, m, acc[g]);
      }
    }
    // lanes 0, 1 hold parts of even rows, 2, 3 of odd rows
    const __m512i order = _mm512_set_epi32(15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
    for (int limb = 0; limb < 3; ++limb) {
      const __m512i pairs =
          _mm512_add_epi32(_mm512_shuffle_i32x4(acc[0][limb], acc[1][limb], 0x88), _mm512_shuffle_i32x4(acc[0][limb], acc[1][limb], 0xdd));
      sums[limb] = _mm512_permutexvar_epi32(order, pairs);
    }
  }
}

template <int kBits>
TWA_AVX512 void tile_avx512(const uint8_t* codes, const uint8_t* scales, int64_t n, const TensorTable& grads, const Block& block, int64_t tile,
                            double* acc) {
  TileGradient g;
  alignas(64) float v[kTileColumns];
  load_tile(grads.dtype[block.tensor], grads.data[block.tensor], block.first_column + tile * kTileColumns, valid_columns(grads, block, tile), v);
  g.unit = to_fixed_avx512(v, kTileColumns, g.q);
  const double sum = static_cast<double>(split_avx512(g.q, kTileColumns, g.a, g.b, g.c));
  Operands<kBits> operands;
  lay_out(g, &operands);
  const LevelTables<kBits> tables = level_tables_avx512<kBits>();
  const __m512d offset = _mm512_set1_pd(-128.0 * sum), unit = _mm512_set1_pd(g.unit), two16 = _mm512_set1_pd(65536.0);
  for (int64_t i0 = 0; i0 < n; i0 += 16) {
    const uint8_t* rows = codes + i0 * row_bytes(kBits);
    prefetch_ahead(rows, 16 * row_bytes(kBits));
    alignas(64) uint8_t padded[16 * row_bytes(kBits)];
    if (n - i0 < 16) {  // the last rows, followed by anything
      std::memcpy(padded, rows, static_cast<size_t>((n - i0) * row_bytes(kBits)));
      rows = padded;
    }
    __m512i sums[3];
    sum_rows16<kBits>(rows, tables, operands, sums);
    const __m512i low = _mm512_add_epi32(_mm512_slli_epi32(sums[1], 8), sums[2]);  // below 2^31: 128 * 255 * 128 * 257
    const __mmask16 mask = static_cast<__mmask16>(n - i0 >= 16 ? 0xffff : (1 << (n - i0)) - 1);
    const __m512 scale = e4m3_to_float_avx512(_mm_maskz_loadu_epi8(mask, scales + i0));
    const auto add = [&](__m256i h, __m256i l, __m256 s, __mmask8 m, double* out) TWA_AVX512 {
      // Exact: the dot product has 38 bits, the scale 4.
      const __m512d dot = _mm512_add_pd(_mm512_add_pd(_mm512_mul_pd(_mm512_cvtepi32_pd(h), two16), _mm512_cvtepi32_pd(l)), offset);
      const __m512d term = _mm512_mul_pd(dot, _mm512_mul_pd(_mm512_cvtps_pd(s), unit));
      _mm512_mask_storeu_pd(out, m, _mm512_add_pd(_mm512_maskz_loadu_pd(m, out), term));
    };
    add(_mm512_castsi512_si256(sums[0]), _mm512_castsi512_si256(low), _mm512_castps512_ps256(scale), static_cast<__mmask8>(mask), acc + i0);
    add(_mm512_extracti64x4_epi64(sums[0], 1), _mm512_extracti64x4_epi64(low, 1), _mm512_extractf32x8_ps(scale, 1), static_cast<__mmask8>(mask >> 8),
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
  return with_bits(bits, [](auto b) { return pick<b()>(); });
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
