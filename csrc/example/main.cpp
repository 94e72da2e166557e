// The kernels from C++, without Python: pack four rows, project a gradient, reconstruct weights; on
// the CPU, and on a GPU where the build has CUDA.
//
//   cmake -S . -B build -DTWA_PYTHON=off && cmake --build build --target twa_example &&
//   build/twa_example
//
// In a project of your own: add_subdirectory(<this repository>) with TWA_PYTHON off, then link
// twa::core, and twa::cuda where that target exists.
#include <cmath>
#include <cstdio>
#include <vector>

#include "../twa.h"

#if defined(TWA_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace {

constexpr int64_t kRows = 4, kSegments = 1;
constexpr int kBits = 8;
const std::vector<int64_t> kNumel = {1000, 300};  // two tensors

// A packed basis in host memory.
struct Basis {
  std::vector<uint8_t> codes, scales;
  std::vector<float> row_scale;
  std::vector<int32_t> tile_segment;
  twa::BasisView view() const {
    return {codes.data(),        scales.data(), row_scale.data(),
            tile_segment.data(), kRows,         static_cast<int64_t>(tile_segment.size()),
            kSegments,           kBits};
  }
};

// Scale of a row whose largest is `most`: a power of two that brings it into e4m3's range. Scales
// have 4 significant bits, so what is left is exact.
uint8_t to_e4m3(float v) {
  for (int code = 0; code < 0x7f; ++code)
    if (twa::e4m3_to_float(static_cast<uint8_t>(code)) == v) return static_cast<uint8_t>(code);
  return 0;
}

bool pack(const std::vector<std::vector<float>>& rows,
          Basis& basis) {  // rows[k * kRows + i]: row i of tensor k
  int64_t tiles = 0;
  for (const int64_t numel : kNumel) tiles += twa::num_tiles(numel);
  basis.tile_segment.assign(tiles, 0), basis.codes.resize(tiles * kRows * twa::row_bytes(kBits)),
      basis.scales.resize(tiles * kRows);
  std::vector<uint16_t> scales(tiles * kRows);
  std::vector<double> sum_sq(kRows * kSegments, 0.0);
  std::vector<float> most(kRows * kSegments, 0.0f);
  std::vector<void*> data;
  for (const auto& row : rows) data.push_back(const_cast<float*>(row.data()));
  const std::vector<twa::Dtype> dtype(rows.size(), twa::Dtype::f32);
  twa::RowTable table{};
  table.data = data.data(), table.dtype = dtype.data(), table.numel = kNumel.data();
  table.count = static_cast<int64_t>(kNumel.size()), table.n = kRows;
  twa::PackTarget target{};
  target.tile_segment = basis.tile_segment.data(), target.num_segments = kSegments;
  target.bits = kBits, target.codes = basis.codes.data(), target.scales = scales.data();
  target.sum_sq = sum_sq.data(), target.max_scale = most.data();
  twa::Where where{};
  const twa::Status status = twa::pack_cpu(table, nullptr, target, &where, 1);
  if (status != twa::Status::ok) return false;
  for (int64_t i = 0; i < kRows; ++i)
    basis.row_scale.push_back(most[i] > 0 ? std::exp2(std::floor(std::log2(most[i])) - 8.0f)
                                          : 1.0f);
  for (int64_t k = 0; k < tiles * kRows; ++k)
    basis.scales[k] = to_e4m3(twa::bf16_to_float(scales[k]) / basis.row_scale[k % kRows]);
  return true;
}

// Largest difference from the same sums in float64.
double error_of(const std::vector<float>& values, const std::vector<double>& exact) {
  double most = 0.0, largest = 0.0;
  for (size_t k = 0; k < values.size(); ++k) {
    most = std::fmax(most, std::fabs(values[k] - exact[k]));
    largest = std::fmax(largest, std::fabs(exact[k]));
  }
  return most / largest;
}

}  // namespace

