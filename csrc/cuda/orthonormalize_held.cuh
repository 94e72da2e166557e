// orthonormalize_pass for more than 64 rows: a block streams chunks and holds V of one of them in
// shared memory, as float64; its warps share the products (see orthonormalize.cu).
#pragma once

#include <utility>

#include "orthonormalize.cuh"

namespace twa {
namespace {

// What a block holds: all rows; or one group of rows, or two of which it takes the products of the
// first with the second, so that blocks share the triangle between them.
enum Shape { kWhole, kDiagonal, kSquare };

constexpr int kHeldRowBytes = 8 * kChunk;
// V's row i begins at held_code(i) bytes, its piece k of two columns at held_code(i) ^ 16 k: four
// pieces of rows i and i + 1 (i even) are in different banks, and halves of two pieces of rows i ..
// i + 3.
TWA_HD constexpr uint32_t held_code(uint32_t i) {
  return i * kHeldRowBytes + (4 * (i & 1) + (i & 2)) * 16;
}

// 16 rows (a strip) times 8 rows (a tile) of the products; on the diagonal the second tile of a
// strip has one half.
struct Unit {
  int strip, tile;
};

template <int kForm, int kShape, int kBlocks>
struct Held {
  static constexpr int kRows = 16 * kBlocks, kTiles = 2 * kBlocks;
  static constexpr int kTeam = kBlocks > 8 ? 8 : 4, kMembers = 32 * kTeam;  // warps, threads
  // Units, in order, a warp's lie together: few tiles of V in many products.
  static constexpr int kAllUnits =
      kShape == kSquare ? kBlocks / 2 * kBlocks : kBlocks * (kBlocks + 1);
  static constexpr int kUnits = kForm == kWrite ? 0 : (kAllUnits + kTeam - 1) / kTeam;
  TWA_HD static constexpr Unit unit(int u) {
    if (kShape == kSquare && kBlocks == 8)  // a warp's: two strips and half of the tiles
      return {u / 16 * 2 + u % 8 / 4, kBlocks + u / 8 % 2 * 4 + u % 4};
    if (kShape == kSquare) return {u / kBlocks, kBlocks + u % kBlocks};
    int strip = 0;
    while (u >= 2 * strip + 2) u -= 2 * strip + 2, ++strip;
    return {strip, u};
  }
  // A strip of the transform takes 2 strip + 2 tiles of V: a warp has one strip from the end and
  // one from the begin.
  TWA_DEVICE static int strip(int z) {
    return z ? warp_index() + kBlocks - 2 * kTeam : kBlocks - 1 - warp_index();
  }

  // A slot: rows, the center, and parents that are not among the rows.
  static constexpr bool kFar = kShape != kWhole, kFromPanel = kForm == kPanel;
  static constexpr int kSlotRows = kFromPanel ? kRows : kRows + 1 + (kFar ? kRows : 0);
  static constexpr int kSlotBytes = kSlotRows * (kFromPanel ? kHeldRowBytes : kRowBytes);
  static constexpr int kSlots =
      kTeam == 8 ? 1 : 2;  // of a block; two blocks share a multiprocessor
  // Shared memory of a block, in bytes from its begin.
  static constexpr int kV = kSlots * kSlotBytes;
  static constexpr int kBarriers = kV + (kFromPanel ? 0 : kRows * kHeldRowBytes);  // (2,)
  static constexpr int kSource = kBarriers + 16;                      // (warps,) Tensors: rows
  static constexpr int kTarget = kSource + sizeof(Tensors) * kTeam;   // (warps,) Tensors: out
  static constexpr int kNumbers = kTarget + sizeof(Tensors) * kTeam;  // (kSlotRows,) what is where
  static constexpr int kParents = kNumbers + 4 * kSlotRows;           // (kRows,) row_code, 16 bits
  static constexpr int kMasks =
      kParents + 2 * kRows;  // (kTiles,) tiles of the transform that are not zero, as in Layout
  static constexpr int kBytes = kMasks + (kForm == kAgain || kForm == kWrite ? 4 * kTiles : 0);
  static constexpr int kProbed = kV;  // (warps, 32 columns, 8) float32: parts of probes * V, when V
                                      // has been read
  static_assert(kFromPanel || kTeam * kChunk * 32 <= kRows * kHeldRowBytes, "they fit");
  static_assert(kSlotBytes <= 1 << 16, "row codes have 16 bits");
  static constexpr int kResident = kTeam == 8 || kUnits > 5 ? 2 : 3;
  static_assert(kBytes <= 99 << 10, "one block fits on sm_86 and later");
};

// Slot row s <-> row of W, or of the panel.
template <class H, int kShape>
struct Places {
  static constexpr int64_t kGroup = kShape == kSquare ? H::kRows / 2 : H::kRows;
  int64_t part = block_index(), upper = 0, lower = 0;  // groups; the one above gives the columns

