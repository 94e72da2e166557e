// orthonormalize_pass:  one read of the rows, for each of the three uses of block Gram-Schmidt.
//
//   V = differences of rows;  if a transform is given: V = round(transform * V), stored in `out` where that is given;  gram += V V^T
//
//   parents only                 Gram matrix of the differences
//   with a transform             Gram matrix of what it makes of them, unrounded (float64): the second look at badly conditioned rows
//   with a transform and `out`   Q = transform * differences, rounded and stored, and Q Q^T of what was stored: the certificate
//
// Operands   rows: count * n tensors (the n rows of tensor 0 first), center: count tensors or none, parent (n,): row i becomes w_i - w_parent, or
//            w_i - center where parent is -1. transform (r, n) float64, row j nonzero only up to its extent. out: count * r tensors or null pointers.
// Work map   item = a range of columns of all tensors joined, at most kMostItems of them, fewer where n is large; its Gram matrix is its own. Inside,
//            blocks of columns that stay in the second-level cache: (a) differences of all rows, (b) transform, 6 rows x 256 bytes at a time,
//            (c) products, 6 x 4 rows at a time (AVX-512).
// Sums       float64; `fast`: float32 over at most 32 columns a lane, then float64. But squares in float64: float32 differences of float32 weights
//            are multiples of a coarse unit, residues of their squares are not symmetric, and roundings add up (2e-8 of the sum). Lanes, blocks
//            and items in a fixed order: the same bits for any number of threads (not for any instruction set).
// Bytes      n * D * input read; r * D * output written. n^2 D / 2 multiply-adds for gram, n r D / 2 for the transform.
#include <algorithm>
#include <memory>
#include <mutex>

#include "common.h"

namespace twa {
namespace {

constexpr int kPanelBytes = 256;             // of a row in the transform: 4 AVX-512 registers
constexpr int64_t kBuffer = 1 << 20;         // bytes of a block's rows, at most, where that leaves rows of a useful length
constexpr int64_t kMostColumns = 2048;       // bytes of a row of a block: 12 rows and 4 stay in the first-level cache
constexpr int64_t kMostItems = 128;          // enough for every thread to have several
constexpr int64_t kPartialBytes = 64 << 20;  // of all items' Gram matrices
constexpr int kRowMultiple = 12;             // rows of a buffer: a multiple of every tile height
constexpr int kTransformRows = 6, kProbes = 6, kProbeRows = 8;

// The innermost loops for one instruction set. Strides in elements.
template <class Real>
struct Kernels {
  int rows_a, rows_b;  // of a product tile
  // total[a * ld + b] += sum over columns of a_row * b_row, `columns` a multiple of a panel. Prefetches `columns` float32 numbers from `next` on:
  // rows of the next block, a line at a time between products. In the loop over differences they would come in a burst, which stalls a core.
  void (*product)(const Real* a, const Real* b, int64_t stride, int64_t columns, double* total, int64_t ld, const void* next);
  // out (6 rows x one panel) = transform tile (extent, 6) * rows; prefetches from `next` on, too
  void (*transform)(const Real* tile, int64_t extent, const Real* rows, int64_t stride, Real* out, int64_t out_stride, const void* next);
  // out[c] = a[c] - b[c] (b null: a[c]); squares[0] += sum of a[c]^2, and for float32 `out`, if `differences`, squares[1] += sum of out[c]^2
  void (*difference)(const float* a, const float* b, int64_t count, Real* out, bool differences, double* squares);
  // rounds to `dtype`, stores (if `to` is not null) and keeps the rounded numbers as float32; `kept` may be `from`
  void (*finish)(const Real* from, int64_t count, Dtype dtype, void* to, float* kept, bool past_cache);
};

// Portable bodies ---------------------------------------------------------------------------------------------------

template <class Real>
void product_portable(const Real* a, const Real* b, int64_t stride, int64_t columns, double* total, int64_t ld, const void*) {
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
void transform_portable(const Real* tile, int64_t extent, const Real* rows, int64_t stride, Real* out, int64_t out_stride, const void*) {
  constexpr int kColumns = kPanelBytes / sizeof(Real);
  for (int j = 0; j < kTransformRows; ++j) {
    Real sum[kColumns] = {};
    for (int64_t k = 0; k < extent; ++k)
      for (int c = 0; c < kColumns; ++c) sum[c] += tile[k * kTransformRows + j] * rows[k * stride + c];
    for (int c = 0; c < kColumns; ++c) out[j * out_stride + c] = sum[c];
  }
}

template <class Real>
TWA_INLINE void difference_body(const float* __restrict__ a, const float* __restrict__ b, int64_t count, Real* __restrict__ out, bool differences,
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
void difference_portable(const float* a, const float* b, int64_t count, Real* out, bool differences, double* squares) {
  difference_body(a, b, count, out, differences, squares);
}
template <class Real>
void finish_portable(const Real* from, int64_t count, Dtype dtype, void* to, float* kept, bool) {
  finish_body(from, count, dtype, to, kept);
}

#ifdef TWA_X86
// AVX2 and AVX-512: the same loops on registers. A register of float64 or float32 and what is done with it:
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
    const V both = _mm512_add_pd(_mm512_shuffle_f64x2(low, high, 0x88), _mm512_shuffle_f64x2(low, high, 0xdd));
    const V sum = _mm512_add_pd(_mm512_shuffle_f64x2(both, both, 0x88), _mm512_shuffle_f64x2(both, both, 0xdd));
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
    const V both = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xee));  // four numbers in each quarter
    const __m512d sum = _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(both)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(both, 1)));
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
    const V sum = _mm256_add_pd(_mm256_permute2f128_pd(low, high, 0x20), _mm256_permute2f128_pd(low, high, 0x31));
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
    const __m256d all = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(sum)), _mm256_cvtps_pd(_mm256_extractf128_ps(sum, 1)));
    _mm256_storeu_pd(total, _mm256_add_pd(_mm256_loadu_pd(total), all));
  }
};

