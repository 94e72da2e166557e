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
//            the second-level cache: (a) differences of all rows, (b) transform, 6 rows x 256 bytes
//            at a time, (c) products, 6 x 4 rows at a time (AVX-512).
// Sums       float64; `fast`: float32 over at most 32 columns a lane, then float64. But squares in
//            float64: float32 differences of float32 weights are multiples of a coarse unit,
//            residues of their squares are not symmetric, and roundings add up (2e-8 of the sum).
//            Lanes, blocks and items in a fixed order: the same bits for any number of threads (not
//            for any instruction set).
// Bytes      n * D * input read; r * D * output written. n^2 D / 2 multiply-adds for gram, n r D /
//            2 for the transform.
#include <algorithm>
#include <memory>
#include <mutex>

#include "orthonormalize_kernels.h"

namespace twa {
namespace {

// Bytes of a block's rows, at most, where that leaves rows of a useful length.
constexpr int64_t kBuffer = 1 << 20;
constexpr int64_t kMostItems = 128;          // enough for every thread to have several
constexpr int64_t kPartialBytes = 64 << 20;  // of all items' Gram matrices
constexpr int kRowMultiple = 12;             // rows of a buffer: a multiple of every tile height

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

// Rows of a block in cache: Real numbers, `stride` apart, more than a power of two so that rows do
// not share cache sets.
template <class Real>
struct Buffer {
  int64_t stride;
  std::vector<Real> storage;
  Real* data;
  Buffer(int64_t rows, int64_t columns)
      : stride(columns + kPanelBytes / static_cast<int64_t>(sizeof(Real))),
        storage(static_cast<size_t>(rows * stride + 64), Real(0)),
        data(storage.data() +
             (64 - reinterpret_cast<uintptr_t>(storage.data()) % 64) % 64 / sizeof(Real)) {}
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
  return std::clamp(kBuffer / (n * size) / panel * panel, kMostColumns / 2 / size,
                    kMostColumns / size);
}

// A row from `column` on as float32: in place, or converted into scratch.
const float* as_float(const void* data, Dtype dtype, int64_t column, int64_t count,
                      float* scratch) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data) + column;
  const auto* half = static_cast<const uint16_t*>(data) + column;
  for (int64_t c = 0; c < count; ++c)
    scratch[c] = dtype == Dtype::bf16 ? bf16_to_float(half[c]) : f16_to_float(half[c]);
  return scratch;
}

// Where the next block's rows lie, for prefetches: row by row, then nothing more.
struct Ahead {
  const RowTable* rows = nullptr;
  int64_t at = 0, end = 0, column = 0;  // entries [at, end) of the table
  const void* next(const void* otherwise) {
    if (at >= end) return otherwise;
    const int64_t k = at++;
    return static_cast<const char*>(rows->data[k]) +
           column * (rows->dtype[k] == Dtype::f32 ? 4 : 2);
  }
};

// 12 rows a at a time, which stay in the first-level cache: total[i, k] += products of rows a[i], i
// in [first, count), and b[k], k <= i where `triangular` (and some more of the same tile, which
// nobody reads), else k < width.
template <class Real>
void add_products(const Kernels<Real>& kernel, const Real* a, const Real* b, int64_t stride,
                  int64_t first, int64_t count, int64_t width, bool triangular, int64_t columns,
                  double* total, int64_t ld, Ahead& ahead) {
  for (int64_t i0 = first / kRowMultiple * kRowMultiple; i0 < count; i0 += kRowMultiple) {
    const int64_t i1 = std::min(i0 + kRowMultiple, count);
    for (int64_t k = 0; k < (triangular ? i1 : width); k += kernel.rows_b)
      for (int64_t i = i0; i < i1; i += kernel.rows_a)
        if (!triangular || k < i + kernel.rows_a)
          kernel.product(a + i * stride, b + k * stride, stride, columns, total + i * ld + k, ld,
                         ahead.next(a + i * stride));
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
        for (int64_t j = j0; j < j0 + kTransformRows; ++j)
          values.push_back(j < r ? static_cast<Real>(transform[j * n + k]) : Real(0));
    }
  }
};

