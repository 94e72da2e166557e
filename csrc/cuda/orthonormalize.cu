// orthonormalize_pass on a GPU:  one read of the rows, for each of the three uses of block Gram-Schmidt.
//
//   gram    V = differences of rows;                    gram = V V^T
//   again   V = transform * differences, unrounded;     gram = V V^T
//   write   V = round(transform * differences), stored; gram = V (V^T probes^T) of what was stored
//
// Operands   rows: count * n tensors, center: count or none, parent (n,): row i becomes w_i - w_parent, or w_i - center where parent is -1.
//            transform (r, n) float64, probes (6, r) float64, out: count * r tensors. Columns of all tensors come in chunks of 32; a chunk does not
//            cross tensors.
// Work map   n <= 64: block = 4 warps and a range of chunks, which depends on sizes alone; each warp streams chunks of its own and holds the whole
//            lower triangle of V V^T (8 x 8 tiles of the matrix units) in registers. So every number is read, converted and subtracted once, and no
//            warp waits for another until the end, when the warps' sums are added in order; a second kernel adds the blocks', in order.
//            n > 64: panels of columns, a launch for each step: differences to global memory, transform, products of 32 x 32 rows a warp.
// Fragments  The order of a contracted index is free, so lane 4 g + t takes what lies together: in V V^T row g of a tile and two neighbours of its
//            columns, an operand for both sides; in transform * V row t and four neighbours, whose results are eight neighbours in row g.
// Shared     2 slots a warp: 65 rows (the last: center) of 32 float32 columns, filled by asynchronous copies one chunk ahead. 16-byte pieces of a row
//            are exchanged by its number (row_code), so that no access below has bank conflicts but by parents. `write` puts V where W was.
// Sums       float64 in a fixed order; differences too; transform and V V^T on the float64 matrix units; `fast` makes no difference here. The units
//            run at the speed of float32 on sm_80 and sm_90; on chips whose float64 is slow (sm_86, sm_89, sm_120) all is right, and slow.
//            Products with probes: float32 over the columns of a chunk, then float64, as on the CPU (n > 64: float64).
// Bytes      n * D * input read; r * D * output written. At n = 64, for 4 columns of all rows: 36 products of 8 x 4 by 4 x 8 (m8n8k4, four of them
//            one m16n8k8 from sm_90 on) for each of V V^T and the transform; 64 differences, of which each takes two conversions.
#include "common.h"

namespace twa {
namespace {

enum Form { kGram, kAgain, kWrite };

constexpr int kChunk = kOrthonormalizeChunk;  // columns: a line of the cache from each row; 128-byte rows make 4 tiles of 8 columns
constexpr int kRowBytes = 4 * kChunk;
constexpr int kSlots = 2;              // of a warp: one is worked on while the other is filled; 8 warps then have 64 KiB on their way
constexpr int kSmallRows = 64;         // whose triangle fits in the registers of a warp: 36 tiles, 144 registers
constexpr int64_t kMostBlocks = 1056;  // four times what 132 multiprocessors run at once, so that other numbers of them have little left over
constexpr int kProbes = 6;             // of the certificate: fixed by the op
constexpr int kSlices = 32;            // n > 64: parts of a panel's columns, each with its own sums
constexpr int64_t kPartialBytes = 64 << 20, kPanelBytes = 64 << 20;  // workspaces for n > 64: as much as the second-level cache, about
constexpr int kTotalThreads = 256, kTotalWays = 8;                   // second kernel: 32 sums a block, 8 threads each

TWA_HD constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
TWA_HD constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
// Numbers in the tiles of the lower triangle of (8 blocks, 8 blocks). Tile (i, k), k <= i, is number i (i + 1) / 2 + k, row-major.
TWA_HD constexpr int64_t triangle(int64_t blocks) { return blocks * (blocks + 1) / 2 * 64; }

struct Arguments {
  const DeviceTensor* rows;    // (count * n)
  const DeviceTensor* center;  // (count) or null
  const DeviceTensor* out;     // (count * r) or null
  const int64_t* numel;        // (count,)
  const int64_t* chunk_begin;  // (count,) first chunk of each tensor
  const int32_t* parent;       // (n,)
  const double* transform;     // (r, n)
  const double* probes;        // (6, r)
  int64_t count, chunks, n, r, first;
  int64_t per_block;  // chunks
  double* partials;   // (blocks, stride): tiles, then squares of rows
  int64_t stride;
  double* fragments;  // n <= 64: the transform as operands, (row tile, tile of 8 rows of V, lane, 2), then a mask
  // n > 64: a panel of columns
  int64_t from, panel;  // first chunk, chunks
  double *v, *u, *s;    // (rows of n, or r, to a multiple of 32, columns of the panel); (6, columns)
  int64_t slices;
};

// Where a chunk lies.
struct Cursor {
  int64_t tensor = -1, begin = 0, end = 0, numel = 0;
  // Whether it is another tensor than before.
  TWA_DEVICE bool seek(const Arguments& a, int64_t chunk) {
    if (chunk < end) return false;
    int64_t low = 0, high = a.count;  // the last tensor that begins at or before it: the empty ones before have no chunk
    while (low + 1 < high) {
      const int64_t mid = (low + high) / 2;
      if (a.chunk_begin[mid] <= chunk)
        low = mid;
      else
        high = mid;
    }
    tensor = low, begin = a.chunk_begin[low], end = low + 1 < a.count ? a.chunk_begin[low + 1] : a.chunks, numel = a.numel[low];
    return true;
  }
  TWA_DEVICE int64_t column(int64_t chunk) const { return (chunk - begin) * kChunk; }
  TWA_DEVICE int columns(int64_t chunk) const { return numel - column(chunk) < kChunk ? static_cast<int>(numel - column(chunk)) : kChunk; }
};

TWA_DEVICE float from_half(Dtype dtype, uint16_t h) { return dtype == Dtype::bf16 ? bf16_to_float(h) : f16_to_float(h); }
TWA_DEVICE uint16_t to_half(Dtype dtype, float v) { return dtype == Dtype::bf16 ? float_to_bf16(v) : float_to_f16(v); }
TWA_DEVICE float rounded(Dtype dtype, float v) { return dtype == Dtype::f32 ? v : from_half(dtype, to_half(dtype, v)); }
TWA_DEVICE const uint8_t* element(const DeviceTensor& t, int64_t column) {
  return static_cast<const uint8_t*>(t.data) + column * (t.dtype == Dtype::f32 ? 4 : 2);
}
TWA_DEVICE float load_element(const DeviceTensor& t, int64_t column) {
  const uint8_t* p = element(t, column);
  return t.dtype == Dtype::f32 ? bits_float(load_4(p)) : from_half(t.dtype, load_2(p));
}
TWA_DEVICE void store_element(const DeviceTensor& t, int64_t column, float v) {
  uint8_t* p = const_cast<uint8_t*>(element(t, column));
  if (t.dtype == Dtype::f32)
    store_4(p, float_bits(v));
  else
    store_2(p, to_half(t.dtype, v));
}
TWA_DEVICE double widened(uint32_t bits) { return static_cast<double>(bits_float(bits)); }

// A slot's row i begins at row_code(i) bytes, its 16-byte piece k at row_code(i) ^ 16 k: what a quarter of a warp reads or writes at once is in
// different banks, be it four pieces of rows i and i + 1, two pieces of rows i .. i + 3 or one of rows i .. i + 7 (i even, or a multiple of 4 or 8).
TWA_HD constexpr uint32_t row_code(uint32_t i) { return i * kRowBytes + (4 * (i & 1) + (i & 2) + ((i ^ i >> 2) & 1)) * 16; }

// What a warp knows about a tensor, in shared memory: registers are for sums.
struct Tensors {
  Cursor at;
  int aligned;  // all of them float32 at multiples of 16 bytes
  int halves;   // all of them 16 bits, at multiples of 8 bytes
  int mixed;    // not all of them float32

