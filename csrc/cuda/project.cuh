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
// Shared     per warp: ring of packed rows, each slot with its tile's gradient behind them; 624
//            bytes of limbs, scales of the rows as float32.
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
  int slots, slot_bytes;  // of a warp's ring
  int row_blocks;
  bool fence;  // of CudaVariant
  bool keep;   // packed bytes stay in the second-level cache as long as it has room
};

// kUnits: 16 rows each, that a block takes. 1 bit: 32 rows an operand, the last may be a half.
template <int kBits, int kUnits>
struct Project {
  static constexpr int kRows = 16 * kUnits, kBlocks = kRows / kProjectRows<kBits>;
  static constexpr bool kHalf = kRows % kProjectRows<kBits> != 0;
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
  // For n rows in all; lanes read kSlot bytes of it, whatever follows the last row.
  TWA_HD static constexpr int slot_bytes(int64_t n) {
    const int rows = n < kRows ? static_cast<int>(n) : kRows;
    return project_offset<kBits>(rows) + kGradientBytes;
  }
  static constexpr int kSlot = project_offset<kBits>(kRows), kMostSlot = kSlot + kGradientBytes;
  static constexpr int block_bytes(int slots, int slot_bytes) {
    return warps_bytes(kHeader, slots, slot_bytes, kSlot);
  }
};

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

// One item and one block of rows.
template <int kBits, int kUnits>
struct ProjectTask : Task {
  using P = Project<kBits, kUnits>;

  explicit TWA_DEVICE ProjectTask(const Task& started) : Task(started) {}
  TWA_DEVICE ProjectTask(const ProjectArguments& a, Ring& ring, int64_t at, int row_block)
      : Task(a.work, at, a.grads) {
    row = row_block * P::kRows;
    codes = a.codes + ((item.tile + tile) * a.n + row) * row_bytes(kBits);
    if (columns.data == nullptr) return;
    for (int k = 0; k < a.slots; ++k) copy(a, ring);
  }
  TWA_DEVICE int rows(const ProjectArguments& a) const {
    const int left = static_cast<int>(a.n) - row;
    return left < P::kRows ? left : P::kRows;
  }
  // Of the next tile.
  TWA_DEVICE void copy(const ProjectArguments& a, Ring& ring) {
    if (tile >= item.tiles) return;
    const int bytes = kTileColumns * columns.element_bytes();
    ring.template copy<kBits, kProjectPad>(codes, rows(a), columns.data + tile * bytes,
                                           tile < columns.whole ? bytes : 0);
    tile += kWarps, codes += kWarps * static_cast<int>(a.n) * row_bytes(kBits);
  }

