// pack on a GPU: the quantiser of packing.h (quantise.cuh), and sums of the squared norms in the
// order of pack_cpu.
//
// Operands   DeviceRows and DevicePackTarget of twa.h.
// Work map   pack: block = 4 warps, some rows of kQuantiseTiles tiles; a warp takes every fourth
//            of these rows, and holds their center. Blocks of the same tiles follow each other.
//            unit_sums: a thread for each row of a unit, kBlockTiles tiles of a tensor; it adds up
//            each piece, tiles of one segment, in order.
//            segment_sums: a thread for each row and each `owners`-th segment adds up its pieces,
//            in order: no atomics, and the same bits as on the CPU.
// Shared     the quantiser's tables.
// Bytes      n * D * input read, n * D * (bits / 8 + 2 / 128) written, and n * D * 8 / 128 of
//            squared norms written and read.
// Compiled with -fmad=false: every float operation rounds once, as on the CPU.
#include "dispatch.h"
#include "quantise.cuh"

namespace twa {
namespace {

constexpr int kPackRows = 64;  // of a block, at most: its tables and centers serve them all

struct PackArguments {
  DeviceRows in;
  DevicePackTarget out;
  int parts;   // of the rows, each with a block of pack
  int owners;  // of segments, among which their sums are shared out
};

// Groups tile .. end - 1 of row i, one by one; k: the tensor of the first one.
template <int kBits>
TWA_DEVICE void pack_singly(const PackArguments& a, const Encoder<kBits>& encoder, int64_t tile,
                            int64_t end, int64_t k, int64_t i) {
  const int64_t n = a.in.n;
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
    store_codes(encoder, found.rounded, a.out.codes + group * row_bytes(kBits));
    if (lane_index() == 0) {
      a.out.scales[group] = static_cast<uint16_t>(float_bits(found.scale) >> 16);
      a.out.squares[group] = ldexp(static_cast<double>(found.sum_sq), 2 * found.e);
      if (!found.finite) *a.out.bad = 1;
    }
  }
}

template <int kBits>
TWA_KERNEL(32 * kQuantiseWarps, 7)
pack_kernel(PackArguments a) {
  const Encoder<kBits> encoder(shared_memory());
  sync_block();
  const uint32_t block = static_cast<uint32_t>(block_index()), parts = a.parts;  // fewer than 2^31
  const int n = static_cast<int>(a.in.n), part = static_cast<int>(block % parts),
            step = static_cast<int>(parts) * kQuantiseWarps;
  const int64_t tile = int64_t{block / parts} * kQuantiseTiles,
                end = tile + kQuantiseTiles < a.out.tiles ? tile + kQuantiseTiles : a.out.tiles;
  const int64_t k = tensor_of(a.out.tile_begin, a.in.count, tile),
                column = (tile - a.out.tile_begin[k]) * kTileColumns;
  const bool whole = a.in.numel[k] - column >= kQuantiseColumns;
  float c[4][4] = {};
  if (whole && a.in.center && a.in.center[k].data) load_four(a.in.center[k], column, c);
  // Parts of the rows are interleaved, so that they are even.
  for (int i = part * kQuantiseWarps + warp_index(); i < n; i += step) {
    FourGroups found;
    bool usual = false;
    if (whole) {
      float v[4][4];
      load_four(a.in.rows[k * n + i], column, v);
#pragma unroll
      for (int j = 0; j < 16; ++j) v[j / 4][j % 4] -= c[j / 4][j % 4];
      usual = quantise_four(encoder, v, found);
    }
    if (!usual) {
      pack_singly(a, encoder, tile, end, k, i);
      continue;
    }
    const int64_t group = tile * n + i;
    uint8_t* to = a.out.codes + group * row_bytes(kBits);
#pragma unroll
    for (int t = 0; t < 4; ++t)
      store_codes(encoder, found.rounded[t], to + t * n * row_bytes(kBits));
    if (lane_index() % 8 == 0) {
      const int64_t own_group = group + lane_index() / 8 * n;
      store_2(a.out.scales + own_group, static_cast<uint16_t>(float_bits(found.scale) >> 16));
      a.out.squares[own_group] = static_cast<double>(found.sum_sq) * pow2(2 * found.e);
    }
  }
}

// Sums over tiles ---------------------------------------------------------------------------------

constexpr int kMostOwners = 256;
constexpr int kSumThreads = 128;  // rows of a block
constexpr int kAhead = 8;         // loads on their way before the first is added

// Unit `at`: the next kBlockTiles tiles of tensor k, from `tile` on.
struct Unit {
  int64_t tile;
  int tiles;
};
TWA_DEVICE Unit unit_of(const PackArguments& a, int64_t at) {
  const int64_t k = tensor_of(a.out.unit_begin, a.in.count, at),
                tile = a.out.tile_begin[k] + (at - a.out.unit_begin[k]) * kBlockTiles,
                behind = k + 1 < a.in.count ? a.out.tile_begin[k + 1] : a.out.tiles;
  return {tile, static_cast<int>(behind - tile < kBlockTiles ? behind - tile : kBlockTiles)};
}

// Sums and largest scales of a unit's pieces, which take the place of its first squares; piece p of
// unit u: pieces[u * (kBlockTiles + 1) + 1 + p] is its segment, and before them is their number.
TWA_KERNEL(kSumThreads, 6) unit_sums_kernel(PackArguments a) {
  const int64_t n = a.in.n, parts = (n + kSumThreads - 1) / kSumThreads, u = block_index() / parts,
                i = block_index() % parts * kSumThreads + thread_index();
  if (i >= n || *a.out.bad != 0) return;
  const Unit unit = unit_of(a, u);
  int32_t* pieces = a.out.pieces + u * (kBlockTiles + 1);
  double* squares = a.out.squares + unit.tile * n + i;
  const uint16_t* scales = a.out.scales + unit.tile * n + i;
  double sum = 0.0;
  int count = 0, segment = a.out.tile_segment[unit.tile];
  uint32_t top = 0;
  const auto end_piece = [&] {
    squares[count * n] = sum;
    if (i == 0) pieces[1 + count] = segment;
    maximise(a.out.max_scale + i * a.out.num_segments + segment, bits_float(top << 16));
    ++count;
  };
  for (int first = 0; first < unit.tiles; first += kAhead) {
    double square[kAhead];
    uint32_t scale[kAhead];
    int next[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (const int t = first + j; t < unit.tiles)
        square[j] = squares[t * n], scale[j] = scales[t * n],
        next[j] = a.out.tile_segment[unit.tile + t];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (first + j >= unit.tiles) break;
      if (next[j] != segment) {
        end_piece();
        sum = 0.0, top = 0, segment = next[j];
      }
      sum += square[j];
      top = top > scale[j] ? top : scale[j];  // not negative: ordered as their bits
    }
  }
  end_piece();
  if (i == 0) pieces[0] = count;
}

// sum_sq += the pieces of this thread's row, of each segment l with l % kOwners == owner, in order.
constexpr int kSumWarps = 4;
TWA_KERNEL(32 * kSumWarps, 4) segment_sums_kernel(PackArguments a) {
  const int64_t n = a.in.n, parts = (n + 31) / 32, i = block_index() % parts * 32 + lane_index();
  const int owners = a.owners,
            owner = static_cast<int>(block_index() / parts) * kSumWarps + warp_index();
  if (i >= n || owner >= owners || *a.out.bad != 0) return;
  double* to = a.out.sum_sq + i * a.out.num_segments;
  int segment = -1;
  double sum = 0.0;
  const auto add = [&](int of, double piece) {
    if (of % owners != owner) return;
    if (of != segment) {
      if (segment >= 0) to[segment] = sum;
      segment = of, sum = to[of];
    }
    sum += piece;
  };
  for (int64_t first = 0; first < a.out.units; first += kAhead) {
    double piece[kAhead];  // the first one of each unit; most have no other
    int count[kAhead], of[kAhead];
    int64_t at[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t u = first + j;
      count[j] = 0;
      if (u >= a.out.units) continue;
      at[j] = unit_of(a, u).tile * n + i;
      count[j] = a.out.pieces[u * (kBlockTiles + 1)];
      of[j] = a.out.pieces[u * (kBlockTiles + 1) + 1], piece[j] = a.out.squares[at[j]];
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (count[j] > 0) add(of[j], piece[j]);
      for (int p = 1; p < count[j]; ++p)
        add(a.out.pieces[(first + j) * (kBlockTiles + 1) + 1 + p], a.out.squares[at[j] + p * n]);
    }
  }
  if (segment >= 0) to[segment] = sum;
}

}  // namespace

