// The functions of csrc/cuda/device.h on a CPU: the CUDA kernels themselves run in tests, block by
// block, a fiber a thread.
//
// What a GPU does at once happens here in an order chosen at random (TWA_EMULATOR_SEED), and what
// it leaves undefined is made visible: shared memory begins as garbage, an asynchronous copy makes
// its destination garbage until somebody waits for it, writing past a block's shared memory, lanes
// of a warp that call different functions, misaligned copies and blocks that wait for ever are
// errors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "twa.h"

#define TWA_DEVICE inline
#define TWA_KERNEL(threads, blocks) static void

namespace twa {
namespace emulator {

struct Copy {
  void* to;
  const void* from;
  int bytes;
};
struct Barrier {
  int arrivals = 0, pending = 0;
  int64_t expected = 0, issued = 0;  // bytes of bulk copies announced and started in this phase
  uint64_t phase = 0;
  std::vector<Copy> copies;
};
struct Warp {
  uint32_t in[32][20], out[32][8];
  int arrived = 0;
  const char* function = nullptr;
  uint64_t generation = 0;
};
struct Block {
  int64_t index;
  int threads, arrived = 0, left;
  uint64_t generation = 0;
  std::vector<uint8_t> bytes;
  uint8_t* shared;
  int shared_bytes;
  std::vector<Warp> warps;
  std::unordered_map<const uint64_t*, Barrier> barriers;
  std::unordered_map<int, std::vector<Copy>> lane_copies;
};

Block& block();  // of the running fiber
int thread();
// Goes on when *counter is no longer `value`; null: when the other fibers have had their turn.
void wait(const uint64_t* counter, uint64_t value);
[[noreturn]] void fail(const std::string& what);
bool bulk_copies();  // TWA_EMULATOR_BULK=0: copies of 16 bytes a lane, as before sm_90
void run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel);
void complete(Barrier& barrier);

// All 32 lanes bring kIn words; compute(in, out) makes each lane's kOut words.
template <int kIn, int kOut, class F>
void together(const char* function, const uint32_t (&in)[kIn], uint32_t (&out)[kOut],
              const F& compute) {
  static_assert(kIn <= 20 && kOut <= 8);
  Warp& w = block().warps[thread() / 32];
  const int lane = thread() % 32;
  if (w.arrived == 0) w.function = function;
  if (std::strcmp(w.function, function) != 0)
    fail(std::string("lanes of a warp call ") + w.function + " and " + function);
  std::memcpy(w.in[lane], in, sizeof(in));
  if (++w.arrived == 32) {
    w.arrived = 0;
    compute(w.in, w.out);
    ++w.generation;
  } else {
    wait(&w.generation, w.generation);
  }
  std::memcpy(out, w.out[lane], sizeof(out));
}
template <class T>
uint32_t bits_of(T v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return u;
}
template <class T>
T of_bits(uint32_t u) {
  T v;
  std::memcpy(&v, &u, 4);
  return v;
}
template <class T>
T exchange(const char* function, T v, int argument, bool exclusive_or) {
  uint32_t in[2] = {bits_of(v), static_cast<uint32_t>(argument)}, out[1];
  together(function, in, out, [&](auto& a, auto& b) {
    for (uint32_t k = 0; k < 32; ++k) b[k][0] = a[exclusive_or ? k ^ a[k][1] : a[k][1]][0];
  });
  return of_bits<T>(out[0]);
}

}  // namespace emulator

inline int thread_index() { return emulator::thread(); }
inline int lane_index() { return emulator::thread() % 32; }
inline int warp_index() { return emulator::thread() / 32; }
inline int64_t block_index() { return emulator::block().index; }
inline uint8_t* shared_memory() { return emulator::block().shared; }
inline void sync_block() {
  emulator::Block& b = emulator::block();
  if (++b.arrived == b.threads) {
    b.arrived = 0;
    ++b.generation;
  } else {
    emulator::wait(&b.generation, b.generation);
  }
}
inline void sync_warp() {
  uint32_t in[1] = {0}, out[1];
  emulator::together("sync_warp", in, out, [](auto&, auto&) {});
}

