// Shared by the kernels: tensor tables, vector loads of any dtype, the ring of asynchronous copies.
#pragma once

#include "device.h"

namespace twa {

constexpr int kWarps = 4;  // warps of a block; each streams tiles of its own, and nothing in the
                           // main loops waits for another warp
constexpr int kThreads = 32 * kWarps;
constexpr int kMaxStages = 8;         // slots of a warp's ring
constexpr int kRingBytes = 10 << 10;  // of a warp, where two slots fit: four blocks of reconstruct
                                      // share a multiprocessor of Hopper

// An item: up to item_tiles(bits) tiles of one tensor and one segment.
struct Item {
  int64_t tile;    // first tile, in the basis
  int64_t column;  // first column, in the tensor
  int64_t numel;   // of the tensor
  int tensor, tiles, segment;
};
TWA_DEVICE Item load_item(const DeviceWork& work, int64_t at) {
  Item item;
  item.tensor = work.item_tensor[at], item.tile = work.item_tile[at],
  item.tiles = work.item_tiles[at], item.segment = work.item_segment[at];
  item.numel = work.numel[item.tensor],
  item.column = (item.tile - work.tile_begin[item.tensor]) * kTileColumns;
  return item;
}

// An item's columns of a tensor: offsets within them are small.
struct Columns {
  uint8_t* data;  // null: absent
  Dtype dtype;
  bool aligned;  // vectors of four elements may be loaded at once: tiles begin at multiples of 128
                 // elements
  int count;

  TWA_DEVICE Columns(const DeviceTensor* table, const Item& item)
      : data(nullptr), dtype(Dtype::f32), aligned(true), count(0) {
    if (table == nullptr) return;
    const DeviceTensor tensor = table[item.tensor];
    if (tensor.data == nullptr) return;
    const int64_t left = item.numel - item.column;
    dtype = tensor.dtype,
    count = left < item.tiles * kTileColumns ? static_cast<int>(left) : item.tiles * kTileColumns;
    data = static_cast<uint8_t*>(tensor.data) + item.column * (dtype == Dtype::f32 ? 4 : 2);
    aligned = reinterpret_cast<uintptr_t>(data) % (dtype == Dtype::f32 ? 16 : 8) == 0;
  }
  TWA_DEVICE float half(uint16_t h) const {
    return dtype == Dtype::bf16 ? bf16_to_float(h) : f16_to_float(h);
  }
  TWA_DEVICE uint16_t to_half(float v) const {
    return dtype == Dtype::bf16 ? float_to_bf16(v) : float_to_f16(v);
  }
  // v[k] = element at(k), zero past the last.
  template <class At>
  TWA_DEVICE void load_singly(const At& at, float* v) const {
    if (dtype == Dtype::f32) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        v[k] = at(k) < count ? bits_float(load_4(data + 4 * at(k))) : 0.0f;
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        v[k] = half(at(k) < count ? load_2(data + 2 * at(k)) : uint16_t{0});
    }
  }
  // Elements c + 4 lane .. c + 4 lane + 3 of the tile that begins at c.
  TWA_DEVICE void load_four(int c, float* v) const {
    const int j = c + 4 * lane_index();
    if (!aligned || c + kTileColumns > count) {
      load_singly([&](int k) { return j + k; }, v);
    } else if (dtype == Dtype::f32) {
      const uint4 w = load_16(data + 4 * j);
      v[0] = bits_float(w.x), v[1] = bits_float(w.y), v[2] = bits_float(w.z),
      v[3] = bits_float(w.w);
    } else {
      const uint2 w = load_8(data + 2 * j);
      v[0] = half(static_cast<uint16_t>(w.x)), v[1] = half(static_cast<uint16_t>(w.x >> 16));
      v[2] = half(static_cast<uint16_t>(w.y)), v[3] = half(static_cast<uint16_t>(w.y >> 16));
    }
  }
  // Elements j, j + 64, j + 1, j + 65 with j = c + 2 lane.
  TWA_DEVICE void load_pairs(int c, float* v) const {
    const int j = c + 2 * lane_index();
    if (!aligned || c + kTileColumns > count) {
      load_singly([&](int k) { return j + k / 2 + 64 * (k % 2); }, v);
    } else if (dtype == Dtype::f32) {
      const uint2 a = load_8(data + 4 * j), b = load_8(data + 4 * j + 256);
      v[0] = bits_float(a.x), v[1] = bits_float(b.x), v[2] = bits_float(a.y),
      v[3] = bits_float(b.y);
    } else {
      const uint32_t a = load_4(data + 2 * j), b = load_4(data + 2 * j + 128);
      v[0] = half(static_cast<uint16_t>(a)), v[1] = half(static_cast<uint16_t>(b));
      v[2] = half(static_cast<uint16_t>(a >> 16)), v[3] = half(static_cast<uint16_t>(b >> 16));
    }
  }
  // As load_four.
  TWA_DEVICE void store_four(int c, const float* v) const {
    const int j = c + 4 * lane_index();
    if (!aligned || c + kTileColumns > count) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (j + k >= count) break;
        if (dtype == Dtype::f32)
          store_4(data + 4 * (j + k), float_bits(v[k]));
        else
          store_2(data + 2 * (j + k), to_half(v[k]));
      }
    } else if (dtype == Dtype::f32) {
      store_16(data + 4 * j,
               uint4{float_bits(v[0]), float_bits(v[1]), float_bits(v[2]), float_bits(v[3])});
    } else {
      store_8(data + 2 * j, uint2{to_half(v[0]) | static_cast<uint32_t>(to_half(v[1])) << 16,
                                  to_half(v[2]) | static_cast<uint32_t>(to_half(v[3])) << 16});
    }
  }
};

