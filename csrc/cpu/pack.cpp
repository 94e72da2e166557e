// pack:  codes and scales of v = row - center, by the quantiser that packing.h specifies, and the
// rows' squared norms.
//
// Operands   rows: count * n tensors in float32/bf16/f16, center: count tensors; codes (num_tiles,
//            n, 16 * bits) bytes, scales (num_tiles, n) as bf16 bits, sum_sq (n, L) float64 and
//            max_scale (n, L) float32 accumulated over calls.
// Work map   one item = one Block, in chunks of up to 8 tiles: of each row in turn, the chunk's
//            columns are read (one page of float32) and quantised into a buffer, which then goes
//            out as one stream. Norms: float32 halving tree per group, float64 over groups in
//            order, blocks in order: same bits for any thread count, tier, or split of a tensor at
//            multiples of kBlockTiles tiles.
// Bytes      n * D * input read, n * D * (bits / 8 + 2 / 128) written.
// Speed      bound by arithmetic, not memory, below 8 bits: two encodings and a least-squares sum a
//            group, most of it
//            one chain of dependent operations, so AVX-512 works on two groups at a time.
#include <algorithm>

#include "average.h"
#include "decode.h"

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
TWA_INLINE void encode(const float* __restrict__ u, float s, uint8_t* __restrict__ code,
                       int8_t* __restrict__ lev) {
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
      const int sum = level(kBits, j) + level(kBits, j + 1),
                rise = level(kBits, j + 1) - level(kBits, j);
      const int8_t threshold =
          static_cast<int8_t>(sum >= 0 ? sum / 2 : -((1 - sum) / 2));  // floor(sum / 2): 2 k > sum
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
  const float down = pow2f(-(e / 2)),
              down2 = pow2f(-(e - e / 2));  // 2^-e in two factors: e reaches 128
  for (int c = 0; c < kTileColumns; ++c) u[c] = v[c] * down * down2;
  for (int c = 0; c < kTileColumns; ++c) work[c] = u[c] * u[c];
  const float sum_sq = tree_sum(work);
  float s;
  if (kBits == 8) {
    s = round_scale(bits_float(static_cast<uint32_t>(m)) * down * down2 / 127.0f, true);
  } else {
    const float largest = bits_float(static_cast<uint32_t>(m)) * down * down2;
    s = std::sqrt(sum_sq / static_cast<float>(valid)) * rms_share(kBits) +
        largest * max_share(kBits);
    encode<kBits>(u, s, code, lev);
    for (int c = 0; c < kTileColumns; ++c) work[c] = u[c] * static_cast<float>(lev[c]);
    int32_t norm = 0;
    for (int c = 0; c < valid; ++c) norm += lev[c] * lev[c];
    s = tree_sum(work) / static_cast<float>(norm);
    s = round_scale(s, false);
  }
  encode<kBits>(u, s, code, lev);
  put_codes<kBits>(code, out);
  const float up =
      s * pow2f(e / 2) * pow2f(e - e / 2);  // below the normal range: zero, as bf16 tables flush it
  return {up < 0x1p-126f ? 0.0f : up, std::ldexp(static_cast<double>(sum_sq), 2 * e), true};
}

template <int kBits>
TWA_INLINE Group quantise_difference(const float* __restrict__ row,
                                     const float* __restrict__ center, int valid, uint8_t* out) {
  alignas(64) float v[kTileColumns];
  for (int c = 0; c < kTileColumns; ++c) v[c] = row[c] - center[c];
  return quantise<kBits>(v, valid, out);
}

#ifdef TWA_X86