  TWA_DEVICE void open() {
    if (lane_index() == 0) at = Cursor{};
  }
  // When chunk is in another tensor than before: table[i] = tensor(number of the tensor of the model, i), i < count.
  template <class Tensor>
  TWA_DEVICE void seek(const Arguments& a, int64_t chunk, DeviceTensor* table, int count, const Tensor& tensor) {
    if (chunk < at.end) return;
    Cursor next;
    next.seek(a, chunk);
    uint32_t odd = 0, odd_half = 0, other = 0;
    sync_warp();  // everybody has read what was there
    for (int i = lane_index(); i < count; i += 32) {
      const DeviceTensor t = tensor(next.tensor, i);
      table[i] = t;
      odd |= t.dtype != Dtype::f32 || reinterpret_cast<uintptr_t>(t.data) % 16 != 0;
      odd_half |= t.dtype == Dtype::f32 || reinterpret_cast<uintptr_t>(t.data) % 8 != 0;
      other |= t.dtype != Dtype::f32;
    }
    odd = warp_max(odd), odd_half = warp_max(odd_half), other = warp_max(other);
    if (lane_index() == 0) at = next, aligned = odd == 0, halves = odd_half == 0, mixed = other != 0;
    sync_warp();
  }
};

// Shared memory of a block, in bytes from its begin.
template <int kPairs>
struct Layout {
  static constexpr int kRows = 16 * kPairs, kTiles = 2 * kPairs;  // rows of a slot without the center; tiles of 8 rows
  static constexpr int kSlotBytes = (kRows + 1) * kRowBytes;
  static constexpr int kBarriers = kWarps * kSlots * kSlotBytes;        // (warps, slots)
  static constexpr int kSource = kBarriers + 8 * kWarps * kSlots;       // (warps,) Tensors: rows and center
  static constexpr int kTarget = kSource + sizeof(Tensors) * kWarps;    // (warps,) Tensors: out
  static constexpr int kParents = kTarget + sizeof(Tensors) * kWarps;   // (kRows,) row_code of the parent
  static constexpr int kMasks = kParents + 4 * kRows;                   // (8,) of tiles of the transform that are not zero: bit = tile of its rows
  static constexpr int kTables = kMasks + 4 * 8;                        // (warps, kRows + 1) tensors of rows, then center
  static constexpr int kOutputs = kTables + 16 * kWarps * (kRows + 1);  // (warps, kRows)
  static constexpr int kSquares = kOutputs + 16 * kWarps * kRows;       // (warps, kPairs, lane) float64: a warp's sums, between chunks
  static constexpr int kProbeOperands = kSquares + 8 * 32 * kWarps * kPairs;  // (kRows, 8) float32: the probes' columns
  static constexpr int kLaneRows = (kRows + 31) / 32;                         // of a lane in products with the probes
  static constexpr int kProbed = kProbeOperands + 32 * kRows;        // (warps, 32 columns, 6) float32: probes * V, four of them and two apart
  static constexpr int kSums = kProbed + kWarps * 32 * 4 * kProbes;  // (warps, kLaneRows, 6, lane) float64: a warp's sums, between chunks
  static constexpr int bytes(Form form) {
    return form == kWrite ? kSums + 8 * 32 * kProbes * kLaneRows * kWarps : form == kAgain ? kProbeOperands : kOutputs;
  }
};
static_assert(sizeof(DeviceTensor) == 16 && Layout<1>::kTables % 16 == 0 && Layout<4>::kTables % 16 == 0, "operands are read 16 bytes at a time");
static_assert(Layout<4>::bytes(kWrite) <= 99 << 10, "two blocks share a multiprocessor; one fits on sm_86 and later");

// A warp's slots, and how they are filled.
template <int kPairs>
struct Stream {
  using L = Layout<kPairs>;
  TWA_DEVICE uint8_t* slot(int k) const { return shared_memory() + (warp_index() * kSlots + k) * L::kSlotBytes; }
  TWA_DEVICE uint64_t* barrier(int k) const { return reinterpret_cast<uint64_t*>(shared_memory() + L::kBarriers) + warp_index() * kSlots + k; }

