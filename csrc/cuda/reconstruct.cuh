// reconstruct, one item: out = center + sum over all rows, for the item's columns.
//
// Operands   codes, scales as in project; x_rows (L, n) float32: coefficient times row_scale;
//            center and out by tensor.
// Work map   block = item; warp w takes tiles w, w + 4, ... and all n rows, kGroups * 32 of them at
//            a time.
// Product    levels (columns x rows) times coefficients (rows x limbs) on the matrix units. The
//            operand wants four rows in a word where packed words have four bytes of one row: 4 x 4
//            bytes (or nibbles) are transposed in registers before they are decoded, at 1 bit 0.06
//            permutations a weight. Coefficients x row_scale scale are 24-bit fixed point with a
//            unit per tile: three limbs, exact int32 sums over all rows.
//            At 1 bit the operand is masked words, 0 or 2^field: sum (2 b - 1) q = 2 sum b q - sum
//            q.
// Shared     per warp: ring of packed rows, the coefficients' limbs, the tile's sums (2.5 KiB) on
//            their way from the matrix layout to four columns a lane; per block x_rows of the
//            segment.
// Bytes      n * D * (bits / 8 + 1 / 128) + D * (center + weight).
#pragma once

#include "common.h"

namespace twa {

struct ReconstructArguments {
  const uint8_t* codes;        // (num_tiles, n, 16 * bits)
  const uint8_t* scales;       // (num_tiles, n)
  const float* x_rows;         // (L, n)
  const DeviceTensor* center;  // (tensors,) or null
  const DeviceTensor* out;     // (tensors,)
  DeviceWork work;
  int64_t n;
  int slots, slot_bytes;  // of a warp's ring
  bool fence, keep;       // as in project
};

// kUnits: 16 rows each; groups of 32 whose coefficients a lane holds, one row each. The last group
// may have 16 rows only.
template <int kBits, int kUnits>
struct Reconstruct {
  static constexpr int kGroups = (kUnits + 1) / 2;
  static constexpr bool kHalf =
      kUnits % 2 != 0 &&
      kBits != 8;  // at 8 bits the first 16 rows are not what the first words contract
  // A slot has some groups of a tile: all, or parts of 6 KiB at most that are alike.
  static constexpr int kMost = kBits == 8                 ? 1
                               : kBits == 4 || kBits == 3 ? 3
                               : kBits == 2               ? 4
                                                          : 8,
                       kParts = (kGroups + kMost - 1) / kMost,
                       kSlotGroups = (kGroups + kParts - 1) / kParts;
  // For n rows in all; lanes read kSlot bytes of it, whatever follows the last row.
  TWA_HD static constexpr int slot_bytes(int64_t n) {
    const int rows = n < 32 * kSlotGroups ? static_cast<int>(n) : 32 * kSlotGroups;
    return reconstruct_offset<kBits>(rows);
  }
  static constexpr int kSlot = reconstruct_offset<kBits>(32 * kSlotGroups);
  static constexpr int kLimbBytes =
      3 * kGroups * 32 +
      32;  // and 32 bytes of zeros, for the columns of the operand that no limb has
  static constexpr int kSumBytes =
      160 * 16;  // 128 columns of four sums, one column of padding every four
  static constexpr int kLimbAt = kMaxStages * 8, kSumAt = (kLimbAt + kLimbBytes + 15) / 16 * 16,
                       kHeader = kSumAt + kSumBytes;
  // Floats of x_rows in shared memory: zeros as far as lanes read.
  TWA_HD static constexpr int x_count(int64_t n) {
    return static_cast<int>((n + 32 * kGroups - 1) / (32 * kGroups) * (32 * kGroups));
  }
  static constexpr int block_bytes(int64_t n, int slots, int slot_bytes) {
    return x_count(n) * 4 + warps_bytes(kHeader, slots, slot_bytes, kSlot);
  }
};

// Adds 32 rows of a slot: sums[m] += levels of columns (reconstruct_column) times limbs b0, b1.
// kHalf: 16 rows, the first of b.
template <int kBits, bool kHalf>
TWA_DEVICE void add_rows(const uint8_t* rows, uint32_t b0, uint32_t b1, const uint32_t* table,
                         int (&sums)[8][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  // Words of this lane's eight rows; each lane has as many bytes of a row as make 8
  // multiplications.
  uint32_t w[2][2][4], top[2][4];  // word, half, row of the half
#pragma unroll
  for (int part = 0; part < (kBits == 8 ? 2 : 1);
       ++part) {  // at 8 bits half a tile at a time, so that its words fit into registers
#pragma unroll
    for (int j = 0; j < (kHalf ? 4 : 8); ++j) {
      const uint8_t* row = rows + reconstruct_offset<kBits>(reconstruct_row<kBits>(t, j));
      if constexpr (kBits == 8 || kBits == 4) {
        const Word2 x = *reinterpret_cast<const Word2*>(row + 64 * part + 8 * g);
        w[0][j / 4][j % 4] = x.w[0], w[1][j / 4][j % 4] = x.w[1];
      } else {
        w[0][j / 4][j % 4] =
            *reinterpret_cast<const uint32_t*>(row + (kBits == 1 ? 4 * (g % 4) : 4 * g));
        if constexpr (kBits == 3)
          top[j / 4][j % 4] =
              top_bits(*reinterpret_cast<const uint32_t*>(row + 32 + 4 * (g % 4)), g / 4);
      }
    }
    if constexpr (kBits == 1) {
      uint32_t bytes[4];
#pragma unroll
      for (int half = 0; half < (kHalf ? 1 : 2); ++half) {
        transpose_bytes(w[0][half][0], w[0][half][1], w[0][half][2], w[0][half][3], bytes);
#pragma unroll
        for (int p = 0; p < 4; ++p) w[0][half][p] = bytes[p];
      }
    }
    const auto multiply = [&](auto constant, int word, int m) {
      constexpr int kPart = decltype(constant)::value;
      uint32_t x[8], y[8];  // 4 bits: two operands
      reconstruct_operand<kBits, kPart>(w[word][0], top[0], g, table, x);
      if constexpr (kHalf) {
#pragma unroll
        for (int k = 0; k < (kBits == 4 ? 8 : 4); k += 4) {
          multiply_add_half<kBits == 1>(sums[m], x[k], x[k + 1], b0);
          multiply_add_half<kBits == 1>(sums[m + 1], x[k + 2], x[k + 3], b0);
        }
        return;
      }
      reconstruct_operand<kBits, kPart>(w[word][1], top[1], g, table, y);
#pragma unroll
      for (int k = 0; k < (kBits == 4 ? 8 : 4); k += 4) {
        multiply_add<kBits == 1>(sums[m], x[k], x[k + 1], y[k], y[k + 1], b0, b1);
        multiply_add<kBits == 1>(sums[m + 1], x[k + 2], x[k + 3], y[k + 2], y[k + 3], b0, b1);
      }
    };
    using std::integral_constant;
    if constexpr (kBits == 8) {
      multiply(integral_constant<int, 0>(), 0, 4 * part),
          multiply(integral_constant<int, 0>(), 1, 4 * part + 2);
    } else if constexpr (kBits == 4) {
      multiply(integral_constant<int, 0>(), 0, 0), multiply(integral_constant<int, 0>(), 1, 2);
      multiply(integral_constant<int, 1>(), 0, 4), multiply(integral_constant<int, 1>(), 1, 6);
    } else {
      multiply(integral_constant<int, 0>(), 0, 0), multiply(integral_constant<int, 1>(), 0, 2);
      multiply(integral_constant<int, 2>(), 0, 4), multiply(integral_constant<int, 3>(), 0, 6);
    }
  }
}

// Coefficients of this lane's rows, row0 + 32 j + lane: x row_scale scale; loaded: scales that are
// here already.
template <int kGroups>
TWA_DEVICE void coefficients(const float* x_row, const uint8_t* scales, int row0, int n,
                             const uint32_t* loaded, float* y) {
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int row = row0 + 32 * j + lane_index();
    const uint32_t byte = loaded ? loaded[j] : row < n ? load_1(scales + row) : 0u;
    y[j] = x_row[row] * (e4m3_shifted(byte) * 0x1p120f);
  }
}

// The tile's four columns of this lane, 4 lane .. 4 lane + 3: value += sum * unit. low, high: sum
// of all coefficients, in limbs of 16 bits; 1 bit: subtracted from twice the sums, whose levels are
// 0 or 1; 4 bits: added.
template <int kBits>
TWA_DEVICE void add_sums(const Word4* columns, int low, int high, TwoFactors unit, float* value) {
  const int lane = lane_index(), field = bit_field(4 * lane);
  if constexpr (kBits == 1) unit.first *= 127.0f * pow2f(-field);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const Word4 limbs = columns[5 * lane + k];
    int v[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) v[i] = static_cast<int>(limbs.w[i]);
    if constexpr (kBits == 1)
      v[0] = 2 * v[0] - (low * (1 << field)), v[1] = 2 * v[1],
      v[2] = 2 * v[2] - (high * (1 << field));  // exact: below 2^30
    if constexpr (kShifted<kBits>) v[0] += low, v[2] += high;
    const float q = fmaf(65536.0f, static_cast<float>(v[2]),
                         fmaf(256.0f, static_cast<float>(v[1]), static_cast<float>(v[0])));
    value[k] = fmaf(q * unit.first, unit.second, value[k]);
  }
}

