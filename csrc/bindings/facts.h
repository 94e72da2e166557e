// What a torch tensor is: address, dtype, device, size, whether it is contiguous.
//
// The module does not link torch, so that one build serves every version of it. A tensor is asked
// by DLPack's C exchange functions where its type has them (30 ns), else by its Python methods. The
// structs are those of DLPack 1.x: github.com/dmlc/dlpack.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace twa {
namespace bindings {

namespace py = pybind11;

struct Kind {
  uint8_t code, bits;  // code: 0 int, 1 unsigned, 2 float, 4 bfloat
  bool operator==(const Kind& other) const { return code == other.code && bits == other.bits; }
};
constexpr Kind kFloat32{2, 32}, kFloat64{2, 64}, kFloat16{2, 16}, kBfloat16{4, 16};
constexpr Kind kUint8{1, 8}, kInt32{0, 32}, kInt64{0, 64};
constexpr int kDeviceCpu = 1, kDeviceCuda = 2, kDeviceRocm = 10;

struct Facts {
  void* data;
  Kind kind;
  int device, index;
  int64_t numel;
  bool contiguous;
};

namespace exchange {
struct Device {
  int32_t type, index;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};
using FromPython = int (*)(void* object, Tensor* out);  // 0, or an error that Python has set
struct Functions {
  uint32_t major, minor;
  void* older;
  void *allocate, *managed_from_python, *managed_to_python;
  FromPython from_python;
};
}  // namespace exchange

// torch, as far as it is needed; made when the module is loaded.
struct Torch {
  py::handle tensor, parameter;
  exchange::FromPython from_python = nullptr;
  PyObject *data_ptr, *numel, *is_contiguous, *dtype, *device, *type, *index;
  struct Named {
    const char* name;
    py::handle dtype;
    Kind kind;
  } kinds[7];

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    tensor = py::object(torch.attr("Tensor")).release();
    parameter = py::object(torch.attr("nn").attr("Parameter")).release();
    const auto text = [](const char* s) { return PyUnicode_InternFromString(s); };
    data_ptr = text("data_ptr"), numel = text("numel"), is_contiguous = text("is_contiguous");
    dtype = text("dtype"), device = text("device"), type = text("type"), index = text("index");
    const auto named = [&](const char* name, Kind kind) {
      return Named{name, py::object(torch.attr(name)).release(), kind};
    };
    const Named all[] = {named("float32", kFloat32), named("float64", kFloat64),
                         named("float16", kFloat16), named("bfloat16", kBfloat16),
                         named("uint8", kUint8),     named("int32", kInt32),
                         named("int64", kInt64)};
    for (int k = 0; k < 7; ++k) kinds[k] = all[k];
    if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return;
    const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    const char* name = "dlpack_exchange_api";
    if (!PyCapsule_IsValid(capsule.ptr(), name)) return;
    const auto* functions =
        static_cast<const exchange::Functions*>(PyCapsule_GetPointer(capsule.ptr(), name));
    if (functions->major == 1) from_python = functions->from_python;
  }
  const char* name_of(Kind kind) const {
    for (const Named& k : kinds)
      if (k.kind == kind) return k.name;
    return "another dtype";
  }
};
inline const Torch& torch() {
  static const Torch* const made = new Torch;  // never destroyed: Python may be gone by then
  return *made;
}

inline py::object checked(PyObject* answer) {
  if (!answer) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer);
}

// By the methods that any tensor has.
inline Facts facts_by_methods(py::handle t) {
  const Torch& names = torch();
  const auto call = [&](PyObject* name) {
    return checked(PyObject_CallMethodNoArgs(t.ptr(), name));
  };
  const auto get = [&](py::handle from, PyObject* name) {
    return checked(PyObject_GetAttr(from.ptr(), name));
  };
  Facts f{};
  const py::object dtype = get(t, names.dtype), device = get(t, names.device);
  for (const Torch::Named& k : names.kinds)
    if (dtype.is(k.dtype)) f.kind = k.kind;
  const std::string type = get(device, names.type).cast<std::string>();
  f.device = type == "cpu" ? kDeviceCpu : type == "cuda" ? kDeviceCuda : 0;
  const py::object index = get(device, names.index);
  f.index = index.is_none() ? 0 : index.cast<int>();
  f.numel = PyLong_AsLongLong(call(names.numel).ptr());
  f.contiguous = call(names.is_contiguous).ptr() == Py_True;
  f.data = PyLong_AsVoidPtr(call(names.data_ptr).ptr());
  return f;
}

// Whether this is a torch.Tensor or a Parameter, and nothing derived from them.
inline bool is_torchs_own(py::handle t) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(t.ptr()));
  return type == torch().tensor.ptr() || type == torch().parameter.ptr();
}

inline Facts facts_of(py::handle t) {
  const Torch& names = torch();
  if (!names.from_python || !is_torchs_own(t)) return facts_by_methods(t);
  exchange::Tensor found{};
  if (names.from_python(t.ptr(), &found) != 0) throw py::error_already_set();
  Facts f{static_cast<char*>(found.data) + found.byte_offset,
          {found.dtype.code, found.dtype.bits},
          found.device.type == kDeviceRocm ? kDeviceCuda : found.device.type,
          found.device.index,
          1,
          true};
  for (int d = found.ndim - 1; d >= 0; --d) {
    if (found.shape[d] != 1 && found.strides[d] != f.numel) f.contiguous = false;
    f.numel *= found.shape[d];
  }
  if (f.numel == 0) f.contiguous = true, f.data = nullptr;
  return f;
}

}  // namespace bindings
}  // namespace twa