  TWA_DEVICE double* squares() const { return reinterpret_cast<double*>(shared_memory() + L::kSquares) + warp_index() * 32 * kPairs + lane_index(); }

  TWA_DEVICE void open(const Arguments& a) const {
    const int lane = lane_index();
    if (lane < kSlots) barrier_init(barrier(lane), 32);
    barrier_publish();
    // What no copy fills stays zero: rows past the last, and the center where there is none.
    for (int k = 0; k < kSlots; ++k)
      for (int i = static_cast<int>(a.n); i < L::kRows + (a.center ? 0 : 1); ++i)
        *reinterpret_cast<uint32_t*>(slot(k) + i * kRowBytes + 4 * lane) = 0;
    reinterpret_cast<Tensors*>(shared_memory() + L::kSource)[warp_index()].open();
    reinterpret_cast<Tensors*>(shared_memory() + L::kTarget)[warp_index()].open();
    sync_warp();
  }
  // Begins to fill a slot. All lanes have finished with it.
  TWA_DEVICE void fill(const Arguments& a, int k, int64_t chunk) const {
    Tensors& source = reinterpret_cast<Tensors*>(shared_memory() + L::kSource)[warp_index()];
    DeviceTensor* const table = reinterpret_cast<DeviceTensor*>(shared_memory() + L::kTables) + warp_index() * (L::kRows + 1);
    const int tensors = static_cast<int>(a.n) + (a.center ? 1 : 0), lane = lane_index();
    source.seek(a, chunk, table, tensors, [&](int64_t tensor, int i) { return i < a.n ? a.rows[tensor * a.n + i] : a.center[tensor]; });
    const int64_t column = source.at.column(chunk);
    const int columns = source.at.columns(chunk);
    const uint64_t policy = evict_normal();
    uint8_t* const to = slot(k);
    const auto row_of = [&](int i) { return row_code(static_cast<uint32_t>(i < a.n ? i : L::kRows)); };
    if (source.aligned && columns == kChunk) {
      for (int i = lane / 8; i < tensors; i += 4)
        copy_16(to + (row_of(i) ^ (16 * (lane % 8))), static_cast<const float*>(table[i].data) + column + 4 * (lane % 8), policy);
    } else if (source.halves && columns == kChunk) {
      constexpr int kAtOnce = 4;  // loads before their first use
      for (int i0 = lane / 8; i0 < tensors; i0 += 4 * kAtOnce) {
        uint2 w[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
          if (i0 + 4 * k < tensors) w[k] = load_8(static_cast<const uint16_t*>(table[i0 + 4 * k].data) + column + 4 * (lane % 8));
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int i = i0 + 4 * k;
          if (i >= tensors) break;
          const Dtype dtype = table[i].dtype;
          const auto half = [&](uint32_t h) { return float_bits(from_half(dtype, static_cast<uint16_t>(h))); };
          *reinterpret_cast<uint4*>(to + (row_of(i) ^ (16 * (lane % 8)))) = uint4{half(w[k].x), half(w[k].x >> 16), half(w[k].y), half(w[k].y >> 16)};
        }
      }
    } else {
      for (int i = 0; i < tensors; ++i) {  // lane = column
        uint8_t* p = to + (row_of(i) ^ (16 * (lane / 4))) + 4 * (lane % 4);
        const DeviceTensor t = table[i];
        if (lane < columns && t.dtype == Dtype::f32)
          copy_4(p, element(t, column + lane), policy);
        else
          *reinterpret_cast<uint32_t*>(p) = lane < columns ? float_bits(load_element(t, column + lane)) : 0u;
      }
    }
    barrier_arrive_after_copies(barrier(k));
  }
  // The slot, when it is full; its parity is that of the number of times that it was used before.
  TWA_DEVICE uint8_t* wait(int k, uint32_t parity) const {
    barrier_wait(barrier(k), parity);
    sync_warp();  // what other lanes stored themselves
    return slot(k);
  }
};

// sums += V V^T for 8 columns: v[i][e] is row g of tile i, column 2 t + e.
template <int kPairs>
TWA_DEVICE void add_products(double (&sums)[kPairs * (2 * kPairs + 1)][2], const double (&v)[2 * kPairs][2]) {
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const int upper = p * (2 * p + 1), lower = (p + 1) * (2 * p + 1);  // numbers of the first tiles of tile rows 2 p and 2 p + 1
#pragma unroll
    for (int k = 0; k <= 2 * p; ++k) multiply_add_f64(sums[upper + k], sums[lower + k], v[2 * p], v[2 * p + 1], v[k]);
#pragma unroll
    for (int e = 0; e < 2; ++e) multiply_add_f64(sums[lower + 2 * p + 1], v[2 * p + 1][e], v[2 * p + 1][e]);
  }
}

// made = transform * V for kBlocks * 8 columns: made[j][b][e] is row g of tile j, column index 2 t + e of block b, where load(k, own, parents) gives
// what lane (g, t) has of row 4 k + t: column index g of every block, and of the parent. squares[32 h] += squares of row
// 16 h + 8 (g / 2 % 2) + 4 (g % 2) + t: half of it, the lanes of g / 4 have each their own.
template <int kPairs, int kBlocks, class Load>
TWA_DEVICE void transform_rows(const double* fragments, const uint32_t* masks, const Load& load, double (&made)[2 * kPairs][kBlocks][2],
                               double* squares) {
  constexpr int kTiles = 2 * kPairs;
  const int lane = lane_index(), g = lane / 4;
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) made[j][b][0] = made[j][b][1] = 0.0;
  double even = 0.0;
#pragma unroll
  for (int q = 0; q < kTiles; ++q) {
    double v[kBlocks][2], square[2] = {0.0, 0.0};
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      uint32_t own[kBlocks], parents[kBlocks];
      load(2 * q + u, own, parents);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const double w = widened(own[b]);
        v[b][u] = w - widened(parents[b]);
        square[u] = fma(w, w, square[u]);
      }
    }
    // Four sums, of which each lane goes on with one.
    const double one = (g & 1 ? square[1] : square[0]) + shuffle_xor(g & 1 ? square[0] : square[1], 4);
    if (q % 2 == 0)
      even = one;
    else
      squares[q / 2 * 32] += (g & 2 ? one : even) + shuffle_xor(g & 2 ? even : one, 8);
    const uint32_t mask = masks[q];
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const double* const at = fragments + ((2 * p * kTiles + q) * 32 + lane) * 2;
      const auto operand = [](const double* from, double (&a)[2]) {
        const uint4 w = load_16(from);
        memcpy(a, &w, sizeof(a));
      };
      double upper[2], lower[2];
      if (mask >> (2 * p) & 1) {
        operand(at, upper), operand(at + kTiles * 64, lower);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) multiply_add_f64(made[2 * p][b], made[2 * p + 1][b], upper, lower, v[b]);
      } else if (mask >> (2 * p + 1) & 1) {  // half of the tiles on the diagonal
        operand(at + kTiles * 64, lower);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int e = 0; e < 2; ++e) multiply_add_f64(made[2 * p + 1][b], lower[e], v[b][e]);
      }
    }
  }
}

