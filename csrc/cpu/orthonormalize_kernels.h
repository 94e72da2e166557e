// The innermost loops of orthonormalize_pass on a CPU (orthonormalize.cpp): products of rows, the
// transform, differences, rounding and storing; portable, AVX2 and AVX-512, in float64 and float32.
#pragma once

#include <algorithm>

#include "common.h"

namespace twa {
namespace {

constexpr int kPanelBytes = 256;  // of a row in the transform: 4 AVX-512 registers
// Bytes of a row of a block: 12 rows and 4 stay in the first-level cache.
constexpr int64_t kMostColumns = 2048;
constexpr int kTransformRows = 6, kProbeRows = 8;

// The innermost loops for one instruction set. Strides in elements.
template <class Real>
struct Kernels {
  int rows_a, rows_b;  // of a product tile
  // total[a * ld + b] += sum over columns of a_row * b_row, `columns` a multiple of a panel.
  // Prefetches `columns` float32 numbers from `next` on: rows of the next block, a line at a time
  // between products. In the loop over differences they would come in a burst, which stalls a core.
  void (*product)(const Real* a, const Real* b, int64_t stride, int64_t columns, double* total,
                  int64_t ld, const void* next);
  // out (6 rows x one panel) = transform tile (extent, 6) * rows; prefetches from `next` on, too
  void (*transform)(const Real* tile, int64_t extent, const Real* rows, int64_t stride, Real* out,
                    int64_t out_stride, const void* next);
  // out[c] = a[c] - b[c] (b null: a[c]); squares[0] += sum of a[c]^2, and for float32 `out`, if
  // `differences`, squares[1] += sum of out[c]^2
  void (*difference)(const float* a, const float* b, int64_t count, Real* out, bool differences,
                     double* squares);
  // rounds to `dtype`, stores (if `to` is not null) and keeps the rounded numbers as float32;
  // `kept` may be `from`
  void (*finish)(const Real* from, int64_t count, Dtype dtype, void* to, float* kept,
                 bool past_cache);
};

// Portable bodies ---------------------------------------------------------------------------------

template <class Real>
void product_portable(const Real* a, const Real* b, int64_t stride, int64_t columns, double* total,
                      int64_t ld, const void*) {
  constexpr int kLanes = 8;
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 2; ++k) {
      const Real* __restrict__ x = a + i * stride, * __restrict__ y = b + k * stride;
      Real lanes[kLanes] = {};
      for (int64_t c = 0; c < columns; c += kLanes)
        for (int j = 0; j < kLanes; ++j) lanes[j] += x[c + j] * y[c + j];
      double sum = 0.0;
      for (int j = 0; j < kLanes; ++j) sum += static_cast<double>(lanes[j]);
      total[i * ld + k] += sum;
    }
}

template <class Real>
void transform_portable(const Real* tile, int64_t extent, const Real* rows, int64_t stride,
                        Real* out, int64_t out_stride, const void*) {
  constexpr int kColumns = kPanelBytes / sizeof(Real);
  for (int j = 0; j < kTransformRows; ++j) {
    Real sum[kColumns] = {};
    for (int64_t k = 0; k < extent; ++k)
      for (int c = 0; c < kColumns; ++c)
        sum[c] += tile[k * kTransformRows + j] * rows[k * stride + c];
    for (int c = 0; c < kColumns; ++c) out[j * out_stride + c] = sum[c];
  }
}

template <class Real>
TWA_INLINE void difference_body(const float* __restrict__ a, const float* __restrict__ b,
                                int64_t count, Real* __restrict__ out, bool differences,
                                double* __restrict__ squares) {
  constexpr int kLanes = 16;
  double of_a[kLanes] = {}, of_out[kLanes] = {};
  for (int64_t c0 = 0; c0 < count; c0 += kLanes) {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, count - c0));
    for (int j = 0; j < lanes; ++j) {
      const int64_t c = c0 + j;
      out[c] = b ? static_cast<Real>(a[c]) - static_cast<Real>(b[c]) : static_cast<Real>(a[c]);
      of_a[j] += static_cast<double>(a[c]) * static_cast<double>(a[c]);
      if (differences) of_out[j] += static_cast<double>(out[c]) * static_cast<double>(out[c]);
    }
  }
  for (int h = kLanes / 2; h; h /= 2)
    for (int j = 0; j < h; ++j) of_a[j] += of_a[j + h], of_out[j] += of_out[j + h];
  squares[0] += of_a[0];
  squares[1] += of_out[0];
}

