// orthonormalize_pass on a GPU:  one read of the rows, for each of the three uses of block
// Gram-Schmidt.
//
//   gram    V = differences of rows;                    gram = V V^T
//   again   V = transform * differences, unrounded;     gram = V V^T
//   write   V = round(transform * differences), stored; gram = V (V^T probes^T) of what was stored
//
// Operands   rows: count * n tensors, center: count or none, parent (n,): row i becomes w_i -
//            w_parent, or w_i - center where parent is -1. transform (r, n) float64, probes (6, r)
//            float64, out: count * r tensors. Columns of all tensors come in chunks of 32; a chunk
//            does not cross tensors.
// Work map   n <= 64: block = 4 warps and a range of chunks, which depends on sizes alone; each
//            warp streams chunks of its own and holds the whole lower triangle of V V^T (8 x 8
//            tiles of the matrix units) in registers. So every number is read, converted and
//            subtracted once, and no warp waits for another until the end, when the warps' sums are
//            added in order; a second kernel adds the blocks', in order.
//            n <= 128 (write: 256): the block streams a chunk at a time. Its threads put V into
//            shared memory as float64; its warps share the triangle, a quarter of the tiles each
//            (at 128 rows 34 of 136 and 144 registers), and the strips of 16 rows of the transform.
//            More rows, gram: blocks = ranges of chunks x groups of 48 or 64 rows, and pairs of
//            groups; parents from other groups are read beside the rows.
//            More rows with a transform: panels of columns, a launch for each step: differences to
//            global memory, transform, products by pairs of groups.
// Fragments  The order of a contracted index is free, so lane 4 g + t takes what lies together: in
//            V V^T row g of a tile and two neighbours of its columns, an operand for both sides; in
//            transform * V row t and four neighbours, whose results are eight neighbours in row g.
// Shared     2 slots a warp (n > 64: a block; 1 from 129 rows written on): 65 rows (the last:
//            center) of 32 float32 columns, filled by asynchronous copies one chunk ahead. 16-byte
//            pieces of a row are exchanged by its number (row_code), so that no access below has
//            bank conflicts but by parents; those of V likewise (held_code). `write` puts V where W
//            was. At most 99 KiB.
// Sums       float64 in a fixed order; differences too; transform and V V^T on the float64 matrix
//            units; `fast` makes no difference here. The units run at the speed of float32 on sm_80
//            and sm_90; on chips whose float64 is slow (sm_86, sm_89, sm_120) all is right, and
//            slow. Products with probes: float32 over the columns of a chunk, then float64, as on
//            the CPU (in panels: float64).
// Bytes      n * D * input read (in G groups: G times, which the second-level cache meets, since
//            blocks of one range run side by side; in panels 8 n D and 8 r D written and read
//            besides); r * D * output written. At n = 64, for 4 columns of all rows: 36
//            products of 8 x 4 by 4 x 8 (m8n8k4, four of them one m16n8k8 from sm_90 on) for each
//            of V V^T and the transform; 64 differences, of which each takes two conversions.
#include "orthonormalize_held.cuh"
#include "orthonormalize_panels.cuh"
#include "orthonormalize_small.cuh"