// kA x 4 accumulators; in the transform kJ rows x kV registers. AVX-512 has 32 registers: 24 of them accumulate; AVX2 16: 12.
template <class R, int kA>
TWA_INLINE void product_body(const typename R::Real* a, const typename R::Real* b, int64_t stride, int64_t columns, double* total, int64_t ld,
                             const void* next) {
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
TWA_INLINE void transform_body(const typename R::Real* tile, int64_t extent, const typename R::Real* rows, int64_t stride, typename R::Real* out,
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
        for (int v = 0; v < kV; ++v) R::store(out + (j0 + j) * out_stride + (v0 + v) * R::kLanes, sum[j][v]);
    }
}

template <class R>
TWA_AVX512 void product_avx512(const typename R::Real* a, const typename R::Real* b, int64_t stride, int64_t columns, double* total, int64_t ld,
                               const void* next) {
  product_body<R, 6>(a, b, stride, columns, total, ld, next);
}
template <class R>
TWA_AVX512 void transform_avx512(const typename R::Real* tile, int64_t extent, const typename R::Real* rows, int64_t stride, typename R::Real* out,
                                 int64_t out_stride, const void* next) {
  transform_body<R, 6, 4>(tile, extent, rows, stride, out, out_stride, next);
}
template <class R>
TWA_AVX2 void product_avx2(const typename R::Real* a, const typename R::Real* b, int64_t stride, int64_t columns, double* total, int64_t ld,
                           const void* next) {
  product_body<R, 3>(a, b, stride, columns, total, ld, next);
}
template <class R>
TWA_AVX2 void transform_avx2(const typename R::Real* tile, int64_t extent, const typename R::Real* rows, int64_t stride, typename R::Real* out,
                             int64_t out_stride, const void* next) {
  transform_body<R, 3, 4>(tile, extent, rows, stride, out, out_stride, next);
}
template <class Real>
TWA_AVX2 void difference_avx2(const float* a, const float* b, int64_t count, Real* out, bool differences, double* squares) {
  difference_body(a, b, count, out, differences, squares);
}
template <class Real>
TWA_AVX2 void finish_avx2(const Real* from, int64_t count, Dtype dtype, void* to, float* kept, bool) {
  finish_body(from, count, dtype, to, kept);
}

TWA_AVX512 inline __m512d low_half(__m512 v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
TWA_AVX512 inline __m512d high_half(__m512 v) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); }