// Real: differences and the transform; Made: what the transform makes, whose products are summed
// (float32 for stored results).
template <class Real, class Made>
void run(const Problem& p, const Transform<Real>* transform, const Transform<Made>* probes,
         int threads) {
  const RowTable& rows_in = p.rows;
  const int64_t lowest = p.pass.first;
  double *gram = p.pass.gram, *norms = p.pass.norms;
  const Kernels<Real> kernel = kernels<Real>();
  const Kernels<Made> made_kernel = kernels<Made>();
  constexpr int64_t kPanel = kPanelBytes / static_cast<int64_t>(sizeof(Real)),
                    kMadePanel = kPanelBytes / static_cast<int64_t>(sizeof(Made));
  const int64_t n = p.n, r = p.r, block = block_columns<Real>(n);
  const int64_t m = transform ? r : n, height = round_up(m, kRowMultiple),
                width = probes ? kProbeRows : height;
  int64_t total = 0;
  std::vector<int64_t> begin;  // first column of each tensor, all joined
  for (int64_t t = 0; t < rows_in.count; ++t) begin.push_back(total), total += rows_in.numel[t];
  const int64_t partial = height * width + round_up(2 * n, 8);
  const int64_t most = std::clamp<int64_t>(kPartialBytes / (partial * 8), 2, kMostItems);
  const int64_t per_item = std::max(round_up((total + most - 1) / most, block), block),
                items = (total + per_item - 1) / per_item;
  const std::unique_ptr<double[]> partials(new double[static_cast<size_t>(items * partial)]);
  const bool past_cache = total * r * 4 > 8 << 20;

  Idle<Workspace<Real, Made>> idle;
  parallel_for(items, threads, [&](int64_t item) {
    double *sums = partials.get() + item * partial, *squares = sums + height * width;
    std::fill(sums, sums + partial, 0.0);
    auto workspace = idle.take([&] {
      return std::make_unique<Workspace<Real, Made>>(
          n, transform ? height + (probes ? kRowMultiple : 0) : 0, block);
    });
    Buffer<Real>& rows = workspace->rows;
    Buffer<Made>& made = workspace->made;
    std::vector<float>& scratch = workspace->scratch;
    std::vector<Real>& strip = workspace->strip;
    const int64_t end = std::min(total, (item + 1) * per_item);
    int64_t t = std::upper_bound(begin.begin(), begin.end(), item * per_item) - begin.begin() - 1;
    for (int64_t at = item * per_item; at < end;) {
      while (at >= begin[t] + rows_in.numel[t]) ++t;  // past empty tensors, too
      const int64_t column = at - begin[t],
                    count = std::min({block, end - at, rows_in.numel[t] - column}),
                    padded = round_up(count, kPanel);
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
        kernel.difference(a, b, count, rows.row(i), !transform, squares + 2 * i);
        std::fill(rows.row(i) + count, rows.row(i) + padded, Real(0));
      }
      Ahead ahead;
      if (column + count + block <= rows_in.numel[t])
        ahead = {&rows_in, t * n, t * n + n, column + count};
      if (!transform) {
        add_products(kernel, rows.data, rows.data, rows.stride, lowest, n, n, true, padded, sums,
                     width, ahead);
      } else {
        for (size_t tile = 0; tile < transform->tiles.size(); ++tile) {
          const auto [from, extent] = transform->tiles[tile];
          const int64_t j0 = static_cast<int64_t>(tile) * kTransformRows;
          // Straight to its place where nothing has to be rounded on the way.
          Real* to = strip.data();
          int64_t stride = block;
          if constexpr (std::is_same_v<Real, Made>) to = made.row(j0), stride = made.stride;
          for (int64_t c = 0; c < padded; c += kPanel)
            kernel.transform(transform->values.data() + from, extent, rows.data + c, rows.stride,
                             to + c, stride, ahead.next(rows.data));
          if constexpr (std::is_same_v<Made, float>)
            for (int64_t j = j0; j < std::min(j0 + kTransformRows, r) && p.out.count; ++j) {
              const Dtype dtype = p.out.dtype[t * r + j];
              char* out = j >= lowest ? static_cast<char*>(p.out.data[t * r + j]) : nullptr;
              if (out) out += column * (dtype == Dtype::f32 ? 4 : 2);
              kernel.finish(to + (j - j0) * stride, count, dtype, out, made.row(j), past_cache);
              std::fill(made.row(j) + count, made.row(j) + round_up(count, kMadePanel), 0.0f);
            }
        }
        const int64_t columns = round_up(count, kMadePanel);
        if (probes) {
          for (int64_t c = 0; c < columns; c += kMadePanel)
            made_kernel.transform(probes->values.data(), probes->tiles[0].extent, made.data + c,
                                  made.stride, made.row(height) + c, made.stride, made.data);
          add_products(made_kernel, made.data, made.row(height), made.stride, 0, r, kProbeRows,
                       false, columns, sums, width, ahead);
        } else {
          add_products(made_kernel, made.data, made.data, made.stride, lowest, r, r, true, columns,
                       sums, width, ahead);
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
    if (probes || i >= lowest)
      sum_over_items(i * width, probes ? kProbes : i + 1, gram + i * columns);
    if (std::is_same_v<Real, float> && !transform && i >= lowest)
      gram[i * columns + i] = squares[2 * i + 1];
  });
}

}  // namespace

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
  if (!pass.transform) {
    if (pass.fast)
      run<float, float>(p, nullptr, nullptr, threads);
    else
      run<double, double>(p, nullptr, nullptr, threads);
    return Status::ok;
  }
  if (!out.count) {
    const Transform<double> by(pass.transform, r, n);
    run<double, double>(p, &by, nullptr, threads);
    return Status::ok;
  }
  const Transform<float> combined(pass.probes, kProbes, r);
  if (pass.fast) {
    const Transform<float> by(pass.transform, r, n);
    run<float, float>(p, &by, &combined, threads);
  } else {
    const Transform<double> by(pass.transform, r, n);
    run<double, float>(p, &by, &combined, threads);
  }
  return Status::ok;
}

}  // namespace twa
