// Decoders: the 128 levels of one row of one tile, for each instruction set. The bit map is drawn
// in packing.h.
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

// decode(row, out): the 128 levels of one row of one tile as int8; out lies at a multiple of 32.
template <int kBits>
struct PortableDecoder {
  TWA_INLINE void operator()(const uint8_t* row, int8_t* out) const {
    int16_t lev[kTileColumns];
    decode_portable<kBits>(row, lev);
    for (int c = 0; c < kTileColumns; ++c) out[c] = static_cast<int8_t>(lev[c]);
  }
};
#ifdef TWA_X86

// Levels as signed bytes of columns 32 * quarter .. + 31, in order.
template <int kBits, int kQuarter>
TWA_AVX2 inline __m256i decode_avx2(const uint8_t* row, __m256i table) {
  const auto load = [](const uint8_t* p) TWA_AVX2 {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  };
  // All ones in the bytes whose 1-bit field is set: lower lane field 2 quarter, upper lane field 2
  // quarter + 1.
  const auto bit_mask = [](const uint8_t* p) TWA_AVX2 {
    const __m256i bit = _mm256_set_m128i(_mm_set1_epi8(static_cast<char>(2 << 2 * kQuarter)),
                                         _mm_set1_epi8(static_cast<char>(1 << 2 * kQuarter)));
    const __m256i w =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cmpeq_epi8(_mm256_and_si256(w, bit), bit);
  };
  if constexpr (kBits == 8)
    return _mm256_xor_si256(load(row + 32 * kQuarter), _mm256_set1_epi8(-128));
  if constexpr (kBits == 4) {
    const __m256i w = load(row + 32 * (kQuarter % 2));
    return _mm256_shuffle_epi8(
        table, _mm256_and_si256(_mm256_srli_epi16(w, kQuarter < 2 ? 0 : 4), _mm256_set1_epi8(15)));
  }
  if constexpr (kBits == 1)  // -127 or -127 + 254
    return _mm256_add_epi8(_mm256_and_si256(bit_mask(row), _mm256_set1_epi8(-2)),
                           _mm256_set1_epi8(-127));
  __m256i code = _mm256_and_si256(_mm256_srli_epi16(load(row), 2 * kQuarter), _mm256_set1_epi8(3));
  if constexpr (kBits == 3)
    code = _mm256_or_si256(code, _mm256_and_si256(bit_mask(row + 32), _mm256_set1_epi8(4)));
  return _mm256_shuffle_epi8(table, code);
}

template <int kBits>
TWA_AVX2 inline __m256i level_table_avx2() {
  alignas(16) int8_t t[16] = {};
  if constexpr (kBits < 8)
    for (int k = 0; k < 1 << kBits; ++k) t[k] = static_cast<int8_t>(level(kBits, k));
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(t)));
}

template <int kBits>
struct Avx2Decoder {
  __m256i table;
  TWA_AVX2 Avx2Decoder() : table(level_table_avx2<kBits>()) {}
  TWA_AVX2 void operator()(const uint8_t* row, int8_t* out) const {
    auto* to = reinterpret_cast<__m256i*>(out);
    _mm256_store_si256(to, decode_avx2<kBits, 0>(row, table));
    _mm256_store_si256(to + 1, decode_avx2<kBits, 1>(row, table));
    _mm256_store_si256(to + 2, decode_avx2<kBits, 2>(row, table));
    _mm256_store_si256(to + 3, decode_avx2<kBits, 3>(row, table));
  }
};

// AVX-512 works on rearranged bytes (of 4, 8 or 16 rows), so its decoder takes a vector of packed
// bytes and gives one vector per field: levels + 128 as unsigned bytes, which is what vpdpbusd
// takes. vpermb looks a byte's low 6 bits up in a table of 64, so a field anywhere in those bits
// needs no mask and no shift, only a table of its own.

template <int kBits>
struct alignas(64) LevelBytes {
  static constexpr int kCount = kBits == 1 ? 6 : kBits == 2 ? 3 : 1;
  uint8_t v[kCount][64];
};
template <int kBits>
constexpr LevelBytes<kBits> level_bytes() {
  LevelBytes<kBits> t{};
  constexpr int kField = kBits == 3 ? 4 : kBits;  // 3 bits: codes in nibbles
  for (int f = 0; f < LevelBytes<kBits>::kCount; ++f)
    for (int i = 0; i < 64; ++i)
      t.v[f][i] =
          static_cast<uint8_t>(level(kBits, (i >> (f * kField)) & ((1 << kBits) - 1)) + 128);
  return t;
}

template <int kBits>
struct LevelTables {
  __m512i table[LevelBytes<kBits>::kCount];
  TWA_AVX512 LevelTables() {
    static constexpr LevelBytes<kBits> kBytes = level_bytes<kBits>();
    for (int f = 0; f < LevelBytes<kBits>::kCount; ++f) table[f] = _mm512_load_si512(kBytes.v[f]);
  }
};

// out[f - kBegin] = levels + 128 of field f of the packed bytes, f in [kBegin, kEnd), for 8, 4, 2
// and 1 bits.
template <int kBits, int kBegin = 0, int kEnd = 8 / kBits>
TWA_AVX512 inline void expand_avx512(__m512i packed, const LevelTables<kBits>& tables,
                                     __m512i* out) {
  if constexpr (kBits == 8) {
    out[0] = packed;
  } else {
    constexpr int kFields = 8 / kBits, kDirect = kBits == 4 ? 1 : LevelBytes<kBits>::kCount;
    const __m512i shifted = _mm512_srli_epi16(
        packed, kBits * (kFields - kDirect));  // brings the upper fields under the last tables
#pragma GCC unroll 8
    for (int f = kBegin; f < kEnd; ++f)
      out[f - kBegin] =
          f < kDirect ? _mm512_permutexvar_epi8(packed, tables.table[f])
                      : _mm512_permutexvar_epi8(shifted, tables.table[f - (kFields - kDirect)]);
  }
}

