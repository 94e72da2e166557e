// pack:  codes and scales of v = row - center, by the quantiser that packing.h specifies, and the rows' squared norms.
//
// Operands   rows: count * n tensors in float32/bf16/f16, center: count tensors; codes (num_tiles, n, 16 * bits) bytes, scales
//            (num_tiles, n) as bf16 bits, sum_sq (n, L) float64 and max_scale (n, L) float32 accumulated over calls.
// Work map   one item = one Block: its center is converted once, then row after row is read as one stream of up to 32 KiB and
//            written as whole 16 * bits byte groups. Norms: float32 halving tree per group, float64 over groups in order,
//            blocks in order: same bits for any thread count, tier, or split of a tensor at multiples of kBlockTiles tiles.
// Bytes      n * D * input read, n * D * (bits / 8 + 2 / 128) written.
// Speed      the quantiser is bound by arithmetic, not memory: three encodings and two least-squares sums a group.
//            AVX-512 takes codes from a 128-entry table in registers, the other tiers from comparisons.
#include <algorithm>
#include <mutex>

#include "common.h"

namespace twa {
namespace {

// v[0] = halving-tree sum of v[0 .. 127].
TWA_INLINE float tree_sum(float* __restrict__ v) {
  for (int c = 0; c < 64; ++c) v[c] += v[c + 64];
  for (int c = 0; c < 32; ++c) v[c] += v[c + 32];
  for (int c = 0; c < 16; ++c) v[c] += v[c + 16];
  for (int h = 8; h > 0; h /= 2)
    for (int c = 0; c < h; ++c) v[c] += v[c + h];
  return v[0];
}

// Codes and levels of u / s, step 3 of the quantiser.
template <int kBits>
TWA_INLINE void encode(const float* __restrict__ u, float s, uint8_t* __restrict__ code, int8_t* __restrict__ lev) {
  const float inverse = s > 0.0f ? 1.0f / s : 0.0f;
  alignas(64) int8_t k[kTileColumns];
  for (int c = 0; c < kTileColumns; ++c) k[c] = static_cast<int8_t>(to_level(u[c], inverse));
  if constexpr (kBits == 8) {
    for (int c = 0; c < kTileColumns; ++c) code[c] = static_cast<uint8_t>(k[c] + 128);
    for (int c = 0; c < kTileColumns; ++c) lev[c] = k[c];
  } else {
    for (int c = 0; c < kTileColumns; ++c) code[c] = 0;
    for (int c = 0; c < kTileColumns; ++c) lev[c] = static_cast<int8_t>(level(kBits, 0));
    for (int j = 0; j + 1 < 1 << kBits; ++j) {
      const int sum = level(kBits, j) + level(kBits, j + 1), rise = level(kBits, j + 1) - level(kBits, j);
      const int8_t threshold = static_cast<int8_t>(sum >= 0 ? sum / 2 : -((1 - sum) / 2));  // floor(sum / 2): 2 k > sum
      for (int c = 0; c < kTileColumns; ++c) {
        const int above = k[c] > threshold;
        code[c] = static_cast<uint8_t>(code[c] + above);
        lev[c] = static_cast<int8_t>(lev[c] + (above ? rise : 0));
      }
    }
  }
}

template <int kBits>
TWA_INLINE void put_codes(const uint8_t* __restrict__ code, uint8_t* __restrict__ out) {
  for (int b = 0; b < row_bytes(kBits); ++b) out[b] = pack_byte(kBits, code, b);
}

struct Group {
  float scale;    // 4 significant bits
  double sum_sq;  // of v
  bool finite;
};

// Quantises v[0 .. 127] (zero past valid) into 16 * bits bytes.
template <int kBits>
TWA_INLINE Group quantise(const float* __restrict__ v, int valid, uint8_t* __restrict__ out) {
  alignas(64) float u[kTileColumns], work[kTileColumns];
  alignas(64) uint8_t code[kTileColumns];
  alignas(64) int8_t lev[kTileColumns];
  const int32_t m = max_abs_bits(v, kTileColumns);
  if (m >= 0x7f800000) return {0.0f, 0.0, false};
  if (m < 0x00800000) {  // zero (or below the normal range, which counts as zero)
    for (int c = 0; c < kTileColumns; ++c) u[c] = 0.0f;
    encode<kBits>(u, 0.0f, code, lev);
    put_codes<kBits>(code, out);
    return {0.0f, 0.0, true};
  }
  const int e = (m >> 23) - 126;
  const float down = pow2f(-(e / 2)), down2 = pow2f(-(e - e / 2));  // 2^-e in two factors: e reaches 128
  for (int c = 0; c < kTileColumns; ++c) u[c] = v[c] * down * down2;
  for (int c = 0; c < kTileColumns; ++c) work[c] = u[c] * u[c];
  const float sum_sq = tree_sum(work);
  float s;
  if constexpr (kBits == 8) {
    s = round_scale(bits_float(static_cast<uint32_t>(m)) * down * down2 / 127.0f, true);
  } else {
    s = std::sqrt(sum_sq / static_cast<float>(valid)) * initial_scale(kBits);
    for (int pass = 0; pass < 2; ++pass) {
      encode<kBits>(u, s, code, lev);
      for (int c = 0; c < kTileColumns; ++c) work[c] = u[c] * static_cast<float>(lev[c]);
      int32_t norm = 0;
      for (int c = 0; c < valid; ++c) norm += lev[c] * lev[c];
      s = tree_sum(work) / static_cast<float>(norm);
    }
    s = round_scale(s, false);
  }
  encode<kBits>(u, s, code, lev);
  put_codes<kBits>(code, out);
  const float up = s * pow2f(e / 2) * pow2f(e - e / 2);  // below the normal range: zero, as bf16 tables flush it
  return {up < 0x1p-126f ? 0.0f : up, std::ldexp(static_cast<double>(sum_sq), 2 * e), true};
}

#ifdef TWA_X86

// The quantiser with a group in 8 vectors, column 16 j + lane in vector j. Same operations in the same order as quantise().
template <int kBits>
struct CodeTables {
  __m512i positive[2], negative[2];  // code of k in 0 .. 127, and of k - 128 in -128 .. -1, at index k
  __m512i levels;                    // int8 level of a code
};

template <int kBits>
TWA_AVX512 CodeTables<kBits> code_tables() {
  alignas(64) uint8_t positive[128], negative[128], levels[16] = {};
  for (int k = 0; k < 128; ++k) {
    positive[k] = static_cast<uint8_t>(nearest_code(kBits, k));
    negative[k] = static_cast<uint8_t>(nearest_code(kBits, k == 0 ? -127 : k - 128));
  }
  if constexpr (kBits < 8)
    for (int k = 0; k < 1 << kBits; ++k) levels[k] = static_cast<uint8_t>(level(kBits, k));
  CodeTables<kBits> t;
  for (int h = 0; h < 2; ++h) t.positive[h] = _mm512_load_si512(positive + 64 * h), t.negative[h] = _mm512_load_si512(negative + 64 * h);
  t.levels = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(levels)));
  return t;
}

