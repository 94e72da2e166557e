// C++ API of the kernels: raw pointers, sizes and a thread count (CPU) or a stream (CUDA). Nothing here knows Python or torch.
//
// Shapes: n rows (candidates), D columns in tiles (packing.h), L segments. A tensor list is a table of base pointers; the
// k-th tensor has numel[k] contiguous elements and starts at tile sum_{j<k} num_tiles(numel[j]).
//
// Every function returns a Status; none throws, prints or exits. CPU results have the same bits for every thread count and
// every instruction set: sums are exact integers per tile and float64 in a fixed order above it.
#pragma once

#include "packing.h"

namespace twa {

enum class Status : int32_t {
  ok = 0,
  bad_argument = 1,  // sizes, bits or dtype out of range
  not_finite = 2,    // pack: NaN or Inf in the input; *where says in which row and tensor
};

struct TensorTable {
  void* const* data;     // (count,) base pointers; null means an absent tensor (a zero gradient)
  const int64_t* numel;  // (count,)
  const Dtype* dtype;    // (count,)
  int64_t count;
};

struct BasisView {
  const uint8_t* codes;         // (num_tiles, n, row_bytes(bits))
  const uint8_t* scales;        // (num_tiles, n) e4m3, at most 0x7e: no sign, no NaN
  const float* row_scale;       // (n, L)
  const int32_t* tile_segment;  // (num_tiles,) in [0, L)
  int64_t n;
  int64_t num_tiles;
  int64_t num_segments;
  int bits;
};

// First non-finite input that pack met: row, tensor and column.
struct Where {
  int64_t row;
  int64_t tensor;
  int64_t column;
};

// Packs v = rows - center of tensors that start at tile `first_tile` of the basis.
//   rows      count * n pointers, the n rows of tensor 0 first
//   center    count tables, or data == nullptr for no center
//   codes     (num_tiles, n, row_bytes) and scales_bf16 (num_tiles, n) of these tensors: scales with 4 significant bits, as bf16
//   absmax    scale from the largest number of a group (always so at 8 bits), else the least-squares scale for Gaussian levels
//   sum_sq    (n, L) float64, added to: squared norms;  max_scale (n, L) float32, maximised
//   errors    (count, 2) float64 or null, added to: squared quantisation error and squared norm of each tensor, all rows
Status pack_cpu(const TensorTable& rows, const TensorTable& center, const int32_t* tile_segment, int64_t n, int64_t num_segments, int bits,
                bool absmax, uint8_t* codes, uint16_t* scales_bf16, double* sum_sq, float* max_scale, double* errors, Where* where, int threads);

// out[k] (n, numel[k]) float32 = dequantised rows.
Status unpack_cpu(const BasisView& basis, const TensorTable& out, int threads);

// c[i, l] = sum over columns j of segment l of P[i, j] * g[j];   c (n, L) float32.
// A NaN or Inf in g makes every c[:, l] of its segment NaN.
Status project_cpu(const BasisView& basis, const TensorTable& grads, float* c, int threads);

// out[j] = center[j] + sum_i x[i, l] * P[i, j], l the segment of column j;   x (n, L) float32; center.data == nullptr means 0.
// A NaN or Inf in x[:, l] makes every column of its segment NaN.
Status reconstruct_cpu(const BasisView& basis, const float* x, const TensorTable& center, const TensorTable& out, int threads);

// An optimizer's update of the coefficients, as torch.optim.SGD and AdamW define it (in float32).
struct Update {
  enum class Rule : int32_t { sgd = 0, adamw = 1 };
  Rule rule;
  bool maximize, nesterov;
  double lr, weight_decay;
  double momentum, dampening;  // sgd
  double beta1, beta2, eps;    // adamw
  int64_t step;                // 1 for the first one
};

// c = project(grads), update of x (n, L), out = center + x^T P: the three calls in one, a segment at a time, where segments are small and
// many, while its codes are in cache. No gradient may share memory with an output. first: momentum buffer or first moment (n, L), null for SGD
// without momentum; second: second moment, null for SGD.
Status step_cpu(const BasisView& basis, const TensorTable& grads, const Update& update, float* x, float* first, float* second,
                const TensorTable& center, const TensorTable& out, float* c, int threads);

// Memory bandwidth with the same threads: sum of the 64-bit words (bytes moved = bytes; `ahead`: with the kernels' software prefetch,
// on AVX-512), and a copy (2 * bytes).
uint64_t read_bytes(const void* data, int64_t bytes, int threads, bool ahead);
void copy_bytes(const void* from, void* to, int64_t bytes, int threads);

// Asks the system for huge pages under a large buffer, where it can: streaming n * D * bits / 8 bytes through 4 KiB pages costs a
// fifth of the bandwidth. Call before the buffer is first written.
void advise_huge_pages(void* data, int64_t bytes);

// Name of the instruction set in use: "avx512", "avx2" or "portable" (TWA_KERNELS_ISA forces one; null if it is not available).
const char* cpu_isa();

#if defined(TWA_WITH_CUDA)
// As pack_cpu, on device pointers (the tables and tile_segment too) and on a stream (cudaStream_t). sum_sq_tiles (num_tiles, n)
// holds squared norms per group; `bad` counts groups with a NaN or Inf. Returns the CUDA error, 0 when the launch succeeded.
int pack_cuda(const void* const* rows, const void* const* center, const int64_t* numel, const int64_t* tile_begin, const Dtype* dtype, int64_t count,
              int64_t tiles, int64_t n, int bits, bool absmax, uint8_t* codes, uint16_t* scales_bf16, double* sum_sq_tiles, int32_t* bad,
              void* stream);
const char* cuda_error_name(int error);
int cuda_device_count();
#endif

}  // namespace twa
