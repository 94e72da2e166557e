// What the bindings make of Python's objects: arrays, lists of tensors, a basis.
//
// An operand of the wrong dtype or size, or one that is not contiguous, raises before a kernel
// runs; all arguments are passed by name.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../twa.h"
#include "facts.h"

namespace twa {
namespace bindings {

using namespace pybind11::literals;

// Arrays ------------------------------------------------------------------------------------------

// What an array of a C++ type is in torch; uint16_t holds the bits of bfloat16.
constexpr Kind kind_of(const float*) { return kFloat32; }
constexpr Kind kind_of(const double*) { return kFloat64; }
constexpr Kind kind_of(const uint8_t*) { return kUint8; }
constexpr Kind kind_of(const uint16_t*) { return kBfloat16; }
constexpr Kind kind_of(const int32_t*) { return kInt32; }
constexpr Kind kind_of(const int64_t*) { return kInt64; }

// Address of a tensor of `count` numbers of type T (uint16_t: bfloat16).
template <class T>
T* array(py::handle tensor, int64_t count, const char* name) {
  const Facts f = facts_of(tensor);
  constexpr Kind kind = kind_of(static_cast<const T*>(nullptr));
  if (!(f.kind == kind))
    throw py::type_error(std::string(name) + ": expected " + torch().name_of(kind) + ", found " +
                         py::str(tensor.attr("dtype")).cast<std::string>());
  if (f.numel != count)
    throw py::value_error(std::string(name) + ": expected " + std::to_string(count) +
                          " numbers, found " + std::to_string(f.numel));
  if (!f.contiguous) throw py::value_error(std::string(name) + ": expected a contiguous tensor");
  return static_cast<T*>(f.data);
}
// The same, or null for None.
template <class T>
T* array_or_null(py::handle tensor, int64_t count, const char* name) {
  return tensor.is_none() ? nullptr : array<T>(tensor, count, name);
}
inline int64_t numel_of(py::handle tensor) { return facts_of(tensor).numel; }
inline int64_t size_of(py::handle tensor, int dimension) {
  return tensor.attr("shape").attr("__getitem__")(dimension).cast<int64_t>();
}

// Bits and sizes ----------------------------------------------------------------------------------

inline void check_bits(int bits) {
  if (!valid_bits(bits)) throw py::value_error("bits must be 8, 4, 3, 2 or 1");
}
inline int64_t tiles_of(const std::vector<int64_t>& numel) {
  return total_tiles(numel.data(), static_cast<int64_t>(numel.size()));
}

// Lists of tensors --------------------------------------------------------------------------------

// Number of a dtype that gradients, centers and weights may have; -1: another one.
inline int number_of(Kind kind) {
  return kind == kFloat32 ? 0 : kind == kBfloat16 ? 1 : kind == kFloat16 ? 2 : -1;
}

// Number of one of two or more spans of memory, and of another that it overlaps; none if none do.
struct Span {
  uintptr_t begin, end;
  size_t k;
};
inline py::object first_shared(std::vector<Span> spans) {
  const auto before = [](const Span& a, const Span& b) { return a.begin < b.begin; };
  if (!std::is_sorted(spans.begin(), spans.end(), before))
    std::sort(spans.begin(), spans.end(), before);
  for (size_t k = 1; k < spans.size(); ++k)
    if (spans[k].begin < spans[k - 1].end) return py::make_tuple(spans[k - 1].k, spans[k].k);
  return py::none();
}
inline void append(std::vector<Span>& spans, const void* data, int64_t numel, int bits, size_t k) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const auto bytes = static_cast<uintptr_t>(numel) * static_cast<uintptr_t>(bits) / 8;
  if (bytes) spans.push_back({begin, begin + bytes, k});
}
// Numbers of two of the tensors, of any dtype, that share memory; none if none do.
inline py::object first_shared(const py::object& given) {
  const py::list tensors(given);
  std::vector<Span> spans;
  for (size_t k = 0; k < tensors.size(); ++k) {
    const Facts f = facts_of(tensors[k]);
    append(spans, f.data, f.numel, f.kind.bits, k);
  }
  return first_shared(std::move(spans));
}

// Addresses, dtypes and sizes of a list of tensors, which it keeps alive.
struct Tensors {
  std::vector<void*> data;
  std::vector<int64_t> numel;
  std::vector<Dtype> dtype;
  std::vector<int64_t> odd;  // those that no kernel can read or write as they lie in memory
  int device = 0, index = 0;
  bool together = true;  // on that device, all of them
  py::list owner;

