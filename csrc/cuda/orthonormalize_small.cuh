// orthonormalize_pass for up to 64 rows: one kernel, whose warps stream chunks and hold the
// triangle of V V^T in registers (see orthonormalize.cu).
#pragma once

#include "orthonormalize.cuh"

namespace twa {
namespace {

// Shared memory of a block, in bytes from its begin.
template <int kPairs>
struct Layout {
  static constexpr int kRows = 16 * kPairs,
                       kTiles = 2 * kPairs;  // rows of a slot without the center; tiles of 8 rows
  static constexpr int kSlotBytes = (kRows + 1) * kRowBytes;
  static constexpr int kBarriers = kWarps * kSlots * kSlotBytes;  // (warps, slots)
  static constexpr int kSource =
      kBarriers + 8 * kWarps * kSlots;  // (warps,) Tensors: rows and center
  static constexpr int kTarget = kSource + sizeof(Tensors) * kWarps;  // (warps,) Tensors: out
  static constexpr int kParents =
      kTarget + sizeof(Tensors) * kWarps;  // (kRows,) row_code of the parent
  static constexpr int kMasks =
      kParents +
      4 * kRows;  // (8,) of tiles of the transform that are not zero: bit = tile of its rows
  static constexpr int kTables = kMasks + 4 * 8;  // (warps, kRows + 1) tensors of rows, then center
  static constexpr int kOutputs = kTables + 16 * kWarps * (kRows + 1);  // (warps, kRows)
  static constexpr int kSquares =
      kOutputs +
      16 * kWarps * kRows;  // (warps, kPairs, lane) float64: a warp's sums, between chunks
  static constexpr int kProbeOperands =
      kSquares + 8 * 32 * kWarps * kPairs;             // (kRows, 8) float32: the probes' columns
  static constexpr int kLaneRows = (kRows + 31) / 32;  // of a lane in products with the probes
  static constexpr int kProbed =
      kProbeOperands +
      32 * kRows;  // (warps, 32 columns, 6) float32: probes * V, four of them and two apart
  static constexpr int kSums =
      kProbed + kWarps * 32 * 4 *
                    kProbes;  // (warps, kLaneRows, 6, lane) float64: a warp's sums, between chunks
  static constexpr int bytes(Form form) {
    return form == kWrite   ? kSums + 8 * 32 * kProbes * kLaneRows * kWarps
           : form == kAgain ? kProbeOperands
                            : kOutputs;
  }
};
static_assert(sizeof(DeviceTensor) == 16 && Layout<1>::kTables % 16 == 0 &&
                  Layout<4>::kTables % 16 == 0,
              "operands are read 16 bytes at a time");
static_assert(Layout<4>::bytes(kWrite) <= 99 << 10,
              "two blocks share a multiprocessor; one fits on sm_86 and later");

// A warp's slots, and how they are filled.
template <int kPairs>
struct Stream {
  using L = Layout<kPairs>;
  TWA_DEVICE uint8_t* slot(int k) const {
    return shared_memory() + (warp_index() * kSlots + k) * L::kSlotBytes;
  }
  TWA_DEVICE uint64_t* barrier(int k) const {
    return reinterpret_cast<uint64_t*>(shared_memory() + L::kBarriers) + warp_index() * kSlots + k;
  }

