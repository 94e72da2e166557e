// Tiers with columns in lanes: what project and reconstruct need of AVX2, AVX-VNNI and AVX-512VL
// (NEON: neon.h).
//
// A tier is a struct, the argument of the bodies in project.cpp and reconstruct.cpp:
//
//   V, zero                    register of sums
//   kVectors                   registers of levels, a byte each, of a row of a tile: 128 / kVectors
//                              columns each
//   kTogether, kRows           rows whose products share operands; rows that add_across sums
//   Levels<bits>               get(row, v): register v of a row
//   kPasses, kPerPass          of reconstruct over the rows; registers of sums in each
//   FourRows<bits, pass>       get(u), for u = 0, 1, ... in this order: four rows, a dword has one
//                              column's four
//   kFactor, kOffset<bits>     of what these give: levels are kFactor * (it + kOffset)
//   to_fixed                   to_fixed() of common.h
//   scale_rows                 coefficients times scales, eight rows at a time
//   prefetch_line, _input, _scales   of codes, of other numbers, of scales
//   kOperands, prepare_columns the numbers q of 128 columns, for multiply() with get(): kOperands
//                              registers for each v. Returns the sum of q.
//   prepare_rows, RowOperands  of four rows, for multiply() with FourRows: up to four dwords, and
//                              the registers with them
//   kSums, multiply            sums[0 .. kSums) += levels * q, limb by limb; kWeight: of each sum
//   kHigh, close               the same as two sums: kHigh * high + low
//   add_across, add_rows       project's end: one sum a row, scaled, added to the rows' totals
//   finish                     reconstruct's end: sums of one pass to float32
//
// The sums of products are exact integers, so that all tiers have the same bits.
#pragma once

#include "decode.h"

namespace twa {

#ifdef TWA_X86

// What all tiers of 256 bits share.
struct Lanes256 {
  using V = __m256i;
  static constexpr int kVectors = 4, kTogether = 2, kRows = 8, kPasses = 4, kPerPass = 4;
  template <int kBits>
  static constexpr double kFactor = 1.0;
  template <int kBits>
  static constexpr double kOffset = -128.0;
  template <int kBits>
  using Levels = Levels256<kBits>;
  template <int kBits, int kPass>
  struct FourRows {
    V levels[kPerPass];
    TWA_AVX2 FourRows(const Levels<kBits>& of, const uint8_t* rows) {
      of.template get4<kPass>(rows, levels);
    }
    TWA_AVX2 V get(int u) const { return levels[u]; }
  };
  template <int kCount>
  struct Broadcast {
    V v[kCount];
    TWA_AVX2 explicit Broadcast(const int32_t* dwords) {
      for (int k = 0; k < kCount; ++k) v[k] = _mm256_set1_epi32(dwords[k]);
    }
    TWA_AVX2 operator const V*() const { return v; }
  };

  TWA_AVX2 static V zero() { return _mm256_setzero_si256(); }
  // The compiler would gather products to add them up as a tree, and spill them.
  TWA_AVX2 static void now(V* sum) { asm volatile("" : "+x"(*sum)); }
  TWA_AVX2 static void prefetch_line(const uint8_t* p, V* after) {
    asm volatile("prefetcht1 %c2(%1)" : "+x"(*after) : "r"(p), "i"(kPrefetch));
  }
  TWA_AVX2 static void prefetch_input(const void* p) {
    _mm_prefetch(static_cast<const char*>(p) + kPrefetchInput, _MM_HINT_T0);
  }

  TWA_AVX2 static void prefetch_scales(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }

