// The quantiser of packing.h on a GPU, shared by pack and record.
//
// Work map   A warp codes four groups of 128 columns at a time: of each group lane r holds columns
//            r, r + 32, r + 64, r + 96, so the halving tree is two additions inside the lane, then
//            butterflies over 16, 8, 4, 2, 1 lanes. The first two butterflies leave a group to
//            each eight lanes: the last three, and the divisions and roots behind them, are done
//            once for all four (quantise_four). Groups that are ragged, zero, not finite or of
//            extreme size go one at a time (quantise), with the same bits.
//            The fields of a packed byte are 16, 32 or 64 columns apart: a lane has whole bytes,
//            or half of them (1 bit and the third bits of 3) and its neighbour 16 lanes on the
//            other half.
// Shared     at 4, 3 and 2 bits, two tables of 256 bytes for the block: a bank has two of a table's
//            words, so that 32 look-ups take two cycles at most.
// To be compiled with -fmad=false: every float operation rounds once, as on the CPU.
#pragma once

#include "common.h"

namespace twa {

constexpr int kQuantiseWarps = 4;  // of a block: with 72 registers 28 warps share a multiprocessor
constexpr int kQuantiseTiles = 4;  // that a warp codes at a time: one for each eight of its lanes
constexpr int kQuantiseColumns = kQuantiseTiles * kTileColumns;
constexpr int kQuantiseShared = 2 * 256;

// Tensor of a tile: the last k with tile_begin[k] <= tile.
TWA_DEVICE int64_t tensor_of(const int64_t* __restrict__ tile_begin, int64_t count, int64_t tile) {
  int64_t k = 0, end = count;
  while (k + 1 < end) {
    const int64_t mid = (k + end) / 2;
    if (tile_begin[mid] <= tile)
      k = mid;
    else
      end = mid;
  }
  return k;
}

// v[r] = element column + lane + 32 r of a tensor, zero past the `valid` ones.
TWA_DEVICE void load_group(const DeviceTensor& t, int64_t column, int valid, float (&v)[4]) {
  const int lane = lane_index();
  if (t.dtype == Dtype::f32) {
    const float* from = opaque(static_cast<const float*>(t.data) + (column + lane));
#pragma unroll
    for (int r = 0; r < 4; ++r)
      v[r] = lane + 32 * r < valid ? bits_float(load_4(from + 32 * r)) : 0.0f;
    return;
  }
  const uint16_t* from = opaque(static_cast<const uint16_t*>(t.data) + (column + lane));
  uint16_t half[4];  // all four are on their way before the first is converted
#pragma unroll
  for (int r = 0; r < 4; ++r) half[r] = lane + 32 * r < valid ? load_2(from + 32 * r) : uint16_t{0};
#pragma unroll
  for (int r = 0; r < 4; ++r)
    v[r] = t.dtype == Dtype::bf16 ? bf16_to_float(half[r]) : f16_to_float(half[r]);
}

// v[t][r] = element column + 128 t + lane + 32 r of a tensor that has them all.
TWA_DEVICE void load_four(const DeviceTensor& t, int64_t column, float (&v)[4][4]) {
  if (t.dtype == Dtype::f32) {
    const float* from = opaque(static_cast<const float*>(t.data) + (column + lane_index()));
#pragma unroll
    for (int k = 0; k < 16; ++k) v[k / 4][k % 4] = bits_float(load_4(from + 32 * k));
    return;
  }
  const uint16_t* from = opaque(static_cast<const uint16_t*>(t.data) + (column + lane_index()));
  uint16_t half[16];
#pragma unroll
  for (int k = 0; k < 16; ++k) half[k] = load_2(from + 32 * k);
  if (t.dtype == Dtype::bf16) {
#pragma unroll
    for (int k = 0; k < 16; ++k) v[k / 4][k % 4] = bf16_to_float(half[k]);
  } else {
#pragma unroll
    for (int k = 0; k < 16; ++k) v[k / 4][k % 4] = f16_to_float(half[k]);
  }
}

// Sum of 128 numbers, 4 a lane, in the halving-tree order of packing.h; every lane gets it.
TWA_DEVICE float tree_sum(float v0, float v1, float v2, float v3) {
  float s = (v0 + v2) + (v1 + v3);
#pragma unroll
  for (int h = 16; h > 0; h /= 2) s += shuffle_xor(s, h);  // a + b == b + a, so all lanes agree
  return s;
}

// Each lane's share of four such sums; lane l gets that of group l / 8. The same additions in the
// same order as tree_sum.
TWA_DEVICE float tree_sums(const float (&s)[4]) {
  const bool upper = lane_index() & 16, odd = lane_index() & 8;
  float a = upper ? s[2] : s[0], b = upper ? s[3] : s[1];
  a += shuffle_xor(upper ? s[0] : s[2], 16);
  b += shuffle_xor(upper ? s[1] : s[3], 16);
  float sum = (odd ? b : a) + shuffle_xor(odd ? a : b, 8);
#pragma unroll
  for (int h = 4; h > 0; h /= 2) sum += shuffle_xor(sum, h);
  return sum;
}
// Of one number for each group, the same in all lanes, that of group lane / 8.
TWA_DEVICE int own(const int (&of)[4]) {
  const int lane = lane_index();
  return lane < 16 ? (lane < 8 ? of[0] : of[1]) : (lane < 24 ? of[2] : of[3]);
}

// From numbers to codes and levels. A number is first rounded to an integer k in [-128, 127], where
// -128 counts as -127 (at 8 bits there is none).
template <int kBits>
struct Encoder {
  static constexpr bool kTables = kBits > 1 && kBits < 8;
  static constexpr uint32_t kZero = 0x4b400000u;  // bits of 1.5 * 2^23
  const uint8_t* codes;                           // (256,) from k = -128 on
  const uint8_t* levels;                          // (256,) level + 128