  TWA_DEVICE double* squares() const {
    return reinterpret_cast<double*>(shared_memory() + L::kSquares) + warp_index() * 32 * kPairs +
           lane_index();
  }

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
    DeviceTensor* const table = reinterpret_cast<DeviceTensor*>(shared_memory() + L::kTables) +
                                warp_index() * (L::kRows + 1);
    const int tensors = static_cast<int>(a.n) + (a.center ? 1 : 0), lane = lane_index();
    source.seek(a, chunk, tensors, [&](int64_t tensor, int i) {
      return table[i] = i < a.n ? a.rows[tensor * a.n + i] : a.center[tensor];
    });
    const int64_t column = source.at.column(chunk);
    const int columns = source.at.columns(chunk);
    const uint64_t policy = evict_normal();
    uint8_t* const to = slot(k);
    const auto row_of = [&](int i) {
      return row_code(static_cast<uint32_t>(i < a.n ? i : L::kRows));
    };
    if (source.aligned && columns == kChunk) {
      for (int i = lane / 8; i < tensors; i += 4)
        copy_16(to + (row_of(i) ^ (16 * (lane % 8))),
                static_cast<const float*>(table[i].data) + column + 4 * (lane % 8), policy);
    } else if (source.halves && columns == kChunk) {
      constexpr int kAtOnce = 4;  // loads before their first use
      for (int i0 = lane / 8; i0 < tensors; i0 += 4 * kAtOnce) {
        uint2 w[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
          if (i0 + 4 * k < tensors)
            w[k] = load_8(static_cast<const uint16_t*>(table[i0 + 4 * k].data) + column +
                          4 * (lane % 8));
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int i = i0 + 4 * k;
          if (i >= tensors) break;
          *reinterpret_cast<uint4*>(to + (row_of(i) ^ (16 * (lane % 8)))) =
              widen(table[i].dtype, w[k]);
        }
      }
    } else {
      for (int i = 0; i < tensors; ++i) {  // lane = column
        uint8_t* p = to + (row_of(i) ^ (16 * (lane / 4))) + 4 * (lane % 4);
        fill_element(p, table[i], column + lane, lane < columns, policy);
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
TWA_DEVICE void add_products(double (&sums)[kPairs * (2 * kPairs + 1)][2],
                             const double (&v)[2 * kPairs][2]) {
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const int upper = p * (2 * p + 1),
              lower =
                  (p + 1) * (2 * p + 1);  // numbers of the first tiles of tile rows 2 p and 2 p + 1
#pragma unroll
    for (int k = 0; k <= 2 * p; ++k)
      multiply_add_f64(sums[upper + k], sums[lower + k], v[2 * p], v[2 * p + 1], v[k]);
#pragma unroll
    for (int e = 0; e < 2; ++e)
      multiply_add_f64(sums[lower + 2 * p + 1], v[2 * p + 1][e], v[2 * p + 1][e]);
  }
}

// made = transform * V for kBlocks * 8 columns: made[j][b][e] is row g of tile j, column index 2 t
// + e of block b, where load(k, own, parents) gives what lane (g, t) has of row 4 k + t: column
// index g of every block, and of the parent. squares[32 h] += squares of row 16 h + 8 (g / 2 % 2) +
// 4 (g % 2) + t: half of it, the lanes of g / 4 have each their own.
template <int kPairs, int kBlocks, class Load>
TWA_DEVICE void transform_rows(const double* fragments, const uint32_t* masks, const Load& load,
                               double (&made)[2 * kPairs][kBlocks][2], double* squares) {
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
    const double one =
        (g & 1 ? square[1] : square[0]) + shuffle_xor(g & 1 ? square[0] : square[1], 4);
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
        for (int b = 0; b < kBlocks; ++b)
          multiply_add_f64(made[2 * p][b], made[2 * p + 1][b], upper, lower, v[b]);
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

// n <= 64 -----------------------------------------------------------------------------------------

template <int kForm, int kPairs>
TWA_KERNEL(kThreads, 2)
orthonormalize_kernel(Arguments a) {
  using L = Layout<kPairs>;
  constexpr int kTiles = L::kTiles, kSums = kForm == kWrite ? kTiles : kPairs * (kTiles + 1);
  const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
  uint8_t* const shared = shared_memory();
  uint32_t* const parents = reinterpret_cast<uint32_t*>(shared + L::kParents);
  float* const probe_operands = reinterpret_cast<float*>(shared + L::kProbeOperands);
  double* const kept =
      reinterpret_cast<double*>(shared + L::kSums) + warp * L::kLaneRows * kProbes * 32 + lane;
  uint32_t* const masks = reinterpret_cast<uint32_t*>(shared + L::kMasks);
  for (int i = thread_index(); i < L::kRows; i += kThreads) {
    const int parent = i >= a.n ? i
                       : a.parent[i] >= 0
                           ? a.parent[i]
                           : L::kRows;  // rows past the last: their own, so that they stay zero
    parents[i] = row_code(static_cast<uint32_t>(parent));
  }
  if constexpr (kForm == kWrite)
    for (int k = thread_index(); k < 8 * L::kRows; k += kThreads)
      probe_operands[k] =
          k % 8 < kProbes && k / 8 < a.r ? static_cast<float>(a.probes[k % 8 * a.r + k / 8]) : 0.0f;
  if constexpr (kForm != kGram)
    for (int q = thread_index(); q < kTiles; q += kThreads) {
      uint32_t mask = 0;
      for (int j = 0; j < kTiles; ++j)
        mask |= static_cast<uint32_t>(a.fragments[kTiles * kTiles * 64 + j * kTiles + q] != 0.0)
                << j;
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
  const uint32_t row_g = row_code(static_cast<uint32_t>(g)),
                 row_t = row_code(static_cast<uint32_t>(t));
  uint32_t parent_g[kPairs];  // kGram: of row g of tiles 2 p and 2 p + 1, 16 bits each
  if constexpr (kForm == kGram)
#pragma unroll
    for (int p = 0; p < kPairs; ++p)
      parent_g[p] = parents[16 * p + g] | parents[16 * p + 8 + g] << 16;
  static_assert(L::kSlotBytes <= 1 << 16, "row codes have 16 bits");

  const int64_t begin = block_index() * a.per_block;
  const int count =
      static_cast<int>(begin + a.per_block < a.chunks ? a.per_block : a.chunks - begin);
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
          const uint2 w =
              *reinterpret_cast<const uint2*>(slot + i * 8 * kRowBytes + (row_g ^ piece) + half);
          const uint2 p = *reinterpret_cast<const uint2*>(
              slot + ((parent_g[i / 2] >> i % 2 * 16 & 0xffff) ^ piece) + half);
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
      for (int h = 0; h < kChunk / 8;
           ++h) {  // lane: column 8 h + g of V, then columns 8 h + 2 t, + 1 of what is made
        const uint32_t piece = 16 * (2 * h + g / 4), word = g % 4 * 4;
        double made[kTiles][1][2], v[kTiles][2];
        transform_rows<kPairs, 1>(
            a.fragments, masks,
            [&](int k, uint32_t (&own)[1], uint32_t (&parent)[1]) {
              own[0] = *reinterpret_cast<const uint32_t*>(slot + k * 4 * kRowBytes +
                                                          (row_t ^ piece ^ (16 * (k & 1))) + word);
              parent[0] =
                  *reinterpret_cast<const uint32_t*>(slot + (parents[4 * k + t] ^ piece) + word);
            },
            made, stream.squares());
#pragma unroll
        for (int i = 0; i < kTiles; ++i) v[i][0] = made[i][0][0], v[i][1] = made[i][0][1];
        add_products<kPairs>(sums, v);
      }
    } else {
      const int64_t chunk = block_index() * a.per_block + k;
      Tensors& target = reinterpret_cast<Tensors*>(shared + L::kTarget)[warp];
      DeviceTensor* const outputs =
          reinterpret_cast<DeviceTensor*>(shared + L::kOutputs) + warp * L::kRows;
      target.seek(a, chunk, static_cast<int>(a.r),
                  [&](int64_t tensor, int i) { return outputs[i] = a.out[tensor * a.r + i]; });
      {
        double made[kTiles][4][2];
        transform_rows<kPairs, 4>(
            a.fragments, masks,
            [&](int k, uint32_t (&own)[4],
                uint32_t (&parent)[4]) {  // lane: columns 4 g .. 4 g + 3 of V, then 8 t .. 8 t + 7
                                          // of what is made
              const uint4 w = *reinterpret_cast<const uint4*>(slot + k * 4 * kRowBytes +
                                                              (row_t ^ (16 * (g ^ (k & 1)))));
              const uint4 p =
                  *reinterpret_cast<const uint4*>(slot + (parents[4 * k + t] ^ (16 * g)));
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
              for (int b = 0; b < 4; ++b)
                w[b] = float_bits(rounded(dtype, static_cast<float>(made[j][b][e])));
              *reinterpret_cast<uint4*>(slot + j * 8 * kRowBytes + (row_g ^ (16 * (2 * t + e)))) =
                  uint4{w[0], w[1], w[2], w[3]};
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
      // Lane: rows 4 i + lane / 8, columns 4 (lane % 8) .. + 3. They are stored, and multiplied by
      // the probes: float32 sums over a chunk, as on the CPU.
      float product[4][kProbes] = {};
#pragma unroll 4
      for (int i = 0; i < L::kRows / 4; ++i) {
        const int row = 4 * i + lane / 8;
        const uint4 w = *reinterpret_cast<const uint4*>(
            slot + (row_code(static_cast<uint32_t>(row)) ^ (16 * (lane % 8))));
        if (whole && row >= a.first && row < a.r)
          store_16(static_cast<float*>(outputs[row].data) + column + 4 * (lane % 8), w);
        float probe[kProbes];
        load_probes(probe_operands + 8 * row, probe_operands + 8 * row + 4, probe);
#pragma unroll
        for (int p = 0; p < kProbes; ++p) {
          product[0][p] = fmaf(probe[p], bits_float(w.x), product[0][p]),
          product[1][p] = fmaf(probe[p], bits_float(w.y), product[1][p]);
          product[2][p] = fmaf(probe[p], bits_float(w.z), product[2][p]),
          product[3][p] = fmaf(probe[p], bits_float(w.w), product[3][p]);
        }
      }
      if (!whole && lane < columns)
        for (int i = static_cast<int>(a.first); i < a.r; ++i)
          store_element(outputs[i], column + lane,
                        *reinterpret_cast<const float*>(
                            slot + (row_code(static_cast<uint32_t>(i)) ^ (16 * (lane / 4))) +
                            4 * (lane % 4)));
      float* const probed = reinterpret_cast<float*>(shared + L::kProbed) + warp * 32 * kProbes;
      float one[kProbes];  // of column 4 (lane % 8) + lane / 16 * 2 + lane / 8 % 2
      add_classes(product, one);
      *reinterpret_cast<uint4*>(probed + 4 * lane) =
          uint4{float_bits(one[0]), float_bits(one[1]), float_bits(one[2]), float_bits(one[3])};
      *reinterpret_cast<uint2*>(probed + 128 + 2 * lane) =
          uint2{float_bits(one[4]), float_bits(one[5])};
      sync_warp();
      // V * (probes * V)^T. Lane: rows lane and lane + 32.
      float sum[L::kLaneRows][kProbes] = {};
#pragma unroll 2
      for (int piece = 0; piece < kChunk / 4; ++piece) {
        float v[L::kLaneRows][4];
#pragma unroll
        for (int z = 0; z < L::kLaneRows; ++z) {
          const int row = lane + 32 * z < L::kRows ? lane + 32 * z : L::kRows - 1;
          const uint4 w = *reinterpret_cast<const uint4*>(
              slot + (row_code(static_cast<uint32_t>(row)) ^ (16 * piece)));
          v[z][0] = bits_float(w.x), v[z][1] = bits_float(w.y), v[z][2] = bits_float(w.z),
          v[z][3] = bits_float(w.w);
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
        for (int p = 0; p < kProbes; ++p)
          kept[32 * (z * kProbes + p)] += static_cast<double>(sum[z][p]);
    }
    sync_warp();  // everybody has read the slot
    if (k + kSlots * kWarps < count)
      stream.fill(a, slot_index, block_index() * a.per_block + k + kSlots * kWarps);
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
        for (int p = 0; p < 8 && lane + 32 * z < L::kRows; ++p)
          add(total[8 * (lane + 32 * z) + p], p < kProbes ? kept[32 * (z * kProbes + p)] : 0.0);
    } else {
#pragma unroll
      for (int k = 0; k < kSums; ++k)
        add(total[64 * k + 2 * lane], sums[k][0]), add(total[64 * k + 2 * lane + 1], sums[k][1]);
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

}  // namespace
}  // namespace twa
