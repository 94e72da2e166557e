// average:  out[j] = sum_i weights[i] * rows[i][j], summed in float64 in the order of the rows,
// rounded once to float32.
//
// Operands   rows: n tables of equal length, each float32, bfloat16 or float16; weights (n,)
//            float64, rows of weight 0 are not read; out (D,) float32.
// Work map   one item = some spans of kSpan columns; the float64 sums of a strip of a span stay in
//            registers while it goes over the rows.
// Bytes      n * D * input read, D * 4 written.
#include "average.h"

namespace twa {
namespace {

constexpr int64_t kSpansPerItem = 8;

void average_portable(const TensorTable& rows, const double* weights, int64_t begin, int count,
                      float* out) {
  average_span(rows.data, rows.dtype, rows.count, weights, begin, count, out);
}
#ifdef TWA_X86
TWA_AVX2 void average_avx2(const TensorTable& rows, const double* weights, int64_t begin, int count,
                           float* out) {
  average_strips<Quantise8>(rows.data, rows.dtype, rows.count, weights, begin, count, out);
}
TWA_AVX512 void average_avx512(const TensorTable& rows, const double* weights, int64_t begin,
                               int count, float* out) {
  average_strips<Quantise16>(rows.data, rows.dtype, rows.count, weights, begin, count, out);
}
#endif

using Average = void (*)(const TensorTable& rows, const double* weights, int64_t begin, int count,
                         float* out);
#ifdef TWA_X86
constexpr Tiers<Average> kTiers =
    wide_tiers<Average>(average_portable, average_avx2, average_avx512);
#else
constexpr Tiers<Average> kTiers{{average_portable}};
#endif

}  // namespace

Status average_cpu(const TensorTable& rows, const double* weights, float* out, int threads) {
  if (rows.count < 1) return Status::bad_argument;
  const int64_t columns = rows.numel[0];
  for (int64_t i = 0; i < rows.count; ++i)
    if (rows.numel[i] != columns || columns < 0) return Status::bad_argument;
  const Average kernel = pick(kTiers);
  const int64_t per_item = kSpan * kSpansPerItem;
  parallel_for((columns + per_item - 1) / per_item, threads, [&](int64_t item) {
    const int64_t end = std::min(columns, (item + 1) * per_item);
    for (int64_t begin = item * per_item; begin < end; begin += kSpan)
      kernel(rows, weights, begin, static_cast<int>(std::min<int64_t>(kSpan, end - begin)),
             out + begin);
  });
  return Status::ok;
}

}  // namespace twa
