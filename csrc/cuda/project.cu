// project on a GPU: partial sums of items (project.cuh), then their sums in a fixed order
// (step.cuh).
#include "dispatch.h"
#include "project.cuh"
#include "step.cuh"

namespace twa {
namespace {

// Of a multiprocessor, with 256 rows: Blackwell's code needs a few of Hopper's 128 registers more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kWideBlocks = 3;
#else
constexpr int kWideBlocks = 4;
#endif

template <int kBits, int kUnits>
TWA_KERNEL(kThreads, kBits == 8     ? 2
                     : kUnits == 16 ? kWideBlocks
                                    : 4)
project_kernel(ProjectArguments a) {
  using P = Project<kBits, kUnits>;
  const int stride = warp_bytes(P::kHeader, a.slots, a.slot_bytes);
  uint8_t* mine = shared_memory() + uniform(warp_index()) * stride;
  Ring ring;
  ring.open(mine + P::kHeader, reinterpret_cast<uint64_t*>(mine), a.slots, a.slot_bytes,
            a.keep ? evict_normal() : evict_first());
  const uint32_t block = static_cast<uint32_t>(block_index()),
                 row_blocks = static_cast<uint32_t>(a.row_blocks);
  const int64_t item = block / row_blocks;
  ProjectTask<kBits, kUnits> task(a, ring, item, static_cast<int>(block % row_blocks));
  task.run(a, ring, mine);
  sync_block();
  task.store(a, shared_memory(), stride, item);
}

// Block = (group, 32 rows).
TWA_KERNEL(kThreads, 8) sum_kernel(UpdateArguments a) {
  const int64_t chunks = row_chunks(a.n);
  sum_group(a, block_index() / chunks, block_index() % chunks,
            reinterpret_cast<double*>(shared_memory()));
}

// Arguments of a kernel have 4 KiB, 32 with the drivers of CUDA 13.
#if defined(CUDART_VERSION) && CUDART_VERSION >= 13000
constexpr int kTableNumbers = 4000;
#else
constexpr int kTableNumbers = 480;
#endif
struct TableArguments {
  int64_t* to;
  int count;
  int64_t numbers[kTableNumbers];
};
TWA_KERNEL(kThreads, 8) table_kernel(TableArguments a) {
  for (int k = thread_index(); k < a.count; k += kThreads) a.to[k] = a.numbers[k];
}

// Thread = (segment, row).
TWA_KERNEL(kThreads, 8) update_kernel(UpdateArguments a) {
  const int64_t at = block_index() * kThreads + thread_index();
  if (at < a.num_segments * a.n) update_row(a, at / a.n, at % a.n);
}

}  // namespace

int launch_project(const ProjectArguments& arguments, int bits, const Place& where) {
  return with_bits_and_units(
      bits, project_units((arguments.n + 15) / 16, bits), [&](auto b, auto g) {
        constexpr int kBits = decltype(b)::value, kUnits = decltype(g)::value;
        if constexpr (kUnits <= project_most_units(kBits)) {
          using P = Project<kBits, kUnits>;
          static_assert(
              P::block_bytes(ring_slots(P::kMostSlot, kRingKib), P::kMostSlot) <= kMostShared,
              "shared memory of the smaller devices");
          ProjectArguments a = arguments;
          a.slot_bytes = P::slot_bytes(a.n);
          a.slots = ring_slots(a.slot_bytes);
          a.row_blocks = static_cast<int>((a.n + P::kRows - 1) / P::kRows);
          return launch(project_kernel<kBits, kUnits>, a.work.items * a.row_blocks, kThreads,
                        P::block_bytes(a.slots, a.slot_bytes), where, a);
        }
        return kInvalidValue;
      });
}

int table_cuda(const int64_t* numbers, int64_t count, int64_t* to, const Place& where) {
  for (int64_t begin = 0; begin < count; begin += kTableNumbers) {
    TableArguments a{};
    a.to = to + begin,
    a.count = static_cast<int>(count - begin < kTableNumbers ? count - begin : kTableNumbers);
    for (int k = 0; k < a.count; ++k) a.numbers[k] = numbers[begin + k];
    if (const int error = launch(table_kernel, 1, kThreads, 0, where, a)) return error;
  }
  return 0;
}

int launch_update(const UpdateArguments& a, const Place& where) {
  const int64_t chunks = row_chunks(a.n);
  const int error = launch(sum_kernel, a.work.groups * chunks, kThreads, kThreads * 8, where, a);
  if (error != 0) return error;
  return launch(update_kernel, (a.num_segments * a.n + kThreads - 1) / kThreads, kThreads, 0, where,
                a);
}

int project_cuda(const BasisView& basis, const DeviceTensor* grads, const DeviceWork& work,
                 float* partial, double* sums, float* c, const Place& where) {
  if (!is_valid(basis)) return kInvalidValue;
  const int error = launch_project({basis.codes, basis.scales, grads, work, partial, basis.n, 0, 0,
                                    1, cuda_variant().fence, fits_cache(basis)},
                                   basis.bits, where);
  if (error != 0) return error;
  UpdateArguments a{};
  a.partial = partial, a.sums = sums, a.row_scale = basis.row_scale, a.c = c, a.work = work,
  a.n = basis.n, a.num_segments = basis.num_segments;
  return launch_update(a, where);
}

}  // namespace twa
