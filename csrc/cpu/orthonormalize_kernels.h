// The innermost loops of orthonormalize_pass on a CPU (orthonormalize.cpp): products of rows, the
// transform, differences, storing. Each loop is written once, over a register of one instruction
// set: portable, AVX2 and AVX-512, in float64 and float32.
#pragma once

#include <algorithm>
#include <cstring>

#include "common.h"

namespace twa {
namespace {

// Registers of a row in the transform, rows on the other side of a product, registers of a row of a
// block at most (float32 sums go over as many columns a lane).
constexpr int kPanel = 4, kQuad = 4, kMostVectors = 64;

// A tile: `rows` rows that stay in registers beside those of the other operand. Strides in
// elements. Both loops prefetch from `next` on, a line at a time between products (rows of the next
// block; in the loop over differences they would come in a burst, which stalls a core).
template <class Real, class Made>
struct Tile {
  int rows;
  // total[i * ld + k] += sum over columns of a row i * b row k, for 4 rows k; `columns` a multiple
  // of a panel. Prefetches `columns` float32 numbers.
  void (*product)(const Real* a, const Real* b, int64_t stride, int64_t columns, double* total,
                  int64_t ld, const void* next);
  // out (rows x one panel) = factor (extent, rows) * x. Prefetches `extent` lines.
  void (*transform)(const Real* factor, int64_t extent, const Real* x, int64_t stride, Made* out,
                    int64_t out_stride, const void* next);
};

// The loops for one instruction set.
template <class Real, class Made>
struct Kernels {
  int lanes;  // of a register of Real
  Tile<Real, Made> tile;
  Tile<Real, Made> probe;  // whose rows divide the 6 probes
  // out[c] = a[c] - b[c] (b null: a[c]), zero up to the end of the panel. The four squares[0..3]
  // together += sum of a[c]^2, and for float32 `out`, if `differences`, squares[4..7] += out[c]^2.
  void (*difference)(const float* a, const float* b, int64_t count, Real* out, bool differences,
                     double* squares);
  // Multiply-adds on 12 registers, `turns` of each: what the processor can do at most.
  void (*multiply)(int64_t turns, Real* out);
  // Rounds `kept` to `dtype` and stores it (if `to` is not null).
  void (*finish)(float* kept, int64_t count, Dtype dtype, void* to, bool past_cache);
};

// Registers of float64 and float32, and what is done with them -----------------------------------
//
// from     load of as many float32 numbers
// add_sums total[0..3] += the sums of four registers

// Vectors of 16 bytes by the compiler's extension.
template <class Number>
struct Plain {
  using Real = Number;
  using Double = Plain<double>;
  static constexpr int kLanes = 16 / sizeof(Real);
  typedef Real V __attribute__((vector_size(16)));
  static TWA_INLINE V zero() { return V{}; }
  static TWA_INLINE V load(const Real* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static TWA_INLINE V from(const float* p) {
    V v;
    for (int j = 0; j < kLanes; ++j) v[j] = p[j];
    return v;
  }
  static TWA_INLINE V all(const Real* p) { return V{} + *p; }
  static TWA_INLINE V fma(V a, V b, V c) { return a * b + c; }
  static TWA_INLINE V sub(V a, V b) { return a - b; }
  template <class Made>
  static TWA_INLINE void store(Made* p, V v) {
    for (int j = 0; j < kLanes; ++j) p[j] = static_cast<Made>(v[j]);
  }
  static TWA_INLINE void stream(float* p, V v) { store(p, v); }
  static TWA_INLINE void prefetch(const void*) {}
  static TWA_INLINE void add_sums(const V (&v)[4], double* total) {
    for (int k = 0; k < 4; ++k)
      for (int j = 0; j < kLanes; ++j) total[k] += static_cast<double>(v[k][j]);
  }
};

#ifdef TWA_X86
struct Double8 {
  using Real = double;
  using V = __m512d;
  using Double = Double8;
  static constexpr int kLanes = 8;
  TWA_AVX512 static V zero() { return _mm512_setzero_pd(); }
  TWA_AVX512 static V load(const double* p) { return _mm512_loadu_pd(p); }
  TWA_AVX512 static V from(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  TWA_AVX512 static V all(const double* p) { return _mm512_set1_pd(*p); }
  TWA_AVX512 static V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  TWA_AVX512 static V sub(V a, V b) { return _mm512_sub_pd(a, b); }
  TWA_AVX512 static void store(double* p, V v) { _mm512_storeu_pd(p, v); }
  TWA_AVX512 static void store(float* p, V v) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(v)); }
  TWA_AVX512 static void prefetch(const void* p) { asm volatile("prefetcht1 (%0)" ::"r"(p)); }
  TWA_AVX512 static void add_sums(const V (&v)[4], double* total) {
    const V low = _mm512_add_pd(_mm512_unpacklo_pd(v[0], v[1]), _mm512_unpackhi_pd(v[0], v[1]));
    const V high = _mm512_add_pd(_mm512_unpacklo_pd(v[2], v[3]), _mm512_unpackhi_pd(v[2], v[3]));
    const V both =
        _mm512_add_pd(_mm512_shuffle_f64x2(low, high, 0x88), _mm512_shuffle_f64x2(low, high, 0xdd));
    const V sum = _mm512_add_pd(_mm512_shuffle_f64x2(both, both, 0x88),
                                _mm512_shuffle_f64x2(both, both, 0xdd));
    _mm256_storeu_pd(total, _mm256_add_pd(_mm256_loadu_pd(total), _mm512_castpd512_pd256(sum)));
  }
};
struct Float16 {
  using Real = float;
  using V = __m512;
  using Double = Double8;
  static constexpr int kLanes = 16;
  TWA_AVX512 static V zero() { return _mm512_setzero_ps(); }
  TWA_AVX512 static V load(const float* p) { return _mm512_loadu_ps(p); }
  TWA_AVX512 static V from(const float* p) { return load(p); }
  TWA_AVX512 static V all(const float* p) { return _mm512_set1_ps(*p); }
  TWA_AVX512 static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  TWA_AVX512 static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  TWA_AVX512 static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  TWA_AVX512 static void stream(float* p, V v) { _mm512_stream_ps(p, v); }
  TWA_AVX512 static void prefetch(const void* p) { asm volatile("prefetcht1 (%0)" ::"r"(p)); }
  TWA_AVX512 static void add_sums(const V (&v)[4], double* total) {
    const V low = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const V high = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const V both =
        _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44),
                      _mm512_shuffle_ps(low, high, 0xee));  // four numbers in each quarter
    const __m512d sum = _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(both)),
                                      _mm512_cvtps_pd(_mm512_extractf32x8_ps(both, 1)));
    const __m256d all = _mm256_add_pd(_mm512_castpd512_pd256(sum), _mm512_extractf64x4_pd(sum, 1));
    _mm256_storeu_pd(total, _mm256_add_pd(_mm256_loadu_pd(total), all));
  }
};
struct Double4 {
  using Real = double;
  using V = __m256d;
  using Double = Double4;
  static constexpr int kLanes = 4;
  TWA_AVX2 static V zero() { return _mm256_setzero_pd(); }
  TWA_AVX2 static V load(const double* p) { return _mm256_loadu_pd(p); }
  TWA_AVX2 static V from(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  TWA_AVX2 static V all(const double* p) { return _mm256_set1_pd(*p); }
  TWA_AVX2 static V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  TWA_AVX2 static V sub(V a, V b) { return _mm256_sub_pd(a, b); }
  TWA_AVX2 static void store(double* p, V v) { _mm256_storeu_pd(p, v); }
  TWA_AVX2 static void store(float* p, V v) { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }
  TWA_AVX2 static void prefetch(const void* p) { asm volatile("prefetcht1 (%0)" ::"r"(p)); }
  TWA_AVX2 static void add_sums(const V (&v)[4], double* total) {
    const V low = _mm256_hadd_pd(v[0], v[1]), high = _mm256_hadd_pd(v[2], v[3]);
    const V sum = _mm256_add_pd(_mm256_permute2f128_pd(low, high, 0x20),
                                _mm256_permute2f128_pd(low, high, 0x31));
    _mm256_storeu_pd(total, _mm256_add_pd(_mm256_loadu_pd(total), sum));
  }
};
struct Float8 {
  using Real = float;
  using V = __m256;
  using Double = Double4;
  static constexpr int kLanes = 8;
  TWA_AVX2 static V zero() { return _mm256_setzero_ps(); }
  TWA_AVX2 static V load(const float* p) { return _mm256_loadu_ps(p); }
  TWA_AVX2 static V from(const float* p) { return load(p); }
  TWA_AVX2 static V all(const float* p) { return _mm256_set1_ps(*p); }
  TWA_AVX2 static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  TWA_AVX2 static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  TWA_AVX2 static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  TWA_AVX2 static void stream(float* p, V v) { _mm256_stream_ps(p, v); }
  TWA_AVX2 static void prefetch(const void* p) { asm volatile("prefetcht1 (%0)" ::"r"(p)); }
  TWA_AVX2 static void add_sums(const V (&v)[4], double* total) {
    const V sum = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m256d all = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(sum)),
                                      _mm256_cvtps_pd(_mm256_extractf128_ps(sum, 1)));
    _mm256_storeu_pd(total, _mm256_add_pd(_mm256_loadu_pd(total), all));
  }
};
#endif