  TWA_AVX2 static V load_numbers(const int32_t* q) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(q));
  }
  // count is a multiple of 8; q lies at a multiple of 32.
  TWA_AVX2 static double to_fixed(const float* v, int count, int32_t* q) {
    __m256i m = _mm256_setzero_si256();
    for (int c = 0; c < count; c += 8)
      m = _mm256_max_epu32(m, _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(v + c)),
                                               _mm256_set1_epi32(0x7fffffff)));
    __m128i n = _mm_max_epu32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    n = _mm_max_epu32(n, _mm_shuffle_epi32(n, 0x4e));
    n = _mm_max_epu32(n, _mm_shuffle_epi32(n, 0xb1));
    const int32_t largest = _mm_cvtsi128_si32(n);
    const int e = fixed_exponent(largest);
    if (e == kUnusual) return twa::to_fixed(v, count, q);
    const __m256 factor = _mm256_set1_ps(pow2f(23 - e));  // a power of two: the product is exact
    for (int c = 0; c < count; c += 8)
      _mm256_store_si256(reinterpret_cast<__m256i*>(q + c),
                         _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(v + c), factor)));
    return static_cast<double>(pow2f(e - 23));
  }

  TWA_AVX2 static __m256 scales(const uint8_t* bytes, int64_t rows) {
    int64_t eight = 0;
    std::memcpy(&eight, bytes, static_cast<size_t>(rows < 8 ? rows : 8));
    const __m256i m = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(eight));
    const __m256i normal = _mm256_add_epi32(_mm256_slli_epi32(m, 20), _mm256_set1_epi32(120 << 23));
    const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(m), _mm256_set1_ps(0x1p-9f));
    return _mm256_blendv_ps(_mm256_castsi256_ps(normal), small,
                            _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(8), m)));
  }
  // w[r] = x[r] * scale of row r, for 8 rows; zero past `rows`.
  TWA_AVX2 static void scale_rows(const float* x, const uint8_t* bytes, int64_t rows, float* w) {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i in =
        _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(rows < 8 ? rows : 8)), lane);
    _mm256_store_ps(w, _mm256_mul_ps(_mm256_maskload_ps(x, in), scales(bytes, rows)));
  }

  // Element r: the sum of the lanes of v[r].
  TWA_AVX2 static V add_across(const V* v) {
    const auto twos = [](V a, V b) TWA_AVX2 {
      return _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    };
    const auto fours = [&](const V* p) TWA_AVX2 {
      const V a = twos(p[0], p[1]), b = twos(p[2], p[3]);
      return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    };
    const V a = fours(v), b = fours(v + 4);
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                            _mm256_permute2x128_si256(a, b, 0x31));
  }
  // acc[r] += scale[r] * unit * (weight * high[r] + low[r] + offset) for 8 rows; acc has room for
  // 8, whatever `rows` is.
  TWA_AVX2 static void add_rows(V high, V low, double weight, double offset, double unit,
                                const uint8_t* bytes, int64_t rows, double* acc) {
    const __m256 scale = scales(bytes, rows);
    const auto add = [&](__m128i h, __m128i l, __m128 s, double* to) TWA_AVX2 {
      // Exact up to the last addition: the dot product has 38 bits, the scale 4.
      const __m256d dot = _mm256_add_pd(
          _mm256_fmadd_pd(_mm256_cvtepi32_pd(h), _mm256_set1_pd(weight), _mm256_cvtepi32_pd(l)),
          _mm256_set1_pd(offset));
      const __m256d scaled = _mm256_mul_pd(dot, _mm256_cvtps_pd(s));
      _mm256_storeu_pd(to, _mm256_fmadd_pd(scaled, _mm256_set1_pd(unit), _mm256_loadu_pd(to)));
    };
    add(_mm256_castsi256_si128(high), _mm256_castsi256_si128(low), _mm256_castps256_ps128(scale),
        acc);
    add(_mm256_extracti128_si256(high, 1), _mm256_extracti128_si256(low, 1),
        _mm256_extractf128_ps(scale, 1), acc + 4);
  }

  // to[c] = from[c] + unit * (sums of column c + offset) for the columns of one pass.
  template <int kBits, int kPass, class Tier>
  TWA_AVX2 static void finish(const V (*sums)[Tier::kSums], double offset, double unit,
                              const float* from, float* to) {
    const __m256d units = _mm256_set1_pd(unit), offsets = _mm256_set1_pd(offset);
#pragma GCC unroll 2
    for (int f = 0; f < 2; ++f)
#pragma GCC unroll 2
      for (int lane = 0; lane < 2; ++lane) {
        const int column = Levels<kBits>::column(kPass, f) + 16 * lane;
#pragma GCC unroll 2
        for (int x = 0; x < 2; ++x) {  // four columns
          __m256d sum = offsets;
#pragma GCC unroll 3
          for (int k = 0; k < Tier::kSums; ++k) {
            const V& all = sums[2 * f + x][k];
            const __m256d part = _mm256_cvtepi32_pd(lane ? _mm256_extracti128_si256(all, 1)
                                                         : _mm256_castsi256_si128(all));
            sum = _mm256_fmadd_pd(part, _mm256_set1_pd(Tier::kWeight[k]), sum);
          }
          const int c = column + 4 * x;
          const __m256d base = _mm256_cvtps_pd(_mm_loadu_ps(from + c));
          _mm_storeu_ps(to + c, _mm256_cvtpd_ps(_mm256_fmadd_pd(sum, units, base)));
        }
      }
  }

  TWA_AVX2 static int64_t sum(const int32_t* q) {  // of 128
    V total = zero();
    for (int c = 0; c < kTileColumns; c += 8) total = _mm256_add_epi32(total, load_numbers(q + c));
    return sum_of(total);
  }
  // Transposes 4 x 4 dwords in each lane: v[m] element e <- v[e] element m.
  TWA_AVX2 static void transpose_dwords(V* v) {
    const V a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]),
            c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm256_unpacklo_epi64(a, c), v[1] = _mm256_unpackhi_epi64(a, c);
    v[2] = _mm256_unpacklo_epi64(b, d), v[3] = _mm256_unpackhi_epi64(b, d);
  }
  // dwords 0 .. 7 <- 0, 4, 1, 5, 2, 6, 3, 7: undoes the lanes of two unpacks or packs.
  TWA_AVX2 static V join_lanes(V v) {
    return _mm256_permutevar8x32_epi32(v, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
  }

 protected:
  TWA_AVX2 static int64_t sum_of(V v) {
    const __m128i two = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i one = _mm_add_epi32(two, _mm_shuffle_epi32(two, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(one, _mm_shuffle_epi32(one, 0xb1)));
  }
};

// AVX2: q = 4096 high + low, two int16 limbs, with the levels of even and of odd bytes as int16.
// Not one limb fewer: 24 bits do not fit into 16, and vpmaddubsw, with its 16-bit sums of two,
// takes 7-bit limbs, four of them, and a second product to widen each.
// Operands: high even, high odd, low even, low odd.
struct Avx2 : Lanes256 {
  static constexpr int kOperands = 4, kSums = 2;
  using RowOperands = Broadcast<kOperands>;
  static constexpr double kHigh = 4096.0, kWeight[kSums] = {4096.0, 1.0};

  TWA_AVX2 static void multiply(V levels, const V* by, V* sums) {
    const V even = _mm256_and_si256(levels, _mm256_set1_epi16(255)),
            odd = _mm256_srli_epi16(levels, 8);
    // Below 2^31 for kMaxRows rows: 255 * 2048 * 4096.
    for (int k = 0; k < 2; ++k) {
      sums[k] = _mm256_add_epi32(sums[k], _mm256_add_epi32(_mm256_madd_epi16(even, by[2 * k]),
                                                           _mm256_madd_epi16(odd, by[2 * k + 1])));
      now(sums + k);
    }
  }
  TWA_AVX2 static void close(const V* sums, V* high, V* low) { *high = sums[0], *low = sums[1]; }

  TWA_AVX2 static int64_t prepare_columns(const int32_t* q, V (*by)[kOperands]) {
    V total = zero();
    for (int v = 0; v < kVectors; ++v) {
      V high[4], low[4];
      for (int j = 0; j < 4; ++j) {
        const V number = load_numbers(q + 32 * v + 8 * j);
        total = _mm256_add_epi32(total, number);
        low[j] = low_limb(number), high[j] = high_limb(number, low[j]);
      }
      by[v][0] = columns<0x88>(high), by[v][1] = columns<0xdd>(high);
      by[v][2] = columns<0x88>(low), by[v][3] = columns<0xdd>(low);
    }
    return sum_of(total);
  }
  // Even: rows 0 and 2.
  TWA_AVX2 static void prepare_rows(const int32_t* q, int32_t* by) {
    const __m128i number = _mm_load_si128(reinterpret_cast<const __m128i*>(q)),
                  low = _mm_srai_epi32(_mm_slli_epi32(number, 20), 20),
                  high = _mm_srai_epi32(_mm_sub_epi32(number, low), 12);
    _mm_store_si128(reinterpret_cast<__m128i*>(by),
                    _mm_packs_epi32(_mm_shuffle_epi32(high, 0xd8), _mm_shuffle_epi32(low, 0xd8)));
  }

 private:
  TWA_AVX2 static V low_limb(V q) { return _mm256_srai_epi32(_mm256_slli_epi32(q, 20), 20); }
  TWA_AVX2 static V high_limb(V q, V low) {
    return _mm256_srai_epi32(_mm256_sub_epi32(q, low), 12);
  }
  // int16 of every other of 32 columns; kWhich: 0x88 the even ones, 0xdd the odd ones.
  template <int kWhich>
  TWA_AVX2 static V columns(const V* v) {
    const auto of = [](V a, V b) TWA_AVX2 {
      return _mm256_castps_si256(
          _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), kWhich));
    };
    return join_lanes(_mm256_packs_epi32(of(v[0], v[1]), of(v[2], v[3])));
  }
};