// Scales of the rows as bytes, row 32 j + lane in s[j]; zero past the last row, so whatever lies
// there in the ring counts nothing.
template <int kCount>
TWA_DEVICE void load_scales(const uint8_t* scales, int rows, uint32_t* s) {
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    s[j] = 32 * j + lane_index() < rows ? load_1(scales + 32 * j + lane_index()) : 0u;
}

// A warp's ring of slots in shared memory, filled by asynchronous copies in the order in which they
// are used.
struct Ring {
  uint8_t* data;
  uint64_t* full;  // (kMaxStages,) one barrier a slot
  int slots, slot_bytes;
  int fill, use;    // slots next filled and next used
  uint32_t parity;  // of the phase that the next used slot completes
  uint64_t policy;

  TWA_DEVICE void open(uint8_t* bytes, uint64_t* barriers, int count, int size,
                       uint64_t cache_policy) {
    data = bytes, full = barriers, slots = count, slot_bytes = size, policy = cache_policy,
    fill = use = 0, parity = 0;
    if (lane_index() < count) barrier_init(&full[lane_index()], bulk_copies() ? 1 : 32);
    barrier_publish();
    sync_warp();
  }
  // Starts the copy of `rows` packed rows into the next slot. At 8 bits groups of 8 rows lie kPad
  // bytes apart.
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
        if (left > 0)
          copy_bulk(to + lane * (1024 + kPad), from + lane * 1024, (left < 8 ? left : 8) * 128,
                    barrier, policy);
      } else if (lane == 0) {
        copy_bulk(to, from, rows * row_bytes(kBits), barrier, policy);
      }
    } else {
      const int chunks = rows * kBits;  // of 16 bytes
      for (int k = lane; k < chunks; k += 32)
        copy_16(to + k * 16 + (kBits == 8 ? k / 64 * kPad : 0), from + k * 16, policy);
      barrier_arrive_after_copies(barrier);
    }
  }
  // Waits for the next slot. Every lane must call it; after use, sync_warp() before the slot is
  // filled again.
  TWA_DEVICE const uint8_t* next() {
    const uint8_t* slot = data + use * slot_bytes;
    barrier_wait(&full[use], parity);
    if (++use == slots) use = 0, parity ^= 1;
    return slot;
  }
};

constexpr int ring_slots(int slot_bytes) {
  const int fit = kRingBytes / slot_bytes;
  return fit < 2 ? 2 : fit > kMaxStages ? kMaxStages : fit;
}

}  // namespace twa
