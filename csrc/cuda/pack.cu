// pack on a GPU: the quantiser of packing.h, one warp per (tile, row).
//
// Operands   DeviceRows and DevicePackTarget of twa.h.
// Work map   block = 8 warps = 8 rows of one tile; blocks of a tile follow each other. Lane r holds
//            columns r, r + 32, r + 64, r + 96, so the halving tree is: two additions inside the
//            lane, then butterflies over 16, 8, 4, 2, 1 lanes.
// Shared     128 bytes of codes per warp, from which each lane assembles whole bytes.
// Bytes      n * D * input read, n * D * (bits / 8 + 2 / 128) written.
// Compiled with -fmad=false: every float operation rounds once, as on the CPU.
#include "device.h"
#include "dispatch.h"

namespace twa {
namespace {

constexpr int kPackWarps =
    8;  // rows of a tile per block: enough warps to hide a load, 1 KiB of shared memory

struct PackArguments {
  DeviceRows in;
  DevicePackTarget out;
};

TWA_DEVICE float load(const DeviceTensor& t, int64_t j) {
  switch (t.dtype) {
    case Dtype::f32:
      return static_cast<const float*>(t.data)[j];
    case Dtype::bf16:
      return bf16_to_float(static_cast<const uint16_t*>(t.data)[j]);
    default:
      return f16_to_float(static_cast<const uint16_t*>(t.data)[j]);
  }
}

// Sum of 128 numbers, 4 a lane, in the halving-tree order of packing.h; every lane gets it.
TWA_DEVICE float tree_sum(float v0, float v1, float v2, float v3) {
  float s = (v0 + v2) + (v1 + v3);
  for (int h = 16; h > 0; h /= 2) s += shuffle_xor(s, h);  // a + b == b + a, so all lanes agree
  return s;
}

template <int kBits>
TWA_KERNEL(32 * kPackWarps, 1)
pack_kernel(PackArguments a) {
  const int64_t n = a.in.n;
  uint8_t* shared_codes = shared_memory() + warp_index() * kTileColumns;
  const int lane = lane_index();
  const int64_t blocks = (n + kPackWarps - 1) / kPackWarps, tile = block_index() / blocks,
                i = block_index() % blocks * kPackWarps + warp_index();
  if (i >= n) return;
  int64_t k = 0, end = a.in.count;  // tensor of this tile: the last k with tile_begin[k] <= tile
  while (k + 1 < end) {
    const int64_t mid = (k + end) / 2;
    if (a.out.tile_begin[mid] <= tile)
      k = mid;
    else
      end = mid;
  }
  const int64_t column = (tile - a.out.tile_begin[k]) * kTileColumns, left = a.in.numel[k] - column;
  const int valid = left < kTileColumns ? static_cast<int>(left) : kTileColumns;

  const DeviceTensor from = a.in.rows[k * n + i];
  const DeviceTensor center = a.in.center ? a.in.center[k] : DeviceTensor{};
  float u[4];
  int m = 0;
  for (int r = 0; r < 4; ++r) {
    const int c = lane + 32 * r;
    u[r] = c < valid ? load(from, column + c) : 0.0f;
    if (center.data && c < valid) u[r] -= load(center, column + c);
    m = max(m, static_cast<int>(float_bits(u[r]) & 0x7fffffffu));
  }
  m = static_cast<int>(warp_max(static_cast<uint32_t>(m)));
  const bool finite = m < 0x7f800000, zero = m < 0x00800000;
  const int e = finite && !zero ? (m >> 23) - 126 : 0;
  const float down = pow2f(-(e / 2)), down2 = pow2f(-(e - e / 2));
  for (int r = 0; r < 4; ++r) u[r] = finite && !zero ? u[r] * down * down2 : 0.0f;
  const float total = tree_sum(u[0] * u[0], u[1] * u[1], u[2] * u[2], u[3] * u[3]);
  float s = 0.0f;
  if (!zero && finite) {
    if (kBits == 8) {
      s = round_scale(bits_float(static_cast<uint32_t>(m)) * down * down2 / 127.0f, true);
    } else {
      s = square_root(divide(total, static_cast<float>(valid))) * rms_share(kBits) +
          bits_float(static_cast<uint32_t>(m)) * down * down2 * max_share(kBits);
      const float inverse = 1.0f / s;
      float dot[4];
      int norm = 0;
      for (int r = 0; r < 4; ++r) {
        const int l = level_of<kBits>(nearest_code_of<kBits>(to_level(u[r], inverse)));
        dot[r] = u[r] * static_cast<float>(l);
        norm += lane + 32 * r < valid ? l * l : 0;
      }
      norm = warp_sum(norm);
      s = tree_sum(dot[0], dot[1], dot[2], dot[3]) / static_cast<float>(norm);
      s = round_scale(s, false);
    }
  }
  const float inverse = s > 0.0f ? 1.0f / s : 0.0f;
  for (int r = 0; r < 4; ++r)
    shared_codes[lane + 32 * r] =
        static_cast<uint8_t>(nearest_code_of<kBits>(to_level(u[r], inverse)));
  sync_warp();
  const int64_t group = tile * n + i;
  for (int b = lane; b < row_bytes(kBits); b += 32)
    a.out.codes[group * row_bytes(kBits) + b] = pack_byte(kBits, shared_codes, b);
  if (lane == 0) {
    const float up = s * pow2f(e / 2) * pow2f(e - e / 2);
    a.out.scales[group] = static_cast<uint16_t>((up < 0x1p-126f ? 0u : float_bits(up)) >> 16);
    a.out.squares[group] = ldexp(static_cast<double>(total), 2 * e);
    if (!finite) counter_add(a.out.bad, 1);  // an integer count: its order does not matter
  }
}

}  // namespace

int pack_cuda(const DeviceRows& rows, const DevicePackTarget& target, const Place& where) {
  if (!valid_bits(target.bits) || rows.n < 1 || rows.n > kMaxRows) return kInvalidValue;
  const int64_t blocks = target.tiles * ((rows.n + kPackWarps - 1) / kPackWarps);
  return with_bits(target.bits, [&](auto b) {
    constexpr int kBits = decltype(b)::value;
    return launch(pack_kernel<kBits>, blocks, 32 * kPackWarps, kPackWarps * kTileColumns, where,
                  PackArguments{rows, target});
  });
}

}  // namespace twa