  TWA_DEVICE explicit Places(const Arguments& a) {
    if constexpr (kShape == kDiagonal)
      part = block_index() / a.groups, lower = block_index() % a.groups;
    if constexpr (kShape == kSquare) {
      const int64_t pairs = a.groups * (a.groups - 1) / 2;
      part = block_index() / pairs, upper = block_index() % pairs, lower = 1;
      while (upper >= lower) upper -= lower++;
    }
  }
  TWA_DEVICE int64_t row(int s) const {
    return kShape == kSquare && s >= kGroup ? upper * kGroup + s - kGroup : lower * kGroup + s;
  }
  // -1: not here.
  TWA_DEVICE int slot_row(int64_t row) const {
    if (row / kGroup == lower) return static_cast<int>(row % kGroup);
    if (kShape == kSquare && row / kGroup == upper) return static_cast<int>(row % kGroup + kGroup);
    return -1;
  }
};

// A block's slots, and how they are filled.
template <class H>
struct Feed {
  TWA_DEVICE uint8_t* slot(int k) const { return shared_memory() + k * H::kSlotBytes; }
  TWA_DEVICE uint64_t* barrier(int k) const {
    return reinterpret_cast<uint64_t*>(shared_memory() + H::kBarriers) + k;
  }
  TWA_DEVICE int32_t* numbers() const {
    return reinterpret_cast<int32_t*>(shared_memory() + H::kNumbers);
  }
  TWA_DEVICE Tensors& source() const {
    return reinterpret_cast<Tensors*>(shared_memory() + H::kSource)[warp_index()];
  }

