// From run-time sizes to kernels: bits, and how many rows a block takes.
#pragma once

#include <type_traits>

#include "common.h"

namespace twa {

constexpr int kInvalidValue = 1;            // cudaErrorInvalidValue
constexpr int kLaunchOutOfResources = 701;  // cudaErrorLaunchOutOfResources

// Kernels are built for blocks of 16, 32, 48, 64, 80, 96, 128 rows, in units of 16, and at 1 bit,
// where a row is 16 bytes, 256.
constexpr int most_units(int bits) { return bits == 1 ? 16 : 8; }
constexpr int built_units(int units) { return units <= 6 ? units : units <= 8 ? 8 : 16; }
// project: at 8 bits more rows would leave a multiprocessor two blocks, or none.
constexpr int project_most_units(int bits) { return bits == 8 ? 3 : most_units(bits); }
constexpr int kMostShared = 99 << 10;  // of a block on sm_86, sm_89 and sm_120
// Rows, in units of 16, are split evenly over as few blocks as hold them.
constexpr int project_units(int64_t units, int bits) {
  const int64_t most = project_most_units(bits), blocks = (units + most - 1) / most;
  return built_units(static_cast<int>((units + blocks - 1) / blocks));
}
inline int reconstruct_units(int64_t n, int bits) {
  const int most = most_units(bits);
  return n > 16 * most ? most : built_units(static_cast<int>((n + 15) / 16));
}

inline bool is_valid(const BasisView& basis) {
  return valid_bits(basis.bits) && basis.n >= 1 && basis.n <= kMaxRows &&
         reinterpret_cast<uintptr_t>(basis.codes) % 16 == 0;
}

// Small enough for the second-level cache of an A100 or later, half of it: what project reads,
// reconstruct finds there. Larger bases pass once.
inline bool fits_cache(const BasisView& basis) {
  return basis.num_tiles * basis.n * row_bytes(basis.bits) <= 20 << 20;
}

// f(integral_constant bits, integral_constant units).
template <class F>
int with_bits_and_units(int bits, int units, const F& f) {
  return with_bits(bits, [&](auto b) {
    using std::integral_constant;
    switch (units) {
      case 1:
        return f(b, integral_constant<int, 1>());
      case 2:
        return f(b, integral_constant<int, 2>());
      case 3:
        return f(b, integral_constant<int, 3>());
      case 4:
        return f(b, integral_constant<int, 4>());
      case 5:
        return f(b, integral_constant<int, 5>());
      case 6:
        return f(b, integral_constant<int, 6>());
      default:
        if constexpr (decltype(b)::value == 1) {
          if (units == 16) return f(b, integral_constant<int, 16>());
        }
        return f(b, integral_constant<int, 8>());
    }
  });
}

// The stages that step() shares with project and reconstruct.
struct ProjectArguments;
struct ReconstructArguments;
struct UpdateArguments;
int launch_project(const ProjectArguments& arguments, int bits, const Place& where);
int launch_update(const UpdateArguments& arguments, const Place& where);
int launch_reconstruct(const ReconstructArguments& arguments, int bits, const Place& where);

}  // namespace twa
