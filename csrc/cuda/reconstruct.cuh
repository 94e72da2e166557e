// reconstruct, one item: out = center + sum over all rows, for the item's columns.
//
// Operands   codes, scales as in project; x_rows (L, padded_rows(n)) float32: coefficient times row_scale, zero past n; center and out by tensor.
// Work map   block = item; warp w takes tiles w, w + 4, ... and all n rows, kGroups * 32 of them at a time.
// Product    levels (columns x rows) times coefficients (rows x limbs) on the matrix units. The operand wants four rows in a word where packed words have
//            four bytes of one row: 4 x 4 bytes (or nibbles) are transposed in registers before they are decoded, at 1 bit 0.06 permutations a
//            weight. Coefficients x row_scale scale are 24-bit fixed point with a unit per tile: three limbs, exact int32 sums over all rows.
//            At 1 bit the operand is masked words, 0 or 2^field: sum (2 b - 1) q = 2 sum b q - sum q.
// Shared     per warp: ring of packed rows, the coefficients' limbs, the tile's sums (2.5 KiB) on their way from the matrix layout to four columns a
//            lane; per block x_rows of the segment.
// Bytes      n * D * (bits / 8 + 1 / 128) + D * (center + weight).
#pragma once

#include "common.h"

namespace twa {

struct ReconstructArguments {
  const uint8_t* codes;         // (num_tiles, n, 16 * bits)
  const uint8_t* scales;        // (num_tiles, n)
  const float* x_rows;          // (L, padded_rows(n))
  const DeviceTensor* center;   // (tensors,) or null
  const DeviceTensor* out;      // (tensors,)
  DeviceWork work;
  int64_t n;
  int slots;                    // of a warp's ring
};

// kGroups: groups of 32 rows whose coefficients a lane holds, one row each.
template <int kBits, int kGroups>
struct Reconstruct {
  static constexpr int kMost = kBits == 8 ? 1 : kBits == 4 || kBits == 3 ? 2 : kBits == 2 ? 4 : 8;
  static constexpr int kSlotGroups = kGroups < kMost ? kGroups : kMost;  // of 32 rows in a slot: at most 4 KiB
  static constexpr int kSlot = kSlotGroups * 32 * row_bytes(kBits) + (kBits == 8 ? 4 * kReconstructPad : 0);
  static constexpr int kLimbBytes = 3 * kGroups * 32 + 32;  // and 32 bytes of zeros, for the columns of the operand that no limb has
  static constexpr int kSumBytes = 160 * 16;                // 128 columns of four sums, one column of padding every four
  static constexpr int kLimbAt = kMaxStages * 8, kSumAt = (kLimbAt + kLimbBytes + 15) / 16 * 16, kHeader = kSumAt + kSumBytes;
  TWA_HD static constexpr int warp_bytes(int slots) { return (kHeader + slots * kSlot + 127) / 128 * 128; }
};

// Adds 32 rows of a slot: sums[m] += levels of columns (reconstruct_column) times limbs b0, b1.
template <int kBits>
TWA_DEVICE void add_rows(const uint8_t* rows, uint32_t b0, uint32_t b1, int (&sums)[8][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  // Words of this lane's eight rows; each lane has as many bytes of a row as make 8 multiplications.
  uint32_t w[2][2][4], top[2][4];  // word, half, row of the half
#pragma unroll
  for (int part = 0; part < (kBits == 8 ? 2 : 1); ++part) {  // at 8 bits half a tile at a time, so that its words fit into registers
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint8_t* row = rows + reconstruct_offset<kBits>(reconstruct_row<kBits>(t, j));
      if constexpr (kBits == 8 || kBits == 4) {
        const Word2 x = *reinterpret_cast<const Word2*>(row + 64 * part + 8 * g);
        w[0][j / 4][j % 4] = x.w[0], w[1][j / 4][j % 4] = x.w[1];
      } else {
        w[0][j / 4][j % 4] = *reinterpret_cast<const uint32_t*>(row + (kBits == 1 ? 4 * (g % 4) : 4 * g));
        if constexpr (kBits == 3) top[j / 4][j % 4] = top_bits(*reinterpret_cast<const uint32_t*>(row + 32 + 4 * (g % 4)), g / 4);
      }
    }
    if constexpr (kBits == 1) {
      uint32_t bytes[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        transpose_bytes(w[0][half][0], w[0][half][1], w[0][half][2], w[0][half][3], bytes);
#pragma unroll
        for (int p = 0; p < 4; ++p) w[0][half][p] = bytes[p];
      }
    }
    const auto multiply = [&](auto constant, int word, int m) {
      constexpr int kPart = decltype(constant)::value;
      uint32_t x[4], y[4];
      reconstruct_operand<kBits, kPart>(w[word][0], top[0], g, x);
      reconstruct_operand<kBits, kPart>(w[word][1], top[1], g, y);
      multiply_add<kBits == 1>(sums[m], x[0], x[1], y[0], y[1], b0, b1);
      multiply_add<kBits == 1>(sums[m + 1], x[2], x[3], y[2], y[3], b0, b1);
    };
    using std::integral_constant;
    if constexpr (kBits == 8) {
      multiply(integral_constant<int, 0>(), 0, 4 * part), multiply(integral_constant<int, 0>(), 1, 4 * part + 2);
    } else if constexpr (kBits == 4) {
      multiply(integral_constant<int, 0>(), 0, 0), multiply(integral_constant<int, 0>(), 1, 2);
      multiply(integral_constant<int, 1>(), 0, 4), multiply(integral_constant<int, 1>(), 1, 6);
    } else {
      multiply(integral_constant<int, 0>(), 0, 0), multiply(integral_constant<int, 1>(), 0, 2);
      multiply(integral_constant<int, 2>(), 0, 4), multiply(integral_constant<int, 3>(), 0, 6);
    }
  }
}

// Coefficients of this lane's rows, row0 + 32 j + lane: x row_scale scale, zero past n.
template <int kGroups>
TWA_DEVICE void coefficients(const float* x_row, const uint8_t* scales, int64_t row0, int64_t n, const uint32_t* loaded, float* y) {
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int64_t row = row0 + 32 * j + lane_index();
    const uint32_t byte = loaded ? loaded[j] : row < n ? scales[row] : 0u;
    y[j] = row < n ? x_row[row] * (e4m3_shifted(byte) * 0x1p120f) : 0.0f;
  }
}

