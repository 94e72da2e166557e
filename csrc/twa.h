// C++ API of the kernels: raw pointers, sizes and a thread count (CPU) or a stream (CUDA). Nothing here knows Python or torch.
//
// Shapes: n rows (candidates), D columns in tiles (packing.h), L segments. A tensor list is a table of base pointers; the
// k-th tensor has numel[k] contiguous elements and starts at tile sum_{j<k} num_tiles(numel[j]).
//
// Every function returns a Status; none throws, prints or exits. CPU results have the same bits for every thread count and
// every instruction set: sums are exact integers per tile and float64 in a fixed order above it.
#pragma once

#include <vector>

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

// out[j] = sum_i weights[i] * rows[i][j];   rows n tables of equal length, weights (n,), out float32. Summed in float64, in order, rounded once.
// Rows of weight 0 are not read.
Status average_cpu(const TensorTable& rows, const double* weights, float* out, int threads);

// Packs v = rows - center of tensors that start at tile `first_tile` of the basis.
//   rows      count * n pointers, the n rows of tensor 0 first
//   center    count tables, or data == nullptr for no center
//   weights   null, or (n,) float64: center, float32, is then written first, as average_cpu does, in the same read of the rows
//   codes     (num_tiles, n, row_bytes) and scales_bf16 (num_tiles, n) of these tensors: scales with 4 significant bits, as bf16
//   sum_sq    (n, L) float64, added to: squared norms;  max_scale (n, L) float32, maximised
//   errors    (count, 2) float64 or null, added to: squared quantisation error and squared norm of each tensor, all rows
Status pack_cpu(const TensorTable& rows, const TensorTable& center, const double* weights, const int32_t* tile_segment, int64_t n,
                int64_t num_segments, int bits, uint8_t* codes, uint16_t* scales_bf16, double* sum_sq, float* max_scale, double* errors, Where* where,
                int threads);

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

// Block Gram-Schmidt, one read of the rows. V = rows minus their parents (row i minus row parent[i] < i, or minus the center where that is -1);
// with a transform (r, n), lower triangular in the order of the rows, V = transform * V; with `out` V is rounded and stored.
//   rows    count * n tensors (float32, bf16, f16), the n rows of tensor 0 first;   center   count tensors, or count == 0 for none
//   out     count * r tensors, or count == 0; rows below `first` are not stored. May be the rows themselves: a block is read before it is written.
//   probes  (6, r) float64 with `out`, else null
//   gram    without `out`: (m, m) float64, m = r with a transform, else n: V V^T for rows i >= first and k <= i, 0 elsewhere;
//           with `out`: (r, 6) float64, V V^T probes^T of the rounded V
//   norms   (n,) float64: squared norms of the rows as they are
//   fast    float32 differences, transform and products, these summed in float64 after at most 64 columns a lane; else float64 (products with probes:
//           float32)
Status orthonormalize_pass_cpu(const TensorTable& rows, const TensorTable& center, int64_t n, const int32_t* parent, const double* transform,
                               int64_t r, const double* probes, int64_t first, bool fast, const TensorTable& out, double* gram, double* norms,
                               int threads);

// Memory bandwidth with the same threads: sum of the 64-bit words (bytes moved = bytes; `ahead`: with the kernels' software prefetch,
// on AVX-512), and a copy (2 * bytes).
uint64_t read_bytes(const void* data, int64_t bytes, int threads, bool ahead);
void copy_bytes(const void* from, void* to, int64_t bytes, int threads);

// Asks the system for huge pages under a large buffer, where it can: streaming n * D * bits / 8 bytes through 4 KiB pages costs a
// fifth of the bandwidth. Call before the buffer is first written.
void advise_huge_pages(void* data, int64_t bytes);

// Name of the instruction set in use: "avx512", "avx2" or "portable" (TWA_KERNELS_ISA forces one; null if it is not available).
const char* cpu_isa();

// CUDA ------------------------------------------------------------------------------------------------------------
// All pointers are device pointers (the tables too), on device number `device`, and work is queued on `stream` (a cudaStream_t) of it. Nothing waits
// and nothing is allocated: the caller brings the workspaces. Each function returns the CUDA error, 0 when everything was launched; if it is not 0,
// no output has been written (a step without tasks may have updated x, if its last kernel was the one that failed). Repeats give the same bits: no
// sum depends on which block ran first.
#if defined(TWA_WITH_CUDA)
struct DeviceTensor {
  void* data;  // null means an absent tensor: a zero gradient, no center, an output that is left alone
  Dtype dtype;
  int32_t reserved;
};

