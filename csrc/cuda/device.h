// What the kernels ask of a GPU, one small function per instruction, and the launch.
// tests/emulator/emulator.h has the same functions for a CPU, so that the kernels themselves, not
// copies of them, run in tests on machines without a GPU (compiled with -DTWA_EMULATE).
#pragma once

#include "../twa.h"
#include "lanes.h"

#if defined(TWA_EMULATE)
#include "emulator.h"
#else
#include <cuda_runtime.h>

#define TWA_DEVICE __device__ __forceinline__
// blocks: that a multiprocessor should have registers for. Where it has 100 KiB of shared memory,
// rings leave room for two.
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
#define TWA_BLOCKS(blocks) ((blocks) < 2 ? (blocks) : 2)
#else
#define TWA_BLOCKS(blocks) (blocks)
#endif
#define TWA_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, TWA_BLOCKS(blocks))

namespace twa {

TWA_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
TWA_DEVICE int lane_index() { return static_cast<int>(threadIdx.x % 32); }
TWA_DEVICE int warp_index() { return static_cast<int>(threadIdx.x / 32); }
TWA_DEVICE int64_t block_index() { return blockIdx.x; }
TWA_DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(128) uint8_t bytes[];
  return bytes;
}
TWA_DEVICE void sync_block() { __syncthreads(); }
TWA_DEVICE void sync_warp() { __syncwarp(); }

// Warp-wide; all 32 lanes take part.
TWA_DEVICE uint32_t warp_max(uint32_t v) { return __reduce_max_sync(0xffffffffu, v); }
TWA_DEVICE int warp_sum(int v) { return __reduce_add_sync(0xffffffffu, v); }
TWA_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
TWA_DEVICE double shuffle_xor(double v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
TWA_DEVICE uint32_t shuffle_xor(uint32_t v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}

// A value that is the same in all lanes, which the compiler cannot know of what comes from memory
// or from the thread's index: it then keeps it, and what follows from it, in registers of the warp.
TWA_DEVICE int uniform(int v) { return __shfl_sync(0xffffffffu, v, 0); }
TWA_DEVICE int64_t uniform(int64_t v) { return __shfl_sync(0xffffffffu, v, 0); }

template <class T>
TWA_DEVICE T* uniform(T* p) {
  return reinterpret_cast<T*>(uniform(static_cast<int64_t>(reinterpret_cast<uintptr_t>(p))));
}
// True in one lane of a warp, whose lanes all ask.
TWA_DEVICE bool one_lane() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t chosen = 0;
  asm volatile("{ .reg .pred one; elect.sync _|one, 0xffffffff; @one mov.b32 %0, 1; }"
               : "+r"(chosen));
  return chosen != 0;
#else
  return lane_index() == 0;
#endif
}
// v of that lane.
TWA_DEVICE float shuffle(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
TWA_DEVICE int shuffle(int v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }

// What happens to be in a register.
TWA_DEVICE uint32_t anything() {
  uint32_t v;
  asm("" : "=r"(v));
  return v;
}

TWA_DEVICE int dot4(uint32_t a, uint32_t b, int c) {
  return __dp4a(static_cast<int>(a), static_cast<int>(b), c);
}
TWA_DEVICE int round_to_int(float v) { return __float2int_rn(v); }
// Nearest integer of 8 bits: ties to even, -128 to 127.
TWA_DEVICE int round_to_byte(float v) {
  int k;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(k) : "f"(v));
  return k;
}
// max(|a|, |b|), NaN if one of them is.
TWA_DEVICE float larger_magnitude(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(fabsf(a)), "f"(fabsf(b)));
  return m;
}

// d += a (16 x 32) * b (32 x 8), 8-bit integers (b signed; a signed, or unsigned for kUnsigned),
// int32 sums. Lane 4 g + t holds, in order, a: row g bytes 4 t .. 4 t + 3, row g + 8 the same
// bytes, row g bytes 16 + 4 t .., row g + 8 bytes 16 + 4 t ..;
// b: column g, rows 4 t .. 4 t + 3, then rows 16 + 4 t ..;   d: row g columns 2 t, 2 t + 1, then
// row g + 8.
template <bool kUnsigned>
TWA_DEVICE void multiply_add(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                             uint32_t b0, uint32_t b1) {
  if constexpr (kUnsigned) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
        "%9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
        "%9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// The same with half as many products: a (16 x 16), b (16 x 8); the first two words of a and the
// first of b.
template <bool kUnsigned>
TWA_DEVICE void multiply_add_half(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  if constexpr (kUnsigned) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, "
        "%1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, "
        "%1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
  }
}