  // Sums of the warp's tiles, in `mine`, its shared memory.
  TWA_DEVICE void run(const ProjectArguments& a, Ring& ring, uint8_t* mine) {
    const int lane = lane_index(), warp = uniform(warp_index()), g = lane / 4, t = lane % 4,
              n = static_cast<int>(a.n), count = rows(a);
    if (columns.data == nullptr) return;
    uint32_t* limbs = reinterpret_cast<uint32_t*>(mine + P::kLimbAt);
    float* scale = reinterpret_cast<float*>(mine + P::kScaleAt);
    if (lane < 16) limbs[P::kZeroAt + lane] = 0;

    // This lane's words of the limbs: column g of the operand is limb g, or nothing. 1 bit: columns
    // 4 to 7 belong to the second row of a pair.
    const bool has_limb = kBits == 1 ? (g >= 4) == (t >= 2) : g < P::kLimbs;
    const uint32_t* my_limbs = limbs + (!has_limb    ? P::kZeroAt
                                        : kBits == 1 ? g % 4 * P::kLimbStride + t % 2 * 16
                                                     : g * P::kLimbStride + t * 8);
    constexpr int kWords = 2 * kProjectSteps<kBits>;

    const uint8_t* scales = a.scales + (item.tile + warp) * a.n + row + lane;  // of this lane
    const uint32_t table[2] = {in_register(first_levels<kBits>(0)),
                               in_register(first_levels<kBits>(1))};
    float acc[P::kBlocks + 1][2] = {}, last = 0.0f;
    uint32_t s[P::kScales];
    if (warp < item.tiles) load_scales<P::kScales>(scales, count, s);
    for (int at = warp; at < item.tiles; at += kWarps) {
      const uint8_t* slot = ring.next();
      int sum;
      TwoFactors unit;
      float gradient[4];
      columns.template take<kBits != 8 && kBits != 1>(slot + ring.slot_bytes - kGradientBytes, at,
                                                      gradient);
      write_limbs<kBits, P::kLimbStride>(gradient, limbs, unit, sum);
#pragma unroll
      for (int j = 0; j < P::kScales; ++j)
        scale[32 * j + lane] = e4m3_shifted(s[j]) * unit.first * unit.second;
      sync_warp();
      uint32_t b[kWords];
#pragma unroll
      for (int k = 0; k < kWords; k += 4) {
        const Word4 w = *reinterpret_cast<const Word4*>(my_limbs + k);
        b[k] = w.w[0], b[k + 1] = w.w[1], b[k + 2] = w.w[2], b[k + 3] = w.w[3];
      }
      const auto add = [&](float& to, const int (&d)[4], int h, int row) {
        // two limbs, below 2^30
        const int v = kBits == 1 ? 512 * d[2 * h + 1] + (2 * d[2 * h] - sum)
                                 : 256 * d[2 * h + 1] + d[2 * h] + (kShifted<kBits> ? sum : 0);
        to = fmaf(static_cast<float>(v), scale[row], to);
      };
#pragma unroll
      for (int block = 0; block < P::kBlocks; ++block) {
        const int base = block * kProjectRows<kBits>, upper = base + project_row<kBits>(g, t),
                  lower = base + project_row<kBits>(g + 8, t);
        uint32_t x[kWords * kProjectPasses<kBits>], y[kWords * kProjectPasses<kBits>];
        project_operand<kBits>(slot + project_offset<kBits>(kBits == 1 ? base + 2 * g : upper), t,
                               table, x);
        project_operand<kBits>(slot + project_offset<kBits>(kBits == 1 ? base + 2 * g + 16 : lower),
                               t, table, y);
        int d[4] = {0, 0, 0, 0};
#pragma unroll
        for (int k = 0; k < kProjectSteps<kBits> * kProjectPasses<kBits>; ++k)
          multiply_add<kBits == 1>(d, x[2 * k], y[2 * k], x[2 * k + 1], y[2 * k + 1],
                                   b[2 * k % kWords], b[2 * k % kWords + 1]);
        add(acc[block][0], d, 0, upper), add(acc[block][1], d, 1, lower);
      }
      if constexpr (P::kHalf) {  // 16 rows: the operand's upper half; nobody looks at the lower
                                 // one's sums
        const int row = 32 * P::kBlocks + project_row<kBits>(g, t);
        uint32_t x[kWords];
        project_operand<kBits>(slot + project_offset<kBits>(32 * P::kBlocks + 2 * g), t, table, x);
        int d[4] = {0, 0, 0, 0};
#pragma unroll
        for (int k = 0; k < kProjectSteps<kBits>; ++k)
          multiply_add<true>(d, x[2 * k], anything(), x[2 * k + 1], anything(), b[2 * k],
                             b[2 * k + 1]);
        add(last, d, 0, row);
      }
      if (a.fence) release_to_copies();
      sync_warp();  // the slot, the limbs and the scales have been read
      copy(a, ring);
      scales += kWarps * n;
      if (at + kWarps < item.tiles)  // after the fence, which would wait for them
        load_scales<P::kScales>(scales, count, s);
    }

    // Lanes with t = 0 (1 bit: and 2) have the lower limbs' sums, their neighbours the upper ones'.
    // Rows past the last are not stored.
    const auto keep = [&](float value, int row) {
      value += 65536.0f * shuffle_xor(value, 1);
      if (kBits == 1 ? t % 2 == 0 : t == 0) scale[row] = value;
    };
#pragma unroll
    for (int block = 0; block < P::kBlocks; ++block) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        keep(acc[block][h], block * kProjectRows<kBits> + project_row<kBits>(g + 8 * h, t));
    }
    if constexpr (P::kHalf) keep(last, 32 * P::kBlocks + project_row<kBits>(g, t));
  }

  // Adds the warps' sums, which all have come to. base: their shared memory, `stride` bytes each.
  TWA_DEVICE void store(const ProjectArguments& a, const uint8_t* base, int stride,
                        int64_t at) const {
    for (int i = thread_index(); i < rows(a); i += kThreads) {
      float value = 0.0f;
      for (int w = 0; w < kWarps && columns.data != nullptr; ++w)
        value += reinterpret_cast<const float*>(base + w * stride + P::kScaleAt)[i];
      a.partial[at * a.n + row + i] = kBits == 1 ? 127.0f * value : value;
    }
  }
};

}  // namespace twa
