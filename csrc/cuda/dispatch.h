// From run-time sizes to kernels: bits, and how many groups of 32 rows a block takes.
#pragma once

#include <type_traits>

#include "common.h"

namespace twa {

constexpr int kInvalidValue = 1;         // cudaErrorInvalidValue
constexpr int kMisalignedAddress = 716;  // cudaErrorMisalignedAddress

// Groups of 32 rows that a block can take: two slots of 96 rows are 24 KiB at 8 bits; at 1 bit a row is 16 bytes.
constexpr int project_most_groups(int bits) { return bits == 8 ? 3 : bits == 1 ? 8 : 4; }
constexpr int reconstruct_most_groups(int bits) { return bits == 1 ? 8 : 4; }
constexpr int built_groups(int groups) { return groups <= 4 ? groups : 8; }
// Rows are split evenly over as few blocks as hold them.
inline int project_groups(int64_t n, int bits) {
  const int64_t groups = (n + 31) / 32, most = project_most_groups(bits), blocks = (groups + most - 1) / most;
  return built_groups(static_cast<int>((groups + blocks - 1) / blocks));
}
inline int reconstruct_groups(int64_t n, int bits) {
  const int most = reconstruct_most_groups(bits);
  return n > 32 * most ? most : built_groups(static_cast<int>((n + 31) / 32));
}

inline bool is_valid(const BasisView& basis) {
  return valid_bits(basis.bits) && basis.n >= 1 && basis.n <= kMaxRows && reinterpret_cast<uintptr_t>(basis.codes) % 16 == 0;
}

// f(integral_constant bits, integral_constant groups).
template <class F>
int with_bits_and_groups(int bits, int groups, const F& f) {
  const auto with_groups = [&](auto b) {
    switch (groups) {
      case 1:
        return f(b, std::integral_constant<int, 1>());
      case 2:
        return f(b, std::integral_constant<int, 2>());
      case 3:
        return f(b, std::integral_constant<int, 3>());
      case 4:
        return f(b, std::integral_constant<int, 4>());
      default:
        return f(b, std::integral_constant<int, decltype(b)::value == 1 ? 8 : 4>());
    }
  };
  switch (bits) {
    case 8:
      return with_groups(std::integral_constant<int, 8>());
    case 4:
      return with_groups(std::integral_constant<int, 4>());
    case 3:
      return with_groups(std::integral_constant<int, 3>());
    case 2:
      return with_groups(std::integral_constant<int, 2>());
    default:
      return with_groups(std::integral_constant<int, 1>());
  }
}

// The stages that step() shares with project and reconstruct.
struct ProjectArguments;
struct ReconstructArguments;
struct UpdateArguments;
int launch_project(const ProjectArguments& arguments, int bits, int device, void* stream);
int launch_update(const UpdateArguments& arguments, int device, void* stream);
int launch_reconstruct(const ReconstructArguments& arguments, int bits, int device, void* stream);

}  // namespace twa