  // All threads of the block make one; then the block synchronises.
  TWA_DEVICE explicit Encoder(uint8_t* shared) : codes(shared), levels(shared + 256) {
    if constexpr (kTables) {
#pragma unroll
      for (int k = thread_index(); k < 256; k += 32 * kQuantiseWarps) {
        const int code = nearest_code_of<kBits>(k - 128);
        shared[k] = static_cast<uint8_t>(code);
        shared[256 + k] = static_cast<uint8_t>(level_of<kBits>(code) + 128);
      }
    }
  }
  TWA_DEVICE int round(float u, float inverse) const { return round_to_byte(u * inverse); }
  TWA_DEVICE uint32_t code(int k) const {
    if constexpr (kBits == 8) return static_cast<uint32_t>(k + 128);
    if constexpr (kBits == 1) return k > 0 ? 1u : 0u;
    return codes[k + 128];
  }
  TWA_DEVICE float level(int k) const {
    if constexpr (kBits == 8) return bits_float(kZero + k) - bits_float(kZero);
    if constexpr (kBits == 1) return k > 0 ? 127.0f : -127.0f;
    return bits_float(0x4b000000u | levels[k + 128]) - (0x1p23f + 128.0f);
  }
};

// e with 2^(e - 1) <= v < 2^e, from the bits of a normal number.
TWA_DEVICE int exponent(int bits) { return (bits >> 23) - 126; }

struct Group {
  int rounded[4];  // of each column, for the Encoder
  float scale;     // 4 significant bits
  float sum_sq;    // of the group times 2^-e
  int e;
  bool finite;  // else it is coded as zeros
};

template <int kBits>
TWA_DEVICE Group quantise(const Encoder<kBits>& encoder, const float (&v)[4], int valid) {
  Group group;
  int m = 0;
#pragma unroll
  for (int r = 0; r < 4; ++r) m = max(m, static_cast<int>(float_bits(v[r]) & 0x7fffffffu));
  m = static_cast<int>(warp_max(static_cast<uint32_t>(m)));
  group.finite = m < 0x7f800000;
  const bool usable = group.finite && m >= 0x00800000;
  const int e = group.e = usable ? exponent(m) : 0;
  const float down = pow2f(-(e / 2)), down2 = pow2f(-(e - e / 2));
  float u[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) u[r] = usable ? v[r] * down * down2 : 0.0f;
  group.sum_sq = tree_sum(u[0] * u[0], u[1] * u[1], u[2] * u[2], u[3] * u[3]);
  float s = 0.0f;
  if (usable) {
    const float largest = bits_float(static_cast<uint32_t>(m)) * down * down2;
    if constexpr (kBits == 8) {
      s = round_scale(largest / 127.0f, true);
    } else {
      // at least 1 / 4 over 128, a power of two: the product is the quotient
      const float mean = valid == kTileColumns ? group.sum_sq * 0x1p-7f
                                               : divide(group.sum_sq, static_cast<float>(valid));
      s = square_root(mean) * rms_share(kBits) + largest * max_share(kBits);
      const float inverse = 1.0f / s;
      float dot[4], norm = 0.0f;  // sums of squares below 2^24: exact in any order
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float level = encoder.level(encoder.round(u[r], inverse));
        dot[r] = u[r] * level;
        norm = lane_index() + 32 * r < valid ? fmaf(level, level, norm) : norm;
      }
      const int total = warp_sum(static_cast<int>(norm));
      s = round_scale(tree_sum(dot[0], dot[1], dot[2], dot[3]) / static_cast<float>(total), false);
    }
  }
  const float inverse = s > 0.0f ? 1.0f / s : 0.0f;
#pragma unroll
  for (int r = 0; r < 4; ++r) group.rounded[r] = encoder.round(u[r], inverse);
  const float up = s * pow2f(e / 2) * pow2f(e - e / 2);
  group.scale = up < 0x1p-126f ? 0.0f : up;
  return group;
}

