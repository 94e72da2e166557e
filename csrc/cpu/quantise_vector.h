// The quantiser of packing.h on registers: same operations in the same order as quantise() in
// quantise.h, for up to 8 groups (a row's columns of 8 tiles) at a time.
//
// Work map   groups are taken in quads: sums and maxima of four end in one register of 4 lanes,
//            where their scales are computed. Each step is taken for one quad, then the other: what
//            leads to a scale is one chain of dependent operations, and the other quad's work fills
//            the time. Numbers between steps (4 KiB) stay in the first-level cache.
// Registers  R is Quantise8 (AVX2, 8 columns) or Quantise16 (AVX-512, 16 columns), all that
// differs.
#pragma once

#include <algorithm>

#include "common.h"

namespace twa {

constexpr int kQuads = 2, kGroups = 4 * kQuads;

// What the quantiser finds of some neighbouring groups.
struct Groups {
  alignas(32) float scale[kGroups];    // 4 significant bits
  alignas(32) double sum_sq[kGroups];  // of v
  bool finite[kGroups];                // else neither of these nor the codes are of use
};

// Where a row's columns of some neighbouring tiles lie.
struct Span {
  Dtype dtype;
  const void* data;
  int64_t count;     // tiles
  const char* next;  // as many bytes that are needed soon: addresses that are only prefetched
};

#ifdef TWA_X86

// Bodies for every R, which are inlined into functions of its target.
#define TWA_BODY TWA_AVX2 __attribute__((always_inline))

// Codes by look-up. Buckets are of 16 numbers x = k - 1, k the integer level, so that each holds at
// most one threshold between codes: `code` of its first number, and the `last` number that has it.
template <int kBits>
struct alignas(16) BucketBytes {
  int8_t code[16], last[16], level[16];  // level: of each code
};
template <int kBits>
constexpr BucketBytes<kBits> bucket_bytes() {
  BucketBytes<kBits> t{};
  for (int j = 0; j < 16; ++j) {
    const int first = 16 * (j < 8 ? j : j - 16), code = nearest_code(kBits, first + 1);
    int last = first;
    while (last < first + 15 && nearest_code(kBits, last + 2) == code) ++last;
    t.code[j] = static_cast<int8_t>(code);
    t.last[j] = static_cast<int8_t>(last);
    t.level[j] = static_cast<int8_t>(level(kBits, j < 1 << kBits ? j : 0));
  }
  return t;
}
template <int kBits>
constexpr bool buckets_hold_one_threshold() {
  const BucketBytes<kBits> t = bucket_bytes<kBits>();
  for (int x = -128; x < 127; ++x) {
    const int j = (x >> 4) & 15;
    if (nearest_code(kBits, x + 1) != t.code[j] + (x > t.last[j])) return false;
  }
  return true;
}
static_assert(buckets_hold_one_threshold<4>() && buckets_hold_one_threshold<3>() &&
                  buckets_hold_one_threshold<2>() && buckets_hold_one_threshold<1>(),
              "every k has the code of the specification");

// Quarters of four registers of 8 lanes to one of 4: lane g is what Op makes of v[g], taken as a
// halving tree.
template <class Op>
TWA_AVX2 inline __m128 reduce4(const __m256* v) {
  const auto halves = [](__m256 a, __m256 b) TWA_AVX2 {
    return Op::of(_mm256_insertf128_ps(a, _mm256_castps256_ps128(b), 1),
                  _mm256_permute2f128_ps(a, b, 0x31));
  };
  const __m256 p = halves(v[0], v[2]), q = halves(v[1], v[3]);
  const __m256 r = Op::of(_mm256_shuffle_ps(p, q, 0x44), _mm256_shuffle_ps(p, q, 0xee));
  const __m128 low = _mm256_castps256_ps128(r), high = _mm256_extractf128_ps(r, 1);
  return Op::of(_mm_shuffle_ps(low, high, 0x88), _mm_shuffle_ps(low, high, 0xdd));
}
struct FloatSum {
  TWA_AVX2 static __m256 of(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  TWA_AVX2 static __m128 of(__m128 a, __m128 b) { return _mm_add_ps(a, b); }
};
struct IntSum {
  TWA_AVX2 static __m256 of(__m256 a, __m256 b) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }
  TWA_AVX2 static __m128 of(__m128 a, __m128 b) {
    return _mm_castsi128_ps(_mm_add_epi32(_mm_castps_si128(a), _mm_castps_si128(b)));
  }
};
struct IntMax {  // of numbers without sign
  TWA_AVX2 static __m256 of(__m256 a, __m256 b) {
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }
  TWA_AVX2 static __m128 of(__m128 a, __m128 b) {
    return _mm_castsi128_ps(_mm_max_epu32(_mm_castps_si128(a), _mm_castps_si128(b)));
  }
};

struct Quantise8 {
  using F = __m256;
  using I = __m256i;
  static constexpr int kLanes = 8;
  TWA_AVX2 static F load(const float* p) { return _mm256_load_ps(p); }
  template <Dtype kDtype>
  TWA_AVX2 static F load_row(const void* p) {
    if constexpr (kDtype == Dtype::f32) return _mm256_loadu_ps(static_cast<const float*>(p));
    const __m128i h = _mm_loadu_si128(static_cast<const __m128i*>(p));
    if constexpr (kDtype == Dtype::f16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  TWA_AVX2 static void store(float* p, F v) { _mm256_store_ps(p, v); }
  TWA_AVX2 static F all(float v) { return _mm256_set1_ps(v); }
  TWA_AVX2 static F add(F a, F b) { return _mm256_add_ps(a, b); }
  TWA_AVX2 static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  TWA_AVX2 static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  TWA_AVX2 static I zero() { return _mm256_setzero_si256(); }
  TWA_AVX2 static I max_size(I largest, F v) {
    return _mm256_max_epu32(
        largest, _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)));
  }
  TWA_AVX2 static I round(F v) { return _mm256_cvtps_epi32(v); }
  // Columns in order, clamped to [-127, 127], less 1.
  TWA_AVX2 static I bytes(const I* i) {
    const I packed =
        _mm256_packs_epi16(_mm256_packs_epi32(i[0], i[1]), _mm256_packs_epi32(i[2], i[3]));
    return _mm256_permutevar8x32_epi32(_mm256_subs_epi8(packed, _mm256_set1_epi8(1)),
                                       _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  TWA_AVX2 static I plus(I x, int v) {
    return _mm256_add_epi8(x, _mm256_set1_epi8(static_cast<int8_t>(v)));
  }
  TWA_AVX2 static I table(const int8_t* t) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(t)));
  }
  TWA_AVX2 static I bucket(I x) {
    return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15));
  }
  TWA_AVX2 static I look_up(I table, I at) { return _mm256_shuffle_epi8(table, at); }
  TWA_AVX2 static I count_above(I count, I x, I last) {
    return _mm256_sub_epi8(count, _mm256_cmpgt_epi8(x, last));
  }
  TWA_AVX2 static void store_levels(int8_t* p, I levels) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), levels);
  }
  TWA_AVX2 static F levels_as_floats(const int8_t* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  TWA_AVX2 static I add_squares(I sum, I levels) {
    const I size = _mm256_abs_epi8(levels);  // two products of at most 127 * 127 fit 16 bits
    return _mm256_add_epi32(
        sum, _mm256_madd_epi16(_mm256_maddubs_epi16(size, size), _mm256_set1_epi16(1)));
  }
  TWA_AVX2 static __m256 half(F v) { return v; }
  TWA_AVX2 static __m256 half_of_squares(I v) { return _mm256_castsi256_ps(v); }
  TWA_AVX2 static __m256 half_of_sizes(I v) { return _mm256_castsi256_ps(v); }

  // For averages: numbers of `load_row` as float64, in two registers.
  using D = __m256d;
  TWA_AVX2 static D no_sum() { return _mm256_setzero_pd(); }
  TWA_AVX2 static void add_product(double w, F v, D* sum) {
    const D factor = _mm256_set1_pd(w);
    sum[0] =
        _mm256_add_pd(sum[0], _mm256_mul_pd(factor, _mm256_cvtps_pd(_mm256_castps256_ps128(v))));
    sum[1] =
        _mm256_add_pd(sum[1], _mm256_mul_pd(factor, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))));
  }
  TWA_AVX2 static void store_rounded(float* p, D v) { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }

  TWA_AVX2 static void put(uint8_t* p, I v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  }
  // code[q]: columns 32 q .. 32 q + 31
  template <int kBits>
  TWA_AVX2 static void put_codes(const I* code, uint8_t* out) {
    if constexpr (kBits == 8) {
      for (int q = 0; q < 4; ++q) put(out + 32 * q, code[q]);
    } else if constexpr (kBits == 4) {
      put(out, _mm256_or_si256(code[0], _mm256_slli_epi16(code[2], 4)));
      put(out + 32, _mm256_or_si256(code[1], _mm256_slli_epi16(code[3], 4)));
    } else {
      // Fields 2 bits apart, of which q has two lanes.
      const auto fields = [](I c0, I c1, I c2, I c3) TWA_AVX2 {
        return _mm256_or_si256(_mm256_or_si256(c0, _mm256_slli_epi16(c1, 2)),
                               _mm256_or_si256(_mm256_slli_epi16(c2, 4), _mm256_slli_epi16(c3, 6)));
      };
      if constexpr (kBits == 2) put(out, fields(code[0], code[1], code[2], code[3]));
      I bits = zero();
      if constexpr (kBits == 3) {
        const I low = _mm256_set1_epi8(3), high = _mm256_set1_epi8(1);
        put(out, fields(_mm256_and_si256(code[0], low), _mm256_and_si256(code[1], low),
                        _mm256_and_si256(code[2], low), _mm256_and_si256(code[3], low)));
        out += 32;
        const auto bit = [&](I c)
                             TWA_AVX2 { return _mm256_and_si256(_mm256_srli_epi16(c, 2), high); };
        bits = fields(bit(code[0]), bit(code[1]), bit(code[2]), bit(code[3]));
      } else if constexpr (kBits == 1) {
        bits = fields(code[0], code[1], code[2], code[3]);
      }
      if constexpr (kBits != 2)  // 16 columns a field: even ones in the lower lane
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                         _mm_or_si128(_mm256_castsi256_si128(bits),
                                      _mm_slli_epi16(_mm256_extracti128_si256(bits, 1), 1)));
    }
  }
};