TWA_AVX512 void difference_avx512(const float* a, const float* b, int64_t count, double* out, bool, double* squares) {
  __m512d sum[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
  for (int64_t c = 0; c < count; c += 16) {
    const __mmask16 in = count - c >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count - c)) - 1);
    const __m512 v = _mm512_maskz_loadu_ps(in, a + c), u = b ? _mm512_maskz_loadu_ps(in, b + c) : _mm512_setzero_ps();
    sum[0] = _mm512_fmadd_pd(low_half(v), low_half(v), sum[0]);
    sum[1] = _mm512_fmadd_pd(high_half(v), high_half(v), sum[1]);
    _mm512_storeu_pd(out + c, _mm512_sub_pd(low_half(v), low_half(u)));
    _mm512_storeu_pd(out + c + 8, _mm512_sub_pd(high_half(v), high_half(u)));
  }
  squares[0] += _mm512_reduce_add_pd(_mm512_add_pd(sum[0], sum[1]));
}
TWA_AVX512 void difference_avx512(const float* a, const float* b, int64_t count, float* out, bool differences, double* squares) {
  __m512 of_a = _mm512_setzero_ps();
  __m512d sum[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
  for (int64_t c = 0; c < count; c += 16) {
    const __mmask16 in = count - c >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count - c)) - 1);
    const __m512 v = _mm512_maskz_loadu_ps(in, a + c), u = b ? _mm512_maskz_loadu_ps(in, b + c) : _mm512_setzero_ps(), d = _mm512_sub_ps(v, u);
    of_a = _mm512_fmadd_ps(v, v, of_a);
    if (differences) {
      sum[0] = _mm512_fmadd_pd(low_half(d), low_half(d), sum[0]);
      sum[1] = _mm512_fmadd_pd(high_half(d), high_half(d), sum[1]);
    }
    _mm512_storeu_ps(out + c, d);
  }
  squares[0] += _mm512_reduce_add_pd(_mm512_add_pd(low_half(of_a), high_half(of_a)));
  squares[1] += _mm512_reduce_add_pd(_mm512_add_pd(sum[0], sum[1]));
}

template <class Real>
TWA_AVX512 void finish_avx512(const Real* from, int64_t count, Dtype dtype, void* to, float* kept, bool past_cache) {
  if (dtype != Dtype::f32 || !to || !past_cache) {
    finish_body(from, count, dtype, to, kept);
    return;
  }
  auto* out = static_cast<float*>(to);
  const auto as_floats = [&](int64_t c) TWA_AVX512 {
    if constexpr (sizeof(Real) == 4)
      return _mm512_loadu_ps(from + c);
    else
      return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(_mm512_loadu_pd(from + c))), _mm512_cvtpd_ps(_mm512_loadu_pd(from + c + 8)),
                                1);
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
  for (const int64_t head = (64 - static_cast<int64_t>(reinterpret_cast<uintptr_t>(out + c) % 64)) % 64 / 4 + c; c < std::min(head, count); ++c)
    out[c] = kept[c];
  for (; c + 16 <= count; c += 16) _mm512_stream_ps(out + c, _mm512_loadu_ps(kept + c));
  for (; c < count; ++c) out[c] = kept[c];
}
#endif

template <class Real>
Kernels<Real> kernels() {
#ifdef TWA_X86
  using Wide = std::conditional_t<sizeof(Real) == 8, Double8, Float16>;
  using Narrow = std::conditional_t<sizeof(Real) == 8, Double4, Float8>;
  if (isa() == Isa::avx512) return {6, 4, product_avx512<Wide>, transform_avx512<Wide>, difference_avx512, finish_avx512<Real>};
  if (isa() == Isa::avx2) return {3, 4, product_avx2<Narrow>, transform_avx2<Narrow>, difference_avx2<Real>, finish_avx2<Real>};
#endif
  return {2, 2, product_portable<Real>, transform_portable<Real>, difference_portable<Real>, finish_portable<Real>};
}

// The pass ----------------------------------------------------------------------------------------------------------

constexpr int64_t round_up(int64_t v, int64_t multiple) { return (v + multiple - 1) / multiple * multiple; }

struct Problem {
  const TensorTable& rows;  // count * n
  const TensorTable& center;
  const TensorTable& out;  // count * r
  const int32_t* parent;
  int64_t n, r, tensors, first;
};