// The tile's four columns of this lane, 4 lane .. 4 lane + 3: sums to weights. sum: 1 bit, sums of the limbs of all coefficients.
template <int kBits>
TWA_DEVICE void weights_of(const Word4* columns, const int (&sum)[3], float unit, float* value) {
  const int lane = lane_index();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const Word4 limbs = columns[5 * lane + k];
    int v[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) v[i] = static_cast<int>(limbs.w[i]);
    if constexpr (kBits == 1) {  // 2^(field + 1) sum b q - 2^field sum q, exact: below 2^28
#pragma unroll
      for (int i = 0; i < 3; ++i) v[i] = 2 * v[i] - (sum[i] << bit_field(4 * lane));
    }
    const float q = fmaf(65536.0f, static_cast<float>(v[2]), fmaf(256.0f, static_cast<float>(v[1]), static_cast<float>(v[0])));
    value[k] = q * unit;
  }
  if constexpr (kBits == 1) {
    const float even = 127.0f * pow2f(-bit_field(4 * lane));
#pragma unroll
    for (int k = 0; k < 4; ++k) value[k] *= even;
  }
}

TWA_DEVICE void store_weights(const DeviceTensor& out, bool aligned, int64_t column, int64_t numel, const float* value) {
  const int64_t j = column + 4 * lane_index();
  if (aligned && j + 4 <= numel) {
    if (out.dtype == Dtype::f32) {
      Float4 f;
      for (int k = 0; k < 4; ++k) f.v[k] = value[k];
      *reinterpret_cast<Float4*>(static_cast<float*>(out.data) + j) = f;
    } else {
      Half4 h;
      for (int k = 0; k < 4; ++k) h.v[k] = out.dtype == Dtype::bf16 ? float_to_bf16(value[k]) : float_to_f16(value[k]);
      *reinterpret_cast<Half4*>(static_cast<uint16_t*>(out.data) + j) = h;
    }
  } else {
    for (int k = 0; k < 4 && j + k < numel; ++k) {
      if (out.dtype == Dtype::f32)
        static_cast<float*>(out.data)[j + k] = value[k];
      else
        static_cast<uint16_t*>(out.data)[j + k] = out.dtype == Dtype::bf16 ? float_to_bf16(value[k]) : float_to_f16(value[k]);
    }
  }
}

