// What comes between project and reconstruct: sums of partial sums, c = row_scale * sum, the
// optimizer's update of x, and x * row_scale by segment.
//
// Sums       items of a group in float32's partial sums are added in float64, four strands of every
//            fourth item and then the strands in order; groups in sixteen strands, then the strands
//            by halves. Every path adds in this order, so that a fused step has the bits of the
//            separate calls.
// Update     torch.optim.SGD and AdamW in float32; what all coefficients share is computed once in
//            float64 on the host.
#pragma once

#include <type_traits>

#include "common.h"

namespace twa {

struct UpdateArguments {
  const float* partial;    // (items, n)
  double* sums;            // (groups, n)
  const float* row_scale;  // (n, L)
  float* c;                // (n, L)
  float* x;                // (n, L), updated; null: c only
  float* first;            // (n, L) or null
  float* second;           // (n, L) or null
  float* x_rows;           // (L, n)
  DeviceWork work;
  int64_t n, num_segments;
  bool adamw, maximize, nesterov, fresh;
  float lr;     // sgd: learning rate; adamw: divided by the first moment's bias correction
  float decay;  // sgd: weight decay; adamw: 1 - lr * weight decay
  float w1;     // sgd: momentum; adamw: 1 - beta1
  float w2;     // sgd: 1 - dampening; adamw: 1 - beta2
  float beta2, root, eps;    // adamw; root: of the second moment's bias correction
  const float* corrections;  // (2,) lr and root in device memory instead, or null
};

// Groups of 32 rows, one a lane.
TWA_HD constexpr int64_t row_chunks(int64_t n) { return (n + 31) / 32; }
// sums[group] for rows 32 * chunk + lane, by the whole block. strands: (kWarps, 32) in shared
// memory.
TWA_DEVICE void sum_group(const UpdateArguments& a, int64_t group, int64_t chunk, double* strands) {
  const int64_t row = 32 * chunk + lane_index();
  const int begin = a.work.group_begin[group], end = a.work.group_begin[group + 1];
  double total = 0.0;
  if (row < a.n) {
#pragma unroll 4
    for (int i = begin + warp_index(); i < end; i += kWarps)
      total += static_cast<double>(load_shared_by_all(a.partial + i * a.n + row));
  }
  strands[thread_index()] = total;
  sync_block();
  if (warp_index() == 0 && row < a.n) {
    for (int w = 1; w < kWarps; ++w) total += strands[32 * w + lane_index()];
    a.sums[group * a.n + row] = total;
  }
  sync_block();
}

// c, x, moments and x_rows of one row and segment.
TWA_DEVICE void update_row(const UpdateArguments& a, int64_t segment, int64_t row) {
  // Sixteen strands, so that as many loads are on their way: the last block of a segment, or a
  // segment that is the whole model, adds thousands.
  constexpr int kStrands = 16;
  double strand[kStrands] = {};
  const int begin = a.work.segment_groups[segment], end = a.work.segment_groups[segment + 1];
  for (int group = begin; group < end; group += kStrands) {
#pragma unroll
    for (int k = 0; k < kStrands; ++k)
      if (group + k < end) strand[k] += load_shared_by_all(a.sums + (group + k) * a.n + row);
  }
  const auto add = [&](auto half) {
#pragma unroll
    for (int k = 0; k < decltype(half)::value; ++k) strand[k] += strand[k + decltype(half)::value];
  };
  using std::integral_constant;
  add(integral_constant<int, 8>()), add(integral_constant<int, 4>()),
      add(integral_constant<int, 2>()), add(integral_constant<int, 1>());
  const double total = strand[0];
  const int64_t at = row * a.num_segments + segment;
  const float scale = a.row_scale[at];
  float g = static_cast<float>(total * static_cast<double>(scale));
  a.c[at] = g;
  if (a.x == nullptr) return;
  if (a.maximize) g = -g;
  float value = a.x[at];
  if (a.adamw) {
    float mean = a.first[at], square = a.second[at];
    value = value * a.decay;
    mean = a.w1 < 0.5f ? mean + a.w1 * (g - mean)
                       : g - (g - mean) * (1.0f - a.w1);  // torch.lerp, exact at both ends
    square = square * a.beta2 + a.w2 * g * g;
    const float lr = a.corrections ? load_shared_by_all(a.corrections) : a.lr,
                root = a.corrections ? load_shared_by_all(a.corrections + 1) : a.root;
    value = value - divide(lr * mean, divide(square_root(square), root) + a.eps);
    a.first[at] = mean, a.second[at] = square;
  } else {
    g = g + a.decay * value;
    if (a.first) {
      const float buffer = a.fresh ? g : a.first[at] * a.w1 + a.w2 * g;
      a.first[at] = buffer;
      g = a.nesterov ? g + a.w1 * buffer : buffer;
    }
    value = value - a.lr * g;
  }
  a.x[at] = value;
  a.x_rows[segment * a.n + row] = value * scale;
}

}  // namespace twa