template <class Real>
TWA_INLINE void finish_body(const Real* from, int64_t count, Dtype dtype, void* to, float* kept) {
  if (static_cast<const void*>(from) != kept)
    for (int64_t c = 0; c < count; ++c) kept[c] = static_cast<float>(from[c]);
  if (dtype != Dtype::f32) {
    auto* half = static_cast<uint16_t*>(to);
    for (int64_t c = 0; c < count; ++c) {
      const uint16_t h = dtype == Dtype::bf16 ? float_to_bf16(kept[c]) : float_to_f16(kept[c]);
      if (half) half[c] = h;
      kept[c] = dtype == Dtype::bf16 ? bf16_to_float(h) : f16_to_float(h);
    }
  } else if (to) {
    std::memcpy(to, kept, static_cast<size_t>(count) * sizeof(float));
  }
}

template <class Real>
void difference_portable(const float* a, const float* b, int64_t count, Real* out, bool differences,
                         double* squares) {
  difference_body(a, b, count, out, differences, squares);
}
template <class Real>
void finish_portable(const Real* from, int64_t count, Dtype dtype, void* to, float* kept, bool) {
  finish_body(from, count, dtype, to, kept);
}

#ifdef TWA_X86
// AVX2 and AVX-512: the same loops on registers. A register of float64 or float32 and what is done
// with it:
struct Double8 {
  using Real = double;
  using V = __m512d;
  static constexpr int kLanes = 8;
  TWA_AVX512 static V zero() { return _mm512_setzero_pd(); }
  TWA_AVX512 static V load(const double* p) { return _mm512_loadu_pd(p); }
  TWA_AVX512 static V all(const double* p) { return _mm512_set1_pd(*p); }
  TWA_AVX512 static V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  TWA_AVX512 static void store(double* p, V v) { _mm512_storeu_pd(p, v); }
  TWA_AVX512 static void prefetch(const void* p) { asm volatile("prefetcht1 (%0)" ::"r"(p)); }
  // total[0..3] += the sums of four registers
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
  static constexpr int kLanes = 16;
  TWA_AVX512 static V zero() { return _mm512_setzero_ps(); }
  TWA_AVX512 static V load(const float* p) { return _mm512_loadu_ps(p); }
  TWA_AVX512 static V all(const float* p) { return _mm512_set1_ps(*p); }
  TWA_AVX512 static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  TWA_AVX512 static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
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
  static constexpr int kLanes = 4;
  TWA_AVX2 static V zero() { return _mm256_setzero_pd(); }
  TWA_AVX2 static V load(const double* p) { return _mm256_loadu_pd(p); }
  TWA_AVX2 static V all(const double* p) { return _mm256_set1_pd(*p); }
  TWA_AVX2 static V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  TWA_AVX2 static void store(double* p, V v) { _mm256_storeu_pd(p, v); }
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
  static constexpr int kLanes = 8;
  TWA_AVX2 static V zero() { return _mm256_setzero_ps(); }
  TWA_AVX2 static V load(const float* p) { return _mm256_loadu_ps(p); }
  TWA_AVX2 static V all(const float* p) { return _mm256_set1_ps(*p); }
  TWA_AVX2 static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  TWA_AVX2 static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  TWA_AVX2 static void prefetch(const void* p) { asm volatile("prefetcht1 (%0)" ::"r"(p)); }
  TWA_AVX2 static void add_sums(const V (&v)[4], double* total) {
    const V sum = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m256d all = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(sum)),
                                      _mm256_cvtps_pd(_mm256_extractf128_ps(sum, 1)));
    _mm256_storeu_pd(total, _mm256_add_pd(_mm256_loadu_pd(total), all));
  }
};

