// Shared by the CPU kernels: instruction-set choice, thread pool, work blocks, dtype conversion,
// fixed point.
#pragma once

#include <functional>
#include <vector>

#include "../twa.h"

// Not with Clang: it refuses vectors as arguments of bodies that have their target only from the
// function they are inlined into.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TWA_X86 1
#include <immintrin.h>
// Kernels of the higher tiers carry their target in the function, so one object file serves every
// machine. AVX-512: Ice Lake, Zen 4.
#define TWA_AVX2 __attribute__((target("avx2,f16c,fma")))
#if __has_include(<avxvnniintrin.h>) && !defined(TWA_NO_AVXVNNI)  // GCC 11
#define TWA_AVXVNNI __attribute__((target("avx2,f16c,fma,avxvnni")))
#endif
#define TWA_AVX512VL \
  __attribute__((target("avx2,f16c,fma,avx512f,avx512vl,avx512vnni,prefer-vector-width=256")))
#define TWA_AVX512                                                          \
  __attribute__((                                                           \
      target("avx2,f16c,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni," \
             "avx512vbmi")))
#elif defined(__aarch64__) && defined(__GNUC__) && !defined(__AARCH64EB__)
#define TWA_ARM 1
#include <arm_neon.h>
// NEON, which every such processor has, and dot products of bytes, which most have.
#if defined(__ARM_FEATURE_DOTPROD)
#define TWA_NEON
#elif defined(__clang__)
#define TWA_NEON __attribute__((target("dotprod")))
#else
#define TWA_NEON __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#endif
// Bodies written once in plain C++ and compiled for each tier by being inlined into a function with
// that target.
#define TWA_INLINE inline __attribute__((always_inline))

