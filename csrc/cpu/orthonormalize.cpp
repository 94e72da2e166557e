// orthonormalize_pass:  one read of the rows, for each of the three uses of block Gram-Schmidt.
//
//   V = differences of rows
//   with a transform: V = round(transform * V), stored in `out` where that is given
//   gram += V V^T
//
//   parents only                 Gram matrix of the differences
//   with a transform             Gram matrix of what it makes of them, unrounded (float64): the
//                                second look at badly conditioned rows
//   with a transform and `out`   Q = transform * differences, rounded and stored, and Q Q^T of what
//                                was stored: the certificate
//
// Operands   rows: count * n tensors (the n rows of tensor 0 first), center: count tensors or none,
//            parent (n,): row i becomes w_i - w_parent, or w_i - center where parent is -1.
//            transform (r, n) float64, row j nonzero only up to its extent. out: count * r tensors
//            or null pointers.
// Work map   item = a range of columns of all tensors joined, at most kMostItems of them, fewer
//            where n is large; its Gram matrix is its own. Inside, blocks of columns that stay in
//            the second-level cache: (a) differences of all rows, (b) transform, a tile of rows x
//            4 registers at a time, (c) stores, (d) products, a tile x 4 rows at a time.
// Sums       float64; `fast`: float32 over at most 64 columns a lane, then float64. But squares in
//            float64: float32 differences of float32 weights are multiples of a coarse unit,
//            residues of their squares are not symmetric, and roundings add up (2e-8 of the sum).
//            Lanes, blocks and items in a fixed order: the same bits for any number of threads (not
//            for any instruction set).
// Bytes      n * D * input read; r * D * output written. n^2 D / 2 multiply-adds for gram, n r D /
//            2 for the transform.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>

#include "orthonormalize_kernels.h"

namespace twa {
namespace {

// Bytes of a block's rows, at most, where they are transformed and that leaves half of their
// length.
constexpr int64_t kBuffer = 1 << 20;
constexpr int64_t kMostItems = 128;          // enough for every thread to have several
constexpr int64_t kPartialBytes = 64 << 20;  // of all items' Gram matrices
constexpr int kRowMultiple = 12;             // rows of a buffer: a multiple of every tile's
constexpr int64_t kGroup = 24;  // rows of a product that stay in cache while the others go by
constexpr int kSquares = 8;     // sums of a row's squares: four of the row, four of its differences

// The pass ----------------------------------------------------------------------------------------

constexpr int64_t round_up(int64_t v, int64_t multiple) {
  return (v + multiple - 1) / multiple * multiple;
}

struct Problem {
  const RowTable& rows;
  const TensorTable& out;  // count * r
  const GramSchmidtPass& pass;
  int64_t n, r;  // r: 0 without a transform
};

// Rows of zeros on cache lines of their own, `stride` apart: in a block more than a power of two,
// so that rows do not share cache sets. Zeros of large buffers are those of fresh pages.
template <class Real>
class Buffer {
 public:
  Buffer(int64_t rows, int64_t columns)
      : stride(round_up(columns, kLine)),
        storage_(std::calloc(static_cast<size_t>(rows * stride + kLine), sizeof(Real))) {
    if (!storage_) throw std::bad_alloc();
    const auto begin = reinterpret_cast<uintptr_t>(storage_.get());
    data = reinterpret_cast<Real*>((begin + kLineBytes - 1) / kLineBytes * kLineBytes);
    advise_huge_pages(data, rows * stride * static_cast<int64_t>(sizeof(Real)));
  }
  Real* row(int64_t i) { return data + i * stride; }

  int64_t stride;
  Real* data;