TWA_AVX512 inline float tree_sum16(__m512 v) {  // h = 8, 4, 2, 1 of the halving tree
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
TWA_AVX512 inline float tree_sum128(const __m512* v) {
  const __m512 a0 = _mm512_add_ps(v[0], v[4]), a1 = _mm512_add_ps(v[1], v[5]), a2 = _mm512_add_ps(v[2], v[6]), a3 = _mm512_add_ps(v[3], v[7]);
  return tree_sum16(_mm512_add_ps(_mm512_add_ps(a0, a2), _mm512_add_ps(a1, a3)));
}

// k[h]: integer levels of columns 64 h .. + 63, clamped to [-127, 127], in order.
TWA_AVX512 inline void to_levels(const __m512* u, float s, __m512i* k) {
  const __m512 inverse = _mm512_set1_ps(s > 0.0f ? 1.0f / s : 0.0f);
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);  // undoes the lanes of the two packs
  for (int h = 0; h < 2; ++h) {
    __m512i i[4];
    for (int j = 0; j < 4; ++j) i[j] = _mm512_cvt_roundps_epi32(_mm512_mul_ps(u[4 * h + j], inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(i[0], i[1]), _mm512_packs_epi32(i[2], i[3]));
    k[h] = _mm512_permutexvar_epi32(order, _mm512_max_epi8(bytes, _mm512_set1_epi8(-127)));
  }
}

template <int kBits>
TWA_AVX512 inline void encode_avx512(const __m512* u, float s, const CodeTables<kBits>& tables, __m512i* code) {
  to_levels(u, s, code);
  for (int h = 0; h < 2; ++h) {
    if constexpr (kBits == 8) {
      code[h] = _mm512_xor_si512(code[h], _mm512_set1_epi8(-128));
    } else {  // the permutation takes the low 7 bits of k as its index
      const __m512i positive = _mm512_permutex2var_epi8(tables.positive[0], code[h], tables.positive[1]);
      const __m512i negative = _mm512_permutex2var_epi8(tables.negative[0], code[h], tables.negative[1]);
      code[h] = _mm512_mask_blend_epi8(_mm512_movepi8_mask(code[h]), positive, negative);
    }
  }
}

template <int kBits>
TWA_AVX512 inline void put_codes_avx512(const __m512i* code, uint8_t* out) {
  if constexpr (kBits == 8) {
    _mm512_storeu_si512(out, code[0]);
    _mm512_storeu_si512(out + 64, code[1]);
  } else if constexpr (kBits == 4) {
    _mm512_storeu_si512(out, _mm512_or_si512(code[0], _mm512_slli_epi16(code[1], 4)));
  } else {
    if constexpr (kBits == 2 || kBits == 3) {  // 32 columns a field
      const __m512i low0 = _mm512_and_si512(code[0], _mm512_set1_epi8(3)), low1 = _mm512_and_si512(code[1], _mm512_set1_epi8(3));
      const __m512i pairs = _mm512_or_si512(low0, _mm512_slli_epi16(low1, 4));  // lower half: fields 0 and 2, upper: 1 and 3
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                          _mm256_or_si256(_mm512_castsi512_si256(pairs), _mm256_slli_epi16(_mm512_extracti64x4_epi64(pairs, 1), 2)));
      out += 32;
    }
    if constexpr (kBits == 1 || kBits == 3) {  // 16 columns a field
      const __m512i shift = _mm512_set_epi64(0x0003000300030003ll, 0x0003000300030003ll, 0x0002000200020002ll, 0x0002000200020002ll,
                                             0x0001000100010001ll, 0x0001000100010001ll, 0, 0);
      const auto bit = [](__m512i c) TWA_AVX512 { return kBits == 3 ? _mm512_and_si512(_mm512_srli_epi16(c, 2), _mm512_set1_epi8(1)) : c; };
      const __m512i fields = _mm512_or_si512(_mm512_sllv_epi16(bit(code[0]), shift), _mm512_slli_epi16(_mm512_sllv_epi16(bit(code[1]), shift), 4));
      const __m256i half = _mm256_or_si256(_mm512_castsi512_si256(fields), _mm512_extracti64x4_epi64(fields, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_or_si128(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
    }
  }
}

template <int kBits>
TWA_AVX512 inline Group quantise_avx512(const float* v, int valid, const CodeTables<kBits>& tables, uint8_t* out) {
  __m512 u[8], work[8];
  __m512i largest = _mm512_setzero_si512();
  for (int j = 0; j < 8; ++j) {
    u[j] = _mm512_loadu_ps(v + 16 * j);
    largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(u[j]), _mm512_set1_epi32(0x7fffffff)));
  }
  const int32_t m = static_cast<int32_t>(_mm512_reduce_max_epu32(largest));
  const int e = (m >> 23) - 126;
  if (e < -100 || e > 100) return quantise<kBits>(v, valid, out);  // zero, extreme or not finite
  const __m512 down = _mm512_set1_ps(pow2f(-e));
  for (int j = 0; j < 8; ++j) u[j] = _mm512_mul_ps(u[j], down);
  for (int j = 0; j < 8; ++j) work[j] = _mm512_mul_ps(u[j], u[j]);
  const float sum_sq = tree_sum128(work);
  __m512i code[2];
  float s;
  if constexpr (kBits == 8) {
    s = round_scale(bits_float(static_cast<uint32_t>(m)) * pow2f(-e) / 127.0f, true);
  } else {
    s = std::sqrt(sum_sq / static_cast<float>(valid)) * initial_scale(kBits);
    const __mmask64 real[2] = {valid >= 64 ? ~0ull : (1ull << valid) - 1, valid == 128 ? ~0ull : valid <= 64 ? 0 : (1ull << (valid - 64)) - 1};
    for (int pass = 0; pass < 2; ++pass) {
      encode_avx512<kBits>(u, s, tables, code);
      __m512i squares = _mm512_setzero_si512();
      for (int h = 0; h < 2; ++h) {
        const __m512i lev = _mm512_shuffle_epi8(tables.levels, code[h]), size = _mm512_maskz_abs_epi8(real[h], lev);
        squares = _mm512_dpbusd_epi32(squares, size, size);
        const __m128i quarter[4] = {_mm512_castsi512_si128(lev), _mm512_extracti32x4_epi32(lev, 1), _mm512_extracti32x4_epi32(lev, 2),
                                    _mm512_extracti32x4_epi32(lev, 3)};
        for (int j = 0; j < 4; ++j) work[4 * h + j] = _mm512_mul_ps(u[4 * h + j], _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter[j])));
      }
      s = tree_sum128(work) / static_cast<float>(_mm512_reduce_add_epi32(squares));
    }
    s = round_scale(s, false);
  }
  encode_avx512<kBits>(u, s, tables, code);
  put_codes_avx512<kBits>(code, out);
  const double up = static_cast<double>(pow2f(e));
  return {s * pow2f(e), static_cast<double>(sum_sq) * up * up, true};
}

