// Fixed test data for tiers.cpp, the same on every machine: a small generator of integers, and
// tensors that end where a page begins that nobody may touch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "twa.h"

struct Random {
  uint64_t state;
  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
  }
  int64_t below(int64_t count) { return static_cast<int64_t>(bits()) % count; }
  float unit() { return static_cast<float>(static_cast<int32_t>(bits()) >> 8) * 0x1p-23f; }
};

// Memory whose last byte is the last of a page: reads and writes past it crash.
class Guarded {
 public:
  explicit Guarded(int64_t bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), size = static_cast<size_t>(bytes);
    size_ = (size + page - 1) / page * page + page;
    base_ = static_cast<uint8_t*>(
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + size_ - page, page, PROT_NONE)) {
      std::perror("guarded memory");
      std::exit(2);
    }
    data = base_ + size_ - page - size;
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
  uint8_t* data;

 private:
  uint8_t* base_;
  size_t size_;
};
using Memory = std::unique_ptr<Guarded>;
inline Memory guarded(int64_t bytes) { return std::make_unique<Guarded>(bytes); }

enum class Kind { plain, wide, zeros, tiny, huge, spike, edge, bad };
constexpr const char* kKindNames[] = {"plain", "wide",  "zeros", "tiny",
                                      "huge",  "spike", "edge",  "bad"};
constexpr Kind kKinds[] = {Kind::plain, Kind::wide,  Kind::zeros, Kind::tiny,
                           Kind::huge,  Kind::spike, Kind::edge,  Kind::bad};

inline float number(Random& random, Kind kind) {
  const uint32_t bits = random.bits(), sign = bits & 0x80000000u;
  switch (kind) {
    case Kind::wide:
      return random.unit() * twa::pow2f(static_cast<int>(bits % 120) - 60);
    case Kind::zeros:
      return twa::bits_float(sign);
    case Kind::tiny:  // subnormal
      return twa::bits_float(bits & 0x807fffffu);
    case Kind::huge:
      return twa::bits_float(sign | 0x7e800000u | (bits & 0xffffffu) % 0x800000u);
    case Kind::spike:
      return bits % 300 == 0 ? twa::bits_float(sign | 0x7f7fffffu) : random.unit() * 0x1p-100f;
    case Kind::edge:  // limbs of the most: 127, 127, 127 or 127, -128, -128
      return (bits % 2 ? 8355711.0f : 8290176.0f) * 0x1p-23f;
    case Kind::bad:
      return bits % 400 == 0   ? twa::bits_float(0x7fc00000u)
             : bits % 401 == 0 ? twa::bits_float(sign | 0x7f800000u)
                               : random.unit();
    default:
      return random.unit();
  }
}
// The same in a dtype of 16 bits: numbers that overflow become the largest, subnormal ones such of
// that dtype.
inline uint16_t number16(Random& random, Kind kind, twa::Dtype dtype) {
  const bool half = dtype == twa::Dtype::f16;
  if (kind == Kind::tiny) return static_cast<uint16_t>(random.bits() & (half ? 0x83ffu : 0x807fu));
  const float f = number(random, kind);
  const uint16_t h = half ? twa::float_to_f16(f) : twa::float_to_bf16(f),
                 infinity = half ? 0x7c00 : 0x7f80;
  const bool overflow = kind != Kind::bad && (h & 0x7fff) == infinity;
  return static_cast<uint16_t>(overflow ? h - 1 : h);
}

inline int64_t size_of(twa::Dtype dtype) { return dtype == twa::Dtype::f32 ? 4 : 2; }
inline void fill(Random& random, Kind kind, twa::Dtype dtype, void* to, int64_t count) {
  for (int64_t c = 0; c < count; ++c)
    if (dtype == twa::Dtype::f32)
      static_cast<float*>(to)[c] = number(random, kind);
    else
      static_cast<uint16_t*>(to)[c] = number16(random, kind, dtype);
}

// Tensors of these sizes, `repeats` of each: filled, or all bytes 0xee.
struct Tensors {
  std::vector<Memory> memory;
  std::vector<void*> data;
  std::vector<int64_t> numel;
  std::vector<twa::Dtype> dtype;
  int64_t repeats;

  // dtype: that of the k-th is (dtype + k) % 3, or float32 for all if it is negative.
  Tensors(const std::vector<int64_t>& sizes, int first_dtype, int64_t repeats = 1)
      : numel(sizes), repeats(repeats) {
    for (const int64_t size : sizes)
      for (int64_t i = 0; i < repeats; ++i) {
        const auto k = static_cast<int>(dtype.size());
        dtype.push_back(first_dtype < 0 ? twa::Dtype::f32
                                        : static_cast<twa::Dtype>((first_dtype + k) % 3));
        memory.push_back(guarded(size * size_of(dtype.back())));
        data.push_back(memory.back()->data);
        std::memset(data.back(), 0xee, static_cast<size_t>(size * size_of(dtype.back())));
      }
  }
  Tensors filled(Random& random, Kind kind) && {
    for (size_t k = 0; k < data.size(); ++k) fill(random, kind, dtype[k], data[k], size(k));
    return std::move(*this);
  }
  int64_t size(size_t k) const { return numel[k / static_cast<size_t>(repeats)]; }
  twa::TensorTable table() const {
    return {data.data(), numel.data(), dtype.data(), static_cast<int64_t>(numel.size())};
  }
};

// A basis of random bytes, in random segments.
struct RandomBasis {
  Memory codes, scales, row_scale;
  std::vector<int32_t> tile_segment;
  int64_t n, segments;
  int bits;

  RandomBasis(Random& random, const std::vector<int64_t>& sizes, int64_t n, int bits, Kind kind,
              int64_t segments = 3)
      : n(n), segments(segments), bits(bits) {
    const int64_t tiles = twa::total_tiles(sizes.data(), static_cast<int64_t>(sizes.size())),
                  bytes = tiles * n * twa::row_bytes(bits);
    codes = guarded(bytes), scales = guarded(tiles * n), row_scale = guarded(n * segments * 4);
    for (int64_t k = 0; k < bytes; ++k)  // edge: levels of one sign, the largest sums
      codes->data[k] =
          static_cast<uint8_t>(kind == Kind::edge ? (random.below(3) ? 0 : 255) : random.bits());
    for (int64_t k = 0; k < tiles * n; ++k)
      scales->data[k] = static_cast<uint8_t>(kind == Kind::edge ? 0x38 : random.below(0x7f));
    for (int64_t k = 0; k < n * segments; ++k)
      row_scale->as<float>()[k] = kind == Kind::edge ? 1.0f
                                  : kind == Kind::huge
                                      ? random.unit() * 0x1p-9f  // x * it is finite
                                      : number(random, Kind::wide);
    tile_segment.assign(static_cast<size_t>(tiles), 0);
    for (size_t t = 1; t < tile_segment.size(); ++t)
      tile_segment[t] =
          random.below(3) ? tile_segment[t - 1] : static_cast<int32_t>(random.below(segments));
  }
  twa::BasisView view() const {
    return {codes->data,
            scales->data,
            row_scale->as<float>(),
            tile_segment.data(),
            n,
            static_cast<int64_t>(tile_segment.size()),
            segments,
            bits};
  }
};
