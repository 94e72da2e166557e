// The quantiser of packing.h for CPUs, for each instruction set, shared by pack and record.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "average.h"
#include "quantise_vector.h"

namespace twa {

// v[0] = halving-tree sum of v[0 .. 127].
TWA_INLINE float tree_sum(float* __restrict__ v) {
  for (int c = 0; c < 64; ++c) v[c] += v[c + 64];
  for (int c = 0; c < 32; ++c) v[c] += v[c + 32];
  for (int c = 0; c < 16; ++c) v[c] += v[c + 16];
  for (int h = 8; h > 0; h /= 2)
    for (int c = 0; c < h; ++c) v[c] += v[c + h];
  return v[0];
}

// Codes and levels of u / s, step 3 of the quantiser.
template <int kBits>
TWA_INLINE void encode(const float* __restrict__ u, float s, uint8_t* __restrict__ code,
                       int8_t* __restrict__ lev) {
  const float inverse = s > 0.0f ? 1.0f / s : 0.0f;
  alignas(64) int8_t k[kTileColumns];
  for (int c = 0; c < kTileColumns; ++c) k[c] = static_cast<int8_t>(to_level(u[c], inverse));
  if constexpr (kBits == 8) {
    for (int c = 0; c < kTileColumns; ++c) code[c] = static_cast<uint8_t>(k[c] + 128);
    for (int c = 0; c < kTileColumns; ++c) lev[c] = k[c];
  } else {
    for (int c = 0; c < kTileColumns; ++c) code[c] = 0;
    for (int c = 0; c < kTileColumns; ++c) lev[c] = static_cast<int8_t>(level(kBits, 0));
    for (int j = 0; j + 1 < 1 << kBits; ++j) {
      const int sum = level(kBits, j) + level(kBits, j + 1),
                rise = level(kBits, j + 1) - level(kBits, j);
      const int8_t threshold =
          static_cast<int8_t>(sum >= 0 ? sum / 2 : -((1 - sum) / 2));  // floor(sum / 2): 2 k > sum
      for (int c = 0; c < kTileColumns; ++c) {
        const int above = k[c] > threshold;
        code[c] = static_cast<uint8_t>(code[c] + above);
        lev[c] = static_cast<int8_t>(lev[c] + (above ? rise : 0));
      }
    }
  }
}

template <int kBits>
TWA_INLINE void put_codes(const uint8_t* __restrict__ code, uint8_t* __restrict__ out) {
  for (int b = 0; b < row_bytes(kBits); ++b) out[b] = pack_byte(kBits, code, b);
}

struct Group {
  float scale;    // 4 significant bits
  double sum_sq;  // of v
  bool finite;
};
inline void keep(const Group& group, int g, Groups* groups) {
  groups->scale[g] = group.scale, groups->sum_sq[g] = group.sum_sq;
  groups->finite[g] = group.finite;
}

// Quantises v[0 .. 127] (zero past valid) into 16 * bits bytes.
template <int kBits>
TWA_INLINE Group quantise(const float* __restrict__ v, int valid, uint8_t* __restrict__ out) {
  alignas(64) float u[kTileColumns], work[kTileColumns];
  alignas(64) uint8_t code[kTileColumns];
  alignas(64) int8_t lev[kTileColumns];
  const int32_t m = max_abs_bits(v, kTileColumns);
  if (m >= 0x7f800000) return {0.0f, 0.0, false};
  if (m < 0x00800000) {  // zero (or below the normal range, which counts as zero)
    for (int c = 0; c < kTileColumns; ++c) u[c] = 0.0f;
    encode<kBits>(u, 0.0f, code, lev);
    put_codes<kBits>(code, out);
    return {0.0f, 0.0, true};
  }
  const int e = (m >> 23) - 126;
  const float down = pow2f(-(e / 2)),
              down2 = pow2f(-(e - e / 2));  // 2^-e in two factors: e reaches 128
  for (int c = 0; c < kTileColumns; ++c) u[c] = v[c] * down * down2;
  for (int c = 0; c < kTileColumns; ++c) work[c] = u[c] * u[c];
  const float sum_sq = tree_sum(work);
  float s;
  if (kBits == 8) {
    s = round_scale(bits_float(static_cast<uint32_t>(m)) * down * down2 / 127.0f, true);
  } else {
    const float largest = bits_float(static_cast<uint32_t>(m)) * down * down2;
    s = std::sqrt(sum_sq / static_cast<float>(valid)) * rms_share(kBits) +
        largest * max_share(kBits);
    encode<kBits>(u, s, code, lev);
    for (int c = 0; c < kTileColumns; ++c) work[c] = u[c] * static_cast<float>(lev[c]);
    int32_t norm = 0;
    for (int c = 0; c < valid; ++c) norm += lev[c] * lev[c];
    s = tree_sum(work) / static_cast<float>(norm);
    s = round_scale(s, false);
  }
  encode<kBits>(u, s, code, lev);
  put_codes<kBits>(code, out);
  const float up =
      s * pow2f(e / 2) * pow2f(e - e / 2);  // below the normal range: zero, as bf16 tables flush it
  return {up < 0x1p-126f ? 0.0f : up, std::ldexp(static_cast<double>(sum_sq), 2 * e), true};
}

template <int kBits>
TWA_INLINE Group quantise_difference(const float* __restrict__ row,
                                     const float* __restrict__ center, int valid, uint8_t* out) {
  alignas(64) float v[kTileColumns];
  for (int c = 0; c < kTileColumns; ++c) v[c] = row[c] - center[c];
  return quantise<kBits>(v, valid, out);
}

#ifdef TWA_X86

// to = from, past the caches where lines are whole: packed rows are not needed again soon.
// line(from, to) moves 64 bytes.
template <class Line>
TWA_INLINE void stream_out(const uint8_t* from, uint8_t* to, int64_t bytes, const Line& line) {
  int64_t k = std::min<int64_t>(
      bytes, (64 - static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % 64)) % 64);
  std::memcpy(to, from, static_cast<size_t>(k));
  for (; k + 64 <= bytes; k += 64) line(from + k, to + k);
  std::memcpy(to + k, from + k, static_cast<size_t>(bytes - k));
  _mm_sfence();
}
TWA_AVX2 inline void stream_out_avx2(const uint8_t* from, uint8_t* to, int64_t bytes) {
  stream_out(from, to, bytes, [](const uint8_t* a, uint8_t* b) TWA_AVX2 {
    for (int k = 0; k < 64; k += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(b + k),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + k)));
  });
}
TWA_AVX512 inline void stream_out_avx512(const uint8_t* from, uint8_t* to, int64_t bytes) {
  stream_out(from, to, bytes, [](const uint8_t* a, uint8_t* b) TWA_AVX512 {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(b), _mm512_loadu_si512(a));
  });
}