// Rows of a block in cache: Real numbers, `stride` apart, more than a power of two so that rows do not share cache sets.
template <class Real>
struct Buffer {
  int64_t stride;
  std::vector<Real> storage;
  Real* data;
  Buffer(int64_t rows, int64_t columns)
      : stride(columns + kPanelBytes / static_cast<int64_t>(sizeof(Real))),
        storage(static_cast<size_t>(rows * stride + 64), Real(0)),
        data(storage.data() + (64 - reinterpret_cast<uintptr_t>(storage.data()) % 64) % 64 / sizeof(Real)) {}
  Real* row(int64_t i) { return data + i * stride; }
};

// Buffers of one thread; fresh memory for every item would cost as much as a tenth of the pass.
template <class Real, class Made>
struct Workspace {
  Buffer<Real> rows;
  Buffer<Made> made;
  std::vector<float> scratch;
  std::vector<Real> strip;
  Workspace(int64_t n, int64_t made_rows, int64_t block)
      : rows(round_up(n, kRowMultiple), block),
        made(made_rows, made_rows ? block : 0),
        scratch(static_cast<size_t>(2 * block)),
        strip(static_cast<size_t>(made_rows ? kTransformRows * block : 0)) {}
};
template <class T>
class Idle {
 public:
  template <class Make>
  std::unique_ptr<T> take(const Make& make) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!items_.empty()) {
        std::unique_ptr<T> item = std::move(items_.back());
        items_.pop_back();
        return item;
      }
    }
    return make();
  }
  void give(std::unique_ptr<T> item) {
    std::lock_guard<std::mutex> lock(mutex_);
    items_.push_back(std::move(item));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<T>> items_;
};

template <class Real>
int64_t block_columns(int64_t n) {
  constexpr int64_t size = sizeof(Real), panel = kPanelBytes / size;
  return std::clamp(kBuffer / (n * size) / panel * panel, kMostColumns / 2 / size, kMostColumns / size);
}

// Row k of tensor t from `column` on as float32: in place, or converted into scratch.
const float* as_float(const TensorTable& table, int64_t at, int64_t column, int64_t count, float* scratch) {
  const Dtype dtype = table.dtype[at];
  if (dtype == Dtype::f32) return static_cast<const float*>(table.data[at]) + column;
  const auto* half = static_cast<const uint16_t*>(table.data[at]) + column;
  for (int64_t c = 0; c < count; ++c) scratch[c] = dtype == Dtype::bf16 ? bf16_to_float(half[c]) : f16_to_float(half[c]);
  return scratch;
}

// Where the next block's rows lie, for prefetches: row by row, then nothing more.
struct Ahead {
  const TensorTable* rows = nullptr;
  int64_t at = 0, end = 0, column = 0;  // entries [at, end) of the table
  const void* next(const void* otherwise) {
    if (at >= end) return otherwise;
    const int64_t k = at++;
    return static_cast<const char*>(rows->data[k]) + column * (rows->dtype[k] == Dtype::f32 ? 4 : 2);
  }
};

// 12 rows a at a time, which stay in the first-level cache: total[i, k] += products of rows a[i], i in [first, count), and b[k], k <= i where
// `triangular` (and some more of the same tile, which nobody reads), else k < width.
template <class Real>
void add_products(const Kernels<Real>& kernel, const Real* a, const Real* b, int64_t stride, int64_t first, int64_t count, int64_t width,
                  bool triangular, int64_t columns, double* total, int64_t ld, Ahead& ahead) {
  for (int64_t i0 = first / kRowMultiple * kRowMultiple; i0 < count; i0 += kRowMultiple) {
    const int64_t i1 = std::min(i0 + kRowMultiple, count);
    for (int64_t k = 0; k < (triangular ? i1 : width); k += kernel.rows_b)
      for (int64_t i = i0; i < i1; i += kernel.rows_a)
        if (!triangular || k < i + kernel.rows_a)
          kernel.product(a + i * stride, b + k * stride, stride, columns, total + i * ld + k, ld, ahead.next(a + i * stride));
  }
}

