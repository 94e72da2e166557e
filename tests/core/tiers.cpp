// Every CPU kernel on fixed data, with the instruction set in use (TWA_KERNELS_ISA): a line for
// each case, with a digest of the bits of all that it wrote. They are the same for every
// instruction set, machine and number of threads; test_tiers.py compares.
//
//   twa_tiers           all cases; exit status 1 if the number of threads changes a bit, or if
//                       orthonormalize, whose bits depend on the instruction set, is wrong
//   twa_tiers --isas    the instruction sets that this machine has
//   twa_tiers TEXT      the bits themselves, for cases whose line begins with TEXT
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <functional>
#include <initializer_list>

#include "data.h"

namespace {

using twa::Dtype;
using twa::Status;

const std::vector<int64_t> kRagged = {1, 127, 128, 129, 0, 255, 300}, kSmall = {1, 130},
                           kLong = {2 * 8192 + 77, 5};
const char* shown = nullptr;
bool failed = false;

// FNV-1a of results. One NaN is as good as another: machines differ in their signs.
class Digest {
 public:
  void add(const void* data, int64_t count, int size) {
    for (int64_t k = 0; k < count; ++k) {
      uint64_t v = 0;
      std::memcpy(&v, static_cast<const char*>(data) + k * size, static_cast<size_t>(size));
      add_word(v, size);
    }
  }
  void add(const float* p, int64_t count) {
    for (int64_t k = 0; k < count; ++k)
      add_word(std::isnan(p[k]) ? 0x7fc00000u : twa::float_bits(p[k]), 4);
  }
  void add(const double* p, int64_t count) {
    const double nan = NAN;
    for (int64_t k = 0; k < count; ++k) add(std::isnan(p[k]) ? &nan : p + k, 1, 8);
  }
  void add(const Tensors& t) {
    for (size_t k = 0; k < t.memory.size(); ++k) {
      const void* data = t.memory[k]->data;
      if (t.dtype[k] == Dtype::f32) {
        add(static_cast<const float*>(data), t.size(k));
        continue;
      }
      for (int64_t c = 0; c < t.size(k); ++c) {
        const uint16_t h = static_cast<const uint16_t*>(data)[c];
        const bool nan = (h & 0x7fff) > (t.dtype[k] == Dtype::f16 ? 0x7c00 : 0x7f80);
        add_word(nan ? 0x7fff : h, 2);
      }
    }
  }
  void add(Status status) {
    refused |= status == Status::bad_argument;
    add_word(static_cast<uint64_t>(status), 1);
  }
  bool refused = false;
  uint64_t value() const { return hash_; }