// n <= 64 -------------------------------------------------------------------------------------------------------------

// The transform in the order in which the kernel takes it, and which of its 8 x 8 tiles are not zero. Block = 1 warp = 1 tile.
TWA_KERNEL(32, 1)
orthonormalize_operands_kernel(Arguments a) {
  const int64_t tiles = divide_up(a.n, 16) * 2, tile = block_index();
  const int lane = lane_index();
  uint32_t any = 0;
  for (int e = 0; e < 2; ++e) {
    const int64_t j = tile / tiles * 8 + lane / 4, k = tile % tiles * 8 + 4 * e + lane % 4;
    const double v = j < a.r && k < a.n ? a.transform[j * a.n + k] : 0.0;
    a.fragments[(tile * 32 + lane) * 2 + e] = v;
    any |= v != 0.0;
  }
  any = warp_max(any);
  if (lane == 0) a.fragments[tiles * tiles * 64 + tile] = any ? 1.0 : 0.0;
}

TWA_DEVICE void load_probes(const float* four, const float* two, float (&v)[kProbes]) {
  const uint4 a = *reinterpret_cast<const uint4*>(four);
  const uint2 b = *reinterpret_cast<const uint2*>(two);
  v[0] = bits_float(a.x), v[1] = bits_float(a.y), v[2] = bits_float(a.z), v[3] = bits_float(a.w), v[4] = bits_float(b.x), v[5] = bits_float(b.y);
}