#endif  // TWA_X86

// A row's columns of some tiles, the last of which has `valid` real ones. A tile that is not full
// is taken on its own, from a buffer that is filled up with zeros.
TWA_INLINE Span span_of(const Span& row, int valid, float* rest) {
  if (valid == kTileColumns) return row;
  if (row.count > 1) return {row.dtype, row.data, row.count - 1, row.next};
  load_tile(row.dtype, row.data, 0, valid, rest);
  return {Dtype::f32, rest, 1, row.next};
}

// Quantisers of up to kGroups neighbouring groups, span - center, how packed bytes go out, and how
// centers are made.
// valid: real columns of each group, of which there are kGroups.
template <int kBits>
struct PlainQuantiser {
  TWA_INLINE void quantise(const Span& row, const float* center, const int* valid,
                           uint8_t* const* out, Groups* groups) const {
    alignas(64) float v[kTileColumns];
    for (int g = 0; g < row.count; ++g) {
      load_tile(row.dtype, row.data, g * kTileColumns, kTileColumns, v);
      keep(quantise_difference<kBits>(v, center + g * kTileColumns, valid[g], out[g]), g, groups);
    }
  }
  TWA_INLINE void copy(const uint8_t* from, uint8_t* to, int64_t bytes) const {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
  TWA_INLINE void average(void* const* data, const Dtype* dtype, int64_t n, const double* weights,
                          int64_t begin, int count, float* out) const {
    average_span(data, dtype, n, weights, begin, count, out);
  }
};
#ifdef TWA_X86
template <class R, int kBits>
TWA_BODY inline void quantise_vector(const Span& row, const float* center, const int* valid,
                                     uint8_t* const* out, Groups* groups) {
  alignas(64) float v[kGroups * kTileColumns];
  __m256 largest[kGroups] = {};
  switch (row.dtype) {
    case Dtype::f32:
      subtract<R, Dtype::f32>(row, center, v, largest);
      break;
    case Dtype::bf16:
      subtract<R, Dtype::bf16>(row, center, v, largest);
      break;
    case Dtype::f16:
      subtract<R, Dtype::f16>(row, center, v, largest);
      break;
  }
  int unusual = quantise_groups<R, kBits>(row, v, largest, valid, out, groups);
  for (int g = 0; unusual; ++g, unusual >>= 1)
    if (unusual & 1) {
      load_tile(row.dtype, row.data, g * kTileColumns, kTileColumns, v);
      keep(quantise_difference<kBits>(v, center + g * kTileColumns, valid[g], out[g]), g, groups);
    }
}
template <int kBits>
struct Avx2Quantiser {
  TWA_AVX2 void quantise(const Span& row, const float* center, const int* valid,
                         uint8_t* const* out, Groups* groups) const {
    quantise_vector<Quantise8, kBits>(row, center, valid, out, groups);
  }
  TWA_AVX2 void copy(const uint8_t* from, uint8_t* to, int64_t bytes) const {
    stream_out_avx2(from, to, bytes);
  }
  TWA_AVX2 void average(void* const* data, const Dtype* dtype, int64_t n, const double* weights,
                        int64_t begin, int count, float* out) const {
    average_strips<Quantise8>(data, dtype, n, weights, begin, count, out);
  }
};
template <int kBits>
struct Avx512Quantiser {
  TWA_AVX512 void quantise(const Span& row, const float* center, const int* valid,
                           uint8_t* const* out, Groups* groups) const {
    quantise_vector<Quantise16, kBits>(row, center, valid, out, groups);
  }
  TWA_AVX512 void copy(const uint8_t* from, uint8_t* to, int64_t bytes) const {
    stream_out_avx512(from, to, bytes);
  }
  TWA_AVX512 void average(void* const* data, const Dtype* dtype, int64_t n, const double* weights,
                          int64_t begin, int count, float* out) const {
    average_strips<Quantise16>(data, dtype, n, weights, begin, count, out);
  }
};
#endif

}  // namespace twa
