// pack:  codes and scales of v = row - center, by the quantiser that packing.h specifies, and the
// rows' squared norms.
//
// Operands   rows: count * n tensors in float32/bf16/f16, center: count tensors; codes (num_tiles,
//            n, 16 * bits) bytes, scales (num_tiles, n) as bf16 bits, sum_sq (n, L) float64 and
//            max_scale (n, L) float32 accumulated over calls.
// Work map   one item = one Block, in chunks of up to 8 tiles: of each row in turn, the chunk's
//            columns are read (one page of float32) and quantised into a buffer, which then goes
//            out as one stream. Norms: float32 halving tree per group, float64 over groups in
//            order, blocks in order: same bits for any thread count, tier, or split of a tensor at
//            multiples of kBlockTiles tiles.
// Bytes      n * D * input read, n * D * (bits / 8 + 2 / 128) written.
// Speed      bound by arithmetic, not memory, below 8 bits: two encodings and a least-squares sum a
//            group. quantise_vector.h has how the chains of eight groups overlap.
#include <algorithm>

#include "average.h"
#include "quantise.h"

namespace twa {
namespace {

struct Job {
  const RowTable& rows;
  const double* weights;  // null: the center is given; else it is the rows' average, and written
  const PackTarget& target;
};

// What one block adds up, for its n rows.
struct Sums {
  std::vector<double> sum_sq;
  std::vector<float> max_scale;
  int64_t bad_row = -1, bad_tile = -1;  // the first row with a NaN or Inf
};
using BlockKernel = void (*)(const Job& job, const Block& block, Sums* sums);

constexpr int kChunk = kSpan / kTileColumns;  // tiles: a page of float32 of each row
constexpr int kRowsAhead = 2;                 // prefetched: a row is packed in 300 ns
constexpr int64_t kBufferBytes = int64_t{256}
                                 << 10;  // of packed bytes, within the second-level cache

// Quantiser: of quantise.h.
template <int kBits, class Quantiser>
TWA_INLINE void pack_block(const Job& job, const Block& block, Sums* sums,
                           const Quantiser& quantiser) {
  constexpr int kBytes = row_bytes(kBits);
  alignas(64) float center[kChunk * kTileColumns] = {}, rest[kTileColumns];
  static thread_local std::vector<uint8_t> buffer;
  const RowTable& rows = job.rows;
  const int64_t n = rows.n, chunk = std::clamp<int64_t>(kBufferBytes / (n * kBytes), 1, kChunk);
  buffer.resize(static_cast<size_t>(chunk * n * kBytes));
  sums->sum_sq.assign(static_cast<size_t>(n), 0.0);
  sums->max_scale.assign(static_cast<size_t>(n), 0.0f);
  for (int64_t t0 = 0; t0 < block.tiles; t0 += chunk) {
    const int64_t tiles = std::min(chunk, block.tiles - t0),
                  column = block.first_column + t0 * kTileColumns;
    int valid[kChunk + kGroups] = {};  // any tile has kGroups after it
    for (int64_t t = 0; t < tiles; ++t) {
      valid[t] = valid_columns(rows.numel, block, t0 + t);
      if (rows.center && !job.weights)
        load_tile(rows.center_dtype[block.tensor], rows.center[block.tensor],
                  column + t * kTileColumns, valid[t], center + t * kTileColumns);
    }
    if (job.weights) {  // the rows are then read again from the second-level cache
      const int count = static_cast<int>((tiles - 1) * kTileColumns + valid[tiles - 1]);
      quantiser.average(rows.data + block.tensor * n, rows.dtype + block.tensor * n, n, job.weights,
                        column, count, center);
      std::memcpy(static_cast<float*>(rows.center[block.tensor]) + column, center,
                  static_cast<size_t>(count) * sizeof(float));
      std::fill(center + count, center + tiles * kTileColumns, 0.0f);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t source = block.tensor * n + i;
      const Dtype dtype = rows.dtype[source];
      // The same columns of a later row; after the last row, of a row's next chunk. An address that
      // is only prefetched.
      const int64_t later = block.tensor * n + (i + kRowsAhead) % n,
                    skip = (i + kRowsAhead) / n * chunk;
      double sum_sq = sums->sum_sq[i];
      float max_scale = sums->max_scale[i];
      for (int64_t t = 0, count; t < tiles; t += count) {
        count = std::min<int64_t>(kGroups, tiles - t);
        const int64_t at = column + t * kTileColumns;
        const char* row = static_cast<const char*>(rows.data[source]) + at * size_of(dtype);
        const char* next = static_cast<const char*>(rows.data[later]) +
                           (at + skip * kTileColumns) * size_of(rows.dtype[later]);
        const float* from = center + t * kTileColumns;
        const Span span = span_of({dtype, row, count, next}, valid[t + count - 1], rest);
        count = span.count;
        uint8_t* out[kGroups];
        for (int g = 0; g < count; ++g) out[g] = buffer.data() + ((t + g) * n + i) * kBytes;
        Groups groups;
        quantiser.quantise(span, from, valid + t, out, &groups);
        for (int g = 0; g < count; ++g) {
          if (!groups.finite[g]) {
            if (sums->bad_row < 0) sums->bad_row = i, sums->bad_tile = t0 + t + g;
            continue;
          }
          job.target.scales[(block.first_tile + t0 + t + g) * n + i] =
              static_cast<uint16_t>(float_bits(groups.scale[g]) >> 16);
          sum_sq += groups.sum_sq[g];
          max_scale = std::max(max_scale, groups.scale[g]);
        }
      }
      sums->sum_sq[i] = sum_sq;
      sums->max_scale[i] = max_scale;
    }
    quantiser.copy(buffer.data(), job.target.codes + (block.first_tile + t0) * n * kBytes,
                   tiles * n * kBytes);
  }
}

template <int kBits>
void block_portable(const Job& job, const Block& block, Sums* sums) {
  pack_block<kBits>(job, block, sums, PlainQuantiser<kBits>());
}
#ifdef TWA_X86
template <int kBits>
TWA_AVX2 void block_avx2(const Job& job, const Block& block, Sums* sums) {
  pack_block<kBits>(job, block, sums, Avx2Quantiser<kBits>());
}
template <int kBits>
TWA_AVX512 void block_avx512(const Job& job, const Block& block, Sums* sums) {
  pack_block<kBits>(job, block, sums, Avx512Quantiser<kBits>());
}
#elif defined(TWA_ARM)
template <int kBits>
constexpr BlockKernel block_neon = block_portable<kBits>;  // which compilers vectorise for it
#endif

TWA_TIERS(BlockKernel)

// Column of the first NaN or Inf of row - center in one tile.
int64_t first_bad_column(const Job& job, const Block& block, int64_t row, int64_t tile) {
  alignas(64) float v[kTileColumns], center[kTileColumns] = {};
  const RowTable& rows = job.rows;
  const int valid = valid_columns(rows.numel, block, tile);
  const int64_t column = block.first_column + tile * kTileColumns,
                source = block.tensor * rows.n + row;
  load_tile(rows.dtype[source], rows.data[source], column, valid, v);
  if (rows.center)
    load_tile(rows.center_dtype[block.tensor], rows.center[block.tensor], column, valid, center);
  int c = 0;
  while (c + 1 < valid && std::isfinite(v[c] - center[c])) ++c;
  return column + c;
}

}  // namespace

Status pack_cpu(const RowTable& rows, const double* weights, const PackTarget& target, Where* where,
                int threads) {
  const int64_t n = rows.n, count = rows.count;
  if (!valid_bits(target.bits) || n < 1 || n > kMaxRows || total_tiles(rows.numel, count) < 0)
    return Status::bad_argument;
  const auto is_float = [](Dtype d) { return d == Dtype::f32; };
  if (weights &&
      (!rows.center || !std::all_of(rows.center_dtype, rows.center_dtype + count, is_float)))
    return Status::bad_argument;
  const Job job{rows, weights, target};
  const std::vector<Block> blocks =
      make_blocks(rows.numel, count, target.tile_segment, kBlockTiles);
  if (!in_segments(blocks, target.num_segments)) return Status::bad_argument;
  std::vector<Sums> sums(blocks.size());
  const BlockKernel kernel = with_bits(target.bits, [](auto b) { return pick(tiers<b()>()); });
  parallel_for(static_cast<int64_t>(blocks.size()), threads,
               [&](int64_t k) { kernel(job, blocks[k], &sums[k]); });
  for (size_t k = 0; k < blocks.size(); ++k)  // before anything is added up
    if (sums[k].bad_row >= 0) {
      *where = {sums[k].bad_row, blocks[k].tensor,
                first_bad_column(job, blocks[k], sums[k].bad_row, sums[k].bad_tile)};
      return Status::not_finite;
    }
  for (size_t k = 0; k < blocks.size(); ++k) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = i * target.num_segments + blocks[k].segment;
      target.sum_sq[at] += sums[k].sum_sq[i];
      target.max_scale[at] = std::max(target.max_scale[at], sums[k].max_scale[i]);
    }
  }
  return Status::ok;
}

}  // namespace twa
