// record on a GPU: codes and scales of weights - reference by the quantiser of packing.h
// (quantise.cuh), then reference += scale * level.
//
// Operands   DeviceRecord of twa.h.
// Work map   Two kernels. look: a warp looks at kQuantiseTiles tiles and counts those that hold a
//            weight that cannot be recorded. record: a block codes kRecordTiles, a warp four at a
//            time; it returns at once where any was counted. Nothing waits for the host.
// Shared     the quantiser's tables.
// Bytes      D * (2 * input + 4) read, D * (4 + bits / 8 + 2 / 128) written. Tiles are coded from
//            the last to the first, so that the second read finds in the second-level cache what
//            the first one read last.
// Exactness  scale * level is exact in float32, so the sum is the one rounding, fused or not.
// Compiled with -fmad=false: every float operation rounds once, as on the CPU.
#include "dispatch.h"
#include "quantise.cuh"

namespace twa {
namespace {

constexpr int64_t kBlockWarpTiles = kQuantiseWarps * kQuantiseTiles;  // that a block takes at once
constexpr int64_t kRecordTiles = 4 * kBlockWarpTiles;  // of a block of record, for its tables
TWA_HD constexpr int64_t blocks_of(int64_t tiles, int64_t of) { return (tiles + of - 1) / of; }

// Largest magnitude among two 16-bit floats, as bits in the upper half of a word.
TWA_DEVICE uint32_t larger_half(uint32_t w) {
  return max(w & 0x7fff0000u, (w << 16) & 0x7fff0000u);
}
TWA_DEVICE uint32_t magnitude(uint32_t w) { return w & 0x7fffffffu; }

// m[t] = largest magnitude of this lane's share of tile t, from the column at which the first one
// begins; as the bits of float32, of 16-bit floats in the upper half. `left` columns are real.
TWA_DEVICE void largest_of(const DeviceTensor& t, int64_t column, int64_t left,
                           uint32_t (&m)[kQuantiseTiles]) {
  const int lane = lane_index();
  const bool wide = t.dtype == Dtype::f32;
  const uint8_t* from = static_cast<const uint8_t*>(t.data) + column * (wide ? 4 : 2);
  const bool whole = left >= kQuantiseTiles * kTileColumns &&
                     reinterpret_cast<uintptr_t>(from) % (wide ? 16 : 8) == 0;
  if (whole && wide) {
    uint4 w[kQuantiseTiles];
#pragma unroll
    for (int k = 0; k < kQuantiseTiles; ++k) w[k] = load_16(from + 512 * k + 16 * lane);
#pragma unroll
    for (int k = 0; k < kQuantiseTiles; ++k)
      m[k] =
          max(max(magnitude(w[k].x), magnitude(w[k].y)), max(magnitude(w[k].z), magnitude(w[k].w)));
  } else if (whole) {
    uint2 w[kQuantiseTiles];
#pragma unroll
    for (int k = 0; k < kQuantiseTiles; ++k) w[k] = load_8(from + 256 * k + 8 * lane);
#pragma unroll
    for (int k = 0; k < kQuantiseTiles; ++k) m[k] = max(larger_half(w[k].x), larger_half(w[k].y));
  } else {
#pragma unroll
    for (int k = 0; k < kQuantiseTiles; ++k) {
      m[k] = 0;
      for (int c = k * kTileColumns + lane; c < (k + 1) * kTileColumns && c < left; c += 32)
        m[k] = max(m[k], wide ? magnitude(load_4(from + 4 * c))
                              : larger_half(uint32_t{load_2(from + 2 * c)}));
    }
  }
}

TWA_KERNEL(32 * kQuantiseWarps, 8) look_kernel(DeviceRecord a) {
  int64_t tile = block_index() * kBlockWarpTiles + warp_index() * kQuantiseTiles;
  const int64_t end = tile + kQuantiseTiles < a.tiles ? tile + kQuantiseTiles : a.tiles;
  if (tile >= end) return;
  for (int64_t k = tensor_of(a.tile_begin, a.count, tile); tile < end; ++k) {
    const int64_t behind = k + 1 < a.count ? a.tile_begin[k + 1] : a.tiles;
    if (behind <= tile) continue;  // a tensor without columns
    const int64_t column = (tile - a.tile_begin[k]) * kTileColumns,
                  stop = behind < end ? behind : end, room = (stop - tile) * kTileColumns,
                  rest = a.numel[k] - column;
    const DeviceTensor from = a.weights[k];
    uint32_t m[kQuantiseTiles];
    largest_of(from, column, rest < room ? rest : room, m);
    const uint32_t most = from.dtype == Dtype::f16 ? 0x7c000000u : float_bits(kMostWeight);
    int bad = 0;
#pragma unroll
    for (int j = 0; j < kQuantiseTiles; ++j) bad += warp_max(m[j]) >= most;
    if (bad != 0 && lane_index() == 0) counter_add(a.bad, bad);  // integers: in any order
    tile = stop;
  }
}

// to[r] += scale * level, of this lane's columns.
template <int kBits>
TWA_DEVICE void move_reference(const Encoder<kBits>& encoder, const int (&rounded)[4], float scale,
                               const float (&reference)[4], int valid, float* to) {
#pragma unroll
  for (int r = 0; r < 4; ++r)
    if (lane_index() + 32 * r < valid)
      store_4(to + 32 * r, float_bits(fmaf(scale, encoder.level(rounded[r]), reference[r])));
}

// Tiles tile .. end - 1, one by one; k: the tensor of the first one.
template <int kBits>
TWA_DEVICE void record_singly(const DeviceRecord& a, const Encoder<kBits>& encoder, int64_t tile,
                              int64_t end, int64_t k) {
  const int lane = lane_index();
  for (; tile < end; ++tile) {
    while (k + 1 < a.count && a.tile_begin[k + 1] <= tile) ++k;
    const int64_t column = (tile - a.tile_begin[k]) * kTileColumns, left = a.numel[k] - column;
    const int valid = left < kTileColumns ? static_cast<int>(left) : kTileColumns;
    float* to = opaque(static_cast<float*>(a.reference[k].data) + (column + lane));
    float v[4], reference[4];
#pragma unroll
    for (int r = 0; r < 4; ++r)
      reference[r] = lane + 32 * r < valid ? bits_float(load_own_4(to + 32 * r)) : 0.0f;
    load_group(a.weights[k], column, valid, v);
#pragma unroll
    for (int r = 0; r < 4; ++r) v[r] -= reference[r];
    const Group group = quantise(encoder, v, valid);
    store_codes(encoder, group.rounded, a.codes + tile * row_bytes(kBits));
    if (lane == 0) store_2(a.scales + tile, static_cast<uint16_t>(float_bits(group.scale) >> 16));
    move_reference(encoder, group.rounded, group.scale, reference, valid, to);
  }
}

// Tiles tile .. end - 1 of a warp, at most four.
template <int kBits>
TWA_DEVICE void record_tiles(const DeviceRecord& a, const Encoder<kBits>& encoder, int64_t tile,
                             int64_t end) {
  const int64_t k = tensor_of(a.tile_begin, a.count, tile),
                column = (tile - a.tile_begin[k]) * kTileColumns;
  FourGroups found;
  float reference[4][4];
  float* to = opaque(static_cast<float*>(a.reference[k].data) + (column + lane_index()));
  bool usual = false;
  if (a.numel[k] - column >= kQuantiseColumns) {
#pragma unroll
    for (int j = 0; j < 16; ++j) reference[j / 4][j % 4] = bits_float(load_own_4(to + 32 * j));
    float v[4][4];
    load_four(a.weights[k], column, v);
#pragma unroll
    for (int j = 0; j < 16; ++j) v[j / 4][j % 4] -= reference[j / 4][j % 4];
    usual = quantise_four(encoder, v, found);
  }
  if (!usual) return record_singly(a, encoder, tile, end, k);
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    store_codes(encoder, found.rounded[t], a.codes + (tile + t) * row_bytes(kBits));
    move_reference(encoder, found.rounded[t], shuffle(found.scale, 8 * t), reference[t],
                   kTileColumns, to + t * kTileColumns);
  }
  if (lane_index() % 8 == 0)
    store_2(a.scales + tile + lane_index() / 8,
            static_cast<uint16_t>(float_bits(found.scale) >> 16));
}

template <int kBits>
TWA_KERNEL(32 * kQuantiseWarps, 7)
record_kernel(DeviceRecord a) {
  if (load_4(a.bad) != 0) return;
  const Encoder<kBits> encoder(shared_memory());
  sync_block();
  const int64_t block = blocks_of(a.tiles, kRecordTiles) - 1 - block_index();
  int64_t tile = block * kRecordTiles + warp_index() * kQuantiseTiles;
#pragma unroll 1
  for (int k = 0; k < kRecordTiles / kBlockWarpTiles; ++k, tile += kBlockWarpTiles) {
    const int64_t end = tile + kQuantiseTiles < a.tiles ? tile + kQuantiseTiles : a.tiles;
    if (tile < end) record_tiles(a, encoder, tile, end);
  }
}

}  // namespace

int record_cuda(const DeviceRecord& record, const Place& where) {
  if (!valid_bits(record.bits) || record.tiles < 0) return kInvalidValue;
  constexpr int kThreads = 32 * kQuantiseWarps;
  if (const int error = clear(record.bad, sizeof(int32_t), where)) return error;
  const int64_t looks = blocks_of(record.tiles, kBlockWarpTiles);
  if (const int error = launch(look_kernel, looks, kThreads, 0, where, record)) return error;
  return with_bits(record.bits, [&](auto b) {
    constexpr int kBits = decltype(b)::value;
    return launch(record_kernel<kBits>, blocks_of(record.tiles, kRecordTiles), kThreads,
                  kQuantiseShared, where, record);
  });
}

}  // namespace twa