template <class T>
T max(T a, T b) {
  return a > b ? a : b;
}
inline uint32_t warp_max(uint32_t v) {
  uint32_t in[1] = {v}, out[1];
  emulator::together("warp_max", in, out, [](auto& a, auto& b) {
    uint32_t m = 0;
    for (int k = 0; k < 32; ++k) m = max(m, a[k][0]);
    for (int k = 0; k < 32; ++k) b[k][0] = m;
  });
  return out[0];
}
inline int warp_sum(int v) {
  uint32_t in[1] = {static_cast<uint32_t>(v)}, out[1];
  emulator::together("warp_sum", in, out, [](auto& a, auto& b) {
    uint32_t m = 0;
    for (int k = 0; k < 32; ++k) m += a[k][0];
    for (int k = 0; k < 32; ++k) b[k][0] = m;
  });
  return static_cast<int>(out[0]);
}
inline float shuffle_xor(float v, int mask) {
  return emulator::exchange("shuffle_xor", v, mask, true);
}
inline double shuffle_xor(double v, int mask) {
  uint32_t words[2];
  std::memcpy(words, &v, 8);
  for (uint32_t& w : words) w = emulator::exchange("shuffle_xor", w, mask, true);
  std::memcpy(&v, words, 8);
  return v;
}
inline uint32_t shuffle_xor(uint32_t v, int mask) {
  return emulator::exchange("shuffle_xor", v, mask, true);
}
inline float shuffle(float v, int lane) { return emulator::exchange("shuffle", v, lane, false); }
inline int shuffle(int v, int lane) { return emulator::exchange("shuffle", v, lane, false); }

inline int uniform(int v) {
  uint32_t in[1] = {static_cast<uint32_t>(v)}, out[1];
  emulator::together("uniform", in, out, [](auto& a, auto& b) {
    for (int k = 0; k < 32; ++k) {
      if (a[k][0] != a[0][0]) emulator::fail("a value is not the same in all lanes of a warp");
      b[k][0] = a[0][0];
    }
  });
  return static_cast<int>(out[0]);
}
inline int64_t uniform(int64_t v) {
  const int low = uniform(static_cast<int>(v)), high = uniform(static_cast<int>(v >> 32));
  return static_cast<int64_t>(high) << 32 | static_cast<uint32_t>(low);
}

template <class T>
T* uniform(T* p) {
  return reinterpret_cast<T*>(uniform(static_cast<int64_t>(reinterpret_cast<uintptr_t>(p))));
}
inline bool one_lane() {
  uint32_t in[1] = {0}, out[1];
  emulator::together("one_lane", in, out, [](auto&, auto& b) {
    for (uint32_t k = 0; k < 32; ++k) b[k][0] = k == 0;
  });
  return out[0] != 0;
}

inline uint32_t anything() { return 0x5a5a5a5a; }

inline int dot4(uint32_t a, uint32_t b, int c) {
  for (int k = 0; k < 4; ++k)
    c += static_cast<int8_t>(a >> (8 * k)) * static_cast<int8_t>(b >> (8 * k));
  return c;
}
inline int round_to_int(float v) {  // as the instruction: saturated, NaN is 0
  if (std::isnan(v)) return 0;
  return v >= 0x1p31f ? INT32_MAX : v <= -0x1p31f ? INT32_MIN : static_cast<int>(std::nearbyint(v));
}
inline int round_to_byte(float v) {
  return std::isnan(v)  ? 0
         : v >= 127.0f  ? 127
         : v <= -128.0f ? -128
                        : static_cast<int>(std::nearbyint(v));
}
inline float larger_magnitude(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(std::fabs(a), std::fabs(b));
}

