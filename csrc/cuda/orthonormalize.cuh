// What all kernels of orthonormalize_pass share (orthonormalize.cu has their header): constants,
// arguments, chunks of columns, elements of any dtype.
#pragma once

#include "common.h"

namespace twa {
namespace {

enum Form { kGram, kAgain, kWrite, kPanel };  // the last: V V^T of a panel made before

constexpr int kChunk = kOrthonormalizeChunk;  // columns: a line of the cache from each row;
                                              // 128-byte rows make 4 tiles of 8 columns
constexpr int kRowBytes = 4 * kChunk;
constexpr int kSlots = 2;  // of a warp: one is worked on while the other is filled; 8 warps then
                           // have 64 KiB on their way
constexpr int kSmallRows =
    64;  // whose triangle fits in the registers of a warp: 36 tiles, 144 registers
constexpr int64_t kMostBlocks = 1056;  // four times what 132 multiprocessors run at once, so that
                                       // other numbers of them have little left over
constexpr int kHeldRows = 128;         // whose triangle fits in the registers of a block,
constexpr int kWrittenRows = 256;      // and what the transform makes of them
constexpr int64_t kHeldParts = 792;  // n > 64: two times three or three times two blocks on each of
                                     // 132 multiprocessors
constexpr int kHeldChunks = 4;       // of a part at least: two are on their way
constexpr int64_t kSlices = 128,     // parts of a panel's columns, each with its own sums; fewer
    kSlicedRows = 32 << 10;          // where this many warps have a row of one each
constexpr int64_t kPartialBytes = 64 << 20,
                  kPanelBytes = 64 << 20,  // workspaces: as much as the second-level cache, about;
    kAddedBytes = 16 << 20;                // what every panel reads and writes again
constexpr int kTotalThreads = 256,
              kTotalWays = 8;  // second kernel: 32 sums a block, 8 threads each

TWA_HD constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
TWA_HD constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
// Numbers in the tiles of the lower triangle of (8 blocks, 8 blocks). Tile (i, k), k <= i, is
// number i (i + 1) / 2 + k, row-major.
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
  double* fragments;  // the transform as operands, (row tile, tile of 8 rows of V, lane, 2), then a
                      // mask, then (rows, 8) float32: the probes' columns
  int64_t groups;     // of rows, whose pairs are blocks' tasks
  // A panel of columns
  int64_t from, panel;  // first chunk, chunks
  double *v, *u, *s;  // (rows of n, or r, to a multiple of 32, columns of the panel); (6, columns)
  int64_t slices;     // of per_block chunks
};

// Where a chunk lies.
struct Cursor {
  int64_t tensor = -1, begin = 0, end = 0, numel = 0;
  // Whether it is another tensor than before.
  TWA_DEVICE bool seek(const Arguments& a, int64_t chunk) {
    if (chunk < end) return false;
    int64_t low = 0, high = a.count;  // the last tensor that begins at or before it: the empty ones
                                      // before have no chunk
    while (low + 1 < high) {
      const int64_t mid = (low + high) / 2;
      if (a.chunk_begin[mid] <= chunk)
        low = mid;
      else
        high = mid;
    }
    tensor = low, begin = a.chunk_begin[low],
    end = low + 1 < a.count ? a.chunk_begin[low + 1] : a.chunks, numel = a.numel[low];
    return true;
  }
  TWA_DEVICE int64_t column(int64_t chunk) const { return (chunk - begin) * kChunk; }
  TWA_DEVICE int columns(int64_t chunk) const {
    return numel - column(chunk) < kChunk ? static_cast<int>(numel - column(chunk)) : kChunk;
  }
};

TWA_DEVICE float from_half(Dtype dtype, uint16_t h) {
  return dtype == Dtype::bf16 ? bf16_to_float(h) : f16_to_float(h);
}
TWA_DEVICE uint16_t to_half(Dtype dtype, float v) {
  return dtype == Dtype::bf16 ? float_to_bf16(v) : float_to_f16(v);
}
TWA_DEVICE float rounded(Dtype dtype, float v) {
  return dtype == Dtype::f32 ? v : from_half(dtype, to_half(dtype, v));
}
TWA_DEVICE const uint8_t* element(const DeviceTensor& t, int64_t column) {
  return static_cast<const uint8_t*>(t.data) + column * (t.dtype == Dtype::f32 ? 4 : 2);
}
TWA_DEVICE float load_element(const DeviceTensor& t, int64_t column) {
  const uint8_t* p = element(t, column);
  return t.dtype == Dtype::f32 ? bits_float(load_4(p)) : from_half(t.dtype, load_2(p));
}
// Four elements of 16 bits as they lie in memory, as float32.
TWA_DEVICE uint4 widen(Dtype dtype, uint2 w) {
  const auto half = [&](uint32_t h) {
    return float_bits(from_half(dtype, static_cast<uint16_t>(h)));
  };
  return uint4{half(w.x), half(w.x >> 16), half(w.y), half(w.y >> 16)};
}
// Puts an element into shared memory as float32, by an asynchronous copy if it is one; 0 outside.
TWA_DEVICE void fill_element(uint8_t* to, const DeviceTensor& t, int64_t column, bool inside,
                             uint64_t policy) {
  if (inside && t.dtype == Dtype::f32)
    copy_4(to, element(t, column), policy);
  else
    *reinterpret_cast<uint32_t*>(to) = inside ? float_bits(load_element(t, column)) : 0u;
}
TWA_DEVICE void store_element(const DeviceTensor& t, int64_t column, float v) {
  uint8_t* p = const_cast<uint8_t*>(element(t, column));
  if (t.dtype == Dtype::f32)
    store_4(p, float_bits(v));
  else
    store_2(p, to_half(t.dtype, v));
}
TWA_DEVICE double widened(uint32_t bits) { return static_cast<double>(bits_float(bits)); }

// A slot's row i begins at row_code(i) bytes, its 16-byte piece k at row_code(i) ^ 16 k: what a
// quarter of a warp reads or writes at once is in different banks, be it four pieces of rows i and
// i + 1, two pieces of rows i .. i + 3 or one of rows i .. i + 7 (i even, or a multiple of 4 or 8).
TWA_HD constexpr uint32_t row_code(uint32_t i) {
  return i * kRowBytes + (4 * (i & 1) + (i & 2) + ((i ^ i >> 2) & 1)) * 16;
}

// What a warp knows about a tensor, in shared memory: registers are for sums.
struct Tensors {
  Cursor at;
  int aligned;  // all of them float32 at multiples of 16 bytes
  int halves;   // all of them 16 bits, at multiples of 8 bytes
  int mixed;    // not all of them float32

