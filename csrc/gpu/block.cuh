// Statistics of columns, and their reduction over a warp, a block, the segments of a row and the ranks. The
// order of every reduction is fixed.
#pragma once

#include "row_math.cuh"

namespace fsl::gpu {

// Statistics of some columns of a row, in units of x (see enum Stat in args.h), without the target's x.
struct Stats {
  float top = -kInfinity;  // maximum
  float total = 0;         // sum of exp(u), u = unit * (x - maximum)
  float x_sum = 0;
  float top_id = kInfinity;  // global id of the maximum, the smallest of equals
  float moment = 0;          // sum of u * exp(u)
};

// Merges the statistics of two column ranges, `a` left of `b`. Segments, blocks of a cluster and ranks are
// all merged with this function, left to right. If a side's factor is 0, its delta may be -inf and is
// replaced by 0, because -inf * 0 is NaN.
FSL_DEVICE Stats fold(const Stats& a, const Stats& b, float unit) {
  const float top = max(a.top, b.top), reference = not_minus_infinity(top);
  const float delta_a = (a.top - reference) * unit, delta_b = (b.top - reference) * unit;
  const float shrink_a = exp(delta_a), shrink_b = exp(delta_b);
  const float moment_a = fma(shrink_a == 0 ? 0.0f : delta_a, a.total, a.moment);
  const float moment_b = fma(shrink_b == 0 ? 0.0f : delta_b, b.total, b.moment);
  const float tied = a.top_id < b.top_id ? a.top_id : b.top_id;
  return {top, fma(b.total, shrink_b, a.total * shrink_a), a.x_sum + b.x_sum,
          b.top > a.top    ? b.top_id
          : b.top == a.top ? tied
                           : a.top_id,
          fma(moment_b, shrink_b, moment_a * shrink_a)};
}

template <int kStatistics>
FSL_DEVICE Stats load_stats(const float* at) {
  Stats s;
  s.top = at[kMaximum];
  s.total = at[kSumExp];
  if (kStatistics > kSum) s.x_sum = at[kSum];
  if (kStatistics > kArgmax) s.top_id = at[kArgmax], s.moment = at[kMoment];
  return s;
}

// Stores everything except the target's x; the caller stores that.
template <int kStatistics>
FSL_DEVICE void store_stats(float* at, const Stats& s) {
  at[kMaximum] = s.top;
  at[kSumExp] = s.total;
  if (kStatistics > kSum) at[kSum] = s.x_sum;
  if (kStatistics > kArgmax) at[kArgmax] = s.top_id, at[kMoment] = s.moment;
}

template <class T, class Op>
FSL_DEVICE T warp_reduce(T value, Op op) {
  FSL_UNROLL for (int mask = kWarp / 2; mask; mask /= 2) value = op(value, shuffle_xor(value, mask));
  return value;
}

// Block reduce; every thread gets the result. A butterfly reduces each warp and gives all lanes the same
// bits; then every thread combines the warps' results in order. `scratch` holds kMaxWarps values. The caller
// needs a barrier before `scratch` is written again.
template <class T, class Op>
FSL_DEVICE T block_reduce(T value, Op op, T* scratch) {
  value = warp_reduce(value, op);
  if (lane_id() == 0) scratch[warp_id()] = value;
  barrier();
  T result = scratch[0];
  for (int warp = 1; warp < block_warps(); ++warp) result = op(result, scratch[warp]);
  return result;
}

struct Add {
  template <class T>
  FSL_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  FSL_DEVICE float operator()(float a, float b) const { return max(a, b); }
};
struct Min {
  FSL_DEVICE int operator()(int a, int b) const { return a < b ? a : b; }
};

}  // namespace fsl::gpu
