// unpack:  out[i, j] = row_scale[i, l] * scales[t, i] * level[code(t, i, c)], float32.
//
// Operands   as project; out a list of (n, numel) float32 tensors.
// Work map   one item = one Block, in chunks of tiles whose packed bytes stay in the second-level
//            cache: each row of a chunk is one stream of writes. The product of the two scales is
//            rounded to float32 first, then times the level.
// Bytes      n * D * (bits / 8 + 1 / 128) read, n * D * 4 written.
#include <algorithm>

#include "decode.h"
#include "neon.h"

namespace twa {
namespace {

constexpr int64_t kResident = int64_t{512} << 10;

// decode(row, out): the 128 levels of one row of one tile as int8.
template <int kBits, class Decode>
TWA_INLINE void unpack_block(const BasisView& basis, const TensorTable& out, const Block& block,
                             const Decode& decode) {
  alignas(64) int8_t lev[kTileColumns];
  const int64_t n = basis.n, columns = out.numel[block.tensor];
  const int64_t chunk = std::max<int64_t>(1, kResident / (n * row_bytes(kBits)));
  for (int64_t t0 = 0; t0 < block.tiles; t0 += chunk)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t t = t0; t < std::min(t0 + chunk, block.tiles); ++t) {
        const int64_t group = (block.first_tile + t) * n + i;
        decode(basis.codes + group * row_bytes(kBits), lev);
        const float scale = basis.row_scale[i * basis.num_segments + block.segment] *
                            e4m3_to_float(basis.scales[group]);
        float* to = static_cast<float*>(out.data[block.tensor]) + i * columns + block.first_column +
                    t * kTileColumns;
        const int valid = valid_columns(out.numel, block, t),
                  full = valid == kTileColumns ? kTileColumns : 0;
        for (int c = 0; c < full; ++c) to[c] = scale * static_cast<float>(lev[c]);
        for (int c = full; c < valid; ++c) to[c] = scale * static_cast<float>(lev[c]);
      }
}

template <int kBits>
void block_portable(const BasisView& basis, const TensorTable& out, const Block& block) {
  unpack_block<kBits>(basis, out, block, PortableDecoder<kBits>());
}

#ifdef TWA_X86
template <int kBits>
TWA_AVX2 void block_avx2(const BasisView& basis, const TensorTable& out, const Block& block) {
  unpack_block<kBits>(basis, out, block, Avx2Decoder<kBits>());
}
// The AVX2 decoder keeps up with the writes; AVX-512 only makes the conversion to float wider.
template <int kBits>
TWA_AVX512 void block_avx512(const BasisView& basis, const TensorTable& out, const Block& block) {
  unpack_block<kBits>(basis, out, block, Avx2Decoder<kBits>());
}
#elif defined(TWA_ARM)
template <int kBits>
void block_neon(const BasisView& basis, const TensorTable& out, const Block& block) {
  unpack_block<kBits>(basis, out, block, NeonDecoder<kBits>());
}
#endif

using UnpackBlock = void (*)(const BasisView& basis, const TensorTable& out, const Block& block);
TWA_TIERS(UnpackBlock)

}  // namespace

Status unpack_cpu(const BasisView& basis, const TensorTable& out, int threads) {
  if (!valid_bits(basis.bits) || basis.n < 1 || basis.n > kMaxRows ||
      total_tiles(out) != basis.num_tiles)
    return Status::bad_argument;
  const std::vector<Block> blocks = blocks_of(out, basis.tile_segment);
  if (!in_segments(blocks, basis.num_segments)) return Status::bad_argument;
  const UnpackBlock kernel = with_bits(basis.bits, [](auto b) { return pick(tiers<b()>()); });
  parallel_for(static_cast<int64_t>(blocks.size()), threads,
               [&](int64_t k) { kernel(basis, out, blocks[k]); });
  return Status::ok;
}

}  // namespace twa