// d += a (8 x 4) * b (4 x 8) in float64. Lane 4 g + t holds a: row g, column t;   b: row t, column
// g;   d: row g, columns 2 t, 2 t + 1.
TWA_DEVICE void multiply_add_f64(double (&d)[2], double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(d[0]), "+d"(d[1])
      : "d"(a), "d"(b));
}
// The same for two blocks of 8 rows of a, and 8 columns of it: what element e of an operand holds
// belongs together, e = 0 and 1. One instruction from sm_90 on, which feeds the matrix units with
// fewer reads of registers.
TWA_DEVICE void multiply_add_f64(double (&upper)[2], double (&lower)[2], const double (&a_upper)[2],
                                 const double (&a_lower)[2], const double (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, {%0, %1, %2, %3};"
      : "+d"(upper[0]), "+d"(upper[1]), "+d"(lower[0]), "+d"(lower[1])
      : "d"(a_upper[0]), "d"(a_lower[0]), "d"(a_upper[1]), "d"(a_lower[1]), "d"(b[0]), "d"(b[1]));
#else
  for (int e = 0; e < 2; ++e)
    multiply_add_f64(upper, a_upper[e], b[e]), multiply_add_f64(lower, a_lower[e], b[e]);
#endif
}

// Division and root as IEEE says, whatever the compiler's flags.
TWA_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
TWA_DEVICE float square_root(float a) { return __fsqrt_rn(a); }

// Loads and stores of global memory: pointers that come out of tables would else be taken for
// generic ones.
TWA_DEVICE uint4 load_16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
TWA_DEVICE uint2 load_8(const void* p) { return __ldg(static_cast<const uint2*>(p)); }
TWA_DEVICE uint32_t load_4(const void* p) { return __ldg(static_cast<const uint32_t*>(p)); }
TWA_DEVICE uint16_t load_2(const void* p) { return __ldg(static_cast<const uint16_t*>(p)); }
TWA_DEVICE uint32_t load_1(const void* p) { return __ldg(static_cast<const uint8_t*>(p)); }
TWA_DEVICE void store_16(void* p, uint4 v) { __stcs(static_cast<uint4*>(p), v); }
TWA_DEVICE void store_8(void* p, uint2 v) { __stcs(static_cast<uint2*>(p), v); }
TWA_DEVICE void store_4(void* p, uint32_t v) { __stcs(static_cast<uint32_t*>(p), v); }
TWA_DEVICE void store_2(void* p, uint16_t v) { __stcs(static_cast<uint16_t*>(p), v); }
TWA_DEVICE void store_1(void* p, uint32_t v) {
  __stcs(static_cast<uint8_t*>(p), static_cast<uint8_t>(v));
}
// The same address, which the compiler does not take apart again into the terms of a sum.
template <class T>
TWA_DEVICE T* opaque(T* p) {
  asm("" : "+l"(p));
  return p;
}
// A constant in a register of every lane, that instructions can take beside an immediate. The
// assembler, which would move it there anew for each of them, does not see that this is one.
TWA_DEVICE uint32_t in_register(uint32_t v) {
  uint32_t zero;
  asm("{ .reg .b32 lane; mov.u32 lane, %%laneid; shr.u32 %0, lane, 5; }" : "=r"(zero));
  return v + zero;
}
// Memory that this thread writes later in the kernel: not by way of the read-only cache.
TWA_DEVICE uint4 load_own_16(const void* p) { return __ldcs(static_cast<const uint4*>(p)); }
TWA_DEVICE uint32_t load_own_4(const void* p) { return __ldcs(static_cast<const uint32_t*>(p)); }
// Memory that other multiprocessors wrote during this kernel: read from the second-level cache.
TWA_DEVICE float load_shared_by_all(const float* p) { return __ldcg(p); }
TWA_DEVICE double load_shared_by_all(const double* p) { return __ldcg(p); }
// Packed bytes pass once: loads that say so leave the caches to what is used again.
TWA_DEVICE uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  return policy;
}
TWA_DEVICE uint64_t evict_normal() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(policy));
  return policy;
}

