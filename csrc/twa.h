// C++ API of the kernels: raw pointers, sizes and a thread count (CPU) or a stream (CUDA).
// Nothing here knows Python or torch.
//
// Shapes: n rows (candidates), D columns in tiles (packing.h), L segments. A tensor list is a table
// of base pointers; the k-th tensor has numel[k] contiguous elements and starts at tile
// sum_{j<k} num_tiles(numel[j]).
//
// Every function returns a Status; none throws, prints or exits. CPU results have the same bits for
// every thread count and every instruction set: sums are exact integers per tile and float64 in a
// fixed order above it.
#pragma once

#include <vector>

#include "packing.h"

namespace twa {

enum class Status : int32_t {
  ok = 0,
  bad_argument = 1,  // sizes, bits, segments or dtype out of range
  not_finite = 2,    // pack: NaN or Inf in the input; *where says in which row and tensor
};

struct TensorTable {
  void* const* data;     // (count,) base pointers; null means an absent tensor (a zero gradient)
  const int64_t* numel;  // (count,)
  const Dtype* dtype;    // (count,)
  int64_t count;
};

// n rows of each of `count` tensors, and what is subtracted from them.
struct RowTable {
  void* const* data;     // (count * n,) row i of tensor k is entry k * n + i
  const Dtype* dtype;    // (count * n,)
  const int64_t* numel;  // (count,)
  int64_t count, n;
  void* const* center;        // (count,), or null: nothing is subtracted
  const Dtype* center_dtype;  // (count,)
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

// Work items --------------------------------------------------------------------------------------

// Up to `most` tiles of one tensor and one segment: the unit of work and of reduction.
struct Block {
  int64_t tensor;
  int64_t first_column;  // within the tensor
  int64_t first_tile;    // within the basis
  int64_t tiles;
  int32_t segment;
};
// Blocks of tensors of these sizes, in the order of their tiles: they end at multiples of `most`
// tiles of a tensor, so that parts of it have the same blocks as the whole, and where the segment
// changes. tile_segment: (total tiles,), or null: all in segment 0.
std::vector<Block> make_blocks(const int64_t* numel, int64_t count, const int32_t* tile_segment,
                               int64_t most);

// For GPUs: blocks ordered by segment, called items; and groups of up to kGroupItems items of one
// segment, whose partial sums are added first. Copy the arrays to the device once: DeviceWork.
constexpr int item_tiles(int bits) { return bits >= 4 ? 16 : bits >= 2 ? 32 : 64; }
constexpr int kGroupItems = 64;
struct HostWork {
  std::vector<int32_t> item_tensor, item_tiles, item_segment, item_group;
  std::vector<int32_t> group_begin, segment_groups;
  std::vector<int64_t> item_tile, numel, tile_begin;
};
HostWork make_work(const int64_t* numel, int64_t count, const int32_t* tile_segment,
                   int64_t num_segments, int bits);
// Tasks of a step, in order: item i's projection is i, its reconstruction is -1 - i. A segment's
// reconstruction begins `window` tasks after its last projection, last item first. Empty if a
// segment has no item: such a step runs without tasks.
std::vector<int32_t> make_tasks(const HostWork& work, int64_t window);

// CPU ---------------------------------------------------------------------------------------------

// out[j] = sum_i weights[i] * rows[i][j]; rows: tables of equal length, weights (n,), out float32.
// Summed in float64, in order, rounded once. Rows of weight 0 are not read.
Status average_cpu(const TensorTable& rows, const double* weights, float* out, int threads);

// Where packed rows go, and what is summed over calls.
struct PackTarget {
  const int32_t* tile_segment;  // (num_tiles,)
  int64_t num_segments;
  int bits;
  uint8_t* codes;    // (num_tiles, n, row_bytes)
  uint16_t* scales;  // (num_tiles, n) bf16 with 4 significant bits
  double* sum_sq;    // (n, L), added to: squared norms
  float* max_scale;  // (n, L), maximised with the scales
};
// First non-finite input that pack met: row, tensor and column.
struct Where {
  int64_t row;
  int64_t tensor;
  int64_t column;
};
// Packs rows - center of tensors that start at tile 0 of the target.
// weights: null; or (n,), and the center, float32, is first written as average_cpu makes it, in the
// same read of the rows.
Status pack_cpu(const RowTable& rows, const double* weights, const PackTarget& target, Where* where,
                int threads);

// out (tiles, n) e4m3 = scales (tiles, n) * 2^-exponent[segment, row], rounded to nearest even;
// scales as pack writes them, exponent (segments, n) in [-900, 900], below which a segment's scales
// are 2^(exponent + 8) at most. *lost: how many that are not 0 became 0.
Status finish_scales_cpu(const uint16_t* scales, const int32_t* tile_segment,
                         const int32_t* exponent, int64_t tiles, int64_t n, int64_t segments,
                         uint8_t* out, int64_t* lost, int threads);

// A difference of one row, as record writes it and replay adds it: no segments, no row_scale.
//   value(column c of tile t) = scales[t] * level[code(t, c)]
struct Difference {
  const uint8_t* codes;    // (num_tiles, row_bytes)
  const uint16_t* scales;  // (num_tiles,) bf16 with 4 significant bits
};
constexpr float kMostWeight = 0x1p126f;  // weights of this size count as infinite
// Codes weights - reference, and adds the decoded difference to the reference, float32, which then
// is what a reader of the codes gets. codes and scales as in Difference, written.
// A weight that is NaN, Inf or of kMostWeight: not_finite, *where says which (row 0), and neither
// reference, codes nor scales were written.
Status record_cpu(const TensorTable& weights, const TensorTable& reference, int bits,
                  uint8_t* codes, uint16_t* scales, Where* where, int threads);
// out += sum_r coefficients[r] * rows[r], float32, row after row, each sum rounded to float32:
// with coefficients of 1 the bits of record's reference. Rows of coefficient 0 are not read.
Status replay_cpu(const TensorTable& out, const Difference* rows, const float* coefficients,
                  int64_t count, int bits, int threads);

// out[k] (n, numel[k]) float32 = dequantised rows.
Status unpack_cpu(const BasisView& basis, const TensorTable& out, int threads);

// c[i, l] = sum over columns j of segment l of P[i, j] * g[j];   c (n, L) float32.
// A NaN or Inf in g makes every c[:, l] of its segment NaN.
Status project_cpu(const BasisView& basis, const TensorTable& grads, float* c, int threads);

// out[j] = center[j] + sum_i x[i, l] * P[i, j], l the segment of column j;   x (n, L) float32;
// center.data == nullptr means 0. A NaN or Inf in x[:, l] makes every column of its segment NaN.
Status reconstruct_cpu(const BasisView& basis, const float* x, const TensorTable& center,
                       const TensorTable& out, int threads);

// An optimizer's update of the coefficients, as torch.optim.SGD and AdamW define it (in float32).
struct Update {
  enum class Rule : int32_t { sgd = 0, adamw = 1 };
  Rule rule;
  bool maximize, nesterov;
  double lr, weight_decay;
  double momentum, dampening;  // sgd
  double beta1, beta2, eps;    // adamw
  int64_t step;                // 1 for the first one