  TWA_DEVICE void open() {
    if (lane_index() == 0) at = Cursor{};
  }
  // When chunk is in another tensor than before: asks for tensor(number of the tensor of the model,
  // i), i < count.
  template <class Tensor>
  TWA_DEVICE void seek(const Arguments& a, int64_t chunk, int count, const Tensor& tensor) {
    if (chunk < at.end) return;
    Cursor next;
    next.seek(a, chunk);
    uint32_t odd = 0, odd_half = 0, other = 0;
    sync_warp();  // everybody has read what was there
    for (int i = lane_index(); i < count; i += 32) {
      const DeviceTensor t = tensor(next.tensor, i);
      odd |= t.dtype != Dtype::f32 || reinterpret_cast<uintptr_t>(t.data) % 16 != 0;
      odd_half |= t.dtype == Dtype::f32 || reinterpret_cast<uintptr_t>(t.data) % 8 != 0;
      other |= t.dtype != Dtype::f32;
    }
    odd = warp_max(odd), odd_half = warp_max(odd_half), other = warp_max(other);
    if (lane_index() == 0)
      at = next, aligned = odd == 0, halves = odd_half == 0, mixed = other != 0;
    sync_warp();
  }
};

TWA_DEVICE float* probe_operands(const Arguments& a) {
  const int64_t tiles = divide_up(a.n, 16) * 2;
  return reinterpret_cast<float*>(a.fragments + tiles * tiles * 65);
}
// The transform in the order in which the kernels take it, which of its 8 x 8 tiles are not zero,
// and the probes as float32. Block = 1 warp = 1 tile.
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
  if (a.out && tile < tiles)
    for (int e = lane; e < 64; e += 32) {
      const int64_t j = 8 * tile + e / 8, p = e % 8;
      probe_operands(a)[8 * j + p] =
          p < kProbes && j < a.r ? static_cast<float>(a.probes[p * a.r + j]) : 0.0f;
    }
}

TWA_DEVICE void load_probes(const float* four, const float* two, float (&v)[kProbes]) {
  const uint4 a = *reinterpret_cast<const uint4*>(four);
  const uint2 b = *reinterpret_cast<const uint2*>(two);
  v[0] = bits_float(a.x), v[1] = bits_float(a.y), v[2] = bits_float(a.z), v[3] = bits_float(a.w),
  v[4] = bits_float(b.x), v[5] = bits_float(b.y);
}
// product[c][p], of column 4 (lane % 8) + c and the rows of class lane / 8, over the four classes.
// Each lane goes on with one of its columns: c is returned.
TWA_DEVICE int add_classes(const float (&product)[4][kProbes], float (&one)[kProbes]) {
  const bool second = lane_index() & 16, odd = lane_index() & 8;
#pragma unroll
  for (int p = 0; p < kProbes; ++p) {
    const float even_half = (second ? product[2][p] : product[0][p]) +
                            shuffle_xor(second ? product[0][p] : product[2][p], 16);
    const float odd_half = (second ? product[3][p] : product[1][p]) +
                           shuffle_xor(second ? product[1][p] : product[3][p], 16);
    one[p] = (odd ? odd_half : even_half) + shuffle_xor(odd ? even_half : odd_half, 8);
  }
  return lane_index() / 16 * 2 + lane_index() / 8 % 2;
}

}  // namespace
}  // namespace twa