TWA_DEVICE void load_center(const DeviceTensor& center, bool aligned, int64_t column, int64_t numel, float* v) {
  const int64_t j = column + 4 * lane_index();
  if (center.data == nullptr) {
    for (int k = 0; k < 4; ++k) v[k] = 0.0f;
  } else if (aligned && j + 4 <= numel) {
    load_four(center, j, v);
  } else {
    for (int k = 0; k < 4; ++k) v[k] = j + k < numel ? load_one(center, j + k) : 0.0f;
  }
}

// kMany: more than kGroups * 32 rows. `mine`: this warp's shared memory; x_row: the segment's x_rows in shared memory.
template <int kBits, int kGroups, bool kMany>
TWA_DEVICE void reconstruct_item(const ReconstructArguments& a, Ring& ring, uint8_t* mine, float* x_row, int64_t at) {
  using R = Reconstruct<kBits, kGroups>;
  const int lane = lane_index(), warp = warp_index(), g = lane / 4, t = lane % 4;
  const Item item = load_item(a.work, at);
  const DeviceTensor out = a.out[item.tensor];
  if (out.data == nullptr) return;
  DeviceTensor center{nullptr, Dtype::f32, 0};
  if (a.center) center = a.center[item.tensor];
  const bool aligned = is_aligned(out), center_aligned = is_aligned(center);
  uint8_t* limbs = mine + R::kLimbAt;
  Word4* columns = reinterpret_cast<Word4*>(mine + R::kSumAt);
  if (lane < 8) reinterpret_cast<uint32_t*>(limbs + 3 * kGroups * 32)[lane] = 0;

  // Copies run ahead over (tile, rows of a slot), in the order of their use.
  constexpr int kSlotRows = 32 * R::kSlotGroups;
  const int64_t tile_bytes = a.n * row_bytes(kBits);
  const uint8_t* codes = a.codes + item.tile * tile_bytes;
  const uint8_t* scales = a.scales + item.tile * a.n;
  int copy_tile = warp;
  int64_t copy_row = 0;
  const auto copy_next = [&] {
    if (copy_tile >= item.tiles) return;
    const int rows = a.n - copy_row < kSlotRows ? static_cast<int>(a.n - copy_row) : kSlotRows;
    ring.template copy<kBits, kReconstructPad>(codes + copy_tile * tile_bytes + copy_row * row_bytes(kBits), rows);
    copy_row += kSlotRows;
    if (copy_row >= a.n) copy_row = 0, copy_tile += kWarps;
  };
  for (int k = 0; k < a.slots; ++k) copy_next();

  const float* x = a.x_rows + item.segment * padded_rows(a.n);
  for (int64_t i = thread_index(); i < padded_rows(a.n); i += kThreads) x_row[i] = load_shared_by_all(x + i);
  sync_block();

  // Column g of the operand is limb g, or nothing; this lane's words of 32 rows follow each other every 32 bytes.
  const uint8_t* my_limbs = g < 3 ? limbs + g * kGroups * 32 + 8 * t : limbs + 3 * kGroups * 32 + 8 * t;
  const int limb_step = g < 3 ? 32 : 0;
  uint32_t s[kGroups];
  float middle[4];
  if (warp < item.tiles) {
    load_scales<kGroups>(scales + warp * a.n, static_cast<int>(a.n), s);
    load_center(center, center_aligned, item.column + warp * kTileColumns, item.numel, middle);
  }
  for (int tile = warp; tile < item.tiles; tile += kWarps) {
    const uint8_t* tile_scales = scales + tile * a.n;
    float y[kGroups];
    coefficients<kGroups>(x_row, tile_scales, 0, a.n, s, y);
    uint32_t largest = 0;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) largest = max(largest, float_bits(y[j]) & 0x7fffffffu);
    if constexpr (kMany) {
      for (int64_t row0 = 32 * kGroups; row0 < a.n; row0 += 32 * kGroups) {
        float more[kGroups];
        coefficients<kGroups>(x_row, tile_scales, row0, a.n, nullptr, more);
        for (int j = 0; j < kGroups; ++j) largest = max(largest, float_bits(more[j]) & 0x7fffffffu);
      }
    }
    largest = warp_max(largest);
    const int e = fixed_exponent(largest), up = 23 - e;
    const float first = any_pow2f(up >> 1), second = any_pow2f(up - (up >> 1));
    if (tile + kWarps < item.tiles) load_scales<kGroups>(tile_scales + kWarps * a.n, static_cast<int>(a.n), s);

    int sums[8][4] = {}, limb_sum = 0;
    for (int64_t row0 = 0; row0 < (kMany ? a.n : 1); row0 += 32 * kGroups) {
      if (kMany && row0 > 0) coefficients<kGroups>(x_row, tile_scales, row0, a.n, nullptr, y);
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        const uint32_t v = limbs3(round_to_int(y[j] * first * second));
        const int byte = j * 32 + reconstruct_byte<kBits>(lane);
        limbs[byte] = static_cast<uint8_t>(v);
        limbs[kGroups * 32 + byte] = static_cast<uint8_t>(v >> 8);
        limbs[2 * kGroups * 32 + byte] = static_cast<uint8_t>(v >> 16);
      }
      sync_warp();
#pragma unroll
      for (int j = 0; j < kGroups; j += R::kSlotGroups) {
        if (row0 + 32 * j >= a.n) continue;
        const uint8_t* slot = ring.next();
#pragma unroll
        for (int i = 0; i < R::kSlotGroups && i + j < kGroups; ++i) {
          const Word2 b = *reinterpret_cast<const Word2*>(my_limbs + (j + i) * limb_step);
          if constexpr (kBits == 1) limb_sum = dot4(b.w[1], 0x01010101u, dot4(b.w[0], 0x01010101u, limb_sum));
          add_rows<kBits>(slot + reconstruct_offset<kBits>(32 * i), b.w[0], b.w[1], sums);
        }
        sync_warp();
        copy_next();
      }
    }

    // From the matrix layout, two limbs of 16 columns a lane, to three limbs of four columns.
    if (t < 2) {
#pragma unroll
      for (int m = 0; m < 8; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int column = reconstruct_column<kBits>(m, h, g);
          Word2* to = reinterpret_cast<Word2*>(columns + column + column / 4) + t;
          *to = Word2{{static_cast<uint32_t>(sums[m][2 * h]), static_cast<uint32_t>(sums[m][2 * h + 1])}};
        }
      }
    }
    int sum[3] = {0, 0, 0};
    if constexpr (kBits == 1) {
      limb_sum += shuffle_xor(limb_sum, 1);
      limb_sum += shuffle_xor(limb_sum, 2);
#pragma unroll
      for (int i = 0; i < 3; ++i) sum[i] = shuffle(limb_sum, 4 * i);
    }
    sync_warp();
    float value[4];
    weights_of<kBits>(columns, sum, largest >= 0x7f800000u ? bits_float(0x7fc00000u) : any_pow2f(e - 23), value);
#pragma unroll
    for (int k = 0; k < 4; ++k) value[k] += middle[k];
    if (tile + kWarps < item.tiles) load_center(center, center_aligned, item.column + (tile + kWarps) * kTileColumns, item.numel, middle);
    store_weights(out, aligned, item.column + tile * kTileColumns, item.numel, value);
    sync_warp();  // the sums have been read
  }
  sync_block();  // x_row too
}

}  // namespace twa
