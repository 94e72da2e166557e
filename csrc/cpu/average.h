// The weighted average of some columns, shared by average() and pack().
#pragma once

#include <algorithm>

#include "quantise_vector.h"

namespace twa {

constexpr int kSpan = 1024;  // columns: a page of float32 per row, 8 KiB of sums
static_assert(kSpan % kTileColumns == 0, "sums of a tile's padding stay inside");

// out[c] = sum_i weights[i] * rows[i][begin + c] for c < count <= kSpan, in float64 in the order of
// the n rows, of which data and dtype are tables; rows of weight 0 are not read.
TWA_INLINE void average_span(void* const* data, const Dtype* dtype, int64_t n,
                             const double* weights, int64_t begin, int count,
                             float* __restrict__ out) {
  alignas(64) double sum[kSpan];
  alignas(64) float v[kTileColumns];
  for (int c = 0; c < kSpan; ++c) sum[c] = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double w = weights[i];
    if (w == 0.0) continue;
    // The same columns of the next row: each row is a stream of its own, too short for the hardware
    // to notice.
    const int64_t ahead = std::min(i + 1, n - 1), size = size_of(dtype[ahead]);
    const char* next = static_cast<const char*>(data[ahead]) + begin * size;
    for (int t = 0; t < count; t += kTileColumns) {
      const int valid = std::min(kTileColumns, count - t);
#if defined(__GNUC__)
      for (int64_t b = t * size; b < (t + kTileColumns) * size; b += 64)
        __builtin_prefetch(next + b);
#endif
      load_tile(dtype[i], data[i], begin + t, valid, v);
      double* s = sum + t;
      for (int c = 0; c < kTileColumns; ++c) s[c] += w * static_cast<double>(v[c]);  // padding is 0
    }
  }
  for (int c = 0; c < count; ++c) out[c] = static_cast<float>(sum[c]);
}

#ifdef TWA_X86
// sum += w * the columns at p.
template <class R, Dtype kDtype>
TWA_BODY inline void add_strip(const char* p, double w, typename R::D* sum) {
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k)
    R::add_product(w, R::template load_row<kDtype>(p + k * R::kLanes * size_of(kDtype)),
                   sum + 2 * k);
}
// average_span, with the sums of a strip of columns in registers: 32 columns on AVX2, 64 on
// AVX-512, of one row after the other.
template <class R>
TWA_BODY inline void average_strips(void* const* data, const Dtype* dtype, int64_t n,
                                    const double* weights, int64_t begin, int count,
                                    float* __restrict__ out) {
  constexpr int kStrip = 4 * R::kLanes, kAhead = 256;  // columns
  int c = 0;
  for (; c + kStrip <= count; c += kStrip) {
    typename R::D sum[8];
    for (int k = 0; k < 8; ++k) sum[k] = R::no_sum();
    for (int64_t i = 0; i < n; ++i) {
      const double w = weights[i];
      if (w == 0.0) continue;
      const int64_t size = size_of(dtype[i]);
      const char* p = static_cast<const char*>(data[i]) + (begin + c) * size;
      for (int64_t b = 0; b < kStrip * size; b += 64)
        asm volatile("prefetcht1 %0" ::"m"(p[kAhead * size + b]));
      switch (dtype[i]) {
        case Dtype::f32:
          add_strip<R, Dtype::f32>(p, w, sum);
          break;
        case Dtype::bf16:
          add_strip<R, Dtype::bf16>(p, w, sum);
          break;
        case Dtype::f16:
          add_strip<R, Dtype::f16>(p, w, sum);
          break;
      }
    }
    for (int k = 0; k < 8; ++k) R::store_rounded(out + c + k * R::kLanes / 2, sum[k]);
  }
  if (c < count) average_span(data, dtype, n, weights, begin + c, count - c, out + c);
}
#endif

}  // namespace twa
