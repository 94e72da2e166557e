// reconstruct on a GPU: x * row_scale by segment, then one block an item (reconstruct.cuh).
#include "dispatch.h"
#include "reconstruct.cuh"

namespace twa {
namespace {

template <int kBits, int kUnits, bool kMany>
TWA_KERNEL(kThreads, 4)
reconstruct_kernel(ReconstructArguments a) {
  using R = Reconstruct<kBits, kUnits>;
  float* x_row = reinterpret_cast<float*>(shared_memory());
  uint8_t* mine = shared_memory() + R::x_count(a.n) * 4 +
                  uniform(warp_index()) * warp_bytes(R::kHeader, a.slots, a.slot_bytes);
  Ring ring;
  ring.open(mine + R::kHeader, reinterpret_cast<uint64_t*>(mine), a.slots, a.slot_bytes,
            a.keep ? evict_normal() : evict_first());
  ReconstructTask<kBits, kUnits, kMany> task(
      a, ring, a.work.items - 1 - block_index());  // last first: project ended there
  task.run(a, ring, mine, x_row, [] {});
}

struct ScaleArguments {
  const float* x;          // (n, L)
  const float* row_scale;  // (n, L)
  float* x_rows;           // (L, n)
  int64_t n, num_segments;
};
TWA_KERNEL(kThreads, 8) scale_kernel(ScaleArguments a) {
  const int64_t at = block_index() * kThreads + thread_index(), row = at % a.n, segment = at / a.n;
  if (segment < a.num_segments)
    a.x_rows[at] =
        a.x[row * a.num_segments + segment] * a.row_scale[row * a.num_segments + segment];
}

}  // namespace

int launch_reconstruct(const ReconstructArguments& arguments, int bits, const Place& where) {
  return with_bits_and_units(bits, reconstruct_units(arguments.n, bits), [&](auto b, auto g) {
    constexpr int kBits = decltype(b)::value, kUnits = decltype(g)::value;
    using R = Reconstruct<kBits, kUnits>;
    ReconstructArguments a = arguments;
    static_assert(R::block_bytes(kMaxRows, ring_slots(R::kSlot, kRingKib), R::kSlot) <= kMostShared,
                  "shared memory of the smaller devices");
    a.slot_bytes = R::slot_bytes(a.n);
    a.slots = ring_slots(a.slot_bytes);
    const int shared = R::block_bytes(a.n, a.slots, a.slot_bytes);
    if constexpr (kUnits == most_units(kBits)) {
      if (a.n > 16 * kUnits)
        return launch(reconstruct_kernel<kBits, kUnits, true>, a.work.items, kThreads, shared,
                      where, a);
    }
    return launch(reconstruct_kernel<kBits, kUnits, false>, a.work.items, kThreads, shared, where,
                  a);
  });
}

int reconstruct_cuda(const BasisView& basis, const float* x, const DeviceTensor* center,
                     const DeviceTensor* out, const DeviceWork& work, float* x_rows,
                     const Place& where) {
  if (!is_valid(basis)) return kInvalidValue;
  const int64_t threads = basis.num_segments * basis.n;
  const ScaleArguments scale{x, basis.row_scale, x_rows, basis.n, basis.num_segments};
  const int error =
      launch(scale_kernel, (threads + kThreads - 1) / kThreads, kThreads, 0, where, scale);
  if (error != 0) return error;
  return launch_reconstruct({basis.codes, basis.scales, x_rows, center, out, work, basis.n, 0, 0,
                             cuda_variant().fence, fits_cache(basis)},
                            basis.bits, where);
}

}  // namespace twa
