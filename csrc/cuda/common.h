// Shared by the kernels: tensor tables, vector loads of any dtype, the ring of asynchronous copies.
#pragma once

#include "device.h"

namespace twa {

constexpr int kWarps = 4;             // warps of a block; each streams tiles of its own, and nothing in the main loops waits for another warp
constexpr int kThreads = 32 * kWarps;
constexpr int kMaxStages = 8;         // slots of a warp's ring
constexpr int kRingBytes = 12 << 10;  // of a warp, at most, where two slots fit: 4 blocks on a multiprocessor have 192 KiB on their way

struct alignas(16) Float4 {
  float v[4];
};
struct alignas(8) Float2 {
  float v[2];
};
struct alignas(8) Half4 {
  uint16_t v[4];
};
struct alignas(4) Half2 {
  uint16_t v[2];
};

TWA_DEVICE float half_to_float(Dtype dtype, uint16_t h) { return dtype == Dtype::bf16 ? bf16_to_float(h) : f16_to_float(h); }
TWA_DEVICE float load_one(const DeviceTensor& x, int64_t j) {
  return x.dtype == Dtype::f32 ? static_cast<const float*>(x.data)[j] : half_to_float(x.dtype, static_cast<const uint16_t*>(x.data)[j]);
}
// True if groups of four elements may be loaded at once: tiles begin at multiples of 128 elements.
TWA_DEVICE bool is_aligned(const DeviceTensor& x) { return reinterpret_cast<uintptr_t>(x.data) % (x.dtype == Dtype::f32 ? 16 : 8) == 0; }

// Elements j .. j + 3.
TWA_DEVICE void load_four(const DeviceTensor& x, int64_t j, float* v) {
  if (x.dtype == Dtype::f32) {
    const Float4 f = *reinterpret_cast<const Float4*>(static_cast<const float*>(x.data) + j);
    for (int k = 0; k < 4; ++k) v[k] = f.v[k];
  } else {
    const Half4 h = *reinterpret_cast<const Half4*>(static_cast<const uint16_t*>(x.data) + j);
    for (int k = 0; k < 4; ++k) v[k] = half_to_float(x.dtype, h.v[k]);
  }
}
// Elements j, j + 64, j + 1, j + 65.
TWA_DEVICE void load_pairs(const DeviceTensor& x, int64_t j, float* v) {
  for (int k = 0; k < 2; ++k) {
    if (x.dtype == Dtype::f32) {
      const Float2 f = *reinterpret_cast<const Float2*>(static_cast<const float*>(x.data) + j + 64 * k);
      v[k] = f.v[0], v[2 + k] = f.v[1];
    } else {
      const Half2 h = *reinterpret_cast<const Half2*>(static_cast<const uint16_t*>(x.data) + j + 64 * k);
      v[k] = half_to_float(x.dtype, h.v[0]), v[2 + k] = half_to_float(x.dtype, h.v[1]);
    }
  }
}

// An item: up to kItemTiles tiles of one tensor and one segment.
struct Item {
  int64_t tile;    // first tile, in the basis
  int64_t column;  // first column, in the tensor
  int64_t numel;   // of the tensor
  int tensor, tiles, segment;
};
TWA_DEVICE Item load_item(const DeviceWork& work, int64_t at) {
  Item item;
  item.tensor = work.item_tensor[at], item.tile = work.item_tile[at], item.tiles = work.item_tiles[at], item.segment = work.item_segment[at];
  item.numel = work.numel[item.tensor], item.column = (item.tile - work.tile_begin[item.tensor]) * kTileColumns;
  return item;
}

// Scales of the rows as bytes, row 32 j + lane in s[j]; zero past the last row, so whatever lies there in the ring counts nothing.
template <int kCount>
TWA_DEVICE void load_scales(const uint8_t* scales, int rows, uint32_t* s) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) s[j] = 32 * j + lane_index() < rows ? scales[32 * j + lane_index()] : 0u;
}

// A warp's ring of slots in shared memory, filled by asynchronous copies in the order in which they are used.
struct Ring {
  uint8_t* data;
  uint64_t* full;  // (kMaxStages,) one barrier a slot
  int slots, slot_bytes;
  int fill, use;         // slots next filled and next used
  uint32_t parity;       // of the phase that the next used slot completes
  uint64_t policy;

  TWA_DEVICE void open(uint8_t* bytes, uint64_t* barriers, int count, int size, uint64_t cache_policy) {
    data = bytes, full = barriers, slots = count, slot_bytes = size, policy = cache_policy, fill = use = 0, parity = 0;
    if (lane_index() < count) barrier_init(&full[lane_index()], bulk_copies() ? 1 : 32);
    barrier_publish();
    sync_warp();
  }
  // Starts the copy of `rows` packed rows into the next slot. At 8 bits groups of 8 rows lie kPad bytes apart.
  template <int kBits, int kPad>
  TWA_DEVICE void copy(const uint8_t* from, int rows) {
    const int lane = lane_index();
    uint8_t* to = data + fill * slot_bytes;
    uint64_t* barrier = &full[fill];
    fill = fill + 1 == slots ? 0 : fill + 1;
    if (bulk_copies()) {
      if (lane == 0) barrier_expect(barrier, rows * row_bytes(kBits));
      sync_warp();
      if constexpr (kBits == 8) {
        const int left = rows - 8 * lane;
        if (left > 0) copy_bulk(to + lane * (1024 + kPad), from + lane * 1024, (left < 8 ? left : 8) * 128, barrier, policy);
      } else if (lane == 0) {
        copy_bulk(to, from, rows * row_bytes(kBits), barrier, policy);
      }
    } else {
      const int chunks = rows * kBits;  // of 16 bytes
      for (int k = lane; k < chunks; k += 32) copy_16(to + k * 16 + (kBits == 8 ? k / 64 * kPad : 0), from + k * 16, policy);
      barrier_arrive_after_copies(barrier);
    }
  }
  // Waits for the next slot. Every lane must call it; after use, sync_warp() before the slot is filled again.
  TWA_DEVICE const uint8_t* next() {
    const uint8_t* slot = data + use * slot_bytes;
    barrier_wait(&full[use], parity);
    if (++use == slots) use = 0, parity ^= 1;
    return slot;
  }
};

inline int ring_slots(int slot_bytes) {
  const int fit = kRingBytes / slot_bytes;
  return fit < 2 ? 2 : fit > kMaxStages ? kMaxStages : fit;
}

}  // namespace twa
