// lanes.h against packing.h: every lane, bit width, row and column. Exit status 0 and the number of
// comparisons, or the first difference.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/cuda/lanes.h"

using namespace twa;

namespace {

int64_t compared = 0;
void equal(int found, int expected, const char* what, int bits, int lane, int k) {
  ++compared;
  if (found == expected) return;
  std::printf("%s: %d bits, lane %d, number %d: found %d, expected %d\n", what, bits, lane, k,
              found, expected);
  std::exit(1);
}

int byte_of(uint32_t word, int k) { return static_cast<int>(word >> (8 * k) & 0xff); }
// What byte k of an operand word stands for: a level, or at 1 bit the bit of a field.
int value_of(int bits, uint32_t word, int k) {
  return bits == 1 ? byte_of(word, k) : static_cast<int8_t>(byte_of(word, k));
}
int expected_value(int bits, const uint8_t* row, int column) {
  const int code = get_code(bits, row, column);
  return bits == 1 ? code << bit_field(column) : level(bits, code);
}

template <int kBits>
void project(std::mt19937& random) {
  // Columns of each word of the gradient's operand, as write_limbs() puts them.
  constexpr int kWords = 2 * kProjectSteps<kBits>;
  std::vector<int> at(128, -1), seen(128, 0);
  for (int lane = 0; lane < 32; ++lane) {
    for (int k = 0; k < 4; ++k) {
      const int column = project_column<kBits>(lane, k);
      equal(at[project_word<kBits>(lane) * 4 + k], -1, "two columns in one byte", kBits, lane, k);
      at[project_word<kBits>(lane) * 4 + k] = column;
      ++seen[column];
    }
  }
  for (int column = 0; column < 128; ++column)
    equal(seen[column], 1, "times that a column is in the operand", kBits, 0, column);
  for (int trial = 0; trial < 8; ++trial) {
    alignas(16) uint8_t rows[2 * 128];  // 1 bit: a pair of rows
    for (uint8_t& byte : rows) byte = static_cast<uint8_t>(random());
    for (int lane = 0; lane < 32; ++lane) {
      const int t = lane % 4;
      const uint32_t table[2] = {first_levels<kBits>(0), first_levels<kBits>(1)};
      uint32_t a[kWords * kProjectPasses<kBits>];
      project_operand<kBits>(rows, t, table, a);
      const uint8_t* row = rows + (kBits == 1 ? t / 2 * 16 : 0);
      const int first =
          kBits == 1 ? t % 2 * 16 : t * 8;  // words of the gradient's operand that meet this lane's
      for (int w = 0; w < kWords; ++w)
        for (int k = 0; k < 4; ++k)
          equal(value_of(kBits, a[w], k) +
                    (kShifted<kBits>
                         ? value_of(kBits, a[kWords % (kWords * kProjectPasses<kBits>)+w], k) + 1
                         : 0),
                expected_value(kBits, row, at[(first + w) * 4 + k]), "project", kBits, lane,
                4 * w + k);
    }
  }
  // Rows of the operand are all rows of the block, each where it lies.
  std::vector<int> rows(kProjectRows<kBits>, 0);
  for (int g = 0; g < 16; ++g)
    for (int t = 0; t < 4; t += 2) ++rows[project_row<kBits>(g, t)];
  for (int i = 0; i < kProjectRows<kBits>; ++i)
    equal(rows[i], kBits == 1 ? 1 : 2, "times that a row is in the operand", kBits, 0, i);
}

template <int kBits, int kPart>
void reconstruct_part(std::mt19937& random, std::vector<int>& seen) {
  constexpr int kStride = 16 * kBits;
  std::vector<uint8_t> rows(4 * kStride);
  for (int g = 0; g < 8; ++g) {
    for (uint8_t& byte : rows) byte = static_cast<uint8_t>(random());
    for (int word = 0; word < (kBits == 8 || kBits == 4 ? 2 : 1); ++word) {
      const int from = kBits == 8   ? 64 * kPart + 8 * g + 4 * word
                       : kBits == 4 ? 8 * g + 4 * word
                       : kBits == 1 ? 4 * (g % 4)
                                    : 4 * g;
      const uint32_t table[2] = {first_levels<kBits>(0), first_levels<kBits>(1)};
      uint32_t w[4], top[4], out[8];
      for (int j = 0; j < 4; ++j) {
        std::memcpy(&w[j], rows.data() + j * kStride + from, 4);
        if (kBits == 3) {
          std::memcpy(&top[j], rows.data() + j * kStride + 32 + 4 * (g % 4), 4);
          top[j] = top_bits(top[j], g / 4);
        }
      }
      if (kBits == 1) {
        uint32_t bytes[4];
        transpose_bytes(w[0], w[1], w[2], w[3], bytes);
        for (int p = 0; p < 4; ++p) w[p] = bytes[p];
      }
      reconstruct_operand<kBits, kBits == 8 ? 0 : kPart>(w, top, g, table, out);
      for (int p = 0; p < 4; ++p) {
        const int m = kBits == 8 || kBits == 4 ? 4 * kPart + 2 * word + p / 2 : 2 * kPart + p / 2;
        const int column = reconstruct_column<kBits>(m, p % 2, g);
        ++seen[column];
        equal(column, reconstruct_column<kBits>(m, p % 2, 0) + reconstruct_column<kBits>(0, 0, g),
              "columns add up", kBits, g, p);
        for (int j = 0; j < 4; ++j)
          equal(value_of(kBits, out[p], j) +
                    (kShifted<kBits> ? value_of(kBits, out[4 + p], j) + 1 : 0),
                expected_value(kBits, rows.data() + j * kStride, column), "reconstruct", kBits, g,
                4 * p + j);
      }
    }
  }
}

template <int kBits>
void reconstruct(std::mt19937& random) {
  std::vector<int> seen(128, 0);
  reconstruct_part<kBits, 0>(random, seen);
  reconstruct_part<kBits, 1>(random, seen);
  if constexpr (kBits <= 3)
    reconstruct_part<kBits, 2>(random, seen), reconstruct_part<kBits, 3>(random, seen);
  for (int column = 0; column < 128; ++column)
    equal(seen[column], 1, "times that a column is computed", kBits, 0, column);
  for (int t = 0; t < 4; ++t)
    for (int j = 0; j < 8; ++j)
      equal(reconstruct_byte<kBits>(reconstruct_row<kBits>(t, j)), 8 * t + j, "byte of a row",
            kBits, t, j);
}

template <int kBits>
void replay(std::mt19937& random) {
  std::vector<int> seen(128, 0);
  alignas(16) uint8_t row[128];
  for (uint8_t& byte : row) byte = static_cast<uint8_t>(random());
  for (int t = 0; t < kReplayLanes<kBits>; ++t) {
    uint32_t mine[4] = {}, third[2] = {}, levels[8] = {};
    std::memcpy(mine, row + kReplayBytes<kBits> * t, kReplayBytes<kBits>);
    if (kBits == 3) std::memcpy(third, row + 32 + 8 * (t % 2), 8);
    const uint32_t table[2] = {replay_table<kBits>(0), replay_table<kBits>(1)};
    if constexpr (kBits > 1) replay_levels<kBits>(mine, third, t, table, levels);
    for (int e = 0; e < kReplayColumns<kBits> / 4; ++e) {
      for (int j = 0; j < 4; ++j) {
        const int column = replay_column<kBits>(t, replay_sum<kBits>(e, j));
        ++seen[column];
        const float found = kBits == 1 ? replay_sign(mine[0], 8 * j + e, 127.0f)
                                       : replay_level<kBits>(levels[e], j);
        equal(static_cast<int>(found), level(kBits, get_code(kBits, row, column)), "replay", kBits,
              t, 4 * e + j);
      }
      const int first = replay_column<kBits>(t, 4 * e);
      equal(first % 4, 0, "four sums begin at a multiple of four", kBits, t, e);
      equal(replay_column<kBits>(t, 4 * e + 3), first + 3, "four neighbours", kBits, t, e);
    }
  }
  for (int column = 0; column < 128; ++column)
    equal(seen[column], 1, "times that a column is summed", kBits, 0, column);
}

template <int kBits>
void codes() {
  for (int k = -127; k <= 127; ++k)
    equal(nearest_code_of<kBits>(k), nearest_code(kBits, k), "nearest_code", kBits, 0, k);
  for (int code = 0; code < 1 << kBits; ++code)
    equal(level_of<kBits>(code), level(kBits, code), "level", kBits, 0, code);
}

void fixed_point(std::mt19937& random) {
  for (int trial = 0; trial < 100000; ++trial) {
    const int most3 = 0x7f7f7f, most4 = most3 * 128;
    const int q3 = static_cast<int>(random() % (2u * most3 + 1)) - most3,
              q4 = static_cast<int>(random() % (2u * most4 + 1)) - most4;
    int64_t sum3 = 0, sum4 = 0;
    for (int k = 3; k >= 0; --k) {
      sum3 = 256 * sum3 + static_cast<int8_t>(limbs3(q3) >> (8 * k));
      sum4 = 256 * sum4 + static_cast<int8_t>(limbs4(q4) >> (8 * k));
    }
    equal(static_cast<int>(sum3), q3, "limbs3", 0, 0, trial);
    equal(static_cast<int>(sum4), q4, "limbs4", 0, 0, trial);
    // The largest number becomes an integer below 0x7f7f7f, and loses nothing that float32 has but
    // its last bit.
    const uint32_t bits = random() % 0x7f800000u;
    const float v = bits_float(bits);
    const double scaled = std::ldexp(static_cast<double>(v), 23 - fixed_exponent(bits));
    equal(scaled <= most3, 1, "fixed_exponent is large enough", 0, 0, trial);
    if (bits >= 0x00800000u)
      equal(scaled > most3 / 2 - 1, 1, "fixed_exponent is small enough", 0, 0, trial);
  }
  for (uint32_t byte = 0; byte <= 0x7e; ++byte)
    equal(e4m3_shifted(byte) * 0x1p120f == e4m3_to_float(static_cast<uint8_t>(byte)), 1, "e4m3", 0,
          0, byte);
}

}  // namespace

int main() {
  std::mt19937 random(7);
  project<8>(random), project<4>(random), project<3>(random), project<2>(random),
      project<1>(random);
  reconstruct<8>(random), reconstruct<4>(random), reconstruct<3>(random), reconstruct<2>(random),
      reconstruct<1>(random);
  for (int trial = 0; trial < 64; ++trial)
    replay<8>(random), replay<4>(random), replay<3>(random), replay<2>(random), replay<1>(random);
  codes<8>(), codes<4>(), codes<3>(), codes<2>(), codes<1>();
  fixed_point(random);
  std::printf("%lld comparisons\n", static_cast<long long>(compared));
}
