// Shared by the kernels: tensor tables, vector loads of any dtype, the ring of asynchronous copies.
#pragma once

#include "device.h"

namespace twa {

constexpr int kWarps = 4;  // warps of a block; each streams tiles of its own, and nothing in the
                           // main loops waits for another warp
constexpr int kThreads = 32 * kWarps;
constexpr int kMaxStages = 8;  // slots of a warp's ring

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
  int whole;  // tiles that asynchronous copies can take, from the first on: 128 columns each, in
              // pieces of 16 bytes

  TWA_DEVICE Columns(const DeviceTensor* table, const Item& item)
      : data(nullptr), dtype(Dtype::f32), aligned(true), count(0), whole(0) {
    if (table == nullptr) return;
    const DeviceTensor tensor = table[item.tensor];
    if (tensor.data == nullptr) return;
    const int64_t left = item.numel - item.column;
    dtype = tensor.dtype,
    count = left < item.tiles * kTileColumns ? static_cast<int>(left) : item.tiles * kTileColumns;
    data = static_cast<uint8_t*>(tensor.data) + item.column * element_bytes();
    aligned = reinterpret_cast<uintptr_t>(data) % (dtype == Dtype::f32 ? 16 : 8) == 0;
    if (reinterpret_cast<uintptr_t>(data) % 16 == 0) whole = count / kTileColumns;
  }
  TWA_DEVICE int element_bytes() const { return dtype == Dtype::f32 ? 4 : 2; }
  TWA_DEVICE uint16_t to_half(float v) const {
    return dtype == Dtype::bf16 ? float_to_bf16(v) : float_to_f16(v);
  }
  // Two elements of 16 bits each.
  TWA_DEVICE void from_halves(uint32_t w, float& low, float& high) const {
    if (dtype == Dtype::bf16)
      low = bits_float(w << 16), high = bits_float(w & 0xffff0000u);
    else
      low = f16_to_float(static_cast<uint16_t>(w)),
      high = f16_to_float(static_cast<uint16_t>(w >> 16));
  }
  // Four elements as they lie in memory, at(0) .. at(3), zero past the last; 16 bits: two a word.
  template <class At>
  TWA_DEVICE void load_singly(const At& at, uint32_t* w) const {
    if (dtype == Dtype::f32) {
#pragma unroll
      for (int k = 0; k < 4; ++k) w[k] = at(k) < count ? load_4(data + 4 * at(k)) : 0u;
    } else {
      const auto half = [&](int k) -> uint32_t {
        return at(k) < count ? load_2(data + 2 * at(k)) : 0u;
      };
      w[0] = half(0) | half(1) << 16, w[1] = half(2) | half(3) << 16;
    }
  }
  // Elements of a tile, which was copied to shared memory if it is one of `whole`:  4 lane .. 4
  // lane + 3;  with kPairs j, j + 64, j + 1, j + 65 with j = 2 lane.
  template <bool kPairs>
  TWA_DEVICE void take(const uint8_t* copied, int tile, float* v) const {
    const int lane = lane_index();
    if (tile >= whole) {
      const int c = tile * kTileColumns;
      uint32_t w[4];
      load_singly(
          [&](int k) { return c + (kPairs ? 2 * lane + k / 2 + 64 * (k % 2) : 4 * lane + k); }, w);
      from_raw(w, v);
    } else if (dtype == Dtype::f32) {
      if constexpr (kPairs) {
        const Word2 a = *reinterpret_cast<const Word2*>(copied + 8 * lane),
                    b = *reinterpret_cast<const Word2*>(copied + 8 * lane + 256);
        v[0] = bits_float(a.w[0]), v[1] = bits_float(b.w[0]), v[2] = bits_float(a.w[1]),
        v[3] = bits_float(b.w[1]);
      } else {
        const Word4 a = *reinterpret_cast<const Word4*>(copied + 16 * lane);
#pragma unroll
        for (int k = 0; k < 4; ++k) v[k] = bits_float(a.w[k]);
      }
    } else if constexpr (kPairs) {
      from_halves(*reinterpret_cast<const uint32_t*>(copied + 4 * lane), v[0], v[2]);
      from_halves(*reinterpret_cast<const uint32_t*>(copied + 4 * lane + 128), v[1], v[3]);
    } else {
      const Word2 a = *reinterpret_cast<const Word2*>(copied + 8 * lane);
      from_halves(a.w[0], v[0], v[1]), from_halves(a.w[1], v[2], v[3]);
    }
  }
  // Elements c + 4 lane .. c + 4 lane + 3 of the tile that begins at c, as they lie in memory: a
  // load that nothing waits for before from_raw(). 16 bits: two words.
  TWA_DEVICE void load_raw(int c, uint32_t* w) const {
    const int j = c + 4 * lane_index();
    if (!aligned || c + kTileColumns > count) {
      load_singly([&](int k) { return j + k; }, w);
    } else if (dtype == Dtype::f32) {
      const uint4 a = load_16(data + 4 * j);
      w[0] = a.x, w[1] = a.y, w[2] = a.z, w[3] = a.w;
    } else {
      const uint2 a = load_8(data + 2 * j);
      w[0] = a.x, w[1] = a.y;
    }
  }
  TWA_DEVICE void from_raw(const uint32_t* w, float* v) const {
    if (dtype == Dtype::f32) {
#pragma unroll
      for (int k = 0; k < 4; ++k) v[k] = bits_float(w[k]);
    } else {
      from_halves(w[0], v[0], v[1]), from_halves(w[1], v[2], v[3]);
    }
  }
  // Elements as load_raw().
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

// One item's tiles of one tensor, from the first copies on: those of a fused step's next task begin
// before the one before has ended.
struct Task {
  Item item;
  Columns columns;       // of the gradient, or of the weights
  int tile, row;         // whose copy comes next; project: its first row
  const uint8_t* codes;  // of that tile