namespace twa {

// Tiers of this build, each after those that it is faster than. A machine has some of them.
#if defined(TWA_X86)
enum class Isa { portable, avx2, avxvnni, avx512vl, avx512 };
constexpr int kIsas = 5;
#elif defined(TWA_ARM)
enum class Isa { portable, neon };
constexpr int kIsas = 2;
#else
enum class Isa { portable };
constexpr int kIsas = 1;
#endif
Isa isa();  // decided once; see cpu_isa() in twa.h

// One kernel for each tier; those that this op lacks are empty.
template <class Kernel>
struct Tiers {
  Kernel kernels[kIsas];
};
// tiers<kBits>() of a file whose block_portable, block_avx2, block_avx512 and block_neon are of
// this type; TWA_ALL_TIERS: and block_avxvnni, block_avx512vl.
#if defined(TWA_X86)
// Of an op without tiers of its own between AVX2 and AVX-512.
template <class Kernel>
constexpr Tiers<Kernel> wide_tiers(Kernel portable, Kernel avx2, Kernel avx512) {
  return {{portable, avx2, {}, {}, avx512}};
}
#ifdef TWA_AVXVNNI
#define TWA_BLOCK_AVXVNNI block_avxvnni<kBits>
#else
#define TWA_BLOCK_AVXVNNI \
  {                       \
  }
#endif
#define TWA_TIERS(Kernel)                                                                     \
  template <int kBits>                                                                        \
  constexpr Tiers<Kernel> tiers() {                                                           \
    return wide_tiers<Kernel>(block_portable<kBits>, block_avx2<kBits>, block_avx512<kBits>); \
  }
#define TWA_ALL_TIERS(Kernel)                                                                    \
  template <int kBits>                                                                           \
  constexpr Tiers<Kernel> tiers() {                                                              \
    return {{block_portable<kBits>, block_avx2<kBits>, TWA_BLOCK_AVXVNNI, block_avx512vl<kBits>, \
             block_avx512<kBits>}};                                                              \
  }
#elif defined(TWA_ARM)
#define TWA_TIERS(Kernel)                                \
  template <int kBits>                                   \
  constexpr Tiers<Kernel> tiers() {                      \
    return {{block_portable<kBits>, block_neon<kBits>}}; \
  }
#define TWA_ALL_TIERS TWA_TIERS
#else
#define TWA_TIERS(Kernel)             \
  template <int kBits>                \
  constexpr Tiers<Kernel> tiers() {   \
    return {{block_portable<kBits>}}; \
  }
#define TWA_ALL_TIERS TWA_TIERS
#endif
// The kernel for the tier in use, or for the next one below it that the op has: an op has all of
// the tiers with products of bytes, or none between AVX2 and AVX-512.
template <class Kernel>
Kernel pick(const Tiers<Kernel>& tiers) {
  int k = static_cast<int>(isa());
  while (!tiers.kernels[k]) --k;
  return tiers.kernels[k];
}

// Runs fn(item) for item in [0, count) on `threads` threads (the caller is one of them). Which
// thread takes which item is not fixed, so fn must write only what belongs to its item.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& fn);

// The small streams beside the codes, gradient and center, which are read in one go per tile; and
// the scales, in tiles.
constexpr int kPrefetchInput = 2048, kScalesAhead = 16;
#ifdef TWA_X86
// Asks for the cache line that lies kPrefetch bytes after p: hardware prefetchers stop at each 4
// KiB page. Past the end of the data the instruction does nothing. Codes go to the second-level
// cache, one line at a time between other work: in a burst, prefetches fill the core's line buffers
// and stall it. So that the compiler does not gather them, it is told that `after` changes here.
constexpr int kPrefetch = 8192;
TWA_AVX512 inline void prefetch_line(const uint8_t* p, __m512i* after) {
  asm volatile("prefetcht1 %c2(%1)" : "+v"(*after) : "r"(p), "i"(kPrefetch));
}
// The same into the first-level cache, of the line at p itself.
TWA_AVX512 inline void prefetch_near(const void* p, __m512i* after) {
  asm volatile("prefetcht0 %1" : "+v"(*after) : "m"(*static_cast<const char*>(p)));
}
TWA_AVX512 inline void prefetch_input(const void* p, __m512i* after) {
  prefetch_near(static_cast<const char*>(p) + kPrefetchInput, after);
}
#endif

// Blocks of kBlockTiles tiles whose tensor is not absent.
std::vector<Block> blocks_of(const TensorTable& tensors, const int32_t* tile_segment);
// Whether all blocks are of segments that there are: their numbers come from outside.
bool in_segments(const std::vector<Block>& blocks, int64_t num_segments);

// Tiles of a tensor list, or -1 if a size is negative.
inline int64_t total_tiles(const TensorTable& t) { return total_tiles(t.numel, t.count); }

// The kernels of one block for the instruction set in use, shared by the single ops and step().
// project: acc[i] += sum over the block's columns of scales * level * g, for the n rows (row_scale
// is the caller's).
using ProjectBlock = void (*)(const BasisView& basis, const TensorTable& grads, const Block& block,
                              double* acc);
ProjectBlock project_block(int bits);
// The same, assigned to partial (n,), by way of numbers of this thread: neighbouring partial sums
// share cache lines with other threads.
void project_partial(ProjectBlock kernel, const BasisView& basis, const TensorTable& grads,
                     const Block& block, double* partial);
// reconstruct: out = center + sum_i x_row[i] * scales * level on the block's columns; x_row (n,) is
// x * row_scale of its segment.
using ReconstructBlock = void (*)(const BasisView& basis, const float* x_row,
                                  const TensorTable& center, const TensorTable& out,
                                  const Block& block);
ReconstructBlock reconstruct_block(int bits);

// tile(codes, scales, t) for each tile t of a block, in order.
template <int kBits, class Tile>
TWA_INLINE void each_tile(const BasisView& basis, const Block& block, const Tile& tile) {
  for (int64_t t = 0; t < block.tiles; ++t) {
    const int64_t group = (block.first_tile + t) * basis.n;
    tile(basis.codes + group * row_bytes(kBits), basis.scales + group, t);
  }
}

// Real columns of tile `tile` of a block; the rest of the tile is padding.
inline int valid_columns(const int64_t* numel, const Block& b, int64_t tile) {
  const int64_t left = numel[b.tensor] - (b.first_column + tile * kTileColumns);
  return left < kTileColumns ? static_cast<int>(left) : kTileColumns;
}

// Bytes of a number.
constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// out[0..127] = data[column .. column + valid) as float32, zero past `valid`.
TWA_INLINE void load_tile(Dtype dtype, const void* data, int64_t column, int valid,
                          float* __restrict__ out) {
  // A constant trip count for all but the last tile.
  const int full = valid == kTileColumns ? kTileColumns : 0;
  switch (dtype) {
    case Dtype::f32: {
      const float* p = static_cast<const float*>(data) + column;
      for (int c = 0; c < full; ++c) out[c] = p[c];
      for (int c = full; c < valid; ++c) out[c] = p[c];
      break;
    }
    case Dtype::bf16: {
      const uint16_t* p = static_cast<const uint16_t*>(data) + column;
      for (int c = 0; c < full; ++c) out[c] = bf16_to_float(p[c]);
      for (int c = full; c < valid; ++c) out[c] = bf16_to_float(p[c]);
      break;
    }
    case Dtype::f16: {
      const uint16_t* p = static_cast<const uint16_t*>(data) + column;
      for (int c = 0; c < full; ++c) out[c] = f16_to_float(p[c]);
      for (int c = full; c < valid; ++c) out[c] = f16_to_float(p[c]);
      break;
    }
  }
  for (int c = valid; c < kTileColumns; ++c) out[c] = 0.0f;
}

// data[column .. column + valid) = in, rounded to nearest even.
TWA_INLINE void store_tile(Dtype dtype, void* data, int64_t column, int valid,
                           const float* __restrict__ in) {
  switch (dtype) {
    case Dtype::f32: {
      float* p = static_cast<float*>(data) + column;
      for (int c = 0; c < valid; ++c) p[c] = in[c];
      break;
    }
    case Dtype::bf16: {
      uint16_t* p = static_cast<uint16_t*>(data) + column;
      for (int c = 0; c < valid; ++c) p[c] = float_to_bf16(in[c]);
      break;
    }
    case Dtype::f16: {
      uint16_t* p = static_cast<uint16_t*>(data) + column;
      for (int c = 0; c < valid; ++c) p[c] = float_to_f16(in[c]);
      break;
    }
  }
}

// Largest |v|, as float bits: integer order is magnitude order, and Inf and NaN come last.
TWA_INLINE int32_t max_abs_bits(const float* v, int count) {
  int32_t m = 0;
  for (int c = 0; c < count; ++c) {
    const int32_t u = static_cast<int32_t>(float_bits(v[c]) & 0x7fffffffu);
    m = u > m ? u : m;
  }
  return m;
}

// Fixed point. v[c] = q[c] * unit with unit a power of two and |q| <= kMaxFixed, the largest
// integer with three balanced int8 limbs. |v - q * unit| <= max|v| * 2^-23. NaN or Inf anywhere in
// v makes unit NaN. Returns unit.
constexpr int32_t kMaxFixed = 127 * 65536 + 127 * 256 + 127;
TWA_INLINE double to_fixed(const float* __restrict__ v, int count, int32_t* __restrict__ q) {
  const int32_t m = max_abs_bits(v, count);
  if (m == 0 || m >= 0x7f800000) {
    for (int c = 0; c < count; ++c) q[c] = 0;
    return m == 0 ? 0.0 : static_cast<double>(NAN);
  }
  int e = (m >> 23) - 126;  // 2^(e-1) <= max|v| < 2^e for normal numbers
  if (std::ldexp(static_cast<double>(bits_float(static_cast<uint32_t>(m))), 23 - e) > kMaxFixed)
    ++e;
  const double factor = std::ldexp(1.0, 23 - e);
  // Adding and subtracting 1.5 * 2^52 rounds a double to the nearest integer, ties to even.
  for (int c = 0; c < count; ++c)
    q[c] = static_cast<int32_t>((static_cast<double>(v[c]) * factor + 0x1.8p52) - 0x1.8p52);
  return std::ldexp(1.0, e - 23);
}

// The exponent e above from the bits of max|v|, where the factor 2^(23 - e) is a normal float32, so
// that v times it is exact; kUnusual if it is zero, tiny, huge or not finite.
constexpr int kUnusual = 1 << 20;
inline int fixed_exponent(int32_t largest) {
  const int e = (largest >> 23) - 126;
  if (largest == 0 || e < -100 || e > 120) return kUnusual;
  return e + (bits_float(static_cast<uint32_t>(largest)) * pow2f(23 - e) >
              static_cast<float>(kMaxFixed));
}

// Limbs of a fixed-point number: q = 4096 high + low (decode.h has the int8 limbs of AVX-512: q =
// 65536 a + 256 b + c).
TWA_INLINE void split_int16(int32_t q, int16_t* high, int16_t* low) {
  *low = static_cast<int16_t>(((q + 2048) & 4095) - 2048);
  *high = static_cast<int16_t>((q - *low) >> 12);
}

}  // namespace twa