// Loops over a register R -------------------------------------------------------------------------

template <class R, int kRows>
TWA_INLINE void product_body(const typename R::Real* a, const typename R::Real* b, int64_t stride,
                             int64_t columns, double* total, int64_t ld, const void* next) {
  typename R::V sum[kRows][kQuad];
  for (int i = 0; i < kRows; ++i)
    for (int k = 0; k < kQuad; ++k) sum[i][k] = R::zero();
  for (int64_t c = 0; c < columns; c += R::kLanes) {
    R::prefetch(static_cast<const float*>(next) + c);
    typename R::V y[kQuad];
    for (int k = 0; k < kQuad; ++k) y[k] = R::load(b + k * stride + c);
    for (int i = 0; i < kRows; ++i) {
      const typename R::V x = R::load(a + i * stride + c);
      for (int k = 0; k < kQuad; ++k) sum[i][k] = R::fma(x, y[k], sum[i][k]);
    }
  }
  for (int i = 0; i < kRows; ++i) R::add_sums(sum[i], total + i * ld);
}

template <class R, int kRows, class Made>
TWA_INLINE void transform_body(const typename R::Real* factor, int64_t extent,
                               const typename R::Real* x, int64_t stride, Made* out,
                               int64_t out_stride, const void* next) {
  typename R::V sum[kRows][kPanel];
  for (int j = 0; j < kRows; ++j)
    for (int v = 0; v < kPanel; ++v) sum[j][v] = R::zero();
  for (int64_t k = 0; k < extent; ++k) {
    R::prefetch(static_cast<const char*>(next) + k * 64);
    typename R::V y[kPanel];
    for (int v = 0; v < kPanel; ++v) y[v] = R::load(x + k * stride + v * R::kLanes);
    for (int j = 0; j < kRows; ++j) {
      const typename R::V t = R::all(factor + k * kRows + j);
      for (int v = 0; v < kPanel; ++v) sum[j][v] = R::fma(t, y[v], sum[j][v]);
    }
  }
  for (int j = 0; j < kRows; ++j)
    for (int v = 0; v < kPanel; ++v) R::store(out + j * out_stride + v * R::kLanes, sum[j][v]);
}

