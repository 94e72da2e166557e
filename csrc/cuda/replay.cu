// replay on a GPU:  out += sum_r coefficient[r] * scale[r] * level[r], row after row.
//
// Operands   DeviceReplay of twa.h.
// Work map   A lane holds the sums of 32 columns of a tile (16 at 8 bits) in registers while the
//            rows pass by; 4 lanes a tile (8), so that a warp reads 512 bytes of a row (at 3, 2 and
//            1 bits 384, 256 and 128), which lie together, and kAhead rows are on their way.
// Bytes      rows * D * (bits / 8 + 2 / 128) + D * 4 read, D * 4 written.
// Exactness  coefficient * scale, times the level, plus the sum: three roundings to float32 a row.
//            With a coefficient of 1 the product is exact (4 significant bits times 7), so that a
//            fused multiply-add rounds as the sum does, and takes one instruction less.
// Speed      a weight and row takes 5 instructions (4 where the coefficient is 1), at 1 bit 3:
// bound
//            by memory at 8 and 4 bits, by arithmetic below.
// Compiled with -fmad=false: every float operation rounds once, as on the CPU.
#include "dispatch.h"
#include "quantise.cuh"

namespace twa {
namespace {

// Rows on their way: 32 KiB of codes a multiprocessor at 8 and 4 bits, with 16 warps.
template <int kBits>
constexpr int kAhead = kBits >= 3 ? 4 : 8;

template <int kBits>
constexpr int kWarpTiles = 32 / kReplayLanes<kBits>;

// A lane's codes of one row, and what they are multiplied with.
template <int kBits>
struct Row {
  uint32_t codes[kReplayBytes<kBits> / 4];
  uint32_t third[2];  // 3 bits: of the 1-bit plane
  uint16_t scale;
  float coefficient;
};

template <int kBits>
TWA_DEVICE void load_row(const DeviceDifference& from, int64_t tile, int t, Row<kBits>& row) {
  const uint8_t* at = from.codes + tile * row_bytes(kBits);
  if constexpr (kBits >= 4) {
    const uint4 w = load_16(at + 16 * t);
    row.codes[0] = w.x, row.codes[1] = w.y, row.codes[2] = w.z, row.codes[3] = w.w;
  } else if constexpr (kBits == 1) {
    row.codes[0] = load_4(at + 4 * t);
  } else {
    const uint2 w = load_8(at + 8 * t);
    row.codes[0] = w.x, row.codes[1] = w.y;
    if constexpr (kBits == 3) {
      const uint2 third = load_8(at + 32 + 8 * (t % 2));
      row.third[0] = third.x, row.third[1] = third.y;
    }
  }
  row.scale = load_2(from.scales + tile);
  row.coefficient = from.coefficient;
}

// kOne: the coefficients of all rows are 1.
template <int kBits, bool kOne>
TWA_DEVICE void add_row(const Row<kBits>& row, int t, const uint32_t (&table)[2],
                        float (&sums)[kReplayColumns<kBits>]) {
  const float scale = kOne ? bf16_to_float(row.scale) : row.coefficient * bf16_to_float(row.scale);
  constexpr int kWords = kReplayColumns<kBits> / 4;
  if constexpr (kBits == 1) {
    const float step = scale * 127.0f;
#pragma unroll
    for (int e = 0; e < kWords; ++e)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        sums[replay_sum<1>(e, j)] += replay_sign(row.codes[0], 8 * j + e, step);
  } else {
    uint32_t levels[kWords];
    replay_levels<kBits>(row.codes, row.third, t, table, levels);
#pragma unroll
    for (int e = 0; e < kWords; ++e)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& sum = sums[replay_sum<kBits>(e, j)];
        const float level = replay_level<kBits>(levels[e], j);
        sum = kOne ? fmaf(scale, level, sum) : sum + scale * level;
      }
  }
}

template <int kBits, bool kOne>
TWA_KERNEL(kThreads, 4)
replay_kernel(DeviceReplay a) {
  constexpr int kColumns = kReplayColumns<kBits>, kLanes = kReplayLanes<kBits>;
  const uint32_t table[2] = {in_register(replay_table<kBits>(0)),
                             in_register(replay_table<kBits>(1))};
  const int t = lane_index() % kLanes;
  const int64_t tile =
      (block_index() * kWarps + warp_index()) * kWarpTiles<kBits> + lane_index() / kLanes;
  if (tile >= a.tiles) return;  // no lane waits for another one
  Row<kBits> rows[kAhead<kBits>];
#pragma unroll
  for (int k = 0; k < kAhead<kBits>; ++k)
    if (k < a.n) load_row<kBits>(a.rows[k], tile, t, rows[k]);

  const int64_t tensor = tensor_of(a.tile_begin, a.count, tile),
                column = (tile - a.tile_begin[tensor]) * kTileColumns,
                left = a.numel[tensor] - column;
  const int valid = left < kTileColumns ? static_cast<int>(left) : kTileColumns;
  float* out = static_cast<float*>(a.out[tensor].data) + column;
  const bool aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0;
  float sums[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; i += 4) {
    const int c = replay_column<kBits>(t, i);
    if (aligned && c + 4 <= valid) {
      const uint4 w = load_own_16(out + c);
      sums[i] = bits_float(w.x), sums[i + 1] = bits_float(w.y), sums[i + 2] = bits_float(w.z),
      sums[i + 3] = bits_float(w.w);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        sums[i + k] = c + k < valid ? bits_float(load_own_4(out + c + k)) : 0.0f;
    }
  }
  const int n = static_cast<int>(a.n);
  for (int first = 0; first < n; first += kAhead<kBits>) {
#pragma unroll
    for (int k = 0; k < kAhead<kBits>; ++k) {
      if (first + k >= n) break;
      add_row<kBits, kOne>(rows[k], t, table, sums);
      if (first + k + kAhead<kBits> < n)
        load_row<kBits>(a.rows[first + k + kAhead<kBits>], tile, t, rows[k]);
    }
  }
#pragma unroll
  for (int i = 0; i < kColumns; i += 4) {
    const int c = replay_column<kBits>(t, i);
    if (aligned && c + 4 <= valid) {
      store_16(out + c, uint4{float_bits(sums[i]), float_bits(sums[i + 1]), float_bits(sums[i + 2]),
                              float_bits(sums[i + 3])});
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (c + k < valid) store_4(out + c + k, float_bits(sums[i + k]));
    }
  }
}

}  // namespace

int replay_cuda(const DeviceReplay& replay, const Place& where) {
  if (!valid_bits(replay.bits) || replay.tiles < 0 || replay.n < 0 || replay.n > kMaxRows)
    return kInvalidValue;
  if (replay.n == 0) return 0;
  return with_bits(replay.bits, [&](auto b) {
    constexpr int kBits = decltype(b)::value;
    const int64_t tiles = kWarps * kWarpTiles<kBits>;
    auto* kernel = replay_kernel<kBits, false>;
    if constexpr (kBits > 1)
      if (replay.ones) kernel = replay_kernel<kBits, true>;
    return launch(kernel, (replay.tiles + tiles - 1) / tiles, kThreads, 0, where, replay);
  });
}

}  // namespace twa
