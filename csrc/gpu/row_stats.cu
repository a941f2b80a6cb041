// Selects and launches a row_stats kernel.
#include "row_stats.cuh"

#include "dispatch.h"
#include "launch_table.h"

namespace fsl::gpu {
namespace {

// How many segments a row is cut into, and how many blocks share them.
struct SegmentPlan {
  int64_t segments;
  int blocks;
};

SegmentPlan plan_segments(const StatsArgs& a, const Chip& chip) {
  const int segment = line_for(chip, Kernel::row_stats, a.logits.columns).segment;
  const int64_t segments = (a.logits.valid + segment - 1) / segment;
  return {segments, splits(chip, a.logits.count(), segments)};
}

}  // namespace

int64_t row_stats_parts(const StatsArgs& a, const Chip& chip) {
  const SegmentPlan plan = plan_segments(a, chip);
  return plan.blocks > 1 ? a.logits.count() * plan.segments * static_cast<int>(a.want) : 0;
}

void row_stats(const StatsArgs& a, float* parts, const Chip& chip, void* stream) {
  check_rows(a.logits);
  const Line& line = line_for(chip, Kernel::row_stats, a.logits.columns);
  const SegmentPlan plan = plan_segments(a, chip);
  const int segments = static_cast<int>(plan.segments), each = (segments + plan.blocks - 1) / plan.blocks;
  const RowSplit split{Divisor(plan.blocks), line.segment, segments, each, parts};
  const Grid grid{a.logits.count() * plan.blocks, line.threads};
  with_dtype(a.logits.dtype, [&](auto dtype) {
    with_statistics(a.want, [&](auto statistics) {
      with_cap(a.math, [&](auto softcap) {
        with_bool(common_skew(a.logits) != 0, [&](auto shifted) {
          launch("row_stats", row_stats_kernel<decltype(dtype), statistics(), softcap(), shifted()>, grid,
                 stream, a, units_of(a.math), split);
        });
      });
    });
  });
  if (plan.blocks == 1) return;
  const int threads = 256;
  const int64_t rows = a.logits.count();
  with_statistics(a.want, [&](auto statistics) {
    launch("fold_segments", fold_segments_kernel<statistics()>, {(rows + threads - 1) / threads, threads},
           stream, parts, a.weight, a.stats, rows, segments, a.math.unit(), a.scale);
  });
}

}  // namespace fsl::gpu
