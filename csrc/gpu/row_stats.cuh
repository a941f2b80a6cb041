// Softmax statistics of each scored row, from one read of it.
//
// A row is cut into segments of a fixed number of columns, and a segment into tiles. Each thread keeps the
// running maximum and sums of its own columns; it rescales once per tile and exchanges nothing. At the end of
// a segment the block reduces its threads, and segments are folded left to right. If there are too few rows
// for the chip, several blocks share a row's segments and write their statistics to memory, and a second
// kernel folds them with the same function in the same order, so the bits are the same. The columns that a
// thread takes depend on neither dtype nor address, so the bits do not either.
#pragma once

#include "block.cuh"
#include "row_units.cuh"
#include "rows.cuh"

namespace fsl::gpu {

// How the blocks of row_stats share a row.
struct RowSplit {
  Divisor blocks;      // per row
  int segment;         // columns
  int segments, each;  // of a row, of a block
  float* parts;        // [N, segments, statistics] if blocks > 1; kTarget is unused
};

// One thread's statistics of its own columns, in units of x.
struct Running {
  float top = -kInfinity;
  float total = 0;  // sum of 2^u with u = x * unit_log2 - rounded, from reference_of(top)
  float x_sum = 0;
  int top_at = 0x7fffffff;
  float moment = 0;  // sum of u * 2^u
};

// Sum of eight numbers, added in pairs.
FSL_DEVICE float sum_eight(const float* x) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// Adds a thread's kRuns vectors of a tile to its statistics. Vector r starts at column first + r * stride.
// `eight(x, r)` writes its fp32 logits to x, not capped, -inf for columns that do not exist. `sum(x, r)` adds
// up the columns that exist. A softcap keeps the order of logits, so only the highest is capped before the
// exponentials.
template <int kStatistics, int kSoftcap, class Eight, class Sum>
FSL_DEVICE void accumulate(Running& s, const Eight& eight, const Sum& sum, int first, int stride,
                           const Units& z) {
  float highest = kSoftcap ? -kInfinity : s.top, x[8];
  FSL_UNROLL for (int r = 0; r < kRuns; ++r) {
    eight(x, r);
    FSL_UNROLL for (int i = 0; i < 8; ++i) highest = max(highest, x[i]);
    optimisation_barrier(highest);
  }
  const float top = kSoftcap ? max(s.top, capped<kSoftcap>(highest, z)) : highest;
  if (kStatistics > kArgmax && top > s.top) {
    FSL_UNROLL for (int r = kRuns - 1; r >= 0; --r) {
      eight(x, r);
      FSL_UNROLL for (int i = 7; i >= 0; --i) s.top_at = x[i] == highest ? first + r * stride + i : s.top_at;
    }
  }
  const Reference reference = reference_of(not_minus_infinity(top), z);
  const float delta = s.top * reference.unit_log2 - reference.rounded, shrink = exp2(delta);
  float total = 0, x_sum = 0, moment = 0;
  FSL_UNROLL for (int r = 0; r < kRuns; ++r) {
    float e[8], u[8];
    scheduling_barrier();
    eight(x, r);
    FSL_UNROLL for (int i = 0; i < 8; ++i) x[i] = capped<kSoftcap>(x[i], z);
    FSL_UNROLL for (int i = 0; i < 8; ++i) u[i] = fma(x[i], reference.unit_log2, -reference.rounded);
    FSL_UNROLL for (int i = 0; i < 8; ++i) e[i] = exp2(u[i]);
    total += sum_eight(e);
    if (kStatistics > kArgmax) {
      FSL_UNROLL for (int i = 0; i < 8; ++i) u[i] = e[i] == 0 ? 0.0f : e[i] * u[i];
      moment += sum_eight(u);
    }
    if (kStatistics > kSum) {
      x_sum += sum(x, r);
      optimisation_barrier(x_sum);
    }
    optimisation_barrier(total);
  }
  if (kStatistics > kArgmax) s.moment = fma(shrink == 0 ? 0.0f : delta, s.total, s.moment) * shrink + moment;
  if (kStatistics > kSum) s.x_sum += x_sum;
  s.total = fma(s.total, shrink, total);
  s.top = top;
}

template <class T, int kStatistics, int kSoftcap, bool kShifted>
struct RowStats {
  // A tile whose chunks all lie in the row: kRuns independent loads, then the arithmetic.
  static FSL_DEVICE void whole_tile(Running& s, const Row& row, int first, const Units& z) {
    const int stride = 8 * block_threads();
    uint32_t words[kRuns][T::kWords];
    FSL_UNROLL for (int r = 0; r < kRuns; ++r)
        load_eight<T, kShifted>(words[r], row.start + int64_t{first + r * stride} * T::kBytes, row.skew);
    const auto eight = [&](float* x, int r) {
      FSL_UNROLL for (int i = 0; i < 8; ++i) x[i] = T::element(words[r], i);
    };
    accumulate<kStatistics, kSoftcap>(
        s, eight, [](const float* x, int) { return sum_eight(x); }, first, stride, z);
  }

