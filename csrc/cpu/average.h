// The weighted average of some columns, shared by average() and pack().
#pragma once

#include <algorithm>

#include "common.h"

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
    const int64_t ahead = std::min(i + 1, n - 1), size = dtype[ahead] == Dtype::f32 ? 4 : 2;
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

}  // namespace twa
