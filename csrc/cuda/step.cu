// A training step on a GPU in one kernel: project, update and reconstruct by segment, so that the
// second read of a segment's codes finds in the second-level cache what is still there.
//
// Work map   as many blocks as the device runs at once take tasks in order from one counter: an
//            item's projection or its reconstruction. The last projection of a group of items adds
//            the group's partial sums, the last group of a segment updates the coefficients and
//            raises the segment's flag; reconstructions wait for it. Nothing else waits: what is
//            waited for was taken earlier by a block that is running.
// Order      make_tasks(): segment after segment; a segment's reconstruction begins, last item
//            first, when as many other tasks have been handed out since its last projection as
//            blocks run at once, so that few blocks ever wait.
#include "dispatch.h"
#include "project.cuh"
#include "reconstruct.cuh"
#include "step.cuh"

namespace twa {
namespace {

struct StepArguments {
  ProjectArguments project;
  ReconstructArguments reconstruct;
  UpdateArguments update;
  const int32_t* tasks;  // (count,)
  int32_t* counters;     // tasks taken (1,), items done (groups,), groups done (L,), flags (L,)
  int64_t count;
};

constexpr int kStrandBytes = kThreads * 8, kTaskBytes = 128;

template <int kBits, int kUnits, bool kMany>
struct Step {
  static constexpr int kProjectUnits =
      kMany ? project_most_units(kBits) : project_units(kUnits, kBits);
  using P = Project<kBits, kProjectUnits>;
  using R = Reconstruct<kBits, kUnits>;
  static constexpr int kSlot = P::kSlot > R::kSlot ? P::kSlot : R::kSlot,
                       kMostSlot = P::kMostSlot > R::kSlot ? P::kMostSlot : R::kSlot,
                       kHeader = P::kHeader > R::kHeader ? P::kHeader : R::kHeader;
  static constexpr int slot_bytes(int64_t n) {
    const int project = P::slot_bytes(n), reconstruct = R::slot_bytes(n);
    return project > reconstruct ? project : reconstruct;
  }
  static constexpr int block_bytes(int64_t n, int slots, int slot_bytes) {
    return kTaskBytes + kStrandBytes + R::x_count(n) * 4 +
           warps_bytes(kHeader, slots, slot_bytes, kSlot);
  }
};

// True in every thread of the last of `of` blocks that come here. meanwhile: what this block does
// until it knows.
template <class Meanwhile>
TWA_DEVICE bool is_last(int32_t* counter, int of, int32_t* shared, const Meanwhile& meanwhile) {
  sync_block();
  if (thread_index() == 0) {  // in the order of what the whole block wrote before and reads after
    const bool last = counter_release(counter, 1) == of - 1;
    if (last) acquire();
    *shared = last;
  }
  meanwhile();
  sync_block();
  const bool last = *shared;
  sync_block();  // before *shared is written again
  return last;
}

template <class Meanwhile>
TWA_DEVICE void finish_item(const StepArguments& a, int64_t item, int segment, int32_t* shared,
                            double* strands, const Meanwhile& meanwhile) {
  const UpdateArguments& u = a.update;
  int32_t* items_done = a.counters + 1;
  int32_t* groups_done = items_done + u.work.groups;
  int32_t* flags = groups_done + u.num_segments;
  const int group = u.work.item_group[item];
  if (!is_last(items_done + group, u.work.group_begin[group + 1] - u.work.group_begin[group],
               shared, meanwhile))
    return;
  for (int64_t chunk = 0; chunk < row_chunks(u.n); ++chunk) sum_group(u, group, chunk, strands);
  if (!is_last(groups_done + segment,
               u.work.segment_groups[segment + 1] - u.work.segment_groups[segment], shared, [] {}))
    return;
  for (int64_t row = thread_index(); row < u.n; row += kThreads) update_row(u, segment, row);
  sync_block();
  if (thread_index() == 0) counter_release(flags + segment, 1);
}

template <int kBits, int kUnits, bool kMany>
TWA_KERNEL(kThreads, 3)
step_kernel(StepArguments a) {
  using S = Step<kBits, kUnits, kMany>;
  using ToProject = ProjectTask<kBits, S::kProjectUnits>;
  using ToReconstruct = ReconstructTask<kBits, kUnits, kMany>;
  int32_t* shared = reinterpret_cast<int32_t*>(shared_memory());
  double* strands = reinterpret_cast<double*>(shared_memory() + kTaskBytes);
  float* x_row = reinterpret_cast<float*>(shared_memory() + kTaskBytes + kStrandBytes);
  uint8_t* base = shared_memory() + kTaskBytes + kStrandBytes + S::R::x_count(a.update.n) * 4;
  const int stride = warp_bytes(S::kHeader, a.project.slots, a.project.slot_bytes);
  uint8_t* mine = base + uniform(warp_index()) * stride;
  Ring ring;
  ring.open(mine + S::kHeader, reinterpret_cast<uint64_t*>(mine), a.project.slots,
            a.project.slot_bytes, evict_normal());
  const int32_t* flags = a.counters + 1 + a.update.work.groups + a.update.num_segments;

  const auto start = [&](int task) {
    if (task >= 0) {
      ring.policy = evict_normal();
      return Task(ToProject(a.project, ring, task, 0));
    }
    ring.policy = evict_first();  // what is reconstructed is not read again
    return Task(ToReconstruct(a.reconstruct, ring, -1 - task));
  };
  if (thread_index() == 0) shared[1] = counter_add(a.counters, 1);
  sync_block();
  int64_t taken = shared[1];
  sync_block();  // before it is written again
  if (taken >= a.count) return;
  int task = a.tasks[taken];
  Task started = start(task);
  for (;;) {
    // The next task is taken before this one is done: a task still waits for smaller numbers only,
    // so the smallest unfinished one can run.
    const int next = thread_index() == 0 ? counter_add(a.counters, 1) : 0;
    const int now = task;
    const int segment = started.item.segment;
    const auto start_next = [&] {
      taken = shared[1];
      if (taken >= a.count) return;
      task = a.tasks[taken];
      started = start(task);
    };
    if (now >= 0) {
      for (int block = 0; block < a.project.row_blocks; ++block) {
        if (block > 0) started = ToProject(a.project, ring, now, block);
        ToProject project(started);
        project.run(a.project, ring, mine);
        if (thread_index() == 0) shared[1] = next;
        sync_block();
        project.store(a.project, base, stride, now);
        sync_block();  // before the sums are written again
      }
      finish_item(a, now, segment, shared, strands, start_next);
    } else {
      ToReconstruct(started).run(a.reconstruct, ring, mine, x_row, [&] {
        if (thread_index() == 0)
          while (counter_read(flags + segment) == 0) pause();
        sync_block();
      });
      if (thread_index() == 0) shared[1] = next;
      sync_block();
      start_next();
      sync_block();  // before shared[1] is written again
    }
    if (taken >= a.count) return;
  }
}

// f(kernel, shared bytes, slots, bytes of a slot, rows of a block) of the kernel for n rows.
template <class F>
int with_kernel(int64_t n, int bits, const F& f) {
  return with_bits_and_units(bits, reconstruct_units(n, bits), [&](auto b, auto g) {
    constexpr int kBits = decltype(b)::value, kUnits = decltype(g)::value;
    const auto run = [&](auto many) {
      using S = Step<kBits, kUnits, decltype(many)::value>;
      static_assert(
          S::block_bytes(kMaxRows, ring_slots(S::kMostSlot, kRingKib), S::kMostSlot) <= kMostShared,
          "shared memory of the smaller devices");
      const int slot_bytes = S::slot_bytes(n), slots = ring_slots(slot_bytes);
      return f(step_kernel<kBits, kUnits, decltype(many)::value>,
               S::block_bytes(n, slots, slot_bytes), slots, slot_bytes, 16 * S::kProjectUnits);
    };
    if constexpr (kUnits == most_units(kBits)) {
      if (n > 16 * kUnits) return run(std::true_type());
    }
    return run(std::false_type());
  });
}

struct CorrectionArguments {
  const float* steps_before;
  float* corrections;  // (2,): learning rate over the first moment's correction, root of the second
                       // moment's
  double lr, beta1, beta2;
};
TWA_KERNEL(32, 1) correction_kernel(CorrectionArguments a) {
  const double step = static_cast<double>(load_shared_by_all(a.steps_before)) + 1.0;
  if (thread_index() == 0) a.corrections[0] = static_cast<float>(a.lr / (1.0 - pow(a.beta1, step)));
  if (thread_index() == 1) a.corrections[1] = static_cast<float>(sqrt(1.0 - pow(a.beta2, step)));
}

UpdateArguments update_arguments(const Update& u) {
  UpdateArguments a{};
  a.adamw = u.rule == Update::Rule::adamw, a.maximize = u.maximize, a.nesterov = u.nesterov,
  a.fresh = u.step == 1;
  if (a.adamw) {
    a.lr = static_cast<float>(u.lr / (1.0 - std::pow(u.beta1, static_cast<double>(u.step))));
    a.decay = static_cast<float>(1.0 - u.lr * u.weight_decay);
    a.w1 = static_cast<float>(1.0 - u.beta1), a.w2 = static_cast<float>(1.0 - u.beta2),
    a.beta2 = static_cast<float>(u.beta2);
    a.root = static_cast<float>(std::sqrt(1.0 - std::pow(u.beta2, static_cast<double>(u.step)))),
    a.eps = static_cast<float>(u.eps);
  } else {
    a.lr = static_cast<float>(u.lr), a.decay = static_cast<float>(u.weight_decay);
    a.w1 = static_cast<float>(u.momentum), a.w2 = static_cast<float>(1.0 - u.dampening);
  }
  return a;
}

}  // namespace

int step_cuda(const BasisView& basis, const DeviceTensor* grads, const Update& update,
              const Coefficients& coefficients, const DeviceTensor* center, const DeviceTensor* out,
              const DeviceWork& work, const StepWorkspace& space, float* c, const Place& where) {
  if (!is_valid(basis) || update.step < 1 || (!coefficients.first && update.keeps_first()) ||
      (!coefficients.second && update.keeps_second()))
    return kInvalidValue;
  UpdateArguments u = update_arguments(update);
  u.partial = space.partial, u.sums = space.sums, u.row_scale = basis.row_scale, u.c = c,
  u.x = coefficients.x, u.x_rows = space.x_rows, u.work = work, u.n = basis.n;
  u.first = update.keeps_first() ? coefficients.first : nullptr,
  u.second = update.keeps_second() ? coefficients.second : nullptr,
  u.num_segments = basis.num_segments;
  ProjectArguments p{
      basis.codes,          basis.scales,     grads, work, space.partial, basis.n, 0, 0, 1,
      cuda_variant().fence, fits_cache(basis)};
  const ReconstructArguments r{
      basis.codes, basis.scales,         space.x_rows,     center, out, work, basis.n, 0,
      0,           cuda_variant().fence, fits_cache(basis)};
  if (u.adamw && space.steps_before) {
    const CorrectionArguments correction{space.steps_before, space.corrections, update.lr,
                                         update.beta1, update.beta2};
    if (const int error = launch(correction_kernel, 1, 32, 0, where, correction)) return error;
    u.corrections = space.corrections;
  }
  if (space.tasks == nullptr) {
    int error = launch_project(p, basis.bits, where);
    if (error == 0) error = launch_update(u, where);
    return error == 0 ? launch_reconstruct(r, basis.bits, where) : error;
  }
  return with_kernel(
      basis.n, basis.bits, [&](auto kernel, int shared, int slots, int slot_bytes, int rows) {
        StepArguments a{p, r, u, space.tasks, space.counters, 2 * work.items};
        a.project.slots = a.reconstruct.slots = slots;
        a.project.slot_bytes = a.reconstruct.slot_bytes = slot_bytes;
        a.project.row_blocks = static_cast<int>((basis.n + rows - 1) / rows);
        if (space.window < 1) return kInvalidValue;  // no block would take a task
        const int error =
            clear(space.counters, step_counters(work.groups, basis.num_segments) * 4, where);
        return error != 0 ? error
                          : launch(kernel, a.count < space.window ? a.count : space.window,
                                   kThreads, shared, where, a);
      });
}

int step_window(int64_t n, int bits, int device) {
  return with_kernel(n, bits, [&](auto kernel, int shared, int, int, int) {
    const int blocks =
        resident_blocks(kernel, kThreads, shared, device, cuda_variant().step_blocks);
    return blocks == 0 ? -kLaunchOutOfResources
                       : blocks;  // a kernel that fits on no multiprocessor
  });
}

}  // namespace twa