// The quantiser with a group in 8 vectors, column 16 j + lane in vector j. Same operations in the
// same order as quantise(). A bucket of four integer levels k, k >> 2 in 6 bits, holds at most one
// threshold between codes: tables say which code its first k has, and the last k that has it.
template <int kBits>
struct alignas(64) BucketBytes {
  int8_t code[64], last[64], low[64], high[64];  // low, high: levels of that code and of the next
};
template <int kBits>
constexpr BucketBytes<kBits> bucket_bytes() {
  BucketBytes<kBits> t{};
  if (kBits == 8) return t;
  for (int j = 0; j < 64; ++j) {
    const int first = 4 * (j < 32 ? j : j - 64), code = nearest_code(kBits, first);
    int last = 127;
    for (int k = first + 3; k > first; --k)
      if (nearest_code(kBits, k) != code) last = k - 1;
    t.code[j] = static_cast<int8_t>(code);
    t.last[j] = static_cast<int8_t>(last);
    t.low[j] = static_cast<int8_t>(level(kBits, code));
    t.high[j] = static_cast<int8_t>(level(kBits, last == 127 ? code : code + 1));
  }
  return t;
}
template <int kBits>
struct BucketTables {
  __m512i code, last, low, high;
  TWA_AVX512 BucketTables() {
    static constexpr BucketBytes<kBits> kBytes = bucket_bytes<kBits>();
    code = _mm512_load_si512(kBytes.code), last = _mm512_load_si512(kBytes.last);
    low = _mm512_load_si512(kBytes.low), high = _mm512_load_si512(kBytes.high);
  }
};

TWA_AVX512 inline float tree_sum16(__m512 v) {  // h = 8, 4, 2, 1 of the halving tree
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
TWA_AVX512 inline float tree_sum128(const __m512* v) {
  const __m512 a0 = _mm512_add_ps(v[0], v[4]), a1 = _mm512_add_ps(v[1], v[5]),
               a2 = _mm512_add_ps(v[2], v[6]), a3 = _mm512_add_ps(v[3], v[7]);
  return tree_sum16(_mm512_add_ps(_mm512_add_ps(a0, a2), _mm512_add_ps(a1, a3)));
}

// k[h]: integer levels of columns 64 h .. + 63, clamped to [-127, 127], in order.
TWA_AVX512 inline void to_levels(const __m512* u, float s, __m512i* k) {
  const __m512 inverse = _mm512_set1_ps(s > 0.0f ? 1.0f / s : 0.0f);
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4,
                                         0);  // undoes the lanes of the two packs
  for (int h = 0; h < 2; ++h) {
    __m512i i[4];
    for (int j = 0; j < 4; ++j)
      i[j] = _mm512_cvt_roundps_epi32(_mm512_mul_ps(u[4 * h + j], inverse),
                                      _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512i bytes =
        _mm512_packs_epi16(_mm512_packs_epi32(i[0], i[1]), _mm512_packs_epi32(i[2], i[3]));
    k[h] = _mm512_permutexvar_epi32(order, _mm512_max_epi8(bytes, _mm512_set1_epi8(-127)));
  }
}

template <int kBits>
TWA_AVX512 inline __m512i codes_of(__m512i k, const BucketTables<kBits>& tables) {
  if constexpr (kBits == 8) return _mm512_xor_si512(k, _mm512_set1_epi8(-128));
  const __m512i bucket = _mm512_srli_epi16(k, 2),
                code = _mm512_permutexvar_epi8(bucket, tables.code);
  const __mmask64 next = _mm512_cmpgt_epi8_mask(k, _mm512_permutexvar_epi8(bucket, tables.last));
  return _mm512_mask_add_epi8(code, next, code, _mm512_set1_epi8(1));
}
template <int kBits>
TWA_AVX512 inline __m512i levels_of(__m512i k, const BucketTables<kBits>& tables) {
  const __m512i bucket = _mm512_srli_epi16(k, 2);
  const __mmask64 next = _mm512_cmpgt_epi8_mask(k, _mm512_permutexvar_epi8(bucket, tables.last));
  return _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(bucket, tables.low), next, bucket,
                                      tables.high);
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
      const __m512i low0 = _mm512_and_si512(code[0], _mm512_set1_epi8(3)),
                    low1 = _mm512_and_si512(code[1], _mm512_set1_epi8(3));
      const __m512i pairs = _mm512_or_si512(
          low0, _mm512_slli_epi16(low1, 4));  // lower half: fields 0 and 2, upper: 1 and 3
      _mm256_storeu_si256(
          reinterpret_cast<__m256i*>(out),
          _mm256_or_si256(_mm512_castsi512_si256(pairs),
                          _mm256_slli_epi16(_mm512_extracti64x4_epi64(pairs, 1), 2)));
      out += 32;
    }
    if constexpr (kBits == 1 || kBits == 3) {  // 16 columns a field
      const __m512i shift =
          _mm512_set_epi64(0x0003000300030003ll, 0x0003000300030003ll, 0x0002000200020002ll,
                           0x0002000200020002ll, 0x0001000100010001ll, 0x0001000100010001ll, 0, 0);
      const auto bit = [](__m512i c) TWA_AVX512 {
        return kBits == 3 ? _mm512_and_si512(_mm512_srli_epi16(c, 2), _mm512_set1_epi8(1)) : c;
      };
      const __m512i fields =
          _mm512_or_si512(_mm512_sllv_epi16(bit(code[0]), shift),
                          _mm512_slli_epi16(_mm512_sllv_epi16(bit(code[1]), shift), 4));
      const __m256i half =
          _mm256_or_si256(_mm512_castsi512_si256(fields), _mm512_extracti64x4_epi64(fields, 1));
      _mm_storeu_si128(
          reinterpret_cast<__m128i*>(out),
          _mm_or_si128(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
    }
  }
}