  bool keeps_first() const { return rule == Rule::adamw || momentum != 0.0; }
  bool keeps_second() const { return rule == Rule::adamw; }
};
// What an update changes: (n, L) float32 each.
struct Coefficients {
  float* x;
  float* first;   // momentum buffer or first moment; null if the rule keeps none
  float* second;  // second moment; null if the rule keeps none
};
// c = project(grads), update of x, out = center + x^T P: the three calls in one, a segment at a
// time, where segments are small and many, while its codes are in cache. No gradient may share
// memory with an output. c (n, L) float32.
Status step_cpu(const BasisView& basis, const TensorTable& grads, const Update& update,
                const Coefficients& coefficients, const TensorTable& center, const TensorTable& out,
                float* c, int threads);

constexpr int kProbes = 6;  // of orthonormalize's certificate
// What one read of the rows does for block Gram-Schmidt. V = rows minus their parents (row i minus
// row parent[i] < i, or minus the center where that is -1); with a transform (r, n), lower
// triangular in the order of the rows, V = transform * V; with `out` V is rounded and stored.
struct GramSchmidtPass {
  const int32_t* parent;    // (n,)
  const double* transform;  // (r, n) or null
  int64_t r;
  const double* probes;  // (kProbes, r) with `out`, else null
  int64_t first;         // rows of V below it are neither stored nor in gram
  bool fast;      // float32 differences, transform and products, these summed in float64 after
                  // at most 64 columns a lane; else float64 (products with probes: float32)
  double* gram;   // without `out`: (m, m), m = r with a transform, else n: V V^T for rows
                  // i >= first and k <= i, 0 elsewhere;
                  // with `out`: (r, 6), V V^T probes^T of the rounded V
  double* norms;  // (n,): squared norms of the rows as they are
};
// out: count * r tensors, or count == 0; may be the rows: a block is read before it is written.
Status orthonormalize_pass_cpu(const RowTable& rows, const GramSchmidtPass& pass,
                               const TensorTable& out, int threads);

// Memory bandwidth with the same threads: sum of the 64-bit words (bytes moved = bytes; `ahead`:
// with the kernels' software prefetch, on AVX-512), and a copy (2 * bytes).
uint64_t read_bytes(const void* data, int64_t bytes, int threads, bool ahead);
void copy_bytes(const void* from, void* to, int64_t bytes, int threads);
// Cycles a second of the core that runs it, now: from a chain of additions and exclusive ors, each
// of which waits a cycle for the one before. The best of a few milliseconds.
double clock_rate();

// Multiply-adds on registers alone, in float32 or float64, by the instruction set in use: what
// bounds orthonormalize. Each thread takes `turns` turns; returns how many it made in all.
int64_t multiply_adds(int64_t turns, bool fast, int threads);

// Asks the system for huge pages under a large buffer, where it can: streaming n * D * bits / 8
// bytes through 4 KiB pages costs a fifth of the bandwidth. Call before the buffer is written.
void advise_huge_pages(void* data, int64_t bytes);

// Name of the instruction set in use: the best of cpu_isas(), or the one that TWA_KERNELS_ISA asks
// for; null if it is not among them. That all of them give the same bits takes rounding to nearest,
// which is what threads begin with.
const char* cpu_isa();
// Those that this build has and this machine runs, the best one last: "portable"; on x86-64 "avx2",
// "avxvnni", "avx512vl" (its 256-bit vpdpbusd) and "avx512"; on 64-bit Arm "neon" (with sdot).
std::vector<const char*> cpu_isas();

// CUDA --------------------------------------------------------------------------------------------
// All pointers are device pointers (the tables too), on device `where.device`, and work is queued
// on its stream. Nothing waits and nothing is allocated: the caller brings the workspaces. Each
// function returns the CUDA error, 0 when everything was launched; if it is not 0, no output has
// been written (a step without tasks may have updated x, if its last kernel was the one that
// failed). Repeats give the same bits: no sum depends on which block ran first.
#if defined(TWA_WITH_CUDA)
struct Place {
  int device;
  void* stream;  // a cudaStream_t of that device
};
struct DeviceTensor {
  void* data;  // null: an absent tensor: a zero gradient, no center, an output that is left alone
  Dtype dtype;
  int32_t reserved;
};

// HostWork in device memory.
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

// to[k] = numbers[k], numbers (count,) in host memory. Sizes, or addresses and what goes with them
// (DeviceTensor, DeviceDifference), by way of kernel arguments: nothing of the host is read later,
// nor by a captured graph.
int table_cuda(const int64_t* numbers, int64_t count, int64_t* to, const Place& where);

// n rows of each of `count` tensors, and what is subtracted from them.
struct DeviceRows {
  const DeviceTensor* rows;    // (count * n,) row i of tensor k is entry k * n + i
  const DeviceTensor* center;  // (count,) or null
  const int64_t* numel;        // (count,)
  int64_t count, n;
};

// As pack_cpu. *bad becomes 1 if a group has a NaN or Inf, else 0; if it is not 0,
// sum_sq and max_scale are as they were. Units are kBlockTiles tiles of a tensor, its last one
// fewer.
struct DevicePackTarget {
  const int64_t* tile_begin;    // (count,) first tile of each tensor
  const int64_t* unit_begin;    // (count,) first unit of each tensor
  const int32_t* tile_segment;  // (tiles,)
  int64_t tiles, units, num_segments;
  int bits;
  uint8_t* codes;    // (tiles, n, row_bytes)
  uint16_t* scales;  // (tiles, n) bf16 with 4 significant bits
  double* sum_sq;    // (n, L), added to
  float* max_scale;  // (n, L)
  double* squares;   // workspace (tiles, n): squared norms of the groups
  int32_t* pieces;   // workspace (units * (kBlockTiles + 1),)
  int32_t* bad;
};
int pack_cuda(const DeviceRows& rows, const DevicePackTarget& target, const Place& where);

// As record_cpu, without `where`: *bad becomes the number of groups with a weight that cannot be
// recorded. If it is not 0, neither reference, codes nor scales are written.
struct DeviceRecord {
  const DeviceTensor* weights;    // (count,)
  const DeviceTensor* reference;  // (count,) float32, updated
  const int64_t* numel;           // (count,)
  const int64_t* tile_begin;      // (count,) first tile of each tensor
  int64_t count, tiles;
  int bits;
  uint8_t* codes;    // (tiles, row_bytes)
  uint16_t* scales;  // (tiles,) bf16 with 4 significant bits
  int32_t* bad;
};
int record_cuda(const DeviceRecord& record, const Place& where);

// As replay_cpu. Codes begin at multiples of 16 bytes.
struct DeviceDifference {
  const uint8_t* codes;
  const uint16_t* scales;
  float coefficient;  // not 0
  int32_t reserved;
};
struct DeviceReplay {
  const DeviceTensor* out;    // (count,) float32, updated
  const int64_t* numel;       // (count,)
  const int64_t* tile_begin;  // (count,) first tile of each tensor
  int64_t count, tiles;
  const DeviceDifference* rows;  // (n,)
  int64_t n;
  bool ones;  // all coefficients are 1: the same bits, faster
  int bits;
};
int replay_cuda(const DeviceReplay& replay, const Place& where);

// As project_cpu. Workspaces: partial (items, n), sums (groups, n).
int project_cuda(const BasisView& basis, const DeviceTensor* grads, const DeviceWork& work,
                 float* partial, double* sums, float* c, const Place& where);

// As reconstruct_cpu; center may be null. Workspace: x_rows (L, n).
int reconstruct_cuda(const BasisView& basis, const float* x, const DeviceTensor* center,
                     const DeviceTensor* out, const DeviceWork& work, float* x_rows,
                     const Place& where);

// As step_cpu, in one kernel: segments are projected, updated and reconstructed in an order in
// which the second read of a segment's codes finds in the second-level cache what fits there.
struct StepWorkspace {
  float* partial;        // (items, n)
  double* sums;          // (groups, n)
  float* x_rows;         // (L, n)
  int32_t* counters;     // (step_counters(groups, L),)
  const int32_t* tasks;  // (2 * items,) from make_tasks(); null: project, update and reconstruct
                         // run one after the other, with the same results
  int64_t window;        // from step_window()
  const float* steps_before;  // AdamW: number of steps before this one, in device memory, in place
                              // of Update::step: for captured graphs; or null
  float* corrections;         // (2,), with steps_before
};
int step_cuda(const BasisView& basis, const DeviceTensor* grads, const Update& update,
              const Coefficients& coefficients, const DeviceTensor* center, const DeviceTensor* out,
              const DeviceWork& work, const StepWorkspace& space, float* c, const Place& where);
constexpr int64_t step_counters(int64_t groups, int64_t num_segments) {
  return 1 + groups + 2 * num_segments;
}
// Blocks of the step kernel that a device runs at once, which is the window that make_tasks()
// wants; or minus the CUDA error.
int step_window(int64_t n, int bits, int device);

// How project, reconstruct and step are launched, with the same results: others than these numbers
// are for measurements side by side, and are set while nothing is launched.
struct CudaVariant {
  int ring_kib = 10;  // of a warp's ring, if two slots fit. 10: four blocks of reconstruct share a
                      // multiprocessor of Hopper
  bool fence = true;  // between reading a slot and its next copy
  int step_blocks = 3;  // of step, on a multiprocessor: more have more on its way, and leave less
                        // of a segment in the second-level cache
};
CudaVariant& cuda_variant();

// As orthonormalize_pass_cpu without `fast`: float64, products with probes float32 (n > 256:
// float64). out may be null; r counts only with a transform. Columns of each tensor come in chunks
// of kOrthonormalizeChunk; tensor k begins with chunk chunk_begin[k], and there are `chunks` in
// all.
constexpr int kOrthonormalizeChunk = 32;
struct GramSchmidtPlan {
  int64_t parts, stride;  // partial sums
  int64_t space;
  int64_t per_block;  // chunks of a block, or of a panel
};
// It depends on its arguments alone.
GramSchmidtPlan orthonormalize_plan(int64_t n, int64_t r, int64_t chunks, bool transform,
                                    bool write);
struct GramSchmidtWorkspace {
  const int64_t* chunk_begin;  // (count,)
  int64_t chunks;
  double* partials;  // (parts, stride)
  double* space;     // (space,)
};
int orthonormalize_pass_cuda(const DeviceRows& rows, const GramSchmidtPass& pass,
                             const DeviceTensor* out, const GramSchmidtWorkspace& space,
                             const Place& where);

const char* cuda_error_name(int error);
const char* cuda_error_string(int error);
int cuda_device_count();
#endif

}  // namespace twa