  // numbers() are there. What no copy fills stays zero.
  TWA_DEVICE void open() const {
    if (thread_index() < H::kSlots) barrier_init(barrier(thread_index()), H::kMembers);
    barrier_publish();
    for (int k = 0; k < H::kSlots; ++k)
      for (int s = warp_index(); s < H::kSlotRows; s += H::kTeam)
        for (int w = lane_index(); numbers()[s] < 0 && w < H::kSlotBytes / H::kSlotRows / 4;
             w += 32)
          reinterpret_cast<uint32_t*>(slot(k) + s * (H::kSlotBytes / H::kSlotRows))[w] = 0;
    source().open();
    sync_block();
  }
  // Begins to fill a slot. All threads have finished with it.
  TWA_DEVICE void fill(const Arguments& a, int k, int64_t chunk) const {
    uint8_t* const to = slot(k);
    const uint64_t policy = evict_normal();
    const int lane = lane_index(), from = 4 * warp_index() + lane / 8, piece = lane % 8;
    constexpr int kStep = 4 * H::kTeam;
    if constexpr (H::kFromPanel) {
      for (int s = from; s < H::kSlotRows; s += kStep) {
        const int64_t row = numbers()[s];
        if (row < 0) continue;
        const double* const at = a.u + row * a.panel * kChunk + chunk * kChunk;
        for (int p = piece; p < kChunk / 2; p += 8)
          copy_16(to + (held_code(static_cast<uint32_t>(s)) ^ (16 * p)), at + 2 * p, policy);
      }
    } else {
      Tensors& tensors = source();
      tensors.seek(a, chunk, static_cast<int>(a.n) + (a.center ? 1 : 0),
                   [&](int64_t tensor, int i) {
                     return i < a.n ? a.rows[tensor * a.n + i] : a.center[tensor];
                   });
      const int64_t tensor = tensors.at.tensor, column = tensors.at.column(chunk);
      const int columns = tensors.at.columns(chunk);
      const auto tensor_of = [&](int row) {
        return row < a.n ? a.rows[tensor * a.n + row] : a.center[tensor];
      };
      const auto place = [&](int s, int p) {
        return to + (row_code(static_cast<uint32_t>(s)) ^ (16 * p));
      };
      if (tensors.aligned && columns == kChunk) {
#pragma unroll 4
        for (int s = from; s < H::kSlotRows; s += kStep) {
          const int row = numbers()[s];
          if (row >= 0)
            copy_16(place(s, piece),
                    static_cast<const float*>(tensor_of(row).data) + column + 4 * piece, policy);
        }
      } else if (tensors.halves && columns == kChunk) {
        constexpr int kAtOnce = 4;  // loads before their first use
        for (int s0 = from; s0 < H::kSlotRows; s0 += kStep * kAtOnce) {
          uint2 w[kAtOnce];
          Dtype dtype[kAtOnce];
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) {
            const int s = s0 + kStep * k, row = s < H::kSlotRows ? numbers()[s] : -1;
            if (row < 0) continue;
            const DeviceTensor t = tensor_of(row);
            dtype[k] = t.dtype;
            w[k] = load_8(static_cast<const uint16_t*>(t.data) + column + 4 * piece);
          }
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) {
            const int s = s0 + kStep * k;
            if (s >= H::kSlotRows || numbers()[s] < 0) continue;
            *reinterpret_cast<uint4*>(place(s, piece)) = widen(dtype[k], w[k]);
          }
        }
      } else {
#pragma unroll 4
        for (int s = warp_index(); s < H::kSlotRows; s += H::kTeam) {  // lane = column
          const int row = numbers()[s];
          if (row < 0) continue;
          uint8_t* const p = place(s, lane / 4) + 4 * (lane % 4);
          fill_element(p, tensor_of(row), column + lane, lane < columns, policy);
        }
      }
    }
    barrier_arrive_after_copies(barrier(k));
  }
  // What threads stored themselves is there too: they all have synchronised since.
  TWA_DEVICE uint8_t* wait(int k, uint32_t parity) const {
    barrier_wait(barrier(k), parity);
    return slot(k);
  }
};

// sums += V V^T for 8 columns, a warp's units: v[i][e] is row g of tile i, column 2 t + e.
template <class H, bool kSquares, int kWarp, int... kIndex>
TWA_DEVICE void add_units(double (&sums)[H::kUnits][2][2], const double (&v)[H::kTiles][2],
                          std::integer_sequence<int, kIndex...>) {
  const auto add = [&](auto index) {
    constexpr int k = decltype(index)::value, u = kWarp * H::kUnits + k;
    if constexpr (u < H::kAllUnits) {
      constexpr Unit at = H::unit(u);
      if constexpr (kSquares || at.tile <= 2 * at.strip) {
        multiply_add_f64(sums[k][0], sums[k][1], v[2 * at.strip], v[2 * at.strip + 1], v[at.tile]);
      } else {
        for (int e = 0; e < 2; ++e) multiply_add_f64(sums[k][1], v[at.tile][e], v[at.tile][e]);
      }
    }
  };
  (add(std::integral_constant<int, kIndex>()), ...);
}
template <class H, bool kSquares, int kWarp>
TWA_DEVICE void add_chunk(double (&sums)[H::kUnits][2][2], const uint8_t* held) {
  const uint32_t g = static_cast<uint32_t>(lane_index()) / 4, t = lane_index() % 4;
#pragma unroll 1
  for (uint32_t h = 0; h < kChunk / 8; ++h) {  // lane: columns 8 h + 2 t, + 1
    double v[H::kTiles][2];
#pragma unroll
    for (int i = 0; i < H::kTiles; ++i) {  // those that the units need are loaded
      const uint4 w = *reinterpret_cast<const uint4*>(held + i * 8 * kHeldRowBytes +
                                                      (held_code(g) ^ (16 * (4 * h + t))));
      memcpy(v[i], &w, sizeof(v[i]));
    }
    add_units<H, kSquares, kWarp>(sums, v, std::make_integer_sequence<int, H::kUnits>());
  }
}

