// The row kernels of one instruction set, over a range of columns of one row.
#pragma once

#include "../args.h"

namespace fsl {

// Columns are cut at fixed places, so the order of every sum, and with it every bit of the result, is the
// same however many threads there are. 8192 columns of the widest dtype are 32 KiB: where a chunk takes a
// second pass, because its first columns misled, it is still in the L1 cache.
constexpr int64_t kChunk = 8192;

// Statistics of some columns of a row, in units of x (see RowMath::unit); merging is exact in the maximum
// and ordered in the sums.
struct Partial {
  float max = -__builtin_inff();
  float denominator = 0;  // sum of exp(u), u = unit * (x - max)
  float sum = 0;          // sum of x
  float weighted = 0;     // sum of u * exp(u)
  int64_t argmax = 0;     // first column that holds the maximum
};

// What the gradient of one row needs besides its logits:
// dz/dx * (p * softmax_factor - smoothing), and target_factor less at the target.
// p = exp(unit * (x - reference)), whose sum the factor holds.
struct RowConstants {
  float reference, softmax_factor, smoothing, target_factor;
  int64_t target_column;  // outside the row: none
};

struct RowKernels {
  const char* isa;
  // Columns [begin, end) of a row, begin a multiple of kChunk, merged in order into `partial`.
  void (*stats)(const StatsArgs&, const void* row, int64_t begin, int64_t end, Partial* partial);
  void (*grad)(const GradArgs&, const RowConstants&, const void* row, void* out, int64_t begin, int64_t end);
  void (*rescale)(Dtype dtype, void* row, int64_t columns, float factor);
  void (*merge)(Partial* into, const Partial& next, float unit);
  float (*target_logit)(const StatsArgs&, const void* row, int64_t column);
  void (*exp)(const float* in, float* out, int64_t n, float scale2);  // for the tests of the polynomial
};

}  // namespace fsl