  TWA_DEVICE Task(const DeviceWork& work, int64_t at, const DeviceTensor* tensors)
      : item(load_item(work, at)), columns(tensors, item), tile(uniform(warp_index())), row(0) {
    item.tile = uniform(item.tile), item.tiles = uniform(item.tiles);
    columns.data = uniform(columns.data), columns.count = uniform(columns.count),
    columns.whole = uniform(columns.whole);
    columns.dtype = static_cast<Dtype>(uniform(static_cast<int>(columns.dtype)));
  }
};

// Scales of the rows as bytes, row 32 j + lane in s[j]; zero past the last row, so whatever lies
// there in the ring counts nothing. mine: this lane's in the first 32 rows.
template <int kCount>
TWA_DEVICE void load_scales(const uint8_t* mine, int rows, uint32_t* s) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) s[j] = 32 * j + lane_index() < rows ? load_1(mine + 32 * j) : 0u;
}

constexpr int kGradientBytes = 4 * kTileColumns;  // at the end of a slot, where project has them

// A warp's ring of slots in shared memory, filled by asynchronous copies in the order in which they
// are used.
struct Ring {
  uint8_t* data;
  uint64_t* full;  // (kMaxStages,) one barrier a slot
  int slots, slot_bytes;
  int fill, use;    // slots next filled and next used
  uint32_t parity;  // of the phase that the next used slot completes
  uint64_t policy;  // of packed rows

  TWA_DEVICE void open(uint8_t* bytes, uint64_t* barriers, int count, int size,
                       uint64_t cache_policy) {
    data = bytes, full = barriers, slots = count, slot_bytes = size, policy = cache_policy,
    fill = use = 0, parity = 0;
    if (lane_index() < count) barrier_init(&full[lane_index()], bulk_copies() ? 1 : 32);
    barrier_publish();
    sync_warp();
  }
  // Starts the copy of `rows` packed rows into the next slot, and of `more` bytes to its end (512
  // at most, multiples of 16). At 8 bits groups of 8 rows lie kPad bytes apart.
  template <int kBits, int kPad>
  TWA_DEVICE void copy(const uint8_t* from, int rows, const uint8_t* more_from = nullptr,
                       int more = 0) {
    const int lane = lane_index();
    uint8_t *to = data + fill * slot_bytes, *more_to = to + slot_bytes - kGradientBytes;
    uint64_t* barrier = &full[fill];
    fill = fill + 1 == slots ? 0 : fill + 1;
    if (bulk_copies()) {
      if (one_lane()) {
        barrier_expect(barrier, rows * row_bytes(kBits) + more);
        if (more) copy_bulk(more_to, more_from, more, barrier, evict_first());
        if (kBits != 8) copy_bulk(to, from, rows * row_bytes(kBits), barrier, policy);
      }
      if constexpr (kBits == 8) {
        sync_warp();
        const int left = rows - 8 * lane;
        if (left > 0)
          copy_bulk(to + lane * (1024 + kPad), from + lane * 1024, (left < 8 ? left : 8) * 128,
                    barrier, policy);
      }
    } else {
      const int chunks = rows * kBits;  // of 16 bytes
      for (int k = lane; k < chunks; k += 32)
        copy_16(to + k * 16 + (kBits == 8 ? k / 64 * kPad : 0), from + k * 16, policy);
      if (16 * lane < more) copy_16(more_to + 16 * lane, more_from + 16 * lane, evict_first());
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

// Slots of a warp's ring.
constexpr int ring_slots(int slot_bytes, int ring_kib) {
  const int fit = (ring_kib << 10) / slot_bytes;
  return fit < 2 ? 2 : fit > kMaxStages ? kMaxStages : fit;
}
inline int ring_slots(int slot_bytes) { return ring_slots(slot_bytes, cuda_variant().ring_kib); }
constexpr int kRingKib = CudaVariant().ring_kib;

// Shared memory of a warp: `header` bytes, then its ring.
TWA_HD constexpr int warp_bytes(int header, int slots, int slot_bytes) {
  return (header + slots * slot_bytes + 127) / 128 * 128;
}
// Of a block's warps, of whose slots lanes read `read` bytes, whatever the last row is.
constexpr int warps_bytes(int header, int slots, int slot_bytes, int read) {
  return kWarps * warp_bytes(header, slots, slot_bytes) +
         (read > slot_bytes ? read - slot_bytes : 0);
}

}  // namespace twa