// 3 bits: out[f] from field f of the 2-bit plane's bytes and bit 2 f of the 1-bit plane's (its odd
// bits are shifted down by the caller).
TWA_AVX512 inline void expand3_avx512(__m512i plane2, __m512i plane1, const LevelTables<3>& tables,
                                      __m512i* out) {
  constexpr int kSelect = 0xca;  // a ? b : c
  const __m512i low_bits = _mm512_set1_epi8(0x33);
  const __m512i even = _mm512_ternarylogic_epi32(low_bits, plane2, _mm512_slli_epi16(plane1, 2),
                                                 kSelect);  // nibbles: fields 0 and 2
  const __m512i odd = _mm512_ternarylogic_epi32(low_bits, _mm512_srli_epi16(plane2, 2), plane1,
                                                kSelect);  // fields 1 and 3
  out[0] = _mm512_permutexvar_epi8(even, tables.table[0]);
  out[1] = _mm512_permutexvar_epi8(odd, tables.table[0]);
  out[2] = _mm512_permutexvar_epi8(_mm512_srli_epi16(even, 4), tables.table[0]);
  out[3] = _mm512_permutexvar_epi8(_mm512_srli_epi16(odd, 4), tables.table[0]);
}

TWA_AVX512 inline __m512 e4m3_to_float_avx512(__m128i bytes) {
  const __m512i m = _mm512_cvtepu8_epi32(bytes);
  const __m512 normal =
      _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(m, 20), _mm512_set1_epi32(120 << 23)));
  const __m512 small = _mm512_mul_ps(_mm512_cvtepi32_ps(m), _mm512_set1_ps(0x1p-9f));
  return _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(m, _mm512_set1_epi32(8)), normal, small);
}

// to_fixed of common.h, 16 numbers at a time; count is a multiple of 16.
TWA_AVX512 inline double to_fixed_avx512(const float* v, int count, int32_t* q) {
  __m512i m = _mm512_setzero_si512();
  for (int c = 0; c < count; c += 16)
    m = _mm512_max_epu32(
        m, _mm512_and_si512(_mm512_loadu_si512(v + c), _mm512_set1_epi32(0x7fffffff)));
  const int32_t largest = static_cast<int32_t>(_mm512_reduce_max_epu32(m));
  int e = (largest >> 23) - 126;
  if (largest == 0 || e < -100 || e > 120)
    return to_fixed(v, count, q);  // zero, tiny, huge or not finite
  if (bits_float(static_cast<uint32_t>(largest)) * pow2f(23 - e) > static_cast<float>(kMaxFixed))
    ++e;
  const __m512 factor = _mm512_set1_ps(pow2f(23 - e));  // a power of two: the product is exact
  for (int c = 0; c < count; c += 16)
    _mm512_storeu_si512(q + c,
                        _mm512_cvt_roundps_epi32(_mm512_mul_ps(_mm512_loadu_ps(v + c), factor),
                                                 _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  return static_cast<double>(pow2f(e - 23));
}

// Bytes c, b, a, 0 of each dword: the signed limbs of q = 65536 a + 256 b + c.
TWA_AVX512 inline __m512i limb_bytes(__m512i q) {
  const __m512i bias = _mm512_set1_epi32(0x808080);
  return _mm512_xor_si512(_mm512_add_epi32(q, bias), bias);
}
// The same with the 4 x 4 bytes of each 128-bit lane transposed: dwords of 4 limbs c, of b, of a,
// zero.
TWA_AVX512 inline __m512i limb_dwords(__m512i q) {
  return _mm512_shuffle_epi8(
      limb_bytes(q),
      _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0)));
}

TWA_AVX512 inline __m512i two_halves(const uint8_t* low, const uint8_t* high) {
  return _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low))),
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)), 1);
}
TWA_AVX512 inline __m128i load16(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
TWA_AVX512 inline __m512i four_quarters(const uint8_t* p0, const uint8_t* p1, const uint8_t* p2,
                                        const uint8_t* p3) {
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(load16(p0)), load16(p1), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(load16(p2)), load16(p3), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Transposes 4 x 4 dwords in each 128-bit lane: v[m] element e <- v[e] element m.
TWA_AVX512 inline void transpose_dwords(__m512i* v) {
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]),
                c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm512_unpacklo_epi64(a, c);
  v[1] = _mm512_unpackhi_epi64(a, c);
  v[2] = _mm512_unpacklo_epi64(b, d);
  v[3] = _mm512_unpackhi_epi64(b, d);
}

// Transposes 4 x 4 lanes of 128 bits: v[m] lane k <- v[k] lane m.
TWA_AVX512 inline void transpose_lanes(__m512i* v) {
  const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44),
                b = _mm512_shuffle_i32x4(v[0], v[1], 0xee),
                c = _mm512_shuffle_i32x4(v[2], v[3], 0x44),
                d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  v[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
  v[2] = _mm512_shuffle_i32x4(b, d, 0x88);
  v[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

#endif  // TWA_X86

}  // namespace twa