#endif  // TWA_X86

struct Job {
  const TensorTable& rows;
  const TensorTable& center;
  int64_t n;
  uint8_t* codes;
  uint16_t* scales;
};

// One block, all rows: adds to sum_sq[n], max_scale[n]. Returns the first row and tile with a NaN or Inf in bad[2], -1 if none.
using BlockKernel = void (*)(const Job& job, const Block& block, double* sum_sq, float* max_scale, int64_t* bad);

template <int kBits, class Quantise>
TWA_INLINE void pack_block(const Job& job, const Block& block, double* sum_sq, float* max_scale, int64_t* bad, const Quantise& quantise_group) {
  alignas(64) static thread_local float center[kBlockTiles * kTileColumns];
  alignas(64) float v[kTileColumns];
  const TensorTable one_row{nullptr, job.center.numel, nullptr, job.center.count};
  if (job.center.data)
    for (int64_t t = 0; t < block.tiles; ++t)
      load_tile(job.center.dtype[block.tensor], job.center.data[block.tensor], block.first_column + t * kTileColumns,
                valid_columns(one_row, block, t), center + t * kTileColumns);
  for (int64_t i = 0; i < job.n; ++i) {
    const int64_t source = block.tensor * job.n + i;
    for (int64_t t = 0; t < block.tiles; ++t) {
      const int valid = valid_columns(one_row, block, t);
      load_tile(job.rows.dtype[source], job.rows.data[source], block.first_column + t * kTileColumns, valid, v);
      if (job.center.data)
        for (int c = 0; c < kTileColumns; ++c) v[c] -= center[t * kTileColumns + c];
      const int64_t group = (block.first_tile + t) * job.n + i;
      const Group g = quantise_group(v, valid, job.codes + group * row_bytes(kBits));
      if (!g.finite) {
        if (bad[0] < 0) bad[0] = i, bad[1] = t;
        continue;
      }
      job.scales[group] = static_cast<uint16_t>(float_bits(g.scale) >> 16);
      sum_sq[i] += g.sum_sq;
      max_scale[i] = std::max(max_scale[i], g.scale);
    }
  }
}