// mma.m16n8k32 by the definition of its fragments in the PTX manual ("Matrix Fragments for
// mma.m16n8k32"): group = lane >> 2, member = lane % 4; a[i]: row = group for 0 <= i < 4 and 8 <= i
// < 12, else group + 8; column = member * 4 + (i & 3), and 16 more for i >= 8; b[i]: row = member *
// 4 + (i & 3), and 16 more for i >= 4; column = group;
// c[i]: row = group for i < 2, else group + 8; column = member * 2 + (i & 1).
template <bool kUnsigned>
void multiply_add(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                  uint32_t b1) {
  uint32_t in[10] = {a0, a1, a2, a3, b0, b1}, out[4];
  for (int i = 0; i < 4; ++i) in[6 + i] = static_cast<uint32_t>(d[i]);
  emulator::together(kUnsigned ? "mma.u8" : "mma.s8", in, out, [](auto& x, auto& y) {
    int a[16][32], b[32][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane >> 2, member = lane % 4;
      for (int i = 0; i < 16; ++i) {
        const uint32_t byte = x[lane][i / 4] >> (8 * (i & 3)) & 0xff;
        const int row = (i < 4 || (i >= 8 && i < 12)) ? group : group + 8,
                  column = member * 4 + (i & 3) + (i >= 8 ? 16 : 0);
        a[row][column] = kUnsigned ? static_cast<int>(byte) : static_cast<int8_t>(byte);
      }
      for (int i = 0; i < 8; ++i)
        b[member * 4 + (i & 3) + (i >= 4 ? 16 : 0)][group] =
            static_cast<int8_t>(x[lane][4 + i / 4] >> (8 * (i & 3)) & 0xff);
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = (lane >> 2) + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
        int64_t sum = static_cast<int32_t>(x[lane][6 + i]);
        for (int k = 0; k < 32; ++k) sum += a[row][k] * b[k][column];
        if (sum > INT32_MAX || sum < INT32_MIN)
          emulator::fail("an int32 sum of the matrix units overflows");
        y[lane][i] = static_cast<uint32_t>(sum);
      }
    }
  });
  for (int i = 0; i < 4; ++i) d[i] = static_cast<int>(out[i]);
}

// mma.m16n8k16, 8-bit: a[i]: row = group for i < 4, else group + 8; column = member * 4 + (i & 3);
// b[i]: row = member * 4 + i, column = group.
template <bool kUnsigned>
void multiply_add_half(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  uint32_t in[7] = {a0, a1, b0}, out[4];
  for (int i = 0; i < 4; ++i) in[3 + i] = static_cast<uint32_t>(d[i]);
  emulator::together(kUnsigned ? "mma.k16.u8" : "mma.k16.s8", in, out, [](auto& x, auto& y) {
    int a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane >> 2, member = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const uint32_t byte = x[lane][i / 4] >> (8 * (i & 3)) & 0xff;
        a[i < 4 ? group : group + 8][member * 4 + (i & 3)] =
            kUnsigned ? static_cast<int>(byte) : static_cast<int8_t>(byte);
      }
      for (int i = 0; i < 4; ++i)
        b[member * 4 + i][group] = static_cast<int8_t>(x[lane][2] >> (8 * i) & 0xff);
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        int64_t sum = static_cast<int32_t>(x[lane][3 + i]);
        for (int k = 0; k < 16; ++k)
          sum += a[(lane >> 2) + (i < 2 ? 0 : 8)][k] * b[k][lane % 4 * 2 + (i & 1)];
        if (sum > INT32_MAX || sum < INT32_MIN)
          emulator::fail("an int32 sum of the matrix units overflows");
        y[lane][i] = static_cast<uint32_t>(sum);
      }
    }
  });
  for (int i = 0; i < 4; ++i) d[i] = static_cast<int>(out[i]);
}

