// orthonormalize_pass with a transform of more rows than a block holds: panels of columns by way of
// global memory, a kernel for each step (see orthonormalize.cu).
#pragma once

#include "orthonormalize.cuh"

namespace twa {
namespace {

// Each launch leaves its results to the next one; a warp alone adds to its sums, launch by launch.

constexpr int kBlock = 32;      // rows: 4 x 4 tiles are 64 registers
constexpr int kWideWarps = 16;  // of a block whose warps have operands in common

struct Slice {
  int64_t begin, end;  // chunks of the panel
};
TWA_DEVICE Slice slice_of(const Arguments& a, int64_t z) {
  const int64_t begin = z * a.per_block < a.panel ? z * a.per_block : a.panel;
  return {begin, begin + a.per_block < a.panel ? begin + a.per_block : a.panel};
}

// V = rows minus parents, and squares of rows. Warp = one row, one slice; lane = column.
TWA_KERNEL(kThreads, 4)
orthonormalize_differences_kernel(Arguments a) {
  const int64_t height = round_up(a.n, kBlock),
                i = block_index() % (height / kWarps) * kWarps + warp_index(),
                z = block_index() / (height / kWarps);
  const int lane = lane_index();
  const int64_t parent = i < a.n ? a.parent[i] : -1;
  const Slice slice = slice_of(a, z);
  Cursor at;
  double square = 0.0;
#pragma unroll 4
  for (int64_t c = slice.begin; c < slice.end; ++c) {
    at.seek(a, a.from + c);
    double w = 0.0, p = 0.0;
    if (i < a.n && lane < at.columns(a.from + c)) {
      const int64_t column = at.column(a.from + c) + lane;
      w = static_cast<double>(load_element(a.rows[at.tensor * a.n + i], column));
      if (parent >= 0)
        p = static_cast<double>(load_element(a.rows[at.tensor * a.n + parent], column));
      else if (a.center)
        p = static_cast<double>(load_element(a.center[at.tensor], column));
    }
    square = fma(w, w, square);
    a.v[(i * a.panel + c) * kChunk + lane] = w - p;
  }
  for (int h = 16; h > 0; h /= 2) square += shuffle_xor(square, h);
  if (lane == 0 && i < a.n) a.partials[z * a.stride + a.stride - round_up(a.n, 16) + i] += square;
}

// U = transform * V; with `out` rounded and stored. Warp = 32 rows of U, one chunk; block = four of
// each, so that the first-level cache has most of what they read.
TWA_KERNEL(32 * kWideWarps, 1)
orthonormalize_transform_kernel(Arguments a) {
  const int64_t height = divide_up(a.r, 4 * kBlock),
                c = block_index() / height * 4 + warp_index() % 4,
                j0 = (block_index() % height * 4 + warp_index() / 4) * kBlock;
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  if (c >= a.panel || j0 >= a.r) return;
  const int64_t stride = a.panel * kChunk;
  double made[4][4][2] = {};
  for (int64_t k0 = 0; k0 < a.n; k0 += 8) {
    double x[4][2], v[4][2];
    uint32_t any = 0;
#pragma unroll
    for (int u = 0; u < 2; ++u)  // loaded together with the transform
#pragma unroll
      for (int b = 0; b < 4; ++b) v[b][u] = a.v[(k0 + 4 * u + t) * stride + c * kChunk + 4 * g + b];
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int64_t row = j0 + 8 * j + g, k = k0 + 4 * u + t;
        x[j][u] = row < a.r && k < a.n ? a.transform[row * a.n + k] : 0.0;
        any |= x[j][u] != 0.0;
      }
    if (warp_max(any) == 0) continue;
#pragma unroll
    for (int j = 0; j < 4; j += 2)
#pragma unroll
      for (int b = 0; b < 4; ++b)
        multiply_add_f64(made[j][b], made[j + 1][b], x[j], x[j + 1], v[b]);
  }
  Cursor at;
  at.seek(a, a.from + c);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t row = j0 + 8 * j + g;
    const DeviceTensor out =
        a.out && row < a.r ? a.out[at.tensor * a.r + row] : DeviceTensor{nullptr, Dtype::f32, 0};
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int column = 4 * (2 * t + e) + b;
        double v = made[j][b][e];
        if (a.out) {
          const float stored = rounded(out.dtype, static_cast<float>(v));
          if (row >= a.first && row < a.r && column < at.columns(a.from + c))
            store_element(out, at.column(a.from + c) + column, stored);
          v = static_cast<double>(stored);
        }
        a.u[row * stride + c * kChunk + column] = v;
      }
  }
}

// probes * U. Block = one chunk; lane = column; warp = every 16th row.
TWA_KERNEL(32 * kWideWarps, 1)
orthonormalize_probe_kernel(Arguments a) {
  const int64_t c = block_index(), stride = a.panel * kChunk;
  const int lane = lane_index(), warp = warp_index();
  double* const sums = reinterpret_cast<double*>(shared_memory());  // (warps, 6, lane)
  double sum[kProbes] = {};
#pragma unroll 4
  for (int64_t j = warp; j < a.r; j += kWideWarps) {
    const double v = a.u[j * stride + c * kChunk + lane];
#pragma unroll
    for (int p = 0; p < kProbes; ++p) sum[p] = fma(a.probes[p * a.r + j], v, sum[p]);
  }
#pragma unroll
  for (int p = 0; p < kProbes; ++p) sums[(warp * kProbes + p) * 32 + lane] = sum[p];
  sync_block();
  if (warp >= kProbes) return;
  double all = 0.0;
  for (int w = 0; w < kWideWarps; ++w) all += sums[(w * kProbes + warp) * 32 + lane];
  a.s[warp * stride + c * kChunk + lane] = all;
}

// sums += U (probes * U)^T. Warp = one row, one slice.
TWA_KERNEL(kThreads, 4)
orthonormalize_probed_kernel(Arguments a) {
  const int64_t task = block_index() * kWarps + warp_index(), j = task % a.r, z = task / a.r,
                stride = a.panel * kChunk;
  const int lane = lane_index();
  if (z >= a.slices) return;
  const Slice slice = slice_of(a, z);
  double sum[kProbes] = {};
#pragma unroll 4
  for (int64_t c = slice.begin; c < slice.end; ++c) {
    const double v = a.u[j * stride + c * kChunk + lane];
#pragma unroll
    for (int p = 0; p < kProbes; ++p) sum[p] = fma(v, a.s[p * stride + c * kChunk + lane], sum[p]);
  }
#pragma unroll
  for (int p = 0; p < kProbes; ++p) {
    for (int h = 16; h > 0; h /= 2) sum[p] += shuffle_xor(sum[p], h);
    if (lane == 0) a.partials[z * a.stride + j / 8 * 64 + j % 8 * 8 + p] += sum[p];
  }
}

}  // namespace
}  // namespace twa
