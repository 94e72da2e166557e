// The handler of SIGBUS behind guard.h.
//
// It may call nothing that allocates or locks. So ranges are in a table of fixed size, and each has
// a version that is odd while it is changed: what was read under one even version is one range.
//
// A fault elsewhere is not ours: the handler that was there before (Python's faulthandler, or the
// system's, which ends the process) is put back, and the fault happens again.
#include "guard.h"

#ifdef __linux__

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <vector>

namespace twa {
namespace {

constexpr int32_t kRanges = 1 << 16;  // Linux gives a process 65530 mappings

struct Range {
  std::atomic<uint32_t> version;
  std::atomic<uintptr_t> begin, end;
  std::atomic<bool> torn;
};
static_assert(std::atomic<uintptr_t>::is_always_lock_free, "for use in a signal handler");

Range ranges[kRanges];  // 2 MB of zeros, which take memory as they are used
std::atomic<int32_t> used{0};
std::atomic<int64_t> torn{0};
uintptr_t page_size;
struct sigaction previous;

std::mutex changing;  // all below, and `ranges` for writing; never taken by the handler
std::vector<int32_t> unused;

void set(Range& r, uintptr_t begin, uintptr_t end) {
  r.version.fetch_add(1);
  r.begin = begin, r.end = end, r.torn = false;
  r.version.fetch_add(1);
}

// Puts zeros in the place of a guarded mapping from an address on; false if it is in none.
bool mend(uintptr_t address) {
  const int32_t count = used.load();
  for (int32_t k = 0; k < count; ++k) {
    Range& r = ranges[k];
    const uint32_t version = r.version.load();
    const uintptr_t begin = r.begin.load(), end = r.end.load();
    if (version % 2 || version != r.version.load() || address < begin || address >= end) continue;
    void* const from = reinterpret_cast<void*>(address / page_size * page_size);
    const size_t bytes = end - address / page_size * page_size;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
    if (mmap(from, bytes, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED &&
        mmap(from, bytes, PROT_READ, flags, -1, 0) == MAP_FAILED)  // writable memory is limited
      return false;
    if (!r.torn.exchange(true)) torn.fetch_add(1);
    return true;
  }
  return false;
}

void on_fault(int signal, siginfo_t* info, void*) {
  const int error = errno;
  const bool of_a_file = info->si_code == BUS_ADRERR;  // not of bad memory, or sent by kill
  if (!of_a_file || !mend(reinterpret_cast<uintptr_t>(info->si_addr))) {
    sigaction(signal, &previous, nullptr);
    previous = {};                          // of SIG_DFL: it may come back to us
    if (info->si_code <= 0) raise(signal);  // sent: it does not happen again by itself
  }
  errno = error;
}

// Puts the handler in front; false if that is not possible.
bool install() {
  struct sigaction now{};
  if (sigaction(SIGBUS, nullptr, &now) != 0) return false;
  if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_fault) return true;
  previous = now;
  struct sigaction ours{};
  ours.sa_sigaction = on_fault;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
  sigemptyset(&ours.sa_mask);
  return sigaction(SIGBUS, &ours, nullptr) == 0;
}

}  // namespace

int32_t guard(const void* data, int64_t bytes) {
  const std::lock_guard<std::mutex> lock(changing);
  page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  if (!data || bytes <= 0 || begin % page_size || !install()) return -1;
  int32_t number = used.load();
  if (!unused.empty()) {
    number = unused.back();
    unused.pop_back();
  } else if (number == kRanges) {
    return -1;
  }
  const uintptr_t pages = (static_cast<uintptr_t>(bytes) + page_size - 1) / page_size;
  set(ranges[number], begin, begin + pages * page_size);
  if (number == used.load()) used = number + 1;
  return number;
}

void unguard(int32_t number) {
  const std::lock_guard<std::mutex> lock(changing);
  if (number < 0 || number >= used.load() || !ranges[number].end.load()) return;
  set(ranges[number], 0, 0);
  unused.push_back(number);
}

bool is_torn(int32_t number) {
  return number >= 0 && number < kRanges && ranges[number].torn.load();
}

int64_t torn_ranges() { return torn.load(); }

}  // namespace twa

#else

namespace twa {

int32_t guard(const void*, int64_t) { return -1; }
void unguard(int32_t) {}
bool is_torn(int32_t) { return false; }
int64_t torn_ranges() { return 0; }

}  // namespace twa

#endif