// One panel of differences, and the sums of squares so far.
template <class R>
TWA_INLINE void difference_panel(const float* a, const float* b, typename R::Real* out,
                                 typename R::V (&squares)[kPanel]) {
  for (int v = 0; v < kPanel; ++v) {
    const typename R::V x = R::from(a + v * R::kLanes);
    squares[v] = R::fma(x, x, squares[v]);
    R::store(out + v * R::kLanes, b ? R::sub(x, R::from(b + v * R::kLanes)) : x);
  }
}
template <class R>
TWA_INLINE void difference_body(const float* a, const float* b, int64_t count,
                                typename R::Real* out, bool differences, double* squares) {
  using D = typename R::Double;
  constexpr int kStep = kPanel * R::kLanes;
  typename R::V of_a[kPanel];
  for (int v = 0; v < kPanel; ++v) of_a[v] = R::zero();
  int64_t c = 0;
  for (; c + kStep <= count; c += kStep)
    difference_panel<R>(a + c, b ? b + c : nullptr, out + c, of_a);
  if (c < count) {
    float end_a[kStep] = {}, end_b[kStep] = {};
    std::memcpy(end_a, a + c, static_cast<size_t>(count - c) * sizeof(float));
    if (b) std::memcpy(end_b, b + c, static_cast<size_t>(count - c) * sizeof(float));
    difference_panel<R>(end_a, end_b, out + c, of_a);
    c += kStep;
  }
  R::add_sums(of_a, squares);
  if constexpr (sizeof(typename R::Real) == sizeof(float))
    if (differences) {
      typename D::V of_out[4];
      for (int v = 0; v < 4; ++v) of_out[v] = D::zero();
      for (int64_t d = 0; d < c; d += 4 * D::kLanes)
        for (int v = 0; v < 4; ++v) {
          const typename D::V y = D::from(out + d + v * D::kLanes);
          of_out[v] = D::fma(y, y, of_out[v]);
        }
      D::add_sums(of_out, squares + 4);
    }
}