// made = transform * V for a strip and kCount times 8 columns, from block b0 of 8 columns on:
// made[half][b][e] is row g of half of the strip, column 8 (b0 + b) + 2 t + e.
template <class H, int kCount>
TWA_DEVICE void transform_strip(const double* fragments, const uint8_t* held, int strip, int b0,
                                double (&made)[2][kCount][2]) {
  const uint32_t* const masks = reinterpret_cast<const uint32_t*>(shared_memory() + H::kMasks);
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int b = 0; b < kCount; ++b) made[half][b][0] = made[half][b][1] = 0.0;
#pragma unroll 1
  for (int q = 0; q < H::kTiles; ++q) {
    if (strip < 0 || !(masks[q] >> (2 * strip) & 3)) continue;
    const double* const at = fragments + ((2 * strip * H::kTiles + q) * 32 + lane) * 2;
    const uint4 w[2] = {load_16(at), load_16(at + H::kTiles * 64)};
    double v[kCount][2], upper[2], lower[2];
#pragma unroll
    for (int b = 0; b < kCount; ++b)
#pragma unroll
      for (int u = 0; u < 2; ++u)
        v[b][u] = *reinterpret_cast<const double*>(
            held + (8 * q + 4 * u) * kHeldRowBytes +
            (held_code(static_cast<uint32_t>(t)) ^ (16 * (4 * (b0 + b) + g / 2))) + g % 2 * 8);
    memcpy(upper, &w[0], sizeof(upper)), memcpy(lower, &w[1], sizeof(lower));
#pragma unroll
    for (int b = 0; b < kCount; ++b) multiply_add_f64(made[0][b], made[1][b], upper, lower, v[b]);
  }
}

