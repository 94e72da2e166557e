// project, one item: sums over its columns, for a block of rows.
//
// Operands   codes (num_tiles, n, 16 * bits) bytes, scales (num_tiles, n) e4m3, gradients of the
//            tensors; partial (items, n) float32.
// Work map   block = (item, block of 16 * kUnits rows); warp w takes tiles w, w + 4, ... of the
//            item and all of the rows.
// Product    levels (rows x columns) times the gradient (columns x limbs) on the matrix units: the
//            tile's gradient in 24-bit fixed point is three 8-bit limbs, exact int32 sums. At 1 bit
//            the operand is the packed word masked, 0 or 2^field, which four limbs of q * 2^(7 -
//            field) even out, and sum (2 b - 1) q = 2 sum b q - sum q: a quarter of an instruction
//            decodes a weight. Two rows then lie side by side in the operand, each against limbs in
//            its own four of the 8 columns.
// Sums       a tile's exact sums times scale and unit are added in float32 over the warp's tiles,
//            then over the warps, in order.
// Shared     per warp: ring of packed rows, 624 bytes of limbs, scales of the rows as float32.
// Bytes      n * D * (bits / 8 + 1 / 128) + D * gradient, once per block of rows.
#pragma once

#include "common.h"

namespace twa {

struct ProjectArguments {
  const uint8_t* codes;       // (num_tiles, n, 16 * bits)
  const uint8_t* scales;      // (num_tiles, n)
  const DeviceTensor* grads;  // (tensors,)
  DeviceWork work;
  float* partial;  // (items, n)
  int64_t n;
  int slots;  // of a warp's ring
  int row_blocks;
  bool keep;  // packed bytes stay in the second-level cache as long as it has room
};

// kUnits: 16 rows each, that a block takes.
template <int kBits, int kUnits>
struct Project {
  static constexpr int kRows = 16 * kUnits, kBlocks = kRows / kProjectRows<kBits>;
  static constexpr int kSlot =
      kBits == 8 ? kRows * 128 + kRows / 8 * kProjectPad : kRows * row_bytes(kBits);
  static constexpr int kLimbs = kBits == 1 ? 4 : 3;
  // Limbs lie 36 words apart, so that lanes of two of them read other banks; then 16 words of
  // zeros, for columns of the operand without a limb.
  static constexpr int kLimbStride = 36, kZeroAt = 3 * kLimbStride + 32,
                       kLimbBytes = (kZeroAt + 16) * 4;
  static constexpr int kScales = (kRows + 31) / 32,
                       kScaleBytes = kScales * 128;  // of a lane; of all
  static constexpr int kLimbAt = kMaxStages * 8,
                       kScaleAt =
                           kLimbAt + kLimbBytes;  // in a warp's shared memory, after the barriers
  static constexpr int kHeader = kScaleAt + kScaleBytes;  // before its ring
  TWA_HD static constexpr int warp_bytes(int slots) {
    return (kHeader + slots * kSlot + 127) / 128 * 128;
  }
};

// The gradient of the tile that begins at column c, four columns a lane (project_column).
template <int kBits>
TWA_DEVICE void load_gradient(const Columns& grad, int c, float* g) {
  if constexpr (kBits == 8 || kBits == 1)
    grad.load_four(c, g);
  else
    grad.load_pairs(c, g);
}

// Writes the limbs of the tile's gradient. unit: 2^120 times the value of 1 in fixed point, NaN if
// the gradient is not finite. sum: of this lane's limbs, 0 and 1, or 2 and 3; 1 bit: to be
// subtracted from twice its sums, 4 bits: to be added to them.
template <int kBits, int kStride>
TWA_DEVICE void write_limbs(const float* g, uint32_t* limbs, TwoFactors& unit, int& sum) {
  const int lane = lane_index();
  uint32_t largest = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) largest = max(largest, float_bits(g[k]) & 0x7fffffffu);
  largest = warp_max(largest);
  const int e = fixed_exponent(largest);
  const TwoFactors up = pow2_factors(23 - e);
  uint32_t v[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int q = round_to_int(g[k] * up.first * up.second);
    v[k] = kBits == 1 ? limbs4(static_cast<int>(static_cast<uint32_t>(q) << (7 - lane / 4)))
                      : limbs3(q);
  }
  uint32_t w[4];
  transpose_bytes(v[0], v[1], v[2], v[3], w);
  const int at = project_word<kBits>(lane);
#pragma unroll
  for (int k = 0; k < (kBits == 1 ? 4 : 3); ++k) limbs[kStride * k + at] = w[k];
  sum = 0;
  if constexpr (kBits == 1 || kShifted<kBits>) {
    const int factor = kBits == 1 ? 1 << lane / 4 : 1;
    const int low =
        warp_sum((dot4(w[0], 0x01010101u, 0) + 256 * dot4(w[1], 0x01010101u, 0)) * factor);
    const int high = warp_sum(
        (dot4(w[2], 0x01010101u, 0) + 256 * (kBits == 1 ? dot4(w[3], 0x01010101u, 0) : 0)) *
        factor);
    sum = lane % 2 ? high : low;
  }
  unit = pow2_factors(120 + e - 23 - (kBits == 1 ? 7 : 0));
  if (largest >= 0x7f800000u) unit.second = bits_float(0x7fc00000u);
}