// kGroups groups of row - center, one after the other; `next`: where input that is needed soon
// begins. Steps are taken for all of them together, so that their chains overlap.
template <int kBits, int kGroups>
TWA_AVX512 inline void quantise_avx512(const float* row, const float* center, const int* valid,
                                       const BucketTables<kBits>& tables, const char* next,
                                       uint8_t* const* out, Group* groups) {
  __m512 u[kGroups][8], work[8];
  int32_t m[kGroups];
  int e[kGroups];
  bool usual = true;
#pragma GCC unroll 2
  for (int g = 0; g < kGroups; ++g) {
    __m512i largest = _mm512_setzero_si512();
    for (int j = 0; j < 8; ++j) {
      u[g][j] = _mm512_sub_ps(_mm512_loadu_ps(row + 128 * g + 16 * j),
                              _mm512_load_ps(center + 128 * g + 16 * j));
      largest = _mm512_max_epu32(
          largest, _mm512_and_si512(_mm512_castps_si512(u[g][j]), _mm512_set1_epi32(0x7fffffff)));
      prefetch_near(next + 64 * (8 * g + j), &largest);
    }
    m[g] = static_cast<int32_t>(_mm512_reduce_max_epu32(largest));
    e[g] = (m[g] >> 23) - 126;
    usual = usual && e[g] >= -100 && e[g] <= 100;
  }
  if (!usual) {  // a group that is zero, extreme or not finite
    for (int g = 0; g < kGroups; ++g)
      groups[g] = quantise_difference<kBits>(row + 128 * g, center + 128 * g, valid[g], out[g]);
    return;
  }
  float sum_sq[kGroups], s[kGroups];
#pragma GCC unroll 2
  for (int g = 0; g < kGroups; ++g) {
    const __m512 down = _mm512_set1_ps(pow2f(-e[g]));
    for (int j = 0; j < 8; ++j) u[g][j] = _mm512_mul_ps(u[g][j], down);
    for (int j = 0; j < 8; ++j) work[j] = _mm512_mul_ps(u[g][j], u[g][j]);
    sum_sq[g] = tree_sum128(work);
    const float largest = bits_float(static_cast<uint32_t>(m[g])) * pow2f(-e[g]);
    s[g] = kBits == 8 ? round_scale(largest / 127.0f, true)
                      : std::sqrt(sum_sq[g] / static_cast<float>(valid[g])) * rms_share(kBits) +
                            largest * max_share(kBits);
  }
  __m512i k[2];
  if (kBits != 8) {
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
      const __mmask64 real[2] = {valid[g] >= 64 ? ~0ull : (1ull << valid[g]) - 1,
                                 valid[g] == 128  ? ~0ull
                                 : valid[g] <= 64 ? 0
                                                  : (1ull << (valid[g] - 64)) - 1};
      to_levels(u[g], s[g], k);
      __m512i squares = _mm512_setzero_si512();
      alignas(64) int8_t lev[kTileColumns];
      for (int h = 0; h < 2; ++h) {
        const __m512i l = levels_of<kBits>(k[h], tables), size = _mm512_maskz_abs_epi8(real[h], l);
        squares = _mm512_dpbusd_epi32(squares, size, size);
        _mm512_store_si512(lev + 64 * h, l);
      }
      for (int j = 0; j < 8; ++j)
        work[j] = _mm512_mul_ps(u[g][j], _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128(
                                             reinterpret_cast<const __m128i*>(lev + 16 * j)))));
      s[g] = tree_sum128(work) / static_cast<float>(_mm512_reduce_add_epi32(squares));
    }
    for (int g = 0; g < kGroups; ++g) s[g] = round_scale(s[g], false);
  }
