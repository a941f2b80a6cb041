// The row kernels of one instruction set. Each works on a range of columns of one row.
#pragma once

#include "../args.h"

namespace fsl {

// Rows are cut into chunks at fixed columns. So the order of every sum, and every bit of the result, does not
// depend on the number of threads. 8192 columns of fp32 are 32 KiB, so the second pass that chunk_stats
// sometimes takes over a chunk reads the L1 cache.
constexpr int64_t kChunk = 8192;

// Statistics of some columns of a row, in units of x (see RowMath::unit). Merging keeps the maximum exact;
// sums are added in the order of the columns.
struct Partial {
  float max = -__builtin_inff();
  float sum_exp = 0;   // sum of exp(u), u = unit * (x - max)
  float sum = 0;       // sum of x
  float moment = 0;    // sum of u * exp(u)
  int64_t argmax = 0;  // first column that holds the maximum
};

// The constants of one row's gradient, which is
// dz/dx * (p * (softmax_factor + tilt * u) - smoothing - [target] * target_factor) with p = exp(u) and
// u = unit * (x - reference). softmax_factor and tilt include the division by the sum of p. Without the
// gradient of an entropy tilt is not used.
struct RowConstants {
  float reference, softmax_factor, smoothing, target_factor;
  int64_t target_column;  // outside the row: none
  float tilt;
};

struct RowKernels {
  const char* isa;
  // Merges columns [begin, end) of a row into `partial`, in order. `begin` is a multiple of kChunk.
  void (*stats)(const StatsArgs&, const void* row, int64_t begin, int64_t end, Partial* partial);
  void (*grad)(const GradArgs&, const RowConstants&, const void* row, void* out, int64_t begin, int64_t end);
  void (*rescale)(Dtype dtype, void* row, int64_t columns, float ratio);
  void (*merge)(Partial* into, const Partial& next, float unit);
  float (*target_logit)(const StatsArgs&, const void* row, int64_t column);
  void (*exp)(const float* in, float* out, int64_t n, float unit_log2);  // for the tests of the polynomial
};

}  // namespace fsl