// mma.m8n8k4, float64: a: row = group, column = member; b: row = member, column = group; c[i]: row
// = group, column = member * 2 + i.
inline void multiply_add_f64(double (&d)[2], double a, double b) {
  const double operands[4] = {a, b, d[0], d[1]};
  uint32_t in[8], out[4];
  std::memcpy(in, operands, sizeof(in));
  emulator::together("mma.f64", in, out, [](auto& x, auto& y) {
    double a[8][4], b[4][8];
    for (int lane = 0; lane < 32; ++lane) {
      std::memcpy(&a[lane >> 2][lane % 4], x[lane], 8);
      std::memcpy(&b[lane % 4][lane >> 2], x[lane] + 2, 8);
    }
    for (int lane = 0; lane < 32; ++lane) {
      double sum[2];
      std::memcpy(sum, x[lane] + 4, 16);
      for (int i = 0; i < 2; ++i)
        for (int k = 0; k < 4; ++k) sum[i] += a[lane >> 2][k] * b[k][lane % 4 * 2 + i];
      std::memcpy(y[lane], sum, 16);
    }
  });
  std::memcpy(d, out, sizeof(out));
}
// mma.m16n8k8, float64: a[i]: row = group for even i, else group + 8; column = member for i < 2,
// else member + 4; b[i]: row = member + 4 i, column = group; c[i]: row = group for i < 2, else
// group + 8; column = member * 2 + (i & 1). As before sm_90 with TWA_EMULATOR_BULK=0.
inline void multiply_add_f64(double (&upper)[2], double (&lower)[2], const double (&a_upper)[2],
                             const double (&a_lower)[2], const double (&b)[2]) {
  if (!emulator::bulk_copies()) {
    for (int e = 0; e < 2; ++e)
      multiply_add_f64(upper, a_upper[e], b[e]), multiply_add_f64(lower, a_lower[e], b[e]);
    return;
  }
  const double operands[10] = {a_upper[0], a_lower[0], a_upper[1], a_lower[1], b[0],
                               b[1],       upper[0],   upper[1],   lower[0],   lower[1]};
  uint32_t in[20], out[8];
  std::memcpy(in, operands, sizeof(in));
  emulator::together("mma.f64.m16n8k8", in, out, [](auto& x, auto& y) {
    double a[16][8], b[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane >> 2, member = lane % 4;
      for (int i = 0; i < 4; ++i)
        std::memcpy(&a[group + i % 2 * 8][member + i / 2 * 4], x[lane] + 2 * i, 8);
      for (int i = 0; i < 2; ++i) std::memcpy(&b[member + 4 * i][group], x[lane] + 8 + 2 * i, 8);
    }
    for (int lane = 0; lane < 32; ++lane) {
      double sum[4];
      std::memcpy(sum, x[lane] + 12, 32);
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 8; ++k)
          sum[i] += a[(lane >> 2) + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
      std::memcpy(y[lane], sum, 32);
    }
  });
  std::memcpy(upper, out, 16);
  std::memcpy(lower, out + 4, 16);
}

inline float divide(float a, float b) { return a / b; }
inline float square_root(float a) { return std::sqrt(a); }
using std::fma;
using std::fmaf;
using std::fmaxf;
using std::fminf;
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
template <class T>
T load_as(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) emulator::fail("a misaligned load");
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}
template <class T>
void store_as(void* p, T v) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) emulator::fail("a misaligned store");
  std::memcpy(p, &v, sizeof(T));
}
inline uint4 load_16(const void* p) { return load_as<uint4>(p); }
inline uint2 load_8(const void* p) { return load_as<uint2>(p); }
inline uint32_t load_4(const void* p) { return load_as<uint32_t>(p); }
inline uint16_t load_2(const void* p) { return load_as<uint16_t>(p); }
inline uint32_t load_1(const void* p) { return load_as<uint8_t>(p); }
inline void store_16(void* p, uint4 v) { store_as(p, v); }
inline void store_8(void* p, uint2 v) { store_as(p, v); }
inline void store_4(void* p, uint32_t v) { store_as(p, v); }
inline void store_2(void* p, uint16_t v) { store_as(p, v); }
inline void store_1(void* p, uint32_t v) { store_as(p, static_cast<uint8_t>(v)); }
template <class T>
T* opaque(T* p) {
  return p;
}
inline uint32_t in_register(uint32_t v) { return v; }
inline uint4 load_own_16(const void* p) { return load_as<uint4>(p); }
inline uint32_t load_own_4(const void* p) { return load_as<uint32_t>(p); }
template <class T>
T load_shared_by_all(const T* p) {
  return *p;
}
inline uint64_t evict_first() { return 1; }
inline uint64_t evict_normal() { return 2; }