 private:
  static constexpr int64_t kLineBytes = 128, kLine = kLineBytes / sizeof(Real);
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> storage_;
};

// Buffers of one thread; fresh memory for every item would cost as much as a tenth of the pass.
template <class Real, class Made>
struct Workspace {
  Buffer<Real> rows;
  Buffer<Made> made;
  std::vector<float> scratch;
  Workspace(int64_t n, int64_t made_rows, int64_t block, int64_t panel)
      : rows(round_up(n, kRowMultiple), block + panel),
        made(made_rows, made_rows ? block + panel : 0),
        scratch(static_cast<size_t>(2 * block)) {}
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

// A row from `column` on as float32: in place, or converted into scratch.
const float* as_float(const void* data, Dtype dtype, int64_t column, int64_t count,
                      float* scratch) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data) + column;
  const auto* half = static_cast<const uint16_t*>(data) + column;
  for (int64_t c = 0; c < count; ++c)
    scratch[c] = dtype == Dtype::bf16 ? bf16_to_float(half[c]) : f16_to_float(half[c]);
  return scratch;
}

// Where the next block's rows lie, for prefetches: row by row, twice (a core drops some), then
// nothing more.
struct Ahead {
  const RowTable* rows = nullptr;
  int64_t tensor = 0, column = 0, count = 0;
  int64_t at = 0, bytes = 0;  // of 2 n rows; of that row
  // Where a loop that will prefetch so many bytes begins.
  const void* next(int64_t many, const void* otherwise) {
    if (!rows || at >= 2 * rows->n) return otherwise;
    const int64_t k = tensor * rows->n + at % rows->n, size = size_of(rows->dtype[k]);
    const void* from = static_cast<const char*>(rows->data[k]) + column * size + bytes;
    bytes += many;
    if (bytes >= count * size) ++at, bytes = 0;
    return from;
  }
};

// total[i, k] += products of rows a[i] and b[k], for k from `first` on and i < height; i <= k where
// `triangular` (and some more of the same tile, which nobody reads).
template <class Real, class Made>
void add_products(const Tile<Real, Made>& tile, const Real* a, const Real* b, int64_t stride,
                  int64_t height, int64_t first, int64_t count, bool triangular, int64_t columns,
                  double* total, int64_t ld, Ahead& ahead) {
  for (int64_t i0 = 0; i0 < height; i0 += kGroup)
    for (int64_t k = std::max(first, triangular ? i0 : 0) / kQuad * kQuad; k < count; k += kQuad)
      for (int64_t i = i0; i < std::min({i0 + kGroup, height, triangular ? k + kQuad : height});
           i += tile.rows)
        tile.product(a + i * stride, b + k * stride, stride, columns, total + i * ld + k, ld,
                     ahead.next(columns * 4, a + i * stride));
}

// The transform in tiles of `height` rows: (extent, height) numbers each, read in order.
template <class Real>
struct Transform {
  struct Part {
    int64_t begin, extent;
  };
  int64_t height;
  std::vector<Part> parts;
  std::vector<Real> values;
  Transform(const double* transform, int64_t r, int64_t n, int64_t height) : height(height) {
    for (int64_t j0 = 0; j0 < r; j0 += height) {
      int64_t extent = 0;
      for (int64_t j = j0; j < std::min(j0 + height, r); ++j)
        for (int64_t k = 0; k < n; ++k)
          if (transform[j * n + k] != 0.0) extent = std::max(extent, k + 1);
      parts.push_back({static_cast<int64_t>(values.size()), extent});
      for (int64_t k = 0; k < extent; ++k)
        for (int64_t j = j0; j < j0 + height; ++j)
          values.push_back(j < r ? static_cast<Real>(transform[j * n + k]) : Real(0));
    }
  }
  // out = transform * rows, a panel at a time, whose rows stay in the first-level cache.
  template <class Made>
  void apply(const Tile<Real, Made>& tile, const Real* rows, int64_t stride, int64_t columns,
             int64_t panel, Made* out, int64_t out_stride, Ahead& ahead) const {
    for (int64_t c = 0; c < columns; c += panel)
      for (size_t k = 0; k < parts.size(); ++k)
        tile.transform(values.data() + parts[k].begin, parts[k].extent, rows + c, stride,
                       out + static_cast<int64_t>(k) * height * out_stride + c, out_stride,
                       ahead.next(parts[k].extent * 64, rows + c));
  }
};

// Real: differences and the transform; Made: what the transform makes, whose products are summed
// (float32 for stored results).
template <class Real, class Made>
void run(const Problem& p, int threads) {
  const RowTable& rows_in = p.rows;
  const int64_t lowest = p.pass.first, n = p.n, r = p.r;
  const bool transformed = p.pass.transform, stored = p.out.count;
  double *gram = p.pass.gram, *norms = p.pass.norms;
  const Kernels<Real, Made> kernel = kernels<Real, Made>();
  const Kernels<Made, Made> made_kernel = kernels<Made, Made>();
  const Transform<Real> by(p.pass.transform, r, n, kernel.tile.rows);
  const Transform<Made> probes(p.pass.probes, stored ? kProbes : 0, r, made_kernel.probe.rows);
  const int64_t panel = kPanel * kernel.lanes, made_panel = kPanel * made_kernel.lanes,
                most = kMostVectors * kernel.lanes,
                in_cache = kBuffer / (n * static_cast<int64_t>(sizeof(Real))),
                block = transformed ? std::clamp(in_cache / made_panel * made_panel, most / 2, most)
                                    : most;
  // Products of a[0 .. height) with m rows.
  const int64_t m = transformed ? r : n, width = round_up(m, kRowMultiple),
                height = stored ? kProbes : m;
  int64_t total = 0;
  std::vector<int64_t> begin;  // first column of each tensor, all joined
  for (int64_t t = 0; t < rows_in.count; ++t) begin.push_back(total), total += rows_in.numel[t];
  const int64_t products = round_up(height, kRowMultiple) * width,
                partial = products + kSquares * n;
  const int64_t most_items = std::clamp<int64_t>(kPartialBytes / (partial * 8), 2, kMostItems),
                per_item = std::max(round_up((total + most_items - 1) / most_items, block), block),
                items = (total + per_item - 1) / per_item;
  Buffer<double> partials(std::max<int64_t>(items, 1), partial);
  const bool past_cache = total * r * 4 > 8 << 20;

  Idle<Workspace<Real, Made>> idle;
  parallel_for(items, threads, [&](int64_t item) {
    double *sums = partials.row(item), *squares = sums + products;
    auto workspace = idle.take([&] {
      return std::make_unique<Workspace<Real, Made>>(
          n, transformed ? width + (stored ? kProbes : 0) : 0, block, made_panel);
    });
    Buffer<Real>& rows = workspace->rows;
    Buffer<Made>& made = workspace->made;
    std::vector<float>& scratch = workspace->scratch;
    const int64_t end = std::min(total, (item + 1) * per_item);
    int64_t t = std::upper_bound(begin.begin(), begin.end(), item * per_item) - begin.begin() - 1;
    for (int64_t at = item * per_item; at < end;) {
      while (at >= begin[t] + rows_in.numel[t]) ++t;  // past empty tensors, too
      const int64_t column = at - begin[t],
                    count = std::min({block, end - at, rows_in.numel[t] - column}),
                    columns = round_up(count, made_panel);
      for (int64_t i = 0; i < n; ++i) {
        const auto row = [&](int64_t k, float* to) {
          return as_float(rows_in.data[t * n + k], rows_in.dtype[t * n + k], column, count, to);
        };
        const float* a = row(i, scratch.data());
        const int32_t parent = p.pass.parent[i];
        const float* b = parent >= 0      ? row(parent, scratch.data() + block)
                         : rows_in.center ? as_float(rows_in.center[t], rows_in.center_dtype[t],
                                                     column, count, scratch.data() + block)
                                          : nullptr;
        kernel.difference(a, b, count, rows.row(i), !transformed, squares + kSquares * i);
        const int64_t done = round_up(count, panel);
        std::fill(rows.row(i) + std::min(done, columns), rows.row(i) + columns, Real(0));
      }
      Ahead ahead;
      if (column + count + block <= rows_in.numel[t]) ahead = {&rows_in, t, column + count, block};
      if (!transformed) {
        if constexpr (std::is_same_v<Real, Made>)
          add_products(kernel.tile, rows.data, rows.data, rows.stride, n, lowest, n, true, columns,
                       sums, width, ahead);
        at += count;
        continue;
      }
      by.apply(kernel.tile, rows.data, rows.stride, columns, panel, made.data, made.stride, ahead);
      if (!stored) {
        add_products(made_kernel.tile, made.data, made.data, made.stride, r, lowest, r, true,
                     columns, sums, width, ahead);
        at += count;
        continue;
      }
      if constexpr (std::is_same_v<Made, float>) {
        for (int64_t j = 0; j < r; ++j) {
          const Dtype dtype = p.out.dtype[t * r + j];
          char* out = j >= lowest ? static_cast<char*>(p.out.data[t * r + j]) : nullptr;
          if (out) out += column * size_of(dtype);
          kernel.finish(made.row(j), count, dtype, out, past_cache);
        }
        probes.apply(made_kernel.probe, made.data, made.stride, columns, made_panel,
                     made.row(width), made.stride, ahead);
        add_products(made_kernel.probe, made.row(width), made.data, made.stride, kProbes, 0, r,
                     false, columns, sums, width, ahead);
      }
      at += count;
    }
#ifdef TWA_X86
    _mm_sfence();
#endif
    idle.give(std::move(workspace));
  });
  double* sums = partials.row(0);  // over items, a row at a time: of products, then of squares
  parallel_for(height + n, threads, [&](int64_t i) {
    const int64_t from = i < height ? i * width + (stored ? 0 : i)
                                    : products + kSquares * (i - height),
                  to = i < height ? (i + 1) * width : from + kSquares;
    for (int64_t item = 1; item < items; ++item)
      for (int64_t k = from; k < to; ++k) sums[k] += partials.row(item)[k];
  });
  const auto square = [&](int64_t i, int64_t from) {
    const double* of = sums + products + kSquares * i + from;
    return (of[0] + of[1]) + (of[2] + of[3]);
  };
  for (int64_t i = 0; i < n; ++i) norms[i] = square(i, 0);
  const int64_t ld = stored ? kProbes : m;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t k = 0; k < ld; ++k)
      gram[i * ld + k] = stored || (i >= lowest && k <= i) ? sums[k * width + i] : 0.0;
    if (std::is_same_v<Real, float> && !transformed && i >= lowest) gram[i * ld + i] = square(i, 4);
  }
}