#pragma GCC unroll 2
  for (int g = 0; g < kGroups; ++g) {
    to_levels(u[g], s[g], k);
    for (int h = 0; h < 2; ++h) k[h] = codes_of<kBits>(k[h], tables);
    put_codes_avx512<kBits>(k, out[g]);
    const double up = static_cast<double>(pow2f(e[g]));
    groups[g] = {s[g] * pow2f(e[g]), static_cast<double>(sum_sq[g]) * up * up, true};
  }
}

// to = from, past the caches where lines are whole: packed rows are not needed again soon.
TWA_AVX512 inline void stream_out(const uint8_t* from, uint8_t* to, int64_t bytes) {
  int64_t k = std::min<int64_t>(
      bytes, (64 - static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % 64)) % 64);
  std::memcpy(to, from, static_cast<size_t>(k));
  for (; k + 64 <= bytes; k += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + k), _mm512_loadu_si512(from + k));
  std::memcpy(to + k, from + k, static_cast<size_t>(bytes - k));
  _mm_sfence();
}

#endif  // TWA_X86

struct Job {
  const RowTable& rows;
  const double* weights;  // null: the center is given; else it is the rows' average, and written
  const PackTarget& target;
};

// What one block adds up, for its n rows.
struct Sums {
  std::vector<double> sum_sq;
  std::vector<float> max_scale;
  double error_sq = 0.0;                // of all rows, when asked for
  int64_t bad_row = -1, bad_tile = -1;  // the first row with a NaN or Inf
};
using BlockKernel = void (*)(const Job& job, const Block& block, Sums* sums);

// sum of (row - center - scale * level)^2 over the real columns of a group.
template <int kBits>
TWA_INLINE double squared_error(const float* __restrict__ row, const float* __restrict__ center,
                                int valid, float scale, const uint8_t* codes) {
  alignas(64) int16_t lev[kTileColumns];
  decode_portable<kBits>(codes, lev);
  double sum = 0.0;
  for (int c = 0; c < valid; ++c) {
    const double d = static_cast<double>(row[c] - center[c]) - static_cast<double>(scale) * lev[c];
    sum += d * d;
  }
  return sum;
}

constexpr int kChunk = kSpan / kTileColumns;  // tiles: a page of float32 of each row
constexpr int64_t kBufferBytes = int64_t{256}
                                 << 10;  // of packed bytes, within the second-level cache

