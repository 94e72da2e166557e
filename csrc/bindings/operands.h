// What the bindings make of Python's objects: arrays, lists of tensors, a basis.
//
// The module does not link torch, so that one build serves every version of it: a tensor is asked for
// its address, dtype and size through Python. An operand of the wrong dtype or size, or one that is
// not contiguous, raises before a kernel runs; all arguments are passed by name.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../twa.h"

namespace twa {
namespace bindings {

namespace py = pybind11;
using namespace pybind11::literals;

// Asking a tensor -----------------------------------------------------------------------------------

// A method's name, made once.
inline PyObject* name_of(const char* text) { return PyUnicode_InternFromString(text); }

inline py::object ask(py::handle tensor, PyObject* method) {
  PyObject* answer = PyObject_CallMethodNoArgs(tensor.ptr(), method);
  if (!answer) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer);
}
inline void* address_of(py::handle tensor) {
  static PyObject* const name = name_of("data_ptr");
  return PyLong_AsVoidPtr(ask(tensor, name).ptr());
}
inline int64_t numel_of(py::handle tensor) {
  static PyObject* const name = name_of("numel");
  return PyLong_AsLongLong(ask(tensor, name).ptr());
}
// Whether the numbers lie in memory as they are, one after the other.
inline bool is_plain(py::handle tensor) {
  static PyObject* const contiguous = name_of("is_contiguous");
  static PyObject* const negated = name_of("is_neg");
  return ask(tensor, contiguous).is(py::bool_(true)) && ask(tensor, negated).is(py::bool_(false));
}
inline py::object dtype_of(py::handle tensor) { return tensor.attr("dtype"); }
inline py::object torch_dtype(const char* name) {
  static const py::handle torch = py::module_::import("torch").release();
  return torch.attr(name);
}

template <class T>
constexpr const char* dtype_name();
template <>
constexpr const char* dtype_name<float>() { return "float32"; }
template <>
constexpr const char* dtype_name<double>() { return "float64"; }
template <>
constexpr const char* dtype_name<uint8_t>() { return "uint8"; }
template <>
constexpr const char* dtype_name<uint16_t>() { return "bfloat16"; }
template <>
constexpr const char* dtype_name<int32_t>() { return "int32"; }
template <>
constexpr const char* dtype_name<int64_t>() { return "int64"; }

// Address of a tensor of `count` numbers of type T (uint16_t: bfloat16).
template <class T>
T* array(py::handle tensor, int64_t count, const char* name) {
  if (!dtype_of(tensor).is(torch_dtype(dtype_name<T>())))
    throw py::type_error(std::string(name) + ": expected " + dtype_name<T>() + ", found " +
                         py::str(dtype_of(tensor)).cast<std::string>());
  if (numel_of(tensor) != count)
    throw py::value_error(std::string(name) + ": expected " + std::to_string(count) +
                          " numbers, found " + std::to_string(numel_of(tensor)));
  if (!is_plain(tensor)) throw py::value_error(std::string(name) + ": expected a contiguous tensor");
  return static_cast<T*>(address_of(tensor));
}
// The same, or null for None.
template <class T>
T* array_or_null(py::handle tensor, int64_t count, const char* name) {
  return tensor.is_none() ? nullptr : array<T>(tensor, count, name);
}
inline int64_t size_of(py::handle tensor, int dimension) {
  return tensor.attr("shape").attr("__getitem__")(dimension).cast<int64_t>();
}

// Lists of tensors ----------------------------------------------------------------------------------

// Addresses, dtypes and sizes of a list of tensors, which it keeps alive.
struct Tensors {
  std::vector<void*> data;
  std::vector<int64_t> numel;
  std::vector<Dtype> dtype;
  std::vector<int64_t> odd;  // those that no kernel can read or write as they lie in memory
  py::list owner;