template <int kBits>
struct PlainQuantiser {
  TWA_INLINE Group operator()(const float* v, int valid, uint8_t* out) const { return quantise<kBits>(v, valid, out); }
};
template <int kBits>
void block_portable(const Job& job, const Block& block, double* sum_sq, float* max_scale, int64_t* bad) {
  pack_block<kBits>(job, block, sum_sq, max_scale, bad, PlainQuantiser<kBits>());
}
#ifdef TWA_X86
template <int kBits>
TWA_AVX2 void block_avx2(const Job& job, const Block& block, double* sum_sq, float* max_scale, int64_t* bad) {
  pack_block<kBits>(job, block, sum_sq, max_scale, bad, PlainQuantiser<kBits>());
}
template <int kBits>
struct VectorQuantiser {
  CodeTables<kBits> tables;
  TWA_AVX512 Group operator()(const float* v, int valid, uint8_t* out) const { return quantise_avx512<kBits>(v, valid, tables, out); }
};
template <int kBits>
TWA_AVX512 void block_avx512(const Job& job, const Block& block, double* sum_sq, float* max_scale, int64_t* bad) {
  pack_block<kBits>(job, block, sum_sq, max_scale, bad, VectorQuantiser<kBits>{code_tables<kBits>()});
}
#endif

template <int kBits>
BlockKernel pick() {
#ifdef TWA_X86
  if (isa() == Isa::avx512) return block_avx512<kBits>;
  if (isa() == Isa::avx2) return block_avx2<kBits>;
#endif
  return block_portable<kBits>;
}
BlockKernel pick(int bits) {
  return with_bits(bits, [](auto b) { return pick<b()>(); });
}