// The transform in tiles of 6 rows: (extent, 6) numbers each, so that they are read in order.
template <class Real>
struct Transform {
  struct Tile {
    int64_t begin, extent;
  };
  std::vector<Tile> tiles;
  std::vector<Real> values;
  Transform(const double* transform, int64_t r, int64_t n) {
    for (int64_t j0 = 0; j0 < r; j0 += kTransformRows) {
      int64_t extent = 0;
      for (int64_t j = j0; j < std::min(j0 + kTransformRows, r); ++j)
        for (int64_t k = 0; k < n; ++k)
          if (transform[j * n + k] != 0.0) extent = std::max(extent, k + 1);
      tiles.push_back({static_cast<int64_t>(values.size()), extent});
      for (int64_t k = 0; k < extent; ++k)
        for (int64_t j = j0; j < j0 + kTransformRows; ++j) values.push_back(j < r ? static_cast<Real>(transform[j * n + k]) : Real(0));
    }
  }
};

// Real: differences and the transform; Made: what the transform makes, whose products are summed (float32 for stored results).
template <class Real, class Made>
void run(const Problem& p, const Transform<Real>* transform, const Transform<Made>* probes, double* gram, double* norms, int threads) {
  const Kernels<Real> kernel = kernels<Real>();
  const Kernels<Made> made_kernel = kernels<Made>();
  constexpr int64_t kPanel = kPanelBytes / static_cast<int64_t>(sizeof(Real)), kMadePanel = kPanelBytes / static_cast<int64_t>(sizeof(Made));
  const int64_t n = p.n, r = p.r, block = block_columns<Real>(n);
  const int64_t m = transform ? r : n, height = round_up(m, kRowMultiple), width = probes ? kProbeRows : height;
  int64_t total = 0;
  std::vector<int64_t> begin;  // first column of each tensor, all joined
  for (int64_t t = 0; t < p.tensors; ++t) begin.push_back(total), total += p.rows.numel[t];
  const int64_t partial = height * width + round_up(2 * n, 8);
  const int64_t most = std::clamp<int64_t>(kPartialBytes / (partial * 8), 2, kMostItems);
  const int64_t per_item = std::max(round_up((total + most - 1) / most, block), block), items = (total + per_item - 1) / per_item;
  const std::unique_ptr<double[]> partials(new double[static_cast<size_t>(items * partial)]);
  const bool past_cache = total * r * 4 > 8 << 20;

  Idle<Workspace<Real, Made>> idle;
  parallel_for(items, threads, [&](int64_t item) {
    double *sums = partials.get() + item * partial, *squares = sums + height * width;
    std::fill(sums, sums + partial, 0.0);
    auto workspace =
        idle.take([&] { return std::make_unique<Workspace<Real, Made>>(n, transform ? height + (probes ? kRowMultiple : 0) : 0, block); });
    Buffer<Real>& rows = workspace->rows;
    Buffer<Made>& made = workspace->made;
    std::vector<float>& scratch = workspace->scratch;
    std::vector<Real>& strip = workspace->strip;
    const int64_t end = std::min(total, (item + 1) * per_item);
    int64_t t = std::upper_bound(begin.begin(), begin.end(), item * per_item) - begin.begin() - 1;
    for (int64_t at = item * per_item; at < end;) {
      while (at >= begin[t] + p.rows.numel[t]) ++t;  // past empty tensors, too
      const int64_t column = at - begin[t], count = std::min({block, end - at, p.rows.numel[t] - column}), padded = round_up(count, kPanel);
      for (int64_t i = 0; i < n; ++i) {
        const float* a = as_float(p.rows, t * n + i, column, count, scratch.data());
        const int32_t parent = p.parent[i];
        const float* b = parent >= 0      ? as_float(p.rows, t * n + parent, column, count, scratch.data() + block)
                         : p.center.count ? as_float(p.center, t, column, count, scratch.data() + block)
                                          : nullptr;
        kernel.difference(a, b, count, rows.row(i), !transform, squares + 2 * i);
        std::fill(rows.row(i) + count, rows.row(i) + padded, Real(0));
      }
      Ahead ahead;
      if (column + count + block <= p.rows.numel[t]) ahead = {&p.rows, t * n, t * n + n, column + count};
      if (!transform) {
        add_products(kernel, rows.data, rows.data, rows.stride, p.first, n, n, true, padded, sums, width, ahead);
      } else {
        for (size_t tile = 0; tile < transform->tiles.size(); ++tile) {
          const auto [from, extent] = transform->tiles[tile];
          const int64_t j0 = static_cast<int64_t>(tile) * kTransformRows;
          // Straight to its place where nothing has to be rounded on the way.
          Real* to = strip.data();
          int64_t stride = block;
          if constexpr (std::is_same_v<Real, Made>) to = made.row(j0), stride = made.stride;
          for (int64_t c = 0; c < padded; c += kPanel)
            kernel.transform(transform->values.data() + from, extent, rows.data + c, rows.stride, to + c, stride, ahead.next(rows.data));
          if constexpr (std::is_same_v<Made, float>)
            for (int64_t j = j0; j < std::min(j0 + kTransformRows, r) && p.out.count; ++j) {
              const Dtype dtype = p.out.dtype[t * r + j];
              char* out = j >= p.first ? static_cast<char*>(p.out.data[t * r + j]) : nullptr;
              if (out) out += column * (dtype == Dtype::f32 ? 4 : 2);
              kernel.finish(to + (j - j0) * stride, count, dtype, out, made.row(j), past_cache);
              std::fill(made.row(j) + count, made.row(j) + round_up(count, kMadePanel), 0.0f);
            }
        }
        const int64_t columns = round_up(count, kMadePanel);
        if (probes) {
          for (int64_t c = 0; c < columns; c += kMadePanel)
            made_kernel.transform(probes->values.data(), probes->tiles[0].extent, made.data + c, made.stride, made.row(height) + c, made.stride,
                                  made.data);
          add_products(made_kernel, made.data, made.row(height), made.stride, 0, r, kProbeRows, false, columns, sums, width, ahead);
        } else {
          add_products(made_kernel, made.data, made.data, made.stride, p.first, r, r, true, columns, sums, width, ahead);
        }
      }
      at += count;
    }
#ifdef TWA_X86
    _mm_sfence();
#endif
    idle.give(std::move(workspace));
  });
  const auto sum_over_items = [&](int64_t from, int64_t count, double* to) {
    std::fill(to, to + count, 0.0);
    for (int64_t item = 0; item < items; ++item)
      for (int64_t k = 0; k < count; ++k) to[k] += partials[item * partial + from + k];
  };
  std::vector<double> squares(static_cast<size_t>(2 * n));
  sum_over_items(height * width, 2 * n, squares.data());
  for (int64_t i = 0; i < n; ++i) norms[i] = squares[2 * i];
  const int64_t columns = probes ? kProbes : m;
  std::fill(gram, gram + m * columns, 0.0);
  parallel_for(m, threads, [&](int64_t i) {
    if (probes || i >= p.first) sum_over_items(i * width, probes ? kProbes : i + 1, gram + i * columns);
    if (std::is_same_v<Real, float> && !transform && i >= p.first) gram[i * columns + i] = squares[2 * i + 1];
  });
}

}  // namespace

