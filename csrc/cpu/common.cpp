// Instruction-set choice, thread pool and work blocks.
#include "common.h"

#include <pthread.h>
#ifdef TWA_X86
#include <cpuid.h>
#endif

#ifdef __linux__
#include <dlfcn.h>

#include <fstream>
#include <sstream>
#endif
#if defined(TWA_ARM) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(TWA_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <string>
#include <thread>

namespace twa {
namespace {

#ifdef TWA_ARM
bool has_dot_products() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
  int found = 0;
  size_t size = sizeof found;
  return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, nullptr, 0) && found;
#else
  return false;
#endif
}
#endif

struct Tier {
  Isa isa;
  const char* name;
};
// Those that this machine has, in the order of Isa.
std::vector<Tier> tiers_here() {
  std::vector<Tier> tiers{{Isa::portable, "portable"}};
#if defined(TWA_X86)
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;  // what some compilers have no name for
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool vl = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512vnni");
  if (avx2) tiers.push_back({Isa::avx2, "avx2"});
#ifdef TWA_AVXVNNI
  if (avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1))
    tiers.push_back({Isa::avxvnni, "avxvnni"});
#endif
  if (vl) tiers.push_back({Isa::avx512vl, "avx512vl"});
  if (vl && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vbmi"))
    tiers.push_back({Isa::avx512, "avx512"});
#elif defined(TWA_ARM)
  if (has_dot_products()) tiers.push_back({Isa::neon, "neon"});
#endif
  return tiers;
}

// name is null if TWA_KERNELS_ISA asks for what this machine or build lacks.
const Tier& tier_in_use() {
  static const Tier choice = [] {
    const std::vector<Tier> tiers = tiers_here();
    const char* forced = std::getenv("TWA_KERNELS_ISA");
    if (!forced || !*forced) return tiers.back();
    for (const Tier& tier : tiers)
      if (!std::strcmp(forced, tier.name)) return tier;
    return Tier{Isa::portable, nullptr};
  }();
  return choice;
}

// Items [0, count) for threads to take, each a run of neighbours: long ones first, so that what a
// kernel prefetches beyond its item is mostly its own thread's, and few threads meet at the
// counter; single items at the end, so that no thread waits long for another.
class Items {
 public:
  Items(int64_t count, int threads) : count_(count), share_(int64_t{8} * threads) {}
  void drain(const std::function<void(int64_t)>& fn) {
    for (;;) {
      const int64_t left = count_ - next_.load(std::memory_order_relaxed);
      const int64_t run = std::max<int64_t>(left / share_, 1), begin = next_.fetch_add(run);
      if (begin >= count_) return;
      for (int64_t item = begin; item < std::min(begin + run, count_); ++item) fn(item);
    }
  }

 private:
  const int64_t count_, share_;
  std::atomic<int64_t> next_{0};
};

// Threads that sleep between calls. One call runs at a time; a second caller waits for the first.
class Pool {
 public:
  void run(int64_t count, int threads, const std::function<void(int64_t)>& fn) {
    std::lock_guard<std::mutex> one_call(call_mutex_);
    const int helpers = threads - 1;
    Items items(count, threads);
    while (static_cast<int>(workers_.size()) < helpers)
      workers_.emplace_back([this, id = static_cast<int>(workers_.size())] { work(id); });
    {
      std::lock_guard<std::mutex> lock(mutex_);
      fn_ = &fn;
      items_ = &items;
      helpers_ = running_ = helpers;
      ++generation_;
    }
    start_.notify_all();
    items.drain(fn);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void work(int id) {
    uint64_t seen = 0;
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      start_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (id >= helpers_) continue;
      const auto* fn = fn_;
      Items* items = items_;
      lock.unlock();
      items->drain(*fn);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex call_mutex_, mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(int64_t)>* fn_ = nullptr;
  Items* items_ = nullptr;
  int helpers_ = 0, running_ = 0;
  uint64_t generation_ = 0;
};

#ifdef __linux__
// The OpenMP runtime that the process has loaded already, such as PyTorch's, if there is one
// (libgomp, libiomp5 and libomp have this entry). Its threads have just run the backward pass and
// spin for a while afterwards: threads of our own would have to wait for their cores.
using OpenMp = void (*)(void (*region)(void*), void* data, unsigned threads, unsigned flags);
OpenMp openmp() {
  static std::atomic<OpenMp> found{nullptr};
  OpenMp f = found.load(std::memory_order_relaxed);
  if (!f) {
    f = reinterpret_cast<OpenMp>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.store(f, std::memory_order_relaxed);
  }
  return f;
}
// Whether this process has been made by a fork without an exec: the ninth field of its state,
// behind a name in brackets, has the kernel's PF_FORKNOEXEC. False where that cannot be read.
bool is_fork() {
  std::ifstream file("/proc/self/stat");
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  std::istringstream fields(text.substr(std::min(text.rfind(')') + 1, text.size())));
  std::string state;
  int64_t parent, group, session, terminal, owner, flags;
  fields >> state >> parent >> group >> session >> terminal >> owner >> flags;
  return fields && (flags & 0x40);
}

// After a fork that runtime's threads are gone, and it does not know. Watched from the moment the
// library is loaded; by then the process may be a fork already.
std::atomic<bool> forked{is_fork()};
const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

struct Region {
  const std::function<void(int64_t)>& fn;
  Items items;
  static void run(void* data) {
    auto* region = static_cast<Region*>(data);
    region->items.drain(region->fn);
  }
};
#endif

// Never destroyed: its threads may outlive static destruction. A forked child has none of them, so
// it starts a new pool.
std::atomic<Pool*> pool{nullptr};
Pool& get_pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
  (void)registered;
  Pool* p = pool.load();
  if (!p) {
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(p, fresh)) return *fresh;
    delete fresh;
  }
  return *p;
}

}  // namespace

Isa isa() { return tier_in_use().isa; }
const char* cpu_isa() { return tier_in_use().name; }
std::vector<const char*> cpu_isas() {
  std::vector<const char*> names;
  for (const Tier& tier : tiers_here()) names.push_back(tier.name);
  return names;
}

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& fn) {
  if (count < threads) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (int64_t item = 0; item < count; ++item) fn(item);
    return;
  }
#ifdef __linux__
  if (const OpenMp parallel = watching_forks == 0 && !forked.load() ? openmp() : nullptr) {
    Region region{fn, Items(count, threads)};
    parallel(Region::run, &region, static_cast<unsigned>(threads), 0);
    return;
  }
#endif
  get_pool().run(count, threads, fn);
}

std::vector<Block> blocks_of(const TensorTable& tensors, const int32_t* tile_segment) {
  std::vector<Block> blocks = make_blocks(tensors.numel, tensors.count, tile_segment, kBlockTiles);
  const auto absent = [&](const Block& b) { return tensors.data[b.tensor] == nullptr; };
  blocks.erase(std::remove_if(blocks.begin(), blocks.end(), absent), blocks.end());
  return blocks;
}

bool in_segments(const std::vector<Block>& blocks, int64_t num_segments) {
  return std::all_of(blocks.begin(), blocks.end(),
                     [&](const Block& b) { return b.segment >= 0 && b.segment < num_segments; });
}

}  // namespace twa