// One item. kMany: more than 16 * kUnits rows.
template <int kBits, int kUnits, bool kMany>
struct ReconstructTask : Task {
  using R = Reconstruct<kBits, kUnits>;

  explicit TWA_DEVICE ReconstructTask(const Task& started) : Task(started) {}
  TWA_DEVICE ReconstructTask(const ReconstructArguments& a, Ring& ring, int64_t at)
      : Task(a.work, at, a.out) {
    codes = a.codes + (item.tile + tile) * a.n * row_bytes(kBits);
    if (columns.data == nullptr) return;
    for (int k = 0; k < a.slots; ++k) copy_next(a, ring);
  }
  // Copies run ahead over (tile, rows of a slot), in the order of their use.
  TWA_DEVICE void copy_next(const ReconstructArguments& a, Ring& ring) {
    if (tile >= item.tiles) return;
    const int n = static_cast<int>(a.n);
    if constexpr (!kMany && R::kParts == 1) {  // a tile is one slot
      ring.template copy<kBits, kReconstructPad>(codes, n);
      tile += kWarps, codes += kWarps * n * row_bytes(kBits);
    } else {
      constexpr int kSlotRows = 32 * R::kSlotGroups;
      const int rows = n - row < kSlotRows ? n - row : kSlotRows;
      ring.template copy<kBits, kReconstructPad>(codes, rows);
      row += rows, codes += rows * row_bytes(kBits);
      if (row == n) row = 0, tile += kWarps, codes += (kWarps - 1) * n * row_bytes(kBits);
    }
  }

