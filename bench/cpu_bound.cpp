// Two calls of project, reconstruct or pack on one thread, for bench/cpu_bound.py, which follows
// the second:  cpu_bound OP BITS ROWS TILES
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../csrc/twa.h"

namespace {

uint32_t state = 1;
uint32_t draw() { return (state = state * 1664525u + 1013904223u) >> 8; }
float uniform() { return static_cast<float>(draw()) / (1 << 23) - 1.0f; }
std::vector<float> uniform(int64_t count) {
  std::vector<float> v(static_cast<size_t>(count));
  for (float& x : v) x = uniform();
  return v;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 5) return 2;
  const int bits = std::atoi(arguments[2]);
  const int64_t n = std::atoll(arguments[3]), tiles = std::atoll(arguments[4]);
  if (!twa::valid_bits(bits) || n < 1 || n > twa::kMaxRows || tiles < 1 || tiles > 64) return 2;
  const int64_t columns = tiles * twa::kTileColumns;
  std::vector<uint8_t> codes(static_cast<size_t>(tiles * n * twa::row_bytes(bits)));
  std::vector<uint8_t> scales(static_cast<size_t>(tiles * n));
  for (uint8_t& code : codes) code = static_cast<uint8_t>(draw());
  for (uint8_t& scale : scales) scale = static_cast<uint8_t>(40 + draw() % 60);
  const std::vector<float> row_scale(static_cast<size_t>(n), 1.0f), x = uniform(n);
  const std::vector<int32_t> segment(static_cast<size_t>(tiles), 0);
  std::vector<float> given = uniform(columns), out(static_cast<size_t>(columns)), c(x.size());
  const twa::BasisView basis{
      codes.data(), scales.data(), row_scale.data(), segment.data(), n, tiles, 1, bits};
  void *from = given.data(), *to = out.data();
  const twa::Dtype dtype = twa::Dtype::f32;
  const twa::TensorTable read{&from, &columns, &dtype, 1}, written{&to, &columns, &dtype, 1};
  std::vector<float> weights = uniform(n * columns), most(x.size());  // pack's
  std::vector<void*> rows;
  for (int64_t i = 0; i < n; ++i) rows.push_back(weights.data() + i * columns);
  const std::vector<twa::Dtype> dtypes(rows.size(), dtype);
  const twa::RowTable table{rows.data(), dtypes.data(), &columns, 1, n, &from, &dtype};
  std::vector<uint16_t> packed(scales.size());
  std::vector<double> norms(x.size());
  const twa::PackTarget target{segment.data(), 1,          bits, codes.data(), packed.data(),
                               norms.data(),   most.data()};
  twa::Where where{};
  const auto call = [&] {
    if (std::strcmp(arguments[1], "project") == 0)
      return twa::project_cpu(basis, read, c.data(), 1);
    if (std::strcmp(arguments[1], "reconstruct") == 0)
      return twa::reconstruct_cpu(basis, x.data(), read, written, 1);
    if (std::strcmp(arguments[1], "pack") == 0)
      return twa::pack_cpu(table, nullptr, target, &where, 1);
    return twa::Status::bad_argument;
  };
  const bool done = call() == twa::Status::ok && call() == twa::Status::ok;
  return done ? 0 : 1;
}