 private:
  void add_word(uint64_t v, int size) {
    if (shown) std::printf(" %0*" PRIx64, 2 * size, v);
    for (int k = 0; k < size; ++k) hash_ = (hash_ ^ (v >> (8 * k) & 255)) * 0x100000001b3u;
  }
  uint64_t hash_ = 0xcbf29ce484222325u;
};

// A line for results of run(threads, digest), which have to be the same for 1 and 3 threads.
void report(const std::string& name, const std::function<void(int, Digest&)>& run) {
  if (shown && name.rfind(shown, 0) != 0) return;
  if (shown) std::printf("%s\n", name.c_str());
  uint64_t found[2];
  const char* wrong = "";
  for (const int threads : {1, 3}) {
    Digest digest;
    run(threads, digest);
    if (digest.refused) wrong = " WRONG: refused its arguments";
    found[threads / 2] = digest.value();
    if (shown) std::printf("\n");
  }
  if (found[0] != found[1]) wrong = " WRONG: other bits with 3 threads";
  failed |= *wrong != 0;
  std::printf("%s %016" PRIx64 "%s\n", name.c_str(), found[0], wrong);
}

std::string name_of(const char* op, int bits, int64_t n, const char* shapes, Kind kind) {
  char line[80];
  std::snprintf(line, sizeof line, "%s bits=%d n=%d %s %s", op, bits, static_cast<int>(n), shapes,
                kKindNames[static_cast<int>(kind)]);
  return line;
}
uint64_t seed_of(const std::string& name) {
  uint64_t seed = 1;
  for (const char c : name) seed = seed * 31 + static_cast<uint8_t>(c);
  return seed;
}

twa::Update update_of(bool adamw) {
  twa::Update u{};
  u.rule = adamw ? twa::Update::Rule::adamw : twa::Update::Rule::sgd;
  u.nesterov = !adamw, u.maximize = adamw;
  u.lr = 0.25, u.weight_decay = 0.125, u.momentum = 0.5, u.beta1 = 0.5, u.beta2 = 0.75,
  u.eps = 1e-8, u.step = 2;
  return u;
}

// project, reconstruct, step and unpack of one basis.
void read_basis(int bits, int64_t n, const char* shapes, const std::vector<int64_t>& sizes,
                Kind kind) {
  const int dtype = static_cast<int>(kind) % 3;
  Random random{seed_of(name_of("", bits, n, shapes, kind))};
  const RandomBasis basis(random, sizes, n, bits, kind);
  const int64_t numbers = n * basis.segments;
  Tensors grads = Tensors(sizes, dtype).filled(random, kind),
          center = Tensors(sizes, dtype + 1)
                       .filled(random, kind == Kind::edge || n % 2 ? Kind::plain : kind);
  const Memory x = guarded(numbers * 4);
  fill(random, kind, Dtype::f32, x->data, numbers);
  if (n % 3 == 0) grads.data[1] = nullptr;  // absent
  const twa::TensorTable none{nullptr, nullptr, nullptr, 0},
      base = n % 4 == 1 ? none : center.table();

  report(name_of("project", bits, n, shapes, kind), [&](int threads, Digest& digest) {
    const Memory c = guarded(numbers * 4);
    digest.add(twa::project_cpu(basis.view(), grads.table(), c->as<float>(), threads));
    digest.add(c->as<float>(), numbers);
  });
  report(name_of("reconstruct", bits, n, shapes, kind), [&](int threads, Digest& digest) {
    Tensors out(sizes, dtype + 2);
    if (n % 5 == 1) out.data[0] = nullptr;
    digest.add(twa::reconstruct_cpu(basis.view(), x->as<float>(), base, out.table(), threads));
    digest.add(out);
  });
  report(name_of("unpack", bits, n, shapes, kind), [&](int threads, Digest& digest) {
    std::vector<void*> data;  // one (n, numel) matrix a tensor
    std::vector<Memory> memory;
    for (const int64_t size : sizes)
      memory.push_back(guarded(size * n * 4)), data.push_back(memory.back()->data);
    Tensors out(sizes, -1);
    out.data = data;
    digest.add(twa::unpack_cpu(basis.view(), out.table(), threads));
    for (size_t k = 0; k < sizes.size(); ++k) digest.add(memory[k]->as<float>(), sizes[k] * n);
  });
  const bool adamw = n % 2;
  report(name_of(adamw ? "step-adamw" : "step-sgd", bits, n, shapes, kind),
         [&](int threads, Digest& digest) {
           Tensors out(sizes, dtype);
           Random state{7};
           Memory c = guarded(numbers * 4), y[3];
           for (auto& m : y)
             m = guarded(numbers * 4), fill(state, Kind::plain, Dtype::f32, m->data, numbers);
           for (int64_t k = 0; k < numbers; ++k)  // second moments
             y[2]->as<float>()[k] = std::fabs(y[2]->as<float>()[k]);
           digest.add(twa::step_cpu(basis.view(), grads.table(), update_of(adamw),
                                    {y[0]->as<float>(), y[1]->as<float>(), y[2]->as<float>()}, base,
                                    out.table(), c->as<float>(), threads));
           for (const auto& m : {&c, &y[0], &y[1], &y[2]}) digest.add((*m)->as<float>(), numbers);
           digest.add(out);
         });
}

// pack without a center, with one, and with the rows' average.
void pack(int bits, int64_t n, const char* shapes, const std::vector<int64_t>& sizes, Kind kind) {
  const int64_t count = static_cast<int64_t>(sizes.size()), segments = 2,
                tiles = twa::total_tiles(sizes.data(), count), numbers = n * segments;
  for (const char* op : {"pack", "pack-center", "pack-average"}) {
    const std::string name = name_of(op, bits, n, shapes, kind);
    const bool average = name.rfind("pack-average", 0) == 0;
    Random random{seed_of(name)};
    const Tensors rows = Tensors(sizes, static_cast<int>(kind) % 3, n).filled(random, kind);
    const uint64_t of_center = random.bits();
    std::vector<double> weights;
    for (int64_t i = 0; i < n; ++i) weights.push_back(i % 4 == 2 ? 0.0 : random.unit());
    std::vector<int32_t> tile_segment;
    for (int64_t t = 0; t < tiles; ++t)
      tile_segment.push_back(static_cast<int32_t>(t / 3 % segments));
    report(name, [&](int threads, Digest& digest) {
      Tensors center(sizes, average ? -1 : 1);
      Random numbers_of{of_center};
      if (!average) center = Tensors(sizes, 1).filled(numbers_of, Kind::plain);
      const bool centered = name.rfind("pack-", 0) == 0;
      const twa::RowTable table{rows.data.data(),
                                rows.dtype.data(),
                                sizes.data(),
                                count,
                                n,
                                centered ? center.data.data() : nullptr,
                                centered ? center.dtype.data() : nullptr};
      const Memory codes = guarded(tiles * n * twa::row_bytes(bits)),
                   scales = guarded(tiles * n * 2);
      std::vector<double> sum_sq(static_cast<size_t>(numbers));
      std::vector<float> most(static_cast<size_t>(numbers));
      twa::Where where{-1, -1, -1};
      const Status status = twa::pack_cpu(table, average ? weights.data() : nullptr,
                                          {tile_segment.data(), segments, bits, codes->data,
                                           scales->as<uint16_t>(), sum_sq.data(), most.data()},
                                          &where, threads);
      digest.add(status);
      digest.add(&where, 3, 8);
      if (status != Status::ok) return;  // of what was written nothing counts
      digest.add(codes->data, tiles * n * twa::row_bytes(bits), 1);
      digest.add(scales->data, tiles * n, 2);
      digest.add(sum_sq.data(), numbers);
      digest.add(most.data(), numbers);
      if (average) digest.add(center);
    });
  }
}

// Three snapshots recorded one after the other, and all of them replayed.
void record(int bits, const char* shapes, const std::vector<int64_t>& sizes, Kind kind) {
  const std::string name = name_of("record", bits, 3, shapes, kind);
  const int64_t count = static_cast<int64_t>(sizes.size()),
                tiles = twa::total_tiles(sizes.data(), count);
  report(name, [&](int threads, Digest& digest) {
    Random random{seed_of(name)};
    Tensors reference = Tensors(sizes, -1).filled(random, Kind::plain),
            sums = Tensors(sizes, -1).filled(random, Kind::plain);
    std::vector<Memory> codes, scales;
    std::vector<twa::Difference> rows;
    for (int k = 0; k < 3; ++k) {
      codes.push_back(guarded(tiles * twa::row_bytes(bits)));
      scales.push_back(guarded(tiles * 2));
      const Tensors weights = Tensors(sizes, k).filled(random, k == 1 ? kind : Kind::plain);
      twa::Where where{-1, -1, -1};
      const Status status =
          twa::record_cpu(weights.table(), reference.table(), bits, codes.back()->data,
                          scales.back()->as<uint16_t>(), &where, threads);
      digest.add(status);
      digest.add(&where, 3, 8);
      digest.add(reference);
      if (status != Status::ok) return;
      digest.add(codes.back()->data, tiles * twa::row_bytes(bits), 1);
      digest.add(scales.back()->data, tiles, 2);
      rows.push_back({codes.back()->data, scales.back()->as<uint16_t>()});
    }
    const float coefficients[] = {1.0f, 0.0f, -0.7f};
    digest.add(twa::replay_cpu(sums.table(), rows.data(), coefficients, 3, bits, threads));
    digest.add(sums);
  });
}

void average(int64_t n, Kind kind) {
  constexpr int64_t kNumel = 2500;
  const std::string name = name_of("average", 32, n, "2500", kind);
  Random random{seed_of(name)};
  const Tensors rows =
      Tensors(std::vector<int64_t>(static_cast<size_t>(n), kNumel), static_cast<int>(n) % 3)
          .filled(random, kind);
  std::vector<double> weights;
  for (int64_t i = 0; i < n; ++i) weights.push_back(i == 1 ? 0.0 : random.unit());
  report(name, [&](int threads, Digest& digest) {
    const Memory out = guarded(kNumel * 4);
    digest.add(twa::average_cpu(rows.table(), weights.data(), out->as<float>(), threads));
    digest.add(out->as<float>(), kNumel);
  });
}

double value_of(const Tensors& t, size_t k, int64_t c) {
  if (t.dtype[k] == Dtype::f32) return t.memory[k]->as<float>()[c];
  const uint16_t h = t.memory[k]->as<uint16_t>()[c];
  return t.dtype[k] == Dtype::f16 ? twa::f16_to_float(h) : twa::bf16_to_float(h);
}

// Against the same sums in plain float64: a line that says within which bound they agree.
void orthonormalize(int64_t n, bool transform, bool write, bool fast) {
  char name[80];
  std::snprintf(name, sizeof name, "orthonormalize n=%d%s%s%s", static_cast<int>(n),
                transform ? " transform" : "", write ? " out" : "", fast ? " fast" : "");
  if (shown && std::string(name).rfind(shown, 0) != 0) return;
  Random random{seed_of(name)};
  const std::vector<int64_t> sizes = {1, 129, 0, 3000};
  const int64_t count = static_cast<int64_t>(sizes.size()),
                r = transform ? std::max<int64_t>(1, n - 1) : n;
  const auto at = [](int64_t k) { return static_cast<size_t>(k); };
  const Tensors rows = Tensors(sizes, 0, n).filled(random, Kind::plain),
                center = Tensors(sizes, 1).filled(random, Kind::plain);
  std::vector<int32_t> parent;
  for (int64_t i = 0; i < n; ++i)
    parent.push_back(i % 3 ? static_cast<int32_t>(random.below(i)) : -1);
  std::vector<double> matrix(at(r * n)), probes(at(twa::kProbes * r));
  for (int64_t a = 0; a < r; ++a)
    for (int64_t i = 0; i <= a; ++i) matrix[at(a * n + i)] = random.unit();
  for (double& p : probes) p = random.bits() % 2 ? 1.0 : -1.0;

  std::vector<double> gram[2], norms[2];
  std::vector<std::unique_ptr<Tensors>> outs;
  for (const int threads : {1, 3}) {
    gram[threads / 2].assign(at(write ? r * twa::kProbes : r * r), 0.0);
    norms[threads / 2].assign(at(n), 0.0);
    outs.push_back(std::make_unique<Tensors>(sizes, 2, r));
    const Tensors& out = *outs.back();
    const twa::GramSchmidtPass pass{parent.data(),
                                    transform ? matrix.data() : nullptr,
                                    r,
                                    write ? probes.data() : nullptr,
                                    0,
                                    fast,
                                    gram[threads / 2].data(),
                                    norms[threads / 2].data()};
    const twa::RowTable table{rows.data.data(),   rows.dtype.data(),  sizes.data(), count, n,
                              center.data.data(), center.dtype.data()};
    const twa::TensorTable to =
        write ? twa::TensorTable{out.data.data(), out.numel.data(), out.dtype.data(), count * r}
              : twa::TensorTable{nullptr, nullptr, nullptr, 0};
    if (twa::orthonormalize_pass_cpu(table, pass, to, threads) != Status::ok) failed = true;
  }
  bool same = gram[0] == gram[1] && norms[0] == norms[1];
  for (size_t k = 0; k < outs[0]->memory.size(); ++k)
    same &= !std::memcmp(outs[0]->data[k], outs[1]->data[k],
                         at(outs[0]->size(k) * size_of(outs[0]->dtype[k])));

  std::vector<double> exact(gram[0].size()), exact_norms(at(n));
  double error = 0.0, largest = 1.0;
  for (int64_t k = 0; k < count; ++k)
    for (int64_t c = 0; c < sizes[at(k)]; ++c) {
      std::vector<double> v(at(n)), w(at(r));
      for (int64_t i = 0; i < n; ++i) {
        const double x = value_of(rows, at(k * n + i), c);
        v[at(i)] = x - (parent[at(i)] < 0 ? value_of(center, at(k), c)
                                          : value_of(rows, at(k * n + parent[at(i)]), c));
        exact_norms[at(i)] += x * x;
      }
      for (int64_t a = 0; a < r; ++a) {
        for (int64_t i = 0; i < n && transform; ++i) w[at(a)] += matrix[at(a * n + i)] * v[at(i)];
        if (!transform) w[at(a)] = v[at(a)];
        if (!write) continue;
        const double stored = value_of(*outs[0], at(k * r + a), c);
        const Dtype dtype = outs[0]->dtype[at(k * r + a)];
        const double place = dtype == Dtype::f32    ? (fast ? 1e-5 : 1e-7)
                             : dtype == Dtype::bf16 ? 0x1p-7
                                                    : 0x1p-10;
        if (!(std::fabs(stored - w[at(a)]) <= place * std::fmax(1.0, std::fabs(w[at(a)]))))
          error = 1.0;
        w[at(a)] = stored;
      }
      for (int64_t a = 0; a < r; ++a) {
        if (write) {
          for (int p = 0; p < twa::kProbes; ++p)
            for (int64_t b = 0; b < r; ++b)
              exact[at(a * twa::kProbes + p)] += w[at(a)] * w[at(b)] * probes[at(p * r + b)];
        } else {
          for (int64_t b = 0; b <= a; ++b) exact[at(a * r + b)] += w[at(a)] * w[at(b)];
        }
      }
    }
  for (const double e : exact) largest = std::fmax(largest, std::fabs(e));
  for (size_t k = 0; k < exact.size(); ++k)
    error = std::fmax(error, std::fabs(gram[0][k] - exact[k]) / largest);
  for (size_t k = 0; k < at(n); ++k)
    error = std::fmax(error, std::fabs(norms[0][k] - exact_norms[k]) / exact_norms[k]);
  const double bound = fast || write ? 1e-5 : 1e-12;
  std::printf("%s ", name);
  if (!(error <= bound)) {
    std::printf("WRONG: off by %.1e\n", error);
  } else {
    std::printf(same ? "within %.0e\n" : "WRONG: other bits with 3 threads\n", bound);
  }
  failed |= !same || !(error <= bound);
}

void all_cases() {
  for (const int bits : {8, 4, 3, 2, 1}) {
    for (const int64_t n : {1, 2, 3, 5, 6, 8, 16, 17, 31, 64, 300})
      for (const Kind kind : kKinds) read_basis(bits, n, "ragged", kRagged, kind);
    for (const Kind kind : {Kind::plain, Kind::edge})
      for (const int64_t n : {511, 4096}) read_basis(bits, n, "small", kSmall, kind);
    for (const int64_t n : {1, 3, 16}) read_basis(bits, n, "long", kLong, Kind::plain);
    for (const int64_t n : {1, 2, 5, 17})
      for (const Kind kind : kKinds) pack(bits, n, "ragged", kRagged, kind);
    pack(bits, 3, "long", kLong, Kind::plain);
    for (const Kind kind : kKinds) record(bits, "ragged", kRagged, kind);
    record(bits, "long", kLong, Kind::plain);
  }
  for (const int64_t n : {1, 3, 8})
    for (const Kind kind : kKinds) average(n, kind);
  for (const int64_t n : {1, 2, 7, 20})
    for (const bool fast : {false, true}) {
      orthonormalize(n, false, false, fast);
      orthonormalize(n, true, false, fast);
      orthonormalize(n, true, true, fast);
    }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--isas") {
    for (const char* name : twa::cpu_isas()) std::printf("%s\n", name);
    return 0;
  }
  if (!twa::cpu_isa()) return std::printf("this machine lacks the instruction set asked for\n"), 2;
  if (argc > 1) shown = argv[1];
  std::printf("instruction set %s\n", twa::cpu_isa());
  all_cases();
  return failed ? 1 : 0;
}