  explicit Tensors(const py::object& tensors) : owner(tensors) {  // a list as it is, no copy
    const size_t count = owner.size();
    data.reserve(count), numel.reserve(count), dtype.reserve(count);
    for (const py::handle t : owner) {
      const Facts f = facts_of(t);
      const int number = number_of(f.kind);
      if (number < 0) throw py::type_error("expected float32, bfloat16 or float16 tensors");
      if (!f.contiguous) odd.push_back(static_cast<int64_t>(data.size()));
      if (data.empty()) device = f.device, index = f.index;
      if (f.device != device || f.index != index) together = false;
      data.push_back(f.data), numel.push_back(f.numel), dtype.push_back(static_cast<Dtype>(number));
    }
  }
  int64_t count() const { return static_cast<int64_t>(data.size()); }
  // sizes: (count,), those of the basis where tensors may be absent.
  TensorTable table(const int64_t* sizes) const {
    return {data.data(), sizes, dtype.data(), count()};
  }
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
  // Whether they have these sizes and are on this device. absent: empty ones may stand for others.
  bool are(const py::object& given, int on_device, int on_index, bool absent) const {
    const py::tuple sizes(given);
    if (data.size() != sizes.size()) return false;
    if (data.empty()) return true;
    if (!together || device != on_device || (device != kDeviceCpu && index != on_index))
      return false;
    for (size_t k = 0; k < data.size(); ++k) {
      if (absent && numel[k] == 0) continue;
      if (numel[k] != PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), k))) return false;
    }
    return true;
  }
  py::object shared() const {
    std::vector<Span> spans;
    spans.reserve(data.size());
    for (size_t k = 0; k < data.size(); ++k)
      append(spans, data[k], numel[k], dtype[k] == Dtype::f32 ? 32 : 16, k);
    return first_shared(std::move(spans));
  }
};

// Tensors of a list that is what lists usually are: dense, of dtypes that kernels take, of no class
// of their own; else none, which does not say what is wrong.
inline py::object usual(const py::list& tensors) {
  for (const py::handle t : tensors)
    if (!is_torchs_own(t)) return py::none();
  try {
    return py::cast(Tensors(tensors));
  } catch (const py::type_error&) {
    return py::none();
  } catch (const py::error_already_set&) {
    return py::none();  // sparse, or without memory
  }
}

// Checks a list with `each` tensors for each of these sizes. absent: empty ones stand for others.
inline void check_sizes(const Tensors& t, const std::vector<int64_t>& numel, int64_t each,
                        const char* name, bool absent = false) {
  t.refuse_odd(name);
  if (t.count() != static_cast<int64_t>(numel.size()) * each)
    throw py::value_error(std::string(name) + ": expected " +
                          std::to_string(numel.size() * static_cast<size_t>(each)) +
                          " tensors, found " + std::to_string(t.count()));
  for (int64_t k = 0; k < t.count(); ++k)
    if (t.numel[k] != numel[k / each] && !(absent && t.numel[k] == 0))
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
    check_bits(bits);
    const int64_t n = size_of(row_scale, 0), segments = size_of(row_scale, 1);
    const int64_t tiles = tiles_of(numel);
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
  TensorTable table(const Tensors& t, const char* name, bool absent = false) const {
    check_sizes(t, numel, 1, name, absent);
    return t.table(numel.data());
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

inline GramSchmidtPass pass_of(int64_t n, py::handle parent, py::handle transform,
                               py::handle probes, int64_t first, bool fast, py::handle gram,
                               py::handle norms, bool write) {
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