template <int kForm, int kShape, int kBlocks>
TWA_KERNEL((Held<kForm, kShape, kBlocks>::kMembers), (Held<kForm, kShape, kBlocks>::kResident))
orthonormalize_held_kernel(Arguments a) {
  using H = Held<kForm, kShape, kBlocks>;
  constexpr bool kTransformed = kForm == kAgain || kForm == kWrite;
  const int thread = thread_index(), warp = warp_index(), lane = lane_index(), g = lane / 4,
            t = lane % 4;
  uint8_t* const shared = shared_memory();
  const Feed<H> feed;
  uint16_t* const parents = reinterpret_cast<uint16_t*>(shared + H::kParents);
  const Places<H, kShape> places(a);
  const int64_t m = kForm == kGram ? a.n : a.r;

  for (int s = thread; s < H::kSlotRows; s += H::kMembers) {
    int64_t number = -1;
    if (H::kFromPanel) {
      number = places.row(s) < m ? places.row(s) : -1;
    } else if (s < H::kRows) {
      number = places.row(s) < a.n ? places.row(s) : -1;
    } else if (s == H::kRows) {
      number = a.center ? a.n : -1;
    } else if (places.row(s - H::kRows - 1) < a.n) {
      const int parent = a.parent[places.row(s - H::kRows - 1)];
      if (parent >= 0 && places.slot_row(parent) < 0) number = parent;
    }
    feed.numbers()[s] = static_cast<int32_t>(number);
  }
  if constexpr (!H::kFromPanel)
    for (int s = thread; s < H::kRows; s += H::kMembers) {
      int at = s;  // rows past the last: their own, so that they stay zero
      if (places.row(s) < a.n) {
        const int parent = a.parent[places.row(s)];
        at = parent < 0 ? H::kRows : places.slot_row(parent);
        if (at < 0) at = H::kRows + 1 + s;
      }
      parents[s] = static_cast<uint16_t>(row_code(static_cast<uint32_t>(at)));
    }
  if constexpr (kTransformed)
    for (int q = thread; q < H::kTiles; q += H::kMembers) {
      uint32_t mask = 0;
      for (int j = 0; j < H::kTiles; ++j)
        mask |= static_cast<uint32_t>(a.fragments[H::kTiles * H::kTiles * 64 + j * H::kTiles + q] !=
                                      0.0)
                << j;
      reinterpret_cast<uint32_t*>(shared + H::kMasks)[q] = mask;
    }
  if constexpr (kForm == kWrite) reinterpret_cast<Tensors*>(shared + H::kTarget)[warp].open();
  sync_block();
  feed.open();

  // Differences and squares: a thread has a piece of four columns, of every kClasses-th row.
  constexpr int kClasses = H::kMembers / 8, kTurns = (H::kRows + kClasses - 1) / kClasses;
  static_assert(kTurns <= 8, "a lane goes on with one of eight sums");
  const int row_class = thread / 8, piece = thread % 8;
  double sums[H::kUnits + (H::kUnits == 0)][2][2] = {}, square = 0.0, kept[kProbes] = {};

  const int64_t all = H::kFromPanel ? a.panel : a.chunks, begin = places.part * a.per_block;
  const int count =
      begin >= all ? 0 : static_cast<int>(begin + a.per_block < all ? a.per_block : all - begin);
  for (int k = 0; k < H::kSlots && k < count; ++k) feed.fill(a, k, begin + k);
  sync_block();
  uint32_t parity = 0;
  int slot_index = 0;
#pragma unroll 1
  for (int k = 0; k < count; ++k) {
    uint8_t* const slot = feed.wait(slot_index, parity);
    uint8_t* const held = H::kFromPanel ? slot : shared + H::kV;
    const auto refill = [&] {
      if (k + H::kSlots < count) feed.fill(a, slot_index, begin + k + H::kSlots);
    };
    if constexpr (!H::kFromPanel) {
      double squares[8] = {};
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
        const int row = kClasses * i + row_class;
        if (kTurns * kClasses > H::kRows && row >= H::kRows) break;
        const uint4 w = *reinterpret_cast<const uint4*>(
            slot + (row_code(static_cast<uint32_t>(row)) ^ (16 * piece)));
        const uint4 p = *reinterpret_cast<const uint4*>(slot + (parents[row] ^ (16 * piece)));
        const double x[4] = {widened(w.x), widened(w.y), widened(w.z), widened(w.w)};
        const double v[2][2] = {{x[0] - widened(p.x), x[1] - widened(p.y)},
                                {x[2] - widened(p.z), x[3] - widened(p.w)}};
        squares[i] = fma(x[0], x[0], x[1] * x[1]) + fma(x[2], x[2], x[3] * x[3]);
#pragma unroll
        for (int e = 0; e < 2; ++e) {  // in an order that has eight lanes in different banks
          const int second = e ^ piece / 4;
          const double two[2] = {second ? v[1][0] : v[0][0], second ? v[1][1] : v[0][1]};
          uint4 pair;
          memcpy(&pair, two, sizeof(pair));
          *reinterpret_cast<uint4*>(
              held + (held_code(static_cast<uint32_t>(row)) ^ (16 * (2 * piece + second)))) = pair;
        }
      }
      // Over the pieces of a row; each lane goes on with one of its rows.
#pragma unroll
      for (int h = 4; h > 0; h /= 2)
#pragma unroll
        for (int i = 0; i < h; ++i)
          squares[i] = (piece & h ? squares[i + h] : squares[i]) +
                       shuffle_xor(piece & h ? squares[i] : squares[i + h], h);
      square += squares[0];
      sync_block();
    }
    if constexpr (kForm == kGram || kForm == kAgain) refill();
    if constexpr (kForm == kAgain) {
      constexpr int kCount = 2;  // of four blocks of columns: the sums take registers
#pragma unroll 1
      for (int b0 = 0; b0 < kChunk / 8; b0 += kCount) {
        double made[2][2][kCount][2];
#pragma unroll
        for (int z = 0; z < 2; ++z)
          transform_strip<H, kCount>(a.fragments, held, H::strip(z), b0, made[z]);
        sync_block();  // everybody has read these columns
#pragma unroll
        for (int z = 0; z < 2; ++z) {
          const int strip = H::strip(z);
          if (strip < 0) continue;
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int b = 0; b < kCount; ++b) {
              uint4 pair;
              memcpy(&pair, made[z][half][b], sizeof(pair));
              *reinterpret_cast<uint4*>(
                  held + (16 * strip + 8 * half) * kHeldRowBytes +
                  (held_code(static_cast<uint32_t>(g)) ^ (16 * (4 * (b0 + b) + t)))) = pair;
            }
        }
      }
      sync_block();
    }
    if constexpr (kForm != kWrite) {
      switch (warp) {
        case 0:
          add_chunk<H, kShape == kSquare, 0>(sums, held);
          break;
        case 1:
          add_chunk<H, kShape == kSquare, 1>(sums, held);
          break;
        case 2:
          add_chunk<H, kShape == kSquare, 2>(sums, held);
          break;
        default:
          add_chunk<H, kShape == kSquare, 3>(sums, held);
      }
    } else {
      Tensors& target = reinterpret_cast<Tensors*>(shared + H::kTarget)[warp];
      target.seek(a, begin + k, static_cast<int>(a.r),
                  [&](int64_t tensor, int i) { return a.out[tensor * a.r + i]; });
      const DeviceTensor* const out = a.out + target.at.tensor * a.r;
      {
        // To where W was: everybody has read it.
#pragma unroll 1
        for (int z = 0; z < 2; ++z) {
          const int strip = H::strip(z);
          if (strip < 0) continue;
          double made[2][4][2];
          transform_strip<H, 4>(a.fragments, held, strip, 0, made);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = 16 * strip + 8 * half + g;
            if (row >= a.n) continue;  // they stay zero
            const Dtype dtype = target.mixed && row < a.r ? out[row].dtype : Dtype::f32;
#pragma unroll
            for (int b = 0; b < 4; ++b)
              *reinterpret_cast<uint2*>(
                  slot + (row_code(static_cast<uint32_t>(row)) ^ (16 * (2 * b + t / 2))) +
                  t % 2 * 8) =
                  uint2{float_bits(rounded(dtype, static_cast<float>(made[half][b][0]))),
                        float_bits(rounded(dtype, static_cast<float>(made[half][b][1])))};
          }
        }
      }
      sync_block();
      const int64_t column = target.at.column(begin + k);
      const int columns = target.at.columns(begin + k);
      const bool whole = target.aligned && columns == kChunk;
      // Rows and columns as for differences. They are stored, and multiplied by the probes: float32
      // sums over a chunk, as on the CPU.
      float product[4][kProbes] = {};