template <int kForm, int kPairs>
TWA_KERNEL(kThreads, 2)
orthonormalize_kernel(Arguments a) {
  using L = Layout<kPairs>;
  constexpr int kTiles = L::kTiles, kSums = kForm == kWrite ? kTiles : kPairs * (kTiles + 1);
  const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
  uint8_t* const shared = shared_memory();
  uint32_t* const parents = reinterpret_cast<uint32_t*>(shared + L::kParents);
  float* const probe_operands = reinterpret_cast<float*>(shared + L::kProbeOperands);
  double* const kept = reinterpret_cast<double*>(shared + L::kSums) + warp * L::kLaneRows * kProbes * 32 + lane;
  uint32_t* const masks = reinterpret_cast<uint32_t*>(shared + L::kMasks);
  for (int i = thread_index(); i < L::kRows; i += kThreads) {
    const int parent = i >= a.n ? i : a.parent[i] >= 0 ? a.parent[i] : L::kRows;  // rows past the last: their own, so that they stay zero
    parents[i] = row_code(static_cast<uint32_t>(parent));
  }
  if constexpr (kForm == kWrite)
    for (int k = thread_index(); k < 8 * L::kRows; k += kThreads)
      probe_operands[k] = k % 8 < kProbes && k / 8 < a.r ? static_cast<float>(a.probes[k % 8 * a.r + k / 8]) : 0.0f;
  if constexpr (kForm != kGram)
    for (int q = thread_index(); q < kTiles; q += kThreads) {
      uint32_t mask = 0;
      for (int j = 0; j < kTiles; ++j) mask |= static_cast<uint32_t>(a.fragments[kTiles * kTiles * 64 + j * kTiles + q] != 0.0) << j;
      masks[q] = mask;
    }
  if constexpr (kForm == kWrite)
    for (int k = 0; k < L::kLaneRows * kProbes; ++k) kept[32 * k] = 0.0;
  const Stream<kPairs> stream;
  if constexpr (kForm != kGram)
    for (int i = 0; i < kPairs; ++i) stream.squares()[32 * i] = 0.0;
  stream.open(a);
  sync_block();

  double sums[kSums][2] = {}, squares[kPairs] = {};
  const uint32_t row_g = row_code(static_cast<uint32_t>(g)), row_t = row_code(static_cast<uint32_t>(t));
  uint32_t parent_g[kPairs];  // kGram: of row g of tiles 2 p and 2 p + 1, 16 bits each
  if constexpr (kForm == kGram)
#pragma unroll
    for (int p = 0; p < kPairs; ++p) parent_g[p] = parents[16 * p + g] | parents[16 * p + 8 + g] << 16;
  static_assert(L::kSlotBytes <= 1 << 16, "row codes have 16 bits");

  const int64_t begin = block_index() * a.per_block;
  const int count = static_cast<int>(begin + a.per_block < a.chunks ? a.per_block : a.chunks - begin);
  for (int k = 0; k < kSlots; ++k)
    if (warp + k * kWarps < count) stream.fill(a, k, begin + warp + k * kWarps);
  uint32_t parity = 0;
  int slot_index = 0;
#pragma unroll 1
  for (int k = warp; k < count; k += kWarps) {
    uint8_t* const slot = stream.wait(slot_index, parity);
    if constexpr (kForm == kGram) {
#pragma unroll 1
      for (int h = 0; h < kChunk / 8; ++h) {  // lane: columns 8 h + 2 t, + 1
        const uint32_t piece = 16 * (2 * h + t / 2), half = t % 2 * 8;
        double v[kTiles][2], even = 0.0;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const uint2 w = *reinterpret_cast<const uint2*>(slot + i * 8 * kRowBytes + (row_g ^ piece) + half);
          const uint2 p = *reinterpret_cast<const uint2*>(slot + ((parent_g[i / 2] >> i % 2 * 16 & 0xffff) ^ piece) + half);
          const double x = widened(w.x), y = widened(w.y);
          v[i][0] = x - widened(p.x), v[i][1] = y - widened(p.y);
          const double square = fma(y, y, x * x);
          if (i % 2 == 0)
            even = square;
          else  // of two sums each lane goes on with one
            squares[i / 2] += (t & 1 ? square : even) + shuffle_xor(t & 1 ? even : square, 1);
        }
        add_products<kPairs>(sums, v);
      }
    } else if constexpr (kForm == kAgain) {
#pragma unroll 1
      for (int h = 0; h < kChunk / 8; ++h) {  // lane: column 8 h + g of V, then columns 8 h + 2 t, + 1 of what is made
        const uint32_t piece = 16 * (2 * h + g / 4), word = g % 4 * 4;
        double made[kTiles][1][2], v[kTiles][2];
        transform_rows<kPairs, 1>(
            a.fragments, masks,
            [&](int k, uint32_t (&own)[1], uint32_t (&parent)[1]) {
              own[0] = *reinterpret_cast<const uint32_t*>(slot + k * 4 * kRowBytes + (row_t ^ piece ^ (16 * (k & 1))) + word);
              parent[0] = *reinterpret_cast<const uint32_t*>(slot + (parents[4 * k + t] ^ piece) + word);
            },
            made, stream.squares());
#pragma unroll
        for (int i = 0; i < kTiles; ++i) v[i][0] = made[i][0][0], v[i][1] = made[i][0][1];
        add_products<kPairs>(sums, v);
      }
    } else {
      const int64_t chunk = block_index() * a.per_block + k;
      Tensors& target = reinterpret_cast<Tensors*>(shared + L::kTarget)[warp];
      DeviceTensor* const outputs = reinterpret_cast<DeviceTensor*>(shared + L::kOutputs) + warp * L::kRows;
      target.seek(a, chunk, outputs, static_cast<int>(a.r), [&](int64_t tensor, int i) { return a.out[tensor * a.r + i]; });
      {
        double made[kTiles][4][2];
        transform_rows<kPairs, 4>(
            a.fragments, masks,
            [&](int k, uint32_t (&own)[4], uint32_t (&parent)[4]) {  // lane: columns 4 g .. 4 g + 3 of V, then 8 t .. 8 t + 7 of what is made
              const uint4 w = *reinterpret_cast<const uint4*>(slot + k * 4 * kRowBytes + (row_t ^ (16 * (g ^ (k & 1)))));
              const uint4 p = *reinterpret_cast<const uint4*>(slot + (parents[4 * k + t] ^ (16 * g)));
              own[0] = w.x, own[1] = w.y, own[2] = w.z, own[3] = w.w;
              parent[0] = p.x, parent[1] = p.y, parent[2] = p.z, parent[3] = p.w;
            },
            made, stream.squares());
        sync_warp();  // everybody has read W
        const auto keep = [&](const auto& dtype_of) {
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            if (8 * j + g >= a.n) continue;
            const Dtype dtype = dtype_of(8 * j + g);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              uint32_t w[4];
#pragma unroll
              for (int b = 0; b < 4; ++b) w[b] = float_bits(rounded(dtype, static_cast<float>(made[j][b][e])));
              *reinterpret_cast<uint4*>(slot + j * 8 * kRowBytes + (row_g ^ (16 * (2 * t + e)))) = uint4{w[0], w[1], w[2], w[3]};
            }
          }
        };
        if (target.mixed)
          keep([&](int row) { return row < a.r ? outputs[row].dtype : Dtype::f32; });
        else
          keep([](int) { return Dtype::f32; });
        sync_warp();
      }
      const int64_t column = target.at.column(chunk);
      const int columns = target.at.columns(chunk);
      const bool whole = target.aligned && columns == kChunk;
      // Lane: rows 4 i + lane / 8, columns 4 (lane % 8) .. + 3. They are stored, and multiplied by the probes: float32 sums over a chunk, as on the
      // CPU.
      float product[4][kProbes] = {};
