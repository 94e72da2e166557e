// record:  codes and scales of v = weights - reference, by the quantiser that packing.h specifies;
// then reference += scale * level, what a reader of the codes will add.
//
// Operands   weights: tensors in float32/bf16/f16; reference: as many in float32, updated; codes
//            (num_tiles, 16 * bits) bytes, scales (num_tiles,) as bf16 bits.
// Work map   one item = one Block, tile after tile. A first pass over all weights looks for NaN and
//            Inf, so that a bad snapshot changes nothing.
// Bytes      D * (2 * input + 4) read, D * (4 + bits / 8 + 2 / 128) written.
// Exactness  scale * level is exact in float32, so the sum is the one rounding, on every machine.
// Speed      as pack: bound by arithmetic below 8 bits.
#include <algorithm>
#include <cstring>

#include "decode.h"
#include "neon.h"
#include "quantise.h"

namespace twa {
namespace {

struct Job {
  const TensorTable& weights;
  const TensorTable& reference;
  uint8_t* codes;
  uint16_t* scales;
};
using BlockKernel = void (*)(const Job& job, const Block& block);
using FirstBad = int64_t (*)(const TensorTable& weights, const Block& block);

// Column of the first weight that cannot be recorded; -1 if there is none.
TWA_INLINE int64_t first_bad(const TensorTable& weights, const Block& block) {
  const int32_t most = static_cast<int32_t>(float_bits(kMostWeight));
  alignas(64) float v[kTileColumns];
  for (int64_t t = 0; t < block.tiles; ++t) {
    const int64_t column = block.first_column + t * kTileColumns;
    const int valid = valid_columns(weights.numel, block, t);
    load_tile(weights.dtype[block.tensor], weights.data[block.tensor], column, valid, v);
    if (max_abs_bits(v, kTileColumns) < most) continue;
    int c = 0;
    while (max_abs_bits(v + c, 1) < most) ++c;
    return column + c;
  }
  return -1;
}

template <int kBits, class Quantiser, class Decoder>
TWA_INLINE void record_block(const Job& job, const Block& block, const Quantiser& quantiser,
                             const Decoder& decode) {
  alignas(64) float rest[kTileColumns], reference[kGroups * kTileColumns];
  alignas(64) int8_t lev[kTileColumns];
  const int64_t k = block.tensor;
  const Dtype dtype = job.weights.dtype[k];
  auto* to = static_cast<float*>(job.reference.data[k]);
  for (int64_t t = 0, count; t < block.tiles; t += count) {
    count = std::min<int64_t>(kGroups, block.tiles - t);
    const int64_t column = block.first_column + t * kTileColumns, tile = block.first_tile + t;
    const char* row = static_cast<const char*>(job.weights.data[k]) + column * size_of(dtype);
    // An address that is only prefetched.
    const char* next = row + kGroups * kTileColumns * size_of(dtype);
    const int of_last = valid_columns(job.weights.numel, block, t + count - 1);
    const Span span = span_of({dtype, row, count, next}, of_last, rest);
    count = span.count;
    int valid[kGroups] = {};
    uint8_t* out[kGroups] = {};
    Groups groups;
    for (int g = 0; g < count; ++g) {
      valid[g] = valid_columns(job.weights.numel, block, t + g);
      out[g] = job.codes + (tile + g) * row_bytes(kBits);
      load_tile(Dtype::f32, to, column + g * kTileColumns, valid[g], reference + g * kTileColumns);
    }
    quantiser.quantise(span, reference, valid, out, &groups);
    for (int g = 0; g < count; ++g) {
      job.scales[tile + g] = static_cast<uint16_t>(float_bits(groups.scale[g]) >> 16);
      decode(out[g], lev);
      float* r = reference + g * kTileColumns;
      for (int c = 0; c < kTileColumns; ++c) r[c] += groups.scale[g] * static_cast<float>(lev[c]);
      store_tile(Dtype::f32, to, column + g * kTileColumns, valid[g], r);
    }
  }
}

int64_t bad_portable(const TensorTable& weights, const Block& block) {
  return first_bad(weights, block);
}
template <int kBits>
void block_portable(const Job& job, const Block& block) {
  record_block<kBits>(job, block, PlainQuantiser<kBits>(), PortableDecoder<kBits>());
}
#ifdef TWA_X86
TWA_AVX2 int64_t bad_avx2(const TensorTable& weights, const Block& block) {
  return first_bad(weights, block);
}
TWA_AVX512 int64_t bad_avx512(const TensorTable& weights, const Block& block) {
  return first_bad(weights, block);
}
template <int kBits>
TWA_AVX2 void block_avx2(const Job& job, const Block& block) {
  record_block<kBits>(job, block, Avx2Quantiser<kBits>(), Avx2Decoder<kBits>());
}
template <int kBits>
TWA_AVX512 void block_avx512(const Job& job, const Block& block) {
  record_block<kBits>(job, block, Avx512Quantiser<kBits>(), Avx2Decoder<kBits>());
}
#elif defined(TWA_ARM)
template <int kBits>
void block_neon(const Job& job, const Block& block) {
  record_block<kBits>(job, block, PlainQuantiser<kBits>(), NeonDecoder<kBits>());
}
#endif

TWA_TIERS(BlockKernel)
constexpr Tiers<FirstBad> looks() {
#ifdef TWA_X86
  return wide_tiers<FirstBad>(bad_portable, bad_avx2, bad_avx512);
#else
  return {{bad_portable}};
#endif
}

}  // namespace

Status record_cpu(const TensorTable& weights, const TensorTable& reference, int bits,
                  uint8_t* codes, uint16_t* scales, Where* where, int threads) {
  const auto is_float = [](Dtype d) { return d == Dtype::f32; };
  if (!valid_bits(bits) || weights.count != reference.count || total_tiles(weights) < 0 ||
      !std::equal(weights.numel, weights.numel + weights.count, reference.numel) ||
      !std::all_of(reference.dtype, reference.dtype + reference.count, is_float))
    return Status::bad_argument;
  const std::vector<Block> blocks = make_blocks(weights.numel, weights.count, nullptr, kBlockTiles);
  const auto items = static_cast<int64_t>(blocks.size());
  std::vector<int64_t> bad(blocks.size(), -1);
  const FirstBad look = pick(looks());
  parallel_for(items, threads, [&](int64_t k) { bad[k] = look(weights, blocks[k]); });
  for (size_t k = 0; k < blocks.size(); ++k)
    if (bad[k] >= 0) {
      *where = {0, blocks[k].tensor, bad[k]};
      return Status::not_finite;
    }
  const Job job{weights, reference, codes, scales};
  const BlockKernel kernel = with_bits(bits, [](auto b) { return pick(tiers<b()>()); });
  parallel_for(items, threads, [&](int64_t k) { kernel(job, blocks[k]); });
  return Status::ok;
}

}  // namespace twa
