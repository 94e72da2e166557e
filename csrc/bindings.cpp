// Python bindings: the only file that knows Python, and it does not know torch. Tensors arrive as addresses, sizes and dtype
// numbers; twa_kernels/native.py checks shapes, dtypes and devices and keeps the tensors alive during the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "twa.h"

namespace py = pybind11;

namespace {

using Addresses = std::vector<uintptr_t>;
using Numbers = std::vector<int64_t>;

// Owns the arrays behind a TensorTable.
struct Table {
  std::vector<void*> data;
  Numbers numel;
  std::vector<twa::Dtype> dtype;

  // `sizes` is shorter than `addresses` where several rows share one size (pack).
  Table(const Addresses& addresses, const Numbers& sizes, const Numbers& dtypes) : numel(sizes) {
    if (dtypes.size() != addresses.size()) throw py::value_error("as many dtypes as tensors expected");
    for (const uintptr_t a : addresses) data.push_back(reinterpret_cast<void*>(a));
    for (const int64_t d : dtypes) {
      if (d < 0 || d > 2) throw py::value_error("dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
      dtype.push_back(static_cast<twa::Dtype>(d));
    }
  }
  twa::TensorTable view() const { return {data.data(), numel.data(), dtype.data(), static_cast<int64_t>(data.size())}; }
};

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(twa::Status status) {
  if (status != twa::Status::ok) throw py::value_error("kernel refused its arguments: sizes, bits or tensor list do not fit the basis");
}

struct Basis {
  twa::BasisView view;
  Basis(uintptr_t codes, uintptr_t scales, uintptr_t row_scale, uintptr_t tile_segment, int64_t n, int64_t tiles, int64_t segments, int bits)
      : view{pointer<const uint8_t>(codes),
             pointer<const uint8_t>(scales),
             pointer<const float>(row_scale),
             pointer<const int32_t>(tile_segment),
             n,
             tiles,
             segments,
             bits} {}
};

py::object pack(const Addresses& rows, const Numbers& row_dtypes, const Addresses& center, const Numbers& center_dtypes, const Numbers& numel,
                uintptr_t tile_segment, int64_t n, int64_t segments, int bits, uintptr_t codes, uintptr_t scales, uintptr_t sum_sq,
                uintptr_t max_scale, uintptr_t errors, const std::vector<double>& weights, int threads) {
  const Table row_table(rows, numel, row_dtypes), center_table(center, numel, center_dtypes);
  if (rows.size() != numel.size() * n || (!center.empty() && center.size() != numel.size())) throw py::value_error("pack: tables of unequal length");
  if (!weights.empty() && weights.size() != static_cast<size_t>(n)) throw py::value_error("pack: as many weights as rows expected");
  const twa::TensorTable c{center.empty() ? nullptr : center_table.data.data(), numel.data(), center_table.dtype.data(),
                           static_cast<int64_t>(numel.size())};
  twa::Where where{};
  twa::Status status;
  {
    py::gil_scoped_release release;
    status = twa::pack_cpu(row_table.view(), c, weights.empty() ? nullptr : weights.data(), pointer<const int32_t>(tile_segment), n, segments, bits,
                           pointer<uint8_t>(codes), pointer<uint16_t>(scales), pointer<double>(sum_sq), pointer<float>(max_scale),
                           pointer<double>(errors), &where, threads);
  }
  if (status == twa::Status::not_finite) return py::make_tuple(where.row, where.tensor, where.column);
  check(status);
  return py::none();
}

void average(const Addresses& rows, const Numbers& dtypes, int64_t columns, const std::vector<double>& weights, uintptr_t out, int threads) {
  const Table table(rows, Numbers(rows.size(), columns), dtypes);
  if (weights.size() != rows.size()) throw py::value_error("average: as many weights as rows expected");
  py::gil_scoped_release release;
  const twa::Status status = twa::average_cpu(table.view(), weights.data(), pointer<float>(out), threads);
  py::gil_scoped_acquire acquire;
  check(status);
}

void unpack(const Basis& basis, const Addresses& out, const Numbers& numel, int threads) {
  const Table table(out, numel, Numbers(out.size(), 0));
  py::gil_scoped_release release;
  const twa::Status status = twa::unpack_cpu(basis.view, table.view(), threads);
  py::gil_scoped_acquire acquire;
  check(status);
}

void project(const Basis& basis, const Addresses& grads, const Numbers& numel, const Numbers& dtypes, uintptr_t c, int threads) {
  const Table table(grads, numel, dtypes);
  py::gil_scoped_release release;
  const twa::Status status = twa::project_cpu(basis.view, table.view(), pointer<float>(c), threads);
  py::gil_scoped_acquire acquire;
  check(status);
}

void reconstruct(const Basis& basis, uintptr_t x, const Addresses& center, const Numbers& center_dtypes, const Addresses& out, const Numbers& numel,
                 const Numbers& dtypes, int threads) {
  const Table out_table(out, numel, dtypes), center_table(center, numel, center_dtypes);
  if (!center.empty() && center.size() != out.size()) throw py::value_error("reconstruct: as many centers as outputs expected");
  const twa::TensorTable c{center.empty() ? nullptr : center_table.data.data(), numel.data(), center_table.dtype.data(),
                           static_cast<int64_t>(out.size())};
  py::gil_scoped_release release;
  const twa::Status status = twa::reconstruct_cpu(basis.view, pointer<const float>(x), c, out_table.view(), threads);
  py::gil_scoped_acquire acquire;
  check(status);
}

// options: maximize, lr, weight decay, then momentum, dampening, nesterov (sgd) or beta1, beta2, eps (adamw).
twa::Update update_of(bool adamw, const std::vector<double>& options, int64_t count) {
  if (options.size() != 6) throw py::value_error("step: six options expected");
  twa::Update update{};
  update.rule = adamw ? twa::Update::Rule::adamw : twa::Update::Rule::sgd;
  update.maximize = options[0] != 0.0, update.lr = options[1], update.weight_decay = options[2], update.step = count;
  if (adamw) {
    update.beta1 = options[3], update.beta2 = options[4], update.eps = options[5];
  } else {
    update.momentum = options[3], update.dampening = options[4], update.nesterov = options[5] != 0.0;
  }
  return update;
}

void step(const Basis& basis, const Addresses& grads, const Numbers& grad_dtypes, bool adamw, const std::vector<double>& options, int64_t count,
          uintptr_t x, uintptr_t first, uintptr_t second, const Addresses& center, const Numbers& center_dtypes, const Addresses& out,
          const Numbers& numel, const Numbers& dtypes, uintptr_t c, int threads) {
  const Table grad_table(grads, numel, grad_dtypes), out_table(out, numel, dtypes), center_table(center, numel, center_dtypes);
  if (grads.size() != out.size() || (!center.empty() && center.size() != out.size())) throw py::value_error("step: tables of unequal length");
  const twa::Update update = update_of(adamw, options, count);
  const twa::TensorTable centers{center.empty() ? nullptr : center_table.data.data(), numel.data(), center_table.dtype.data(),
                                 static_cast<int64_t>(out.size())};
  py::gil_scoped_release release;
  const twa::Status status = twa::step_cpu(basis.view, grad_table.view(), update, pointer<float>(x), pointer<float>(first), pointer<float>(second),
                                           centers, out_table.view(), pointer<float>(c), threads);
  py::gil_scoped_acquire acquire;
  check(status);
}

// Tables that repeat one size for several rows: numel has one entry per tensor of the model.
void orthonormalize_pass(const Addresses& rows, const Numbers& row_dtypes, const Addresses& center, const Numbers& center_dtypes,
                         const Numbers& numel, int64_t n, uintptr_t parent, uintptr_t transform, int64_t r, uintptr_t probes, int64_t first,
                         bool fast, const Addresses& out, const Numbers& out_dtypes, uintptr_t gram, uintptr_t norms, int threads) {
  const Table row_table(rows, numel, row_dtypes), center_table(center, numel, center_dtypes), out_table(out, numel, out_dtypes);
  if (rows.size() != numel.size() * static_cast<size_t>(n)) throw py::value_error("orthonormalize: tables of unequal length");
  py::gil_scoped_release release;
  const twa::Status status = twa::orthonormalize_pass_cpu(row_table.view(), center_table.view(), n, pointer<const int32_t>(parent),
                                                          pointer<const double>(transform), r, pointer<const double>(probes), first, fast,
                                                          out_table.view(), pointer<double>(gram), pointer<double>(norms), threads);
  py::gil_scoped_acquire acquire;
  check(status);
}

#if defined(TWA_WITH_CUDA)
void check_cuda(const char* op, int error, int device) {
  if (error != 0)
    throw std::runtime_error(std::string(op) + ": CUDA error " + twa::cuda_error_name(error) + " on device " + std::to_string(device) + " (" +
                             twa::cuda_error_string(error) + "); nothing was computed");
}

void pack_cuda(uintptr_t rows, uintptr_t center, uintptr_t numel, uintptr_t tile_begin, uintptr_t dtypes, int64_t count, int64_t tiles, int64_t n,
               int bits, uintptr_t codes, uintptr_t scales, uintptr_t sum_sq_tiles, uintptr_t bad, int device, uintptr_t stream) {
  if (!twa::valid_bits(bits)) throw py::value_error("bits must be 8, 4, 3, 2 or 1");
  const int error =
      twa::pack_cuda(pointer<const void* const>(rows), pointer<const void* const>(center), pointer<const int64_t>(numel),
                     pointer<const int64_t>(tile_begin), pointer<const twa::Dtype>(dtypes), count, tiles, n, bits, pointer<uint8_t>(codes),
                     pointer<uint16_t>(scales), pointer<double>(sum_sq_tiles), pointer<int32_t>(bad), device, pointer<void>(stream));
  check_cuda("pack", error, device);
}

template <class T>
py::bytes bytes_of(const std::vector<T>& v) {
  return py::bytes(reinterpret_cast<const char*>(v.data()), v.size() * sizeof(T));
}

// DeviceWork from the addresses of its arrays, in the order of its members.
struct Work {
  twa::DeviceWork view;
  Work(const Addresses& a, int64_t items, int64_t groups) {
    if (a.size() != 9) throw py::value_error("Work: nine addresses expected");
    view = {pointer<const int32_t>(a[0]),
            pointer<const int64_t>(a[1]),
            pointer<const int32_t>(a[2]),
            pointer<const int32_t>(a[3]),
            pointer<const int32_t>(a[4]),
            pointer<const int32_t>(a[5]),
            pointer<const int32_t>(a[6]),
            pointer<const int64_t>(a[7]),
            pointer<const int64_t>(a[8]),
            items,
            groups};
  }
};

void project_cuda(const Basis& basis, uintptr_t grads, const Work& work, uintptr_t partial, uintptr_t sums, uintptr_t c, int device,
                  uintptr_t stream) {
  check_cuda("project",
             twa::project_cuda(basis.view, pointer<const twa::DeviceTensor>(grads), work.view, pointer<float>(partial), pointer<double>(sums),
                               pointer<float>(c), device, pointer<void>(stream)),
             device);
}

void reconstruct_cuda(const Basis& basis, uintptr_t x, uintptr_t center, uintptr_t out, const Work& work, uintptr_t x_rows, int device,
                      uintptr_t stream) {
  check_cuda("reconstruct",
             twa::reconstruct_cuda(basis.view, pointer<const float>(x), pointer<const twa::DeviceTensor>(center),
                                   pointer<const twa::DeviceTensor>(out), work.view, pointer<float>(x_rows), device, pointer<void>(stream)),
             device);
}

// workspaces: partial, sums, x_rows, counters, tasks (0: separate launches), steps_before (0: count), corrections.
void step_cuda(const Basis& basis, uintptr_t grads, bool adamw, const std::vector<double>& options, int64_t count, uintptr_t x, uintptr_t first,
               uintptr_t second, uintptr_t center, uintptr_t out, const Work& work, const Addresses& workspaces, int64_t window, uintptr_t c,
               int device, uintptr_t stream) {
  if (workspaces.size() != 7) throw py::value_error("step: seven workspaces expected");
  const twa::StepWorkspace space{pointer<float>(workspaces[0]),       pointer<double>(workspaces[1]),        pointer<float>(workspaces[2]),
                                 pointer<int32_t>(workspaces[3]),     pointer<const int32_t>(workspaces[4]), window,
                                 pointer<const float>(workspaces[5]), pointer<float>(workspaces[6])};
  const int error = twa::step_cuda(basis.view, pointer<const twa::DeviceTensor>(grads), update_of(adamw, options, count), pointer<float>(x),
                                   pointer<float>(first), pointer<float>(second), pointer<const twa::DeviceTensor>(center),
                                   pointer<const twa::DeviceTensor>(out), work.view, space, pointer<float>(c), device, pointer<void>(stream));
  check_cuda("step", error, device);
}

// center and out may be 0; workspaces: partials, space.
void orthonormalize_pass_cuda(uintptr_t rows, uintptr_t center, uintptr_t out, uintptr_t numel, uintptr_t chunk_begin, int64_t count, int64_t chunks,
                              int64_t n, uintptr_t parent, uintptr_t transform, int64_t r, uintptr_t probes, int64_t first, uintptr_t partials,
                              uintptr_t space, uintptr_t gram, uintptr_t norms, int device, uintptr_t stream) {
  const int error = twa::orthonormalize_pass_cuda(
      pointer<const twa::DeviceTensor>(rows), pointer<const twa::DeviceTensor>(center), pointer<const twa::DeviceTensor>(out),
      pointer<const int64_t>(numel), pointer<const int64_t>(chunk_begin), count, chunks, n, pointer<const int32_t>(parent),
      pointer<const double>(transform), r, pointer<const double>(probes), first, pointer<double>(partials), pointer<double>(space),
      pointer<double>(gram), pointer<double>(norms), device, pointer<void>(stream));
  check_cuda("orthonormalize_pass", error, device);
}

// entries: address and dtype number of each tensor.
void table_cuda(const Numbers& entries, uintptr_t to, int device, uintptr_t stream) {
  std::vector<twa::DeviceTensor> table;
  for (size_t k = 0; k + 1 < entries.size(); k += 2) {
    if (entries[k + 1] < 0 || entries[k + 1] > 2) throw py::value_error("dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
    table.push_back({pointer<void>(static_cast<uintptr_t>(entries[k])), static_cast<twa::Dtype>(entries[k + 1]), 0});
  }
  check_cuda("table",
             twa::table_cuda(table.data(), static_cast<int64_t>(table.size()), pointer<twa::DeviceTensor>(to), device, pointer<void>(stream)),
             device);
}
#endif

}  // namespace

#if !defined(TWA_MODULE)
#define TWA_MODULE _C
#endif

PYBIND11_MODULE(TWA_MODULE, m) {
  m.doc() = "Native kernels of twa_kernels. Use the functions of the package, not these: addresses are not checked here.";
  py::class_<Basis>(m, "Basis").def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int>());
  m.def("pack", &pack);
  m.def("average", &average);
  m.def("unpack", &unpack);
  m.def("project", &project);
  m.def("reconstruct", &reconstruct);
  m.def("step", &step);
  m.def("orthonormalize_pass", &orthonormalize_pass);
  m.def("cpu_isa", [] { return twa::cpu_isa(); });
  m.def(
      "read_bytes",
      [](uintptr_t data, int64_t bytes, int threads, bool ahead) {
        py::gil_scoped_release release;
        return twa::read_bytes(pointer<const void>(data), bytes, threads, ahead);
      },
      py::arg("data"), py::arg("bytes"), py::arg("threads"), py::arg("ahead") = false);
  m.def("copy_bytes", [](uintptr_t from, uintptr_t to, int64_t bytes, int threads) {
    py::gil_scoped_release release;
    twa::copy_bytes(pointer<const void>(from), pointer<void>(to), bytes, threads);
  });
  m.def("advise_huge_pages", [](uintptr_t data, int64_t bytes) { twa::advise_huge_pages(pointer<void>(data), bytes); });
  m.def("get_code",
        [](int bits, const std::string& row, int column) { return twa::get_code(bits, reinterpret_cast<const uint8_t*>(row.data()), column); });
  m.def("level", &twa::level);
#if defined(TWA_WITH_CUDA)
  m.attr("with_cuda") = true;
  m.attr("cuda_architectures") = TWA_CUDA_ARCHITECTURES;
  py::class_<Work>(m, "Work").def(py::init<const Addresses&, int64_t, int64_t>());
  // Host arrays of work items as bytes, in the order of Work's addresses without numel; tile_begin last.
  py::class_<twa::HostWork>(m, "HostWork", py::module_local())
      .def(py::init([](const Numbers& numel, uintptr_t tile_segment, int64_t segments, int bits) {
        return twa::make_work(numel.data(), static_cast<int64_t>(numel.size()), pointer<const int32_t>(tile_segment), segments, bits);
      }))
      .def_property_readonly("arrays",
                             [](const twa::HostWork& w) {
                               return py::make_tuple(bytes_of(w.item_tensor), bytes_of(w.item_tile), bytes_of(w.item_tiles), bytes_of(w.item_segment),
                                                     bytes_of(w.item_group), bytes_of(w.group_begin), bytes_of(w.segment_groups),
                                                     bytes_of(w.tile_begin));
                             })
      .def("tasks", [](const twa::HostWork& w, int64_t window) { return bytes_of(twa::make_tasks(w, window)); });
  m.def("pack_cuda", &pack_cuda);
  m.def("table_cuda", &table_cuda);
  m.def("project_cuda", &project_cuda);
  m.def("reconstruct_cuda", &reconstruct_cuda);
  m.def("step_cuda", &step_cuda);
  m.def("orthonormalize_pass_cuda", &orthonormalize_pass_cuda);
  m.attr("orthonormalize_chunk") = twa::kOrthonormalizeChunk;
  // Rows and columns of the partial sums, and numbers of the other workspace.
  m.def("orthonormalize_plan", [](int64_t n, int64_t r, int64_t chunks, bool transform, bool write) {
    const twa::OrthonormalizePlan plan = twa::orthonormalize_plan(n, r, chunks, transform, write);
    return py::make_tuple(plan.parts, plan.stride, plan.space);
  });
  m.def("step_counters", [](int64_t groups, int64_t segments) { return twa::step_counters(groups, segments); });
  m.def("step_window", [](int64_t n, int bits, int device) {
    const int window = twa::step_window(n, bits, device);
    check_cuda("step", window < 0 ? -window : 0, device);
    return window;
  });
  m.def("cuda_device_count", &twa::cuda_device_count);
#else
  m.attr("with_cuda") = false;
#endif
}
