// The CUDA kernels. Tensors are on the device; `device` is its number, `stream` a handle of it.
#include "operands.h"

namespace twa {
namespace bindings {
namespace {

void check(const char* op, int error, int device) {
  if (error != 0)
    throw std::runtime_error(std::string(op) + ": CUDA error " + cuda_error_name(error) +
                             " on device " + std::to_string(device) + " (" +
                             cuda_error_string(error) + "); nothing was computed");
}
Place place_of(int device, uintptr_t stream) { return {device, reinterpret_cast<void*>(stream)}; }

// A table of `count` tensors in device memory, (count, 2) int64, as write_table makes it.
static_assert(sizeof(DeviceTensor) == 16, "a row of a table is two int64");
DeviceTensor* table(py::handle tensor, int64_t count, const char* name) {
  return reinterpret_cast<DeviceTensor*>(array_or_null<int64_t>(tensor, 2 * count, name));
}

void put(const std::vector<int64_t>& numbers, py::handle to, const char* name, int device,
         uintptr_t stream) {
  const auto count = static_cast<int64_t>(numbers.size());
  check(
      "table",
      table_cuda(numbers.data(), count, array<int64_t>(to, count, name), place_of(device, stream)),
      device);
}
void append(std::vector<int64_t>& numbers, const void* address) {
  numbers.push_back(static_cast<int64_t>(reinterpret_cast<uintptr_t>(address)));
}
void write_table(const Tensors& tensors, py::handle to, int device, uintptr_t stream) {
  tensors.refuse_odd("tensors");
  std::vector<int64_t> numbers;
  for (int64_t k = 0; k < tensors.count(); ++k) {
    append(numbers, tensors.numel[k] ? tensors.data[k] : nullptr);
    numbers.push_back(static_cast<int64_t>(tensors.dtype[k]));
  }
  put(numbers, to, "to", device, stream);
}
void write_numbers(const std::vector<int64_t>& numbers, py::handle to, int device,
                   uintptr_t stream) {
  put(numbers, to, "to", device, stream);
}

// Rows of replay, (rows, 3) int64: addresses of codes and scales, the bits of the coefficient.
static_assert(sizeof(DeviceDifference) == 24, "a row is three int64");
void write_rows(const py::list& codes, const py::list& scales,
                const std::vector<float>& coefficients, int64_t tiles, int bits, py::handle to,
                int device, uintptr_t stream) {
  check_bits(bits);
  if (codes.size() != coefficients.size() || scales.size() != coefficients.size())
    throw py::value_error("replay: as many codes and scales as coefficients expected");
  std::vector<int64_t> numbers;
  for (size_t r = 0; r < coefficients.size(); ++r) {
    const auto* address = array<uint8_t>(codes[r], tiles * row_bytes(bits), "codes");
    if (reinterpret_cast<uintptr_t>(address) % 16)
      throw py::value_error("codes[" + std::to_string(r) + "]: expected a multiple of 16 bytes");
    append(numbers, address);
    append(numbers, array<uint16_t>(scales[r], tiles, "scales"));
    numbers.push_back(static_cast<int64_t>(float_bits(coefficients[r])));
  }
  put(numbers, to, "to", device, stream);
}

struct Work {
  DeviceWork view;
  int64_t tensors;

