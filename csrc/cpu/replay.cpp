// replay:  out += sum_r coefficients[r] * rows[r], the recorded differences, row after row.
//
// Operands   out: tensors in float32, updated; rows: `count` Differences.
// Work map   one item = up to kReplayTiles tiles of a tensor, whose sums stay in the first-level
//            cache while the rows pass by.
// Bytes      rows * D * (bits / 8 + 2 / 128) + D * 4 read, D * 4 written.
// Exactness  coefficient * scale, times the level, plus the sum: three roundings to float32 a row;
//            with a coefficient of 1 only the last is not exact.
#include "decode.h"
#include "neon.h"

namespace twa {
namespace {

constexpr int64_t kReplayTiles = 32;

struct Job {
  const TensorTable& out;
  const Difference* rows;
  const float* coefficients;
  int64_t count;
};
using BlockKernel = void (*)(const Job& job, const Block& block);

template <int kBits, class Decoder>
TWA_INLINE void replay_block(const Job& job, const Block& block, const Decoder& decode) {
  alignas(64) float sums[kReplayTiles * kTileColumns];
  alignas(64) int8_t lev[kTileColumns];
  const int64_t k = block.tensor;
  const auto column = [&](int64_t t) { return block.first_column + t * kTileColumns; };
  for (int64_t t = 0; t < block.tiles; ++t)
    load_tile(Dtype::f32, job.out.data[k], column(t), valid_columns(job.out.numel, block, t),
              sums + t * kTileColumns);
  for (int64_t r = 0; r < job.count; ++r) {
    if (job.coefficients[r] == 0.0f) continue;
    for (int64_t t = 0; t < block.tiles; ++t) {
      const int64_t tile = block.first_tile + t;
      decode(job.rows[r].codes + tile * row_bytes(kBits), lev);
      const float scale = job.coefficients[r] * bf16_to_float(job.rows[r].scales[tile]);
      float* s = sums + t * kTileColumns;
      for (int c = 0; c < kTileColumns; ++c) s[c] += scale * static_cast<float>(lev[c]);
    }
  }
  for (int64_t t = 0; t < block.tiles; ++t)
    store_tile(Dtype::f32, job.out.data[k], column(t), valid_columns(job.out.numel, block, t),
               sums + t * kTileColumns);
}

template <int kBits>
void block_portable(const Job& job, const Block& block) {
  replay_block<kBits>(job, block, PortableDecoder<kBits>());
}
#ifdef TWA_X86
template <int kBits>
TWA_AVX2 void block_avx2(const Job& job, const Block& block) {
  replay_block<kBits>(job, block, Avx2Decoder<kBits>());
}
template <int kBits>
TWA_AVX512 void block_avx512(const Job& job, const Block& block) {
  replay_block<kBits>(job, block, Avx2Decoder<kBits>());
}
#elif defined(TWA_ARM)
template <int kBits>
void block_neon(const Job& job, const Block& block) {
  replay_block<kBits>(job, block, NeonDecoder<kBits>());
}
#endif

TWA_TIERS(BlockKernel)

}  // namespace

Status replay_cpu(const TensorTable& out, const Difference* rows, const float* coefficients,
                  int64_t count, int bits, int threads) {
  for (int64_t k = 0; k < out.count; ++k)
    if (out.dtype[k] != Dtype::f32) return Status::bad_argument;
  if (!valid_bits(bits) || count < 0 || total_tiles(out) < 0) return Status::bad_argument;
  const std::vector<Block> blocks = make_blocks(out.numel, out.count, nullptr, kReplayTiles);
  const Job job{out, rows, coefficients, count};
  const BlockKernel kernel = with_bits(bits, [](auto b) { return pick(tiers<b()>()); });
  parallel_for(static_cast<int64_t>(blocks.size()), threads,
               [&](int64_t k) { kernel(job, blocks[k]); });
  return Status::ok;
}

}  // namespace twa