// Column of the first NaN or Inf of row - center in one tile.
int64_t first_bad_column(const Job& job, const Block& block, int64_t row, int64_t tile) {
  alignas(64) float v[kTileColumns], center[kTileColumns] = {};
  const TensorTable sizes{nullptr, job.center.numel, nullptr, job.center.count};
  const int valid = valid_columns(sizes, block, tile);
  const int64_t column = block.first_column + tile * kTileColumns, source = block.tensor * job.n + row;
  load_tile(job.rows.dtype[source], job.rows.data[source], column, valid, v);
  if (job.center.data) load_tile(job.center.dtype[block.tensor], job.center.data[block.tensor], column, valid, center);
  int c = 0;
  while (c + 1 < valid && std::isfinite(v[c] - center[c])) ++c;
  return column + c;
}

}  // namespace

Status pack_cpu(const TensorTable& rows, const TensorTable& center, const int32_t* tile_segment, int64_t n, int64_t num_segments, int bits,
                uint8_t* codes, uint16_t* scales_bf16, double* sum_sq, float* max_scale, Where* where, int threads) {
  if (!valid_bits(bits) || n < 1 || n > kMaxRows || rows.count != center.count * n || total_tiles(center) < 0) return Status::bad_argument;
  const Job job{rows, center, n, codes, scales_bf16};
  // Blocks of the center's geometry; an absent center still has sizes.
  std::vector<void*> present(center.count, codes);
  const std::vector<Block> blocks = make_blocks({present.data(), center.numel, center.dtype, center.count}, tile_segment);
  std::vector<double> partial(blocks.size() * n, 0.0);
  std::vector<float> largest(blocks.size() * n, 0.0f);
  std::vector<int64_t> bad(blocks.size() * 2, -1);
  const BlockKernel kernel = pick(bits);
  parallel_for(static_cast<int64_t>(blocks.size()), threads,
               [&](int64_t k) { kernel(job, blocks[k], partial.data() + k * n, largest.data() + k * n, bad.data() + 2 * k); });
  for (size_t k = 0; k < blocks.size(); ++k) {
    if (bad[2 * k] >= 0) {
      *where = {bad[2 * k], blocks[k].tensor, first_bad_column(job, blocks[k], bad[2 * k], bad[2 * k + 1])};
      return Status::not_finite;
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = i * num_segments + blocks[k].segment;
      sum_sq[at] += partial[k * n + i];
      max_scale[at] = std::max(max_scale[at], largest[k * n + i]);
    }
  }
  return Status::ok;
}

}  // namespace twa