struct Quantise16 {
  using F = __m512;
  using I = __m512i;
  static constexpr int kLanes = 16;
  TWA_AVX512 static F load(const float* p) { return _mm512_load_ps(p); }
  template <Dtype kDtype>
  TWA_AVX512 static F load_row(const void* p) {
    if constexpr (kDtype == Dtype::f32) return _mm512_loadu_ps(p);
    const __m256i h = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    if constexpr (kDtype == Dtype::f16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  TWA_AVX512 static void store(float* p, F v) { _mm512_store_ps(p, v); }
  TWA_AVX512 static F all(float v) { return _mm512_set1_ps(v); }
  TWA_AVX512 static F add(F a, F b) { return _mm512_add_ps(a, b); }
  TWA_AVX512 static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  TWA_AVX512 static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  TWA_AVX512 static I zero() { return _mm512_setzero_si512(); }
  TWA_AVX512 static I max_size(I largest, F v) {
    return _mm512_max_epu32(
        largest, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
  }
  TWA_AVX512 static I round(F v) { return _mm512_cvtps_epi32(v); }
  TWA_AVX512 static I bytes(const I* i) {
    const I packed =
        _mm512_packs_epi16(_mm512_packs_epi32(i[0], i[1]), _mm512_packs_epi32(i[2], i[3]));
    return _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
        _mm512_subs_epi8(packed, _mm512_set1_epi8(1)));
  }
  TWA_AVX512 static I plus(I x, int v) {
    return _mm512_add_epi8(x, _mm512_set1_epi8(static_cast<int8_t>(v)));
  }
  TWA_AVX512 static I table(const int8_t* t) {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(t)));
  }
  TWA_AVX512 static I bucket(I x) {
    return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15));
  }
  TWA_AVX512 static I look_up(I table, I at) { return _mm512_shuffle_epi8(table, at); }
  TWA_AVX512 static I count_above(I count, I x, I last) {
    return _mm512_mask_add_epi8(count, _mm512_cmpgt_epi8_mask(x, last), count, _mm512_set1_epi8(1));
  }
  TWA_AVX512 static void store_levels(int8_t* p, I levels) { _mm512_store_si512(p, levels); }
  TWA_AVX512 static F levels_as_floats(const int8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p))));
  }
  TWA_AVX512 static I add_squares(I sum, I levels) {
    const I size = _mm512_abs_epi8(levels);
    return _mm512_dpbusd_epi32(sum, size, size);
  }
  TWA_AVX512 static __m256 half(F v) {
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  }
  TWA_AVX512 static __m256 half_of_squares(I v) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1)));
  }
  TWA_AVX512 static __m256 half_of_sizes(I v) {
    return _mm256_castsi256_ps(
        _mm256_max_epu32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1)));
  }
  using D = __m512d;
  TWA_AVX512 static D no_sum() { return _mm512_setzero_pd(); }
  TWA_AVX512 static void add_product(double w, F v, D* sum) {
    const D factor = _mm512_set1_pd(w);
    sum[0] =
        _mm512_add_pd(sum[0], _mm512_mul_pd(factor, _mm512_cvtps_pd(_mm512_castps512_ps256(v))));
    sum[1] =
        _mm512_add_pd(sum[1], _mm512_mul_pd(factor, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))));
  }
  TWA_AVX512 static void store_rounded(float* p, D v) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(v)); }

  // code[q]: columns 64 q .. 64 q + 63
  template <int kBits>
  TWA_AVX512 static void put_codes(const I* code, uint8_t* out) {
    if constexpr (kBits == 8) {
      _mm512_storeu_si512(out, code[0]);
      _mm512_storeu_si512(out + 64, code[1]);
    } else if constexpr (kBits == 4) {
      _mm512_storeu_si512(out, _mm512_or_si512(code[0], _mm512_slli_epi16(code[1], 4)));
    } else {
      if constexpr (kBits == 2 || kBits == 3) {  // 32 columns a field
        const I low0 = _mm512_and_si512(code[0], _mm512_set1_epi8(3)),
                low1 = _mm512_and_si512(code[1], _mm512_set1_epi8(3));
        const I pairs = _mm512_or_si512(
            low0, _mm512_slli_epi16(low1, 4));  // lower half: fields 0 and 2, upper: 1 and 3
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(out),
            _mm256_or_si256(_mm512_castsi512_si256(pairs),
                            _mm256_slli_epi16(_mm512_extracti64x4_epi64(pairs, 1), 2)));
        out += 32;
      }
      if constexpr (kBits == 1 || kBits == 3) {  // 16 columns a field
        const I shift = _mm512_set_epi64(0x0003000300030003ll, 0x0003000300030003ll,
                                         0x0002000200020002ll, 0x0002000200020002ll,
                                         0x0001000100010001ll, 0x0001000100010001ll, 0, 0);
        const auto bit = [](I c) TWA_AVX512 {
          return kBits == 3 ? _mm512_and_si512(_mm512_srli_epi16(c, 2), _mm512_set1_epi8(1)) : c;
        };
        const I fields =
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
};

template <class R>
constexpr int kRegisters = kTileColumns / R::kLanes;  // of a group

// Asks for a quarter of what is needed instead of group g next time, into the second-level cache:
// all of it at once would fill the core's line buffers and stall it.
TWA_BODY inline void prefetch_quarter(const Span& row, int quarter, int64_t g) {
  const int64_t lines = size_of(row.dtype) / 2;
  for (int64_t k = 0; k < lines; ++k)
    asm volatile("prefetcht1 %0" ::"m"(row.next[64 * (lines * (4 * g + quarter) + k)]));
}

// v[128 g ..]: row - center; largest[g]: of their sizes, in 8 lanes.
template <class R, Dtype kDtype>
TWA_BODY inline void subtract(const Span& row, const float* center, float* v, __m256* largest) {
  constexpr int kSize = size_of(kDtype);
  for (int g = 0; g < row.count; ++g) {
    typename R::I most = R::zero();
#pragma GCC unroll 16
    for (int c = 0; c < kTileColumns; c += R::kLanes) {
      const int at = g * kTileColumns + c;
      const typename R::F d =
          R::sub(R::template load_row<kDtype>(static_cast<const char*>(row.data) + at * kSize),
                 R::load(center + at));
      R::store(v + at, d);
      most = R::max_size(most, d);
    }
    largest[g] = R::half_of_sizes(most);
    prefetch_quarter(row, 0, g);
  }
}

// Sums over the registers of a group, h = 64 .. kLanes of the halving tree; term(j): register j.
template <class R, class Term>
TWA_BODY inline typename R::F tree_of(const Term& term) {
  if constexpr (R::kLanes == 16) {
    const auto a0 = R::add(term(0), term(4)), a2 = R::add(term(2), term(6));
    const auto a1 = R::add(term(1), term(5)), a3 = R::add(term(3), term(7));
    return R::add(R::add(a0, a2), R::add(a1, a3));
  } else {
    const auto four = [&](int j) TWA_BODY {  // h = 64 and 32
      const auto a = R::add(term(j), term(j + 8));
      return R::add(a, R::add(term(j + 4), term(j + 12)));
    };
    const auto a = R::add(four(0), four(2));
    return R::add(a, R::add(four(1), four(3)));
  }
}

// x = k - 1 of the integer levels k of u * inverse.
template <class R>
TWA_BODY inline void to_levels(const float* u, float inverse, typename R::I* x) {
  const typename R::F factor = R::all(inverse);
#pragma GCC unroll 4
  for (int b = 0; b < kRegisters<R> / 4; ++b) {
    typename R::I i[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      i[j] = R::round(R::mul(R::load(u + (4 * b + j) * R::kLanes), factor));
    x[b] = R::bytes(i);
  }
}

template <class R, int kBits>
struct Tables {
  typename R::I code, last, level;
};
template <class R, int kBits>
TWA_BODY inline Tables<R, kBits> tables() {
  static constexpr BucketBytes<kBits> kBytes = bucket_bytes<kBits>();
  return {R::table(kBytes.code), R::table(kBytes.last), R::table(kBytes.level)};
}
template <class R, int kBits>
TWA_BODY inline typename R::I code_of(typename R::I x, const Tables<R, kBits>& t) {
  if constexpr (kBits == 8) return R::plus(x, 129);
  const typename R::I bucket = R::bucket(x);
  return R::count_above(R::look_up(t.code, bucket), x, R::look_up(t.last, bucket));
}

// round_scale() of packing.h; without its sign, which a group of zeros may have.
TWA_AVX2 inline __m128 round_scales(__m128 s, bool up) {
  const __m128i u = _mm_castps_si128(s);
  const __m128i add = up ? _mm_set1_epi32(0xfffff)
                         : _mm_add_epi32(_mm_set1_epi32(0x7ffff),
                                         _mm_and_si128(_mm_srli_epi32(u, 20), _mm_set1_epi32(1)));
  return _mm_castsi128_ps(_mm_and_si128(_mm_set1_epi32(0x7ff00000), _mm_add_epi32(u, add)));
}
TWA_AVX2 inline __m128 inverses(__m128 s) {  // 0 of 0
  return _mm_and_ps(_mm_div_ps(_mm_set1_ps(1.0f), s), _mm_cmpgt_ps(s, _mm_setzero_ps()));
}

// What is known of a quad, a lane a group.
struct Quad {
  __m128 size, down, up;  // largest u; 2^-e, 2^e
  __m128 sum_sq, scale;   // of u
};
// Mask of the groups of a quad that are extreme or not finite: what is made of them is of no use.
TWA_BODY inline int measure(const __m256* largest, Quad* quad, float* down) {
  const __m128i most = _mm_castps_si128(reduce4<IntMax>(largest)),
                exponent = _mm_srli_epi32(most, 23);  // e + 126; 0: the group counts as zero
  const __m128i is_zero = _mm_cmpeq_epi32(exponent, _mm_setzero_si128());
  // Within these all powers of two are normal numbers.
  const __m128i usual = _mm_and_si128(_mm_cmpgt_epi32(exponent, _mm_set1_epi32(25)),
                                      _mm_cmpgt_epi32(_mm_set1_epi32(227), exponent));
  quad->down = _mm_castsi128_ps(
      _mm_andnot_si128(is_zero, _mm_slli_epi32(_mm_sub_epi32(_mm_set1_epi32(253), exponent), 23)));
  quad->up = _mm_castsi128_ps(_mm_slli_epi32(_mm_add_epi32(exponent, _mm_set1_epi32(1)), 23));
  quad->size = _mm_mul_ps(_mm_castsi128_ps(most), quad->down);
  _mm_store_ps(down, quad->down);
  return 15 & ~_mm_movemask_ps(_mm_castsi128_ps(_mm_or_si128(usual, is_zero)));
}
// The steps of a quad, groups `first` .. `first` + `count` - 1.

// u = v * down, and the first scale of the groups; that of 8 bits is the last one.
template <class R, int kBits>
TWA_BODY inline void first_scale(const Span& row, int first, int count, float* v, const int* valid,
                                 Quad* quad, float* each) {
  __m256 part[4] = {};
  for (int g = 0; g < count; ++g) {
    const typename R::F down = R::all(each[first + g]);
    float* u = v + (first + g) * kTileColumns;
    part[g] = R::half(tree_of<R>([&](int j) TWA_BODY {
      const typename R::F scaled = R::mul(R::load(u + j * R::kLanes), down);
      R::store(u + j * R::kLanes, scaled);
      return R::mul(scaled, scaled);
    }));
    prefetch_quarter(row, 1, first + g);
  }
  quad->sum_sq = reduce4<FloatSum>(part);
  if constexpr (kBits == 8) {
    quad->scale = round_scales(_mm_div_ps(quad->size, _mm_set1_ps(127.0f)), true);
  } else {
    const __m128 columns =
        _mm_cvtepi32_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(valid + first)));
    const __m128 rms = _mm_sqrt_ps(_mm_div_ps(quad->sum_sq, columns));
    quad->scale = _mm_add_ps(_mm_mul_ps(rms, _mm_set1_ps(rms_share(kBits))),
                             _mm_mul_ps(quad->size, _mm_set1_ps(max_share(kBits))));
  }
  _mm_store_ps(each + first, inverses(quad->scale));
}
// Levels of u times each, and the sums of their squares.
template <class R, int kBits>
TWA_BODY inline void first_levels(int first, int count, const float* u, const float* each,
                                  int8_t* lev, __m256* squares) {
  const Tables<R, kBits> t = tables<R, kBits>();
  for (int g = first; g < first + count; ++g) {
    typename R::I x[kRegisters<R> / 4], square = R::zero();
    to_levels<R>(u + g * kTileColumns, each[g], x);
#pragma GCC unroll 4
    for (int b = 0; b < kRegisters<R> / 4; ++b) {
      const typename R::I levels = R::look_up(t.level, code_of<R, kBits>(x[b], t));
      R::store_levels(lev + g * kTileColumns + 4 * b * R::kLanes, levels);
      square = R::add_squares(square, levels);
    }
    squares[g] = R::half_of_squares(square);
  }
}
// The scale that fits these levels best.
template <class R, int kBits>
TWA_BODY inline void fitted_scale(const Span& row, int first, int count, const float* u,
                                  const int8_t* lev, const __m256* squares, const int* valid,
                                  Quad* quad, float* each) {
  __m256 part[4] = {};
  for (int g = 0; g < count; ++g) {
    part[g] = R::half(tree_of<R>([&](int j) TWA_BODY {
      const int at = (first + g) * kTileColumns + j * R::kLanes;
      return R::mul(R::load(u + at), R::levels_as_floats(lev + at));
    }));
    prefetch_quarter(row, 2, first + g);
  }
  // Columns past the end have the level of 0.
  constexpr int kOfZero = level(kBits, nearest_code(kBits, 0));
  const __m128i columns = _mm_loadu_si128(reinterpret_cast<const __m128i*>(valid + first));
  const __m128i past = _mm_mullo_epi32(_mm_sub_epi32(_mm_set1_epi32(kTileColumns), columns),
                                       _mm_set1_epi32(kOfZero * kOfZero));
  const __m128i norm = _mm_sub_epi32(_mm_castps_si128(reduce4<IntSum>(squares + first)), past);
  quad->scale = round_scales(_mm_div_ps(reduce4<FloatSum>(part), _mm_cvtepi32_ps(norm)), false);
  _mm_store_ps(each + first, inverses(quad->scale));
}
template <class R, int kBits>
TWA_BODY inline void last_codes(const Span& row, int first, int count, const float* u,
                                const float* each, uint8_t* const* out) {
  const Tables<R, kBits> t = tables<R, kBits>();
  for (int g = first; g < first + count; ++g) {
    typename R::I x[kRegisters<R> / 4];
    to_levels<R>(u + g * kTileColumns, each[g], x);
#pragma GCC unroll 4
    for (int b = 0; b < kRegisters<R> / 4; ++b) x[b] = code_of<R, kBits>(x[b], t);
    R::template put_codes<kBits>(x, out[g]);
    if (kBits == 8) prefetch_quarter(row, 2, g);
    prefetch_quarter(row, 3, g);
  }
}