#pragma unroll 4
      for (int i = 0; i < L::kRows / 4; ++i) {
        const int row = 4 * i + lane / 8;
        const uint4 w = *reinterpret_cast<const uint4*>(slot + (row_code(static_cast<uint32_t>(row)) ^ (16 * (lane % 8))));
        if (whole && row >= a.first && row < a.r) store_16(static_cast<float*>(outputs[row].data) + column + 4 * (lane % 8), w);
        float probe[kProbes];
        load_probes(probe_operands + 8 * row, probe_operands + 8 * row + 4, probe);
#pragma unroll
        for (int p = 0; p < kProbes; ++p) {
          product[0][p] = fmaf(probe[p], bits_float(w.x), product[0][p]), product[1][p] = fmaf(probe[p], bits_float(w.y), product[1][p]);
          product[2][p] = fmaf(probe[p], bits_float(w.z), product[2][p]), product[3][p] = fmaf(probe[p], bits_float(w.w), product[3][p]);
        }
      }
      if (!whole && lane < columns)
        for (int i = static_cast<int>(a.first); i < a.r; ++i)
          store_element(outputs[i], column + lane,
                        *reinterpret_cast<const float*>(slot + (row_code(static_cast<uint32_t>(i)) ^ (16 * (lane / 4))) + 4 * (lane % 4)));
      // Over the four classes of rows; each lane goes on with one of its columns, 4 (lane % 8) + lane / 16 * 2 + lane / 8 % 2.
      float* const probed = reinterpret_cast<float*>(shared + L::kProbed) + warp * 32 * kProbes;
      const bool second = lane & 16, odd = lane & 8;
      float one[kProbes];
#pragma unroll
      for (int p = 0; p < kProbes; ++p) {
        const float even_half = (second ? product[2][p] : product[0][p]) + shuffle_xor(second ? product[0][p] : product[2][p], 16);
        const float odd_half = (second ? product[3][p] : product[1][p]) + shuffle_xor(second ? product[1][p] : product[3][p], 16);
        one[p] = (odd ? odd_half : even_half) + shuffle_xor(odd ? even_half : odd_half, 8);
      }
      *reinterpret_cast<uint4*>(probed + 4 * lane) = uint4{float_bits(one[0]), float_bits(one[1]), float_bits(one[2]), float_bits(one[3])};
      *reinterpret_cast<uint2*>(probed + 128 + 2 * lane) = uint2{float_bits(one[4]), float_bits(one[5])};
      sync_warp();
      // V * (probes * V)^T. Lane: rows lane and lane + 32.
      float sum[L::kLaneRows][kProbes] = {};
#pragma unroll 2
      for (int piece = 0; piece < kChunk / 4; ++piece) {
        float v[L::kLaneRows][4];
#pragma unroll
        for (int z = 0; z < L::kLaneRows; ++z) {
          const int row = lane + 32 * z < L::kRows ? lane + 32 * z : L::kRows - 1;
          const uint4 w = *reinterpret_cast<const uint4*>(slot + (row_code(static_cast<uint32_t>(row)) ^ (16 * piece)));
          v[z][0] = bits_float(w.x), v[z][1] = bits_float(w.y), v[z][2] = bits_float(w.z), v[z][3] = bits_float(w.w);
        }
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const int from = b / 2 * 16 + b % 2 * 8 + piece;  // lane that has column 4 piece + b
          float probe[kProbes];
          load_probes(probed + 4 * from, probed + 128 + 2 * from, probe);
#pragma unroll
          for (int z = 0; z < L::kLaneRows; ++z)
#pragma unroll
            for (int p = 0; p < kProbes; ++p) sum[z][p] = fmaf(v[z][b], probe[p], sum[z][p]);
        }
      }
#pragma unroll
      for (int z = 0; z < L::kLaneRows; ++z)
#pragma unroll
        for (int p = 0; p < kProbes; ++p) kept[32 * (z * kProbes + p)] += static_cast<double>(sum[z][p]);
    }
    sync_warp();  // everybody has read the slot
    if (k + kSlots * kWarps < count) stream.fill(a, slot_index, block_index() * a.per_block + k + kSlots * kWarps);
    if (++slot_index == kSlots) slot_index = 0, parity ^= 1;
  }

  // The warps' sums in order, where the slots were: tiles, then squares of rows.
  double* const total = reinterpret_cast<double*>(shared);
  double* const total_squares = total + 64 * kSums;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    if constexpr (kForm != kGram) squares[i] = stream.squares()[32 * i];
    squares[i] += shuffle_xor(squares[i], kForm == kGram ? 2 : 16);
  }
  for (int w = 0; w < kWarps; ++w) {
    sync_block();
    if (warp != w) continue;
    const auto add = [w](double& to, double v) { to = (w == 0 ? 0.0 : to) + v; };
    if constexpr (kForm == kWrite) {
      for (int z = 0; z < L::kLaneRows; ++z)
        for (int p = 0; p < 8 && lane + 32 * z < L::kRows; ++p) add(total[8 * (lane + 32 * z) + p], p < kProbes ? kept[32 * (z * kProbes + p)] : 0.0);
    } else {
#pragma unroll
      for (int k = 0; k < kSums; ++k) add(total[64 * k + 2 * lane], sums[k][0]), add(total[64 * k + 2 * lane + 1], sums[k][1]);
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int row = 16 * i + (kForm == kGram ? t % 2 * 8 + g : 8 * (g / 2 % 2) + 4 * (g % 2) + t);
      if (kForm == kGram ? t < 2 : g < 4) add(total_squares[row], squares[i]);
    }
  }
  sync_block();
  double* const partial = a.partials + block_index() * a.stride;
  for (int k = thread_index(); k < 64 * kSums + L::kRows; k += kThreads) partial[k] = total[k];
}