// Quantiser: quantise(row, center, valid, ...) for `count` groups, 1 or 2; copy(...) writes the
// buffer out.
template <int kBits, class Quantiser>
TWA_INLINE void pack_block(const Job& job, const Block& block, Sums* sums,
                           const Quantiser& quantiser) {
  constexpr int kBytes = row_bytes(kBits);
  alignas(64) float center[kChunk * kTileColumns] = {}, loaded[2 * kTileColumns];
  static thread_local std::vector<uint8_t> buffer;
  const RowTable& rows = job.rows;
  const int64_t n = rows.n, chunk = std::clamp<int64_t>(kBufferBytes / (n * kBytes), 1, kChunk);
  buffer.resize(static_cast<size_t>(chunk * n * kBytes));
  sums->sum_sq.assign(static_cast<size_t>(n), 0.0);
  sums->max_scale.assign(static_cast<size_t>(n), 0.0f);
  for (int64_t t0 = 0; t0 < block.tiles; t0 += chunk) {
    const int64_t tiles = std::min(chunk, block.tiles - t0),
                  column = block.first_column + t0 * kTileColumns;
    int valid[kChunk];
    for (int64_t t = 0; t < tiles; ++t) {
      valid[t] = valid_columns(rows.numel, block, t0 + t);
      if (rows.center && !job.weights)
        load_tile(rows.center_dtype[block.tensor], rows.center[block.tensor],
                  column + t * kTileColumns, valid[t], center + t * kTileColumns);
    }
    if (job.weights) {  // the rows are then read again from the second-level cache
      const int count = static_cast<int>((tiles - 1) * kTileColumns + valid[tiles - 1]);
      average_span(rows.data + block.tensor * n, rows.dtype + block.tensor * n, n, job.weights,
                   column, count, center);
      std::memcpy(static_cast<float*>(rows.center[block.tensor]) + column, center,
                  static_cast<size_t>(count) * sizeof(float));
      std::fill(center + count, center + tiles * kTileColumns, 0.0f);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t source = block.tensor * n + i;
      for (int64_t t = 0; t < tiles; t += 2) {
        const int count = t + 1 < tiles ? 2 : 1;
        uint8_t* out[2];
        Group groups[2];
        const bool direct =
            rows.dtype[source] == Dtype::f32 && valid[t + count - 1] == kTileColumns;
        const float* row =
            direct ? static_cast<const float*>(rows.data[source]) + column + t * kTileColumns
                   : loaded;
        const float* from = center + t * kTileColumns;
        for (int g = 0; g < count; ++g) {
          if (!direct)
            load_tile(rows.dtype[source], rows.data[source], column + (t + g) * kTileColumns,
                      valid[t + g], loaded + g * kTileColumns);
          out[g] = buffer.data() + ((t + g) * n + i) * kBytes;
        }
        // The same columns of the next row; after the last row, of the first row's next chunk. An
        // address that is only prefetched.
        const int64_t ahead = i + 1 < n ? source + 1 : block.tensor * n,
                      skip = i + 1 < n ? 0 : chunk;
        const char* next =
            static_cast<const char*>(rows.data[ahead]) +
            (column + (t + skip) * kTileColumns) * (rows.dtype[ahead] == Dtype::f32 ? 4 : 2);
        quantiser.quantise(row, from, valid + t, count, next, out, groups);
        for (int g = 0; g < count; ++g) {
          if (!groups[g].finite) {
            if (sums->bad_row < 0) sums->bad_row = i, sums->bad_tile = t0 + t + g;
            continue;
          }
          job.target.scales[(block.first_tile + t0 + t + g) * n + i] =
              static_cast<uint16_t>(float_bits(groups[g].scale) >> 16);
          sums->sum_sq[i] += groups[g].sum_sq;
          sums->max_scale[i] = std::max(sums->max_scale[i], groups[g].scale);
          if (job.target.errors)
            sums->error_sq += squared_error<kBits>(row + g * kTileColumns, from + g * kTileColumns,
                                                   valid[t + g], groups[g].scale, out[g]);
        }
      }
    }
    quantiser.copy(buffer.data(), job.target.codes + (block.first_tile + t0) * n * kBytes,
                   tiles * n * kBytes);
  }
}