// vpdpbusd: q = 65536 a + 256 b + c, three int8 limbs. Operands: c, b, a.
struct Dot256 : Lanes256 {
  static constexpr int kOperands = 3, kSums = 3;
  using RowOperands = Broadcast<kOperands>;
  static constexpr double kHigh = 65536.0, kWeight[kSums] = {1.0, 256.0, 65536.0};

  TWA_AVX2 static void close(const V* sums, V* high, V* low) {
    *high = sums[2];
    *low = _mm256_add_epi32(_mm256_slli_epi32(sums[1], 8),
                            sums[0]);  // below 2^31 for the 16 columns of a lane
  }
  TWA_AVX2 static int64_t prepare_columns(const int32_t* q, V (*by)[kOperands]) {
    V total = zero();
    for (int v = 0; v < kVectors; ++v) {
      V limbs[4];  // dwords of 4 limbs c, of b, of a, zeros, in each lane
      for (int j = 0; j < 4; ++j) {
        const V number = load_numbers(q + 32 * v + 8 * j);
        total = _mm256_add_epi32(total, number);
        limbs[j] = limb_dwords(number);
      }
      const V a = _mm256_unpacklo_epi32(limbs[0], limbs[1]),
              b = _mm256_unpacklo_epi32(limbs[2], limbs[3]);
      by[v][0] = join_lanes(_mm256_unpacklo_epi64(a, b));
      by[v][1] = join_lanes(_mm256_unpackhi_epi64(a, b));
      by[v][2] = join_lanes(_mm256_unpacklo_epi64(_mm256_unpackhi_epi32(limbs[0], limbs[1]),
                                                  _mm256_unpackhi_epi32(limbs[2], limbs[3])));
    }
    return sum_of(total);
  }
  TWA_AVX2 static void prepare_rows(const int32_t* q, int32_t* by) {
    const V number = _mm256_castsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(q)));
    _mm_store_si128(reinterpret_cast<__m128i*>(by), _mm256_castsi256_si128(limb_dwords(number)));
  }

 private:
  TWA_AVX2 static V limb_dwords(V q) {
    const V bias = _mm256_set1_epi32(0x808080);
    return _mm256_shuffle_epi8(_mm256_xor_si256(_mm256_add_epi32(q, bias), bias),
                               _mm256_broadcastsi128_si256(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2,
                                                                        13, 9, 5, 1, 12, 8, 4, 0)));
  }
};

// By hand: around the intrinsics GCC copies the sums.
#ifdef TWA_AVXVNNI
struct AvxVnni : Dot256 {  // Alder Lake, Zen 5
  TWA_AVXVNNI static void multiply(V levels, const V* by, V* sums) {
    for (int k = 0; k < kSums; ++k)
      asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums[k]) : "x"(levels), "xm"(by[k]));
  }
};
#endif
struct Avx512Vl : Dot256 {  // Cascade Lake
  TWA_AVX512VL static void multiply(V levels, const V* by, V* sums) {
    for (int k = 0; k < kSums; ++k)
      asm("vpdpbusd %2, %1, %0" : "+v"(sums[k]) : "v"(levels), "vm"(by[k]));
  }
};

#endif  // TWA_X86

}  // namespace twa