// n > 64 --------------------------------------------------------------------------------------------------------------
// Each launch leaves its results to the next one; a warp alone adds to its sums, launch by launch.

constexpr int kBlock = 32;  // rows: 4 x 4 tiles of products are 64 registers

struct Slice {
  int64_t begin, end;  // chunks of the panel
};
TWA_DEVICE Slice slice_of(const Arguments& a, int64_t z) {
  const int64_t per = divide_up(a.panel, a.slices), begin = z * per < a.panel ? z * per : a.panel;
  return {begin, begin + per < a.panel ? begin + per : a.panel};
}

// V = rows minus parents, and squares of rows. Warp = one row, one slice; lane = column.
TWA_KERNEL(kThreads, 4)
orthonormalize_differences_kernel(Arguments a) {
  const int64_t height = round_up(a.n, kBlock), i = block_index() % (height / kWarps) * kWarps + warp_index(), z = block_index() / (height / kWarps);
  const int lane = lane_index();
  const int64_t parent = i < a.n ? a.parent[i] : -1;
  const Slice slice = slice_of(a, z);
  Cursor at;
  double square = 0.0;
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

// U = transform * V; with `out` rounded and stored. Warp = 32 rows of U, one chunk.
TWA_KERNEL(kThreads, 4)
orthonormalize_transform_kernel(Arguments a) {
  const int64_t height = divide_up(a.r, kBlock), task = block_index() * kWarps + warp_index(), c = task / height, j0 = task % height * kBlock;
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  if (c >= a.panel) return;
  const int64_t stride = a.panel * kChunk;
  double made[4][4][2] = {};
  for (int64_t k0 = 0; k0 < a.n; k0 += 8) {
    double x[4][2], v[4][2];
    uint32_t any = 0;
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
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int b = 0; b < 4; ++b) v[b][u] = a.v[(k0 + 4 * u + t) * stride + c * kChunk + 4 * g + b];
#pragma unroll
    for (int j = 0; j < 4; j += 2)
#pragma unroll
      for (int b = 0; b < 4; ++b) multiply_add_f64(made[j][b], made[j + 1][b], x[j], x[j + 1], v[b]);
  }
  Cursor at;
  at.seek(a, a.from + c);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t row = j0 + 8 * j + g;
    const DeviceTensor out = a.out && row < a.r ? a.out[at.tensor * a.r + row] : DeviceTensor{nullptr, Dtype::f32, 0};
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int column = 4 * (2 * t + e) + b;
        double v = made[j][b][e];
        if (a.out) {
          const float stored = rounded(out.dtype, static_cast<float>(v));
          if (row >= a.first && row < a.r && column < at.columns(a.from + c)) store_element(out, at.column(a.from + c) + column, stored);
          v = static_cast<double>(stored);
        }
        a.u[row * stride + c * kChunk + column] = v;
      }
  }
}

// sums += U U^T (of V where there is no transform). Warp = 32 x 32 of the products, one slice.
TWA_KERNEL(kThreads, 2)
orthonormalize_products_kernel(Arguments a) {
  const int64_t m = a.transform ? a.r : a.n, blocks = divide_up(m, kBlock), pairs = blocks * (blocks + 1) / 2;
  const int64_t task = block_index() * kWarps + warp_index(), z = task / pairs;
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  if (z >= a.slices) return;
  int64_t i0 = 0, k0 = task % pairs;
  while (k0 > i0) k0 -= ++i0;
  const double* const u = a.transform ? a.u : a.v;
  const int64_t stride = a.panel * kChunk;
  const Slice slice = slice_of(a, z);
  double sums[4][4][2] = {};
  for (int64_t c = slice.begin * kChunk + 2 * t; c < slice.end * kChunk; c += 8) {
    double x[4][2], y[4][2];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        x[i][e] = u[(i0 * kBlock + 8 * i + g) * stride + c + e];
        y[i][e] = u[(k0 * kBlock + 8 * i + g) * stride + c + e];
      }
#pragma unroll
    for (int i = 0; i < 4; i += 2)
#pragma unroll
      for (int k = 0; k < 4; ++k) multiply_add_f64(sums[i][k], sums[i + 1][k], x[i], x[i + 1], y[k]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t row = 4 * i0 + i, column = 4 * k0 + k;  // of tiles
      if (column > row || 8 * row >= m) continue;
      double* const tile = a.partials + z * a.stride + (row * (row + 1) / 2 + column) * 64;
      tile[2 * lane] += sums[i][k][0], tile[2 * lane + 1] += sums[i][k][1];
    }
}

// probes * U. Warp = one chunk; lane = column.
TWA_KERNEL(kThreads, 4)
orthonormalize_probe_kernel(Arguments a) {
  const int64_t c = block_index() * kWarps + warp_index(), column = c * kChunk + lane_index(), stride = a.panel * kChunk;
  if (c >= a.panel) return;
  double sum[kProbes] = {};
  for (int64_t j = 0; j < a.r; ++j) {
    const double v = a.u[j * stride + column];
#pragma unroll
    for (int p = 0; p < kProbes; ++p) sum[p] = fma(a.probes[p * a.r + j], v, sum[p]);
  }
#pragma unroll
  for (int p = 0; p < kProbes; ++p) a.s[p * stride + column] = sum[p];
}