  Work(py::handle item_tensor, py::handle item_tile, py::handle item_tiles, py::handle item_segment,
       py::handle item_group, py::handle group_begin, py::handle segment_groups, py::handle numel,
       py::handle tile_begin)
      : tensors(numel_of(numel)) {
    const int64_t items = numel_of(item_tile), groups = numel_of(group_begin) - 1;
    view = {array<int32_t>(item_tensor, items, "item_tensor"),
            array<int64_t>(item_tile, items, "item_tile"),
            array<int32_t>(item_tiles, items, "item_tiles"),
            array<int32_t>(item_segment, items, "item_segment"),
            array<int32_t>(item_group, items, "item_group"),
            array<int32_t>(group_begin, groups + 1, "group_begin"),
            array<int32_t>(segment_groups, numel_of(segment_groups), "segment_groups"),
            array<int64_t>(numel, tensors, "numel"),
            array<int64_t>(tile_begin, tensors, "tile_begin"),
            items,
            groups};
  }
};

struct RowsOnDevice {
  DeviceRows view;
  RowsOnDevice(py::handle rows, py::handle center, py::handle numel, int64_t n) {
    const int64_t count = numel_of(numel);
    view = {table(rows, count * n, "rows"), table(center, count, "center"),
            array<int64_t>(numel, count, "numel"), count, n};
  }
};

void pack(const RowsOnDevice& rows, py::handle tile_begin, py::handle unit_begin, int64_t units,
          py::handle tile_segment, int bits, py::handle codes, py::handle scales, py::handle sum_sq,
          py::handle max_scale, py::handle squares, py::handle pieces, py::handle bad, int device,
          uintptr_t stream) {
  check_bits(bits);
  const int64_t n = rows.view.n, count = rows.view.count, tiles = size_of(codes, 0),
                segments = size_of(sum_sq, 1);
  const DevicePackTarget target{array<int64_t>(tile_begin, count, "tile_begin"),
                                array<int64_t>(unit_begin, count, "unit_begin"),
                                array<int32_t>(tile_segment, tiles, "tile_segment"),
                                tiles,
                                units,
                                segments,
                                bits,
                                array<uint8_t>(codes, tiles * n * row_bytes(bits), "codes"),
                                array<uint16_t>(scales, tiles * n, "scales"),
                                array<double>(sum_sq, n * segments, "sum_sq"),
                                array<float>(max_scale, n * segments, "max_scale"),
                                array<double>(squares, tiles * n, "squares"),
                                array<int32_t>(pieces, units * (kBlockTiles + 1), "pieces"),
                                array<int32_t>(bad, 1, "bad")};
  check("pack", pack_cuda(rows.view, target, place_of(device, stream)), device);
}

void record(py::handle weights, py::handle reference, py::handle numel, py::handle tile_begin,
            int bits, py::handle codes, py::handle scales, py::handle bad, int device,
            uintptr_t stream) {
  check_bits(bits);
  const int64_t count = numel_of(numel), tiles = numel_of(scales);
  const DeviceRecord record{table(weights, count, "weights"),
                            table(reference, count, "reference"),
                            array<int64_t>(numel, count, "numel"),
                            array<int64_t>(tile_begin, count, "tile_begin"),
                            count,
                            tiles,
                            bits,
                            array<uint8_t>(codes, tiles * row_bytes(bits), "codes"),
                            array<uint16_t>(scales, tiles, "scales"),
                            array<int32_t>(bad, 1, "bad")};
  check("record", record_cuda(record, place_of(device, stream)), device);
}

void replay(py::handle out, py::handle numel, py::handle tile_begin, int64_t tiles, int bits,
            py::handle rows, bool ones, int device, uintptr_t stream) {
  check_bits(bits);
  const int64_t count = numel_of(numel), n = size_of(rows, 0);
  const DeviceReplay replay{
      table(out, count, "out"),
      array<int64_t>(numel, count, "numel"),
      array<int64_t>(tile_begin, count, "tile_begin"),
      count,
      tiles,
      reinterpret_cast<const DeviceDifference*>(array<int64_t>(rows, 3 * n, "rows")),
      n,
      ones,
      bits};
  check("replay", replay_cuda(replay, place_of(device, stream)), device);
}

void project(const Basis& basis, py::handle grads, const Work& work, py::handle partial,
             py::handle sums, py::handle c, int device, uintptr_t stream) {
  const int64_t n = basis.view.n;
  const int error =
      project_cuda(basis.view, table(grads, work.tensors, "grads"), work.view,
                   array<float>(partial, work.view.items * n, "partial"),
                   array<double>(sums, work.view.groups * n, "sums"),
                   array<float>(c, basis.coefficients(), "c"), place_of(device, stream));
  check("project", error, device);
}

void reconstruct(const Basis& basis, py::handle x, py::handle center, py::handle out,
                 const Work& work, py::handle x_rows, int device, uintptr_t stream) {
  const int error = reconstruct_cuda(
      basis.view, array<float>(x, basis.coefficients(), "x"), table(center, work.tensors, "center"),
      table(out, work.tensors, "out"), work.view,
      array<float>(x_rows, basis.coefficients(), "x_rows"), place_of(device, stream));
  check("reconstruct", error, device);
}

struct Workspace {
  StepWorkspace view;
  Workspace(const Basis& basis, const Work& work, py::handle partial, py::handle sums,
            py::handle x_rows, py::handle counters, py::handle tasks, int64_t window,
            py::handle steps_before, py::handle corrections) {
    const int64_t items = work.view.items, groups = work.view.groups, n = basis.view.n;
    view = {array<float>(partial, items * n, "partial"),
            array<double>(sums, groups * n, "sums"),
            array<float>(x_rows, basis.coefficients(), "x_rows"),
            array<int32_t>(counters, step_counters(groups, basis.view.num_segments), "counters"),
            array_or_null<int32_t>(tasks, 2 * items, "tasks"),
            window,
            array_or_null<float>(steps_before, 1, "steps_before"),
            array<float>(corrections, 2, "corrections")};
  }
};

void step(const Basis& basis, py::handle grads, const Update& update, py::handle x,
          py::handle first, py::handle second, py::handle center, py::handle out, const Work& work,
          const Workspace& workspace, py::handle c, int device, uintptr_t stream) {
  const int error =
      step_cuda(basis.view, table(grads, work.tensors, "grads"), update,
                coefficients_of(basis, x, first, second), table(center, work.tensors, "center"),
                table(out, work.tensors, "out"), work.view, workspace.view,
                array<float>(c, basis.coefficients(), "c"), place_of(device, stream));
  check("step", error, device);
}

void orthonormalize_pass(const RowsOnDevice& rows, py::handle parent, py::handle transform,
                         py::handle probes, int64_t first, py::handle out, py::handle chunk_begin,
                         int64_t chunks, py::handle partials, py::handle space, py::handle gram,
                         py::handle norms, int device, uintptr_t stream) {
  const int64_t n = rows.view.n, count = rows.view.count;
  const GramSchmidtPass pass =
      pass_of(n, parent, transform, probes, first, false, gram, norms, !out.is_none());
  const GramSchmidtPlan plan =
      orthonormalize_plan(n, pass.r, chunks, !transform.is_none(), !out.is_none());
  const GramSchmidtWorkspace workspace{
      array<int64_t>(chunk_begin, count, "chunk_begin"), chunks,
      array<double>(partials, plan.parts * plan.stride, "partials"),
      array<double>(space, plan.space, "space")};
  const int error = orthonormalize_pass_cuda(rows.view, pass, table(out, count * pass.r, "out"),
                                             workspace, place_of(device, stream));
  check("orthonormalize_pass", error, device);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("cuda_architectures") = TWA_CUDA_ARCHITECTURES;
  m.attr("orthonormalize_chunk") = kOrthonormalizeChunk;
  using py::handle;
  py::class_<Work>(m, "Work", py::module_local())
      .def(py::init<handle, handle, handle, handle, handle, handle, handle, handle, handle>(),
           py::kw_only(), "item_tensor"_a, "item_tile"_a, "item_tiles"_a, "item_segment"_a,
           "item_group"_a, "group_begin"_a, "segment_groups"_a, "numel"_a, "tile_begin"_a);
  py::class_<RowsOnDevice>(m, "DeviceRows", py::module_local())
      .def(py::init<handle, handle, handle, int64_t>(), py::kw_only(), "rows"_a, "center"_a,
           "numel"_a, "n"_a);
  py::class_<Workspace>(m, "StepWorkspace", py::module_local())
      .def(py::init<const Basis&, const Work&, handle, handle, handle, handle, handle, int64_t,
                    handle, handle>(),
           py::kw_only(), "basis"_a, "work"_a, "partial"_a, "sums"_a, "x_rows"_a, "counters"_a,
           "tasks"_a, "window"_a, "steps_before"_a, "corrections"_a);
  m.def("write_table", &write_table, py::kw_only(), "tensors"_a, "to"_a, "device"_a, "stream"_a);
  m.def("write_numbers", &write_numbers, py::kw_only(), "numbers"_a, "to"_a, "device"_a,
        "stream"_a);
  m.def("write_rows", &write_rows, py::kw_only(), "codes"_a, "scales"_a, "coefficients"_a,
        "tiles"_a, "bits"_a, "to"_a, "device"_a, "stream"_a);
  m.def("record_cuda", &record, py::kw_only(), "weights"_a, "reference"_a, "numel"_a,
        "tile_begin"_a, "bits"_a, "codes"_a, "scales"_a, "bad"_a, "device"_a, "stream"_a);
  m.def("replay_cuda", &replay, py::kw_only(), "out"_a, "numel"_a, "tile_begin"_a, "tiles"_a,
        "bits"_a, "rows"_a, "ones"_a, "device"_a, "stream"_a);
  m.attr("unit_tiles") = kBlockTiles;
  m.def("pack_cuda", &pack, py::kw_only(), "rows"_a, "tile_begin"_a, "unit_begin"_a, "units"_a,
        "tile_segment"_a, "bits"_a, "codes"_a, "scales"_a, "sum_sq"_a, "max_scale"_a, "squares"_a,
        "pieces"_a, "bad"_a, "device"_a, "stream"_a);
  m.def("project_cuda", &project, py::kw_only(), "basis"_a, "grads"_a, "work"_a, "partial"_a,
        "sums"_a, "c"_a, "device"_a, "stream"_a);
  m.def("reconstruct_cuda", &reconstruct, py::kw_only(), "basis"_a, "x"_a, "center"_a, "out"_a,
        "work"_a, "x_rows"_a, "device"_a, "stream"_a);
  m.def("step_cuda", &step, py::kw_only(), "basis"_a, "grads"_a, "update"_a, "x"_a, "first"_a,
        "second"_a, "center"_a, "out"_a, "work"_a, "workspace"_a, "c"_a, "device"_a, "stream"_a);
  m.def("orthonormalize_pass_cuda", &orthonormalize_pass, py::kw_only(), "rows"_a, "parent"_a,
        "transform"_a, "probes"_a, "first"_a, "out"_a, "chunk_begin"_a, "chunks"_a, "partials"_a,
        "space"_a, "gram"_a, "norms"_a, "device"_a, "stream"_a);
  // Rows and columns of the partial sums, and numbers of the other workspace.
  m.def("orthonormalize_plan",
        [](int64_t n, int64_t r, int64_t chunks, bool transform, bool write) {
          const GramSchmidtPlan plan = orthonormalize_plan(n, r, chunks, transform, write);
          return py::make_tuple(plan.parts, plan.stride, plan.space);
        });
  m.def("step_counters", &step_counters);
  m.def("step_window", [](int64_t n, int bits, int device) {
    const int window = step_window(n, bits, device);
    check("step", window < 0 ? -window : 0, device);
    return window;
  });
  const CudaVariant shipped;
  m.def(
      "set_cuda_variant",
      [](int ring_kib, bool fence, int step_blocks) {
        if (ring_kib < 1 || ring_kib > 32 || step_blocks < 1)
          throw py::value_error("expected 1 <= ring_kib <= 32 and step_blocks >= 1, found " +
                                std::to_string(ring_kib) + " and " + std::to_string(step_blocks));
        cuda_variant() = {ring_kib, fence, step_blocks};
      },
      py::kw_only(), "ring_kib"_a = shipped.ring_kib, "fence"_a = shipped.fence,
      "step_blocks"_a = shipped.step_blocks);
  m.def("cuda_device_count", &cuda_device_count);
}

}  // namespace bindings
}  // namespace twa