// kA x 4 accumulators; in the transform kJ rows x kV registers. AVX-512 has 32 registers: 24 of
// them accumulate; AVX2 16: 12.
template <class R, int kA>
TWA_INLINE void product_body(const typename R::Real* a, const typename R::Real* b, int64_t stride,
                             int64_t columns, double* total, int64_t ld, const void* next) {
  constexpr int kB = 4;
  typename R::V sum[kA][kB];
  for (int i = 0; i < kA; ++i)
    for (int k = 0; k < kB; ++k) sum[i][k] = R::zero();
  for (int64_t c = 0; c < columns; c += R::kLanes) {
    R::prefetch(static_cast<const float*>(next) + c);
    typename R::V y[kB];
    for (int k = 0; k < kB; ++k) y[k] = R::load(b + k * stride + c);
    for (int i = 0; i < kA; ++i) {
      const typename R::V x = R::load(a + i * stride + c);
      for (int k = 0; k < kB; ++k) sum[i][k] = R::fma(x, y[k], sum[i][k]);
    }
  }
  for (int i = 0; i < kA; ++i) R::add_sums(sum[i], total + i * ld);
}
template <class R, int kJ, int kV>
TWA_INLINE void transform_body(const typename R::Real* tile, int64_t extent,
                               const typename R::Real* rows, int64_t stride, typename R::Real* out,
                               int64_t out_stride, const void* next) {
  for (int j0 = 0; j0 < kTransformRows; j0 += kJ)
    for (int v0 = 0; v0 < kPanelBytes / static_cast<int>(sizeof(typename R::V)); v0 += kV) {
      typename R::V sum[kJ][kV];
      for (int j = 0; j < kJ; ++j)
        for (int v = 0; v < kV; ++v) sum[j][v] = R::zero();
      for (int64_t k = 0; k < extent; ++k) {
        R::prefetch(static_cast<const char*>(next) + (k * 64) % (kMostColumns / 2));
        typename R::V x[kV];
        for (int v = 0; v < kV; ++v) x[v] = R::load(rows + k * stride + (v0 + v) * R::kLanes);
        for (int j = 0; j < kJ; ++j) {
          const typename R::V t = R::all(tile + k * kTransformRows + j0 + j);
          for (int v = 0; v < kV; ++v) sum[j][v] = R::fma(t, x[v], sum[j][v]);
        }
      }
      for (int j = 0; j < kJ; ++j)
        for (int v = 0; v < kV; ++v)
          R::store(out + (j0 + j) * out_stride + (v0 + v) * R::kLanes, sum[j][v]);
    }
}

template <class R>
TWA_AVX512 void product_avx512(const typename R::Real* a, const typename R::Real* b, int64_t stride,
                               int64_t columns, double* total, int64_t ld, const void* next) {
  product_body<R, 6>(a, b, stride, columns, total, ld, next);
}
template <class R>
TWA_AVX512 void transform_avx512(const typename R::Real* tile, int64_t extent,
                                 const typename R::Real* rows, int64_t stride,
                                 typename R::Real* out, int64_t out_stride, const void* next) {
  transform_body<R, 6, 4>(tile, extent, rows, stride, out, out_stride, next);
}
template <class R>
TWA_AVX2 void product_avx2(const typename R::Real* a, const typename R::Real* b, int64_t stride,
                           int64_t columns, double* total, int64_t ld, const void* next) {
  product_body<R, 3>(a, b, stride, columns, total, ld, next);
}
template <class R>
TWA_AVX2 void transform_avx2(const typename R::Real* tile, int64_t extent,
                             const typename R::Real* rows, int64_t stride, typename R::Real* out,
                             int64_t out_stride, const void* next) {
  transform_body<R, 3, 4>(tile, extent, rows, stride, out, out_stride, next);
}
template <class Real>
TWA_AVX2 void difference_avx2(const float* a, const float* b, int64_t count, Real* out,
                              bool differences, double* squares) {
  difference_body(a, b, count, out, differences, squares);
}
template <class Real>
TWA_AVX2 void finish_avx2(const Real* from, int64_t count, Dtype dtype, void* to, float* kept,
                          bool) {
  finish_body(from, count, dtype, to, kept);
}

