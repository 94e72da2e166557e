// The packed layout and its quantiser: everything that fixes a bit of a packed basis.
//
// A basis P (n, D) is stored in tiles of kTileColumns columns; every tensor of a model starts on a
// tile boundary and
// its last tile is padded. One (tile, row) is a quantisation group:
//
//   value(i, column c of tile t) = row_scale[i, segment(t)] * scales[t, i] * level[code(t, i, c)]
//
//   codes     uint8  (num_tiles, n, 16 * bits)
//   scales    e4m3   (num_tiles, n)
//   row_scale fp32   (n, L)
//
// Bit map of one row of one tile, B = 16 * bits bytes; column c is field c / B of byte c % B,
// fields from the low bits up:
//
//   bits 8   byte b: [ c = b                                       ]
//            B = 128
//   bits 4   byte b: [ c = b + 64        | c = b           ]
//            B = 64
//   bits 2   byte b: [ b + 96 | b + 64 | b + 32 | b ]
//            B = 32
//   bits 1   byte b: [ b + 112 | ... | b + 16 | b ]
//            B = 16
//   bits 3   a 2-bit plane (32 bytes: the low two bits of each code), then a 1-bit plane (16 bytes:
//            bit 2)
//
// Quantiser of one group v[0..127] (`valid` real columns, the rest zero). Every step is a single
// IEEE float32 operation or an exact integer one, in a stated order, so that all backends produce
// the same bytes:
//
//   1. e: the power of two with 2^(e-1) <= max|v| < 2^e;   u = v * 2^-e
//   (exact)
//   2. bits 8: s = max|u| / 127, rounded up to 4 significant bits: nothing is clipped
//      bits 4 .. 1: s = sqrt(sum u^2 / valid) * rms_share + max|u| * max_share; then s = sum(u * l)
//      / sum(l * l) with l = level[code(u, s)],
//                   rounded to nearest, 4 significant bits
//   3. code(u, s) = number of j with 2 k > level[j] + level[j + 1], k = round-to-even(u * (1 / s))
//   clamped to [-127, 127]
//
// Float sums run as a halving tree: v[c] += v[c + h] for h = 64, 32, ..., 1. A scale of 4
// significant bits is an e4m3 number up to a power of two, which row_scale carries.
//
// Levels: Lloyd-Max levels of a unit Gaussian (S. P. Lloyd, "Least squares quantization in PCM",
// 1982) scaled so that the outermost is 127, rounded to integers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define TWA_HD __host__ __device__ __forceinline__
#else
#define TWA_HD inline
#endif