Status orthonormalize_pass_cpu(const TensorTable& rows, const TensorTable& center, int64_t n, const int32_t* parent, const double* transform,
                               int64_t r, const double* probes, int64_t first, bool fast, const TensorTable& out, double* gram, double* norms,
                               int threads) {
  if (n < 1 || n > kMaxRows || rows.count % n != 0 || first < 0 || (transform && (r < 0 || r > n))) return Status::bad_argument;
  const int64_t tensors = rows.count / n;
  if ((center.count && center.count != tensors) || (out.count && (!transform || out.count != tensors * r))) return Status::bad_argument;
  if ((probes != nullptr) != (out.count > 0)) return Status::bad_argument;
  for (int64_t i = 0; i < n; ++i)
    if (parent[i] < -1 || parent[i] >= i) return Status::bad_argument;
  for (int64_t t = 0; t < tensors; ++t)
    if (rows.numel[t] < 0) return Status::bad_argument;
  const Problem p{rows, center, out, parent, n, transform ? r : 0, tensors, first};
  if (!transform) {
    if (fast)
      run<float, float>(p, nullptr, nullptr, gram, norms, threads);
    else
      run<double, double>(p, nullptr, nullptr, gram, norms, threads);
  } else if (!out.count) {
    const Transform<double> by(transform, r, n);
    run<double, double>(p, &by, nullptr, gram, norms, threads);
  } else {
    const Transform<float> combined(probes, kProbes, r);
    if (fast) {
      const Transform<float> by(transform, r, n);
      run<float, float>(p, &by, &combined, gram, norms, threads);
    } else {
      const Transform<double> by(transform, r, n);
      run<double, float>(p, &by, &combined, gram, norms, threads);
    }
  }
  return Status::ok;
}

}  // namespace twa
