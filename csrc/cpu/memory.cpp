// Huge pages, and what benchmarks compare themselves with: memory bandwidth with the kernels' own
// threads, and the clock.
//
// read_bytes   sums 64-bit words; bytes moved = bytes.
// copy_bytes   one read and one write per byte.
// Work map     items of 1 MiB, taken by the threads in order, as the kernels take their blocks.
#include <algorithm>
#include <atomic>
#include <chrono>

#include "common.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace twa {
namespace {

constexpr int64_t kItem = int64_t{1} << 20;

TWA_INLINE uint64_t sum_words(const uint64_t* __restrict__ p, int64_t count) {
  uint64_t s[8] = {};
  for (int64_t k = 0; k + 8 <= count; k += 8)
    for (int j = 0; j < 8; ++j) s[j] += p[k + j];
  return s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
}
uint64_t sum_portable(const uint64_t* p, int64_t count) { return sum_words(p, count); }
#ifdef TWA_X86
template <bool kAhead>
TWA_AVX512 uint64_t sum_avx512(const uint64_t* p, int64_t count) {
  __m512i s[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                  _mm512_setzero_si512()};
  for (int64_t k = 0; k + 32 <= count; k += 32)
    for (int j = 0; j < 4; ++j) {
      if (kAhead) prefetch_line(reinterpret_cast<const uint8_t*>(p + k + 8 * j), &s[j]);
      s[j] = _mm512_add_epi64(s[j], _mm512_loadu_si512(p + k + 8 * j));
    }
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(
      _mm512_add_epi64(_mm512_add_epi64(s[0], s[1]), _mm512_add_epi64(s[2], s[3]))));
}
#endif

}  // namespace

uint64_t read_bytes(const void* data, int64_t bytes, int threads, bool ahead) {
  std::atomic<uint64_t> total{0};
  auto sum = sum_portable;
#ifndef TWA_X86
  (void)ahead;
#else
  if (isa() == Isa::avx512) sum = ahead ? sum_avx512<true> : sum_avx512<false>;
#endif
  parallel_for((bytes + kItem - 1) / kItem, threads, [&](int64_t item) {
    const int64_t begin = item * kItem, count = std::min(kItem, bytes - begin) / 8;
    total += sum(reinterpret_cast<const uint64_t*>(static_cast<const char*>(data) + begin), count);
  });
  return total;
}

void copy_bytes(const void* from, void* to, int64_t bytes, int threads) {
  parallel_for((bytes + kItem - 1) / kItem, threads, [&](int64_t item) {
    const int64_t begin = item * kItem;
    std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin,
                static_cast<size_t>(std::min(kItem, bytes - begin)));
  });
}

double clock_rate() {
  constexpr int64_t kLinks = int64_t{1} << 22;
  using Clock = std::chrono::steady_clock;
  static std::atomic<uint64_t> kept{0x9e3779b97f4a7c15u};  // unknown to the compiler
  const uint64_t a = kept.load() | 1, b = a >> 7;
  double best = 0.0;
  for (int round = 0; round < 8; ++round) {
    uint64_t x = kept.load();
    const auto start = Clock::now();
    for (int64_t k = 0; k < kLinks; k += 32)
      for (int j = 0; j < 16; ++j) x = (x + a) ^ b;  // two links: no two can be made one
    kept.store(x);
    const std::chrono::duration<double> seconds = Clock::now() - start;
    best = std::max(best, static_cast<double>(kLinks) / seconds.count());
  }
  return best;
}

void advise_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage,
                  end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin,
            MADV_HUGEPAGE);  // a hint: failure changes nothing
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace twa