// sums += U (probes * U)^T. Warp = one row, one slice.
TWA_KERNEL(kThreads, 4)
orthonormalize_probed_kernel(Arguments a) {
  const int64_t task = block_index() * kWarps + warp_index(), j = task % a.r, z = task / a.r, stride = a.panel * kChunk;
  const int lane = lane_index();
  if (z >= a.slices) return;
  const Slice slice = slice_of(a, z);
  double sum[kProbes] = {};
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

// Sum over partial sums ------------------------------------------------------------------------------------------------

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
    for (int64_t b = warp_index(); b < a.count; b += kTotalWays) sum += a.partials[b * a.stride + at];
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
int run_small(const Arguments& a, int64_t blocks, int device, void* stream) {
  const auto run = [&](auto kernel, int bytes) { return launch(kernel, blocks, kThreads, bytes, device, stream, a); };
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

// Panels of columns, one after the other.
int run_large(Arguments a, int64_t most, int device, void* stream) {
  int error = clear(a.partials, a.slices * a.stride * 8, device, stream);
  const auto run = [&](auto kernel, int64_t warps) {
    if (error == 0) error = launch(kernel, divide_up(warps, kWarps), kThreads, 0, device, stream, a);
  };
  for (a.from = 0; a.from < a.chunks; a.from += most) {
    a.panel = a.chunks - a.from < most ? a.chunks - a.from : most;
    run(orthonormalize_differences_kernel, round_up(a.n, kBlock) * a.slices);
    if (a.transform) run(orthonormalize_transform_kernel, divide_up(a.r, kBlock) * a.panel);
    if (a.out) {
      run(orthonormalize_probe_kernel, a.panel);
      run(orthonormalize_probed_kernel, a.r * a.slices);
    } else {
      const int64_t blocks = divide_up(a.transform ? a.r : a.n, kBlock);
      run(orthonormalize_products_kernel, blocks * (blocks + 1) / 2 * a.slices);
    }
  }
  return error;
}

}  // namespace

OrthonormalizePlan orthonormalize_plan(int64_t n, int64_t r, int64_t chunks, bool transform, bool write) {
  OrthonormalizePlan plan{};
  const int64_t m = transform ? r : n, rows = round_up(n, 16);
  if (n <= kSmallRows) {
    plan.stride = (write ? rows * 8 : triangle(rows / 8)) + rows;
    const int64_t blocks = divide_up(chunks, 2 * kWarps) < kMostBlocks ? divide_up(chunks, 2 * kWarps) : kMostBlocks;  // two chunks a warp at least
    plan.per_block = blocks ? round_up(divide_up(chunks, blocks), kWarps) : kWarps;
    plan.parts = divide_up(chunks, plan.per_block);
    plan.space = transform ? (rows / 8) * (rows / 8) * 65 : 0;
    return plan;
  }
  plan.stride = (write ? round_up(m, 8) * 8 : triangle(divide_up(m, 8))) + rows;
  plan.parts = kPartialBytes / 8 / plan.stride;
  plan.parts = plan.parts < 1 ? 1 : plan.parts > kSlices ? kSlices : plan.parts;
  const int64_t per_chunk = kChunk * (round_up(n, kBlock) + (transform ? round_up(r, kBlock) : 0) + (write ? 8 : 0));
  plan.per_block = kPanelBytes / 8 / per_chunk;
  plan.per_block = plan.per_block < 1 ? 1 : plan.per_block > chunks ? chunks : plan.per_block;
  plan.space = plan.per_block * per_chunk;
  return plan;
}

int orthonormalize_pass_cuda(const DeviceTensor* rows, const DeviceTensor* center, const DeviceTensor* out, const int64_t* numel,
                             const int64_t* chunk_begin, int64_t count, int64_t chunks, int64_t n, const int32_t* parent, const double* transform,
                             int64_t r, const double* probes, int64_t first, double* partials, double* space, double* gram, double* norms, int device,
                             void* stream) {
  const OrthonormalizePlan plan = orthonormalize_plan(n, r, chunks, transform != nullptr, out != nullptr);
  const int64_t m = transform ? r : n, tiles = round_up(n, 16) / 8;
  Arguments a{};
  a.rows = rows, a.center = center, a.out = out, a.numel = numel, a.chunk_begin = chunk_begin, a.parent = parent, a.transform = transform;
  a.probes = probes, a.count = count, a.chunks = chunks, a.n = n, a.r = transform ? r : 0, a.first = first, a.per_block = plan.per_block;
  a.partials = partials, a.stride = plan.stride, a.fragments = space, a.slices = plan.parts;
  int error = 0;
  if (n <= kSmallRows) {
    if (transform) error = launch(orthonormalize_operands_kernel, tiles * tiles, 32, 0, device, stream, a);
    if (error == 0)
      error = out         ? run_small<kWrite>(a, plan.parts, device, stream)
              : transform ? run_small<kAgain>(a, plan.parts, device, stream)
                          : run_small<kGram>(a, plan.parts, device, stream);
  } else {
    const int64_t columns = plan.per_block * kChunk;
    a.v = space, a.u = space + round_up(n, kBlock) * columns, a.s = a.u + (transform ? round_up(r, kBlock) * columns : 0);
    error = run_large(a, plan.per_block, device, stream);
  }
  if (error != 0) return error;
  const TotalArguments total{partials,       plan.parts, plan.stride, plan.stride - round_up(n, 16), m, out ? kProbes : m, n, first,
                             out == nullptr, gram,       norms};
  return launch(orthonormalize_total_kernel, divide_up(total.m * total.width + n, 32), kTotalThreads, 8 * kTotalThreads, device, stream, total);
}

}  // namespace twa