template <int kBits>
struct PlainQuantiser {
  TWA_INLINE void quantise(const float* row, const float* center, const int* valid, int count,
                           const char*, uint8_t* const* out, Group* groups) const {
    for (int g = 0; g < count; ++g)
      groups[g] = quantise_difference<kBits>(row + g * kTileColumns, center + g * kTileColumns,
                                             valid[g], out[g]);
  }
  TWA_INLINE void copy(const uint8_t* from, uint8_t* to, int64_t bytes) const {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
};
template <int kBits>
void block_portable(const Job& job, const Block& block, Sums* sums) {
  pack_block<kBits>(job, block, sums, PlainQuantiser<kBits>());
}
#ifdef TWA_X86
template <int kBits>
TWA_AVX2 void block_avx2(const Job& job, const Block& block, Sums* sums) {
  pack_block<kBits>(job, block, sums, PlainQuantiser<kBits>());
}
template <int kBits>
struct VectorQuantiser {
  BucketTables<kBits> tables;
  TWA_AVX512 VectorQuantiser() {}
  TWA_AVX512 void quantise(const float* row, const float* center, const int* valid, int count,
                           const char* next, uint8_t* const* out, Group* groups) const {
    if (count == 2) return quantise_avx512<kBits, 2>(row, center, valid, tables, next, out, groups);
    quantise_avx512<kBits, 1>(row, center, valid, tables, next, out, groups);
  }
  TWA_AVX512 void copy(const uint8_t* from, uint8_t* to, int64_t bytes) const {
    stream_out(from, to, bytes);
  }
};
template <int kBits>
TWA_AVX512 void block_avx512(const Job& job, const Block& block, Sums* sums) {
  pack_block<kBits>(job, block, sums, VectorQuantiser<kBits>());
}
#endif

template <int kBits>
constexpr Tiers<BlockKernel> tiers() {
#ifdef TWA_X86
  return {block_portable<kBits>, block_avx2<kBits>, block_avx512<kBits>};
#else
  return {block_portable<kBits>};
#endif
}

// Column of the first NaN or Inf of row - center in one tile.
int64_t first_bad_column(const Job& job, const Block& block, int64_t row, int64_t tile) {
  alignas(64) float v[kTileColumns], center[kTileColumns] = {};
  const RowTable& rows = job.rows;
  const int valid = valid_columns(rows.numel, block, tile);
  const int64_t column = block.first_column + tile * kTileColumns,
                source = block.tensor * rows.n + row;
  load_tile(rows.dtype[source], rows.data[source], column, valid, v);
  if (rows.center)
    load_tile(rows.center_dtype[block.tensor], rows.center[block.tensor], column, valid, center);
  int c = 0;
  while (c + 1 < valid && std::isfinite(v[c] - center[c])) ++c;
  return column + c;
}

}  // namespace

Status pack_cpu(const RowTable& rows, const double* weights, const PackTarget& target, Where* where,
                int threads) {
  const int64_t n = rows.n, count = rows.count;
  if (!valid_bits(target.bits) || n < 1 || n > kMaxRows || total_tiles(rows.numel, count) < 0)
    return Status::bad_argument;
  const auto is_float = [](Dtype d) { return d == Dtype::f32; };
  if (weights &&
      (!rows.center || !std::all_of(rows.center_dtype, rows.center_dtype + count, is_float)))
    return Status::bad_argument;
  const Job job{rows, weights, target};
  const std::vector<Block> blocks =
      make_blocks(rows.numel, count, target.tile_segment, kBlockTiles);
  std::vector<Sums> sums(blocks.size());
  const BlockKernel kernel = with_bits(target.bits, [](auto b) { return pick(tiers<b()>()); });
  parallel_for(static_cast<int64_t>(blocks.size()), threads,
               [&](int64_t k) { kernel(job, blocks[k], &sums[k]); });
  for (size_t k = 0; k < blocks.size(); ++k)  // before anything is added up
    if (sums[k].bad_row >= 0) {
      *where = {sums[k].bad_row, blocks[k].tensor,
                first_bad_column(job, blocks[k], sums[k].bad_row, sums[k].bad_tile)};
      return Status::not_finite;
    }
  double* errors = target.errors;
  for (size_t k = 0; k < blocks.size(); ++k) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = i * target.num_segments + blocks[k].segment;
      target.sum_sq[at] += sums[k].sum_sq[i];
      target.max_scale[at] = std::max(target.max_scale[at], sums[k].max_scale[i]);
      if (errors) errors[2 * blocks[k].tensor + 1] += sums[k].sum_sq[i];
    }
    if (errors) errors[2 * blocks[k].tensor] += sums[k].error_sq;
  }
  return Status::ok;
}

}  // namespace twa
