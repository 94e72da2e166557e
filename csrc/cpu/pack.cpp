// pack:  codes and scales of v = row - center, by the quantiser that packing.h specifies, and the rows' squared norms.
//
// Operands   rows: count * n tensors in float32/bf16/f16, center: count tensors; codes (num_tiles, n, 16 * bits) bytes, scales
//            (num_tiles, n) as bf16 bits, sum_sq (n, L) float64 and max_scale (n, L) float32 accumulated over calls.
// Work map   one item = one Block: its center is converted once, then row after row is read as one stream of up to 32 KiB and
//            written as whole 16 * bits byte groups. Norms: float32 halving tree per group, float64 over groups in order,
//            blocks in order: same bits for any thread count, tier, or split of a tensor at multiples of kBlockTiles tiles.
// Bytes      n * D * input read, n * D * (bits / 8 + 2 / 128) written.
#include <algorithm>
#include <mutex>

#include "common.h"

namespace twa {
namespace {

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
TWA_INLINE void encode(const float* __restrict__ u, float s, uint8_t* __restrict__ code, int8_t* __restrict__ lev) {
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
      const int sum = level(kBits, j) + level(kBits, j + 1);
      const int8_t threshold = static_cast<int8_t>(sum >= 0 ? sum / 2 : -((1 - sum) / 2));   // floor(sum / 2): 2 k > sum
      const int8_t rise = static_cast<int8_t>(level(kBits, j + 1) - level(kBits, j) - 128);  // + 128 below: a rise of 254 fits
      for (int c = 0; c < kTileColumns; ++c) {
        const int above = k[c] > threshold;
        code[c] = static_cast<uint8_t>(code[c] + above);
        lev[c] = static_cast<int8_t>(lev[c] + (above ? static_cast<int8_t>(rise) + 128 : 0));
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
  const float down = pow2f(-(e / 2)), down2 = pow2f(-(e - e / 2));  // 2^-e in two factors: e reaches 128
  for (int c = 0; c < kTileColumns; ++c) u[c] = v[c] * down * down2;
  for (int c = 0; c < kTileColumns; ++c) work[c] = u[c] * u[c];
  const float sum_sq = tree_sum(work);
  float s;
  if constexpr (kBits == 8) {
    s = round_scale(bits_float(static_cast<uint32_t>(m)) * down * down2 / 127.0f, true);
  } else {
    s = std::sqrt(sum_sq / static_cast<float>(valid)) * initial_scale(kBits);
    for (int pass = 0; pass < 2; ++pass) {
      encode<kBits>(u, s, code, lev);
      for (int c = 0; c < kTileColumns; ++c) work[c] = u[c] * static_cast<float>(lev[c]);
      int32_t norm = 0;
      for (int c = 0; c < valid; ++c) norm += lev[c] * lev[c];
      s = tree_sum(work) / static_cast<float>(norm);
    }
    s = round_scale(s, false);
  }
  encode<kBits>(u, s, code, lev);
  put_codes<kBits>(code, out);
  const float up = s * pow2f(e / 2) * pow2f(e - e / 2);  // below the normal range: zero, as bf16 tables flush it
  return {up < 0x1p-126f ? 0.0f : up, std::ldexp(static_cast<double>(sum_sq), 2 * e), true};
}

struct Job {
  const TensorTable& rows;
  const TensorTable& center;
  int64_t n;
  uint8_t* codes;
  uint16_t* scales;
};

// One block, all rows: adds to sum_sq[n], max_scale[n]. Returns the first row and tile with a NaN or Inf in bad[2], -1 if none.
using BlockKernel = void (*)(const Job& job, const Block& block, double* sum_sq, float* max_scale, int64_t* bad);

template <int kBits>
TWA_INLINE void pack_block(const Job& job, const Block& block, double* sum_sq, float* max_scale, int64_t* bad) {
  alignas(64) static thread_local float center[kBlockTiles * kTileColumns];
  alignas(64) float v[kTileColumns];
  const TensorTable one_row{nullptr, job.center.numel, nullptr, job.center.count};
  if (job.center.data)
    for (int64_t t = 0; t < block.tiles; ++t)
      load_tile(job.center.dtype[block.tensor], job.center.data[block.tensor], block.first_column + t * kTileColumns,
                valid_columns(one_row, block, t), center + t * kTileColumns);
  for (int64_t i = 0; i < job.n; ++i) {
    const int64_t source = block.tensor * job.n + i;
    for (int64_t t = 0; t < block.tiles; ++t) {
      const int valid = valid_columns(one_row, block, t);
      load_tile(job.rows.dtype[source], job.rows.data[source], block.first_column + t * kTileColumns, valid, v);
      if (job.center.data)
        for (int c = 0; c < kTileColumns; ++c) v[c] -= center[t * kTileColumns + c];
      const int64_t group = (block.first_tile + t) * job.n + i;
      const Group g = quantise<kBits>(v, valid, job.codes + group * row_bytes(kBits));
      if (!g.finite) {
        if (bad[0] < 0) bad[0] = i, bad[1] = t;
        continue;
      }
      job.scales[group] = static_cast<uint16_t>(float_bits(g.scale) >> 16);
      sum_sq[i] += g.sum_sq;
      max_scale[i] = std::max(max_scale[i], g.scale);
    }
  }
}

template <int kBits>
void block_portable(const Job& job, const Block& block, double* sum_sq, float* max_scale, int64_t* bad) {
  pack_block<kBits>(job, block, sum_sq, max_scale, bad);
}
#ifdef TWA_X86
template <int kBits>
TWA_AVX2 void block_avx2(const Job& job, const Block& block, double* sum_sq, float* max_scale, int64_t* bad) {
  pack_block<kBits>(job, block, sum_sq, max_scale, bad);
}
template <int kBits>
TWA_AVX512 void block_avx512(const Job& job, const Block& block, double* sum_sq, float* max_scale, int64_t* bad) {
  pack_block<kBits>(job, block, sum_sq, max_scale, bad);
}
#endif

template <int kBits>
BlockKernel pick() {
#ifdef TWA_X86
  if (isa() == Isa::avx512) return block_avx512<kBits>;
  if (isa() == Isa::avx2) return block_avx2<kBits>;
#endif
  return block_portable<kBits>;
}
BlockKernel pick(int bits) {
  switch (bits) {
    case 8:
      return pick<8>();
    case 4:
      return pick<4>();
    case 3:
      return pick<3>();
    case 2:
      return pick<2>();
    default:
      return pick<1>();
  }
}

// Column of the first NaN or Inf of row - center in one tile.
int64_t first_bad_column(const Job& job, const Block& block, int64_t row, int64_t tile) {
  alignas(64) float v[kTileColumns], center[kTileColumns] = {};
  const TensorTable sizes{nullptr, job.center.numel, nullptr, job.center.count};
  const int valid = valid_columns(sizes, block, tile);
  const int64_t column = block.first_column + tile * kTileColumns, source = block.tensor * job.n + row;
  load_tile(job.rows.dtype[source], job.rows.data[source], column, valid, v);
  if (job.center.data) load_tile(job.center.dtype[block.tensor], job.center.data[block.tensor], column, valid, center);
  int c = 0;
  while (c + 1 < valid && std::isfinite(v[c] - center[c])) ++c;
  return column + c;
}

}  // namespace

Status pack_cpu(const TensorTable& rows, const TensorTable& center, const int32_t* tile_segment, int64_t n, int64_t num_segments, int bits,
                uint8_t* codes, uint16_t* scales_bf16, double* sum_sq, float* max_scale, Where* where, int threads) {
  if (!valid_bits(bits) || n < 1 || n > kMaxRows || rows.count != center.count * n || total_tiles(center) < 0) return Status::bad_argument;
  const Job job{rows, center, n, codes, scales_bf16};
  // Blocks of the center's geometry; an absent center still has sizes.
  std::vector<void*> present(center.count, codes);
  const std::vector<Block> blocks = make_blocks({present.data(), center.numel, center.dtype, center.count}, tile_segment);
  std::vector<double> partial(blocks.size() * n, 0.0);
  std::vector<float> largest(blocks.size() * n, 0.0f);
  std::vector<int64_t> bad(blocks.size() * 2, -1);
  const BlockKernel kernel = pick(bits);
  parallel_for(static_cast<int64_t>(blocks.size()), threads,
               [&](int64_t k) { kernel(job, blocks[k], partial.data() + k * n, largest.data() + k * n, bad.data() + 2 * k); });
  for (size_t k = 0; k < blocks.size(); ++k) {
    if (bad[2 * k] >= 0) {
      *where = {bad[2 * k], blocks[k].tensor, first_bad_column(job, blocks[k], bad[2 * k], bad[2 * k + 1])};
      return Status::not_finite;
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = i * num_segments + blocks[k].segment;
      sum_sq[at] += partial[k * n + i];
      max_scale[at] = std::max(max_scale[at], largest[k * n + i]);
    }
  }
  return Status::ok;
}

}  // namespace twa