// base: the warps' shared memory, `stride` bytes each.
template <int kBits, int kUnits>
TWA_DEVICE void project_item(const ProjectArguments& a, Ring& ring, uint8_t* base, int stride,
                             int64_t at, int row_block) {
  using P = Project<kBits, kUnits>;
  const int lane = lane_index(), warp = warp_index(), g = lane / 4, t = lane % 4;
  const Item item = load_item(a.work, at);
  const Columns grad(a.grads, item);
  const int n = static_cast<int>(a.n), row0 = row_block * P::kRows,
            rows = n - row0 < P::kRows ? n - row0 : P::kRows;
  float* out = a.partial + at * a.n + row0;
  if (grad.data == nullptr) {
    for (int i = thread_index(); i < rows; i += kThreads) out[i] = 0.0f;
    return;
  }
  uint8_t* mine = base + warp * stride;
  uint32_t* limbs = reinterpret_cast<uint32_t*>(mine + P::kLimbAt);
  float* scale = reinterpret_cast<float*>(mine + P::kScaleAt);
  if (lane < 16) limbs[P::kZeroAt + lane] = 0;

  // This lane's words of the limbs: column g of the operand is limb g, or nothing. 1 bit: columns 4
  // to 7 belong to the second row of a pair.
  const bool has_limb = kBits == 1 ? (g >= 4) == (t >= 2) : g < P::kLimbs;
  const uint32_t* my_limbs = limbs + (!has_limb    ? P::kZeroAt
                                      : kBits == 1 ? g % 4 * P::kLimbStride + t % 2 * 16
                                                   : g * P::kLimbStride + t * 8);
  constexpr int kWords = 2 * kProjectSteps<kBits>;

  const int tile_bytes = n * row_bytes(kBits);  // an item has at most 64 tiles of 4096 rows
  const uint8_t* codes = a.codes + (item.tile * a.n + row0) * row_bytes(kBits);
  const uint8_t* scales = a.scales + item.tile * a.n + row0;
  for (int k = 0; k < a.slots; ++k) {
    const int tile = warp + kWarps * k;
    if (tile < item.tiles) ring.template copy<kBits, kProjectPad>(codes + tile * tile_bytes, rows);
  }
  float gradient[4], acc[P::kBlocks][2] = {};
  uint32_t s[P::kScales];
  if (warp < item.tiles) {
    load_gradient<kBits>(grad, warp * kTileColumns, gradient);
    load_scales<P::kScales>(scales + warp * n, rows, s);
  }
  for (int tile = warp; tile < item.tiles; tile += kWarps) {
    int sum;
    TwoFactors unit;
    write_limbs<kBits, P::kLimbStride>(gradient, limbs, unit, sum);
#pragma unroll
    for (int j = 0; j < P::kScales; ++j)
      scale[32 * j + lane] = e4m3_shifted(s[j]) * unit.first * unit.second;
    if (tile + kWarps < item.tiles) {  // the next tile's, while this one is computed
      load_gradient<kBits>(grad, (tile + kWarps) * kTileColumns, gradient);
      load_scales<P::kScales>(scales + (tile + kWarps) * n, rows, s);
    }
    sync_warp();
    uint32_t b[kWords];
#pragma unroll
    for (int k = 0; k < kWords; k += 4) {
      const Word4 w = *reinterpret_cast<const Word4*>(my_limbs + k);
      b[k] = w.w[0], b[k + 1] = w.w[1], b[k + 2] = w.w[2], b[k + 3] = w.w[3];
    }
    const uint8_t* slot = ring.next();
#pragma unroll
    for (int block = 0; block < P::kBlocks; ++block) {
      const int base = block * kProjectRows<kBits>, row = project_row<kBits>(g, t),
                row8 = project_row<kBits>(g + 8, t);
      uint32_t x[kWords * kProjectPasses<kBits>], y[kWords * kProjectPasses<kBits>];
      project_operand<kBits>(slot + project_offset<kBits>(base + (kBits == 1 ? 2 * g : row)), t, x);
      project_operand<kBits>(slot + project_offset<kBits>(base + (kBits == 1 ? 2 * g + 16 : row8)),
                             t, y);
      int d[4] = {0, 0, 0, 0};
#pragma unroll
      for (int k = 0; k < kProjectSteps<kBits> * kProjectPasses<kBits>; ++k)
        multiply_add<kBits == 1>(d, x[2 * k], y[2 * k], x[2 * k + 1], y[2 * k + 1],
                                 b[2 * k % kWords], b[2 * k % kWords + 1]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {  // two limbs, below 2^30
        const int v = kBits == 1 ? 512 * d[2 * h + 1] + (2 * d[2 * h] - sum)
                                 : 256 * d[2 * h + 1] + d[2 * h] + (kShifted<kBits> ? sum : 0);
        acc[block][h] = fmaf(static_cast<float>(v), scale[base + (h ? row8 : row)], acc[block][h]);
      }
    }
    release_to_copies();
    sync_warp();  // the slot, the limbs and the scales have been read
    if (tile + kWarps * a.slots < item.tiles)
      ring.template copy<kBits, kProjectPad>(codes + (tile + kWarps * a.slots) * tile_bytes, rows);
  }

  // Lanes with t = 0 (1 bit: and 2) have the lower limbs' sums, their neighbours the upper ones'.
  // Rows past the last are not stored.
  float* total = scale;
#pragma unroll
  for (int block = 0; block < P::kBlocks; ++block) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float value = acc[block][h] + 65536.0f * shuffle_xor(acc[block][h], 1);
      if (kBits == 1 ? t % 2 == 0 : t == 0)
        total[block * kProjectRows<kBits> + project_row<kBits>(g + 8 * h, t)] = value;
    }
  }
  sync_block();
  for (int i = thread_index(); i < rows; i += kThreads) {
    float value = 0.0f;
    for (int w = 0; w < kWarps; ++w)
      value += reinterpret_cast<const float*>(base + w * stride + P::kScaleAt)[i];
    out[i] = kBits == 1 ? 127.0f * value : value;
  }
  sync_block();
}

}  // namespace twa