  // The tile at either end of a row. Vectors that lie in the row are loaded whole, others logit by logit.
  static FSL_DEVICE void edge_tile(Running& s, const Row& row, int first, int end, const Units& z) {
    const int stride = 8 * block_threads();
    uint32_t words[kRuns][T::kWords];
    FSL_UNROLL for (int r = 0; r < kRuns; ++r) {
      const int column = first + r * stride;
      if (column + 8 <= end && chunks_inside<T, kShifted>(row, column, 8, row.skew)) {
        load_eight<T, kShifted>(words[r], row.start + int64_t{column} * T::kBytes, row.skew);
      } else {
        float x[8];
        FSL_UNROLL for (int i = 0; i < 8; ++i) x[i] =
            column + i < end ? load_one<T>(row, column + i) : -kInfinity;
        T::put(words[r], x);
      }
    }
    const auto eight = [&](float* x, int r) {
      FSL_UNROLL for (int i = 0; i < 8; ++i) x[i] = T::element(words[r], i);
    };
    const auto sum = [&](const float* x, int r) {
      float there[8];
      FSL_UNROLL for (int i = 0; i < 8; ++i) there[i] = first + r * stride + i < end ? x[i] : 0.0f;
      return sum_eight(there);
    };
    accumulate<kStatistics, kSoftcap>(s, eight, sum, first, stride, z);
  }

  // Adds columns [begin, end) to `s`.
  static FSL_DEVICE Running columns(const Row& row, int begin, int end, const Units& z, Running s = {}) {
    const int tile = 8 * kRuns * block_threads(), mine = 8 * thread_id();
    for (int first = begin; first < end; first += tile) {
      for (; first + tile <= end && chunks_inside<T, kShifted>(row, first, tile, row.skew); first += tile)
        whole_tile(s, row, first + mine, z);
      if (first < end) edge_tile(s, row, first + mine, end, z);
      if (!kShifted || kUnalignedAccess) break;  // only the last tile is not whole
    }
    return s;
  }

