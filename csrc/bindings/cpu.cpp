// The C++ kernels for CPUs.
#include "../guard.h"
#include "operands.h"

namespace twa {
namespace bindings {
namespace {

// f() while other threads of Python run.
template <class F>
void run(const F& f) {
  Status status;
  {
    py::gil_scoped_release release;
    status = f();
  }
  if (status != Status::ok)
    throw py::value_error(
        "kernel refused its arguments: sizes, bits, segments or tensors do not fit the basis");
}

void average(const Tensors& rows, const std::vector<double>& weights, py::handle out, int threads) {
  rows.refuse_odd("rows");
  if (weights.size() != rows.data.size())
    throw py::value_error("average: as many weights as rows expected");
  const TensorTable table = rows.table(rows.numel.data());
  auto* to = array<float>(out, rows.count() ? rows.numel[0] : 0, "out");
  run([&] { return average_cpu(table, weights.data(), to, threads); });
}

struct Target {
  PackTarget view;
  int64_t n, tiles;

  Target(py::handle tile_segment, int bits, py::handle codes, py::handle scales, py::handle sum_sq,
         py::handle max_scale)
      : n(size_of(sum_sq, 0)), tiles(numel_of(tile_segment)) {
    check_bits(bits);
    const int64_t segments = size_of(sum_sq, 1);
    view = {array<int32_t>(tile_segment, tiles, "tile_segment"),
            segments,
            bits,
            array<uint8_t>(codes, tiles * n * row_bytes(bits), "codes"),
            array<uint16_t>(scales, tiles * n, "scales"),
            array<double>(sum_sq, n * segments, "sum_sq"),
            array<float>(max_scale, n * segments, "max_scale")};
  }
};

py::object pack(const Rows& rows, const std::vector<double>& weights, const Target& target,
                int threads) {
  if (rows.n != target.n || tiles_of(rows.numel) != target.tiles)
    throw py::value_error("pack: rows and target of different sizes");
  if (!weights.empty() && weights.size() != static_cast<size_t>(rows.n))
    throw py::value_error("pack: as many weights as rows expected");
  Where where{};
  Status status = Status::ok;
  run([&] {
    status = pack_cpu(rows.view(), weights.empty() ? nullptr : weights.data(), target.view, &where,
                      threads);
    return status == Status::not_finite ? Status::ok : status;
  });
  if (status == Status::not_finite) return py::make_tuple(where.row, where.tensor, where.column);
  return py::none();
}

// How many scales became zero.
int64_t finish_scales(py::handle scales, py::handle tile_segment, py::handle exponent,
                      py::handle out, int threads) {
  const int64_t tiles = size_of(scales, 0), n = size_of(scales, 1), segments = size_of(exponent, 0);
  const auto* from = array<uint16_t>(scales, tiles * n, "scales");
  const auto* of_tiles = array<int32_t>(tile_segment, tiles, "tile_segment");
  const auto* of_rows = array<int32_t>(exponent, segments * n, "exponent");
  auto* to = array<uint8_t>(out, tiles * n, "out");
  int64_t lost = 0;
  run([&] {
    return finish_scales_cpu(from, of_tiles, of_rows, tiles, n, segments, to, &lost, threads);
  });
  return lost;
}

// (tensor, column) of the first weight that is not finite, or None.
py::object record(const Tensors& weights, const Tensors& reference, int bits, py::handle codes,
                  py::handle scales, int threads) {
  check_bits(bits);
  weights.refuse_odd("weights");
  check_sizes(reference, weights.numel, 1, "reference");
  const int64_t tiles = tiles_of(weights.numel);
  auto* to_codes = array<uint8_t>(codes, tiles * row_bytes(bits), "codes");
  auto* to_scales = array<uint16_t>(scales, tiles, "scales");
  Where where{};
  Status status = Status::ok;
  run([&] {
    status =
        record_cpu(weights.table(weights.numel.data()), reference.table(reference.numel.data()),
                   bits, to_codes, to_scales, &where, threads);
    return status == Status::not_finite ? Status::ok : status;
  });
  if (status == Status::not_finite) return py::make_tuple(where.tensor, where.column);
  return py::none();
}

void replay(const Tensors& out, const py::list& codes, const py::list& scales,
            const std::vector<float>& coefficients, int bits, int threads) {
  check_bits(bits);
  out.refuse_odd("out");
  const int64_t tiles = tiles_of(out.numel);
  if (codes.size() != coefficients.size() || scales.size() != coefficients.size())
    throw py::value_error("replay: as many codes and scales as coefficients expected");
  std::vector<Difference> rows;
  for (size_t r = 0; r < coefficients.size(); ++r)
    rows.push_back({array<uint8_t>(codes[r], tiles * row_bytes(bits), "codes"),
                    array<uint16_t>(scales[r], tiles, "scales")});
  run([&] {
    return replay_cpu(out.table(out.numel.data()), rows.data(), coefficients.data(),
                      static_cast<int64_t>(rows.size()), bits, threads);
  });
}

void unpack(const Basis& basis, const Tensors& out, int threads) {
  std::vector<int64_t> sizes;
  for (const int64_t size : basis.numel) sizes.push_back(size * basis.view.n);
  check_sizes(out, sizes, 1, "out");
  const TensorTable table = out.table(basis.numel.data());
  run([&] { return unpack_cpu(basis.view, table, threads); });
}

void project(const Basis& basis, const Tensors& grads, py::handle c, int threads) {
  const TensorTable table = basis.table(grads, "grads", true);
  auto* to = array<float>(c, basis.coefficients(), "c");
  run([&] { return project_cpu(basis.view, table, to, threads); });
}

void reconstruct(const Basis& basis, py::handle x, const Tensors* center, const Tensors& out,
                 int threads) {
  const TensorTable from = basis.table(center, "center"), to = basis.table(out, "out");
  const auto* coefficients = array<float>(x, basis.coefficients(), "x");
  run([&] { return reconstruct_cpu(basis.view, coefficients, from, to, threads); });
}

void step(const Basis& basis, const Tensors& grads, const Update& update, py::handle x,
          py::handle first, py::handle second, const Tensors* center, const Tensors& out,
          py::handle c, int threads) {
  const Coefficients coefficients = coefficients_of(basis, x, first, second);
  const TensorTable g = basis.table(grads, "grads", true);
  const TensorTable from = basis.table(center, "center"), to = basis.table(out, "out");
  auto* projected = array<float>(c, basis.coefficients(), "c");
  run([&] { return step_cpu(basis.view, g, update, coefficients, from, to, projected, threads); });
}

void orthonormalize_pass(const Rows& rows, py::handle parent, py::handle transform,
                         py::handle probes, int64_t first, bool fast, const Tensors* out,
                         py::handle gram, py::handle norms, int threads) {
  const GramSchmidtPass pass =
      pass_of(rows.n, parent, transform, probes, first, fast, gram, norms, out != nullptr);
  TensorTable table{};
  if (out) {
    check_sizes(*out, rows.numel, pass.r, "out");
    table = out->table(out->numel.data());
  }
  run([&] { return orthonormalize_pass_cpu(rows.view(), pass, table, threads); });
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_cpu(py::module_& m) {
  py::class_<Target>(m, "PackTarget", py::module_local())
      .def(py::init<py::handle, int, py::handle, py::handle, py::handle, py::handle>(),
           py::kw_only(), "tile_segment"_a, "bits"_a, "codes"_a, "scales"_a, "sum_sq"_a,
           "max_scale"_a);
  m.def("average", &average, py::kw_only(), "rows"_a, "weights"_a, "out"_a, "threads"_a);
  m.def("pack", &pack, py::kw_only(), "rows"_a, "weights"_a, "target"_a, "threads"_a);
  m.def("finish_scales", &finish_scales, py::kw_only(), "scales"_a, "tile_segment"_a, "exponent"_a,
        "out"_a, "threads"_a);
  m.def("record", &record, py::kw_only(), "weights"_a, "reference"_a, "bits"_a, "codes"_a,
        "scales"_a, "threads"_a);
  m.def("replay", &replay, py::kw_only(), "out"_a, "codes"_a, "scales"_a, "coefficients"_a,
        "bits"_a, "threads"_a);
  m.def("unpack", &unpack, py::kw_only(), "basis"_a, "out"_a, "threads"_a);
  m.def("project", &project, py::kw_only(), "basis"_a, "grads"_a, "c"_a, "threads"_a);
  m.def("reconstruct", &reconstruct, py::kw_only(), "basis"_a, "x"_a, "center"_a.none(true),
        "out"_a, "threads"_a);
  m.def("step", &step, py::kw_only(), "basis"_a, "grads"_a, "update"_a, "x"_a, "first"_a,
        "second"_a, "center"_a.none(true), "out"_a, "c"_a, "threads"_a);
  m.def("orthonormalize_pass", &orthonormalize_pass, py::kw_only(), "rows"_a, "parent"_a,
        "transform"_a, "probes"_a, "first"_a, "fast"_a, "out"_a.none(true), "gram"_a, "norms"_a,
        "threads"_a);
  m.def("cpu_isa", &cpu_isa);
  m.def("cpu_isas", &cpu_isas);
  m.def(
      "multiply_adds",
      [](int64_t turns, bool fast, int threads) { return multiply_adds(turns, fast, threads); },
      "turns"_a, "fast"_a, "threads"_a, py::call_guard<py::gil_scoped_release>());
  m.def(
      "read_bytes",
      [](uintptr_t data, int64_t bytes, int threads, bool ahead) {
        py::gil_scoped_release release;
        return read_bytes(pointer<const void>(data), bytes, threads, ahead);
      },
      "data"_a, "bytes"_a, "threads"_a, "ahead"_a = false);
  m.def("copy_bytes", [](uintptr_t from, uintptr_t to, int64_t bytes, int threads) {
    py::gil_scoped_release release;
    copy_bytes(pointer<const void>(from), pointer<void>(to), bytes, threads);
  });
  m.def("clock_rate", [] {
    py::gil_scoped_release release;
    return clock_rate();
  });
  m.def("advise_huge_pages",
        [](uintptr_t data, int64_t bytes) { advise_huge_pages(pointer<void>(data), bytes); });
  m.def(
      "guard",
      [](const py::buffer& mapped) {
        const py::buffer_info info = mapped.request();
        return guard(info.ptr, info.size * info.itemsize);
      },
      "mapped"_a);
  m.def("unguard", &unguard, "number"_a);
  m.def("is_torn", &is_torn, "number"_a);
  m.def("torn_ranges", &torn_ranges);
}

}  // namespace bindings
}  // namespace twa