inline bool bulk_copies() { return emulator::bulk_copies(); }
inline void barrier_init(uint64_t* barrier, int arrivals) {
  if (emulator::block().barriers.count(barrier)) emulator::fail("a barrier is initialised twice");
  emulator::Barrier& b = emulator::block().barriers[barrier];
  b.arrivals = b.pending = arrivals;
}
inline void barrier_publish() {}
inline void release_to_copies() {}
inline emulator::Barrier& barrier_at(uint64_t* barrier) {
  const auto found = emulator::block().barriers.find(barrier);
  if (found == emulator::block().barriers.end())
    emulator::fail("a barrier that was not initialised");
  return found->second;
}
inline void barrier_expect(uint64_t* barrier, int bytes) {
  emulator::Barrier& b = barrier_at(barrier);
  if (b.pending <= 0) emulator::fail("more arrivals at a barrier than it expects");
  b.expected += bytes;
  --b.pending;
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  emulator::Barrier& b = barrier_at(barrier);
  while (b.phase % 2 == parity) {
    emulator::complete(b);
    if (b.phase % 2 == parity) emulator::wait(nullptr, 0);
  }
}
inline void start_copy(emulator::Copy copy, std::vector<emulator::Copy>& copies, int unit = 16) {
  const emulator::Block& b = emulator::block();
  const uint8_t* to = static_cast<const uint8_t*>(copy.to);
  if (reinterpret_cast<uintptr_t>(copy.from) % unit || (to - b.shared) % unit ||
      copy.bytes % unit || copy.bytes <= 0)
    emulator::fail("an asynchronous copy is not of multiples of " + std::to_string(unit) +
                   " bytes");
  if (to < b.shared || to + copy.bytes > b.shared + b.shared_bytes)
    emulator::fail("an asynchronous copy past the end of shared memory");
  std::memset(copy.to, 0xff, copy.bytes);
  copies.push_back(copy);
}
inline void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier, uint64_t policy) {
  if (policy == 0) emulator::fail("a copy without a cache policy");
  emulator::Barrier& b = barrier_at(barrier);
  start_copy({to, from, bytes}, b.copies);
  b.issued += bytes;
}
inline void copy_16(void* to, const void* from, uint64_t policy) {
  if (policy == 0) emulator::fail("a copy without a cache policy");
  start_copy({to, from, 16}, emulator::block().lane_copies[emulator::thread()]);
}
inline void copy_4(void* to, const void* from, uint64_t policy) {
  if (policy == 0) emulator::fail("a copy without a cache policy");
  start_copy({to, from, 4}, emulator::block().lane_copies[emulator::thread()], 4);
}
inline void barrier_arrive_after_copies(uint64_t* barrier) {
  emulator::Barrier& b = barrier_at(barrier);
  if (b.pending <= 0) emulator::fail("more arrivals at a barrier than it expects");
  std::vector<emulator::Copy>& mine = emulator::block().lane_copies[emulator::thread()];
  b.copies.insert(b.copies.end(), mine.begin(), mine.end());
  mine.clear();
  --b.pending;
}

inline void maximise(float* to, float v) { *to = max(*to, v); }
inline int counter_add(int* counter, int by) {
  const int before = *counter;
  *counter += by;
  return before;
}
inline int counter_release(int* counter, int by) { return counter_add(counter, by); }
inline void acquire() {}
inline int counter_read(const int* counter) { return *counter; }
inline void pause() { emulator::wait(nullptr, 0); }

template <class Arguments>
int launch(void (*kernel)(Arguments), int64_t blocks, int threads, int shared_bytes,
           const Place& where, const Arguments& arguments) {
  if (where.device != 0) return 101;       // cudaErrorInvalidDevice
  if (shared_bytes > 227 << 10) return 1;  // cudaErrorInvalidValue
  if (blocks > 0) emulator::run(blocks, threads, shared_bytes, [&] { kernel(arguments); });
  return 0;
}
template <class Arguments>
int resident_blocks(void (*)(Arguments), int, int, int device, int) {
  const char* blocks = std::getenv("TWA_EMULATOR_RESIDENT");
  return device != 0 ? -101 : blocks ? std::atoi(blocks) : 3;
}
inline int clear(void* p, int64_t bytes, const Place& where) {
  if (where.device != 0) return 101;
  std::memset(p, 0, static_cast<size_t>(bytes));
  return 0;
}

}  // namespace twa