#pragma unroll 2
      for (int i = 0; i < kTurns; ++i) {
        const int row = kClasses * i + row_class;
        if (kTurns * kClasses > H::kRows && row >= H::kRows) break;
        const uint4 w = *reinterpret_cast<const uint4*>(
            slot + (row_code(static_cast<uint32_t>(row)) ^ (16 * piece)));
        if (whole && row >= a.first && row < a.r)
          store_16(static_cast<float*>(out[row].data) + column + 4 * piece, w);
        const float* const from = probe_operands(a) + 8 * row;
        const uint4 four = load_16(from);
        const uint2 two = load_8(from + 4);
        const float probe[kProbes] = {bits_float(four.x), bits_float(four.y), bits_float(four.z),
                                      bits_float(four.w), bits_float(two.x),  bits_float(two.y)};
#pragma unroll
        for (int p = 0; p < kProbes; ++p) {
          product[0][p] = fmaf(probe[p], bits_float(w.x), product[0][p]),
          product[1][p] = fmaf(probe[p], bits_float(w.y), product[1][p]);
          product[2][p] = fmaf(probe[p], bits_float(w.z), product[2][p]),
          product[3][p] = fmaf(probe[p], bits_float(w.w), product[3][p]);
        }
      }
      if (!whole && lane < columns)
        for (int i = static_cast<int>(a.first) + warp; i < a.r; i += H::kTeam)
          store_element(out[i], column + lane,
                        *reinterpret_cast<const float*>(
                            slot + (row_code(static_cast<uint32_t>(i)) ^ (16 * (lane / 4))) +
                            4 * (lane % 4)));
      float one[kProbes];
      const int mine = 4 * piece + add_classes(product, one);
      float* const probed = reinterpret_cast<float*>(shared + H::kProbed);
      *reinterpret_cast<uint4*>(probed + 8 * (32 * warp + mine)) =
          uint4{float_bits(one[0]), float_bits(one[1]), float_bits(one[2]), float_bits(one[3])};
      *reinterpret_cast<uint2*>(probed + 8 * (32 * warp + mine) + 4) =
          uint2{float_bits(one[4]), float_bits(one[5])};
      sync_block();
      for (int i = thread; i < 8 * kChunk; i += H::kMembers)
        if (i % 8 < kProbes)
          for (int w = 1; w < H::kTeam; ++w) probed[i] += probed[8 * kChunk * w + i];
      sync_block();
      // V * (probes * V)^T: thread = row.
      if (thread < H::kRows) {
        float sum[kProbes] = {};
#pragma unroll 2
        for (int p4 = 0; p4 < kChunk / 4; ++p4) {
          const uint4 w = *reinterpret_cast<const uint4*>(
              slot + (row_code(static_cast<uint32_t>(thread)) ^ (16 * p4)));
          const float v[4] = {bits_float(w.x), bits_float(w.y), bits_float(w.z), bits_float(w.w)};
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            float probe[kProbes];
            load_probes(probed + 8 * (4 * p4 + b), probed + 8 * (4 * p4 + b) + 4, probe);
#pragma unroll
            for (int p = 0; p < kProbes; ++p) sum[p] = fmaf(v[b], probe[p], sum[p]);
          }
        }
