// Launches the kernels over vectors of N rows.
#include "dispatch.h"
#include "merge.cuh"
#include "reduce.cuh"
#include "row_targets.cuh"

namespace fsl::gpu {

void row_targets(const TargetsArgs& a, void* stream) {
  const int threads = 512;  // many, because block 0 reads all rows and needs loads in flight
  launch("row_targets", row_targets_kernel, {1 + (a.batch * a.seq + threads - 1) / threads, threads}, stream,
         a);
}

void merge(const MergeArgs& a, const Metrics& metrics, void* stream) {
  const int threads = 256;
  with_statistics(static_cast<Want>(a.statistics), [&](auto statistics) {
    launch("merge", merge_kernel<statistics()>, {(a.rows + threads - 1) / threads, threads}, stream, a,
           metrics);
  });
}

void reduce(const ReduceArgs& a, void* stream) { launch("reduce", reduce_kernel, {1, 512}, stream, a); }

// The losses [N], the statistics [N, want], then those of the segments if several blocks share a row.
int64_t loss_scratch(const Rows& logits, const RowMath& math, const Chip& chip) {
  const Want want = wanted_by(math);
  const StatsArgs stats{logits, math, nullptr, nullptr, want, nullptr};
  return logits.count() * (1 + static_cast<int>(want)) + row_stats_parts(stats, chip);
}

void loss(const LossArgs& a, float* scratch, const Chip& chip, void* stream) {
  const Want want = wanted_by(a.math);
  const int64_t rows = a.logits.count(), statistics = static_cast<int>(want);
  const bool reduced = a.reduction != Reduction::none;
  float *losses = reduced ? scratch : a.result, *stats = scratch + rows, *parts = stats + rows * statistics;
  const TargetsArgs& t = a.targets;
  row_targets(t, stream);
  row_stats({a.logits, a.math, t.target, t.weight, want, stats}, parts, chip, stream);
  merge({stats, 1, rows, statistics, 0, t.target, t.weight, a.math, losses, a.normalizer}, {}, stream);
  if (reduced)
    reduce({losses, rows, a.reduction == Reduction::mean ? t.weight_sum : nullptr, a.result}, stream);
}

}  // namespace fsl::gpu