int main() {
  std::vector<std::vector<float>> rows, grads, out;
  uint32_t state = 1;
  const auto random = [&] {
    return static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1.0f;
  };
  for (const int64_t numel : kNumel) {
    for (int64_t i = 0; i < kRows; ++i) rows.emplace_back(numel);
    grads.emplace_back(numel), out.emplace_back(numel);
  }
  for (auto* list : {&rows, &grads})
    for (auto& row : *list)
      for (float& v : row) v = random();
  Basis basis;
  if (!pack(rows, basis)) return std::printf("pack refused its arguments\n"), 1;

  std::vector<void*> grad_data, out_data;
  for (auto& g : grads) grad_data.push_back(g.data());
  for (auto& o : out) out_data.push_back(o.data());
  const std::vector<twa::Dtype> dtype(kNumel.size(), twa::Dtype::f32);
  const int64_t count = static_cast<int64_t>(kNumel.size());
  const twa::TensorTable g{grad_data.data(), kNumel.data(), dtype.data(), count},
      weights{out_data.data(), kNumel.data(), dtype.data(), count};
  std::vector<float> c(kRows * kSegments);
  if (twa::project_cpu(basis.view(), g, c.data(), 2) != twa::Status::ok)
    return std::printf("project refused its arguments\n"), 1;
  std::vector<double> exact(kRows, 0.0);
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = 0; i < kRows; ++i)
      for (int64_t j = 0; j < kNumel[k]; ++j)
        exact[i] += static_cast<double>(rows[k * kRows + i][j]) * grads[k][j];
  std::printf("cpu (%s): project differs from the unpacked rows by %.1e\n", twa::cpu_isa(),
              error_of(c, exact));

  const std::vector<float> x = {1.0f, 0.5f, -0.25f, 2.0f};
  if (twa::reconstruct_cpu(basis.view(), x.data(), {nullptr, kNumel.data(), dtype.data(), count},
                           weights, 2) != twa::Status::ok)
    return std::printf("reconstruct refused its arguments\n"), 1;
  std::vector<double> mixed(kNumel[0], 0.0);
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < kNumel[0]; ++j) mixed[j] += static_cast<double>(x[i]) * rows[i][j];
  std::printf("cpu (%s): reconstruct differs by %.1e\n", twa::cpu_isa(), error_of(out[0], mixed));

#if defined(TWA_WITH_CUDA)
  if (twa::cuda_device_count() == 0) return std::printf("cuda: no device\n"), 0;
  const twa::HostWork host =
      twa::make_work(kNumel.data(), count, basis.tile_segment.data(), kSegments, kBits);
  const auto upload = [](const auto& v) {
    using T = typename std::decay_t<decltype(v)>::value_type;
    void* p = nullptr;  // freed with the process
    if (cudaMalloc(&p, v.size() * sizeof(T)) == cudaSuccess)
      cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice);
    return static_cast<T*>(p);
  };
  std::vector<twa::DeviceTensor> table;
  for (auto& v : grads) table.push_back({upload(v), twa::Dtype::f32, 0});
  const int64_t items = static_cast<int64_t>(host.item_tile.size()),
                groups = static_cast<int64_t>(host.group_begin.size()) - 1;
  const twa::DeviceWork work{upload(host.item_tensor),
                             upload(host.item_tile),
                             upload(host.item_tiles),
                             upload(host.item_segment),
                             upload(host.item_group),
                             upload(host.group_begin),
                             upload(host.segment_groups),
                             upload(host.numel),
                             upload(host.tile_begin),
                             items,
                             groups};
  twa::BasisView device = basis.view();
  device.codes = upload(basis.codes), device.scales = upload(basis.scales),
  device.row_scale = upload(basis.row_scale);
  device.tile_segment = upload(basis.tile_segment);
  float* partial = upload(std::vector<float>(items * kRows));
  double* sums = upload(std::vector<double>(groups * kRows));
  float* result = upload(c);
  const int error =
      twa::project_cuda(device, upload(table), work, partial, sums, result, {0, nullptr});
  if (error != 0) return std::printf("cuda: %s\n", twa::cuda_error_name(error)), 1;
  cudaMemcpy(c.data(), result, c.size() * sizeof(float), cudaMemcpyDeviceToHost);
  std::printf("cuda: project differs from the unpacked rows by %.1e\n", error_of(c, exact));
#endif
  return 0;
}