// Four groups; scale, sum_sq and e are of group lane / 8.
struct FourGroups {
  int rounded[4][4];
  float scale, sum_sq;
  int e;
};

// v[t][r]: number r of this lane of group t; all columns are real. False, and nothing done, where
// one of the groups is not usual: then `quantise` takes them one by one.
template <int kBits>
TWA_DEVICE bool quantise_four(const Encoder<kBits>& encoder, float (&v)[4][4], FourGroups& found) {
  int m[4];
  bool usual = true;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float most =
        larger_magnitude(larger_magnitude(v[t][0], v[t][1]), larger_magnitude(v[t][2], v[t][3]));
    m[t] = static_cast<int>(warp_max(float_bits(most)));
    usual = usual && exponent(m[t]) >= -100 && exponent(m[t]) <= 100;
  }
  if (!usual) return false;
  float sums[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float down =
        pow2f(-exponent(m[t]));  // one factor does what quantise() does in two: |e| is small
#pragma unroll
    for (int r = 0; r < 4; ++r) v[t][r] *= down;
    sums[t] = (v[t][0] * v[t][0] + v[t][2] * v[t][2]) + (v[t][1] * v[t][1] + v[t][3] * v[t][3]);
  }
  const int own_m = own(m);
  found.sum_sq = tree_sums(sums), found.e = exponent(own_m);
  const float largest = bits_float((static_cast<uint32_t>(own_m) & 0x7fffffu) | 0x3f000000u);
  float s;
  if constexpr (kBits == 8) {
    s = round_scale(largest / 127.0f, true);
  } else {
    s = square_root(found.sum_sq * 0x1p-7f) * rms_share(kBits) + largest * max_share(kBits);
    const float inverse = 1.0f / s;
    int norms[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float of_group = shuffle(inverse, 8 * t);
      float dot[4], norm = 0x1p23f;  // an integer in its low bits, below 2^17: exact in any order
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float level = encoder.level(encoder.round(v[t][r], of_group));
        dot[r] = v[t][r] * level;
        norm = fmaf(level, level, norm);
      }
      sums[t] = (dot[0] + dot[2]) + (dot[1] + dot[3]);
      if constexpr (kBits > 1) norms[t] = warp_sum(static_cast<int>(float_bits(norm)));
    }
    // 32 lanes' bits of 2^23 are 0x60000000 mod 2^32
    float total = kTileColumns * 127.0f * 127.0f;
    if constexpr (kBits > 1)
      total = bits_float(static_cast<uint32_t>(own(norms)) - 0x60000000u + 0x4b000000u) - 0x1p23f;
    s = round_scale(tree_sums(sums) / total, false);
  }
  const float inverse = 1.0f / s;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float of_group = shuffle(inverse, 8 * t);
#pragma unroll
    for (int r = 0; r < 4; ++r) found.rounded[t][r] = encoder.round(v[t][r], of_group);
  }
  found.scale = s * pow2f(found.e);
  return true;
}

// Bytes of one row of one tile, from what its columns are rounded to.
template <int kBits>
TWA_DEVICE void store_codes(const Encoder<kBits>& encoder, const int (&rounded)[4], uint8_t* to) {
  const int lane = lane_index();
  to += lane;
  uint32_t c[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) c[r] = encoder.code(rounded[r]);
  if constexpr (kBits == 8) {
#pragma unroll
    for (int r = 0; r < 4; ++r) store_1(to + 32 * r, c[r]);
  } else if constexpr (kBits == 4) {
    store_1(to, c[0] | c[2] << 4);
    store_1(to + 32, c[1] | c[3] << 4);
  } else {
    if constexpr (kBits >= 2) {
      const uint32_t all = c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6;
      const uint32_t low = (c[0] & 3) | (c[1] & 3) << 2 | (c[2] & 3) << 4 | (c[3] & 3) << 6;
      store_1(to, kBits == 2 ? all : low);
    }
    if constexpr (kBits != 2) {
      constexpr int kShift = kBits == 3 ? 2 : 0;
      const uint32_t bits =
          c[0] >> kShift | c[1] >> kShift << 2 | c[2] >> kShift << 4 | c[3] >> kShift << 6;
      const uint32_t mine = lane < 16 ? bits : bits << 1;  // columns 16 on are odd fields
      const uint32_t both = mine | shuffle_xor(mine, 16);
      if (lane < 16) store_1(to + (kBits == 3 ? 32 : 0), both);
    }
  }
}

}  // namespace twa