// row - center, v, which becomes u. Returns the mask of groups that are yet to be quantised.
template <class R, int kBits>
TWA_BODY inline int quantise_groups(const Span& row, float* v, const __m256* largest,
                                    const int* valid, uint8_t* const* out, Groups* groups) {
  alignas(16) float each[kGroups];
  alignas(64) int8_t lev[kGroups * kTileColumns];
  __m256 squares[kGroups] = {};
  Quad quads[kQuads];
  int unusual = 0;
  const auto for_quads = [&](const auto& step) TWA_BODY {
#pragma GCC unroll 1
    for (int q = 0, g = 0; g < row.count; ++q, g += 4)
      step(quads + q, g, static_cast<int>(std::min<int64_t>(4, row.count - g)));
  };
  for_quads([&](Quad* quad, int g, int)
                TWA_BODY { unusual |= measure(largest + g, quad, each + g) << g; });
  for_quads([&](Quad* quad, int g, int count)
                TWA_BODY { first_scale<R, kBits>(row, g, count, v, valid, quad, each); });
  if constexpr (kBits != 8) {
    for_quads([&](Quad*, int g, int count)
                  TWA_BODY { first_levels<R, kBits>(g, count, v, each, lev, squares); });
    asm volatile("" : "+m"(lev));  // else the compiler takes registers apart, which costs more
    for_quads([&](Quad* quad, int g, int count) TWA_BODY {
      fitted_scale<R, kBits>(row, g, count, v, lev, squares, valid, quad, each);
    });
  }
  for_quads([&](Quad* quad, int g, int count) TWA_BODY {
    last_codes<R, kBits>(row, g, count, v, each, out);
    _mm_store_ps(groups->scale + g, _mm_mul_ps(quad->scale, quad->up));
    const __m256d up = _mm256_cvtps_pd(quad->up);
    _mm256_store_pd(groups->sum_sq + g,
                    _mm256_mul_pd(_mm256_mul_pd(_mm256_cvtps_pd(quad->sum_sq), up), up));
  });
  for (int g = 0; g < kGroups; ++g) groups->finite[g] = true;
  return unusual & ((1 << row.count) - 1);
}

#endif  // TWA_X86

}  // namespace twa
