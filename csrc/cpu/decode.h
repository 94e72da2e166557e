// Decoders: the 128 levels of one row of one tile, for each instruction set. The bit map is drawn in packing.h.
#pragma once

#include "common.h"

namespace twa {

// Levels of all 128 columns, in order.
template <int kBits>
TWA_INLINE void decode_portable(const uint8_t* __restrict__ row, int16_t* __restrict__ out) {
  if constexpr (kBits == 8) {
    for (int c = 0; c < kTileColumns; ++c) out[c] = static_cast<int16_t>(row[c] - 128);
  } else {
    int16_t table[1 << kBits];
    for (int k = 0; k < 1 << kBits; ++k) table[k] = static_cast<int16_t>(level(kBits, k));
    for (int c = 0; c < kTileColumns; ++c) out[c] = table[get_code(kBits, row, c)];
  }
}

#ifdef TWA_X86

// Levels as signed bytes of columns 32 * quarter .. + 31, in order.
template <int kBits, int kQuarter>
TWA_AVX2 inline __m256i decode_avx2(const uint8_t* row, __m256i table) {
  const auto load = [](const uint8_t* p) TWA_AVX2 { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
  // All ones in the bytes whose 1-bit field is set: lower lane field 2 quarter, upper lane field 2 quarter + 1.
  const auto bit_mask = [](const uint8_t* p) TWA_AVX2 {
    const __m256i bit = _mm256_set_m128i(_mm_set1_epi8(static_cast<char>(2 << 2 * kQuarter)), _mm_set1_epi8(static_cast<char>(1 << 2 * kQuarter)));
    const __m256i w = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cmpeq_epi8(_mm256_and_si256(w, bit), bit);
  };
  if constexpr (kBits == 8) return _mm256_xor_si256(load(row + 32 * kQuarter), _mm256_set1_epi8(-128));
  if constexpr (kBits == 4) {
    const __m256i w = load(row + 32 * (kQuarter % 2));
    return _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(w, kQuarter < 2 ? 0 : 4), _mm256_set1_epi8(15)));
  }
  if constexpr (kBits == 1)  // -127 or -127 + 254
    return _mm256_add_epi8(_mm256_and_si256(bit_mask(row), _mm256_set1_epi8(-2)), _mm256_set1_epi8(-127));
  __m256i code = _mm256_and_si256(_mm256_srli_epi16(load(row), 2 * kQuarter), _mm256_set1_epi8(3));
  if constexpr (kBits == 3) code = _mm256_or_si256(code, _mm256_and_si256(bit_mask(row + 32), _mm256_set1_epi8(4)));
  return _mm256_shuffle_epi8(table, code);
}

template <int kBits>
TWA_AVX2 inline __m256i level_table_avx2() {
  alignas(16) int8_t t[16] = {};
  if constexpr (kBits < 8)
    for (int k = 0; k < 1 << kBits; ++k) t[k] = static_cast<int8_t>(level(kBits, k));
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(t)));
}

// Levels + 128 as unsigned bytes (what vpdpbusd takes) of columns 64 * half .. + 63, in order.
template <int kBits, int kHalf>
TWA_AVX512 inline __m512i decode_avx512(const uint8_t* row, __m512i table) {
  // Bytes whose 1-bit field is set: 128-bit lane k holds field 4 half + k.
  const auto bit_mask = [](const uint8_t* p) TWA_AVX512 {
    constexpr uint64_t kOnes = 0x0101010101010101ull << 4 * kHalf;
    const __m512i bit = _mm512_set_epi64(kOnes << 3, kOnes << 3, kOnes << 2, kOnes << 2, kOnes << 1, kOnes << 1, kOnes, kOnes);
    return _mm512_test_epi8_mask(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), bit);
  };
  if constexpr (kBits == 8) return _mm512_loadu_si512(row + 64 * kHalf);
  if constexpr (kBits == 4)
    return _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(row), 4 * kHalf), _mm512_set1_epi8(15)));
  if constexpr (kBits == 1) return _mm512_mask_blend_epi8(bit_mask(row), _mm512_set1_epi8(1), _mm512_set1_epi8(-1));
  // Lower 32 bytes: field 2 half; upper 32 bytes: field 2 half + 1.
  const __m512i w = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
  const __m512i shift = _mm512_inserti64x4(_mm512_set1_epi16(4 * kHalf), _mm256_set1_epi16(4 * kHalf + 2), 1);
  __m512i code = _mm512_and_si512(_mm512_srlv_epi16(w, shift), _mm512_set1_epi8(3));
  if constexpr (kBits == 3) code = _mm512_mask_add_epi8(code, bit_mask(row + 32), code, _mm512_set1_epi8(4));
  return _mm512_shuffle_epi8(table, code);
}

template <int kBits>
TWA_AVX512 inline __m512i level_table_avx512() {
  alignas(16) uint8_t t[16] = {};
  if constexpr (kBits < 8)
    for (int k = 0; k < 1 << kBits; ++k) t[k] = static_cast<uint8_t>(level(kBits, k) + 128);
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(t)));
}

#endif  // TWA_X86

}  // namespace twa
