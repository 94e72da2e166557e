// Fibers and their order for emulator.h. Linux and macOS (ucontext).
#include "emulator.h"

#include <ucontext.h>

#include <memory>
#include <random>

#include "../../csrc/twa.h"

namespace twa {
namespace emulator {
namespace {

constexpr size_t kStack = 64 << 10;
constexpr int kResident = 3;      // blocks that run at once
constexpr int kPatience = 20000;  // rounds in which every fiber waits for another

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block;
  int thread;
  const uint64_t* counter = nullptr;
  uint64_t value = 0;
  bool waiting = false, done = false;
};

ucontext_t scheduler;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
std::string error;
std::vector<int64_t> launches;  // blocks, threads and shared bytes of each

void enter() {
  try {
    (*body)();
  } catch (const std::exception& e) {
    error = e.what();
  }
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

}  // namespace

Block& block() { return *current->block; }
int thread() { return current->thread; }
void fail(const std::string& what) {
  throw std::runtime_error("emulator: " + what + " (block " +
                           std::to_string(current->block->index) + ", thread " +
                           std::to_string(current->thread) + ")");
}
bool bulk_copies() {
  const char* value = std::getenv("TWA_EMULATOR_BULK");
  return !value || *value != '0';
}
void wait(const uint64_t* counter, uint64_t value) {
  current->counter = counter, current->value = value, current->waiting = true;
  swapcontext(&current->context, &scheduler);
  if (!error.empty()) throw std::runtime_error(error);  // some other fiber failed: leave
}
void complete(Barrier& b) {
  if (b.pending != 0 || b.issued != b.expected) return;
  for (const Copy& c : b.copies) std::memcpy(c.to, c.from, c.bytes);
  b.copies.clear();
  b.pending = b.arrivals, b.expected = b.issued = 0;
  ++b.phase;
}

void run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
  launches.insert(launches.end(), {blocks, threads, shared_bytes});
  if (current) throw std::runtime_error("emulator: kernels do not nest");
  const char* seed = std::getenv("TWA_EMULATOR_SEED");
  std::mt19937 random(seed ? static_cast<unsigned>(std::atoi(seed)) : 0u);
  body = &kernel;
  error.clear();
  std::vector<std::unique_ptr<Block>> running;
  std::vector<std::unique_ptr<Fiber>> fibers;  // of running[k]: k * threads onwards
  int64_t next = 0;
  const auto start = [&](size_t slot) {
    auto b = std::make_unique<Block>();
    b->index = next++, b->threads = b->left = threads, b->shared_bytes = shared_bytes;
    b->bytes.assign(shared_bytes + 512, 0xff);
    b->shared = b->bytes.data() + (128 - reinterpret_cast<uintptr_t>(b->bytes.data()) % 128);
    b->warps.resize(threads / 32);
    for (int t = 0; t < threads; ++t) {
      Fiber& f = *fibers[slot * threads + t];
      f.block = b.get(), f.thread = t, f.waiting = f.done = false, f.counter = nullptr;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = kStack,
      f.context.uc_link = &scheduler;
      makecontext(&f.context, enter, 0);
    }
    running[slot] = std::move(b);
  };
  const size_t slots = static_cast<size_t>(blocks < kResident ? blocks : kResident);
  for (size_t k = 0; k < slots * threads; ++k) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->stack.reset(new char[kStack]);
  }
  running.resize(slots);
  for (size_t k = 0; k < slots; ++k) start(k);
  int idle = 0;
  for (size_t alive = slots; alive > 0 && error.empty();) {
    bool progress = false;
    const size_t turn = random();
    for (size_t w = 0; w < slots * threads / 32 && error.empty(); ++w) {
      const size_t warp = (w + turn) % (slots * threads / 32), slot = warp * 32 / threads;
      if (!running[slot]) continue;
      for (int again = 0; again < 64 && error.empty(); ++again) {  // as long as the warp gets on
        bool moved = false;
        const size_t first = random() % 32;
        for (size_t k = 0; k < 32 && error.empty(); ++k) {
          Fiber& f = *fibers[warp * 32 + (first + k) % 32];
          if (f.done || (f.waiting && f.counter && *f.counter == f.value)) continue;
          const bool spinning = f.waiting && !f.counter;
          if (spinning && again > 0) continue;
          f.waiting = false;
          current = &f;
          swapcontext(&scheduler, &f.context);
          current = nullptr;
          moved |= !spinning || !f.waiting || f.counter;
          if (f.done && --f.block->left == 0) moved = true;
        }
        progress |= moved;
        if (!moved) break;
      }
      if (running[slot] && running[slot]->left == 0) {
        const Block& b = *running[slot];
        for (const uint8_t* p = b.shared + b.shared_bytes; p < b.bytes.data() + b.bytes.size(); ++p)
          if (*p != 0xff) error = "emulator: a block wrote past the end of its shared memory";
        for (const auto& [address, barrier] : b.barriers)
          if (!barrier.copies.empty())
            error = "emulator: a block ended before its asynchronous copies";
        running[slot].reset();
        if (next < blocks)
          start(slot);
        else
          --alive;
      }
    }
    idle = progress ? 0 : idle + 1;
    if (idle > kPatience) error = "emulator: every thread waits for another";
  }
  current = nullptr;
  if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace emulator

const char* cuda_error_name(int error) {
  return error == 101   ? "cudaErrorInvalidDevice"
         : error == 701 ? "cudaErrorLaunchOutOfResources"
                        : "cudaErrorInvalidValue";
}
const char* cuda_error_string(int error) {
  return error == 101   ? "invalid device ordinal"
         : error == 701 ? "too many resources requested for launch"
                        : "invalid argument";
}
CudaVariant& cuda_variant() {
  static CudaVariant variant;
  return variant;
}
int cuda_device_count() { return 1; }

}  // namespace twa

// Takes the launches so far, of three numbers each: how many numbers there were, `most` of them
// written.
extern "C" __attribute__((visibility("default"))) int64_t twa_emulator_launches(int64_t* to,
                                                                                int64_t most) {
  const int64_t count = static_cast<int64_t>(twa::emulator::launches.size());
  for (int64_t k = 0; k < count && k < most; ++k) to[k] = twa::emulator::launches[k];
  twa::emulator::launches.clear();
  return count;
}