TWA_AVX512 inline __m512d low_half(__m512 v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
TWA_AVX512 inline __m512d high_half(__m512 v) {
  return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
}

// One register: the differences, and the sums of squares so far.
struct Difference {
  __m512 short_sum;
  __m512d sum[2];
  TWA_AVX512 Difference()
      : short_sum(_mm512_setzero_ps()), sum{_mm512_setzero_pd(), _mm512_setzero_pd()} {}
  TWA_AVX512 void add_squares(__m512 v) {
    sum[0] = _mm512_fmadd_pd(low_half(v), low_half(v), sum[0]);
    sum[1] = _mm512_fmadd_pd(high_half(v), high_half(v), sum[1]);
  }
  TWA_AVX512 void step(__m512 v, __m512 u, double* out, bool) {
    const __m512d low = low_half(v), high = high_half(v);
    sum[0] = _mm512_fmadd_pd(low, low, sum[0]);
    sum[1] = _mm512_fmadd_pd(high, high, sum[1]);
    _mm512_storeu_pd(out, _mm512_sub_pd(low, low_half(u)));
    _mm512_storeu_pd(out + 8, _mm512_sub_pd(high, high_half(u)));
  }
  TWA_AVX512 void step(__m512 v, __m512 u, float* out, bool differences) {
    const __m512 d = _mm512_sub_ps(v, u);
    short_sum = _mm512_fmadd_ps(v, v, short_sum);
    if (differences) add_squares(d);
    _mm512_storeu_ps(out, d);
  }
  TWA_AVX512 double squares() const { return _mm512_reduce_add_pd(_mm512_add_pd(sum[0], sum[1])); }
  TWA_AVX512 double short_squares() const {
    return _mm512_reduce_add_pd(_mm512_add_pd(low_half(short_sum), high_half(short_sum)));
  }
};

template <class Real>
TWA_AVX512 void difference_avx512(const float* a, const float* b, int64_t count, Real* out,
                                  bool differences, double* squares) {
  Difference d;
  const __m512 none = _mm512_setzero_ps();
  int64_t c = 0;
  if (b)
    for (; c + 16 <= count; c += 16)
      d.step(_mm512_loadu_ps(a + c), _mm512_loadu_ps(b + c), out + c, differences);
  else
    for (; c + 16 <= count; c += 16) d.step(_mm512_loadu_ps(a + c), none, out + c, differences);
  if (c < count) {
    const __mmask16 in = static_cast<__mmask16>((1u << (count - c)) - 1);
    d.step(_mm512_maskz_loadu_ps(in, a + c), b ? _mm512_maskz_loadu_ps(in, b + c) : none, out + c,
           differences);
  }
  squares[0] += sizeof(Real) == 8 ? d.squares() : d.short_squares();
  if (sizeof(Real) == 4) squares[1] += d.squares();
}

template <class Real>
TWA_AVX512 void finish_avx512(const Real* from, int64_t count, Dtype dtype, void* to, float* kept,
                              bool past_cache) {
  if (dtype != Dtype::f32 || !to || !past_cache) {
    finish_body(from, count, dtype, to, kept);
    return;
  }
  auto* out = static_cast<float*>(to);
  const auto as_floats = [&](int64_t c) TWA_AVX512 {
    if constexpr (sizeof(Real) == 4)
      return _mm512_loadu_ps(from + c);
    else
      return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(_mm512_loadu_pd(from + c))),
                                _mm512_cvtpd_ps(_mm512_loadu_pd(from + c + 8)), 1);
  };
  const int64_t whole = reinterpret_cast<uintptr_t>(out) % 64 ? 0 : count / 16 * 16;
  for (int64_t c = 0; c < whole; c += 16) {
    const __m512 v = as_floats(c);
    _mm512_storeu_ps(kept + c, v);
    _mm512_stream_ps(out + c, v);
  }
  if (whole == count) return;
  finish_body(from + whole, count - whole, dtype, nullptr, kept + whole);
  int64_t c = whole;  // unaligned: whole cache lines past the cache, the ends as usual
  for (const int64_t head =
           (64 - static_cast<int64_t>(reinterpret_cast<uintptr_t>(out + c) % 64)) % 64 / 4 + c;
       c < std::min(head, count); ++c)
    out[c] = kept[c];
  for (; c + 16 <= count; c += 16) _mm512_stream_ps(out + c, _mm512_loadu_ps(kept + c));
  for (; c < count; ++c) out[c] = kept[c];
}
#endif

template <class Real>
Kernels<Real> kernels() {
  constexpr Kernels<Real> portable{2,
                                   2,
                                   product_portable<Real>,
                                   transform_portable<Real>,
                                   difference_portable<Real>,
                                   finish_portable<Real>};
#ifdef TWA_X86
  using Wide = std::conditional_t<sizeof(Real) == 8, Double8, Float16>;
  using Narrow = std::conditional_t<sizeof(Real) == 8, Double4, Float8>;
  constexpr Kernels<Real> avx2{
      3, 4, product_avx2<Narrow>, transform_avx2<Narrow>, difference_avx2<Real>, finish_avx2<Real>};
  constexpr Kernels<Real> avx512{6,
                                 4,
                                 product_avx512<Wide>,
                                 transform_avx512<Wide>,
                                 difference_avx512<Real>,
                                 finish_avx512<Real>};
  return isa() == Isa::avx512 ? avx512 : isa() == Isa::portable ? portable : avx2;
#else
  return portable;
#endif
}

}  // namespace
}  // namespace twa