#pragma unroll
        for (int p = 0; p < kProbes; ++p) kept[p] += static_cast<double>(sum[p]);
      }
    }
    sync_block();  // everybody has read V, and the slot
    if constexpr (kForm == kWrite || H::kFromPanel) refill();
    if constexpr (H::kSlots == 1) sync_block();  // before wait() of the same slot
    if (++slot_index == H::kSlots) slot_index = 0, parity ^= 1;
  }

  double* const partial = a.partials + places.part * a.stride;
  if constexpr (kForm == kWrite) {
    if (thread < a.r)
      for (int p = 0; p < kProbes; ++p) partial[8 * thread + p] = kept[p];
  } else {
#pragma unroll
    for (int k = 0; k < H::kUnits; ++k) {
      const int u = warp * H::kUnits + k;
      if (u >= H::kAllUnits) continue;
      const Unit at = H::unit(u);
      const int64_t column = places.row(8 * at.tile) / 8;  // of tiles
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = places.row(16 * at.strip) / 8 + half;
        if (column > row || 8 * row >= m) continue;
        double* const tile = partial + (row * (row + 1) / 2 + column) * 64 + 2 * lane;
        if (H::kFromPanel)
          tile[0] += sums[k][half][0], tile[1] += sums[k][half][1];
        else
          tile[0] = sums[k][half][0], tile[1] = sums[k][half][1];
      }
    }
  }
  if constexpr (!H::kFromPanel && kShape != kSquare) {
    const int s = kClasses * piece + row_class;
    if (s < H::kRows && places.row(s) < a.n)
      partial[a.stride - round_up(a.n, 16) + places.row(s)] = square;
  }
}

}  // namespace
}  // namespace twa