constexpr int kChains = 12;  // independent sums: more than any core's latency times its units
template <class R>
TWA_INLINE void multiply_body(int64_t turns, typename R::Real* out) {
  const typename R::Real half = 0.5;
  const typename R::V x = R::all(&half);
  typename R::V sum[kChains];
  for (int k = 0; k < kChains; ++k) sum[k] = R::zero();
  for (int64_t t = 0; t < turns; ++t)
    for (int k = 0; k < kChains; ++k) sum[k] = R::fma(sum[k], x, x);
  for (int k = 0; k < kChains; ++k) R::store(out + k * R::kLanes, sum[k]);
}

template <class R>
TWA_INLINE void finish_body(float* kept, int64_t count, Dtype dtype, void* to, bool past_cache) {
  if (dtype != Dtype::f32) {
    auto* half = static_cast<uint16_t*>(to);
    for (int64_t c = 0; c < count; ++c) {
      const uint16_t h = dtype == Dtype::bf16 ? float_to_bf16(kept[c]) : float_to_f16(kept[c]);
      if (half) half[c] = h;
      kept[c] = dtype == Dtype::bf16 ? bf16_to_float(h) : f16_to_float(h);
    }
    return;
  }
  if (!to) return;
  auto* out = static_cast<float*>(to);
  int64_t c = 0;
  if (past_cache) {  // whole cache lines; the ends as usual
    constexpr int kLine = 16;
    const auto begin = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % 64 / 4);
    for (; c < std::min((kLine - begin) % kLine, count); ++c) out[c] = kept[c];
    for (; c + kLine <= count; c += kLine)
      for (int v = 0; v < kLine; v += R::kLanes) R::stream(out + c + v, R::load(kept + c + v));
  }
  std::memcpy(out + c, kept + c, static_cast<size_t>(count - c) * sizeof(float));
}

// The loops for each instruction set --------------------------------------------------------------