int pack_cuda(const DeviceRows& rows, const DevicePackTarget& target, const Place& where) {
  if (!valid_bits(target.bits) || rows.n < 1 || rows.n > kMaxRows) return kInvalidValue;
  const int64_t n = rows.n, tiles = target.tiles;
  const auto parts = [](int64_t count, int64_t of) { return (count + of - 1) / of; };
  const int64_t owners = target.num_segments < kMostOwners ? target.num_segments : kMostOwners;
  const PackArguments arguments{rows, target, static_cast<int>(parts(n, kPackRows)),
                                static_cast<int>(owners)};
  if (const int error = clear(target.bad, sizeof(int32_t), where)) return error;
  if (const int error = with_bits(target.bits, [&](auto b) {
        constexpr int kBits = decltype(b)::value;
        return launch(pack_kernel<kBits>, parts(tiles, kQuantiseTiles) * arguments.parts,
                      32 * kQuantiseWarps, kQuantiseShared, where, arguments);
      }))
    return error;
  if (const int error = launch(unit_sums_kernel, target.units * parts(n, kSumThreads), kSumThreads,
                               0, where, arguments))
    return error;
  return launch(segment_sums_kernel, parts(owners, kSumWarps) * parts(n, 32), 32 * kSumWarps, 0,
                where, arguments);
}

}  // namespace twa
