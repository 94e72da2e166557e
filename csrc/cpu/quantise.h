// The quantiser of packing.h for CPUs, for each instruction set, shared by pack and record.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common.h"

namespace twa {

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

// Quantisers of 1 or 2 neighbouring groups, and how packed bytes go out.
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
#ifdef TWA_X86
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
#endif

}  // namespace twa