  explicit Tensors(const py::list& tensors) : owner(tensors) {
    const py::object kinds[] = {torch_dtype("float32"), torch_dtype("bfloat16"),
                                torch_dtype("float16")};
    const size_t count = tensors.size();
    data.reserve(count), numel.reserve(count), dtype.reserve(count);
    for (const py::handle t : tensors) {
      const py::object kind = dtype_of(t);
      int number = 0;
      while (number < 3 && !kind.is(kinds[number])) ++number;
      if (number == 3) throw py::type_error("expected float32, bfloat16 or float16 tensors");
      if (!is_plain(t)) odd.push_back(static_cast<int64_t>(data.size()));
      data.push_back(address_of(t)), numel.push_back(numel_of(t));
      dtype.push_back(static_cast<Dtype>(number));
    }
  }
  int64_t count() const { return static_cast<int64_t>(data.size()); }
  // The same for the same tensors at the same addresses.
  py::bytes key() const {
    std::string bytes(reinterpret_cast<const char*>(data.data()), data.size() * sizeof(void*));
    bytes.append(reinterpret_cast<const char*>(dtype.data()), dtype.size() * sizeof(Dtype));
    return py::bytes(bytes);
  }
  void refuse_odd(const char* name) const {
    if (!odd.empty())
      throw py::value_error(std::string(name) + "[" + std::to_string(odd[0]) +
                            "]: expected a contiguous tensor");
  }
};

// Table of a list with `each` tensors for each of these sizes; empty ones may be absent.
inline void check_sizes(const Tensors& t, const std::vector<int64_t>& numel, int64_t each,
                        const char* name) {
  t.refuse_odd(name);
  if (t.count() != static_cast<int64_t>(numel.size()) * each)
    throw py::value_error(std::string(name) + ": expected " +
                          std::to_string(numel.size() * static_cast<size_t>(each)) +
                          " tensors, found " + std::to_string(t.count()));
  for (int64_t k = 0; k < t.count(); ++k)
    if (t.numel[k] != numel[k / each] && t.numel[k] != 0)
      throw py::value_error(std::string(name) + "[" + std::to_string(k) + "]: expected " +
                            std::to_string(numel[k / each]) + " elements, found " +
                            std::to_string(t.numel[k]));
}

// n rows of each tensor, and what is subtracted from them.
struct Rows {
  const Tensors& rows;
  const Tensors* center;
  std::vector<int64_t> numel;
  int64_t n;

  Rows(const Tensors& rows, const Tensors* center, std::vector<int64_t> sizes, int64_t n)
      : rows(rows), center(center), numel(std::move(sizes)), n(n) {
    check_sizes(rows, numel, n, "rows");
    if (center) check_sizes(*center, numel, 1, "center");
  }
  RowTable view() const {
    return {rows.data.data(),
            rows.dtype.data(),
            numel.data(),
            static_cast<int64_t>(numel.size()),
            n,
            center ? center->data.data() : nullptr,
            center ? center->dtype.data() : nullptr};
  }
};

// A packed basis. It does not keep the tensors alive: who calls a kernel holds them.
struct Basis {
  BasisView view;
  std::vector<int64_t> numel;

  Basis(py::handle codes, py::handle scales, py::handle row_scale, py::handle tile_segment,
        std::vector<int64_t> sizes, int bits)
      : numel(std::move(sizes)) {
    if (!valid_bits(bits)) throw py::value_error("bits must be 8, 4, 3, 2 or 1");
    const int64_t n = size_of(row_scale, 0), segments = size_of(row_scale, 1);
    int64_t tiles = 0;
    for (const int64_t size : numel) tiles += num_tiles(size);
    view = {array<uint8_t>(codes, tiles * n * row_bytes(bits), "codes"),
            array<uint8_t>(scales, tiles * n, "scales"),
            array<float>(row_scale, n * segments, "row_scale"),
            array<int32_t>(tile_segment, tiles, "tile_segment"),
            n,
            tiles,
            segments,
            bits};
  }
  int64_t coefficients() const { return view.n * view.num_segments; }
  // The table of a list with one entry per tensor of the basis.
  TensorTable table(const Tensors& t, const char* name) const {
    check_sizes(t, numel, 1, name);
    return {t.data.data(), numel.data(), t.dtype.data(), t.count()};
  }
  TensorTable table(const Tensors* t, const char* name) const {
    if (t) return table(*t, name);
    return {nullptr, numel.data(), nullptr, static_cast<int64_t>(numel.size())};
  }
};

// The coefficients and what an optimizer keeps of them.
inline Coefficients coefficients_of(const Basis& basis, py::handle x, py::handle first,
                                    py::handle second) {
  return {array<float>(x, basis.coefficients(), "x"),
          array_or_null<float>(first, basis.coefficients(), "first"),
          array_or_null<float>(second, basis.coefficients(), "second")};
}

inline GramSchmidtPass pass_of(int64_t n, py::handle parent, py::handle transform, py::handle probes,
                               int64_t first, bool fast, py::handle gram, py::handle norms,
                               bool write) {
  GramSchmidtPass pass{};
  pass.r = transform.is_none() ? 0 : size_of(transform, 0);
  const int64_t m = transform.is_none() ? n : pass.r;
  pass.parent = array<int32_t>(parent, n, "parent");
  pass.transform = array_or_null<double>(transform, pass.r * n, "transform");
  pass.probes = array_or_null<double>(probes, kProbes * pass.r, "probes");
  pass.first = first, pass.fast = fast;
  pass.gram = array<double>(gram, m * (write ? kProbes : m), "gram");
  pass.norms = array<double>(norms, n, "norms");
  return pass;
}

void bind_cpu(py::module_& m);
#if defined(TWA_WITH_CUDA)
void bind_cuda(py::module_& m);
#endif

}  // namespace bindings
}  // namespace twa
