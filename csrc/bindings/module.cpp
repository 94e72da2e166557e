// The native module of twa_kernels: what CPU and CUDA share. help() of a function has its operands.
#include "operands.h"

#if !defined(TWA_MODULE)
#define TWA_MODULE _C
#endif

namespace twa {
namespace bindings {
namespace {

template <class T>
py::bytes bytes_of(const std::vector<T>& v) {
  return py::bytes(reinterpret_cast<const char*>(v.data()), v.size() * sizeof(T));
}

Update make_update(const std::string& rule, bool maximize, double lr, double weight_decay,
                   double momentum, double dampening, bool nesterov, double beta1, double beta2,
                   double eps, int64_t step) {
  if (rule != "sgd" && rule != "adamw") throw py::value_error("rule: expected sgd or adamw");
  Update u{};
  u.rule = rule == "adamw" ? Update::Rule::adamw : Update::Rule::sgd;
  u.maximize = maximize, u.lr = lr, u.weight_decay = weight_decay, u.step = step;
  u.momentum = momentum, u.dampening = dampening, u.nesterov = nesterov;
  u.beta1 = beta1, u.beta2 = beta2, u.eps = eps;
  return u;
}

HostWork host_work(const std::vector<int64_t>& numel, py::handle tile_segment, int64_t segments,
                   int bits) {
  const auto* of_tile = array<int32_t>(tile_segment, tiles_of(numel), "tile_segment");
  return make_work(numel.data(), static_cast<int64_t>(numel.size()), of_tile, segments, bits);
}

// Arrays as bytes, under the names of DeviceWork's members.
py::dict arrays_of(const HostWork& w) {
  return py::dict(
      "item_tensor"_a = bytes_of(w.item_tensor), "item_tile"_a = bytes_of(w.item_tile),
      "item_tiles"_a = bytes_of(w.item_tiles), "item_segment"_a = bytes_of(w.item_segment),
      "item_group"_a = bytes_of(w.item_group), "group_begin"_a = bytes_of(w.group_begin),
      "segment_groups"_a = bytes_of(w.segment_groups), "numel"_a = bytes_of(w.numel),
      "tile_begin"_a = bytes_of(w.tile_begin));
}

}  // namespace

PYBIND11_MODULE(TWA_MODULE, m) {
  torch();
  m.doc() = "Native kernels of twa_kernels. Use the functions of the package, not these.";
  py::class_<Tensors>(m, "Tensors", py::module_local())
      .def(py::init<const py::object&>(), "tensors"_a)
      .def_readonly("odd", &Tensors::odd)
      .def_property_readonly("key", &Tensors::key)
      .def("are", &Tensors::are, py::kw_only(), "numels"_a, "device"_a, "index"_a, "absent"_a)
      .def("first_shared", &Tensors::shared)
      .def("__len__", &Tensors::count);
  py::class_<Rows>(m, "Rows", py::module_local())
      .def(py::init<const Tensors&, const Tensors*, std::vector<int64_t>, int64_t>(), py::kw_only(),
           "rows"_a, "center"_a.none(true), "numel"_a, "n"_a, py::keep_alive<1, 2>(),
           py::keep_alive<1, 3>());
  py::class_<Basis>(m, "Basis", py::module_local())
      .def(py::init<py::handle, py::handle, py::handle, py::handle, std::vector<int64_t>, int>(),
           py::kw_only(), "codes"_a, "scales"_a, "row_scale"_a, "tile_segment"_a, "numel"_a,
           "bits"_a);
  py::class_<Update>(m, "Update", py::module_local())
      .def(py::init(&make_update), py::kw_only(), "rule"_a, "maximize"_a, "lr"_a, "weight_decay"_a,
           "momentum"_a, "dampening"_a, "nesterov"_a, "beta1"_a, "beta2"_a, "eps"_a, "step"_a);
  py::class_<HostWork>(m, "HostWork", py::module_local())
      .def(py::init(&host_work), py::kw_only(), "numel"_a, "tile_segment"_a, "segments"_a, "bits"_a)
      .def_property_readonly("arrays", &arrays_of)
      .def("tasks",
           [](const HostWork& w, int64_t window) { return bytes_of(make_tasks(w, window)); });
  m.def("usual", &usual, "tensors"_a);
  m.def("first_shared", py::overload_cast<const py::object&>(&first_shared), "tensors"_a);
  m.def("get_code", [](int bits, const std::string& row, int column) {
    return get_code(bits, reinterpret_cast<const uint8_t*>(row.data()), column);
  });
  m.def("level", &level);
  bind_cpu(m);
#if defined(TWA_WITH_CUDA)
  m.attr("with_cuda") = true;
  bind_cuda(m);
#else
  m.attr("with_cuda") = false;
#endif
}

}  // namespace bindings
}  // namespace twa
