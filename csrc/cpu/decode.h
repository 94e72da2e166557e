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

// Levels + 128 as unsigned bytes, 32 columns at a time. vpshufb looks a byte's low 4 bits up in a
// table of 16: a field of 4 bits, or either of two fields of 2. The 1-bit plane, in both lanes,
// with its odd bits shifted down in the upper one, looks like fields of 2 bits.
template <int kBits>
struct alignas(16) NibbleLevels {
  static constexpr int kCount = kBits < 3 ? 2 : 1;
  uint8_t v[kCount][16];
};
template <int kBits>
constexpr NibbleLevels<kBits> nibble_levels() {
  NibbleLevels<kBits> t{};
  for (int f = 0; f < NibbleLevels<kBits>::kCount; ++f)
    for (int i = 0; i < 16; ++i)
      t.v[f][i] = static_cast<uint8_t>(level(kBits, (i >> (2 * f)) & ((1 << kBits) - 1)) + 128);
  return t;
}

template <int kBits>
struct Levels256 {
  __m256i table[NibbleLevels<kBits>::kCount];
  TWA_AVX2 Levels256() {
    static constexpr NibbleLevels<kBits> kBytes = nibble_levels<kBits>();
    for (int f = 0; f < NibbleLevels<kBits>::kCount; ++f)
      table[f] = _mm256_broadcastsi128_si256(
          _mm_load_si128(reinterpret_cast<const __m128i*>(kBytes.v[f])));
  }

  // Columns 32 v .. + 31 of a row, in order.
  TWA_AVX2 __m256i get(const uint8_t* row, int v) const {
    if constexpr (kBits == 8) return load(row + 32 * v);
    if constexpr (kBits == 4) return field(load(row + 32 * (v % 2)), v / 2);
    if constexpr (kBits == 3) return field3(load(row), plane(both(row + 32)), v);
    if constexpr (kBits == 2) return field(load(row), v);
    return field(plane(both(row)), v);
  }

  // Four rows, a dword with one column's four levels: dword d of out[2 f + x] is column
  // column(kPass, f) + 16 (d / 4) + 4 x + d % 4. The packed bytes are interleaved, then expanded.
  static constexpr int column(int pass, int f) {
    return kBits == 8   ? 32 * pass + 8 * f
           : kBits == 4 ? 64 * f + 32 * (pass / 2) + 8 * (pass % 2)
                        : 32 * (2 * (pass / 2) + f) + 8 * (pass % 2);
  }
  template <int kPass>
  TWA_AVX2 void get4(const uint8_t* rows, __m256i* out) const {
    constexpr int kBytes = row_bytes(kBits), kFirst = kBits == 4 ? 0 : 2 * (kPass / 2);
    __m256i r[4], x[2], y[2];
    for (int k = 0; k < 4; ++k)
      r[k] = kBits == 1   ? both(rows + k * kBytes)
             : kBits == 8 ? load(rows + k * kBytes + 32 * kPass)
             : kBits == 4 ? load(rows + k * kBytes + 32 * (kPass / 2))
                          : load(rows + k * kBytes);
    if constexpr (kBits == 8) {
      interleave<true>(r, out);
      interleave<false>(r, out + 2);
      return;
    }
    interleave<kPass % 2 == 0>(r, x);
    if constexpr (kBits == 1)
      for (int k = 0; k < 2; ++k) x[k] = plane(x[k]);
    if constexpr (kBits == 3) {
      for (int k = 0; k < 4; ++k) r[k] = both(rows + k * kBytes + 32);
      interleave<kPass % 2 == 0>(r, y);
      for (int k = 0; k < 2; ++k) y[k] = plane(y[k]);
    }
    for (int f = 0; f < 2; ++f)
      for (int k = 0; k < 2; ++k)
        out[2 * f + k] = kBits == 3 ? field3(x[k], y[k], kFirst + f) : field(x[k], kFirst + f);
  }

 private:
  TWA_AVX2 static __m256i load(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  TWA_AVX2 static __m256i both(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // Of the 1-bit plane in both lanes: bit 2 f is field 2 f in the lower, 2 f + 1 in the upper lane.
  TWA_AVX2 static __m256i plane(__m256i bytes) {
    return _mm256_srlv_epi64(bytes, _mm256_set_epi64x(1, 1, 0, 0));
  }
  TWA_AVX2 __m256i field(__m256i bytes, int f) const {
    constexpr int kFields = NibbleLevels<kBits>::kCount;  // in a nibble
    const __m256i nibble = f < kFields ? bytes : _mm256_srli_epi16(bytes, 4);
    return _mm256_shuffle_epi8(table[f % kFields], _mm256_and_si256(nibble, _mm256_set1_epi8(15)));
  }
  // 3 bits: field f of the 2-bit plane's bytes with bit 2 f of the 1-bit plane's as bit 2.
  TWA_AVX2 __m256i field3(__m256i plane2, __m256i plane1, int f) const {
    const __m256i low = _mm256_srli_epi16(plane2, 2 * f),
                  high =
                      f == 0 ? _mm256_slli_epi16(plane1, 2) : _mm256_srli_epi16(plane1, 2 * f - 2);
    return _mm256_shuffle_epi8(table[0],
                               _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(3)),
                                               _mm256_and_si256(high, _mm256_set1_epi8(4))));
  }
  // Dword d of out[x]: byte 16 (d / 4) + 4 x + d % 4 of each row; !kLow: 8 bytes further.
  template <bool kLow>
  TWA_AVX2 static void interleave(const __m256i* r, __m256i* out) {
    const __m256i r01 = kLow ? _mm256_unpacklo_epi8(r[0], r[1]) : _mm256_unpackhi_epi8(r[0], r[1]),
                  r23 = kLow ? _mm256_unpacklo_epi8(r[2], r[3]) : _mm256_unpackhi_epi8(r[2], r[3]);
    out[0] = _mm256_unpacklo_epi16(r01, r23);
    out[1] = _mm256_unpackhi_epi16(r01, r23);
  }
};

template <int kBits>
struct Avx2Decoder {
  Levels256<kBits> levels;
  TWA_AVX2 Avx2Decoder() {}
  TWA_AVX2 void operator()(const uint8_t* row, int8_t* out) const {
    auto* to = reinterpret_cast<__m256i*>(out);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      _mm256_store_si256(to + v, _mm256_xor_si256(levels.get(row, v), _mm256_set1_epi8(-128)));
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
  const int e = fixed_exponent(largest);
  if (e == kUnusual) return to_fixed(v, count, q);
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