// Work items of a basis: up to item_tiles(bits) tiles of one tensor and one segment, ordered by segment; and groups of up to kGroupItems items of one
// segment, whose partial sums are added first. make_work() fills host arrays; copy them to the device once.
constexpr int item_tiles(int bits) { return bits >= 4 ? 16 : bits >= 2 ? 32 : 64; }
constexpr int kGroupItems = 64;
struct DeviceWork {
  const int32_t* item_tensor;     // (items,)
  const int64_t* item_tile;       // (items,) first tile in the basis
  const int32_t* item_tiles;      // (items,)
  const int32_t* item_segment;    // (items,)
  const int32_t* item_group;      // (items,)
  const int32_t* group_begin;     // (groups + 1,) first item of each group
  const int32_t* segment_groups;  // (L + 1,) first group of each segment
  const int64_t* numel;           // (tensors,)
  const int64_t* tile_begin;      // (tensors,) first tile of each tensor
  int64_t items, groups;
};
struct HostWork {
  std::vector<int32_t> item_tensor, item_tiles, item_segment, item_group, group_begin, segment_groups;
  std::vector<int64_t> item_tile, tile_begin;
};
// numel and tile_segment (total tiles,) in host memory.
HostWork make_work(const int64_t* numel, int64_t count, const int32_t* tile_segment, int64_t num_segments, int bits);

// to[k] = entries[k], entries (count,) in host memory. A table by way of kernel arguments: nothing of the host is read later, nor by a captured
// graph.
int table_cuda(const DeviceTensor* entries, int64_t count, DeviceTensor* to, int device, void* stream);

// As pack_cpu. sum_sq_tiles (num_tiles, n) receives squared norms per group; `bad` counts groups with a NaN or Inf.
int pack_cuda(const void* const* rows, const void* const* center, const int64_t* numel, const int64_t* tile_begin, const Dtype* dtype, int64_t count,
              int64_t tiles, int64_t n, int bits, uint8_t* codes, uint16_t* scales_bf16, double* sum_sq_tiles, int32_t* bad, int device,
              void* stream);

// As project_cpu. Workspaces: partial (items, n), sums (groups, n).
int project_cuda(const BasisView& basis, const DeviceTensor* grads, const DeviceWork& work, float* partial, double* sums, float* c, int device,
                 void* stream);

// As reconstruct_cpu; center may be null. Workspace: x_rows (L, n).
int reconstruct_cuda(const BasisView& basis, const float* x, const DeviceTensor* center, const DeviceTensor* out, const DeviceWork& work,
                     float* x_rows, int device, void* stream);

// As step_cpu, in one kernel: segments are projected, updated and reconstructed in an order in which the second read of a segment's codes finds in
// the second-level cache what fits there.
struct StepWorkspace {
  float* partial;             // (items, n)
  double* sums;               // (groups, n)
  float* x_rows;              // (L, n)
  int32_t* counters;          // (step_counters(groups, L),)
  const int32_t* tasks;       // (2 * items,) from make_tasks(); null: project, update and reconstruct run one after the other, with the same results
  int64_t window;             // from step_window()
  const float* steps_before;  // AdamW: number of steps before this one, in device memory, instead of Update::step: for captured graphs; or null
  float* corrections;         // (2,), with steps_before
};
int step_cuda(const BasisView& basis, const DeviceTensor* grads, const Update& update, float* x, float* first, float* second,
              const DeviceTensor* center, const DeviceTensor* out, const DeviceWork& work, const StepWorkspace& space, float* c, int device,
              void* stream);
constexpr int64_t step_counters(int64_t groups, int64_t num_segments) { return 1 + groups + 2 * num_segments; }
// Tasks of a step, in order: item i's projection is i, its reconstruction is -1 - i. A segment's reconstruction begins `window` tasks after its last
// projection, last item first. Empty if a segment has no item: such a step runs without tasks.
std::vector<int32_t> make_tasks(const HostWork& work, int64_t window);
// Blocks of the step kernel that a device runs at once, which is the window that make_tasks() wants; or minus the CUDA error.
int step_window(int64_t n, int bits, int device);

// As orthonormalize_pass_cpu without `fast`: float64, products with probes float32 (n > 64: float64). center and out may be null; r counts only with
// a transform. Columns of each tensor come in chunks of kOrthonormalizeChunk; tensor k begins with chunk chunk_begin[k], and there are `chunks` in
// all. Workspaces: partials (parts, stride) and space (space,) float64, as orthonormalize_plan() says, which depends on its arguments alone.
constexpr int kOrthonormalizeChunk = 32;
struct OrthonormalizePlan {
  int64_t parts, stride;  // partial sums
  int64_t space;
  int64_t per_block;  // chunks of a block; of a panel, for more than 64 rows
};
OrthonormalizePlan orthonormalize_plan(int64_t n, int64_t r, int64_t chunks, bool transform, bool write);
int orthonormalize_pass_cuda(const DeviceTensor* rows, const DeviceTensor* center, const DeviceTensor* out, const int64_t* numel,
                             const int64_t* chunk_begin, int64_t count, int64_t chunks, int64_t n, const int32_t* parent, const double* transform,
                             int64_t r, const double* probes, int64_t first, double* partials, double* space, double* gram, double* norms, int device,
                             void* stream);

const char* cuda_error_name(int error);
const char* cuda_error_string(int error);
int cuda_device_count();
#endif

}  // namespace twa
