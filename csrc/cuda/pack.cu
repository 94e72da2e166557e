// pack on a GPU: the quantiser of packing.h (quantise.cuh), one warp per (tile, row).
//
// Operands   DeviceRows and DevicePackTarget of twa.h.
// Work map   block = 8 warps = 8 rows of kQuantiseTiles tiles; blocks of the same tiles follow each
//            other.
// Shared     the quantiser's tables.
// Bytes      n * D * input read, n * D * (bits / 8 + 2 / 128) written.
// Compiled with -fmad=false: every float operation rounds once, as on the CPU.
#include "dispatch.h"
#include "quantise.cuh"

namespace twa {
namespace {

// Blocks of a launch at most, since a grid has below 2^31: large bases take several.
#if defined(TWA_EMULATE)
constexpr int64_t kMostPackBlocks = 32;  // so that tests have several, too
#else
constexpr int64_t kMostPackBlocks = 0x7fffffff;
#endif

struct PackArguments {
  DeviceRows in;
  DevicePackTarget out;
  int64_t first;  // tile of this launch
};

template <int kBits>
TWA_KERNEL(32 * kQuantiseWarps, 5)
pack_kernel(PackArguments a) {
  const int64_t n = a.in.n;
  const Encoder<kBits> encoder(shared_memory());
  sync_block();
  const int64_t blocks = (n + kQuantiseWarps - 1) / kQuantiseWarps,
                i = block_index() % blocks * kQuantiseWarps + warp_index();
  int64_t tile = a.first + block_index() / blocks * kQuantiseTiles;
  const int64_t end = tile + kQuantiseTiles < a.out.tiles ? tile + kQuantiseTiles : a.out.tiles;
  if (i >= n) return;
  int64_t k = tensor_of(a.out.tile_begin, a.in.count, tile);
  for (; tile < end; ++tile) {
    while (k + 1 < a.in.count && a.out.tile_begin[k + 1] <= tile) ++k;
    const int64_t column = (tile - a.out.tile_begin[k]) * kTileColumns,
                  left = a.in.numel[k] - column;
    const int valid = left < kTileColumns ? static_cast<int>(left) : kTileColumns;
    float v[4];
    load_group(a.in.rows[k * n + i], column, valid, v);
    const DeviceTensor center = a.in.center ? a.in.center[k] : DeviceTensor{};
    if (center.data) {
      float c[4];
      load_group(center, column, valid, c);
#pragma unroll
      for (int r = 0; r < 4; ++r) v[r] -= c[r];
    }
    const Group found = quantise(encoder, v, valid);
    const int64_t group = tile * n + i;
    store_codes(encoder, found, a.out.codes + group * row_bytes(kBits));
    if (lane_index() == 0) {
      a.out.scales[group] = static_cast<uint16_t>(float_bits(found.scale) >> 16);
      a.out.squares[group] = ldexp(static_cast<double>(found.sum_sq), 2 * found.e);
      if (!found.finite) store_4(a.out.bad, 1);  // whoever writes it, and however often
    }
  }
}

}  // namespace

int pack_cuda(const DeviceRows& rows, const DevicePackTarget& target, const Place& where) {
  if (!valid_bits(target.bits) || rows.n < 1 || rows.n > kMaxRows) return kInvalidValue;
  const int64_t row_blocks = (rows.n + kQuantiseWarps - 1) / kQuantiseWarps,
                tile_blocks = (target.tiles + kQuantiseTiles - 1) / kQuantiseTiles,
                most = row_blocks < kMostPackBlocks ? kMostPackBlocks / row_blocks : 1;
  int error = 0;
  for (int64_t first = 0; first < tile_blocks && error == 0; first += most) {
    const int64_t count = tile_blocks - first < most ? tile_blocks - first : most;
    with_bits(target.bits, [&](auto b) {
      constexpr int kBits = decltype(b)::value;
      error = launch(pack_kernel<kBits>, count * row_blocks, 32 * kQuantiseWarps, kQuantiseShared,
                     where, PackArguments{rows, target, first * kQuantiseTiles});
    });
  }
  return error;
}

}  // namespace twa
