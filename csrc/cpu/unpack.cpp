// unpack:  out[i, j] = row_scale[i, l] * scales[t, i] * level[code(t, i, c)], float32, for tests and small things.
//
// Operands   as project; out a list of (n, numel) float32 tensors.
// Work map   one item = one Block; the product of the two scales is rounded to float32 first, then times the level.
// Bytes      n * D * (bits / 8 + 1 / 128) read, n * D * 4 written: bound by the writes, so one portable version serves all tiers.
#include "decode.h"

namespace twa {
namespace {

template <int kBits>
void unpack_block(const BasisView& basis, const TensorTable& out, const Block& block) {
  alignas(64) int16_t lev[kTileColumns];
  const int64_t n = basis.n, columns = out.numel[block.tensor];
  for (int64_t t = 0; t < block.tiles; ++t) {
    const int valid = valid_columns(out, block, t);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t group = (block.first_tile + t) * n + i;
      decode_portable<kBits>(basis.codes + group * row_bytes(kBits), lev);
      const float scale = basis.row_scale[i * basis.num_segments + block.segment] * e4m3_to_float(basis.scales[group]);
      float* to = static_cast<float*>(out.data[block.tensor]) + i * columns + block.first_column + t * kTileColumns;
      for (int c = 0; c < valid; ++c) to[c] = scale * static_cast<float>(lev[c]);
    }
  }
}

}  // namespace

Status unpack_cpu(const BasisView& basis, const TensorTable& out, int threads) {
  if (!valid_bits(basis.bits) || basis.n < 1 || basis.n > kMaxRows || total_tiles(out) != basis.num_tiles) return Status::bad_argument;
  const std::vector<Block> blocks = make_blocks(out, basis.tile_segment);
  parallel_for(static_cast<int64_t>(blocks.size()), threads,
               [&](int64_t k) { with_bits(basis.bits, [&](auto b) { unpack_block<b()>(basis, out, blocks[k]); }); });
  return Status::ok;
}

}  // namespace twa