namespace twa {
namespace {

// Sum over partial sums ---------------------------------------------------------------------------

struct TotalArguments {
  const double* partials;          // (count, stride)
  int64_t count, stride, squares;  // the last: where squares of rows begin
  int64_t m, width, n, first;      // gram (m, width)
  bool triangular;
  double *gram, *norms;
};

// Warp w of a block adds every kTotalWays-th partial sum from w on; then the warps' in order.
TWA_KERNEL(kTotalThreads, 1)
orthonormalize_total_kernel(TotalArguments a) {
  double* const ways = reinterpret_cast<double*>(shared_memory());
  const int lane = lane_index();
  const int64_t entry = block_index() * 32 + lane, entries = a.m * a.width;
  int64_t at = -1;
  if (entry < entries) {
    const int64_t i = entry / a.width, k = entry % a.width;
    if (!a.triangular)
      at = i / 8 * 64 + i % 8 * 8 + k;
    else if (k <= i && i >= a.first)
      at = (i / 8 * (i / 8 + 1) / 2 + k / 8) * 64 + i % 8 * 8 + k % 8;
  } else if (entry < entries + a.n) {
    at = a.squares + entry - entries;
  }
  double sum = 0.0;
  if (at >= 0) {
#pragma unroll 4
    for (int64_t b = warp_index(); b < a.count; b += kTotalWays)
      sum += a.partials[b * a.stride + at];
  }
  ways[thread_index()] = sum;
  sync_block();
  if (warp_index() != 0) return;
  for (int w = 1; w < kTotalWays; ++w) sum += ways[32 * w + lane];
  if (entry < entries)
    a.gram[entry] = sum;
  else if (entry < entries + a.n)
    a.norms[entry - entries] = sum;
}

template <int kForm>
int run_small(const Arguments& a, int64_t blocks, const Place& where) {
  const auto run = [&](auto kernel, int bytes) {
    return launch(kernel, blocks, kThreads, bytes, where, a);
  };
  constexpr Form form = static_cast<Form>(kForm);
  switch (divide_up(a.n, 16)) {
    case 1:
      return run(orthonormalize_kernel<kForm, 1>, Layout<1>::bytes(form));
    case 2:
      return run(orthonormalize_kernel<kForm, 2>, Layout<2>::bytes(form));
    case 3:
      return run(orthonormalize_kernel<kForm, 3>, Layout<3>::bytes(form));
    default:
      return run(orthonormalize_kernel<kForm, 4>, Layout<4>::bytes(form));
  }
}

// A block holds all rows.
template <int kForm, int kBlocks>
int run_held(const Arguments& a, int64_t parts, const Place& where) {
  using H = Held<kForm, kWhole, kBlocks>;
  if constexpr (kForm == kWrite || H::kRows <= kHeldRows)
    if (a.n <= H::kRows)
      return launch(orthonormalize_held_kernel<kForm, kWhole, kBlocks>, parts, H::kMembers,
                    H::kBytes, where, a);
  if constexpr (H::kRows < (kForm == kWrite ? kWrittenRows : kHeldRows))
    return run_held<kForm, kBlocks + 1>(a, parts, where);
  return 1;  // cudaErrorInvalidValue: never
}

// Groups of rows, by which the triangle of V V^T is shared out.
struct Groups {
  int64_t count;
  int blocks;  // of 16 rows, of each
};
Groups groups_of(int64_t rows) {
  const int64_t count = divide_up(rows, 64);
  return {count, rows <= 48 * count ? 3 : 4};
}
template <int kForm, int kBlocks>
int run_pairs(const Arguments& a, int64_t parts, const Place& where) {
  using D = Held<kForm, kDiagonal, kBlocks>;
  using S = Held<kForm, kSquare, 2 * kBlocks>;
  const int error = launch(orthonormalize_held_kernel<kForm, kDiagonal, kBlocks>, a.groups * parts,
                           D::kMembers, D::kBytes, where, a);
  if (error != 0) return error;
  return launch(orthonormalize_held_kernel<kForm, kSquare, 2 * kBlocks>,
                a.groups * (a.groups - 1) / 2 * parts, S::kMembers, S::kBytes, where, a);
}
template <int kForm>
int run_groups(Arguments a, int64_t rows, int64_t parts, const Place& where) {
  const Groups groups = groups_of(rows);
  a.groups = groups.count;
  return groups.blocks == 3 ? run_pairs<kForm, 3>(a, parts, where)
                            : run_pairs<kForm, 4>(a, parts, where);
}

// Panels of columns, one after the other.
int run_panels(Arguments a, int64_t most, int64_t slices, const Place& where) {
  int error = clear(a.partials, slices * a.stride * 8, where);
  const auto run = [&](auto kernel, int64_t warps) {
    if (error == 0) error = launch(kernel, divide_up(warps, kWarps), kThreads, 0, where, a);
  };
  for (a.from = 0; a.from < a.chunks; a.from += most) {
    a.panel = a.chunks - a.from < most ? a.chunks - a.from : most;
    a.per_block = divide_up(a.panel, slices), a.slices = divide_up(a.panel, a.per_block);
    run(orthonormalize_differences_kernel, round_up(a.n, kBlock) * a.slices);
    if (error == 0)
      error =
          launch(orthonormalize_transform_kernel,
                 divide_up(a.r, 4 * kBlock) * divide_up(a.panel, 4), 32 * kWideWarps, 0, where, a);
    if (a.out) {
      if (error == 0)
        error = launch(orthonormalize_probe_kernel, a.panel, 32 * kWideWarps,
                       8 * 32 * kProbes * kWideWarps, where, a);
      run(orthonormalize_probed_kernel, a.r * a.slices);
    } else if (error == 0) {
      error = run_groups<kPanel>(a, a.r, a.slices, where);
    }
  }
  return error;
}

// By which kernels.
enum Way { kSmall, kHeld, kGroups, kPanels };
Way way_of(int64_t n, bool transform, bool write) {
  return n <= kSmallRows                           ? kSmall
         : n <= (write ? kWrittenRows : kHeldRows) ? kHeld
         : transform                               ? kPanels
                                                   : kGroups;
}

}  // namespace

GramSchmidtPlan orthonormalize_plan(int64_t n, int64_t r, int64_t chunks, bool transform,
                                    bool write) {
  GramSchmidtPlan plan{};
  const int64_t m = transform ? r : n, rows = round_up(n, 16);
  const int64_t operands = transform ? rows / 8 * (rows / 8) * 65 + (write ? 4 * rows : 0) : 0;
  const Way way = way_of(n, transform, write);
  if (way == kSmall) {
    plan.stride = (write ? rows * 8 : triangle(rows / 8)) + rows;
    const int64_t blocks = divide_up(chunks, 2 * kWarps) < kMostBlocks
                               ? divide_up(chunks, 2 * kWarps)
                               : kMostBlocks;  // two chunks a warp at least
    plan.per_block = blocks ? round_up(divide_up(chunks, blocks), kWarps) : kWarps;
    plan.parts = divide_up(chunks, plan.per_block);
    plan.space = operands;
    return plan;
  }
  plan.stride = (write ? round_up(m, 8) * 8 : triangle(divide_up(m, 8))) + rows;
  const auto at_most = [&](int64_t bytes, int64_t parts) {
    const int64_t fit = bytes / 8 / plan.stride;
    return fit < 1 ? 1 : fit < parts ? fit : parts;
  };
  if (way != kPanels) {
    const int64_t most = at_most(kPartialBytes, way == kHeld ? kHeldParts : kHeldParts / 3),
                  some = divide_up(chunks, kHeldChunks), parts = some < most ? some : most;
    plan.per_block = parts ? divide_up(chunks, parts) : 1;
    plan.parts = divide_up(chunks, plan.per_block);
    plan.space = operands;
    return plan;
  }
  const int64_t slices = divide_up(kSlicedRows, n);
  plan.parts = at_most(kAddedBytes, slices < kSlices ? slices : kSlices);
  const int64_t per_chunk = kChunk * (round_up(n, kBlock) + round_up(r, kBlock) + (write ? 8 : 0));
  plan.per_block = kPanelBytes / 8 / per_chunk;
  plan.per_block = plan.per_block < 1 ? 1 : plan.per_block > chunks ? chunks : plan.per_block;
  plan.space = plan.per_block * per_chunk;
  return plan;
}

int orthonormalize_pass_cuda(const DeviceRows& rows, const GramSchmidtPass& pass,
                             const DeviceTensor* out, const GramSchmidtWorkspace& space,
                             const Place& where) {
  const int64_t n = rows.n, r = pass.transform ? pass.r : 0, m = pass.transform ? r : n;
  const GramSchmidtPlan plan =
      orthonormalize_plan(n, r, space.chunks, pass.transform != nullptr, out != nullptr);
  const int64_t tiles = round_up(n, 16) / 8;
  Arguments a{};
  a.rows = rows.rows, a.center = rows.center, a.out = out, a.numel = rows.numel;
  a.chunk_begin = space.chunk_begin, a.parent = pass.parent, a.transform = pass.transform;
  a.probes = pass.probes, a.count = rows.count, a.chunks = space.chunks, a.n = n, a.r = r;
  a.first = pass.first, a.per_block = plan.per_block, a.partials = space.partials;
  a.stride = plan.stride, a.fragments = space.space;
  int error = 0;
  const Way way = way_of(n, pass.transform != nullptr, out != nullptr);
  if (pass.transform && way != kPanels)
    error = launch(orthonormalize_operands_kernel, tiles * tiles, 32, 0, where, a);
  if (error != 0) return error;
  if (way == kSmall) {
    error = out              ? run_small<kWrite>(a, plan.parts, where)
            : pass.transform ? run_small<kAgain>(a, plan.parts, where)
                             : run_small<kGram>(a, plan.parts, where);
  } else if (way == kHeld) {
    error = out              ? run_held<kWrite, kSmallRows / 16 + 1>(a, plan.parts, where)
            : pass.transform ? run_held<kAgain, kSmallRows / 16 + 1>(a, plan.parts, where)
                             : run_held<kGram, kSmallRows / 16 + 1>(a, plan.parts, where);
  } else if (way == kGroups) {
    error = run_groups<kGram>(a, n, plan.parts, where);
  } else {
    const int64_t columns = plan.per_block * kChunk;
    a.v = space.space, a.u = a.v + round_up(n, kBlock) * columns;
    a.s = a.u + round_up(r, kBlock) * columns;
    error = run_panels(a, plan.per_block, plan.parts, where);
  }
  if (error != 0) return error;
  const TotalArguments total{space.partials,
                             plan.parts,
                             plan.stride,
                             plan.stride - round_up(n, 16),
                             m,
                             out ? kProbes : m,
                             n,
                             pass.first,
                             out == nullptr,
                             pass.gram,
                             pass.norms};
  return launch(orthonormalize_total_kernel, divide_up(total.m * total.width + n, 32),
                kTotalThreads, 8 * kTotalThreads, where, total);
}

}  // namespace twa