// After reading a slot and before the warp synchronises to let the copy engine write it again: the
// two see memory by different ways.
TWA_DEVICE void release_to_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Asynchronous copies into shared memory. A barrier completes a phase when the bytes announced to
// it have arrived.
// bulk_copies: one instruction for kilobytes (cp.async.bulk); else 16 bytes a lane (cp.async).
TWA_DEVICE constexpr bool bulk_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return false;
#else
  return true;
#endif
}

TWA_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
TWA_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}
// Makes initialised barriers visible to the copy engine; then the warp must synchronise.
TWA_DEVICE void barrier_publish() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
TWA_DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
#endif
}
// Lanes may see it complete at different tries: not a branch that promises they agree (bra.uni),
// after which the compiler would take the warp for whole.
TWA_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred done; wait: mbarrier.try_wait.parity.shared.b64 done, [%0], %1; @!done bra "
      "wait; }" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{ .reg .pred done; wait: mbarrier.test_wait.parity.shared.b64 done, [%0], %1; @!done bra "
      "wait; }" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}
// to, from and bytes are multiples of 16.
TWA_DEVICE void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier,
                          uint64_t policy) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
#endif
}
TWA_DEVICE void copy_16(void* to, const void* from, uint64_t policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
      "l"(from), "l"(policy)
      : "memory");
}
TWA_DEVICE void copy_4(void* to, const void* from, uint64_t policy) {
  asm volatile(
      "cp.async.ca.shared.global.L2::cache_hint [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
      "l"(from), "l"(policy)
      : "memory");
}
// Arrives at the barrier when this lane's copies so far have come.
TWA_DEVICE void barrier_arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

TWA_DEVICE int counter_add(int* counter, int by) { return atomicAdd(counter, by); }
// Between blocks of one kernel: what was written before counter_release() is seen by who reads the
// counter's new value by counter_read(), or by counter_release() and then calls acquire().
TWA_DEVICE int counter_release(int* counter, int by) {
  int v;
  asm volatile("atom.release.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(v)
               : "l"(counter), "r"(by)
               : "memory");
  return v;
}
TWA_DEVICE void acquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// *to = max(*to, v), both not negative: in any order.
TWA_DEVICE void maximise(float* to, float v) {
  atomicMax(reinterpret_cast<int*>(to), __float_as_int(v));
}
TWA_DEVICE int counter_read(const int* counter) {
  int v;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
  return v;
}
TWA_DEVICE void pause() { __nanosleep(64); }

// f() with `device` as the current device; the CUDA error of either. An error is not left for the
// next call to report.
template <class F>
cudaError_t on_device(int device, const F& f) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && device != before) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = f();
  if (error != cudaSuccess) cudaGetLastError();
  if (device != before) cudaSetDevice(before);
  return error;
}
// Runs kernel(arguments) in `blocks` blocks; the CUDA error, 0 if the launch succeeded. No block,
// no launch.
template <class Arguments>
int launch(void (*kernel)(Arguments), int64_t blocks, int threads, int shared_bytes,
           const Place& where, const Arguments& arguments) {
  return static_cast<int>(on_device(where.device, [&] {
    if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
    cudaError_t error = cudaSuccess;
    if (shared_bytes > 48 << 10)
      error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess || blocks == 0) return error;
    void* pointers[] = {const_cast<Arguments*>(&arguments)};
    return cudaLaunchKernel(
        kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), pointers,
        static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(where.stream));
  }));
}
// Blocks of a kernel that the device runs at once, `most` of them on a multiprocessor; or minus the
// CUDA error.
template <class Arguments>
int resident_blocks(void (*kernel)(Arguments), int threads, int shared_bytes, int device,
                    int most) {
  int per = 0, count = 0;
  const cudaError_t error = on_device(device, [&] {
    cudaError_t e = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (e == cudaSuccess)
      e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (e == cudaSuccess)
      e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per, kernel, threads,
                                                        static_cast<size_t>(shared_bytes));
    return e;
  });
  return error == cudaSuccess ? (per < most ? per : most) * count : -static_cast<int>(error);
}
// Sets device memory to zero, in the stream's order.
inline int clear(void* p, int64_t bytes, const Place& where) {
  return static_cast<int>(on_device(where.device, [&] {
    return cudaMemsetAsync(p, 0, static_cast<size_t>(bytes),
                           static_cast<cudaStream_t>(where.stream));
  }));
}

}  // namespace twa
#endif