// The same functions with the target that their registers need.
#ifdef TWA_X86
template <class R, int kRows>
TWA_AVX512 void product_avx512(const typename R::Real* a, const typename R::Real* b, int64_t stride,
                               int64_t columns, double* total, int64_t ld, const void* next) {
  product_body<R, kRows>(a, b, stride, columns, total, ld, next);
}
template <class R, int kRows, class Made>
TWA_AVX512 void transform_avx512(const typename R::Real* factor, int64_t extent,
                                 const typename R::Real* x, int64_t stride, Made* out,
                                 int64_t out_stride, const void* next) {
  transform_body<R, kRows>(factor, extent, x, stride, out, out_stride, next);
}
template <class R>
TWA_AVX512 void difference_avx512(const float* a, const float* b, int64_t count,
                                  typename R::Real* out, bool differences, double* squares) {
  difference_body<R>(a, b, count, out, differences, squares);
}
template <class R>
TWA_AVX512 void multiply_avx512(int64_t turns, typename R::Real* out) {
  multiply_body<R>(turns, out);
}
TWA_AVX512 inline void finish_avx512(float* kept, int64_t count, Dtype dtype, void* to,
                                     bool past_cache) {
  finish_body<Float16>(kept, count, dtype, to, past_cache);
}
template <class R, int kRows>
TWA_AVX2 void product_avx2(const typename R::Real* a, const typename R::Real* b, int64_t stride,
                           int64_t columns, double* total, int64_t ld, const void* next) {
  product_body<R, kRows>(a, b, stride, columns, total, ld, next);
}
template <class R, int kRows, class Made>
TWA_AVX2 void transform_avx2(const typename R::Real* factor, int64_t extent,
                             const typename R::Real* x, int64_t stride, Made* out,
                             int64_t out_stride, const void* next) {
  transform_body<R, kRows>(factor, extent, x, stride, out, out_stride, next);
}
template <class R>
TWA_AVX2 void difference_avx2(const float* a, const float* b, int64_t count, typename R::Real* out,
                              bool differences, double* squares) {
  difference_body<R>(a, b, count, out, differences, squares);
}
template <class R>
TWA_AVX2 void multiply_avx2(int64_t turns, typename R::Real* out) {
  multiply_body<R>(turns, out);
}
TWA_AVX2 inline void finish_avx2(float* kept, int64_t count, Dtype dtype, void* to,
                                 bool past_cache) {
  finish_body<Float8>(kept, count, dtype, to, past_cache);
}
#endif

// AVX2's 16 registers hold 3 x 4 sums and their operands; AVX-512's 32 6 x 4, but 4 x 4 are as
// fast and waste less on the diagonal.
template <class Real, class Made>
Kernels<Real, Made> kernels() {
  using Basic = Plain<Real>;
  constexpr Kernels<Real, Made> portable{
      Basic::kLanes,
      {3, product_body<Basic, 3>, transform_body<Basic, 3, Made>},
      {3, product_body<Basic, 3>, transform_body<Basic, 3, Made>},
      difference_body<Basic>,
      multiply_body<Basic>,
      finish_body<Plain<float>>};
#ifdef TWA_X86
  using Narrow = std::conditional_t<sizeof(Real) == 8, Double4, Float8>;
  using Wide = std::conditional_t<sizeof(Real) == 8, Double8, Float16>;
  constexpr Kernels<Real, Made> avx2{Narrow::kLanes,
                                     {3, product_avx2<Narrow, 3>, transform_avx2<Narrow, 3, Made>},
                                     {3, product_avx2<Narrow, 3>, transform_avx2<Narrow, 3, Made>},
                                     difference_avx2<Narrow>,
                                     multiply_avx2<Narrow>,
                                     finish_avx2};
  constexpr Kernels<Real, Made> avx512{
      Wide::kLanes,
      {4, product_avx512<Wide, 4>, transform_avx512<Wide, 4, Made>},
      {6, product_avx512<Wide, 6>, transform_avx512<Wide, 6, Made>},
      difference_avx512<Wide>,
      multiply_avx512<Wide>,
      finish_avx512};
  return isa() == Isa::avx512 ? avx512 : isa() == Isa::portable ? portable : avx2;
#else
  return portable;
#endif
}

}  // namespace
}  // namespace twa