  // `mine`: this warp's shared memory; x_row: the segment's x_rows in shared memory. wait: until
  // they are there to be read.
  template <class Wait>
  TWA_DEVICE void run(const ReconstructArguments& a, Ring& ring, uint8_t* mine, float* x_row,
                      const Wait& wait) {
    if (columns.data == nullptr) return;
    constexpr int kGroups = R::kGroups;
    const int lane = lane_index(), warp = uniform(warp_index()), g = lane / 4, t = lane % 4,
              n = static_cast<int>(a.n);
    const Columns center(a.center, item);  // an absent center has no columns: zeros
    uint8_t* limbs = mine + R::kLimbAt;
    Word4* to_columns = reinterpret_cast<Word4*>(mine + R::kSumAt);
    if (lane < 8) reinterpret_cast<uint32_t*>(limbs + 3 * kGroups * 32)[lane] = 0;
    const uint8_t* scales = a.scales + (item.tile + warp) * a.n;
    uint32_t s[kGroups], middle[4];
    if (warp < item.tiles) {
      load_scales<kGroups>(scales + lane, n, s);
      center.load_raw(warp * kTileColumns, middle);
    }
    wait();
    const float* x = a.x_rows + item.segment * a.n;
    for (int i = thread_index(); i < R::x_count(n); i += kThreads)
      x_row[i] = i < n ? load_shared_by_all(x + i) : 0.0f;
    sync_block();

    // Column g of the operand is limb g, or nothing; this lane's words of 32 rows follow each other
    // every 32 bytes.
    const uint8_t* my_limbs =
        g < 3 ? limbs + g * kGroups * 32 + 8 * t : limbs + 3 * kGroups * 32 + 8 * t;
    const int limb_step = g < 3 ? 32 : 0;
    const uint32_t table[2] = {in_register(first_levels<kBits>(0)),
                               in_register(first_levels<kBits>(1))};
    for (int at = warp; at < item.tiles; at += kWarps) {
      float y[kGroups];
      coefficients<kGroups>(x_row, scales, 0, n, s, y);
      uint32_t largest = 0;
#pragma unroll
      for (int j = 0; j < kGroups; ++j) largest = max(largest, float_bits(y[j]) & 0x7fffffffu);
      if constexpr (kMany) {
        for (int row0 = 32 * kGroups; row0 < n; row0 += 32 * kGroups) {
          float more[kGroups];
          coefficients<kGroups>(x_row, scales, row0, n, nullptr, more);
          for (int j = 0; j < kGroups; ++j)
            largest = max(largest, float_bits(more[j]) & 0x7fffffffu);
        }
      }
      largest = warp_max(largest);
      const int e = fixed_exponent(largest);
      const TwoFactors up = pow2_factors(23 - e);

      int sums[8][4] = {}, q_sum = 0;
      for (int row0 = 0; row0 < (kMany ? n : 1); row0 += 32 * kGroups) {
        if (kMany && row0 > 0) coefficients<kGroups>(x_row, scales, row0, n, nullptr, y);
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
          const int q = round_to_int(y[j] * up.first * up.second);
          const uint32_t v = limbs3(q);
          if constexpr (kBits == 1 || kShifted<kBits>)
            q_sum =
                static_cast<int>(static_cast<uint32_t>(q_sum) +
                                 static_cast<uint32_t>(q));  // may wrap where NaN follows anyway
          const int byte = j * 32 + reconstruct_byte<kBits>(lane);
          limbs[byte] = static_cast<uint8_t>(v);
          limbs[kGroups * 32 + byte] = static_cast<uint8_t>(v >> 8);
          limbs[2 * kGroups * 32 + byte] = static_cast<uint8_t>(v >> 16);
        }
        sync_warp();
#pragma unroll
        for (int j = 0; j < kGroups; j += R::kSlotGroups) {
          if ((j > 0 || kMany) && row0 + 32 * j >= n) continue;
          const uint8_t* slot = ring.next();
#pragma unroll
          for (int i = 0; i < R::kSlotGroups && i + j < kGroups; ++i) {
            const Word2 b = *reinterpret_cast<const Word2*>(my_limbs + (j + i) * limb_step);
            if constexpr (R::kHalf && !kMany) {
              if (i + j == kGroups - 1) {
                add_rows<kBits, true>(slot + reconstruct_offset<kBits>(32 * i), b.w[0], b.w[1],
                                      table, sums);
                continue;
              }
            }
            add_rows<kBits, false>(slot + reconstruct_offset<kBits>(32 * i), b.w[0], b.w[1], table,
                                   sums);
          }
          if (a.fence) release_to_copies();
          sync_warp();
          copy_next(a, ring);
        }
      }

      // From the matrix layout, two limbs of 16 columns a lane, to three limbs of four columns.
      if (t < 2) {
        const int mine = reconstruct_column<kBits>(0, 0, g);  // a multiple of 4
        Word2* to = reinterpret_cast<Word2*>(to_columns + mine + mine / 4) + t;
#pragma unroll
        for (int m = 0; m < 8; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int column = reconstruct_column<kBits>(m, h, 0);
            to[2 * (column + column / 4)] = Word2{
                {static_cast<uint32_t>(sums[m][2 * h]), static_cast<uint32_t>(sums[m][2 * h + 1])}};
          }
        }
      }
      int low = 0, high = 0;
      if constexpr (kBits == 1 || kShifted<kBits>)
        low = warp_sum(q_sum & 0xffff), high = warp_sum(q_sum >> 16);
      sync_warp();
      float value[4];
      center.from_raw(middle, value);
      TwoFactors unit = pow2_factors(e - 23);
      if (largest >= 0x7f800000u) unit.second = bits_float(0x7fc00000u);
      add_sums<kBits>(to_columns, low, high, unit, value);
      scales += kWarps * n;
      if (at + kWarps < item.tiles) {  // after the fences, which would wait for them
        load_scales<kGroups>(scales + lane, n, s);
        center.load_raw((at + kWarps) * kTileColumns, middle);
      }
      columns.store_four(at * kTileColumns, value);
      sync_warp();  // the sums have been read
    }
  }
};

}  // namespace twa
