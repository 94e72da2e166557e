// step:  c = project(g);  x = optimizer(x, c);  out = center + x^T P, segment by segment.
//
// Operands   as project and reconstruct; x and the optimizer's state (n, L) fp32, updated in place;
//            c (n, L) fp32, written.
// Work map   first pass: a resident segment, of at most kResidentBytes of codes and a thread's
//            share of all of them, is one item, in which one thread projects, updates and
//            reconstructs, so that the second read of its codes hits the core's cache; other
//            segments are projected by blocks. Second pass: the others' blocks are reconstructed,
//            the most recently read first.
// Bytes      codes of resident segments once, of others twice; gradient, center and out once.
// Bits       the same as project_cpu, the update, and reconstruct_cpu one after the other.
#include <algorithm>
#include <cmath>

#include "common.h"

namespace twa {
namespace {

constexpr int64_t kResidentBytes =
    int64_t{1} << 20;  // half of the second-level cache of a current server core

// torch.optim.SGD and AdamW on one number, in float32 as they compute, with what all numbers share
// computed once in float64.
struct Rule {
  bool adamw, maximize, nesterov, fresh;
  float lr, decay, momentum, dampened;        // sgd; decay: weight decay
  float shrink, w1, b2, w2, root, size, eps;  // adamw; root: of the second moment's bias correction

  explicit Rule(const Update& u)
      : adamw(u.rule == Update::Rule::adamw),
        maximize(u.maximize),
        nesterov(u.nesterov),
        fresh(u.step == 1),
        lr(static_cast<float>(u.lr)),
        decay(static_cast<float>(u.weight_decay)),
        momentum(static_cast<float>(u.momentum)),
        dampened(static_cast<float>(1.0 - u.dampening)),
        shrink(static_cast<float>(1.0 - u.lr * u.weight_decay)),
        w1(static_cast<float>(1.0 - u.beta1)),
        b2(static_cast<float>(u.beta2)),
        w2(static_cast<float>(1.0 - u.beta2)),
        root(static_cast<float>(std::sqrt(1.0 - std::pow(u.beta2, static_cast<double>(u.step))))),
        size(static_cast<float>(u.lr / (1.0 - std::pow(u.beta1, static_cast<double>(u.step))))),
        eps(static_cast<float>(u.eps)) {}

  void operator()(float g, float* x, float* first, float* second) const {
    if (maximize) g = -g;
    if (adamw) {
      *x *= shrink;
      *first = w1 < 0.5f ? *first + w1 * (g - *first)
                         : g - (g - *first) * (1.0f - w1);  // torch.lerp, exact at both ends
      *second = *second * b2 + w2 * g * g;
      *x -= size * *first / (std::sqrt(*second) / root + eps);
      return;
    }
    if (decay != 0.0f) g += decay * *x;
    if (momentum != 0.0f) {
      *first = fresh ? g : *first * momentum + dampened * g;
      g = nesterov ? g + momentum * *first : *first;
    }
    *x -= lr * g;
  }
};

}  // namespace

Status step_cpu(const BasisView& basis, const TensorTable& grads, const Update& update,
                const Coefficients& coefficients, const TensorTable& center, const TensorTable& out,
                float* c, int threads) {
  const int64_t n = basis.n, segments = basis.num_segments;
  float *const x = coefficients.x, *const first = coefficients.first,
               *const second = coefficients.second;
  if (!valid_bits(basis.bits) || n < 1 || n > kMaxRows || total_tiles(out) != basis.num_tiles ||
      grads.count != out.count || update.step < 1 || (!first && update.keeps_first()) ||
      (!second && update.keeps_second()))
    return Status::bad_argument;
  const std::vector<Block> blocks =
      make_blocks(out.numel, out.count, basis.tile_segment, kBlockTiles);
  if (!in_segments(blocks, segments)) return Status::bad_argument;
  std::vector<std::vector<int64_t>> of_segment(segments);  // blocks in order
  std::vector<int64_t> bytes(segments, 0);
  int64_t total_bytes = 0;
  for (size_t k = 0; k < blocks.size(); ++k) {
    const int64_t size = blocks[k].tiles * n * row_bytes(basis.bits);
    of_segment[blocks[k].segment].push_back(static_cast<int64_t>(k));
    bytes[blocks[k].segment] += size;
    total_bytes += size;
  }
  // Items of the first pass: (segment, -1) or (segment, one block).
  struct Item {
    int64_t segment, block;
  };
  std::vector<Item> items;
  std::vector<int64_t> shared;  // segments that several threads work on
  for (int64_t l = 0; l < segments; ++l) {
    if (bytes[l] <= kResidentBytes && bytes[l] * threads <= total_bytes) {
      items.push_back({l, -1});
    } else {
      shared.push_back(l);
      for (const int64_t k : of_segment[l]) items.push_back({l, k});
    }
  }
  std::vector<double> partial(blocks.size() * n, 0.0);
  std::vector<float> scaled(segments * n);
  const Rule rule(update);
  const ProjectBlock project = project_block(basis.bits);
  const ReconstructBlock reconstruct = reconstruct_block(basis.bits);
  const auto project_one = [&](int64_t k) {
    if (!grads.data[blocks[k].tensor]) return;  // an absent gradient: zero
    project_partial(project, basis, grads, blocks[k], partial.data() + k * n);
  };
  const auto update_segment = [&](int64_t l) {
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0.0;
      for (const int64_t k : of_segment[l]) sum += partial[k * n + i];
      const int64_t at = i * segments + l;
      c[at] = static_cast<float>(sum * basis.row_scale[at]);
      rule(c[at], x + at, first ? first + at : nullptr, second ? second + at : nullptr);
      scaled[l * n + i] = x[at] * basis.row_scale[at];
    }
  };
  const auto reconstruct_one = [&](const Block& b) {
    if (!out.data[b.tensor]) return;  // an absent output: left alone
    reconstruct(basis, scaled.data() + b.segment * n, center, out, b);
  };
  parallel_for(static_cast<int64_t>(items.size()), threads, [&](int64_t item) {
    const auto [l, block] = items[item];
    if (block >= 0) return project_one(block);
    for (const int64_t k : of_segment[l]) project_one(k);
    update_segment(l);
    for (auto k = of_segment[l].rbegin(); k != of_segment[l].rend(); ++k)
      reconstruct_one(blocks[*k]);
  });
  std::vector<int64_t> rest;
  for (const int64_t l : shared) {
    update_segment(l);
    rest.insert(rest.end(), of_segment[l].begin(), of_segment[l].end());
  }
  const int64_t count = static_cast<int64_t>(rest.size());
  parallel_for(count, threads,
               [&](int64_t item) { reconstruct_one(blocks[rest[count - 1 - item]]); });
  return Status::ok;
}

}  // namespace twa