namespace twa {

constexpr int kTileColumns =
    128;  // one AVX-512 row at 4 bits is 64 bytes, one warp holds 4 columns a lane
constexpr int kBlockTiles = 64;  // tiles per work item: 8192 columns, a 32 KiB float32 gradient
constexpr int kMaxRows =
    4096;  // int32 sums of (level * coefficient limb) over rows stay below 2^31

enum class Dtype : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

TWA_HD constexpr bool valid_bits(int bits) { return bits == 8 || (bits >= 1 && bits <= 4); }
TWA_HD constexpr int row_bytes(int bits) { return kTileColumns / 8 * bits; }
static_assert(row_bytes(8) == 128 && row_bytes(4) == 64 && row_bytes(3) == 48 &&
                  row_bytes(2) == 32 && row_bytes(1) == 16,
              "a row of a tile has 16 * bits bytes");

// f(std::integral_constant<int, bits>): every launcher's one switch over bit widths.
template <class F>
auto with_bits(int bits, const F& f) {
  switch (bits) {
    case 8:
      return f(std::integral_constant<int, 8>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 2:
      return f(std::integral_constant<int, 2>());
    default:
      return f(std::integral_constant<int, 1>());
  }
}

TWA_HD constexpr int64_t num_tiles(int64_t numel) {
  return (numel + kTileColumns - 1) / kTileColumns;
}
// Tiles of all tensors of these sizes, or -1 if one is negative.
inline int64_t total_tiles(const int64_t* numel, int64_t count) {
  int64_t tiles = 0;
  for (int64_t k = 0; k < count; ++k) {
    if (numel[k] < 0) return -1;
    tiles += num_tiles(numel[k]);
  }
  return tiles;
}

// level of a code. Arrays live inside the function so that host and device share one definition.
TWA_HD constexpr int level(int bits, int code) {
  constexpr int8_t k4[16] = {-127, -96, -75, -58, -44, -31, -18, -6,
                             6,    18,  31,  44,  58,  75,  96,  127};
  constexpr int8_t k3[8] = {-127, -79, -45, -14, 14, 45, 79, 127};
  constexpr int8_t k2[4] = {-127, -38, 38, 127};
  constexpr int8_t k1[2] = {-127, 127};
  switch (bits) {
    case 8:
      return code - 128;
    case 4:
      return k4[code];
    case 3:
      return k3[code];
    case 2:
      return k2[code];
    default:
      return k1[code];
  }
}

// First scale of a group, from which one least-squares step is taken: a mixture of the rms, which
// is right for Gaussian numbers, and the largest number, which is right for heavy tails. Shares of
// the largest: 1/2, 1/4, 0, 0 at 4, 3, 2, 1 bits; the rms is multiplied by sigma / 127 of the
// outermost Lloyd-Max level.
TWA_HD float rms_share(int bits) {
  switch (bits) {
    case 4:
      return 0.5f * 2.732589571f / 127.0f;
    case 3:
      return 0.75f * 2.151945705f / 127.0f;
    case 2:
      return 1.510417608f / 127.0f;
    default:
      return 0.7978845608f / 127.0f;
  }
}
TWA_HD float max_share(int bits) {
  return bits == 4 ? 0.5f / 127.0f : bits == 3 ? 0.25f / 127.0f : 0.0f;
}

// code of an integer k in [-127, 127]: the nearest level, the lower one at a tie.
TWA_HD constexpr int nearest_code(int bits, int k) {
  if (bits == 8) return k + 128;
  int code = 0;
  const int last = (1 << bits) - 1;
  for (int j = 0; j < last; ++j) code += 2 * k > level(bits, j) + level(bits, j + 1);
  return code;
}

// Integer level nearest to u / s, given 1 / s: adding and subtracting 1.5 * 2^23 rounds to an
// integer, ties to even.
TWA_HD int to_level(float u, float inverse) {
  float t = u * inverse;
  t = t < -127.0f ? -127.0f : t;
  t = t > 127.0f ? 127.0f : t;
  return static_cast<int>((t + 12582912.0f) - 12582912.0f);
}

// Code of column c read from the packed bytes of one row of one tile.
TWA_HD int get_code(int bits, const uint8_t* row, int c) {
  if (bits == 3)
    return ((row[c % 32] >> (c / 32 * 2)) & 3) | (((row[32 + c % 16] >> (c / 16)) & 1) << 2);
  const int b = row_bytes(bits);
  return (row[c % b] >> (c / b * bits)) & ((1 << bits) - 1);
}

// Byte b of a packed row, from its 128 codes (one per byte).
TWA_HD uint8_t pack_byte(int bits, const uint8_t* codes, int b) {
  int w = 0;
  if (bits == 3 && b < 32) {
    for (int f = 0; f < 4; ++f) w |= (codes[f * 32 + b] & 3) << (2 * f);
  } else if (bits == 3) {
    for (int f = 0; f < 8; ++f) w |= (codes[f * 16 + b - 32] >> 2) << f;
  } else {
    for (int f = 0; f < 8 / bits; ++f) w |= codes[f * row_bytes(bits) + b] << (bits * f);
  }
  return static_cast<uint8_t>(w);
}

TWA_HD uint32_t float_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
TWA_HD float bits_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

// Positive float with 4 significant bits: nearest (ties to even) or, for `up`, the next one not
// below.
TWA_HD float round_scale(float s, bool up) {
  const uint32_t u = float_bits(s);
  const uint32_t add = up ? 0xfffffu : 0x7ffffu + ((u >> 20) & 1u);
  return bits_float((u + add) & ~0xfffffu);
}

// 2^e for e in [-126, 127].
TWA_HD float pow2f(int e) { return bits_float(static_cast<uint32_t>(e + 127) << 23); }

// The same in float64, for e in [-1022, 1023].
TWA_HD double pow2(int e) {
  const uint64_t u = static_cast<uint64_t>(e + 1023) << 52;
  double d;
  memcpy(&d, &u, 8);
  return d;
}

// e4m3 (no infinities, 0x7f is NaN, sign never set here) to float, exact.
TWA_HD float e4m3_to_float(uint8_t x) {
  const uint32_t m = x & 0x7fu;
  if (m == 0x7fu) return bits_float(0x7fc00000u);
  return m < 8 ? static_cast<float>(m) * 0x1p-9f : bits_float((m << 20) + (120u << 23));
}

TWA_HD float bf16_to_float(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }
TWA_HD uint16_t float_to_bf16(float f) {  // round to nearest even; NaN stays NaN
#if defined(__CUDA_ARCH__)
  uint16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
#else
  const uint32_t u = float_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
#endif
}

TWA_HD float f16_to_float(uint16_t h) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, m = h & 0x7fffu;
  if (m >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((m & 0x3ffu) << 13));
  if (m < 0x400u) {  // subnormal: m * 2^-24
    const float f = static_cast<float>(m) * 0x1p-24f;
    return sign ? -f : f;
  }
  return bits_float(sign | ((m << 13) + (112u << 23)));
#endif
}
TWA_HD uint16_t
float_to_f16(float f) {  // round to nearest even; overflow to infinity; NaN stays NaN
#if defined(__CUDA_ARCH__)
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
#else
  const uint32_t u = float_bits(f), sign = (u >> 16) & 0x8000u, m = u & 0x7fffffffu;
  if (m > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (m >= 0x477ff000u)
    return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (m < 0x38800000u) {                           // below 2^-14: a multiple of 2^-24
    const float r = bits_float(m) + 0.5f;          // 0.5f's last place is 2^-24
    return static_cast<uint16_t>(sign | (float_bits(r) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((m - (112u << 23) + 0xfffu + ((m >> 13) & 1u)) >> 13));
#endif
}

}  // namespace twa