  // Block reduce; every thread gets the result. A thread's sums include the factor 2^rest of reference_of;
  // the result does not.
  static FSL_DEVICE Stats reduce_block(const Running& s, const Units& z, int64_t vocab_start) {
    FSL_SHARED(float, tops, kMaxWarps);
    FSL_SHARED(float, totals, kMaxWarps);
    const float top = block_reduce(s.top, Max{}, tops);
    const Reference reference = reference_of(not_minus_infinity(top), z);
    const float delta = (s.top * reference.unit_log2 - reference.rounded) - reference.rest,
                shrink = exp2(delta);
    Stats result;
    result.top = top;
    result.total = block_reduce(s.total * shrink, Add{}, totals);
    // The maximum's own term is 1 before rounding. A sum below 1 could make a loss negative.
    if (top > -kInfinity && result.total < 1) result.total = 1;
    if (kStatistics > kSum) {
      FSL_SHARED(float, sums, kMaxWarps);
      result.x_sum = block_reduce(s.x_sum, Add{}, sums);
    }
    if (kStatistics > kArgmax) {
      FSL_SHARED(int, ids, kMaxWarps);
      FSL_SHARED(float, moments, kMaxWarps);
      const int at = block_reduce(s.top == top ? s.top_at : 0x7fffffff, Min{}, ids);
      result.top_id = static_cast<float>(vocab_start + at);
      const float moment = fma(shrink == 0 ? 0.0f : delta, s.total, s.moment) * shrink;
      result.moment = block_reduce(moment, Add{}, moments) * kLn2;
    }
    barrier();  // the scratch is written again for the next segment
    return result;
  }
};

// x of the row's target, 0 if this shard does not hold it.
template <class T, int kSoftcap>
FSL_DEVICE float target_value(const StatsArgs& a, const Row& row, uint32_t n, const Units& z) {
  const int own = own_column(a.target[n], a.math.vocab_start, a.logits);
  return own < 0 ? 0.0f : capped<kSoftcap>(load_one<T>(row, own), z);
}

template <class T, int kStatistics, int kSoftcap, bool kShifted>
FSL_KERNEL(512, kStatistics > kSum || kSoftcap ? 4 : 8)
row_stats_kernel(StatsArgs a, Units z_of_all, RowSplit split) {
  const Divided block = divide(block_id(), split.blocks);
  const uint32_t n = block.quotient, part = block.rest;
  const bool alone = split.blocks.value == 1;
  const int valid = static_cast<int>(a.logits.valid);
  float* stats = a.stats + int64_t{n} * kStatistics;
  if (a.weight[n] == 0) {
    if (part == 0 && thread_id() < kStatistics) stats[thread_id()] = 0;
    return;
  }
  // Only the kernels for metrics have registers to spare for units of the row.
  constexpr bool kScaled = kStatistics > kArgmax && !kSoftcap;
  const Units z = kScaled ? units_of_row(z_of_all, a.scale, n) : z_of_all;
  const Row row = row_at<T>(a.logits, n);
  Stats all;
  const int from = static_cast<int>(part) * split.each;
  for (int segment = from; segment < split.segments && segment < from + split.each; ++segment) {
    const int begin = segment * split.segment,
              end = valid - begin < split.segment ? valid : begin + split.segment;
    using Kernel = RowStats<T, kStatistics, kSoftcap, kShifted>;
    const Stats s = Kernel::reduce_block(Kernel::columns(row, begin, end, z), z, a.math.vocab_start);
    if (alone) all = fold(all, s, z.unit);
    else if (thread_id() == 0)
      store_stats<kStatistics>(split.parts + (int64_t{n} * split.segments + segment) * kStatistics, s);
  }
  if (thread_id() != 0 || part != 0) return;
  stats[kTarget] = target_value<T, kSoftcap>(a, row, n, z);
  if (alone) store_stats<kStatistics>(stats, all);
}

// Folds the parts of each row, one row per thread. row_stats_kernel has already written the target's x.
template <int kStatistics>
FSL_KERNEL(256, 4)
fold_segments_kernel(const float* parts, const float* weight, float* stats, int64_t rows, int segments,
                     float unit, const float* scale) {
  const int64_t n = int64_t{block_id()} * block_threads() + thread_id();
  if (n >= rows || weight[n] == 0) return;
  if (kStatistics > kArgmax && scale) unit = scale[n];
  Stats all;
  for (int segment = 0; segment < segments; ++segment)
    all = fold(all, load_stats<kStatistics>(parts + (n * segments + segment) * kStatistics), unit);
  store_stats<kStatistics>(stats + n * kStatistics, all);
}

}  // namespace fsl::gpu
