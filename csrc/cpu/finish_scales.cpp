// finish_scales:  scales of 4 significant bits (bf16) as e4m3, divided by a power of two of the row
// and segment; see twa.h.
//
// Work map   one item = kTilesPerItem tiles; a tile's rows are one run of bytes.
// Bytes      3 a group.
// Exactness  a normal number keeps its three mantissa bits, only the exponent's bias changes; a
//            smaller one is rounded to nearest even. All in integers and exact float64 products.
#include <algorithm>
#include <atomic>

#include "common.h"

namespace twa {
namespace {

constexpr int64_t kTilesPerItem = 256;
constexpr int kMostExponent = 900;  // powers of two are then normal numbers

// One tile: out[i] for n rows, whether or not all are normal; returns whether they are.
TWA_INLINE bool finish_normal(const uint16_t* __restrict__ scales,
                              const int32_t* __restrict__ exponent, int64_t n,
                              uint8_t* __restrict__ out) {
  int32_t least = 8;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t bits = static_cast<int16_t>(scales[i]) >> 4,  // biased exponent, mantissa in use
        code = bits - (exponent[i] + 120) * 8;
    least = std::min(least, bits == 0 ? 0 : code);
    out[i] = static_cast<uint8_t>(code);
  }
  return least >= 8;
}
using Finish = bool (*)(const uint16_t* scales, const int32_t* exponent, int64_t n, uint8_t* out);
bool finish_portable(const uint16_t* scales, const int32_t* exponent, int64_t n, uint8_t* out) {
  return finish_normal(scales, exponent, n, out);
}
#ifdef TWA_X86
TWA_AVX2 bool finish_avx2(const uint16_t* scales, const int32_t* exponent, int64_t n,
                          uint8_t* out) {
  return finish_normal(scales, exponent, n, out);
}
constexpr Tiers<Finish> kTiers{{finish_portable, finish_avx2}};
#else
constexpr Tiers<Finish> kTiers{{finish_portable}};
#endif

// The numbers of a tile that are below e4m3's normal range, or zero; returns how many became zero.
int64_t finish_small(const uint16_t* scales, const int32_t* exponent, int64_t n, uint8_t* out) {
  int64_t lost = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t bits = static_cast<int16_t>(scales[i]) >> 4;
    if (bits != 0 && bits - (exponent[i] + 120) * 8 >= 8) continue;
    const double v = static_cast<double>(bf16_to_float(scales[i])) * pow2(9 - exponent[i]);
    // 2^-9 is e4m3's unit there. A negative number, which pack does not make, becomes none of e4m3.
    out[i] = v < 0.0 ? 0xff : static_cast<uint8_t>((v + 0x1.8p52) - 0x1.8p52);
    lost += v > 0.0 && out[i] == 0;
  }
  return lost;
}

}  // namespace

Status finish_scales_cpu(const uint16_t* scales, const int32_t* tile_segment,
                         const int32_t* exponent, int64_t tiles, int64_t n, int64_t segments,
                         uint8_t* out, int64_t* lost, int threads) {
  const auto is_odd = [](int32_t e) { return e < -kMostExponent || e > kMostExponent; };
  const auto is_segment = [&](int32_t l) { return l >= 0 && l < segments; };
  if (std::any_of(exponent, exponent + segments * n, is_odd) ||
      !std::all_of(tile_segment, tile_segment + tiles, is_segment))
    return Status::bad_argument;
  const Finish finish = pick(kTiers);
  std::atomic<int64_t> total{0};
  parallel_for((tiles + kTilesPerItem - 1) / kTilesPerItem, threads, [&](int64_t item) {
    int64_t zeros = 0;
    const int64_t end = std::min(tiles, (item + 1) * kTilesPerItem);
    for (int64_t t = item * kTilesPerItem; t < end; ++t) {
      const int32_t* of_rows = exponent + tile_segment[t] * n;
      if (!finish(scales + t * n, of_rows, n, out + t * n))
        zeros += finish_small(scales + t * n, of_rows, n, out + t * n);
    }
    total += zeros;
  });
  *lost = total;
  return Status::ok;
}

}  // namespace twa