template <class Real>
int64_t multiply(int64_t turns, int threads) {
  const Kernels<Real, Real> kernel = kernels<Real, Real>();
  const int64_t sums = kChains * kernel.lanes;
  Buffer<Real> out(threads, sums);
  parallel_for(threads, threads, [&](int64_t item) { kernel.multiply(turns, out.row(item)); });
  return threads * turns * sums;
}

}  // namespace

int64_t multiply_adds(int64_t turns, bool fast, int threads) {
  return fast ? multiply<float>(turns, threads) : multiply<double>(turns, threads);
}

Status orthonormalize_pass_cpu(const RowTable& rows, const GramSchmidtPass& pass,
                               const TensorTable& out, int threads) {
  const int64_t n = rows.n, r = pass.transform ? pass.r : 0;
  if (n < 1 || n > kMaxRows || pass.first < 0 || r < 0 || r > n) return Status::bad_argument;
  if (out.count && (!pass.transform || out.count != rows.count * r)) return Status::bad_argument;
  if ((pass.probes != nullptr) != (out.count > 0)) return Status::bad_argument;
  for (int64_t i = 0; i < n; ++i)
    if (pass.parent[i] < -1 || pass.parent[i] >= i) return Status::bad_argument;
  if (total_tiles(rows.numel, rows.count) < 0) return Status::bad_argument;
  const Problem p{rows, out, pass, n, r};
  if (pass.fast && (!pass.transform || out.count))
    run<float, float>(p, threads);
  else if (out.count)
    run<double, float>(p, threads);
  else
    run<double, double>(p, threads);
  return Status::ok;
}

}  // namespace twa
